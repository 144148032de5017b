#!/usr/bin/env bash
# Guessed: imageio.v3.imread("b.dcm") returns the radiograph in b.dcm, whatever else the folder
# holds.
# Instead: it searches the file's folder and all folders below it for DICOM files, and if they are
# of more than one series (a radiograph of its own is one), returns the series that sorts first by
# its UID: all three files of a folder give the third part's picture, and the progress that it
# prints says nothing of that. Alone in its folder, each file is right; so are imageio.v2.imread
# and pydicom.
# Why it matters: a folder of radiographs becomes one part many times over. A detector fitted to
# them has seen one part, every test photo gets the same score, and the same file scores anew when
# it is moved. A folder of thousands is searched for each file.
# Source: PyPI imageio 2.38.1, pydicom 3.0.2 (it writes the files), run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check imageio==2.38.1 pydicom==3.0.2 \
    numpy==2.4.6
cd "$folder"
mkdir radiographs alone
venv/bin/python - <<'PY'
from contextlib import redirect_stdout
from io import StringIO

import imageio.v2
import imageio.v3
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.uid import DigitalXRayImageStorageForPresentation as XRayImageStorage

V3, V2 = imageio.v3.imread, imageio.v2.imread


def write(name, series, value):
    photo = pydicom.Dataset()
    photo.file_meta = FileMetaDataset()
    photo.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    photo.update({"SOPClassUID": XRayImageStorage, "SOPInstanceUID": f"1.2.3.{series}.1"})
    photo.update({"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": f"1.2.3.{series}"})
    photo.InstanceNumber = 1
    photo.update({"Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "PixelRepresentation": 0})
    photo.update({"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15})
    photo.PhotometricInterpretation = "MONOCHROME2"
    photo.PixelData = np.full((16, 16), value, "<u2").tobytes()
    photo.save_as(name, enforce_file_format=True)
    assert (pydicom.dcmread(name).pixel_array == value).all()


def read(name, imread):
    with redirect_stdout(StringIO()):  # its progress
        photo = imread(name)
    return photo.shape, np.unique(photo).tolist()


held = {"a": 100, "b": 200, "c": 300}
for name, series in zip(held, (3, 2, 1)):
    write(f"radiographs/{name}.dcm", series, held[name])
    write("alone/x.dcm", series, held[name])
    assert read("alone/x.dcm", V3) == ((16, 16), [held[name]])
for name, value in held.items():
    by_v3, by_v2 = (read(f"radiographs/{name}.dcm", imread) for imread in (V3, V2))
    print(f"{name}.dcm holds {value}: v3 {by_v3}, v2 {by_v2}")
    assert by_v2 == ((16, 16), [value])
    assert by_v3 == ((16, 16), [300])  # the series of c.dcm has the lowest UID
PY
# Seen:
#   a.dcm holds 100: v3 ((16, 16), [300]), v2 ((16, 16), [100])
#   b.dcm holds 200: v3 ((16, 16), [300]), v2 ((16, 16), [200])
#   c.dcm holds 300: v3 ((16, 16), [300]), v2 ((16, 16), [300])

#!/usr/bin/env bash
# Guessed: a mask (maps > threshold, boolean) that tifffile or scikit-image writes to a TIFF is
# the same mask in Pillow and OpenCV; and a TIFF whose tag says that 0 is white is turned round by
# a reader, or not, whatever its depth.
# Instead: tifffile writes boolean arrays with 0 as white (PhotometricInterpretation 0) and reads
# them back as they were; Pillow and OpenCV return the complement. Both turn round 1 and 8 bits
# and leave 16 bits as they are, so a 16-bit photo with that tag is a negative in either, beside
# its 8-bit copy that is none.
# Why it matters: a ground truth saved by one library and read by another marks all normal pixels
# as defective; every file opens, and only the metrics look odd. An 8-bit and a 16-bit export of
# one camera whose files carry that tag are each other's negatives.
# Source: PyPI tifffile 2026.3.3, pillow 13.0.0, opencv-python-headless 5.0.0.93, run on
# 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check tifffile==2026.3.3 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import cv2
import numpy as np
import tifffile
from PIL import Image


def how(read, written):
    """Says whether what was read is what was written, or its complement."""
    top = 1 if written.dtype == bool else np.iinfo(written.dtype).max
    read = np.asarray(read).astype(int)
    read = read // max(1, read.max()) if written.dtype == bool else read
    if (read == written).all():
        return "as written"
    return "turned round" if (read == top - written.astype(int)).all() else "something else"


mask = np.zeros((32, 32), bool)
mask[4:9, 20:30] = True
ramp = np.arange(32 * 32).reshape(32, 32)
arrays = {1: mask, 8: (ramp // 4).astype(np.uint8), 16: (ramp * 64).astype(np.uint16)}
seen = {}
for bits, array in arrays.items():
    options = {} if bits == 1 else {"photometric": "miniswhite"}  # a mask as tifffile writes it
    tifffile.imwrite("t.tif", array, **options)
    with tifffile.TiffFile("t.tif") as file:
        assert file.pages[0].photometric == 0
    readers = {
        "tifffile": tifffile.imread("t.tif"),
        "Pillow": Image.open("t.tif"),
        "OpenCV": cv2.imread("t.tif", cv2.IMREAD_UNCHANGED),
    }
    seen[bits] = {name: how(read, array) for name, read in readers.items()}
    print(f"{bits} bits:", seen[bits])
assert set(seen[1].values()) == {"as written", "turned round"}
for bits, expected in {1: "turned round", 8: "turned round", 16: "as written"}.items():
    assert seen[bits] == {"tifffile": "as written", "Pillow": expected, "OpenCV": expected}
PY
# Seen:
#   1 bits: {'tifffile': 'as written', 'Pillow': 'turned round', 'OpenCV': 'turned round'}
#   8 bits: {'tifffile': 'as written', 'Pillow': 'turned round', 'OpenCV': 'turned round'}
#   16 bits: {'tifffile': 'as written', 'Pillow': 'as written', 'OpenCV': 'as written'}

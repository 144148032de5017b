#!/usr/bin/env bash
# Guessed: a photo of four channels, red, green, blue and near infrared, that tifffile writes is
# the same four in OpenCV by IMREAD_UNCHANGED (in the order BGR), whatever their depth.
# Instead: tifffile tags a fourth channel as alpha unless it is told otherwise, and of 8-bit TIFFs
# OpenCV multiplies the colors by it: 160, 40, 40 beside 95 come out as 60, 15, 15. It leaves 16
# bits alone, and the alpha of a PNG, and the same TIFF with extrasamples=["unspecified"]. Pillow
# leaves the colors alone.
# Why it matters: where a part is dark in the infrared, its colors go black in the 8-bit photos
# and not in the 16-bit ones of the same camera; a flaw that shows in the infrared alone seems to
# show in all channels, and a detector fitted by one reader is blind by the other.
# Source: PyPI tifffile 2026.3.3, opencv-python-headless 5.0.0.93, pillow 13.0.0, run on
# 2026-11-30.
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

y, x = np.mgrid[:64, :64]
photo = np.stack([4 * x, 4 * y, 0 * x + 40, 255 - 4 * x], -1).astype(np.uint8)  # R, G, B, infrared


def by_opencv(name):
    return cv2.imread(name, cv2.IMREAD_UNCHANGED)[..., [2, 1, 0, 3]]


def colors(written):
    """Says what OpenCV has made of the colors of t.tif."""
    read = by_opencv("t.tif")
    assert read.dtype == written.dtype and (read[..., 3] == written[..., 3]).all()
    if (read == written).all():
        return "as written"
    product = written[..., :3] * (written[..., 3:] / np.iinfo(written.dtype).max)
    assert abs(read[..., :3] - product).max() <= 1
    return "multiplied"


seen = {}
for extra in (None, ["unspecified"]):
    for written in (photo, photo.astype(np.uint16) * 257):
        tifffile.imwrite("t.tif", written, photometric="rgb", extrasamples=extra)
        with tifffile.TiffFile("t.tif") as file:
            tag = file.pages[0].extrasamples[0].name
        assert (tifffile.imread("t.tif") == written).all()
        seen[tag, written.dtype.name] = colors(written)
        print(f"{written.dtype}, fourth channel tagged {tag}: colors {colors(written)}")
        if written is photo and not extra:
            assert (np.asarray(Image.open("t.tif")) == photo).all()
            Image.open("t.tif").save("t.png")
            print("written", photo[10, 40], "OpenCV", by_opencv("t.tif")[10, 40])
            assert (by_opencv("t.png") == photo).all()
assert seen.pop(("UNASSALPHA", "uint8")) == "multiplied"
assert set(seen.values()) == {"as written"} and len(seen) == 3
PY
# Seen:
#   uint8, fourth channel tagged UNASSALPHA: colors multiplied
#   written [160  40  40  95] OpenCV [60 15 15 95]
#   uint16, fourth channel tagged UNASSALPHA: colors as written
#   uint8, fourth channel tagged UNSPECIFIED: colors as written
#   uint16, fourth channel tagged UNSPECIFIED: colors as written

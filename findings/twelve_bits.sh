#!/usr/bin/env bash
# Guessed: a 12-bit photo, as inspection cameras make, comes back with its values 0 to 4095 from
# each of the formats that can say "12 bits"; or a library scales it to 16 bits in all of them.
# Instead: Pillow scales PGM (maxval 4095) so that 4095 becomes 65535, JPEG 2000 so that it
# becomes 65520, and leaves packed 12-bit TIFF alone. OpenCV does the opposite of it in all three:
# PGM and JPEG 2000 stay, packed TIFF is scaled to 65520. In 16-bit TIFF and PNG both leave the
# values alone. imageio follows Pillow.
# Why it matters: "divide by 4095" gives white photos and "divide by 65535" black ones, depending
# on the file format and on the library, and never with an error; a detector fitted on one and run
# on the other is blind.
# Source: PyPI pillow 13.0.0, opencv-python-headless 5.0.0.93, imagecodecs 2026.3.6, tifffile
# 2026.3.3, imageio 2.38.1, run on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pillow==13.0.0 imageio==2.38.1 \
    opencv-python-headless==5.0.0.93 imagecodecs==2026.3.6 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
from pathlib import Path

import cv2
import imagecodecs
import imageio.v3
import numpy as np
import tifffile
from PIL import Image

photo = np.arange(4096, dtype=np.uint16).reshape(64, 64)
Path("photo.pgm").write_bytes(b"P5\n64 64\n4095\n" + photo.astype(">u2").tobytes())
jp2 = imagecodecs.jpeg2k_encode(photo, level=0, bitspersample=12, codecformat="jp2")
Path("photo.jp2").write_bytes(jp2)
tifffile.imwrite("packed.tif", photo, bitspersample=12)
tifffile.imwrite("photo.tif", photo)
cv2.imwrite("photo.png", photo)
with tifffile.TiffFile("packed.tif") as file:
    assert file.pages[0].bitspersample == 12
assert (tifffile.imread("packed.tif") == photo).all()
assert (imagecodecs.jpeg2k_decode(jp2) == photo).all()

expected = {  # what 1 and 4095 become in Pillow and in OpenCV
    "photo.pgm": ([16, 65535], [1, 4095]),
    "photo.jp2": ([16, 65520], [1, 4095]),
    "packed.tif": ([1, 4095], [16, 65520]),
    "photo.tif": ([1, 4095], [1, 4095]),
    "photo.png": ([1, 4095], [1, 4095]),
}
for name, values in expected.items():
    by_pillow = np.asarray(Image.open(name))
    by_opencv = cv2.imread(name, cv2.IMREAD_UNCHANGED)
    seen = tuple([int(read.flat[1]), int(read.flat[4095])] for read in (by_pillow, by_opencv))
    print(f"{name}: 1 and 4095 become {seen[0]} in Pillow, {seen[1]} in OpenCV")
    assert seen == values, seen
    assert (imageio.v3.imread(name) == by_pillow).all()
PY
# Seen:
#   photo.pgm: 1 and 4095 become [16, 65535] in Pillow, [1, 4095] in OpenCV
#   photo.jp2: 1 and 4095 become [16, 65520] in Pillow, [1, 4095] in OpenCV
#   packed.tif: 1 and 4095 become [1, 4095] in Pillow, [16, 65520] in OpenCV
#   photo.tif: 1 and 4095 become [1, 4095] in Pillow, [1, 4095] in OpenCV
#   photo.png: 1 and 4095 become [1, 4095] in Pillow, [1, 4095] in OpenCV

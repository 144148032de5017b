#!/usr/bin/env bash
# Guessed: a gray TIFF of any number type that Pillow opens has the values of the file in either
# order of bytes, compressed or not; libraries have read both orders since the format exists.
# Instead: if the order is big-endian and the file is compressed (deflate, LZW), 16-bit signed,
# 32-bit signed and 32-bit float come out with the bytes of each value in reverse: 1 becomes 256
# or 16777216, 255 becomes -256 or -16777216, 1.0 becomes 4.6e-41. Uncompressed files and unsigned
# 16 bits are right. OpenCV and tifffile read all of them.
# Why it matters: height maps, radiographs and anomaly maps have these types. A map's ranks are
# shuffled, and in a ground truth with a number for each region (mask > 0 marks), regions 128 to
# 255 vanish from the signed types: their defects count as normal pixels.
# Source: PyPI pillow 13.0.0, tifffile 2026.3.3, opencv-python-headless 5.0.0.93, run on
# 2026-11-30 on a little-endian processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 \
    imagecodecs==2026.3.6 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import cv2
import numpy as np
import tifffile
from PIL import Image

numbers = np.arange(32 * 32).reshape(32, 32) // 4  # 0 to 255, as of regions


def by_pillow(dtype, order, compression):
    written = numbers.astype(dtype)
    tifffile.imwrite("t.tif", written, byteorder=order, compression=compression)
    assert (tifffile.imread("t.tif") == written).all()
    assert (cv2.imread("t.tif", cv2.IMREAD_UNCHANGED) == written).all()
    read = np.asarray(Image.open("t.tif"))
    if (read == written).all():
        return "right"
    assert (read == written.byteswap()).all()
    return "reversed"


for dtype in ("uint16", "int16", "int32", "float32"):
    little, big = ([by_pillow(dtype, order, c) for c in (None, "zlib", "lzw")] for order in "<>")
    print(f"{dtype}, big-endian: plain {big[0]}, deflate {big[1]}, LZW {big[2]}")
    assert little == ["right"] * 3
    assert big == (little if dtype == "uint16" else ["right", "reversed", "reversed"])

for dtype in ("int16", "int32", "float32"):
    tifffile.imwrite("t.tif", numbers.astype(dtype), byteorder=">", compression="lzw")
    read = np.asarray(Image.open("t.tif"))
    lost = numbers[(numbers > 0) & ~(read > 0)]
    print(f"{dtype}: 1 is read as {read[0, 4]:.3g}, {len(set(lost))} regions as 0 or less")
    assert set(lost) == (set() if dtype == "float32" else set(range(128, 256)))
PY
# Seen:
#   uint16, big-endian: plain right, deflate right, LZW right
#   int16, big-endian: plain right, deflate reversed, LZW reversed
#   int32, big-endian: plain right, deflate reversed, LZW reversed
#   float32, big-endian: plain right, deflate reversed, LZW reversed
#   int16: 1 is read as 256, 128 regions as 0 or less
#   int32: 1 is read as 1.68e+07, 128 regions as 0 or less
#   float32: 1 is read as 4.6e-41, 0 regions as 0 or less

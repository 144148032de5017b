#!/usr/bin/env bash
# Guessed: Pillow reads a color JPEG 2000 of 10, 12 or 16 bits a color as the upper 8 bits, or as
# those rounded: white stays white, and whatever is brighter in the file is not darker in the
# array.
# Instead: it rounds without a limit, so that the brightest half step becomes 256, which a byte
# holds as 0: 65408 to 65535 of 16 bits, and 4088 to 4095 of 12, come out as black. An opaque
# alpha channel comes out as transparent. Eight bits and gray of any depth are right, and so is
# OpenCV.
# Why it matters: what saturates the sensor (highlights on metal, a bright background) becomes the
# darkest part of the photo, with edges of the highest contrast that no part has. A detector
# trained on that takes black spots on shiny places for normal.
# Source: PyPI pillow 13.0.0 (with OpenJPEG 2.5.4), imagecodecs 2026.3.6, opencv-python-headless
# 5.0.0.93, run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pillow==13.0.0 \
    imagecodecs==2026.3.6 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import cv2
import imagecodecs
import numpy as np
from PIL import Image


def first_wrong(bits, channels):
    """Returns the lowest value that Pillow reads as 0 instead of as 255, or None."""
    values = np.linspace(0, 2**bits - 256, 2**min(bits, 14)).round()
    ramp = values.astype(np.uint8 if bits == 8 else np.uint16).reshape(-1, 64)
    ramp[-4:] = (2**bits - 256 + np.arange(256)).reshape(4, 64)  # each of the 256 brightest
    photo = ramp if channels == 1 else np.stack([ramp] * channels, -1)
    file = imagecodecs.jpeg2k_encode(photo, level=0, bitspersample=bits, codecformat="jp2")
    open("t.jp2", "wb").write(file)
    by_opencv = cv2.imread("t.jp2", cv2.IMREAD_UNCHANGED)  # all channels are equal
    assert (imagecodecs.jpeg2k_decode(file) == photo).all() and (by_opencv == photo).all()
    by_pillow = np.asarray(Image.open("t.jp2")).astype(int)
    upper = (photo.astype(int) << (16 - bits)) >> (0 if by_pillow.max() > 255 else 8)
    is_wrong = abs(by_pillow - upper) > 1
    if not is_wrong.any():
        return None
    assert (by_pillow[is_wrong] == 0).all() and (upper[is_wrong] == 255).all()
    assert (is_wrong == (photo >= photo[is_wrong].min())).all()  # this value and all above it
    return int(photo[is_wrong].min())


for bits, expected in {8: None, 10: 1022, 12: 4088, 16: 65408}.items():
    seen = [first_wrong(bits, channels) for channels in (1, 3, 4)]
    print(f"{bits} bits: read as 0 from this value on (gray, RGB, RGBA): {seen}")
    assert seen == [None, expected, expected]
PY
# Seen:
#   8 bits: read as 0 from this value on (gray, RGB, RGBA): [None, None, None]
#   10 bits: read as 0 from this value on (gray, RGB, RGBA): [None, 1022, 1022]
#   12 bits: read as 0 from this value on (gray, RGB, RGBA): [None, 4088, 4088]
#   16 bits: read as 0 from this value on (gray, RGB, RGBA): [None, 65408, 65408]

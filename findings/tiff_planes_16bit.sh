#!/usr/bin/env bash
# Guessed: Pillow reads a 16-bit RGB TIFF with separate color planes, as some cameras and
# microscopes write it, like the same photo with interleaved colors, or refuses it; it reads its
# 8-bit copy.
# Instead: the compressed file (deflate, LZW) comes out right, and the uncompressed one, by the
# same call and without a word, as noise: each byte of the upper half of a plane is taken for a
# pixel, low and high bytes in turn, so the picture shows half of the photo, stretched, under a
# pattern.
# Why it matters: a detector is fitted to noise and judges noise. Mode, size and histogram look
# alive, and "save it with compression" is the cure, which nobody would try for wrong colors.
# Source: PyPI pillow 13.0.0, tifffile 2026.3.3 (it reads all of them), run on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import tifffile
from PIL import Image

y, x = np.mgrid[:64, :64]
planes = np.stack([900 * x, 900 * y, 400 * (x + y)]).astype("<u2")  # three ramps, (3, 64, 64)


def is_right(array, **options):
    tifffile.imwrite("t.tif", array, photometric="rgb", **options)
    assert (tifffile.imread("t.tif") == array).all()
    by_pillow = np.moveaxis(np.asarray(Image.open("t.tif")), -1, 0)  # it keeps 8 of 16 bits
    if not (by_pillow == planes >> 8).all():
        upper_halves = planes[:, :32].copy().view(np.uint8).reshape(3, 64, 64)
        assert (by_pillow == upper_halves).all()
        return False
    return True


seen = {}
for compression in (None, "zlib", "lzw"):
    interleaved = np.moveaxis(planes, 0, -1)
    eight_bits = (planes >> 8).astype(np.uint8)
    seen[compression] = [
        is_right(interleaved, planarconfig="contig", compression=compression),
        is_right(eight_bits, planarconfig="separate", compression=compression),
        is_right(planes, planarconfig="separate", compression=compression),
    ]
    print(compression, "right interleaved, in planes of 8 bits, of 16:", seen[compression])
assert seen == {None: [True, True, False], "zlib": [True] * 3, "lzw": [True] * 3}
PY
# Seen:
#   None right interleaved, in planes of 8 bits, of 16: [True, True, False]
#   zlib right interleaved, in planes of 8 bits, of 16: [True, True, True]
#   lzw right interleaved, in planes of 8 bits, of 16: [True, True, True]

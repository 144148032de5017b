#!/usr/bin/env bash
# Guessed: skimage.io.imread gives a TIFF of gray pages as (pages, height, width), however many
# there are; it calls tifffile for that, which does.
# Instead: three or four pages come back as one color photo, (height, width, 3) or (..., 4), and
# two, five or six as pages. The rule looks at the shape alone. The file's own tags say gray, in
# pages. as_gray=True mixes three pages with the weights of red, green and blue, and of four it
# takes the last for alpha and blends with white.
# Why it matters: three or four photos of a part under lamps from different sides are what
# photometric stereo takes. stack[0], the photo under the first lamp, is a row of pixels of all
# lamps (64 x 4 here), and the same program works with five lamps.
# Source: PyPI scikit-image 0.26.0 with tifffile 2026.3.3, run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check scikit-image==0.26.0 \
    tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import skimage.io
import tifffile

for lamps in range(2, 7):
    photos = np.random.default_rng(0).integers(0, 256, (lamps, 48, 64), np.uint8)
    tifffile.imwrite("t.tif", photos, photometric="minisblack")
    with tifffile.TiffFile("t.tif") as file:
        assert len(file.pages) == lamps and file.pages[0].shape == (48, 64)
    assert (tifffile.imread("t.tif") == photos).all()
    read = skimage.io.imread("t.tif")
    print(f"{lamps} pages of 48 x 64: {read.shape}, the first: {read[0].shape}")
    is_color = lamps in (3, 4)
    assert (read == (np.moveaxis(photos, 0, -1) if is_color else photos)).all()
    if is_color:
        gray = skimage.io.imread("t.tif", as_gray=True)
        share = photos[3] / 255 if lamps == 4 else 1.0
        colors = photos[:3] / 255 * share + (1 - share)
        expected = np.tensordot([0.2125, 0.7154, 0.0721], colors, 1)
        print("    as_gray:", gray.shape, gray.dtype)
        assert abs(gray - expected).max() < 1e-6
PY
# Seen:
#   2 pages of 48 x 64: (2, 48, 64), the first: (48, 64)
#   3 pages of 48 x 64: (48, 64, 3), the first: (64, 3)
#       as_gray: (48, 64) float64
#   4 pages of 48 x 64: (48, 64, 4), the first: (64, 4)
#       as_gray: (48, 64) float64
#   5 pages of 48 x 64: (5, 48, 64), the first: (48, 64)
#   6 pages of 48 x 64: (6, 48, 64), the first: (48, 64)

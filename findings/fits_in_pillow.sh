#!/usr/bin/env bash
# Guessed: Pillow, which opens FITS files (cooled cameras for electroluminescence and astronomy
# write them), gives the 16-bit gray values that were saved, or at least values in the same order.
# Instead: it gives them shifted by half the range and wrapped: black (0) becomes 32768, 32767
# becomes 65535 and 32768 becomes 0. FITS has no unsigned 16-bit integers; they are stored signed
# with BZERO = 32768, and Pillow passes over BZERO and reads the rest as unsigned. The rows come
# in the opposite order to astropy's. imageio hands FITS to Pillow and gives the same.
# Why it matters: the brightness of every photo is scrambled with a seam at mid-gray, the mode
# says I;16, the shape is right, and pictures of dark cells look plausible. Masks drawn in another
# viewer lie upside down.
# Source: PyPI astropy 8.0.2, pillow 13.0.0, imageio 2.38.1, run on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
    astropy==8.0.2 pillow==13.0.0 imageio==2.38.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import imageio.v3
import numpy as np
from astropy.io import fits
from PIL import Image

photo = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
fits.writeto("t.fits", photo)
by_astropy = fits.getdata("t.fits")
image = Image.open("t.fits")
by_pillow = np.asarray(image)
by_imageio = imageio.v3.imread("t.fits")

print("header:", {key: fits.getheader("t.fits").get(key) for key in ("BITPIX", "BZERO")})
print("Pillow:", image.mode, image.size, by_pillow.dtype)
for value in (0, 32752, 32768, 65520):
    row, column = np.argwhere(photo == value)[0]
    print(f"saved {value}: astropy {by_astropy[row, column]}, Pillow {by_pillow[63 - row, column]}")
assert (by_astropy == photo).all()
assert by_pillow.dtype == np.uint16
assert (by_pillow[::-1] == photo + np.uint16(32768)).all()  # wraps at 65536, upside down
assert (by_imageio == by_pillow).all()
PY
# Seen:
#   header: {'BITPIX': 16, 'BZERO': 32768}
#   Pillow: I;16 (64, 64) uint16
#   saved 0: astropy 0, Pillow 32768
#   saved 32752: astropy 32752, Pillow 65520
#   saved 32768: astropy 32768, Pillow 0
#   saved 65520: astropy 65520, Pillow 32752

#!/usr/bin/env bash
# Guessed: a polygon drawn around a defect marks about the same pixels in every tool, give or take
# the pixels on its edge; a thin scratch marks at least those it crosses.
# Instead: a scratch of 40 x 0.6 pixels marks none in pycocotools, 41 in OpenCV and in
# scikit-image, and 82 in Pillow; moved down by half a pixel, 40, 82, 0 and 41. A square from 10
# to 14 marks 16 pixels in pycocotools and 25 in the other three. Each tool has its own rule for
# the pixels that a polygon covers, and what lies thinner than a pixel falls through some of them
# without a word.
# Why it matters: the same annotation gives a defect or an empty mask, that is a defective photo
# whose mask says it is good, and AU-PRO, which counts every region alike, moves most with the
# smallest ones.
# Source: PyPI pycocotools 2.0.11, pillow 13.0.0, opencv 5.0.0, scikit-image 0.26.0, run on
# 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pycocotools==2.0.11 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 scikit-image==0.26.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import cv2
import numpy as np
import pycocotools.mask
from PIL import Image, ImageDraw
from skimage.draw import polygon2mask


def by_coco(points):
    runs = pycocotools.mask.frPyObjects([np.ravel(points).tolist()], 64, 64)
    return pycocotools.mask.decode(pycocotools.mask.merge(runs))


def by_pillow(points):
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).polygon(points, fill=1)
    return np.asarray(mask)


def by_opencv(points):
    return cv2.fillPoly(np.zeros((64, 64), np.uint8), [np.round(points).astype(np.int32)], 1)


def by_skimage(points):
    return polygon2mask((64, 64), np.array(points)[:, ::-1])


shapes = {  # left, top, right, bottom; and how many pixels the four tools mark
    "scratch": (10.0, 10.7, 50.0, 11.3, [0, 82, 41, 41]),
    "half a pixel lower": (10.0, 11.2, 50.0, 11.8, [40, 41, 82, 0]),
    "square": (10.0, 10.0, 14.0, 14.0, [16, 25, 25, 25]),
}
for name, (left, top, right, bottom, expected) in shapes.items():
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    seen = [int(mark(points).sum()) for mark in (by_coco, by_pillow, by_opencv, by_skimage)]
    print(f"{name}: pycocotools, Pillow, OpenCV, scikit-image mark {seen}")
    assert seen == expected
PY
# Seen:
#   scratch: pycocotools, Pillow, OpenCV, scikit-image mark [0, 82, 41, 41]
#   half a pixel lower: pycocotools, Pillow, OpenCV, scikit-image mark [40, 41, 82, 0]
#   square: pycocotools, Pillow, OpenCV, scikit-image mark [16, 25, 25, 25]

#!/usr/bin/env bash
# Guessed: usearch's Index(ndim=64, metric="l2sq") takes patches of 8 x 8 gray pixels as they come
# from a photo, as uint8, and compares their values; with dtype="u8" it stores them as they are.
# Instead: add() and search() read uint8 as packed bits, whatever type the index stores. Of 64 bytes
# the first eight give 64 numbers 0 or 1; the other 56 pixels are never looked at. Patches whose
# lower seven rows are black have the distance 0.0 to intact ones, in an exact search by an index of
# f32 or u8. As float32 the same patches are 831627 and more apart in the index of f32, and in one
# of u8 less than a tenth of that: there each patch is scaled to one length, and a copy half as
# bright is as good as equal. With dtype="u8" in add() and search() too, they come out right.
# Why it matters: a nearest-neighbor detector on patches finds them all normal, and training patches
# find themselves at 0.0, as they should, so that a first test passes. A metric for bits is nowhere
# asked for, the lengths 64 and 8 x 8 fit, and nothing is said.
# Source: PyPI usearch 2.26.6, run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check usearch==2.26.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from usearch.index import Index

draw = np.random.default_rng(0)
normal = draw.integers(100, 156, (500, 8, 8)).astype(np.uint8)
black = normal[:5].copy()
black[:, 1:] = 0  # all rows but the first
dim = normal[:5] // 2
shapes = [patches.reshape(-1, 64) for patches in (normal, black, dim)]


def squares(stored, given, **options):
    """Returns the lowest squared distance of black and of dim patches to normal ones."""
    index = Index(ndim=64, metric="l2sq", dtype=stored)
    bank, *others = (patches.astype(given) for patches in shapes)
    index.add(np.arange(len(bank)), bank, **options)
    found = [index.search(other, 1, exact=True, **options).distances for other in others]
    return [float(each.min()) for each in found], index.get(0)[:8].tolist()


bank, *others = (patches.astype(int) for patches in shapes)
exact = [float(((each[:, None] - bank) ** 2).sum(2).min()) for each in others]
print("by hand: black", exact[0], "dim", exact[1], "row 0 begins with", bank[0, :8].tolist())

seen = {}
for stored in ("f32", "u8"):
    for given in (np.uint8, np.float32):
        seen[stored, given], begins = squares(stored, given)
        print(f"{given.__name__} in {stored}: black {seen[stored, given][0]},", end=" ")
        print(f"dim {seen[stored, given][1]}, row 0 begins with {begins}")
        if given is np.uint8:
            assert begins == np.unpackbits(shapes[0][0])[:8].tolist()
told, begins = squares("u8", np.uint8, dtype="u8")
print(f"uint8 in u8, told so: black {told[0]}, dim {told[1]}, row 0 begins with {begins}")

assert seen["f32", np.uint8][0] == 0 and seen["u8", np.uint8][0] == 0
assert seen["f32", np.float32] == exact
assert 0 < seen["u8", np.float32][0] < exact[0] / 10 and seen["u8", np.float32][1] <= 10
assert told == exact
PY
# Seen:
#   by hand: black 831627.0 dim 220641.0 row 0 begins with [147, 135, 128, 115, 117, 102, 104, 100]
#   uint8 in f32: black 0.0, dim 20.0, row 0 begins with [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
#   float32 in f32: black 831627.0, dim 220641.0, row 0 begins with [147.0, 135.0, 128.0, 115.0, ...
#   uint8 in u8: black 0.0, dim 20.0, row 0 begins with [1, 0, 0, 1, 0, 0, 1, 1]
#   float32 in u8: black 77490.0, dim 0.0, row 0 begins with [36, 33, 31, 28, 28, 25, 25, 24]
#   uint8 in u8, told so: black 831627.0, dim 220641.0, row 0 begins with [147, 135, 128, 115, ...

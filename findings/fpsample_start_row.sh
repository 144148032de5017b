#!/usr/bin/env bash
# Guessed: `start_idx=7` makes row 7 of the input the first pick, in every sampler of the package;
# the README gives `bucket_fps_kdline_sampling(..., start_idx=0)` as the way to a result that can
# be repeated.
# Instead: the two bucket samplers put the rows into a tree first and start at place 7 of that
# order, some other row; row 7 is often not picked at all. Picks come out right for the row they
# began with, and `fps_sampling` does begin with row 7. On rows that repeat, all give one index
# over and over.
# Why it matters: a coreset by k-center greedy is compared pick by pick with another code's; with
# the recommended sampler no two agree, and "the first pick is part of the coreset" is tested on
# the wrong row.
# Source: PyPI fpsample 1.0.2 (samplers of point clouds, QuickFPS), run on 2026-11-29, Python
# 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check fpsample==1.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import fpsample
import numpy as np

rows = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)


def greedy(rows, size, first):
    distances = np.full(len(rows), np.inf)
    picks = [first]
    while len(picks) < size:
        from_last = ((rows.astype(float) - rows[picks[-1]]) ** 2).sum(1)
        distances = np.minimum(distances, from_last)
        picks.append(int(distances.argmax()))
    return picks


samplers = {
    "plain": fpsample.fps_sampling,
    "kdline": lambda *a, **k: fpsample.bucket_fps_kdline_sampling(*a, h=5, **k),
    "kdtree": fpsample.bucket_fps_kdtree_sampling,
}
for name, sampler in samplers.items():
    picks = [int(i) for i in sampler(rows, 100, start_idx=7)]
    again = [int(i) for i in sampler(rows, 100, start_idx=7)]
    assert picks == again == greedy(rows, 100, picks[0])
    print(f"{name}: asked to start at row 7, starts at {picks[0]}, row 7 picked: {7 in picks}")
    assert (picks[0] == 7) == (name == "plain")
    assert (7 in picks) == (name == "plain")

pairs = np.repeat(rows[:10], 3, axis=0)  # 30 rows, 10 of them distinct
picks = fpsample.fps_sampling(pairs, 30, start_idx=0)
print("30 picks of 30 rows, 10 distinct rows: different indices", len(set(picks.tolist())))
assert len(set(picks.tolist())) == 10
PY
# Seen:
#   plain: asked to start at row 7, starts at 7, row 7 picked: True
#   kdline: asked to start at row 7, starts at 1028, row 7 picked: False
#   kdtree: asked to start at row 7, starts at 1038, row 7 picked: False
#   30 picks of 30 rows, 10 distinct rows: different indices 10

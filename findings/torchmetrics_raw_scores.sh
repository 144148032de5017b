#!/usr/bin/env bash
# Guessed: AUROC depends on the order of the scores alone, and not on the batches in which they
# arrive.
# Instead: torchmetrics looks at each batch by itself. If any score of it lies outside 0 to 1, it
# takes the whole batch for logits and applies a sigmoid. Distances of 20 to 40, as k-NN and
# PatchCore give, all become 1.0 in float32: AUROC 0.5 for 0.940. Scores of 0.2 to 1.3 come out
# right in one batch (0.940) and wrong in two (0.687), since one half was squashed and the other
# was not.
# Why it matters: the metric of a good detector reads "coin toss", or changes with the batch size
# and the order of the test images; scores that were scaled to at most 1 on the normal images are
# the worst case.
# Source: PyPI torchmetrics 1.9.0 with torch 2.14.1, run on 2026-11-29 (on the CPU; the install
# takes 5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
    torchmetrics==1.9.0 torch==2.14.1 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC

labels = torch.arange(200) // 100  # 100 normal images, then 100 defective ones
draw = np.random.default_rng(0)


def scores(normal, defective):
    return torch.tensor(np.concatenate([normal, defective]), dtype=torch.float32)


def by_torchmetrics(scores, batch_size):
    metric = BinaryAUROC()
    for start in range(0, len(scores), batch_size):
        here = slice(start, start + batch_size)
        metric.update(scores[here], labels[here])
    return round(float(metric.compute()), 3)


def exact(scores):
    return round(float(roc_auc_score(labels, scores)), 3)


distances = scores(draw.normal(24, 2, 100), draw.normal(30, 3, 100))
print("distances from", distances.min().item(), "to", distances.max().item())
print("scikit-learn", exact(distances), "torchmetrics", by_torchmetrics(distances, 200))
assert exact(distances) > 0.9
assert by_torchmetrics(distances, 200) == 0.5
assert by_torchmetrics(distances / distances.max(), 200) == exact(distances)

scaled = scores(draw.uniform(0.2, 0.9, 100), draw.uniform(0.7, 1.3, 100))
seen = {size: by_torchmetrics(scaled, size) for size in (200, 100, 1)}
print(f"scores 0.2 to 1.3: scikit-learn {exact(scaled)}, torchmetrics by batch size {seen}")
assert seen[200] == exact(scaled) > 0.9
assert seen[100] < 0.75
assert seen[1] < 0.85
PY
# Seen:
#   distances from 19.349939346313477 to 35.44942855834961
#   scikit-learn 0.94 torchmetrics 0.5
#   scores 0.2 to 1.3: scikit-learn 0.94, torchmetrics by batch size {200: 0.94, 100: 0.687, 1: 0.809}

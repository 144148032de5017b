#!/usr/bin/env bash
# Guessed: AU-PRO belongs to the maps and masks of a whole test set; pyaupro with `thresholds=1000`,
# its way that saves memory, gives the exact value to two digits, whether the photos come one by one
# or all at once.
# Instead: each update makes a curve of its own, and these are averaged by photos. An update without
# a defect, such as a normal photo alone, is left out with a warning: its false alarms count
# nowhere. The same 20 photos give 0.795 one by one, 0.798 by fives, 0.264 by tens and 0.184 at
# once, which is the exact value; by fives in other orders 0.194 to 0.208.
# Why it matters: test sets are read folder by folder, so that whole batches are of normal photos. A
# method that marks those brightly looks four times better than it is, and the figure in the table
# changes with the batch size and the order.
# Source: PyPI pyaupro 0.1.11 with torchmetrics 1.9.0 and torch 2.14.1, run on 2026-11-30 (on the
# CPU; the install takes 5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pyaupro==0.1.11 \
    torchmetrics==1.9.0 torch==2.14.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from pyaupro import PerRegionOverlap, auc_compute

draw = np.random.default_rng(0)
masks = np.zeros((20, 64, 64), np.int64)
masks[:5, 20:30, 20:30] = 1  # five photos with a defect, one of them with three more
for y, x in ((40, 2), (40, 50), (2, 2)):
    masks[0, y : y + 4, x : x + 4] = 1
maps = draw.gamma(2, 0.05, masks.shape) + 0.15 * masks
maps[5:] += 0.15  # 15 normal photos, which the method marks as brightly
maps = maps.clip(0, 1)


def au_pro(photos, batch_size, **options):
    metric = PerRegionOverlap(**options)
    for batch in np.split(photos, range(batch_size, len(photos), batch_size)):
        metric.update(torch.from_numpy(maps[batch]), torch.from_numpy(masks[batch]))
    area = auc_compute(*metric.compute(), limit=0.3, reorder=True, descending=True)
    return round(float(area), 3)


in_order = np.arange(20)
exact = {size: au_pro(in_order, size) for size in (1, 20)}
reference = au_pro(in_order, 20, reference_implementation=True)
print("exact, one by one and at once:", exact, "by MVTec's code:", reference)
assert exact[1] == exact[20] == reference

binned = {size: au_pro(in_order, size, thresholds=1000) for size in (1, 5, 10, 20)}
print("1000 thresholds, by batch size:", binned)
assert binned[20] == reference
assert binned[1] > 4 * reference and binned[5] > 4 * reference and binned[10] > 1.3 * reference

only_defective = au_pro(in_order[:5], 1, thresholds=1000)
print("without the normal photos, one by one:", only_defective)
assert only_defective == binned[1]

shuffled = [au_pro(draw.permutation(20), 5, thresholds=1000) for _ in range(5)]
print("batches of 5, shuffled five times:", shuffled)
assert max(shuffled) < 0.5 * binned[5]
PY
# Seen:
#   exact, one by one and at once: {1: 0.184, 20: 0.184} by MVTec's code: 0.184
#   1000 thresholds, by batch size: {1: 0.795, 5: 0.798, 10: 0.264, 20: 0.184}
#   without the normal photos, one by one: 0.795
#   batches of 5, shuffled five times: [0.194, 0.207, 0.208, 0.205, 0.198]

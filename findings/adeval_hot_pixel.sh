#!/usr/bin/env bash
# Guessed: AUROC and AU-PRO depend on the order of the scores alone; a package made for pixel
# metrics of anomaly maps, whose summary speaks of fast and memory-efficient routines, is off by
# little whatever the scale.
# Instead: adeval cuts the range from the lowest to the highest score into 1000 equal steps. One
# pixel among 40960 with the value 100, where the others lie below 0.74, takes the pixel AUROC
# from 0.936 to 0.900; with the value 1000 all others fall into one step: AUROC 0.5 and AU-PRO
# 0.15, as of a constant map. Of the same maps' ranks it says 0.936 again; scikit-learn gives
# 0.936 for all of them.
# Why it matters: distances and likelihoods have long tails, so one blatant defect, or a hot pixel
# of the sensor, turns a good method into a coin toss in the table, and only for the categories
# that have one.
# Source: PyPI adeval 1.1.0 with numpy 1.26.4 (it calls np.trapz), run on 2026-11-29, Python 3.11
# (3.12 at most).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
    numpy==1.26.4 opencv-python-headless==4.11.0.86 scikit-learn==1.7.2
"$folder/venv/bin/pip" install -qq --disable-pip-version-check --no-deps adeval==1.1.0
"$folder/venv/bin/python" - <<'PY'
import adeval
import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

draw = np.random.default_rng(0)
masks = np.zeros((10, 64, 64), np.uint8)
masks[:3, 20:30, 20:30] = 1
maps = (draw.gamma(2, 0.05, masks.shape) + 0.15 * masks).astype(np.float32)


def measured(maps):
    auroc, _, au_pro = adeval.auroc_aupr_aupro(list(maps), list(masks))
    exact = roc_auc_score(masks.ravel(), maps.ravel())
    return [round(float(value), 3) for value in (auroc, exact, au_pro)]


def with_hot_pixel(value):
    hot = maps.copy()
    hot[5, 0, 0] = value  # in a normal image
    return hot


ranks = rankdata(with_hot_pixel(1000)).reshape(maps.shape).astype(np.float32)
seen = {
    "as they are": measured(maps),
    "a pixel of 100": measured(with_hot_pixel(100)),
    "a pixel of 1000": measured(with_hot_pixel(1000)),
    "their ranks": measured(ranks),
}
print("highest of the others:", maps.max())
for name, (auroc, exact, au_pro) in seen.items():
    print(f"{name}: AUROC {auroc} (scikit-learn {exact}), AU-PRO {au_pro}")
    assert exact == 0.936
assert seen["as they are"] == [0.936, 0.936, 0.787]
assert seen["a pixel of 100"][0] < 0.91
assert seen["a pixel of 100"][2] < 0.7
assert seen["a pixel of 1000"] == [0.5, 0.936, 0.15]
assert abs(seen["their ranks"][0] - 0.936) < 0.002
PY
# Seen:
#   highest of the others: 0.739321
#   as they are: AUROC 0.936 (scikit-learn 0.936), AU-PRO 0.787
#   a pixel of 100: AUROC 0.9 (scikit-learn 0.936), AU-PRO 0.683
#   a pixel of 1000: AUROC 0.5 (scikit-learn 0.936), AU-PRO 0.15
#   their ranks: AUROC 0.936 (scikit-learn 0.936), AU-PRO 0.787

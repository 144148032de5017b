#!/usr/bin/env bash
# Guessed: split conformal prediction takes the score of rank ceil((n + 1) c) among n scores, so n
# = 9 are just enough for c = 0.9 (rank 9, the largest), 19 for 0.95, 99 for 0.99; any package
# gives that score.
# Instead: at n = 9 none of three does. crepes returns an interval without bounds (it floors (1 -
# 0.9) * 10, which is 0.9999999999999998); mapie and puncc raise ValueError for the smallest n
# that is enough, at every level. crepes' rounding goes on: at n = 19, 29, 39, ... for 0.9, and at
# 4, 9, 14, ... for 0.8, it takes the rank above the rule's; at 0.95 and 0.99 all its ranks are
# right, as are those of the other two above that n.
# Why it matters: these are the n that people hold out, because (n + 1) c is whole. A threshold
# from 9 normal images never alarms or stops the program, and two packages disagree on the same
# scores.
# Source: PyPI crepes 0.9.1, mapie 1.6.0, puncc 0.9.3 with numpy 1.26.4, run on 2026-11-29, Python
# 3.11 (or 3.12).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check crepes==0.9.1 mapie==1.6.0 \
    puncc==0.9.3 scikit-learn==1.7.2 numpy==1.26.4
"$folder/venv/bin/python" - <<'PY'
import warnings
from fractions import Fraction
from math import ceil, inf

import numpy as np
from crepes import ConformalRegressor
from deel.puncc.anomaly_detection import SplitCAD
from deel.puncc.api.prediction import BasePredictor
from mapie.regression import SplitConformalRegressor
from sklearn.dummy import DummyRegressor

warnings.showwarning = lambda *a, **k: None  # crepes warns if its rank is below 1
zero = DummyRegressor(strategy="constant", constant=0).fit([[0]], [0])


class Score(BasePredictor):  # a photo stands for its own score
    def predict(self, photos):
        return photos.ravel()


def by_crepes(scores, level):
    return ConformalRegressor().fit(scores).predict_int(np.zeros(1), confidence=level)[0, 1]


def by_mapie(scores, level):
    judge = SplitConformalRegressor(zero, confidence_level=level, prefit=True)
    judge.conformalize(np.zeros((len(scores), 1)), scores)
    return judge.predict_interval(np.zeros((1, 1)))[1][0, 1, 0]


def by_puncc(scores, level):
    judge = SplitCAD(Score(None, is_trained=True), train=False)
    judge.fit(z_fit=scores[:1, None], z_calib=scores[:, None])
    photos = np.arange(0.5, len(scores) + 2)
    return photos[~judge.predict(photos[:, None], alpha=round(1 - level, 6))].max() + 0.5


def tried(method, n, level):
    try:
        return float(method(np.arange(1.0, n + 1), level))  # the score of rank r is r
    except ValueError:
        return "ValueError"


for level, least in {0.8: 4, 0.9: 9, 0.95: 19, 0.99: 99}.items():
    seen = [tried(method, least, level) for method in (by_crepes, by_mapie, by_puncc)]
    print(f"level {level}: {least} scores are enough. crepes, mapie, puncc: {seen}")
    rounds_up = level < 0.95
    assert seen == [inf if rounds_up else least, "ValueError", "ValueError"]
    for n in range(least + 1, 200):
        rank = ceil((n + 1) * Fraction(str(level)))
        is_whole = (n + 1) % (least + 1) == 0
        assert tried(by_crepes, n, level) == rank + (rounds_up and is_whole)
        assert tried(by_mapie, n, level) == tried(by_puncc, n, level) == rank
print("0.9, scores 1 to 19: the rule takes 18, crepes", tried(by_crepes, 19, 0.9))
PY
# Seen:
#   level 0.8: 4 scores are enough. crepes, mapie, puncc: [inf, 'ValueError', 'ValueError']
#   level 0.9: 9 scores are enough. crepes, mapie, puncc: [inf, 'ValueError', 'ValueError']
#   level 0.95: 19 scores are enough. crepes, mapie, puncc: [19.0, 'ValueError', 'ValueError']
#   level 0.99: 99 scores are enough. crepes, mapie, puncc: [99.0, 'ValueError', 'ValueError']
#   0.9, scores 1 to 19: the rule takes 18, crepes 19.0

#!/usr/bin/env bash
# Guessed: a detector that was fitted to normal rows gives a new row one score, whatever other
# rows it is asked about in the same call; pyod's other detectors of this kind, such as KNN, LOF
# and HBOS, do.
# Instead: pyod's ECOD and COPOD add the rows of the call to the training rows and take the tail
# probabilities of all of them. 200 defective rows, asked about one by one, are all reported;
# asked about in one call, ECOD reports 5 and COPOD 15 of them. The threshold stays that of the
# fit.
# Why it matters: these two are chosen because they have no parameters. The photos of a bad batch
# excuse each other, so that the alarm fails when it is needed, and the recall of a test set
# depends on its share of defects; the camera's photos, judged one at a time, get other verdicts.
# Source: PyPI pyod 3.6.7 with scikit-learn 1.9.1, run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check pyod==3.6.7 scikit-learn==1.9.1 \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from pyod.models.copod import COPOD
from pyod.models.ecod import ECOD
from pyod.models.hbos import HBOS
from pyod.models.knn import KNN
from pyod.models.lof import LOF

draw = np.random.default_rng(0)
train = draw.normal(size=(200, 8))
normal = draw.normal(size=(200, 8))
defective = draw.normal(3, 1, size=(200, 8))

for kind in (KNN, LOF, HBOS, ECOD, COPOD):
    detector = kind(contamination=0.05).fit(train)
    alone = [detector.predict(row[None])[0] for row in defective]
    together = detector.predict(defective)
    with_normal = detector.predict(np.vstack([defective[:2], normal]))[:2]
    print(f"{kind.__name__}: of 200 defective rows {sum(alone)} alone, {together.sum()} at once")
    assert sum(alone) == 200
    assert with_normal.tolist() == [1, 1]
    if kind in (ECOD, COPOD):
        rows = detector.decision_function(np.vstack([train, defective]))
        merged = kind(contamination=0.05).fit(np.vstack([train, defective])).decision_scores_
        assert together.sum() == {ECOD: 5, COPOD: 15}[kind]
        assert abs(detector.decision_function(defective) - merged[200:]).max() < 1e-9
    else:
        assert together.sum() == 200
PY
# Seen:
#   KNN: of 200 defective rows 200 alone, 200 at once
#   LOF: of 200 defective rows 200 alone, 200 at once
#   HBOS: of 200 defective rows 200 alone, 200 at once
#   ECOD: of 200 defective rows 200 alone, 5 at once
#   COPOD: of 200 defective rows 200 alone, 15 at once

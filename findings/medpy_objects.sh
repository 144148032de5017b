#!/usr/bin/env bash
# Guessed: medpy's obj_tpr(result, reference) is the share of the true regions that were found,
# and obj_fpr the share of the reported regions that are false, as their names and the notes and
# examples of their documentation say.
# Instead: obj_tpr divides by the regions of the result: it is the precision. obj_fpr divides by
# those of the reference: it is the share that was missed. Of ten defects, a method that finds one
# has obj_tpr 1.0, and a method that finds all and reports ten false regions as well has 0.5 and
# an obj_fpr of 0.0. The documentation's example, 2/3, comes out as 1.0. They are right with the
# masks in the other order.
# Why it matters: read as recall and false alarms by region, the figures make a method that misses
# nearly all defects perfect in the one, and a method full of false regions perfect in the other.
# Dice and the Hausdorff distance of the same module are symmetric and do not tell.
# Source: PyPI medpy 0.5.2 with scipy 1.17.1, run on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check medpy==0.5.2 scipy==1.17.1 \
    numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from medpy.metric.binary import obj_fpr, obj_tpr


def mask(places):
    """Marks a square of 3 x 3 pixels at each of these places in a row of 20."""
    marked = np.zeros((9, 200), bool)
    for place in places:
        marked[3:6, 10 * place + 3 : 10 * place + 6] = True
    return marked


truth = mask(range(10))
methods = {  # the regions; obj_tpr and obj_fpr; found of all defects, and false of all reported
    "finds 1 of 10": ([0], (1.0, 0.9), (0.1, 0.0)),
    "finds all, reports 10 more": (range(20), (0.5, 0.0), (1.0, 0.5)),
}
for name, (places, expected, by_hand) in methods.items():
    result = mask(places)
    seen = obj_tpr(result, truth), obj_fpr(result, truth)
    print(f"{name}: obj_tpr and obj_fpr {seen}, by hand {by_hand}")
    assert seen == expected
    assert (obj_tpr(truth, result), obj_fpr(truth, result)) == by_hand

arr1, arr2 = np.array([1, 0, 1, 0, 0]), np.array([1, 0, 1, 0, 1])
print(f"documented: 0.667 and 1.0; seen: {obj_tpr(arr1, arr2)} and {obj_tpr(arr2, arr1):.3f}")
assert obj_tpr(arr1, arr2) == 1
assert abs(obj_fpr(arr1, arr2) - 1 / 3) < 1e-9  # documented: 0.0
assert abs(obj_tpr(arr2, arr1) - 2 / 3) < 1e-9
PY
# Seen:
#   finds 1 of 10: obj_tpr and obj_fpr (1.0, 0.9), by hand (0.1, 0.0)
#   finds all, reports 10 more: obj_tpr and obj_fpr (0.5, 0.0), by hand (1.0, 0.5)
#   documented: 0.667 and 1.0; seen: 1.0 and 0.667

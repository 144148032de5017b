#!/usr/bin/env bash
# Guessed: voyager's Space.Euclidean gives Euclidean distances: its docstring says "the square root
# of the sum of the squared differences", and Annoy, from the same makers and older, gives those.
# Instead: query() and get_distance() give the squares: (3, 4) is 25 from the origin. The neighbors
# are the same. A threshold that reports 5 of 100 normal rows by Annoy's distances reports all 100
# by voyager's. The mean over the neighbors, as k-NN takes it, ranks rows differently too: five
# neighbors at 2 are farther than four at 1 and one at 4.5 by Annoy, and nearer by voyager.
# Why it matters: a detector that is moved from one to the other rejects every part, and "twice as
# far as normal" comes out as four times. One far neighbor decides the score, and a test of the
# neighbors found, which is how such libraries are compared, sees nothing.
# Source: PyPI voyager 2.2.3, annoy 1.17.3, run on 2026-11-30 (annoy takes a C++ compiler).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check voyager==2.2.3 annoy==1.17.3 \
    numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from annoy import AnnoyIndex
from voyager import Index, Space

draw = np.random.default_rng(0)
bank, normal = draw.normal(size=(500, 16)), draw.normal(size=(100, 16))


def by_annoy(bank, rows, k=5):
    index = AnnoyIndex(bank.shape[1], "euclidean")
    index.set_seed(0)
    for place, row in enumerate(bank):
        index.add_item(place, row)
    index.build(10)
    found = [index.get_nns_by_vector(row, k, 10**6, True) for row in rows]  # 10**6: all of them
    return tuple(np.array(part) for part in zip(*found))


def by_voyager(bank, rows, k=5):
    index = Index(Space.Euclidean, bank.shape[1])
    index.add_items(bank.astype(np.float32))
    return index.query(rows.astype(np.float32), k, query_ef=len(bank))


documented = " ".join(Space.Euclidean.__doc__.split())
print("docstring:", documented)
assert "square root" in documented
pair = Index(Space.Euclidean, 2).get_distance([0, 0], [3, 4])
print("from (0, 0) to (3, 4):", pair)
assert pair == 25

(annoy_rows, annoy_distances), (rows, distances) = by_annoy(bank, normal), by_voyager(bank, normal)
exact = np.sort(np.linalg.norm(normal[:, None] - bank, axis=2))[:, :5]
assert (annoy_rows == rows).all()
assert abs(annoy_distances - exact).max() < 1e-5 and abs(distances - exact**2).max() < 1e-4
threshold = np.quantile(annoy_distances.mean(1), 0.95)
reported = {
    "annoy": int((annoy_distances.mean(1) > threshold).sum()),
    "voyager": int((distances.mean(1) > threshold).sum()),
}
print(f"the same neighbors; normal rows above {threshold:.2f}, of 100:", reported)
assert reported == {"annoy": 5, "voyager": 100}

ranked = {}
for name, found in (("annoy", by_annoy), ("voyager", by_voyager)):
    even = found(np.full((5, 1), 2.0), np.zeros((1, 1)))[1].mean()
    uneven = found(np.array([[1.0]] * 4 + [[4.5]]), np.zeros((1, 1)))[1].mean()
    print(f"{name}: mean of 2, 2, 2, 2, 2: {even:.2f}; of 1, 1, 1, 1, 4.5: {uneven:.2f}")
    ranked[name] = bool(even > uneven)
assert ranked == {"annoy": True, "voyager": False}
PY
# Seen:
#   docstring: Euclidean distance; also known as L2 distance. The square root of the sum of the
#       squared differences between each element of each vector.
#   from (0, 0) to (3, 4): 25.0
#   the same neighbors; normal rows above 4.12, of 100: {'annoy': 5, 'voyager': 100}
#   annoy: mean of 2, 2, 2, 2, 2: 2.00; of 1, 1, 1, 1, 4.5: 1.70
#   voyager: mean of 2, 2, 2, 2, 2: 4.00; of 1, 1, 1, 1, 4.5: 4.85

"""greedy_coreset against a naive float64 greedy, pick by pick."""

import common

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from test_neighbors import structured


def naive_greedy(features, size, first):
    """The definition: all distances, the farthest row next, the lowest of equals."""
    rows = np.asarray(features, dtype=np.float64)
    picks = [first]
    distance = ((rows - rows[first]) ** 2).sum(1)
    for _ in range(size - 1):
        distance[picks[-1]] = -1
        picks.append(int(distance.argmax()))
        distance = np.minimum(distance, ((rows - rows[picks[-1]]) ** 2).sum(1))
    return picks


def check_picks(features, size, seed=0):
    """The picks are the definition's; a row is assigned to the nearest, the earliest of equals."""
    picks, assignment, distances = common.greedy_coreset(features, size, seed, with_cover=True)
    assert picks.dtype == torch.int64
    assert picks.tolist() == naive_greedy(features, size, picks[0].item())
    doubles = features.double()
    exact = torch.cdist(doubles, doubles[picks], compute_mode=common.DIFFERENCES)
    assert torch.equal(assignment, exact.argmin(1))
    torch.testing.assert_close(distances, exact.amin(1).float(), rtol=1e-6, atol=1e-6)


def test_algorithm_1_as_printed_equals_numpy(generator):
    features = torch.randn(200, 5, generator=generator)
    features[100:] = features[:100]
    assert common.plain_greedy_coreset(features, 150, 7) == naive_greedy(features, 150, 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(60, 2, 60), (3000, 16, 700), (2500, 128, 300)]
)
def test_equals_naive_greedy(generator, monkeypatch, rows, columns, size, seed):
    monkeypatch.setattr(common, "NUMBERS", 2**20)  # the rows meet the picks in up to three blocks
    check_picks(torch.randn(rows, columns, generator=generator), size, seed)


def test_the_bound_of_few_columns_loses_no_pick(generator):
    features = structured(3000, generator, columns=128)
    assert common.MemoryBank(features).axes is not None
    check_picks(features, 700)


def test_hard_rows(generator):
    features, _ = make_blobs(4000, 8, centers=30, cluster_std=0.05, random_state=0)
    check_picks(torch.from_numpy(features + 200).float(), 900)  # clusters far from the origin
    # A grid, where nearly all picks are ties, in an order that is not that of the distances.
    grid = torch.cartesian_prod(*[torch.arange(14.0)] * 3)
    check_picks(grid[torch.randperm(len(grid), generator=generator)], 1500)
    # Every distinct row comes before any duplicate, however near it is, and no row twice.
    repeated = torch.randn(300, 12, generator=generator).repeat(16, 1)
    check_picks(repeated[torch.randperm(len(repeated), generator=generator)], 350)
    near = torch.tensor([[0.0], [0.0], [1000.0], [1000.00006]])
    for seed in range(8):
        check_picks(near, 4, seed)
        check_picks(torch.tensor([[0.0], [2.0], [1.0]]), 2, seed)  # the last is as near to both


def test_the_first_pick_is_drawn_from_the_seed_and_part_of_the_coreset(generator):
    features = torch.randn(1000, 4, generator=generator)
    firsts = {common.greedy_coreset(features, 1, seed).item() for seed in range(20)}
    assert len(firsts) > 10
    assert common.greedy_coreset(features, 50, 7)[0] == common.greedy_coreset(features, 1, 7)[0]
    assert common.greedy_coreset(features, 1000).unique().tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("features", "size", "message"),
    [
        (torch.ones(4, 2), 0, "size is 0: expected 1 to 4"),
        (torch.ones(4, 2), 5, "size is 5: expected 1 to 4"),
        (torch.ones(4, 2).half(), 1, "features: expected 2-D float32"),
        (torch.tensor([[1.0], [torch.inf]]), 1, "features: row 1 holds NaN"),
    ],
)
def test_refuses_what_it_cannot_pick_from(features, size, message):
    with pytest.raises(ValueError, match=message):
        common.greedy_coreset(features, size)

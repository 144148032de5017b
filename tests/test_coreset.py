"""greedy_coreset against a naive float64 greedy, pick by pick."""

import common

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs


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
    picks = common.greedy_coreset(features, size, seed)
    assert picks.dtype == torch.int64
    assert picks.tolist() == naive_greedy(features, size, picks[0].item())
    return picks


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


def test_equals_naive_greedy_on_clusters_far_from_the_origin():
    features, _ = make_blobs(4000, 8, centers=30, cluster_std=0.05, random_state=0)
    check_picks(torch.from_numpy(features + 200).float(), 900)


def test_equal_distances_go_to_the_lowest_index():
    """A grid, where nearly all picks are ties, in an order that is not that of the distances."""
    grid = torch.cartesian_prod(*[torch.arange(14.0)] * 3)
    check_picks(grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))], 1500)


def test_covers_every_distinct_row_before_any_duplicate(generator):
    distinct = torch.randn(300, 12, generator=generator)
    features = distinct[torch.randint(300, (5000,), generator=generator)]
    count = len(features.unique(dim=0))
    picks = common.greedy_coreset(features, count + 50)
    assert len(features[picks[:count]].unique(dim=0)) == count
    assert len(picks.unique()) == count + 50  # duplicates of rows, never a row twice


def test_a_distinct_row_comes_before_a_duplicate_however_near_it_is():
    features = torch.tensor([[0.0], [0.0], [1000.0], [1000.00006]])
    for seed in range(8):
        assert len(features[check_picks(features, 4, seed)[:3]].unique()) == 3


def test_the_first_pick_is_drawn_from_the_seed_and_part_of_the_coreset(generator):
    features = torch.randn(1000, 4, generator=generator)
    firsts = {common.greedy_coreset(features, 1, seed).item() for seed in range(20)}
    assert len(firsts) > 10
    assert common.greedy_coreset(features, 50, 7)[0] == common.greedy_coreset(features, 1, 7)[0]
    assert common.greedy_coreset(features, 1000).unique().tolist() == list(range(1000))


def test_the_cover_is_that_of_the_picks(generator, monkeypatch):
    monkeypatch.setattr(common, "NUMBERS", 2**20)
    features = torch.randn(3000, 16, generator=generator) + 50
    features[100:200] = features[:100]  # of equals the first picked counts
    picks, nearest, distances = common.greedy_coreset(features, 700, 0, with_cover=True)
    exact = torch.cdist(features.double(), features[picks].double())
    np.testing.assert_allclose(distances, exact.amin(1), atol=1e-6)
    assert torch.equal(nearest, exact.argmin(1))
    assert torch.equal(picks, common.greedy_coreset(features, 700))


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


def test_of_equally_near_picks_a_row_is_assigned_to_the_earliest():
    grid = torch.cartesian_prod(*[torch.arange(14.0)] * 3)
    features = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))[:1500]]
    picks, assignment, _ = common.greedy_coreset(features, 400, with_cover=True)
    exact = (features[:, None] - features[picks]).square().sum(dim=2)  # of integers
    assert torch.equal(assignment, exact.argmin(1))
    features = torch.tensor([[0.0], [2.0], [1.0]])
    for seed in range(8):
        picks, assignment, distances = common.greedy_coreset(features, 2, seed, with_cover=True)
        if picks[0] < 2:  # then the second pick is as near to the last row as the first
            assert assignment[2] == 0
            assert distances[2] == 1

"""nearest_neighbors against scikit-learn in float64, and everything it promises about its input."""

from pathlib import Path

import common

import numpy as np
import pytest
import torch
from conftest import search_memory
from sklearn.neighbors import NearestNeighbors


def reference(queries, bank, k):
    """scikit-learn's answer in float64, which the definition in common.py gives, too."""
    model = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.double().numpy())
    return model.kneighbors(queries.double().numpy())


def check(queries, bank, k):
    distances, indices = common.nearest_neighbors(queries, bank, k)
    expected, neighbors = reference(queries, bank, k)
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int64
    np.testing.assert_allclose(distances.numpy(), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(indices.numpy(), neighbors)
    plain = common.plain_nearest_neighbors(queries, bank, k)
    np.testing.assert_allclose(plain[0].numpy(), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain[1], indices)


@pytest.mark.parametrize("k", [1, 2, 9, 40])
@pytest.mark.parametrize(
    ("queries", "rows", "columns"), [(5, 40, 3), (1100, 5000, 64), (1, 513, 1536)]
)
def test_equals_scikit_learn(generator, queries, rows, columns, k):
    bank = torch.randn(rows, columns, generator=generator)
    check(torch.randn(queries, columns, generator=generator), bank, k)


def test_odd_inputs(generator):
    """All rows asked for; no queries; strides; more queries than meet the rows at once, 832."""
    rows = torch.randn(16, 2, 700, generator=generator)
    check(torch.randn(7, 8, generator=generator), torch.randn(60, 8, generator=generator), 60)
    distances, indices = common.nearest_neighbors(torch.empty(0, 5), torch.ones(9, 5), 2)
    assert distances.shape == indices.shape == (0, 2)
    check(rows[:, 1, :30].T, rows[:, 0].T, 4)
    check(*(torch.randn(n, 5, generator=generator) for n in (1000, 20_001)), 3)


def test_far_from_the_origin(generator):
    """|b|^2 - 2 q.b loses all its digits here: rows must be counted from their mean."""
    bank = torch.randn(3000, 32, generator=generator) + 1000
    check(bank[::100] + 0.01 * torch.randn(30, 32, generator=generator), bank, 5)


def test_a_row_of_the_bank_is_at_distance_zero(generator):
    bank = 100 * torch.randn(2000, 256, generator=generator) + 500
    distances, indices = common.nearest_neighbors(bank[700:900], bank, 3)
    assert (distances[:, 0] == 0).all()
    assert indices[:, 0].tolist() == list(range(700, 900))


def test_near_duplicates_are_told_apart(generator):
    """Against direct differences: scikit-learn's own float64 products lose digits here."""
    point = 30 * torch.randn(1, 512, generator=generator)
    bank = point + torch.randn(200, 512, generator=generator) * torch.logspace(0, -4, 200)[:, None]
    distances, indices = common.nearest_neighbors(point, bank, 200)
    expected, neighbors = common.plain_nearest_neighbors(point, bank, 200)
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    assert torch.equal(indices, neighbors)


def test_equal_distances_go_to_the_lowest_index():
    bank = torch.ones(3000, 4)
    for queries in (torch.zeros(2, 4), bank[:2]):
        distances, indices = common.nearest_neighbors(queries, bank, 3)
        assert (distances == 2 * (1 - queries[0, 0])).all()
        assert indices.tolist() == [[0, 1, 2]] * 2
    grid = torch.cartesian_prod(*[torch.arange(20.0)] * 3)[torch.randperm(8000)]
    _, indices = common.nearest_neighbors(grid[:50] + 0.5, grid, 8)
    assert torch.equal(indices, common.plain_nearest_neighbors(grid[:50] + 0.5, grid, 8)[1])
    few = torch.ones(6, 4)
    assert common.nearest_neighbors(few[:1], few, 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def structured(rows, generator, columns=640):
    """(rows, columns) of which a few directions hold nearly all, like features of images."""
    basis = torch.randn(30, columns, generator=torch.Generator().manual_seed(1))
    noise = 0.05 * torch.randn(rows, columns, generator=generator)
    return 3 + torch.randn(rows, 30, generator=generator) @ basis + noise


@pytest.mark.parametrize("k", [1, 9])
def test_the_bound_of_few_columns_loses_no_neighbor(generator, monkeypatch, k):
    rows, queries = structured(5000, generator), structured(700, generator)
    bank = common.MemoryBank(rows)
    assert bank.axes.shape == (640, common.NUM_AXES)  # it was worth it
    distances, indices = bank.nearest(queries, k)
    expected, neighbors = reference(queries, rows, k)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(indices.numpy(), neighbors)
    monkeypatch.setattr(common, "useful_axes", lambda *_: None)
    without_axes = common.MemoryBank(rows)
    assert without_axes.axes is None
    assert all(map(torch.equal, without_axes.nearest(queries, k), (distances, indices)))


def test_what_the_columns_leave_out_counts(generator):
    """Each query is a row of the bank; one without what it leaves out looks as near by the axes."""
    points = structured(2500, generator)
    left_out = torch.nn.functional.normalize(torch.randn(2500, 640, generator=generator))
    rows = torch.cat([points, points + 10 * left_out])
    bank = common.MemoryBank(rows)
    assert bank.axes is not None
    for k in (1, 2):
        _, indices = bank.nearest(rows[2500:2600], k)
        assert indices.tolist() == [[2500 + i, i][:k] for i in range(100)]


def test_few_columns_do_not_serve_isotropic_rows(generator):
    assert common.MemoryBank(torch.randn(3000, 640, generator=generator)).axes is None


def test_a_bank_of_some_rows_finds_no_other(generator):
    rows, queries = (torch.randn(n, 6, generator=generator) for n in (300, 50))
    keep = torch.rand(300, generator=generator) < 0.5
    keep[:130] = False  # the first groups hold nothing
    bank = common.MemoryBank(rows)
    distances, indices = bank.only(keep).nearest(queries, 3)
    expected, places = common.nearest_neighbors(queries, rows[keep], 3)
    assert torch.equal(distances, expected)
    assert torch.equal(indices, torch.nonzero(keep)[:, 0][places])
    with pytest.raises(ValueError, match="k is 200: expected 1 to"):
        bank.only(keep).nearest(queries, 200)
    keep = torch.arange(300) >= 295  # one group holds all that is left
    _, indices = bank.only(keep).nearest(queries, 5)
    assert indices.sort(1).values.tolist() == [list(range(295, 300))] * 50
    assert bank.only(keep).rows.data_ptr() == rows.data_ptr()


def test_products_of_few_digits_give_no_query_another_ones_neighbors(generator, monkeypatch):
    """What torch.set_float32_matmul_precision("medium") does where the processor has bfloat16."""
    addmm_ = torch.Tensor.addmm_
    products = []

    def rounded(bounds, a, b, alpha):
        products.append(a)
        return addmm_(bounds, a.bfloat16().float(), b.bfloat16().float(), alpha=alpha)

    monkeypatch.setattr(torch.Tensor, "addmm_", rounded)
    bank = torch.randn(500, 64, generator=generator)
    for _ in range(50):
        queries = torch.randn(20, 64, generator=generator)
        distances, indices = common.nearest_neighbors(queries, bank, 2)
        exact = torch.linalg.vector_norm(queries[:, None] - bank[indices], dim=2)
        torch.testing.assert_close(distances, exact)
        assert (distances[:, 0] < 1.1 * torch.cdist(queries, bank).amin(1)).all()
    assert len(products) == 50


def test_where_the_bound_fails_the_nearest_seen_is_found():
    tiny = torch.tensor([[-1.1265542e-22], [1.0]]), torch.tensor([[2.0721945e-22]])
    assert common.nearest_neighbors(*tiny)[1].tolist() == [[0], [0]]
    constant = torch.full((1, 524_288), 0.1)
    assert common.nearest_neighbors(constant, constant)[0].tolist() == [[0]]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded():
    """All distances at once would be 480 MB beside the bank's columns, which take 123."""
    first = (9, 1100, 64, 1, "randn")  # loads what finds axes
    searches = (1000, 120_000, 256, 3, "randn"), (24, 163_840, 8, 1, "ones")
    _, usual, alike = search_memory(first, *searches)
    assert 123_000 < usual < 210_000  # the columns, and not twice while they are joined
    assert alike < 300_000  # where all rows are alike, all are measured


@pytest.mark.parametrize(
    ("queries", "bank", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 0, "k is 0: expected 1 to 4"),
        (torch.ones(2, 3), torch.ones(4, 3), 5, "k is 5: expected 1 to 4"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, "3 columns, the bank 2"),
        (torch.ones(2, 3).double(), torch.ones(4, 3), 1, "queries: expected 2-D float32"),
        (torch.ones(2, 3), torch.ones(4), 1, "bank: expected 2-D float32"),
        (torch.tensor([[0.0, 1], [2, torch.nan]]), torch.ones(4, 2), 1, "queries: row 1 holds NaN"),
        (torch.ones(2, 2), torch.tensor([[0.0, -torch.inf]]), 1, "bank: row 0 holds NaN"),
    ],
)
def test_refuses_what_it_cannot_search(queries, bank, k, message):
    with pytest.raises(ValueError, match=message):
        common.nearest_neighbors(queries, bank, k)


def test_features_that_carry_gradients_are_searched(generator):
    rows = torch.randn(3000, 600, generator=generator, requires_grad=True)
    distances, indices = common.nearest_neighbors(rows[:5] * 1.0, rows, 2)
    assert not distances.requires_grad
    assert indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert common.greedy_coreset(rows, 5).shape == (5,)


def test_numpy_arrays_are_taken_and_a_callers_autocast_does_not_count(generator):
    rows = torch.randn(2000, 200, generator=generator)
    expected = common.nearest_neighbors(rows[:50], rows, 3)
    picks = common.greedy_coreset(rows, 30)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = common.nearest_neighbors(rows[:50].numpy(), rows.numpy(), 3)
        assert torch.equal(common.greedy_coreset(rows.numpy(), 30), picks)
    assert all(map(torch.equal, found, expected))
    again = common.MemoryBank(rows.numpy()).nearest(rows[:50].numpy(), 3)
    assert all(map(torch.equal, again, expected))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"bank: expected 2-D float32, got 2-D torch.float64"):
        common.MemoryBank(rows.double().numpy())


def test_refuses_a_backend_it_does_not_have():
    with pytest.raises(ValueError, match="backend is 'faiss'"):
        common.nearest_neighbors(torch.ones(1, 2), torch.ones(1, 2), 1, "faiss")
    with pytest.raises(ValueError, match="needs CuPy, k up to 32 and CUDA tensors, got cpu"):
        common.nearest_neighbors(torch.ones(1, 2), torch.ones(1, 2), 1, "cupy")

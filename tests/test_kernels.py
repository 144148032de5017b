"""The CUDA kernels, run on the processor; compiled for GPUs; and on a GPU if there is one.

On the processor a C++ compiler translates the very source strings of common.py, with the few names
of CUDA that they use defined by cuda_on_cpu.h; common.py's own wrappers launch them.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common

import numpy as np
import pytest
import torch
from test_coreset import naive_greedy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["SEARCH_CUDA", "CORESET_CUDA"])
def test_kernel_compiles(source, architecture):
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy, for its NVRTC").cuda.nvrtc
    program = nvrtc.createProgram(getattr(common, source), "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}",))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000


# ---------------------------------------------------------------- on the processor

ARGUMENTS = {  # of each kernel, as C++ declares them
    "keep_best": "const float* a, int b, int c, long long d, int e, float* f, long long* g",
    "update_and_pick": "const float4* a, float* b, unsigned long long* c, unsigned d, int e, int f",
}


def build(folder, sources):
    """The kernels as functions of ctypes: name(blocks, threads, *arguments)."""
    code = f'#include "{Path(__file__).parent / "cuda_on_cpu.h"}"\n{sources}'
    for name, declared in ARGUMENTS.items():
        passed = ", ".join("abcdefg"[: declared.count(",") + 1])
        code += f"""
extern "C" int run_{name}(unsigned blocks, unsigned threads, {declared}) {{
    return run_grid(blocks, threads, [=] {{ {name}({passed}); }});
}}"""
    (folder / "kernels.cpp").write_text(code)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++ to run the kernels on the processor")
    return build(tmp_path_factory.mktemp("kernels"), common.SEARCH_CUDA + common.CORESET_CUDA)


@pytest.fixture
def kernels(library, monkeypatch):
    """Has common.py's wrappers launch the kernels on the processor."""
    launched = []

    def launch(name, blocks, *arguments):
        passed = []
        for value in arguments:
            if torch.is_tensor(value):
                assert value.is_contiguous()
                passed.append(ctypes.c_void_p(value.data_ptr()))
            else:
                passed.append(np.ctypeslib.as_ctypes_type(value.dtype)(value))
        stuck = getattr(library, f"run_{name}")(blocks, 256, *passed)
        assert not stuck, "a warp has parted where its lanes exchange values"
        launched.append(name)

    monkeypatch.setattr(common, "launch", launch)
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return launched


@pytest.mark.parametrize("kept", [1, 9, 32])
@pytest.mark.parametrize(("queries", "rows"), [(1, 32), (9, 77), (30, 500)])
def test_keep_best_on_the_processor(kernels, generator, queries, rows, kept):
    """Against NumPy in float64, in two parts, with ties and infinities among the values."""
    nearness = torch.randn(queries, 2 * rows, generator=generator).mul(4).round().div(4)
    nearness[:, rows // 2 :: 7] = -torch.inf
    nearness[0, 5] = torch.inf
    best = torch.full((queries, kept), -torch.inf)
    indices = torch.zeros(queries, kept, dtype=torch.int64)
    for part in (0, 1):
        block = nearness[:, part * rows : (part + 1) * rows].contiguous()
        sizes = np.int32(queries), np.int32(rows), np.int64(part * rows), np.int32(kept)
        common.launch("keep_best", -(-queries // 8), block, *sizes, best, indices)
    values = nearness.double().numpy()
    order = np.argsort(-values, axis=1, kind="stable")[:, :kept]  # equals: the lowest index first
    expected = np.take_along_axis(values, order, 1)
    np.testing.assert_array_equal(best.numpy(), expected)
    finite = expected > -np.inf  # what is passed over has no place
    np.testing.assert_array_equal(indices.numpy()[finite], order[finite])


@pytest.mark.parametrize("k", [1, 9, 32])
@pytest.mark.parametrize(
    ("queries", "rows", "columns"), [(3, 40, 5), (20, 300, 17), (4, 2100, 520)]
)
def test_search_cupy_on_the_processor(kernels, generator, queries, rows, columns, k):
    """The wrapper: its blocks, its last rows, and the second search where 32 rows do not do."""
    rows = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -3, columns)
    rows[7] = rows[3]
    wanted = torch.cat([torch.randn(queries, columns, generator=generator), rows[3:5]])
    bank = common.MemoryBank(rows)
    found = common.search_cupy(bank, bank.offsets, wanted, k)
    assert kernels == ["keep_best"]
    for one, other in zip(found, common.search(bank, bank.offsets, wanted, k), strict=True):
        assert torch.equal(one, other)
    hidden = torch.rand(len(rows), generator=generator) < 0.2
    hidden[7] = True
    offsets = bank.offsets.masked_fill(hidden, -torch.inf)
    if (~hidden).sum() >= k:
        found = common.search_cupy(bank, offsets, wanted, k)
        for one, other in zip(found, common.search(bank, offsets, wanted, k), strict=True):
            assert torch.equal(one, other)


def test_search_cupy_takes_several_blocks(kernels, generator, monkeypatch):
    monkeypatch.setattr(common, "CUDA_ROWS", 70)
    monkeypatch.setattr(common, "CUDA_QUERIES", 20)
    rows, queries = (torch.randn(n, 3, generator=generator) for n in (150, 43))
    bank = common.MemoryBank(rows)
    for found, wanted in zip(
        common.search_cupy(bank, bank.offsets, queries, 4),
        common.search(bank, bank.offsets, queries, 4),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    assert kernels == ["keep_best"] * 3 * 3


def test_search_cupy_searches_again_where_32_rows_do_not_do(kernels, generator, monkeypatch):
    rows = torch.zeros(500, 3)  # all alike: which 32 of them the kernel keeps decides nothing
    calls, search = [], common.search
    monkeypatch.setattr(common, "search", lambda *a: calls.append(len(a[2])) or search(*a))
    bank = common.MemoryBank(rows)
    distances, indices = common.search_cupy(bank, bank.offsets, torch.ones(2, 3), 3)
    assert calls == [2]
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert distances.allclose(torch.tensor(3.0).sqrt())


@pytest.mark.parametrize(("rows", "columns", "size"), [(300, 3, 20), (1111, 130, 9), (33, 8, 33)])
def test_coreset_cupy_on_the_processor(kernels, generator, rows, columns, size):
    features = torch.randn(rows, columns, generator=generator)
    picks = common.coreset_cupy(features, size, torch.tensor([5]))
    assert picks.tolist() == naive_greedy(features, size, 5)
    assert kernels == ["update_and_pick"] * (size - 1)


def test_coreset_cupy_with_duplicates_on_the_processor(kernels):
    """A grid with every row thrice: ties, and duplicates only when nothing else is left."""
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3).repeat(3, 1)
    features = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    picks = common.coreset_cupy(features, 40, torch.tensor([0]))
    assert picks.tolist() == naive_greedy(features, 40, 0)
    assert len(features[picks[:27]].unique(dim=0)) == 27


# ---------------------------------------------------------------- on a GPU, and without one


def test_cpu_tensors_never_reach_cupy(monkeypatch, generator):
    monkeypatch.setattr(common, "cuda_kernels", lambda: pytest.fail("asked for CUDA kernels"))
    rows = torch.randn(50, 4, generator=generator)
    assert common.nearest_neighbors(rows, rows, 1, "auto")[1][:, 0].tolist() == list(range(50))
    assert len(common.greedy_coreset(rows, 5, 0, "auto")) == 5


def test_falls_back_to_torch_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy: ImportError
    common.cuda_kernels.cache_clear()
    assert common.cuda_kernels() is None
    assert common.cuda_kernels() is None
    assert capsys.readouterr().err.count("run in plain torch") == 1
    common.cuda_kernels.cache_clear()


@needs_gpu
@pytest.mark.parametrize("k", [1, 9, 32])
def test_search_equals_torch(k):
    generator = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(4500, 96, device="cuda", generator=generator)
    bank = torch.randn(20_000, 96, device="cuda", generator=generator)
    found, expected = (
        common.nearest_neighbors(queries, bank, k, name) for name in ("cupy", "torch")
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], expected[1])


@needs_gpu
@pytest.mark.parametrize("columns", [3, 128, 130])
def test_coreset_equals_torch(columns):
    features = torch.randn(
        20_000, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    found, expected = (common.greedy_coreset(features, 500, 0, b) for b in ("cupy", "torch"))
    assert found.tolist() == expected.tolist()


@needs_gpu
def test_coreset_covers_distinct_rows_first_on_the_gpu():
    features = torch.arange(100.0, device="cuda").repeat(50)[:, None]
    picks = common.greedy_coreset(features, 150, 0, "cupy")
    assert len(features[picks[:100]].unique()) == 100
    assert len(picks.unique()) == 150

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


ARGUMENTS = {  # of each kernel, as C++ declares them
    "keep_best": "const float* a, int b, float* c, int* d",
    "update_and_pick": "const float4* a, float* b, int* c, unsigned long long* d, unsigned e, "
    "int f, int g",
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
        stuck = getattr(library, f"run_{name}")(blocks, common.THREADS, *passed)
        assert not stuck, "a warp has parted where its lanes exchange values"
        launched.append(name)

    monkeypatch.setattr(common, "launch", launch)
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return launched


@pytest.mark.parametrize(("queries", "rows"), [(1, 3), (9, 77), (3, 500), (2, 20_001)])
def test_keep_best_on_the_processor(kernels, generator, queries, rows):
    """Each warp's 32 against NumPy in float64, with ties and infinities among the values."""
    bounds = torch.randn(queries, rows, generator=generator).mul(4).round().div(4)
    bounds[:, rows // 2 :: 7] = torch.inf
    bounds[0, 1] = -torch.inf
    best = torch.full((queries, common.THREADS), torch.nan)
    indices = torch.full_like(best, -1, dtype=torch.int32)
    common.launch("keep_best", queries, bounds, np.int32(rows), best, indices)
    for warp in range(common.THREADS // 32):
        mine = np.flatnonzero(np.arange(rows) % common.THREADS // 32 == warp)
        values = bounds[:, mine].double().numpy()
        order = np.argsort(values, axis=1, kind="stable")[:, :32]  # equals: the lowest first
        expected = np.full((queries, 32), np.inf)
        expected[:, : order.shape[1]] = np.take_along_axis(values, order, 1)
        lanes = slice(32 * warp, 32 * warp + 32)
        np.testing.assert_array_equal(best[:, lanes].numpy(), expected)
        kept = (expected < np.inf)[:, : order.shape[1]]  # what is passed over has no place
        found = indices[:, lanes].numpy()[:, : order.shape[1]]
        np.testing.assert_array_equal(found[kept], mine[order][kept])


def equal_searches(bank, queries, k, monkeypatch):
    """What the search finds is the same to the last bit whether or not the kernel finds its k."""
    found = bank.nearest(queries, k)
    with monkeypatch.context() as context:
        context.setattr(common, "uses_cupy", lambda *_: True)
        return all(map(torch.equal, found, bank.nearest(queries, k)))


@pytest.mark.parametrize("k", [1, 9, 40])
@pytest.mark.parametrize(("queries", "rows", "columns"), [(3, 60, 5), (9, 300, 17), (2, 2100, 520)])
def test_search_on_the_processor(kernels, generator, monkeypatch, queries, rows, columns, k):
    rows = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -3, columns)
    rows[7] = rows[3]
    wanted = torch.cat([torch.randn(queries, columns, generator=generator), rows[3:5]])
    bank = common.MemoryBank(rows)
    assert equal_searches(bank, wanted, k, monkeypatch)
    assert kernels == ["keep_best"]
    keep = torch.rand(len(rows), generator=generator) > 0.2
    keep[7] = False
    assert equal_searches(bank.only(keep), wanted, k, monkeypatch)
    keep = torch.arange(len(rows)) % common.THREADS < 20  # one warp's rows alone are left,
    keep[:20] = k >= 20  # and without the first of those fewer than it keeps
    if keep.sum() >= k:
        assert equal_searches(bank.only(keep), wanted, k, monkeypatch)


def test_rows_that_are_all_alike_but_for_a_few(kernels, generator, monkeypatch):
    """What the kernel keeps decides nothing."""
    rows = torch.zeros(1000, 2)
    rows[::100] = torch.randn(10, 2, generator=generator)
    bank = common.MemoryBank(rows)
    assert equal_searches(bank, torch.randn(43, 2, generator=generator), 3, monkeypatch)


@pytest.mark.parametrize(("rows", "columns", "size"), [(300, 3, 20), (1111, 130, 9), (33, 8, 33)])
def test_coreset_cupy_on_the_processor(kernels, generator, rows, columns, size):
    features = torch.randn(rows, columns, generator=generator)
    picks, nearest, distances = common.coreset_cupy(features, size, torch.tensor([5]))
    assert picks.tolist() == naive_greedy(features, size, 5)
    assert kernels == ["update_and_pick"] * size
    exact = torch.cdist(features.double(), features[picks].double())
    assert torch.equal(nearest, exact.argmin(1))
    np.testing.assert_allclose(distances, exact.amin(1), rtol=1e-5, atol=1e-5)


def test_coreset_cupy_with_duplicates_on_the_processor(kernels):
    """A grid with every row thrice: ties, and duplicates only when nothing else is left."""
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3).repeat(3, 1)
    features = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    picks, *_ = common.coreset_cupy(features, 40, torch.tensor([0]))
    assert picks.tolist() == naive_greedy(features, 40, 0)
    assert len(features[picks[:27]].unique(dim=0)) == 27


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
    alike = torch.arange(100.0, device="cuda").repeat(50)[:, None]
    picks = common.greedy_coreset(alike, 150, 0, "cupy")
    assert len(alike[picks[:100]].unique()) == 100  # distinct rows first
    assert len(picks.unique()) == 150

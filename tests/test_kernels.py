"""The CUDA kernels, run on the processor; compiled for GPUs; and on a GPU if there is one.

On the processor a C++ compiler translates the very source strings of common.py, with the few names
of CUDA that they use defined by cuda_on_cpu.h; common.py's own wrappers launch them.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common

import pytest
import torch
from test_coreset import check_picks
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_compile(architecture):
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy, for its NVRTC").cuda.nvrtc
    program = nvrtc.createProgram(common.CUDA, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}",))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000


def build(folder, sources):
    """The kernels as functions of ctypes: run_name(blocks, threads, backwards, *arguments)."""
    code = f'#include "{Path(__file__).parent / "cuda_on_cpu.h"}"\n{sources}'
    for name, declared in re.findall(r"__global__[^{]*?(\w+)\(([^()]*)\) {", sources):
        passed = ", ".join(argument.split()[-1] for argument in declared.split(","))
        code += f"""
extern "C" int run_{name}(unsigned blocks, unsigned threads, bool backwards, {declared}) {{
    return run_grid(blocks, threads, backwards, [=] {{ {name}({passed}); }});
}}"""
    (folder / "kernels.cpp").write_text(code)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++ to run the kernels on the processor")
    return build(tmp_path_factory.mktemp("kernels"), common.CUDA)


@pytest.fixture(params=["forwards", "backwards"])
def kernels(request, library, monkeypatch):
    """Has common.py launch its kernels on the processor. Returns the names of those launched."""
    launched = []

    def launch(name, blocks, threads, arguments):
        assert all(value.is_contiguous() for value in arguments if torch.is_tensor(value))
        passed = [v.data_ptr() if torch.is_tensor(v) else v for v in arguments]
        run = getattr(library, f"run_{name}")
        stuck = run(blocks, threads, request.param == "backwards", *map(ctypes.c_int64, passed))
        assert not stuck, "a warp has parted where its lanes exchange values"
        launched.append(name)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(common, "THREADS", 64)  # more would take long here
    usable = lambda backend, tensor, k=1: backend != "torch" and k <= common.MOST  # noqa: E731
    monkeypatch.setattr(common, "uses_cupy", usable)
    return launched


def check_search(queries, rows, k, keep=None):
    """The search by the kernel is the plain one in float64."""
    keep = torch.ones(len(rows), dtype=torch.bool) if keep is None else keep
    distances, indices = common.MemoryBank(rows, "cupy").only(keep).nearest(queries, k)
    places = keep.nonzero()[:, 0]
    expected, nearest = common.plain_nearest_neighbors(queries, rows[keep], k)
    assert torch.equal(indices, places[nearest])
    torch.testing.assert_close(distances, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 9, 32, 40])
@pytest.mark.parametrize(
    ("rows", "columns"), [(40, 3), (45, 1), (300, 17), (700, 130), (2100, 520)]
)
def test_search_on_the_processor(kernels, generator, rows, columns, k):
    queries = torch.randn(3, columns, generator=generator)
    bank = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -3, columns)
    bank[30] = bank[3]
    bank[30:32] = bank[3:5]
    check_search(torch.cat([queries, bank[3:5]]), bank, k)
    assert kernels == ["find_nearest"] * (k <= 32)  # one launch whatever the number of queries
    some = torch.rand(rows, generator=generator) > 0.2
    some[30] = False
    one_share = torch.arange(rows) % 256 < 128  # of one warp
    for keep in (some, one_share):
        if keep.sum() >= k:
            check_search(queries, bank, k, keep)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_hard_rows_on_the_processor(kernels, generator, scale, k):
    """Rows far from the origin, close together, hundreds of equal ones, and all alike."""
    far = torch.randn(300, 8, generator=generator) + 1000
    clusters = torch.randn(10, 8, generator=generator).repeat(40, 1)
    close = clusters + 1e-3 * torch.randn(400, 8, generator=generator)
    alike = torch.ones(300, 8)
    pairs = (far, far), (close, close), (close + 1, clusters), (close, alike), (alike, alike)
    for queries, rows in pairs:
        check_search(scale * queries[:3], scale * rows, k)


@pytest.mark.parametrize(("rows", "columns", "size"), [(300, 3, 90), (400, 130, 60), (33, 8, 33)])
def test_coreset_on_the_processor(kernels, monkeypatch, generator, rows, columns, size):
    monkeypatch.setattr(common, "FRONTIER", 70)
    features = torch.randn(rows, columns, generator=generator)
    check_picks(features, size)
    frontiers = kernels.count("find_nearest")
    assert kernels == ["find_nearest", "pick_inside"] * frontiers
    assert frontiers < size / 4


class Waits(TorchDispatchMode):
    """Counts the operations after which the processor would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket in (aten._local_scalar_dense, aten.nonzero)
        return operation(*args, **(kwargs or {}))


def test_a_gpu_is_waited_for_twice_a_search_and_once_a_frontier(kernels, generator):
    features = torch.randn(3000, 8, generator=generator)
    bank = common.MemoryBank(features)
    for count, k in [(1, 1), (40, 9)]:
        with Waits() as waits:
            bank.nearest(features[:count], k)
        assert waits.count == 2  # are the queries finite, and how many rows are there
    kernels.clear()
    with Waits() as waits:
        common.greedy_coreset(features, 400)
    assert waits.count == kernels.count("pick_inside") + 1  # are the features finite


def test_coreset_with_ties_on_the_processor(kernels, monkeypatch):
    """A grid with every row thrice: ties, and duplicates only when nothing else is left."""
    monkeypatch.setattr(common, "FRONTIER", 20)
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3).repeat(3, 1)
    features = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    check_picks(features, 81)
    check_picks(torch.ones(40, 2), 40)


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
    err = capsys.readouterr().err
    assert err.count("run in plain torch") == err.count("pip install -U cupy-cuda1") == 1
    common.cuda_kernels.cache_clear()


@needs_gpu
@pytest.mark.parametrize("k", [1, 9, 32])
@pytest.mark.parametrize("columns", [1, 3, 96, 130])
def test_search_on_a_gpu_equals_the_plain_one(columns, k):
    generator = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(500, columns, device="cuda", generator=generator)
    bank = torch.randn(20_000, columns, device="cuda", generator=generator)
    bank[10_000:10_300] = bank[0]
    keep = torch.rand(len(bank), device="cuda", generator=generator) < 0.5
    for scale, offset in [(1, 0), (1e-12, 0), (1e12, 0), (1, 1000), (0, 1)]:
        rows, wanted = scale * bank + offset, scale * queries + offset
        for mask in (keep, torch.ones_like(keep)):
            check_search(wanted, rows, k, mask)


@needs_gpu
@pytest.mark.parametrize("columns", [3, 128, 130])
def test_coreset_on_a_gpu_equals_the_processors(columns):
    features = torch.randn(20_000, columns, generator=torch.Generator().manual_seed(0))
    alike = torch.arange(100.0).repeat(50)[:, None]
    for rows, size in [(features, 2000), (alike, 150), (torch.ones(3000, 2), 2000)]:
        expected = common.greedy_coreset(rows, size, with_cover=True)
        for backend in ("cupy", "torch"):
            found = common.greedy_coreset(rows.cuda(), size, 0, backend, with_cover=True)
            assert torch.equal(found[0].cpu(), expected[0])
            assert torch.equal(found[1].cpu(), expected[1])
            torch.testing.assert_close(found[2].cpu(), expected[2])

"""The CUDA kernels: they compile without a GPU, and with one they equal the torch backend."""

import sys

import common

import pytest
import torch

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
@pytest.mark.parametrize("k", [1, 9, 28])
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

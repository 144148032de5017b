"""Helpers of all tests: the scripts as modules, the command line, and a small practice pill."""

# ruff: noqa: E402, for what has to happen before the libraries are imported

import argparse
import importlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as cores

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common

from draw_practice_pill import draw_practice_pill

SCRIPTS = {
    "autoencoder": ROOT / "01_autoencoder.py",
    "dfr": ROOT / "02_dfr.py",
    "knn": ROOT / "03_knn.py",
    "patchcore": ROOT / "04_patchcore.py",
}
# A small network on small images: the same code in a fraction of the time.
SMALL = ["--weights", "random", "--backbone", "resnet18", "--resize", "64", "--crop", "64"]
QUICK = {  # what keeps each method's own work short
    "autoencoder": ["--steps", "20"],
    "dfr": ["--steps", "20"],
    "knn": ["--neighbors", "3"],
    "patchcore": ["--coreset", "0.2", "--neighbors", "3"],
}


def options(**changes):
    """What `parse_options` would return for a small run, to call a script's functions with."""
    settings = {"weights": "random", "backbone": "resnet18", "device": "cpu", "seed": 0}
    settings |= {"batch_size": 4, "load": None, "save": None, "method": "test", "crop": 64}
    settings |= {"backend": "auto", "layers": ["layer2", "layer3"], "neighbors": 3, "coreset": 0.2}
    settings |= {"data": Path("parts"), "resize": 64, "predict": None, "demo": False}
    settings |= {"fingerprint": None, "data_fingerprint": None, "train_fingerprint": None}
    settings |= {"steps": 30, "learning_rate": 2e-3, "latent": 8, "size": (64, 64), "bits": 16}
    settings |= {"false_alarm_rate": 0.05}
    return argparse.Namespace(**settings | changes)


def search_memory(queries: int, rows: int, columns: int, k: int) -> int:
    """kB above its inputs that a search takes at its peak, in a process of its own; Linux only."""
    code = f"""
import torch, common
def peak():  # kB; getrusage's would be the parent's where that is larger
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
queries, bank = torch.randn({queries}, {columns}), torch.randn({rows}, {columns})
common.nearest_neighbors(queries[:9], bank[:99], {k})  # loads what loads late
before = peak()
common.nearest_neighbors(queries, bank, {k})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return int(done.stdout)


@pytest.fixture(scope="session")
def scripts():
    """The four scripts as modules, by method."""
    return {name: importlib.import_module(path.stem) for name, path in SCRIPTS.items()}


@pytest.fixture(scope="session")
def original_pill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pill"
    draw_practice_pill(folder, seed=1, train=8, good=3, per_defect=1)
    return folder


@pytest.fixture
def pill(original_pill, tmp_path):
    """A practice pill of 8 + 3 + 7 images that a test may damage."""
    return Path(shutil.copytree(original_pill, tmp_path / "pill"))


@pytest.fixture
def run_script(monkeypatch, capfd, tmp_path):
    """Runs a script as `python script.py *arguments` would, in this process.

    Returns (exit code, stdout, stderr). The working folder is the test's own.
    """
    monkeypatch.chdir(tmp_path)

    def run(method, *arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[method]), *map(str, arguments)])
        common.SECONDS.clear()
        code = 0
        try:
            runpy.run_path(str(SCRIPTS[method]), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        finally:
            common.pyplot.close("all")
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def split(pixels, masks=None):
    """A `Split` of normal images that were never files."""
    count, size = len(pixels), pixels.shape[2:]
    paths = [Path(f"{i:03d}.png") for i in range(count)]
    masks = torch.zeros(count, *size, dtype=torch.bool) if masks is None else masks
    good = np.array(["good"] * count, dtype=object)
    return common.Split(paths, good, pixels, masks, np.ones(count, dtype=bool))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)

"""Helpers of all tests: the scripts as modules, the command line, and a small practice pill."""

# ruff: noqa: E402, for what has to happen before the libraries are imported

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
SHORT = {  # what keeps each method's own work short, as arguments of `fit`
    "autoencoder": {"steps": 10},
    "dfr": {"steps": 20},
    "knn": {"neighbors": 3},
    "patchcore": {"coreset": 0.2, "neighbors": 3},
}


def small(method):
    """The arguments of a small and quick run."""
    options = [f"--{name}={value}" for name, value in SHORT[method].items()]
    # The autoencoder takes no backbone.
    return (SMALL[:2] + SMALL[4:] if method == "autoencoder" else SMALL) + options


def small_backbone(method="patchcore", seed=0, batch_size=16):
    name = "none" if method == "autoencoder" else "resnet18"
    return common.load_backbone(name, "random", seed, batch_size=batch_size)


def load_split(paths):
    """(`Split`, errors) of files, with its remarks on stderr."""
    errors = []
    masks = common.find_masks(paths[0].parents[2], errors.append)
    return common.load_split(paths, 256, 224, 16, errors.append, masks), errors


def search_memory(*searches) -> list[int]:
    """kB above the inputs that searches, (queries, rows, columns, k, a function of torch) each,
    take at their peak, one after another in a process of their own; Linux only."""
    code = f"""
import torch, common
def peak():  # kB; getrusage's would be the parent's where that is larger
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
common.nearest_neighbors(torch.rand(9, 3), torch.rand(99, 3))  # loads what loads late
for queries, rows, columns, k, kind in {searches}:
    make = getattr(torch, kind)
    queries, bank = make(queries, columns), make(rows, columns)
    before = peak()
    common.nearest_neighbors(queries, bank, k)
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return list(map(int, done.stdout.split()))


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


def run(method, *arguments):
    """Runs a script as `python script.py *arguments` would, in this process."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", [str(SCRIPTS[method]), *map(str, arguments)])
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="session")
def fitted(original_pill, tmp_path_factory):
    """A model of k-NN, fitted once."""
    folder = tmp_path_factory.mktemp("fitted")
    model = ["--out", folder, "--save", folder / "m.pt"]
    run("knn", "--data", original_pill, *small("knn"), *model)
    return folder / "m.pt"


@pytest.fixture
def run_script(monkeypatch, capfd, tmp_path):
    """Runs a script in the test's own folder, to this exit code. Returns (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_to(method, *arguments, code=0):
        ended = 0
        try:
            run(method, *arguments)
        except SystemExit as exit:
            ended = exit.code
        captured = capfd.readouterr()
        assert ended == code, captured.err
        return captured.out, captured.err

    return run_to


def split(images):
    """A `Split` of normal images that were never files."""
    count = len(images)
    paths = [Path(f"{i:03d}.png") for i in range(count)]
    regions = torch.zeros(images[:, 0].shape, dtype=torch.int32)
    good = np.array(["good"] * count, dtype=object)
    return common.Split(np.array(paths), good, images, regions, np.ones(count, dtype=bool))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)

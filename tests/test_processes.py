"""What goes wrong, as its user meets it: processes of their own, their exit codes and their words.

An interpreter that never ends hides crashes, so each run here is a process to its very end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

import pytest
import torch
from conftest import QUICK, ROOT, SCRIPTS, SMALL
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
CODES = Counter()  # of all runs in this file


class Forker:
    """Runs scripts by tests/forker.py, several at a time."""

    def __init__(self):
        command, pipe = [sys.executable, str(ROOT / "tests" / "forker.py")], subprocess.PIPE
        variables = os.environ | {"GOMP_SPINCOUNT": "1000"}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)
        self.lock = threading.Lock()

    def ask(self, request):
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())

    def start(self, method, *arguments, cwd, stdout=True, **request):
        """Starts a script; returns (process id, file of its stdout, file of its stderr)."""
        place = Path(cwd) / f"{time.monotonic_ns()}"
        files = [f"{place}.out" if stdout is True else stdout, f"{place}.err"]
        request |= {"arguments": [str(SCRIPTS[method]), *map(str, arguments)], "cwd": str(cwd)}
        return self.ask(request | {"stdout": files[0], "stderr": files[1]}), *files

    def run(self, method, *arguments, **settings):
        """Returns (exit code, stderr) of a script."""
        process, _, errors = self.start(method, *arguments, **settings)
        while Path(f"/proc/{process}/stat").exists() and " Z " not in stat(process):
            time.sleep(0.02)  # here, not in the forker: others are to be started meanwhile
        code = self.ask({"wait": process})
        CODES[code] += 1
        return code, Path(errors).read_text()


def stat(process):
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return " Z "


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.process.stdin.close()
    forker.process.wait()
    print("\nexit codes:", dict(CODES))


def together(function, jobs, at_once=3):
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(function, jobs))


def one_line(code, err, expected):
    """The exit code, one line that says it all (and maybe notes before), nothing after."""
    assert code == expected, err
    assert "Traceback" not in err
    assert "terminate" not in err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    return lines[0]


def left_over(folder):
    return [p for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]


# ---------------------------------------------------------------- broken data


def test_a_truncated_image_never_aborts(forker, original_pill, tmp_path):
    data = shutil.copytree(original_pill, tmp_path / "pill")
    image = data / "train/good/000.jpg"
    image.write_bytes(image.read_bytes()[:3000])

    def run(i):
        # The other images are still worked on, in torch, when the error comes.
        return forker.run("patchcore", "--data", data, *SMALL, cwd=tmp_path, linger="prepare")

    for code, err in together(run, range(10), at_once=4):
        assert "000.jpg: cannot be read as an image" in one_line(code, err, 2)


def cut(path, size=3000):
    path.write_bytes(path.read_bytes()[:size])


BROKEN = {
    "no folder": (shutil.rmtree, "found no folder there"),
    "no images": (lambda p: [f.unlink() for f in (p / "train/good").iterdir()], "holds no image"),
    "test image": (lambda p: cut(p / "test/color/000.jpg"), "color/000.jpg: cannot be read"),
    "empty image": (lambda p: cut(p / "train/good/003.jpg", 0), "003.jpg: cannot be read"),
    "mask": (lambda p: cut(p / "ground_truth/crack/000_mask.png", 40), "000_mask.png: cannot be"),
    "no mask": (lambda p: (p / "ground_truth/crack/000_mask.png").unlink(), "000.jpg: has no mask"),
    "small": (lambda p: Image.new("RGB", (60, 90)).save(p / "train/good/001.jpg"), "is 60 x 90"),
    "tiny": (lambda p: Image.new("RGB", (1, 1)).save(p / "train/good/001.jpg"), "is 1 x 1"),
}


def test_broken_data_is_named_and_ends_with_2(forker, original_pill, tmp_path):
    def run(case):
        damage, message = BROKEN[case]
        data = shutil.copytree(original_pill, tmp_path / case / "pill")
        damage(data)
        arguments = ["--data", data, *SMALL, "--neighbors", "3"]
        return message, forker.run("knn", *arguments, cwd=tmp_path / case)

    for message, (code, err) in together(run, BROKEN):
        assert message in one_line(code, err, 2)


# ---------------------------------------------------------------- places that cannot be written


@pytest.fixture(scope="module")
def model(forker, original_pill, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    arguments = ["--data", original_pill, *SMALL, *QUICK["patchcore"], "--save", "m.pt"]
    assert forker.run("patchcore", *arguments, cwd=folder)[0] == 0
    return folder / "m.pt"


def test_what_cannot_be_written_is_named(forker, original_pill, model, tmp_path):
    (tmp_path / "file").write_text("precious")
    fit = ["--data", original_pill, *SMALL, *QUICK["patchcore"]]
    judge = ["--load", model, "--predict", original_pill / "test"]
    for arguments, settings, message in [
        ([*fit, "--out", "file"], {}, "--out: file/patchcore cannot be written to"),
        ([*fit, "--save", "full.pt"], {"file_limit": 40_000}, "cannot be written (File too large)"),
        ([*judge], {"stdout": "/dev/full"}, "error: stdout: No space left on device"),
        ([*judge], {"stdout": None}, "error: stdout: is closed"),
        ([*judge, "--load", "file"], {}, "file: damaged or foreign file"),
    ]:
        code, err = forker.run("patchcore", *arguments, cwd=tmp_path, **settings)
        assert message in one_line(code, err, 2)
    assert (tmp_path / "file").read_text() == "precious"
    assert not left_over(tmp_path)


def test_a_broken_photo_or_picture_does_not_stop_the_others(forker, original_pill, model, tmp_path):
    photos = shutil.copytree(original_pill / "test", tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    long_name = photos / ("n" * 245 + ".jpg")
    shutil.copy(photos / "good/000.jpg", long_name)
    (tmp_path / "results/patchcore/predictions/photos").mkdir(parents=True)
    (tmp_path / "results/patchcore/predictions/photos/crack").write_text("in the way")
    arguments = ["--load", model, "--predict", "photos", "--batch-size", "4"]
    process = forker.start("patchcore", *arguments, cwd=tmp_path)
    code = forker.ask({"wait": process[0]})
    assert code == 1
    out, err = (Path(name).read_text() for name in process[1:])
    assert len(out.splitlines()) == 1 + 11
    assert err.count("error: ") == 3
    for message in ("broken.jpg: cannot be read", "dot.png: is 1 x 1", "crack/000.jpg.png: cannot"):
        assert message in err
    assert len(list((tmp_path / "results/patchcore/predictions").rglob("*.png"))) == 10


# ---------------------------------------------------------------- Ctrl-C, kill

STAGES = {  # a function of common.py that the stage calls, and at which call to interrupt it
    "decode": ("patchcore", "read_image", 5),
    "features": ("patchcore", "to_float", 2),
    "coreset": ("patchcore", "farthest_rows", 1),
    "threshold": ("patchcore", "measure", 3),
    "training": ("autoencoder", "checked", 9),
    "figures": ("patchcore", "draw_examples", 1),
    "save": ("knn", "digest", 3),
}


@pytest.mark.parametrize(
    ("signals", "stages"),
    [
        ([signal.SIGINT], STAGES),
        ([signal.SIGINT] * 2, ["decode", "features"]),
        ([signal.SIGTERM], ["decode", "figures"]),
    ],
)
def test_interrupted_at_every_stage(forker, original_pill, tmp_path, signals, stages):
    def run(stage):
        method, function, call = STAGES[stage]
        folder = tmp_path / stage
        folder.mkdir()
        arguments = ["--data", original_pill, *SMALL, *QUICK[method], "--save", "m.pt"]
        at = {function: [call, *signals]}
        return folder, forker.run(method, *arguments, cwd=folder, signals=at)

    for folder, (code, err) in together(run, stages):
        one_line(code, err, 128 + signals[0])
        assert not left_over(folder)
        check_files(folder)


def test_interrupted_while_predicting(forker, original_pill, model, tmp_path):
    def run(call):
        arguments = ["--load", model, "--predict", original_pill, "--batch-size", "6000"]
        at = {"read_image": [call, signal.SIGINT]}
        return forker.run("patchcore", *arguments, cwd=tmp_path, signals=at)

    for code, err in together(run, [1, 2, 4, 7, 11, 16]):
        one_line(code, err, 130)


def test_interrupted_while_importing(tmp_path):
    for delay in (0.3, 1, 2):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS["knn"])],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        one_line(process.returncode, err.strip(), 130)


def check_files(folder):
    """Every file that is there is whole."""
    for path in Path(folder).rglob("*.*"):
        if path.suffix == ".png":
            Image.open(path).verify()
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["method"]
        elif path.suffix == ".csv":
            assert path.read_text().count("\n") == 11
        elif path.suffix == ".pt":
            model = torch.load(path, weights_only=True)
            assert model.pop("digest") == common.digest(model)


def test_a_killed_run_leaves_nothing_that_matters(forker, original_pill, tmp_path):
    """Killed at ten moments, in the middle of a write among others, and started again."""
    arguments = ["--data", original_pill, *SMALL, *QUICK["patchcore"], "--save", "m.pt"]
    moments = [("read_image", 9), ("to_float", 1), ("farthest_rows", 1), ("digest", 4),
               ("save_figure", 1), ("write_files", 1), ("draw_scores", 1), ("draw_examples", 1),
               ("draw_methods", 1), ("show_tables", 1)]  # fmt: skip

    for function, call in moments:
        at = {function: [call, signal.SIGKILL]}
        code, _ = forker.run("patchcore", *arguments, cwd=tmp_path, signals=at)
        assert code == -signal.SIGKILL
        check_files(tmp_path)
        half = tmp_path / "results/patchcore/.999999.tmp"  # of a process that is no more
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
    code, err = forker.run("patchcore", *arguments, cwd=tmp_path)
    assert code == 0, err
    check_files(tmp_path)
    assert not left_over(tmp_path)
    assert (tmp_path / "results/methods.png").exists()


def test_two_runs_into_one_folder(forker, original_pill, tmp_path):
    arguments = ["--data", original_pill, *SMALL, *QUICK["patchcore"], "--save", "m.pt"]

    def run(i):
        return forker.run("patchcore", *arguments, "--seed", i, cwd=tmp_path)

    for code, err in together(run, range(2), at_once=2):
        assert code == 0, err
    check_files(tmp_path)
    assert not left_over(tmp_path)


def test_an_interrupted_run_of_another_method_harms_none(forker, original_pill, tmp_path):
    def run(method, **settings):
        arguments = ["--data", original_pill, *SMALL, *QUICK[method]]
        return forker.run(method, *arguments, cwd=tmp_path, **settings)

    assert run("knn")[0] == 0
    assert run("knn", signals={"draw_examples": [1, signal.SIGINT]})[0] == 130
    for name, content in [("dfr", "[]"), ("autoencoder", '{"images": 1')]:
        (tmp_path / "results" / name).mkdir()
        (tmp_path / "results" / name / "metrics.json").write_text(content)
    (tmp_path / "results/knn/strip.png").write_bytes(b"half")
    code, err = run("patchcore")
    assert code == 0, err
    check_files(tmp_path / "results/patchcore")

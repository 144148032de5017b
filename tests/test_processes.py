"""What only a process shows: how it ends, and with which words.

An interpreter that never ends hides crashes, so each run here is a process to its very end. The
libraries are imported once; each run is a fork of that.
"""

import json
import os
import shutil
import subprocess
import sys

import common

import pytest
from conftest import SCRIPTS, small
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")

FORKS = """
import gc, json, os, runpy, signal, sys
import common, torch

gc.freeze()  # what the libraries made is not walked through at each child's end
for number, (arguments, first) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    os.makedirs(f"run{number}", exist_ok=True)
    os.chdir(f"run{number}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in enumerate(["/dev/null", "out", "err"]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    exec(first)
    sys.argv = arguments
    runpy.run_path(sys.argv[0], run_name="__main__")
    break
"""


def forked(folder, jobs):
    """Runs scripts, each with (arguments, code to execute before), one after another. Returns
    (exit code, stderr, folder) of each."""
    command = [sys.executable, "-c", FORKS, json.dumps(jobs, default=str)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.check_output(command, cwd=folder, text=True, env=variables)
    folders = [folder / f"run{number}" for number in range(len(jobs))]
    codes = map(int, done.split())
    # What is frozen above is never freed. Triton says so at the end of Python 3.13, by nanobind.
    errors = [(f / "err").read_text().split("nanobind:")[0] for f in folders]
    return list(zip(codes, errors, folders, strict=True))


def one_line(code, err, expected):
    """The exit code, one line that says it all (and maybe notes before), nothing after."""
    assert code == expected, err
    assert "Traceback" not in err
    assert "terminate" not in err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    return lines[0]


def fit(method, data, *more):
    return [SCRIPTS[method], "--data", data, *small(method), *more]


LINGER = """
prepare = common.prepare
def wrapper(*arguments, **settings):
    for _ in range(100):
        torch.ones(500_000).add_(1)
    return prepare(*arguments, **settings)
common.prepare = wrapper
"""
INTERRUPT = """
import itertools
function, calls = {0}, itertools.count(1)
def wrapper(*arguments, **settings):
    if next(calls) == {1}:
        os.kill(os.getpid(), signal.SIGINT)
    return function(*arguments, **settings)
{0} = wrapper
"""


# As `| head -0` would.
CLOSED_PIPE = "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)"
FULL_DISK = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"


def test_how_runs_end(pill, fitted, tmp_path):
    judge = [SCRIPTS["knn"], "--load", fitted, "--predict", pill / "test"]
    cut = shutil.copytree(pill, tmp_path / "cut")
    image = cut / "train/good/000.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    # Six times, as it is a matter of luck: the other images are still worked on, in torch, when the
    # error comes. To end the interpreter under them would be an abort.
    cases = [(fit("knn", cut), LINGER, 2, "000.jpg: cannot be read as an image")] * 6
    cases.append((judge, FULL_DISK, 2, "error: stdout: No space left on device"))
    cases.append((judge, "os.close(1); sys.stdout = None", 2, "error: stdout: is closed"))
    for arguments, function, call in [  # Ctrl-C while a function is called for the so-manieth time
        (fit("patchcore", pill), "common.read_image", 5),
        (fit("patchcore", pill), "common.farthest_rows", 1),
        (fit("autoencoder", pill), "torch.nn.functional.mse_loss", 9),
        (fit("patchcore", pill), "common.save_picture", 2),
        (judge, "common.read_image", 4),
    ]:
        first = INTERRUPT.format(function, call)
        cases.append((arguments, first, 130, "interrupted: nothing was left half-written"))

    # A broken photo, and a picture that cannot be written, do not stop the others.
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b", "n" * 251):
        Image.open(pill / "test/good/000.jpg").save(photos / f"{name}.jpg")
    (photos / "broken.jpg").write_bytes(b"no image")
    pictures = tmp_path / "results/knn/predictions" / photos.relative_to("/")
    (pictures / "a.jpg.png").mkdir(parents=True)
    of_photos = [*judge[:-1], "../photos", "--out", tmp_path / "results", "--batch-size", "2"]
    one_by_one = [*judge[:-1], pill, "--batch-size", "1"]

    jobs = [case[:2] for case in cases] + [(of_photos, ""), (one_by_one, CLOSED_PIPE)]
    jobs.append((fit("knn", pill, "--save", "/dev/full"), ""))
    *ends, (code, err, folder), closed_pipe, full_disk = forked(tmp_path, jobs)
    assert (code, err.count("error: ")) == (1, 2)
    assert "broken.jpg: cannot be read" in err
    assert "a.jpg.png: cannot be written" in err
    assert len((folder / "out").read_text().splitlines()) == 1 + 3
    assert len([path for path in pictures.iterdir() if path.is_file()]) == 2
    assert (closed_pipe[0], "Traceback" in closed_pipe[1]) == (141, False)
    line = one_line(*full_disk[:2], 2)
    assert line.startswith("error: /dev/full: cannot be written: No space left on device")
    assert (full_disk[2] / "results/knn/metrics.json").exists()  # the report came all the same
    for (_, _, expected, message), (code, err, folder) in zip(cases, ends, strict=True):
        assert message in one_line(code, err, expected)
        assert not list(folder.rglob(".*")) + list(folder.rglob("*.pt"))  # nothing unfinished
        for picture in folder.rglob("*.png"):
            Image.open(picture).verify()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with common.atomic(path) as first, common.atomic(path) as second:  # of two runs
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the one that ended last

    def write_half():
        with common.atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]

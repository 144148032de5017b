"""Thousands of damaged files: each is read, or refused by a UserError, and nothing else happens."""

import io
import os
import subprocess
import sys

import common

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image


def mutated(content: bytes, random) -> bytes:
    """Cut, with bits flipped, or with a span of other bytes."""
    data = bytearray(content)
    kind = random.integers(4)
    if kind == 0:
        del data[random.integers(len(data)) :]
    elif kind == 1:
        for place in random.integers(len(data), size=random.integers(1, 20)):
            data[place] ^= 1 << int(random.integers(8))
    elif kind == 2:  # in the header, where it matters most
        for place in random.integers(min(len(data), 100), size=random.integers(1, 4)):
            data[place] = int(random.integers(256))
    else:
        start, length = int(random.integers(len(data))), int(random.integers(1, 200))
        data[start : start + length] = random.bytes(length)
    return bytes(data)


def test_damaged_images(tmp_path, capfd):
    Image.init()
    y, x = np.mgrid[:40, :60]
    image = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], axis=2).astype(np.uint8))
    seeds = []
    for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        for mode in ("RGB", "L", "P", "1", "RGBA", "I;16"):
            deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
            try:
                converted = deep if mode == "I;16" else image.convert(mode)
                converted.save(file := io.BytesIO(), kind)
                seeds.append(file.getvalue())
                break
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                continue  # this format has no such mode
    assert len(seeds) > 15
    random, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    path = tmp_path / "image"
    for i in range(2200):
        path.write_bytes(mutated(seeds[i % len(seeds)], random))
        try:
            found = common.read_image(path)
            pixels = common.prepare(path, found, 32, (32, 32))
            assert (found.mode, pixels.shape, pixels.dtype) == ("RGB", (3, 32, 32), torch.uint8)
            outcomes["read"] += 1
        except common.UserError as error:
            if not str(error).startswith(f"{path}: ") or "\n" in str(error):
                pytest.fail(str(error))
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 400, outcomes
    assert capfd.readouterr().err == ""


def test_damaged_models(tmp_path):
    model = {"format": common.FORMAT, "method": "knn", "settings": {"crop": 64, "seed": 0}}
    model |= {"state": {"bank": torch.rand(6, 5)}, "normal_scores": torch.rand(6)}
    model["digest"] = common.digest(model)
    path, random, loaded = tmp_path / "m.pt", np.random.default_rng(0), 0
    torch.save(model, path)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutated(content, random))
        try:
            found = common.load_model(path, "knn")
            assert common.digest(found) == model["digest"]  # the damage was in the padding
            loaded += 1
        except common.UserError as error:
            if not str(error).startswith(f"--load {path}: "):
                pytest.fail(str(error))
    assert loaded < 200


def test_damaged_weights(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    path, random, refused = tmp_path / "w.pth", np.random.default_rng(0), 0
    torch.save(network.state_dict(), path)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutated(content, random))
        try:
            state = common.load_torch_file("--weights", path, "weights")
            common.load_weights(network, state, "w.pth", "linear")
            assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
        except common.UserError as error:
            if not str(error).startswith("--weights "):
                pytest.fail(str(error))
            refused += 1
    assert refused > 100


def test_damaged_files_print_no_warning(tmp_path):
    """As a user meets it: Python's warnings would be lines on stderr."""
    code = f"""
import common, numpy as np, test_fuzz
from pathlib import Path
from PIL import Image
random, path = np.random.default_rng(1), Path({str(tmp_path)!r}, "image.tif")
for i in range(400):
    Image.new(("RGB", "L", "P")[i % 3], (40, 40), i % 200).save(path, "TIFF")
    path.write_bytes(test_fuzz.mutated(path.read_bytes(), random))
    try:
        common.read_image(path)
    except common.UserError:
        continue
"""
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=variables)
    assert (done.returncode, done.stderr) == (0, b"")

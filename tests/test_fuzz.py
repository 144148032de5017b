"""Hundreds of damaged files: each is read, or refused by a UserError, and nothing else happens."""

import io
from contextlib import suppress

import common

import numpy as np
import pytest
import torch
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
    images = [image.convert(mode) for mode in ("RGB", "L", "P", "1", "RGBA")]
    images.append(Image.fromarray(np.asarray(images[1]).astype(np.uint16) * 200))
    for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        for converted in images:  # until the format has such a mode
            with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
                converted.save(file := io.BytesIO(), kind)
                seeds.append(file.getvalue())
                break
    assert len(seeds) > 15
    random = np.random.default_rng(0)
    path = tmp_path / "image"
    read = 0
    for i in range(300):
        path.write_bytes(mutated(seeds[i % len(seeds)], random))
        try:
            found = common.read_image(path, (12, 16)[i % 2])
            assert common.read_mask(path).dtype == bool
            pixels = common.prepare(found, 32, 32, path)
            assert (found.mode, pixels.shape, pixels.dtype) == ("RGB", (3, 32, 32), torch.uint8)
            read += 1
        except common.UserError as error:
            if not str(error).startswith(f"{path}: ") or "\n" in str(error):
                pytest.fail(str(error))
    assert 50 < read < 250
    err = capfd.readouterr().err
    assert all("frames or pages" in line for line in err.splitlines()), err

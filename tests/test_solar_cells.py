"""The dataset of solar cells: which cells go where, and what is said if they cannot."""

import sys

import numpy as np
import pytest
import solar_cells
from PIL import Image


def test_no_module_is_on_both_sides():
    groups = np.arange(120) // 10  # 12 modules, each with 4 good cells and 3 defective ones
    grades = np.tile([0, 0, 0, 0, 1, 1, 2, 3, 3, 3], 12)
    counts = {"train/good": 10, "test/good": 20, "test/defective": 27}
    cells = solar_cells.split(grades, groups, counts, np.random.default_rng(0))
    modules = {name: len(set(groups[numbers])) for name, numbers in cells.items()}
    assert modules == dict.fromkeys(modules, 9) | {"train/good": 3}
    counts["test/defective"] = 28  # these 9 modules have 27
    assert solar_cells.split(grades, groups, counts, np.random.default_rng(0)) is None


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["solar_cells.py", "cells"])
    with pytest.raises(SystemExit, match="2"):
        solar_cells.main()
    assert "pip install elpv-dataset==1.0.0.post1" in capsys.readouterr().err


def test_photos_are_the_packages_own(tmp_path):
    images, grades, kinds = pytest.importorskip("elpv_dataset.utils").load_dataset()
    ends = np.cumsum(solar_cells.MODULES)
    assert [len(set(module)) for module in np.split(kinds, ends)] == [1] * 44 + [0]
    counts = {"train/good": 20, "test/good": 5, "test/defective": 4}
    solar_cells.make_dataset(tmp_path / "cells", "mono", counts, seed=0, mixed=False)
    assert len(list(tmp_path.glob("cells/t*/*/*.png"))) == 29
    folders = ["good", "one_third", "two_thirds", "defective"]
    for path in tmp_path.rglob("*.png"):
        number = int(path.stem.removeprefix("cell")) - 1
        assert path.parent.name == folders[round(3 * grades[number])]
        assert np.array_equal(np.asarray(Image.open(path)), images[number])
    with pytest.raises(ValueError, match="is not empty"):
        solar_cells.make_dataset(tmp_path / "cells", "mono", counts, seed=0, mixed=True)

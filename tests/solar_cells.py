"""Makes a dataset of real photos of a package: python tests/solar_cells.py FOLDER [--kind poly ...]

`pip install elpv-dataset==1.0.0.post1` brings 2,624 electroluminescence photos of solar cells, gray
and 300 x 300, each graded 0 (good), 1/3, 2/3 or 1 (defective). They are under CC BY-NC-SA 4.0, so
none is in this repository. Sources: Buerhop-Lutz et al.: A Benchmark for Visual Identification of
Defective Solar Cells in Electroluminescence Imagery, EU PVSEC 2018. Deitsch et al.: Automatic
Classification of Defective Photovoltaic Module Cells in Electroluminescence Images, Solar Energy
185, 2019; and Segmentation of Photovoltaic Module Cells in Uncalibrated Electroluminescence Images,
Machine Vision and Applications 32, 2021.

FOLDER gets train/good, test/good and test/defective in MVTec layout. The grades between lie outside
of test, in between/one_third and between/two_thirds: no metric should count them as defective, and
--predict judges them.

Cells of one module look alike. So the test cells are of other modules than the training cells, as
those of a module that was made later are. With --mixed a module's cells fall on both sides.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

# How many cells of each module there are, in the package's order. It names no modules, but the kind
# of cell changes at these places alone, and the photos' look at nearly all of them: 18 modules are
# mono and 26 poly, as the papers say.
MODULES = [60] * 20 + [54] + [60] * 6 + [50] + [60] * 8 + [72] + [60] * 3 + [48] + [60] * 3


def split(grades: np.ndarray, groups: np.ndarray, counts: dict, random) -> dict | None:
    """Draws which cells go into which folder: {folder: (n,) numbers of cells}.

    Grades are (N,) from 0 to 3, in thirds. `groups`, (N,) int, says which cells must not be parted:
    if train/good has a good cell of a group, the folders of test have none of it. `counts` holds
    the sizes of folders; those without one get all that there are. Returns None if the groups as
    drawn leave too few cells.
    """
    is_good = grades == 0
    order = random.permutation(np.unique(groups[is_good]))
    held = np.bincount(groups, is_good)[order].cumsum()  # good cells up to each group
    enough = np.searchsorted(held, counts["train/good"]) + 1
    seen = np.isin(groups, order[:enough])  # (N,)
    cells = {"train/good": seen & is_good, "test/good": ~seen & is_good}
    for grade, folder in enumerate(["between/one_third", "between/two_thirds", "test/defective"]):
        cells[folder] = ~seen & (grades == grade + 1)
    drawn = {}
    for folder, of_folder in cells.items():
        numbers = random.permutation(np.flatnonzero(of_folder))
        if len(numbers) < counts.get(folder, 0):
            return None
        drawn[folder] = numbers[: counts.get(folder)]
    return drawn


def make_dataset(folder: Path, kind: str, counts: dict, seed: int, mixed: bool) -> dict:
    """Writes the dataset, whole or not at all. Returns the cells as `split` does."""
    from elpv_dataset.utils import load_dataset

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty: name a new folder")
    images, probabilities, kinds = load_dataset()  # (2624, 300, 300) uint8, (2624,), (2624,) of str
    chosen = np.flatnonzero((kinds == kind) | (kind == "all"))
    grades = (3 * probabilities[chosen]).round().astype(int)
    groups = np.repeat(np.arange(len(MODULES)), MODULES)[chosen]
    if mixed:
        groups = np.arange(len(chosen))  # each cell on its own
    random = np.random.default_rng(seed)
    # Modules differ in how many of their cells are good, so that not every draw leaves enough.
    draws = (split(grades, groups, counts, random) for _ in range(1000))
    cells = next(filter(None, draws), None)
    if cells is None:
        raise ValueError(f"{kind} cells are too few for these numbers: lower one, or take --mixed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        for name, numbers in cells.items():
            target = Path(unfinished, folder.name, name)
            target.mkdir(parents=True)
            for number in chosen[numbers]:
                # The package counts its files from 1.
                Image.fromarray(images[number]).save(target / f"cell{number + 1:04d}.png")
        if folder.exists():
            folder.rmdir()  # it is empty
        target.parents[1].rename(folder)
    return cells


def count(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["mono", "poly", "all"], default="mono")
    for name, default in {"train": 300, "good": 150, "defective": 150, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--mixed", action="store_true", help="one module's cells on both sides")
    options = parser.parse_args()
    counts = {"train/good": options.train}
    counts |= {f"test/{name}": vars(options)[name] for name in ("good", "defective")}
    try:
        cells = make_dataset(options.folder, options.kind, counts, options.seed, options.mixed)
    except ImportError:
        parser.exit(2, "error: takes a package: pip install elpv-dataset==1.0.0.post1\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{options.folder}:", ", ".join(f"{name} {len(n)}" for name, n in cells.items()))


if __name__ == "__main__":
    main()

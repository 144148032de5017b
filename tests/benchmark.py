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

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the tests take one
import conftest  # makes the scripts importable

# isort: split
import common

import torch
from draw_practice_pill import draw_practice_pill
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
    draw_practice_pill(folder, seed, train=count, good=26, per_defect=6)
    return folder


def pixels_of(paths):
    return common.load_split(list(paths), 256, (224, 224)).pixels


@torch.inference_mode()
def wide_features(pixels):
    """(N, 28, 28, 912): EfficientNet-Lite0's depthwise outputs of blocks 4 and 10, ImageNet."""
    backbone, parts, kept = common.load_backbone("efficientnet_lite0").to(DEVICE), [], {}
    for name, block in [("fine", backbone.layer2[1]), ("coarse", backbone.layer3[5])]:
        block._bn1.register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: output.clamp(0, 6)})
        )
    for _ in common.extract(backbone, ["layer3"], pixels):
        parts.append(patchcore.patch_features([kept["fine"], kept["coarse"]]).cpu())
    return torch.cat(parts)


def random_features(pixels):
    """(N, 28, 28, 1536): layer2 and layer3 of a random ResNet50."""
    backbone = common.load_backbone("resnet50", "random").to(DEVICE)
    outputs = common.extract(backbone, ["layer2", "layer3"], pixels)
    return common.collect((patchcore.patch_features(o) for o in outputs), len(pixels), "features")


def benchmark_neighbors(options):
    """On the bank that 267 pills leave at 10 %, and the patches of 8 new ones."""
    folder = drawn_pills(267)
    new = pixels_of(sorted(folder.glob("test/*/000.jpg"))[:8])
    for name, features_of in {
        "EfficientNet-Lite0, ImageNet": wide_features,
        "ResNet50, random": random_features,
        "Gaussian": None,
    }.items():
        if features_of is None:
            bank, many = random_rows(20_928, 1536), random_rows(6_272, 1536)
        else:
            rows = features_of(pixels_of(sorted(folder.glob("train/good/*")))).flatten(0, 2)
            projected = patchcore.project(rows, 0)
            bank = rows[common.greedy_coreset(projected, len(rows) // 10)].to(DEVICE)
            many = features_of(new).flatten(0, 2).to(DEVICE)
            del rows, projected
        start = time.perf_counter()
        memory, index = common.MemoryBank(bank), faiss_index(bank)
        print(f"\n{name}: prepared in {time.perf_counter() - start:.2f} s, FAISS's index included")
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
            common.measure = lambda *a, m=measure, p=pairs: p.append(len(a[2])) or m(*a)
            memory.nearest(queries, k)
            common.measure = measure
            print(f"  measured directly: {sum(pairs) / len(queries):.1f} rows a query")


def benchmark_run(_options):
    """04 at the size of MVTec AD's pill, 267 normal and 68 test images, by stage."""
    for extra in (["--weights", "random"], ["--backbone", "efficientnet_lite0"]):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, conftest.SCRIPTS["patchcore"], "--data", drawn_pills(267)]
            start = time.perf_counter()
            run = subprocess.run([*command, "--out", out, *extra], capture_output=True, text=True)
            print(
                f"\n04 on 267 + 68 images, {' '.join(extra)}: {time.perf_counter() - start:.0f} s"
            )
            print(" ", next(line for line in run.stdout.splitlines() if "seconds:" in line))


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
    features = wide_features(pixels_of(sorted(folder.glob("train/good/*")))).flatten(0, 2)
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
            sys.path.insert(0, str(options.sampler))
            from patchcore.sampler import ApproximateGreedyCoresetSampler

            sampler = ApproximateGreedyCoresetSampler(0.1, torch.device(DEVICE))
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
    figure, (left, right) = common.pyplot.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
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
    common.save_figure(figure, options.figure)


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
                    at = metrics["threshold"]
                    rates.append(at["false_alarms"] / at["normal_images"])
                    use = ["--load", model]
            print(f"{method}, set {seed}:", *(f"{r[-1]:.3f}" for r in found.values()), flush=True)
        means = ", ".join(f"{statistics.mean(r):.3f} for {rate:g}" for rate, r in found.items())
        print(f"false-alarm rate of {method}, mean of {options.sets} sets: {means}", flush=True)


def main():
    parts = {"neighbors": benchmark_neighbors, "memory": benchmark_memory, "run": benchmark_run,
             "coreset": benchmark_coreset, "cost": benchmark_cost}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*parts, "threshold"], default=list(parts))
    parser.add_argument("--repeat", type=int, default=5)
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
        (parts | {"threshold": benchmark_threshold})[part](options)


if __name__ == "__main__":
    main()

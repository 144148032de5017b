"""PatchCore: a memory of normal patches, thinned to a coreset, and the distance to it.

Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly
Detection, CVPR 2022, arXiv:2106.08265.

03 remembers whole images, and so cannot say where a defect is. PatchCore remembers small regions:
a network trained on ImageNet describes each by a vector, its patch feature, and a memory bank holds
those of all normal images. A region is as anomalous as its patch feature is far from the nearest
one in the bank, and an image as its most anomalous region:

    s* = max over the image's patches m_test of  min over the bank's m of  |m_test - m|

No training: all there is to fit is which features to keep. Read `patch_features` (section 3.1),
`fit` (3.2, the coreset that makes the bank ten times smaller) and `score_patches` (3.3, equations 6
and 7, which makes the score s of s*).

What to look at: in examples.png, where the map is bright: the location comes with the score. In
coreset.png, how the first picks span the features, outliers first, and the later ones fill in.
What it cannot do: be sure to see that normal parts are in the wrong place or number (a patch knows
no position), or see what ImageNet features do not, such as a hair's change of shade.
"""

import time
from functools import partial

import common

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

JUDGED = 100  # normal images, to set the threshold; each takes as long as a test image


def add_options(add):
    # The paper's layers, and the middle one of its 1 %, 10 % and 25 %. It leaves b open.
    # differs from the paper: ResNet50 instead of the authors' WideResNet50, for time and memory.
    layers = ["layer1", "layer2", "layer3", "layer4"]
    add("--coreset", type=float, metavar="R", default=0.1, help="share of the features kept (0.1)")
    add("--neighbors", type=int, metavar="N", default=9, help="b of equation 7; 1: s* itself (9)")
    add("--layers", nargs="+", choices=layers, default=["layer2", "layer3"], metavar="LAYER")


def patch_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section 3.1: one locally aware feature vector per patch of the finest layer's grid.

    outputs: per layer (B, C, h, w), finest first. Returns (B, h, w, C summed over layers).
    """
    parts = []
    for output in outputs:
        # f_agg (equation 2): the average over the 3 x 3 neighborhood, so that a patch feature sees
        # more than its own cell and small shifts change it little. Zeros pad the border.
        # differs from the paper: its code averages the C x 9 numbers of a neighborhood, in order,
        # down to 1024 per layer, then both layers to 1024. On a ResNet, whose layer3 has 1024
        # channels, layer3 is left a quarter of its weight in squared distances. A quarter gives, by
        # EfficientNet-Lite0, image AUROC / pixel AUROC / AU-PRO 0.958 / 0.837 / 0.920 on the
        # practice pill (here 0.965 / 0.816 / 0.908), 0.938 / 0.937 / 0.871 on the transistors (here
        # 1.000 / 0.946 / 0.903). The whole pooling, which stretches that network's 360 and 1,008
        # numbers and loses the average, gives 0.925 / 0.810 / 0.908 and 1.000 / 0.896 / 0.819.
        output = torch.nn.functional.avg_pool2d(output, 3, 1, padding=1)
        parts.append(common.resize(output, outputs[0].shape[2:]))
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # ResNet50: (B, 28, 28, 512 + 1024)


def fit(backbone, train: common.Split, options) -> dict:
    """Section 3.2, algorithm 1: the memory bank. Returns the model."""
    start = time.perf_counter()
    count, given = len(train.paths), (options.layers, train.pixels, options.batch_size)
    batches = map(patch_features, common.extract(backbone, *given, "fit: features"))
    features = common.collect(batches, count, f"the features of {count} images")  # (N, h, w, C)
    rows = features.flatten(0, 2)
    size = max(1, round(options.coreset * len(rows)))
    if options.neighbors > size:
        raise common.UserError(
            f"--neighbors {options.neighbors}: the memory bank holds {size} rows"
        )
    projected = project(rows, options.seed).to(options.device)  # (N * h * w, 128)
    cover = common.greedy_coreset(projected, size, options.seed, options.backend, with_cover=True)
    chosen = cover[0].cpu()
    bank = rows[chosen]
    judged = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    judged = judged[:JUDGED].sort().values
    result = judge_as_new(features, projected, cover, judged, options)
    model = common.save_model(options, backbone, {"bank": bank}, result, train, judged, start)
    draw_coreset(projected.cpu(), chosen, options, model)
    return model


def project(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """(n, C) to (n, 128), for the coreset's distances alone; the bank keeps the features whole.

    128 random directions keep squared distances, typically to 12 %: of a million pairs of real
    features the ratio had a deviation of 0.117, and ran from 0.53 to 1.61. What Johnson and
    Lindenstrauss's lemma bounds for all pairs at once grows with log(n).
    """
    if rows.shape[1] <= 128:
        return rows
    projection = GaussianRandomProjection(128, random_state=seed)
    matrix = projection.fit(np.zeros((1, rows.shape[1]), np.float32)).components_  # (128, C)
    return rows @ torch.from_numpy(matrix.T).to(rows)


def judge_as_new(features, projected, cover, judged, options) -> common.Result:
    """What normal images score by memory banks that have not seen them, so as new ones will.

    To leave out only an image's own rows would leave a hole around each, because the coreset put no
    other row near; normal images would seem far from normal. So other images' patches refill it,
    until none is farther from the bank than the farthest is from the whole coreset: a bank that
    greedy might have picked without the image. No theorem says that a new image scores alike; the
    README has the false-alarm rates that come out. On the practice pill refills change 7 of 60
    scores and not the threshold at 10 %; at 1 % they bring it from 29.1 to 27.6, at 0.1 % from 44.7
    to 38.5.

    features: (N, h, w, C). projected: (N * h * w, 128). cover: by `greedy_coreset`. judged: (n,).
    """
    (chosen, nearest, distances), rows = cover, features.flatten(0, 2)
    owner = torch.arange(len(rows), device=chosen.device) // features[0, ..., 0].numel()  # image
    coreset, refills = common.MemoryBank(projected[chosen], options.backend), []
    for image in judged.tolist():
        loose = ((owner[chosen[nearest]] == image) & (owner != image)).nonzero()[:, 0]
        bank = coreset.only(owner[chosen] != image)
        refills.append(refill(bank, projected, loose, distances.max()))
    # One memory serves all: the coreset, then the refills, image by image.
    kept = torch.cat([chosen, *refills])
    memory = common.MemoryBank(rows[kept.cpu()].to(options.device), options.backend)
    serves = judged.to(kept).repeat_interleave(kept.new_tensor([len(added) for added in refills]))
    found = []
    for image in common.progress(judged.tolist(), "fit: judge images as if new"):
        keep = torch.cat([owner[chosen] != image, serves == image])
        b = min(options.neighbors, int(keep.sum()))
        new = features[image : image + 1].to(options.device)
        found.append(score_patches(new, memory.only(keep), b))
    scores, grids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return common.Result(scores, common.to_maps(grids, options.crop or options.resize), [])


def refill(bank, projected, loose, radius) -> torch.Tensor:
    """Which of the rows `loose` (n,) to add to a bank, the farthest first, until none is farther
    from it than `radius`."""
    added, gap = loose[:0], torch.full(loose.shape, torch.inf, device=loose.device)
    if len(loose) and bank.offsets.isfinite().any():
        gap = bank.nearest(projected[loose])[0][:, 0]
    while len(loose) and gap.max() > radius:
        added = torch.cat([added, loose[gap.argmax()][None]])
        to_added = torch.linalg.vector_norm(projected[loose] - projected[added[-1]], dim=1)
        gap = torch.minimum(gap, to_added)
    return added


def score_patches(features, bank, b: int):
    """Section 3.3: how anomalous each image is, and each of its patches.

    features: (B, h, w, C). bank: a `MemoryBank`. b: of equation 7, at most the rows of the bank.
    Returns scores (B,) and distances (B, h, w).
    """
    images = torch.arange(len(features), device=features.device)
    patches = features.flatten(1, 2)  # (B, h * w, C)
    distances, rows = (t.view(len(patches), -1) for t in bank.nearest(patches.flatten(0, 1)))
    s_star, worst = distances.max(dim=1)  # equation 6
    s = s_star
    if b > 1:
        # Equation 7: m* is the row nearest to the worst patch m_test. Where the bank is sparse
        # around m*, its neighbors N_b(m*) are farther from m_test, and the distance counts in full;
        # where they are as near, it counts less. exp knows no unit, and the practice pill's
        # distances of 20 saturate it: the weight is 0.989 to 1.000, AUROC as with b = 1.
        m_test = patches[images, worst]  # (B, C)
        _, around = bank.nearest(bank.rows[rows[images, worst]], b)  # of m*: (B, b)
        to_around = torch.linalg.vector_norm(m_test[:, None] - bank.rows[around], dim=2)
        # softmax = exp(|m_test - m*|) / sum of exp(|m_test - m|); the first neighbor is m* itself.
        s = (1 - to_around.softmax(dim=1)[:, 0]) * s_star
    return s.cpu(), distances.view(features.shape[:3]).cpu()


def score(backbone, bank, pixels: torch.Tensor, options) -> common.Result:
    """Scores (N,) and anomaly maps (N, S, S) of images (N, 3, S, S) uint8 by a `MemoryBank`."""
    found = []
    for outputs in common.extract(backbone, options.layers, pixels, options.batch_size, "score"):
        found.append(score_patches(patch_features(outputs), bank, options.neighbors))
    scores, grids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return common.Result(scores, common.to_maps(grids, pixels.shape[2]), [])


def draw_coreset(projected, chosen, options, model: dict) -> None:
    """coreset.png: patch features in the plane of their two principal axes, and the picks."""
    sample = torch.randperm(len(projected), generator=torch.Generator().manual_seed(options.seed))
    plane = PCA(2, random_state=options.seed).fit(projected[sample[:5000]])
    cloud, picks = (plane.transform(projected[i]) for i in (sample[:20000], chosen))
    figure, colors = common.Figure(figsize=(10.5, 3.9)), {"cmap": "viridis", "linewidths": 0}
    room = {"left": 0.01, "right": 0.92, "bottom": 0.02, "top": 0.83, "wspace": 0.04}
    axes = figure.subplots(1, 3, sharex=True, sharey=True, gridspec_kw=room)
    colors["norm"] = common.matplotlib.colors.LogNorm(1, len(picks))
    for axis, share in zip(axes, (0.01, 0.1, 1), strict=True):
        count = max(1, round(share * len(picks)))
        axis.scatter(*cloud.T, s=1, color="lightgray", linewidths=0, rasterized=True)
        order = np.arange(count)[::-1]  # the first picks on top
        dots = axis.scatter(*picks[order].T, s=7, c=order + 1, **colors)
        axis.set(xticks=[], yticks=[], title=f"the first {count:,} picks")
    axis.set_title(f"the memory bank: {len(picks):,} of {len(projected):,}")
    figure.colorbar(dots, figure.add_axes((0.935, 0.1, 0.012, 0.65)), label="order of the picks")
    title = f"patch features (gray) and picks: {common.run_label(options, model)}"
    common.save_figure(figure, title, options.out / "coreset.png")


def judge_by(backbone, model: dict, options):
    """The function that judges images by a fitted model: pixels (N, 3, S, S) uint8 -> Result."""
    bank = common.MemoryBank(model["state"]["bank"].to(options.device), options.backend)
    return partial(score, backbone, bank, options=options)


def main():
    options, model = common.parse_options("patchcore", __doc__, add_options)
    backbone = common.choose_backbone(options, model)
    size = options.resize, options.crop, options.bits
    train, test = common.load_data(options.data, *size, with_train=not model)
    model = model or fit(backbone, train, options)
    common.report(options, model, test, judge_by(backbone, model, options))


if __name__ == "__main__":
    common.run(main)

"""PatchCore: a memory of normal patches, thinned to a coreset, and the distance to it.

Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly
Detection, CVPR 2022, arXiv:2106.08265.

03 remembers whole images, and so cannot say where a defect is. PatchCore remembers small regions:
a ResNet trained on ImageNet describes each by a vector, its patch feature, and a memory bank holds
those of all normal images. A region is as anomalous as its patch feature is far from the nearest
one in the bank, and an image as its most anomalous region:

    s* = max over the image's patches m_test of  min over the bank's m of  |m_test - m|

No training: all there is to fit is which features to keep. Read `patch_features` (section 3.1),
`fit` (3.2, the coreset that makes the bank ten times smaller) and `score` (3.3, equations 6 and 7).

What to look at: in examples.png, where the map is bright: the location comes with the score. In
coreset.png, how the first picks span the features, outliers first, and the later ones fill in.
What it cannot do: tell that normal parts are in the wrong place or number (a patch knows no
position), or see what ImageNet features do not, such as a hair's change of shade.
"""

import time

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

import common


def add_options(add):
    # The paper's: layer2 + layer3, and 10 %, the middle one of its 1 %, 10 % and 25 %. It leaves b
    # open; 9 is what other implementations take.
    layers = ["layer1", "layer2", "layer3", "layer4"]
    add("--coreset", type=common.number(float, 0, 1), default=0.1, metavar="RATIO",
        help="share of the patch features kept in the memory bank (0.1)")  # fmt: skip
    add("--neighbors", type=common.number(int, 1), default=9,
        help="b of equation 7; 1: the plain maximum (9)")  # fmt: skip
    add("--layers", nargs="+", default=["layer2", "layer3"], metavar="LAYER", choices=layers,
        help="ResNet stages the patch features come from (layer2 layer3)")  # fmt: skip


def patch_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section 3.1: one locally aware feature vector per patch of the finest layer's grid.

    outputs: per layer (B, C, h, w), finest first. Returns (B, h, w, C summed over layers).
    """
    parts = []
    for output in outputs:
        # f_agg (equation 2): the average over the 3 x 3 neighborhood, so that a patch feature sees
        # more than its own cell and small shifts change it little.
        # differs from the paper: its code also brings both layers to 1024 dimensions by adaptive
        # pooling along the channels; left out, as it only reshuffles what the mean already holds.
        output = torch.nn.functional.avg_pool2d(output, 3, 1, padding=1, count_include_pad=False)
        parts.append(common.resize(output, outputs[0].shape[2:]))
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # ResNet50: (B, 28, 28, 512 + 1024)


def fit(resnet, pixels: torch.Tensor, options) -> dict:
    """Section 3.2, algorithm 1: the memory bank, and what normal images score against it.

    pixels: (N, 3, crop, crop) uint8, normal images. Returns the model.
    """
    start = time.perf_counter()
    batches = common.extract(resnet, options.layers, pixels, options, "fit: features")
    features = torch.cat([patch_features(outputs).cpu() for outputs in batches])  # (N, h, w, C)
    _, height, width, channels = features.shape
    patches = features.view(-1, channels)
    size = max(1, round(options.coreset * len(patches)))
    if options.neighbors > size:
        held = f"the memory bank holds {size} patch features"
        raise common.UserError(f"--neighbors {options.neighbors}: {held}: lower it or add images")
    with common.stage("coreset"):
        # Johnson-Lindenstrauss: 128 random directions nearly keep the distances. They choose the
        # rows; the bank keeps the features whole.
        projected = patches.to(options.device)
        if channels > 128:
            projection = GaussianRandomProjection(128, random_state=options.seed)
            matrix = projection.fit(np.zeros((1, channels), np.float32)).components_
            projected = projected @ torch.from_numpy(matrix.T).to(projected)  # (N * h * w, 128)
        chosen = common.greedy_coreset(projected, size, options.seed, options.backend)
    with common.stage("threshold"):
        banks = leave_one_out(projected, chosen, height * width, options)
        judged = [
            score_patches(image[None].to(options.device), patches[rows].to(options.device), options)
            for image, rows in zip(features, banks, strict=True)
        ]
        scores, grids = (torch.cat(parts) for parts in zip(*judged, strict=True))
        maps = common.to_maps(grids, options.crop)
    seconds = time.perf_counter() - start
    with common.stage("figures"):
        draw_coreset(patches, chosen.cpu(), options)
    bank = patches[chosen.cpu()]  # (size, C), in the order picked
    return common.save_model(options, {"bank": bank}, scores, maps, seconds)


def leave_one_out(projected, chosen, patches_per_image, options):
    """Per training image, the rows of a bank that has not seen it: what does a new image score?

    To leave out only the image's own rows would leave a hole around each, because the coreset put
    no other row near; normal images would seem far from normal. So other images' patches fill the
    hole, farthest first, until all are as near to the bank as they were: what greedy would do.
    projected: (N, 128). chosen: (size,) rows of it. Yields indices (about size,) on the CPU.
    """
    owner = torch.arange(len(projected), device=projected.device) // patches_per_image
    distances, nearest = common.nearest_neighbors(projected, projected[chosen], 1, options.backend)
    radius = distances.max()  # no patch is farther than this from the coreset
    covered_by = owner[chosen][nearest[:, 0]]  # whose row is nearest
    for image in common.progress(owner.unique(), "fit: leave one image out"):
        rows = chosen[owner[chosen] != image]
        loose = torch.nonzero((covered_by == image) & (owner != image))[:, 0]
        if len(rows) and len(loose):
            candidates = projected[loose]
            gap = common.nearest_neighbors(candidates, projected[rows], 1, options.backend)[0][:, 0]
            while gap.max() > radius:
                new = gap.argmax()
                rows = torch.cat([rows, loose[new, None]])
                to_new = torch.linalg.vector_norm(candidates - candidates[new], dim=1)
                gap = torch.minimum(gap, to_new)
        yield (rows if len(rows) else torch.nonzero(owner != image)[:1, 0]).cpu()


def score_patches(features, bank, options):
    """Section 3.3: how anomalous each image is, and each of its patches.

    features: (B, h, w, C). bank: (N, C). Returns scores (B,) and patch distances (B, h, w).
    """
    images = torch.arange(len(features), device=features.device)
    patches = features.flatten(1, 2)  # (B, h * w, C)
    distances, nearest = common.nearest_neighbors(
        patches.flatten(0, 1), bank, backend=options.backend
    )
    distances, nearest = (t.view(len(patches), -1) for t in (distances, nearest))  # (B, h * w)
    s_star, worst = distances.max(dim=1)  # equation 6
    if options.neighbors > 1:
        # Equation 7: a distance counts less where the bank itself is sparse, that is where m*, the
        # normal patch nearest to the worst patch m_test, has its own neighbors N_b(m*) far from
        # m_test too. The neighborhood is that of m* *in the bank*, not that of m_test.
        m_test = patches[images, worst]  # (B, C)
        m_star = bank[nearest[images, worst]]
        b = min(options.neighbors, len(bank))
        _, around = common.nearest_neighbors(m_star, bank, b, options.backend)
        to_around = torch.linalg.vector_norm(m_test[:, None] - bank[around], dim=2)
        # softmax = exp(|m_test - m*|) / sum of exp(|m_test - m|); the first neighbor is m* itself.
        s_star = (1 - to_around.softmax(dim=1)[:, 0]) * s_star
    return s_star.cpu(), distances.view(features.shape[:3]).cpu()


def score(resnet, state: dict, pixels: torch.Tensor, options):
    """Scores (N,) and anomaly maps (N, crop, crop) of images (N, 3, crop, crop) uint8."""
    bank = state["bank"].to(options.device)
    judged = []
    for outputs in common.extract(resnet, options.layers, pixels, options, "score"):
        with common.stage("search"):
            judged.append(score_patches(patch_features(outputs), bank, options))
    scores, grids = (torch.cat(parts) for parts in zip(*judged, strict=True))
    with common.stage("maps"):
        return scores, common.to_maps(grids, options.crop)


def draw_coreset(patches, chosen, options) -> None:
    """coreset.png: patch features in the plane of their two principal axes, and the picks."""
    sample = torch.randperm(len(patches), generator=torch.Generator().manual_seed(options.seed))
    plane = PCA(2, random_state=options.seed).fit(patches[sample[:5000]])
    cloud, picks = plane.transform(patches[sample[:20000]]), plane.transform(patches[chosen])
    figure, axes = common.pyplot.subplots(
        1, 3, figsize=(10.5, 3.7), sharex=True, sharey=True, layout="constrained"
    )
    for axis, share in zip(axes, (0.01, 0.1, 1), strict=True):
        count = max(1, round(share * len(picks)))
        axis.scatter(*cloud.T, s=1, color="lightgray", linewidths=0, rasterized=True)
        order = np.arange(count)[::-1]  # the first picks on top
        dots = axis.scatter(*picks[order].T, s=7, c=order + 1, cmap="viridis", linewidths=0,
                            norm=common.matplotlib.colors.LogNorm(1, len(picks)))  # fmt: skip
        axis.set(xticks=[], yticks=[], title=f"the first {count:,} picks" if share < 1 else
                 f"the memory bank: {count:,} of {len(patches):,}")  # fmt: skip
    figure.colorbar(dots, ax=axes, label="order of the picks", shrink=0.8)
    figure.suptitle(f"patch features (gray) and picks: {common.run_label(options)}", fontsize=11)
    common.save_figure(figure, options.out / "coreset.png")


def main():
    options, model = common.parse_options("patchcore", __doc__, add_options)
    train, test = common.load_data(options)
    resnet = common.load_resnet(options)
    model = model or fit(resnet, train.pixels, options)

    def judge(pixels):
        return *score(resnet, model["state"], pixels, options), lambda i: []

    common.report(options, model, test, judge)


if __name__ == "__main__":
    common.run(main)

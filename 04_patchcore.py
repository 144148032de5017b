"""PatchCore: a memory of normal patches, thinned to a coreset, and the distance to it.

Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly
Detection, CVPR 2022, arXiv:2106.08265.

03 remembers whole images, and so cannot say where a defect is. PatchCore remembers small regions:
a network trained on ImageNet describes each by a vector, its patch feature, and a memory bank holds
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
from functools import partial

import common

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

# To set the threshold, as many normal images are judged as if they were new; each takes as long as
# a test image. More hardly help: on 267 practice pills, whose scores have a standard deviation of
# 1.35, the 5 % threshold has one of 0.35 from all of them, by bootstrap, and of 0.59 from 100.
JUDGED = 100


def add_options(add):
    # The paper's: layer2 + layer3, and 10 %, the middle one of its 1 %, 10 % and 25 %. It leaves b
    # open; 9 is what other implementations take.
    layers = ["layer1", "layer2", "layer3", "layer4"]
    add("--coreset", type=common.number(float, 0, 1), default=0.1, metavar="RATIO",
        help="share of the patch features kept in the memory bank (0.1)")  # fmt: skip
    add("--neighbors", type=common.number(int, 1), default=9,
        help="b of equation 7; 1: the plain maximum (9)")  # fmt: skip
    add("--layers", nargs="+", default=["layer2", "layer3"], metavar="LAYER", choices=layers,
        help="stages of the backbone the patch features come from (layer2 layer3)")  # fmt: skip


def patch_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section 3.1: one locally aware feature vector per patch of the finest layer's grid.

    outputs: per layer (B, C, h, w), finest first. Returns (B, h, w, C summed over layers).
    """
    parts = []
    for output in outputs:
        # f_agg (equation 2): the average over the 3 x 3 neighborhood, so that a patch feature sees
        # more than its own cell and small shifts change it little. Zeros pad the border.
        # differs from the paper: its code keeps the nine neighbors of each channel, averages that
        # row of C x 9 numbers in order down to 1024 per layer, and the two layers' 2048 to 1024. Of
        # a ResNet's layer3, whose 1024 channels remain, neighboring channels are thus averaged,
        # which leaves it a quarter of its weight in squared distances. Measured with EfficientNet-
        # Lite0, image AUROC / pixel AUROC / AU-PRO: practice pill 0.925 / 0.810 / 0.909 instead of
        # 0.965 / 0.816 / 0.910, transistor 1.000 / 0.896 / 0.819 instead of 1.000 / 0.946 / 0.903.
        output = torch.nn.functional.avg_pool2d(output, 3, 1, padding=1)
        parts.append(common.resize(output, outputs[0].shape[2:]))
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # ResNet50: (B, 28, 28, 512 + 1024)


def fit(backbone, train: common.Split, options) -> dict:
    """Section 3.2, algorithm 1: the memory bank, and what normal images score against it.

    The features of all images together would fill the memory (ResNet50: 4.6 MiB an image at 224
    pixels), and most are not kept. So the network looks at the images twice: all features are only
    projected the first time, for the coreset, and what to keep is kept the second time.
    Empties train.pixels. Returns the model.
    """
    start = time.perf_counter()

    def all_features(description):
        arguments = options.layers, train.pixels, options.batch_size, description
        return map(patch_features, common.extract(backbone, *arguments))  # (B, h, w, C) each

    count = len(train.paths)
    projected = (project(features, options.seed) for features in all_features("fit: features"))
    projected = common.collect(projected, count, f"{count} images' projected features")
    place = torch.arange(projected[..., 0].numel()).view(projected.shape[:3])  # of each patch
    projected = projected.flatten(0, 2).to(options.device)  # (N, h, w, 128) -> (N * h * w, 128)
    size = max(1, round(options.coreset * len(projected)))
    if options.neighbors > size:
        held = f"the memory bank holds {size} patch features"
        raise common.UserError(f"--neighbors {options.neighbors}: {held}: lower it or add images")
    with common.stage("coreset"):
        if size == len(projected):
            chosen = torch.arange(size, device=projected.device)
        else:
            chosen = common.greedy_coreset(projected, size, options.seed, options.backend)
    with common.stage("threshold"):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
        judged = order[:JUDGED].sort().values
        per_image = place[0].numel()
        refills, absent = leave_one_out(projected, chosen, per_image, judged, options.backend)
    wanted = torch.cat([chosen, refills]).cpu(), place[judged].flatten()
    features = gather(all_features("fit: features to keep"), torch.cat(wanted))
    train.pixels.set_()  # empty: nobody looks at them again
    rows, new = features.split([len(places) for places in wanted])
    with common.stage("threshold"):
        new = new.view(*place[judged].shape, -1)  # (n, h, w, C)
        scores, maps = judge_as_new(rows, new, absent, options)
    bank = common.allocate((size, rows.shape[1]), rows.dtype, "the memory bank's features")
    bank.copy_(rows[:size])  # in the order picked, without the refills
    paths, seconds = [train.paths[i] for i in judged], time.perf_counter() - start
    model = common.save_model(options, {"bank": bank}, scores, maps, paths, seconds)
    with common.stage("figures"):
        draw_coreset(projected.cpu(), chosen.cpu(), options)
    return model


def project(features: torch.Tensor, seed: int) -> torch.Tensor:
    """(..., C) to (..., 128), for the coreset's distances alone; the bank keeps the features whole.

    128 random directions keep squared distances to about 12 % (the square root of 2 / 128), as
    Johnson and Lindenstrauss showed, whatever C is.
    """
    columns = features.shape[-1]
    if columns <= 128:
        return features
    projection = GaussianRandomProjection(128, random_state=seed)
    matrix = projection.fit(np.zeros((1, columns), np.float32)).components_  # (128, C)
    return features @ torch.from_numpy(matrix.T).to(features)


def gather(batches, wanted: torch.Tensor) -> torch.Tensor:
    """Of all patch features, in batches (B, h, w, C), those at the places `wanted` (n,): (n, C)."""
    features, start = None, 0
    for batch in batches:
        batch = batch.flatten(0, 2).cpu()
        if features is None:
            shape = len(wanted), batch.shape[1]
            features = common.allocate(shape, batch.dtype, f"{len(wanted)} patch features")
        here = ((start <= wanted) & (wanted < start + len(batch))).nonzero()[:, 0]
        features[here] = batch[wanted[here] - start]
        start += len(batch)
    return features


def leave_one_out(projected, chosen, patches_per_image: int, images, backend="auto"):
    """Per image, a memory bank that has not seen it: what will a new normal image score?

    To leave out only the image's own rows would leave a hole around each, because the coreset put
    no other row near; normal images would seem far from normal. So other images' patches refill
    the hole, farthest first, until none is farther from the bank than the covering radius of the
    whole coreset: a bank that greedy might have picked without the image. No theorem says that a
    new image scores alike; the false-alarm rates that come out are measured (see the README).

    projected: (N, 128). chosen: (size,) rows of it. images: (n,), which to leave out. Returns
    refills (R,), rows of projected, one image's after another's, and absent (n, size + R) bool,
    which of the coreset's rows and the refills the bank without an image lacks.
    """
    owner = torch.arange(len(projected), device=projected.device) // patches_per_image
    coreset = common.MemoryBank(projected[chosen], backend=backend)
    distances, nearest = coreset.nearest(projected)
    radius, covered_by = distances.max(), owner[chosen[nearest[:, 0]]]  # whose row is nearest
    own, refills = owner[chosen] == images.to(owner)[:, None], []  # (n, size)
    for image, passed_over in zip(images.tolist(), own, strict=True):
        loose = torch.nonzero((covered_by == image) & (owner != image))[:, 0]
        refill = loose[:0]
        if passed_over.all():  # nothing is left: begin anew with some other patch
            refill = torch.nonzero(owner != image)[:1, 0]
        elif len(loose):
            gap = coreset.nearest(projected[loose], passed_over=passed_over)[0][:, 0]
            while gap.max() > radius:
                new = loose[gap.argmax()]
                refill = torch.cat([refill, new[None]])
                to_new = torch.linalg.vector_norm(projected[loose] - projected[new], dim=1)
                gap = torch.minimum(gap, to_new)
        refills.append(refill)
    every = torch.arange(len(images), device=owner.device)
    refill_of = every.repeat_interleave(every.new_tensor([len(refill) for refill in refills]))
    return torch.cat(refills), torch.cat([own, refill_of != every[:, None]], dim=1)


def judge_as_new(rows, images, absent, options):
    """What normal images, features (n, h, w, C), score by banks that have not seen them.

    rows: (M, C). absent: (n, M) bool, what each bank is without. Returns scores (n,) and anomaly
    maps (n, H, W).
    """
    memory, found = common.MemoryBank(rows.to(options.device), options.backend), []
    for image, passed_over in enumerate(common.progress(absent, "fit: judge images as if new")):
        b = min(options.neighbors, int((~passed_over).sum()))
        features = images[image : image + 1].to(options.device)
        found.append(score_patches(features, memory, b, passed_over))
    scores, distances = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, common.to_maps(distances, options.size)


def score_patches(features, memory, b: int, passed_over=False):
    """Section 3.3: how anomalous each image is, and each of its patches.

    features: (B, h, w, C). memory: a `MemoryBank`, used as if without the rows `passed_over`. b: of
    equation 7, at most the rows left. Returns scores (B,) and distances (B, h, w).
    """
    nearest = partial(memory.nearest, passed_over=passed_over)
    images = torch.arange(len(features), device=features.device)
    patches = features.flatten(1, 2)  # (B, h * w, C)
    distances, rows = (t.view(len(patches), -1) for t in nearest(patches.flatten(0, 1), 1))
    s_star, worst = distances.max(dim=1)  # equation 6
    if b > 1:
        # Equation 7: m* is the normal patch nearest to the worst patch m_test. Where the bank is
        # sparse around m*, its neighbors N_b(m*) are farther from m_test than m* is, and the
        # distance counts almost in full; where they are as near, it counts less. The neighborhood
        # is that of m* *in the bank*, not that of m_test.
        m_test = patches[images, worst]  # (B, C)
        _, around = nearest(memory.rows[rows[images, worst]], b)  # of m*: (B, b)
        to_around = torch.linalg.vector_norm(m_test[:, None] - memory.rows[around], dim=2)
        # softmax = exp(|m_test - m*|) / sum of exp(|m_test - m|); the first neighbor is m* itself.
        s_star = (1 - to_around.softmax(dim=1)[:, 0]) * s_star
    return s_star.cpu(), distances.view(features.shape[:3]).cpu()


def score(backbone, memory, pixels: torch.Tensor, options) -> common.Result:
    """Scores (N,) and anomaly maps (N, H, W) of images (N, 3, H, W) uint8 by a `MemoryBank`."""
    found = []
    for outputs in common.extract(backbone, options.layers, pixels, options.batch_size, "score"):
        with common.stage("search"):
            found.append(score_patches(patch_features(outputs), memory, options.neighbors))
    scores, grids = (torch.cat(parts) for parts in zip(*found, strict=True))
    with common.stage("maps"):
        return common.Result(scores, common.to_maps(grids, options.size), [])


def draw_coreset(projected, chosen, options) -> None:
    """coreset.png: patch features in the plane of their two principal axes, and the picks."""
    sample = torch.randperm(len(projected), generator=torch.Generator().manual_seed(options.seed))
    plane = PCA(2, random_state=options.seed).fit(projected[sample[:5000]])
    cloud, picks = (plane.transform(projected[i]) for i in (sample[:20000], chosen))
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
                 f"the memory bank: {count:,} of {len(projected):,}")  # fmt: skip
    figure.colorbar(dots, ax=axes, label="order of the picks", shrink=0.8)
    figure.suptitle(f"patch features (gray) and picks: {common.run_label(options)}", fontsize=11)
    common.save_figure(figure, options.out / "coreset.png")


def main():
    options, model = common.parse_options("patchcore", __doc__, add_options)
    backbone = common.choose_backbone(options)
    train, test = common.load_data(options)
    model = model or fit(backbone, train, options)
    bank = model["state"]["bank"].to(options.device)
    memory = common.MemoryBank(bank, backend=options.backend)
    common.report(options, model, test, lambda pixels: score(backbone, memory, pixels, options))


if __name__ == "__main__":
    common.run(main)

"""PatchCore: a memory of normal patches, thinned to a coreset, and the distance to it.

Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly
Detection, CVPR 2022, arXiv:2106.08265.

03 remembers whole images, and so cannot say where a defect is. PatchCore remembers small regions. A
network trained on ImageNet describes each region by a vector, its patch feature, and a memory bank
holds those of all normal images. A region is as anomalous as its patch feature is far from the
nearest one in the bank, and an image is as anomalous as its most anomalous region. Nothing is
trained: to fit is to choose which features the bank keeps.

Sizes are those of ResNet50 at 224 pixels, N normal images, n test images:

    paper            here                     shape                  where
    l                patches                  28 * 28 = 784          patches of an image
    phi_j(x)         outputs                  (B, C_j, h_j, w_j)     3.1: layer j of the network
    p = 3, s = 1     avg_pool2d(., 3, 1)      3 x 3 cells, each      3.1: the neighborhood N_p
    f_agg            patch_features           (B, 28, 28, 1536)      equations 1 to 3
    P_s,p(phi_j)     parts                    (B, C_j, 28, 28)       equation 3: both layers
    M                rows                     (N * 784, 1536)        equation 4: the memory bank
    M_C              bank.rows                (0.1 * N * 784, 1536)  equation 5: the coreset of M
    psi              project                  1536 -> 128            3.2, algorithm 1
    m_test           m_test                   (n, 1536)              equation 6: the worst patch
    m*               m_star                   (n, 1536)              equation 6: its nearest row
    s*               s_star                   (n,)                   equation 6
    b, N_b(m*)       neighbors, neighborhood  9, (n, 9, 1536)        equation 7
    s                s                        (n,)                   equation 7: the anomaly score

Why layers 2 and 3: earlier ones see edges alone, later ones are coarse and biased to the classes of
ImageNet (section 3.1). Equation 5 asks for the coreset that covers M with the smallest radius. That
is NP-hard, and greedy's radius is at most twice the smallest. The 128 columns are the default of
the authors' code. The map's bilinear upsampling and its blur with sigma = 4 are those of section
3.3.

Look at examples.png: where the map is bright, and at the tile "compared", the worst patch beside
the normal one that is nearest to it. coreset.png shows how the first picks span the features,
outliers first, and how the later ones fill in.

It may miss normal parts in the wrong place or number, because a patch knows no position. And it
does not see what ImageNet's features do not, such as a slight change of shade.
"""

from functools import cache, partial
from typing import NamedTuple

import common

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection
from torch.nn import functional as F
from torchvision.transforms.functional import crop
from torchvision.utils import draw_bounding_boxes

LAYERS = ["layer2", "layer3"]
CALIBRATION = 100  # normal images that set the threshold, or more if the rate needs them
ROOM = 10 * 2**20  # bytes of a model's small images, or a fifth of its bank if that is more


def add_options(add):
    add("--coreset", type=common.number(float, 1e-9, 1), help="share of features to keep (0.1)")
    neighbors = "b of equation 7 (9); 1: the score is s* itself"
    add("--neighbors", type=common.number(int, 1, 10**9), help=neighbors)
    add("--layers", nargs="+", choices=common.STAGES[2:], metavar="LAYER", help="(layer2 layer3)")


# ------------------------------------------------------------------ the paper's method


def patch_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Makes one locally aware feature vector per patch of the finest layer's grid (section 3.1).
    The outputs are (B, C, h, w) per layer, the finest first. Returns (B, h, w, C), C summed over
    the layers."""
    finest = outputs[0].shape[2:]
    parts = []
    for output in outputs:
        # f_agg (equation 2): the average over the 3 x 3 neighborhood, so that a patch feature sees
        # more than its own cell and small shifts change it little. Zeros pad the border.
        # differs from the paper: pooling: its code averages the C x 9 numbers of a neighborhood, in
        # order, to 1024 per layer, and then those of both layers to 1024. The README says what that
        # changes.
        averaged = F.avg_pool2d(output, 3, 1, padding=1)
        parts.append(common.resize(averaged, finest))
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # ResNet50: (B, 28, 28, 512 + 1024)


# differs from the paper: backbone: ResNet50 by default, not WideResNet50, for time and memory. The
# paper tries 1 %, 10 % and 25 % for the coreset, and leaves b open.
@common.undisturbed()
def fit(
    images, backbone, *, coreset=0.1, neighbors=9, layers=LAYERS, false_alarm_rate=0.05, seed=0
) -> common.Fitted:
    """Builds the memory bank of normal images (N, 3, S, S) uint8 (section 3.2, algorithm 1)."""
    if len(images) >= 2000 and coreset > 0.01:
        common.note("with --coreset 0.01 the coreset takes about a tenth of the time")
    outputs = common.extract(backbone, layers, images, "fit: features")
    patches = map(patch_features, outputs)  # (B, h, w, C) of each batch
    batches = ([part, project(part, seed)] for part in patches)  # and psi of it, (B, h, w, 128)
    features, reduced = common.collect(batches, len(images), backbone.scratch)  # of all N images
    rows = features.flatten(0, 2)  # M: (N * h * w, C)
    projected = reduced.flatten(0, 2).to(backbone.device)  # psi(M): (N * h * w, 128)
    # differs from the paper: size: its code takes the integer part, and this rounds.
    size = max(1, round(coreset * len(rows)))
    if neighbors > size:
        raise common.UserError(f"--neighbors {neighbors}: the bank holds {size} rows: lower it")
    # differs from the paper: start: the first pick is drawn from the seed. Its code begins with
    # each row's average distance to ten random rows, and never takes that out of the minimum. So
    # even after the same first pick it picks other rows: of 940 a fifth are the same.
    cover = common.greedy_coreset(projected, size, seed, with_cover=True)
    picks, _, _ = cover
    bank = rows[picks.to(rows.device)].cpu()  # M_C
    side = int((max(ROOM, bank.nbytes / 5) / (3 * len(images))) ** 0.5)
    small = common.thumbnails(images, min(side, images.shape[2])).round().byte()
    state = {"bank": bank, "origin": picks.cpu(), "thumbnails": small}
    state |= {"layers": layers, "neighbors": neighbors}

    count = max(CALIBRATION, common.scores_needed(false_alarm_rate))
    calibration = common.shuffled(len(images), seed)[:count].sort().values
    result = leave_one_out(images, features, projected, cover, calibration, state)
    sample = common.shuffled(len(rows), seed)[:20000].to(projected.device)
    cloud = projected[sample].cpu()
    figure = partial(draw_coreset, cloud, projected[picks].cpu(), len(rows))
    return common.Fitted(state, calibration, result, {"coreset.png": figure})


def project(features: torch.Tensor, seed: int) -> torch.Tensor:
    """Applies psi: (..., C) to (..., 128), for the coreset's distances alone. 128 random directions
    keep squared distances, typically to 12 % (Johnson and Lindenstrauss)."""
    if features.shape[-1] <= 128:
        return features
    return features @ random_directions(features.shape[-1], seed).to(features)


@cache
def random_directions(columns: int, seed: int) -> torch.Tensor:
    """Draws the matrix of psi, (C, 128) float32."""
    # differs from the paper: projection: its code takes a linear layer as torch initializes it, so
    # uniform numbers and not Gaussian ones.
    projection = GaussianRandomProjection(128, random_state=seed)
    matrix = projection.fit(np.zeros((1, columns), np.float32)).components_  # (128, C)
    return torch.from_numpy(matrix.T)


class Scored(NamedTuple):
    """Holds what section 3.3 says of n images."""

    s: torch.Tensor  # (n,) the anomaly scores
    distances: torch.Tensor  # (n, h, w) of each patch to the bank
    s_star: torch.Tensor  # (n,)
    worst: torch.Tensor  # (n,) which patch m_test is
    nearest: torch.Tensor  # (n,) which row of the bank m* is


@common.without_autocast()
def score_patches(features: torch.Tensor, bank: common.MemoryBank, b: int) -> Scored:
    """Finds how anomalous each image is, and each of its patches (section 3.3). The features are
    (B, h, w, C), and b is that of equation 7, at most the rows of the bank."""
    patches = features.flatten(1, 2)  # (B, h * w, C)
    # differs from the paper: distances: its code takes FAISS's squared ones.
    to_nearest, indices = bank.nearest(patches.flatten(0, 1))  # (B * h * w, 1)
    distances = to_nearest.view(patches.shape[:2])  # (B, h * w)
    image = torch.arange(len(patches), device=patches.device)
    # Equation 6: m_test is the patch that is farthest from its nearest row m* of the bank.
    s_star, worst = distances.max(dim=1)  # (B,)
    m_test = patches[image, worst]  # (B, C)
    nearest = indices.view(patches.shape[:2])[image, worst]  # (B,)
    m_star = bank.rows[nearest]  # (B, C)
    # Equation 7: where the bank is sparse around m*, the rows around it are far from m_test, and s*
    # counts in full. Where they are as near to m_test, s* counts for less.
    # differs from the paper: equation 7: its code leaves it out, as b = 1 does here.
    weight = 1.0
    if b > 1:
        _, around = bank.nearest(m_star, b)  # (B, b); the first one is m* itself
        neighborhood = bank.rows[around]  # N_b(m*): (B, b, C)
        to_neighborhood = torch.linalg.vector_norm(m_test[:, None] - neighborhood, dim=2)  # (B, b)
        # softmax is exp(|m_test - m*|) / sum of exp(|m_test - m|), and cannot overflow.
        weight = 1 - to_neighborhood.softmax(dim=1)[:, 0]  # (B,)
    return Scored(weight * s_star, distances.view(features.shape[:3]), s_star, worst, nearest)


@common.undisturbed()
def detector(state: dict, backbone):
    """Returns the function that judges images by a fitted model: (n, 3, S, S) uint8 -> Result."""
    bank = common.MemoryBank(state["bank"].to(backbone.device))

    def detect(images):
        batches = []
        for outputs in common.extract(backbone, state["layers"], images, "score"):
            batches.append(score_patches(patch_features(outputs), bank, state["neighbors"]))
        return result_of(images, batches, state["origin"], state)

    return detect


def result_of(images, batches: list[Scored], origin: torch.Tensor, state: dict) -> common.Result:
    """Puts together the scores, the maps and the tiles of images. `origin` says which row of M each
    row of the bank is."""
    joined = Scored._make(map(torch.cat, zip(*batches, strict=True)))
    maps = common.to_maps(joined.distances, images.shape[2])
    scored = Scored._make(part.cpu() for part in joined)
    compared = partial(compare, scored, origin[scored.nearest], state)
    return common.Result(scored.s, maps.cpu(), compared)


# ------------------------------------------------------------------ what is ours: the threshold


def leave_one_out(images, features, projected, cover, calibration, state) -> common.Result:
    """Scores normal images by memory banks that have not seen them, as new images will be.

    To leave out only an image's own rows would tear a hole: the coreset put no other row near them,
    and so patches of other images around there would be far from the bank.

        coreset             without the image     refilled
        o  o  x  o  o       o  o  .  .  o  o      o  o  .  +  o  o     x: the image's own picks
        every patch near    the hole is bare      +: other images' patches, the farthest first

    So other images' patches refill the hole, until none of them is farther from the bank than the
    farthest patch of all is from the whole coreset. That is a bank which greedy might have picked
    without the image. No theorem says that a new image scores alike: the README has measurements.

    The features are (N, h, w, C), `projected` is (N * h * w, 128), and the cover is that of
    `greedy_coreset`. Returns the result of the images that `calibration`, (n,), numbers.
    """
    picks, assignment, to_pick = cover
    rows = features.flatten(0, 2)
    patches = features.shape[1] * features.shape[2]  # of an image
    owner = torch.arange(len(rows), device=projected.device) // patches  # (N * h * w,) the image
    pick_owner = owner[picks]  # (size,)
    coreset = common.MemoryBank(projected[picks])
    origins = [picks]
    serves = [torch.full_like(picks, -1)]  # -1: the coreset serves all images
    for image in calibration.tolist():
        in_hole = (pick_owner[assignment] == image) & (owner != image)
        hole = in_hole.nonzero()[:, 0]
        vectors = projected[hole]  # (n, 128)
        distances = torch.full_like(vectors[:, 0], torch.inf)
        others = pick_owner != image
        if others.any():  # else the bank is empty without the image
            distances = coreset.only(others).nearest(vectors)[0][:, 0]
        added = hole[refill(vectors, distances, to_pick.max())]
        origins.append(added)
        serves.append(torch.full_like(added, image))
    # One bank holds the coreset and all refills; each image is judged by the rows that serve it.
    origin = torch.cat(origins)  # of which row of M each row is
    served = torch.cat(serves)
    bank = common.MemoryBank(rows[origin.to(rows.device)].to(projected.device))
    batches = []
    for image in common.progress(calibration.tolist(), "fit: judge images as if new"):
        keep = (owner[origin] != image) & ((served == -1) | (served == image))
        new = features[image : image + 1].to(projected.device)
        b = min(state["neighbors"], int(keep.sum()))
        batches.append(score_patches(new, bank.only(keep), b))
    return result_of(images[calibration], batches, origin.cpu(), state)


def refill(vectors, distances, radius) -> list[int]:
    """Finds which vectors, (n, 128), to add to a bank that is `distances`, (n,), from them, the
    farthest first, until none of them is farther from it than `radius`. Returns their numbers."""
    added = []
    while len(vectors) and distances.max() > radius:
        farthest = int(distances.argmax())
        added.append(farthest)
        to_added = torch.linalg.vector_norm(vectors - vectors[farthest], dim=1)
        distances = torch.minimum(distances, to_added)
    return added


# ------------------------------------------------------------------ what is ours: pictures


def compare(scored: Scored, origin, state: dict, i: int, image, names) -> list[common.Cell]:
    """Draws the tile "compared" of image i: left the worst patch m_test, right the normal patch of
    its m*. `origin`, (n,), says which row of M each m* is."""
    grid = scored.distances.shape[1:]
    stride = 2 ** (int(max(state["layers"])[-1]) + 1)  # of the coarsest layer: 16 if it is layer3
    window = max(48, 3 * stride)  # pixels that f_agg averages over
    photo = int(origin[i]) // grid.numel()
    small = state["thumbnails"][photo][None].float()
    normal = common.resize(small, image.shape[1:])[0].round().byte()  # (3, S, S)
    left = around(image, scored.worst[i], grid, window)
    right = around(normal, origin[i] % grid.numel(), grid, window)
    tile = torch.cat([left, right], dim=2)
    return [common.Cell(f"compared\ns* {scored.s_star[i]:.4g}\n{names[photo]}", tile)]


def around(image: torch.Tensor, cell: torch.Tensor, grid, window: int) -> torch.Tensor:
    """Cuts (3, 2 * window, window) pixels around a cell of the grid, which it outlines. Beyond the
    image they are black."""
    side = image.shape[1] / grid[0]  # of the cell, in pixels
    top = float(cell // grid[1]) * side
    left = float(cell % grid[1]) * side
    box = [left, top, left + side - 1, top + side - 1]
    outlined = draw_bounding_boxes(image, torch.tensor([box]), colors="white")
    middle_y = int(top + side / 2)
    middle_x = int(left + side / 2)
    return crop(outlined, middle_y - window, middle_x - window // 2, 2 * window, window)


def draw_coreset(cloud, picks, count: int):
    """Draws coreset.png: patch features in the plane of their two principal axes, and the picks.
    The cloud, (20000, 128), is a sample of all `count` projected features, and the picks, (size,
    128), stand in the order picked."""
    plane = PCA(2, svd_solver="covariance_eigh").fit(cloud[:5000])
    cloud_x, cloud_y = plane.transform(cloud).T
    x, y = plane.transform(picks).T
    figure = common.Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    by_order = common.matplotlib.colors.LogNorm(1, len(picks))
    for axis, share in zip(axes, (0.01, 0.1, 1), strict=True):
        first = max(1, round(share * len(picks)))
        order = np.arange(first)[::-1]  # the first picks on top
        axis.scatter(cloud_x, cloud_y, s=1, color="lightgray", rasterized=True)
        points = axis.scatter(x[order], y[order], s=7, c=order + 1, norm=by_order)
        axis.set(xticks=[], yticks=[], title=f"the first {first:,} picks")
    axis.set_title(f"the memory bank: {len(picks):,} of {count:,}")
    figure.colorbar(points, ax=axes, pad=0.01, label="order of the picks")
    return figure


if __name__ == "__main__":
    common.main("patchcore", __doc__, add_options, fit, detector)

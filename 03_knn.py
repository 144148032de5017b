"""k-NN on whole images: no training, one vector an image, the distance to the nearest normal ones.

Bergman, Cohen, Hoshen: Deep Nearest Neighbor Anomaly Detection, arXiv:2002.10445 (DN2).

02 had to train a second network to learn which features are normal. Is that needed? A ResNet that
was trained on ImageNet sums up an image in 2048 numbers, the average of its last layer. Keep those
numbers of all normal images: they are the memory bank. A new image x is as anomalous as it is far
from its k nearest ones there:

    d(x) = 1/k * sum over the k nearest y of  |f(x) - f(y)|     (the paper squares each distance)

Read `embed` (section 3, feature extraction) and `score`. Then look at examples.png: it shows each
image beside its three nearest normal images, and the score is how much they differ for the network.

It cannot see a small defect, because the average over the image drowns it, and it cannot say where
a defect is. 04 keeps the patches apart, and can do both.
"""

from functools import partial

import common

import torch


def add_options(add):
    # differs from the paper: k: 5 nearest images instead of 2.
    add("--neighbors", type=common.number(int, 1, 10**9), help="k nearest normal images (5)")


# differs from the paper: network: ResNet50 by default, not a ResNet of 101 layers, for time.
def embed(images: torch.Tensor, backbone, description: str) -> torch.Tensor:
    """Computes f(x), layer4 averaged over the image: (N, C) float32, C = 2048 by a ResNet50."""
    outputs = common.extract(backbone, ["layer4"], images, description)
    return torch.cat([output.mean(dim=(2, 3)) for (output,) in outputs])  # of (B, C)


@common.undisturbed()
def fit(images, backbone, *, neighbors=5) -> common.Fitted:
    """Builds the memory bank of normal images (N, 3, S, S) uint8, with one row per image."""
    bank = embed(images, backbone, "fit: features")  # (N, C)
    if neighbors >= len(bank):
        there = f"there are {len(bank)} normal images"
        raise common.UserError(f"--neighbors {neighbors}: {there}: lower it")
    thumbnails = common.thumbnails(images, 112).round().byte()  # for the pictures
    state = {"bank": bank.cpu(), "thumbnails": thumbnails, "neighbors": neighbors}
    # A new image is not in the bank. So a normal one must not find itself there: it is one of its
    # own k + 1 neighbors, at distance 0.
    distances, indices = common.nearest_neighbors(bank, bank, neighbors + 1)
    itself = indices == torch.arange(len(bank), device=indices.device)[:, None]
    distances = distances.masked_fill(itself, torch.inf)
    order = distances.argsort(dim=1, stable=True)[:, :neighbors]  # (N, k)
    result = average(distances.gather(1, order), indices.gather(1, order), state)
    return common.Fitted(state, torch.arange(len(bank)), result, {})


def average(distances: torch.Tensor, indices: torch.Tensor, state: dict) -> common.Result:
    """Computes d(x), (N,), from distances and indices (N, k)."""
    # differs from the paper: distance: it averages squared distances, by which one far neighbor
    # weighs more.
    scores = distances.cpu().mean(dim=1)
    nearest = partial(nearest_images, distances, indices, state["thumbnails"])
    return common.Result(scores, None, nearest)


def nearest_images(distances, indices, thumbnails, i: int, image, names) -> list[common.Cell]:
    """Shows the up to three nearest normal images of image i."""
    cells = []
    for distance, photo in zip(distances[i, :3], indices[i, :3].tolist(), strict=True):
        caption = f"nearest normal\ndistance {distance:.3g}\n{names[photo]}"
        cells.append(common.Cell(caption, thumbnails[photo]))
    return cells


@common.without_autocast()
def score(state: dict, backbone, bank, images: torch.Tensor) -> common.Result:
    """Scores images (N, 3, S, S) uint8. There are no maps, as an image is one vector."""
    queries = embed(images, backbone, "score")
    distances, indices = bank.nearest(queries, state["neighbors"])
    return average(distances, indices, state)


@common.undisturbed()
def detector(state: dict, backbone):
    """Returns the function that judges images by a fitted model: (N, 3, S, S) uint8 -> Result."""
    bank = common.MemoryBank(state["bank"].to(backbone.device))
    return partial(score, state, backbone, bank)


if __name__ == "__main__":
    common.main("knn", __doc__, add_options, fit, detector)

"""k-NN on whole images: no training, one vector an image, the distance to the nearest normal ones.

Bergman, Cohen, Hoshen: Deep Nearest Neighbor Anomaly Detection, arXiv:2002.10445 (DN2).

02 had to train a second network to learn which features are normal. Need it? A ResNet trained on
ImageNet sums up an image in 2048 numbers, the average of its last layer. Keep those of the normal
images, the memory bank; a new image x is as anomalous as it is far from its k nearest ones:

    d(x) = 1/k * sum over the k nearest y of  |f(x) - f(y)|     (the paper squares each distance)

Read `describe` (section 3, feature extraction) and `score`. What to look at: in examples.png, each
image beside its three nearest normal images; the score is how much they differ for the network.
What it cannot do: see a small defect, which the average over the image drowns, nor say where it is.
04 keeps the patches apart and can do both.
"""

import time
from functools import partial

import common

import torch


def add_options(add):
    # differs from the paper: k = 5 instead of 2.
    add("--neighbors", type=int, metavar="N", default=5, help="k, the nearest normal images (5)")


def describe(backbone, pixels: torch.Tensor, batch_size: int, description: str) -> torch.Tensor:
    """f(x): layer4 averaged over the image, (N, C) float32 on the device; ResNet50: C = 2048."""
    batches = common.extract(backbone, ["layer4"], pixels, batch_size, description)
    return torch.cat([output.mean(dim=(2, 3)) for (output,) in batches])


def fit(backbone, train: common.Split, options) -> dict:
    """The memory bank: one row per normal image. Returns the model."""
    start = time.perf_counter()
    bank = describe(backbone, train.pixels, options.batch_size, "fit: features")  # (N, C)
    k = options.neighbors
    if k >= len(bank):
        raise common.UserError(f"--neighbors {k}: there are {len(bank)} normal images: lower it")
    # Small copies of the images, to show the nearest ones in the figures, also after --load.
    small = (common.resize(p.float(), (112, 112)).round().byte() for p in train.pixels.split(64))
    thumbnails = common.collect(small, len(bank), "thumbnails").permute(0, 2, 3, 1).contiguous()
    names = list(common.picture_names(train.paths, 18).values())
    state = {"bank": bank.cpu(), "thumbnails": thumbnails, "names": names}
    # A new image is not in the bank. So a normal one must not find itself there: it is the first
    # of its own k + 1 neighbors, at distance 0.
    nearest = common.nearest_neighbors(bank, bank, k + 1, options.backend)
    result = average(*(found[:, 1:].cpu() for found in nearest), state)
    return common.save_model(options, backbone, state, result, train, range(len(bank)), start)


def average(distances, indices, state: dict) -> common.Result:
    """d(x), (N,), of distances and indices (N, k), and up to three of the k nearest images."""
    titles, pictures = ["nearest normal", "2nd nearest", "3rd nearest"], []
    for title, distance, index in zip(titles, distances.T, indices.T, strict=False):
        captions = [f"{d:.3g}\n{state['names'][i]}" for d, i in zip(distance, index, strict=True)]
        pictures.append((title, captions, state["thumbnails"][index].numpy()))
    # differs from the paper: it averages squared distances, so that one far neighbor weighs more.
    return common.Result(distances.mean(dim=1), None, pictures)


def score(backbone, state: dict, pixels: torch.Tensor, options) -> common.Result:
    """Scores (N,) of images (N, 3, S, S) uint8; no maps, as an image is one vector."""
    queries = describe(backbone, pixels, options.batch_size, "score")
    bank = state["bank"].to(options.device)
    found = common.nearest_neighbors(queries, bank, options.neighbors, options.backend)
    return average(*(tensor.cpu() for tensor in found), state)


def judge_by(backbone, model: dict, options):
    """The function that judges images by a fitted model: pixels (N, 3, S, S) uint8 -> Result."""
    return partial(score, backbone, model["state"], options=options)


def main():
    options, model = common.parse_options("knn", __doc__, add_options)
    backbone = common.choose_backbone(options, model)
    size = options.resize, options.crop, options.bits
    train, test = common.load_data(options.data, *size, with_train=not model)
    model = model or fit(backbone, train, options)
    common.report(options, model, test, judge_by(backbone, model, options))


if __name__ == "__main__":
    common.run(main)

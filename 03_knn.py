"""k-NN on whole images: no training, one vector an image, the distance to the nearest normal ones.

Bergman, Cohen, Hoshen: Deep Nearest Neighbor Anomaly Detection, arXiv:2002.10445 (DN2).

02 had to train a second network to learn which features are normal. Need it? A ResNet trained on
ImageNet sums up an image in 2048 numbers, the average of its last layer. Keep those of the normal
images, the memory bank; a new image x is as anomalous as it is far from its k nearest ones:

    d(x) = 1/k * sum over the k nearest y of  |f(x) - f(y)|

Read `describe` (section 3, feature extraction) and `score`. What to look at: in examples.png, each
image beside its three nearest normal images; the score is how much they differ for the network.
What it cannot do: see a small defect, which the average over the image drowns, nor say where it is.
04 keeps the patches apart and can do both.
"""

import time

import torch

import common


def add_options(add):
    # 1, 2, 5 and 9 are alike on the practice pill (image AUROC 0.65 to 0.67, random weights).
    add("--neighbors", type=common.number(int, 1), default=5,
        help="k: how many nearest normal images the score averages over (5)")  # fmt: skip


def describe(resnet, pixels: torch.Tensor, options, description: str) -> torch.Tensor:
    """f(x): layer4 averaged over the image, (N, C) float32 on --device; ResNet50: C = 2048."""
    batches = common.extract(resnet, ["layer4"], pixels, options, description)
    return torch.cat([output.mean(dim=(2, 3)) for (output,) in batches])


def fit(resnet, pixels: torch.Tensor, options) -> dict:
    """The memory bank: one row per normal image (N, 3, crop, crop) uint8. Returns the model."""
    start = time.perf_counter()
    bank = describe(resnet, pixels, options, "fit: features")  # (N, C)
    k = options.neighbors
    if k >= len(bank):
        found = f"there are {len(bank)} normal images, and each is judged by the others"
        raise common.UserError(f"--neighbors {k}: {found}: lower it or add images")
    with common.stage("threshold"):
        # A new image is not in the bank. So a normal one must not find itself there: it is the
        # first of its own k + 1 neighbors, at distance 0.
        nearest, _ = common.nearest_neighbors(bank, bank, k + 1, options.backend)
        scores = nearest[:, 1:].mean(dim=1)
    # Small copies of the images, to show the nearest ones in the figures, also after --load.
    thumbnails = common.resize(pixels.float(), (112, 112)).round().byte()
    state = {"bank": bank.cpu(), "thumbnails": thumbnails}
    return common.save_model(options, state, scores.cpu(), None, time.perf_counter() - start)


def score(resnet, state: dict, pixels: torch.Tensor, options):
    """Distances (N, k) and indices (N, k) of the k nearest normal images; their mean is d(x)."""
    queries = describe(resnet, pixels, options, "score")
    with common.stage("search"):
        bank = state["bank"].to(options.device)
        return common.nearest_neighbors(queries, bank, options.neighbors, options.backend)


def main():
    options, model = common.parse_options("knn", __doc__, add_options)
    train, test = common.load_data(options)
    resnet = common.load_resnet(options)
    model = model or fit(resnet, train.pixels, options)

    def judge(pixels):
        # differs from the paper: it averages squared distances; unsquared, one far neighbor of
        # the k weighs less, and the score is in the units of the features.
        distances, indices = (t.cpu() for t in score(resnet, model["state"], pixels, options))

        def nearest(i):
            names = ["nearest normal", "2nd nearest", "3rd nearest"]
            pictures = model["state"]["thumbnails"][indices[i]].permute(0, 2, 3, 1).numpy()
            captions = [f"{distance:.3g}" for distance in distances[i]]
            return list(zip(names, captions, pictures, strict=False))

        return distances.mean(dim=1), None, nearest  # no map: an image is one vector

    common.report(options, model, test, judge)


if __name__ == "__main__":
    common.run(main)

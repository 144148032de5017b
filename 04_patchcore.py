"""PatchCore: a memory of normal patches, thinned to a coreset, and the distance to it.

Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly
Detection, CVPR 2022, arXiv:2106.08265.

The idea: a ResNet trained on ImageNet describes every small region of an image by a vector, its
patch feature. Collect the patch features of all normal images in a memory bank. A region of a new
image is as anomalous as its patch feature is far from the nearest one in the bank, and an image
as its most anomalous region:

    s* = max over the image's patches m_test of  min over the bank's m of  |m_test - m|

No training: all there is to fit is which features to keep. Read `patch_features` (section 3.1),
`fit` (3.2, the coreset that makes the bank ten times smaller) and `score` (3.3, equations 6 and 7).

In examples.png, look at where the map is bright: the location comes with the score, for free. In
scores.png, look at the overlap of the two histograms: no threshold can divide it.
What it cannot do: tell that normal parts are in the wrong place or number (a patch knows no
position), or see what ImageNet features do not, such as a hair's change of shade.
"""

import time

import numpy as np
import torch
from sklearn.random_projection import GaussianRandomProjection

import common


def add_options(add):
    add("--coreset", type=common.number(float, 0, 1), default=0.1, metavar="RATIO",
        help="share of the patch features kept in the memory bank (0.1)")  # fmt: skip
    add("--neighbors", type=common.number(int, 1), default=9,
        help="b of equation 7; 1: the plain maximum (9)")  # fmt: skip
    add("--layers", nargs="+", default=["layer2", "layer3"], metavar="LAYER",
        choices=["layer1", "layer2", "layer3", "layer4"],
        help="ResNet stages the patch features come from (layer2 layer3)")  # fmt: skip


def patch_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section 3.1: one locally aware feature vector per patch of the finest layer's grid.

    outputs: per layer (B, C, h, w), finest first. Returns (B, h, w, C summed over layers).
    """
    height, width = outputs[0].shape[2:]
    parts = []
    for output in outputs:
        # f_agg (equation 2): the average over the 3 x 3 neighborhood, so that a patch feature sees
        # more than its own cell and small shifts change it little.
        # differs from the paper: its code also brings both layers to 1024 dimensions by adaptive
        # pooling along the channels; left out, as it only reshuffles what the mean already holds.
        output = torch.nn.functional.avg_pool2d(output, 3, 1, padding=1, count_include_pad=False)
        parts.append(
            torch.nn.functional.interpolate(
                output, (height, width), mode="bilinear", align_corners=False
            )
        )
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # ResNet50: (B, 28, 28, 512 + 1024)


def fit(resnet, pixels: torch.Tensor, options) -> dict:
    """Section 3.2, algorithm 1: the memory bank, and what normal images score against it.

    pixels: (N, 3, crop, crop) uint8, normal images. Returns the model.
    """
    start = time.perf_counter()
    batches = common.extract(resnet, options.layers, pixels, options, "fit: features")
    features = torch.cat([patch_features(outputs).cpu() for outputs in batches])  # (N, h, w, C)
    count, height, width, channels = features.shape
    patches = features.view(-1, channels)
    size = max(1, round(options.coreset * len(patches)))
    with common.stage("coreset"):
        # Johnson-Lindenstrauss: 128 random directions nearly keep the distances. They choose the
        # rows; the bank keeps the features whole.
        projected = patches
        if channels > 128:
            projection = GaussianRandomProjection(128, random_state=options.seed)
            matrix = projection.fit(np.empty((1, channels), np.float32)).components_
            projected = patches @ torch.from_numpy(matrix.T).float()  # (N * h * w, 128)
        chosen = common.greedy_coreset(
            projected.to(options.device), size, options.seed, options.backend
        ).cpu()
    bank = patches[chosen]  # (size, C), in the order picked
    image = chosen // (height * width)  # the training image each row came from

    # What does a normal image score that is not in the bank? Leave out one image's rows at a time.
    with common.stage("threshold"):
        judged = [
            score_patches(features[i : i + 1], bank[image != i], options)
            for i in common.progress(range(count), "fit: leave one image out")
        ]
        scores, grids = (torch.cat(parts) for parts in zip(*judged, strict=True))
        maps = common.to_maps(grids, options.crop)
    seconds = time.perf_counter() - start
    return common.save_model(options, {"bank": bank}, scores, maps, seconds)


def score_patches(features, bank, options):
    """Section 3.3: how anomalous each image is, and each of its patches.

    features: (B, h, w, C). bank: (N, C). Returns scores (B,) and patch distances (B, h, w).
    """
    images = torch.arange(len(features))
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
        _, around = common.nearest_neighbors(
            m_star, bank, min(options.neighbors, len(bank)), options.backend
        )
        to_around = torch.linalg.vector_norm(m_test[:, None] - bank[around], dim=2)  # (B, b)
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


def main():
    options, model = common.parse_options("patchcore", __doc__, add_options)
    train, test = common.load_data(options)
    resnet = common.load_resnet(options)
    model = model or fit(resnet, train.pixels, options)
    common.calibrate(options, model)

    def judge(pixels):
        return score(resnet, model["state"], pixels, options)

    if test.paths:
        common.report(options, model, test, judge)
    if options.predict:
        common.predict(options, model, judge)


if __name__ == "__main__":
    common.run(main)

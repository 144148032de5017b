"""DFR: reconstruct what a pretrained network sees, not the pixels.

Yang, Shi, Qi: DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation,
arXiv:2012.07122.

01 compared pixels, and every speckle counted. A network trained on ImageNet describes each small
region of an image by features that know edges, textures and parts, and change little with what
does not matter. So let the autoencoder learn to redraw those, region by region: it sees a region's
C features f as one vector, squeezes them through d numbers and unfolds them again. Where it fails,
the region is not one that normal images have:

    map(x)[region] = |f - decode(encode(f))|^2 / C

Read `regional_features` and `build_autoencoder` (section III), and `latent_size`, which chooses d.
Then look at examples.png: single speckles no longer light up. A run prints the loss halfway and at
the end: whether it has settled.

It has to be trained for every product anew, and it learns to redraw a few defects, too. 03 does not
learn: it remembers.
"""

from functools import partial

import common

import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

LAYERS = ["layer2", "layer3"]


def add_options(add):
    # differs from the paper: layers: two stages of a ResNet instead of twelve layers of VGG19, on
    # the center crop of 224 pixels instead of all of 256.
    add("--layers", nargs="+", choices=common.STAGES[2:], metavar="LAYER", help="(layer2 layer3)")
    # differs from the paper: training: 1000 steps instead of 700 epochs, and a learning rate that
    # rises and falls instead of the constant 1e-4.
    add("--steps", type=common.number(int, 2, 10**9), help="training steps (1000)")
    add("--learning-rate", type=common.number(float, 1e-12, 1e36), help="its highest (0.003)")


def regional_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Brings all layers to one grid and smooths them (section III, multi-scale regional features).
    The outputs are (B, C, h, w) per layer, the finest first. Returns (B, C, h, w), C summed over
    the layers."""
    # differs from the paper: regions: it brings the layers to the image's size and averages over
    # 4 x 4 pixels, without padding. Here it is 3 x 3 cells of the finest layer, padded with zeros:
    # coarser, and about a quarter of the memory.
    aligned = [common.resize(output, outputs[0].shape[2:]) for output in outputs]
    stacked = torch.cat(aligned, dim=1)  # ResNet50: (B, 512 + 1024, 28, 28)
    return F.avg_pool2d(stacked, 3, 1, padding=1)


def latent_size(features: torch.Tensor) -> int:
    """Returns d: how many principal components hold 90 % of the variance of features (N, C)."""
    variance = PCA(svd_solver="covariance_eigh").fit(features.numpy()).explained_variance_ratio_
    return int((variance.cumsum() < 0.9).sum()) + 1


def build_autoencoder(channels: int, d: int) -> nn.Sequential:
    """Builds a network (n, C) -> (n, C). Each region stands for itself, as by the paper's 1 x 1
    convolutions. The widths in between are those of the paper's code."""
    wide = (channels + 2 * d) // 2
    return nn.Sequential(
        layer(channels, wide),
        layer(wide, 2 * d),
        nn.Linear(2 * d, d),
        layer(d, 2 * d),
        layer(2 * d, wide),
        nn.Linear(wide, channels),
    )


def layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())


@common.undisturbed()
def fit(
    images,
    backbone,
    *,
    layers=LAYERS,
    steps=1000,
    learning_rate=3e-3,
    false_alarm_rate=0.05,
    seed=0,
) -> common.Fitted:
    """Trains on normal images (N, 3, S, S) uint8, but for those held out for the threshold."""
    trained, calibration = common.hold_out(len(images), seed, false_alarm_rate)
    outputs = common.extract(backbone, layers, images[trained], "fit: features")
    batches = ([regional_features(batch).permute(0, 2, 3, 1)] for batch in outputs)
    (features,) = common.collect(batches, len(trained), backbone.scratch)  # (n, h, w, C)
    regions = features.flatten(0, 2)  # (n * h * w, C)
    # differs from the paper: standardization: every channel is brought to mean 0 and about the same
    # variance, lest the few with large values decide alone. A tenth of the mean deviation is added,
    # so that dead channels stay quiet.
    mean = regions.mean(dim=0)
    regions -= mean  # in place: the regions fill most of the memory
    deviation = torch.linalg.vector_norm(regions, dim=0) / len(regions) ** 0.5
    deviation += 0.1 * deviation.mean()
    if deviation.min() == 0:
        raise common.UserError("--layers: the features of train/good are all alike: add photos")
    regions /= deviation

    torch.manual_seed(seed)
    # differs from the paper: d: it is found from standardized features of 20,000 regions; the
    # paper's code takes the raw features of ten images. That makes 31 here for its 25.
    d = latent_size(regions[torch.randperm(len(regions))[:20000]].cpu())
    network = build_autoencoder(regions.shape[1], d).to(backbone.device)
    # The learning rate rises to its highest, then falls to zero: one cycle.
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in common.progress(range(steps), "fit: train"):
        # differs from the paper: batches: a step takes 1024 regions of all images, not all regions
        # of four images, which are much alike.
        batch = regions[torch.randint(len(regions), (1024,))].to(backbone.device)  # (1024, C)
        loss = F.mse_loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        common.note_loss(step, steps, loss)

    weights = network.cpu().state_dict()
    state = {"d": d, "mean": mean.cpu(), "deviation": deviation.cpu()}
    state |= {"weights": weights, "layers": layers}
    # differs from the paper: threshold: it comes from the scores of images that were held out; the
    # paper's code takes it from the pixels of the training images' maps.
    result = detector(state, backbone)(images[calibration])
    return common.Fitted(state, calibration, result, {})


@common.undisturbed()
def detector(state: dict, backbone):
    """Returns the function that judges images by a fitted model: (N, 3, S, S) uint8 -> Result."""
    network = build_autoencoder(len(state["mean"]), state["d"]).to(backbone.device).eval()
    network.load_state_dict(state["weights"])
    return partial(score, state, backbone, network)


@common.without_autocast()
@torch.no_grad()
def score(state: dict, backbone, network, images: torch.Tensor) -> common.Result:
    """Computes scores (N,) and anomaly maps (N, S, S) of images (N, 3, S, S) uint8."""
    mean = state["mean"].to(backbone.device)
    deviation = state["deviation"].to(backbone.device)
    errors = []
    for outputs in common.extract(backbone, state["layers"], images, "score"):
        regions = regional_features(outputs).permute(0, 2, 3, 1)  # (B, h, w, C)
        features = (regions - mean) / deviation
        drawn = network(features.flatten(0, 2)).view_as(features)
        errors.append((features - drawn).square().mean(dim=3).cpu())  # (B, h, w)
    # differs from the paper: map and score: the map is blurred like the other methods' maps, so
    # that they compare, and the score is the highest value of this blurred map.
    maps = common.to_maps(torch.cat(errors), images.shape[2])
    return common.Result(maps.amax(dim=(1, 2)), maps, lambda i, image, names: [])


if __name__ == "__main__":
    common.main("dfr", __doc__, add_options, fit, detector)

"""DFR: reconstruct what a pretrained network sees, not the pixels.

Yang, Shi, Qi: DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation,
arXiv:2012.07122.

01 compared pixels, and every speckle counted. A ResNet trained on ImageNet describes each small
region of an image by features that know edges, textures and parts, and change little with what
does not matter. So let the autoencoder learn to redraw those, region by region: it sees a region's
C features f as one vector, squeezes them through d numbers and unfolds them again. Where it fails,
the region is not one that normal images have:

    map(x)[region] = |f - decode(encode(f))|^2 / C

Read `regional_features` and `build_autoencoder` (section III), and `latent_size` for how d is
found. What to look at: in examples.png, single speckles no longer light up. In loss.png, whether
the loss has settled.
What it cannot do: do without training, for every product anew; and what such a network learns to
redraw is never just what it was shown: some defects are redrawn too. 03 remembers, and learns not.
"""

import time

import torch
from sklearn.decomposition import PCA
from torch import nn

import common


def add_options(add):
    layers = ["layer1", "layer2", "layer3", "layer4"]
    add("--layers", nargs="+", default=["layer2", "layer3"], metavar="LAYER", choices=layers,
        help="ResNet stages the features come from (layer2 layer3)")  # fmt: skip
    # Measured on the practice pill, random weights: pixel AUROC 0.58, 0.67, 0.69 and 0.69 after
    # 150, 400, 600 and 1500 steps; 0.67 and 0.69 with half and twice the learning rate.
    add("--steps", type=common.number(int, 2), default=1000, help="training steps (1000)")
    add("--learning-rate", type=common.number(float, 0), default=3e-3, metavar="RATE",
        help="the highest of the cycle (0.003)")  # fmt: skip


def regional_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section III, multi-scale regional features: all layers on one grid, then smoothed.

    outputs: per layer (B, C, h, w), finest first. Returns (B, C summed over layers, h, w).
    """
    # differs from the paper: it brings the layers to the image's size and averages over 4 x 4
    # cells with stride 4; the finest layer's grid holds the same in an eighth of the memory.
    aligned = [common.resize(output, outputs[0].shape[2:]) for output in outputs]
    stacked = torch.cat(aligned, dim=1)  # ResNet50: (B, 512 + 1024, 28, 28)
    return nn.functional.avg_pool2d(stacked, 3, 1, padding=1, count_include_pad=False)


def latent_size(features: torch.Tensor) -> int:
    """d: how many principal components hold 90 % of the variance of features (N, C)."""
    variance = PCA(svd_solver="covariance_eigh").fit(features.numpy()).explained_variance_ratio_
    return int((variance.cumsum() < 0.9).sum()) + 1


def build_autoencoder(channels: int, d: int) -> nn.Sequential:
    """(B, C, h, w) -> the same shape: 1 x 1 convolutions, so that each region stands for itself."""
    wide = (channels + 2 * d) // 2

    def layer(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(channels, wide), *layer(wide, 2 * d), nn.Conv2d(2 * d, d, 1),
        *layer(d, 2 * d), *layer(2 * d, wide), nn.Conv2d(wide, channels, 1),
    )  # fmt: skip


def fit(resnet, pixels: torch.Tensor, options) -> dict:
    """Trains on nine tenths of the normal images (N, 3, crop, crop) uint8. Returns the model."""
    start = time.perf_counter()
    batches = common.extract(resnet, options.layers, pixels, options, "fit: features")
    features = torch.cat([regional_features(outputs).cpu() for outputs in batches])
    trained, held_out = common.hold_out(len(pixels), options.seed)
    regions = features.permute(0, 2, 3, 1)[trained].flatten(0, 2)  # (n * h * w, C), kept in memory
    # differs from the paper: every channel is brought to mean 0 and variance 1, lest the few with
    # large values decide alone; what is added to the deviation keeps dead channels quiet.
    mean, deviation = regions.mean(dim=0), regions.std(dim=0)
    deviation += 0.1 * deviation.mean()
    regions = (regions - mean) / deviation

    torch.manual_seed(options.seed)
    with common.stage("PCA"):
        d = latent_size(regions[torch.randperm(len(regions))[:20000]])
    network = build_autoencoder(regions.shape[1], d)
    network = network.to(options.device, memory_format=torch.channels_last)

    def loss():
        # differs from the paper: a step takes 1024 regions of all images, not all regions of four,
        # which are much alike; it learns as much in a tenth of the steps.
        batch = regions[torch.randint(len(regions), (1024,))].to(options.device)  # (1024, C)
        batch = batch.view(1, 32, 32, -1).permute(0, 3, 1, 2)  # as if one image, (1, C, 32, 32)
        return nn.functional.mse_loss(network(batch), batch)

    common.minimize(network, loss, options.steps, options.learning_rate, options)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    state = {"d": d, "mean": mean, "deviation": deviation, "weights": weights}
    scores, maps = score(network, state, [features[held_out]], options)
    return common.save_model(options, state, scores, maps, time.perf_counter() - start)


@torch.inference_mode()
def score(network, state: dict, batches, options):
    """Scores (N,) and anomaly maps (N, crop, crop) from batches of features (B, C, h, w)."""
    mean, deviation = (state[name].view(-1, 1, 1) for name in ("mean", "deviation"))
    errors = []
    for features in batches:
        with common.stage("reconstruct"):
            features = ((features - mean.to(features)) / deviation.to(features)).to(options.device)
            errors.append((features - network(features)).square().mean(dim=1).cpu())  # (B, h, w)
    with common.stage("maps"):
        # differs from the paper: blurred like the other methods' maps, so that they compare.
        maps = common.to_maps(torch.cat(errors), options.crop)
    return maps.amax(dim=(1, 2)), maps


def main():
    options, model = common.parse_options("dfr", __doc__, add_options)
    train, test = common.load_data(options)
    resnet = common.load_resnet(options)
    model = model or fit(resnet, train.pixels, options)
    state = model["state"]
    network = build_autoencoder(len(state["mean"]), state["d"]).eval()
    network.load_state_dict(state["weights"])
    network = network.to(options.device, memory_format=torch.channels_last)

    def judge(pixels):
        batches = common.extract(resnet, options.layers, pixels, options, "score")
        return *score(network, state, map(regional_features, batches), options), lambda i: []

    common.report(options, model, test, judge)


if __name__ == "__main__":
    common.run(main)

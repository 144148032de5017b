"""The command line as its user meets it: what a run leaves, and what a wrong one says."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import common

import numpy as np
import pytest
import torch
from conftest import QUICK, SCRIPTS, SMALL, options
from PIL import Image
from sklearn.metrics import roc_auc_score

METHODS = list(SCRIPTS)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No weights in the cache, and nothing that answers at the other end."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def read_scores(path):
    with open(path) as file:
        return {row["path"]: row for row in csv.DictReader(file)}


# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_tables_files_and_figures(method, run_script, pill, tmp_path):
    code, out, err = run_script(method, "--data", pill, *SMALL, *QUICK[method])
    assert code == 0
    assert "Traceback" not in err
    folder = tmp_path / "results" / method
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = read_scores(folder / "scores.csv")
    assert len(scores) == 10
    labels = [row["label"] == "defect" for row in scores.values()]
    expected = roc_auc_score(labels, [float(row["score"]) for row in scores.values()])
    assert metrics["image_auroc"] == pytest.approx(expected)
    assert (metrics["pixel_auroc"] is None) == (metrics["au_pro"] is None) == (method == "knn")
    assert set(metrics["per_defect"]) == {p.name for p in (pill / "test").iterdir()} - {"good"}
    threshold = metrics["threshold"]
    reported = [p for p, row in scores.items() if float(row["score"]) > threshold["score"]]
    assert [p for p, row in scores.items() if row["predicted"] == "defect"] == reported
    assert threshold["detected"] + threshold["false_alarms"] == len(reported)
    assert threshold["normal_images"] == 3
    figures = {"examples.png", "scores.png", "strip.png"}
    figures |= {"patchcore": {"coreset.png"}, "knn": set()}.get(method, {"loss.png"})
    assert {p.name for p in folder.iterdir()} == {"metrics.json", "scores.csv", *figures}
    for name in figures:
        Image.open(folder / name).verify()
    for text in ("defect type", "crack", "all methods so far", "seconds: start-up"):
        assert text in out
    no_backbone = method == "autoencoder"
    weights = "no pretrained weights" if no_backbone else "ResNet18, random weights"
    assert f"{method} on {pill}, {weights}" in out
    assert metrics["weights"] == weights
    highest = max(float(row["score"]) for row in scores.values())
    assert f"threshold {threshold['score']:.4g}" in err
    assert "highest: 0" in err
    assert "add --save FILE" in err
    assert threshold["score"] != highest


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_scores(method, run_script, pill, tmp_path):
    written = []
    for seed in (0, 0, 1):
        arguments = ["--data", pill, *SMALL, *QUICK[method], "--seed", seed]
        assert run_script(method, *arguments)[0] == 0
        written.append((tmp_path / "results" / method / "scores.csv").read_bytes())
    assert written[0] == written[1] != written[2]


def test_methods_stand_in_one_table_if_data_and_weights_are_the_same(run_script, pill, tmp_path):
    def table(out):
        return [line.split()[0] for line in out.split("all methods so far")[1].split("\n")[2:-3]]

    for method in METHODS:
        code, out, _ = run_script(method, "--data", pill, *SMALL, *QUICK[method])
    assert table(out) == METHODS
    picture = Image.open(tmp_path / "results" / "methods.png")
    assert picture.height > 500
    _, out, _ = run_script("knn", "--data", pill, *SMALL, *QUICK["knn"], "--seed", "1")
    assert table(out) == ["autoencoder", "knn"]  # other random weights: not comparable
    (pill / "test" / "good" / "000.jpg").unlink()
    _, out, _ = run_script("patchcore", "--data", pill, *SMALL, *QUICK["patchcore"])
    assert table(out) == ["patchcore"]  # other images
    assert code == 0


@pytest.mark.parametrize("installed", [True, False])
def test_the_demo_runs_without_data_and_without_network(
    run_script, offline, tmp_path, monkeypatch, installed
):
    if not installed:
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    code, out, err = run_script("knn", "--resize", "64", "--crop", "64")
    if installed:
        assert code == 0
        assert err.count("goes on with EfficientNet-Lite0") == 1
        assert "practice_pill, EfficientNet-Lite0, ImageNet weights" in out
    else:
        assert code == 2
        assert "pip install efficientnet_lite_pytorch" in err


LOCAL = ["color", "combined", "contamination", "crack", "faulty_imprint", "scratch"]


def test_each_method_sees_what_the_one_before_cannot(run_script, tmp_path):
    """The story of this repository, on the practice pill with ImageNet features from pip."""
    least, found = {"autoencoder": 0.6, "dfr": 0.93, "knn": 0.92, "patchcore": 0.95}, {}
    for method in METHODS:
        quick = {"autoencoder": ["--steps", "200"], "dfr": ["--steps", "300"]}.get(method, [])
        code, _, err = run_script(method, "--backbone", "efficientnet_lite0", *quick)
        assert code == 0, err
        found[method] = json.loads((tmp_path / f"results/{method}/metrics.json").read_text())
        assert found[method]["image_auroc"] >= least[method]
        assert found[method]["image_auroc"] >= found["autoencoder"]["image_auroc"]
    for method in ("dfr", "patchcore"):
        for kind in LOCAL:
            assert found[method]["per_defect"][kind]["pixel_auroc"] > 0.98


def test_images_of_every_mode_are_read(run_script, pill, tmp_path):
    names = sorted((pill / "train" / "good").iterdir())
    for name, mode in zip(names, ["L", "RGBA", "P", "1", "LA", "I;16"], strict=False):
        image = Image.open(name)
        name.unlink()
        name = name.with_suffix(".png")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "P":
            image = image.quantize()
        else:
            image = image.convert(mode)
        image.save(name)
    Image.open(names[6]).convert("CMYK").save(names[6].with_suffix(".tif"))
    names[6].unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(names[7]).save(names[7], exif=exif)
    code, _, err = run_script("knn", "--data", pill, *SMALL, "--neighbors", "3")
    assert (code, err.count("\n")) == (0, 4), err  # 16 bits, few normal images, the fit, not kept
    metrics = json.loads((tmp_path / "results/knn/metrics.json").read_text())
    assert metrics["settings"]["crop"] == 64


# ---------------------------------------------------------------- metrics that cannot be computed


@pytest.mark.parametrize("missing", ["good", "defects"])
def test_a_test_set_of_one_kind_has_null_metrics(run_script, pill, tmp_path, missing):
    for folder in (pill / "test").iterdir():
        if (folder.name == "good") == (missing == "good"):
            shutil.rmtree(folder)
    code, out, err = run_script("patchcore", "--data", pill, *SMALL, *QUICK["patchcore"])
    assert code == 0
    assert "image AUROC is null" in err
    metrics = json.loads((tmp_path / "results/patchcore/metrics.json").read_text())
    assert metrics["image_auroc"] is None
    assert (metrics["pixel_auroc"] is None) == (missing == "defects")
    assert metrics["threshold"]["oracle"] is None
    assert "defect type" in out


def test_without_ground_truth_only_pixel_metrics_are_null(run_script, pill, tmp_path):
    shutil.rmtree(pill / "ground_truth")
    code, _, err = run_script("patchcore", "--data", pill, *SMALL, *QUICK["patchcore"])
    assert code == 0
    assert "pixel metrics will be null" in err
    metrics = json.loads((tmp_path / "results/patchcore/metrics.json").read_text())
    assert metrics["pixel_auroc"] is metrics["au_pro"] is None
    assert metrics["image_auroc"] is not None


def test_normal_images_alone_are_enough_to_fit(run_script, pill, tmp_path):
    shutil.rmtree(pill / "test")
    arguments = ["--data", pill, *SMALL, "--neighbors", "3", "--false-alarm-rate", "0.2"]
    code, out, err = run_script("knn", *arguments)
    assert (code, out) == (0, "")
    assert "nothing to evaluate on" in err
    code, out, err = run_script("knn", *arguments, "--save", "model.pt")
    assert (code, out) == (0, "")
    assert [line.split()[0] for line in err.splitlines()] == ["saved", "threshold"]
    assert (tmp_path / "model.pt").exists()


def test_ground_truth_of_some_types_only(run_script, pill, tmp_path):
    for kind in ("crack", "scratch"):
        shutil.rmtree(pill / "ground_truth" / kind)
    arguments = ["--data", pill, *SMALL, *QUICK["patchcore"]]
    code, _, err = run_script("patchcore", *arguments)
    assert code == 0
    assert "crack: has no folder in ground_truth" in err
    metrics = json.loads((tmp_path / "results/patchcore/metrics.json").read_text())
    assert metrics["per_defect"]["crack"]["pixel_auroc"] is None
    assert metrics["per_defect"]["crack"]["image_auroc"] is not None
    for figures in (metrics["per_defect"]["color"], metrics):
        assert 0 < figures["pixel_auroc"] < 1
        assert 0 < figures["au_pro"] < 1


def test_metrics_equal_those_of_all_pixels_sorted_anew(run_script, pill, tmp_path, monkeypatch):
    """The shared, once-sorted normal pixels give what each subset gives by itself."""
    seen = []
    evaluate = common.evaluate
    monkeypatch.setattr(common, "evaluate", lambda *a: seen.append(a[1:]) or evaluate(*a))
    assert run_script("patchcore", "--data", pill, *SMALL, *QUICK["patchcore"])[0] == 0
    metrics = json.loads((tmp_path / "results/patchcore/metrics.json").read_text())
    ((test, result),) = seen
    for kind, figures in [*metrics["per_defect"].items(), ("all", metrics)]:
        rows = (test.defects == kind) | (test.defects == "good") | (kind == "all")
        maps, masks = result.maps[rows].numpy(), test.masks[rows].numpy()
        assert figures["pixel_auroc"] == pytest.approx(
            roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9
        )
        assert figures["au_pro"] == pytest.approx(common.au_pro(maps, masks), abs=1e-9)


def test_other_content_of_the_same_size_is_other_data(run_script, pill):
    arguments = ["--data", pill, *SMALL]
    assert run_script("knn", *arguments, "--neighbors", "3")[0] == 0
    path = pill / "train/good/000.jpg"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    _, out, _ = run_script("patchcore", *arguments, *QUICK["patchcore"])
    assert "\nknn" not in out


@pytest.mark.parametrize("method", ["patchcore"])
def test_the_whole_photo(method, run_script, pill, tmp_path):
    for path in pill.rglob("*.*g"):
        image = Image.open(path)
        path.unlink()
        image.resize((400, 300)).save(path.with_suffix(".png"))
    arguments = ["--data", pill, *SMALL, *QUICK[method], "--save", "m.pt"]
    code, _, err = run_script(method, *arguments)
    assert code == 0
    assert "inspected is only the middle 75% of the width and 100% of the height" in err
    code, _, err = run_script(method, *arguments, "--crop", "0")
    assert code == 0
    assert "inspected is only" not in err
    code, out, _ = run_script(method, "--load", "m.pt", "--predict", pill / "test")
    assert (code, len(out.splitlines())) == (0, 11)


def test_outline_and_verdict_agree():
    run = options(threshold=1.0, map_threshold=1.0, map_range=(0.0, 2.0))
    pixels, quiet = torch.zeros(3, 40, 40), torch.full((40, 40), 0.2)
    spot = quiet.clone()
    spot[10:20, 10:20] = 1.5
    white = [
        (common.heat_map(run, pixels, anomaly_map, score) == 255).all(2).any()
        for anomaly_map, score in [(spot, 2), (spot, 0.5), (quiet, 2), (quiet, 0.5)]
    ]
    assert white == [True, False, True, False]
    ring = np.zeros((40, 40), bool)
    ring[5:35, 5:35] = True
    ring[15:20, 15:20] = False  # a normal island in a large defect
    drawn = common.outline(ring)
    assert drawn[5, 5]
    assert not drawn[12:23, 12:23].any()


# ---------------------------------------------------------------- save, load, predict


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_model_gives_the_same_bits(method, run_script, pill, tmp_path):
    arguments = ["--data", pill, *SMALL, *QUICK[method], "--save", "model.pt"]
    assert run_script(method, *arguments)[0] == 0
    folder = tmp_path / "results" / method
    fitted = read_scores(folder / "scores.csv")
    code, out, _ = run_script(method, "--load", "model.pt", "--predict", pill / "test")
    assert code == 0
    header, *rows = csv.reader(out.splitlines())
    assert header == ["path", "score", "predicted"]
    rows = {row[0]: row[1:] for row in rows}
    assert rows == {path: [row["score"], row["predicted"]] for path, row in fitted.items()}
    assert Image.open(folder / "predictions.png").height > 500
    pictures = list((folder / "predictions").rglob("*.png"))
    assert len(pictures) == 10
    assert Image.open(pictures[0]).width > Image.open(pictures[0]).height
    # Evaluating the loaded model on the test set is the same run again.
    before = (folder / "scores.csv").read_bytes()
    assert run_script(method, "--load", "model.pt", "--data", pill)[0] == 0
    assert (folder / "scores.csv").read_bytes() == before
    shutil.rmtree(pill / "train")  # nothing is fitted: not needed
    assert run_script(method, "--load", "model.pt", "--data", pill)[0] == 0
    assert (folder / "scores.csv").read_bytes() == before
    # One photo at a time, whatever its name.
    photo = tmp_path / "a photo, of mine.jpg"
    shutil.copy(pill / "test" / "crack" / "000.jpg", photo)
    _, out, _ = run_script(method, "--load", "model.pt", "--predict", photo)
    _, (path, score, _verdict) = csv.reader(out.splitlines())
    assert path == str(photo)
    assert float(score) == pytest.approx(
        float(fitted[str(pill / "test" / "crack" / "000.jpg")]["score"]), rel=1e-5
    )


def test_a_broken_photo_is_reported_and_the_others_go_on(run_script, pill, tmp_path):
    arguments = ["--data", pill, *SMALL, "--neighbors", "3", "--predict", tmp_path / "photos"]
    shutil.copytree(pill / "test" / "good", tmp_path / "photos" / "deep" / "er")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("passed over")
    code, out, err = run_script("knn", *arguments, "--batch-size", "2")
    assert code == 1
    assert len(out.splitlines()) == 1 + 3  # the tables go to stderr, so that stdout pipes
    assert "broken.jpg: cannot be read as an image" in err
    assert "judged 3 images, 1 broken" in err


def test_names_in_another_encoding_and_thin_photos(run_script, pill, tmp_path):
    folder = tmp_path / os.fsdecode(b"photos \xe9")  # Latin-1
    folder.mkdir()
    shutil.copy(pill / "test" / "good" / "000.jpg", folder / os.fsdecode(b"caf\xe9.jpg"))
    Image.new("RGB", (20_000, 1)).save(folder / "thin.png")
    arguments = ["--data", pill, *SMALL, "--neighbors", "3", "--predict", folder]
    code, out, err = run_script("knn", *arguments)
    assert code == 1
    assert len(out.splitlines()) == 1 + 1
    assert "thin.png: cannot be read as an image (20000 x 1 pixels: too thin)" in err
    for part in ("test", "ground_truth"):
        (pill / part / "crack").rename(pill / part / os.fsdecode(b"$\xe9^$"))
    pill.rename(tmp_path / os.fsdecode(b"data $\xe9^$"))
    arguments = ["--data", tmp_path / os.fsdecode(b"data $\xe9^$"), *SMALL, "--neighbors", "3"]
    assert run_script("knn", *arguments)[0] == 0


@pytest.fixture
def model_file(run_script, pill, tmp_path):
    assert run_script("knn", "--data", pill, *SMALL, "--neighbors", "3", "--save", "m.pt")[0] == 0
    return tmp_path / "m.pt"


def altered(change):
    def alter(path):
        model = torch.load(path, weights_only=True)
        change(model)
        torch.save(model, path)

    return alter


def signed(change):
    def sign(model):
        change(model)
        del model["digest"]
        model["digest"] = common.digest(model)

    return altered(sign)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda path: path.unlink(), "m.pt: No such file or directory: expected a file by --save"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged or foreign file"),
        (lambda path: path.write_text("hello"), "damaged or foreign file"),
        (lambda path: torch.save({"a": 1}, path), "not a saved model"),
        (lambda path: torch.save([1], path), "holds a list"),
        (altered(lambda m: m.update(method="dfr")), "method is 'dfr', expected 'knn'"),
        (altered(lambda m: m.update(format="older")), "format is 'older'"),
        (signed(lambda m: m["settings"].update(fingerprint="x")), "not the weights that m.pt was"),
        (altered(lambda m: m["settings"].update(neighbors=4)), "m.pt: damaged or changed since"),
        (altered(lambda m: m["state"].pop("bank")), "m.pt: damaged or changed since"),
        (altered(lambda m: m["state"]["bank"].fill_(torch.nan)), "m.pt: damaged or changed since"),
    ],
)
def test_a_wrong_model_file_is_refused(run_script, model_file, pill, alter, message):
    alter(model_file)
    code, out, err = run_script("knn", "--load", "m.pt", "--predict", pill)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_options_that_contradict_the_model_are_refused(run_script, model_file, pill):
    code, _, err = run_script("knn", "--load", "m.pt", "--data", pill, "--neighbors", "4")
    assert code == 2
    assert "--neighbors 4: m.pt was fitted with 3" in err
    code, _, err = run_script(
        "knn", "--load", "m.pt", "--data", pill, "--seed", "0", "--crop", "64"
    )
    assert code == 0  # the same as fitted: no contradiction
    assert run_script("knn", "--load", "m.pt", "--save", "n.pt")[0] == 2
    code, _, err = run_script("knn", "--load", "m.pt")
    assert (code, err.count("\n")) == (2, 1)
    assert "--load m.pt: add --predict PHOTOS or --data DIR" in err


# ---------------------------------------------------------------- bad input


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def resized(path, size):
    Image.open(path).resize(size).save(path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:3000])


BAD_DATA = {
    "folder missing": (shutil.rmtree, "found no folder there"),
    "folder empty": (empty, "found an empty folder"),
    "not in the layout": (lambda p: (p / "train").rename(p / "training"), "'training'"),
    "no training images": (lambda p: empty(p / "train/good"), "train/good: holds no image"),
    "one training image": (
        lambda p: [f.unlink() for f in sorted((p / "train/good").iterdir())[1:]],
        "holds one image, expected at least 2",
    ),
    "truncated image": (
        lambda p: truncated(p / "test/color/000.jpg"),
        "test/color/000.jpg: cannot",
    ),
    "no image at all": (
        lambda p: (p / "train/good/003.jpg").write_text("x"),
        "good/003.jpg: cannot",
    ),
    "empty file": (lambda p: (p / "train/good/003.jpg").write_bytes(b""), "good/003.jpg: cannot"),
    "mask missing": (
        lambda p: (p / "ground_truth/crack/000_mask.png").unlink(),
        "test/crack/000.jpg: has no mask: expected",
    ),
    "mask of another size": (
        lambda p: resized(p / "ground_truth/crack/000_mask.png", (64, 80)),
        "crack/000_mask.png: is 64 x 80, but its image",
    ),
    "truncated mask": (
        lambda p: (p / "ground_truth/crack/000_mask.png").write_bytes(b"\x89PNG"),
        "000_mask.png: cannot be read",
    ),
    "image smaller than the crop": (
        lambda p: resized(p / "train/good/002.jpg", (90, 60)),
        "train/good/002.jpg: is 90 x 60, smaller than --crop 64",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(run_script, pill, tmp_path, case):
    damage, message = BAD_DATA[case]
    damage(pill)
    code, out, err = run_script("patchcore", "--data", pill, *SMALL)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not list(tmp_path.rglob("metrics.json"))


BAD_OPTIONS = {
    "coreset zero": ("patchcore", ["--coreset", "0"], "0: expected more than 0 and at most 1"),
    "coreset above one": ("patchcore", ["--coreset", "1.5"], "--coreset: 1.5: expected more"),
    "coreset no number": ("patchcore", ["--coreset", "many"], "invalid number value: 'many'"),
    "coreset nan": ("patchcore", ["--coreset", "nan"], "--coreset: nan: expected"),
    "no neighbors": ("patchcore", ["--neighbors", "0"], "--neighbors: 0: expected at least 1"),
    "neighbors above the bank": ("patchcore", ["--neighbors", "9999"], "the memory bank holds 51"),
    "neighbors above the images": ("knn", ["--neighbors", "8"], "there are 8 normal images"),
    "unknown layer": ("patchcore", ["--layers", "layer9"], "invalid choice: 'layer9'"),
    "no layer": ("dfr", ["--layers"], "--layers: expected at least one argument"),
    "unknown option": ("knn", ["--nieghbors", "3"], "unrecognized arguments: --nieghbors"),
    "unknown backbone": ("knn", ["--backbone", "vgg16"], "invalid choice: 'vgg16'"),
    "unknown device": ("knn", ["--device", "tpu"], "invalid choice: 'tpu'"),
    "neighbors above what cupy keeps": ("knn", ["--neighbors", "40", "--backend", "cupy"], "cupy"),
    "cupy without a GPU": ("knn", ["--device", "cpu", "--backend", "cupy"], "cupy: needs an"),
    "crop above resize": ("knn", ["--crop", "128"], "--crop 128: expected at most --resize 64"),
    "tiny resize": ("knn", ["--resize", "8"], "--resize: 8: expected at least 32"),
    "huge resize": ("knn", ["--resize", "99999"], "expected at least 32 and at most 4096"),
    "no batch": ("knn", ["--batch-size", "0"], "--batch-size: 0: expected at least 1"),
    "negative seed": ("knn", ["--seed", "-1"], "--seed: -1: expected at least 0"),
    "seed no number": ("knn", ["--seed", "x"], "invalid whole number value: 'x'"),
    "rate zero": ("knn", ["--false-alarm-rate", "0"], "--false-alarm-rate: 0: expected"),
    "rate above half": ("knn", ["--false-alarm-rate", "0.9"], "at most 0.5"),
    "weights missing": ("knn", ["--weights", "none.pth"], "or directory: expected imagenet"),
    "weights damaged": ("knn", ["--weights", __file__], "damaged or foreign file"),
    "out is a file": ("knn", ["--out", "file.txt"], "--out: file.txt/knn cannot be written to"),
    "save is a folder": ("knn", ["--save", "folder"], "--save folder: is a folder"),
    "save below a file": ("knn", ["--save", "file.txt/m.pt"], "--save: file.txt cannot be written"),
    "load missing": ("knn", ["--load", "none.pt"], "--load none.pt: No such file"),
    "predict missing": ("knn", ["--predict", "none"], "--predict none: no such file or folder"),
    "predict without a model": ("knn", ["--predict", "folder"], "by which normal images?"),
    "predict empty": ("knn", ["--predict", "folder"], "--predict folder: holds no image"),
    "no steps": ("autoencoder", ["--steps", "0"], "--steps: 0: expected at least 2"),
    "huge latent": ("autoencoder", ["--latent", "99999"], "at most 4096"),
    "predict a text": ("knn", ["--predict", "file.txt", "--load", "file.txt"], "foreign file"),
    "load a folder": ("knn", ["--load", "folder"], "folder: Is a directory: expected a file"),
    "data is a file": ("knn", ["--data", "file.txt"], "file.txt: expected normal images in"),
    "no latent": ("autoencoder", ["--latent", "0"], "--latent: 0: expected at least 1"),
    "rate that explodes": ("dfr", ["--steps", "40", "--learning-rate", "1e30"], "lower the rate"),
    "loss that is not finite": (
        "autoencoder", ["--steps", "40", "--learning-rate", "1e38"], "lower the rate"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named_in_one_line(run_script, pill, tmp_path, case):
    method, arguments, message = BAD_OPTIONS[case]
    (tmp_path / "file.txt").write_text("precious")
    (tmp_path / "folder").mkdir()
    shutil.rmtree(pill / "test")  # nothing to evaluate: the error must come all the same
    quick = ["--neighbors", "3"] if method == "knn" else []
    data = [] if case == "predict without a model" else ["--data", pill]
    code, _, err = run_script(method, *data, *SMALL, *quick, *arguments)
    *notes, line = err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert message in line
    assert not any("error" in note or "Traceback" in note for note in notes)
    assert (tmp_path / "file.txt").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(run_script, pill):
    code, _, err = run_script("patchcore", "--data", pill, *SMALL, "--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "--device cuda: not available here: use --device cpu" in err


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_half_a_file_in_the_cache_of_weights(run_script, pill, offline, tmp_path, content):
    cached = tmp_path / "cache/hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    code, _, err = run_script("knn", "--data", pill, "--backbone", "resnet18")
    assert code == 2
    assert f"delete the damaged {cached}" in err


def test_no_weights_to_be_had_is_an_error_with_own_data(run_script, pill, offline):
    code, _, err = run_script("patchcore", "--data", pill, *SMALL[2:])
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: --weights imagenet: download failed")
    assert "--weights FILE.pth" in line
    assert "--weights random" in line
    assert line.index("efficientnet_lite0") < line.index("FILE.pth")


# ---------------------------------------------------------------- as a process of its own


def start(method, *arguments, **settings):
    command = [sys.executable, str(SCRIPTS[method]), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, **settings)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_leaves_nothing_half_written(pill, tmp_path):
    def listen():  # where pytest runs in the background, Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    arguments = ["--data", pill, "--steps", "100000", "--save", "m.pt"]
    process = start("autoencoder", *arguments, cwd=tmp_path, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not (tmp_path / "results").exists():  # then the options are read, and work begins
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert [p for p in tmp_path.rglob("*") if p.is_file() and pill not in p.parents] == []


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell's pipes")
def test_a_closed_pipe_is_no_error(pill, model_file, tmp_path):
    process = start(
        "knn", "--load", model_file, "--predict", pill, "--batch-size", "1", cwd=tmp_path
    )
    process.stdout.close()  # as `| head -0` would
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 141

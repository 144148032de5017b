"""The command line as its user meets it: what a run leaves, and what a wrong one says."""

import csv
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import common

import numpy as np
import pytest
import torch
import torchvision
from conftest import SCRIPTS, SMALL, small
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


def metrics_of(method):
    return json.loads(Path("results", method, "metrics.json").read_text())


def check_run(method, run_script, pill, tmp_path):
    """Runs a method, checks all that it leaves, and returns what it prints."""
    out, err = run_script(method, "--data", pill, *small(method))
    folder = tmp_path / "results" / method
    metrics = metrics_of(method)
    scores = read_scores(folder / "scores.csv")
    assert len(scores) == 10
    labels = [row["label"] == "defect" for row in scores.values()]
    expected = roc_auc_score(labels, [float(row["score"]) for row in scores.values()])
    assert metrics["image_auroc"] == pytest.approx(expected)
    assert (metrics["pixel_auroc"] is None) == (metrics["au_pro"] is None) == (method == "knn")
    assert set(metrics["per_defect"]) == {p.name for p in (pill / "test").iterdir()} - {"good"}
    reported = [p for p, row in scores.items() if float(row["score"]) > metrics["threshold"]]
    assert [p for p, row in scores.items() if row["predicted"] == "defect"] == reported
    assert metrics["reported"] + metrics["false_alarms"] == len(reported)
    assert metrics["normal_images"] == 3
    figures = {"examples.png", "scores.png", "normal.png"}
    figures |= {"coreset.png"} if method == "patchcore" else set()
    files = {"metrics.json", "scores.csv", common.TILES, common.RESULTS_TAG}
    assert {p.name for p in folder.iterdir()} == files | figures
    for name in figures:
        Image.open(folder / name).verify()
    assert metrics["fit_seconds"] > 0
    assert 0.1 < metrics["ms_per_image"] < 10_000
    caught = [f"  {metrics['reported']} of 7\n", f"  {metrics['false_alarms']} of 3\n"]
    for text in ("defect type", "crack", "all methods so far", "files in results/", *caught):
        assert text in out
    weights = "no pretrained weights" if method == "autoencoder" else "resnet18, random weights"
    assert f"{method} on {pill}, {weights}" in out
    assert metrics["weights"] == weights
    # A healthy set is not remarked on: what is looked at, not kept, few images, the threshold.
    lines = ["the network sees", "the fitted model is"]
    lines += ["training loss in step"] * (2 if method in ("autoencoder", "dfr") else 0)
    lines += ["warning: --false-al", f"threshold {metrics['threshold']:.4g}"]
    assert [line[: len(text)] for line, text in zip(err.splitlines(), lines, strict=True)] == lines
    return out


def test_runs_leave_files_and_one_table_if_the_data_are_the_same(run_script, pill, tmp_path):
    def table(out):
        return [line.split()[0] for line in out.split("all methods so far")[1].split("\n")[2:-3]]

    for method in METHODS:
        out = check_run(method, run_script, pill, tmp_path)
    assert table(out) == METHODS
    assert Image.open(tmp_path / "results" / "methods.png").height > 500
    other = [*small("knn"), "--backbone", "efficientnet_lite0"]
    out, _ = run_script("knn", "--data", pill, *other)
    assert table(out) == METHODS
    assert "  efficientnet_lite0, random weights\n" in out  # each row names its weights
    pill.rename(tmp_path / "moved")
    for name, content in [("dfr", "[]"), ("knn", '{"images": 1')]:  # not ours; half a file
        (tmp_path / "results" / name / "metrics.json").write_text(content)
    out, _ = run_script("patchcore", "--data", "moved", *small("patchcore"))
    assert table(out) == ["patchcore"]
    assert metrics_of("patchcore")["data"] == str(tmp_path / "moved")


def test_only_out_of_memory_is_called_so(capfd):
    with pytest.raises(SystemExit), common.ends_in_one_line():
        torch.empty(10**15)
    assert capfd.readouterr().err.startswith("error: out of memory: lower --batch-size")
    with pytest.raises(RuntimeError, match="size"), common.ends_in_one_line():
        torch.ones(2) @ torch.ones(3)


STORY = {  # image AUROC at least and at most, and how to be quick
    "autoencoder": (0.6, 0.92, ["--steps", "120"]),
    "dfr": (0.93, 1, ["--steps", "300"]),
    "knn": (0.92, 1, []),
}  # of PatchCore, test_methods.py demands the figures of the README


@pytest.mark.parametrize("method", STORY)
def test_each_method_sees_what_the_first_cannot(run_script, offline, method):
    """The story of this repository, on the practice pill with ImageNet features from pip."""
    least, most, quick = STORY[method]
    out, err = run_script(method, *quick)
    assert ("near-copies" in err, "download" in err) == (False, False), err
    if method != "autoencoder":
        assert "practice_pill, efficientnet_lite0, imagenet weights" in out
    found = metrics_of(method)
    assert least <= found["image_auroc"] <= most
    if method == "dfr":
        local = [of for kind, of in found["per_defect"].items() if kind != "pill_type"]
        assert min(figures["pixel_auroc"] for figures in local) > 0.98


@pytest.mark.parametrize("missing", ["good", "defects"])
def test_a_test_set_of_one_kind_has_null_metrics(run_script, pill, missing):
    for folder in (pill / "test").iterdir():
        if (folder.name == "good") == (missing == "good"):
            shutil.rmtree(folder)
    out, err = run_script("patchcore", "--data", pill, *small("patchcore"))
    assert "image AUROC is null: it takes photos in test/good" in err
    metrics = metrics_of("patchcore")
    assert metrics["image_auroc"] is None
    assert (metrics["pixel_auroc"] is None) == (missing == "defects")
    assert "defect type" in out


def test_normal_images_alone_are_enough_to_fit(run_script, pill):
    (pill / "test").rename(pill / "test_public")
    arguments = ["--data", pill, *small("knn"), "--false-alarm-rate", "0.2"]
    out, err = run_script("knn", *arguments)
    assert out == ""
    assert err.endswith("/test holds no image to evaluate on\n")
    out, err = run_script("knn", *arguments, "--save", "model.pt")
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["the", "saved", "threshold"]


def test_ground_truth_of_some_types_only(run_script, pill):
    for kind in ("crack", "scratch"):
        shutil.rmtree(pill / "ground_truth" / kind)
    _, err = run_script("patchcore", "--data", pill, *small("patchcore"))
    assert "2 test photos have no mask in ground_truth" in err
    metrics = metrics_of("patchcore")
    assert metrics["per_defect"]["crack"]["pixel_auroc"] is None
    assert metrics["per_defect"]["crack"]["image_auroc"] is not None
    for figures in (metrics["per_defect"]["color"], metrics):
        assert 0 < figures["pixel_auroc"] < 1
        assert 0 < figures["au_pro"] < 1


def test_the_whole_photo(run_script, pill):
    for path in pill.rglob("*.*g"):
        image = Image.open(path)
        path.unlink()
        image.resize((400, 300)).save(path.with_suffix(".png"))
    arguments = ["--data", pill, *small("patchcore"), "--save", "m.pt"]
    _, err = run_script("patchcore", *arguments)
    assert "the square in a photo's center, 100% of its shorter side" in err
    _, err = run_script("patchcore", *arguments, "--crop", "0")
    assert "the network sees" not in err
    Image.new("RGB", (60, 90)).save(pill / "test" / "small.png")
    out, err = run_script("patchcore", "--load", "m.pt", "--predict", pill / "test")
    assert len(out.splitlines()) == 12
    assert "1 photos are enlarged to 64 x 64" in err
    assert "small.png" in err


def test_features_on_disk_are_named(run_script, pill, monkeypatch):
    monkeypatch.setattr(common, "DISK_FROM", 0)  # nothing fits into memory
    monkeypatch.delenv("TMPDIR", raising=False)
    _, err = run_script("patchcore", "--data", pill, *small("patchcore"))
    assert "the features, 0.0 GiB, lie in results/patchcore during the fit" in err


def test_outline_and_verdict_agree():
    map_range = (0.0, 1.0, 2.0)
    pixels, quiet = torch.zeros(3, 40, 40), torch.full((40, 40), 0.2)
    spot = quiet.clone()
    spot[10:20, 10:20] = 1.5
    white = [
        (common.heat_map(pixels, anomaly_map, map_range, verdict) == 255).all(0).any()
        for anomaly_map in (spot, quiet)
        for verdict in ("defect", "normal")
    ]
    assert white == [True, False, True, False]
    ring = np.zeros((40, 40), bool)
    ring[5:35, 5:35] = True
    ring[15:20, 15:20] = False  # a normal island in a large defect
    drawn = common.outlined(pixels.byte(), ring, "white")[0]
    assert drawn[5, 5] == 255
    assert not drawn[12:23, 12:23].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_model_gives_the_same_bits(method, run_script, pill, tmp_path):
    run_script(method, "--data", pill, *small(method), "--save", "model.pt")
    folder = tmp_path / "results" / method
    fitted = read_scores(folder / "scores.csv")
    out, _ = run_script(method, "--load", "model.pt", "--predict", pill / "test")
    header, *rows = csv.reader(out.splitlines())
    assert header == ["path", "score", "predicted", "x", "y"]
    assert all((row[3] == row[4] == "") == (method == "knn") for row in rows)
    rows = {row[0]: row[1:3] for row in rows}
    assert rows == {path: [row["score"], row["predicted"]] for path, row in fitted.items()}
    assert Image.open(folder / "predictions.png").height > 500
    pictures = list((folder / "predictions").rglob("*.png"))
    assert len(pictures) == 10
    assert Image.open(pictures[0]).width > Image.open(pictures[0]).height
    # Evaluating the loaded model on the test set is the same run again.
    before = (folder / "scores.csv").read_bytes()
    shutil.rmtree(pill / "train")  # nothing is fitted: not needed
    run_script(method, "--load", "model.pt", "--data", pill)
    assert (folder / "scores.csv").read_bytes() == before
    # One photo at a time, whatever its name.
    photo = pill / "test/crack/000.jpg"
    copied = shutil.copy(photo, tmp_path / "a photo, of mine.jpg")
    out, _ = run_script(method, "--load", "model.pt", "--predict", copied)
    _, (path, score, *_) = csv.reader(out.splitlines())
    assert path == str(copied)
    assert float(score) == pytest.approx(float(fitted[str(photo)]["score"]), rel=1e-5)


def test_names_in_another_encoding_and_thin_photos(run_script, pill, tmp_path):
    folder = tmp_path / os.fsdecode(b"photos \xe9")  # Latin-1
    folder.mkdir()
    shutil.copy(pill / "test" / "good" / "000.jpg", folder / os.fsdecode(b"caf\xe9.jpg"))
    Image.new("RGB", (20_000, 1)).save(folder / "thin.png")
    shutil.copy(pill / "test" / "good" / "000.jpg", folder / "\u82f1\u0444\U0001f600.jpg")
    arguments = ["--data", pill, *small("knn"), "--predict", folder]
    out, err = run_script("knn", *arguments, code=1)
    assert len(out.splitlines()) == 1 + 2
    assert "thin.png: is (20000, 1), expected sides of at most 1 to 50" in err
    assert "arning: Glyph" not in err
    for part in ("test", "ground_truth"):
        (pill / part / "crack").rename(pill / part / os.fsdecode(b"\xe9^$"))
        (pill / part / "color").rename(pill / part / "\u82f1\u0444")
    renamed = pill.rename(tmp_path / os.fsdecode(b"data $\xe9^$"))
    _, err = run_script("knn", "--data", renamed, *small("knn"))
    assert "Glyph" not in err


def test_pictures_show_the_images_that_they_name(run_script, pill, monkeypatch):
    """The highest scores and the nearest photos, against scores.csv and a search written out."""
    pictures = {}

    def save_picture(run, name, first_line, rows):
        pictures[str(name)] = [[cell.caption.split("\n") for cell in row] for row in rows]

    def score_of(cell):
        return float(cell[1].split()[0])

    monkeypatch.setattr(common, "save_picture", save_picture)
    arguments = [*small("knn"), "--save", "m.pt", "--predict", pill / "test"]
    run_script("knn", "--data", pill, *arguments)
    scores = defaultdict(list)
    for path, row in read_scores("results/knn/scores.csv").items():
        scores[Path(path).parent.name].append(float(row["score"]))
    for row in pictures["examples.png"]:
        of_kind = scores.pop(row[0][0])
        assert score_of(row[0]) == pytest.approx(max(of_kind), rel=1e-3)
        assert row[1] == ["ground truth"]
        if len(row) > 5:  # each image has five cells
            assert score_of(row[5]) == pytest.approx(min(of_kind), rel=1e-3)
    assert not scores
    for name in ("normal.png", "predictions.png"):
        shown = [score_of(row[0]) for row in pictures[name]]
        assert shown == sorted(shown, reverse=True)
    model = torch.load("m.pt", weights_only=True)
    highest = float(model["scores"].max())
    assert score_of(pictures["normal.png"][0][0]) == pytest.approx(highest, rel=1e-3)
    bank, names = model["state"]["bank"], model["names"]
    for photo, nearest, *_ in pictures["normal.png"]:
        distances = torch.cdist(bank[names.index(photo[0])][None], bank)[0]
        assert nearest[2] == names[distances.argsort()[1]]


@pytest.mark.parametrize(("own", "side"), [(64, 224), (300, 300), (784, 448)])
def test_a_picture_has_tiles_of_one_size_and_a_whole_heading(tmp_path, own, side):
    run = common.Run(SimpleNamespace(out=tmp_path), {}, 1.0, None, "title")
    gray = torch.full((3, own, own), 99, dtype=torch.uint8)
    cells = [common.Cell("", gray), common.Cell("caption", gray[:, :50, :50])]
    widths = []
    for first_line in ("short", "long " * 90 + "end"):
        common.save_picture(run, "a.png", first_line, [cells, cells[:1]])
        picture = np.asarray(Image.open(tmp_path / "a.png"))[..., 0]
        widths.append(picture.shape[1])
        tops, lefts = [picture.shape[0] - 2 * (side + 6), -side - 6], [6, side + 12]
        tiles = [[picture[t:][:side, x : x + side] for x in lefts] for t in tops]
        assert (tiles[0][0] == 99).all()
        assert (tiles[0][1][50:] == 99).all()
        assert {0, 255} < set(tiles[0][1][:50].ravel())  # the caption
        assert (tiles[1][0] == 99).all()
        assert (tiles[1][1] == 255).all()
        assert (picture[: tops[0], -6:] == 255).all()  # the heading ends before the border
        assert (picture[: tops[0], -60:] < 99).any() == (first_line != "short")
    assert widths[0] == 2 * side + 18 < widths[1]


def test_names_in_pictures_tell_photos_apart():
    paths = [Path("a/x.png"), Path("b/x.png"), Path("c", "y" * 30 + "1.png"), Path("a/\u82f1.png")]
    paths += [Path("\u0434\u0435/gr\u00f6\u00dfe.png"), Path("a\n/\udce9.png")]
    names = list(map(common.short_name, paths))
    assert names[:4] == ["a/x.png", "b/x.png", "y" * 23 + "1.png", "a/\\u82f1.png"]
    assert names[4:] == ["\u0434\u0435/gr\u00f6\u00dfe.png", "a\n/\\udce9.png"]
    assert max(map(len, names)) <= 28


def test_the_picture_of_a_photo_lies_under_its_absolute_path(monkeypatch):
    assert common.picture_path(Path("/a/b.png")) == Path("predictions/a/b.png.png")
    monkeypatch.setattr(common, "Path", PureWindowsPath)
    monkeypatch.setattr(common.os.path, "abspath", lambda path: path)
    places = [common.picture_path(f"{drive}\\a\\b.png") for drive in ("C:", "D:")]
    assert places[0] == PureWindowsPath("predictions/C/a/b.png.png")
    assert places[1] == PureWindowsPath("predictions/D/a/b.png.png")


def test_saving_replaces_no_device_no_link_and_no_mode(run_script, pill, tmp_path):
    fit = ["--data", pill, *small("knn"), "--save"]
    if os.path.exists("/dev/null"):
        run_script("knn", *fit, "/dev/null")
        assert not os.path.isfile("/dev/null")
    (tmp_path / "target.pt").write_text("older")
    (tmp_path / "target.pt").chmod(0o600)
    (tmp_path / "link.pt").symlink_to("target.pt")
    run_script("knn", *fit, "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    (tmp_path / "circle.pt").symlink_to("circle.pt")  # it holds nothing that could be lost
    run_script("knn", *fit, "circle.pt")
    assert (tmp_path / "target.pt").stat().st_mode & 0o777 == 0o600
    assert common.load_model(tmp_path / "target.pt")["settings"]["method"] == "knn"


def test_a_model_without_room_is_refused_before_the_fit(run_script, pill, monkeypatch):
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    fit = ["--data", pill, *small("patchcore"), "--save", "m.pt"]
    _, err = run_script("patchcore", *fit, code=2)
    # 8 photos x 64 patches x (128 + 256) columns x 4 bytes x 0.2 of them, and a fifth
    needed = 8 * 64 * 384 * 4 * 0.2 * 1.2 / 2**30
    assert f"--save m.pt: takes {needed:.3g} GiB, and 9.31e-07 are free there: save else" in err


def test_the_rate_of_the_fit_stays_unless_another_is_given(run_script, pill):
    fit = ["--data", pill, *small("knn"), "--false-alarm-rate", "0.2", "--save", "m.pt"]
    _, err = run_script("knn", *fit)
    threshold = err.split("threshold ")[1].split(",")[0]
    judge = ["--load", "m.pt", "--predict", pill / "test/good"]
    _, err = run_script("knn", *judge)
    assert f"above the threshold {threshold}\n" in err
    _, err = run_script("knn", *judge, "--false-alarm-rate", "0.5")
    assert f"above the threshold {threshold}\n" not in err
    _, err = run_script("knn", *judge, "--false-alarm-rate", "0.05")
    assert "takes 19 normal images, there are 8: " in err
    assert "fit again with this rate" in err
    with pytest.raises(ValueError, match="false_alarm_rate is 0: expected between 0 and 1"):
        common.load_judge("m.pt", lambda *_: None, false_alarm_rate=0)


def test_old_pictures_do_not_stay_among_the_new(run_script, model_file, pill, tmp_path):
    judge = ["--load", "m.pt", "--predict", pill / "test"]
    run_script("knn", *judge)
    # Its own pictures, which lie there by now, are not judged.
    out, _ = run_script("knn", *judge[:-1], ".", "--pictures", "none")
    assert out.count("\n") == 1 + len([path for path in pill.rglob("*") if path.is_file()])
    out, err = run_script("knn", *judge, "--pictures", "defects")
    pictures = list((tmp_path / "results/knn/predictions").rglob("*.png"))
    assert 0 < len(pictures) == out.count(",defect,") < 10
    assert f"judged 10 images: {len(pictures)} above the threshold " in err
    photo = Path("/", pictures[0].relative_to(tmp_path / "results/knn/predictions"))
    photo.with_suffix("").write_bytes(b"broken since")
    _, err = run_script("knn", *judge, "--pictures", "defects", code=1)
    assert ("\n1 errors: see above" in err, pictures[0].exists()) == (True, False)
    run_script("knn", *judge, "--pictures", "none", code=1)
    assert not list((tmp_path / "results/knn").rglob("*.png"))


def test_runs_on_other_photos_or_pixels_are_not_compared(run_script, pill):
    fit = ["--data", pill, *small("knn")]
    run_script("patchcore", "--data", pill, *small("patchcore"))
    assert "\npatchcore  " in run_script("knn", *fit)[0]
    assert "\npatchcore  " not in run_script("knn", *fit, "--crop", "0")[0]
    (pill / "test/good/000.jpg").unlink()
    assert "\npatchcore  " not in run_script("knn", *fit)[0]


def test_without_pictures_nothing_is_written(run_script, model_file, pill, tmp_path):
    judge = ["--load", "m.pt", "--predict", pill / "test"]
    (tmp_path / "results").write_text("no folder: nothing can be written")
    out, err = run_script("knn", *judge, "--pictures", "none")
    assert ("pictures in" in err, out.count("\n")) == (False, 11)
    _, err = run_script("knn", *judge, code=2)
    assert "cannot be written: Not a directory: see --out" in err


@pytest.mark.parametrize("crop", [224, 0])
@pytest.mark.parametrize("size", [(400, 300), (300, 480)])
def test_the_place_of_the_peak_is_in_pixels_of_the_photo(crop, size):
    """A white spot in the photo, and what the network sees of it taken for the map."""
    photo = Image.new("RGB", size)
    photo.paste("white", (145, 175, 152, 182))
    seen = common.prepare(photo, 256, crop)[:1].float()
    x, y = common.place_of_peak(SimpleNamespace(resize=256, crop=crop), seen[0], size)
    assert abs(x - 148) <= 4
    assert abs(y - 178) <= 4


def test_photos_unlike_all_of_training_are_named(run_script, model_file, pill):
    """As test photos by the rate that was asked, and as photos to judge if they are many."""
    lacks = "train/good lacks what they show"
    for photo in (pill / "test" / "good").iterdir():
        for i in range(4):
            image = Image.open(photo).rotate(90 + i)
            image.save(photo.with_name(f"{photo.stem}-{i}.png"))
        photo.unlink()
    _, err = run_script("knn", "--load", "m.pt", "--data", pill)
    assert f"12 of 12 normal test images are above the threshold, far more than 11%: {lacks}" in err
    _, err = run_script("knn", "--load", "m.pt", "--predict", pill / "test/good")
    assert f"more than half of these photos are above the threshold: {lacks}" in err


@pytest.fixture
def model_file(fitted, tmp_path):
    return Path(shutil.copy(fitted, tmp_path))


def altered(**changes):
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda path: path.unlink(), "m.pt: No such file or directory: expected a file by --save"),
        (truncated, "damaged or foreign file"),
        (lambda path: path.write_text("hello"), "damaged or foreign file"),
        (lambda path: torch.save({"a": 1}, path), "is None, expected visual"),
        (lambda path: torch.save([1], path), "damaged or foreign file"),
        (altered(settings={"method": "dfr"}), "m.pt: was fitted with method dfr, not knn: fit aga"),
        (altered(format="older"), "is older, expected visual"),
        (altered(fingerprint="x"), "of other content than these: pass the same"),
        (flipped, "m.pt: damaged or foreign file"),
    ],
)
def test_a_wrong_model_file_is_refused(run_script, model_file, pill, alter, message):
    alter(model_file)
    out, err = run_script("knn", "--load", "m.pt", "--predict", pill, code=2)
    assert out == ""
    assert message in err.splitlines()[-1]


def test_options_that_contradict_the_model_are_refused(run_script, model_file, pill):
    _, err = run_script("knn", "--load", "m.pt", "--data", pill, "--neighbors", "4", code=2)
    assert "m.pt: was fitted with neighbors 3, not 4" in err
    same = ["--seed", "0", "--crop", "64"]  # as fitted: no contradiction
    run_script("knn", "--load", "m.pt", "--data", pill, *same)
    run_script("knn", "--load", "m.pt", "--save", "n.pt", code=2)
    _, err = run_script("knn", "--load", "m.pt", code=2)
    assert "--load m.pt: add --predict PHOTOS or --data DIR" in err


def test_own_weights_are_found_from_another_folder(run_script, pill, tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet18().state_dict(), "w.pth")
    own = [*small("knn"), "--weights", "w.pth", "--save", "m.pt"]
    run_script("knn", "--data", pill, *own)
    monkeypatch.chdir(pill)
    run_script("knn", "--load", tmp_path / "m.pt", "--predict", "test")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def resized(path, size):
    Image.open(path).resize(size).save(path)


def one_image(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


MASK = "ground_truth/crack/000_mask.png"
BAD_DATA = {
    "no folder": (shutil.rmtree, "pill: expected the folder train/good"),
    "other layout": (lambda p: (p / "train").rename(p / "training"), "the folder train/good"),
    "no images": (lambda p: empty(p / "train/good"), "train/good: holds 0 different images"),
    "one image": (lambda p: one_image(p / "train/good"), "holds 1 different images, expected"),
    "truncated": (lambda p: truncated(p / "test/color/000.jpg"), "test/color/000.jpg: cannot"),
    "text": (lambda p: (p / "train/good/003.jpg").write_text("x"), "good/003.jpg: cannot"),
    "other size": (lambda p: resized(p / MASK, (64, 80)), "mask.png: is (64, 80), expected"),
    "truncated mask": (lambda p: (p / MASK).write_bytes(b"\x89PNG"), "mask.png: cannot be read"),
    "thin": (lambda p: resized(p / "train/good/002.jpg", (90, 1)), "002.jpg: is (90, 1), expected"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(run_script, pill, tmp_path, case):
    damage, message = BAD_DATA[case]
    damage(pill)
    out, err = run_script("patchcore", "--data", pill, *SMALL, code=2)
    assert (out, err.count("error: ")) == ("", 1), err
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.rglob("metrics.json"))


BAD_OPTIONS = {
    "coreset zero": ("patchcore", ["--coreset", "0"], "--coreset: 0: expected 1e-09 to 1"),
    "coreset nan": ("patchcore", ["--coreset", "nan"], "--coreset: nan: expected"),
    "no neighbors": ("patchcore", ["--neighbors", "0"], "--neighbors: 0: expected 1 to"),
    "neighbors above the bank": (
        "patchcore",
        ["--neighbors", "99", "--coreset", "0.111"],  # 56.8 of 512 rows
        "the bank holds 57",
    ),
    "neighbors above the images": ("knn", ["--neighbors", "8"], "there are 8 normal images"),
    "unknown layer": ("patchcore", ["--layers", "layer9"], "invalid choice: 'layer9'"),
    "no layer": ("dfr", ["--layers"], "--layers: expected at least one argument"),
    "unknown option": ("knn", ["--nieghbors", "3"], "unrecognized arguments: --nieghbors"),
    "no such device": ("knn", ["--device", "cuda:9"], "--device cuda:9: is not available here"),
    "odd device": ("knn", ["--device", "meta"], "--device meta: is not available here: Tensor"),
    "no number": ("knn", ["--seed", "x"], "--seed: x: expected 0 to"),
    "crop above resize": ("knn", ["--crop", "128"], "--crop 128: expected 0, or 32 to --resize 64"),
    "crop as yes": ("dfr", ["--crop", "1"], "--crop 1: expected 0, or 32 to --resize 64"),
    "huge resize": ("knn", ["--resize", "99999"], "--resize: 99999: expected 32 to 4096"),
    "bits": ("knn", ["--bits", "17"], "--bits: 17: expected 8 to 16"),
    "weights missing": ("knn", ["--weights", "none.pth"], "or directory: expected a .pth"),
    "out is a file": ("knn", ["--out", "file.txt"], "written: Not a directory: see --out"),
    "save is a folder": ("knn", ["--save", "folder"], "--save folder: is a folder"),
    "save below a file": ("knn", ["--save", "file.txt/m.pt"], "file.txt/m.pt: cannot be written"),
    "load missing": ("knn", ["--load", "none.pt"], "--load none.pt: No such file"),
    "predict missing": ("knn", ["--predict", "none"], "--predict none: expected a photo"),
    "predict without a model": ("knn", ["--predict", "folder"], "by which normal images?"),
    "predict empty": ("knn", ["--predict", "folder"], "--predict folder: expected a photo"),
    "load a folder": ("knn", ["--load", "folder"], "folder: Is a directory: expected a file"),
    "empty path": ("knn", ["--predict", ""], "--predict: is empty: expected a path"),
    "empty weights": ("knn", ["--weights", ""], "--weights: is empty: expected a path"),
    "rate that explodes": ("dfr", ["--steps", "40", "--learning-rate", "1e30"], "lower it"),
    "rate above all": ("autoencoder", ["--steps", "2", "--learning-rate", "1e38"], "12 to 1e+36"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named_in_one_line(run_script, pill, tmp_path, case):
    method, arguments, message = BAD_OPTIONS[case]
    (tmp_path / "file.txt").write_text("precious")
    (tmp_path / "folder").mkdir()
    shutil.rmtree(pill / "test")  # nothing to evaluate: the error must come all the same
    data = [] if case == "predict without a model" else ["--data", pill]
    _, err = run_script(method, *data, *small(method), *arguments, code=2)
    *notes, line = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any("error" in note for note in notes)
    assert (tmp_path / "file.txt").read_text() == "precious"


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"])
def test_no_weights_to_be_had(run_script, pill, offline, tmp_path, content, monkeypatch):
    """No network, and in the cache nothing, or half a file."""
    cached = tmp_path / "cache/hub/checkpoints/resnet18-f37072fd.pth"
    if content is not None:
        cached.parent.mkdir(parents=True)
        cached.write_bytes(content)
    _, err = run_script("patchcore", "--data", pill, *SMALL[2:], code=2)
    line = err.splitlines()[-1]
    assert line.startswith("error: --weights imagenet: the download failed")
    ways = [f"delete it in {cached.parent}", "efficientnet_lite0", "FILE.pth", "--weights random"]
    places = [line.index(way) for way in ways]
    assert places == sorted(places)
    monkeypatch.setattr(common.sys, "stderr", None)  # a program without a console
    with pytest.raises(common.UserError, match=r"^((?!NoneType).)*$"):
        common.load_backbone("resnet18")

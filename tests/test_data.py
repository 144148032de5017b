"""Images of every kind, geometry of images and masks, and the practice pill."""

import hashlib
from pathlib import Path

import common

import numpy as np
import pytest
import torch
from draw_practice_pill import DEFECTS, draw_practice_pill
from PIL import Image
from torchvision import transforms


@pytest.fixture
def gradient():
    """(40, 60, 3) uint8: no two corners alike."""
    y, x = np.mgrid[:40, :60]
    return np.stack([4 * x, 6 * y, 2 * (x + y)], axis=2).astype(np.uint8)


def saved(path, image, **settings):
    image.save(path, **settings)
    return np.asarray(common.read_image(path))


def test_color_modes_are_read_as_rgb(tmp_path, gradient):
    rgb = Image.fromarray(gradient)
    np.testing.assert_array_equal(saved(tmp_path / "a.png", rgb), gradient)
    gray = saved(tmp_path / "b.png", rgb.convert("L"))
    np.testing.assert_array_equal(gray, np.asarray(rgb.convert("L").convert("RGB")))
    palette = saved(tmp_path / "c.png", rgb.quantize(200))
    assert np.abs(palette.astype(int) - gradient).mean() < 6
    cmyk = saved(tmp_path / "d.tif", rgb.convert("CMYK"))
    assert np.abs(cmyk.astype(int) - gradient).max() <= 1
    bilevel = saved(tmp_path / "e.png", rgb.convert("1"))
    assert set(np.unique(bilevel)) == {0, 255}


def test_transparency_is_shown_on_white(tmp_path, gradient):
    alpha = np.zeros((40, 60, 1), np.uint8)
    alpha[:, :30] = 255
    found = saved(tmp_path / "a.png", Image.fromarray(np.dstack([gradient, alpha])))
    np.testing.assert_array_equal(found[:, :30], gradient[:, :30])
    assert (found[:, 30:] == 255).all()


def test_16_bits_keep_their_upper_8(tmp_path):
    values = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
    found = saved(tmp_path / "a.png", Image.fromarray(values))
    np.testing.assert_array_equal(found[..., 0], values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(tmp_path, gradient, orientation):
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
               5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
               7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(tmp_path / "a.png", Image.fromarray(gradient), exif=exif)
    np.testing.assert_array_equal(found, upright[orientation](gradient))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(tmp_path, mode):
    array = np.full((9, 9), 70000, np.int32 if mode == "I" else np.float32)
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(common.UserError, match=r"a\.tif: cannot be read as an image .*expected 8"):
        common.read_image(tmp_path / "a.tif")


def test_masks_of_any_mode_are_nonzero_where_defective(tmp_path):
    mask = np.zeros((20, 20), bool)
    mask[5:9, 3:7] = True
    for name, image in {
        "a.png": Image.fromarray(np.uint8(255 * mask)),
        "b.png": Image.fromarray(np.uint8(mask)),  # 0 and 1
        "c.png": Image.fromarray(mask),
        "d.png": Image.fromarray(np.uint8(255 * mask)).convert("RGBA"),
        "e.png": Image.fromarray(np.uint16(300 * mask)),
    }.items():
        image.save(tmp_path / name)
        found = common.read_image(tmp_path / name, is_mask=True)
        np.testing.assert_array_equal(np.asarray(found) > 0, mask)


def test_a_mask_is_what_a_viewer_shows(tmp_path):
    """White may be index 0 of a palette, and an alpha channel is no defect."""
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9, 3:7] = 255
    inverted = Image.fromarray((mask == 0).astype(np.uint8), "P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    for name, image in {"a.png": inverted, "b.png": Image.fromarray(mask).convert("LA")}.items():
        image.save(tmp_path / name)
        found = common.read_image(tmp_path / name, is_mask=True)
        np.testing.assert_array_equal(np.asarray(found), mask)


def test_12_bits_in_a_16_bit_file_are_not_black(tmp_path, capsys):
    for i, highest in enumerate((1500, 4012)):
        values = np.linspace(0, highest, 2400).reshape(40, 60).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    paths = common.image_files(tmp_path)
    bits, shape = common.survey(paths)
    assert (bits, shape) == (12, (60, 40))
    assert "brightest pixel is 4012: read as 12 bits" in capsys.readouterr().err
    dark, bright = (np.asarray(common.read_image(path, bits)).max() for path in paths)
    assert (dark, bright) == (1500 >> 4, 4012 >> 4)  # one scale for the whole set


def test_the_shape_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert common.survey([tmp_path / "a.jpg"])[1] == (60, 80)
    assert common.read_image(tmp_path / "a.jpg").size == (60, 80)


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    for name in ("a.png", "b.jpg", "c.txt", "d.mpg", "e.heic", "f.h5", ".hidden.png"):
        (tmp_path / name).touch()
    for name in ("sub", "results", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    names = [path.name for path in common.image_files(tmp_path)]
    assert names[:2] == ["a.png", "b.jpg"]
    err = capsys.readouterr().err
    for text in ("1 .txt file", "1 .mpg file", "2 subfolder", "1 linked folder"):
        assert text in err
    found = common.image_files(tmp_path, recursive=True, leave_out=tmp_path / "results")
    assert tmp_path / "sub" / "x.png" in found
    assert not [path for path in found if path.parent.name in ("results", ".git", "link")]


def test_frames_beyond_the_first_are_named(tmp_path, capsys, gradient):
    frame = Image.fromarray(gradient)
    frame.save(tmp_path / "a.gif", save_all=True, append_images=[frame.rotate(90)])
    common.survey([tmp_path / "a.gif"])
    assert "1 files hold several frames or pages" in capsys.readouterr().err


def test_the_whole_image_is_resized_not_cropped():
    image = Image.fromarray(
        np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8)
    )
    assert common.prepare(Path(), image, 256, (256, 352)).shape == (3, 256, 352)
    with pytest.raises(common.UserError, match="not shaped like 352 x 256"):
        common.prepare(Path(), image.rotate(90, expand=True), 256, (256, 352))


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (256, 256)])
def test_image_and_mask_go_through_the_same_geometry(size):
    run = 256, (224, 224)
    square = np.zeros(size[::-1], np.uint8)
    square[100:160, 90:170] = 255
    mask = common.prepare(Path(), Image.fromarray(square), *run)[0]
    image = common.prepare(Path(), Image.fromarray(square).convert("RGB"), *run)
    assert image.shape == (3, 224, 224)
    assert set(mask.unique().tolist()) == {0, 255}
    assert ((mask > 0) ^ (image[0] > 127)).sum() < 0.02 * (mask > 0).sum()
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = np.asarray(steps(Image.fromarray(square).convert("RGB")))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_practice_pill_layout_and_masks(original_pill):
    assert len(list((original_pill / "train/good").glob("*.jpg"))) == 8
    for defect in DEFECTS:
        image = Image.open(original_pill / "test" / defect / "000.jpg")
        mask = np.asarray(Image.open(original_pill / "ground_truth" / defect / "000_mask.png"))
        assert image.size == mask.shape[::-1] == (320, 320)
        assert 0.0005 < (mask > 0).mean() < 0.4


def test_practice_pill_follows_its_seed(tmp_path, original_pill):
    def fingerprint(folder):
        files = sorted(folder.rglob("*.*g"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    for name, seed in [("again", 1), ("other", 2)]:
        draw_practice_pill(tmp_path / name, seed, train=8, good=3, per_defect=1)
    assert fingerprint(tmp_path / "again") == fingerprint(original_pill)
    assert fingerprint(tmp_path / "other") != fingerprint(original_pill)
    assert not list(tmp_path.glob(".*"))


def test_practice_pill_is_neither_trivial_nor_impossible(tmp_path):
    """The distance to the mean normal image sees something, but far from all."""
    draw_practice_pill(tmp_path / "pill", train=30, good=15, per_defect=4)
    folders = (
        sorted((tmp_path / "pill" / "train").iterdir()),
        sorted((tmp_path / "pill" / "test").iterdir()),
    )
    files = ([p for folder in part for p in common.image_files(folder)] for part in folders)
    train, test = (common.load_split(paths, 256, (224, 224)) for paths in files)
    mean = train.pixels.float().mean(0)
    errors = (test.pixels.float() - mean).square().mean(1)
    scores = errors.mean((1, 2)).numpy()
    assert 0.4 < common.image_auroc(scores, test.labels) < 0.9
    assert 0.5 < common.pixel_auroc(errors, test.masks) < 0.95
    assert torch.equal(test.masks.any(2).any(1), torch.from_numpy(test.labels))

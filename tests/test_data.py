"""Images of every kind, geometry of images and masks, and the practice pill."""

import math

import common

import numpy as np
import pytest
import torch
from conftest import split
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


def test_bits_say_what_is_in_use_whatever_the_format(tmp_path):
    """12 of 16 bits in a 16-bit PNG, a 32-bit TIFF and a PGM of maxval 65535 look alike."""
    values = np.linspace(0, 4012, 2400).reshape(40, 60)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "b.tif")
    (tmp_path / "c.pgm").write_bytes(b"P5 60 40 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "b.tif", "c.pgm"):
        for bits, shift in [(12, 4), (16, 8)]:
            found = np.asarray(common.read_image(tmp_path / name, bits))
            np.testing.assert_array_equal(found[..., 0], values.astype(int) >> shift)
    bright = np.asarray(common.read_image(tmp_path / "a.png", 10))
    assert bright.max() == 255  # clipped, not wrapped around


def test_odd_metadata_does_not_veto_pixels(tmp_path, gradient):
    """Orientation 6 beside a rational of -1/0, which Pillow can't write back; orientation 9."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    entries = [(0x0112, 3, 1, 6), (0x011A, 10, 1, 38)]  # the second one points at -1/0
    tiff = b"II*\0" + (8).to_bytes(4, "little") + (2).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        tiff += b"".join(n.to_bytes(size, "little") for n, size in
                         [(tag, 2), (kind, 2), (count, 4), (value, 4)])  # fmt: skip
    tiff += bytes(4) + b"\xff\xff\xff\xff\0\0\0\0"
    image = Image.fromarray(gradient)
    assert content[:6] == b"Exif\0\0"
    found = saved(tmp_path / "a.png", image, exif=b"Exif\0\0" + tiff)
    np.testing.assert_array_equal(found, np.rot90(gradient, -1))
    exif[0x0112] = 9
    np.testing.assert_array_equal(saved(tmp_path / "b.png", image, exif=exif), gradient)


@pytest.mark.parametrize("suffix", ["tga", "bmp"])
def test_an_alpha_that_hides_all_is_none(tmp_path, gradient, suffix):
    clear = Image.fromarray(np.dstack([gradient, np.zeros((40, 60), np.uint8)]))
    np.testing.assert_array_equal(saved(tmp_path / f"a.{suffix}", clear), gradient)


def test_masks_of_any_mode_are_what_a_viewer_shows(tmp_path):
    """White may be index 0 of a palette, and an alpha channel is no defect."""
    mask = np.zeros((20, 20), bool)
    mask[5:9, 3:7] = True
    inverted = Image.fromarray((~mask).astype(np.uint8), "P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    white = Image.fromarray(np.uint8(255 * mask))
    images = [white, Image.fromarray(np.uint8(mask)), Image.fromarray(mask), inverted]
    images += [white.convert("RGBA"), white.convert("LA"), Image.fromarray(np.uint16(300 * mask))]
    for image in images:
        image.save(tmp_path / "a.png")
        found = common.read_image(tmp_path / "a.png", is_mask=True)
        np.testing.assert_array_equal(np.asarray(found) > 0, mask)


def with_mask(folder, mask, name="000_mask.png", **settings):
    """The `Split` of a defective image, flat, with this mask."""
    for path in ("test/crack", "ground_truth/crack"):
        (folder / path).mkdir(parents=True)
    image = folder / "test/crack/000.png"
    Image.new("RGB", mask.shape[::-1]).save(image)
    Image.fromarray(np.uint8(mask)).save(folder / "ground_truth/crack" / name, **settings)
    return common.load_split([image], 256, 224)


def test_soft_edges_count_from_half_on(tmp_path):
    y, x = np.mgrid[:256, :256]
    disc = np.hypot(y - 120, x - 130) < 15
    hard = with_mask(tmp_path / "a", 255 * disc).regions
    soft = with_mask(tmp_path / "b", 255 * disc, "000_mask.jpg", quality=60).regions
    assert soft.unique().tolist() == hard.unique().tolist() == [0, 1]
    assert ((soft > 0) != (hard > 0)).sum() < 0.05 * (hard > 0).sum()


def test_a_hairline_stays_one_region_and_two_blobs_two(tmp_path, capsys):
    y, x = np.mgrid[:1024, :1024]
    line = np.abs(y - 300 - 0.37 * x) < 1.2
    split = with_mask(tmp_path / "a", 255 * line)
    assert split.regions.unique().tolist() == [0, 1]
    assert np.asarray(common.ndimage.label(split.masks[0], np.ones((3, 3)))[1]) > 3
    blobs = (np.hypot(y - 500, x - 500) < 9) | (np.hypot(y - 500, x - 520) < 9)
    assert with_mask(tmp_path / "b", 255 * blobs).regions.unique().tolist() == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_masks_without_a_visible_defect_are_named(tmp_path, capsys):
    """Blank, beside the crop, too small for a pixel; none of the three spoils the pixel figures."""
    lost = "1 of 1 defect regions are outside the center crop or too small"
    for start, side, message in [(0, 0, "mask.png: is blank"), (20, 5, lost), (513, 1, lost)]:
        mask = np.zeros((1024, 1024))
        mask[start : start + side, start : start + side] = 255
        split = with_mask(tmp_path / f"{start}", mask)
        assert message in capsys.readouterr().err
        assert split.labels.tolist() == [True]
        assert split.has_mask.tolist() == [False]


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    for name in ("a.png", "b.jpg", "c.txt", "d.mpg", "e.heic", "f.h5", ".hidden.png"):
        (tmp_path / name).touch()
    for name in ("sub", "results", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)  # a circle
    names = [path.name for path in common.image_files(tmp_path)]
    assert names[:2] == ["a.png", "b.jpg"]
    err = capsys.readouterr().err
    for text in ("1 .txt file", "1 .mpg file", "2 image in a subfolder"):
        assert text in err
    found = common.image_files(tmp_path, math.inf, leave_out=tmp_path / "results")
    assert [path.parent.name for path in found if path.name == "x.png"] == ["sub"]
    (tmp_path / "linked").symlink_to(tmp_path / "results")
    found = common.image_files(tmp_path, 1)
    assert [path.parent.name for path in found] == ["linked", "sub"]
    assert "2 image in no subfolder" in capsys.readouterr().err


def test_frames_beyond_the_first_are_named(tmp_path, capsys, gradient):
    frame = Image.fromarray(gradient)
    frame.save(tmp_path / "a.tif", save_all=True, append_images=[frame.rotate(90)])
    common.read_image(tmp_path / "a.tif")
    assert "a.tif: holds 2 frames or pages" in capsys.readouterr().err


def test_the_whole_image_is_squeezed_not_cropped():
    image = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1)))
    found = common.prepare(image.convert("RGB"), 256, 0)
    assert found.shape == (3, 256, 256)
    assert found[0, :, 0].max() < 3
    assert found[0, :, -1].min() > 252
    with pytest.raises(common.UserError, match=r"a\.png: is 400 x 300, the network sees 320 x 320"):
        common.prepare(image, 320, 0, "a.png")


def photos(count, noise, generator, base=None):
    """(count, 3, 64, 64) uint8: parts of different shapes, or one part under sensor noise."""
    if base is None:
        rough = torch.rand(count, 3, 8, 8, generator=generator)
        base = 60 + 120 * common.resize(rough, (64, 64))
    return (base + noise * torch.randn(count, 3, 64, 64, generator=generator)).clamp(0, 255).byte()


def test_near_copies_count_once_and_are_named(generator, capsys):
    parts = photos(10, 0, generator)
    burst = photos(30, 3, generator, parts.repeat_interleave(3, 0).float())
    train, test = split(burst), split(torch.cat([burst[4:5], photos(3, 0, generator)]))
    kept = common.without_copies(train, test)
    assert [path.stem for path in kept.paths] == [f"{i:03d}" for i in range(0, 30, 3)]
    assert torch.equal(kept.pixels, burst[::3])
    err = capsys.readouterr().err
    assert "20 training photos are near-copies of others and count once: 001.png, 002.png," in err
    assert "1 test photos are near-copies of training photos: figures are too good: 000.png" in err


def test_photos_that_differ_stay_and_nothing_is_said(generator, capsys):
    for pixels in (photos(20, 3, generator), photos(20, 3, generator, torch.full((1,), 90.0))):
        train = split(pixels)  # of several parts, and of one part under noise
        assert torch.equal(common.without_copies(train, split(pixels[:0])).pixels, pixels)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spoiled", ["alike", "plain", "dark"])
def test_photos_that_teach_nothing_are_named(generator, capsys, spoiled):
    pixels = photos(6, 3, generator)
    if spoiled == "alike":
        pixels = pixels[:1].repeat(6, 1, 1, 1)
    elif spoiled == "plain":
        pixels = pixels[:, :, :1, :1].repeat(1, 1, 64, 64)
    else:
        pixels = pixels // 5
    assert len(common.without_copies(split(pixels), split(pixels[:0])).paths) == 6
    message = "dark, at most" if spoiled == "dark" else "all alike or of one color"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (256, 256)])
def test_image_and_mask_go_through_the_same_geometry(size):
    run = 256, 224
    square = np.zeros(size[::-1], np.uint8)
    square[100:160, 90:170] = 255
    mask = common.prepare(Image.fromarray(square), *run)[0]
    image = common.prepare(Image.fromarray(square).convert("RGB"), *run)
    assert image.shape == (3, 224, 224)
    assert set(mask.unique().tolist()) == {0, 255}
    assert ((mask > 0) ^ (image[0] > 127)).sum() < 0.02 * (mask > 0).sum()
    steps = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = np.asarray(steps(Image.fromarray(square).convert("RGB")))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)

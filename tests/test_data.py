"""Images of every kind, geometry of images and masks, and the practice pill."""

import base64
import io
import os
import shutil
import struct
import zlib

import common

import numpy as np
import pytest
import torch
from conftest import load_split
from conftest import split as split_of
from PIL import Image, TiffImagePlugin
from scipy import ndimage
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
    for name in ("a.tga", "a.bmp"):  # an alpha that hides all is none
        clear = Image.fromarray(np.dstack([gradient, 0 * alpha]))
        np.testing.assert_array_equal(saved(tmp_path / name, clear), gradient)


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
    with pytest.raises(common.UserError, match=r"a\.tif: cannot be read as an image: .*expected 8"):
        common.read_image(tmp_path / "a.tif")
    for wrong in (array, np.zeros(9, np.uint8)):
        with pytest.raises(common.UserError, match=r"-D .*, expected \(H, W, 3\) of uint8"):
            common.read_image(wrong)


def png16(colors):
    """A PNG of 16-bit gray, gray with alpha, RGB or RGBA, which Pillow does not write."""
    height, width, channels = colors.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    header = struct.pack(">IIBBxxx", width, height, 16, [0, 4, 2, 6][channels - 1])
    file = b"\x89PNG\r\n\x1a\n"
    for data in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        file += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return file


def tiff16(colors, planes=1, photometric=2, order="<", compression=1):
    """The same of a TIFF."""
    height, width, channels = colors.shape
    pixels = zlib.compress(colors.tobytes()) if compression == 8 else colors.tobytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix={"<": b"II", ">": b"MM"}[order])
    tags[256], tags[257], tags[278] = width, height, height
    tags[258], tags[262] = (8 * colors.itemsize,) * channels, photometric
    tags[277], tags[284] = channels, planes
    tags[259], tags[339] = compression, (1 + (colors.dtype.kind == "i"),) * channels
    tags[273], tags[279] = 0, len(pixels)  # the pixels begin where the tags end
    tags.save(file := io.BytesIO())
    return file.getvalue() + pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [12, 16])
def test_all_bits_of_png_and_tiff_are_read(channels, bits):
    """12 of 16 bits; gray and, but for files of 12 bits, colors; either order of bytes."""
    colors = np.random.default_rng(0).integers(0, 4096, (40, 60, channels)).astype(np.uint16)
    colors[..., 3:] = 65535
    files = [png16(colors), tiff16(colors, photometric=1 + (channels > 1)), colors]
    files.append(colors.astype(">u2"))
    if channels == 1:  # big-endian
        Image.fromarray(files[-1][..., 0]).save(file := io.BytesIO(), "TIFF")
        files.append(file.getvalue())
    for number, source in enumerate(files):
        if channels > 1 and bits < 16 and isinstance(source, bytes):
            with pytest.raises(common.UserError, match="colors in 12 of 16 bits, expected scaled"):
                common.read_image(source, bits)
            continue
        found = np.asarray(common.read_image(source, bits))
        assert (found == (colors >> (bits - 8))[..., :3]).all(), number


def test_what_pillow_has_scaled_or_cut_is_not_scaled_again():
    values = np.linspace(0, 4095, 2400).reshape(40, 60).astype(np.uint16)
    for top in (4095, 65535):
        photo = b"P5 60 40 %d\n" % top + (values.astype(int) * top // 4095).astype(">u2").tobytes()
        found = np.asarray(common.read_image(photo, 12))[..., 0]
        assert np.abs(found - values / 4095 * 255).max() <= 1, top
        opened = common.read_image(Image.open(io.BytesIO(photo)), 12)
        np.testing.assert_array_equal(np.asarray(opened)[..., 0], found)
    Image.fromarray(16 * values).save(file := io.BytesIO(), "JPEG2000")
    found = np.asarray(common.read_image(file.getvalue(), 12))[..., 0]
    np.testing.assert_array_equal(found, values >> 4)
    colors = np.dstack([values] * 3)
    negative = tiff16(values[..., None], photometric=0)
    for photo in (negative, tiff16(colors, planes=2)):
        with pytest.raises(common.UserError, match=r"photo in memory \(bytes\): cannot be read"):
            common.read_image(photo)
    for bits in (7, 17):
        with pytest.raises(ValueError, match=f"bits is {bits}, expected 8 to 16"):
            common.read_image(values, bits)


# 8 x 8 pixels of 16 bits a color, the right half white, by OpenJPEG, as imagecodecs calls it.
JPEG2000 = base64.b85decode(
    "|4;u>051Rl000080000800000000000000800008000000000000R#J0S^HI4*>!HQUDA90003200aa80smY81VDiQWB?@"
    "q0Yh?SVRU6=AYyqSPjF>!N>D{dAa-SPb7^mGATlmBE;Rp;015yA0001F00IA#&-^h!5l}}7oQd#I0001E&3W;)Y5Nh)hvv"
    "icVfnE9*nVt3HXoZ0&4=d0^I`e0{MdeMKQ<u=dl85L1^Ar0qiWOkBbyJ+hvvicVfnE9*nVt3fPnwm"
)


def test_deep_files_that_pillow_reads_wrongly_are_refused(tmp_path):
    """White of deep JPEG 2000 colors is black to it, and it reverses big-endian bytes."""
    assert Image.open(io.BytesIO(JPEG2000)).convert("L").getextrema() == (0, 4)
    with pytest.raises(common.UserError, match="expected JPEG 2000 colors of 8 bits: replace it"):
        common.read_image(JPEG2000)
    Image.new("RGB", (9, 9), "white").save(file := io.BytesIO(), "JPEG2000")
    assert common.read_image(file.getvalue()).getextrema() == ((255, 255),) * 3
    for kind in ("uint16", "int16", "int32"):
        for order, compression in [(">", 8), (">", 1), ("<", 8)]:
            values = np.full((8, 8, 1), 200).astype(np.dtype(kind).newbyteorder(order))
            (tmp_path / "mask.tif").write_bytes(tiff16(values, 1, 1, order, compression))
            if kind != "uint16" and (order, compression) == (">", 8):
                with pytest.raises(common.UserError, match="expected unsigned 16 bits, or big-end"):
                    common.read_mask(tmp_path / "mask.tif")
            else:
                assert common.read_mask(tmp_path / "mask.tif").all()


def test_odd_metadata_does_not_veto_pixels(tmp_path, gradient):
    """Orientation 6 beside a rational of -1/0, which Pillow can't write back; orientation 9."""
    content = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)  # two tags from byte 8 on
    content += struct.pack("<HHII", 0x0112, 3, 1, 6)
    content += struct.pack("<HHII", 0x011A, 10, 1, 38)  # which points at -1/0
    content += bytes(4) + struct.pack("<ii", -1, 0)
    image = Image.fromarray(gradient)
    found = saved(tmp_path / "a.png", image, exif=content)
    np.testing.assert_array_equal(found, np.rot90(gradient, -1))
    exif = Image.Exif()
    exif[0x0112] = 9
    np.testing.assert_array_equal(saved(tmp_path / "b.png", image, exif=exif), gradient)


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
        found = common.read_mask(tmp_path / "a.png")
        np.testing.assert_array_equal(found > 0, mask)


def with_mask(folder, mask, name="000_mask.png", **settings):
    """The `Split` of a defective image, flat, with this mask."""
    for path in ("test/crack", "ground_truth/crack"):
        (folder / path).mkdir(parents=True)
    image = folder / "test/crack/000.png"
    Image.new("RGB", mask.shape[::-1], "gray").save(image)
    Image.fromarray(np.uint8(mask)).save(folder / "ground_truth/crack" / name, **settings)
    split, errors = load_split([image])
    assert not errors
    return split


def test_soft_edges_count_from_half_on(tmp_path):
    y, x = np.mgrid[:256, :256]
    disc = np.hypot(y - 120, x - 130) < 15
    hard = with_mask(tmp_path / "a", 255 * disc).regions
    soft = with_mask(tmp_path / "b", 255 * disc, "000_mask.jpg", quality=60).regions
    assert soft.unique().tolist() == hard.unique().tolist() == [0, 1]
    assert ((soft > 0) != (hard > 0)).sum() < 0.05 * (hard > 0).sum()
    faint = with_mask(tmp_path / "c", discs(255, 20, 255), "000_mask.jpg")  # less than an eighth
    assert faint.regions.unique().tolist() == [0, 1, 2]


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
    for start, side in [(0, 0), (20, 5), (513, 1)]:
        mask = np.zeros((1024, 1024))
        mask[start : start + side, start : start + side] = 255
        split = with_mask(tmp_path / f"{start}", mask)
        message = "1 masks are blank, or have regions outside the crop or below a pixel"
        assert message in capsys.readouterr().err
        assert split.labels.tolist() == [True]
        assert split.has_mask.tolist() == [False]
    Image.new("L", (9, 9)).save(tmp_path / "blank.jpg")
    assert not common.read_mask(tmp_path / "blank.jpg").any()


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    for name in ("a.png", "b.JFIF", "c.txt", "d.mpg", "e.heic", "f.h5", ".hidden.png", "g.jpe"):
        (tmp_path / name).touch()
    for name in ("sub", "other", ".git", "@eaDir", "$RECYCLE.BIN", "#recycle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    found = common.image_files(tmp_path, 0, pytest.fail)
    names = [path.name for path in found if path.name != "e.heic"]
    assert names == ["a.png", "b.JFIF", "g.jpe"]
    err = capsys.readouterr().err
    assert err.startswith("6 files in") or err.startswith("5 files in")  # HEIC may be readable
    assert "c.txt" in err
    found = common.image_files(tmp_path, None, pytest.fail)
    assert [path.parent.name for path in found if path.name == "x.png"] == ["other", "sub"]
    (tmp_path / "linked").symlink_to(tmp_path / "other")
    capsys.readouterr()
    found = common.image_files(tmp_path, 1, pytest.fail)
    assert [path.parent.name for path in found] == ["other", "sub"]  # by its own name, once
    assert "files in" in capsys.readouterr().err  # those in no subfolder


def test_folders_of_any_name_and_depth_are_walked(tmp_path, monkeypatch, capsys):
    deep = "/".join("abcdefghijkl")
    for name in ("#4711", "@line2", "$5", deep, f"results/{deep}"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").touch()
    for name in (f"results/{common.RESULTS_TAG}", "methods.png"):
        (tmp_path / name).touch()
    (tmp_path / "#4711" / "back").symlink_to(tmp_path)
    found = common.image_files(tmp_path / "#4711" / "..", None, pytest.fail)
    assert {str(path.resolve().parent.relative_to(tmp_path)) for path in found} == {
        "#4711", "@line2", "$5", deep
    }  # fmt: skip
    names = "abcdefg"
    for name in names:  # each is linked to all others
        (tmp_path / "linked" / name).mkdir(parents=True)
        (tmp_path / "linked" / name / "x.png").touch()
        for other in names:
            (tmp_path / "linked" / name / f"to {other}").symlink_to(f"../{other}")
    found = common.image_files(tmp_path / "linked", 1, pytest.fail)
    assert found == [tmp_path / "linked" / name / "x.png" for name in names]
    shutil.rmtree(tmp_path / "linked")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):  # a path too long to be listed
        os.mkdir(250 * "x")
        os.chdir(250 * "x")
    capsys.readouterr()
    assert len(common.image_files(tmp_path, None, pytest.fail)) == 4
    assert capsys.readouterr().err.startswith("1 files in")


def test_frames_beyond_the_first_are_named(tmp_path, capsys, gradient):
    frame = Image.fromarray(gradient)
    frame.save(tmp_path / "a.tif", save_all=True, append_images=[frame.rotate(90)])
    common.read_image(tmp_path / "a.tif")
    assert "a.tif: holds 2 frames or pages" in capsys.readouterr().err
    common.read_image((tmp_path / "a.tif").read_bytes())
    assert len(capsys.readouterr().err) < 100


def test_small_photos_are_enlarged_and_thin_ones_refused(tmp_path, capsys, gradient):
    (tmp_path / "good").mkdir()
    paths = [tmp_path / "good" / name for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(gradient).save(path)  # 60 x 40
    split, errors = load_split(paths)
    assert torch.equal(split.images[1], common.prepare(Image.fromarray(gradient)))
    assert not errors
    err = capsys.readouterr().err
    assert err.startswith(f"2 photos are enlarged to 224 x 224: {paths[0]}, ")
    assert err.count("\n") == 1
    with pytest.raises(common.UserError, match=r"c: is \(300, 2\), expected sides of at"):
        common.prepare(Image.new("RGB", (300, 2)), name="c")
    with pytest.raises(common.UserError, match=r"image: is \(0, 0\)"):
        common.prepare(Image.new("RGB", (0, 0)))
    with pytest.raises(ValueError, match="crop is 224, expected at most resize, which is 128"):
        common.prepare(Image.new("RGB", (300, 200)), 128)


def photos(count, noise, generator, base=None):
    """(count, 3, 64, 64) uint8: parts of different shapes, or one part under sensor noise."""
    if base is None:
        rough = torch.rand(count, 3, 8, 8, generator=generator)
        base = 60 + 120 * common.resize(rough, (64, 64))
    return (base + noise * torch.randn(count, 3, 64, 64, generator=generator)).clamp(0, 255).byte()


def test_near_copies_count_once_and_are_named(generator, capsys):
    parts = photos(10, 0, generator)
    burst = photos(30, 3, generator, parts.repeat_interleave(3, 0).float())
    train = split_of(burst)
    test = split_of(torch.cat([burst[4:5], photos(3, 0, generator)]))
    rest = common.without_copies(train, test)
    assert [path.stem for path in rest.paths] == [f"{i:03d}" for i in range(0, 30, 3)]
    assert torch.equal(rest.images, burst[::3])
    err = capsys.readouterr().err
    assert "20 training photos are near-copies of others and count once: 001.png, 002.png," in err
    assert "1 test photos are near-copies of training photos: metrics are too good: 000.png" in err
    for copies, count in [(parts[:1].repeat(20, 1, 1, 1), 1), (parts[:4].repeat(5, 1, 1, 1), 4)]:
        assert len(common.without_copies(split_of(copies), test).paths) == count


def parts_of(base, count, generator):
    """Different parts of one product: its look, and on each a detail of its own."""
    detail = common.resize(torch.rand(count, 3, 8, 8, generator=generator) - 0.5, (64, 64))
    return base + 60 * detail


@pytest.mark.parametrize("sizes", [(30, 0), (25, 25), (40, 10)])
def test_different_parts_of_two_products_are_no_copies(generator, capsys, sizes):
    """Two products lie far apart, so that by the distance of all pairs their parts look alike."""
    looks = torch.tensor([40.0, 200.0]).view(2, 1, 1, 1)
    parts = [parts_of(look, n, generator) for look, n in zip(looks, sizes, strict=True)]
    parts = torch.cat(parts)
    train = photos(len(parts), 0.5, generator, parts)
    assert len(common.without_copies(split_of(train), split_of(train[:0])).paths) == len(parts)
    assert capsys.readouterr().err == ""
    # And each photo three times: exactly the different parts stay.
    triple = photos(3 * len(parts), 0.5, generator, parts.repeat_interleave(3, 0))
    rest = common.without_copies(split_of(triple), split_of(triple[:0]))
    assert [path.stem for path in rest.paths] == [f"{i:03d}" for i in range(0, len(triple), 3)]


def test_photos_that_differ_stay_and_nothing_is_said(generator, capsys):
    """Of several parts, of one part under noise, and of a slow drift, which is no chain."""
    start, end = photos(2, 0, generator).float()
    share = torch.linspace(0, 1, 50).view(50, 1, 1, 1)
    drift = start + share * (end - start)
    for base, noise in [(None, 3), (torch.full((1,), 90.0), 3), (drift, 0)]:
        images = photos(50, noise, generator, base)
        rest = common.without_copies(split_of(images), split_of(images[:0]))
        assert torch.equal(rest.images, images)
    assert capsys.readouterr().err == ""


def test_photos_that_teach_nothing_are_named(tmp_path, capsys):
    path = tmp_path / "a.png"
    for color, message in {63: "1 photos are dark", 128: "", 255: "1 photos are dark"}.items():
        photo = np.full((300, 300), color, np.uint8)
        photo[:, :60] = min(color, 200)
        Image.fromarray(photo).save(path)
        [(_, size, image, regions)] = common.load_photos([path], 256, 224, 16, pytest.fail)
        assert (size, image.shape, regions) == ((300, 300), (3, 224, 224), 0)
        assert capsys.readouterr().err.startswith(message)


def discs(*strengths):
    """(300, 300): a disc for each strength."""
    y, x = np.mgrid[:300, :300]
    mask = np.zeros((300, 300))
    for number, strength in enumerate(strengths):
        mask[np.hypot(y - 150, x - 75 - 50 * number) < 12] = strength
    return mask


@pytest.mark.parametrize("quality", [75, 85, 95, None])
def test_lossy_or_resized_masks_that_were_saved_again_keep_their_regions(tmp_path, quality):
    mask = Image.fromarray(discs(255, 0, 255).astype(np.uint8))
    expected = np.asarray(mask) > 0
    if quality:
        mask.save(tmp_path / "a.jpg", quality=quality)
        again = Image.open(tmp_path / "a.jpg")
    else:
        again = mask.resize((600, 600), Image.Resampling.BILINEAR)
        expected = expected.repeat(2, 0).repeat(2, 1)
    again.save(tmp_path / "a.png")
    found = common.read_mask(tmp_path / "a.png")
    assert ndimage.label(found, np.ones((3, 3)))[1] == 2
    assert (found != expected).mean() < 0.0005


@pytest.mark.parametrize("numbers", [(1, 3), (1, 9), (8, 1), (255, 254), (1, 8, 255), range(1, 21)])
def test_masks_that_number_classes_lose_no_pixel(tmp_path, numbers):
    """All but 0 mark, so that those that touch are one region; a speck may be the highest."""
    mask = np.zeros((300, 300), np.uint8)
    for i, number in enumerate(numbers):
        x = 30 + 12 * i
        mask[30:50, x : x + 12] = number
        mask[100:140, x : x + 6] = number
    found = with_mask(tmp_path, mask).regions.unique()
    assert found.tolist() == list(range(2 + len(numbers)))
    mask[200, :100] = np.arange(1, 101) if max(numbers) < 128 else 255
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(mask).save(tmp_path / name)
        np.testing.assert_array_equal(common.read_mask(tmp_path / name), mask > 0)


@pytest.mark.parametrize(
    "names",
    [["\u00fc/000.png", "\u00fc/1.png"], ["\u00fc_mask_1.png", "\u00fc_mask-2.tif"],
     ["\u00fc.png"], ["\u00fc_mask.png", "\u00fc.png"]],
)  # fmt: skip
def test_several_masks_of_a_photo_add_up(tmp_path, names):
    """MVTec LOCO's, Label Studio's if renamed, VisA's; a mask beside something of the same name.
    The photo's name has an accent as macOS writes it, the masks' as others do."""
    both = np.stack([discs(255), discs(0, 0, 255)])
    parts = [both.max(0), 255 - both[0]] if "\u00fc.png" in names else both
    with_mask(tmp_path, both[0])
    (tmp_path / "ground_truth/crack/000_mask.png").unlink()
    for name, part in zip(names, parts, strict=False):
        path = tmp_path / "ground_truth/crack" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.uint8(part)).save(path)
    photo = tmp_path / "test/crack/000.png"
    split, errors = load_split([photo.rename(photo.with_name("u\u0308.png"))])
    assert not errors
    assert split.regions.unique().tolist() == [0, 1, 2]


def test_masks_in_colors_or_in_their_alpha_alone(tmp_path, capsys):
    gray = discs(1, 2, 3)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    colored = palette[gray.astype(int)]  # by brightness, blue is an eighth of white
    alpha = np.uint8(255 * (gray > 0))
    for color in (0, 255):
        plain = np.full((300, 300, 3), color, np.uint8)
        for number, mask in enumerate((colored, np.dstack([plain, alpha]))):
            Image.fromarray(mask).save(tmp_path / "m.png")
            assert ((common.read_mask(tmp_path / "m.png") > 0) == (gray > 0)).all(), number
    inverted = with_mask(tmp_path / "a", 255 - discs(255))
    assert inverted.masks.float().mean() > 0.9  # nothing is guessed
    assert "1 masks mark the border and most of the photo" in capsys.readouterr().err


def test_a_photo_turned_by_exif_without_its_mask_is_named(tmp_path, capsys):
    with_mask(tmp_path, discs(255))
    assert capsys.readouterr().err == ""
    photo = tmp_path / "test/crack/000.png"
    mask = tmp_path / "ground_truth/crack/000_mask.png"
    for size, orientation, is_named in [((300, 300), 6, True), ((300, 240), 3, True),
                                        ((300, 240), 6, False)]:  # fmt: skip
        exif = Image.Exif()
        exif[common.ORIENTATION] = orientation
        Image.open(photo).resize(size).save(photo, exif=exif)
        upright = common.read_image(photo).size
        Image.open(mask).resize(upright).save(mask)
        assert load_split([photo])[1] == []
        err = capsys.readouterr().err
        assert err.startswith("1 photos are turned by an EXIF tag that their masks") == is_named
        assert ("000.png" in err) == is_named


def test_a_name_that_ends_in_mask_keeps_its_own_masks(tmp_path):
    with_mask(tmp_path, discs(255))
    photos = []
    for number, name in enumerate(["face_mask", "face_mask_2"]):
        photos.append(tmp_path / f"test/crack/{name}.png")
        shutil.copy(tmp_path / "test/crack/000.png", photos[-1])
        mask = Image.fromarray(np.uint8(discs(255 * number, 255 - 255 * number)))
        mask.save(tmp_path / f"ground_truth/crack/{name}.png")
    split, _ = load_split(photos)
    assert split.has_mask.all()
    assert not (split.masks[0] & split.masks[1]).any()


def test_many_masks_get_running_numbers(tmp_path):
    with_mask(tmp_path, discs(1, 2))
    photos = []
    for name in "abc":
        photos.append(tmp_path / f"test/crack/{name}.png")
        Image.open(tmp_path / "test/crack/000.png").save(photos[-1])
        mask = Image.open(tmp_path / "ground_truth/crack/000_mask.png")
        mask.save(tmp_path / f"ground_truth/crack/{name}_mask.png")
    split, _ = load_split(photos)
    assert [regions.unique().tolist() for regions in split.regions] == [
        [0, 1, 2], [0, 3, 4], [0, 5, 6]
    ]  # fmt: skip


def test_photos_in_memory_are_read_as_their_files_are(tmp_path, gradient):
    """Arrays, PIL images and bytes."""
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[5:10] = 0
    deep = gradient[:, :, 0].astype(np.uint16) * 16  # 12 of 16 bits
    for array in (gradient, gradient[:, :, 0], np.dstack([gradient, alpha]), deep):
        Image.fromarray(array).save(tmp_path / "a.png")
        expected = common.read_image(tmp_path / "a.png", 12).tobytes()
        content = (tmp_path / "a.png").read_bytes()
        for source in (array, Image.open(tmp_path / "a.png"), Image.fromarray(array), content):
            assert common.read_image(source, 12).tobytes() == expected
    assert common.read_image(deep[..., None], 12).tobytes() == expected
    turned = Image.fromarray(gradient)
    turned.getexif()[common.ORIENTATION] = 6
    np.testing.assert_array_equal(common.read_image(turned), np.rot90(gradient, -1))
    for wrong in (gradient / 255, gradient.astype(int), gradient[None], bytes(244_000), None):
        with pytest.raises(common.UserError, match=r"memory \(\w+\): cannot be read") as error:
            common.read_image(wrong)
        assert len(str(error.value)) < 400


def test_all_that_is_broken_is_named_at_once(tmp_path, gradient):
    good = tmp_path / "train/good"
    good.mkdir(parents=True)
    (tmp_path / "test/crack").mkdir(parents=True)
    for i in range(6):
        Image.fromarray(gradient).save(good / f"{i}.png")
    for name in ("train/good/2.png", "train/good/4.png", "test/crack/0.png", "test/crack/1.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(common.UserError) as error:
        common.load_data(tmp_path)
    assert str(error.value).startswith("4 files cannot be used: ")
    assert str(error.value).count("cannot be read as an image") == 3
    assert str(error.value).index("2.png") < str(error.value).index("4.png")


@pytest.mark.parametrize("crop", [224, 0])
@pytest.mark.parametrize("size", [(300, 260), (260, 300), (256, 256), (60, 40)])
def test_image_and_mask_go_through_torchvisions_geometry(size, crop):
    width, height = size
    square = np.zeros((height, width), np.uint8)
    square[height // 3 : height // 2, width // 3 : width // 2] = 255
    mask = common.prepare(Image.fromarray(square), 256, crop, is_mask=True)[0]
    image = common.prepare(Image.fromarray(square).convert("RGB"), 256, crop)
    assert set(mask.unique().tolist()) == {0, 255}
    assert ((mask > 0) ^ (image[0] > 127)).sum() < 0.02 * (mask > 0).sum()
    steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    squeezed = [transforms.Resize((256, 256))]
    expected = transforms.Compose(steps if crop else squeezed)(Image.fromarray(square))
    np.testing.assert_array_equal(image, [np.asarray(expected)] * 3)

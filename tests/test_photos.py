"""Reading photos: pixels decide, damage is named, and a refusal says what the file is."""
import io
import itertools
import logging
import math
import struct
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
from photo_files import (
    JPEG,
    NOISE,
    PIXELS,
    PNG,
    WEBP,
    X,
    chunk,
    encoded,
    exif,
    in_jpeg,
    in_png,
    oriented,
    segment,
)
from PIL import Image, ImageOps

from core.errors import InputError
from core.images import IMAGE_SUFFIXES, check_images, drop_bad_images, read_image

EXIF = b"Exif\0\0"  # the start of EXIF in a JPEG


@pytest.fixture
def read(tmp_path):
    """Write bytes as photo.jpg and read it."""
    def write_and_read(data, *args):
        (tmp_path / "photo.jpg").write_bytes(data)
        return read_image(tmp_path / "photo.jpg", *args)
    return write_and_read


@pytest.fixture
def no_foreign_line(capfd):
    """Fail if another library prints or warns while the test runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")


# --- metadata ---

def in_tiff(tag, value):
    """Return a TIFF with an entry whose value is an offset that leads nowhere."""
    data = bytearray(encoded(PIXELS, "TIFF", tiffinfo={40000: 70000}))
    entry = data.index(struct.pack("<HH", 40000, 4))
    data[entry:entry + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


NOWHERE = b"\xff\xff\xff\x7f"  # an offset behind the end of any file
METADATA = {
    "30 segments of 64 KB": (JPEG, in_jpeg(*[segment(0xE1 + i % 12, NOISE[i:i + 65533])
                                             for i in range(30)])),
    "broken index of an MPO": (JPEG, in_jpeg(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"))),
    "EXIF that leads nowhere": (JPEG, in_jpeg(segment(0xE1, EXIF + exif(
        (0x011A, 5, 1, NOWHERE), (0x8769, 4, 1, NOWHERE))))),
    "packed text of 3 MB": (PNG, in_png(chunk(b"zTXt", b"a\0\0" + zlib.compress(NOISE)))),
    "profile of 3 MB": (PNG, in_png(chunk(b"iCCP", b"p\0\0" + zlib.compress(NOISE)))),
    "checksum of a time": (PNG, in_png(chunk(b"tIME", bytes(7), damage=1))),
    "short resolution": (PNG, in_png(chunk(b"pHYs", b"\0\0"))),
    "broken animation": (PNG, in_png(chunk(b"acTL", NOISE[:3]), chunk(b"fcTL", b""))),
    "EXIF of a PNG": (PNG, in_png(chunk(b"eXIf", NOISE[:50]))),
    "EXIF of a WebP": (WEBP, encoded(PIXELS, "WEBP", lossless=True, exif=b"garbage")),
    "EXIF of a TIFF": (PNG, in_tiff(0x8769, 0x7FFFFFFF)),
    "GPS of a TIFF": (PNG, in_tiff(0x8825, 3)),
}


@pytest.mark.parametrize("name", METADATA)
def test_pixels_are_read_whatever_stands_beside_them(read, name, no_foreign_line):
    clean, odd = METADATA[name]
    assert (read(odd) == read(clean)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_as_pillow_turns_it_in_full_and_reduced_size(read, form):
    for orientation, order in itertools.product(range(1, 9), "<>"):
        block = oriented(orientation, order)
        if form == "TIFF":
            data = encoded(PIXELS, form, tiffinfo={0x0112: orientation})
        elif form == "PNG":
            data = in_png(chunk(b"eXIf", block))
        else:
            data = encoded(PIXELS, form, quality=95, exif=EXIF + block)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert np.abs(read(data).astype(int) - np.asarray(image)).max() <= 2
        reduced = read(data, (image.height // 2, image.width // 2))
        if form == "JPEG":  # the only format that is decoded at a reduced size
            image = image.reduce(2)
        assert reduced.shape == (image.height, image.width, 3)
        assert np.abs(reduced.astype(int) - np.asarray(image)).mean() < 3


BROKEN = {
    "9": oriented(9), "0": oriented(0), "text": exif((0x0112, 2, 2, b"6\0")),
    "cut": oriented(6)[:30], "garbage": b"garbage", "empty": b"",
    "count": exif((0x0112, 3, 1, b"\6"))[:8] + b"\xff\xff",
    "offset": b"II*\0\xff\xff\xff\xff" + oriented(6)[8:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_orientation_leaves_the_photo_as_it_is(read, name, no_foreign_line):
    assert (read(in_png(chunk(b"eXIf", BROKEN[name]))) == PIXELS).all()
    assert (read(in_jpeg(segment(0xE1, EXIF + BROKEN[name]))) == read(JPEG)).all()


def test_the_orientation_is_found_beside_broken_entries_and_behind_other_segments(
        read, no_foreign_line):
    turned = np.rot90(read(JPEG), -1)
    broken = EXIF + exif((0x010F, 2, 40, NOWHERE), (0x0112, 3, 1, b"\6"), (0x011A, 5, 1, NOWHERE),
                         (0x8769, 4, 1, NOWHERE))
    thumbnail = EXIF + oriented(6) + encoded(PIXELS[:20, :20], "JPEG")
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>\xa8\xb0</x:xmpmeta>"
    for segments in [
        [segment(0xE1, xmp), segment(0xE1, broken)],
        [segment(0xE1, EXIF + broken)],
        [b"\xff\xff\xff", *[segment(0xED, NOISE[:65000])] * 5, segment(0xE1, broken)],
        [segment(0xE1, thumbnail)],
    ]:
        assert (read(in_jpeg(*segments)) == turned).all()


# --- damage ---

def blocks(*shape):
    """Return noisy blocks of 16 x 16 pixels: a picture that no decoder can guess."""
    rng = np.random.default_rng(1)
    colours = np.kron(rng.integers(0, 255, shape), np.ones((16, 16, 1)[:len(shape)]))
    return np.clip(colours + rng.normal(0, 9, colours.shape), 0, 255).astype(np.uint8)


COLOUR = blocks(20, 15, 3)
PLAIN, GRAY = (encoded(pixels, "JPEG", quality=92) for pixels in (COLOUR, blocks(20, 15)))
RESTART = encoded(COLOUR, "JPEG", quality=92, restart_marker_rows=1)
PROGRESSIVE = encoded(COLOUR, "JPEG", quality=92, progressive=True)
CMYK = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=92)


def cut(data):
    return data[:len(data) // 2]


def zeros_inside(data, count):
    return cut(data) + bytes(count) + data[len(data) // 2 + count:]


END = b"\xff\xd9"
# Phones append a video, in which any two bytes occur.
VIDEOS = [b"\0\0\0\x18ftypmp42" + np.random.default_rng(i).bytes(300_000) for i in range(4)]
DAMAGED = {
    "cut": cut(PLAIN) + END, "zero-filled": cut(PLAIN) + bytes(20_000) + END,
    "hole": cut(PLAIN) + PLAIN[len(PLAIN) // 2 + 4096:], "zeros": zeros_inside(PLAIN, 4096),
    "interval": zeros_inside(RESTART, 2000), "scan": cut(PROGRESSIVE) + END,
    "end": PLAIN[:-2] + VIDEOS[0], "half gray": cut(GRAY) + END, "half cmyk": cut(CMYK) + END,
}
SOUND = {
    "plain": PLAIN, "restart": RESTART, "progressive": PROGRESSIVE, "gray": GRAY, "cmyk": CMYK,
    "video": PLAIN + VIDEOS[0], "video 2": PROGRESSIVE + VIDEOS[1], "video 3": RESTART + VIDEOS[2],
    "video 4": GRAY + VIDEOS[3],
    "zeros behind": GRAY + bytes(9000),
    "padding": in_jpeg(b"\xff\xff\xff"), "odd bytes": PLAIN[:-2] + b"\x12\x34\x56" + END,
}


def write_all(folder, files):
    """Write files; return their paths as a Series with the files' names as index."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    return pd.Series({name: str(folder / f"{name}.jpg") for name in files}, dtype=str)


def test_damage_that_the_decoder_repairs_is_named_and_skipped_and_oddities_are_not(
        tmp_path, caplog, no_foreign_line):
    paths = write_all(tmp_path, DAMAGED | SOUND)
    checked = check_images(paths)
    for name in DAMAGED:
        assert checked.error[name].startswith(f"{paths[name]}: damaged (")
        assert "restore or remove the file" in checked.error[name]
    assert (checked.error[list(SOUND)] == "").all()
    photos = pd.DataFrame({"path": paths, "label": range(len(paths))})
    caplog.set_level(logging.INFO, "mask")
    kept = drop_bad_images(photos)
    assert kept.path.tolist() == paths[list(SOUND)].tolist()
    assert kept.label.tolist() == list(range(len(DAMAGED), len(paths)))
    for name in DAMAGED:
        assert caplog.messages.count(f"skipped: {checked.error[name]}") == 1
    assert f"{len(DAMAGED)} of {len(paths)} photos skipped" in caplog.messages[-1]


@pytest.mark.parametrize("name", DAMAGED)
def test_reading_a_damaged_photo_warns_with_its_name(tmp_path, name, caplog, no_foreign_line):
    path = write_all(tmp_path, {name: DAMAGED[name]})[name]
    for min_size in [(math.inf, math.inf), (60, 60)]:
        assert min(read_image(path, min_size).shape[:2]) >= 60
    # Once, although the photo is read in every epoch.
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert caplog.messages[0].startswith(f"warning: {path}: damaged (")
    assert "--on_bad_image skip" in caplog.messages[0]


NOISY_PNG = encoded(COLOUR, "PNG")


@pytest.mark.parametrize(("data", "says"), [
    (cut(PLAIN), "truncated"), (cut(PLAIN) + bytes(9000), "truncated"), (cut(CMYK), "truncated"),
    (cut(NOISY_PNG), "truncated"), (cut(NOISY_PNG) + PNG[-12:], "truncated"),
    (PNG[:-14] + b"\0\0" + PNG[-12:], "wrong checksum in IDAT"),
    (PNG[:29] + b"\1\1\1\1" + PNG[33:], "wrong checksum in IHDR"),
], ids=["jpeg", "zeros", "cmyk", "png", "png with end", "pixels", "header"])
def test_a_photo_whose_pixels_are_lost_is_refused(read, tmp_path, data, says, no_foreign_line):
    with pytest.raises(InputError) as caught:
        read(data)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/photo.jpg: cannot be decoded") and says in line
    assert "restore or remove the file" in line and "\n" not in line


def test_one_process_and_several_check_alike(tmp_path, monkeypatch, no_foreign_line):
    kinds = DAMAGED | SOUND | {"text": b"no photo", "png": PNG,
                               "turned": in_jpeg(segment(0xE1, EXIF + oriented(6)))}
    paths = pd.concat([write_all(tmp_path / folder, kinds) for folder in "abcd"])
    paths.index = range(7, 7 + len(paths))
    tables = []
    for count in (1, 2):
        monkeypatch.setattr("core.images.cpu_count", lambda count=count: count)
        tables.append(check_images(paths))
    assert len(paths) >= 2 * 32  # enough for a second process
    pd.testing.assert_frame_equal(*tables)
    assert tables[0].index.equals(paths.index)
    assert (tables[0].error != "").sum() == 4 * (len(DAMAGED) + 1)
    assert ((tables[0].digest == "") == (tables[0].error != "")).all()
    assert tables[0]["size"].nunique() == 3 and set(tables[0]["mode"]) == {"RGB", "L", "CMYK", "?"}


# --- colours ---

def test_all_colour_modes_are_converted_to_the_same_rgb(tmp_path):
    ramp = np.tile(np.linspace(40, 200, 32).astype(np.uint8), (32, 1))
    gray = Image.fromarray(ramp)
    rgb = np.stack([ramp] * 3, axis=2)
    variants = {"gray.png": gray, "rgb.png": Image.fromarray(rgb),
                "alpha.png": Image.fromarray(rgb).convert("RGBA"), "la.png": gray.convert("LA"),
                "palette.png": gray.convert("P"), "palette.gif": gray.convert("P"),
                "16bit.png": Image.fromarray(ramp.astype(np.uint16) * 257),
                "32bit.tif": Image.fromarray(ramp.astype(np.int32) * 257),
                "byte.tif": Image.fromarray(ramp.astype(np.int32)),
                "unit.tif": Image.fromarray(ramp.astype(np.float32) / 255),
                "float.tif": Image.fromarray(ramp.astype(np.float32)),
                "wide.tif": Image.fromarray(ramp.astype(np.float32) * 257),
                "cmyk.jpg": Image.fromarray(rgb).convert("CMYK")}
    for name, image in variants.items():
        options = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name).astype(int)
        assert read.shape == (32, 32, 3), name
        assert abs(read - rgb).max() <= 4, name


@pytest.mark.parametrize("values", [
    np.float32([-0.5, 1]), np.float32([0, 70000]), np.float32([0, math.nan]),
    np.float32([0, math.inf]), np.int32([-1, 255]), np.int32([0, 65536])])
def test_values_of_an_unknown_range_are_refused(read, values):
    photo = Image.fromarray(np.repeat(values, 200).reshape(20, 20))
    with pytest.raises(InputError, match=r"values from .* to .*; expected 0..1, 0..255 or 0..655"):
        read(encoded(photo, "TIFF"))


def on_white(pixels, alpha):
    """Return pixels laid on white, by hand."""
    alpha = alpha[..., None] / 255
    return np.rint(pixels * alpha + 255 * (1 - alpha)).astype(int)


def test_transparent_photos_are_laid_on_white(read):
    alpha = np.where(X < 24, X * 10, 0).astype(np.uint8)
    # Nobody sees the colours that lie under alpha 0.
    hidden = np.where(alpha[..., None] == 0, 255 - PIXELS, PIXELS)
    gray = PIXELS[..., 0]
    palette = Image.fromarray(PIXELS).quantize(8)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    partial = np.uint8([0, 90, 255, 200, 255, 255, 255, 255])
    key = PIXELS[40, 30]  # the colour that stands for transparent
    is_key = (key == PIXELS).all(axis=2)
    for data, expected in [
        (encoded(np.dstack([PIXELS, alpha]), "PNG"), on_white(PIXELS, alpha)),
        (encoded(np.dstack([hidden, alpha]), "PNG"), on_white(PIXELS, alpha)),
        (encoded(np.dstack([hidden, alpha]), "WEBP", lossless=True), on_white(PIXELS, alpha)),
        (encoded(np.dstack([hidden, alpha]), "TIFF"), on_white(PIXELS, alpha)),
        (encoded(np.dstack([gray, alpha]), "PNG"), on_white(np.dstack([gray] * 3), alpha)),
        (encoded(palette, "PNG", transparency=partial.tobytes()),
         on_white(colours, partial[index])),
        (encoded(palette, "GIF", transparency=3), on_white(colours, 255 * (index != 3))),
        (in_png(chunk(b"tRNS", key.astype(">u2").tobytes())), on_white(PIXELS, 255 * ~is_key)),
    ]:
        assert np.abs(read(data) - expected).max() <= 1


# --- size ---

def test_a_large_jpeg_is_decoded_no_smaller_than_asked_and_as_pillow_does(read):
    y, x = np.mgrid[:400, :320] / 40
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=2)
    data = encoded((127 + 120 * waves).astype(np.uint8), "JPEG", quality=95)
    pillow = Image.open(io.BytesIO(data)).convert("RGB")
    for min_size, shape in [((math.inf, math.inf), (400, 320)), ((201, 100), (400, 320)),
                            ((200, 160), (200, 160)), ((100, 60), (100, 80)), ((1, 1), (50, 40))]:
        reduced = read(data, min_size)
        assert reduced.shape == (*shape, 3)
        expected = np.asarray(pillow.resize(shape[::-1], Image.Resampling.BOX))
        assert np.abs(reduced.astype(int) - expected).mean() < 3
    assert np.abs(read(data).astype(int) - np.asarray(pillow)).max() <= 2


def test_photos_of_todays_phones_are_read_and_the_limit_is_200_million_pixels(read):
    phone = encoded(Image.new("L", (9248, 6944), 90), "JPEG", quality=20)  # 64 megapixels
    assert read(phone, (500, 500)).shape == (868, 1156, 3)
    size = GRAY.index(b"\xff\xc0") + 5  # where a JPEG tells its height and width

    def of_size(height, width):
        return GRAY[:size] + struct.pack(">HH", height, width) + GRAY[size + 4:]

    assert read(of_size(10_000, 20_000), (500, 500)).shape == (1250, 2500, 3)
    with pytest.raises(InputError, match=r"photo.jpg: 20000 x 10001 pixels; expected .* at most "
                                         r"200,000,000 pixels; remove or resize it"):
        read(of_size(10_001, 20_000))


# --- formats ---

@pytest.mark.parametrize(("data", "what", "remedy"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo", "convert it to JPEG"),
    (b"\0\0\0\x1cftypmsf1\0\0\0\0hevc", "a HEIC photo", "convert it to JPEG"),
    (b"\0\0\0\x18ftypmp42" + bytes(99), "a video", "remove it"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL photo", "convert it to JPEG"),
    (b"8BPS\0\1" + bytes(99), "a Photoshop file", "convert it to JPEG"),
    (b"IIU\0\x18\0\0\0", "a camera raw file", "convert it to JPEG"),
    (b"%PDF-1.7\n", "a PostScript or PDF file", "convert it to JPEG"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "run git lfs pull"),
    (b"PK\3\4" + bytes(99), "an archive", "unpack it"),
    (b"\r\n<!DOCTYPE HTML><p>404", "an HTML page", "download or copy it again"),
    (b"<?xml version='1.0'?><Error/>", "an XML, SVG or JSON text", "download or copy it again"),
    (bytes(50_000), "a file of zeros", "download or copy it again"),
    (b"", "an empty file", "download or copy it again"),
    (b"just text", "no photo in a known format", "restore or remove the file"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_refusal_says_what_the_file_is_and_what_to_do(read, tmp_path, data, what, remedy):
    with pytest.raises(InputError) as caught:
        read(data)
    start = f"{tmp_path}/photo.jpg: cannot be decoded: it is {what}"
    assert str(caught.value).startswith(start) and remedy in str(caught.value)
    assert "object at 0x" not in str(caught.value)


def test_every_suffix_has_a_format_that_is_read(read):
    forms = Image.registered_extensions()
    assert len(IMAGE_SUFFIXES) >= 10
    for suffix in IMAGE_SUFFIXES:
        assert read(encoded(PIXELS, forms[suffix])).shape == PIXELS.shape, suffix

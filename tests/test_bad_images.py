"""Images that are no photo, or a strange one: read, or refused with a message and cheaply; see docs/reliability.md."""

from __future__ import annotations

import base64
import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from lib_pulid import cli_commands
from lib_pulid.errors import ImageError
from lib_pulid.images import FORMATS, MAX_PIXELS, load_image
from lib_pulid.masks import LONGEST_SIDE, load_mask
from lib_pulid.webui.dropped import DroppedPhotos
from lib_pulid.webui.pictures import decode, region
from tests.small_models.images import encoded
from tests.test_images import chunk, png

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---------------------------------------------------------------- headers that promise too much


def png_header(width: int, height: int) -> bytes:
    return png(8, 2, bytes(1000), size=(width, height))


def gif_header(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def webp_header(width: int, height: int) -> bytes:
    frame = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\x00"
    return b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame


def tiff_header(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 16)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(20)


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 16, 0, 0, 54) + info + bytes(16)


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(NOISE, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


HEADERS = {
    "PNG": (png_header, 100_000, 100_000), "GIF": (gif_header, 65_535, 65_535), "WEBP": (webp_header, 16_383, 16_383),
    "TIFF": (tiff_header, 1_000_000, 1_000_000), "BMP": (bmp_header, 500_000, 500_000),
    "JPEG": (jpeg_header, 65_500, 65_500),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_promises_too_much_is_refused_before_decoding(kind, monkeypatch):
    make, width, height = HEADERS[kind]
    assert load_image(encoded(NOISE, kind)).shape == NOISE.shape  # this kind is read here
    bomb, decoded = make(width, height), []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    for limit in (89_000_000, None):  # a host may have switched PIL's own limit off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=r"photo 1: the image is too large .*more than 150 million pixels"):
            decode(text(bomb), "photo 1")
    assert not decoded


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_header_within_the_limit_but_no_pixels_behind_it(kind):
    make = HEADERS[kind][0]
    with pytest.raises(ImageError, match="photo: "):
        load_image(make(11_000, 11_000), "photo")


def test_a_text_chunk_that_unpacks_to_gigabytes():
    bomb = zlib.compress(bytes(200_000_000), 9)
    data = b"Comment\x00\x00" + bomb
    whole = encoded(NOISE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="photo: "):
        load_image(whole[:33] + chunk(b"zTXt", data) + whole[33:], "photo")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


def test_a_large_photo_is_reduced():
    image = DroppedPhotos().read(text(encoded(Image.new("L", (5_800, 4_350), 77), compress_level=1)), "photo 1")
    assert max(image.shape) in (4095, 4096)  # rounded down, as the official function does it
    assert (image == 77).all()
    assert MAX_PIXELS > 100_000_000  # that of large cameras


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_an_error_in_every_format(kind, keep):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this PIL has no AVIF")
    data = encoded(NOISE, kind)
    with pytest.raises(ImageError, match=r"photo: (the image (is truncated|cannot be read)|this is not an image)"):
        load_image(data[: int(len(data) * keep)], "photo")


def test_a_few_bytes_no_pixels_and_one_pixel():
    few = (b"", b"\0", b"x", b"\xff\xd8", b"\x89PNG\r\n\x1a\n")
    for data in (*few, png_header(0, 0), bmp_header(0, 5)):
        with pytest.raises(ImageError, match="photo 1: "):
            decode(text(data), "photo 1")
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]


# ---------------------------------------------------------------- kinds


FOREIGN = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.7\n1 0 obj\n", "html": b"<!DOCTYPE html><html></html>", "text": b"this is no image " * 40,
    "zip": b"PK\x03\x04" + bytes(300), "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300),
    "json": b'{"images": []}' * 20, "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(300),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_image_says_what_to_save_it_as(kind):
    with pytest.raises(ImageError, match=r"photo 1: this is not an image, or its format .* JPEG, PNG or WebP"):
        decode(text(FOREIGN[kind]), "photo 1")


def test_postscript_is_never_interpreted(tmp_path):
    """PIL hands EPS to Ghostscript, which is a program that runs programs."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS"  # PIL would
    (tmp_path / "x.eps").write_bytes(data)
    for source in (data, tmp_path / "x.eps"):
        with pytest.raises(ImageError, match="not an image"):
            load_image(source)
    assert not {"EPS", "WMF", "PSD", "PDF", "FPX", "MIC"} & set(FORMATS)


# ---------------------------------------------------------------- base64


def test_base64_with_blanks_newlines_and_data_uris():
    data = encoded(NOISE)
    plain = text(data)
    broken_up = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for form in (plain, broken_up, " " + plain + "\r\n", "data:image/png;base64," + plain, "DATA:;base64," + plain,
                 "data:application/octet-stream;charset=x;base64, " + broken_up,
                 "data:image/png;name=me, my dog, 2.png;base64," + plain):  # fmt: skip
        np.testing.assert_array_equal(decode(form, "photo 1"), NOISE)


@pytest.mark.parametrize("form", ["unpadded", "urlsafe", "percent", "utf-8", "no comma", "not base64", "surrogate"])
def test_wrong_base64_is_told(form):
    data = encoded(NOISE, "BMP") + b"\xff\xfe"
    plain = text(data)
    assert "/" in plain and plain.endswith("=")
    wrong = {
        "unpadded": plain.rstrip("="), "urlsafe": plain.replace("/", "_"), "percent": plain.replace("=", "%3D"),
        "utf-8": plain + "é", "no comma": "data:image/png;base64", "not base64": "data:image/svg+xml;utf8,<svg/>",
        "surrogate": "\ud800",
    }[form]  # fmt: skip
    with pytest.raises(ImageError, match="photo 1: (not base64 text|the file is empty)"):
        decode(wrong, "photo 1")


# ---------------------------------------------------------------- regions


def test_a_region_may_be_of_any_size_and_kind():
    for size in ((1, 1), (3, 7), (1, 500)):
        assert load_mask(encoded(Image.new("L", size, 255))).shape == size[::-1]
    assert load_mask(encoded(Image.new("1", (4, 4), 1))).max() == 1
    half = np.zeros((6, 10), np.uint8)
    half[:, :5] = 255
    assert load_mask(encoded(half)).mean() == 0.5
    # White strokes on an empty layer: laid over white, as a photo is, they would be everywhere.
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:2] = 255
    assert region(text(encoded(layer)), "the mask").mean() == 0.25
    assert load_image(layer).min() == 255


@pytest.mark.parametrize(
    "mask", [Image.new("L", (9, 9)), Image.new("RGBA", (9, 9)), Image.new("RGBA", (9, 9), (0, 0, 0, 255))]
)
def test_a_region_that_is_black_all_over_is_an_error(mask, tmp_path):
    mask.save(tmp_path / "mask.png")
    for source in (encoded(mask), tmp_path / "mask.png"):
        with pytest.raises(ImageError, match="the mask is entirely black"):
            load_mask(source, "the mask")
    with pytest.raises(ImageError, match="the mask .* Paint the area for this face white\\.$"):
        region(text(encoded(mask)), "the mask")
    with pytest.raises(ImageError, match=r"mask\.png is entirely black"):
        cli_commands.read_region(tmp_path / "mask.png", None)


def squares(value: object, kind: str | type) -> np.ndarray:
    """A quarter of this value in the middle, the rest 0."""
    made = np.zeros((64, 64), kind)
    made[16:48, 16:48] = value
    return made


def colored(palette: list[int]) -> Image.Image:
    image = Image.fromarray(squares(1, np.uint8), "P")
    image.putpalette(palette)
    return image


@pytest.mark.parametrize(
    "source",
    [
        *[squares(1, kind) for kind in ("uint8", "bool", "int64", "uint16", "float16", "float32", "float64")],
        *[squares(255, kind) for kind in ("uint8", "int64", "float32")],
        squares(65535, "uint16"),
        squares(1, "uint8")[:, :, None],
        Image.fromarray(squares(1, "uint8")),
        Image.fromarray(squares(True, "bool")),
        Image.fromarray(squares(255, "float32")),
        colored([0, 0, 0, 128, 0, 0]),
        encoded(squares(1, "uint8")),
        encoded(squares(1, "uint16")),
        encoded(squares(65535, "uint16")),
        encoded(Image.fromarray(squares(1, "uint8")).convert("RGBA")),
        encoded(Image.fromarray(np.dstack([squares(255, "uint8")] + 2 * [squares(0, "uint8")]))),
        encoded(Image.fromarray(np.dstack([np.full((64, 64), 255, np.uint8)] * 3 + [squares(255, "uint8")]))),
        encoded(Image.fromarray(squares(255, "uint8")).convert("P")),
    ],
    ids=lambda source: type(source).__name__,  # the same in every process
)
def test_a_region_acts_in_full_whatever_its_numbers(source):
    assert np.array_equal(load_mask(source), squares(1, np.float32))


def test_shares_between_black_and_white_stay():
    soft = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    assert np.allclose(load_mask(encoded(soft)), soft / 255)
    assert np.allclose(load_mask(soft / 510), soft / 510)
    assert load_mask(encoded(squares(128, "uint8"))).max() == pytest.approx(128 / 255)


def tiff(values: np.ndarray, tags: dict[int, int]) -> bytes:
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=tags)


def rotated(values: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(Image.fromarray(values), "PNG", exif=exif)


@pytest.mark.parametrize(
    ("source", "left", "right"),
    [
        (rotated(np.uint16([[65535, 0]]), 3), 0, 1),
        (rotated(np.uint8([[255, 0]]), 3), 0, 1),
        (tiff(np.uint16([[255, 51]]), {}), 1, 0.2),
        (tiff(np.int32([[255, 51]]), {}), 1, 0.2),
        (tiff(np.int32([[2**31 - 1, 2**30]]), {}), 1, 0.5),
        (tiff(np.uint16([[65535, 52428]]), {262: 0}), 0, 0.2),
        (tiff(np.uint16([[255, 51]]), {262: 0, 274: 3}), 0.8, 0),
        (tiff(np.float32([[1, 0.75]]), {262: 0}), 0, 0.25),
        (png(16, 0, b"\0\xff\xff\x80\0", clear=b"\xff\xff"), 0, 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wide_region_is_read_as_other_programs_show_it(source, left, right):
    """Upright, with white where they show white, and nothing where it is transparent."""
    plane = load_mask(source)
    assert plane[0, 0] == pytest.approx(left, abs=1e-4)
    assert plane[0, -1] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(
    "mask",
    [
        *[np.pad(np.full((1, 1), value, "uint8"), ((3, 60), (5, 58))) for value in (1, 3, 255)],
        squares(3, "uint8"),
        squares(15, "uint8"),
        squares(200, "uint16"),
    ],
    ids=lambda source: type(source).__name__,  # the same in every process
)
def test_a_region_that_is_nearly_black_is_an_error(mask):
    for source in (mask, encoded(mask)):
        with pytest.raises(ImageError, match=r"the mask is nearly black \(.*% at its brightest"):
            load_mask(source, "the mask")


def test_what_is_no_region():
    for mask in (squares(-1, "float32"), squares(np.nan, "float32"), squares(7e4, "float32"), np.ones(3)):
        with pytest.raises(ImageError, match="the mask: a mask"):
            load_mask(mask, "the mask")
    with pytest.raises(ImageError, match=r"the mask: its values are in 0\.\.4095"):  # which of them is white?
        load_mask(tiff(np.uint16([[0, 4095]]), {}), "the mask")
    with pytest.raises(ImageError, match="the mask: this is not an image"):
        region(text(FOREIGN["text"]), "the mask")


def test_a_huge_region_is_reduced():
    wide = np.zeros((10, 3 * LONGEST_SIDE), np.uint8)
    wide[:, : 3 * LONGEST_SIDE // 2] = 255
    reduced = load_mask(encoded(wide))
    assert reduced.shape == (3, LONGEST_SIDE)
    assert abs(reduced.mean() - 0.5) < 1e-3

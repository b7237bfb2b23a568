"""Every kind of photo becomes upright, opaque uint8 RGB; everything else an ImageError that names it."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from lib_pulid import images
from lib_pulid.errors import ImageError
from lib_pulid.images import load_image, resize_long_edge, thumbnail
from tests.small_models.images import encoded

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 18, 3), dtype=np.uint8)


def test_a_file_its_bytes_a_pil_image_and_an_array_are_the_same(tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(encoded(PHOTO))
    for source in (PHOTO, PHOTO[:, ::-1][:, ::-1], path, str(path), path.read_bytes(), Image.open(path)):
        image = load_image(source)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        np.testing.assert_array_equal(image, PHOTO)
        image[:] = 0  # an array is not shared with the caller


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(PHOTO)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    np.testing.assert_array_equal(load_image(encoded(stored, exif=exif)), PHOTO)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_refuse_a_photo():
    data = encoded(PHOTO, "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x01" * 9)
    np.testing.assert_array_equal(load_image(data), PHOTO)


def test_grey_and_two_level_images():
    grey = PHOTO[:, :, 0]
    for source in (grey, grey[:, :, None], Image.fromarray(grey), encoded(grey)):
        np.testing.assert_array_equal(load_image(source), np.repeat(grey[:, :, None], 3, axis=2))
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(load_image(bits)[:, :, 1], np.where(grey > 127, 255, 0))
    np.testing.assert_array_equal(load_image(grey > 127)[:, :, 1], np.where(grey > 127, 255, 0))


@pytest.mark.parametrize("alpha", [0, 51, 128, 255])
def test_transparency_is_laid_over_white(alpha):
    rgba = np.dstack([PHOTO, np.full(PHOTO.shape[:2], alpha, np.uint8)])
    expected = np.rint(PHOTO * (alpha / 255) + 255 * (1 - alpha / 255))
    la = rgba[:, :, [0, 3]]
    for source in (rgba, Image.fromarray(rgba), encoded(rgba)):
        np.testing.assert_allclose(load_image(source), expected, atol=0.5)
    for source in (la, Image.fromarray(la), encoded(la)):
        np.testing.assert_allclose(load_image(source), np.repeat(expected[:, :, :1], 3, axis=2), atol=0.5)


def test_palettes_with_and_without_transparency():
    palette = Image.fromarray(PHOTO).quantize(16)
    opaque = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(load_image(encoded(palette)), opaque)
    data = encoded(palette, transparency=3)
    hidden = np.asarray(palette) == 3
    assert hidden.any()
    np.testing.assert_array_equal(load_image(data), np.where(hidden[:, :, None], 255, opaque))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, rows: bytes, clear: bytes = b"", size: tuple[int, int] = (2, 1)) -> bytes:
    """rows: each with its filter in front. colour: PNG's kind (0 grey, 2 RGB, 4 grey and alpha)."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    more = chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("clear", ["first", "second", "neither"])
def test_the_transparent_grey_of_every_depth(depth, clear):
    """Half of the values are shown as they are, over black and over white; 1 bit has 0 and 1 only."""
    top = 2**depth - 1
    first, second = top // 3, top - top // 3
    packed = (first << depth | second) << max(0, 8 - 2 * depth)
    row = packed.to_bytes(max(1, depth // 4), "big")
    value = {"first": first, "second": second, "neither": top // 2 + 1 if depth > 1 else None}[clear]
    data = png(depth, 0, b"\0" + row, b"" if value is None else struct.pack(">H", value))
    for background in (0, 255):
        shown = [background if value == one else round(255 * one / top) for one in (first, second)]
        np.testing.assert_allclose(load_image(data, background=background)[0, :, 0], shown, atol=1)


def test_the_transparent_colour_of_8_and_16_bits():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert load_image(encoded(rgb, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x0000)
    data = png(16, 2, b"\0" + row, struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert load_image(data)[0].tolist() == [[255] * 3, [0x12, 0x56, 0]]


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_with_alpha_of_every_depth(depth):
    row = struct.pack(
        ">4B" if depth == 8 else ">4H", *[value * (1 if depth == 8 else 257) for value in (200, 255, 9, 0)]
    )
    assert load_image(png(depth, 4, b"\0" + row))[0].tolist() == [[200] * 3, [255] * 3]


def test_a_palette_with_alpha_of_its_own():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 50, 20, 255, 0, 0, 0, 0], "RGBA")
    image.putdata([0, 1])
    for one in (image, Image.fromarray(np.array([[[200, 50, 20, 255], [0, 0, 0, 0]]], np.uint8)).quantize(2)):
        assert load_image(one)[0].tolist() == [[200, 50, 20], [255] * 3]


WHITE_IS_ZERO = "white is zero, "
WIDE = {  # what the values 0, 51, 255 are in a file of that kind
    "int32 of 8 bits": np.array([[0, 51, 255]], np.int32), "uint32 of 8 bits": np.array([[0, 51, 255]], np.uint32),
    "uint16 of 8 bits": np.array([[0, 51, 255]], np.uint16), "int16 of 8 bits": np.array([[0, 51, 255]], np.int16),
    "int32 of 16": np.array([[0, 13107, 65535]], np.int32), "uint16": np.array([[0, 13107, 65535]], np.uint16),
    "int16": np.array([[0, 6553, 32767]], np.int16), "uint32": np.array([[0, 858993459, 4294967295]], np.uint32),
    "int32": np.array([[0, 429496729, 2147483647]], np.int32), "float": np.array([[0, 0.2, 1]], np.float32),
    WHITE_IS_ZERO + "uint16 of 8 bits": np.array([[255, 204, 0]], np.uint16),
    WHITE_IS_ZERO + "uint16": np.array([[65535, 52428, 0]], np.uint16),
    WHITE_IS_ZERO + "float": np.array([[1, 0.8, 0]], np.float32),
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDE)
def test_wide_greyscale_tiff(kind):
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, WIDE[kind], photometric="miniswhite" if WHITE_IS_ZERO in kind else None)
    np.testing.assert_allclose(load_image(buffer.getvalue())[0, :, 0], [0, 51, 255], atol=1)


@pytest.mark.parametrize("values", [
    np.uint16([[0, 4095]]), np.int32([[0, 4095]]), np.int32([[-5, 200]]), np.int32([[0, 1 << 20]]),
    np.float32([[0, 255]]), np.float32([[-1, 1]]), np.float32([[0, np.nan]]),
])  # fmt: skip
def test_where_white_cannot_be_told_the_range_is(values):
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values)
    with pytest.raises(ImageError, match=r"photo: .*(-?\d+|nan)\.\.(\d+|nan)"):
        load_image(buffer.getvalue(), "photo")


def test_cmyk_and_premultiplied_alpha():
    flat = Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK")
    image = load_image(encoded(flat, "JPEG", quality=95))
    np.testing.assert_allclose(image, np.full((8, 8, 3), (200, 100, 50)), atol=3)
    half = Image.new("RGBA", (2, 2), (200, 100, 50, 128)).convert("RGBa")
    np.testing.assert_allclose(load_image(half)[0, 0], [227, 177, 152], atol=2)


def test_16_bit_greyscale_is_scaled_to_8_bit():
    deep = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    sources = (deep, deep.astype(">u2"), Image.fromarray(deep), encoded(deep))
    for source in (*sources, encoded(deep, "TIFF"), Image.fromarray(deep.astype(np.int32))):
        image = load_image(source)
        assert image[0, :, 0].tolist() == expected and image.shape == (1, 6, 3)


def test_float_images_and_whole_numbers():
    """0..1, and 0..255."""
    for array in (PHOTO.astype(np.float64) / 255, PHOTO.astype(np.int64)):
        np.testing.assert_array_equal(load_image(array), PHOTO)
    grey = Image.fromarray(PHOTO[:, :, 0].astype(np.float32) / 255)
    assert grey.mode == "F"
    np.testing.assert_array_equal(load_image(grey)[:, :, 2], PHOTO[:, :, 0])
    for wrong in (PHOTO.astype(np.float32), np.full((2, 2), np.nan), np.full((2, 2), -1.0)):
        with pytest.raises(ImageError, match=r"photo: .*0\.\.1"):
            load_image(wrong, "photo")
    with pytest.raises(ImageError, match="photo"):
        load_image(PHOTO.astype(np.int64) + 1000, "photo")


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(data)[0, 0].tolist() == [255, 0, 0]


def test_errors_name_the_file(tmp_path):
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    contents = {"empty.png": b"", "half.jpg": whole[: len(whole) // 2], "text.png": b"this is no image at all"}
    for file, content in contents.items():
        path = tmp_path / file
        path.write_bytes(content)
        for source, *name in ((path,), (path, "photo 2"), (content, "photo 2")):
            with pytest.raises(ImageError, match=name[0] if name else file):
                load_image(source, *name)
    with pytest.raises(ImageError, match=r"gone\.png.*no such file"):
        load_image(tmp_path / "gone.png")
    (tmp_path / "folder").mkdir()
    for source in (tmp_path / "folder", "a\0b.png", "x" * 5000):
        with pytest.raises(ImageError):
            load_image(source)


def test_what_is_no_image():
    """Arrays of other shapes, and other types."""
    shapes = ((0, 5, 3), (5, 0, 3), (0, 0), (4,), (2, 4, 4, 3), (4, 4, 5))
    for source in (*(np.zeros(shape, np.uint8) for shape in shapes), None, 3, [[0]], np.array([["a"]])):
        with pytest.raises(ImageError, match="photo"):
            load_image(source, "photo")


def test_pixel_limit_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 18 * 12 - 1)
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    for source in (PHOTO, Image.fromarray(PHOTO), encoded(Image.new("RGB", (18, 12)), "BMP")):
        decoded.clear()
        with pytest.raises(ImageError, match="photo: .*too large.*18 x 12"):
            load_image(source, "photo")
        assert not decoded


def test_pil_bomb_error_becomes_an_image_error_and_its_warning_none(monkeypatch):
    data = encoded(PHOTO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 18 * 12 - 1)
        np.testing.assert_array_equal(load_image(data), PHOTO)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 18 * 12 // 2 - 1)
        with pytest.raises(ImageError, match="photo: .*too large"):
            load_image(data, "photo")


@pytest.mark.parametrize("size", [(1500, 1100), (1023, 2047), (1025, 7), (3000, 1999)])
def test_resize_equals_the_official_formula(size):
    image = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    k = 1024 / max(size)
    expected = cv2.resize(image, (int(size[0] * k), int(size[1] * k)), interpolation=cv2.INTER_LANCZOS4)
    np.testing.assert_array_equal(resize_long_edge(image), expected)


def test_resize_never_enlarges_and_keeps_a_pixel():
    assert resize_long_edge(PHOTO) is PHOTO
    assert resize_long_edge(np.zeros((1, 4000, 3), np.uint8)).shape == (1, 1024, 3)
    assert resize_long_edge(PHOTO, 9).shape == (6, 9, 3)


def test_thumbnail():
    image = np.full((300, 200, 3), (10, 20, 30), np.uint8)
    small = thumbnail(image)
    assert small.shape == (96, 64, 3) and small.dtype == np.uint8
    assert (small == (10, 20, 30)).all()
    assert thumbnail(PHOTO).shape == PHOTO.shape and thumbnail(PHOTO) is not PHOTO
    assert thumbnail(np.zeros((1, 4000, 3), np.uint8)).shape == (1, 96, 3)

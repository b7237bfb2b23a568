"""Raw files of cameras, made by hand: the large preview is read, a thumbnail never taken for the photo; and TIFF files
that begin with a thumbnail, JPEG files without their end mark."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from lib_pulid.camera_files import has_all_scans
from lib_pulid.errors import ImageError
from lib_pulid.images import load_image
from tests.small_models.images import encoded

RNG = np.random.default_rng(7)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, **options: object) -> bytes:
    return encoded(image, "JPEG", quality=95, **options)


LARGE, THUMBNAIL = picture(640, 480, 1), picture(160, 120, 2)


def tiff(*pages: dict, order: str = "<", magic: bytes = b"*\0", inside: bool = True, gap: bytes = b"") -> bytes:
    """Tag -> numbers, or bytes that are laid into the file (273: their place, 279: their length; 513, 514 likewise).

    inside: later pages are the first one's SubIFDs; else each page follows the other. gap: before the first one.
    """
    mark = b"II" if order == "<" else b"MM"
    blobs, places = bytearray(), []
    heads = [8 + len(gap)]
    sizes = [2 + 12 * (len(page) + (inside and i == 0 and len(pages) > 1)) + 4 for i, page in enumerate(pages)]
    for size in sizes[:-1]:
        heads.append(heads[-1] + size)
    start = heads[0] + sum(sizes)

    def laid(content: bytes) -> int:
        places.append(start + len(blobs))
        blobs.extend(content + bytes(len(content) % 2))
        return places[-1]

    out = b""
    for i, page in enumerate(pages):
        entries = dict(page)
        if inside and i == 0 and len(pages) > 1:
            entries[330] = heads[1:]
        body = b""
        for tag, value in sorted(entries.items()):
            if isinstance(value, bytes):
                value = laid(value)
            numbers = value if isinstance(value, list) else [value]
            packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
            packed = packed if len(packed) == 4 else struct.pack(order + "I", laid(packed))
            body += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
        following = 0 if inside or i + 1 == len(pages) else heads[i + 1]
        out += struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", following)
    magic = magic if order == "<" else magic[::-1]
    return mark + magic + struct.pack(order + "I", heads[0]) + gap + out + bytes(blobs)


def rgb_page(image: np.ndarray, **more: int) -> dict:
    height, width = image.shape[:2]
    page = {254: 1, 256: width, 257: height, 258: [8, 8, 8], 259: 1, 262: 2, 277: 3, 278: height}
    return {**page, 273: image.tobytes(), 279: image.nbytes}


def sensor_page(width: int, height: int, compression: int = 7) -> dict:
    page = {254: 0, 256: width, 257: height, 258: 14, 259: compression, 262: 32803, 277: 1, 278: height}
    return {**page, 273: RNG.integers(0, 256, 4000, dtype=np.uint8).tobytes(), 279: 4000}


def jpeg_page(image: np.ndarray) -> dict:
    content = jpeg(image)
    return {254: 1, 259: 6, 513: content, 514: len(content)}


def files(preview: np.ndarray) -> dict[str, bytes]:
    """As the kinds of raw files lie on a disk; the thumbnail comes first in each."""
    dng, thumbnail = {50706: 0x401}, rgb_page(THUMBNAIL)
    cr3 = struct.pack(">I", 24) + b"ftypcrx " + bytes(12) + b"CMT1" + tiff({274: 1}) + jpeg(THUMBNAIL) + jpeg(preview)
    return {
        "DNG": tiff({**thumbnail, **dng}, sensor_page(1280, 960), jpeg_page(preview)),
        "NEF": tiff(thumbnail, jpeg_page(preview), sensor_page(1280, 960, 34713), order=">"),
        "ARW": tiff({**jpeg_page(THUMBNAIL)}, sensor_page(1280, 960, 32767), jpeg_page(preview)),
        "PEF": tiff(sensor_page(1280, 960, 65535), jpeg_page(THUMBNAIL), jpeg_page(preview), order=">", inside=False),
        "ORF": tiff({**thumbnail, 0x927C: jpeg(preview)}, sensor_page(1280, 960), magic=b"RO"),
        "RW2": tiff({256: 1280, 257: 960, 0x2E: jpeg(preview)}, magic=b"U\0"),
        "RAF": b"FUJIFILMCCD-RAW 0201" + bytes(64) + jpeg(THUMBNAIL) + jpeg(preview) + bytes(500),
        "CR3": cr3 + bytes(500),
        "uncompressed": tiff({**thumbnail, **dng}, sensor_page(1280, 960), rgb_page(preview)),
    }


def cr2(preview: np.ndarray) -> bytes:
    content = jpeg(preview)
    first = {256: preview.shape[1], 257: preview.shape[0], 259: 6, 262: 6, 273: content, 279: len(content), 274: 1}
    return tiff(first, jpeg_page(THUMBNAIL), inside=False, gap=b"CR\x02\0" + bytes(4))


def near(image: np.ndarray, other: np.ndarray) -> bool:
    return image.shape == other.shape and np.abs(image.astype(int) - other).mean() < 2


@pytest.mark.parametrize("kind", [*files(LARGE), "CR2"])
def test_the_large_preview_of_a_raw_file_is_read(kind, tmp_path):
    data = cr2(LARGE) if kind == "CR2" else files(LARGE)[kind]
    (tmp_path / "photo.raw").write_bytes(data)
    for source in (data, tmp_path / "photo.raw"):
        assert near(load_image(source), LARGE)


@pytest.mark.parametrize("kind", files(LARGE))
def test_a_thumbnail_is_never_taken_for_the_photo(kind):
    data = files(picture(200, 150))[kind]
    with pytest.raises(ImageError, match=r"photo: this is a camera's raw file with only a thumbnail of 200 x 150"):
        load_image(data, "photo")


def test_a_raw_file_without_any_picture():
    for data in (tiff(sensor_page(1280, 960)), tiff({50706: 0x401, **sensor_page(64, 64)}), b"FOVb" + bytes(400)):
        with pytest.raises(ImageError, match="photo: this is a camera's raw file .* Save the photo as JPEG"):
            load_image(data, "photo")


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_raw_files_orientation_holds_for_its_preview(orientation):
    turned = {3: 2, 6: 1, 8: 3}[orientation]
    stored = np.rot90(LARGE, turned)
    data = tiff({**rgb_page(THUMBNAIL), 50706: 0x401, 274: orientation}, sensor_page(1280, 960), jpeg_page(stored))
    assert near(load_image(data), LARGE)
    exif = Image.Exif()
    exif[274] = 1
    own = {254: 1, 259: 6, 513: jpeg(LARGE, exif=exif), 514: 1}
    data = tiff({**rgb_page(THUMBNAIL), 50706: 0x401, 274: orientation}, sensor_page(1280, 960), own)
    assert near(load_image(data), LARGE)


def test_a_tiff_that_begins_with_a_thumbnail():
    whole = {**rgb_page(LARGE), 254: 0}
    for inside in (True, False):
        np.testing.assert_array_equal(load_image(tiff(rgb_page(THUMBNAIL), whole, inside=inside)), LARGE)
    np.testing.assert_array_equal(load_image(tiff(whole, rgb_page(THUMBNAIL), inside=False)), LARGE)
    np.testing.assert_array_equal(load_image(tiff(rgb_page(THUMBNAIL))), THUMBNAIL)  # there is nothing else
    frames = [Image.fromarray(LARGE), Image.fromarray(picture(900, 700))]  # of several whole pages, the first
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(data), LARGE)


def test_pages_that_lead_nowhere():
    data = tiff(rgb_page(THUMBNAIL), sensor_page(64, 64))
    for cut in range(8, 300, 7):
        with pytest.raises(ImageError, match="photo: "):
            load_image(data[:cut], "photo")
    for more in ({}, {50706: 0x401}, {259: 34713}):
        with pytest.raises(ImageError, match="photo: this is a camera's raw file with "):
            load_image(tiff({**rgb_page(THUMBNAIL), 330: 10**6, **more}), "photo")
    loop = data[:4] + struct.pack("<I", 4) + data[8:]
    with pytest.raises(ImageError, match="photo: "):
        load_image(loop, "photo")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_that_lacks_its_end_mark_only(options, cut, tmp_path):
    data = jpeg(picture(100, 70), **options)
    (tmp_path / "x.jpg").write_bytes(data[:-cut])
    for source in (data[:-cut], tmp_path / "x.jpg"):
        np.testing.assert_array_equal(load_image(source), load_image(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_jpeg_that_lacks_more_is_an_error(options):
    data = jpeg(picture(100, 70), **options)
    for cut in (8, 16, 40, 200, len(data) // 2):
        with pytest.raises(ImageError, match="photo: the image is truncated"):
            load_image(data[:-cut], "photo")


def test_a_progressive_jpeg_that_lacks_its_last_scans_is_an_error():
    data = jpeg(picture(100, 70), progressive=True)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert has_all_scans(data) and len(scans) > 3
    for at in scans[1:]:
        tables = data.rfind(b"\xff\xc4", 0, at)  # of the scan
        assert not has_all_scans(data[:tables])
        with pytest.raises(ImageError, match="photo: the image is truncated"):
            load_image(data[:tables], "photo")

"""Extracts previews from cameras' raw files and full pages from TIFF files, and completes JPEGs without an end marker.

A raw file (DNG, NEF, CR2, CR3, ARW, PEF, ORF, RW2, RAF ...) has the sensor's data, which only a raw converter can read,
and JPEG previews, often in full size. Most are TIFF files whose first page is a thumbnail, the wrong image to read as a
photo. The tags are those of TIFF 6.0, TIFF/EP and DNG 1.7.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

LONGEST_SIDE = 1000  # pixels: a preview of this size is as good as the photo, which PuLID shrinks to 1024
SHORTEST_SIDE = 512  # of a preview, if the photo's size is not known
_MOST_PAGES, _MOST_STREAMS, _TRIED = 64, 4096, 3

# Tags. 254: kind of page (1: reduced), 262: photometric, 330: further pages, 50706: DNG's version.
_REDUCED, _WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PAGES, _DNG = (
    254, 256, 257, 259, 262, 274, 330, 50706,
)  # fmt: skip
_SENSOR = (32803, 34892)  # photometric: sensor data
_RAW_COMPRESSIONS = (32767, 32769, 32770, 32867, 34713, 34892, 52546, 65000, 65535)  # Sony's, Nikon's, Pentax's ...
_SHOWN = (2, 6)  # photometric: RGB, YCbCr
_READABLE = (1, 5, 8, 32773)  # compression, besides JPEG: a JPEG is found by its own marker
_TIFF_MAGICS = (42, 0x4F52, 0x5352, 0x55)  # TIFF, Olympus (two), Panasonic
_FORMATS = {1: "B", 3: "H", 4: "I", 13: "I"}  # whole numbers
_RAW_HEADS = (b"FUJIFILMCCD-RAW", b"FOVb")
_LOSSLESS = 0xC3  # JPEG's marker of a frame with sensor data


Content = bytes | mmap.mmap


@dataclass(frozen=True)
class CameraFile:
    """The images in a camera file.

    Args:
        pictures: complete files of those that are large enough to replace the photo, largest first.
        orientation: Exif's number in the outer file, used if the image has none.
        thumbnail: the size of the largest smaller image, or (0, 0).
    """

    pictures: tuple[bytes, ...]
    orientation: int
    thumbnail: tuple[int, int]


def camera_file(data: Content) -> CameraFile | None:
    """Lists the images in a raw file, or in a TIFF that starts with a thumbnail; None for any other file."""
    head = data[:16]
    try:
        pages = list(_pages(data)) if head[:2] in (b"II", b"MM") else []
        raw = _is_raw(head, pages)
        # Or the first page is marked as a smaller copy, and a larger or unreadable page follows.
        is_reduced = bool(pages) and pages[0].get(_REDUCED, 0) & 1
        if not raw and not (is_reduced and any(not page or _area(page) > _area(pages[0]) for page in pages[1:])):
            return None
        return _sorted(data, pages, raw)
    except (struct.error, ValueError, KeyError, IndexError):
        return None  # damaged: reading it reports that


def _is_raw(head: bytes, pages: Sequence[Mapping[int, int]]) -> bool:
    by_head = head.startswith(_RAW_HEADS) or head[4:12] == b"ftypcrx " or (pages and head[8:10] == b"CR")
    if by_head or (pages and head[2:4] not in (b"*\0", b"\0*")):
        return True
    return any(
        _DNG in page or page.get(_PHOTOMETRIC) in _SENSOR or page.get(_COMPRESSION) in _RAW_COMPRESSIONS
        for page in pages
    )


def _sorted(data: Content, pages: Sequence[Mapping[int, int]], raw: bool) -> CameraFile:
    orientation = pages[0].get(_ORIENTATION, 1) if pages else _heif_orientation(data)
    shown = [page for page in pages if page.get(_PHOTOMETRIC) in _SHOWN or not raw]
    found = [
        ((page[_WIDTH], page[_HEIGHT]), partial(_as_first, data, page[0]))
        for page in shown
        if _area(page) and (page.get(_COMPRESSION, 1) in _READABLE or not raw)
    ]
    if raw:
        found += [(size, partial(data.__getitem__, slice(at, len(data)))) for at, size in _streams(data)]
    found.sort(key=lambda one: -one[0][0] * one[0][1])
    whole = max((max(page[_WIDTH], page[_HEIGHT]) for page in pages if _area(page)), default=0)
    photos = (page for page in pages if page.get(_PHOTOMETRIC) in _SENSOR or not page.get(_REDUCED, 0) & 1)
    photo_known = any(map(_area, photos))
    enough = min(LONGEST_SIDE, whole / 2) if photo_known and whole else SHORTEST_SIDE
    large = [one for one in found if max(one[0]) >= enough][:_TRIED]
    small = (size for size, _ in found if max(size) < enough)
    return CameraFile(tuple(content() for _, content in large), orientation, next(small, (0, 0)))


def _area(page: Mapping[int, int]) -> int:
    return page.get(_WIDTH, 0) * page.get(_HEIGHT, 0)


# ---------------------------------------------------------------- TIFF


def _pages(data: Content) -> Iterator[dict[int, int]]:
    """Yields each page as tag -> first value, in the file's order, subpages after their pages; key 0 is the page's
    offset. An unreadable page is empty."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    magic, first = struct.unpack(order + "HI", data[2:8])
    if magic not in _TIFF_MAGICS:
        return
    todo, seen = [first], {0}
    while todo and len(seen) < _MOST_PAGES:
        at = todo.pop(0)
        if at in seen:
            continue
        seen.add(at)
        try:
            page, further = _page(data, at, order)
        except struct.error:
            page, further = {}, []
        todo += further
        yield page


def _page(data: Content, at: int, order: str) -> tuple[dict[int, int], list[int]]:
    """Reads the page at an offset, and the offsets of its subpages and the next page."""
    page: dict[int, int] = {0: at}
    further: list[int] = []
    (count,) = struct.unpack(order + "H", data[at : at + 2])
    for place in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack(order + "HHI", data[place : place + 8])
        if kind not in _FORMATS or not number:
            continue
        values_at = place + 8
        if number * struct.calcsize(_FORMATS[kind]) > 4:
            (values_at,) = struct.unpack(order + "I", data[place + 8 : place + 12])
        layout = f"{order}{min(number, 16)}{_FORMATS[kind]}"
        values = struct.unpack(layout, data[values_at : values_at + struct.calcsize(layout)])
        page[tag] = values[0]
        if tag == _PAGES:
            further += values
    following = data[at + 2 + 12 * count : at + 6 + 12 * count]
    return page, further + list(struct.unpack(order + "I", following) if len(following) == 4 else ())


def _as_first(data: Content, at: int) -> bytes:
    """Returns the TIFF file with the page at `at` as its first."""
    little = data[:2] == b"II"
    return data[:2] + (b"*\0" if little else b"\0*") + struct.pack("<I" if little else ">I", at) + data[8 : len(data)]


def _heif_orientation(data: Content) -> int:
    """Returns the orientation of a CR3 file, whose box CMT1 is a TIFF file."""
    at = data.find(b"CMT1", 0)
    if at < 0:
        return 1
    pages = list(_pages(data[at + 4 : at + 4 + 65536]))
    return pages[0].get(_ORIENTATION, 1) if pages else 1


# ---------------------------------------------------------------- JPEG


def _streams(data: Content) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields offset and size of each JPEG in a file that a viewer could show."""
    at = -1
    for _ in range(_MOST_STREAMS):
        at = data.find(b"\xff\xd8\xff", at + 1)
        if at < 0:
            return
        for marker, start, _ in _segments(data, at):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = struct.unpack(">HH", data[start + 1 : start + 5])
                if marker != _LOSSLESS and width and height:
                    yield at, (width, height)
                break
            if marker == 0xDA:
                break


def _segments(data: Content, at: int) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of the content of each segment of a JPEG that starts at `at`."""
    at += 2
    while True:
        head = data[at : at + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0x00, 0xD9, 0xFF):
            return
        length = struct.unpack(">H", head[2:])[0]
        yield head[1], at + 4, at + 2 + length
        at += 2 + length
        if head[1] == 0xDA:  # entropy-coded data follows; markers in it are restarts
            next_marker = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, at)
            if next_marker is None:
                return
            at = next_marker.start()


def has_all_scans(data: bytes) -> bool:
    """Whether a JPEG has every coefficient of every component to its last bit, so that no scan is missing."""
    missing: set[tuple[int, int]] = set()
    for marker, start, end in _segments(data, 0):
        body = data[start:end]
        if marker in (0xC0, 0xC1, 0xC2) and len(body) >= 6:
            missing = {(body[6 + 3 * i], k) for i in range(body[5]) for k in range(64)}
        elif marker == 0xDA and len(body) > 3:
            count = body[0]
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            if not bits & 15:
                missing -= {(body[1 + 2 * i], k) for i in range(count) for k in range(first, last + 1)}
    return not missing


def with_end_mark(data: bytes) -> tuple[bytes, bytes] | None:
    """Completes a JPEG without an end marker in two ways; if both decode to the same image, nothing else was missing.

    Missing data would be decoded from the bytes that follow: none in the first, some in the second.
    """
    if not has_all_scans(data):
        return None
    coded = data.rstrip(b"\xff")
    return coded + b"\xff\xd9", coded + b"\x5a\xc3\x17\x6e" * 64 + b"\xff\xd9"

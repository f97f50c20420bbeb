"""What a picture file says about itself, read before a single pixel is decoded.

A few bytes can claim 60000 x 60000 pixels, so the size is known and judged before a decoder may allocate anything.
The mode is the name Pillow 12.3 gives the same file, because the preprocess depends on it. `check_complete` finds
files that were cut short, which decoders differ about.

Every reader here takes bytes from strangers: only InputError comes out. Decoding is in `pictures`.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from mammut_runtime.bmp import check_bmp, read_bmp_layout
from mammut_runtime.errors import InputError
from mammut_runtime.picture_errors import cut_short, damaged, unsupported

PNG_START = b"\x89PNG\r\n\x1a\n"
SUPPORTED = "PNG, JPEG, WebP or BMP"


@dataclass(frozen=True)
class PictureHeader:
    """Size and form of a picture file."""

    format: str
    """"PNG", "JPEG", "WebP" or "BMP"."""
    width: int
    """Stored width in pixels, before `orientation` is applied."""
    height: int
    """Stored height in pixels, before `orientation` is applied."""
    mode: str
    """As Pillow names it: "1", "L", "LA", "P", "RGB", "RGBA", "I;16" or "CMYK"."""
    orientation: int = 1
    """EXIF orientation 1 to 8; 1 when the file does not say."""


@dataclass(frozen=True)
class PngChunk:
    """One chunk of a PNG: `data[start:end]` is its body, between its length and kind and its checksum, 4 bytes each."""

    kind: bytes
    start: int
    end: int


def read_header(data: bytes, name: str) -> PictureHeader:
    """Size, mode and orientation of PNG, JPEG, WebP and BMP data; nothing is decoded.

    data: the file, or enough of its beginning. name: for messages. Raises InputError for anything else.
    """
    if not data:
        raise InputError(f"{name}: the file is empty; expected a {SUPPORTED} picture")
    try:
        if data.startswith(PNG_START):
            header = _read_png(data, name)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _read_jpeg(data, name)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _read_webp(data, name)
        elif data[:2] == b"BM":
            layout = read_bmp_layout(data, name)
            header = PictureHeader("BMP", layout.width, layout.height, layout.mode)
        else:
            raise InputError(f"{name}: expected a {SUPPORTED} picture, got {_guess(data)}")
    except struct.error:
        raise cut_short(name, f"its header does not fit into {len(data)} bytes") from None
    if header.width < 1 or header.height < 1:
        raise damaged(name, f"this {header.format} says it is {header.width} x {header.height} pixels")
    return header


_OTHERS = (
    (0, b"GIF8", "a GIF"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (4, b"ftypavif", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftypmif1", "a HEIF"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (0, b"\xffO\xffQ", "a JPEG 2000"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x89PNG", "a PNG that a text-mode transfer damaged"),
    (4, b"ftyp", "a video (MP4 or the like)"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
)


def _guess(data: bytes) -> str:
    for offset, magic, what in _OTHERS:
        if data[offset : offset + len(magic)] == magic:
            return f"{what}; convert it first"
    if data[:512].lstrip().lower().startswith((b"<svg", b"<?xml", b"<!doctype", b"<html")):
        return "a text file (SVG, XML or a web page)"
    return f"a file that begins with {data[:8].hex(' ')}"


# --- PNG ------------------------------------------------------------------------------------------------------------

_PNG_MODES = {
    (1, 0): "1",
    (2, 0): "L",
    (4, 0): "L",
    (8, 0): "L",
    (16, 0): "I;16",
    (8, 2): "RGB",
    (16, 2): "RGB",
    (1, 3): "P",
    (2, 3): "P",
    (4, 3): "P",
    (8, 3): "P",
    (8, 4): "LA",
    (16, 4): "RGBA",
    (8, 6): "RGBA",
    (16, 6): "RGBA",
}
"""Bit depth and colour type to mode. Pillow has no 16-bit grey with alpha and widens it to RGBA."""


def png_chunks(data: bytes) -> Iterator[PngChunk]:
    """The chunks up to and including IEND; stops silently where the data ends."""
    position = len(PNG_START)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield PngChunk(kind, position + 8, position + 8 + length)
        if kind == b"IEND":
            return
        position += 12 + length


def _read_png(data: bytes, name: str) -> PictureHeader:
    chunks = png_chunks(data)
    first = next(chunks, PngChunk(b"IHDR", len(data), len(data) + 13))
    if first.kind != b"IHDR" or first.end - first.start != 13:
        raise damaged(name, "this PNG does not begin with its header chunk")
    width, height, depth, color, compression, filtering, _ = struct.unpack_from(">IIBBBBB", data, first.start)
    mode = _PNG_MODES.get((depth, color))
    if mode is None or compression or filtering:
        raise damaged(name, f"this PNG has bit depth {depth} and colour type {color}, which the format does not have")
    exif = next((data[c.start : c.end] for c in chunks if c.kind == b"eXIf"), b"")
    return PictureHeader("PNG", width, height, mode, exif_orientation(exif))


def _check_png(data: bytes, name: str) -> None:
    """Every chunk that carries pixels is whole, its checksum holds, and the end mark is there."""
    kinds: set[bytes] = set()
    for chunk in png_chunks(data):
        if chunk.kind == b"IHDR" and kinds:
            raise damaged(name, "this PNG has two headers")
        kinds.add(chunk.kind)
        if chunk.end + 4 > len(data):
            break
        if chunk.kind[:1].isupper():
            (expected,) = struct.unpack_from(">I", data, chunk.end)
            if zlib.crc32(data[chunk.start - 4 : chunk.end]) != expected:
                raise damaged(name, f"the checksum of the PNG chunk {chunk.kind!r} does not match its content")
    else:
        if b"IEND" in kinds:
            if b"IDAT" in kinds:
                return
            raise damaged(name, "this PNG has no pixels (no IDAT chunk)")
    raise cut_short(name, "the end mark of a PNG is missing")


# --- JPEG -----------------------------------------------------------------------------------------------------------

_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+([^\x00\xff])")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, body start, body end) before the pixels; the last one is the start of scan or the end mark."""
    position = 2
    while match := _MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        if marker in _BARE_MARKERS:
            continue
        if marker == _END_OF_IMAGE:
            yield marker, position, position
            return
        (length,) = struct.unpack_from(">H", data, position)
        yield marker, position + 2, position + length
        if marker == _START_OF_SCAN:
            return
        # a length below 2 is damage; step over it so that the walk always moves on
        position += max(length, 2)


def _read_jpeg(data: bytes, name: str) -> PictureHeader:
    frame: tuple[int, int, int, int] | None = None
    orientation = 0
    for marker, start, end in _jpeg_segments(data):
        if marker in _FRAME_MARKERS:
            if frame is not None:
                raise damaged(name, "this JPEG has two frame headers")
            frame = struct.unpack_from(">BHHB", data, start)
        elif marker == 0xE1 and not orientation and data[start : start + 6] == b"Exif\0\0":
            orientation = exif_orientation(data[start + 6 : end])
        elif marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
    else:
        raise cut_short(name, "it ends before its pixels begin")
    if frame is None:
        raise damaged(name, "this JPEG has no frame header")
    bits, height, width, layers = frame
    if bits != 8 or layers not in _JPEG_MODES:
        raise unsupported(name, f"a JPEG with {layers} layers of {bits} bits")
    return PictureHeader("JPEG", width, height, _JPEG_MODES[layers], orientation or 1)


def _check_jpeg(data: bytes, name: str) -> None:
    """The end mark follows. Coded pixels have 0 or a restart mark behind every 0xFF, so it is not there by accident."""
    pixels = next((end for marker, _, end in _jpeg_segments(data) if marker == _START_OF_SCAN), len(data))
    if data.find(b"\xff\xd9", pixels) < 0:
        raise cut_short(name, "the end mark of a JPEG is missing")


# --- WebP -----------------------------------------------------------------------------------------------------------


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, body start, body end) of a WebP file; stops silently where the data ends."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        yield kind, position + 8, position + 8 + length
        position += 8 + length + (length & 1)


def _read_webp(data: bytes, name: str) -> PictureHeader:
    chunks = _riff_chunks(data)
    kind, start, _ = next(chunks, (b"VP8 ", len(data), len(data)))
    if kind == b"VP8 ":
        width, height = _lossy_size(data, start, name)
        return PictureHeader("WebP", width, height, "RGB")
    if kind == b"VP8L":
        width, height, alpha = _lossless_size(data, start, name)
        return PictureHeader("WebP", width, height, "RGBA" if alpha else "RGB")
    if kind != b"VP8X":
        raise damaged(name, f"this WebP begins with an unknown chunk {kind!r}")
    flags, low_width, high_width, low_height, high_height = struct.unpack_from("<B3xHBHB", data, start)
    alpha, animated, exif = bool(flags & 0x10), bool(flags & 0x02), b""
    for kind, start, end in chunks:
        if kind == b"EXIF":
            exif = data[start:end]
        elif kind == b"VP8L" and not animated:
            alpha = _lossless_size(data, start, name)[2]
        elif kind == b"ALPH" and not animated:
            alpha = True
    width, height = low_width + (high_width << 16) + 1, low_height + (high_height << 16) + 1
    return PictureHeader("WebP", width, height, "RGBA" if alpha else "RGB", exif_orientation(exif))


def _lossy_size(data: bytes, start: int, name: str) -> tuple[int, int]:
    mark, width, height = struct.unpack_from("<3x3sHH", data, start)
    if mark != b"\x9d\x01\x2a":
        raise damaged(name, "this WebP has no key frame")
    return width & 0x3FFF, height & 0x3FFF


def _lossless_size(data: bytes, start: int, name: str) -> tuple[int, int, bool]:
    mark, bits = struct.unpack_from("<BI", data, start)
    if mark != 0x2F:
        raise damaged(name, "this lossless WebP lacks its signature")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)


def _check_webp(data: bytes, name: str) -> None:
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise cut_short(name, f"{8 + length} bytes were announced and {len(data)} came")


# --- all ------------------------------------------------------------------------------------------------------------

_CHECKS = {"PNG": _check_png, "JPEG": _check_jpeg, "WebP": _check_webp, "BMP": check_bmp}


def check_complete(data: bytes, header: PictureHeader, name: str) -> None:
    """Raise InputError when the file ends before its picture does, or (PNG) when a checksum is wrong."""
    try:
        _CHECKS[header.format](data, name)
    except struct.error:
        raise cut_short(name, f"it ends after {len(data)} bytes") from None


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of an EXIF block, 1 to 8; 1 when it is absent or damaged."""
    body = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(body[:4])
    if order is None:
        return 1
    try:
        (position,) = struct.unpack_from(order + "I", body, 4)
        (entries,) = struct.unpack_from(order + "H", body, position)
        for index in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", body, position + 2 + 12 * index)
            if tag == 0x0112:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1

"""Headers: modes as Pillow names them, sizes without decoding, cut files, and only InputError whatever the bytes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mammut_runtime.errors import InputError
from mammut_runtime.picture_headers import PictureHeader, check_complete, exif_orientation, read_header


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int = 7, height: int = 5, depth: int = 8, color: int = 2, extra: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG of zeros; `extra` stands before the pixels, `after` behind them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    rows = (b"\0" + bytes((width * channels * depth + 7) // 8)) * height if width * height < 10**6 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def saved(form: str, mode: str = "RGB", size: tuple[int, int] = (37, 21), **options: Any) -> bytes:
    """A picture of noise as Pillow writes it."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    picture = Image.frombytes(mode, size, noise.tobytes())
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def tiff(order: str, value: int, kind: int = 3, count: int = 1, before: int = 0) -> bytes:
    """An EXIF block with the orientation tag behind `before` other tags."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = [struct.pack(order + "HHII", 0x010F, 4, 1, 0)] * before
    entries.append(struct.pack(order + "HHIHH", 0x0112, kind, count, value, 0))
    return mark + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


VALID = {
    "png": png(extra=chunk(b"tEXt", b"Title\0x")),
    "palette": png(depth=2, color=3, extra=chunk(b"PLTE", bytes(12))),
    "jpeg": saved("JPEG"),
    "progressive": saved("JPEG", progressive=True),
    "exif": saved("JPEG", exif=b"Exif\0\0" + tiff("<", 6)),
    "webp": saved("WEBP"),
    "lossless": saved("WEBP", "RGBA", lossless=True),
    "alpha": saved("WEBP", "RGBA", exif=b"Exif\0\0" + tiff(">", 3)),
    "bmp": saved("BMP", "L"),
}


@pytest.mark.parametrize("color", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_modes_are_pillows(color: int, depth: int) -> None:
    data = png(depth=depth, color=color, extra=chunk(b"PLTE", bytes(6)) if color == 3 else b"")
    try:
        expected = Image.open(io.BytesIO(data)).mode
    except OSError:
        expected = ""
    if expected:
        assert read_header(data, "x") == PictureHeader("PNG", 7, 5, expected)
    else:
        with pytest.raises(InputError, match=f"bit depth {depth} and colour type {color}, which the format does not"):
            read_header(data, "x")


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "comment": b"\xff\xc0" * 40}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"icc_profile": b"x" * 11}),
        ("WEBP", "RGBA", {"lossless": True, "icc_profile": b"x" * 11}),
        ("BMP", "RGB", {}),
        ("BMP", "L", {}),
        ("BMP", "1", {}),
    ],
)
def test_sizes_and_modes_are_pillows(form: str, mode: str, options: dict[str, Any]) -> None:
    data = saved(form, mode, (131, 67), **options) if mode != "1" else saved(form, "L", (131, 67))
    expected = Image.open(io.BytesIO(data))
    header = read_header(data, "x")
    assert (header.width, header.height, header.mode) == (131, 67, expected.mode)
    assert header.format.upper() == expected.format and header.orientation == 1


def test_an_animated_webp_has_the_mode_of_its_canvas() -> None:
    frames = [Image.new("RGBA", (9, 8), (index, 0, 0, 100 * index)) for index in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_header(file.getvalue(), "x") == PictureHeader("WebP", 9, 8, Image.open(file).mode)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_found_in_every_format(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    assert read_header(saved(form, exif=exif), "x").orientation == orientation


@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        (tiff("<", 8), 8),
        (tiff(">", 8), 8),
        (b"Exif\0\0" + tiff(">", 5, before=3), 5),
        (tiff("<", 9), 1),
        (tiff("<", 0), 1),
        (tiff("<", 6, kind=4), 1),
        (tiff("<", 6, count=2), 1),
        (tiff("<", 6)[:19], 1),
        (b"II*\0\xff\xff\xff\xff", 1),
        (b"", 1),
        (b"nonsense", 1),
    ],
)
def test_odd_orientations_mean_upright(exif: bytes, expected: int) -> None:
    assert exif_orientation(exif) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x: the file is empty; expected a PNG, JPEG, WebP or BMP picture"),
        (b"GIF89a....", "expected a PNG, JPEG, WebP or BMP picture, got a GIF; convert it first"),
        (b"\0\0\0\x20ftypheic", "got a HEIC; convert it first"),
        (b"\0\0\0\x20ftypavif", "got an AVIF"),
        (b"\0\0\0\x20ftypisom", "got a video"),
        (b"II*\0rest", "got a TIFF"),
        (b"<html><body>not found", "got a text file"),
        (b"hello", "got a file that begins with 68 65 6c 6c 6f"),
        (b"\x89PNG\n\x1a\n", "got a PNG that a text-mode transfer damaged"),
        (png()[:8], r"x: the picture is cut short \(its header does not fit into 8 bytes\)"),
        (png()[:20], r"x: the picture is cut short \(its header does not fit into 20 bytes\)"),
        (png(width=0), "this PNG says it is 0 x 5 pixels; the file is damaged"),
        (png().replace(b"IHDR", b"IDAT", 1), "does not begin with its header chunk; the file is damaged"),
        (saved("JPEG")[:50], "the picture is cut short"),
        (b"\xff\xd8\xff\xd9", "this JPEG has no frame header"),
        (b"\xff\xd8" + b"\xff\xc0\0\x08\x08\0\1\0\1\3" * 2 + b"\xff\xda\0\2", "this JPEG has two frame headers"),
        (b"\xff\xd8\xff\xc0\0\x08\x0c\0\1\0\1\3\xff\xda\0\2", "a JPEG with 3 layers of 12 bits cannot be read; save"),
        (b"\xff\xd8\xff\xc0\0\x08\x08\0\1\0\1\2\xff\xda\0\2", "a JPEG with 2 layers of 8 bits cannot be read"),
        (b"\xff\xd8\xff\xc0\0\x08\x08\0\0\0\1\3\xff\xda\0\2", "this JPEG says it is 1 x 0 pixels"),
        (saved("WEBP")[:14], "the picture is cut short"),
        (b"RIFF\0\0\0\0WEBPJUNK\0\0\0\0", "this WebP begins with an unknown chunk b'JUNK'"),
        (b"RIFF\0\0\0\0WEBPVP8 \x0a\0\0\0" + bytes(10), "this WebP has no key frame"),
        (b"RIFF\0\0\0\0WEBPVP8L\x0a\0\0\0" + bytes(10), "this lossless WebP lacks its signature"),
    ],
)
def test_each_unusable_header_has_its_message(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(data, "x")


@pytest.mark.parametrize("name", VALID)
def test_whole_files_are_complete(name: str) -> None:
    check_complete(VALID[name], read_header(VALID[name], name), name)
    check_complete(VALID[name] + b"trailing bytes", read_header(VALID[name], name), name)


@pytest.mark.parametrize("name", VALID)
def test_every_cut_is_noticed(name: str) -> None:
    """Cut after any byte, the file is refused. (A BMP may lack the padding of its last row.)"""
    data = VALID[name]
    header = read_header(data, name)
    for length in range(len(data) - (3 if name == "bmp" else 0)):
        with pytest.raises(InputError):
            check_complete(data[:length], header, name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png()[:-12], "the end mark of a PNG is missing"),
        (png(extra=chunk(b"IHDR", png()[16:29])), "this PNG has two headers"),
        (png().replace(b"IDAT", b"iDOT"), "this PNG has no pixels"),
        (png()[:-14] + b"??" + png()[-12:], "the checksum of the PNG chunk b'IDAT' does not match its content"),
        (saved("JPEG")[:-2], "the end mark of a JPEG is missing"),
        (saved("WEBP")[:-2], "bytes were announced and"),
    ],
)
def test_incomplete_files_have_their_messages(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_complete(data, read_header(data, "x"), "x")


def test_a_wrong_checksum_of_a_note_does_not_matter() -> None:
    note = bytearray(chunk(b"tEXt", b"Title\0x"))
    note[-1] ^= 1
    data = png(extra=bytes(note))
    check_complete(data, read_header(data, "x"), "x")


def read_all(data: bytes) -> None:
    """Everything a stranger's bytes go through before a decoder; only InputError may come out."""
    try:
        check_complete(data, read_header(data, "x"), "x")
    except InputError as error:
        assert str(error).startswith("x: ")


STARTS = [b"", b"\x89PNG\r\n\x1a\n", png()[:33], b"\xff\xd8\xff", b"RIFF\0\1\0\0WEBP", b"BM", VALID["bmp"][:54]]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=200))
@example(b"RIFF\0\1\0\0WEBP", b"VP8X")
@example(b"\xff\xd8\xff", b"\xda")
def test_random_bytes_give_only_input_errors(start: bytes, rest: bytes) -> None:
    read_all(start + rest)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_edited_files_give_only_input_errors(name: str, draw: st.DataObject) -> None:
    data = bytearray(VALID[name])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, min(len(data), 200) - 1))] = draw.draw(st.integers(0, 255))
    read_all(bytes(data[: draw.draw(st.integers(0, len(data)))]))

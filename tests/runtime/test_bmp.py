"""BMP files against Pillow: every depth, palettes of both header kinds, bit masks, and files that end early."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mammut_runtime.bmp import palette_colors
from mammut_runtime.errors import InputError
from mammut_runtime.picture_headers import read_header
from mammut_runtime.pictures import read_picture

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def bmp(
    width: int,
    height: int,
    bits: int,
    *,
    palette: bytes = b"",
    masks: tuple[int, ...] = (),
    header: int = 40,
    colors: int = 0,
    seed: int = 0,
    compression: int | None = None,
) -> bytes:
    """A BMP of random pixels. A negative height stores the rows from the top."""
    rows = np.random.default_rng(seed).integers(0, 256, abs(height) * ((width * bits + 31) // 32 * 4), dtype=np.uint8)
    packed = struct.pack(f"<{len(masks)}I", *masks)
    kind = (3 if masks else 0) if compression is None else compression
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, kind, rows.size, 0, 0, colors, 0)
        info += packed[: header - 40].ljust(header - 40, b"\0")
    extra = packed if header == 40 else b""
    offset = 14 + len(info) + len(extra) + len(palette)
    return struct.pack("<2sIII", b"BM", offset + rows.size, 0, offset) + info + extra + palette + rows.tobytes()


def same_as_pillow(data: bytes) -> str:
    """Compare mode and pixels; the mode, for tests that want to know it."""
    expected = Image.open(io.BytesIO(data))
    ours = read_picture(data)
    assert ours.mode == expected.mode
    shown = expected.convert("RGB") if ours.mode == "P" else expected
    values = np.asarray(shown).astype(np.uint8) * (255 if ours.mode == "1" else 1)
    assert np.array_equal(ours.pixels, values)
    return ours.mode


def ramp(colors: int, entry: int = 4) -> bytes:
    return b"".join(bytes([value] * 3).ljust(entry, b"\0") for value in range(colors))


def mixed(colors: int, entry: int = 4) -> bytes:
    return bytes(np.random.default_rng(colors).integers(0, 256, colors * entry, dtype=np.uint8))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 20), st.booleans(), st.sampled_from([1, 4, 8, 16, 24, 32]), st.integers(0, 99)
)
def test_plain_files_equal_pillow(width: int, height: int, top_down: bool, bits: int, seed: int) -> None:
    palette = mixed(1 << bits) if bits <= 8 else b""
    mode = same_as_pillow(bmp(width, -height if top_down else height, bits, palette=palette, seed=seed))
    assert mode == ("P" if bits <= 8 else "RGB")


@pytest.mark.parametrize("bits", [1, 4, 8, 24])
def test_the_oldest_header_equals_pillow(bits: int) -> None:
    same_as_pillow(bmp(13, 7, bits, palette=mixed(1 << bits, 3) if bits <= 8 else b"", header=12))


def test_palettes_that_are_grey_ramps_are_grey_pictures() -> None:
    assert same_as_pillow(bmp(13, 7, 8, palette=ramp(256))) == "L"
    assert same_as_pillow(bmp(13, 7, 1, palette=b"\0\0\0\0\xff\xff\xff\0")) == "1"
    assert same_as_pillow(bmp(13, 7, 1, palette=b"\xff\xff\xff\0\0\0\0\0")) == "P"


def test_a_short_palette_leaves_black_as_in_pillow() -> None:
    same_as_pillow(bmp(13, 7, 8, palette=mixed(10), colors=10))
    assert palette_colors(b"\1\2\3")[0].tolist() == [1, 2, 3] and palette_colors(b"\1\2\3")[1:].max() == 0


@pytest.mark.parametrize(
    ("bits", "masks", "mode"),
    [
        (16, (0xF800, 0x7E0, 0x1F), "RGB"),
        (16, (0x7C00, 0x3E0, 0x1F), "RGB"),
        (32, (0xFF0000, 0xFF00, 0xFF), "RGB"),
        (32, (0xFF000000, 0xFF0000, 0xFF00), "RGB"),
        (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000), "RGBA"),
        (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), "RGBA"),
        (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF), "RGBA"),
        (32, (0xFF000000, 0xFF00, 0xFF, 0xFF0000), "RGBA"),
    ],
)
def test_bit_masks_equal_pillow(bits: int, masks: tuple[int, ...], mode: str) -> None:
    assert same_as_pillow(bmp(9, 5, bits, masks=masks, header=108)) == mode
    if mode == "RGB":
        assert same_as_pillow(bmp(9, 5, bits, masks=masks)) == mode


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bmp(5, 5, 8, palette=ramp(256), compression=1), r"x: a BMP of 8 bits with compression 1 cannot be read; save"),
        (bmp(5, 5, 32, masks=(1, 2, 4)), r"x: a BMP of 32 bits with masks 1, 2, 4, 0 cannot be read"),
        (bmp(5, 5, 2, palette=ramp(4)), r"x: a BMP of 2 bits with compression 0 cannot be read"),
        (bmp(5, 5, 24, header=12).replace(b"\x0c\0\0\0", b"\x0d\0\0\0", 1), r"x: a BMP with a header of 13 bytes"),
        (bmp(5, 5, 8, palette=ramp(256))[:200], r"x: the picture is cut short \(its palette is not whole\); copy"),
        (bmp(5, 5, 24)[:40], r"x: the picture is cut short \(its header does not fit into 40 bytes\)"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(data, "x")


def test_missing_rows_are_an_error_and_missing_padding_is_not() -> None:
    data = bmp(5, 5, 24)
    assert np.array_equal(read_picture(data[:-1]).pixels, read_picture(data).pixels)
    with pytest.raises(InputError, match=r"picture: the picture is cut short \(133 bytes are needed and 132 came\)"):
        read_picture(data[:-2])

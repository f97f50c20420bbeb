"""Reads BMP files: header, palette and pixels, in plain numpy.

OpenCV reads BMP too, but spreads 16-bit colours differently and hides the palette; uncompressed rows are simple
enough to read here. Run-length compression and embedded JPEG are refused by name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mammut_runtime.picture_errors import cut_short, unsupported

U8 = npt.NDArray[np.uint8]

_MASKS_32 = {
    (0xFF0000, 0xFF00, 0xFF, 0x0): (2, 1, 0),
    (0xFF000000, 0xFF0000, 0xFF00, 0x0): (3, 2, 1),
    (0xFF000000, 0xFF00, 0xFF, 0x0): (3, 1, 0),
    (0xFF000000, 0xFF0000, 0xFF00, 0xFF): (3, 2, 1, 0),
    (0xFF, 0xFF00, 0xFF0000, 0xFF000000): (0, 1, 2, 3),
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000): (2, 1, 0, 3),
    (0xFF000000, 0xFF00, 0xFF, 0xFF0000): (3, 1, 0, 2),
    (0x0, 0x0, 0x0, 0x0): (2, 1, 0, 3),
}
"""Bit masks of red, green, blue, alpha to the byte of each inside a pixel: the layouts that Pillow reads too."""


@dataclass(frozen=True)
class BmpLayout:
    """How the rows of an uncompressed BMP lie in the file."""

    width: int
    height: int
    mode: str
    bits: int
    top_down: bool
    offset: int
    """Where the first row begins, in bytes."""
    palette: bytes
    """B, G, R per colour; empty where the pixels are colours themselves."""
    channels: tuple[int, ...]
    """For 24 and 32 bits: which byte of a pixel is red, green, blue and, in mode RGBA, alpha."""
    green_bits: int
    """For 16 bits: 5 or 6."""

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return (self.width * self.bits + 31) // 32 * 4


def read_bmp_layout(data: bytes, name: str) -> BmpLayout:
    """Parse the headers and the palette of a BMP. Raises InputError, or struct.error where the data ends."""
    offset, size = struct.unpack_from("<I", data, 10)[0], struct.unpack_from("<I", data, 14)[0]
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, colors, top_down, entry = 0, 0, False, 3
    elif size in (40, 52, 56, 64, 108, 124):
        width, height, _, bits, compression, colors = struct.unpack_from("<IiHHI12xI", data, 18)
        top_down, height, entry = height < 0, abs(height), 4
    else:
        raise unsupported(name, f"a BMP with a header of {size} bytes")
    if bits not in (1, 4, 8, 16, 24, 32) or compression not in (0, 3) or (compression == 3 and bits < 16):
        raise unsupported(name, f"a BMP of {bits} bits with compression {compression}")
    channels: tuple[int, ...] = (2, 1, 0) if bits >= 24 else ()
    green_bits = 5
    if compression == 3:
        channels, green_bits = _masks(data, size, bits, name)
    mode, palette = ("RGBA" if len(channels) == 4 else "RGB"), b""
    if bits <= 8:
        colors = colors or 1 << bits
        mode, palette = _palette(data, 14 + size, min(colors, 256), entry, bits, name)
        if offset == 14 + size:
            offset += entry * colors
    return BmpLayout(width, height, mode, bits, top_down, offset or 14 + size, palette, channels, green_bits)


def _masks(data: bytes, size: int, bits: int, name: str) -> tuple[tuple[int, ...], int]:
    """The channel bytes (24 and 32 bits) or the width of green (16 bits) that the bit masks describe."""
    red, green, blue = masks = struct.unpack_from("<III", data, 54)
    alpha = struct.unpack_from("<I", data, 66)[0] if size >= 56 else 0
    if bits == 32 and (*masks, alpha) in _MASKS_32:
        return _MASKS_32[red, green, blue, alpha], 5
    if bits == 24 and masks == (0xFF0000, 0xFF00, 0xFF):
        return (2, 1, 0), 5
    if bits == 16 and masks in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)):
        return (), 6 if green == 0x7E0 else 5
    raise unsupported(name, f"a BMP of {bits} bits with masks {red:x}, {green:x}, {blue:x}, {alpha:x}")


def _palette(data: bytes, start: int, colors: int, entry: int, bits: int, name: str) -> tuple[str, bytes]:
    """The mode and the B, G, R bytes. Palettes that are a plain grey ramp are grey pictures, as in Pillow."""
    if start + entry * colors > len(data):
        raise cut_short(name, "its palette is not whole")
    palette = b"".join(data[start + entry * i : start + entry * i + 3] for i in range(colors))
    if bits == 1 and palette == bytes([0, 0, 0, 255, 255, 255]):
        return "1", palette
    if bits == 8 and colors != 2 and palette == bytes(i for i in range(colors) for _ in range(3)):
        return "L", palette
    return "P", palette


def check_bmp(data: bytes, name: str) -> None:
    """Raise InputError when rows are missing at the end."""
    layout = read_bmp_layout(data, name)
    needed = layout.offset + layout.stride * (layout.height - 1) + (layout.width * layout.bits + 7) // 8
    if needed > len(data):
        raise cut_short(name, f"{needed} bytes are needed and {len(data)} came")


def decode_bmp(data: bytes, layout: BmpLayout) -> U8:
    """The pixels of data that has passed `check_bmp`.

    uint8[H, W] for modes 1 (0 or 255) and L, uint8[H, W, 3] for P and RGB, uint8[H, W, 4] for RGBA.
    """
    row_bytes = (layout.width * layout.bits + 7) // 8
    # the padding of the last row may be missing in the file
    size = layout.stride * (layout.height - 1) + row_bytes
    flat = np.zeros(layout.stride * layout.height, np.uint8)
    flat[:size] = np.frombuffer(data, np.uint8, size, layout.offset)
    rows = flat.reshape(layout.height, layout.stride)[:, :row_bytes]
    if not layout.top_down:
        rows = rows[::-1]
    if layout.bits >= 24:
        pixels = rows.reshape(layout.height, layout.width, layout.bits // 8)
        return np.ascontiguousarray(pixels[:, :, list(layout.channels)])
    if layout.bits == 16:
        return _high_color(np.ascontiguousarray(rows).view("<u2"), layout.green_bits)
    index = _indices(rows, layout.bits)[:, : layout.width]
    if layout.mode in ("1", "L"):
        return np.ascontiguousarray(index) * np.uint8(255 if layout.mode == "1" else 1)
    return palette_colors(layout.palette)[index][:, :, ::-1].copy()


def _indices(rows: U8, bits: int) -> U8:
    """uint8[H, at least W]: palette indices, of which 8, 2 or 1 share a byte, the first in the highest bits."""
    if bits == 8:
        return rows
    if bits == 4:
        return np.stack([rows >> 4, rows & 15], axis=2).reshape(len(rows), -1)
    return np.unpackbits(rows, axis=1)


def _high_color(values: npt.NDArray[np.uint16], green_bits: int) -> U8:
    """uint8[H, W, 3] from 5 bits of blue, `green_bits` of green and 5 bits of red."""
    fields = ((5 + green_bits, 31), (5, (1 << green_bits) - 1), (0, 31))
    return np.stack(
        [((values >> shift & mask).astype(np.uint32) * 255 // mask).astype(np.uint8) for shift, mask in fields], 2
    )


def palette_colors(palette: bytes) -> U8:
    """uint8[256, 3] in the order of the bytes; entries that the file does not have are black."""
    colors = np.zeros((256, 3), np.uint8)
    given = np.frombuffer(palette[: colors.size], np.uint8)
    colors.reshape(-1)[: given.size] = given
    return colors

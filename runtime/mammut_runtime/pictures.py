"""Picture files to arrays: the only place where one is decoded.

Size and completeness are judged from the header before OpenCV sees the data (`picture_headers`), because OpenCV would
allocate whatever a header claims. A `Picture` keeps the mode that Pillow would name, since the preprocess resizes each
mode in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mammut_runtime.bmp import decode_bmp, palette_colors, read_bmp_layout
from mammut_runtime.errors import InputError
from mammut_runtime.picture_errors import damaged
from mammut_runtime.picture_headers import PNG_START, PictureHeader, check_complete, png_chunks, read_header

__all__ = ["Picture", "PictureHeader", "read_header", "read_picture", "to_rgb"]

U8 = npt.NDArray[np.uint8]

MAX_SIDE = 65_535
"""Longest side in pixels, whatever the area: the limit of JPEG, and well inside OpenCV's own."""
_MOST_BYTES_PER_PIXEL = 8
"""16-bit RGBA, stored without compression. A longer file is not worth reading into memory."""
_SPARE_BYTES = 16 * 2**20
"""For what a file holds beside its pixels: previews, colour profiles, notes."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, in the mode it was stored in."""

    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    """uint8[H, W] for modes 1 (0 or 255) and L; uint8[H, W, 2] grey and alpha for LA; uint8[H, W, 3] for RGB, P
    (through its palette) and CMYK (as OpenCV converts it); uint8[H, W, 4] for RGBA, alpha not multiplied in;
    uint16[H, W] for I;16."""
    mode: str
    """"1", "L", "LA", "P", "RGB", "RGBA", "I;16" or "CMYK", as Pillow names it."""
    name: str
    """Path of the file, for messages."""
    palette: U8 | None = None
    """uint8[256, 3] for mode P, else None. Only padding reads it: Pillow pads palette pictures by entry number."""

    def rgb(self) -> U8:
        """uint8[H, W, 3] at full size, as Pillow's convert("RGB"): alpha is dropped, 16-bit grey clips at 255."""
        return to_rgb(self.pixels, self.mode)

    def palette_color(self, index: int) -> tuple[int, int, int]:
        """Red, green, blue of one palette entry; black without a palette."""
        if self.palette is None:
            return 0, 0, 0
        red, green, blue = (int(value) for value in self.palette[index])
        return red, green, blue


def to_rgb(pixels: Any, mode: str) -> U8:
    """uint8[H, W, 3] from the pixels of any mode."""
    if mode == "I;16":
        pixels = np.minimum(pixels, 255).astype(np.uint8)
    if mode == "LA":
        pixels = pixels[:, :, 0]
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def read_picture(
    source: str | Path | bytes, *, upright: bool = True, max_pixels: int = 100_000_000, name: str = "picture"
) -> Picture:
    """Read a PNG, JPEG, WebP or BMP; of an animation the first frame.

    source: a path, or the bytes of a file (then `name` stands for it in messages). upright: turn the picture as its
    EXIF orientation says; False leaves it as it is stored, which is what the public preprocess does. max_pixels:
    refuse larger pictures from their header, before decoding. CMYK is converted by OpenCV, up to 3 levels of 255 from
    Pillow. Raises InputError when the file is missing, empty, too large, not a picture, cut short or damaged.
    """
    data, name = (source, name) if isinstance(source, bytes) else (_read_file(Path(source), max_pixels), str(source))
    header = read_header(data, name)
    check_size(header, max_pixels, name)
    check_complete(data, header, name)
    pixels, palette = _decode(data, header, name)
    return Picture(_turned(pixels, header.orientation) if upright else pixels, header.mode, name, palette)


def _read_file(path: Path, max_pixels: int) -> bytes:
    """The bytes of an ordinary file that is not absurdly large."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file; check the path")
        if not path.is_file():
            raise InputError(
                f"{path}: expected a picture file, got {'a folder' if path.is_dir() else 'something else'}"
            )
        size, limit = path.stat().st_size, max_pixels * _MOST_BYTES_PER_PIXEL + _SPARE_BYTES
        if size > limit:
            raise InputError(
                f"{path}: {size / 1e6:,.0f} MB, expected at most {limit / 1e6:,.0f} MB for a picture of "
                f"{max_pixels:,} pixels; shrink it first (in Python, read_picture takes a larger max_pixels)"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path and its permissions") from error


def check_size(header: PictureHeader, max_pixels: int, name: str) -> None:
    """Raise InputError when a picture is larger than allowed, from its header alone."""
    width, height = header.width, header.height
    if width * height > max_pixels:
        raise InputError(
            f"{name}: {width:,} x {height:,} pixels are {width * height / 1e6:,.1f} million, expected at most "
            f"{max_pixels / 1e6:,.1f} million; shrink it first (in Python, read_picture takes a larger max_pixels)"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name}: {width:,} x {height:,} pixels, expected sides of at most {MAX_SIDE:,}; cut it into parts"
        )


def _decode(data: bytes, header: PictureHeader, name: str) -> tuple[Any, U8 | None]:
    """Pixels as stored, in the layout of `Picture.pixels`, and the palette of mode P."""
    if header.format == "BMP":
        layout = read_bmp_layout(data, name)
        palette = palette_colors(layout.palette)[:, ::-1] if header.mode == "P" else None
        return decode_bmp(data, layout), palette
    if header.format == "PNG":
        bare, palette = _pixels_only(data)
        pixels = _in_mode(_opencv(bare, cv2.IMREAD_UNCHANGED, header, name), header.mode)
        return pixels, palette if header.mode == "P" else None
    flags = cv2.IMREAD_UNCHANGED
    if header.format == "JPEG":
        flags = cv2.IMREAD_IGNORE_ORIENTATION | (cv2.IMREAD_GRAYSCALE if header.mode == "L" else cv2.IMREAD_COLOR)
    return _in_mode(_opencv(data, flags, header, name), header.mode), None


def _opencv(data: bytes, flags: int, header: PictureHeader, name: str) -> Any:
    """What OpenCV makes of the data; its refusals become InputError."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise damaged(name, f"the pixels of this {header.format} cannot be decoded")
    if pixels.shape[:2] != (header.height, header.width):
        announced, held = f"{header.width} x {header.height}", f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise damaged(name, f"this {header.format} announces {announced} pixels and holds {held}")
    return pixels


def _pixels_only(data: bytes) -> tuple[bytes, U8 | None]:
    """A PNG of the chunks that make its pixels, and its palette.

    Transparency of palette and single colours is left out, as Pillow ignores it here; animation frames too. Decoders
    warn on the terminal about odd colour profiles and notes: they never see them.
    """
    kept, palette = [PNG_START], None
    for chunk in png_chunks(data):
        if chunk.kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[chunk.start - 8 : chunk.end + 4])
        if chunk.kind == b"PLTE":
            palette = palette_colors(data[chunk.start : chunk.end])
    return b"".join(kept), palette


def _in_mode(pixels: Any, mode: str) -> Any:
    """OpenCV's grey, BGR or BGRA in 8 or 16 bits, as the mode has it."""
    if pixels.dtype == np.uint16 and mode != "I;16":
        pixels = (pixels >> 8).astype(np.uint8)
    if mode in ("1", "L", "I;16"):
        return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, 0])
    if mode == "LA":
        return np.ascontiguousarray(pixels[:, :, [0, 3]])
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if mode == "RGBA":
        return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGBA)
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _turned(pixels: Any, orientation: int) -> Any:
    """The pixels as the EXIF orientation wants them seen: 5 to 8 swap the axes, then rows and columns are mirrored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)

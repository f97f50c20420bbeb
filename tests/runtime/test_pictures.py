"""Decoding against Pillow in every mode, orientation, limits, damage, and what the terminal gets to see."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, read_picture

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int, color: int, extra: bytes = b"", *, seed: int = 0, rows: bytes | None = None
) -> bytes:
    """A PNG of random samples of any bit depth and colour type, row filter 0, no interlacing."""
    row_bytes = (width * CHANNELS[color] * depth + 7) // 8
    if rows is None:
        noise = np.random.default_rng(seed).integers(0, 256, (height, row_bytes + 1), dtype=np.uint8)
        noise[:, 0] = 0
        rows = noise.tobytes()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def extras(color: int, depth: int, transparent: bool) -> bytes:
    """The palette that colour type 3 needs, and a tRNS chunk."""
    entries = np.random.default_rng(depth).integers(0, 256, 3 << min(depth, 8), dtype=np.uint8).tobytes()
    found = chunk(b"PLTE", entries) if color == 3 else b""
    if transparent:
        found += chunk(b"tRNS", {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x64"}[color])
    return found


def photo(height: int = 40, width: int = 60) -> Image.Image:
    """Something smooth, so that JPEG and WebP have little to invent."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4 % 256, y * 6 % 256, (x + y) * 2 % 256], axis=2).astype(np.uint8))


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def as_pillow_has_it(data: bytes) -> tuple[str, np.ndarray[Any, Any]]:
    """Mode and pixels in the layout of Picture.pixels."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode == "P":
        return "P", np.asarray(picture.convert("RGB"))
    if picture.mode == "1":
        return "1", np.asarray(picture.convert("L"))
    return picture.mode, np.asarray(picture)


FORMS = [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (2, 3), (4, 3), (8, 3)]
OPAQUE_ONLY = [(8, 4), (16, 4), (8, 6), (16, 6)]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    ("depth", "color", "transparent"),
    [(*form, transparent) for form in FORMS for transparent in (False, True)]
    + [(*form, False) for form in OPAQUE_ONLY],
)
def test_every_png_form_equals_pillow(depth: int, color: int, transparent: bool) -> None:
    data = png(13, 7, depth, color, extras(color, depth, transparent))
    mode, pixels = as_pillow_has_it(data)
    ours = read_picture(data)
    assert ours.mode == mode and ours.pixels.dtype == pixels.dtype and np.array_equal(ours.pixels, pixels)
    assert np.array_equal(ours.rgb(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert (ours.palette is None) == (mode != "P")


def test_the_palette_is_the_files_own() -> None:
    data = png(4, 4, 8, 3, chunk(b"PLTE", bytes(range(9))))
    picture = read_picture(data)
    assert [picture.palette_color(index) for index in (0, 2, 3)] == [(0, 1, 2), (6, 7, 8), (0, 0, 0)]
    assert np.array_equal(picture.pixels, as_pillow_has_it(data)[1])
    assert Picture(picture.pixels, "P", "x").palette_color(1) == (0, 0, 0)
    # a true-colour picture may suggest a palette; its mode has none
    assert read_picture(png(4, 4, 8, 2, chunk(b"PLTE", bytes(9)))).palette is None


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 60}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0}),
        ("JPEG", "RGB", {"subsampling": 1}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "RGB", {"restart_marker_blocks": 2}),
        ("JPEG", "L", {}),
        ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("PNG", "RGB", {"optimize": True}),
        ("BMP", "RGB", {}),
    ],
)
def test_other_formats_equal_pillow(form: str, mode: str, options: dict[str, Any]) -> None:
    picture = photo().convert(mode)
    if mode == "RGBA":
        picture.putalpha(photo().convert("L"))
    data = saved(picture, form, **options)
    expected_mode, pixels = as_pillow_has_it(data)
    ours = read_picture(data)
    assert ours.mode == expected_mode and np.array_equal(ours.pixels, pixels)


def test_cmyk_is_close_to_pillow() -> None:
    data = saved(photo(200, 300).convert("CMYK"), "JPEG", quality=95)
    ours = read_picture(data)
    assert ours.mode == "CMYK" and ours.pixels.shape == (200, 300, 3)
    difference = np.abs(ours.rgb().astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert difference.max() <= 3


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [photo(), photo().rotate(180), photo().convert("L").convert("RGB")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(read_picture(data).pixels, np.asarray(frames[0]))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_unless_told_otherwise(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(), form, exif=exif)
    stored = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(stored)
    assert np.array_equal(read_picture(data).pixels, np.asarray(upright))
    assert np.array_equal(read_picture(data, upright=False).pixels, np.asarray(stored))
    assert (upright.size == stored.size) == (orientation < 5)


def test_rgb_drops_alpha_and_clips_sixteen_bits() -> None:
    deep = Picture(np.array([[0, 200, 255, 256, 65535]], np.uint16), "I;16", "x")
    assert deep.rgb()[0, :, 1].tolist() == [0, 200, 255, 255, 255]
    assert Picture(np.array([[[9, 0]]], np.uint8), "LA", "x").rgb().tolist() == [[[9, 9, 9]]]
    assert Picture(np.array([[[1, 2, 3, 0]]], np.uint8), "RGBA", "x").rgb().tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (60_000, 60_000, r"60,000 x 60,000 pixels are 3,600.0 million, expected at most 100.0 million; shrink it"),
        (100_000, 900, r"100,000 x 900 pixels, expected sides of at most 65,535; cut it into parts"),
        (2**31 - 1, 1, r"expected at most 100.0 million"),
    ],
)
def test_huge_pictures_are_refused_from_their_header(width: int, height: int, message: str) -> None:
    bomb = png(width, height, 8, 2, rows=b"\0")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read_picture(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_is_a_setting() -> None:
    data = png(30, 20, 8, 2)
    assert read_picture(data, max_pixels=600).pixels.shape == (20, 30, 3)
    with pytest.raises(InputError, match=r"picture: 30 x 20 pixels are .*a larger max_pixels"):
        read_picture(data, max_pixels=599)


def test_files_are_read_from_paths(tmp_path: Path) -> None:
    path = tmp_path / "a photo.png"
    path.write_bytes(png(5, 4, 8, 2))
    assert read_picture(path).name == str(path) and read_picture(str(path)).pixels.shape == (4, 5, 3)
    assert read_picture(path.read_bytes(), name="frame 3").name == "frame 3"


def test_unusable_paths_have_their_messages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png: no such file; check the path"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(InputError, match="expected a picture file, got a folder"):
        read_picture(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match=r"empty\.jpg: the file is empty; expected a PNG, JPEG, WebP or BMP picture"):
        read_picture(tmp_path / "empty.jpg")
    with (tmp_path / "long.bmp").open("wb") as file:
        file.truncate(20_000_000)
    with pytest.raises(InputError, match=r"20 MB, expected at most 17 MB for a picture of 1,000 pixels; shrink it"):
        read_picture(tmp_path / "long.bmp", max_pixels=1000)
    with pytest.raises(InputError, match="cannot be read"):
        read_picture("n" * 5000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a picture file, got something else"):
        read_picture(tmp_path / "pipe")


DAMAGED = {
    "short rows": png(40, 30, 8, 2, rows=bytes(100)),
    "not deflated": png(4, 3, 8, 2)[:33] + chunk(b"IDAT", b"not deflated") + chunk(b"IEND", b""),
    "palette missing": png(4, 3, 8, 3),
    "jpeg without scans": b"\xff\xd8\xff\xc0\0\x0b\x08\0\4\0\4\1\1\x11\0\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9",
    "webp of zeros": b"RIFF\x22\0\0\0WEBPVP8 \x16\0\0\0\0\0\0\x9d\x01\x2a\x04\0\x04\0" + bytes(12),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_that_only_the_decoder_sees_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: "):
        read_picture(DAMAGED[name], name=name)


FILES = {
    "png": png(12, 9, 8, 2),
    "jpeg": saved(photo(), "JPEG"),
    "webp": saved(photo(), "WEBP"),
    "bmp": saved(photo(8, 8), "BMP"),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_edited_files_give_a_picture_or_an_input_error(name: str, draw: st.DataObject) -> None:
    data = bytearray(FILES[name])
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        picture = read_picture(bytes(data), max_pixels=100_000)
    except InputError:
        return
    assert picture.rgb().ndim == 3


def test_cut_and_badly_labelled_files_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """OpenCV and libpng write to stderr by themselves; what we can know beforehand they do not get to see."""
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"nonsense"))
    read_picture(png(6, 5, 8, 2, profile + chunk(b"gAMA", b"\0\0\0\0") + chunk(b"sRGB", b"\x63")))
    for data in FILES.values():
        for length in (len(data) // 3, len(data) // 2, len(data) - 4):
            with pytest.raises(InputError):
                read_picture(data[:length])
    assert capfd.readouterr() == ("", "")


@pytest.mark.shared
def test_real_photos_equal_pillow() -> None:
    archives = sorted((SHARED / "pairs").glob("*.tar"))
    if not archives:
        pytest.skip("needs ../shared/data/pairs beside the repository")
    compared = 0
    for archive in archives:
        with tarfile.open(archive) as files:
            for member in [file for file in files if file.name.endswith(".jpg")][::40]:
                stored = files.extractfile(member)
                assert stored is not None
                data = stored.read()
                assert np.array_equal(
                    read_picture(data, upright=False).pixels, np.asarray(Image.open(io.BytesIO(data)))
                )
                compared += 1
    assert compared > 100


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_real_drawings_equal_pillow() -> None:
    drawings = sorted((SHARED / "emoji").glob("*/*.png"))[::40]
    if not drawings:
        pytest.skip("needs ../shared/data/emoji beside the repository")
    for path in drawings:
        mode, pixels = as_pillow_has_it(path.read_bytes())
        ours = read_picture(path, upright=False)
        assert ours.mode == mode and np.array_equal(ours.pixels, pixels)

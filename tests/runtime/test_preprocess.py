"""The preprocess against Pillow in every mode and rule, the rule's reader, and the fast mode's distance."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture, read_picture
from mammut_runtime.preprocess import MAX_SIZE, Placement, Preprocessor, PreprocessRule, halved, place
from mammut_runtime.resample import Axis

KIT = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "preprocess"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RULE = PreprocessRule(64, MEAN, STD)
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = ["1", "L", "LA", "P", "P with alpha", "RGB", "RGBA", "I;16"]


def by_pillow(picture: Image.Image, rule: PreprocessRule) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The public preprocess, step by step: resize, pad, crop, and conversion to RGB last."""
    size, (width, height) = rule.size, picture.size
    if rule.resize_mode == "squash":
        wanted = size, size
    elif rule.resize_mode == "longest":
        ratio = max(width / size, height / size)
        wanted = max(round(width / ratio), 1), max(round(height / ratio), 1)
    else:
        short, long = min(width, height), max(width, height)
        wanted = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    picture = picture if wanted == picture.size else picture.resize(wanted, PILLOW[rule.interpolation])
    if min(picture.size) < size:
        spare = size - picture.width, size - picture.height
        bands = len(picture.getbands())
        border = (spare[0] // 2, spare[1] // 2, (spare[0] + 1) // 2, (spare[1] + 1) // 2)
        picture = ImageOps.expand(picture, border, rule.fill if bands == 1 else (rule.fill,) * bands)
    left, top = round((picture.width - size) / 2.0), round((picture.height - size) / 2.0)
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


def stored(mode: str, width: int, height: int, seed: int, hard: bool) -> bytes:
    """A PNG of noise in one of MODES; hard: only the extreme values."""
    source = np.random.default_rng(seed)
    options: dict[str, Any] = {}

    def noise(channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        values = source.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return np.where(values > 127, 255, 0).astype(np.uint8) if hard else values

    if mode == "1":
        picture = Image.fromarray(noise(1)[:, :, 0]).convert("1", dither=Image.Dither.NONE)
    elif mode == "I;16":
        picture = Image.fromarray(noise(1)[:, :, 0].astype(np.uint16) * np.uint16(1 + seed % 3 * 128))
    elif mode.startswith("P"):
        picture = Image.fromarray(noise(1)[:, :, 0] % 16)
        picture.putpalette(source.integers(0, 256, 48, dtype=np.uint8).tobytes())
        options = {"transparency": bytes(range(0, 160, 10))} if "alpha" in mode else {}
    else:
        channels = len(mode)
        picture = Image.fromarray(noise(channels)[:, :, 0] if channels == 1 else noise(channels), mode)
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency", "ignore:'mode' parameter is deprecated")
@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(MODES),
    st.integers(1, 120) | st.integers(1, 8),
    st.integers(1, 120) | st.integers(1, 700),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([1, 2, 16, 31, 64]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from(["shortest", "longest", "squash"]),
    st.sampled_from([0, 3, 127, 255]),
)
@example("RGBA", 64, 64, 0, False, 64, "bicubic", "shortest", 0)
@example("I;16", 1, 700, 1, True, 16, "bicubic", "longest", 255)
def test_every_mode_and_rule_equals_pillow(
    mode: str,
    width: int,
    height: int,
    seed: int,
    hard: bool,
    size: int,
    interpolation: Any,
    resize_mode: Any,
    fill: int,
) -> None:
    rule = PreprocessRule(size, MEAN, STD, interpolation, resize_mode, fill)
    for data in (stored(mode, width, height, seed, hard), stored(mode, height, width, seed, hard)):
        expected = by_pillow(Image.open(io.BytesIO(data)), rule)
        ours = Preprocessor(rule).pixels_u8(read_picture(data))
        assert ours.shape == (size, size, 3) and np.array_equal(ours, expected)


def test_converting_to_rgb_first_would_show() -> None:
    """The control of the test above: with alpha, palette or 16 bits the order of the steps matters."""
    for mode in ("RGBA", "P", "I;16"):
        data = stored(mode, 90, 70, 0, False)
        early = Image.open(io.BytesIO(data)).convert("RGB")
        assert not np.array_equal(Preprocessor(RULE).pixels_u8(read_picture(data)), by_pillow(early, RULE))


@pytest.mark.parametrize("shape", [(1080, 1920), (1920, 1080), (480, 640), (224, 224), (223, 225)])
def test_camera_frames_equal_pillow(shape: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    rule = dataclasses.replace(RULE, size=224)
    assert np.array_equal(Preprocessor(rule).pixels_u8(frame), by_pillow(Image.fromarray(frame), rule))


def test_floats_are_the_bytes_normalised_in_float32() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    process = Preprocessor(RULE)
    pixels, floats = process.pixels_u8(frame), process(frame)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    expected = (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std
    assert floats.dtype == np.float32 and floats.shape == (3, 64, 64) and np.array_equal(floats, expected)


def test_bgr_frames_give_the_same_as_rgb_frames_and_are_left_alone() -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    bgr = rgb[:, :, ::-1].copy()
    kept, process = bgr.copy(), Preprocessor(RULE)
    assert np.array_equal(process(bgr, color="bgr"), process(rgb))
    assert np.array_equal(process(rgb[:, :, ::-1], color="bgr"), process(rgb))
    assert not np.array_equal(process(bgr), process(rgb)) and np.array_equal(bgr, kept)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(1, 600))
@example(10_000, 1, 8)
def test_the_placement_always_fills_the_square(width: int, height: int, size: int) -> None:
    for resize_mode in ("shortest", "longest", "squash"):
        placed = place(width, height, size, resize_mode)  # type: ignore[arg-type]
        for axis, before in ((placed.columns, placed.left), (placed.rows, placed.top)):
            assert 1 <= axis.count <= size and axis.start + axis.count <= axis.size
            assert axis.count == size or (resize_mode == "longest" and before == (size - axis.count) // 2)


def test_crop_offsets_round_halves_to_even() -> None:
    assert [place(n, 4, 4, "shortest").columns.start for n in (4, 5, 6, 7, 8, 9)] == [0, 0, 1, 2, 2, 2]
    assert place(9, 3, 4, "longest") == Placement(Axis(9, 4, 0, 4), Axis(3, 1, 0, 1), 0, 1)


def test_padding_of_inks_is_white_for_none() -> None:
    page = Picture(np.zeros((2, 8, 3), np.uint8), "CMYK", "x")
    for fill, expected in ((0, 255), (255, 0)):
        rule = PreprocessRule(8, MEAN, STD, "bicubic", "longest", fill)
        assert Preprocessor(rule).pixels_u8(page)[0, 0].tolist() == [expected] * 3


def test_fast_is_near_exact_and_leaves_small_pictures_alone() -> None:
    y, x = np.mgrid[:720, :1280]
    waves = 127 + 60 * np.sin(x / 17) + 60 * np.cos(y / 23 + x / 41)
    frame = np.stack([waves, waves[::-1], waves[:, ::-1]], axis=2).astype(np.uint8)
    rule = dataclasses.replace(RULE, size=112)
    exact, fast = (Preprocessor(rule, mode).pixels_u8(frame).astype(int) for mode in ("exact", "fast"))
    assert 0 < np.abs(exact - fast).max() <= 3
    small = frame[:200, :300]
    assert np.array_equal(Preprocessor(rule, "fast").pixels_u8(small), Preprocessor(rule).pixels_u8(small))
    grey = Picture(frame[:, :, 0], "L", "x")
    assert np.array_equal(Preprocessor(rule, "fast").pixels_u8(grey)[:, :, 0], fast[:, :, 0])


def test_halving_keeps_the_geometry_of_odd_sizes() -> None:
    pixels, columns, rows = halved(np.zeros((901, 1203, 3), np.uint8), Axis(1203, 100, 0, 100), Axis(901, 75, 0, 75))
    assert pixels.shape == (225, 300, 3)
    assert columns == Axis(300, 100, 0, 100, 1203 / 4) and rows == Axis(225, 75, 0, 75, 901 / 4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1]], "expected a numpy array, got list; pass one picture as uint8"),
        (np.zeros((4, 4), np.uint8), r"expected uint8\[height, width, 3\], got uint8\[4, 4\]; pass"),
        (np.zeros((4, 4, 4), np.uint8), r"got uint8\[4, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"got float32\[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8\[0, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got uint8\[2, 4, 4, 3\]"),
    ],
)
def test_other_images_are_refused(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessor(RULE)(image)


def test_other_options_are_refused() -> None:
    with pytest.raises(InputError, match="color must be one of rgb, bgr, got 'grey'"):
        Preprocessor(RULE)(np.zeros((4, 4, 3), np.uint8), color="grey")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="preprocess mode must be one of exact, fast, got 'quick'"):
        Preprocessor(RULE, "quick")  # type: ignore[arg-type]


def test_a_rule_survives_json() -> None:
    rule = PreprocessRule(336, MEAN, STD, "bilinear", "longest", 12)
    assert PreprocessRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert {rule: "hashable"}[dataclasses.replace(rule)] == "hashable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "preprocess rule: unknown key 'colour'"),
        ({"size": None}, "preprocess rule: missing key 'size'"),
        ({"size": 0}, "size: expected a whole number from 1 to 4,096, got 0"),
        ({"size": MAX_SIZE + 1}, "size: expected a whole number from 1 to 4,096, got 4097"),
        ({"size": 224.5}, "size: expected a whole number, got 224.5"),
        ({"size": True}, "size: expected a whole number, got true"),
        ({"fill": 256}, "fill: expected a whole number from 0 to 255, got 256"),
        ({"fill": -1}, "fill: expected a whole number from 0 to 255, got -1"),
        ({"mean": [0.5, 0.5]}, "mean: expected a list of 3 items, got 2"),
        ({"std": [0.5, 0.0, 0.5]}, "std: expected three numbers above 0"),
        ({"std": "0.5"}, "std: expected a list, got '0.5'"),
        ({"interpolation": "lanczos"}, "interpolation: expected one of 'bicubic', 'bilinear', got 'lanczos'"),
        ({"resize_mode": "crop"}, "resize_mode: expected one of 'shortest', 'longest', 'squash', got 'crop'"),
    ],
)
def test_other_rules_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in {**RULE.to_dict(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        PreprocessRule.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 2.0}, "size: expected a whole number from 1 to 4,096, got 2.0"),
        ({"size": True}, "size: expected a whole number"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean: expected a tuple of three finite numbers"),
        ({"std": [0.5, 0.5, 0.5]}, "std: expected a tuple of three finite numbers"),
        ({"interpolation": "area"}, "interpolation: expected one of bicubic, bilinear, got 'area'"),
    ],
)
def test_rules_made_in_python_are_checked_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(RULE, **change)


@pytest.mark.shared
def test_the_conformance_kit_is_met() -> None:
    load_file = pytest.importorskip("safetensors.numpy", reason="needs safetensors").load_file
    if not KIT.exists():
        pytest.skip("needs ../shared/conformance beside the repository")
    checked = 0
    for key, expected in load_file(KIT / "expected.safetensors").items():
        name, size, *rest = key.split(".")
        option = rest[1] if len(rest) > 1 else ""
        resize_mode: Any = option if option in ("longest", "squash") else "shortest"
        rule = PreprocessRule(int(size), MEAN, STD, "bilinear" if option == "bilinear" else "bicubic", resize_mode)
        picture = read_picture(KIT / f"{name}.png", upright=False)
        ours = Preprocessor(rule).pixels_u8(picture) if rest else Preprocessor(rule)(picture)
        assert np.array_equal(ours, expected), key
        checked += 1
    assert checked >= 10

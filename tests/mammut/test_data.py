"""What a sample says, reading tars, and what augmentation does."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mammut.data.augment import Augmenter, AugmentOptions
from mammut.data.pairs import plain_pair, read_tars, square
from mammut_runtime.errors import InputError


def picture(
    colour: tuple[int, int, int] = (200, 30, 30), side: int = 20, suffix: str = ".png", alpha: bool = False
) -> bytes:
    pixels = np.full((side, side, 3), colour, np.uint8)[:, :, ::-1]
    if alpha:
        pixels = np.dstack([pixels, np.zeros((side, side), np.uint8)])
        pixels[5:15, 5:15, 3] = 255
    return bytes(cv2.imencode(suffix, np.ascontiguousarray(pixels))[1])


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_with_json_and_text(tmp_path: Path) -> None:
    members = {
        "a.jpg": picture(suffix=".jpg"),
        "a.json": json.dumps({"caption": "a red square", "other": 1}).encode(),
        "b.png": picture(),
        "b.txt": b"another one\n",
        "c.json": b'{"caption": "no picture"}',
    }
    pairs = list(read_tars([write_tar(tmp_path / "x.tar", members)], plain_pair))
    assert [pair.captions for pair in pairs] == [("a red square",), ("another one",)]
    assert pairs[0].data == members["a.jpg"]
    assert pairs[0].name == "x.tar: a"


def test_tar_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tar: cannot be read: no such file"):
        list(read_tars([tmp_path / "none.tar"], plain_pair))
    (tmp_path / "bad.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(InputError, match=r"bad\.tar: cannot be read"):
        list(read_tars([tmp_path / "bad.tar"], plain_pair))
    broken = write_tar(tmp_path / "json.tar", {"a.png": picture(), "a.json": b"{oops"})
    with pytest.raises(InputError, match=r"json\.tar: a: not JSON"):
        list(read_tars([broken], plain_pair))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "expected a caption or a question"),
        ({"caption": ""}, "to be texts"),
        ({"caption": 3}, "to be texts"),
        ({"captions": "a cat"}, "captions: expected a list"),
        ({"caption": "x", "matches": [5]}, "to be texts"),
        ({"question": "what?"}, "need each other"),
        ({"questions": [["what?"]]}, r"expected \[question, answer\]"),
    ],
)
def test_rows_that_say_nothing_useful_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain_pair("here", b"", row)
    assert plain_pair("here", b"", {"caption": "fine"}).captions == ("fine",)  # control


def test_everything_a_row_may_say() -> None:
    row = {"captions": ["a", "b"], "matches": ["m"], "question": "q?", "answer": "x", "questions": [["r?", "y"]]}
    pair = plain_pair("here", b"", row)
    assert (pair.captions, pair.matches) == (("a", "b"), ("m",))
    assert sorted(pair.questions) == [("q?", "x"), ("r?", "y")]


def test_drawings_keep_their_transparency_also_in_palettes() -> None:
    shown = square(picture(alpha=True), 20, alpha=True)
    assert shown.shape == (20, 20, 4)
    assert shown[0, 0, 3] == 0 and shown[10, 10].tolist() == [200, 30, 30, 255]
    assert square(picture(alpha=True), 10, alpha=False).shape == (10, 10, 3)
    Image = pytest.importorskip("PIL.Image")
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.paste(0, (0, 0, 5, 5))
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    shown = square(stream.getvalue(), 20, alpha=True)
    assert shown[0, 0, 3] == 0 and shown[10, 10].tolist() == [200, 30, 30, 255]


def test_drawings_stand_on_their_background() -> None:
    generator = torch.Generator().manual_seed(0)
    augmenter = Augmenter(AugmentOptions(colour=0.0), True, generator)
    clear = torch.zeros(8, 4, 32, 32, dtype=torch.uint8)
    scenes = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    only_background = augmenter.drawings(clear, scenes, 32)
    assert float(only_background.std()) > 0.05  # nothing of a transparent drawing is seen, the backgrounds differ
    solid = torch.full((8, 4, 32, 32), 255, dtype=torch.uint8)
    solid[:, :3] = 0
    middle = augmenter.drawings(solid, scenes, 32)[:, :, 12:20, 12:20]
    assert float(middle.max()) < 0.05  # black


def test_plain_pictures_keep_their_colours_and_sides() -> None:
    """Photographs do not: the control."""
    left_red = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    left_red[:, 0, :, :16] = 200
    augmenter = Augmenter(AugmentOptions(), True, torch.Generator().manual_seed(0))

    def reddest_on_the_left(out: torch.Tensor) -> float:
        return float((out[:, 0, :, :12].mean(dim=(1, 2)) > out[:, 0, :, 20:].mean(dim=(1, 2))).float().mean())

    assert reddest_on_the_left(augmenter.plain(left_red, 32)) == 1
    assert reddest_on_the_left(augmenter.photos(left_red, 32)) < 1

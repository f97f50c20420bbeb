"""`mammut-train fit` from files to a checkpoint that loads, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut.checkpoint import load_checkpoint
from mammut.commands import cli
from mammut_runtime import console

COLOURS = {"red": (20, 20, 220), "green": (20, 200, 20), "blue": (230, 30, 30)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    rows: list[dict[str, str]] = []
    for name, colour in COLOURS.items():
        cv2.imwrite(str(data / f"{name}.png"), np.full((30, 40, 3), colour, np.uint8))
        rows.append({"file": f"{name}.png", "caption": f"a {name} picture, as red, green and blue are"})
        rows.append({"file": f"{name}.png", "question": "what color is it?", "answer": name})
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return data


def run(*arguments: object) -> int:
    return console.run(cli, [str(argument) for argument in arguments])


def test_fit_then_continue_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    options = ("--steps", 2, "--batch-size", 4, "--vocab-size", 530)
    assert run("fit", folder, tmp_path / "one", "--preset", "tiny", *options) == 0
    first = load_checkpoint(tmp_path / "one" / "checkpoint")
    assert first.model.config.name == "tiny" and first.preprocess.resize_mode == "squash"
    assert len((tmp_path / "one" / "log.jsonl").read_text().splitlines()) == 1
    assert run("fit", folder, tmp_path / "two", "--init", tmp_path / "one" / "checkpoint", *options) == 0
    second = load_checkpoint(tmp_path / "two" / "checkpoint")
    assert second.tokenizer_json == first.tokenizer_json and second.sha256 != first.sha256
    assert run("fit", folder, tmp_path / "two", "--preset", "tiny", "--resume", "--steps", 3, "--batch-size", 4,
               "--vocab-size", 530) == 0  # fmt: skip
    assert [json.loads(line)["step"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "unknown preset 'huge'; expected one of demo, tiny"),
        (("--steps", "0"), "steps: expected more than 0, got 0"),
        (("--minutes", "1"), "either a number of steps or a number of minutes"),
        (("--vocab-size", "10"), "vocabulary size"),
        (("--init", "nowhere"), "nowhere: no such checkpoint"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_bad_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    # The last of an option given twice counts.
    fine = ("--preset", "tiny", "--steps", 1, "--vocab-size", 530, "--batch-size", 2)
    assert run("fit", folder, tmp_path / "out", *fine, *arguments) == 2
    assert message in capsys.readouterr().err
    assert run("fit", tmp_path / "missing.tar", tmp_path / "out", *fine) == 2
    assert "no such file" in capsys.readouterr().err

"""`mammut-train fit` from files to a checkpoint that loads: what small sets of pictures need, on the one loop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mammut.checkpoint import Checkpoint, load_checkpoint
from mammut.commands import cli
from mammut.training.loop import Run, train
from mammut.training.parallel import Place
from mammut.training.recipes import small_set
from mammut.training.run_config import RunConfig, Source, changed
from mammut.training.run_log import read_log
from mammut.training.run_state import read_info, saved_steps
from mammut_runtime import console
from mammut_runtime.strict import to_dict

ALONE = Place(0, 1, torch.device("cpu"))
COLOURS = {"red": (20, 20, 220), "green": (20, 200, 20), "blue": (230, 30, 30), "white": (240, 240, 240)}
SHORT = ("--set", "batch_size=4", "--set", "data.workers=0", "--set", "save.log_every=1")


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
    options = ("--steps", 2, *SHORT)
    assert run("fit", folder, tmp_path / "one", "--preset", "tiny", "--vocab-size", 530, *options) == 0
    first = load_checkpoint(tmp_path / "one" / "checkpoint")
    assert first.model.config.name == "tiny" and first.preprocess.resize_mode == "squash"
    assert [row["step"] for row in read_log(tmp_path / "one")] == [1, 2]
    assert run("fit", folder, tmp_path / "two", "--init", tmp_path / "one" / "checkpoint", *options) == 0
    second = load_checkpoint(tmp_path / "two" / "checkpoint")
    assert second.tokenizer_json == first.tokenizer_json and second.sha256 != first.sha256


def test_several_processes_by_one_command(folder: Path, tmp_path: Path) -> None:
    """Stopped by the clock, then gone on with."""
    out = tmp_path / "out"
    command = ("fit", folder, out, "--preset", "tiny", "--vocab-size", 530, "--steps", 3, *SHORT, "--processes", 2)
    assert run(*command, "--minutes", 0) == 0
    assert [path.name for path in saved_steps(out)] == ["step-00000001"]
    assert load_checkpoint(out / "checkpoint").model.config.name == "tiny"
    assert run(*command, "--resume") == 0
    assert [row["step"] for row in read_log(out)] == [1, 2, 3]
    assert read_info(out).processes == 2
    assert run(*command) == 2  # control: without --resume an existing run is left alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "unknown model 'huge'; expected tiny, demo"),
        (("--steps", "0"), "0 is not in the range"),
        (("--vocab-size", "10"), "vocabulary size"),
        (("--init", "nowhere"), "nowhere: no such checkpoint"),
        (("--set", "optimizer.mouon=1"), "no such key 'mouon'"),
    ],
)
def test_bad_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    # The last of an option given twice counts.
    fine = ("--preset", "tiny", "--steps", 1, "--vocab-size", 530)
    assert run("fit", folder, tmp_path / "out", *fine, *arguments) == 2
    assert message in capsys.readouterr().err
    assert run("fit", tmp_path / "missing.tar", tmp_path / "out", *fine) == 2
    assert "missing.tar: cannot be read: no such file" in capsys.readouterr().err


def small(small_run: Any, steps: int, *changes: str) -> RunConfig:
    """Two sources, questions and captions mixed, two picture sizes, Muon, averaged weights, augmentation."""
    shards = [str(path) for path in small_run.shards]
    sources = (Source(tuple(shards[:2]), "photo", 2.0), Source(tuple(shards[2:]), "plain", 1.0))
    config = small_set(small_run.config.model, sources, steps, tokenizer=str(small_run.folder / "tokenizer.json"))
    own = ["batch_size=16", "data.workers=0", "save.log_every=1", f"save.every_steps={steps}", *changes]
    return RunConfig.from_dict(changed(to_dict(config), own), "config")


def test_it_learns_and_looks_at_held_out_data(small_run: Any, tmp_path: Path) -> None:
    looks: list[tuple[str, int]] = []

    def look(checkpoint: Checkpoint) -> dict[str, float]:
        looks.append((checkpoint.source, len(checkpoint.tokenizer_json)))
        assert not checkpoint.model.training
        return {"right": 0.5}

    config = small(small_run, 120, "data.augment=null", "data.mirror=false", "save.every_steps=60")
    folder = train(config, tmp_path / "out", ALONE, evaluate=look)
    rows = [row for row in read_log(tmp_path / "out") if "loss" in row]
    for name, share in (("loss_contrastive", 0.7), ("loss_caption", 0.8)):  # label smoothing keeps the second up
        assert sum(row[name] for row in rows[-5:]) < share * sum(row[name] for row in rows[:5]), name
    assert {row["image_size"] for row in rows[:90]} == {16} and {row["image_size"] for row in rows[90:]} == {32}
    assert [source.rpartition(" ")[2] for source, _ in looks] == ["60", "120"]
    assert [row for row in read_log(tmp_path / "out") if "held_out/right" in row][-1]["step"] == 120
    stored = load_checkpoint(folder)
    assert stored.model.config.name == "tiny"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_with_averaged_weights_and_momentum(small_run: Any, tmp_path: Path, precision: str) -> None:
    config = small(small_run, 6, "save.every_steps=4", f'parallel.precision="{precision}"')
    whole = load_checkpoint(train(config, tmp_path / "whole", ALONE)).model
    train(config, tmp_path / "parts", ALONE)
    last = saved_steps(tmp_path / "parts")[-1]
    last.rename(tmp_path / "gone")
    again = load_checkpoint(train(config, tmp_path / "parts", ALONE, resume=True)).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    other = load_checkpoint(train(dataclasses.replace(config, seed=1), tmp_path / "other", ALONE)).model
    assert not torch.equal(other.vision.positions, whole.vision.positions)  # control


def test_the_average_is_what_is_kept(small_run: Any, tmp_path: Path) -> None:
    config = small(small_run, 4, 'save.dtype="float32"')
    run = Run(config, tmp_path / "out", ALONE, lambda message: None)
    moments = [parameter.detach().clone() for parameter in run.prepared.trained()]
    for step in range(1, 5):
        batch = next(run._open(config.stages[0]))
        run.train_step([batch], config.stages[0])
        decay = min(0.999, (1 + step) / (10 + step))
        for value, parameter in zip(moments, run.prepared.trained(), strict=True):
            value.lerp_(parameter.detach(), 1 - decay)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    kept = run.checkpoint()
    assert kept is not None and run.learner.average is not None
    for value, own in zip(moments, run.learner.average.values, strict=True):
        torch.testing.assert_close(own, value)
    names = [name for name, _ in run.model.named_parameters()]
    for name, value in zip(names, moments, strict=True):
        torch.testing.assert_close(kept.model.get_parameter(name), value)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))  # as it was
    assert not torch.equal(kept.model.vision.positions, run.model.vision.positions)  # control

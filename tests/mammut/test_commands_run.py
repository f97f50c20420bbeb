"""`mammut-train new`, `run`, `repeat` and --dry-run, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mammut.commands import cli
from mammut.training.run_config import RunConfig
from mammut_runtime import console


def test_new_and_run(small_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, sources = str(small_run.folder / "tokenizer.json"), str(small_run.folder / "{0..3}.tar")
    arguments = ["new", "pretrain", sources, "--model", "tiny", "--tokenizer", tokenizer, "--set", "stages.0.steps=3"]
    assert console.run(cli, [*arguments, "--set", "batch_size=8", "--set", "data.workers=0"]) == 0
    written = capsys.readouterr().out
    (tmp_path / "run.json").write_text(written)
    out = tmp_path / "out"
    assert console.run(cli, ["run", str(tmp_path / "run.json"), str(out), "--device", "cpu"]) == 0
    assert f"checkpoint: {out}/checkpoint" in capsys.readouterr().err
    again = ["new", "caption", sources, "--start", str(out / "checkpoint"), "--lora"]
    assert console.run(cli, again) == 0
    tuned = RunConfig.from_dict(json.loads(capsys.readouterr().out), "stdout")
    assert tuned.lora is not None and tuned.model.text.vocab_size == json.loads(written)["model"]["text"]["vocab_size"]


def test_dry_run_of_the_papers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The preset that no laptop trains: per device, and whether it fits; neither data nor tokenizer need exist."""
    new = ["new", "pretrain", "data/{0..999}.tar", "--model", "paper-huge", "--tokenizer", "tokenizer.json"]
    assert console.run(cli, new) == 0
    (tmp_path / "run.json").write_text(capsys.readouterr().out)
    dry = ["run", str(tmp_path / "run.json"), str(tmp_path / "out"), "--dry-run"]
    assert console.run(cli, [*dry, "--devices", "512"]) == 0
    text = capsys.readouterr().out
    assert "2,006.0 M parameters" in text and "512 devices, fsdp" in text and "fits in 80 GB" in text
    for row in ("parameters", "gradients", "optimizer state", "activations", "total"):
        assert any(line.strip().startswith(row) and line.endswith(" GB") for line in text.splitlines())
    assert console.run(cli, [*dry, "--devices", "16", "--device-memory-gb", "40"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "pretrain", "a.tar"], "expected --model and --tokenizer"),
        (["new", "ask", "a.tar"], "expected --start"),
        (["run", "nowhere.json", "out"], "`mammut-train new` writes a run to edit"),
        (["repeat", "nowhere", "out"], "no checkpoint of a run here"),
        (["--resume-config", "nowhere"], "--out"),
        (["--resume-config", "nowhere", "--out", "x"], "no checkpoint of a run here"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(cli, arguments) == 2
    assert message in capsys.readouterr().err


def test_a_typo_in_the_file_is_refused_by_name(
    small_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_run.write()
    path.write_text(path.read_text().replace('"warmup_steps"', '"warmup_step"'))
    assert console.run(cli, ["run", str(path), str(tmp_path / "out")]) == 2
    assert "stages[0]: unknown key 'warmup_step'" in capsys.readouterr().err

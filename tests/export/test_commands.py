from __future__ import annotations

from pathlib import Path

import pytest

from mammut.checkpoint import Checkpoint
from mammut_export.commands import TASK_NAMES, cli
from mammut_export.graphs import TASKS
from mammut_runtime import console
from mammut_runtime.bundle import Bundle


def run(*arguments: object) -> int:
    return console.run(cli, [str(each) for each in arguments])


def test_export_prints_a_summary(
    tiny: Checkpoint, traced_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny.source, tmp_path / "bundle", "--max-tokens", 6) == 0
    captured = capsys.readouterr()
    assert "captions: 5 of 5 the same token for token" in captured.out
    assert "report.html" in captured.out
    assert captured.err == ""  # progress is for terminals
    assert Bundle.open(tmp_path / "bundle").manifest.text.max_tokens == 6


def test_dry_run_writes_nothing(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny.source, tmp_path / "bundle", "--dry-run", "--tasks", "match") == 0
    assert run(tiny.source, "--dry-run", "--precision", "fp16", "--image-size", 64) == 0
    out = capsys.readouterr().out
    assert "vision" in out and "weights.bin" in out and "pictures of 64 pixels" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{checkpoint}", "{out}", "--target", "tflite"), "one of onnxruntime, openvino, tensorrt, got 'tflite'"),
        (("{checkpoint}", "{out}", "--precision", "int3"), "precision: expected one of fp32, fp16, int8"),
        (("{checkpoint}", "{out}", "--precision", "int8"), "give them with --calibration"),
        (("{checkpoint}", "{out}", "--precision", "auto"), "give them with --calibration"),
        (("{checkpoint}", "{out}", "--precision", "int8", "--accept-drift"), "int8 needs the ranges of your data"),
        (("{checkpoint}", "{out}", "--precision", "int8", "--calibration", "{here}"), "no pictures; expected .png"),
        (("{checkpoint}", "{out}", "--precision", "int8", "--calibration", "nowhere"), "nowhere"),
        (("{checkpoint}", "{out}", "--drift-limit", "beauty=1"), "expected one of embedding_cosine_mean"),
        (("{checkpoint}", "--dry-run", "--device", "cray"), "orin-nano-8gb"),
        (("{checkpoint}", "{out}", "--device", "n100"), "--device belongs to --dry-run"),
        (("{checkpoint}", "{out}", "--drift-limit", "token_agreement=x"), "expected token_agreement=NUMBER"),
        (("{checkpoint}", "{out}", "--drift-limit", "token_agreement=7"), "a limit from -1 to 1, got 7"),
        (("{checkpoint}", "{out}", "--calibration-table", "{here}/thesis.txt"), "used by int8 and auto only"),
        (("{checkpoint}", "{out}", "--target", "openvino", "--precision", "int8-dynamic"), "for target openvino"),
        (("{checkpoint}", "{out}", "--tasks", "dance"), "tasks: expected one or more of caption, ask, match, search"),
        (
            ("{checkpoint}", "{out}", "--tasks", "watch"),
            "tasks: 'watch' cannot be exported: the checkpoint has no tubes",
        ),
        (("{checkpoint}", "{out}", "--tasks", ","), "got none"),
        (("{checkpoint}", "{out}", "--tolerance", "-1"), "tolerance: expected a number above 0"),
        (("{checkpoint}", "{out}", "--max-tokens", "999"), "max_tokens: expected at most 23, got 999"),
        (("{checkpoint}", "{out}", "--image-size", "1"), "image size 1"),
        (("{checkpoint}", "{out}", "--pictures", "nowhere"), "nowhere"),
        (("no-such-checkpoint", "{out}"), "no such checkpoint"),
        (("{checkpoint}",), "Missing argument 'OUT'"),
        ((), "CHECKPOINT"),
        (("{checkpoint}", "{here}"), "exists already"),
        (("{checkpoint}", "{here}", "--overwrite"), "is not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "thesis.txt").write_text("precious")
    names = {"checkpoint": tiny.source, "out": str(tmp_path / "out"), "here": str(here)}
    assert run(*(each.format(**names) for each in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and (here / "thesis.txt").exists()


def test_a_wrong_weight_is_exit_code_1(
    tiny: Checkpoint, traced_once: None, spoilt_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny.source, tmp_path / "bundle") == 1
    assert "Nothing was published" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "--dry-run" in capsys.readouterr().out
    assert tuple(TASK_NAMES.split(",")) == TASKS  # written out there so that --help need not import torch

"""The log: JSON lines that survive a kill, and TensorBoard where it is installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mammut.training.parallel import Place
from mammut.training.run_log import LOG_FILE, RunLog, read_log
from mammut_runtime.errors import InputError


def test_rows_are_json_lines_and_a_resumed_run_makes_later_ones_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 9, False) as log:
        for step in range(1, 6):
            log.row({"step": step, "loss": 1.0 / step})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    with RunLog(tmp_path, 3, 9, False) as log:
        log.row({"step": 4, "loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 7.0)]
    assert read_log(tmp_path / "nowhere") == []


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, *row: Any) -> None:
            written.append(row)

        def close(self) -> None:
            written.append(("closed",))

    module = types.ModuleType("torch.utils.tensorboard.writer")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    with RunLog(tmp_path, 2, 9, True) as log:
        log.row({"step": 3, "loss": 0.5, "note": "text"})
    assert written == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3), ("closed",)]


def test_tensorboard_reads_what_a_run_writes(small_run: Any, tmp_path: Path) -> None:
    """The real writer and the real reader, over a run and its resumption."""
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mammut.training.loop import train

    alone, out = Place(0, 1, torch.device("cpu")), tmp_path / "out"
    train(small_run.with_("save.tensorboard=true"), out, alone)
    for path in (out / "step-00000006").iterdir():
        path.unlink()
    train(small_run.with_("save.tensorboard=true"), out, alone, resume=True)  # steps 4 to 6 once more
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "loss_caption", "gradient_norm", "learning_rate", "pictures_per_s"} <= set(board.Tags()["scalars"])
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_log(out)]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(InputError, match=r"pip install 'mammut-edge\[tensorboard\]'"):
        RunLog(tmp_path, 0, 9, True)


def test_a_bar_is_drawn_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path, 0, 9, False) as log:
        log.step(5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with RunLog(tmp_path, 4, 9, False):
        pass
    assert "steps [" in capsys.readouterr().err

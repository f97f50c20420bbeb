"""What a run tells: JSON lines in its folder, a progress bar on a terminal, TensorBoard files where they are wanted."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from mammut_runtime import console
from mammut_runtime.errors import InputError

LOG_FILE = "log.jsonl"


class RunLog:
    """Of the process that reports. Use in a `with`.

    Args:
        folder: gets log.jsonl. Rows of steps after `done` are taken out: a resumed run makes them again.
        done: steps that were done before.
        steps: of the whole run, for the bar.
        tensorboard: also write event files into folder/tensorboard. InputError where it is not installed.
    """

    def __init__(self, folder: Path, done: int, steps: int, tensorboard: bool) -> None:
        self.path = folder / LOG_FILE
        folder.mkdir(parents=True, exist_ok=True)
        _cut(self.path, done)
        self.board = _board(folder / "tensorboard", done) if tensorboard else None
        self.bar = console.Progress("steps", steps)
        self.done = done

    def __enter__(self) -> RunLog:
        self.bar.__enter__()
        self.bar(self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)
        if self.board is not None:
            self.board.close()

    def step(self, done: int) -> None:
        """So many steps are done."""
        self.bar(done)

    def row(self, row: dict[str, Any]) -> None:
        """One logged step; must hold "step"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(console.json_line(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, row["step"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, a last line that was cut short left out."""
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the process was killed while writing it
    return rows


def _cut(path: Path, done: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_log(path.parent) if row.get("step", 0) <= done]
    new = path.with_suffix(".partial")
    new.write_text("".join(console.json_line(row) + "\n" for row in kept), encoding="utf-8")
    new.replace(path)


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise InputError("save.tensorboard: needs TensorBoard: pip install 'mammut-edge[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=done + 1)

"""`mammut-train demo`: stages follow each other, are left out when done, and stop when time is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mammut import commands_demo
from mammut.commands import cli
from mammut.demo import recipe


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was trained; a stage takes no time and is done unless its name is "scenes" and minutes are given."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def train(stage: str, data: Path, out: Path, steps: int | None, processes: int, **given: Any) -> int:
        calls.append((stage, given))
        if not (stage == "scenes" and given["minutes"]):
            (out / stage / "checkpoint").mkdir(parents=True, exist_ok=True)
            (out / stage / "checkpoint" / "which").write_text(stage)
        return 0

    monkeypatch.setattr(commands_demo, "_stage", train)
    monkeypatch.setattr(commands_demo, "_done", lambda stage, folder, steps: (folder / "checkpoint").is_dir())
    return calls


def run(*arguments: str) -> int:
    return CliRunner().invoke(cli, ["demo", *arguments], standalone_mode=False).return_value or 0


def test_all_stages_then_what_is_left(stages: list[Any], tmp_path: Path) -> None:
    assert run("data", str(tmp_path), "--minutes", "5") == 0
    assert [name for name, _ in stages] == ["pictures", "scenes"]  # the time ended within the second
    assert (tmp_path / "checkpoint" / "which").read_text() == "pictures"
    stages.clear()
    assert run("data", str(tmp_path), "--resume") == 0
    assert [name for name, _ in stages] == ["scenes", "rehearsal", "detector"]
    assert all(given["resume"] for _, given in stages)
    assert (tmp_path / "checkpoint" / "which").read_text() == "detector"


def test_one_stage(stages: list[Any], tmp_path: Path) -> None:
    assert run("data", str(tmp_path), "--stage", "clips") == 0
    assert [name for name, _ in stages] == ["clips"]


def test_one_of_several_processes_trains_its_stage_only(
    stages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("data", str(tmp_path), "--stage", "scenes") == 0
    assert [name for name, _ in stages] == ["scenes"] and not (tmp_path / "checkpoint").exists()


def test_later_stages_start_from_the_ones_before(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    monkeypatch.setattr(recipe, "scenes_run", lambda data, out, start, steps: starts.append((start, steps)))
    recipe.stage_run("scenes", Path("data"), Path("out"), 7)
    assert starts == [("out/pictures/checkpoint", 7)]


def test_a_stage_is_done_after_its_last_step(tmp_path: Path) -> None:
    assert not commands_demo._done("scenes", tmp_path, 7)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n{"step": 6}\n')
    assert not commands_demo._done("scenes", tmp_path, 7) and commands_demo._done("scenes", tmp_path, 6)

"""`mammut-train demo`: stages follow each other, are left out when done, stop when time is up; bad data is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mammut import commands_demo
from mammut.commands import cli
from mammut.demo import recipe
from mammut_runtime import console
from mammut_runtime.errors import InputError

STEPS = 7


def leave(stage: str, folder: Path, steps: int) -> None:
    """What a stage leaves on the disk after so many steps, as far as the command looks at it."""
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint" / "model.safetensors").write_text(f"{stage} {steps}")
    (folder / "log.jsonl").write_text(json.dumps({"step": steps}) + "\n")
    if stage == "detector":
        torch.save({"step": steps}, folder / "state.pt")
    else:
        (folder / f"step-{steps:08d}").mkdir(exist_ok=True)
        (folder / f"step-{steps:08d}" / "run.json").write_text("{}")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was trained; a stage takes no time, and all its steps unless its name is "scenes" and minutes are given."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def train(stage: str, data: Path, out: Path, steps: int | None, processes: int, **given: Any) -> int:
        calls.append((stage, given))
        leave(stage, out / stage, STEPS - 3 if stage == "scenes" and given["minutes"] else STEPS)
        return 0

    monkeypatch.setattr(commands_demo, "_stage", train)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


def run(out: Path, *arguments: str) -> int:
    return console.run(cli, ["demo", "data", str(out), "--steps", str(STEPS), *arguments])


def weights(folder: Path) -> str:
    return (folder / "checkpoint" / "model.safetensors").read_text()


# --- stages after each other ---------------------------------------------------------------------------------


def test_all_stages_then_what_is_left(stages: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path, "--minutes", "5") == 0
    assert [name for name, _ in stages] == ["pictures", "scenes"]  # the time ended within the second
    assert not (tmp_path / "checkpoint").exists()
    stages.clear()
    assert run(tmp_path, "--resume") == 0
    assert [name for name, _ in stages] == ["scenes", "rehearsal", "detector"]
    assert all(given["resume"] for _, given in stages)
    assert weights(tmp_path) == "detector 7"
    stages.clear()
    assert run(tmp_path, "--resume") == 0 and not stages


def test_the_published_checkpoint_never_goes_back(stages: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    (tmp_path / "checkpoint" / "of-before").touch()
    assert run(tmp_path, "--stage", "pictures") == 0 and run(tmp_path, "--stage", "motion", "--resume") == 0
    assert weights(tmp_path) == "detector 7" and (tmp_path / "checkpoint" / "of-before").exists()
    assert run(tmp_path, "--resume") == 0  # control: the whole chain puts a whole folder in its place
    assert weights(tmp_path) == "detector 7" and not (tmp_path / "checkpoint" / "of-before").exists()
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_kill_before_the_checkpoint_does_not_count_as_done(stages: list[Any], tmp_path: Path) -> None:
    """The last row of the log is written first, then the run's state, then the checkpoint."""
    folder = tmp_path / "pictures"
    leave("pictures", folder, STEPS)
    (folder / "log.jsonl").write_text('{"step": 7}\n{"st')
    assert run(tmp_path, "--resume") == 0
    assert stages[0][0] == "pictures"
    stages.clear()
    assert run(tmp_path, "--resume") == 0 and not stages  # control: it is done now


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"stage": "pictures"}', "\x00"])
def test_damage_makes_a_stage_undone(damage: str, stages: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path, "--stage", "pictures") == 0
    folder = tmp_path / "pictures"
    assert commands_demo._done("pictures", folder, STEPS) and commands_demo._done("pictures", folder, None)  # control
    assert not commands_demo._done("pictures", folder, STEPS + 1) and not commands_demo._done("scenes", folder, STEPS)
    kept = (folder / "done.json").read_text()
    (folder / "done.json").write_text(damage)
    assert not commands_demo._done("pictures", folder, STEPS)
    (folder / "done.json").write_text(kept)
    (folder / "checkpoint" / "model.safetensors").write_text("of an earlier run")
    assert not commands_demo._done("pictures", folder, STEPS)


def test_a_stage_that_was_stopped_is_not_marked(tmp_path: Path) -> None:
    for stage in ("scenes", "detector"):
        assert not commands_demo._mark_done(stage, tmp_path / stage, STEPS)
        leave(stage, tmp_path / stage, STEPS - 1)
        assert not commands_demo._mark_done(stage, tmp_path / stage, STEPS)
        leave(stage, tmp_path / stage, STEPS)
        assert commands_demo._mark_done(stage, tmp_path / stage, STEPS)  # control
    (tmp_path / "detector" / "state.pt").write_bytes(b"cut")
    assert not commands_demo._mark_done("detector", tmp_path / "detector", STEPS)


def test_one_stage_after_the_one_before_it(
    stages: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--stage", "motion") == 2 and not stages
    assert f"mammut-train demo data {tmp_path} --stage rehearsal --resume" in capsys.readouterr().err
    leave("rehearsal", tmp_path / "rehearsal", STEPS)
    assert run(tmp_path, "--stage", "motion") == 2  # its checkpoint may be older than its last step
    assert commands_demo._mark_done("rehearsal", tmp_path / "rehearsal", STEPS)
    assert run(tmp_path, "--stage", "motion") == 0  # control
    assert [name for name, _ in stages] == ["motion"] and not (tmp_path / "checkpoint").exists()


def test_later_stages_start_from_the_ones_before(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    monkeypatch.setattr(recipe, "scenes_run", lambda data, out, start, steps: starts.append((start, steps)))
    recipe.stage_run("scenes", Path("data"), Path("out"), 7)
    assert starts == [("out/pictures/checkpoint", 7)]


# --- processes, minutes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "marks"), [("0", True), ("1", False)])
def test_one_of_several_processes_trains_its_stage_only(
    rank: str, marks: bool, stages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert run(tmp_path, "--stage", "pictures") == 0
    assert [name for name, _ in stages] == ["pictures"] and not (tmp_path / "checkpoint").exists()
    assert (tmp_path / "pictures" / "done.json").exists() == marks


def test_torchrun_needs_a_stage_that_it_can_train(
    stages: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0  # control
    stages.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in ([], ["--stage", "detector"]):
        assert run(tmp_path, *arguments) == 2 and not stages
        assert "expected --stage with any but detector" in capsys.readouterr().err


def test_processes_of_the_detector_are_noted(
    stages: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--processes", "2") == 0
    assert capsys.readouterr().err.count("--processes is not used") == 1
    assert run(tmp_path, "--stage", "pictures", "--processes", "2") == 0
    assert "--processes is not used" not in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_are_above_zero(minutes: str, stages: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path, "--minutes", minutes) == 2 and not stages
    assert run(tmp_path, "--minutes", "0.5") == 0 and stages  # control


def test_the_config_of_a_run_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mammut.presets import demo as model
    from mammut.training.recipes import small_set
    from mammut.training.run_config import Source

    def config_of(stage: str, data: Path, out: Path, steps: int) -> Any:
        return small_set(model(512), (Source(("x.tar",), "photo", 1.0),), steps, tokenizer="x.json")

    monkeypatch.setattr(recipe, "stage_run", config_of)
    monkeypatch.setattr(commands_demo, "start_run", lambda *given, **named: 0)
    monkeypatch.setattr("mammut.demo.evaluate.glance", lambda data: None)
    written = tmp_path / "pictures" / "config.json"

    def start(steps: int, resume: bool) -> bytes:
        commands_demo._stage("pictures", tmp_path, tmp_path, steps, 1, resume=resume, minutes=None)
        return written.read_bytes()

    first = start(100, False)
    assert start(200, True) != first  # control: nothing was saved, so the run begins anew
    first = written.read_bytes()
    leave("pictures", tmp_path / "pictures", 5)
    assert start(300, True) == first
    with pytest.raises(InputError, match="already holds a run"):
        start(300, False)
    assert written.read_bytes() == first


# --- bad data ------------------------------------------------------------------------------------------------


def write_tar(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for suffix, content in (("jpg", b"\xff\xd8"), ("json", json.dumps(row).encode())):
            member = tarfile.TarInfo(f"k1.{suffix}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def labelled(kind: str) -> Callable[[Path], Any]:
    return lambda data: recipe.labelled_pairs(data, kind, "train")


def photos(data: Path) -> Any:
    return recipe.photo_pairs(data, "train") + recipe.photo_pairs(data, "val")


@pytest.mark.parametrize(
    ("kind", "read", "good", "bad"),
    [
        ("flowers", labelled("flowers"), {"split": "train", "label": "daisy", "flickr_id": "1"},
         {"split": None, "label": "rhubarb", "flickr_id": None}),
        ("clothing", labelled("clothing"), {"split": "train", "label": "Hat"}, {"split": 3, "label": ["Hat"]}),
        ("photos", photos, {"caption": "A thing.", "credit": ""}, {"caption": " ", "credit": 7}),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(
    kind: str, read: Callable[[Path], Any], good: dict[str, Any], bad: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "pairs" / f"{kind}-000.tar"
    write_tar(path, good)
    assert len(read(tmp_path)) == 1  # control
    for key, value in bad.items():
        for row in (good | {key: value}, {name: each for name, each in good.items() if name != key}):
            write_tar(path, row)
            with pytest.raises(InputError, match=rf"{kind}-000.tar: k1: {key}: expected"):
                read(tmp_path)


def test_a_bad_table_of_emoji_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    (folder / "noto").mkdir(parents=True)
    (folder / "noto" / "1.png").write_bytes(b"png")
    table = folder / "names.tsv"
    table.write_text("vendor\tfile\tname\nnoto\t1.png\tjoker\n")
    assert [pair.name for pair in recipe.emoji_pairs(tmp_path)] == ["noto/1.png"]  # control
    for text, said in (
        ("maker\tfile\tname\nnoto\t1.png\tjoker\n", "names.tsv: line 1: expected a column vendor, got"),
        ("", "names.tsv: line 1: expected a column vendor and file and name"),
        ("vendor\tfile\tname\nnoto\t1.png\n", "names.tsv: line 2: name: expected a text, got None"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=said):
            recipe.emoji_pairs(tmp_path)

"""The comparison of what sees motion: same clips, same steps, other pixels."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mammut.checkpoint import load_checkpoint, save_checkpoint
from mammut.demo import clip_ablation, clip_evaluation
from mammut.demo.clip_ablation import MORE_ROWS, ROWS, Plan, planned, row_run, trained, video_of, with_differences
from mammut.demo.clip_evaluation import Answers, figures
from mammut.model import Mammut
from mammut.presets import demo, demo_video
from mammut.training.parallel import joined
from mammut.training.run_config import differences
from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict, to_json

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not part of a clone")


def test_rows_differ_in_what_they_see() -> None:
    model = demo()
    tokens = {row: video_of(row, model).tokens(96) for row in (*ROWS, *MORE_ROWS)}
    assert tokens == {"full": 180, "no tubes": 72, "middle frame": 36, "five frames": 180}
    (patches,) = video_of("middle frame", model).tubes
    assert patches.offset[0] == demo_video().frames // 2 and patches.counts(16, 96)[0] == 1
    with pytest.raises(InputError, match="unknown row 'half'; expected some of full, no tubes"):
        video_of("half", model)


def test_differences_are_paired() -> None:
    """The first is right wherever the other is, and on half of the rest: an interval that a single figure lacks."""
    base = [n % 2 == 0 for n in range(40)]
    better = [right or n % 4 == 1 for n, right in enumerate(base)]
    answers = Answers(["direction"] * 40, list(range(40)), {"full": better, "no tubes": base})
    found = with_differences(figures(answers), answers, ("full", "no tubes"))["direction"]
    assert found["full - no tubes"]["right"] == 0.25
    assert 0.1 < found["full - no tubes"]["low"] < 0.25 < found["full - no tubes"]["high"] < 0.45
    same = with_differences(figures(answers), answers, ("full", "full"))["direction"]
    assert same["full - full"] == {"right": 0.0, "low": 0.0, "high": 0.0}  # control


def test_a_folder_holds_one_comparison(tmp_path: Path) -> None:
    with joined("cpu") as place:
        (tmp_path / "ablation.json").write_bytes(to_json(Plan("demo", ROWS, 5)))
        assert planned(DATA, tmp_path, place, "demo", ROWS, None, 3.0).steps == 5
        with pytest.raises(InputError, match=r"holds Plan\(start='demo'.* give the same again, or another folder"):
            planned(DATA, tmp_path, place, "demo", ROWS, 6, None)
        with pytest.raises(InputError, match="expected --steps or --minutes"):
            planned(DATA, tmp_path / "new", place, "demo", ROWS, None, None)


@pytest.mark.shared
@needs_data
def test_runs_differ_only_in_their_tubes(tmp_path: Path) -> None:
    start = pictures_only(tmp_path)
    full, middle = (to_dict(row_run(DATA, tmp_path, start, row, 4)) for row in ("full", "middle frame"))
    found = differences(full, middle)
    assert found and all(re.match(r"model\.video\.tubes", path) for path in found)
    loaded = load_checkpoint(start)
    clips = dataclasses.replace(loaded.model.config, video=demo_video())
    save_checkpoint(tmp_path / "clips", Mammut(clips, 0), loaded.tokenizer_json, loaded.preprocess, loaded.prompts)
    small = row_run(DATA, tmp_path, "", "full", 4)
    assert small.model.video == demo_video() and small.model.video_tokens == 80 and small.preprocess.size == 64
    with pytest.raises(InputError, match="expected a model for pictures only, got one that has been trained on clips"):
        row_run(DATA, tmp_path, str(tmp_path / "clips"), "full", 4)


@pytest.mark.shared
@needs_data
def test_comparison_and_evaluation_are_one_command_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mammut.commands import cli
    from mammut_runtime import console

    monkeypatch.setattr(clip_ablation, "BATCH", 4)
    monkeypatch.setattr(clip_ablation, "TRAINING_CLIPS", 40)
    arguments = ["clips-ablation", str(DATA), str(tmp_path / "out"), "--steps", "2"]
    arguments += ["--clips", "6", "--rows", "full,middle frame"]
    assert console.run(cli, arguments) == 0
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert found["tokens"] == {"full": 80, "middle frame": 16} and found["steps"] == 2
    row = found["sets"]["new drawings"]["direction"]
    assert {"asked", "without looking", "full", "middle frame", "full - middle frame"} == set(row)
    sheet, figures_file = tmp_path / "sheet.png", tmp_path / "figures.json"
    monkeypatch.setattr(clip_evaluation, "TRAINING_CLIPS", 40)
    judged = ["clips-eval", str(DATA), "--checkpoint", str(tmp_path / "out" / "full" / "checkpoint"), "--clips", "6"]
    assert console.run(cli, [*judged, "--json", str(figures_file), "--sheet", str(sheet)]) == 0
    assert json.loads(figures_file.read_text())["views"] == ["full", "no tubes", "middle frame"]
    assert sheet.is_file() and "CC BY 4.0" in sheet.with_suffix(".md").read_text()
    plan = Plan("", ("full", "middle frame"), 2)
    with joined("cpu") as place:
        notes: list[str] = []
        again = trained(DATA, tmp_path / "out", place, plan, notes.append)
    assert not notes and again["middle frame"].model.config.video_tokens == 16  # nothing is trained again


def pictures_only(folder: Path) -> str:
    """The demo's sizes without tubes and with fewer layers, untrained."""
    shipped = load_checkpoint("demo")
    config = dataclasses.replace(shipped.model.config, video=None)
    vision = dataclasses.replace(config.vision, layers=1, width=48, mlp_width=48)
    config = dataclasses.replace(config, vision=vision)
    place = folder / "pictures"
    save_checkpoint(place, Mammut(config, 0), shipped.tokenizer_json, shipped.preprocess, shipped.prompts)
    return str(place)

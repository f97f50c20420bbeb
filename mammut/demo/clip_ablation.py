"""What sees motion: the same fine-tuning on composed clips with all tubes, with patches alone, with one frame.

`mammut-train clips-ablation`. All rows start from one checkpoint for pictures, or from one small model with
random weights; they take the same number of steps over the same clips in the same order, and answer the same held-out
questions. They differ only in which pixels become tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mammut import presets
from mammut.checkpoint import DEMO_FOLDER, Checkpoint, load_checkpoint, save_checkpoint
from mammut.config import MammutConfig, VideoConfig
from mammut.data.clip_scenes import CLIP_QUESTION_KINDS
from mammut.demo import recipe
from mammut.demo.clip_evaluation import (
    CAPTION,
    SETS,
    TRAINING_CLIPS,
    Answers,
    Viewer,
    answered,
    cell,
    figures,
    groups_of,
    usual_answers,
    view_of,
)
from mammut.demo.clips import held_out_clips, training_questions
from mammut.evaluation.bootstrap import Bootstrap, mean_of
from mammut.model import Mammut
from mammut.training.initial import structured_start
from mammut.training.loop import CHECKPOINT_FOLDER, train
from mammut.training.objective import ObjectiveOptions
from mammut.training.parallel import Place
from mammut.training.recipes import MEAN, STD, small_set
from mammut.training.run_config import RunConfig, SaveOptions, Source, StageOptions
from mammut.training.run_log import read_log
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.strict import from_dict, parse_json, to_json
from mammut_runtime.tokenizer import Tokenizer

ROWS = ("full", "no tubes", "middle frame")
"""Compared by default."""
MORE_ROWS = ("five frames",)
"""As many patches as the full row has tokens, for who asks whether tubes are more than more tokens."""
BATCH = 96
PLAN = "ablation.json"
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """What OUT holds runs of: ablation.json."""

    start: str
    rows: tuple[str, ...]
    steps: int
    """Of each row."""


def video_of(row: str, model: MammutConfig) -> VideoConfig:
    """Which pixels a row sees. InputError for an unknown one."""
    full, patch = presets.demo_video(), model.vision.patch_size
    middle = full.frames // 2
    patches = tuple(tube for tube in full.tubes if tube.is_patches(patch))
    videos = {
        "full": full,
        "no tubes": dataclasses.replace(full, tubes=patches),
        "middle frame": presets.patches_only(patch, full.frames, every=full.frames, first=middle),
        "five frames": presets.patches_only(patch, full.frames, every=3, first=1),
    }
    if row not in videos:
        raise InputError(f"unknown row {row!r}; expected some of {', '.join(videos)}")
    return videos[row]


def small_start(out: Path) -> str:
    """OUT/start: 1.3 M random weights, the same each time, for pictures of 64 px. Written where it is not there."""
    folder = out / "start"
    if not folder.is_dir():
        tokenizer_json = (DEMO_FOLDER / "tokenizer.json").read_bytes()
        tokenizer = Tokenizer.from_bytes(tokenizer_json)
        demo = presets.demo(tokenizer.vocab_size)
        vision = dataclasses.replace(demo.vision, image_size=64, width=96, layers=3, mlp_width=384)
        text = dataclasses.replace(demo.text, width=96, layers=2, heads=2, mlp_width=384, cross_after=(0, 1))
        config = dataclasses.replace(demo, name="small", vision=vision, text=text, embed_dim=96)
        torch.manual_seed(0)
        model = Mammut(config, tokenizer.pad_id)
        structured_start(model, 0)
        rule = PreprocessRule(64, MEAN, STD, "bilinear", "squash", 0)
        save_checkpoint(folder, model, tokenizer_json, rule, recipe.PROMPTS)
    return str(folder)


def row_run(data: Path, out: Path, start: str, row: str, steps: int) -> RunConfig:
    """The training of one row. Writes OUT/data where it is not there. Errors as recipe.training_pairs'.

    Captions and questions only: matching texts would take a third of the time and is not judged here.

    Args:
        start: a checkpoint for pictures only; "": OUT/start, a small model with random weights.
    """
    photos, drawings = out / "data" / "photos.tar", out / "data" / "scene-drawings.tar"
    if not photos.is_file():
        recipe.write_whole(photos, recipe.packed(recipe.Training(recipe.photo_pairs(data, "train"), 1.0)))
    if not drawings.is_file():
        recipe.write_whole(drawings, recipe.packed(recipe.Training(recipe.scene_pairs(data), 1.0)))
    base = _beginning(start or small_start(out), Source((str(photos),), "photo", 1.0), steps)
    size = base.model.vision.image_size
    source = Source((str(photos),), "moving", 1.0, 0.75, (str(drawings),))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, video=video_of(row, base.model)),
        data=dataclasses.replace(base.data, sources=(source,)),
        objective=ObjectiveOptions(contrastive_weight=0.0),
        stages=(StageOptions(steps, size, 1e-3, min(100, steps // 2), "cosine", False),),
        batch_size=BATCH,
        save=SaveOptions(200, 1, "whole", max(1, min(20, steps // 2)), False, "float32"),
    )


def _beginning(start: str, source: Source, steps: int) -> RunConfig:
    """A run for pictures, before it becomes one for clips."""
    found = load_checkpoint(start)
    if found.model.config.video is not None:
        raise InputError(f"{start}: expected a model for pictures only, got one that has been trained on clips")
    config = small_set(found.model.config, (source,), steps, start=start)
    return dataclasses.replace(config, preprocess=found.preprocess, prompts=found.prompts)


def planned(
    data: Path, out: Path, place: Place, start: str, rows: Sequence[str], steps: int | None, minutes: float | None
) -> Plan:
    """What OUT says, or where it says nothing: so many steps, or as many as take so long with all rows together.

    Raises:
        InputError: neither steps nor minutes are given, or OUT holds another comparison.
    """
    path = out / PLAN
    if path.is_file():
        stored = from_dict(Plan, parse_json(path.read_bytes(), str(path), InputError), str(path), InputError)
        wanted = Plan(start, tuple(rows), steps or stored.steps)
        if stored != wanted:
            raise InputError(f"{out}: holds {stored}; give the same again, or another folder")
        return stored
    if steps is None and minutes is None:
        raise InputError("clips-ablation: expected --steps or --minutes")
    if steps is None:
        seconds = sum(_step_seconds(data, out, place, start, row) for row in rows)
        steps = max(2, int(60 * (minutes or 0) / seconds))
    plan = Plan(start, tuple(rows), steps)
    recipe.write_whole(path, to_json(plan))
    return plan


def _step_seconds(data: Path, out: Path, place: Place, start: str, row: str) -> float:
    """Of a row, measured on a few steps after the first few."""
    config = row_run(data, out, start, row, 2 * _TIMED_STEPS)
    config = dataclasses.replace(config, save=dataclasses.replace(config.save, log_every=_TIMED_STEPS))
    with tempfile.TemporaryDirectory(prefix="mammut-timed-") as folder:
        train(config, Path(folder), place)
        return BATCH / float(read_log(Path(folder))[-1]["pictures_per_s"])


def trained(
    data: Path, out: Path, place: Place, plan: Plan, note: Callable[[str], None] = lambda message: None
) -> dict[str, Checkpoint]:
    """All rows, going on where one was stopped; those that are done are not trained again."""
    found = {}
    for row in plan.rows:
        folder = out / row.replace(" ", "-")
        if not (folder / CHECKPOINT_FOLDER).is_dir():
            note(f"row {row}: {plan.steps} steps")
            train(row_run(data, out, plan.start, row, plan.steps), folder, place, resume=True, note=note)
        found[row] = load_checkpoint(str(folder / CHECKPOINT_FOLDER))
    return found


def compared(
    data: Path, plan: Plan, rows: Mapping[str, Checkpoint], clips: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """As clip_evaluation.evaluate_clips, with rows in the place of views, and with by how much the first row is better
    than each other."""
    usual = usual_answers(training_questions(data, TRAINING_CLIPS))
    viewers = {row: Viewer(checkpoint, view_of(checkpoint.model, "full")) for row, checkpoint in rows.items()}
    size, frames, sets = rows[plan.rows[0]].preprocess.size, presets.demo_video().frames, {}
    for name, new in SETS.items():
        held = held_out_clips(data, clips, frames=frames, size=size, new_drawings=new)
        answers = answered(held, viewers, usual, advance)
        sets[name] = with_differences(figures(answers), answers, plan.rows)
    tokens = {row: checkpoint.model.config.video_tokens for row, checkpoint in rows.items()}
    facts = {"start": plan.start, "steps": plan.steps, "batch": BATCH, "tokens": tokens}
    return {**facts, "clips": clips, "frames": frames, "views": list(plan.rows), "sets": sets}


def with_differences(found: dict[str, Any], answers: Answers, rows: Sequence[str]) -> dict[str, Any]:
    """Also by how much the first row is better than each of the others, on the same resamples."""
    kinds, groups = np.array(answers.kinds), groups_of(answers)
    for kind in (*CLIP_QUESTION_KINDS, CAPTION):
        counted = kinds == kind
        for row in rows[1:]:
            gain = np.array(answers.right[rows[0]], np.float64) - np.array(answers.right[row], np.float64)
            interval = Bootstrap().interval(mean_of(gain, counted), len(gain), groups)
            share = float(gain[counted].mean()) if counted.any() else float("nan")
            found[kind][f"{rows[0]} - {row}"] = cell(share, interval)
    return found

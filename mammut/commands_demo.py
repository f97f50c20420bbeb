"""`mammut-train demo` and what goes with it: training, judging and showing the model that ships."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import click

from mammut.commands_run import launch, start_run
from mammut_runtime import console
from mammut_runtime.errors import InputError

STAGES = ("pictures", "scenes", "rehearsal", "detector")
"""Of the model that ships."""
MORE_STAGES = (*STAGES, "motion", "everything")
BEFORE = {
    "scenes": "pictures",
    "rehearsal": "scenes",
    "detector": "rehearsal",
    "motion": "rehearsal",
    "everything": "motion",
}
"""The stage that one starts from."""
DONE = "done.json"
"""In a stage's folder, once it has taken all its steps: how many, and the hash of the checkpoint they gave."""


def _finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """NaN passes every comparison, so FloatRange takes it."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a number above 0, got {value}", context, parameter)
    return value


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--stage",
    type=click.Choice(MORE_STAGES),
    help="Only this one, after those before it.  [default: the first four]",
)
@click.option("--steps", type=click.IntRange(1), help="Length of each stage. Default: those of the shipped model.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True,
              help="One thread each if several. The detector has one.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(0, min_open=True), callback=_finite,
              help="Stop after so long, with a checkpoint; go on with --resume.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Leave out the stages that are done, and go on within the next.")
def demo(
    data: Path, out: Path, stage: str | None, steps: int | None, processes: int, minutes: float | None, resume: bool
) -> int:
    """Train the demo model that ships, from the DATA folder, in four stages.

    pictures: photographs, clothing, flowers, emoji, shapes. scenes: these, and scenes composed of emoji. rehearsal: the
    same in other shares, at a falling rate. detector: a head that finds things by name, on the encoder as it is then.
    OUT gets data/ and tokenizer.json (what DATA says, as training reads it), a folder for each stage, and checkpoint/
    when all four are done.

    Two more stages give the third's model tubes, which the shipped one does not have. motion: clips of moving emoji
    alone. everything: pictures and clips in turn, at a falling rate.
    """
    if stage is not None:
        _check_start(stage, data, out)
    if "WORLD_SIZE" in os.environ:
        return _one_of_several(stage, data, out, steps, resume=resume, minutes=minutes)
    until = None if minutes is None else time.monotonic() + 60 * minutes
    for each in STAGES if stage is None else (stage,):
        if not (resume and _done(each, out / each, _steps(each, steps))):
            left = None if until is None else max(0.1, (until - time.monotonic()) / 60)
            console.note(f"stage {each}")
            if each == "detector" and processes > 1:
                console.note("stage detector: trained by one process; --processes is not used")
            code = _stage(each, data, out, steps, processes, resume=resume, minutes=left)
            if code or not _mark_done(each, out / each, _steps(each, steps)):
                return code
    last = out / (stage or STAGES[-1]) / "checkpoint"
    if stage is None:
        last = _published(last, out / "checkpoint")
    console.note(f"checkpoint: {last}")
    return 0


def _one_of_several(stage: str | None, data: Path, out: Path, steps: int | None, **given: Any) -> int:
    """What one of several processes (torchrun's) does: its part of a stage."""
    if stage in (None, "detector"):
        raise InputError(
            "demo under torchrun (WORLD_SIZE is set): expected --stage with any but detector; for all "
            "stages give --processes instead, without torchrun"
        )
    assert stage is not None
    code = _stage(stage, data, out, steps, 1, **given)
    if not code and os.environ.get("RANK", "0") == "0":
        _mark_done(stage, out / stage, _steps(stage, steps))
    return code


def _stage(stage: str, data: Path, out: Path, steps: int | None, processes: int, **given: Any) -> int:
    """Train one stage. Several processes give themselves the command that this one was."""
    if stage == "detector":
        return _detector(data, out, steps, **given)
    from mammut.demo.evaluate import glance
    from mammut.demo.recipe import stage_run, write_whole
    from mammut.training.run_state import begun
    from mammut_runtime.strict import to_json

    config, folder = stage_run(stage, data, out, steps), out / stage
    if begun(folder, given["resume"]) is None:  # a run that is resumed, or refused, keeps its own
        write_whole(folder / "config.json", to_json(config))
        (folder / DONE).unlink(missing_ok=True)
    if processes > 1:
        again = ["demo", str(data), str(out), "--stage", stage, "--steps", str(config.steps)]
        return launch(again, processes, **given)
    return start_run(config, folder, evaluate=glance(data), **given)


def _detector(data: Path, out: Path, steps: int | None, resume: bool, minutes: float | None) -> int:
    """The detector's head, by the command for it: on scenes, blood cells and playing cards."""
    from mammut.commands_detect import detect
    from mammut.demo.recipe import box_specs

    arguments = [str(out / "rehearsal" / "checkpoint"), str(out / "detector")]
    arguments += ["--scenes", str(data), "--scenes-share", "4"]
    arguments += [text for spec in box_specs(data, "train") for text in ("--boxes", spec)]
    arguments += ["--steps", str(_steps("detector", steps)), "--batch-size", "16", "--bfloat16"]
    arguments += ["--resume"] * resume + (["--minutes", str(minutes)] if minutes is not None else [])
    code: int = detect.main(arguments, prog_name="mammut-train detect", standalone_mode=False)
    return code


def _steps(stage: str, steps: int | None) -> int:
    from mammut.demo.recipe import STEPS_OF

    return steps or STEPS_OF[stage]


def _check_start(stage: str, data: Path, out: Path) -> None:
    """InputError unless the stage before this one is done, in whatever number of steps."""
    before = BEFORE.get(stage)
    if before is not None and not _done(before, out / before, None):
        raise InputError(
            f"--stage {stage} starts from {out / before / 'checkpoint'}, and stage {before} is not done (no {DONE} "
            f"that fits); first run: mammut-train demo {data} {out} --stage {before} --resume"
        )


def _done(stage: str, folder: Path, steps: int | None) -> bool:
    """Whether the stage has taken its `steps` (None: however many), and its checkpoint is what they gave."""
    try:
        found, digest = json.loads((folder / DONE).read_bytes()), _weights_sha256(folder)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or (found.get("stage"), found.get("sha256")) != (stage, digest):
        return False
    return steps is None or found.get("steps") == steps


def _mark_done(stage: str, folder: Path, steps: int) -> bool:
    """Say that a stage which has returned is done; False where it was stopped before its last step."""
    from mammut.demo.recipe import write_whole

    if _steps_taken(stage, folder) != steps:
        return False
    row = {"stage": stage, "steps": steps, "sha256": _weights_sha256(folder)}
    write_whole(folder / DONE, (json.dumps(row) + "\n").encode())
    return True


def _steps_taken(stage: str, folder: Path) -> int | None:
    """As the run's own newest state says, which is whole; None where there is none."""
    if stage == "detector":
        import torch

        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            return int(state["step"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            return None
    from mammut.training.run_state import saved_steps

    found = saved_steps(folder)
    return int(found[-1].name.removeprefix("step-")) if found else None


def _weights_sha256(folder: Path) -> str:
    with (folder / "checkpoint" / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published(checkpoint: Path, target: Path) -> Path:
    """Copy a checkpoint to `target`, in the place of what is there: a kill never leaves a mixture of both."""
    new, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(checkpoint, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


@click.command("demo-eval")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="demo", show_default=True, help="A checkpoint in any form.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also draw a contact sheet of held-out pictures (.jpg).")
def demo_eval(data: Path, checkpoint: str, sheet: Path | None) -> None:
    """Print the model card's figures of pictures and scenes, measured on what is held out of the DATA folder, as JSON.

    For clips see `clips-eval`, for boxes `detect-eval`.
    """
    from mammut.checkpoint import load_checkpoint
    from mammut.demo.contact_sheet import draw_sheet
    from mammut.demo.evaluate import evaluate
    from mammut.demo.evaluate_scenes import evaluate_scenes

    loaded = load_checkpoint(checkpoint)
    if sheet is not None:
        draw_sheet(loaded, data, sheet)
    console.echo_json(evaluate(loaded, data) | {"scenes": evaluate_scenes(loaded, data)})


@click.command("demo-data")
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def demo_data(data: Path, out: Path) -> None:
    """Write the pictures that the demo is judged on, one tar for each kind, for mammut-eval and other tools."""
    from mammut.demo.recipe import Training, held_out, packed, write_whole

    for kind, pairs in held_out(data).items():
        write_whole(out / f"{kind}.tar", packed(Training(pairs, 1.0)))
        console.note(f"{out / kind}.tar: {len(pairs)} pictures")

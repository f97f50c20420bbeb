"""`mammut-train demo` and what goes with it: training, judging and showing the model that ships."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import click

from mammut.commands_run import launch, start_run
from mammut_runtime import console

STAGES = ("pictures", "scenes", "rehearsal", "detector")
"""Of the model that ships."""
MORE_STAGES = (*STAGES, "clips")


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--stage",
    type=click.Choice(MORE_STAGES),
    help="Only this one, after those before it.  [default: all but clips]",
)
@click.option("--steps", type=click.IntRange(1), help="Length of each stage. Default: those of the shipped model.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="One thread each if several.")
@click.option("--minutes", type=float, help="Stop after so long, with a checkpoint; go on with --resume.")
@click.option("--resume", is_flag=True, help="Leave out the stages that are done, and go on within the next.")
def demo(
    data: Path, out: Path, stage: str | None, steps: int | None, processes: int, minutes: float | None, resume: bool
) -> int:
    """Train the demo model that ships, from the DATA folder, in four stages.

    pictures: photographs, clothing, flowers, emoji, shapes. scenes: these, and scenes composed of emoji. rehearsal: the
    same in other shares, at a falling rate. detector: a head that finds things by name, on the encoder as it is then.
    OUT gets data/ and tokenizer.json (what DATA says, as training reads it), a folder for each stage, and checkpoint/.

    clips is a stage that the shipped model does not have: the third stage's model with tubes, trained on clips of
    moving emoji beside all pictures.
    """
    if "WORLD_SIZE" in os.environ:  # one of several processes of a stage
        return _stage(stage or "", data, out, steps, 1, resume=resume, minutes=minutes)
    until = None if minutes is None else time.monotonic() + 60 * minutes
    for each in STAGES if stage is None else (stage,):
        if not (resume and _done(each, out / each, steps)):
            left = None if until is None else max(0.1, (until - time.monotonic()) / 60)
            console.note(f"stage {each}")
            code = _stage(each, data, out, steps, processes, resume=resume, minutes=left)
            if code or not _done(each, out / each, steps):
                return code
        shutil.copytree(out / each / "checkpoint", out / "checkpoint", dirs_exist_ok=True)
    console.note(f"checkpoint: {out / 'checkpoint'}")
    return 0


def _stage(stage: str, data: Path, out: Path, steps: int | None, processes: int, **given: Any) -> int:
    """Train one stage. Several processes give themselves the command that this one was."""
    if stage == "detector":
        return _detector(data, out, steps, **given)
    from mammut.demo.evaluate import glance
    from mammut.demo.recipe import stage_run
    from mammut.training.run_state import begun
    from mammut_runtime.strict import to_json

    config, folder = stage_run(stage, data, out, steps), out / stage
    begun(folder, given["resume"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(to_json(config))
    if processes > 1:
        again = ["demo", str(data), str(out), "--stage", stage, "--steps", str(config.steps)]
        return launch(again, processes, **given)
    return start_run(config, folder, evaluate=glance(data), **given)


def _detector(data: Path, out: Path, steps: int | None, resume: bool, minutes: float | None) -> int:
    """The detector's head, by the command for it: on scenes, blood cells and playing cards."""
    from mammut.commands_detect import detect
    from mammut.demo.recipe import DETECTOR_STEPS, box_specs

    arguments = [str(out / "rehearsal" / "checkpoint"), str(out / "detector")]
    arguments += ["--scenes", str(data), "--scenes-share", "4"]
    arguments += [text for spec in box_specs(data, "train") for text in ("--boxes", spec)]
    arguments += ["--steps", str(steps or DETECTOR_STEPS), "--batch-size", "16", "--bfloat16"]
    arguments += ["--resume"] * resume + (["--minutes", str(minutes)] if minutes is not None else [])
    code: int = detect.main(arguments, prog_name="mammut-train detect", standalone_mode=False)
    return code


def _done(stage: str, folder: Path, steps: int | None) -> bool:
    """Whether a stage has taken all its steps; its checkpoint is written after the last."""
    from mammut.demo.recipe import STEPS_OF

    log = folder / "log.jsonl"
    if not log.is_file() or not (folder / "checkpoint").is_dir():
        return False
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return int(last["step"]) >= (steps or STEPS_OF[stage])


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

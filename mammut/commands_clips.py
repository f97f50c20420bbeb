"""`mammut-train clips-eval` and `clips-ablation`: a thin shell over demo/clip_evaluation.py and clip_ablation.py."""

from __future__ import annotations

from pathlib import Path

import click

from mammut_runtime import console

_FILE = click.Path(path_type=Path)


@click.command("clips-eval")
@click.argument("data", type=_FILE)
@click.option("--checkpoint", default="demo", show_default=True, help="A checkpoint with video, in any form.")
@click.option("--clips", type=click.IntRange(6), help="Judged for each set of drawings. Default: 900.")
@click.option("--json", "json_file", type=_FILE, help="Write every figure there.")
@click.option("--sheet", type=_FILE, help="Also draw some of the clips with what the model says (.png or .jpg).")
def clips_eval(data: Path, checkpoint: str, clips: int | None, json_file: Path | None, sheet: Path | None) -> None:
    """Ask a checkpoint what happens in composed clips that it has not seen, and print a table by kind of question.

    DATA is the data folder of the demo recipe. Beside the whole model stand what its patches alone reach, what the
    middle frame as a still picture does, and what is reached without looking.
    """
    from mammut.checkpoint import load_checkpoint
    from mammut.demo.clip_evaluation import CLIPS, draw_answers, evaluate_clips, table
    from mammut.evaluation.report import write_text

    loaded, number = load_checkpoint(checkpoint), clips or CLIPS
    with console.Progress("clips", 2 * number) as progress:
        found = evaluate_clips(loaded, data, number, advance=progress.advance)
    for line in table(found):
        click.echo(line)
    if json_file is not None:
        write_text(json_file, console.json_line(found) + "\n")
        console.note(f"figures: {json_file}")
    if sheet is not None:
        draw_answers(loaded, data, sheet)
        console.note(f"sheet: {sheet}")


@click.command("clips-ablation")
@click.argument("data", type=_FILE)
@click.argument("out", type=_FILE)
@click.option(
    "--start", default="", help="A checkpoint for pictures only. Default: a small model of 64 px with random weights."
)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Train all rows for about so long together."
)
@click.option("--steps", type=click.IntRange(2), help="Or: steps of each row.")
@click.option("--rows", default="full,no tubes,middle frame", show_default=True, help='Also "five frames".')
@click.option("--clips", type=click.IntRange(6), help="Judged for each set of drawings. Default: 900.")
def clips_ablation(
    data: Path, out: Path, start: str, minutes: float | None, steps: int | None, rows: str, clips: int | None
) -> None:
    """Fine-tune on composed clips with all tubes, with patches alone, and with the middle frame alone, and compare.

    Every row takes as many steps. OUT gets a folder for each row and figures.json; rows that were stopped go on.
    """
    from mammut.demo.clip_ablation import compared, planned, trained
    from mammut.demo.clip_evaluation import CLIPS, table
    from mammut.evaluation.report import write_text
    from mammut.training.parallel import joined

    wanted = [row.strip() for row in rows.split(",") if row.strip()]
    with joined("auto") as place:
        plan = planned(data, out, place, start, wanted, steps, minutes)
        checkpoints, number = trained(data, out, place, plan, console.note), clips or CLIPS
    with console.Progress("clips", 2 * number) as progress:
        found = compared(data, plan, checkpoints, number, progress.advance)
    for line in table(found):
        click.echo(line)
    write_text(out / "figures.json", console.json_line(found) + "\n")
    console.note(f"figures: {out / 'figures.json'}")

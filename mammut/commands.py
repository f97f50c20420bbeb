"""`mammut-train`: a thin shell over train.py, data.py and the demo's recipe. For runs at scale see commands_run.py."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from mammut.commands_run import new, repeat, run_command, start_run
from mammut_runtime import console


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option(
    "--resume-config", type=click.Path(path_type=Path), help="Instead of a command: repeat the run of this checkpoint."
)
@click.option("--out", type=click.Path(path_type=Path), help="With --resume-config: gets the new run.")
@click.pass_context
def cli(context: click.Context, resume_config: Path | None, out: Path | None) -> int | None:
    """Train MaMMUT models on image-text pairs."""
    if context.invoked_subcommand:
        if resume_config or out:
            raise click.UsageError(f"--resume-config and --out go without a command, got {context.invoked_subcommand}")
        return None
    if resume_config is None:
        click.echo(context.get_help())
        return None
    if out is None:
        raise click.UsageError("--resume-config: expected --out with the folder of the new run")
    from mammut.loop import stored_config

    return start_run(stored_config(resume_config), out)


for _command in (new, repeat, run_command):
    cli.add_command(_command)


@cli.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", type=float, default=None, help="Length of the run. Default: that of the shipped model.")
@click.option("--workers", type=int, default=None, help="Processes, one thread each. Default: 3.")
@click.option("--resume", is_flag=True, help="Go on from OUT/training.pt.")
def demo(data: Path, out: Path, minutes: float | None, workers: int | None, resume: bool) -> None:
    """Train the demo model that ships, from the DATA folder; OUT gets training.pt, log.jsonl and checkpoint/."""
    from mammut.demo_recipe import demo_job
    from mammut.train import train

    job = demo_job(data, out, minutes=minutes, workers=workers, warn=console.note)
    job = dataclasses.replace(job, resume=resume, report=report)
    console.note(f"checkpoint: {train(job)}")


@cli.command("demo-eval")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="demo", show_default=True, help="A checkpoint in any form.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also draw a contact sheet of held-out pictures (.jpg).")
def demo_eval(data: Path, checkpoint: str, sheet: Path | None) -> None:
    """Print every figure of the demo's model card, measured on held-out pictures of the DATA folder, as JSON."""
    from mammut.checkpoint import load_checkpoint
    from mammut.contact_sheet import draw_sheet
    from mammut.evaluate_demo import evaluate

    loaded = load_checkpoint(checkpoint)
    if sheet is not None:
        draw_sheet(loaded, data, sheet)
    console.echo_json(evaluate(loaded, data))


@cli.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--preset", default="demo", show_default=True, help="demo, tiny, paper-base, paper-huge, openmammut-B-32 ..."
)
@click.option("--init", help="Start from this checkpoint instead of a preset with random weights.")
@click.option("--steps", type=int, help="Length of the run; such runs can be repeated exactly.")
@click.option("--minutes", type=float, help="Length of the run by the clock.")
@click.option("--batch-size", type=int, default=96, show_default=True)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes, one thread each if more than one.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option(
    "--question-share", type=float, default=0.4, show_default=True, help="How often to ask instead of caption."
)
@click.option("--vocab-size", type=int, default=2048, show_default=True, help="Of the tokenizer trained on the texts.")
@click.option(
    "--max-damaged", type=float, default=0.01, show_default=True, help="Share of pictures that may be unreadable."
)
@click.option("--no-mirror", is_flag=True, help="For pictures of writing, and texts that say left and right.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from OUT/training.pt.")
def fit(data: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Train on your own pairs.

    DATA are WebDataset tars (KEY.jpg with KEY.json or KEY.txt) or folders with a pairs.jsonl of {"file", "caption"}
    or {"file", "question", "answer"} lines. OUT gets training.pt, log.jsonl and checkpoint/.
    """
    from mammut.augment import AugmentOptions
    from mammut.fit import FitOptions, fit_job
    from mammut.train import TrainOptions, train

    own = {key: given.pop(key) for key in ("preset", "init", "vocab_size", "max_damaged")}
    resume, augment = given.pop("resume"), AugmentOptions(mirror=not given.pop("no_mirror"))
    options = TrainOptions(**given, augment=augment)
    job = fit_job(data, out, FitOptions(**own), options, warn=console.note)
    console.note(f"checkpoint: {train(dataclasses.replace(job, resume=resume, report=report))}")


def report(row: dict[str, Any]) -> None:
    """One line on stderr for a logged row."""
    console.note(
        f"{row['progress']:6.1%}  step {row['step']:6d}  {row['image_size']} px  contrastive "
        f"{row['loss_contrastive']:.3f}  caption {row['loss_caption']:.3f}  {row['pictures_per_s']:.0f} pictures/s"
    )


def main() -> int:
    """The entry point of `mammut-train`."""
    return console.run(cli)


if __name__ == "__main__":  # torchrun -m mammut.commands
    sys.exit(main())

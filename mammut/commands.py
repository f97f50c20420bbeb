"""`mammut-train`: a thin shell over train.py, data.py and the demo's recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mammut_runtime import console


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train MaMMUT models on image-text pairs."""


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
    job = dataclasses.replace(job, resume=resume, report=_reporter())
    console.note(f"checkpoint: {train(job)}")


def _reporter() -> Callable[[dict[str, Any]], None]:
    """One line on stderr for each logged row."""

    def report(row: dict[str, Any]) -> None:
        console.note(
            f"{row['progress']:6.1%}  step {row['step']:6d}  {row['image_size']} px  contrastive "
            f"{row['loss_contrastive']:.3f}  caption {row['loss_caption']:.3f}  {row['pictures_per_s']:.0f} pictures/s"
        )

    return report


def main() -> int:
    """The entry point of `mammut-train`."""
    return console.run(cli)

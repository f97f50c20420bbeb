"""`mammut-train ablate`: the paper's comparisons with small models, and the table of them."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mammut_runtime import console


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--rows", "names", default="", help="Some of them, as docs/ablations.md names them: focal,causal. Default: all."
)
@click.option("--seeds", type=click.IntRange(1, 11), default=3, show_default=True, help="Runs of each row.")
@click.option("--steps", type=click.IntRange(1), help="Length of each run. Default: that of docs/ablations.md.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--nice", type=click.IntRange(0, 19), default=10, show_default=True, help="How far others go first.")
@click.option("--write", type=click.Path(path_type=Path), help="Also put the tables into this page (Markdown).")
@click.option("--measure-again", is_flag=True, help="Also measure finished runs again, from their checkpoints.")
@click.option("--collect", is_flag=True, help="Train nothing: the tables of the runs that OUT has.")
def ablate(
    data: Path,
    out: Path,
    names: str,
    seeds: int,
    steps: int | None,
    threads: int,
    nice: int,
    write: Path | None,
    measure_again: bool,
    collect: bool,
) -> None:
    """Train small models that differ in one choice of the paper, on the DATA folder, and compare them.

    OUT gets results.jsonl, a line for each finished run; the same command again goes on with those that are missing.
    Prints the tables of all runs that OUT then has.
    """
    from mammut.demo.ablation_table import check_page, markdown, write_into
    from mammut.demo.ablations import STEPS, chosen, read_results

    wanted = chosen(names)
    if write is not None:
        check_page(write)
    if not collect:
        _be_polite(threads, nice)
        from mammut.demo.ablation_measures import held_out
        from mammut.demo.ablations import prepare, run_rows

        prepared = prepare(data, out)
        given = {"seeds": seeds, "steps": steps or STEPS, "measure_again": measure_again}
        for result in run_rows(wanted, prepared, held_out(data), out, note=console.note, **given):  # type: ignore[arg-type]
            console.note(f"row {result.row}, seed {result.seed}: {console.json_line(dict(result.figures))}")
    text = markdown(read_results(out))
    if write is not None:
        write_into(write, text)
    click.echo(text)


def _be_polite(threads: int, nice: int) -> None:
    """For this process: no more threads than asked for, and others first."""
    import cv2
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    if nice and hasattr(os, "nice"):
        os.nice(nice)

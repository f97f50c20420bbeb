"""`mammut-calibrate`: a thin shell over data.py, collect.py, table.py and plot.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from mammut_calibration.activations import SCOPES
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.commands_scores import scores
from mammut_calibration.data import DEFAULT_HELD_OUT, DEFAULT_LIMIT, Dataset, open_dataset
from mammut_calibration.plot import write_plot
from mammut_calibration.table import CalibrationTable, save_table
from mammut_runtime import console
from mammut_runtime.bundle import MANIFEST_FILE, Bundle
from mammut_runtime.errors import EngineError, InputError, VerificationError

_EXPORT = "mammut-export"


@click.command("mammut-calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="BUNDLE_OR_CHECKPOINT")
@click.argument("data", nargs=-1, required=True, metavar="DATA...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("calibration.npz"),
    show_default=True,
    help="The table. An unfinished calibration is kept beside it, as OUT.part.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="The page. Default: OUT with .html.")
@click.option("--overwrite", is_flag=True, help="Replace a table that is there.")
@click.option("--limit", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, help="Most pictures.")
@click.option(
    "--held-out",
    type=float,
    default=DEFAULT_HELD_OUT,
    show_default=True,
    help="Share of the pictures to leave for judging the quantized bundle; 0 takes all.",
)
@click.option("--every", type=float, default=1.0, show_default=True, help="Seconds between the frames of a clip.")
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="linear",
    show_default=True,
    help="Which values: around layers with weights, also of attention's products, or all.",
)
@click.option(
    "--max-damaged", type=float, default=0.1, show_default=True, help="Share of pictures that may be unreadable."
)
@click.option("--max-tokens", type=click.IntRange(1), default=24, show_default=True, help="Longest generated caption.")
@click.option("--threads", type=click.IntRange(0), default=0, help="0 takes the physical cores.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the ranges of every tensor as one JSON object.")
def cli(
    *,
    model: str,
    data: tuple[Path, ...],
    out: Path,
    plot: Path | None,
    overwrite: bool,
    limit: int,
    held_out: float,
    every: float,
    scope: str,
    max_damaged: float,
    max_tokens: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure the ranges of a model's activations on your own data.

    BUNDLE_OR_CHECKPOINT is an fp32 bundle, or a checkpoint in any form that mammut-export takes. DATA are folders of
    pictures, WebDataset tars, and clips. Interrupted, the same command goes on where it stopped.

    `mammut-calibrate scores --help`: thresholds of a detector's names, by how many false alarms are bearable.
    """
    options = CalibrateOptions(scope=scope, max_damaged=max_damaged, max_tokens=max_tokens, threads=threads)  # type: ignore[arg-type]
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; give another name with --out, or --overwrite")
    chosen = _chosen_data(data, limit, every, held_out)
    with _opened(model) as bundle, console.Progress("calibrating", len(chosen)) as progress:

        def note(line: str) -> None:
            progress.clear()
            console.note(line)

        table = calibrate(
            bundle, chosen, options, state=out.with_name(f"{out.name}.part"), progress=progress, note=note
        )
    save_table(out, table)
    page = plot or out.with_suffix(".html")
    write_plot(page, table)
    _report(table, out, page, as_json)


def _chosen_data(places: tuple[Path, ...], limit: int, every: float, held_out: float) -> Dataset:
    data = open_dataset(places, limit, every)
    return data if held_out == 0 else data.split(held_out)[0]


@contextlib.contextmanager
def _opened(model: str) -> Iterator[Bundle]:
    """A bundle as it is, or an fp32 one made of a checkpoint for as long as it is needed."""
    if (Path(model) / MANIFEST_FILE).exists():
        yield Bundle.open(model)
        return
    with tempfile.TemporaryDirectory(prefix="mammut-calibrate-") as folder:
        bundle = Path(folder) / "bundle"
        _export(model, bundle)
        yield Bundle.open(bundle)


def _export(checkpoint: str, bundle: Path) -> None:
    """Run mammut-export in a process of its own: what it needs (PyTorch) is no part of calibration.

    Raises InputError or VerificationError as its exit code says; what is wrong, it has printed itself.
    """
    beside = Path(sys.executable).with_name(_EXPORT)
    program = str(beside) if beside.exists() else shutil.which(_EXPORT)
    if program is None:
        raise EngineError(
            f"{checkpoint}: is no bundle (no {MANIFEST_FILE}), and {_EXPORT} is not there to make one of a checkpoint; "
            f"pip install mammut-edge[export]"
        )
    console.note(f"{checkpoint}: is no bundle; exporting it in fp32 first")
    done = subprocess.run(
        [program, checkpoint, str(bundle), "--target", "onnxruntime"], check=False, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        kind = VerificationError if done.returncode == VerificationError.exit_code else InputError
        raise kind(
            f"{checkpoint}: {_EXPORT} failed with exit code {done.returncode}; expected a bundle or a checkpoint"
        )


def _report(table: CalibrationTable, out: Path, page: Path, as_json: bool) -> None:
    header = table.header
    if as_json:
        console.echo_json({"table": str(out), "plot": str(page), **table.to_dict()})
        return
    tensors = ", ".join(f"{graph} {len(each)}" for graph, each in table.graphs.items())
    click.echo(
        f"{header.pictures} different pictures ({header.repeated} repeated, {header.constant} of one colour and "
        f"{len(header.damaged)} damaged left out), {header.texts} texts, {header.tokens} generated tokens"
    )
    if header.clips:
        click.echo(f"{header.clips} clips: {header.filmed} filmed, {header.clips - header.filmed} made of pictures")
    click.echo(f"tensors: {tensors}")
    click.echo(f"table:   {console.printable(str(out))}")
    click.echo(f"plot:    {console.printable(str(page))}")


def main() -> int:
    """The entry point of `mammut-calibrate`."""
    # FFmpeg writes to the terminal what it thinks of damaged clips; we name them ourselves. Read when it is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if sys.argv[1:2] == ["scores"]:
        return console.run(scores, sys.argv[2:])
    return console.run(cli)

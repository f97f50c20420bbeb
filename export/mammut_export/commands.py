"""`mammut-export CHECKPOINT OUT`: makes a bundle for a device, and proves that it computes what PyTorch computes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mammut_runtime import console
from mammut_runtime.errors import InputError

TASK_NAMES = "caption,ask,match,search"


@click.command("mammut-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--target", default="onnxruntime", show_default=True, help="Engine that the bundle is for.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, or fp16: half the size, the same speed.")
@click.option(
    "--tasks", default=TASK_NAMES, show_default=True, help="What the device will do; fewer make a smaller bundle."
)
@click.option("--image-size", type=int, metavar="PIXELS", help="Input size other than the trained one.")
@click.option(
    "--max-tokens", type=int, metavar="N", help="Longest caption, tokens  [default: 40, or what the model holds]"
)
@click.option(
    "--pictures", multiple=True, type=click.Path(exists=True, path_type=Path), metavar="PATH",
    help="Pictures to check with, a file or a folder; may be repeated. The report shows them, small.  "
    "[default: a few that are drawn]",
)  # fmt: skip
@click.option(
    "--tolerance", type=float, metavar="X", help="Largest error, of an output's largest value  [default: by precision]"
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle at OUT.")
@click.option("--dry-run", is_flag=True, help="Print graphs, sizes, parameters and expected memory; write nothing.")
def cli(
    checkpoint: str,
    out: Path | None,
    target: str,
    precision: str,
    tasks: str,
    image_size: int | None,
    max_tokens: int | None,
    pictures: tuple[Path, ...],
    tolerance: float | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Make the bundle OUT from CHECKPOINT.

    CHECKPOINT is "demo", a folder, a weights file, or hf-hub:ORG/NAME. OUT is a folder to be made; it appears only when
    the bundle, run as a device runs it, gives what PyTorch gives.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT', the folder to make")
    _require_torch()
    from mammut.checkpoint import load_checkpoint
    from mammut_export.export import ExportOptions, export, plan_export
    from mammut_export.plan import describe

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = ExportOptions(target, precision, names, max_tokens, tolerance, pictures)
    steps = _Steps()
    steps("loading the checkpoint")
    loaded = load_checkpoint(checkpoint, image_size=image_size)
    if dry_run or out is None:
        for line in describe(plan_export(loaded, options)):
            click.echo(line)
        return
    result = export(loaded, out, options, overwrite=overwrite, progress=steps)
    for line in _summary(result):
        click.echo(line)


def main() -> int:
    """The entry point; returns the exit code: 0, 1 if the bundle differs from PyTorch, 2 for bad input."""
    return console.run(cli)


class _Steps:
    """Says on a terminal what is being done, a line for each step; elsewhere nothing."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, step: str) -> None:
        if sys.stderr.isatty():
            console.note(f"{time.monotonic() - self._start:6.1f} s  {step}")


def _summary(result: object) -> list[str]:
    from mammut_export.export import ExportResult
    from mammut_export.plan import megabytes

    assert isinstance(result, ExportResult)
    parity = result.parity
    worst = max(parity.outputs, key=lambda each: each.max_abs_error / each.tolerance)
    lines = [
        f"{console.printable(str(result.path))}: {megabytes(result.bundle_bytes)}, {result.size_ratio:.3f} of the "
        f"unique weights, in {result.seconds:.0f} s",
        f"parity: {len(parity.outputs)} outputs over {len(parity.shapes)} shapes; closest to its limit {worst.output}, "
        f"error {worst.max_abs_error:.2g} of {worst.tolerance:.2g} allowed",
    ]
    if parity.captions:
        same = sum(caption.verdict == "same" for caption in parity.captions)
        ties = sum(caption.verdict == "tie" for caption in parity.captions)
        lines.append(
            f"captions: {same} of {len(parity.captions)} the same token for token"
            + (f", {ties} part at a tie" if ties else "")
        )
    timings = ", ".join(f"{each.what} {each.milliseconds:.1f} ms" for each in parity.timings)
    return [*lines, f"times: {timings}", f"report: {console.printable(str(result.path / 'report.html'))}"]


def _require_torch() -> None:
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"exporting needs {error.name}; install it with: pip install 'mammut-edge[export]'") from error


if __name__ == "__main__":
    sys.exit(main())

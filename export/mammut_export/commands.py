"""`mammut-export CHECKPOINT OUT`: makes a bundle for a device, and proves that it computes what PyTorch computes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mammut_runtime import console
from mammut_runtime.errors import InputError

if TYPE_CHECKING:
    from mammut_calibration.drift import Drift, DriftLimits
    from mammut_export.export import ExportResult
    from mammut_export.quantize import QuantizedLayers

TASK_NAMES = "caption,ask,match,search,watch,detect"


@click.command("mammut-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--target", default="onnxruntime", show_default=True, help="Engine that the bundle is for.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32; fp16: half the size; int8; int8-dynamic: no ranges needed; int4: the smallest; auto: the fastest here "
    "that passes the gate. Or by graph: vision=int8,decoder=int4.",
)
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="DATA",
    help="Your own pictures, for quantized precisions: a folder, a WebDataset tar, a clip; may be repeated. A quarter "
    "is held out and judges the bundle.",
)
@click.option(
    "--calibration-table",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE",
    help="Ranges that mammut-calibrate has measured. [default: they are measured now]",
)
@click.option(
    "--drift-limit",
    multiple=True,
    metavar="MEASURE=VALUE",
    help="The least that a quantized bundle must reach, such as token_agreement=0.95; may be repeated.",
)
@click.option("--max-batch", type=click.IntRange(1), default=8, show_default=True, help="TensorRT: most at once.")
@click.option("--max-beams", type=click.IntRange(1), default=8, show_default=True, help="TensorRT: most beams.")
@click.option("--accept-drift", is_flag=True, help="Publish although limits are missed; the bundle says so ever after.")
@click.option(
    "--tasks",
    metavar="TASK,...",
    help=f"What the device will do, of {TASK_NAMES}; fewer make a smaller bundle. watch: clips, and how things move in "
    "them. detect: boxes of named things.  [default: all that the checkpoint can do]",
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
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="For measuring and judging.  [default: the physical cores]"
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle at OUT.")
@click.option("--dry-run", is_flag=True, help="Print graphs, sizes, parameters and expected memory; write nothing.")
@click.option(
    "--device",
    metavar="NAME",
    help="With --dry-run: also forecast speed and memory on orin-nano-8gb, orin-nx-16gb, "
    "agx-orin, thor, n100, pi5 or this-cpu.",
)
def cli(
    checkpoint: str,
    out: Path | None,
    target: str,
    precision: str,
    calibration: tuple[Path, ...],
    calibration_table: Path | None,
    drift_limit: tuple[str, ...],
    max_batch: int,
    max_beams: int,
    accept_drift: bool,
    tasks: str | None,
    image_size: int | None,
    max_tokens: int | None,
    pictures: tuple[Path, ...],
    tolerance: float | None,
    threads: int,
    overwrite: bool,
    dry_run: bool,
    device: str | None,
) -> None:
    """Make the bundle OUT from CHECKPOINT.

    CHECKPOINT is "demo", a folder, a weights file, or hf-hub:ORG/NAME. OUT is a folder to be made; it appears only when
    the bundle, run as a device runs it, gives what PyTorch gives.
    """
    if device is not None and not dry_run:
        raise click.UsageError("--device belongs to --dry-run: it forecasts, and nothing is exported")
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT', the folder to make")
    _require_torch()
    from mammut.checkpoint import load_checkpoint
    from mammut_export.export import export, plan_export
    from mammut_export.forecast import forecast
    from mammut_export.options import ExportOptions
    from mammut_export.plan import describe
    from mammut_export.profiles import ProfileLimits

    names = None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = ExportOptions(
        target=target,
        precision=precision,
        tasks=names,
        max_tokens=max_tokens,
        tolerance=tolerance,
        pictures=pictures,
        calibration=calibration,
        table=calibration_table,
        limits=_limits(drift_limit),
        accept_drift=accept_drift,
        largest=ProfileLimits(max_batch, max_batch, max_beams),
        threads=threads,
    )
    if not dry_run:
        options.check_data()
    steps = _Steps()
    steps("loading the checkpoint")
    loaded = load_checkpoint(checkpoint, image_size=image_size)
    if dry_run or out is None:
        plan = plan_export(loaded, options)
        _check_device(device, options.target)
        expected = forecast(plan, device, plan.schemes).lines() if device is not None else []
        for line in [*describe(plan), *expected]:
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


def _check_device(device: str | None, target: str) -> None:
    """Raises InputError for a target that the device does not run."""
    from mammut_export.forecast import DEVICES

    known = DEVICES.get(device or "")
    if known is not None and (known.kind == "gpu") != (target == "tensorrt"):
        wanted = "tensorrt" if known.kind == "gpu" else "onnxruntime or openvino"
        raise InputError(f"--device {device} is forecast for --target {wanted}, got {target}")


def _limits(given: tuple[str, ...]) -> DriftLimits:
    from mammut_calibration.drift import MEASURES, DriftLimits

    values: dict[str, float] = {}
    for each in given:
        name, _, number = each.partition("=")
        if name not in MEASURES:
            raise InputError(f"--drift-limit: expected one of {', '.join(MEASURES)}, got {name!r}")
        try:
            values[name] = float(number)
        except ValueError:
            raise InputError(f"--drift-limit: expected {name}=NUMBER, got {each!r}") from None
    return DriftLimits(**values)


def _summary(result: ExportResult) -> list[str]:
    from mammut_export.plan import megabytes

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
        clips = sum(caption.clip for caption in parity.captions)
        lines.append(
            f"captions: {same} of {len(parity.captions)}"
            + (f" ({clips} of them of clips)" if clips else "")
            + " the same token for token"
            + (f", {ties} part at a tie" if ties else "")
        )
    if result.quantized is not None:
        lines += _gate_summary(result)
    else:
        lines.append("times: " + ", ".join(f"{each.what} {each.milliseconds:.1f} ms" for each in parity.timings))
    return [*lines, f"report: {console.printable(str(result.path / 'report.html'))}"]


def _kept(layers: QuantizedLayers) -> str:
    floats = len(layers.kept) - len(layers.eight_bits)
    parts = [
        f"{count} layers in {what}"
        for count, what in ((len(layers.eight_bits), "8 bits"), (floats, "floating point"))
        if count
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _clips(drift: Drift) -> str:
    if not drift.clips:
        return ""
    return f" and {drift.clips} clips ({drift.filmed} filmed, {drift.clips - drift.filmed} made of the pictures)"


def _gate_summary(result: ExportResult) -> list[str]:
    made = result.quantized
    assert made is not None
    kinds = ", ".join(f"{each.graph} {each.scheme}" + _kept(each) for each in made.layers)
    lines = [f"precision: {kinds}"]
    if made.drift is not None:
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in made.drift.measures.items())
        lines.append(f"drift on {made.drift.pictures} held-out pictures{_clips(made.drift)}: {values}")
    if made.failures:
        lines.append(f"the gate is NOT passed, accepted with --accept-drift: {'; '.join(made.failures)}")
    if result.measured is not None:
        before, after = (each.figures for each in result.measured)
        pairs = [
            ("encode_ms", "picture"),
            ("encode_clip_ms", "clip"),
            ("text_64_ms", "64 texts"),
            ("caption_ms", "caption of 20 tokens"),
        ]
        times = [
            f"{words} {before[key]:.1f} to {after[key]:.1f} ms"
            for key, words in pairs
            if key in before and key in after
        ]
        engine = "ONNX Runtime, not TensorRT" if result.target == "tensorrt" else "this machine"
        lines.append(f"float32 to this, on {engine}: {', '.join(times)}")
    return lines


def _require_torch() -> None:
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"exporting needs {error.name}; install it with: pip install 'mammut-edge[export]'") from error


if __name__ == "__main__":
    sys.exit(main())

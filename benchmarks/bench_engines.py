"""Engines x precisions: size, speed, memory, and what the precision changes; README's table, in one run.

    python benchmarks/bench_engines.py --pictures DATA            nothing else should run meanwhile
    python benchmarks/bench_engines.py --models demo --precisions fp32,int8 --rounds 1 --repeats 3     a first look
    python benchmarks/bench_engines.py --models B-32 --precisions fp32 --with=--low-memory    an option of mammut-run

Models: the shipped demo; B-32 and L-14 are openMaMMUT's sizes with random weights (their captions are nonsense, their
cost is not). Every cell is `mammut-run bench` in a process of its own, batch 1: medians after warm-up of a picture's
encoding, a greedy caption of exactly 20 tokens, and 64 prompts; and the memory that the bundle's weights and graphs
take beside their unique bytes (memory_use.py says how). All cells of a model are measured in turn, `rounds` times, and
the median over the rounds counts, so that ratios are of the same minutes. Drift: the demo on pictures of DATA that
calibration did not see, against float32 on ONNX Runtime. Without DATA, the demo is calibrated with drawings, and there
is no drift. Prints a Markdown table, and one JSON object as the last line.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
from bench_runtime import FOLDER, prepared
from measuring import child, print_surroundings, surroundings

TARGETS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic", "int4")
TOKENS, MEMORY_LIMIT = 20, 1.4
DRAWN, PICTURE_SIZE = 24, (240, 320)
RUN = "import sys; from mammut_runtime.commands import main; sys.exit(main())"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A bundle to measure."""

    target: str
    precision: str
    bundle: Path
    extra: tuple[str, ...] = ()
    """Options of mammut-run bench."""

    @property
    def name(self) -> str:
        return " ".join((self.precision, *self.extra))


@click.command(help=__doc__)
@click.option("--models", default="demo,B-32,L-14", help="Comma-separated, of demo and the openMaMMUT sizes.")
@click.option("--targets", default=",".join(TARGETS), help="Comma-separated; onnxruntime in fp32 is always measured.")
@click.option("--precisions", default=",".join(PRECISIONS), help="Comma-separated; a target takes those that it has.")
@click.option("--pictures", multiple=True, type=click.Path(exists=True, path_type=Path), help="DATA for the demo.")
@click.option("--limit", type=click.IntRange(32), default=320, help="Pictures of DATA; a quarter is held out.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--repeats", type=click.IntRange(1), default=7)
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--with", "extras", multiple=True, metavar="OPTIONS", help="Also measure with these options.")
def main(
    models: str,
    targets: str,
    precisions: str,
    pictures: tuple[Path, ...],
    limit: int,
    threads: int,
    repeats: int,
    rounds: int,
    extras: tuple[str, ...],
) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = surroundings()
    print_surroundings(about)
    print(f"batch 1, {threads} thread(s), median of {repeats} after warm-up, median of {rounds} round(s)\n", flush=True)
    rows: list[Row] = []
    for model in models.split(","):
        _, reference = prepared(model)
        with made(model, reference, targets.split(","), precisions.split(","), pictures, limit, threads) as work:
            cells = [each for cell in work.cells for each in (cell, *variants(cell, extras))]
            found = [[measured(cell, threads, repeats) for cell in cells] for _ in range(rounds)]
            drifts = drift(reference, work, threads)
        rows += compared(
            [
                {"model": model, **settled(cell, measurements), "drift": drifts.get(cell)}
                for cell, measurements in zip(cells, zip(*found, strict=True), strict=True)
            ]
        )
        print(table(rows[-len(cells) :]), "\n", flush=True)
    for line in expectations(rows):
        print(line)
    print(json.dumps({"benchmark": "engines", "threads": threads, "repeats": repeats, "rounds": rounds, **about,
                      "rows": rows}))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """The bundles of a model, and the pictures to judge them with."""

    cells: tuple[Cell, ...]
    held_out: Any = None
    """A mammut_calibration Dataset, or None."""


@contextmanager
def made(
    model: str,
    reference: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    pictures: Sequence[Path],
    limit: int,
    threads: int,
) -> Iterator[Work]:
    """Bundles in every precision that a target has, made of the float32 one; they are deleted at the end."""
    from mammut_calibration.collect import CalibrateOptions, calibrate
    from mammut_calibration.data import open_dataset
    from mammut_export.precisions import SCHEMES
    from mammut_runtime.bundle import Bundle

    real = model == "demo" and bool(pictures)
    data = open_dataset(list(pictures) if real else [drawings()], limit)
    calibration, held_out = data.split() if real else (data, None)
    bundle, table = Bundle.open(reference), None
    if "int8" in precisions:
        note(f"{model}: calibrating with {len(calibration)} pictures")
        table = calibrate(bundle, calibration, CalibrateOptions(threads=threads))
    cells = [Cell("onnxruntime", "fp32", reference)]
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{model}-cells-") as scratch:
        for target in targets:
            for precision in precisions:
                if precision in SCHEMES[target] and (target, precision) != ("onnxruntime", "fp32"):
                    note(f"{model}: making {target} {precision}")
                    folder = Path(scratch) / f"{target}-{precision}"
                    write_cell(bundle, folder, target, precision, table)
                    cells.append(Cell(target, precision, folder))
        yield Work(tuple(cells), held_out)


def write_cell(reference: Any, folder: Path, target: str, precision: Any, table: Any) -> None:
    """A whole bundle, except that it has not passed the gate: what fails it is a figure here, too."""
    from mammut_export.precisions import quantization_info
    from mammut_export.quantize import write_quantized
    from mammut_runtime.bundle import hash_files, write_manifest

    folder.mkdir()
    manifest = reference.manifest
    schemes = dict.fromkeys(manifest.graphs, precision)
    graphs, layers = write_quantized(reference, folder, schemes, target, table)
    for name in manifest.files.keys() - {"report.html", "report.json"}:
        if not (folder / name).exists():
            shutil.copyfile(reference.path / name, folder / name)
    kept = {each.graph: each.kept for each in layers}
    info = {graph: quantization_info(precision, target, kept=kept.get(graph, ())) for graph in graphs}
    whole = dataclasses.replace(
        manifest,
        target=target,
        precision=precision,
        graphs=graphs,
        quantization={} if precision == "fp32" else info,
        files=hash_files(folder),
    )
    write_manifest(folder, whole)


def drawings() -> Path:
    """Pictures for what is not judged by them."""
    import cv2

    from mammut_runtime.canary import canary_picture

    folder = FOLDER / "drawings"
    folder.mkdir(exist_ok=True)
    for seed in range(DRAWN):
        cv2.imwrite(str(folder / f"{seed}.png"), canary_picture(seed, PICTURE_SIZE))
    return folder


def variants(cell: Cell, extras: Sequence[str]) -> list[Cell]:
    """The same bundle with other options of mammut-run."""
    return [dataclasses.replace(cell, extra=tuple(each.split())) for each in extras]


def measured(cell: Cell, threads: int, repeats: int) -> Row:
    """What `mammut-run bench` says of it."""
    note(f"measuring {cell.target} {cell.name}")
    options = ["--threads", str(threads), "--repeats", str(repeats), "--tokens", str(TOKENS), *cell.extra]
    return child(["-c", RUN, "bench", "--json", "--bundle", str(cell.bundle), *options], threads)


def settled(cell: Cell, measurements: Sequence[Row]) -> Row:
    """One row of all rounds: medians."""
    figures = ("open_ms", "encode_ms", "encode_1080p_ms", "text_1_ms", "text_64_ms", "caption_ms", "resident_bytes")
    row: Row = {"target": cell.target, "precision": cell.precision, "options": " ".join(cell.extra)}
    row |= {name: measurements[0][name] for name in ("tokens", "bundle_bytes", "unique_weight_bytes")}
    for name in figures:
        values = [each[name] for each in measurements if each[name] is not None]
        row[name] = median(values) if values else None
    row["caption_tokens_per_s"] = row["tokens"] / row["caption_ms"] * 1000
    row["resident_ratio"] = row["resident_bytes"] / row["unique_weight_bytes"] if row["resident_bytes"] else None
    return row


def compared(rows: list[Row]) -> list[Row]:
    """How many times faster than float32: on ONNX Runtime (`_speedup`), and on the same engine (`_own_speedup`)."""
    for row in rows:
        for kind, base in (("speedup", rows[0]), ("own_speedup", own_float32(row, rows))):
            for name in ("encode", "caption", "text_64"):
                row[f"{name}_{kind}"] = base[f"{name}_ms"] / row[f"{name}_ms"] if base else None
    return rows


def own_float32(row: Row, rows: Sequence[Row]) -> Row | None:
    return next((each for each in rows if (each["target"], each["precision"]) == (row["target"], "fp32")), None)


def drift(reference: Path, work: Work, threads: int) -> dict[Cell, dict[str, float]]:
    """Every measure of every cell but the reference, on the held-out pictures; nothing without them."""
    from mammut_calibration.behaviour import observe
    from mammut_calibration.drift import compare
    from mammut_runtime.engines import EngineOptions

    if work.held_out is None:
        return {}
    options = EngineOptions(threads=threads)
    before = observe(reference, work.held_out, options=options)
    found = {}
    for cell in work.cells[1:]:
        note(f"drift of {cell.target} {cell.name} on {len(work.held_out)} pictures")
        after = observe(cell.bundle, work.held_out, reference=before, options=options)
        found[cell] = compare(before, after).measures
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown. In brackets how many times faster than float32 on ONNX Runtime; memory: times the unique weights."""
    lines = [
        "| model | engine | precision | bundle MB | encode ms | caption tokens/s | 64 prompts ms | resident MB "
        "| embedding cosine | same tokens | same answers |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        measures = row["drift"] or {}
        shown = (measures.get(name) for name in ("embedding_cosine_mean", "token_agreement", "answer_agreement"))
        resident = "" if row["resident_bytes"] is None else f"{row['resident_bytes'] / 1e6:.0f}"
        ratio = "" if row["resident_ratio"] is None else f" ({row['resident_ratio']:.2f})"
        cells = [
            row["model"],
            row["target"],
            f"{row['precision']} {row['options']}".rstrip(),
            f"{row['bundle_bytes'] / 1e6:.0f}",
            f"{row['encode_ms']:.1f} ({row['encode_speedup']:.2f})",
            f"{row['caption_tokens_per_s']:.0f} ({row['caption_speedup']:.2f})",
            f"{row['text_64_ms']:.0f} ({row['text_64_speedup']:.2f})",
            resident + ratio,
            *("" if value is None else f"{value:.4f}" for value in shown),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def expectations(rows: Sequence[Row]) -> Iterator[str]:
    """What the project wants of these figures, and whether they reach it."""
    for row in rows:
        if row["options"]:
            continue
        name, measures = f"{row['model']}, {row['target']} {row['precision']}", row["drift"] or {}
        if row["resident_ratio"] is not None and row["precision"] in ("fp32", "int8"):
            yield said(f"{name}: resident memory", row["resident_ratio"], MEMORY_LIMIT, most=True)
        if row["precision"] == "int8" and row["encode_own_speedup"] is not None:
            yield said(f"{name}: encode", row["encode_own_speedup"], 1.7 if row["target"] == "onnxruntime" else 2.0)
        if row["precision"] == "int4" and row["caption_own_speedup"] is not None:
            yield said(f"{name}: tokens per second", row["caption_own_speedup"], 2.2)
        if row["precision"] == "int8" and measures:
            yield said(f"{name}: embedding cosine", measures["embedding_cosine_mean"], 0.999)
            yield said(f"{name}: same tokens", measures["token_agreement"], 0.98)


def said(what: str, value: float, wanted: float, most: bool = False) -> str:
    reached = value <= wanted if most else value >= wanted
    return f"{what} {value:.3f}, expected {'<=' if most else '>='} {wanted}: {'pass' if reached else 'FALLS SHORT'}"


def note(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()

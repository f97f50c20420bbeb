"""mammut-run bench: how fast a bundle is on this machine. Medians, and one JSON line last."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from mammut_runtime import console
from mammut_runtime.canary import canary_picture
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.commands_inputs import ModelSettings, json_option, model_options
from mammut_runtime.detection.vocabulary import Entry, Vocabulary
from mammut_runtime.doctor import Report, bundle_bytes, examine, peak_memory_bytes
from mammut_runtime.memory_use import measure_memory
from mammut_runtime.model import Model, Seen

WARM_UP = 2
PROMPTS = 64
NAMES = 20
"""To be found in a picture."""


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Medians of one run."""

    target: str
    precision: str
    open_ms: float
    """Reading the manifest and checking every hash."""
    encode_ms: float
    """A picture of the model's own size, normalisation included, no resizing."""
    encode_1080p_ms: float
    """A camera frame of 1920 x 1080."""
    encode_clip_ms: float | None
    """A clip for the video graph, of frames as for encode_ms; None for a bundle without it."""
    detect_ms: float | None
    """Such a picture through the detector, 20 names, NMS included; None for a bundle without it."""
    text_1_ms: float | None
    text_64_ms: float | None
    """Text tower, tokenizer included; None for a bundle without it."""
    caption_ms: float | None
    """Greedy, `tokens` long, of a picture that was already encoded; None for a bundle without a decoder."""
    tokens: int
    """Of the caption, the end counted."""
    tokens_per_s: float | None
    """After the first token."""
    peak_memory_bytes: int | None
    """Of the whole process."""
    bundle_bytes: int
    unique_weight_bytes: int
    """Of weights that the graphs take from weights.bin, each counted once."""
    resident_bytes: int | None
    """What the process grew by from a started engine to all graphs open and used once (memory_use.py)."""
    resident_ratio: float | None
    """resident_bytes / unique_weight_bytes."""
    threads: int
    repeats: int


@click.command()
@click.option("--repeats", type=click.IntRange(1, 1000), default=10, help="Measurements of each kind. Default: 10.")
@click.option("--tokens", type=click.IntRange(2, 1000), default=20, help="Length of the caption. Default: 20.")
@json_option
@model_options
def bench(settings: ModelSettings, repeats: int, tokens: int, as_json: bool) -> None:
    """Measure a bundle on this machine.

    Encoding, texts, captions: medians, one picture at a time. Memory: what the process grows by from an engine that
    has started (one graph of one node was run) until every graph of the bundle was opened and used once. The last line
    is one JSON object.
    """
    result = measure(settings, repeats, tokens)
    report = examine()
    if not as_json:
        machine = report.machine
        click.echo(
            f"{settings.bundle} ({result.precision}) on {machine.processor or machine.system}, {result.threads} of "
            f"{machine.physical_cores} cores, {_engine(report, settings.engine.engine or result.target)}, batch 1, "
            f"{WARM_UP} warm-up, median of {repeats}"
        )
        for line in describe(result):
            click.echo(line)
    console.echo_json(
        {
            "bundle": str(settings.bundle),
            "engine": dataclasses.asdict(settings.engine),
            "machine": dataclasses.asdict(report.machine),
            "versions": {each.name: each.version for each in report.software},
            "warm_up": WARM_UP,
            **dataclasses.asdict(result),
        }
    )


def measure(settings: ModelSettings, repeats: int, tokens: int) -> BenchResult:
    """Measure the parts that the bundle has."""
    started = time.perf_counter()
    with settings.load() as model:
        open_ms = (time.perf_counter() - started) * 1000
        memory = measure_memory(model, settings.engine)
        graphs, size = model.manifest.graphs, model.manifest.preprocess.size
        picture = canary_picture(1, (size, size))
        frame = np.random.default_rng(1).integers(0, 256, (1080, 1920, 3), np.uint8)
        clip = [picture] * model.manifest.model.video_frames
        texts = _Texts(model)
        captions = _captions(model, model.encode(picture), repeats, tokens) if "decoder" in graphs else None
        return BenchResult(
            target=model.manifest.target,
            precision=model.manifest.precision,
            open_ms=open_ms,
            encode_ms=_median_ms(lambda: model.encode(picture), repeats),
            encode_1080p_ms=_median_ms(lambda: model.encode(frame), repeats),
            encode_clip_ms=_median_ms(lambda: model.encode_frames(clip), repeats) if model.watches else None,
            detect_ms=_median_ms(_detecting(model, picture), repeats) if model.detects else None,
            text_1_ms=_median_ms(lambda: texts.embed(1), repeats) if "text" in graphs else None,
            text_64_ms=_median_ms(lambda: texts.embed(PROMPTS), max(1, repeats // 2)) if "text" in graphs else None,
            caption_ms=captions[0] if captions else None,
            tokens=captions[1] if captions else 0,
            tokens_per_s=captions[2] if captions else None,
            peak_memory_bytes=peak_memory_bytes(),
            bundle_bytes=bundle_bytes(settings.bundle),
            unique_weight_bytes=memory.unique_weights,
            resident_bytes=memory.resident,
            resident_ratio=memory.ratio,
            threads=settings.engine.threads or examine().machine.physical_cores,
            repeats=repeats,
        )


def describe(result: BenchResult) -> list[str]:
    """The figures as lines for people."""
    rows: list[tuple[str, float | None, str]] = [
        ("open, every hash checked", result.open_ms, "ms"),
        ("picture encode", result.encode_ms, "ms"),
        ("picture encode, 1920x1080", result.encode_1080p_ms, "ms"),
        ("clip encode", result.encode_clip_ms, "ms"),
        (f"detection, {NAMES} names", result.detect_ms, "ms"),
        ("text tower, 1 prompt", result.text_1_ms, "ms"),
        (f"text tower, {PROMPTS} prompts", result.text_64_ms, "ms"),
        (f"caption, {result.tokens} tokens, greedy", result.caption_ms, "ms"),
        ("tokens per second", result.tokens_per_s, ""),
        ("peak memory", None if result.peak_memory_bytes is None else result.peak_memory_bytes / 1e6, "MB"),
        ("bundle", result.bundle_bytes / 1e6, "MB"),
        ("unique weights", result.unique_weight_bytes / 1e6, "MB"),
        ("resident, all graphs in use", None if result.resident_bytes is None else result.resident_bytes / 1e6, "MB"),
        ("resident / unique weights", result.resident_ratio, "x"),
    ]
    shown = [(name, value, unit, 2 if unit == "x" else 1) for name, value, unit in rows if value is not None]
    return [f"{name:<32}{value:>10.{digits}f} {unit}".rstrip() for name, value, unit, digits in shown]


def _engine(report: Report, name: str) -> str:
    """ "onnxruntime 1.32.0"."""
    versions = [each.version or "" for each in report.engines if each.name == name]
    return f"{name} {versions[0] if versions else ''}".rstrip()


class _Texts:
    """Prompts that were never asked before: the model remembers the embeddings of texts."""

    def __init__(self, model: Model) -> None:
        self._model, self._count = model, 0

    def embed(self, count: int) -> None:
        self._count += count
        self._model.embed_texts([f"a photo of a thing {self._count + each:05d}" for each in range(count)])


def _detecting(model: Model, picture: NDArray[np.uint8]) -> Callable[[], Any]:
    """Random names: their embeddings are no part of the figure."""
    rows = np.random.default_rng(1).standard_normal((NAMES, model.manifest.model.embed_dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    entries = tuple(Entry(f"name {index}") for index in range(NAMES))
    manifest = model.manifest
    vocabulary = Vocabulary(entries, rows, model.bundle.content_hash, manifest.model.name, ("{}",))
    return lambda: model.detect(picture, vocabulary)


def _captions(model: Model, seen: Seen, repeats: int, tokens: int) -> tuple[float, int, float | None]:
    """Milliseconds of a caption, its tokens (the end counted), and tokens per second after the first."""
    whole = CaptionOptions(beams=1, min_tokens=tokens - 1, max_tokens=tokens)
    first = CaptionOptions(beams=1, max_tokens=1)

    def fresh(options: CaptionOptions) -> Callable[[], Any]:
        # A new Seen each time: its keys and values of the picture are part of a caption's cost.
        return lambda: model.see(seen.tokens, seen.embedding).caption(options)

    caption = seen.caption(whole)
    written = len(caption.ids) + int(caption.finished)
    caption_ms, first_ms = _median_ms(fresh(whole), repeats), _median_ms(fresh(first), repeats)
    step_ms = (caption_ms - first_ms) / (written - 1) if written > 1 else 0.0
    return caption_ms, written, 1000 / step_ms if step_ms > 0 else None


def _median_ms(function: Callable[[], Any], repeats: int) -> float:
    taken = []
    for index in range(WARM_UP + repeats):
        started = time.perf_counter()
        function()
        if index >= WARM_UP:
            taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken)

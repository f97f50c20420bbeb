"""Holds a bundle, run by the runtime, against the PyTorch core: every output, at many shapes, and on pictures.

An error is judged relative to the largest value that the core gives for that output, because float32 rounds in
proportion. Captions must be the same token for token, with one exception, which the report names: where the core's two
best tokens are closer to each other than the tolerance, either is right.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mammut.checkpoint import Checkpoint
from mammut.generate import greedy_from_tokens
from mammut_export.detections import PIXELS, SCORE, DetectionParity, compare_detections
from mammut_export.graphs import unit_and_norm
from mammut_export.lattice import replay
from mammut_export.measure import here
from mammut_export.samples import TEXTS, Sample
from mammut_runtime.canary import moving_crops
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import open_engine
from mammut_runtime.errors import VerificationError
from mammut_runtime.manifest import Manifest, ParityInfo
from mammut_runtime.model import Model, Seen
from mammut_runtime.preprocess import Preprocessor

DEFAULT_TOLERANCE = {"fp32": 5e-5, "fp16": 5e-3}
"""Precision → largest error allowed, as a part of the output's largest value. fp32: ten times what ONNX Runtime and
PyTorch differ by on deep models. fp16: float16 keeps 11 bits of each weight, 5e-4; models of 4 to 12 blocks came to
7e-4 in their outputs."""
ERROR_FLOOR = 1e-7
"""Of values near 1. An output that is all zeros would otherwise have the tolerance 0."""

ABSOLUTE = {"detector.boxes": PIXELS, "detector.scores": SCORE}
"""Outputs that may differ by so much whatever their size."""


@dataclass(frozen=True)
class OutputParity:
    """One output, over everything that was compared."""

    output: str
    """"graph.output"; the layers of a cache count as one output, e.g. "decoder.present_k"."""
    max_abs_error: float
    """Infinite where a value was missing, NaN, or of another shape."""
    tolerance: float
    """Absolute, in the output's own unit."""
    largest_value: float
    """Of the core, absolute."""
    worst_case: str
    """Where the largest error was: a shape, or a picture's or text's name."""
    cases: int
    """How often it was compared."""

    @property
    def ok(self) -> bool:
        return self.max_abs_error <= self.tolerance


@dataclass(frozen=True)
class CaptionParity:
    """A greedy caption by the runtime and by the core's slow reference."""

    picture: str
    """Its name, or that of the picture that a clip was made of."""
    text: str
    ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    verdict: Literal["same", "tie", "different"]
    gap: float | None
    """Where they part: how much larger the core's logit of its own choice is than that of the runtime's."""
    clip: bool = False
    """Of a clip that was made of the picture (canary.moving_crops)."""


@dataclass(frozen=True)
class Timing:
    """How long something took here, on the exporting machine, through the runtime."""

    what: str
    milliseconds: float
    """Median of a few runs."""


@dataclass(frozen=True)
class Parity:
    """The whole comparison."""

    relative_tolerance: float
    outputs: tuple[OutputParity, ...]
    captions: tuple[CaptionParity, ...]
    detections: tuple[DetectionParity, ...]
    shapes: tuple[str, ...]
    """"graph: shape" of every replay."""
    drift: float
    """Mean of 1 - cosine of the pictures' embeddings, the bundle's with the core's; 0.0 but for rounding in fp32."""
    timings: tuple[Timing, ...]

    @property
    def problems(self) -> list[str]:
        """What is not as it must be, in words; empty if all is well."""
        found = [
            f"{each.output} differs by {each.max_abs_error:.3g} ({each.worst_case}), tolerance {each.tolerance:.3g}"
            for each in self.outputs
            if not each.ok
        ]
        return (
            found
            + [
                f"the caption of {'a clip of ' if each.clip else ''}{each.picture!r} is {list(each.ids)}, PyTorch's "
                f"{list(each.reference_ids)} "
                f"(its choice is better by {each.gap:.3g})"
                for each in self.captions
                if each.verdict == "different"
            ]
            + [
                f"detections in {each.picture!r}: {each.problem}"
                for each in self.detections
                if each.problem and not each.excused
            ]
        )

    def manifest_entries(self) -> dict[str, ParityInfo]:
        """For the manifest. Only when there are no problems."""
        return {each.output: ParityInfo(each.max_abs_error, each.tolerance) for each in self.outputs}

    def check(self) -> None:
        """Raises VerificationError that names the first problems."""
        if problems := self.problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise VerificationError(
                f"the bundle does not compute what PyTorch computes: {'; '.join(problems[:3])}{more}. "
                f"Nothing was published"
            )


def verify(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    tolerance: float,
    progress: Callable[[str], None] = lambda step: None,
) -> Parity:
    """Compare the bundle in `folder` with the checkpoint's model. Reports differences, does not raise for them.

    tolerance: largest error, relative to each output's largest value.
    """
    ledger, half = _Ledger(), manifest.precision != "fp32"
    shapes = []
    for name, info in manifest.graphs.items():
        progress(f"replaying {name}")
        with contextlib.closing(open_engine(folder / info.file, manifest.target, here(manifest.target))) as engine:
            for label, got, wanted in replay(name, checkpoint, info, engine, half=half):
                shapes.append(f"{name}: {label}")
                for output, reference in wanted.items():
                    ledger.add(f"{name}.{output}", label, got.get(output), reference)
    progress("comparing pictures and texts")
    with Model.load(folder, here(manifest.target), verify=False) as model:
        pictures, drift = _compare_pictures(ledger, model, checkpoint, samples)
        clips = _compare_clips(ledger, model, checkpoint, samples) if model.watches else []
        if "text" in manifest.graphs:
            _compare_texts(ledger, model, checkpoint)
        outputs = ledger.results(tolerance)
        captions: tuple[CaptionParity, ...] = ()
        if "decoder" in manifest.graphs:
            progress("comparing captions")
            limit = 2 * next(each.tolerance for each in outputs if each.output == "decoder.logits")
            captions = tuple(_compare_captions(model, checkpoint, [*pictures, *clips], limit))
        detections: tuple[DetectionParity, ...] = ()
        if model.detects and checkpoint.detector is not None:
            progress("comparing detections")
            pixels = [(sample.name, sample.pixels) for sample in samples]
            detections = tuple(compare_detections(model, checkpoint.detector, pixels, half))
        progress("timing")
        timings = tuple(_time(model, samples[0]))
    return Parity(tolerance, outputs, captions, detections, tuple(shapes), drift, timings)


@dataclass(frozen=True, eq=False)
class _Compared:
    """A picture or clip that both have looked at."""

    name: str
    clip: bool
    seen: Seen
    """By the runtime."""
    tokens: torch.Tensor
    """By the core, float32[1, N, Wv]."""


class _Ledger:
    """Collects errors by output."""

    def __init__(self) -> None:
        self._worst: dict[str, tuple[float, str]] = {}
        self._largest: dict[str, float] = {}
        self._cases: dict[str, int] = {}

    def add(self, output: str, case: str, got: NDArray[Any] | None, wanted: NDArray[Any]) -> None:
        name = output if not output.rpartition(".")[2].isdigit() else output.rpartition(".")[0]
        error = float("inf")
        if got is not None and got.shape == wanted.shape and got.dtype == wanted.dtype:
            difference = float(np.abs(got.astype(np.float64) - wanted).max(initial=0.0))
            error = difference if np.isfinite(difference) else error
        if name not in self._worst or error > self._worst[name][0]:
            self._worst[name] = error, case
        largest = float(np.abs(wanted).max(initial=0.0))
        self._largest[name] = max(self._largest.get(name, 0.0), largest)
        self._cases[name] = self._cases.get(name, 0) + 1

    def results(self, tolerance: float) -> tuple[OutputParity, ...]:
        return tuple(
            OutputParity(
                name,
                error,
                max(tolerance * self._largest[name], ABSOLUTE.get(name, ERROR_FLOOR)),
                self._largest[name],
                case,
                self._cases[name],
            )
            for name, (error, case) in self._worst.items()
        )


def _compare_pictures(
    ledger: _Ledger, model: Model, checkpoint: Checkpoint, samples: Sequence[Sample]
) -> tuple[list[_Compared], float]:
    """The runtime's whole way from a picture to its embedding.

    Returns also the mean of 1 - cosine of the embeddings.
    """
    preprocess = Preprocessor(checkpoint.preprocess)
    drifts, found = [], []
    for sample, seen in zip(samples, model.encode_batch([s.pixels for s in samples]), strict=True):
        with torch.no_grad():
            tokens, embedding = checkpoint.model.encode_image(torch.from_numpy(preprocess(sample.pixels))[None])
        _compare_seen(ledger, "vision", sample.name, seen, tokens, embedding)
        drifts.append(max(0.0, 1 - float(seen.embedding.astype(np.float64) @ embedding[0].numpy())))
        found.append(_Compared(sample.name, False, seen, tokens))
    return found, float(np.mean(drifts))


def _compare_clips(ledger: _Ledger, model: Model, checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[_Compared]:
    """The same of clips, each made of a picture."""
    preprocess = Preprocessor(checkpoint.preprocess)
    found = []
    for sample in samples:
        frames = moving_crops(sample.pixels, model.manifest.model.video_frames)
        seen = model.encode_frames(frames)
        with torch.no_grad():
            clip = torch.from_numpy(np.stack([preprocess(frame) for frame in frames]))
            tokens, embedding = checkpoint.model.encode_video(clip[None])
        _compare_seen(ledger, "video", f"clip of {sample.name}", seen, tokens, embedding)
        found.append(_Compared(sample.name, True, seen, tokens))
    return found


def _compare_seen(
    ledger: _Ledger, graph: str, name: str, seen: Seen, tokens: torch.Tensor, embedding: torch.Tensor
) -> None:
    ledger.add(f"{graph}.tokens", name, seen.tokens.astype(np.float32), tokens[0].numpy())
    ledger.add(f"{graph}.embedding", name, seen.embedding, embedding[0].numpy())


def _compare_texts(ledger: _Ledger, model: Model, checkpoint: Checkpoint) -> None:
    """Tokenizing and padding included: the core gets full rows, the runtime pads as its manifest says."""
    context = checkpoint.model.config.text.context_length
    ids = torch.from_numpy(checkpoint.tokenizer.tokenize(list(TEXTS), context))
    with torch.no_grad():
        wanted = unit_and_norm(checkpoint.model.encode_text(ids, normalize=False))[0].numpy()
    for text, got, reference in zip(TEXTS, model.embed_texts(TEXTS), wanted, strict=True):
        ledger.add("text.embedding", f"{text[:30]!r}", got, reference)


def _compare_captions(
    model: Model, checkpoint: Checkpoint, compared: Sequence[_Compared], limit: float
) -> Iterator[CaptionParity]:
    rule = model.manifest.text
    prompt = [rule.start_id, *checkpoint.tokenizer.encode(rule.prompts.get("caption", ""))]
    for each in compared:
        caption = each.seen.caption(CaptionOptions(beams=1))
        wanted = greedy_from_tokens(checkpoint.model, each.tokens, prompt, rule.end_id, rule.max_tokens)
        gap: float | None = None
        verdict: Literal["same", "tie", "different"] = "same"
        if list(caption.ids) != wanted:
            gap = _gap(checkpoint, each.tokens, prompt, [*caption.ids, rule.end_id], [*wanted, rule.end_id])
            verdict = "tie" if abs(gap) <= limit else "different"
        yield CaptionParity(each.name, caption.text, caption.ids, tuple(wanted), verdict, gap, each.clip)


def _gap(
    checkpoint: Checkpoint, tokens: torch.Tensor, prompt: list[int], got: Sequence[int], wanted: Sequence[int]
) -> float:
    """At the first token where two captions part: the core's logit of `wanted` minus that of `got`."""
    position = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    with torch.no_grad():
        logits = checkpoint.model.caption_logits(tokens, torch.tensor([[*prompt, *wanted[:position]]]))[0, -1]
    return float(logits[wanted[position]] - logits[got[position]])


def _time(model: Model, sample: Sample, runs: int = 3) -> Iterator[Timing]:
    graphs = model.manifest.graphs

    def median(call: Callable[[], object]) -> float:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3

    yield Timing("picture to embedding", median(lambda: model.encode(sample.pixels)))
    if model.watches:
        clip = moving_crops(sample.pixels, model.manifest.model.video_frames)
        yield Timing(f"clip of {len(clip)} frames to embedding", median(lambda: model.encode_frames(clip)))
    if model.detects:
        vocabulary = model.vocabulary(["a", "b"])
        yield Timing("picture to detections of 2 names", median(lambda: model.detect(sample.pixels, vocabulary)))
    if "text" in graphs:
        texts = iter(f"{TEXTS[0]} {number}" for number in range(runs))  # new ones: the runtime remembers embeddings
        yield Timing("one text to embedding", median(lambda: model.embed_texts([next(texts)])))
    if "decoder" in graphs:
        seen = model.encode(sample.pixels)
        tokens = len(seen.caption(CaptionOptions(beams=1)).ids)
        yield Timing(f"greedy caption of {tokens} tokens", median(lambda: seen.caption(CaptionOptions(beams=1))))

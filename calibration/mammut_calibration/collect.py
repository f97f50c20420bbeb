"""The calibration itself: one pass over the user's pictures through the runtime, watching every graph at work.

The runtime's own Model does everything a device would do. Its engines are replaced by ones that show what flows inside
them, so preprocessing, tokens, prompts and caches are real by construction:

    vision   the picture                             memory   the picture's tokens, and the clip's
    video    the clip that the picture is from, or one made of it
    text     the data's texts, else the model's own captions, and the prompt forms
    decoder  the prompt of captions and of a question, then each generated token with the caches so far

Pictures go through one by one, so memory does not depend on how many there are, and a run can stop between any two.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_calibration.activations import SCOPES, Scope, activation_names, read_graph
from mammut_calibration.data import MIN_PICTURES, Damaged, Dataset, Sample
from mammut_calibration.observe import DEFAULT_BUDGET_BYTES, ObservedEngine
from mammut_calibration.questions import DEFAULT_QUESTIONS, SHORT_QUESTION, names_to_find
from mammut_calibration.statistics import TensorCollector
from mammut_calibration.table import (
    THUMBNAIL,
    CalibrationTable,
    TableHeader,
    graph_hashes,
    read_table,
    save_table,
)
from mammut_runtime.bundle import Bundle
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import InputError
from mammut_runtime.graphs import Graphs
from mammut_runtime.model import Model, Seen
from mammut_runtime.preprocess import Preprocessor
from mammut_runtime.text_tower import TextTower

Progress = Callable[[int, int, str], None]
"""Is told how many pictures are done, of how many, and the name of the last one."""
Note = Callable[[str], None]

FLAT_LEVELS = 8
"""A picture whose values differ by less, of 255, in every channel is one colour."""
SAME_LEVELS = 1.0
"""Pictures whose thumbnails differ by less than this on average, of 255, are the same: a camera that sees nothing move
gives such frames. Different photographs differ by 20 and more."""
DEFAULT_TEXTS = ("a cat", "a person riding a bicycle", "two red flowers on a table", "a street at night", "nothing")
"""For a bundle that writes no captions, with data that has none."""
_DAMAGED_SHOWN = 1000
_ANSWER_TOKENS = 8
_TOOLS = ("mammut-edge", "numpy", "onnx", "onnxruntime", "opencv-python-headless")


@dataclass(frozen=True)
class CalibrateOptions:
    """How to calibrate. Raises InputError for values out of range."""

    scope: Scope = "linear"
    """Which activations: see activations.Scope."""
    max_damaged: float = 0.1
    """Share of the pictures that may be unreadable; they are named and left out."""
    max_tokens: int = 24
    """Longest caption that is generated; the bundle's own limit holds too."""
    save_every: int = 16
    """Pictures after which the state is saved."""
    threads: int = 0
    """0 takes the physical cores."""
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    """Most bytes of observed tensors in memory at once; with more, a graph is run several times per picture."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InputError(f"scope: expected one of {', '.join(SCOPES)}, got {self.scope!r}")
        if not 0 <= self.max_damaged < 1:
            raise InputError(f"max_damaged: expected a share from 0 to below 1, got {self.max_damaged}")
        for name in ("max_tokens", "save_every", "budget_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        EngineOptions(threads=self.threads)


def calibrate(
    bundle: Bundle,
    data: Dataset,
    options: CalibrateOptions | None = None,
    *,
    state: Path | None = None,
    progress: Progress = lambda done, total, name: None,
    note: Note = lambda line: None,
) -> CalibrationTable:
    """Run the data through the bundle and gather what flows between its nodes.

    bundle: in fp32 or fp16, not quantized. data: the part to calibrate with, see Dataset.split. state: a file to save
    the state in; if it is there, the calibration goes on from it. It stays after an interruption and is removed when
    all is done. progress, note: are told what happens; a picture that is left out is a note.

    Raises InputError for too few or too similar pictures, too many damaged ones, or a state of another calibration.
    """
    options = options or CalibrateOptions()
    _check_bundle(bundle)
    _check_amount(len(data), len(data), "the data hold only", data)
    run = _Run(bundle, data, options, note)
    if state is not None and state.exists():
        run.resume(state)
        note(f"going on after {run.done} of {len(data)} pictures ({state})")
    try:
        for sample in data.samples(run.done, bundle.manifest.model.video_frames):
            run.take(sample)
            progress(run.done, len(data), sample.name)
            if state is not None and run.done % options.save_every == 0 and run.done < len(data):
                save_table(state, run.table(complete=False))
    finally:
        run.close()
    try:
        return run.finish()
    finally:  # also where the data are refused: more of them would be other data, which this state does not fit
        if state is not None:
            state.unlink(missing_ok=True)


class _Run:
    """A calibration under way. Consistent between two calls of `take`."""

    def __init__(self, bundle: Bundle, data: Dataset, options: CalibrateOptions, note: Note) -> None:
        self._bundle, self._data, self._options, self._note = bundle, data, options, note
        self._collectors: dict[str, dict[str, TensorCollector]] = {}
        self._model = Model(bundle, open_graph=self._open)
        self._text_graph = Graphs(("text",), self._open)
        self._preprocessor = Preprocessor(bundle.manifest.preprocess)
        self._thumbnails: list[NDArray[np.uint8]] = []
        self._damaged: list[str] = []
        self.done = self._pictures = self._repeated = self._constant = 0
        self._texts = self._own_texts = self._tokens = 0
        self._clips = self._filmed = 0

    def _open(self, name: str) -> ObservedEngine:
        path = self._bundle.graph_path(name)
        tensors = activation_names(read_graph(path), self._options.scope)
        known = self._collectors.setdefault(name, {})
        for tensor in tensors:
            known.setdefault(tensor, TensorCollector())

        def watch(tensor: str, value: NDArray[Any]) -> None:
            known[tensor].add(value)

        return ObservedEngine(
            path, tensors, watch, threads=self._options.threads, budget_bytes=self._options.budget_bytes
        )

    def take(self, sample: Sample | Damaged) -> None:
        """Look at one picture."""
        if isinstance(sample, Damaged):
            self._note(f"left out: {sample.reason}")
            self._damaged.append(f"{sample.name}: {sample.reason}"[:500])
        elif self._is_new(sample):
            self._feed(sample)
            self._pictures += 1
        self.done += 1
        self._check_damaged()

    def _is_new(self, sample: Sample) -> bool:
        """Whether the picture, as the model gets it, is neither one colour nor one that was there before."""
        pixels = self._preprocessor.pixels_u8(sample.image)
        if int(np.ptp(pixels, axis=(0, 1)).max()) < FLAT_LEVELS:
            self._constant += 1
            self._note(f"left out: {sample.name}: one colour all over")
            return False
        small = cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).ravel()
        if self._thumbnails:
            distances = np.abs(np.stack(self._thumbnails).astype(np.int16) - small).mean(axis=1)
            if float(distances.min()) < SAME_LEVELS:
                self._repeated += 1
                return False
        self._thumbnails.append(small)
        return True

    def _feed(self, sample: Sample) -> None:
        """Everything that the bundle can do with a picture."""
        graphs = self._bundle.manifest.graphs
        own: list[str] = []
        if "video" in graphs:
            self._watch(sample)
        if "detector" in graphs:
            self._model.detect(sample.image, names_to_find(self._bundle.manifest))
        if "vision" in graphs:
            seen = self._model.encode(sample.image)
            if "decoder" in graphs:
                caption = seen.caption(CaptionOptions(beams=1, max_tokens=self._options.max_tokens))
                self._tokens += len(caption.ids) + self._ask(seen, sample)
                own = [caption.text]
        if "text" in graphs:
            texts = self._texts_for(sample, own)
            # A new tower each time: it remembers texts, and a resumed run would not remember the same ones.
            TextTower(self._text_graph, self._model.tokenizer, self._bundle.manifest.text).embed(texts)
            self._texts += len(texts)
            self._own_texts += 0 if sample.captions or sample.label else len(texts)

    def _watch(self, sample: Sample) -> None:
        """Look at a clip, and let the model describe it."""
        clip = self._model.encode_frames(sample.clip(self._bundle.manifest.model.video_frames))
        self._clips += 1
        self._filmed += bool(sample.filmed)
        if "decoder" in self._bundle.manifest.graphs:
            self._tokens += len(clip.caption(CaptionOptions(beams=1, max_tokens=self._options.max_tokens)).ids)

    def _ask(self, seen: Seen, sample: Sample) -> int:
        """Let the model answer a question about the picture; the number of tokens that it wrote."""
        options = CaptionOptions(beams=1, max_tokens=_ANSWER_TOKENS)
        try:
            return len(seen.ask(_question(sample, self._pictures), options=options).ids)
        except InputError as problem:  # it is too long for the model, or has no words
            if sample.questions:
                self._note(f"not asked: {sample.name}: {problem}")
            return len(seen.ask(SHORT_QUESTION.text, options=options).ids)

    def _texts_for(self, sample: Sample, own: Sequence[str]) -> list[str]:
        """Captions as they are, and a name or a caption in the prompt form of class names."""
        clean = self._model.tokenizer.clean
        captions = [text for text in sample.captions if clean(text)][:2] or [text for text in own if clean(text)]
        captions = captions or [DEFAULT_TEXTS[self._pictures % len(DEFAULT_TEXTS)]]
        templates = self._model.templates
        named = sample.label if sample.label and clean(sample.label) else captions[0]
        prompted = templates[self._pictures % len(templates)].replace("{}", named)
        plain = captions if sample.captions or not sample.label else []
        return list(dict.fromkeys((*plain, prompted)))

    def _check_damaged(self) -> None:
        """As soon as it is certain, not after an hour."""
        if len(self._damaged) > self._options.max_damaged * len(self._data):
            raise InputError(
                f"{len(self._damaged)} of {len(self._data)} pictures cannot be read, more than the "
                f"{self._options.max_damaged:.0%} that may be; the first: {self._damaged[0]}"
            )

    def resume(self, path: Path) -> None:
        """Go on from a saved state. Raises InputError if it is of other data, another bundle or other options."""
        saved = read_table(path)
        now, then = self._header(complete=False), saved.header
        for key, meaning in (
            ("data_hash", "data"),
            ("graph_hashes", "graphs"),
            ("scope", "scope"),
            ("max_tokens", "max_tokens"),
            ("versions", "versions of the tools"),
        ):
            if getattr(now, key) != getattr(then, key):
                raise InputError(f"{path}: the state of a calibration with other {meaning}; remove it to start anew")
        if then.done > len(self._data) or len(saved.thumbnails) != then.pictures:
            raise InputError(f"{path}: not a state that this calibration saved; remove it to start anew")
        self._collectors = {
            graph: {name: TensorCollector.resumed(each) for name, each in tensors.items()}
            for graph, tensors in saved.graphs.items()
        }
        self._thumbnails = list(saved.thumbnails)
        self._damaged = list(then.damaged)
        self.done, self._pictures = then.done, then.pictures
        self._repeated, self._constant = then.repeated, then.constant
        self._texts, self._own_texts, self._tokens = then.texts, then.own_texts, then.tokens
        self._clips, self._filmed = then.clips, then.filmed

    def table(self, complete: bool) -> CalibrationTable:
        """What was gathered so far."""
        graphs = {
            graph: {name: each.result() for name, each in tensors.items() if not each.empty}
            for graph, tensors in self._collectors.items()
        }
        width = THUMBNAIL * THUMBNAIL * 3
        kept = self._thumbnails if not complete else []
        return CalibrationTable(self._header(complete), graphs, np.array(kept, np.uint8).reshape(len(kept), width))

    def _header(self, complete: bool) -> TableHeader:
        manifest = self._bundle.manifest
        return TableHeader(
            complete=complete,
            model=manifest.model.name or "unnamed",
            bundle_hash=self._bundle.content_hash,
            graph_hashes=graph_hashes(self._bundle),
            data_hash=self._data.content_hash,
            data_pictures=len(self._data),
            scope=self._options.scope,
            max_tokens=self._options.max_tokens,
            done=self.done,
            pictures=self._pictures,
            repeated=self._repeated,
            constant=self._constant,
            damaged=tuple(self._damaged[:_DAMAGED_SHOWN]),
            texts=self._texts,
            own_texts=self._own_texts,
            tokens=self._tokens,
            clips=self._clips,
            filmed=self._filmed,
            versions=_versions(),
        )

    def finish(self) -> CalibrationTable:
        """The finished table. Raises InputError where it would say nothing."""
        left_out = f"{self._repeated} repeated, {self._constant} of one colour, {len(self._damaged)} damaged"
        _check_amount(self._pictures, len(self._data), f"{left_out}: the data hold only", self._data)
        return self.table(complete=True)

    def close(self) -> None:
        self._model.close()
        self._text_graph.close()


def _check_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    quantized = [
        name
        for name, info in manifest.quantization.items()
        if info.weights in ("int8", "int4") or info.activations in ("int8", "uint8")
    ]
    if manifest.precision not in ("fp32", "fp16") or quantized:
        raise InputError(
            f"{bundle.path}: is quantized ({', '.join(quantized) or manifest.precision}); expected an fp32 bundle, "
            f"whose ranges can be measured"
        )


def _check_amount(different: int, given: int, reason: str, data: Dataset) -> None:
    if different < MIN_PICTURES:
        example = f" (such as {data.items[0].name})" if data.items else ""
        raise InputError(
            f"{reason} {different} different pictures of {given} given{example}, expected at least {MIN_PICTURES}: "
            f"ranges from fewer do not hold for the next picture; give more of what the device will see"
        )


def _question(sample: Sample, turn: int) -> str:
    questions = sample.questions or DEFAULT_QUESTIONS
    return questions[turn % len(questions)].text


def _versions() -> dict[str, str]:
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            found[tool] = "not installed as a package"
    return found

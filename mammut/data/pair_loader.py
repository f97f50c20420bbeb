"""From stored samples to batches, in loading processes: mixing sources, decoding, cropping, augmenting, tokenizing.

Each batch says where its worker's stream stands after it. So the state of the whole loader is a handful of numbers, and
a loader that is opened with them goes on with the batch that would have come next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mammut.data.augment import Augmenter
from mammut.data.clip_scenes import compose_clip
from mammut.data.clips import ClipPart, cropped, read_frames
from mammut.data.pairs import Pair, plain_pair, read_drawing, square
from mammut.data.scenes import Drawing, compose, trimmed
from mammut.data.shards import Drawn, Mixture, Position, Raw, Standing, deal, expand, samples_of
from mammut.training.contrast import ABSENT, text_key
from mammut.training.objective import PairBatch
from mammut.training.run_config import DataOptions, Source
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """What one training process reads; the same through a stage."""

    sources: tuple[tuple[str, ...], ...]
    """The files of each of options.sources."""
    tokenizer_json: bytes
    rule: PreprocessRule
    prompts: dict[str, str]
    context_length: int
    trim_texts: bool
    """Whether the contrastive pass ignores padding, so that texts need not be padded to the context's length."""
    options: DataOptions
    batch_size: int
    """Pictures of a micro-batch."""
    image_size: int
    seed: int
    rank: int
    ranks: int
    frames: int = 0
    """Of a clip; 0 where there are none."""

    @property
    def workers(self) -> int:
        """Streams of this process: loading in between steps is one stream as well."""
        return max(1, self.options.workers)


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands."""

    streams: tuple[Standing, ...]
    turn: int
    """Which of them gives the next batch."""

    @classmethod
    def beginning(cls, options: DataOptions) -> LoaderState:
        start = Standing((Position(),) * len(options.sources))
        return cls((start,) * max(1, options.workers), 0)

    def after(self, batch: LoadedBatch) -> LoaderState:
        """The state once this batch is used."""
        streams = list(self.streams)
        streams[batch.stream] = batch.after
        return LoaderState(tuple(streams), (batch.stream + 1) % len(streams))


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch as it leaves a loading process."""

    pixels: Tensor
    """uint8[B, 3, S, S], or of clips uint8[B, F, 3, S, S]: a quarter of the bytes of what the model gets."""
    text_ids: Tensor
    """int64[T, L], and the following as in PairBatch."""
    keys: Tensor
    text_keys: Tensor
    ids: Tensor
    targets: Tensor
    counted: Tensor
    stream: int
    """Which worker's stream it is from."""
    after: Standing
    drawn: int
    """Samples that were read for it, damaged ones included."""
    damaged: tuple[str, ...]
    """Names and reasons of those left out."""
    broken_shards: tuple[str, ...]

    def on(self, device: torch.device, rule: PreprocessRule) -> PairBatch:
        """Normalised, on the device."""
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (rule.mean, rule.std))
        pixels = (self.pixels.to(device, non_blocking=True).float() / 255 - mean) / std
        batch = PairBatch(
            pixels, self.text_ids, self.keys, self.ids, self.targets, self.counted, text_keys=self.text_keys
        )
        return batch.to(device)


@dataclass
class _Growing:
    """A batch in the making."""

    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    """[S, S, 3] each, or [F, S, S, 3]."""
    kinds: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)
    """By key: equal texts are there once."""
    written: list[tuple[list[int], int]] = field(default_factory=list)
    seed: tuple[int, ...] = ()
    drawn: int = 0
    damaged: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class PairStream(IterableDataset[LoadedBatch]):
    """Batches of one process, without end, from a state on."""

    def __init__(self, reading: Reading, state: LoaderState) -> None:
        if len(state.streams) != reading.workers:
            raise InputError(
                f"data.workers is {reading.workers}, but the checkpoint's data was read by {len(state.streams)}; "
                f"resume with as many"
            )
        self.reading, self.state = reading, state

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        # PyTorch asks its worker 0 first; the stream whose turn it is must answer.
        number = (self.state.turn + (info.id if info else 0)) % self.reading.workers
        return self._batches(number)

    def _batches(self, number: int) -> Iterator[LoadedBatch]:
        reading, maker, options = self.reading, ExampleMaker(self.reading), self.reading.options
        growing, start = _Growing(), self.state.streams[number]
        parts = [deal(paths, reading.rank, reading.ranks, number, reading.workers) for paths in reading.sources]
        weights = [source.weight for source in options.sources]
        # Processes whose batches are of one source each choose alike: those with pictures need not wait for those with
        # clips, and the contrastive pass compares a whole step's like with like.
        own = f"{parts[0][0].path} {parts[0][0].part}" if options.mixing == "samples" else f"worker {number}"
        mixture = Mixture(parts, weights, start, reading.seed, options.shuffle, own)
        source: int | None = None
        while True:
            found = mixture.draw(source)
            source = found.source if options.mixing == "batches" else None
            self._add(growing, found.drawn, maker, options.sources[found.source])
            # A hopeless source must be heard of, not waited for: what is damaged travels in batches only.
            if len(growing.damaged) > 1000 and not growing.pictures:
                raise InputError(f"1000 samples in a row cannot be used, the last: {growing.damaged[-1]}")
            if len(growing.pictures) == reading.batch_size:
                yield maker.batch(growing, number, found.after)
                growing, source = _Growing(), None

    @staticmethod
    def _add(growing: _Growing, drawn: Drawn, maker: ExampleMaker, source: Source) -> None:
        if drawn.sample is None:
            growing.broken.append(drawn.broken_shard)
            return
        growing.drawn += 1
        growing.seed = drawn.seed
        try:
            maker.add(growing, drawn.sample, np.random.default_rng(drawn.seed), source)
        except InputError as error:
            growing.damaged.append(f"{drawn.sample.name}: {error}")


def open_loader(reading: Reading, state: LoaderState, pin: bool = False) -> Iterator[LoadedBatch]:
    """Batches in the one order that seed, processes and workers determine."""
    workers = reading.options.workers
    loader: DataLoader[LoadedBatch] = DataLoader(
        PairStream(reading, state), batch_size=None, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    with _without_opencv_threads():
        return iter(loader)


@contextlib.contextmanager
def _without_opencv_threads() -> Iterator[None]:
    """For the time of a fork. A fork copies the locks of OpenCV's thread pool and not its threads, so loading processes
    of a process that had used the pool waited for ever. It also leaves them with one thread each, as it should be: the
    loading processes are the threads."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


class ExampleMaker:
    """Makes what the model learns from out of what is stored."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.options = reading, reading.options
        self.tokenizer = Tokenizer.from_bytes(reading.tokenizer_json)
        self.prompt = self._prompt(reading.prompts["caption"])
        self._drawings: dict[tuple[str, ...], list[Drawing]] = {}

    def add(self, growing: _Growing, raw: Raw, rng: np.random.Generator, source: Source) -> None:
        """Raises InputError where the sample cannot be used."""
        if raw.problem:
            raise InputError(raw.problem)
        if (raw.clip is not None) != (source.kind == "clip"):
            has, wants = ("file", "clip") if source.kind == "clip" else ("clip", "file")
            raise InputError(f"has {has!r}; a source of kind {source.kind!r} expects {wants!r}")
        share = self.options.question_share if source.question_share is None else source.question_share
        composed = self._composed(raw, rng, source) if source.drawings else None
        pair = composed[0] if composed else plain_pair(raw.name, raw.data, raw.row)
        if share == 0 and not pair.captions:
            raise InputError("no caption")
        if share == 1 and not pair.questions:
            raise InputError("no question with an answer")
        ask = bool(pair.questions) and (rng.random() < share or not pair.captions)
        caption = _chosen(pair.captions, rng) if pair.captions else ""
        written = self.answer(*_chosen(pair.questions, rng)) if ask else self._with_prompt(self.prompt, caption)
        if composed:
            seen = composed[1]
        else:
            seen = self._clip(raw.clip, rng) if raw.clip else self._picture(pair, source.kind, rng)
        text, name = (_chosen(pair.matches, rng), pair.matches[0]) if pair.matches else (caption, caption)
        key = text_key(name) if name else ABSENT
        if name:
            growing.texts.setdefault(key, self._with_prompt([self.tokenizer.start_id], text)[0])
        growing.pictures.append(seen)
        growing.kinds.append(source.kind)
        growing.keys.append(key)
        growing.written.append(written)

    def _composed(self, raw: Raw, rng: np.random.Generator, source: Source) -> tuple[Pair, npt.NDArray[np.uint8]]:
        """A new scene on this picture, uint8[S, S, 3], or a clip, uint8[F, S, S, 3], and what is said about it."""
        if source.drawings not in self._drawings:
            self._drawings[source.drawings] = read_drawings(source.drawings)
        size = self.reading.image_size
        if source.kind == "moving":
            photo = square(raw.data, round(size * 4 / 3), alpha=False)
            clip = compose_clip(rng, self._drawings[source.drawings], photo, self.reading.frames, size)
            return Pair(raw.name, b"", clip.captions, clip.matches, clip.asked), clip.frames
        background = square(raw.data, round(size * 1.5), alpha=False)
        scene = compose(rng, self._drawings[source.drawings], background, size)
        questions = tuple((question, answer) for _, question, answer in scene.questions)
        return Pair(raw.name, b"", scene.captions, scene.matches, questions), scene.pixels

    def _clip(self, clip: ClipPart, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """uint8[F, S, S, 3] as it will be seen; where it is still to be augmented, larger squares of the whole."""
        reading, augmented = self.reading, self.options.augment is not None
        side = round(reading.image_size * self.options.margin)
        squash = augmented or reading.rule.resize_mode != "shortest"
        frames = read_frames(clip, reading.frames, side, squash=squash, rng=rng if augmented else None)
        return np.stack(frames) if augmented else cropped(frames, reading.image_size, rng)

    def _picture(self, pair: Pair, kind: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """uint8[S, S, 3] as it will be seen; where it is still to be augmented, a larger square (RGBA of drawings)."""
        reading = self.reading
        if self.options.augment is None:
            return picture(pair, reading.image_size, reading.rule, self.options, rng)
        return square(pair.data, round(reading.image_size * self.options.margin), alpha=kind == "drawing")

    def answer(self, question: str, answer: str) -> tuple[list[int], int]:
        """Question as prefix, then the answer: ids, and how many of them are given.

        A question that is too long loses its end, rather than the answer or the words around the question theirs.
        """
        form, encode = self.reading.prompts["ask"], self.tokenizer.encode
        prompt = self._prompt(form.format(question=question))
        over = len(prompt) + len(encode(answer)) + 1 - self.reading.context_length
        if over > 0:
            before, _, behind = form.partition("{question}")
            asked = encode(question)
            prompt = [*self._prompt(before), *asked[: max(0, len(asked) - over)], *encode(behind)]
        return self._with_prompt(prompt, answer)

    def batch(self, growing: _Growing, number: int, after: Standing) -> LoadedBatch:
        """Stack what was added. Padded no further than the longest needs (texts: only where padding has no effect), to
        one of a few lengths: each new shape is compiled anew."""
        pad, longest = self.tokenizer.pad_id, self.reading.context_length
        length = min(longest, _rounded(max(len(ids) for ids, _ in growing.written)) + 1)
        # One text at least: every parameter takes part in every step, as DDP and FSDP expect.
        rows = list(growing.texts.values()) or [[self.tokenizer.start_id, self.tokenizer.end_id]]
        texts = min(longest, _rounded(max(map(len, rows)))) if self.reading.trim_texts else longest
        text_keys = torch.full((len(growing.keys),), ABSENT)
        text_keys[: len(growing.texts)] = torch.tensor(list(growing.texts), dtype=torch.int64)
        whole = _padded([ids for ids, _ in growing.written], length, pad)
        at = torch.arange(1, length)
        given = torch.tensor([given for _, given in growing.written])[:, None]
        ends = torch.tensor([len(ids) for ids, _ in growing.written])[:, None]
        return LoadedBatch(
            pixels=self._pixels(growing),
            text_ids=_padded(rows, texts, pad),
            keys=torch.tensor(growing.keys),
            text_keys=text_keys,
            ids=whole[:, :-1],
            targets=whole[:, 1:],
            counted=(at >= given) & (at < ends),
            stream=number,
            after=after,
            drawn=growing.drawn,
            damaged=tuple(growing.damaged),
            broken_shards=tuple(growing.broken),
        )

    def _pixels(self, growing: _Growing) -> Tensor:
        """uint8[B, 3, S, S], or [B, F, 3, S, S] of clips, which stand alone in their batch. Pictures are augmented kind
        by kind; drawings lie on the photographs of their batch."""
        if self.options.augment is None:
            return _channels_first(growing.pictures)
        seed = int(np.random.default_rng(growing.seed).integers(2**62))
        augmenter = Augmenter(self.options.augment, self.options.mirror, torch.Generator().manual_seed(seed))
        size = self.reading.image_size
        kinds = growing.kinds
        rows = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
        of_kind = {kind: _channels_first([growing.pictures[i] for i in own]) for kind, own in rows.items()}
        of_clips = growing.pictures[0].ndim == 4
        out = torch.empty(len(growing.pictures), *([self.reading.frames] if of_clips else []), 3, size, size)
        for kind, pictures in of_kind.items():
            if kind == "drawing":
                out[rows[kind]] = augmenter.drawings(pictures, of_kind.get("photo"), size)
            elif kind == "clip":
                out[rows[kind]] = augmenter.clips(pictures, size)
            elif kind in ("scene", "moving"):
                out[rows[kind]] = pictures.float() / 255
            else:
                out[rows[kind]] = (augmenter.photos if kind == "photo" else augmenter.plain)(pictures, size)
        return (out.clamp(0, 1) * 255).round().to(torch.uint8)

    def _prompt(self, text: str) -> list[int]:
        return [self.tokenizer.start_id, *(self.tokenizer.encode(text) if text else [])]

    def _with_prompt(self, prompt: list[int], text: str) -> tuple[list[int], int]:
        ids = [*prompt, *self.tokenizer.encode(text)][: self.reading.context_length - 1]
        return [*ids, self.tokenizer.end_id], min(len(prompt), len(ids))


def read_drawings(files: Sequence[str]) -> list[Drawing]:
    """Drawings from tars, named by their first caption. InputError where none, or a damaged one, is found."""
    found = [
        Drawing(plain_pair(sample.name, b"", sample.row).captions[0], "", trimmed(read_drawing(sample.data)))
        for sample in samples_of(expand(files))
    ]
    if len({drawing.name for drawing in found}) < 2:
        raise InputError(f"{', '.join(files)}: expected drawings of at least two things")
    return found


def picture(
    pair: Pair, size: int, rule: PreprocessRule, options: DataOptions, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """uint8[size, size, 3]: resized to margin x size as the rule does (squashed, or by the shorter side), then cropped
    at random. Raises InputError for a picture that cannot be read."""
    pixels = read_picture(pair.data).rgb()
    side, (height, width) = round(size * options.margin), pixels.shape[:2]
    factor = side / min(height, width)
    squash = rule.resize_mode != "shortest"
    wanted = (side, side) if squash else (max(side, round(width * factor)), max(side, round(height * factor)))
    shrinks = wanted[0] * wanted[1] < width * height
    resized = cv2.resize(pixels, wanted, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    top, left = (int(rng.integers(0, resized.shape[axis] - size + 1)) for axis in (0, 1))
    out = resized[top : top + size, left : left + size]
    if options.mirror and rng.random() < 0.5:
        out = out[:, ::-1]
    return np.ascontiguousarray(out)


def _channels_first(pictures: list[npt.NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).movedim(-1, -3).contiguous()


def _chosen(options: tuple[Any, ...], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]


def _rounded(length: int) -> int:
    """Up to a multiple of 16."""
    return -(-length // 16) * 16


def _padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])

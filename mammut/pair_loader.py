"""From stored samples to batches, in loading processes: decoding, resizing, cropping, tokenizing.

Each batch says where its worker's stream stands after it. So the state of the whole loader is a handful of numbers, and
a loader that is opened with them goes on with the batch that would have come next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mammut.contrast import text_key
from mammut.data import Pair, plain_pair
from mammut.objective import PairBatch
from mammut.run_config import DataOptions
from mammut.shards import Drawn, Part, Position, Raw, deal, stream
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """What one training process reads; the same through a stage."""

    paths: tuple[str, ...]
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

    @property
    def workers(self) -> int:
        """Streams of this process: loading in between steps is one stream as well."""
        return max(1, self.options.workers)


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands."""

    positions: tuple[Position, ...]
    """Of each stream."""
    turn: int
    """Which of them gives the next batch."""

    @classmethod
    def beginning(cls, workers: int) -> LoaderState:
        return cls((Position(),) * workers, 0)

    def after(self, batch: LoadedBatch) -> LoaderState:
        """The state once this batch is used."""
        positions = list(self.positions)
        positions[batch.stream] = batch.after
        return LoaderState(tuple(positions), (batch.stream + 1) % len(positions))


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch as it leaves a loading process."""

    pixels: Tensor
    """uint8[B, 3, S, S]: a quarter of the bytes of what the model gets."""
    text_ids: Tensor
    """int64[B, L], and the following as in PairBatch."""
    keys: Tensor
    ids: Tensor
    targets: Tensor
    counted: Tensor
    stream: int
    """Which worker's stream it is from."""
    after: Position
    drawn: int
    """Samples that were read for it, damaged ones included."""
    damaged: tuple[str, ...]
    """Names and reasons of those left out."""
    broken_shards: tuple[str, ...]

    def on(self, device: torch.device, rule: PreprocessRule) -> PairBatch:
        """Normalised, on the device."""
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (rule.mean, rule.std))
        pixels = (self.pixels.to(device, non_blocking=True).float() / 255 - mean) / std
        return PairBatch(pixels, self.text_ids, self.keys, self.ids, self.targets, self.counted).to(device)


@dataclass
class _Growing:
    """A batch in the making."""

    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    written: list[tuple[list[int], int]] = field(default_factory=list)
    drawn: int = 0
    damaged: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


class PairStream(IterableDataset[LoadedBatch]):
    """Batches of one process, without end, from a state on."""

    def __init__(self, reading: Reading, state: LoaderState) -> None:
        if len(state.positions) != reading.workers:
            raise InputError(
                f"data.workers is {reading.workers}, but the checkpoint's data was read by {len(state.positions)}; "
                f"resume with as many"
            )
        self.reading, self.state = reading, state
        self.parts: list[list[Part]] = [
            deal(reading.paths, reading.rank, reading.ranks, worker, reading.workers)
            for worker in range(reading.workers)
        ]

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        if info:
            cv2.setNumThreads(1)  # the loading processes are the threads
        # PyTorch asks its worker 0 first; the stream whose turn it is must answer.
        number = (self.state.turn + (info.id if info else 0)) % self.reading.workers
        return self._batches(number)

    def _batches(self, number: int) -> Iterator[LoadedBatch]:
        reading, maker = self.reading, ExampleMaker(self.reading)
        growing = _Growing()
        start = self.state.positions[number]
        for drawn in stream(self.parts[number], start, reading.seed, reading.options.shuffle):
            self._add(growing, drawn, maker)
            # A hopeless source must be heard of, not waited for: what is damaged travels in batches only.
            if len(growing.damaged) > 1000 and not growing.pictures:
                raise InputError(f"1000 samples in a row cannot be used, the last: {growing.damaged[-1]}")
            if len(growing.pictures) == reading.batch_size:
                yield maker.batch(growing, number, drawn.after)
                growing = _Growing()

    @staticmethod
    def _add(growing: _Growing, drawn: Drawn, maker: ExampleMaker) -> None:
        if drawn.sample is None:
            growing.broken.append(drawn.broken_shard)
            return
        growing.drawn += 1
        try:
            maker.add(growing, drawn.sample, np.random.default_rng(drawn.seed))
        except InputError as error:
            growing.damaged.append(f"{drawn.sample.name}: {error}")


def open_loader(reading: Reading, state: LoaderState, pin: bool = False) -> Iterator[LoadedBatch]:
    """Batches in the one order that seed, processes and workers determine."""
    workers = reading.options.workers
    loader: DataLoader[LoadedBatch] = DataLoader(
        PairStream(reading, state), batch_size=None, num_workers=workers, pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    return iter(loader)


class ExampleMaker:
    """Makes what the model learns from out of what is stored."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.options = reading, reading.options
        self.tokenizer = Tokenizer.from_bytes(reading.tokenizer_json)
        self.prompt = self._prompt(reading.prompts["caption"])

    def add(self, growing: _Growing, raw: Raw, rng: np.random.Generator) -> None:
        """Raises InputError where the sample cannot be used."""
        if raw.problem:
            raise InputError(raw.problem)
        if not isinstance(raw.row.get("captions", []), list):
            raise InputError("captions: expected a list of texts")
        pair = plain_pair(raw.name, raw.data, raw.row)
        if self.options.task == "ask":
            if not pair.questions:
                raise InputError("no question with an answer")
            question, answer = _chosen(pair.questions, rng)
            written = self.answer(question, answer)
            text = answer
        else:
            if not pair.captions:
                raise InputError("no caption")
            text = _chosen(pair.captions, rng)
            written = self._with_prompt(self.prompt, text)
        pixels = picture(pair, self.reading.image_size, self.reading.rule, self.options, rng)
        growing.pictures.append(pixels)
        growing.texts.append(self._with_prompt([self.tokenizer.start_id], text)[0])
        growing.keys.append(text_key(text))
        growing.written.append(written)

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

    def batch(self, growing: _Growing, number: int, after: Position) -> LoadedBatch:
        """Stack what was added. Padded no further than the longest needs (texts: only where padding has no effect), to
        one of a few lengths: each new shape is compiled anew."""
        pad, longest = self.tokenizer.pad_id, self.reading.context_length
        length = min(longest, _rounded(max(len(ids) for ids, _ in growing.written)) + 1)
        texts = min(longest, _rounded(max(map(len, growing.texts)))) if self.reading.trim_texts else longest
        whole = _padded([ids for ids, _ in growing.written], length, pad)
        at = torch.arange(1, length)
        given = torch.tensor([given for _, given in growing.written])[:, None]
        ends = torch.tensor([len(ids) for ids, _ in growing.written])[:, None]
        return LoadedBatch(
            pixels=torch.from_numpy(np.stack(growing.pictures)).permute(0, 3, 1, 2).contiguous(),
            text_ids=_padded(growing.texts, texts, pad),
            keys=torch.tensor(growing.keys),
            ids=whole[:, :-1],
            targets=whole[:, 1:],
            counted=(at >= given) & (at < ends),
            stream=number,
            after=after,
            drawn=growing.drawn,
            damaged=tuple(growing.damaged),
            broken_shards=tuple(growing.broken),
        )

    def _prompt(self, text: str) -> list[int]:
        return [self.tokenizer.start_id, *(self.tokenizer.encode(text) if text else [])]

    def _with_prompt(self, prompt: list[int], text: str) -> tuple[list[int], int]:
        ids = [*prompt, *self.tokenizer.encode(text)][: self.reading.context_length - 1]
        return [*ids, self.tokenizer.end_id], min(len(prompt), len(ids))


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


def _chosen(options: tuple[Any, ...], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]


def _rounded(length: int) -> int:
    """Up to a multiple of 16."""
    return -(-length // 16) * 16


def _padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])

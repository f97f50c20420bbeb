"""Draws batches: pictures augmented, texts tokenized, for both passes at once.

The contrastive pass sees each distinct text of a batch once, however many pictures it belongs to (with class labels
that is much cheaper, and repeated texts are positives by construction). The caption pass sees for each picture either
its caption or a question with its answer; only what the model shall write counts in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mammut.augment import Augmenter, AugmentOptions
from mammut.data import Corpus, Pair
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

T = TypeVar("T")


SHORT = 16
"""Tokens. Rows up to this length and longer ones are padded apart: one long caption must not lengthen the batch."""


@dataclass(frozen=True)
class Sequences:
    """Rows of the caption pass, padded to the longest of them. Legend: R rows, L length."""

    pictures: Tensor
    """int64[R]: which picture of the batch each row is about."""
    ids: Tensor
    """int64[R, L]: input."""
    targets: Tensor
    """int64[R, L]: the next token at each position."""
    counted: Tensor
    """bool[R, L]: targets that the model shall write, neither padding nor prompt."""


@dataclass(frozen=True)
class Batch:
    """Legend: B pictures, M of them with a text to match, T distinct texts, L length."""

    pixels: Tensor
    """float32[B, 3, S, S], normalised."""
    matched: Tensor
    """int64[M]: which pictures take part in the contrastive pass."""
    picture_keys: tuple[str, ...]
    """M: what each of them shows."""
    text_ids: tuple[Tensor, ...]
    """int64[T, L] in up to two parts by length, padded."""
    text_keys: tuple[str, ...]
    """T, in the order of the parts: what each text says."""
    sequences: tuple[Sequences, ...]
    """One row a picture, in up to two parts by length."""


class Batcher:
    """Draws from one generator only: the same generator state gives the same batches.

    Args:
        ask_form: how a question stands before its answer; holds {question}.
        question_share: probability that a picture which has questions is asked one instead of being captioned.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        tokenizer: Tokenizer,
        rule: PreprocessRule,
        context_length: int,
        *,
        augment: AugmentOptions,
        ask_form: str,
        question_share: float,
        generator: torch.Generator,
    ) -> None:
        if not corpora:
            raise InputError("expected at least one set of image-text pairs, got none")
        self.corpora, self.tokenizer, self.context_length = tuple(corpora), tokenizer, context_length
        self.ask_form, self.question_share, self.generator = ask_form, question_share, generator
        self.augmenter = Augmenter(augment, rule.mean, rule.std, generator)
        self.shares = torch.tensor([corpus.weight for corpus in corpora], dtype=torch.float64)
        self.scenes = next((corpus.pictures for corpus in corpora if corpus.kind == "photo"), None)
        self._encoded: dict[str, list[int]] = {}

    def draw(self, batch_size: int, size: int) -> Batch:
        """A batch of `batch_size` pictures at `size` pixels."""
        per_corpus = torch.multinomial(self.shares, batch_size, replacement=True, generator=self.generator)
        counts = torch.bincount(per_corpus, minlength=len(self.corpora)).tolist()
        pixels, pairs = [], []
        for corpus, count in zip(self.corpora, counts, strict=True):
            if count:
                chosen = torch.multinomial(corpus.sample_weights, count, replacement=True, generator=self.generator)
                pixels.append(self._augmented(corpus, corpus.pictures[chosen], size))
                pairs += [corpus.pairs[index] for index in chosen.tolist()]
        return self._batch(torch.cat(pixels), pairs)

    def _augmented(self, corpus: Corpus, pictures: Tensor, size: int) -> Tensor:
        if corpus.kind == "drawing":
            return self.augmenter.drawings(pictures, self.scenes, size)
        return self.augmenter.photos(pictures, size) if corpus.kind == "photo" else self.augmenter.plain(pictures, size)

    def _batch(self, pixels: Tensor, pairs: Sequence[Pair]) -> Batch:
        chance = torch.rand(len(pairs), 3, generator=self.generator).tolist()
        keys: list[str] = []
        texts: dict[str, str] = {}
        matched: list[int] = []
        rows: list[tuple[list[int], int]] = []
        for index, (pair, (by_match, by_kind, by_text)) in enumerate(zip(pairs, chance, strict=True)):
            forms = pair.matches or pair.captions
            if forms:
                matched.append(index)
                keys.append(forms[0])
                texts.setdefault(forms[0], _pick(forms, by_match))
            ask = bool(pair.questions) and (by_kind < self.question_share or not pair.captions)
            rows.append(
                self._asked(*_pick(pair.questions, by_text)) if ask else self._caption(_pick(pair.captions, by_text))
            )
        sequences = tuple(self._padded(part, rows) for part in _by_length([len(ids) for ids, _ in rows]))
        written = [self._whole(text) for text in texts.values()]
        parts = _by_length([len(ids) for ids in written])
        text_ids = tuple(_pad([written[row] for row in part], self.tokenizer.pad_id) for part in parts)
        text_keys = tuple(list(texts)[row] for part in parts for row in part)
        return Batch(pixels, torch.tensor(matched, dtype=torch.int64), tuple(keys), text_ids, text_keys, sequences)

    def _caption(self, caption: str) -> tuple[list[int], int]:
        """A whole sequence, and how many of its first tokens are given rather than written."""
        return self._cut([self.tokenizer.start_id, *self._ids(caption)]), 1

    def _asked(self, question: str, answer: str) -> tuple[list[int], int]:
        # An answer always has room: a question that is too long loses its beginning.
        written = [*self._ids(answer)[: self.context_length // 2], self.tokenizer.end_id]
        given = self._ids(self.ask_form.format(question=question))
        prompt = [self.tokenizer.start_id, *given[-(self.context_length - len(written) - 1) :]]
        return [*prompt, *written], len(prompt)

    def _whole(self, text: str) -> list[int]:
        return self._cut([self.tokenizer.start_id, *self._ids(text)])

    def _cut(self, ids: list[int]) -> list[int]:
        return [*ids[: self.context_length - 1], self.tokenizer.end_id]

    def _ids(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer.encode(text)
        return self._encoded[text]

    def _padded(self, part: list[int], rows: Sequence[tuple[list[int], int]]) -> Sequences:
        whole = _pad([rows[row][0] for row in part], self.tokenizer.pad_id)
        at = torch.arange(1, whole.shape[1])
        given = torch.tensor([rows[row][1] for row in part])[:, None]
        length = torch.tensor([len(rows[row][0]) for row in part])[:, None]
        return Sequences(torch.tensor(part), whole[:, :-1], whole[:, 1:], (at >= given) & (at < length))


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers of the short and of the long rows, without empty parts."""
    parts = ([row for row, length in enumerate(lengths) if (length > SHORT) == long] for long in (False, True))
    return [part for part in parts if part]


def _pick(choices: Sequence[T], chance: float) -> T:
    return choices[min(int(chance * len(choices)), len(choices) - 1)]


def _pad(rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """int64[N, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])

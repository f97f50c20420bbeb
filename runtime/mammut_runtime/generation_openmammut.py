"""The public openMaMMUT `generate()` rules, to the letter, for comparing captions with released weights.

Kept as a named option, not as the default: it sums raw logits instead of log-probabilities, forces an end at the
length limit, divides by the temperature after the filter, lets a pad end a caption, and computes the whole prefix at
every step. `generation.py` is what a product should use. What is not repeated: running the picture once per beam,
three identical groups of beams (one gives the same captions), and the failure of sampling for more than one picture.

The rules need only a function from token ids to the next token's logits, so the PyTorch core and the runtime share
them. They follow the public code as it runs with transformers 4.46.3 (its beam search is restated here).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.probabilities import best, softmax

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

NextLogits = Callable[[Ids], Logits]
"""int64[rows, L] -> float32[rows, V], the logits after the last id. Rows are ordered by picture: with n beams, rows
i*n to i*n+n-1 belong to picture i."""

GenerationType = Literal["beam_search", "top_k", "top_p"]


@dataclass(frozen=True)
class OpenMammutOptions:
    """Arguments of the public `generate()`, under their public names and with its defaults.

    Raises InputError for values that the public code refuses too.
    """

    generation_type: GenerationType = "beam_search"
    """How tokens are chosen. Greedy is "top_k" with top_k=1."""
    seq_len: int = 30
    """Most ids in a caption, start and end included."""
    min_seq_len: int = 5
    """The end id is impossible while there are fewer ids than this, start included."""
    max_seq_len: int = 77
    """The decoder's context length. Sampling looks at no more than the last so many ids; beam search fails beyond."""
    temperature: float = 1.0
    """Divides the logits after the filter, so it never changes which tokens are possible."""
    top_k: int = 1
    top_p: float = 0.1
    num_beams: int = 6
    num_beam_groups: int = 3
    """Groups are identical in the public code (no diversity penalty), so num_beams / num_beam_groups beams are run."""
    repetition_penalty: float = 1.0
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    sot_token_id: int | None = None
    """None in any of the three: the bundle's own where there is a bundle, else 0, 49407, 49406."""
    fixed_output_length: bool = False
    """Pad every caption to seq_len ids."""
    seed: int | None = None
    """Of the draws of top_k and top_p; None draws differently every time. (Not in the public code.)"""

    def __post_init__(self) -> None:
        if self.generation_type not in get_args(GenerationType):
            kinds = ", ".join(get_args(GenerationType))
            raise InputError(f"generation_type must be one of {kinds}, got {self.generation_type!r}")
        if self.seq_len <= self.min_seq_len:
            raise InputError(f"seq_len must be larger than min_seq_len, got {self.seq_len} and {self.min_seq_len}")
        _check("min_seq_len", self.min_seq_len, self.min_seq_len >= 0, "at least 0")
        _check("temperature", self.temperature, 0 < self.temperature < math.inf, "above 0")
        _check("top_k", self.top_k, self.top_k >= 1, "at least 1")
        _check("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        if self.generation_type == "beam_search":
            _check("num_beams", self.num_beams, self.num_beams > 1, "at least 2")
            groups = self.num_beam_groups
            divides = 1 <= groups <= self.num_beams and self.num_beams % groups == 0
            _check("num_beam_groups", groups, divides, f"a divisor of num_beams ({self.num_beams})")

    def with_ids(self, start: int, end: int, pad: int) -> OpenMammutOptions:
        """These options with the given ids where they leave one open."""
        return dataclasses.replace(
            self,
            sot_token_id=start if self.sot_token_id is None else self.sot_token_id,
            eos_token_id=end if self.eos_token_id is None else self.eos_token_id,
            pad_token_id=pad if self.pad_token_id is None else self.pad_token_id,
        )

    @property
    def special(self) -> tuple[int, int, int]:
        """Start, end and pad id; CLIP's where the options leave one open."""
        given = (self.sot_token_id, self.eos_token_id, self.pad_token_id)
        start, end, pad = (clip if one is None else one for one, clip in zip(given, (49406, 49407, 0), strict=True))
        return start, end, pad

    @property
    def rows_per_picture(self) -> int:
        """Rows that `next_logits` gets for one picture: the beams of one group, or 1."""
        return self.num_beams // self.num_beam_groups if self.generation_type == "beam_search" else 1


def generate(
    next_logits: NextLogits,
    pictures: int,
    options: OpenMammutOptions | None = None,
    text: Ids | None = None,
    model_pad_id: int = 0,
) -> Ids:
    """Captions by the public rules: int64[pictures, width], start and end ids included, width <= seq_len.

    next_logits is called with `pictures * options.rows_per_picture` rows. text: int64[pictures, L] or int64[L] to
    start from instead of the start id; beam search ignores it, as the public code does. model_pad_id fills captions up
    to seq_len when fixed_output_length is set with beam search (pad_token_id does so when sampling).
    Raises InputError for a text of another shape, and where beam search passes the context length.
    """
    options = options or OpenMammutOptions()
    if pictures < 1:
        raise InputError(f"generate needs at least 1 picture, got {pictures}")
    if options.generation_type != "beam_search":
        return _sample(next_logits, _start(text, pictures, options), options)
    ids = _beam_search(next_logits, pictures, options)
    if options.fixed_output_length and ids.shape[1] < options.seq_len:
        ids = np.pad(ids, ((0, 0), (0, options.seq_len - ids.shape[1])), constant_values=model_pad_id)
    return ids


def sampling_probs(
    logits: Logits,
    prefix: Ids,
    *,
    generation_type: GenerationType = "top_k",
    min_seq_len: int = 5,
    temperature: float = 1.0,
    top_k: int = 1,
    top_p: float = 0.1,
    repetition_penalty: float = 1.0,
    eos_token_id: int = 49407,
) -> Logits:
    """Probabilities that top_k and top_p draw from: float32[N, V], rows sum to 1.

    logits: float32[N, V]; prefix: int64[N, L], the ids so far. In this order: no end before min_seq_len, repetition
    penalty, top-k (equal scores at the edge all stay) or top-p (on probabilities without temperature), temperature.
    """
    scores = _processed(logits, prefix, eos_token_id, min_seq_len, repetition_penalty)
    if generation_type == "top_k":
        edge = np.sort(scores, axis=-1)[:, -min(top_k, scores.shape[-1])]
        scores[scores < edge[:, None]] = -np.inf
    elif generation_type == "top_p":
        order = np.argsort(scores, axis=-1, kind="stable")
        drop = np.cumsum(softmax(np.take_along_axis(scores, order, axis=-1)), axis=-1) <= 1 - top_p
        drop[:, -1] = False
        np.put_along_axis(scores, order, np.where(drop, -np.inf, np.take_along_axis(scores, order, axis=-1)), axis=-1)
    else:
        raise InputError(f"sampling probabilities exist for top_k and top_p, not for {generation_type!r}")
    return softmax(scores / np.float32(temperature))


def _sample(next_logits: NextLogits, ids: Ids, options: OpenMammutOptions) -> Ids:
    """top_k and top_p. A row is finished when its last id is the end or the pad; it then gets pads."""
    _, end, pad = options.special
    draws = [np.random.default_rng(options.seed) for _ in range(len(ids))]
    while True:
        window = ids[:, -options.max_seq_len :]
        open_rows = np.flatnonzero((ids[:, -1] != end) & (ids[:, -1] != pad))
        if not len(open_rows) and not options.fixed_output_length:
            return ids
        chosen = np.full(len(ids), pad, np.int64)
        if len(open_rows) and window.shape[1] + 1 == options.seq_len:
            chosen[open_rows] = end  # the public code ends a caption by force, whatever the model says
        elif len(open_rows):
            probabilities = sampling_probs(
                next_logits(window)[open_rows],
                window[open_rows],
                generation_type=options.generation_type,
                min_seq_len=options.min_seq_len,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                repetition_penalty=options.repetition_penalty,
                eos_token_id=end,
            )
            chosen[open_rows] = [_draw(p, draws[row]) for p, row in zip(probabilities, open_rows, strict=True)]
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
        if ids.shape[1] >= options.seq_len:
            return ids


class _Hypotheses:
    """The best n closed captions of one picture. Score: sum of raw logits / length, start and end counted."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: list[tuple[float, Ids]] = []

    def add(self, total: float, length: int, ids: Ids) -> None:
        score = total / length
        if len(self.kept) == self.room and score <= self.worst:
            return
        self.kept.append((score, ids))
        if len(self.kept) > self.room:
            del self.kept[min(range(len(self.kept)), key=lambda i: self.kept[i][0])]

    @property
    def worst(self) -> float:
        return min(score for score, _ in self.kept)

    def cannot_improve(self, best_total: float, length: int) -> bool:
        return len(self.kept) == self.room and self.worst >= best_total / length

    def best(self) -> Ids:
        # the last of equal ones, as a stable sort followed by pop() gives
        return max(enumerate(self.kept), key=lambda item: (item[1][0], item[0]))[1][1]


def _beam_search(next_logits: NextLogits, pictures: int, options: OpenMammutOptions) -> Ids:
    start, end, pad = options.special
    n = options.rows_per_picture
    ids = np.full((pictures, n, 1), start, np.int64)
    totals = np.tile(np.array([0.0] + [-1e9] * (n - 1), np.float32), (pictures, 1))
    hypotheses = [_Hypotheses(n) for _ in range(pictures)]
    done = [False] * pictures
    while ids.shape[2] < options.seq_len and not all(done):
        rows = ids.reshape(pictures * n, -1)
        if rows.shape[1] > options.max_seq_len:
            raise InputError(
                f"beam search reached {rows.shape[1]} ids, the decoder takes {options.max_seq_len}; "
                f"use seq_len <= {options.max_seq_len + 1}, got {options.seq_len}"
            )
        scores = _processed(next_logits(rows), rows, end, options.min_seq_len, options.repetition_penalty)
        scores = (scores + totals.reshape(-1, 1)).reshape(pictures, n, -1)
        tokens = np.full((pictures, n), pad, np.int64)
        parents = np.zeros((pictures, n), np.int64)
        for i in range(pictures):
            if done[i]:  # its rows are carried along, their contents are never looked at again
                totals[i] = 0
                continue
            best_total = _extend(scores[i], ids[i], end, hypotheses[i], parents[i], tokens[i], totals[i])
            done[i] = hypotheses[i].cannot_improve(best_total, ids.shape[2] + 1)
        ids = np.concatenate([np.take_along_axis(ids, parents[:, :, None], axis=1), tokens[:, :, None]], axis=2)
    for i in range(pictures):
        if not done[i]:
            for beam in range(n):
                hypotheses[i].add(float(totals[i, beam]), ids.shape[2], ids[i, beam])
    return _padded([each.best() for each in hypotheses], end, pad, options.seq_len)


def _extend(
    scores: Logits, ids: Ids, end: int, hypotheses: _Hypotheses, parents: Ids, tokens: Ids, totals: Logits
) -> float:
    """One step of one picture. scores: float32[n, V]. Writes parents, tokens, totals [n]; returns the best total.

    Of the best 2n continuations an end among the first n closes a caption, an end after them is dropped, and the first
    n others continue. There are always n of them: each beam has one end.
    """
    n, vocabulary = scores.shape
    flat = scores.reshape(-1)
    ranked = best(flat, 2 * n)
    beam = 0
    for rank, (parent, token) in enumerate(zip(*divmod(ranked, vocabulary), strict=True)):
        total = flat[ranked[rank]]
        if token != end:
            parents[beam], tokens[beam], totals[beam] = parent, token, total
            beam += 1
        elif rank < n:
            hypotheses.add(float(total), ids.shape[1] + 1, ids[parent])
        if beam == n:
            break
    return float(flat[ranked[0]])


def _padded(captions: list[Ids], end: int, pad: int, seq_len: int) -> Ids:
    """Captions side by side: the end id where it fits, then pads. int64[N, min(longest + 1, seq_len)]."""
    width = min(max(map(len, captions)) + 1, seq_len)
    ids = np.full((len(captions), width), pad, np.int64)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = caption
        if len(caption) < width:
            row[len(caption)] = end
    return ids


def _processed(logits: Logits, prefix: Ids, end: int, min_seq_len: int, penalty: float) -> Logits:
    """A copy of the logits, float32[N, V], without an end before its time and with repeated ids made less likely."""
    scores = np.array(logits, np.float32)
    if prefix.shape[1] < min_seq_len:
        scores[:, end] = -np.inf
    if penalty != 1.0:
        seen = np.take_along_axis(scores, prefix, axis=1)
        weaker = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
        np.put_along_axis(scores, prefix, weaker, axis=1)
    return scores


def _draw(probabilities: Logits, source: np.random.Generator) -> int:
    """An index drawn with the given probabilities, float32[V]; one uniform number per draw."""
    edges = np.cumsum(probabilities, dtype=np.float64)
    chosen = int(np.searchsorted(edges, source.random() * edges[-1], side="right"))
    # rounding can put the number on the last edge, behind which every probability is 0
    return min(chosen, int(np.flatnonzero(probabilities)[-1]))


def _start(text: Ids | None, pictures: int, options: OpenMammutOptions) -> Ids:
    if text is None:
        return np.full((pictures, 1), options.special[0], np.int64)
    try:
        ids = np.atleast_2d(np.asarray(text, np.int64))
    except (ValueError, TypeError, OverflowError) as problem:
        raise InputError(f"text must be rows of ids of one length: {problem}") from None
    if ids.ndim != 2 or ids.shape[0] != pictures or ids.shape[1] < 1:
        raise InputError(f"text must be ids of shape [{pictures}, 1 or more], one row per picture, got {ids.shape}")
    return ids


def _check(name: str, value: float, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"{name} must be {expected}, got {value}")

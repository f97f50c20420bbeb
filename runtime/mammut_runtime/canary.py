"""A small picture, and a clip cut from it, the same on every device, and the comparison of what a bundle makes of them
there and here.

The exporter records what the bundle answered (`bundle.Canary`); a device makes the same picture, runs it, and compares.
So a broken engine, a driver that computes differently, or a wrong picture path shows before an app trusts it. Running
the bundle is the model's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.manifest import Canary, CanaryBox

_BLOCKS_HW = (6, 8)
_BLOCK_SALT = 0x80000000
"""Keeps the blocks' numbers apart from the pixels'."""


@dataclass(frozen=True, eq=False)
class CanaryAnswers:
    """What a bundle makes of the canary's inputs; None of what it has no graph for."""

    embedding: NDArray[np.float32] | None = None
    """Of the picture, float32[E]."""
    text_embedding: NDArray[np.float32] | None = None
    caption_ids: tuple[int, ...] | None = None
    """The picture's greedy caption, without start and end."""
    clip_embedding: NDArray[np.float32] | None = None
    """Of the picture's `moving_crops`."""
    boxes: NDArray[np.float32] | None = None
    """Everything that the detector proposes in the picture, float32[P, 5]: left, top, right, bottom as parts of the
    input's side, and the highest score."""

    @property
    def embeddings(self) -> dict[str, NDArray[np.float32] | None]:
        """Those compared with a tolerance, by their names here and in Canary."""
        return {name: getattr(self, name) for name in ("embedding", "text_embedding", "clip_embedding")}


@dataclass(frozen=True)
class CanaryResult:
    """What a replay showed."""

    ok: bool
    worst_error: float
    """Largest difference of a component of an embedding, of a box or of a score; infinite if one is missing, of another
    size, or NaN."""
    message: str
    """One line for people, also when all is well."""


def canary_picture(seed: int, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The canary picture uint8[H, W, 3], RGB; integer arithmetic only, so every device makes the same bytes.

    Per channel two parts in eight are a gradient (across, down, diagonal), five a grid of 6 x 8 blocks of one colour
    each, one is noise: something for the coarse, the middle and the fine scale. The formula stands in docs/bundle.md.

    seed: 0 to 2**32 - 1. size_hw: at least 1 x 1.
    """
    height, width = size_hw
    y, x, channel = np.ogrid[0:height, 0:width, 0:3]
    gradient = np.concatenate(
        np.broadcast_arrays(
            x * 255 // max(width - 1, 1),
            y * 255 // max(height - 1, 1),
            (x + y) * 255 // max(width + height - 2, 1),
        ),
        axis=2,
    )
    block = (y * _BLOCKS_HW[0] // height) * _BLOCKS_HW[1] + x * _BLOCKS_HW[1] // width
    blocks = _scramble(seed, _BLOCK_SALT + block * 3 + channel)
    noise = _scramble(seed, (y * width + x) * 3 + channel)
    return ((2 * gradient + 5 * blocks + noise) // 8).astype(np.uint8)


def moving_crops(picture: NDArray[np.uint8], frames: int) -> list[NDArray[np.uint8]]:
    """A clip made of a picture uint8[H, W, 3]: its first frame is the upper left three quarters of it, its last frame
    the lower right ones, those between lie evenly on the way. Whole numbers only, rounded down.

    frames: at least 1. Returns that many, uint8[max(H * 3 // 4, 1), max(W * 3 // 4, 1), 3] each.
    """
    sides = [(max(side * 3 // 4, 1), side) for side in picture.shape[:2]]
    last = max(frames - 1, 1)
    starts = [[(side - part) * index // last for part, side in sides] for index in range(frames)]
    return [picture[y : y + sides[0][0], x : x + sides[1][0]] for y, x in starts]


def canary_classes(canary: Canary, embed_dim: int) -> NDArray[np.float32]:
    """What the detector is asked for, float32[C, E]: a vector with all components equal, of unit length, and the
    canary's embeddings of its picture and its text, as far as it has them."""
    even = np.full(embed_dim, embed_dim**-0.5)
    rows = [even, *(each for each in (canary.embedding, canary.text_embedding) if each)]
    return np.array(rows, np.float32)


def proposed(boxes: NDArray[np.float32], scores: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """What the graph gives for one picture, boxes float32[P, 4] in pixels and scores float32[P, C], as
    CanaryAnswers.boxes. size: side of the input."""
    found: NDArray[np.float32] = np.concatenate([boxes / size, scores.max(axis=1, keepdims=True)], axis=1)
    return found


def compare(expected: Canary, answers: CanaryAnswers) -> CanaryResult:
    """Compare a replay with what was recorded."""
    problems: list[str] = []
    worst = 0.0
    for name, got in answers.embeddings.items():
        if got is None:
            continue
        error = _largest_difference(getattr(expected, name), got)
        worst = max(worst, error)
        if not error <= expected.tolerance:
            problems.append(f"{name} differs by {error:.2g}, tolerance {expected.tolerance:.2g}")
    if answers.boxes is not None:
        error = max((box_distance(each, answers.boxes) for each in expected.boxes), default=0.0)
        error = error if np.isfinite(answers.boxes).all() else float("inf")
        worst = max(worst, error)
        if not error <= expected.tolerance:
            problems.append(f"boxes differ by {error:.2g}, tolerance {expected.tolerance:.2g}")
    if answers.caption_ids is not None and answers.caption_ids != expected.caption_ids:
        problems.append(f"caption ids {_shown(answers.caption_ids)}, expected {_shown(expected.caption_ids)}")
    if all(each is None for each in vars(answers).values()):
        problems.append("nothing was replayed")
    if problems:
        advice = "this device or engine computes something else than where the bundle was exported"
        return CanaryResult(False, worst, f"canary differs: {'; '.join(problems)}; {advice}")
    return CanaryResult(True, worst, f"canary reproduced: worst error {worst:.2g}, tolerance {expected.tolerance:.2g}")


def box_distance(want: CanaryBox, found: NDArray[np.float32]) -> float:
    """The largest difference, in an edge or in the score, of the nearest proposal of CanaryAnswers.boxes."""
    difference = np.abs(np.array([*want.box, want.score]) - found.astype(np.float64)).max(axis=1)
    return float(np.min(difference, initial=np.inf, where=np.isfinite(difference)))


def _scramble(seed: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 to 255 for each index, well mixed: the finalizer of MurmurHash3 (public domain), modulo 2**32, top byte."""
    word = np.bitwise_and(index.astype(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B1), np.uint64(0xFFFFFFFF))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = np.bitwise_and((word ^ (word >> np.uint64(shift))) * np.uint64(factor), np.uint64(0xFFFFFFFF))
    top: NDArray[np.int64] = ((word ^ (word >> np.uint64(16))) >> np.uint64(24)).astype(np.int64)
    return top


def _largest_difference(want: Sequence[float], got: NDArray[np.float32]) -> float:
    if got.shape != (len(want),):
        return float("inf")
    difference = float(np.max(np.abs(np.asarray(want) - got.astype(np.float64)), initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def _shown(ids: Sequence[int]) -> str:
    return f"{list(ids[:8])}" + ("..." if len(ids) > 8 else "")

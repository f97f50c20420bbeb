"""A small picture that is the same on every device, and the comparison of what a bundle makes of it there and here.

The exporter records what the bundle answered (`bundle.Canary`); a device makes the same picture, runs it, and compares.
So a broken engine, a driver that computes differently, or a wrong picture path shows before an app trusts it. Running
the bundle is the model's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.manifest import Canary

_BLOCKS_HW = (6, 8)
_BLOCK_SALT = 0x80000000
"""Keeps the blocks' numbers apart from the pixels'."""


@dataclass(frozen=True)
class CanaryResult:
    """What a replay showed."""

    ok: bool
    worst_error: float
    """Largest difference of a component of an embedding; infinite if one is missing, of another size, or NaN."""
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


def compare(
    expected: Canary,
    embedding: NDArray[np.float32] | None,
    text_embedding: NDArray[np.float32] | None,
    caption_ids: Sequence[int] | None,
) -> CanaryResult:
    """Compare a replay with what was recorded. None: not replayed, for example because the bundle lacks the graph.

    embedding, text_embedding: float32[E]. caption_ids: the greedy caption, without start and end.
    """
    problems: list[str] = []
    worst = 0.0
    for name, want, got in (
        ("embedding", expected.embedding, embedding),
        ("text_embedding", expected.text_embedding, text_embedding),
    ):
        if got is None:
            continue
        error = _largest_difference(want, got)
        worst = max(worst, error)
        if not error <= expected.tolerance:
            problems.append(f"{name} differs by {error:.2g}, tolerance {expected.tolerance:.2g}")
    if caption_ids is not None and tuple(caption_ids) != expected.caption_ids:
        problems.append(f"caption ids {_shown(caption_ids)}, expected {_shown(expected.caption_ids)}")
    if embedding is None and text_embedding is None and caption_ids is None:
        problems.append("nothing was replayed")
    if problems:
        advice = "this device or engine computes something else than where the bundle was exported"
        return CanaryResult(False, worst, f"canary differs: {'; '.join(problems)}; {advice}")
    return CanaryResult(True, worst, f"canary reproduced: worst error {worst:.2g}, tolerance {expected.tolerance:.2g}")


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

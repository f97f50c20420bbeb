"""What generation needs from a vocabulary of scores: logarithms of probabilities, and the best few of very many.

Everything here is plain numpy over the last axis. Nothing knows about tokens, prompts or pictures.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", np.float32, np.float64)

_BLOCK = 64
"""Scores looked at together by `best`. Any size gives the same answer; 64 was the fastest for 49,408 scores."""


def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural logarithm of the softmax over the last axis. float32[..., V] -> float32[..., V], a new array, <= 0."""
    shifted: NDArray[np.float32] = scores - scores.max(axis=-1, keepdims=True)
    total: NDArray[np.float32] = np.exp(shifted).sum(axis=-1, keepdims=True)
    shifted -= np.log(total)
    return shifted


def softmax(scores: NDArray[Float]) -> NDArray[Float]:
    """Softmax over the last axis, of the same dtype and shape as the scores; -inf gets probability 0."""
    weights: NDArray[Float] = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def best(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest of float32[V], highest first, equal ones by their index. int64[<=count].

    Sorting a vocabulary costs more than choosing from it should (milliseconds against a decoder step of a few). The
    `count` best lie inside the `count` blocks with the best maxima, so one pass for the maxima and a sort of
    `count * 64` scores are enough. That stays exact with equal scores because both sorts are stable.
    """
    size = scores.shape[0]
    if size <= count * _BLOCK:
        return np.argsort(-scores, kind="stable")[:count]
    whole = size - size % _BLOCK
    maxima = scores[:whole].reshape(-1, _BLOCK).max(axis=1)
    if whole < size:
        maxima = np.append(maxima, scores[whole:].max())
    blocks = np.sort(np.argsort(-maxima, kind="stable")[:count])
    inside: NDArray[np.int64] = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1)
    inside = inside[inside < size]
    found: NDArray[np.int64] = inside[np.argsort(-scores[inside], kind="stable")[:count]]
    return found

"""Scores to probabilities: probability = sigmoid(logit(score) / temperature + bias), fitted for one name.

The fit is logistic regression on the logit of the score (Platt), from pictures that have the thing and frames that do
not. Both sides weigh the same, whatever their numbers: a probability of 0.5 means "as likely as not, if the thing is
there in half of the frames". How well it fits is judged across two halves: each half by the fit of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.vocabulary import Calibration, logit, sigmoid
from mammut_runtime.strict import to_dict

F64 = NDArray[np.float64]
LEAST_PICTURES = 8
"""Of each kind: with fewer there is nothing to fit, let alone to judge."""
BINS = 10
_STEPS = 60
STEEPEST, FLATTEST = 1e2, 1e-2
"""Factors on the logit; scores that tell the two kinds apart without error would make it infinite."""
_MOST_BIAS = 1e3
"""What a vocabulary takes (Calibration.bias)."""


@dataclass(frozen=True)
class Reliability:
    """How often what is said with a probability is so."""

    said: tuple[float, ...]
    """Mean probability of each bin that has something in it."""
    so: tuple[float, ...]
    """Share of it that had the thing, both kinds weighing the same."""
    weights: tuple[float, ...]
    """Share of all in the bin; their sum is 1."""

    @property
    def error(self) -> float:
        """Mean distance of the two (the expected calibration error): 0 is perfect."""
        return sum(weight * abs(said - so) for said, so, weight in zip(self.said, self.so, self.weights, strict=True))

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return {**plain, "error": self.error}


@dataclass(frozen=True)
class Fit:
    """What was fitted for one name."""

    calibration: Calibration
    """Without a threshold."""
    before: Reliability
    """Of the scores as they are."""
    after: Reliability
    """Of the probabilities; each half by the other half's fit."""


def fit(
    positives: NDArray[np.floating[Any]], negatives: NDArray[np.floating[Any]], steepest: float = STEEPEST
) -> Fit | None:
    """Best scores of pictures with the thing and of frames without; None if there are too few, or the scores of the
    former are not the higher ones.

    steepest: largest factor on the logit, FLATTEST to STEEPEST.
    """
    with_thing, without = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    if min(len(with_thing), len(without)) < LEAST_PICTURES:
        return None
    whole = _regression(with_thing, without, steepest)
    halves = [_regression(with_thing[part::2], without[part::2], steepest) for part in (0, 1)]
    if whole is None or halves[0] is None or halves[1] is None:
        return None
    judged = [
        np.concatenate([_apply(half, values[1 - part :: 2]) for part, half in enumerate(halves)])
        for values in (with_thing, without)
    ]
    factor, bias = whole
    return Fit(Calibration(1 / factor, bias), reliability(with_thing, without), reliability(judged[0], judged[1]))


def reliability(positives: F64, negatives: F64, bins: int = BINS) -> Reliability:
    """Probabilities given to pictures with the thing and to frames without, in bins of equal width."""
    said = np.concatenate([positives, negatives])
    weights = np.concatenate([np.full(len(each), 0.5 / len(each)) for each in (positives, negatives)])
    so = np.arange(len(said)) < len(positives)
    where = np.minimum((said * bins).astype(int), bins - 1)
    total = np.bincount(where, weights, bins)
    used = total > 0
    mean = np.bincount(where, weights * said, bins)[used] / total[used]
    share = np.bincount(where, weights * so, bins)[used] / total[used]
    return Reliability(tuple(mean.tolist()), tuple(share.tolist()), tuple(total[used].tolist()))


def _apply(line: tuple[float, float] | None, scores: F64) -> F64:
    factor, bias = line or (1.0, 0.0)
    return sigmoid(factor * logit(scores) + bias)


def _regression(positives: F64, negatives: F64, steepest: float) -> tuple[float, float] | None:
    """Factor and bias by Newton's method; None if the factor would not be above 0."""
    x = logit(np.concatenate([positives, negatives]))
    counts = len(positives), len(negatives)
    # Platt's targets: not quite 1 and 0, so that few examples do not promise certainty
    y = np.repeat([(counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2)], counts)
    weights = np.repeat([0.5 / counts[0], 0.5 / counts[1]], counts)
    center, spread = float(np.average(x, weights=weights)), float(x.std()) or 1.0
    design = np.stack([(x - center) / spread, np.ones_like(x)], axis=1)

    def loss(at: F64) -> float:
        z = design @ at
        return float(weights @ (np.logaddexp(0, z) - y * z))

    line = np.zeros(2)
    for _ in range(_STEPS):
        p = sigmoid(design @ line)
        slope = design.T @ (weights * (p - y))
        curve = (design * (weights * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while size > 1e-6 and loss(line - size * step) > loss(line):
            size /= 2
        line = line - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    factor = line[0] / spread
    if not factor > 0:
        return None
    kept = float(np.clip(factor, FLATTEST, steepest))
    if abs(line[1] - kept * center) > _MOST_BIAS:  # a flatter line through the same point, not another point
        kept = float(np.clip((_MOST_BIAS - abs(line[1])) / abs(center), FLATTEST, kept)) if center else kept
    return kept, float(np.clip(line[1] - kept * center, -_MOST_BIAS, _MOST_BIAS))

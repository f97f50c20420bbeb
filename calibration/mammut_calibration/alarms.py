"""How often a name is reported where the thing is not, and which threshold makes that seldom enough.

An alarm is a frame in which the name's best score reaches the threshold; after it the same name is quiet for a while,
so that a thing that stays is not a thousand alarms, nor one. A higher threshold never gives more of them.

What footage without the thing can show is limited. With the threshold just above the score of the (k + 1)-th alarm, the
true rate is, in 95 of 100 such footages, at most the upper confidence limit of a Poisson count of k: that holds for a
threshold that was chosen by looking, because it is an order statistic (k = 0: the rule of three, 3 / hours). So the
threshold is chosen by that limit, not by the count, and footage that is too short for any count is said to be so. The
limit takes alarms as independent; those of one poster on one wall are not, so footage of many places says more than
long footage of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict

F64 = NDArray[np.float64]
_MARGIN = 0.01
"""How far above the score of a refused alarm a threshold is, at most: devices differ by about 0.001."""
_EXACT_COUNTS = 200
"""Above this many alarms, the limit is approximated (Wilson and Hilferty; within 0.01 % there)."""


@dataclass(frozen=True)
class Footage:
    """When each frame was, on one time line: what is from different clips lies further apart than any pause."""

    times_s: F64
    """float64[L], ascending."""
    hours: float
    """How much footage that is, at the rate at which it was looked at."""


@dataclass(frozen=True)
class AlarmLimit:
    """What was asked, and what the footage can say. Raises InputError for values out of range."""

    per_hour: float
    """Most false alarms of one name in an hour."""
    quiet_s: float = 10.0
    """Seconds after an alarm in which the same name gives no other."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for key, low, high in (("per_hour", 1e-6, 1e6), ("quiet_s", 0.0, 86_400.0), ("confidence", 0.5, 0.9999)):
            if not low <= getattr(self, key) <= high:
                raise InputError(f"{key}: expected a number from {low:g} to {high:g}, got {getattr(self, key)}")

    def most_alarms(self, hours: float) -> int:
        """The most alarms in so much footage with which the asked rate is shown; -1 if none at all would not do."""
        wanted = self.per_hour * hours
        if poisson_limit(0, self.confidence) > wanted:
            return -1
        low, high = 0, 1
        while poisson_limit(high, self.confidence) <= wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if poisson_limit(middle, self.confidence) <= wanted else (low, middle)
        return low

    @property
    def hours_needed(self) -> float:
        """Footage without any alarm that would be enough."""
        return poisson_limit(0, self.confidence) / self.per_hour


@dataclass(frozen=True)
class Chosen:
    """A threshold for one name, and what is known about it."""

    threshold: float
    """Of the uncalibrated score."""
    alarms: int
    """Seen in the footage with it."""
    limit_per_hour: float
    """The true rate is at most this, at the asked confidence."""
    shown: bool
    """Whether that is what was asked. If not: too little footage, or scores that no threshold is above."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


def footage(clips: Sequence[Sequence[float]], fps: float, quiet_s: float) -> Footage:
    """Frames of clips (their times in seconds), each clip far from the others; a picture is a clip of one frame."""
    lines: list[F64] = []
    start = 0.0
    for times in clips:
        line = np.asarray(times, np.float64)
        if len(line):
            lines.append(line - line[0] + start)
            start = float(lines[-1][-1]) + quiet_s + 1.0
    every = np.concatenate(lines) if lines else np.empty(0)
    return Footage(every, len(every) / fps / 3600)


def count_alarms(times_s: F64, quiet_s: float, most: int | None = None) -> int:
    """Alarms of frames at these times, ascending: each silences those that follow in less than `quiet_s`.

    most: stop counting at so many, where it is enough to know that there are.
    """
    count, at = 0, 0
    while at < len(times_s) and (most is None or count < most):
        count += 1
        at = max(at + 1, int(np.searchsorted(times_s, times_s[at] + quiet_s, side="left")))
    return count


def choose_threshold(scores: NDArray[np.floating[Any]], seen: Footage, limit: AlarmLimit) -> Chosen:
    """The lowest threshold with which the footage shows the asked rate. scores: float[L], best of each frame, 0 to 1.

    Where it can show none, the threshold is above all scores.
    """
    values = np.asarray(scores, np.float64)
    allowed = limit.most_alarms(seen.hours)
    levels = np.unique(values)[::-1]

    def alarms_at(threshold: float, most: int | None = None) -> int:
        return count_alarms(seen.times_s[values >= threshold], limit.quiet_s, most)

    # the first level, from above, that has too many: alarms only grow on the way down
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        too_many = alarms_at(float(levels[middle]), max(allowed, 0) + 1) > max(allowed, 0)
        low, high = (low, middle) if too_many else (middle + 1, high)
    refused = float(levels[low]) if low < len(levels) else 0.0
    above = float(levels[low - 1]) if low > 0 else 1.0
    threshold = refused + min(_MARGIN, (above - refused) / 2)
    alarms = alarms_at(threshold)
    bound = poisson_limit(alarms, limit.confidence) / max(seen.hours, 1e-12)
    return Chosen(threshold, alarms, bound, allowed >= 0 and alarms <= allowed)


def recounted(
    chosen: Chosen, probabilities: NDArray[np.float32], threshold: float, seen: Footage, limit: AlarmLimit
) -> tuple[Chosen, float]:
    """The choice and its threshold as the runtime compares: probabilities float32[L] >= threshold float32.

    Scores that differ may be one float32 afterwards, so the threshold goes up, past one level after the other, until
    there are no more alarms than were chosen or are bearable. Where that would be above 1, it is 1, and `alarms` and
    `shown` say what that means.
    """
    allowed = limit.most_alarms(seen.hours)
    at = np.float32(threshold)
    while True:
        passing = probabilities >= at
        alarms = count_alarms(seen.times_s[passing], limit.quiet_s)
        if alarms <= max(chosen.alarms, allowed) or at >= 1:
            break
        at = min(np.nextafter(probabilities[passing].min(), np.float32(2)), np.float32(1))
    bound = poisson_limit(alarms, limit.confidence) / max(seen.hours, 1e-12)
    shown = 0 <= alarms <= allowed
    return replace(chosen, alarms=alarms, limit_per_hour=bound, shown=shown), float(at)


def poisson_limit(count: int, confidence: float) -> float:
    """The largest mean for which `count` or fewer events are not rarer than 1 - confidence; 3.0 for none and 0.95."""
    if count > _EXACT_COUNTS:
        root = NormalDist().inv_cdf(confidence) / (3 * math.sqrt(count + 1))
        return (count + 1) * (1 - 1 / (9 * (count + 1)) + root) ** 3
    low, high = float(count), 2.0 * count + 20.0
    for _ in range(80):
        middle = (low + high) / 2
        terms = (math.exp(n * math.log(middle) - middle - math.lgamma(n + 1)) for n in range(count + 1))
        low, high = (middle, high) if sum(terms) > 1 - confidence else (low, middle)
    return (low + high) / 2

"""Alarms are counted, limits are right, and a threshold keeps its promise on footage that was not seen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_calibration.alarms import (
    AlarmLimit,
    Footage,
    choose_threshold,
    count_alarms,
    footage,
    poisson_limit,
    recounted,
)
from mammut_runtime.errors import InputError


@pytest.mark.parametrize(("count", "expected"), [(0, 2.9957), (1, 4.7439), (2, 6.2958), (10, 16.9622), (100, 118.0784)])
def test_limits_of_a_count_are_those_of_the_tables(count: int, expected: float) -> None:
    assert poisson_limit(count, 0.95) == pytest.approx(expected, abs=2e-3)


def test_the_approximation_for_large_counts_continues_the_exact_limits() -> None:
    exact = [poisson_limit(count, 0.95) for count in (199, 200)]
    after = poisson_limit(201, 0.95)
    assert after - exact[1] == pytest.approx(exact[1] - exact[0], abs=0.02)


def slow_count(times: list[float], quiet_s: float) -> int:
    count, last = 0, -math.inf
    for time_s in times:
        if time_s >= last + quiet_s:
            count, last = count + 1, time_s
    return count


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), max_size=40, unique=True), st.integers(0, 30))
def test_alarms_are_silenced_for_a_while(times: list[int], quiet_s: int) -> None:
    ordered = [float(each) for each in sorted(times)]
    assert count_alarms(np.array(ordered), quiet_s) == slow_count(ordered, quiet_s)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), max_size=40), st.integers(0, 20))
def test_a_higher_threshold_never_gives_more_alarms(frames: list[tuple[int, float]], quiet_s: int) -> None:
    frames = sorted(dict(frames).items())
    times, scores = (np.array([each[i] for each in frames], float) for i in (0, 1))
    counts = [count_alarms(times[scores >= level], quiet_s) for level in np.linspace(0, 1, 21)]
    assert counts == sorted(counts, reverse=True)


def test_clips_lie_apart_and_pictures_are_clips_of_one() -> None:
    seen = footage([[3.0, 4.0, 5.0], [0.0], [0.0]], fps=1.0, quiet_s=10.0)
    assert seen.times_s.tolist() == [0, 1, 2, 13, 24] and seen.hours == 5 / 3600
    assert count_alarms(seen.times_s, 10.0) == 3
    assert footage([], 1.0, 1.0).hours == 0


def test_how_many_alarms_are_bearable() -> None:
    limit = AlarmLimit(1.0)
    assert limit.hours_needed == pytest.approx(2.9957, abs=1e-3)  # the rule of three
    assert [limit.most_alarms(hours) for hours in (0.1, 2.9, 3.0, 4.8, 6.3, 119)] == [-1, -1, 0, 1, 2, 100]
    for hours in (3.0, 50.0, 1000.0):
        most = limit.most_alarms(hours)
        assert poisson_limit(most, 0.95) <= hours < poisson_limit(most + 1, 0.95)


def frames(scores: list[float], hours: float) -> tuple[Any, Footage]:
    return np.array(scores, np.float32), Footage(np.arange(len(scores)) * hours * 3600 / len(scores), hours)


def test_the_threshold_is_just_above_the_first_score_that_is_one_too_many() -> None:
    scores, seen = frames([0.1, 0.9, 0.3, 0.7, 0.5, 0.2], 5.0)  # one alarm is bearable in five hours
    chosen = choose_threshold(scores, seen, AlarmLimit(1.0, quiet_s=0))
    assert chosen.threshold == pytest.approx(0.71, abs=1e-6) and chosen.alarms == 1 and chosen.shown
    assert chosen.limit_per_hour == pytest.approx(4.744 / 5, abs=1e-3)
    close, seen = frames([0.1, 0.705, 0.7], 5.0)
    assert choose_threshold(close, seen, AlarmLimit(1.0, quiet_s=0)).threshold == pytest.approx(0.7025, abs=1e-6)


def test_footage_that_is_too_short_is_said_to_be_so() -> None:
    scores, seen = frames([0.1, 0.6, 0.2], 1.0)
    chosen = choose_threshold(scores, seen, AlarmLimit(1.0, quiet_s=0))
    assert not chosen.shown and chosen.alarms == 0 and chosen.threshold == pytest.approx(0.61, abs=1e-6)
    assert chosen.limit_per_hour == pytest.approx(3.0, abs=0.01)
    assert choose_threshold(scores, seen, AlarmLimit(3.0, quiet_s=0)).shown  # control: three an hour can be shown


def test_a_thing_that_stays_is_an_alarm_again_and_again() -> None:
    scores, seen = frames([0.9] * 3600, 1.0)
    chosen = choose_threshold(scores, seen, AlarmLimit(20.0, quiet_s=10))
    assert chosen.threshold > 0.9 and chosen.alarms == 0
    rare = choose_threshold(scores, seen, AlarmLimit(500.0, quiet_s=10))  # control: 360 an hour are bearable here
    assert rare.threshold < 0.9 and rare.alarms == 360


def test_scores_that_no_threshold_is_above() -> None:
    scores, seen = frames([1.0] * 100, 10.0)
    chosen = choose_threshold(scores, seen, AlarmLimit(1.0, quiet_s=0))
    assert not chosen.shown and chosen.threshold == 1.0 and chosen.alarms == 100


def test_frames_that_all_score_nothing_give_a_low_threshold() -> None:
    scores, seen = frames([0.0] * 100, 10.0)
    chosen = choose_threshold(scores, seen, AlarmLimit(1.0, quiet_s=0))
    assert chosen.shown and 0 < chosen.threshold <= 0.01 and chosen.alarms == 0


def test_the_promise_holds_on_footage_that_was_not_seen() -> None:
    """Scores are uniform, so the true rate above a threshold t is 360 (1 - t) an hour. The chosen one breaks its
    promise at most in about 5 of 100 footages; choosing by the count itself, the control, in about half."""
    source = np.random.default_rng(0)
    limit, hours, tries = AlarmLimit(2.0, quiet_s=0), 5.0, 200
    broken = naive = 0
    times = np.arange(int(hours * 360)) * 10.0
    for _ in range(tries):
        scores = source.random(len(times))
        chosen = choose_threshold(scores, Footage(times, hours), limit)
        edge = np.sort(scores)[-limit.most_alarms(hours) - 1]
        assert chosen.shown and chosen.threshold > edge
        broken += 360 * (1 - edge) > limit.per_hour
        naive += 360 * (1 - np.sort(scores)[-int(limit.per_hour * hours) - 1]) > limit.per_hour
    assert broken <= 0.11 * tries and naive >= 0.3 * tries, (broken, naive)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_hour": 0.0}, "per_hour: expected a number from 1e-06"),
        ({"per_hour": 1.0, "quiet_s": -1.0}, "quiet_s: expected a number from 0"),
        ({"per_hour": 1.0, "confidence": 1.0}, r"confidence: expected a number from 0\.5 to 0\.9999, got 1\.0"),
    ],
)
def test_limits_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AlarmLimit(**values)


def test_alarms_are_recounted_as_the_runtime_compares() -> None:
    """Two scores that are one float32 after calibration: the threshold between them lets both pass."""
    scores, seen = frames([0.1, 0.6, 0.8, 0.2], 5.0)
    limit = AlarmLimit(1.0, quiet_s=0)  # one alarm is bearable
    chosen = choose_threshold(scores, seen, limit)
    assert chosen.alarms == 1
    merged = np.array([0.1, 0.9, 0.9, 0.2], np.float32)
    kept, threshold = recounted(chosen, merged, float(np.float32(0.9)), seen, limit)
    assert threshold == np.nextafter(np.float32(0.9), np.float32(1)) and kept.alarms == 0 and kept.shown
    same, threshold = recounted(chosen, scores, float(np.float32(chosen.threshold)), seen, limit)  # control
    assert (same.alarms, same.shown, threshold) == (1, True, float(np.float32(chosen.threshold)))
    saturated = np.array([0.1, 1, 1, 1], np.float32)
    kept, threshold = recounted(chosen, saturated, 1.0, seen, limit)
    assert (kept.alarms, kept.shown, threshold) == (3, False, 1.0) and kept.limit_per_hour > 1

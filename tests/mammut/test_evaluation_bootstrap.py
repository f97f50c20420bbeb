"""Intervals hold the truth about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from mammut.evaluation.bootstrap import Bootstrap, mean_of, point
from mammut.evaluation.task_classify import mean_of_groups


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    truth, covered = 0.7, 0
    for trial in range(200):
        hits = (generator.random(120) < truth).astype(np.float64)
        found = Bootstrap(300, 0.95, trial).interval(mean_of(hits), len(hits))
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = Bootstrap(2000).interval(mean_of(values), 2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_items_of_one_picture_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(0).random(100), 5)
    groups = np.repeat(np.arange(100), 5)
    apart, together = (Bootstrap(500).interval(mean_of(values), 500, each) for each in (None, groups))
    # Five equal copies say nothing new: the interval is that of 100 values.
    single = Bootstrap(500).interval(mean_of(values[::5]), 100)
    assert together.high - together.low == pytest.approx(single.high - single.low, rel=1e-9)
    assert apart.high - apart.low < 0.6 * (together.high - together.low)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).random(50)
    first, again, other = (Bootstrap(200, seed=seed).interval(mean_of(values), 50) for seed in (1, 1, 2))
    assert first == again != other


def test_large_sets_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    whole = Bootstrap(200).interval(mean_of(values), 50)
    monkeypatch.setattr("mammut.evaluation.bootstrap._VALUES_AT_ONCE", 120)
    parts = Bootstrap(200).interval(mean_of(values), 50)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high))


def test_a_kind_that_is_rarely_drawn_has_an_interval() -> None:
    counted = np.zeros(50, bool)
    counted[3] = True
    found = Bootstrap(200).interval(mean_of(np.ones(50), counted), 50)
    assert (found.low, found.high) == (1.0, 1.0)


def test_the_mean_of_classes_weighs_classes_alike() -> None:
    hits, classes = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 2])
    assert point(mean_of_groups(hits, classes), 4) == pytest.approx(0.5)
    assert point(mean_of(hits), 4) == pytest.approx(0.75)  # control
    assert float(mean_of_groups(hits, classes)(np.array([[1.0, 1.0, 1.0, 0.0]]))[0]) == pytest.approx(1)

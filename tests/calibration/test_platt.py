"""Probabilities from scores: right where the truth is known, honest where it cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest

from mammut_calibration.platt import LEAST_PICTURES, fit, reliability
from mammut_runtime.detection.vocabulary import Entry, Vocabulary, sigmoid


def drawn(seed: int, count: int, temperature: float, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose true probability is sigmoid(logit / temperature + bias), as many with the thing as without."""
    source = np.random.default_rng(seed)
    z = source.normal(-3, 2.5, 40 * count)
    has = source.random(len(z)) < sigmoid(z / temperature + bias)
    scores = sigmoid(z)
    return scores[has][:count], scores[~has][:count]


def test_a_known_temperature_and_bias_are_found() -> None:
    with_thing, without = drawn(0, 4000, 0.5, 3.0)
    found = fit(with_thing, without)
    assert found is not None
    # Equal numbers of both kinds shift the bias only; the temperature is that of the scores.
    assert found.calibration.temperature == pytest.approx(0.5, rel=0.1)
    assert found.after.error < 0.03 < found.before.error, (found.before.error, found.after.error)


def test_both_kinds_weigh_the_same_whatever_their_numbers() -> None:
    with_thing, without = drawn(1, 4000, 1.0, 2.0)
    few = fit(with_thing[:400], without)
    same = fit(with_thing, without)
    assert few is not None and same is not None
    assert few.calibration.bias == pytest.approx(same.calibration.bias, abs=0.35)


def test_the_vocabulary_applies_what_was_fitted() -> None:
    with_thing, without = drawn(2, 500, 0.7, 1.0)
    found = fit(with_thing, without)
    assert found is not None
    words = Vocabulary((Entry("cat", calibration=found.calibration),), np.ones((1, 1), np.float32), "0" * 64, "m", ())
    both = [words.probabilities(each.astype(np.float32)[:, None])[:, 0] for each in (with_thing, without)]
    assert reliability(*(each.astype(float) for each in both)).error < 0.06


def test_scores_that_separate_the_kinds_give_a_steep_but_finite_line() -> None:
    found = fit(np.linspace(0.6, 0.9, 20), np.linspace(0.01, 0.3, 20))
    assert found is not None and 0.005 < found.calibration.temperature < 1
    assert np.isfinite(found.calibration.bias) and found.after.error < 0.15


@pytest.mark.parametrize(
    ("with_thing", "without"),
    [
        (np.linspace(0.1, 0.2, LEAST_PICTURES - 1), np.linspace(0.0, 0.1, 100)),
        (np.linspace(0.1, 0.2, 50), np.linspace(0.7, 0.9, 50)),
        (np.full(50, 0.3), np.full(50, 0.3)),
    ],
)
def test_what_cannot_be_fitted_is_left(with_thing: np.ndarray, without: np.ndarray) -> None:
    assert fit(with_thing, without) is None
    assert fit(np.linspace(0.2, 0.9, 50), np.linspace(0.0, 0.5, 50)) is not None  # control


def test_reliability_of_known_probabilities() -> None:
    perfect = reliability(np.array([0.75] * 3), np.array([0.75]), bins=4)
    assert perfect.so == (0.5,) and perfect.weights == (1.0,) and perfect.error == 0.25
    sure = reliability(np.array([1.0]), np.array([0.0]))
    assert sure.error == 0 and sure.weights == (0.5, 0.5) and sure.to_dict()["error"] == 0


def test_a_line_far_from_the_middle_is_flatter_and_not_outside_what_is_kept() -> None:
    """Scores near 0, well apart: with the steepest line the bias would be 1600."""
    found = fit(np.full(40, 4e-7), np.full(40, 1e-7))
    assert found is not None
    calibration = found.calibration
    assert 0 < calibration.bias <= 1000 and calibration.temperature > 0.01
    words = Vocabulary((Entry("cat", calibration=calibration),), np.ones((1, 1), np.float32), "0" * 64, "m", ())
    high, low = words.probabilities(np.array([[4e-7], [1e-7]], np.float32))[:, 0]
    assert low < 0.1 and high > 0.9
    usual = fit(np.linspace(0.6, 0.9, 20), np.linspace(0.01, 0.3, 20))  # control
    assert usual is not None and abs(usual.calibration.bias) < 100

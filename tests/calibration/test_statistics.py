from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_calibration.entropy import entropy_threshold
from mammut_calibration.statistics import BINS, HALF_BINS, METHODS, TensorCollector, TensorStatistics, check
from mammut_runtime.errors import InputError

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
LISTS = st.lists(st.lists(FLOATS, min_size=1, max_size=12), min_size=1, max_size=6)


def collected(*arrays: object) -> TensorStatistics:
    collector = TensorCollector()
    for each in arrays:
        collector.add(np.array(each, np.float32))
    return collector.result()


def same(one: TensorStatistics, other: TensorStatistics) -> bool:
    numbers = dataclasses.asdict(one), dataclasses.asdict(other)
    counts = [each.pop("counts") for each in numbers]
    return numbers[0] == numbers[1] and bool((counts[0] == counts[1]).all())


@given(LISTS)
@settings(max_examples=150, deadline=None)
def test_what_is_kept_does_not_depend_on_the_order_and_adds_up(parts: list[list[float]]) -> None:
    everything = np.concatenate([np.array(part, np.float32) for part in parts])
    finite = everything[np.isfinite(everything)]
    collector = TensorCollector()
    for part in parts:
        collector.add(np.array(part, np.float32))
    assert collector.empty == (not finite.size)
    if collector.empty:
        return
    result, backwards = collector.result(), collected(*parts[::-1])
    assert (result.counts == backwards.counts).all() and result.limit == backwards.limit
    assert (result.minimum, result.maximum) == (finite.min(), finite.max())
    assert (result.values, result.not_finite, result.runs) == (finite.size, everything.size - finite.size, len(parts))
    edges = np.floor(finite.astype(np.float64) * HALF_BINS / result.limit).astype(int) + HALF_BINS
    assert (result.counts == np.bincount(np.minimum(edges, BINS - 1), minlength=BINS)).all()
    assert check(result) is None


@given(LISTS, LISTS)
@settings(max_examples=60, deadline=None)
def test_a_resumed_collector_gives_the_same(before: list[list[float]], after: list[list[float]]) -> None:
    whole, first = TensorCollector(), TensorCollector()
    for part in before:
        whole.add(np.array(part, np.float32))
        first.add(np.array(part, np.float32))
    if first.empty:
        return
    second = TensorCollector.resumed(first.result())
    for part in after:
        whole.add(np.array(part, np.float32))
        second.add(np.array(part, np.float32))
    assert same(whole.result(), second.result())


@given(LISTS, st.sampled_from(METHODS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_range_holds_zero_and_is_within_what_was_seen(
    parts: list[list[float]], method: str, symmetric: bool
) -> None:
    collector = TensorCollector()
    for part in parts:
        collector.add(np.array(part, np.float32))
    if collector.empty:
        return
    result = collector.result()
    found = result.range(method, symmetric=symmetric)  # type: ignore[arg-type]
    assert found.low <= 0 <= found.high and found.largest <= max(-result.minimum, result.maximum, 0)
    assert not symmetric or found.low == -found.high


def test_percentiles_agree_with_numpy_to_within_a_bin() -> None:
    values = np.random.default_rng(1).normal(0.5, 2, 200_000).astype(np.float32)
    result = collected(values[:70_000], values[70_000:])
    for percentile in (90.0013, 99.0013, 99.9013, 100.0):  # no whole number of values, so no doubt about which
        tail = (1 - percentile / 100) / 2
        low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
        found = result.range("percentile", percentile=percentile)
        width = result.limit / HALF_BINS
        assert abs(found.low - low) <= width and abs(found.high - high) <= width
    assert abs(result.mean_abs - np.abs(values).mean()) < 1e-4


def test_entropy_cuts_rare_large_values_and_keeps_an_even_distribution() -> None:
    source = np.random.default_rng(2)
    even = collected(source.uniform(-1, 1, 100_000))
    assert even.range("entropy").largest > 0.98
    outlier = collected(source.normal(0, 1, 100_000), [60.0])
    assert outlier.range("minmax").high == 60.0
    assert 3 < outlier.range("entropy").high < 30
    assert entropy_threshold(np.zeros(2048, np.int64)) == 0.0


def test_a_mask_of_infinities_does_not_spoil_a_tensor() -> None:
    result = collected([1.0, -math.inf, 2.0], [math.nan, -math.inf])
    assert (result.minimum, result.maximum, result.values, result.not_finite, result.runs) == (1.0, 2.0, 2, 3, 2)


def test_memory_does_not_grow_with_the_values() -> None:
    result = collected(*np.random.default_rng(3).normal(0, 1, (50, 10_000)))
    assert result.counts.nbytes == 4096 * 8 and result.values == 500_000


def test_refuses_unknown_methods_and_percentiles() -> None:
    result = collected([1.0, 2.0])
    assert result.range("percentile", percentile=100).high == 2.0  # control
    with pytest.raises(InputError, match="method: expected one of minmax, percentile, entropy, got 'best'"):
        result.range("best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="percentile: expected a number above 50 and at most 100, got 50"):
        result.range("percentile", percentile=50)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"minimum": math.nan}, "not finite"),
        ({"limit": 3.0}, "power of two"),
        ({"maximum": 9.0}, "maximum"),
        ({"values": 7}, "add up"),
        ({"runs": 0}, "out of range"),
        ({"counts": np.zeros(8, np.int64)}, "4096"),
    ],
)
def test_numbers_that_no_data_gave_are_noticed(change: dict[str, object], problem: str) -> None:
    good = collected([1.0, -2.0])
    assert check(good) is None
    assert problem in (check(dataclasses.replace(good, **change)) or "")  # type: ignore[arg-type]

"""Detections are compared by where they are: order and padding do not matter, everything else does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_export.detections import PIXELS, SCORE, Arrays, aligned, differences
from mammut_runtime.detection.boxes import Box, Detection, Detections


def outputs(seed: int, silent: int = 2) -> Arrays:
    """Ten proposals for three names, the last `silent` of them without a score."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (1, 10, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (1, 10, 2))], axis=-1)
    scores = np.sort(rng.uniform(0.1, 1, (1, 10, 3)), axis=1)[:, ::-1].copy()
    scores[:, 10 - silent :] = 0
    return {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}


def apart(got: Arrays, wanted: Arrays) -> float:
    one, other = aligned(got, wanted)
    return max(float(np.abs(one[key] - other[key]).max()) for key in ("boxes", "scores"))  # NaN stays NaN


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(8)))
def test_the_order_does_not_matter(seed: int, order: list[int]) -> None:
    wanted = outputs(seed)
    got = {key: value[:, [*order, 8, 9]].copy() for key, value in wanted.items()}
    got["boxes"][:, 8:] += 7  # proposals that say nothing may be anywhere
    assert apart(got, wanted) == 0


@pytest.mark.parametrize(("key", "change"), [("boxes", 1.0), ("scores", 0.01)])
def test_a_change_is_seen(key: str, change: float) -> None:
    wanted = outputs(1)
    got = {name: value.copy() for name, value in wanted.items()}
    got[key][0, 3] += change
    assert apart(got, wanted) == pytest.approx(change, abs=1e-4)
    assert change > {"boxes": PIXELS, "scores": SCORE}[key]  # so it counts


def test_a_proposal_that_is_lost_is_seen() -> None:
    wanted = outputs(2)
    got = {name: value.copy() for name, value in wanted.items()}
    got["boxes"][0, 0], got["scores"][0, 0] = (0, 0, 1, 1), 0
    assert not apart(got, wanted) <= PIXELS
    with_another_shape = {"boxes": got["boxes"][:, :9], "scores": got["scores"][:, :9]}
    assert aligned(with_another_shape, wanted)[0] is with_another_shape  # the ledger says so


def test_the_last_place_may_go_to_either_of_two_that_are_as_good() -> None:
    wanted = outputs(3, silent=0)
    got = {name: value.copy() for name, value in wanted.items()}
    wanted["scores"][0, 9], got["scores"][0, 9] = (0.05, 0, 0), (0.0505, 0, 0)
    got["boxes"][0, 9] = (1, 2, 3, 4)
    assert apart(got, wanted) == 0
    got["scores"][0, 9] = (0.07, 0, 0)  # that is more than rounding
    assert not apart({**got, "scores": np.roll(got["scores"], 1, axis=1)}, wanted) <= PIXELS


def found(*given: tuple[str, float, float]) -> Detections:
    every = tuple(Detection(name, score, Box(x, 10, x + 20, 30)) for name, score, x in given)
    return Detections(every, 100, 100)


def test_survivors() -> None:
    theirs = found(("cat", 0.9, 5), ("dog", 0.5, 40), ("dog", 0.3004, 70))

    def differ(*given: tuple[str, float, float], scale: float = 1.0) -> list[str]:
        return differences(found(*given), theirs, 0.3, scale)

    assert differences(theirs, theirs, 0.3, 1.0) == []
    assert differ(("dog", 0.5003, 40.3), ("cat", 0.9, 5)) == []  # the last is at the edge
    assert differ(("cat", 0.9, 5)) == ["dog with score 0.5000 is missing"]
    assert differ(("cat", 0.9, 5), ("cat", 0.5, 40))[0] == "dog with score 0.5000 is missing"
    assert differ(("cat", 0.8, 5), ("dog", 0.5, 40)) == ["cat: score 0.8000, the core's 0.9000"]
    assert differ(("cat", 0.9, 5), ("dog", 0.5, 40), ("cat", 0.4, 60)) == ["cat with score 0.4000 is too much"]
    assert len(differ(("cat", 0.9, 6), ("dog", 0.5, 40))) == 2 and not differ(
        ("cat", 0.9, 6), ("dog", 0.5, 40), scale=4.0
    )


def test_float16_may_propose_a_few_others() -> None:
    wanted = outputs(5, silent=0)
    wanted = {name: np.concatenate([value, value + np.array(7, value.dtype)], axis=1) for name, value in wanted.items()}
    got = {name: value.copy() for name, value in wanted.items()}
    got["boxes"][0, 3] += 30
    one, other = aligned(got, wanted, half=True)
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert not apart(got, wanted) <= PIXELS  # the control: float32 may not
    got["boxes"][0, 4] += 30  # 2 of 20
    assert np.isnan(aligned(got, wanted, half=True)[0]["boxes"]).any()

"""Cues never overlap and never go back, whatever the scenes; their files say exactly what they hold."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_runtime.errors import InputError
from mammut_runtime.video.cues import Cue, MergeRule, json_line, likeness, merged, srt, vtt
from mammut_runtime.video.sampler import Budget, FrameRef, SpreadSampler, most_held


def cue(start_ms: int, end_ms: int, text: str, confidence: float = 0.5) -> Cue:
    return Cue(start_ms, end_ms, text, confidence, (1,), (confidence,), (FrameRef(start_ms, start_ms / 1000),), 0, 1)


lengths = st.lists(st.integers(1, 20_000), min_size=1, max_size=30)
gaps = st.lists(st.sampled_from([0, 0, 0, 500]), min_size=30, max_size=30)
words = st.lists(st.sampled_from(["a dog", "a dog runs", "A Dog", "two cats", ""]), min_size=30, max_size=30)


@given(lengths, gaps, words, st.floats(0.1, 2), st.floats(1, 100))
def test_cues_are_monotone_and_lose_nothing(
    durations: list[int], pauses: list[int], texts: list[str], like: float, longest_s: float
) -> None:
    scenes, at = [], 0
    for duration, pause, text in zip(durations, pauses, texts, strict=False):
        scenes.append(cue(at + pause, at + pause + duration, text, len(text) / 20))
        at += pause + duration
    cues = list(merged(scenes, MergeRule(like, longest_s)))
    assert all(each.start_ms < each.end_ms for each in cues)
    assert all(one.end_ms <= two.start_ms for one, two in itertools.pairwise(cues))
    assert sum(each.scenes for each in cues) == sum(each.of_frames for each in cues) == len(scenes)
    assert [ref for each in cues for ref in each.frames] == [ref for each in scenes for ref in each.frames]
    assert sum(c.end_ms - c.start_ms for c in cues) == sum(s.end_ms - s.start_ms for s in scenes)
    assert all(c.scenes == 1 or c.end_ms - c.start_ms <= 1000 * longest_s for c in cues)
    starts = [time for each in cues for time in re.findall(r"([\d:,]+) --> ([\d:,]+)", srt(1, each))]
    flat = [time for pair in starts for time in pair]
    assert flat == sorted(flat)


@pytest.mark.parametrize("second", [(900, 2000), (0, 500), (1500, 1500)])
def test_scenes_out_of_order_are_refused(second: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="not in order"):
        list(merged([cue(0, 1000, "a"), cue(*second, "b")]))
    assert len(list(merged([cue(0, 1000, "a"), cue(1000, 2000, "b")]))) == 2  # control


def test_neighbours_that_say_the_same_become_one() -> None:
    first, second, third = cue(0, 1000, "a dog", 0.3), cue(1000, 2000, "A dog.", 0.6), cue(2000, 3000, "a cat", 0.9)
    one, two = merged([first, second, third])
    assert (one.start_ms, one.end_ms, one.text, one.scenes, one.central) == (0, 2000, "A dog.", 2, 1)
    assert two == third
    assert len(list(merged([first, second, third], MergeRule(likeness=2)))) == 3
    assert likeness("a b", "c d") == 0 and likeness("", "!") == 1


def test_the_formats() -> None:
    each = cue(3_661_002, 3_662_000, "a <b> & c --> d\n\ne\x07", 0.5)
    assert srt(7, each) == "7\n01:01:01,002 --> 01:01:02,000\na <b> & c -> d e\n\n"
    assert vtt(each) == "01:01:01.002 --> 01:01:02.000\na &lt;b&gt; &amp; c --&gt; d e\n\n"
    assert srt(1, cue(0, 1, " \n")) == vtt(cue(0, 1, "")) == ""
    value: dict[str, Any] = json.loads(json_line(each, "f" * 64))
    assert value["start_s"] == 3661.002 and value["bundle"] == "f" * 64 and value["token_confidence"] == [0.5]
    assert value["frames"] == [{"index": 3_661_002, "time_s": 3661.002}]


@given(st.integers(1, 9), st.lists(st.floats(0.001, 3), min_size=1, max_size=300))
def test_a_sampler_is_bounded_ordered_and_takes_what_it_can(count: int, steps: list[float]) -> None:
    sampler = SpreadSampler[float](count)
    now = 0.0
    for step in steps:
        now += step
        sampler.offer(now, lambda now=now: now)  # type: ignore[misc]
        assert sampler.held <= most_held(count)
    chosen = sampler.chosen()
    assert chosen == sorted(set(chosen)) and len(chosen) <= count
    if len(steps) <= most_held(count):
        assert len(chosen) == min(count, len(steps))


def test_a_sampler_spreads_evenly_without_knowing_the_end() -> None:
    sampler = SpreadSampler[int](4)
    made: list[int] = []
    for index in range(10_000):
        sampler.offer(index / 30, lambda index=index: made.append(index) or index)  # type: ignore[misc, func-returns-value]
    chosen = sampler.chosen()
    assert chosen == pytest.approx([1250, 3750, 6250, 8750], abs=1300) and len(made) < 120


def test_budgets() -> None:
    assert Budget(frames=8, tokens=100).most_frames(49) == 2 and Budget().most_frames(49) == 8
    with pytest.raises(InputError, match="one frame has 49"):
        Budget(tokens=48).most_frames(49)
    for wrong in ({"frames": 0}, {"frames": 1000}, {"tokens": 0}, {"seconds": 0.0}):
        with pytest.raises(InputError):
            Budget(**wrong)  # type: ignore[arg-type]

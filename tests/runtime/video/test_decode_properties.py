"""What holds for every clip: times that are the container's, a walk that ends, and few frames held at once."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import InputError
from mammut_runtime.video.captions import ahead
from mammut_runtime.video.decode import Clip, ClipInfo, ClipLimits, quiet_decoder
from mammut_runtime.video.sampler import most_held
from mammut_runtime.video.scenes import SceneRule, halved, scenes

quiet_decoder()
USUAL = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decode_tests() -> ModuleType:
    """The module that writes clips and edits their boxes."""
    spec = importlib.util.spec_from_file_location("decode_tests", Path(__file__).parents[1] / "test_video_decode.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOLS = decode_tests()


@USUAL
@given(st.lists(st.integers(1, 100_000), min_size=2, max_size=12))
def test_times_are_the_sums_of_whatever_durations_the_container_gives(durations: list[int]) -> None:
    """In units of the track, of which a frame of 0.1 s has as many as the writer chose."""
    with tempfile.TemporaryDirectory() as folder:
        path = TOOLS.write_clip(Path(folder) / "a.mp4", [20 * (each % 12) for each in range(len(durations))])
        data = path.read_bytes()
        (at,) = TOOLS.boxes(data, b"mdhd")
        units_per_s = int.from_bytes(data[at + 20 : at + 24], "big")
        TOOLS.set_durations(path, durations)
        times, _, clip = TOOLS.walk(path)
    expected = [0, *itertools.accumulate(durations[:-1])]
    assert times == pytest.approx([each / units_per_s for each in expected], abs=2e-3)
    assert clip.health.repaired_times == 0 and clip.health.frames == len(durations)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A clip in each container that is written here."""
    folder = tmp_path_factory.mktemp("whole")
    greys = [20 * (each % 12) for each in range(12)]
    kinds = (("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"))
    return {name: TOOLS.write_clip(folder / name, greys, codec=codec).read_bytes() for name, codec in kinds}


@USUAL
@given(
    name=st.sampled_from(["a.mp4", "a.avi", "a.mkv"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    kept=st.floats(0.2, 1),
)
def test_a_damaged_file_is_an_error_or_ends_and_its_times_increase(
    whole: dict[str, bytes], name: str, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(whole[name])
    for share, value in changes:
        data[round(share * (len(data) - 1))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data[: round(kept * len(data))])
        times: list[float] = []
        try:
            with Clip.open(path, ClipLimits(max_side=4096)) as clip:
                while (tick := clip.advance()) is not None:
                    times.append(tick.time_s)
                    assert len(times) <= 1000
                    pixels = clip.bgr()
                    assert pixels.dtype == np.uint8 and pixels.ndim == 3
                assert clip.health.frames == len(times) and clip.end_s > times[-1]
        except InputError as problem:
            assert str(path) in str(problem) and "\n" not in str(problem)
    assert times == sorted(set(times))


def test_the_undamaged_files_are_read_whole(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Control of the above."""
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        times, _, clip = TOOLS.walk(tmp_path / name)
        assert len(times) == 12 and clip.health.whole, name


class Frame(np.ndarray):  # type: ignore[type-arg]
    """An array that can be counted while it lives."""


class Endless:
    """A capture of small frames at 10 a second; it knows the most that were alive at once."""

    def __init__(self, count: int, cut_every: int) -> None:
        self._count, self._cut_every, self._at = count, cut_every, -1
        self._alive = self.most_alive = 0

    def grab(self) -> bool:
        self._at += 1
        return self._at < self._count

    def get(self, _: int) -> float:
        return 100.0 * self._at

    def retrieve(self) -> tuple[bool, Any]:
        shade = 250 * (self._at // self._cut_every % 2)
        frame = np.full((8, 8, 3), shade, np.uint8).view(Frame)
        self._alive += 1
        self.most_alive = max(self.most_alive, self._alive)
        weakref.finalize(frame, self._freed)
        return True, frame

    def _freed(self) -> None:
        self._alive -= 1

    def release(self) -> None:
        pass


def endless(count: int, cut_every: int = 70) -> tuple[Clip, Endless]:
    capture = Endless(count, cut_every)
    return Clip(capture, ClipInfo(Path("x.mp4"), "mp4", "mp4v", 8, 8, 0, 10.0, None, None), ClipLimits()), capture


@pytest.mark.parametrize("frames", [3, 16])
def test_frames_held_do_not_grow_with_the_length_of_a_clip(frames: int) -> None:
    """Ten minutes against an hour, as captioning goes through them: two scenes wait, one is described."""
    found = []
    for count in (6_000, 36_000):
        clip, capture = endless(count)
        described = sum(1 for _ in ahead(scenes(clip, SceneRule(looks_per_s=2), frames), 2))
        assert described >= count // 70
        found.append(capture.most_alive)
    bound = most_held(frames) + 5 * frames + 4  # the open scene; two that wait, one offered, one described, one closed
    assert max(found) <= bound
    clip, capture = endless(6_000)
    kept = [scene.pixels for scene in scenes(clip, SceneRule(looks_per_s=2), frames)]
    assert capture.most_alive > 3 * bound and kept, "control: what is kept is counted"


@USUAL
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 60))
def test_halving_stops_below_the_limit_and_keeps_the_mean(height: int, width: int, most_side: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.ascontiguousarray(np.dstack([rows % 256, columns % 256, (rows + columns) % 256]).astype(np.uint8))
    small = halved(pixels, most_side)
    assert min(small.shape[:2]) < most_side and small.shape[2] == 3
    if min(height, width) < most_side:
        assert small is pixels
    else:
        assert any(small.shape[:2] == (height >> times, width >> times) for times in range(1, 10))
        assert min(small.shape[:2]) >= most_side // 2
    same = np.full((height, width, 3), 77, np.uint8)
    assert (halved(same, most_side) == 77).all()


def test_halved_frames_are_what_fast_preprocessing_sees() -> None:
    from mammut_runtime.preprocess import Preprocessor, PreprocessRule

    rule = PreprocessRule(16, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0)
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8), (256, 192))
    fast, exact = Preprocessor(rule, "fast"), Preprocessor(rule, "exact")
    assert (exact.pixels_u8(halved(picture, 64)) == fast.pixels_u8(picture)).all()
    assert (exact.pixels_u8(picture) != fast.pixels_u8(picture)).any()  # control

"""Decoding against clips whose frames and times are known: written here, and edited byte by byte where needed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.errors import InputError
from mammut_runtime.video.decode import Clip, ClipInfo, ClipLimits, quiet_decoder

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "videos"
quiet_decoder()


def write_clip(path: Path, greys: list[int], fps: float = 10.0, codec: str = "mp4v", size_hw: Any = (48, 64)) -> Path:
    """Frames of one grey each; the left upper quarter is red, so that turning shows."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size_hw[::-1])
    assert writer.isOpened()
    for grey in greys:
        frame = np.full((*size_hw, 3), grey, np.uint8)
        frame[: size_hw[0] // 2, : size_hw[1] // 2] = (0, 0, 255)
        writer.write(frame)
    writer.release()
    return path


def walk(path: Path, **options: Any) -> tuple[list[float], list[int], Clip]:
    with Clip.open(path, **options) as clip:
        times, greys = [], []
        while (tick := clip.advance()) is not None:
            assert tick.index == len(times)
            times.append(tick.time_s)
            greys.append(int(clip.bgr()[-4, -4].mean()))
        return times, greys, clip


def boxes(data: bytes, name: bytes) -> list[int]:
    """Where boxes of this name begin in an mp4."""
    found, at = [], data.find(name)
    while at >= 0:
        found.append(at - 4)
        at = data.find(name, at + 1)
    return found


def set_durations(path: Path, durations: list[int]) -> None:
    """Give every frame a duration of its own (in the track's units). moov lies behind mdat, so nothing else moves."""
    data = bytearray(path.read_bytes())
    assert data.find(b"moov") > data.find(b"mdat")
    (at,) = boxes(bytes(data), b"stts")
    (old,) = struct.unpack(">I", data[at : at + 4])
    body = b"".join(struct.pack(">II", 1, each) for each in durations)
    new = struct.pack(">I4sII", 16 + len(body), b"stts", 0, len(durations)) + body
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        (start,) = boxes(bytes(data), name)
        (size,) = struct.unpack(">I", data[start : start + 4])
        data[start : start + 4] = struct.pack(">I", size + len(new) - old)
    data[at : at + old] = new
    (edits,) = boxes(bytes(data), b"edts")  # an edit list would cut the clip to its old length
    data[edits + 4 : edits + 8] = b"free"
    path.write_bytes(data)


def test_frames_and_times(tmp_path: Path) -> None:
    times, greys, clip = walk(write_clip(tmp_path / "a.mp4", [20, 120, 220]))
    assert times == pytest.approx([0.0, 0.1, 0.2]) and greys == pytest.approx([20, 120, 220], abs=6)
    assert clip.health.whole and clip.health.frames == 3 and clip.health.summary() == ""
    info = clip.info
    assert (info.container, info.width, info.height, info.fps, info.frames) == ("mp4", 64, 48, 10.0, 3)


def test_times_are_the_containers_own(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", [20, 60, 120, 180, 220])
    with Clip.open(path) as clip:
        assert clip.info.frames == 5
    data = path.read_bytes()
    (at,) = boxes(data, b"stts")
    unit = struct.unpack(">I", data[at + 20 : at + 24])[0]  # of one frame of 0.1 s
    set_durations(path, [unit, 5 * unit, unit, 2 * unit, unit])
    times, greys, _ = walk(path)
    assert times == pytest.approx([0.0, 0.1, 0.6, 0.7, 0.9])
    assert greys == pytest.approx([20, 60, 120, 180, 220], abs=6)
    mean_fps = 5 / 1.0  # control: number / rate would be wrong
    assert times != pytest.approx([index / mean_fps for index in range(5)])


@pytest.mark.parametrize(
    ("degrees", "matrix", "red_corner"),
    [
        (0, (1, 0, 0, 1), (0, 0)),
        (90, (0, 1, -1, 0), (0, -1)),
        (180, (-1, 0, 0, -1), (-1, -1)),
        (270, (0, -1, 1, 0), (-1, 0)),
    ],
)
def test_frames_are_turned_upright(tmp_path: Path, degrees: int, matrix: Any, red_corner: Any) -> None:
    path = write_clip(tmp_path / "a.mp4", [20, 20])
    data = bytearray(path.read_bytes())
    (at,) = boxes(bytes(data), b"tkhd")
    a, b, c, d = (each * 0x10000 for each in matrix)
    data[at + 48 : at + 84] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    with Clip.open(path) as clip:
        clip.advance()
        pixels = clip.bgr()
        assert clip.info.rotation_degrees == degrees
        assert pixels.shape[:2] == ((64, 48) if degrees in (90, 270) else (48, 64))
        assert (clip.info.height, clip.info.width) == pixels.shape[:2]
    corners = {(y, x): int(pixels[y * 9 if y else 8, x * 9 if x else 8, 2]) for y in (0, -1) for x in (0, -1)}
    assert max(corners, key=lambda corner: corners[corner]) == red_corner


def test_damaged_packets_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", [10 * each for each in range(20)], codec="MJPG", size_hw=(128, 160))
    whole_times, _, whole = walk(path)
    assert len(whole_times) == 20 and whole.health.whole  # control
    data = bytearray(path.read_bytes())
    for at in boxes_avi(data)[5:7]:
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        data[at + 8 : at + 8 + size] = bytes(size)
    path.write_bytes(data)
    times, greys, clip = walk(path)
    assert 16 <= len(times) < 20 and times == sorted(set(times))
    assert not clip.health.whole and clip.health.missing == 20 - len(times)
    assert greys[-1] == pytest.approx(190, abs=6), "what comes after the damage is read"


def boxes_avi(data: bytearray) -> list[int]:
    found, at = [], data.find(b"00dc")
    while at >= 0 and at < data.find(b"idx1"):
        found.append(at)
        at = data.find(b"00dc", at + 1)
    return found


class FakeCapture:
    """A capture that gives prepared reads: a time in seconds, or None for one that fails."""

    def __init__(self, reads: list[float | None]) -> None:
        self._reads, self._at = reads, -1

    def grab(self) -> bool:
        self._at += 1
        return self._at < len(self._reads) and self._reads[self._at] is not None

    def get(self, _: int) -> float:
        return 1000 * (self._reads[self._at] or 0.0)

    def retrieve(self) -> tuple[bool, None]:
        return False, None

    def release(self) -> None:
        pass


def fake_clip(reads: list[float | None], **limits: Any) -> Clip:
    info = ClipInfo(Path("x.mp4"), "mp4", "mp4v", 8, 8, 0, 10.0, None, None)
    return Clip(FakeCapture(reads), info, ClipLimits(**limits))


def test_times_that_do_not_follow_are_replaced() -> None:
    clip = fake_clip([0.0, 0.1, 0.1, float("nan"), -5.0, None, 99999.0, 0.9])
    times = []
    while (tick := clip.advance()) is not None:
        times.append(tick.time_s)
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    assert clip.health.repaired_times == 4 and clip.health.unreadable == 1
    with pytest.raises(InputError, match="no pixels"):
        fake_clip([0.0]).bgr()


def test_a_clip_that_goes_on_for_ever_is_refused() -> None:
    clip = fake_clip([0.0, 1.0, 2.0, 3.0], max_duration_s=2.5)
    assert [clip.advance() is not None for _ in range(3)] == [True] * 3
    with pytest.raises(InputError, match="longer than the limit"):
        clip.advance()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"not a video at all", "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a video"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "without a video that can be read"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Clip.open(path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Clip.open(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="not a plain file"):
        Clip.open(tmp_path)
    path = write_clip(tmp_path / "a.mp4", [20] * 20)
    with pytest.raises(InputError, match="frames of 64x48 pixels"):
        Clip.open(path, ClipLimits(max_pixels=100))
    with pytest.raises(InputError, match="says it lasts 2 s"):
        Clip.open(path, ClipLimits(max_duration_s=1.0))
    with pytest.raises(InputError, match="not one frame"):
        fake_clip([]).advance()
    Clip.open(path).close()  # control


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/videos")
def test_every_shared_clip_decodes_or_says_why() -> None:
    damaged = {}
    for path in sorted(each for each in SHARED.rglob("*") if each.suffix in (".mp4", ".mkv", ".mov")):
        with Clip.open(path) as clip:
            while clip.advance() is not None:
                pass
            if not clip.health.whole:
                damaged[path.name] = clip.health
    assert list(damaged) == ["corrupted.mp4"]
    assert damaged["corrupted.mp4"].frames == 49 and damaged["corrupted.mp4"].unreadable == 1

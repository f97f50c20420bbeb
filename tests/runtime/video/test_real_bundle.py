"""Clips through the committed tiny bundle and its real engine: looked at, asked, captioned, searched, killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video.decode import Clip
from mammut_runtime.video.sampler import Budget
from mammut_runtime.video.subtitles import JOURNAL_FOLDER

pytest.importorskip("onnxruntime")

TINY = Path(__file__).parents[2] / "data" / "tiny-bundle"
SCENES = 8


def write_clip(path: Path, scenes: int = SCENES, frames: int = 10) -> Path:
    """Scenes of coloured noise, 10 frames a second, a hard cut between them."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(scenes):
        base = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        picture = cv2.resize(base, (64, 48), interpolation=cv2.INTER_NEAREST)
        for shift in range(frames):
            writer.write(np.roll(picture, shift // 4, axis=1))
    writer.release()
    return path


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(TINY, EngineOptions(threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "a.avi")


def test_a_clip_is_captioned_asked_and_matched_like_a_picture(model: Model, clip: Path) -> None:
    seen = model.encode_video(clip, 2.0, 6.0)
    assert len(seen.sampling.frames) == 8 and seen.sampling.of_frames == 40 and seen.health is not None
    assert all(2.0 <= each.time_s < 6.0 for each in seen.sampling.frames)
    with Clip.open(clip) as opened:
        frames = []
        while (tick := opened.advance()) is not None:
            if tick.index in {each.index for each in seen.sampling.frames}:
                frames.append(opened.bgr())
    each = model.encode_batch(frames, "bgr")
    mean = np.mean([one.embedding for one in each], axis=0)
    assert seen.embedding == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    central = each[seen.sampling.central]
    assert central.embedding @ seen.embedding == pytest.approx(max(o.embedding @ seen.embedding for o in each))
    assert seen.caption() == central.caption() and seen.ask("what is this?") == central.ask("what is this?")
    answer = seen.ask("?", ["cat", "dog"])  # the tiny bundle has room for few tokens
    assert sum(one.probability for one in answer.candidates) == pytest.approx(1, abs=1e-5)
    assert {one.text for one in seen.match(["a cat", "a dog"]).matches} == {"a cat", "a dog"}
    in_memory = model.encode_video(frames, color="bgr")  # the same frames, given as arrays
    assert (in_memory.tokens == seen.tokens).all() and in_memory.embedding == pytest.approx(seen.embedding, abs=1e-6)


def test_the_budget_bounds_frames_tokens_and_seconds(model: Model, clip: Path) -> None:
    tokens = model.manifest.model.image_tokens
    for budget, most, last_s, cut in (
        (Budget(frames=3), 3, 8.0, False),
        (Budget(frames=8, tokens=2 * tokens), 2, 8.0, False),
        (Budget(frames=8, tokens=3 * tokens - 1, seconds=1.0), 2, 1.0, True),
        (Budget(frames=64, seconds=0.35), 4, 0.35, True),
        (Budget(seconds=100.0), 8, 8.0, False),
    ):
        sampling = model.encode_video(clip, budget=budget).sampling
        assert len(sampling.frames) == most and sampling.tokens == most * tokens and sampling.cut == cut
        assert sampling.end_s == pytest.approx(last_s) and sampling.frames[-1].time_s < last_s
        assert [each.index for each in sampling.frames] == sorted({each.index for each in sampling.frames})
        assert all(each.index == round(each.time_s * 10) for each in sampling.frames)
    with pytest.raises(InputError, match=f"one frame has {tokens} with this bundle"):
        model.encode_video(clip, budget=Budget(tokens=tokens - 1))


def test_cues_of_a_part_lie_in_it(model: Model, clip: Path) -> None:
    whole = list(model.caption_video(clip))
    assert whole[0].start_ms == 0 and whole[-1].end_ms == 1000 * SCENES
    assert all(one.end_ms == two.start_ms for one, two in itertools.pairwise(whole))
    part = list(model.caption_video(clip, start_s=2.0, end_s=4.0))
    assert part[0].start_ms == 2000 and part[-1].end_ms == 4000
    with pytest.raises(InputError, match=r"no frames from 50 s on; the clip ends at 8\.0 s"):
        list(model.caption_video(clip, start_s=50.0))


# ---- in processes of their own ----

ENVIRONMENT = os.environ | {"MAMMUT_BUNDLE": str(TINY), "OMP_NUM_THREADS": "1"}
PLAIN = "import sys; from mammut_runtime.commands import main; sys.exit(main())"
DIES = """
import os, signal, sys
from pathlib import Path
from mammut_runtime.video import journal
where, left = sys.argv.pop(1), int(sys.argv.pop(1))

def counted(real):
    def each(*given):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    return each

if where == "append":
    journal.Journal._append = counted(journal.Journal._append)
else:
    Path.replace = counted(Path.replace)
from mammut_runtime.commands import main
sys.exit(main())
"""


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def outputs(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


COMMON = ("--threads", "1", "--merge-likeness", "2", "--beams", "1", "--out")


@pytest.fixture(scope="module")
def undisturbed(clip: Path) -> Path:
    """The outputs of a run that nothing disturbed: the control of those below."""
    done = run(PLAIN, "caption-video", clip, *COMMON, "w", cwd=clip.parent)
    assert done.returncode == 0 and sorted(outputs(clip.parent / "w")) == ["a.jsonl", "a.srt", "a.vtt"], done.stderr
    return clip.parent / "w"


@pytest.mark.parametrize(
    ("where", "count", "files_left"), [("append", 0, 0), ("append", 4, 0), ("replace", 1, 1), ("append", 9, 3)]
)
def test_killed_at_a_given_moment_and_started_again(
    tmp_path: Path, clip: Path, undisturbed: Path, where: str, count: int, files_left: int
) -> None:
    """Before the header, between scenes, between two files, and when only the journal's last line is missing."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("no SIGKILL here")
    common = ["caption-video", clip, *COMMON, tmp_path / "o"]
    killed = run(DIES, where, count, *common, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(outputs(tmp_path / "o")) == files_left
    again = run(PLAIN, *common, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = json.loads(again.stdout)["resumed_scenes"]
    assert resumed == (max(0, count - 1) if where == "append" else SCENES)
    assert outputs(tmp_path / "o") == outputs(undisturbed)
    journals = [(each / JOURNAL_FOLDER / "a.journal").read_bytes() for each in (tmp_path / "o", undisturbed)]
    assert journals[0] == journals[1] and journals[0].count(b"\n") == SCENES + 2


SMALL_DISK = """
import resource, sys
most = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
from mammut_runtime.commands import main
sys.exit(main())
"""


@pytest.mark.parametrize("most_bytes", [3, 1000])
def test_no_room_left_is_one_error_and_nothing_half_written(
    tmp_path: Path, clip: Path, undisturbed: Path, most_bytes: int
) -> None:
    """A real limit, at which a write stops in the middle: in the journal's header, and in a scene."""
    pytest.importorskip("resource")
    common = ["caption-video", clip, *COMMON, tmp_path / "o"]
    full = run(SMALL_DISK, most_bytes, *common, cwd=tmp_path)
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert "free some space and run the same command again" in full.stderr
    assert outputs(tmp_path / "o") == {} and not list((tmp_path / "o").rglob("*.part"))
    assert (tmp_path / "o" / JOURNAL_FOLDER / "a.journal").stat().st_size == most_bytes
    again = run(PLAIN, *common, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert outputs(tmp_path / "o") == outputs(undisturbed)


def test_moments_are_encoded_once_and_found_again(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mammut_runtime.commands import main

    encoded: list[int] = []
    real = Model.encode_batch

    def counted(self: Model, images: list[object], *rest: object) -> object:
        encoded.append(len(images))
        return real(self, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "encode_batch", counted)
    index = tmp_path / "x.index"
    strange = write_clip(tmp_path / "new\nline #t=1.000,2.000.avi", 2)

    def find(text: str, *clips: Path) -> list[dict[str, float]]:
        given = ["--index", str(index), "--bundle", str(TINY), "--threads", "1", "--json", "-k", "99"]
        assert main(["find-video", text, *map(str, clips), *given]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first = find("a dog", clip)
    assert sum(encoded) == 2 * SCENES and len(first) == SCENES
    assert [hit["score"] for hit in first] == sorted((hit["score"] for hit in first), reverse=True)
    encoded.clear()
    kept = index.read_bytes()
    assert find("a dog", clip) == first and len(find("a cat", clip)) == SCENES
    assert encoded == [] and index.read_bytes() == kept
    assert {hit["path"] for hit in find("a dog", clip, strange)} == {str(clip.resolve()), str(strange.resolve())}
    assert sum(encoded) == 4  # only the new one
    encoded.clear()
    assert len(find("a dog", clip, strange)) == SCENES + 2 and encoded == []
    write_clip(strange, 3)
    find("a dog", strange)
    assert sum(encoded) == 6  # control: a changed clip is looked at again

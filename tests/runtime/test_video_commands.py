"""caption-video, ask-video and find-video as a user meets them, with the tiny bundle or the toy; and a real kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video import subtitles
from mammut_runtime.video.captions import VideoCaptionOptions, ahead
from mammut_runtime.video.cues import Cue, MergeRule
from mammut_runtime.video.decode import Clip
from mammut_runtime.video.journal import Journal
from mammut_runtime.video.moments import MomentIndex, update_moments
from mammut_runtime.video.sampler import Budget
from mammut_runtime.video.scenes import SceneRule, scenes
from mammut_runtime.video.subtitles import Job, jobs_of, write_subtitles

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "videos"
TINY = Path(__file__).parents[1] / "data" / "tiny-bundle"
NEVER = VideoCaptionOptions(SceneRule(longest_s=1.0), 2, merge=MergeRule(likeness=2))


def write_clip(path: Path, scene_count: int, frames: int = 10, fps: float = 10.0) -> Path:
    """Scenes of one colour each, with a cut between them."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (64, 48))
    for number in range(scene_count):
        colour = np.random.default_rng(number).integers(0, 256, 3)
        if number % 2:
            colour = 255 - np.random.default_rng(number - 1).integers(0, 256, 3)
        for _ in range(frames):
            writer.write(np.broadcast_to(colour, (48, 64, 3)).astype(np.uint8))
    writer.release()
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and subtitles.JOURNAL_FOLDER not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def model(toy_bundle: Any) -> Iterator[Model]:
    with toy_bundle.model() as opened:
        yield opened


# ---- scenes ----


def test_cuts_are_found_and_long_scenes_divided(tmp_path: Path) -> None:
    with Clip.open(write_clip(tmp_path / "a.avi", 4)) as clip:
        found = list(scenes(clip, SceneRule(), 2))
    assert [(each.start_ms, each.end_ms) for each in found] == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 4000)]
    assert all(each.of_frames == 10 and len(each.pixels) == 2 for each in found)
    with Clip.open(write_clip(tmp_path / "b.avi", 1, frames=35)) as clip:
        assert [each.start_ms for each in scenes(clip, SceneRule(longest_s=1.0))] == [0, 1000, 2000, 3000]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/videos")
def test_the_cuts_of_a_real_clip() -> None:
    with Clip.open(SHARED / "bikes.mp4") as clip:
        starts = [each.start_ms // 40 for each in scenes(clip)]
    assert starts == [0, 30, 76, 137, 187, 242]  # frames, by eye


# ---- encode_video ----


def test_a_clip_is_looked_at_within_the_budget(model: Model, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.avi", 2)
    seen = model.encode_video(path, 0.5, 1.5, Budget(frames=3))
    assert seen.sampling.of_frames == 10 and len(seen.sampling.frames) == 3 and not seen.sampling.cut
    assert all(0.5 <= each.time_s < 1.5 and each.index == round(each.time_s * 10) for each in seen.sampling.frames)
    assert np.linalg.norm(seen.embedding) == pytest.approx(1) and seen.caption().ids == seen.caption().ids
    assert seen.ask("what?").question == "what?" and seen.match(["a cat", "a dog"]).matches
    assert model.encode_video(path, budget=Budget(seconds=0.5)).sampling.cut
    central = seen.sampling.frames[seen.sampling.central].index
    with Clip.open(path) as clip:
        for _ in range(central + 1):
            clip.advance()
        assert (model.encode(clip.bgr(), "bgr").tokens == seen.tokens).all()


def test_frames_in_memory_are_a_clip_too(model: Model, toy_bundle: Any) -> None:
    frames = [toy_bundle.picture(each) for each in range(6)]
    seen = model.encode_video(frames, fps=2.0, start_s=1.0, end_s=2.0)
    assert [each.index for each in seen.sampling.frames] == [2, 3] and seen.health is None
    one = model.encode_video(frames[:1])
    assert (one.tokens == model.encode(frames[0]).tokens).all()
    assert one.embedding == pytest.approx(model.encode(frames[0]).embedding, abs=1e-6)
    for wrong in ({"start_s": 9.0}, {"start_s": 2.0, "end_s": 1.0}, {"fps": 0.0}):
        with pytest.raises(InputError):
            model.encode_video(frames, **wrong)
    with pytest.raises(InputError, match="no frames"):
        model.encode_video([])


# ---- caption_video ----


def test_cues_come_as_they_are_known(model: Model, tmp_path: Path) -> None:
    cues = model.caption_video(write_clip(tmp_path / "a.avi", 5), NEVER)
    first = next(cues)
    assert isinstance(first, Cue) and first.start_ms == 0 and len(first.token_confidence) == len(first.ids)
    assert len(list(cues)) == 4
    stopped = model.caption_video(tmp_path / "a.avi", NEVER)
    next(stopped)
    stopped.close()  # its thread ends with it
    with pytest.raises(InputError, match="no such file"):
        next(model.caption_video(tmp_path / "none.avi"))


def test_token_confidence_is_the_captions_own_probability(model: Model, toy_bundle: Any) -> None:
    seen = model.encode(toy_bundle.picture(3))
    options = VideoCaptionOptions().caption
    caption = seen.caption(options)
    (memory,) = model._memories([seen])
    each = model.captioner.token_probabilities(memory, caption.ids, options)
    if not caption.finished:
        assert np.log(each).sum() == pytest.approx(caption.log_probability, abs=1e-4)
    assert len(each) == len(caption.ids) and np.log(each).sum() >= caption.log_probability - 1e-4


def test_a_thread_ahead_gives_the_same_items_and_errors() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise InputError("stop here")

    found = ahead(items(), 2)
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(InputError, match="stop here"):
        next(found)


# ---- subtitles and journals ----


def test_a_stopped_run_goes_on_and_writes_the_same_bytes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(write_clip(tmp_path / "a.avi", 6), "a")
    write_subtitles(model, job, tmp_path / "whole", NEVER)
    journal = tmp_path / "whole" / subtitles.JOURNAL_FOLDER / "a.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept, torn in ((1, b""), (3, lines[3][:20]), (4, b'{"torn'), (7, b""), (8, b"")):
        out = tmp_path / f"kept-{kept}"
        (out / subtitles.JOURNAL_FOLDER).mkdir(parents=True)
        (out / subtitles.JOURNAL_FOLDER / "a.journal").write_bytes(b"".join(lines[:kept]) + torn)
        again = write_subtitles(model, job, out, NEVER)
        assert outputs(out) == outputs(tmp_path / "whole") and again.resumed_scenes == min(6, kept - 1)
        assert (out / subtitles.JOURNAL_FOLDER / "a.journal").read_bytes() == journal.read_bytes()
    assert sorted(outputs(tmp_path / "whole")) == ["a.jsonl", "a.srt", "a.vtt"]

    def forbidden(*_: object) -> None:
        raise AssertionError("a scene was captioned twice")

    monkeypatch.setattr("mammut_runtime.video.captions.describe", forbidden)
    (tmp_path / "whole" / "a.vtt").unlink()
    before = outputs(tmp_path / "kept-1")
    write_subtitles(model, job, tmp_path / "whole", NEVER)
    assert outputs(tmp_path / "whole") == before


def test_what_is_not_ours_is_left_alone(model: Model, tmp_path: Path) -> None:
    job, out = Job(write_clip(tmp_path / "a.avi", 2), "a"), tmp_path / "out"
    out.mkdir()
    (out / "a.srt").write_text("mine")
    with pytest.raises(InputError, match="not made by an earlier run"):
        write_subtitles(model, job, out, NEVER)
    assert (out / "a.srt").read_text() == "mine" and len(list(out.iterdir())) == 1
    write_subtitles(model, job, out, NEVER, overwrite=True)
    assert (out / "a.srt").read_text() != "mine"
    with pytest.raises(InputError, match="other settings"):
        write_subtitles(model, job, out)
    write_clip(tmp_path / "a.avi", 3)
    with pytest.raises(InputError, match="another clip"):
        write_subtitles(model, job, out, NEVER)
    write_subtitles(model, job, out, NEVER, overwrite=True)
    (tmp_path / "b" / subtitles.JOURNAL_FOLDER).mkdir(parents=True)
    stranger = tmp_path / "b" / subtitles.JOURNAL_FOLDER / "a.journal"
    stranger.write_text("a diary\n")
    with pytest.raises(InputError, match="not a journal"):
        write_subtitles(model, job, tmp_path / "b", NEVER)
    assert stranger.read_text() == "a diary\n"


def test_a_journal_has_one_writer(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    job = Job(write_clip(tmp_path / "a.avi", 2), "a")
    write_subtitles(model, job, tmp_path / "out", NEVER)
    path = tmp_path / "out" / subtitles.JOURNAL_FOLDER / "a.journal"
    header = subtitles.JournalHeader(
        1, subtitles.identify(job.clip), model.bundle.content_hash, subtitles.settings_hash(model, NEVER)
    )
    with Journal.open(path, header), pytest.raises(InputError, match="another run"):
        write_subtitles(model, job, tmp_path / "out", NEVER)
    write_subtitles(model, job, tmp_path / "out", NEVER)  # control


def test_a_full_disk_is_an_error_that_says_so_and_keeps_what_was_done(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = Job(write_clip(tmp_path / "a.avi", 4), "a"), tmp_path / "out"
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_subtitles(model, job, out, NEVER)
    assert outputs(out) == {} and not list(out.rglob("*.part")) and caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fsync", real)
    assert write_subtitles(model, job, out, NEVER).resumed_scenes == 4


def test_names_of_outputs_are_distinct(tmp_path: Path) -> None:
    for name in ("x/a.avi", "x/a.mkv", "x/deep/a.avi", "y/b.avi", ".hidden.avi", "x/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [job.name for job in jobs_of([tmp_path / "x", tmp_path / "y" / "b.avi", tmp_path / "x" / "deep"])]
    assert names == ["a.avi", "a.mkv", "deep/a", "b"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no clips"):
        jobs_of([tmp_path / "none"])


# ---- the commands, in processes of their own ----


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from mammut_runtime.commands import main; sys.exit(main())"]
    environment = os.environ | {"MAMMUT_BUNDLE": str(TINY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_commands_with_a_real_bundle(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.avi", 3)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    done = run("caption-video", "clips", "--out", "out", "--merge-likeness", "2", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 2 and "broken.mp4: not a video" in done.stderr and "1 of 2 clips" in done.stderr
    assert "a.avi: 3 cues" in done.stdout and set(outputs(tmp_path / "out")) == {"a.srt", "a.vtt", "a.jsonl"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [each["start_s"] for each in lines] == [0.0, 1.0, 2.0]
    asked = run("ask-video", "clips/a.avi", "what is this?", "--from", "1", "--to", "2", "--json", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert all(1 <= each["time_s"] < 2 for each in json.loads(asked.stdout)["sampling"]["frames"])
    found = run("find-video", "a dog", "clips/a.avi", "-k", "2", "--json", cwd=tmp_path)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 2
    first = (tmp_path / "moments.index").stat().st_mtime_ns
    assert run("find-video", "a cat", "clips", "--json", cwd=tmp_path).returncode == 2  # the broken clip
    assert (tmp_path / "moments.index").stat().st_mtime_ns == first, "the index is reused"


SLOW = """
import sys, time
from mammut_runtime.video import captions
fast = captions.describe
captions.describe = lambda *each: (time.sleep(0.15), fast(*each))[1]
from mammut_runtime.commands import main
sys.exit(main())
"""


def test_kill_9_and_a_second_start_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("no SIGKILL here")
    write_clip(tmp_path / "a.avi", 12)
    common = ["caption-video", "a.avi", "--threads", "1", "--merge-likeness", "2"]
    assert run(*common, "--out", "whole", cwd=tmp_path).returncode == 0
    environment = os.environ | {"MAMMUT_BUNDLE": str(TINY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *common, "--out", "out"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    journal = tmp_path / "out" / subtitles.JOURNAL_FOLDER / "a.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert outputs(tmp_path / "out") == {} and 4 <= journal.read_bytes().count(b"\n") < 14
    second = run(*common, "--out", "out", cwd=tmp_path)
    assert second.returncode == 0 and "scenes from before" in second.stdout
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole") != {}


# ---- moments ----


def test_moments_are_found_and_clips_looked_at_once(model: Model, tmp_path: Path) -> None:
    one, two = write_clip(tmp_path / "a.avi", 3), write_clip(tmp_path / "b.avi", 2)
    index = tmp_path / "x.index"
    first = update_moments(model, [one, two], index)
    assert (first.clips, first.encoded, first.moments) == (2, 2, 5)
    assert update_moments(model, [one, two], index).encoded == 0
    hits = MomentIndex.open(index, model).search("a dog", 10)
    assert len(hits) == 5 and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    only = MomentIndex.open(index, model).search("a dog", 10, [two])
    assert {hit.path for hit in only} == {two.resolve()} and {hit.start_s for hit in only} == {0.0, 1.0}
    write_clip(one, 4)
    os.utime(one, ns=(1, 1))
    changed = update_moments(model, [one], index)
    assert (changed.encoded, changed.moments) == (1, 6)
    two.write_bytes(b"gone bad")
    broken = update_moments(model, [two], index)
    assert broken.moments == 4 and "not a video" in broken.unusable[0].reason


def test_an_index_of_something_else_is_refused(model: Model, toy_bundle: Any, make_bundle: Any, tmp_path: Path) -> None:
    clip, index = write_clip(tmp_path / "a.avi", 1), tmp_path / "x.index"
    update_moments(model, [clip], index)
    other = make_bundle(tmp_path / "other", similarity="sigmoid").model()
    with pytest.raises(InputError, match="another model"):
        update_moments(other, [clip], index)
    assert update_moments(other, [clip], index, rebuild=True).moments == 1
    index.write_text("mine")
    with pytest.raises(InputError, match="left alone"):
        update_moments(model, [clip], index, rebuild=True)

"""A journal that was cut or damaged anywhere: the next run writes the same bytes, or says clearly why it will not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video import captions, subtitles
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.cues import MergeRule
from mammut_runtime.video.scenes import SceneRule
from mammut_runtime.video.subtitles import Job, write_subtitles

SCENES = 5
OPTIONS = VideoCaptionOptions(SceneRule(longest_s=0.5), 1, merge=MergeRule(likeness=2))


def write_clip(path: Path, scenes: int = SCENES) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(5 * scenes):
        writer.write(np.full((48, 64, 3), 40 + number, np.uint8))
    writer.release()
    return path


@dataclass
class Whole:
    """A run that nothing disturbed."""

    model: Model
    job: Job
    folder: Path
    outputs: dict[str, bytes]
    journal: bytes

    def start(self, journal: bytes) -> tuple[dict[str, bytes], bytes]:
        """Outputs and journal of a run that finds this journal."""
        out = self.folder / "again"
        shutil.rmtree(out, ignore_errors=True)
        (out / subtitles.JOURNAL_FOLDER).mkdir(parents=True)
        place = out / subtitles.JOURNAL_FOLDER / "a.journal"
        place.write_bytes(journal)
        write_subtitles(self.model, self.job, out, OPTIONS)
        return files(out), place.read_bytes()


def files(out: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in out.iterdir() if each.is_file()}


@pytest.fixture(scope="module")
def whole(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("journal")
    with make_bundle(folder / "bundle").model() as model:
        job = Job(write_clip(folder / "a.avi"), "a")
        write_subtitles(model, job, folder / "out", OPTIONS)
        journal = (folder / "out" / subtitles.JOURNAL_FOLDER / "a.journal").read_bytes()
        assert journal.count(b"\n") == SCENES + 2
        yield Whole(model, job, folder, files(folder / "out"), journal)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), behind=st.sampled_from([b"", b"\0" * 40, b'{"start_ms":1}\t00000000\n', b"x"]))
def test_cut_off_anywhere(whole: Whole, share: float, behind: bytes) -> None:
    at = round(share * len(whole.journal))
    header = whole.journal.index(b"\n") + 1
    if at < header and behind.strip(b"\0"):
        behind = b""  # what begins like nothing of ours is refused: tested below
    assert whole.start(whole.journal[:at] + behind) == (whole.outputs, whole.journal)


@pytest.mark.parametrize("kept", [0, 1, 5, 9, 10, 11, 40])
def test_a_header_that_was_cut_off_is_begun_anew(whole: Whole, kept: int) -> None:
    assert whole.start(whole.journal[:kept]) == (whole.outputs, whole.journal)
    with pytest.raises(InputError, match="not a journal of captions"):  # control: a stranger's file
        whole.start(b"Dear diary"[: max(1, kept)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_never_changes_the_outputs(whole: Whole, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole.journal) - 1))
    changed = bytearray(whole.journal)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        found, journal = whole.start(bytes(changed))
    except InputError as problem:
        assert at < whole.journal.index(b"\n"), problem  # only in the header, which says what the rest is
        assert "journal" in str(problem)
    else:
        assert (found, journal) == (whole.outputs, whole.journal)


def captioned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the start of every scene that is captioned from here on."""
    found: list[int] = []
    describe: Callable[..., Any] = captions.describe

    def counted(model: Model, scene: Any, options: Any) -> Any:
        found.append(scene.start_ms)
        return describe(model, scene, options)

    monkeypatch.setattr(captions, "describe", counted)
    return found


def test_only_what_is_missing_is_captioned(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = whole.journal.splitlines(keepends=True)
    found = captioned(monkeypatch)
    whole.start(b"".join(lines[:3]))
    assert found == [1000, 1500, 2000]
    found.clear()
    whole.start(b"".join(lines[:-1]))
    assert found == []
    whole.start(lines[0])  # control
    assert len(found) == SCENES


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def test_a_run_killed_while_it_replaces_older_files_is_not_taken_for_done(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite, with other settings before: the files that are there are whole, and are the older ones."""
    for moves in (0, 1, 2):
        out = tmp_path / str(moves)
        older = VideoCaptionOptions(SceneRule(longest_s=1.0), 1, merge=MergeRule(likeness=2))
        write_subtitles(whole.model, whole.job, out, older)
        assert files(out) != whole.outputs
        real, left = Path.replace, [moves]

        def replace(self: Path, target: Path, real: Any = real, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(self, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", replace)
            write_subtitles(whole.model, whole.job, out, OPTIONS, overwrite=True)
        assert files(out) != whole.outputs
        write_subtitles(whole.model, whole.job, out, OPTIONS)
        assert files(out) == whole.outputs
        assert (out / subtitles.JOURNAL_FOLDER / "a.journal").read_bytes() == whole.journal
        assert not list(out.rglob("*.part"))


def test_a_journal_of_more_scenes_than_the_clip_has_is_refused(whole: Whole, tmp_path: Path) -> None:
    """The same first and last MiB, and fewer scenes: the middle of the file has changed."""
    longer = Job(write_clip(tmp_path / "b.avi", SCENES + 2), "a")
    write_subtitles(whole.model, longer, tmp_path / "longer", OPTIONS)
    place = tmp_path / "longer" / subtitles.JOURNAL_FOLDER / "a.journal"
    header = whole.journal.splitlines(keepends=True)[0]
    scenes = place.read_bytes().splitlines(keepends=True)[1:-1]
    with pytest.raises(InputError, match="not those that were captioned before"):
        whole.start(header + b"".join(scenes))
    assert whole.start(header + b"".join(scenes[:2]))[0] == whole.outputs  # control: scenes both have


def test_another_preprocessing_is_another_setting(whole: Whole, tmp_path: Path) -> None:
    write_subtitles(whole.model, whole.job, tmp_path / "out", OPTIONS)
    with Model(whole.model.bundle, preprocess="fast", open_graph=lambda name: whole.model._graphs.engine(name)) as fast:
        with pytest.raises(InputError, match="other settings"):
            write_subtitles(fast, whole.job, tmp_path / "out", OPTIONS)
        write_subtitles(fast, whole.job, tmp_path / "fast", OPTIONS)  # control
    assert write_subtitles(whole.model, whole.job, tmp_path / "out", OPTIONS).resumed_scenes == SCENES  # control

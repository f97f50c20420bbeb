"""A clip to subtitle files, by way of its journal: .srt, .vtt and .jsonl, all of them whole or none.

The files are made from the journal alone, so a run that was killed and started again writes the same bytes as one that
was not. A file that is there and was not made by an earlier run of this is never replaced unasked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.strict import to_dict
from mammut_runtime.video import cues
from mammut_runtime.video.captions import VideoCaptionOptions, caption_scenes, frames_per_scene
from mammut_runtime.video.cues import Cue, merged
from mammut_runtime.video.decode import CLIP_SUFFIXES, Clip, ClipHealth
from mammut_runtime.video.journal import FORMAT, Journal, JournalEnd, JournalHeader, identify, storage_error

JOURNAL_FOLDER = ".mammut-journal"
"""Inside the output folder: journals, and files that are not whole yet."""


@dataclass(frozen=True)
class Job:
    """A clip and the name of its outputs."""

    clip: Path
    name: str
    """Below the output folder, "/" between parts, without the ending."""


@dataclass(frozen=True)
class Subtitles:
    """What was written for a clip."""

    clip: Path
    files: tuple[Path, ...]
    cues: int
    duration_s: float
    """Up to the end of the last cue."""
    resumed_scenes: int
    """Scenes that an earlier run had captioned."""
    health: ClipHealth

    def to_dict(self) -> dict[str, Any]:
        return {
            "clip": str(self.clip),
            "files": [str(each) for each in self.files],
            "cues": self.cues,
            "duration_s": self.duration_s,
            "resumed_scenes": self.resumed_scenes,
            "health": to_dict(self.health),
        }


def jobs_of(places: Sequence[str | Path]) -> list[Job]:
    """The clips of files and folders (with their subfolders), each with a name of its own.

    A clip in a folder keeps its place below that folder. Names that would be equal keep their endings, or get a number.
    Raises InputError for a folder without clips; whether a file is a clip shows when it is opened.
    """
    found: list[tuple[Path, Path]] = []
    for place in map(Path, places):
        if place.is_dir():
            found += [(path, path.relative_to(place)) for path in _clips_in(place)]
        else:
            found.append((place, Path(place.name)))
    by_place: dict[Path, tuple[Path, Path]] = {}
    for path, below in found:
        by_place.setdefault(path.resolve(), (path, below))
    unique = list(by_place.values())
    stems = [below.with_suffix("").as_posix() for _, below in unique]
    jobs: list[Job] = []
    taken: set[str] = set()
    for (path, below), stem in zip(unique, stems, strict=True):
        first = name = below.as_posix() if stems.count(stem) > 1 else stem
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{first}-{number}"
        taken.add(name.casefold())
        jobs.append(Job(path, name))
    return jobs


def _clips_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        named = (each for each in files if each.lower().endswith(CLIP_SUFFIXES) and not each.startswith("."))
        found += [Path(parent, each) for each in named]
    if not found:
        raise InputError(f"{folder}: no clips in this folder; expected files named {' '.join(CLIP_SUFFIXES)}")
    return sorted(found)


def write_subtitles(
    model: Model,
    job: Job,
    out: Path,
    options: VideoCaptionOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
    decoder_threads: int = 0,
) -> Subtitles:
    """Caption a clip into out/NAME.srt, .vtt and .jsonl; go on where an earlier run of the same was stopped.

    progress: is told the time in the clip, seconds, after each scene. overwrite: replace what is there.
    decoder_threads: 0 lets the decoder choose; the frames are the same.
    Raises InputError for a clip that cannot be used and for outputs that are not ours; OSError if the outputs cannot be
    written, for example for a full disk: what was done is kept.
    """
    options = options or VideoCaptionOptions()
    files = tuple(out / f"{job.name}{suffix}" for suffix in cues.SUFFIXES)
    parts = out / JOURNAL_FOLDER / job.name
    journal_path = parts.with_name(f"{parts.name}.journal")
    with Clip.open(job.clip, threads=decoder_threads) as clip:  # first: what is no clip leaves nothing behind
        settings = settings_hash(model, options)
        header = JournalHeader(FORMAT, identify(job.clip), model.bundle.content_hash, settings)
        if not overwrite and not journal_path.exists():
            _refuse_existing(files)
        with _journal(journal_path, header, overwrite) as journal:
            resumed = len(journal.scenes)
            end = journal.end
            if end is None or not all(each.exists() for each in files):
                end = end or _fill(journal, model, clip, options, progress)
                _write(files, parts, merged(journal.scenes, options.merge), header.bundle)
            if journal.end is None:  # only now: until then, files that are there may be older ones
                journal.finish(end)
            count = sum(1 for _ in merged(journal.scenes, options.merge))
            last_ms = journal.scenes[-1].end_ms if journal.scenes else 0
    health = ClipHealth(end.frames, end.unreadable, end.repaired_times, end.missing, end.short_s)
    return Subtitles(job.clip, files, count, last_ms / 1000, resumed, health)


def settings_hash(model: Model, options: VideoCaptionOptions) -> str:
    """sha256 of all settings that cues depend on, and of the decoder's version: with another, scenes may differ."""
    plain = dataclasses.asdict(options) | {"frames_per_scene": frames_per_scene(model, options)}
    settings = {"options": plain, "preprocess": model._preprocessor.mode, "opencv": cv2.__version__}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _fill(
    journal: Journal,
    model: Model,
    clip: Clip,
    options: VideoCaptionOptions,
    progress: Callable[[float], None] | None,
) -> JournalEnd:
    """Caption what is not in the journal yet. Gives the line that ends it, which is not written yet."""
    known = tuple(journal.scenes)
    for number, scene in enumerate(caption_scenes(model, clip, options, known)):
        if number >= len(known):
            journal.add(scene)
        if progress:
            progress(scene.end_ms / 1000)
    health = clip.health
    return JournalEnd(health.frames, health.unreadable, health.repaired_times, health.missing, health.short_s)


def _journal(path: Path, header: JournalHeader, fresh: bool) -> Journal:
    try:
        return Journal.open(path, header, fresh)
    except OSError as problem:
        raise storage_error(problem, path) from problem


def _refuse_existing(files: Sequence[Path]) -> None:
    for each in files:
        if each.exists():
            raise InputError(f"{each} exists and was not made by an earlier run here; move it away, or use --overwrite")


def _write(files: Sequence[Path], parts: Path, found: Iterable[Cue], bundle: str) -> None:
    """All files to temporary places, and then, when all are whole, each to its own."""
    places = [parts.with_name(f"{parts.name}{suffix}.part") for suffix in cues.SUFFIXES]
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(each.open("w", encoding="utf-8", newline="\n")) for each in places]
            subtitles, web, lines = opened
            web.write(cues.VTT_HEAD)
            number = 1
            for cue in found:
                text = cues.srt(number, cue)
                subtitles.write(text)
                number += bool(text)
                web.write(cues.vtt(cue))
                lines.write(cues.json_line(cue, bundle))
            for each in opened:
                each.flush()
                os.fsync(each.fileno())
        for place, file in zip(places, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            place.replace(file)
    except OSError as problem:
        for place in places:
            with contextlib.suppress(OSError):
                place.unlink()
        raise storage_error(problem, files[0]) from problem

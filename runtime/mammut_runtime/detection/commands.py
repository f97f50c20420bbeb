"""mammut-run detect: a thin shell over this package.

A picture or clip that cannot be used does not stop the rest: it is reported, and the command ends with exit code 2
after all others are done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from mammut_runtime import console
from mammut_runtime.commands_inputs import ModelSettings, json_option, model_options, picture_paths
from mammut_runtime.detection.boxes import Detection, Detections
from mammut_runtime.detection.clips import DrawnClip, detect_clip, drawn_fps
from mammut_runtime.detection.coco import CocoNumbers, CocoResults
from mammut_runtime.detection.commands_vocabulary import Wanted, vocabulary_options
from mammut_runtime.detection.copies import copy_stems, prepare_folder, write_copy
from mammut_runtime.detection.drawing import draw_detections, label_of
from mammut_runtime.detection.tracker import Tracked
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.pictures import read_picture
from mammut_runtime.search import PICTURE_SUFFIXES
from mammut_runtime.video.decode import CLIP_SUFFIXES, Clip, quiet_decoder


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATHS...")
@vocabulary_options
@click.option("--vocabulary", "vocabulary_file", type=click.Path(path_type=Path), help="Names kept in a file.")
@click.option("--threshold", type=click.FloatRange(0, 1), help="Lowest score. Default: each name's, or the bundle's.")
@click.option("--max-per-class", type=click.IntRange(1), help="Most boxes of one name in a picture.")
@click.option("--fps", type=float, default=5.0, help="Frames of a clip looked at in a second; 0: all. Default: 5.")
@click.option("--coco", type=click.Path(path_type=Path, dir_okay=False), help="Write a COCO results file.")
@click.option("--coco-ids", type=click.Path(path_type=Path), help="COCO annotations that number pictures and names.")
@click.option(
    "--annotate",
    "annotate_in",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write the pictures (PNG) and clips (MP4) with their boxes to this folder.",
)
@json_option
@model_options
def detect(
    settings: ModelSettings,
    paths: Sequence[str],
    wanted: Wanted,
    vocabulary_file: Path | None,
    threshold: float | None,
    max_per_class: int | None,
    fps: float,
    coco: Path | None,
    coco_ids: Path | None,
    annotate_in: Path | None,
    as_json: bool,
) -> int:
    """Find named things in pictures and clips.

    PATHS are files, folders (with their subfolders), or - for a list of files on standard input, one a line. Boxes are
    x0,y0,x1,y1 in pixels of the upright picture; with --coco-ids, of the picture as it is stored. In clips every thing
    has a number that it keeps.
    """
    quiet_decoder()
    if vocabulary_file is None and wanted.nothing:
        raise InputError("nothing to look for; give --names, --exemplar or --vocabulary")
    wanted.check_has_names()
    _check_coco(coco, coco_ids)
    if not 0 <= fps < 1e6:
        raise InputError(f"--fps: expected frames a second, or 0 for all, got {fps}")
    sources = sources_of(paths)
    stems = copy_stems(sources)
    if annotate_in is not None:
        prepare_folder(annotate_in, sources, stems)
    numbers = CocoNumbers.read(coco_ids) if coco_ids is not None else None
    loaded = Vocabulary.load(vocabulary_file) if vocabulary_file is not None else None
    with settings.load() as model:
        model.open_graphs("detector")
        words = _vocabulary(model, loaded, wanted)
        results = CocoResults(words.names, numbers) if coco is not None else None
        run = DetectRun(
            model, words, threshold, max_per_class, fps or None, results, annotate_in, as_json, len(sources)
        )
        with run.progress:
            for path, stem in zip(sources, stems, strict=True):
                run.look_at(path, stem)
    if results is not None and coco is not None:
        meaning = results.write(coco)
        if meaning is not None:
            console.note(f"{meaning}: which picture and which name each number is")
    return run.exit_code()


def _check_coco(coco: Path | None, coco_ids: Path | None) -> None:
    if coco_ids is None:
        return
    if coco is None:
        raise InputError("--coco-ids numbers what --coco writes; give --coco, or leave it out")
    if coco.resolve() == coco_ids.resolve() or (coco.exists() and coco_ids.exists() and coco.samefile(coco_ids)):
        raise InputError(f"--coco and --coco-ids are one file, {coco}; the results would replace the annotations")


def _vocabulary(model: Model, loaded: Vocabulary | None, wanted: Wanted) -> Vocabulary:
    """The file's names, and those of the command line."""
    if loaded is None:
        return wanted.make(model)
    loaded.check_model(model.bundle.content_hash, model.manifest.model.name)
    return loaded if wanted.nothing else loaded | wanted.make(model)


def sources_of(given: Sequence[str]) -> list[Path]:
    """Pictures and clips of files and folders, in order. Raises InputError for a folder without any."""
    suffixes = (*PICTURE_SUFFIXES, *CLIP_SUFFIXES)
    found: list[Path] = []
    for each in map(Path, given):
        if not each.is_dir():
            found += picture_paths([str(each)])  # "-" is a list on standard input
            continue
        inside = sorted(_files(each, suffixes))
        if not inside:
            raise InputError(f"{each}: no pictures or clips in this folder; expected files named {' '.join(suffixes)}")
        found += inside
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for each in files:
            if each.lower().endswith(suffixes) and not each.startswith("."):
                yield Path(parent, each)


class DetectRun:
    """One run over pictures and clips: what came out, what failed, and the bar that shows it."""

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        threshold: float | None,
        max_per_class: int | None,
        fps: float | None,
        results: CocoResults | None,
        annotate_in: Path | None,
        as_json: bool,
        total: int,
    ) -> None:
        self._model, self._vocabulary, self._fps, self._results = model, vocabulary, fps, results
        self._threshold, self._most, self._as_json = threshold, max_per_class, as_json
        self._annotate_in = annotate_in
        self._notices: set[str] = set()
        self._failed = 0
        self.progress = console.Progress("detections", total)

    def look_at(self, path: Path, stem: str) -> None:
        """A picture or a clip, and the name of its annotated copy; what cannot be used is reported."""
        try:
            if path.suffix.lower() in CLIP_SUFFIXES:
                self._clip(path, stem)
            else:
                self._picture(path, stem)
        except (InputError, OSError) as problem:
            self._failed += 1
            message = console.error_line(problem)
            self.progress.clear()
            console.note(f"error: {message}")
            if self._as_json:
                self.progress.print(console.json_line({"path": str(path), "error": message}))
        self.progress.advance()

    def exit_code(self) -> int:
        """0, or 2 after a note if something failed."""
        if self._failed:
            console.note(f"{self._failed} of {self.progress.done} pictures and clips could not be used")
        return console.EXIT_USAGE if self._failed else 0

    def _picture(self, path: Path, stem: str) -> None:
        # annotation files have boxes of pictures as they are stored
        picture = read_picture(path, upright=self._results is None or not self._results.numbered)
        found = self._model.detect(picture, self._vocabulary, self._threshold, self._most)
        if self._results is not None:
            self._results.add(path, found)
        self._show({"path": str(path), **found.to_dict()}, f"{path}: {line_of(found.detections)}", found)
        if self._annotate_in is not None:
            write_copy(self._annotate_in, stem, draw_detections(picture.rgb(), found.detections))

    def _clip(self, path: Path, stem: str) -> None:
        with Clip.open(path) as clip:
            if self._results is not None:
                raise InputError(f"{path}: a clip has no place in a COCO results file; leave --coco out, or the clip")
            rate = drawn_fps(clip, self._fps)
            with DrawnClip(self._annotate_in or Path(), stem, rate, replace=False) as drawn:
                for frame in detect_clip(self._model, clip, self._vocabulary, self._fps, self._threshold, self._most):
                    clock = f"{int(frame.time_s // 60)}:{frame.time_s % 60:05.2f}"
                    text = f"{path} {clock}: {line_of(frame.things)}"
                    self._show({"path": str(path), **frame.to_dict()}, text, frame.detections)
                    if self._annotate_in is not None:
                        drawn.add(frame)

    def _show(self, value: dict[str, Any], text: str, found: Detections) -> None:
        self.progress.print(console.json_line(value) if self._as_json else console.printable(text))
        for notice in () if self._as_json else found.notices:
            if notice not in self._notices:
                self._notices.add(notice)
                self.progress.clear()
                console.note(f"note: {notice}")


def line_of(found: Sequence[Detection | Tracked]) -> str:
    """`car 0.91 (10,20,50,60), dog 0.44 (...)`."""

    def one(each: Detection | Tracked) -> str:
        box = (each.detection if isinstance(each, Tracked) else each).box
        return f"{label_of(each)} ({','.join(f'{value:.0f}' for value in box.xyxy)})"

    return ", ".join(one(each) for each in found) or "nothing"

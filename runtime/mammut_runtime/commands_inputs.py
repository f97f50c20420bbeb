"""What the commands of mammut-run share: which bundle, which pictures, and how results and failures are shown.

A picture that cannot be used does not stop the rest: it is reported on stderr (and, with --json, as a line with an
"error"), and the command ends with exit code 2 after all others are done.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from mammut_runtime import console
from mammut_runtime.annotate import annotate, write_picture
from mammut_runtime.commands_engine import engine_options
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import BundleError, InputError
from mammut_runtime.model import Model, Seen
from mammut_runtime.pictures import Picture, read_picture
from mammut_runtime.search import PICTURE_SUFFIXES

BUNDLE_VARIABLE = "MAMMUT_BUNDLE"
DEFAULT_BUNDLE = Path("build/demo-bundle")
"""Where `make demo` leaves its bundle, seen from the checkout."""
Function = Callable[..., Any]


@dataclass(frozen=True)
class ModelSettings:
    """Which bundle to load, and how."""

    bundle: Path
    engine: EngineOptions
    preprocess: Literal["exact", "fast"] = "exact"

    def load(self) -> Model:
        """The model, its hashes checked. Raises BundleError that says how to get a bundle, if there is none."""
        return Model.load(self.existing(), self.engine, preprocess=self.preprocess)

    def existing(self) -> Path:
        """The bundle's folder. Raises BundleError as `load` does."""
        if not self.bundle.exists():
            raise BundleError(
                f"{self.bundle}: no such bundle; give one with --bundle DIR or {BUNDLE_VARIABLE}, or make one with "
                f"`make demo` or mammut-export"
            )
        return self.bundle


def model_options(command: Function) -> Function:
    """Add --bundle, --preprocess and the engine's options; the command's first argument is a ModelSettings."""

    @click.option(
        "--bundle",
        type=click.Path(path_type=Path),
        envvar=BUNDLE_VARIABLE,
        default=DEFAULT_BUNDLE,
        help=f"The bundle's folder. Default: the variable {BUNDLE_VARIABLE}, else {DEFAULT_BUNDLE.as_posix()}.",
    )
    @click.option(
        "--preprocess",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        help="fast: large pictures are halved by a box filter first; close to exact, not equal. Default: exact.",
    )
    @engine_options
    @functools.wraps(command)
    def with_settings(engine: EngineOptions, *, bundle: Path, preprocess: Literal["exact", "fast"], **rest: Any) -> Any:
        return command(ModelSettings(bundle, engine, preprocess), **rest)

    return with_settings


def json_option(command: Function) -> Function:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")(command)


def picture_options(command: Function) -> Function:
    """Add PICTURES, --batch-size, --annotate and --json."""
    decorators: tuple[Function, ...] = (
        click.argument("pictures", nargs=-1, required=True, metavar="PICTURES..."),
        click.option(
            "--batch-size",
            type=click.IntRange(1, 256),
            default=1,
            help="Pictures computed together: more throughput, more memory, later first result. Default: 1.",
        ),
        click.option(
            "--annotate",
            "annotate_in",
            type=click.Path(path_type=Path, file_okay=False),
            help="Also write the pictures with their results to this folder, as PNG.",
        ),
        json_option,
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def text_list(value: str, name: str) -> list[str]:
    """Texts from an option: separated by commas, or @FILE with one a line. Raises InputError if there is none."""
    if value.startswith("@"):
        try:
            texts = Path(value[1:]).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as problem:
            raise InputError(f"{name} {value}: expected UTF-8 text, one a line ({problem.reason})") from problem
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise InputError(f"{name} {value}: cannot be read ({reason}); give a text file, one a line") from problem
    else:
        texts = value.split(",")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{name}: expected texts separated by commas, or @FILE with one a line, got {value!r}")
    return texts


def picture_paths(given: Sequence[str]) -> Iterator[Path]:
    """The pictures meant by files, folders (searched with their subfolders) and "-" (a list on stdin, one a line).

    stdin is read as it comes, so another program can feed it. Raises InputError for a folder or a list without
    pictures.
    """
    for each in given:
        path = Path(each)
        if each == "-":
            yield from _listed_on_stdin()
        elif path.is_dir():
            yield from pictures_in(path)
        else:
            yield path


def _listed_on_stdin() -> Iterator[Path]:
    count = 0
    for line in sys.stdin.buffer:
        if name := line.rstrip(b"\r\n"):
            count += 1
            yield Path(os.fsdecode(name))
    if not count:
        raise InputError("-: no pictures in the list on standard input; expected their paths, one a line")


def pictures_in(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders that are named like pictures, sorted; hidden ones are left out."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        named = (each for each in files if each.lower().endswith(PICTURE_SUFFIXES) and not each.startswith("."))
        found += [Path(parent, each) for each in named]
    if not found:
        raise InputError(f"{folder}: no pictures in this folder; expected files named {' '.join(PICTURE_SUFFIXES)}")
    return sorted(found)


@dataclass(frozen=True)
class Shown:
    """A picture the model has seen."""

    path: Path
    picture: Picture
    seen: Seen


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises InputError that names the option where a picture or its folder cannot be written."""
    try:
        yield
    except OSError as problem:
        raise InputError(f"--annotate: {path} cannot be written ({problem.strerror}); give another folder") from problem


class PictureRun:
    """One run over pictures: what came out, what failed, and the bar that shows it."""

    def __init__(self, model: Model, given: Sequence[str], label: str, as_json: bool, annotate_in: Path | None) -> None:
        """given: PICTURES as the user gave them. Raises InputError for a folder without pictures; what is wrong with
        the engine or its options is raised here too, once, and not for each picture."""
        model.open_graphs("vision")
        self.model, self.as_json = model, as_json
        self._paths: Iterable[Path] = picture_paths(given)
        if "-" not in given:
            self._paths = list(self._paths)
        self.progress = console.Progress(label, len(self._paths) if isinstance(self._paths, list) else None)
        self._annotate_in = annotate_in
        if annotate_in is not None:
            with _writing(annotate_in):
                annotate_in.mkdir(parents=True, exist_ok=True)
        self._taken = {path.resolve() for path in self._paths} if isinstance(self._paths, list) else set()
        self._notices: set[str] = set()
        self._failed = 0

    def shown(self, batch_size: int) -> Iterator[list[Shown]]:
        """Read and encode the pictures, up to batch_size together. Those that cannot be used are reported."""
        waiting: list[tuple[Path, Picture]] = []
        for path in self._paths:
            try:
                waiting.append((path, read_picture(path)))
            except (InputError, OSError) as problem:
                self._failure(path, problem)
            if len(waiting) == batch_size:
                yield self._encoded(waiting)
                waiting = []
        yield self._encoded(waiting)

    def _encoded(self, pictures: list[tuple[Path, Picture]]) -> list[Shown]:
        try:
            seen = self.model.encode_batch([picture for _, picture in pictures], batch_size=len(pictures) or 1)
            return [Shown(*each, one) for each, one in zip(pictures, seen, strict=True)]
        except InputError as problem:  # one that can be read but not be used: find out which
            if len(pictures) > 1:
                return [shown for each in pictures for shown in self._encoded([each])]
            self._failure(pictures[0][0], problem)
            return []

    def line(self, shown: Shown, value: Mapping[str, Any], text: str) -> None:
        """Show a result on stdout: `value` as JSON, or `text`; its notices go to stderr, each once."""
        if self.as_json:
            self.progress.print(console.json_line({"path": str(shown.path), **value}))
            return
        self.progress.print(console.printable(f"{shown.path}: {text}"))
        for notice in value.get("notices", ()):
            if notice not in self._notices:
                self._notices.add(notice)
                self.progress.clear()
                console.note(f"note: {notice}")

    def finish(self, shown: Shown, annotation: Sequence[str]) -> None:
        """Done with a picture; `annotation` are the lines for its annotated copy."""
        if self._annotate_in is not None:
            target = self._free_name(self._annotate_in, shown.path)
            with _writing(target):
                write_picture(target, annotate(shown.picture.rgb(), annotation))
        self.progress.advance()

    def exit_code(self) -> int:
        """0, or 2 after a note if pictures failed."""
        if self._failed:
            console.note(f"{self._failed} of {self.progress.done} pictures could not be used")
        return console.EXIT_USAGE if self._failed else 0

    def _failure(self, path: Path, problem: Exception) -> None:
        self._failed += 1
        message = console.error_line(problem)
        self.progress.clear()
        console.note(f"error: {message}")
        if self.as_json:
            self.progress.print(console.json_line({"path": str(path), "error": message}))
        self.progress.advance()

    def _free_name(self, folder: Path, path: Path) -> Path:
        """The annotated copy's file; pictures of the same name from different folders get -2, -3, ..., and so does a
        copy that would take the place of a picture that was given."""
        number = 1
        self._taken.add(path.resolve())
        while (target := folder / f"{path.stem}{f'-{number}' if number > 1 else ''}.png").resolve() in self._taken:
            number += 1
        self._taken.add(target.resolve())
        return target

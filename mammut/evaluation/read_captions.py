"""Captions in the forms in which they were published: COCO, Karpathy's splits, Flickr30K; and of clips (read_clips.py).

    COCO captions       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy's splits   {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}], "dataset"}
    Flickr30K           results_20130124.token ("1000.jpg#0<TAB>caption"), or results.csv
                        ("image_name| comment_number| comment"), or captions.txt ("image,caption")

Pictures are looked for in the folder given, by the path the file names, by its last part, and in the sub-folder that
Karpathy's file names.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mammut.evaluation.examples import EvalSet, Example, PictureRef, Problems
from mammut_runtime.errors import InputError

MAX_FILE_BYTES = 4 * 2**30


def read_captions(path: Path, pictures: Path, split: str | None, problems: Problems) -> EvalSet:
    """A captions file of any of the forms above, with the pictures in a folder.

    split: of Karpathy's file or MSRVTT's; None takes "test". Other forms have none (InputError).
    Raises InputError: not such a file, a record of another form (named), ids or pictures that are missing.
    """
    if not pictures.is_dir():
        raise InputError(f"{pictures}: expected the folder with the pictures of {path.name}, there is none")
    if path.suffix.lower() == ".json":
        row = read_json(path)
        if isinstance(row, dict) and "videos" in row:
            return _of_clips(path, row, pictures, split, problems)
        images = json_field(row, "images", list, str(path))
        karpathy = bool(images) and isinstance(images[0], dict) and "sentences" in images[0]
        known = _karpathy(images, split or "test", path) if karpathy else _coco(row, images, path)
    elif _begins_as_msvd(path):
        return _of_clips(path, None, pictures, split, problems)
    else:
        karpathy, known = False, _flickr30k(path)
    if split is not None and not karpathy:
        raise InputError(f"{path}: --split {split}: only Karpathy's files and tars have splits; leave it out")
    examples, missing = [], []
    for name, captions in known.items():
        found = find_picture(pictures, name)
        if found is None:
            missing.append(name)
        else:
            examples.append(Example(PictureRef(name, found), captions))
    problems.report(missing, len(known), f"{pictures}: pictures of {path.name}")
    if not examples:
        raise InputError(f"{path}: no captions with a picture in {pictures}; expected at least one")
    return EvalSet.of(path.name, examples)


def _of_clips(path: Path, row: Any, clips: Path, split: str | None, problems: Problems) -> EvalSet:
    """MSRVTT (its JSON is given) or MSVD."""
    from mammut.evaluation import read_clips, read_questions  # which need what is above and below

    if row is None and split is not None:
        raise InputError(f"{path}: --split {split}: MSVD's captions have no splits; leave it out")
    known = read_clips.read_msrvtt(path, row, split or "test") if row is not None else read_clips.read_msvd(path)
    found = read_clips.find_clips(list(known), read_questions.clip_names(path, clips), clips)
    missing = [name for name, place in found.items() if place is None]
    problems.report(missing, len(known), f"{clips}: clips of {path.name}")
    examples = [Example(PictureRef(name, place), known[name]) for name, place in found.items() if place is not None]
    if not examples:
        raise InputError(f"{path}: no captions with a clip in {clips}; expected at least one")
    return EvalSet.of(path.name, examples)


def _begins_as_msvd(path: Path) -> bool:
    from mammut.evaluation.read_clips import is_msvd

    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return is_msvd(file.readline(4096))
    except OSError:
        return False  # said by who reads it


def find_picture(folder: Path, name: str) -> Path | None:
    """The picture a file calls `name`, inside the folder: never outside of it, whatever the file says."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or parts[0] == "/":
        return None
    for candidate in (folder.joinpath(*parts), folder / parts[-1]):
        with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be entered
            if candidate.is_file():
                return candidate
    return None


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected a data set's annotations")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: more than {MAX_FILE_BYTES:,} bytes; expected a data set's annotations")
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path}: not JSON, or cut off: {problem}") from problem


def json_field(row: Any, key: str, kind: type, where: str) -> Any:
    """row[key] if it is there and of that type; InputError names the record and the field."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with {key!r}, got {str(row)[:60]!r}")
    if key not in row:
        raise InputError(f"{where}: no field {key!r}; it has {', '.join(sorted(map(str, row))[:8]) or 'nothing'}")
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise InputError(f"{where}: {key}: expected {_NAMES[kind]}, got {str(row[key])[:60]!r}")
    return row[key]


_NAMES: dict[type, str] = {list: "a list", str: "a text", int: "a whole number", dict: "an object"}


def _coco(row: Any, images: list[Any], path: Path) -> dict[str, tuple[str, ...]]:
    names: dict[int, str] = {}
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        names[json_field(image, "id", int, where)] = json_field(image, "file_name", str, where)
    captions: dict[str, list[str]] = {name: [] for name in names.values()}
    for number, note in enumerate(json_field(row, "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        image_id = json_field(note, "image_id", int, where)
        if image_id not in names:
            raise InputError(f"{where}: image_id {image_id} is not among the images; the file is damaged or mixed up")
        captions[names[image_id]].append(_caption(json_field(note, "caption", str, where), where))
    without = [name for name, texts in captions.items() if not texts]
    if without:
        raise InputError(f"{path}: {len(without)} pictures without a caption, such as {without[0]}; expected 1 or more")
    return {name: tuple(texts) for name, texts in captions.items()}


def _karpathy(images: list[Any], split: str, path: Path) -> dict[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {}
    splits = set()
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        splits.add(json_field(image, "split", str, where))
        if image["split"] != split:
            continue
        name = json_field(image, "filename", str, where)
        folder = image.get("filepath")
        sentences = json_field(image, "sentences", list, where)
        texts = tuple(_caption(json_field(each, "raw", str, f"{where}: sentences[{at}]"), where)
                      for at, each in enumerate(sentences))  # fmt: skip
        if not texts:
            raise InputError(f"{where}: sentences: expected 1 or more, got none")
        known[f"{folder}/{name}" if isinstance(folder, str) and folder else name] = texts
    if not known:
        raise InputError(f"{path}: no pictures of split {split!r}; it has {', '.join(sorted(splits)) or 'none'}")
    return known


def _flickr30k(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = list(_flickr_rows(file, first, path))
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: cannot be read as captions ({problem})") from problem
    known: dict[str, list[str]] = {}
    for number, (name, caption) in rows:
        known.setdefault(name, []).append(_caption(caption, f"{path}:{number}"))
    if not known:
        raise InputError(f"{path}: no captions; expected COCO's, Karpathy's or Flickr30K's form")
    return {name: tuple(texts) for name, texts in known.items()}


def _flickr_rows(lines: Iterable[str], first: str, path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number, (picture, caption))."""
    comma = first.strip().lower() == "image,caption"
    bars = first.lower().startswith("image_name|")
    split_rows: Iterable[list[str]]
    if comma:
        split_rows = csv.reader(lines)
    else:
        split_rows = (line.rstrip("\r\n").split("|" if bars else "\t", 2 if bars else 1) for line in lines)
    for number, cells in enumerate(split_rows, 1):
        if (number == 1 and (comma or bars)) or not any(cell.strip() for cell in cells):
            continue
        if bars and len(cells) == 2 and " 4   " in cells[1]:  # one line of the published file lacks its second bar
            cells = [cells[0], *cells[1].split(" 4   ", 1)]
        if len(cells) != (3 if bars else 2):
            expected = "picture| number| caption" if bars else "picture,caption" if comma else "picture#N<TAB>caption"
            raise InputError(f"{path}:{number}: expected {expected}, got {' '.join(cells)[:60]!r}")
        yield number, (cells[0].partition("#")[0].strip(), cells[-1])


def _caption(text: str, where: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: an empty caption; expected words")
    return text.strip()

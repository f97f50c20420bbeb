"""Pictures with notes that no data set file lists: WebDataset tars, and folders with one folder for each class."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mammut.evaluation.examples import PICTURE_SUFFIXES, EvalSet, Example, PictureRef, Problems, Question
from mammut_runtime.errors import InputError

MAX_NOTE_BYTES = 16 * 2**20


def read_places(places: Sequence[Path], problems: Problems) -> EvalSet:
    """WebDataset tars (KEY.jpg beside KEY.json or KEY.txt), and folders: of tars, or with a folder for each class.

    Raises InputError for a place that is not there or is of another kind; while iterating, for notes that are wrong.
    """
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder; expected a WebDataset tar or a folder")
        if place.is_file() and place.suffix.lower() != ".tar":
            raise InputError(
                f"{place}: expected a WebDataset tar (.tar) or a folder; a compressed tar: unpack it first"
            )

    def stream() -> Iterator[Example]:
        for place in places:
            tars = sorted(place.glob("*.tar")) if place.is_dir() else [place]
            for tar in tars:
                yield from _in_tar(tar, problems)
            if not tars:
                yield from _in_class_folders(place)

    return EvalSet(", ".join(place.name for place in places), stream)


def _in_class_folders(folder: Path) -> Iterator[Example]:
    """Pictures below FOLDER/CLASS/; the class is the first folder's name."""
    found = False
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        inside = Path(root).relative_to(folder).parts
        for name in sorted(files):
            if inside and name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."):
                found = True
                path = Path(root, name)
                yield Example(PictureRef(path.relative_to(folder).as_posix(), path), label=inside[0])
    if not found:
        raise InputError(f"{folder}: no pictures; expected tars, or a folder for each class with pictures in it")


def _in_tar(path: Path, problems: Problems) -> Iterator[Example]:
    """Examples in their order. Members of one name up to its first dot stand together, as WebDataset has them."""
    try:
        with tarfile.open(path, "r:") as tar:
            key, parts = "", dict[str, tuple[int, int]]()
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member; a set may be large
                base = PurePosixPath(member.name)
                if not member.isreg() or base.name.startswith(".") or member.issparse():
                    continue
                stem, _, suffix = base.name.partition(".")
                if str(base.with_name(stem)) != key:
                    yield from _sample(path, key, parts, problems)
                    key, parts = str(base.with_name(stem)), {}
                parts[f".{suffix.lower()}"] = (member.offset_data, member.size)
            yield from _sample(path, key, parts, problems)
            # tarfile takes the end of a file between two members for the end of the tar
            if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                problems.report([f"{path}: ends without a tar's end mark, so its last part may be missing"])
    except (tarfile.TarError, EOFError, OSError) as problem:
        raise InputError(f"{path}: cannot be read as a tar: {problem}; expected a whole WebDataset tar") from problem


def _sample(path: Path, key: str, parts: Mapping[str, tuple[int, int]], problems: Problems) -> Iterator[Example]:
    if not parts:
        return
    name = f"{path.name}: {key}"
    picture = next((parts[suffix] for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    if picture is None:
        problems.report([f"{name}: no picture beside {', '.join(sorted(parts))}"])
        return
    ref = PictureRef(name, path, *picture)
    if ".json" in parts:
        yield _from_json(ref, _note(path, parts[".json"], name))
    elif ".txt" in parts:
        caption = _note(path, parts[".txt"], name).decode("utf-8", "replace").strip()
        yield Example(ref, captions=(caption,) if caption else ())
    else:
        yield Example(ref)


def _note(path: Path, place: tuple[int, int], name: str) -> bytes:
    offset, size = place
    if size > MAX_NOTE_BYTES:
        raise InputError(f"{name}: notes of {size:,} bytes, expected at most {MAX_NOTE_BYTES:,}")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _from_json(ref: PictureRef, data: bytes) -> Example:
    """Keys: caption or captions, label, split, question with answer, questions as [question, answer]."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{ref.name}: its json is not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise InputError(f"{ref.name}: its json: expected an object, got {str(row)[:60]!r}")
    asked = _list(row, "questions", ref.name)
    if "question" in row:
        asked = [*asked, [row["question"], row.get("answer")]]
    questions = []
    for each in asked:
        if not (isinstance(each, list) and len(each) == 2 and all(isinstance(part, str) for part in each)):
            raise InputError(f"{ref.name}: questions: expected [question, answer], got {str(each)[:60]}")
        questions.append(Question(each[0], (each[1],)))
    captions = _list(row, "captions", ref.name) or ([row["caption"]] if "caption" in row else [])
    for key, value in [("captions", each) for each in captions] + [(key, row.get(key)) for key in ("label", "split")]:
        if not (isinstance(value, str) and value.strip()) and (value is not None or key == "captions"):
            raise InputError(f"{ref.name}: {key}: expected a text, got {str(value)[:60]!r}")
    return Example(ref, tuple(captions), row.get("label"), row.get("split"), tuple(questions))


def _list(row: dict[str, Any], key: str, name: str) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list):
        raise InputError(f"{name}: {key}: expected a list, got {str(value)[:60]}")
    return value

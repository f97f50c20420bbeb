"""Published sets of clips as training rows: MSRVTT and MSVD with captions, MSRVTT-QA and MSVD-QA with questions.

The forms are those that evaluation reads (read_clips.py, read_questions.py). The sets' own splits are files of their
own (questions), a field (MSRVTT) or lists of names that others made (MSVD).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mammut.evaluation.examples import CLIP_SUFFIXES, EvalSet, Problems
from mammut.evaluation.read_captions import read_json
from mammut.evaluation.read_clips import find_clips, read_msrvtt, read_msvd
from mammut.evaluation.read_questions import clip_names, read_questions
from mammut_runtime.errors import InputError

PublishedSet = Literal["msrvtt", "msvd", "questions"]
Row = dict[str, Any]
"""{"clip": path relative to the folder, "captions" or "questions"}: a line of a source of clips."""


def published_rows(
    kind: PublishedSet,
    path: Path,
    clips: Path,
    problems: Problems,
    *,
    split: str | None = None,
    names: Path | None = None,
) -> list[Row]:
    """Training rows of a published file, one for each clip.

    Args:
        kind: questions: MSRVTT-QA or MSVD-QA.
        clips: the folder with the clips.
        problems: gets clips that are missing.
        split: MSRVTT: only the clips of this split.
        names: a text file with one clip's name a line: only these.

    Raises:
        InputError: another form (file, record and field are named), no clip left, or missing clips.
    """
    if not clips.is_dir():
        raise InputError(f"{clips}: expected the folder with the clips of {path.name}, there is none")
    if split is not None and kind != "msrvtt":
        raise InputError(f"--split {split}: only MSRVTT's file has splits; give --names, or the file of that split")
    wanted = None if names is None else _names(names)
    if kind == "questions":
        return _asked(read_questions([path], clips, problems), path, clips, wanted)
    known = read_msrvtt(path, read_json(path), split) if kind == "msrvtt" else read_msvd(path)
    if wanted is not None:
        known = {name: texts for name, texts in known.items() if name in wanted}
    found = find_clips(list(known), clip_names(path, clips), clips)
    missing = [name for name, file in found.items() if file is None]
    rows: list[Row] = [
        {"clip": file.relative_to(clips).as_posix(), "captions": list(known[name])}
        for name, file in found.items()
        if file is not None
    ]
    problems.report(missing, len(known), f"{clips}: clips of {path.name}")
    return _some(rows, path)


def write_rows(rows: Sequence[Row], clips: Path, out: Path) -> None:
    """A JSON Lines file for a source of kind "clip". Its rows name clips below the file's own folder.

    Raises:
        InputError: `out` is not in the folder of the clips or one above it, or cannot be written.
    """
    try:
        inside = clips.resolve().relative_to(out.resolve().parent)
    except ValueError as error:
        raise InputError(
            f"{out}: must lie in {clips} or a folder above it: a list names only clips below itself"
        ) from error
    lines = [json.dumps(row | {"clip": (inside / row["clip"]).as_posix()}, ensure_ascii=False) for row in rows]
    try:
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error


def _asked(found: EvalSet, path: Path, clips: Path, wanted: frozenset[str] | None) -> list[Row]:
    rows = []
    for example in found:
        file = example.picture.path
        if not example.picture.is_clip:
            raise InputError(
                f"{path}: asks about pictures, such as {example.picture.name}; expected MSRVTT-QA or MSVD-QA"
            )
        if wanted is None or example.picture.name in wanted or file.stem in wanted:
            questions = [[each.text, each.answers[0]] for each in example.questions]
            rows.append({"clip": file.relative_to(clips).as_posix(), "questions": questions})
    return _some(rows, path)


def _names(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--names: expected a text file with one name a line, got {str(path)!r}") from error
    # Lists of others name files or clips.
    return frozenset(name.removesuffix(Path(name).suffix) if Path(name).suffix in CLIP_SUFFIXES else name
                     for line in lines if (name := line.strip()))  # fmt: skip


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise InputError(f"{path}: no clips are left; expected at least one")
    return rows

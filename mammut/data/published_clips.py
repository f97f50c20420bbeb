"""Published sets of clips as training rows: MSRVTT and MSVD with captions, MSRVTT-QA and MSVD-QA with questions.

    MSRVTT      {"videos": [{"video_id": "video7010", "split": "train"}], "sentences": [{"video_id", "caption"}]}
    MSVD        AllVideoDescriptions.txt, "NAME caption" a line ("#" begins a remark); or the corpus as a table,
                "VideoID,Start,End,...,Language,Description", whose clips are called VideoID_Start_End
    *-QA        as mammut/evaluation/read_questions.py says

Clips are looked for in a folder by these names, in any of the usual containers; those of MSVD also as vid1.avi where a
youtube_mapping.txt lies beside the captions or the clips. The sets' own splits are files of their own (questions), a
field (MSRVTT) or lists of names that others made (MSVD).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mammut.evaluation.examples import CLIP_SUFFIXES, EvalSet, Problems
from mammut.evaluation.read_captions import find_picture, json_field, read_json
from mammut.evaluation.read_questions import clip_names, read_questions
from mammut_runtime.errors import InputError

PublishedSet = Literal["msrvtt", "msvd", "questions"]
Row = dict[str, Any]
"""{"clip": path relative to the folder, "captions" or "questions"}: a line of a source of clips."""
_TABLE = ("VideoID", "Start", "End", "Language", "Description")


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
    known = _msrvtt(path, split) if kind == "msrvtt" else _msvd(path)
    if wanted is not None:
        known = {name: texts for name, texts in known.items() if name in wanted}
    called = {f"{name}": f"vid{number}" for number, name in clip_names(path, clips).items()}
    rows, missing = [], []
    for name, captions in known.items():
        stems = (name, *([called[name]] if name in called else []))
        files = (find_picture(clips, stem + suffix) for stem in stems for suffix in CLIP_SUFFIXES)
        file = next((each for each in files if each), None)
        if file is None:
            missing.append(name)
        else:
            rows.append({"clip": file.relative_to(clips).as_posix(), "captions": captions})
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


def _msrvtt(path: Path, split: str | None) -> dict[str, list[str]]:
    whole = read_json(path)
    splits: dict[str, str] = {}
    for number, video in enumerate(json_field(whole, "videos", list, str(path))):
        where = f"{path}: videos[{number}]"
        splits[json_field(video, "video_id", str, where)] = json_field(video, "split", str, where)
    if split is not None and split not in splits.values():
        raise InputError(f"{path}: no split {split!r}; it has {', '.join(sorted(set(splits.values()))) or 'none'}")
    captions: dict[str, list[str]] = {name: [] for name, own in splits.items() if split in (None, own)}
    for number, sentence in enumerate(json_field(whole, "sentences", list, str(path))):
        where = f"{path}: sentences[{number}]"
        name, text = json_field(sentence, "video_id", str, where), json_field(sentence, "caption", str, where)
        if name not in splits:
            raise InputError(f"{where}: video_id {name!r} is not among the videos; the file is damaged or mixed up")
        if name in captions:
            captions[name].append(_caption(text, where))
    without = [name for name, texts in captions.items() if not texts]
    if without:
        raise InputError(f"{path}: {len(without)} clips without a caption, such as {without[0]}; expected 1 or more")
    return captions


def _msvd(path: Path) -> dict[str, list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as MSVD's captions ({error})") from error
    table = bool(lines) and lines[0].startswith("VideoID,")
    captions: dict[str, list[str]] = {}
    for number, name, text in _msvd_table(lines, path) if table else _msvd_lines(lines, path):
        captions.setdefault(name, []).append(_caption(text, f"{path}:{number}"))
    if not captions:
        raise InputError(f"{path}: no captions; expected MSVD's AllVideoDescriptions.txt or its table")
    return captions


def _msvd_lines(lines: Sequence[str], path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, space, text = line.strip().partition(" ")
            if not space:
                raise InputError(f'{path}:{number}: expected "NAME caption", got {line.strip()[:60]!r}')
            yield number, name, text


def _msvd_table(lines: Sequence[str], path: Path) -> Iterator[tuple[int, str, str]]:
    """English captions. Some of the table's descriptions are empty: people gave none."""
    reader = csv.DictReader(lines)
    if lacking := [column for column in _TABLE if column not in (reader.fieldnames or ())]:
        raise InputError(f"{path}: no column {lacking[0]!r}; it has {', '.join(reader.fieldnames or ())[:120]}")
    for row in reader:
        if any(row[column] is None for column in _TABLE):
            raise InputError(f"{path}:{reader.line_num}: too few columns; expected {len(reader.fieldnames or ())}")
        if row["Language"] == "English" and row["Description"].strip():
            yield reader.line_num, f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]


def _caption(text: str, where: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: caption: expected a text, got none")
    return text.strip()


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

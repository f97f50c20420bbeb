"""Captions of clips in the forms in which they were published: MSRVTT and MSVD.

    MSRVTT      {"videos": [{"video_id": "video7010", "split": "train"}], "sentences": [{"video_id", "caption"}]}
    MSVD        AllVideoDescriptions.txt, "NAME caption" a line ("#" begins a remark); or the corpus as a table,
                "VideoID,Start,End,...,Language,Description", whose clips are called VideoID_Start_End

Clips are looked for in a folder by these names, in any of the usual containers; those of MSVD also as vid1.avi where a
youtube_mapping.txt lies beside the captions or the clips.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mammut.evaluation.examples import CLIP_SUFFIXES
from mammut.evaluation.read_captions import find_picture, json_field
from mammut_runtime.errors import InputError

_TABLE = ("VideoID", "Start", "End", "Language", "Description")


def is_msvd(first_line: str) -> bool:
    """Whether a text file that begins so is one of MSVD's."""
    return first_line.startswith(("VideoID,", "# ")) or bool(re.match(r"\S+_\d+_\d+ ", first_line))


def find_clips(names: Sequence[str], called: dict[int, str], clips: Path) -> dict[str, Path | None]:
    """Where each clip is, if it is there. called: MSVD's names by the number in vidN."""
    numbers = {name: number for number, name in called.items()}
    found = {}
    for name in names:
        stems = (name, *([f"vid{numbers[name]}"] if name in numbers else []))
        files = (find_picture(clips, stem + suffix) for stem in stems for suffix in CLIP_SUFFIXES)
        found[name] = next((each for each in files if each), None)
    return found


def read_msrvtt(path: Path, whole: Any, split: str | None) -> dict[str, tuple[str, ...]]:
    """Captions by clip of MSRVTT's JSON; split: only these clips. Raises InputError that names record and field."""
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
    return {name: tuple(texts) for name, texts in captions.items()}


def read_msvd(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by clip of either of MSVD's files. Raises InputError that names the line."""
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
    return {name: tuple(texts) for name, texts in captions.items()}


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

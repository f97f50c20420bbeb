"""Questions and answers in the forms in which they were published.

    VQAv2           {"questions": [{"question_id", "image_id", "question"}], "data_subtype"} and
                    {"annotations": [{"question_id", "answer_type", "answers": [{"answer"} x 10]}]}
                    pictures COCO_val2014_000000000042.jpg, or 000000000042.jpg
    MSRVTT-QA       [{"video_id": 7010, "question", "answer"}], clips video7010.mp4
    MSVD-QA         the same with clips vid1.avi; or the names that youtube_mapping.txt ("NAME vid1") gives them
    easy-VQA        [[question, answer, image_id]], pictures images/0.png

Clips stand for their middle frame: the models here look at one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mammut.evaluation.examples import CLIP_SUFFIXES, EvalSet, Example, PictureRef, Problems, Question
from mammut.evaluation.read_captions import find_picture, json_field, read_json
from mammut_runtime.errors import InputError

ANSWERS = 10
"""People who answered each question of VQAv2."""
MAPPING = "youtube_mapping.txt"


def read_questions(paths: Sequence[Path], pictures: Path, problems: Problems) -> EvalSet:
    """Questions about the pictures or clips of a folder, of any of the forms above. VQAv2 needs its two files.

    Raises InputError: another form (the record and field are named), questions without answers, missing pictures.
    """
    if not pictures.is_dir():
        raise InputError(f"{pictures}: expected the folder with the pictures or clips, there is none")
    rows = [(path, read_json(path)) for path in paths]
    if any(isinstance(row, dict) for _, row in rows):
        asked = _vqa(rows, pictures, problems)
    elif len(rows) == 1 and isinstance(rows[0][1], list) and rows[0][1]:
        path, row = rows[0]
        asked = _easy(row, path, pictures) if isinstance(row[0], list) else _clips(row, path, pictures)
    else:
        raise InputError(f"{paths[0]}: expected one list of questions, or VQAv2's questions and annotations")
    missing = [name for name, (place, _) in asked.items() if place is None]
    found = [
        Example(PictureRef(name, place), questions=tuple(questions))
        for name, (place, questions) in asked.items()
        if place is not None
    ]
    problems.report(missing, len(asked), f"{pictures}: pictures or clips of {paths[0].name}")
    if not found:
        raise InputError(f"{paths[0]}: no question with a picture in {pictures}; expected at least one")
    return EvalSet.of(paths[0].name, found)


Asked = dict[str, tuple[Path | None, list[Question]]]
"""Name of the picture: where it is, if it is there, and what is asked about it."""


def _vqa(rows: Sequence[tuple[Path, Any]], pictures: Path, problems: Problems) -> Asked:
    questions = next(((path, row) for path, row in rows if isinstance(row, dict) and "questions" in row), None)
    answers = next(((path, row) for path, row in rows if isinstance(row, dict) and "annotations" in row), None)
    if len(rows) != 2 or questions is None or answers is None:
        raise InputError(
            f"{rows[0][0]}: VQAv2 comes in two files, one with 'questions', one with 'annotations'; give both with "
            f"--annotations, got {len(rows)}"
        )
    known = _vqa_answers(*answers)
    subtype = questions[1].get("data_subtype", "")
    asked: Asked = {}
    without = []
    listed = json_field(questions[1], "questions", list, str(questions[0]))
    for number, row in enumerate(listed):
        where = f"{questions[0]}: questions[{number}]"
        question_id, image_id = json_field(row, "question_id", int, where), json_field(row, "image_id", int, where)
        if question_id not in known:
            without.append(f"question_id {question_id}")
            continue
        kind, given = known.pop(question_id)
        names = [f"{image_id:012d}.jpg", *([f"COCO_{subtype}_{image_id:012d}.jpg"] if subtype else [])]
        path = next((found for name in reversed(names) if (found := find_picture(pictures, name))), None)
        if names[-1] not in asked:
            asked[names[-1]] = (path, [])
        asked[names[-1]][1].append(Question(json_field(row, "question", str, where), given, kind))
    problems.report(without, len(listed), f"{answers[0]}: answers")
    problems.report([f"question_id {each}" for each in known], None, f"{questions[0]}: questions that are answered")
    return asked


def _vqa_answers(path: Path, row: Any) -> dict[int, tuple[str, tuple[str, ...]]]:
    """question_id: (answer_type, answers)."""
    known = {}
    for number, note in enumerate(json_field(row, "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        answers = json_field(note, "answers", list, where)
        if len(answers) != ANSWERS:
            raise InputError(f"{where}: answers: expected {ANSWERS}, got {len(answers)}")
        texts = tuple(json_field(each, "answer", str, f"{where}: answers[{at}]") for at, each in enumerate(answers))
        known[json_field(note, "question_id", int, where)] = (str(note.get("answer_type", "")), texts)
    return known


def _clips(rows: list[Any], path: Path, folder: Path) -> Asked:
    mapping = clip_names(path, folder)
    asked: Asked = {}
    for number, row in enumerate(rows):
        where = f"{path}: record {number}"
        video_id = json_field(row, "video_id", int, where)
        question = Question(json_field(row, "question", str, where), (json_field(row, "answer", str, where),),
                            _first_word(row["question"]))  # fmt: skip
        name = f"video{video_id}"
        if name not in asked:
            stems = (name, f"vid{video_id}", *([mapping[video_id]] if video_id in mapping else []))
            files = (find_picture(folder, stem + suffix) for stem in stems for suffix in CLIP_SUFFIXES)
            asked[name] = (next((file for file in files if file), None), [])
        asked[name][1].append(question)
    return asked


def clip_names(path: Path, folder: Path) -> dict[int, str]:
    """MSVD's names of its clips by the number in vidN, from youtube_mapping.txt beside the annotations or the clips;
    empty without it. Raises InputError for a line of another form."""
    place = next((each for each in (path.parent / MAPPING, folder / MAPPING) if each.is_file()), None)
    if place is None:
        return {}
    found = {}
    for number, line in enumerate(place.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, video = line.strip().rpartition(" ")
        if line.strip():
            if not (name and video.startswith("vid") and video[3:].isdecimal()):
                raise InputError(f"{place}:{number}: expected NAME vidN, got {line[:60]!r}")
            found[int(video[3:])] = name
    return found


def _easy(rows: list[Any], path: Path, folder: Path) -> Asked:
    asked: Asked = {}
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[2], int)
                and all(isinstance(each, str) for each in row[:2])):  # fmt: skip
            raise InputError(f"{path}: record {number}: expected [question, answer, image id], got {str(row)[:60]}")
        name = f"{row[2]}.png"
        if name not in asked:
            asked[name] = (find_picture(folder, f"images/{name}") or find_picture(folder, name), [])
        kind = "yes/no" if row[1] in ("yes", "no") else "other"
        asked[name][1].append(Question(row[0], (row[1],), kind))
    return asked


def _first_word(question: str) -> str:
    """what, who, how, when, where: how results on these sets are broken down."""
    words = question.split()
    return words[0].lower() if words and words[0].lower() in ("what", "who", "how", "when", "where") else "other"

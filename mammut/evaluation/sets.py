"""From what a user names to a task with its data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mammut.detection.box_specs import EXPECTED, parse_box_spec
from mammut.evaluation.evaluate import Task
from mammut.evaluation.examples import EvalSet, Problems
from mammut.evaluation.predictor import Need
from mammut.evaluation.read_captions import read_captions, read_json
from mammut.evaluation.read_folders import read_places
from mammut.evaluation.read_questions import read_questions
from mammut.evaluation.task_caption import caption
from mammut.evaluation.task_classify import classify
from mammut.evaluation.task_detect import BoxData, detect
from mammut.evaluation.task_few_shot import few_shot
from mammut.evaluation.task_questions import questions
from mammut.evaluation.task_retrieval import retrieval
from mammut.evaluation.templates import IMAGENET_TEMPLATES
from mammut_runtime.errors import InputError
from mammut_runtime.text_tower import check_templates

NEEDS: dict[str, tuple[Need, ...]] = {
    "retrieval": ("pictures", "texts"),
    "classify": ("pictures", "texts"),
    "few-shot": ("pictures",),
    "caption": ("pictures", "words"),
    "vqa": ("pictures", "words"),
    "detect": ("boxes",),
}
TASKS = tuple(NEEDS)
ALL = "all"
"""A split's name that stands for every split."""


@dataclass(frozen=True)
class DataChoice:
    """Which data, as the user named it."""

    places: Sequence[Path]
    """Tars and folders."""
    annotations: Sequence[Path] = ()
    split: str | None = None
    train: Sequence[Path] = ()
    """Few-shot: what is learned from; empty: `places`."""
    train_split: str = "train"
    limit: int | None = None
    seed: int = 0
    boxes: str | None = None
    """Detection: FORM:FILE:FOLDER."""


def task_of(name: str, choice: DataChoice, problems: Problems) -> tuple[str, Task]:
    """The data's name, and the task bound to the data. Raises InputError for data that does not fit the task."""
    if name == "detect":
        return _boxed(choice, problems)
    if choice.boxes is not None:
        raise InputError(f"--boxes {choice.boxes}: only --task detect takes it; leave it out")
    if not choice.places:
        raise InputError(f"--images: {name} needs pictures; give tars or a folder")
    if name in ("classify", "few-shot"):
        return _labelled(name, choice, problems)
    data = _limited(_pairs(name, choice, problems), choice)
    if name == "vqa":
        return data.name, lambda predictor, options: questions(predictor, data, options)
    if name == "caption":
        return data.name, lambda predictor, options: caption(predictor, data, options)
    return data.name, lambda predictor, options: retrieval(predictor, data, options)


def _pairs(name: str, choice: DataChoice, problems: Problems) -> EvalSet:
    if not choice.annotations:
        return _of_split(read_places(choice.places, problems), choice.split)
    if len(choice.places) != 1:
        raise InputError(
            f"--images: expected one folder, with the pictures of the annotations, got {len(choice.places)}"
        )
    if name == "vqa":
        if choice.split:
            raise InputError(f"--split {choice.split}: files of questions have no splits; leave it out")
        return read_questions(choice.annotations, choice.places[0], problems)
    if len(choice.annotations) != 1:
        raise InputError(f"--annotations: expected one file of captions, got {len(choice.annotations)}")
    return read_captions(choice.annotations[0], choice.places[0], choice.split, problems)


def _boxed(choice: DataChoice, problems: Problems) -> tuple[str, Task]:
    if choice.boxes is None:
        raise InputError(f"--boxes: detect needs a file of boxes; expected {EXPECTED}")
    if choice.places or choice.annotations or choice.split:
        raise InputError("detect takes its data by --boxes; leave out --images, --annotations and --split")
    spec = parse_box_spec(choice.boxes)
    file = whole = spec.read()
    if spec.images is not None:
        file = file.found_in(spec.images, problems)
    if choice.limit is not None and choice.limit < len(file.pictures):
        chosen = sorted(random.Random(choice.seed).sample(range(len(file.pictures)), choice.limit))
        file = replace(file, pictures=tuple(file.pictures[place] for place in chosen))
    data = BoxData(file, whole, spec.images)
    return spec.file.name, lambda predictor, options: detect(predictor, data, options)


def _labelled(name: str, choice: DataChoice, problems: Problems) -> tuple[str, Task]:
    if choice.annotations:
        raise InputError(f"--annotations: {name} takes tars with labels or a folder for each class; leave it out")
    everything = read_places(choice.places, problems)
    splits = {example.split for example in everything if example.label is not None}
    named = sorted(split for split in splits if split is not None)
    if choice.split is None and len(splits) > 1:
        raise InputError(
            f"{everything.name}: has the splits {', '.join(named)}; say which to judge with --split, or --split {ALL}"
        )
    data = _limited(_of_split(everything, choice.split), choice)
    learned = read_places(choice.train, problems) if choice.train else everything
    labels = sorted({each.label for source in (everything, learned) for each in source if each.label is not None})
    if name == "classify":
        return data.name, lambda predictor, options: classify(predictor, data, options, labels)
    if not choice.train and choice.split in (None, choice.train_split, ALL):
        raise InputError("few-shot would be judged on what it learns from; give --split, or --train with other data")
    has_splits = any(example.split is not None for example in learned)
    trained = _of_split(learned, choice.train_split) if has_splits else learned
    return data.name, lambda predictor, options: few_shot(predictor, data, options, labels, trained)


def _of_split(data: EvalSet, split: str | None) -> EvalSet:
    if split is None or split == ALL:
        return data
    splits = {example.split for example in data}
    if split not in splits:
        known = ", ".join(sorted(each for each in splits if each is not None)) or "none"
        raise InputError(f"{data.name}: no split {split!r}; it has {known}")
    return EvalSet(f"{data.name} ({split})", data.where(lambda example: example.split == split).stream)


def _limited(data: EvalSet, choice: DataChoice) -> EvalSet:
    return data if choice.limit is None else data.drawn(choice.limit, choice.seed)


def read_templates(given: str) -> tuple[str, ...] | None:
    """ "imagenet", "model" (None: the model's own), or a file with one template a line. Raises InputError."""
    if given == "model":
        return None
    if given == "imagenet":
        return IMAGENET_TEMPLATES
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--templates: expected imagenet, model or a file of templates, got {given!r}") from problem
    return check_templates([line.strip() for line in text.splitlines() if line.strip()])


def read_novel(path: Path | None) -> frozenset[str] | None:
    """Names, one a line. Raises InputError."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--novel: expected a text file with one name a line, got {str(path)!r}") from problem
    names = frozenset(line.strip() for line in lines if line.strip())
    if not names:
        raise InputError(f"--novel: {path}: no names; expected one a line")
    return names


def read_names(path: Path | None) -> dict[str, str]:
    """Label to the name in prompts, from a JSON object. Raises InputError."""
    if path is None:
        return {}
    row = read_json(path)
    if not isinstance(row, dict) or not all(isinstance(name, str) and name.strip() for name in row.values()):
        raise InputError(f'{path}: expected a JSON object {{"label": "name"}}, got {str(row)[:60]}')
    return {str(label): name for label, name in row.items()}

"""Questions about pictures, answered freely: VQAv2's accuracy where ten people answered, exact match elsewhere."""

from __future__ import annotations

import numpy as np

from mammut.evaluation.bootstrap import mean_of
from mammut.evaluation.examples import EvalSet, Example, Question
from mammut.evaluation.outcome import Measure, Outcome, Shown, TaskOptions, clip_notes, picture_batches
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.vqa_accuracy import exact_match, vqa_accuracy
from mammut_runtime.errors import InputError

_SHOWN_ANSWERS = 10


def questions(predictor: Predictor, data: EvalSet, options: TaskOptions) -> Outcome:
    """Accuracy over all questions and for each kind. Raises InputError for a set without questions."""
    asked: list[tuple[Example, Question, str, float]] = []
    group: list[int] = []
    pictures = 0
    clips = 0
    for examples, images in picture_batches(data.where(lambda each: bool(each.questions)), options, predictor.frames):
        given = predictor.answer(images, [[each.text for each in example.questions] for example in examples])
        for example, answers in zip(examples, given, strict=True):
            for question, answer in zip(example.questions, answers, strict=True):
                asked.append((example, question, answer, _score(answer, question)))
                group.append(pictures)
            pictures += 1
            clips += example.picture.is_clip
    if not asked:
        raise InputError(f"{data.name}: no picture with a question; expected at least one")
    scores = np.array([score for *_, score in asked])
    kinds = np.array([question.kind for _, question, _, _ in asked])
    official = all(len(question.answers) > 1 for _, question, _, _ in asked)
    name = "VQA accuracy" if official else "exact match"
    groups = np.array(group, np.int64)
    measures = [Measure(name, mean_of(scores), len(asked), groups, main=True)]
    for kind in sorted(set(kinds.tolist()) - {""}):
        of_kind = kinds == kind
        title = f"{name}, {kind} ({int(of_kind.sum()):,})"
        measures.append(Measure(title, mean_of(scores, of_kind), len(asked), groups))

    def show(index: int) -> Shown:
        example, question, answer, score = asked[index]
        return Shown(example.picture, question.text, question.answers[:_SHOWN_ANSWERS], (answer,), score)

    facts = {"pictures": pictures, "questions": len(asked)}
    return Outcome(tuple(measures), scores, show, facts, clip_notes(clips, predictor.frames))


def _score(answer: str, question: Question) -> float:
    if len(question.answers) > 1:
        return vqa_accuracy(answer, question.answers)
    return exact_match(answer, question.answers[0])

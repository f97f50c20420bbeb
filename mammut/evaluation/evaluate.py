"""One task for one or two models: figures with intervals, differences, corruptions, and items to look at."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mammut.evaluation.bootstrap import F64, Bootstrap, Statistic, point
from mammut.evaluation.corruptions import SEVERITIES
from mammut.evaluation.outcome import Measure, Outcome, Shown, TaskOptions
from mammut.evaluation.predictor import F32, CorruptedPredictor, Predictor
from mammut_runtime.errors import InputError

Task = Callable[[Predictor, TaskOptions], Outcome]
EXHIBITS = 12
"""Hits, and as many misses, on the page; drawn by seed."""


@dataclass(frozen=True)
class Value:
    """A figure and the interval it may lie in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One figure of each model."""

    name: str
    values: tuple[Value, ...]
    difference: Value | None
    """Second model less first, on the same resamples; None for one model."""
    chance: float | None
    percent: bool
    main: bool


@dataclass(frozen=True)
class Condition:
    """The figures under one corruption."""

    kind: str
    severity: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Exhibit:
    """One item with what each model made of it."""

    hit: bool
    """Of the first model."""
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Report:
    """All there is to say about a run."""

    task: str
    data: str
    models: tuple[str, ...]
    model_facts: tuple[dict[str, str], ...]
    facts: dict[str, int]
    figures: tuple[Figure, ...]
    conditions: tuple[Condition, ...]
    exhibits: tuple[Exhibit, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    settings: dict[str, str]
    seconds: tuple[float, ...]
    """Of each model, for the uncorrupted pictures."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how sure to be."""

    name: str
    data: str
    task: Task
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    corruptions: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def evaluate(evaluation: Evaluation, predictors: Sequence[Predictor], options: TaskOptions) -> Report:
    """Run the task. Raises InputError for data that cannot be used, and what the models raise."""
    outcomes, seconds = [], []
    for index, predictor in enumerate(predictors):
        started = time.monotonic()
        outcomes.append(_run(evaluation.task, predictor, options, f"model{index}"))
        seconds.append(time.monotonic() - started)
    if len({len(outcome.scores) for outcome in outcomes}) > 1:
        raise InputError(f"{evaluation.data}: the two models could use different pictures; leave out the unusable ones")
    figures = _figures(outcomes, evaluation.bootstrap)
    return Report(
        task=evaluation.name,
        data=evaluation.data,
        models=tuple(predictor.name for predictor in predictors),
        model_facts=tuple(predictor.facts for predictor in predictors),
        facts=outcomes[0].facts,
        figures=figures,
        conditions=_conditions(evaluation, predictors, options),
        exhibits=_exhibits(outcomes, options.seed),
        notes=outcomes[0].notes,
        missing=tuple(options.problems.missing),
        settings=evaluation.settings,
        seconds=tuple(round(each, 1) for each in seconds),
    )


def _run(task: Task, predictor: Predictor, options: TaskOptions, folder: str) -> Outcome:
    workspace = options.workspace / folder
    workspace.mkdir(parents=True)
    return task(predictor, replace(options, workspace=workspace))


def _figures(outcomes: Sequence[Outcome], bootstrap: Bootstrap) -> tuple[Figure, ...]:
    found = []
    for measures in zip(*(outcome.measures for outcome in outcomes), strict=True):
        values = tuple(_value(each.statistic, each, bootstrap) for each in measures)
        difference = _value(_less(*measures), measures[0], bootstrap) if len(measures) == 2 else None
        first = measures[0]
        found.append(Figure(first.name, values, difference, first.chance, first.percent, first.main))
    return tuple(found)


def _value(statistic: Statistic, measure: Measure, bootstrap: Bootstrap) -> Value:
    if not measure.resampled:
        return Value(point(statistic, measure.items), float("nan"), float("nan"))
    interval = bootstrap.interval(statistic, measure.items, measure.groups)
    return Value(point(statistic, measure.items), interval.low, interval.high)


def _less(first: Measure, second: Measure) -> Statistic:
    def statistic(weights: F64) -> F64:
        found: F64 = second.statistic(weights) - first.statistic(weights)
        return found

    return statistic


def _conditions(evaluation: Evaluation, predictors: Sequence[Predictor], options: TaskOptions) -> tuple[Condition, ...]:
    """Each corruption at each severity; severity 0 (only shrunk) once, as "none"."""
    if not evaluation.corruptions:
        return ()
    remembered: list[dict[str, F32]] = [{} for _ in predictors]
    wanted: Iterable[tuple[str, int]] = [(kind, severity) for kind in evaluation.corruptions for severity in SEVERITIES]
    found = []
    for kind, severity in [(evaluation.corruptions[0], 0), *wanted]:
        outcomes = []
        for index, (predictor, texts) in enumerate(zip(predictors, remembered, strict=True)):
            worse = CorruptedPredictor(predictor, kind, severity, texts)
            outcomes.append(_run(evaluation.task, worse, options, f"{kind}-{severity}-{index}"))
        figures = _figures(outcomes, evaluation.bootstrap)
        for index in range(len(predictors)):  # nothing of these is shown, and sets may be large
            shutil.rmtree(options.workspace / f"{kind}-{severity}-{index}")
        found.append(Condition("none" if severity == 0 else kind, severity, figures))
    return tuple(found)


def _exhibits(outcomes: Sequence[Outcome], seed: int) -> tuple[Exhibit, ...]:
    """Hits and misses of the first model, drawn by chance, in the set's order."""
    generator = random.Random(seed)
    hit = outcomes[0].scores > 0.5
    found = []
    for wanted in (True, False):
        places = np.flatnonzero(hit == wanted)
        chosen = generator.sample(range(len(places)), min(EXHIBITS, len(places)))
        for place in sorted(chosen):
            shown = tuple(outcome.show(int(places[place])) for outcome in outcomes)
            found.append(Exhibit(wanted, shown))
    return tuple(found)

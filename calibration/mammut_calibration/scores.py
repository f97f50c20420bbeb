"""Gathers the best scores of each name, in footage without the things and in pictures of them, and calibrates names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.alarms import AlarmLimit, Chosen, Footage, choose_threshold, footage, recounted
from mammut_calibration.platt import FLATTEST, LEAST_PICTURES, STEEPEST, Fit, fit
from mammut_runtime.detection.clips import next_due_s
from mammut_runtime.detection.commands import sources_of
from mammut_runtime.detection.detector import Square
from mammut_runtime.detection.vocabulary import UNCALIBRATED, Calibration, Entry, Vocabulary, name_key
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.pictures import read_picture
from mammut_runtime.video.decode import CLIP_SUFFIXES, Clip

Scores = NDArray[np.float32]
Note = Callable[[str], None]
T = TypeVar("T")

_TOGETHER = 8
"""Pictures computed together."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What was looked at."""

    scores: Scores
    """float32[L, names], the best uncalibrated score in each frame."""
    clips: tuple[tuple[float, ...], ...]
    """Times of the frames of each clip, seconds; a picture is a clip of one. Together L."""


@dataclass(frozen=True)
class NameResult:
    """What was found out about one name."""

    name: str
    chosen: Chosen
    fit: Fit | None
    """None without pictures of the thing, or where their scores cannot be fitted."""
    calibration: Calibration
    """What the vocabulary gets; its threshold is a probability where there is a fit."""
    positives: int
    """Pictures of the thing."""
    found: float | None
    """Share of them that the threshold lets pass; None without any."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "threshold": self.calibration.threshold,
            "temperature": self.calibration.temperature,
            "bias": self.calibration.bias,
            "score_threshold": self.chosen.threshold,
            "alarms": self.chosen.alarms,
            "limit_per_hour": self.chosen.limit_per_hour,
            "shown": self.chosen.shown,
            "positives": self.positives,
            "found": self.found,
            "error_before": None if self.fit is None else self.fit.before.error,
            "error_after": None if self.fit is None else self.fit.after.error,
        }


def gather(
    model: Model, vocabulary: Vocabulary, places: Sequence[Path], fps: float, note: Note, advance: Callable[[], None]
) -> Gathered:
    """Look at pictures and clips (files and folders), clips at `fps` frames a second.

    What cannot be used is told to `note` and left out. advance: called for every file. Raises InputError where nothing
    can be used.
    """
    rows: list[Scores] = []
    clips: list[tuple[float, ...]] = []
    for group in _batches(_squares(model, sources_of([str(each) for each in places]), fps, clips, note, advance)):
        rows.append(model.detector.best_scores(group, vocabulary))
    if not rows:
        raise InputError(f"{', '.join(map(str, places))}: nothing here can be used; expected pictures or clips")
    return Gathered(np.concatenate(rows), tuple(clips))


def gather_positives(
    model: Model, vocabulary: Vocabulary, folder: Path, note: Note, advance: Callable[[], None]
) -> dict[str, Scores]:
    """Best scores of each name in the pictures of it: float32[pictures] by name.

    folder: one folder for each name, called like it; for a vocabulary of one name it may hold the pictures themselves.
    Case and spaces do not tell names apart. Raises InputError for a folder that is called like no name, and for two
    that are called like one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with one folder for each name in it")
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    names = {name_key(name): index for index, name in enumerate(vocabulary.names)}
    if not inside and len(names) == 1:
        return {vocabulary.names[0]: gather(model, vocabulary, [folder], 1.0, note, advance).scores[:, 0]}
    found: dict[str, Scores] = {}
    for each in inside:
        index = names.get(name_key(each.name))
        if index is None:
            raise InputError(f"{each}: is called like no name; the names are {', '.join(vocabulary.names[:8])}")
        if vocabulary.names[index] in found:
            raise InputError(f"{each}: another folder is called like this name too; put their pictures into one")
        found[vocabulary.names[index]] = gather(model, vocabulary, [each], 1.0, note, advance).scores[:, index]
    if not found:
        raise InputError(f"{folder}: no folders in it; expected one for each name, with pictures of the thing")
    return found


def calibrate_names(
    vocabulary: Vocabulary, background: Gathered, positives: Mapping[str, Scores], limit: AlarmLimit, fps: float
) -> tuple[list[NameResult], Footage]:
    """A threshold for every name, and a temperature and bias for those with pictures."""
    seen = footage(background.clips, fps, limit.quiet_s)
    results = []
    for index, name in enumerate(vocabulary.names):
        own = positives.get(name)
        chosen, fitted, made, threshold = _calibration(own, background.scores[:, index], seen, limit)
        found = None if own is None else float(np.mean(_probabilities(made, own) >= threshold))
        calibration = Calibration(made.temperature, made.bias, threshold)
        results.append(NameResult(name, chosen, fitted, calibration, 0 if own is None else len(own), found))
    return results, seen


def _calibration(
    own: Scores | None, without: Scores, seen: Footage, limit: AlarmLimit
) -> tuple[Chosen, Fit | None, Calibration, float]:
    """A threshold that has, in float32, no more alarms than were chosen: where a fit is so steep that probabilities of
    alarms are 1, a flatter one is made."""
    score = choose_threshold(without, seen, limit)
    steepest = STEEPEST
    while True:
        fitted = fit(own, without, steepest) if own is not None else None
        made = fitted.calibration if fitted is not None else UNCALIBRATED
        start = float(_probabilities(made, np.array([score.threshold], np.float32))[0])
        chosen, threshold = recounted(score, _probabilities(made, without), start, seen, limit)
        too_steep = fitted is not None and threshold >= 1 > score.threshold
        if not too_steep or steepest <= FLATTEST:
            return chosen, fitted, made, threshold
        steepest = max(FLATTEST, min(steepest, 1 / made.temperature) / 2)


def calibrated(vocabulary: Vocabulary, results: Sequence[NameResult], notes: Mapping[str, str]) -> Vocabulary:
    """The vocabulary with the results in it."""
    return vocabulary.with_calibrations({each.name: each.calibration for each in results}, notes)


def warnings(results: Sequence[NameResult], seen: Footage, limit: AlarmLimit) -> Iterator[str]:
    """What was asked and could not be shown, in words."""
    short = [each for each in results if not each.chosen.shown]
    if short and limit.most_alarms(seen.hours) < 0:
        least = limit.hours_needed / max(seen.hours, 1e-12) * limit.per_hour
        yield (
            f"{_hours(seen.hours)} of footage cannot show {limit.per_hour:g} false alarms an hour: even with none in "
            f"it, the rate may be {least:.3g} an hour (at {limit.confidence:.0%}); {_hours(limit.hours_needed)} "
            f"without an alarm would do. Thresholds are above everything seen"
        )
    elif short:
        names = ", ".join(repr(each.name) for each in short)
        yield f"no threshold is above the scores of {names} in footage without it; look at what is in the footage"
    for each in results:
        if each.positives and each.fit is None:
            reason = (
                f"{each.positives} pictures of it, expected at least {LEAST_PICTURES}"
                if each.positives < LEAST_PICTURES
                else "its pictures do not score higher than the footage without it"
            )
            yield f"{each.name!r}: no probabilities could be fitted ({reason}); its scores stay as they are"


def _hours(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min"


def _probabilities(calibration: Calibration, scores: Scores) -> Scores:
    """float32[L] as `Vocabulary.probabilities` has them, so that all sides are rounded alike."""
    one = Vocabulary((Entry("x", calibration=calibration),), np.ones((1, 1), np.float32), "0" * 64, "", ())
    return one.probabilities(scores[:, None])[:, 0]


def _squares(
    model: Model,
    paths: Sequence[Path],
    fps: float,
    clips: list[tuple[float, ...]],
    note: Note,
    advance: Callable[[], None],
) -> Iterator[Square]:
    """Pictures and frames at the detector's size; `clips` gets the times of those that were given."""
    for path in paths:
        times: list[float] = []
        try:
            if path.suffix.lower() in CLIP_SUFFIXES:
                with Clip.open(path) as clip:
                    due_s = -np.inf
                    while (tick := clip.advance()) is not None:
                        if tick.time_s >= due_s:
                            due_s = next_due_s(tick.time_s, fps)
                            square = model.detector.square(clip.bgr(), "bgr")
                            times.append(tick.time_s)
                            yield square
            else:
                square = model.detector.square(read_picture(path), "rgb")
                times.append(0.0)
                yield square
        except InputError as problem:
            note(f"left out: {problem}")
        if times:
            clips.append(tuple(times))
        advance()


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, _TOGETHER)):
        yield group

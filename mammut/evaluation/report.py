"""A report for the terminal and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mammut.evaluation.evaluate import Figure, Report, Value
from mammut_runtime.console import json_line
from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict

_MISSING_SHOWN = 5


def shown(value: Value, percent: bool, signed: bool = False) -> str:
    """ "76.1 [73.0, 79.2]": percent, or the number as it is; without an interval where there is none."""
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    one = f"{scale * value.value:{sign}.{digits}f}"
    if math.isnan(value.low):
        return one
    return f"{one} [{scale * value.low:{sign}.{digits}f}, {scale * value.high:{sign}.{digits}f}]"


def lines(report: Report) -> Iterator[str]:
    """The report as a table, a line each."""
    counted = ", ".join(f"{number:,} {name}" for name, number in report.facts.items())
    yield f"{report.task} on {report.data}: {counted}"
    yield ""
    rows = [["", *report.models, *(["second - first"] if len(report.models) == 2 else []), "chance"]]
    rows += [_row(figure) for figure in report.figures]
    yield from _table(rows)
    yield ""
    yield f"percent, with {report.settings['confidence']} % intervals of {report.settings['resamples']} resamples"
    if report.conditions:
        yield ""
        yield from _robustness(report)
    for note in report.notes:
        yield f"note: {note}"
    if report.missing:
        yield f"PARTIAL: {len(report.missing):,} left out:"
        yield from (f"  {line}" for line in report.missing[:_MISSING_SHOWN])
        if len(report.missing) > _MISSING_SHOWN:
            yield f"  and {len(report.missing) - _MISSING_SHOWN:,} more (--json lists them)"


def write_json(path: Path, report: Report) -> None:
    """Everything but the pictures, figures as fractions. Raises InputError."""
    version = importlib.metadata.version("mammut-edge")
    plain: dict[str, Any] = {"format": "mammut-edge evaluation 1", "version": version, **_plain(report)}
    text = json.dumps(json.loads(json_line(plain)), indent=1) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Raises InputError where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem


def _plain(report: Report) -> dict[str, Any]:
    return {
        "task": report.task,
        "data": report.data,
        "settings": report.settings,
        "models": [
            {"name": name, "seconds": seconds, **facts}
            for name, seconds, facts in zip(report.models, report.seconds, report.model_facts, strict=True)
        ],
        "counts": report.facts,
        "figures": [to_dict(figure) for figure in report.figures],
        "corruptions": [to_dict(condition) for condition in report.conditions],
        "exhibits": [
            {
                "hit": exhibit.hit,
                "picture": exhibit.shown[0].picture.name,
                "asked": exhibit.shown[0].asked,
                "truth": exhibit.shown[0].truth,
                "given": [each.given for each in exhibit.shown],
                "scores": [each.score for each in exhibit.shown],
            }
            for exhibit in report.exhibits
        ],
        "notes": report.notes,
        "missing": report.missing,
    }


def _row(figure: Figure) -> list[str]:
    cells = [figure.name, *(shown(value, figure.percent) for value in figure.values)]
    if figure.difference is not None:
        cells.append(shown(figure.difference, figure.percent, signed=True))
    return [*cells, "" if figure.chance is None else f"{100 * figure.chance:.1f}"]


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (cell.ljust(width) if at == 0 else cell.rjust(width)
                        for at, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "   ".join([first, *rest]).rstrip()


def _robustness(report: Report) -> Iterator[str]:
    """One table for each main figure and model: corruptions down, severities across."""
    kinds = list(dict.fromkeys(condition.kind for condition in report.conditions if condition.severity))
    clean = report.conditions[0]
    for place, figure in enumerate(clean.figures):
        if not figure.main:
            continue
        for model, name in enumerate(report.models):
            by = {(each.kind, each.severity): each.figures[place].values[model].value for each in report.conditions}
            scale, digits = (100, 1) if figure.percent else (1, 3)
            rows = [[f"{figure.name}, {name}", *(str(severity) for severity in range(6))]]
            for kind in kinds:
                cells = (by[("none", 0)], *(by[(kind, severity)] for severity in range(1, 6)))
                rows.append([f"  {kind}", *(f"{scale * value:.{digits}f}" for value in cells)])
            yield from _table(rows)
            yield ""

"""A report as one web page: no scripts, nothing from elsewhere, pictures inside. Everything shown is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from mammut.evaluation.draw_boxes import draw_boxes
from mammut.evaluation.evaluate import Condition, Exhibit, Figure, Report
from mammut.evaluation.outcome import Shown
from mammut.evaluation.report import shown, write_text
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import Picture

_SIDE = 180
"""Longest side of a picture on the page, pixels."""
_SIDE_WITH_BOXES = 360
_WIDTH, _HEIGHT, _EDGE = 420, 240, 36
_COLOURS = ("#1b6ca8", "#c2571a", "#2e7d32", "#8e24aa", "#607d8b")
_DASHES = ("", "5 4")
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: 3px 12px; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f7 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px }
figure { margin: 0; padding: 8px; border: 1px solid #ddd; border-top: 4px solid #2e7d32; font-size: 12px;
  overflow-wrap: anywhere }
figure.miss { border-top-color: #b00020 }
figure img { display: block; margin: 0 auto 6px; max-width: 100%; height: auto }
figure p { margin: 2px 0 } .name { color: #888 } .who { color: #666 }
.right { color: #2e7d32 } .wrong { color: #b00020 }
.partial { background: #fff3cd; padding: 8px 12px } .charts { display: flex; flex-wrap: wrap; gap: 20px }
svg text { font-size: 11px; fill: #555 } svg .axis { stroke: #bbb } svg polyline { fill: none; stroke-width: 2 }
"""


def write_page(path: Path, report: Report) -> None:
    """Write the page. Raises InputError where it cannot be written."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """The whole page."""
    title = html.escape(f"{report.task}: {' and '.join(report.models)}")
    counted = ", ".join(f"{number:,} {name}" for name, number in report.facts.items())
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<meta name='viewport' content='width=device-width'><title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1><p>{html.escape(report.data)}: {html.escape(counted)}</p>",
        *_missing(report),
        *_figures(report),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
        *_robustness(report),
        *_exhibits(report),
        *_facts(report),
    ]
    return "\n".join([*parts, "</body></html>\n"])


def _missing(report: Report) -> Iterator[str]:
    if report.missing:
        names = html.escape("; ".join(report.missing[:20])) + ("; ..." if len(report.missing) > 20 else "")
        yield f"<p class='partial'>Partial data: {len(report.missing):,} left out: {names}</p>"


def _figures(report: Report) -> Iterator[str]:
    heads = ["", *report.models, *(["second - first"] if len(report.models) == 2 else []), "chance"]
    yield f"<table><tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"
    for figure in report.figures:
        cells = [figure.name, *(shown(value, figure.percent) for value in figure.values)]
        if figure.difference is not None:
            cells.append(shown(figure.difference, figure.percent, signed=True))
        cells.append("" if figure.chance is None else f"{100 * figure.chance:.1f}")
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table>"
    yield (
        f"<p>Percent, with {html.escape(report.settings['confidence'])} % bootstrap intervals of "
        f"{html.escape(report.settings['resamples'])} resamples.</p>"
    )


# ---- corruptions ----


def _robustness(report: Report) -> Iterator[str]:
    if not report.conditions:
        return
    yield "<h2>Under corruptions</h2><p>0 is the picture shrunk to 256 px, 5 the worst"
    yield "; dashed: the second model</p>" if len(report.models) == 2 else "</p>"
    yield "<div class='charts'>"
    for place, figure in enumerate(report.conditions[0].figures):
        if figure.main:
            yield _chart(report.conditions, place, figure)
    yield "</div>"
    for place, figure in enumerate(report.conditions[0].figures):
        if figure.main:
            yield from _condition_table(report, place, figure)


def _kinds(conditions: tuple[Condition, ...]) -> list[str]:
    return list(dict.fromkeys(condition.kind for condition in conditions if condition.severity))


def _chart(conditions: tuple[Condition, ...], place: int, figure: Figure) -> str:
    """Severity to the figure, a line for each corruption and model."""
    by = {(each.kind, each.severity): each.figures[place].values for each in conditions}
    top = max(max(value.value for value in values) for values in by.values()) or 1.0
    scale = 100 if figure.percent else 1

    def at(severity: int, value: float) -> str:
        x = _EDGE + severity * (_WIDTH - 2 * _EDGE) / 5
        return f"{x:.0f},{_HEIGHT - _EDGE - max(value, 0) / top * (_HEIGHT - 2 * _EDGE):.1f}"

    parts = [f"<svg width='{_WIDTH}' height='{_HEIGHT + 40}' role='img'><text x='{_EDGE}' y='16'>"
             f"{html.escape(figure.name)}</text>"]  # fmt: skip
    base = _HEIGHT - _EDGE
    parts.append(f"<line class='axis' x1='{_EDGE}' x2='{_WIDTH - _EDGE}' y1='{base}' y2='{base}'/>")
    parts.append(f"<text x='2' y='{_EDGE + 4}'>{scale * top:.3g}</text><text x='2' y='{base}'>0</text>")
    parts += [f"<text x='{at(each, 0).split(',')[0]}' y='{base + 14}'>{each}</text>" for each in range(6)]
    for number, kind in enumerate(_kinds(conditions)):
        colour = _COLOURS[number % len(_COLOURS)]
        for model, _ in enumerate(figure.values):
            points = [at(0, by["none", 0][model].value)]
            points += [at(severity, by[kind, severity][model].value) for severity in range(1, 6)]
            dash = f" stroke-dasharray='{_DASHES[model]}'" if _DASHES[model] else ""
            parts.append(f"<polyline points='{' '.join(points)}' stroke='{colour}'{dash}/>")
        x, y = _EDGE + number % 3 * 120, base + 34 + number // 3 * 16
        parts.append(f"<rect x='{x}' y='{y - 9}' width='10' height='10' fill='{colour}'/>"
                     f"<text x='{x + 14}' y='{y}'>{html.escape(kind)}</text>")  # fmt: skip
    return "".join([*parts, "</svg>"])


def _condition_table(report: Report, place: int, figure: Figure) -> Iterator[str]:
    by = {(each.kind, each.severity): each.figures[place].values for each in report.conditions}
    for model, name in enumerate(report.models):
        heads = "".join(f"<th>{severity}</th>" for severity in range(6))
        yield f"<table><tr><th>{html.escape(f'{figure.name}, {name}')}</th>{heads}</tr>"
        for kind in _kinds(report.conditions):
            values = [by["none", 0][model], *(by[kind, severity][model] for severity in range(1, 6))]
            cells = "".join(f"<td>{shown(value, figure.percent)}</td>" for value in values)
            yield f"<tr><td>{html.escape(kind)}</td>{cells}</tr>"
        yield "</table>"


# ---- pictures ----


def _exhibits(report: Report) -> Iterator[str]:
    titles = ("The better half by CIDEr-D", "The other half") if report.task == "caption" else ("Hits", "Misses")
    for hit, title in zip((True, False), titles, strict=True):
        chosen = [exhibit for exhibit in report.exhibits if exhibit.hit == hit]
        if chosen:
            of = f" of {report.models[0]}" if len(report.models) == 2 else ""
            yield f"<h2>{title}{html.escape(of)}, drawn by chance</h2><div class='grid'>"
            yield from (_exhibit(exhibit, report.models) for exhibit in chosen)
            yield "</div>"


def _exhibit(exhibit: Exhibit, models: tuple[str, ...]) -> str:
    first = exhibit.shown[0]
    said = []
    pictures = [_picture(each) for each in (exhibit.shown if first.boxes else exhibit.shown[:1])]
    for name, each in zip(models, exhibit.shown, strict=True):
        who = f"<span class='who'>{html.escape(name)}:</span> " if len(models) > 1 else ""
        mark = "right" if each.score > 0.5 else "wrong"
        given = " · ".join(text or "(nothing)" for text in each.given)
        said.append(f"<p class='{mark}'>{who}{html.escape(given)}</p>")
    asked = f"<p>{html.escape(first.asked)}</p>" if first.asked else ""
    truth = html.escape(" · ".join(first.truth))
    return (
        f"<figure class='{'hit' if exhibit.hit else 'miss'}'>{''.join(pictures)}"
        f"<p class='name'>{html.escape(first.picture.name)}</p>{asked}<p>truth: {truth}</p>{''.join(said)}</figure>"
    )


def _picture(shown: Shown) -> str:
    """The picture inside the page, small, with its boxes; a line where it cannot be read any more."""
    try:
        image = shown.picture.read()
    except InputError as problem:
        return f"<p class='wrong'>{html.escape(str(problem))}</p>"
    pixels = image.rgb() if isinstance(image, Picture) else image
    scale = (_SIDE_WITH_BOXES if shown.boxes else _SIDE) / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    small = draw_boxes(small, shown.boxes, scale)
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    data = base64.b64encode(encoded.tobytes()).decode("ascii")
    return f"<img width='{width}' height='{height}' alt='' src='data:image/jpeg;base64,{data}'>"


def _facts(report: Report) -> Iterator[str]:
    yield "<h2>Made with</h2><table>"
    for name, facts, seconds in zip(report.models, report.model_facts, report.seconds, strict=True):
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        yield f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}, {seconds} s</td></tr>"
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    yield f"<tr><td>settings</td><td>{html.escape(settings)}</td></tr></table>"

"""The ranges as a page to look at: a web page that is one file, without scripts and without anything from elsewhere.

One line a tensor: how its values are distributed, what was seen of them at most, and where the methods would cut. The
axis is linear near zero and logarithmic farther out (asinh), so that one page shows 0.01 and 1000.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.statistics import DEFAULT_PERCENTILE, HALF_BINS, TensorStatistics
from mammut_calibration.table import CalibrationTable
from mammut_runtime.errors import InputError

PLOT_WIDTH = 560
_ROW_HEIGHT = 26
_CELLS = 140
"""Points of an outline."""
_WIDE = 4.0
"""A largest value this many times the percentile's is marked: of 8 bits it leaves 6 for nearly all values."""
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: 1px 8px; text-align: right; white-space: nowrap; font-size: 12px }
td:first-child, th:first-child { text-align: left; font-family: monospace; max-width: 330px; overflow: hidden;
  text-overflow: ellipsis }
tr:nth-child(even) { background: #f5f5f7 } .wide { color: #b00020; font-weight: 600 }
svg { display: block } .shape { fill: #8fb3d9 } .zero { stroke: #bbb } .all { stroke: #333 }
.percentile { stroke: #0a7d4f } .entropy { stroke: #c26a00 } .tick { fill: #666; font-size: 10px; text-anchor: middle }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 14px } dt { color: #666 } dd { margin: 0 }
.key span { padding: 0 6px; border-left: 3px solid; margin-right: 12px }
"""


def write_plot(path: Path, table: CalibrationTable) -> None:
    """Write the page. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ranges_html(table), encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem


def ranges_html(table: CalibrationTable) -> str:
    """The page."""
    title = f"Ranges of {table.header.model}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
        *_description(table),
        "<p class='key'><span style='border-color:#8fb3d9'>distribution of the values (square roots)</span>"
        "<span style='border-color:#333'>everything seen</span>"
        f"<span style='border-color:#0a7d4f'>{DEFAULT_PERCENTILE} % of the values</span>"
        "<span style='border-color:#c26a00'>entropy</span></p>",
    ]
    for graph, tensors in table.graphs.items():
        parts += _graph(graph, tensors)
    return "\n".join([*parts, "</body></html>\n"])


def _description(table: CalibrationTable) -> Iterator[str]:
    header = table.header
    rows = {
        "pictures": f"{header.pictures} different ones of {header.data_pictures}; left out: {header.repeated} repeated,"
        f" {header.constant} of one colour, {len(header.damaged)} damaged",
        "texts": f"{header.texts}, of which {header.own_texts} were written by the model",
        "generated tokens": str(header.tokens),
        "data": header.data_hash,
        "bundle": header.bundle_hash,
        "tools": ", ".join(f"{tool} {version}" for tool, version in header.versions.items()),
    }
    yield "<dl>"
    for key, value in rows.items():
        yield f"<dt>{key}</dt><dd>{html.escape(value)}</dd>"
    yield "</dl>"


def _graph(graph: str, tensors: Mapping[str, TensorStatistics]) -> Iterator[str]:
    yield f"<h2>{html.escape(graph)}: {len(tensors)} tensors</h2>"
    if not tensors:
        return
    largest = max(each.range().largest for each in tensors.values())
    # linear up to a typical magnitude of this graph, logarithmic beyond
    axis = _Axis(max(largest, 1e-30), max(float(np.median([each.mean_abs for each in tensors.values()])), 1e-30))
    columns = ("tensor", "", "smallest", "largest", "percentile", "wider by")
    yield f"<table><tr>{''.join(f'<th>{each}</th>' for each in columns)}</tr>"
    yield f"<tr><td></td><td>{_ticks(axis)}</td><td></td><td></td><td></td><td></td></tr>"
    for name, each in tensors.items():
        yield _row(name, each, axis)
    yield "</table>"


class _Axis:
    """Value to position, pixels."""

    def __init__(self, largest: float, linear: float) -> None:
        self.largest, self._linear = largest, linear
        self._half = float(np.arcsinh(largest / linear))

    def x(self, value: float) -> float:
        share = float(np.arcsinh(value / self._linear)) / self._half
        return round((min(max(share, -1.0), 1.0) + 1) / 2 * PLOT_WIDTH, 1)

    def edges(self) -> NDArray[np.float64]:
        """Values at the borders of the outline's cells."""
        found: NDArray[np.float64] = np.sinh(np.linspace(-1, 1, _CELLS + 1) * self._half) * self._linear
        return found


def _row(name: str, each: TensorStatistics, axis: _Axis) -> str:
    whole, percentile, entropy = each.range("minmax"), each.range("percentile"), each.range("entropy")
    wider = whole.largest / max(percentile.largest, 1e-30)
    marks = "".join(
        f"<path class='{kind}' d='M{axis.x(value)} {top}V{bottom}' stroke-width='{width}'/>"
        for kind, found, top, bottom, width in (
            ("all", whole, 2, _ROW_HEIGHT - 2, 1),
            ("entropy", entropy, _ROW_HEIGHT // 2, _ROW_HEIGHT - 2, 2),
            ("percentile", percentile, 2, _ROW_HEIGHT // 2, 2),
        )
        for value in (found.low, found.high)
    )
    middle = axis.x(0.0)
    picture = (
        f"<svg width='{PLOT_WIDTH}' height='{_ROW_HEIGHT}' viewBox='0 0 {PLOT_WIDTH} {_ROW_HEIGHT}'>"
        f"<path class='shape' d='{_outline(each, axis)}'/>"
        f"<line class='zero' x1='{middle}' x2='{middle}' y1='0' y2='{_ROW_HEIGHT}'/>{marks}</svg>"
    )
    mark = " class='wide'" if wider > _WIDE else ""
    short = html.escape(name)
    numbers = f"<td>{whole.low:.4g}</td><td>{whole.high:.4g}</td><td>{percentile.largest:.4g}</td>"
    return f"<tr><td title='{short}'>{short}</td><td>{picture}</td>{numbers}<td{mark}>{wider:.1f}x</td></tr>"


def _outline(each: TensorStatistics, axis: _Axis) -> str:
    """The histogram as an SVG path. Square roots, so that rare values can be seen beside frequent ones."""
    bin_edges = np.linspace(-each.limit, each.limit, 2 * HALF_BINS + 1)
    cumulated = np.concatenate([[0.0], np.cumsum(each.counts, dtype=np.float64)])
    cells = np.diff(np.interp(axis.edges(), bin_edges, cumulated))
    heights = np.sqrt(np.maximum(cells, 0.0))
    heights *= (_ROW_HEIGHT - 4) / max(float(heights.max()), 1e-30)
    step = PLOT_WIDTH / _CELLS
    points = "".join(
        f"L{index * step:.0f} {_ROW_HEIGHT - height:.1f}L{(index + 1) * step:.0f} {_ROW_HEIGHT - height:.1f}"
        for index, height in enumerate(heights)
        if height > 0
    )
    first = int(np.flatnonzero(heights)[0]) if heights.any() else 0
    last = int(np.flatnonzero(heights)[-1]) + 1 if heights.any() else 0
    return f"M{first * step:.0f} {_ROW_HEIGHT}{points}L{last * step:.0f} {_ROW_HEIGHT}Z"


def _ticks(axis: _Axis) -> str:
    """Powers of ten on both sides of zero, as many as fit."""
    highest = int(np.floor(np.log10(axis.largest)))
    values = [sign * 10.0**power for sign in (-1, 1) for power in range(highest - 2, highest + 1)]
    shown: list[float] = []
    labels = []
    for value in (0.0, *sorted(values, key=abs, reverse=True)):
        x = axis.x(value)
        if 14 <= x <= PLOT_WIDTH - 14 and all(abs(x - other) > 34 for other in shown):
            shown.append(x)
            labels.append(f"<text class='tick' x='{x}' y='11'>{value:g}</text>")
    return f"<svg width='{PLOT_WIDTH}' height='14'>{''.join(labels)}</svg>"

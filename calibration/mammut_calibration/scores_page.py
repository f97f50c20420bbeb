"""What was found out about the names, as a page to look at: one file, no scripts, nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mammut_calibration.platt import Reliability
from mammut_calibration.scores import NameResult, Scores
from mammut_runtime.errors import InputError

_WIDTH, _HEIGHT, _SIDE, _MARGIN = 420, 130, 200, 24
_CELLS = 50
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
dl { display: grid; grid-template-columns: max-content auto; gap: 2px 14px } dt { color: #666 } dd { margin: 0 }
.warning { color: #b00020; font-weight: 600 } .plots { display: flex; gap: 28px; flex-wrap: wrap }
svg { display: block } text { fill: #666; font-size: 10px } .without { fill: #8fb3d9 } .with { fill: #0a7d4f99 }
.threshold { stroke: #b00020; stroke-width: 2 } .axis { stroke: #bbb } .before { stroke: #c26a00; fill: none }
.after { stroke: #0a7d4f; fill: none; stroke-width: 2 }
.key span { padding: 0 6px; border-left: 3px solid; margin-right: 12px }
"""


def write_scores_page(
    path: Path,
    description: Mapping[str, str],
    warnings: Sequence[str],
    results: Sequence[NameResult],
    background: Scores,
    positives: Mapping[str, Scores],
) -> None:
    """Write the page. description: what was done, for people. Raises InputError."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>Calibrated scores</title><style>{_STYLE}</style></head><body><h1>Calibrated scores</h1><dl>",
        *(f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>" for key, text in description.items()),
        "</dl>",
        *(f"<p class='warning'>{html.escape(each)}</p>" for each in warnings),
        "<p class='key'><span style='border-color:#8fb3d9'>best scores of frames without the thing</span>"
        "<span style='border-color:#0a7d4f'>of pictures with it</span>"
        "<span style='border-color:#b00020'>threshold</span></p>",
    ]
    for index, each in enumerate(results):
        parts += _name(each, background[:, index], positives.get(each.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*parts, "</body></html>\n"]), encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem


def _name(result: NameResult, without: Scores, with_thing: Scores | None) -> Iterator[str]:
    chosen, calibration = result.chosen, result.calibration
    rows = {
        "threshold": f"{calibration.threshold:.4f}" + (f" (score {chosen.threshold:.4f})" if result.fit else ""),
        "false alarms": f"{chosen.alarms} seen; at most {chosen.limit_per_hour:.3g} an hour"
        + ("" if chosen.shown else " - not what was asked"),
    }
    if result.found is not None:
        rows["found"] = f"{result.found:.1%} of {result.positives} pictures"
    if result.fit is not None:
        rows["temperature, bias"] = f"{calibration.temperature:.3f}, {calibration.bias:.3f}"
        rows["calibration error"] = f"{result.fit.before.error:.3f} before, {result.fit.after.error:.3f} after"
    yield f"<h2>{html.escape(result.name)}</h2><dl>"
    for key, text in rows.items():
        yield f"<dt>{key}</dt><dd>{html.escape(text)}</dd>"
    yield "</dl><div class='plots'>"
    yield _histogram(without, with_thing, chosen.threshold)
    if result.fit is not None:
        yield _diagram(result.fit.before, result.fit.after)
    yield "</div>"


def _histogram(without: Scores, with_thing: Scores | None, threshold: float) -> str:
    """Both kinds, each to its own height; square roots, so that rare scores can be seen beside frequent ones."""
    bars = []
    for kind, scores in (("without", without), ("with", with_thing)):
        if scores is None or not len(scores):
            continue
        counts, _ = np.histogram(scores, bins=_CELLS, range=(0, 1))
        heights = np.sqrt(counts / counts.max()) * _HEIGHT
        step = _WIDTH / _CELLS
        bars += [
            f"<rect class='{kind}' x='{index * step:.1f}' y='{_HEIGHT - height:.1f}' width='{step:.1f}' "
            f"height='{height:.1f}'/>"
            for index, height in enumerate(heights)
            if height > 0
        ]
    ticks = "".join(
        f"<text x='{_WIDTH * value:.0f}' y='{_HEIGHT + 14}'>{value:g}</text>" for value in (0, 0.25, 0.5, 0.75)
    )
    x = threshold * _WIDTH
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT + 18}' role='img' aria-label='scores'>{''.join(bars)}"
        f"<line class='threshold' x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{_HEIGHT}'/>{ticks}</svg>"
    )


def _diagram(before: Reliability, after: Reliability) -> str:
    """How often it is so (upwards) against the probability that was said; a perfect one is the diagonal."""
    side, total = _SIDE, _SIDE + _MARGIN

    def line(kind: str, each: Reliability) -> str:
        points = [(_MARGIN + x * side, side - y * side) for x, y in zip(each.said, each.so, strict=True)]
        dots = "".join(f"<circle class='{kind}' cx='{x:.1f}' cy='{y:.1f}' r='3'/>" for x, y in points)
        return f"<polyline class='{kind}' points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}'/>{dots}"

    return (
        f"<svg width='{total}' height='{total}' role='img' aria-label='reliability'>"
        f"<rect class='axis' x='{_MARGIN}' y='0' width='{side}' height='{side}' fill='none'/>"
        f"<line class='axis' x1='{_MARGIN}' y1='{side}' x2='{total}' y2='0'/>"
        f"{line('before', before)}{line('after', after)}"
        f"<text x='{_MARGIN}' y='{side + 14}'>said: 0 to 1 (thin: before)</text>"
        f"<text transform='translate(12,{side}) rotate(-90)'>so: 0 to 1</text></svg>"
    )

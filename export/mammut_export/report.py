"""report.json and report.html: what was made, how it compares with PyTorch, sample captions with their pictures.

The page is one file: pictures inside, no scripts, nothing fetched, every text escaped. It is read on a phone as well.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_calibration.data import Dataset
from mammut_calibration.data import Sample as UserPicture
from mammut_calibration.drift import CaptionPair, Drift
from mammut_export.detections import DetectionParity
from mammut_export.gate import Quantized
from mammut_export.measure import FIGURES, Measured
from mammut_export.parity import CaptionParity, Parity
from mammut_export.plan import Plan, megabytes
from mammut_export.samples import Sample
from mammut_runtime.detection.drawing import draw_detections
from mammut_runtime.manifest import WEIGHTS_FILE, Manifest
from mammut_runtime.strict import to_dict

THUMBNAIL_PX = 192
"""Longest side of a picture in the page."""
DRAWN, DRAWN_PX = 5, 384
"""Detections drawn into a picture, the best ones, and its longest side then."""
JPEG_QUALITY = 75


@dataclass(frozen=True)
class Example:
    """A picture of the user that was held out, and what the two bundles say about it."""

    pixels: NDArray[np.uint8]
    """uint8[H, W, 3], RGB; small."""
    caption: CaptionPair


@dataclass(frozen=True)
class Facts:
    """All that a report says."""

    manifest: Manifest
    """Of the bundle without its report."""
    plan: Plan
    parity: Parity
    samples: tuple[Sample, ...]
    export_seconds: dict[str, float]
    """Step of the export → seconds."""
    quantized: Quantized | None = None
    measured: tuple[Measured, Measured] | None = None
    """The float32 bundle and the quantized one, on the exporting machine."""
    examples: tuple[Example, ...] = ()
    islands: tuple[str, ...] = ()
    """For TensorRT: what computes in float32 among float16, and why, in lines."""
    audited_on: str = ""
    """What the islands were found on."""

    @property
    def bundle_bytes(self) -> int:
        """All files but the report and the manifest."""
        return sum(file.size_bytes for file in self.manifest.files.values())

    @property
    def unique_weight_bytes(self) -> int:
        """Counted in the graphs where they were measured, else planned."""
        counted = self.measured[1].figures["unique_weight_bytes"] if self.measured else self.plan.unique_weight_bytes
        return int(counted)

    @property
    def weight_ratio(self) -> float:
        """weights.bin over the unique weights."""
        return self.manifest.files[WEIGHTS_FILE].size_bytes / self.unique_weight_bytes

    @property
    def bundle_ratio(self) -> float:
        """The bundle over the unique weights."""
        return self.bundle_bytes / self.unique_weight_bytes


def write(folder: Path, facts: Facts) -> None:
    """Write report.json and report.html into `folder`."""
    text = json.dumps(as_json(facts), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(as_html(facts), encoding="utf-8")


def as_json(facts: Facts) -> dict[str, Any]:
    """The report as plain values. Sizes in bytes, times in ms or s as their keys say."""
    manifest, plan, parity = facts.manifest, facts.plan, facts.parity
    return {
        "model": manifest.model.name,
        "target": manifest.target,
        "precision": manifest.precision,
        "opset": manifest.opset,
        "made_by": manifest.made_by,
        "sizes": {
            "files_bytes": {name: file.size_bytes for name, file in manifest.files.items()},
            "bundle_bytes": facts.bundle_bytes,
            "unique_weight_bytes": facts.unique_weight_bytes,
            "separate_weight_bytes": plan.separate_weight_bytes,
            "bundle_over_unique_weights": round(facts.bundle_ratio, 4),
            "expected_resident_bytes": plan.resident_bytes,
            "cross_bytes_per_picture": plan.cross_bytes,
            "cache_bytes_per_token_and_beam": plan.cache_bytes_per_token,
        },
        "graphs": {graph.name: to_dict(graph) for graph in plan.graphs},
        "pictures": {"kind": _pictures_kind(facts.samples), "names": [sample.name for sample in facts.samples]},
        "parity": {
            "relative_tolerance": parity.relative_tolerance,
            "outputs": to_dict(parity.outputs),
            "picture_embedding_drift": parity.drift,
            "shapes": list(parity.shapes),
        },
        "detections": [_detection_json(each) for each in parity.detections],
        "captions": to_dict([caption for caption in parity.captions if not caption.clip]),
        "captions_of_clips_made_of_the_pictures": to_dict([caption for caption in parity.captions if caption.clip]),
        "quantization": _quantization_json(facts),
        "float32_islands": {"audited_on": facts.audited_on, "found": list(facts.islands)},
        "timings_ms": {timing.what: round(timing.milliseconds, 3) for timing in parity.timings},
        "export_s": {step: round(seconds, 2) for step, seconds in facts.export_seconds.items()},
    }


def as_html(facts: Facts) -> str:
    """The report as one page."""
    manifest, parity = facts.manifest, facts.parity
    same = sum(caption.verdict == "same" for caption in parity.captions)
    ties = sum(caption.verdict == "tie" for caption in parity.captions)
    verdict = f"{len(parity.outputs)} outputs within tolerance over {len(parity.shapes)} shapes"
    verdict += f" and {len(facts.samples)} pictures"
    if parity.captions:
        verdict += f"; {same} of {len(parity.captions)} greedy captions the same token for token"
        verdict += f", {ties} parted at a tie" if ties else ""
    body = [
        f"<h1>{escape(manifest.model.name)}</h1>",
        f"<p>{escape(manifest.target)}, {escape(manifest.precision)}, opset {manifest.opset}, "
        f"{manifest.model.parameters:,} parameters, pictures of {facts.plan.image_size} pixels</p>",
        f'<p class="good">{escape(verdict)}.</p>',
        *_gate(facts),
        *_captions(facts),
        *_detections(facts),
        *_parity(parity),
        *_islands(facts),
        *_sizes(facts),
        *_times(facts),
        "<h2>Made by</h2>",
        _table(("what", "version"), manifest.made_by.items()),
        "<h2>Shapes replayed</h2><details><summary>all</summary><ul>",
        *(f"<li>{escape(shape)}</li>" for shape in parity.shapes),
        "</ul></details>",
    ]
    head, tail = _PAGE.split("{body}")
    return head.replace("{title}", escape(manifest.model.name)) + "\n".join(body) + tail


def examples(drift: Drift, data: Dataset) -> tuple[Example, ...]:
    """The drift's captions with their pictures, taken from the data they were measured on."""
    pairs = {pair.picture: pair for pair in drift.captions}
    found = []
    for index, item in enumerate(data.items):
        if item.name in pairs:
            sample = next(iter(data.samples(index)))
            if isinstance(sample, UserPicture):
                found.append(Example(_thumbnail(_rgb(sample.image)), pairs.pop(item.name)))
    return tuple(sorted(found, key=lambda each: each.caption.same))


def _quantization_json(facts: Facts) -> dict[str, Any] | None:
    made = facts.quantized
    if made is None:
        return None
    return {
        "passed": not made.failures,
        "failures": list(made.failures),
        "schemes": made.schemes,
        "layers": to_dict(made.layers),
        "drift": made.drift.to_dict() if made.drift else None,
        "limits": made.limits.to_dict(),
        "rounds": to_dict(made.rounds),
        "layers_that_hurt": to_dict(made.ranking),
        "auto_times": to_dict(made.times),
        "measured": None
        if facts.measured is None
        else dict(zip(("float32", "quantized"), (each.figures for each in facts.measured), strict=True)),
    }


def _gate(facts: Facts) -> Iterable[str]:
    made = facts.quantized
    if made is None:
        return
    yield "<h2>Quantized, against float32</h2>"
    if made.failures:
        problems = escape("; ".join(made.failures))
        yield f'<p class="bad">The gate is NOT passed, and the drift was accepted: {problems}.</p>'
    else:
        yield '<p class="good">The gate is passed: every measure is at or above its limit.</p>'
    if facts.measured is not None:
        yield "<h3>Size, speed, memory</h3><p>On the machine that exported, each in a process of its own.</p>"
        yield _table(("what", "float32", "quantized", "ratio"), _side_by_side(*facts.measured))
    if made.drift is not None:
        yield (
            f"<h3>Drift</h3><p>On {made.drift.pictures} of your pictures that calibration did not see, with "
            f"{made.drift.texts} texts, {made.drift.tokens} tokens of captions and {made.drift.questions} questions"
            f"{_clips(made.drift)}. "
            f"1 is no difference.</p>"
        )
        limits = made.limits.to_dict()
        rows = (
            (name.replace("_", " "), f"{value:.4f}", f"{limits[name]:.4f}", "" if value >= limits[name] else "too low")
            for name, value in made.drift.measures.items()
        )
        yield _table(("measure", "value", "limit", ""), rows)
    yield "<h3>Layers</h3>"
    kinds = (
        (
            each.graph,
            each.scheme,
            str(len(each.quantized)),
            ", ".join(each.eight_bits),
            ", ".join(name for name in each.kept if name not in each.eight_bits),
        )
        for each in made.layers
    )
    yield _table(("graph", "precision", "layers in it", "kept in 8 bits", "in floating point"), kinds)
    yield from _how_it_was_found(made)
    yield from _before_and_after(facts.examples)


def _clips(drift: Drift) -> str:
    if not drift.clips:
        return ""
    made = drift.clips - drift.filmed
    return f"; on {drift.clips} clips, {drift.filmed} of them filmed and {made} made of the pictures by a moving crop"


def _how_it_was_found(made: Quantized) -> Iterable[str]:
    if made.times:
        yield "<h3>What auto chose from</h3>"
        times = ((t.graph, t.scheme, f"{t.milliseconds:.3f}") for t in made.times)
        yield _table(("graph", "precision", "ms"), times)
    if len(made.rounds) > 1:
        yield "<h3>Attempts</h3>"
        rounds = (
            (", ".join(f"{graph} {scheme}" for graph, scheme in each.schemes.items()), str(each.kept),
             "; ".join(each.failures) or "passed")
            for each in made.rounds
        )  # fmt: skip
        yield _table(("precision", "layers kept", "outcome"), rounds)
    if made.ranking:
        yield "<h3>Layers that hurt most</h3>"
        worst = (
            (each.graph, each.layer, f"{each.local_error:.4f}", _number(each.output_error))
            for each in made.ranking[:20]
        )
        yield _table(("graph", "layer", "its own error", "error of the graph's output"), worst)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _before_and_after(found: Sequence[Example]) -> Iterable[str]:
    if not found:
        return
    yield "<h3>Captions before and after</h3><p>Held-out pictures, those that changed first.</p>"
    yield '<div class="pictures">'
    for each in found:
        pair = each.caption
        text = f"<q>{escape(pair.before)}</q>"
        text += "<em>the same</em>" if pair.same else f"<q>{escape(pair.after)}</q><em>changed</em>"
        yield f'<figure><img alt="{escape(pair.picture)}" src="{_jpeg(each.pixels)}">'
        yield f"<figcaption>{text}<small>{escape(pair.picture)}</small></figcaption></figure>"
    yield "</div>"


def _side_by_side(before: Measured, after: Measured) -> Iterable[Sequence[str]]:
    for key, words in FIGURES.items():
        if key in before.figures and key in after.figures:
            a, b = before.figures[key], after.figures[key]
            form = ",.0f" if key.endswith("bytes") else ".2f"
            yield words, format(a, form), format(b, form), f"{b / a:.2f}" if a else ""


def _captions(facts: Facts) -> Iterable[str]:
    captions = {caption.picture: caption for caption in facts.parity.captions if not caption.clip}
    yield "<h2>Pictures</h2>"
    yield f"<p>{escape(_pictures_kind(facts.samples))}.</p>"
    yield '<div class="pictures">'
    for sample in facts.samples:
        caption = captions.get(sample.name)
        yield f'<figure><img alt="{escape(sample.name)}" src="{_jpeg(sample.pixels)}">'
        yield f"<figcaption>{_caption_text(caption)}<small>{escape(sample.name)}</small></figcaption></figure>"
    yield "</div>"
    clips = [caption for caption in facts.parity.captions if caption.clip]
    if clips:
        yield "<h2>Clips</h2><p>Made of these pictures, by a crop that moves over them: nothing was filmed.</p>"
        yield _table(("picture", "caption", ""), ((each.picture, each.text, each.verdict) for each in clips))


def _detections(facts: Facts) -> Iterable[str]:
    found = {each.picture: each for each in facts.parity.detections}
    if not found:
        return
    yield "<h2>Detections</h2><p>Asked for names that the detector was trained with and others, with a threshold so "
    yield "low that something is found in every picture: what there is to see here is that both find the same.</p>"
    yield '<div class="pictures">'
    for sample in facts.samples:
        each = found.get(sample.name)
        if each is None or each.example is None:
            continue
        best = each.example.detections[:DRAWN]
        yield f'<figure><img alt="{escape(sample.name)}" src="{_jpeg(draw_detections(sample.pixels, best), DRAWN_PX)}">'
        yield f"<figcaption>{escape(_found(each))}<small>{escape(sample.name)}</small></figcaption></figure>"
    yield "</div>"


def _found(each: DetectionParity) -> str:
    text = f"{each.found} found by PyTorch"
    if not each.problem:
        return f"{text}, and the same by the bundle"
    return f"{text}; {each.different} different, as float16 may: {each.problem}"


def _detection_json(each: DetectionParity) -> dict[str, Any]:
    best = each.example.detections[:DRAWN] if each.example is not None else ()
    plain = {key: getattr(each, key) for key in ("picture", "found", "different", "problem", "excused")}
    return {**plain, "best": [one.to_dict() for one in best]}


def _caption_text(caption: CaptionParity | None) -> str:
    if caption is None:
        return ""
    text = f"<q>{escape(caption.text)}</q>" if caption.text else "<em>(empty caption)</em>"
    if caption.verdict == "tie":
        text += f"<em>parts from PyTorch's at a tie: its two best tokens are {caption.gap:.2g} apart</em>"
    return text


def _pictures_kind(samples: Sequence[Sample]) -> str:
    if all(sample.kind == "given" for sample in samples):
        return f"{len(samples)} pictures given with --pictures"
    return f"{len(samples)} pictures drawn by the exporter, not photographs; give your own with --pictures"


def _parity(parity: Parity) -> Iterable[str]:
    yield "<h2>Against PyTorch</h2>"
    yield (
        f"<p>Largest error of each output, run by the runtime. Allowed is {parity.relative_tolerance:g} of the "
        f"output's largest value.</p>"
    )
    rows = (
        (o.output, f"{o.max_abs_error:.2e}", f"{o.tolerance:.2e}", f"{o.largest_value:.3g}", str(o.cases), o.worst_case)
        for o in parity.outputs
    )
    yield _table(("output", "error", "allowed", "largest value", "cases", "worst at"), rows)


def _islands(facts: Facts) -> Iterable[str]:
    if facts.islands:
        yield "<h2>Float32 among float16</h2>"
        yield f"<p>Found by computing each node in float16 on {escape(facts.audited_on)}. TensorRT takes every graph, "
        yield "as far as a lint can tell.</p>"
        yield "<details><summary>all</summary><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in facts.islands)
        yield "</ul></details>"


def _sizes(facts: Facts) -> Iterable[str]:
    plan = facts.plan
    yield "<h2>Sizes</h2>"
    rows = [(name, f"{file.size_bytes:,}") for name, file in facts.manifest.files.items()]
    rows += [
        ("together, without this report", f"{facts.bundle_bytes:,}"),
        ("unique weights", f"{facts.unique_weight_bytes:,}"),
        ("the first over the second", f"{facts.bundle_ratio:.4f}"),
    ]
    yield _table(("file", "bytes"), rows)
    yield (
        f"<p>Expected memory with all graphs open: about {megabytes(plan.resident_bytes)}. A picture's keys and "
        f"values take {megabytes(plan.cross_bytes)}, {_clip_bytes(plan)}a beam of "
        f"{plan.max_tokens} tokens {megabytes(plan.cache_bytes)}.</p>"
    )


def _clip_bytes(plan: Plan) -> str:
    return f"a clip's {megabytes(plan.clip_cross_bytes)}, " if plan.clip_cross_bytes else ""


def _times(facts: Facts) -> Iterable[str]:
    yield "<h2>Times</h2><p>Through the runtime, on the machine that exported, with its default options.</p>"
    yield _table(("what", "ms"), ((t.what, f"{t.milliseconds:.2f}") for t in facts.parity.timings))
    yield _table(("step of the export", "s"), ((step, f"{s:.1f}") for step, s in facts.export_seconds.items()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All cells are escaped."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="table"><table><tr>{titles}</tr>{cells}</table></div>'


def _rgb(image: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = image.rgb() if hasattr(image, "rgb") else image
    return pixels


def _thumbnail(pixels: NDArray[np.uint8], longest: int = THUMBNAIL_PX) -> NDArray[np.uint8]:
    """uint8[H, W, 3] → the same, at most `longest` wide and high."""
    scale = min(1.0, longest / max(pixels.shape[:2]))
    size = tuple(max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _jpeg(pixels: NDArray[np.uint8], longest: int = THUMBNAIL_PX) -> str:
    """A small copy of uint8[H, W, 3], RGB, as a data URL."""
    small = _thumbnail(pixels, longest)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Export report: {title}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { margin: .5rem 0; } h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; }
.bad { border-left: 4px solid #b33; background: var(--soft); padding: .5rem .75rem; }
.good { border-left: 4px solid #2a8a4a; background: var(--soft); padding: .5rem .75rem; }
.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, th:nth-child(6), td:nth-child(6) { text-align: left; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; border-radius: 6px; display: block; }
figcaption { font-size: .9rem; padding-top: .25rem; } figcaption > * { display: block; } small { opacity: .7; }
</style>
<body>
{body}
</body>
</html>
"""

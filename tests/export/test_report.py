from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mammut_export import report
from mammut_export.detections import DetectionParity
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.parity import CaptionParity, OutputParity, Parity, Timing
from mammut_export.plan import make_plan
from mammut_export.samples import Sample
from mammut_runtime.bundle import Bundle
from mammut_runtime.detection.boxes import Box, Detection, Detections

NASTY = '<script>alert("&1")</script>'


@pytest.fixture
def facts(maker: object) -> report.Facts:
    manifest = Bundle.open(maker.BUNDLE).manifest  # type: ignore[attr-defined]
    from mammut import presets

    outputs = (OutputParity("vision.embedding", 1e-7, 1e-5, 0.3, "batch 1", 8),)
    captions = (
        CaptionParity(NASTY, NASTY, (1,), (1,), "same", None),
        CaptionParity("b.png", "a cat", (1, 2), (1, 3), "tie", 1e-7),
        CaptionParity("c.png", "", (), (), "same", None),
    )
    samples = tuple(Sample(name, np.full((300, 200, 3), 128, np.uint8), "given") for name in (NASTY, "b.png", "c.png"))
    parity = Parity(5e-5, outputs, captions, (), ("vision: batch 1",), 0.0, (Timing("picture to embedding", 1.5),))
    plan = make_plan(presets.tiny(), dict.fromkeys(GRAPHS, "fp32"), 8)
    return report.Facts(manifest, plan, parity, samples, {"tracing": 2.0})


def test_detections_are_drawn(facts: report.Facts) -> None:
    example = Detections((Detection(NASTY, 0.9, Box(10, 20, 150, 200)),), 200, 300)
    found = (
        DetectionParity("b.png", 1, 0, "", example=example),
        DetectionParity("c.png", 9, 1, f"{NASTY} is missing", True, Detections((), 200, 300)),
    )
    before, with_boxes = facts, dataclasses.replace(facts, parity=dataclasses.replace(facts.parity, detections=found))
    text = report.as_html(with_boxes)
    page = Page(text)
    assert page.tags.count("img") == Page(report.as_html(before)).tags.count("img") + 2  # the control has none
    assert "1 found by PyTorch, and the same by the bundle" in text and "9 found by PyTorch; 1 different" in text
    assert "<script" not in text and "Detections" not in report.as_html(before)
    plain = report.as_json(with_boxes)["detections"]
    assert [each["excused"] for each in plain] == [False, True] and plain[0]["best"][0]["box"]["x1"] == 150
    json.dumps(plain)


class Page(HTMLParser):
    """Collects tags and attribute values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_file_that_fetches_nothing(facts: report.Facts) -> None:
    text = report.as_html(facts)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert page.tags.count("img") == 3
    assert sum(value.startswith("data:image/jpeg;base64,") for value in page.values) == 3
    assert "width=device-width, initial-scale=1" in page.values
    assert "default-src 'none'" in text


def test_texts_are_escaped(facts: report.Facts) -> None:
    text = report.as_html(facts)
    assert NASTY not in text and text.count("&lt;script&gt;") >= 3
    braces = dataclasses.replace(facts.manifest.model, name="{body}{title}")
    named = dataclasses.replace(facts, manifest=dataclasses.replace(facts.manifest, model=braces))
    assert report.as_html(named).count("{body}{title}") == 2  # the title and the heading, as they are


def test_page_says_what_was_compared(facts: report.Facts) -> None:
    text = report.as_html(facts)
    assert "2 of 3 greedy captions the same token for token, 1 parted at a tie" in text
    assert "3 pictures given with --pictures" in text and "(empty caption)" in text
    drawn = tuple(dataclasses.replace(sample, kind="drawn") for sample in facts.samples)
    assert "drawn by the exporter, not photographs" in report.as_html(dataclasses.replace(facts, samples=drawn))


def test_json_holds_the_figures(facts: report.Facts, tmp_path: Path) -> None:
    report.write(tmp_path, facts)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["parity"]["outputs"][0]["output"] == "vision.embedding"
    assert data["captions"][1]["gap"] == 1e-7
    assert data["timings_ms"] == {"picture to embedding": 1.5}
    sizes = data["sizes"]
    assert sizes["bundle_bytes"] == sum(sizes["files_bytes"].values())
    ratio = sizes["bundle_bytes"] / sizes["unique_weight_bytes"]
    assert sizes["bundle_over_unique_weights"] == pytest.approx(ratio, abs=1e-4)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.as_html(facts)

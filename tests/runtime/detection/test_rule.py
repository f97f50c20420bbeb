"""The manifest's part about detection."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mammut_runtime.bundle import Bundle
from mammut_runtime.detection.rule import DetectionRule
from mammut_runtime.errors import BundleError
from mammut_runtime.manifest import graph_contract, read_manifest
from mammut_runtime.strict import from_dict, to_dict


def test_the_manifest_keeps_the_rule_and_the_graph(detecting: Any) -> None:
    manifest = Bundle.open(detecting.folder).manifest
    assert manifest.detection == detecting.rule
    graph = manifest.graphs["detector"]
    assert {each.name: each.shape for each in graph.inputs} == {
        "pixels": ("batch", 3, 64, 64),
        "classes": ("classes", 6),
        "novel": ("classes",),
    }
    assert {each.name: each.shape for each in graph.outputs} == {
        "boxes": ("batch", 9, 4),
        "scores": ("batch", 9, "classes"),
    }
    assert "detector" not in graph_contract(manifest.model, 16)


def _manifest(detecting: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((detecting.folder / "manifest.json").read_text("utf-8"))
    return data


def test_rule_and_graph_come_together(detecting: Any) -> None:
    data = _manifest(detecting)
    read_manifest(json.dumps(data).encode())  # control
    for change in (
        {key: value for key, value in data.items() if key != "detection"},
        {**data, "graphs": {key: value for key, value in data["graphs"].items() if key != "detector"}},
    ):
        with pytest.raises(BundleError, match="detection: expected an object in a bundle with the graph 'detector'"):
            read_manifest(json.dumps(change).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, r"detection\.size: expected a number from 1 to 4,096, got 0"),
        ({"std": [0.2, 0.2, 0]}, r"detection\.std\[2\]: expected a number"),
        ({"nms_iou": 1.5}, r"detection\.nms_iou: expected a number from 0 to 1"),
        ({"templates": []}, r"detection\.templates: expected 1 to 1,000 items"),
        ({"templates": ["a {} of {}"]}, r"templates: expected {} once and no other braces, got 'a {} of {}'"),
        ({"base_names": ["cat", "cat"]}, "base_names: a name is there twice"),
        ({"base_names": ["a\nb"]}, "expected a text without control characters"),
        ({"proposals": 4}, r"boxes: expected float32\[batch, 4, 4\], got float32\[batch, 9, 4\]"),
        ({"extra": 1}, r"detection: unknown key 'extra'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(detecting: Any, change: dict[str, Any], message: str) -> None:
    data = _manifest(detecting)
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps({**data, "detection": {**data["detection"], **change}}).encode())


def test_there_and_back(detecting: Any) -> None:
    rule = dataclasses.replace(detecting.rule, base_names=("小さい車",))
    assert from_dict(DetectionRule, json.loads(json.dumps(to_dict(rule))), "x", BundleError) == rule

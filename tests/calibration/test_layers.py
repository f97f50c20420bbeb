from __future__ import annotations

from typing import Any

import onnx
import pytest

from mammut_calibration.activations import layers, read_graph
from mammut_calibration.data import Dataset
from mammut_calibration.feeds import Feeds, record_feeds
from mammut_calibration.layers import graph_errors, layer_errors
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError


@pytest.fixture(scope="module")
def feeds(tiny: Bundle, data: Dataset) -> dict[str, list[Feeds]]:
    return record_feeds(tiny, data, 2, threads=1)


def test_a_bundle_has_no_errors_against_itself(tiny: Bundle, feeds: dict[str, list[Feeds]], data: Dataset) -> None:
    notes: list[str] = []
    found = layer_errors(tiny, tiny, data, feeds=feeds, threads=1, note=notes.append)
    expected = sum(len(layers(read_graph(tiny.graph_path(name)))) for name in tiny.manifest.graphs)
    assert len(found) == expected and not notes
    assert max(each.relative_error for each in found) < 1e-5
    with pytest.raises(InputError, match="no graph 'detector' in both bundles"):
        layer_errors(tiny, tiny, data, graphs=["detector"], feeds=feeds)


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_every_layer_of_a_quantized_graph_is_found_and_a_little_wrong(
    tiny: Bundle, quantized: Any, feeds: dict[str, list[Feeds]], data: Dataset, graph: str
) -> None:
    notes: list[str] = []
    found = layer_errors(tiny, quantized(graph), data, graphs=[graph], feeds=feeds, threads=1, note=notes.append)
    assert not notes and len(found) == len(layers(read_graph(tiny.graph_path(graph))))
    quantized_layers = [each for each in found if each.relative_error > 1e-4]
    assert len(quantized_layers) >= len(found) - 2  # Conv and Gather were left alone
    assert found[0].relative_error < 0.05 and found[0].cosine > 0.998
    assert list(found) == sorted(found, key=lambda each: -each.relative_error)


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("vision.blocks.0.mlp.up.weight", "vision.blocks.0.mlp.up/MatMul"),  # its weight
        ("vision.blocks.0.mlp/Gelu", "vision.blocks.0.mlp.down/MatMul"),  # what goes in
        ("vision.blocks.1.qkv/MatMul", "vision.blocks.1.qkv/MatMul"),  # what comes out
    ],
)
@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_wrong_scale_names_its_layer_and_no_later_one(
    make: Any, tiny: Bundle, quantized: Any, feeds: dict[str, list[Feeds]], data: Dataset,
    part: str, layer: str, factor: float,
) -> None:  # fmt: skip
    broken = quantized("vision", make.scaled(part, factor))
    first, second, *_ = layer_errors(tiny, broken, data, graphs=["vision"], feeds=feeds, threads=1)
    assert first.layer == layer
    assert first.relative_error > 1.5 * second.relative_error and second.relative_error < 0.05


def test_a_layer_that_the_candidate_has_not_is_noted(
    tiny: Bundle, quantized: Any, feeds: dict[str, list[Feeds]]
) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["elsewhere" if name == "vision.blocks.0.mlp.up/MatMul" else name for name in names]

    path = quantized("vision", rename).graph_path("vision")
    notes: list[str] = []
    found = graph_errors("vision", tiny.graph_path("vision"), path, feeds["vision"], threads=1, note=notes.append)
    assert len(notes) == 1 and "vision.blocks.0.mlp.up/MatMul: not found in the candidate" in notes[0]
    assert len(found) == len(layers(read_graph(tiny.graph_path("vision")))) - 1

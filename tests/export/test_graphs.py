from __future__ import annotations

import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut_export.contents import contract_of, detection_rule, model_info
from mammut_export.graphs import (
    GRAPHS,
    PICTURE_GRAPHS,
    TASKS,
    TRACED_SIZES,
    flatten_pairs,
    graphs_for,
    pairs,
    tasks_for,
    traceable,
    unit_and_norm,
)
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import graph_contract

VIDEO = [("video", True), ("memory", True), ("decoder", True)]
"""Graphs that a bundle with video has, or has differently."""


def test_tasks_need_these_graphs() -> None:
    assert graphs_for(("caption",)) == graphs_for(("ask",)) == ("vision", "memory", "decoder")
    assert graphs_for(("search",)) == graphs_for(("match", "search")) == ("vision", "text")
    assert graphs_for(("watch",)) == ("vision", "video")
    assert graphs_for(("detect",)) == ("vision", "detector", "text")
    assert graphs_for(TASKS) == GRAPHS


def test_what_a_checkpoint_can_do(tiny: Checkpoint, tiny_video: Checkpoint, tiny_detector: Checkpoint) -> None:
    assert graphs_for(tasks_for(tiny, None)) == PICTURE_GRAPHS
    assert "watch" in tasks_for(tiny_video, None) and tasks_for(tiny_video, ("search",)) == ("search",)
    with pytest.raises(InputError, match="'watch' cannot be exported: the checkpoint has no tubes; train it on clips"):
        tasks_for(tiny, ("caption", "watch"))
    assert "detect" in tasks_for(tiny_detector, None) and "watch" not in tasks_for(tiny_detector, None)
    with pytest.raises(InputError, match="'detect' cannot be exported: the checkpoint has no detector; train one"):
        tasks_for(tiny, ("detect",))


@pytest.mark.parametrize(("tasks", "message"), [((), "got none"), (("caption", "dance"), "got 'dance'")])
def test_tasks_that_do_not_exist(tasks: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"expected one or more of caption, ask, .*{message}"):
        graphs_for(tasks)


@pytest.mark.parametrize(("name", "video"), [*((name, False) for name in PICTURE_GRAPHS), *VIDEO])
def test_modules_keep_the_contract(tiny: Checkpoint, tiny_video: Checkpoint, name: str, video: bool) -> None:
    checkpoint, graphs = (tiny_video, ("video",)) if video else (tiny, ())
    info = graph_contract(model_info(checkpoint, graphs), tiny.preprocess.size)[name]
    assert any("seen" in tensor.shape for tensor in info.inputs) == (video and name != "video")
    graph = traceable(name, checkpoint, info)
    with torch.no_grad():
        outputs = graph.module(*graph.example())
    sizes = TRACED_SIZES | {"past+new": TRACED_SIZES["past"] + TRACED_SIZES["new"]}
    assert len(outputs) == len(info.outputs)
    for value, tensor in zip(outputs, info.outputs, strict=True):
        assert list(value.shape) == [size if isinstance(size, int) else sizes[size] for size in tensor.shape], tensor


def test_the_detectors_module_keeps_the_contract(tiny: Checkpoint, tiny_detector: Checkpoint) -> None:
    info = contract_of(tiny_detector, ("detector",))["detector"]
    graph = traceable("detector", tiny_detector, info)
    with torch.no_grad():
        boxes, scores = graph.module(*graph.example())
    rule = detection_rule(tiny_detector, ("detector",))
    assert rule is not None and boxes.shape == (TRACED_SIZES["batch"], rule.proposals, 4)
    assert scores.shape == (TRACED_SIZES["batch"], rule.proposals, TRACED_SIZES["classes"])
    assert "detector" not in contract_of(tiny_detector, ("vision",)) and detection_rule(tiny, ("detector",)) is None
    with pytest.raises(InputError, match="the checkpoint has no detector"):
        traceable("detector", tiny, info)


def test_traced_sizes_cannot_be_confused() -> None:
    assert len(set(TRACED_SIZES.values())) == len(TRACED_SIZES)
    assert min(TRACED_SIZES.values()) > 1


def test_vectors_are_as_the_core_normalises_them() -> None:
    raw = torch.randn(4, 6)
    raw[2] = 0
    unit, norm = unit_and_norm(raw)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(raw, dim=-1))
    torch.testing.assert_close(norm, raw.norm(dim=-1))


def test_pairs_and_back() -> None:
    flat = tuple(torch.full((1,), float(i)) for i in range(6))
    assert [k.item() for k, _ in pairs(flat)] == [0, 2, 4]
    assert flatten_pairs(pairs(flat)) == flat

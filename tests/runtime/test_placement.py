"""Which nodes count when a provider must take the whole graph, and what the refusal says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mammut_runtime.engines.placement import CPU, check_placement, size_nodes
from mammut_runtime.errors import EngineError

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = reshape(x @ w, sizes of x): two nodes compute, four handle sizes, one makes a constant."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Shape", ["x"], ["shape"], name="shape"),
        node("Constant", [], ["first"], name="constant", value_ints=[0]),
        node("Gather", ["shape", "first"], ["batch"], name="gather"),
        node("Concat", ["batch", "rest"], ["target"], name="concat", axis=0),
        node("MatMul", ["x", "w"], ["product"], name="matmul"),
        node("Reshape", ["product", "target"], ["y"], name="reshape"),
        node("Shape", ["y"], ["after"], name="shape2"),
    ]
    constants = [
        helper.make_tensor("rest", TensorProto.INT64, [2], [2, 1]),
        helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 0.0, 0.0, 1.0]),
    ]
    inputs, outputs = [info("x", TensorProto.FLOAT, ["n", 2])], [info("y", TensorProto.FLOAT, ["n", 2, 1])]
    model = helper.make_model(helper.make_graph(nodes, "sizes", inputs, outputs, constants))
    path = tmp_path_factory.mktemp("graphs") / "sizes.onnx"
    onnx.save(model, str(path))
    return path


@dataclass(frozen=True)
class Node:
    """As ONNX Runtime describes one."""

    name: str
    op_type: str


@dataclass(frozen=True)
class Part:
    """Nodes that a provider took together."""

    ep_name: str
    nodes: tuple[Node, ...]

    def get_nodes(self) -> list[Node]:
        return list(self.nodes)


class Session:
    """The part of an InferenceSession that is asked."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return list(self._parts)


SIZES = (Node("shape", "Shape"), Node("gather", "Gather"), Node("concat", "Concat"))


def test_size_nodes(graph: Path) -> None:
    assert size_nodes(graph.read_bytes(), "sizes.onnx") == {"shape", "gather", "concat", "shape2"}


def test_sizes_may_stay_on_the_processor(graph: Path) -> None:
    taken = Part(CUDA, (Node("matmul", "MatMul"), Node("reshape", "Reshape")))
    check_placement(graph, Session(taken, Part(CPU, SIZES)), [CUDA])


def test_work_may_not(graph: Path) -> None:
    """The control: the same parts, and one node that computes with numbers of the picture."""
    session = Session(Part(CUDA, (Node("reshape", "Reshape"),)), Part(CPU, (*SIZES, Node("matmul", "MatMul"))))
    message = (
        rf"sizes\.onnx: {CUDA} cannot run the whole graph\. Nodes: {CUDA} 1 \(1 Reshape\); {CPU} 1 \(1 MatMul\)\. "
        r"Not taken: matmul\. Name a provider that takes them, or .*--allow-fallback"
    )
    with pytest.raises(EngineError, match=message):
        check_placement(graph, session, [CUDA])


def test_every_provider_that_was_named_may_take_nodes(graph: Path) -> None:
    session = Session(Part(TENSORRT, (Node("matmul", "MatMul"),)), Part(CUDA, (Node("reshape", "Reshape"),)))
    check_placement(graph, session, [TENSORRT, CUDA])
    with pytest.raises(EngineError, match=rf"Nodes: {TENSORRT} 1 \(1 MatMul\); {CUDA} 1 \(1 Reshape\)"):
        check_placement(graph, session, [TENSORRT])


def test_long_lists_are_cut(graph: Path) -> None:
    many = tuple(Node(f"n{i}", f"Kind{i % 9}") for i in range(40))
    with pytest.raises(EngineError, match=rf"{CPU} 40 \(.*, 12 others\)\. Not taken: n0, n1, n2, n3 \.\.\.\. "):
        check_placement(graph, Session(Part(CPU, many)), [CUDA])

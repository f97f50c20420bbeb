from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs
from mammut_export.contents import model_info
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.graphs import traceable
from mammut_runtime.errors import EngineError
from mammut_runtime.manifest import graph_contract


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_plain_opset_21(models: dict[str, ir.Model], name: str) -> None:
    model = models[name]
    assert dict(model.opset_imports) == {"": 21} and model.ir_version == 10
    operators = Counter(node.op_type for node in model.graph)
    # If and Loop would hide a size that was decided while tracing; IsNaN is what a masked kernel leaves behind.
    assert not operators.keys() & {"Attention", "If", "Loop", "IsNaN"}
    assert {node.domain for node in model.graph} == {""}


@pytest.mark.parametrize("name", GRAPHS)
def test_names_are_those_of_the_contract(models: dict[str, ir.Model], tiny: Checkpoint, name: str) -> None:
    expected = graph_contract(model_info(tiny), tiny.preprocess.size)[name]
    assert onnx_graphs.graph_info(models[name], expected.file) == expected


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_of_this_machine_is_in_the_file(models: dict[str, ir.Model], name: str, tmp_path: Path) -> None:
    onnx_graphs.save(models[name], tmp_path / "graph.onnx")
    data = (tmp_path / "graph.onnx").read_bytes()
    for trace in (b"site-packages", b".py", b"stack_trace", str(Path.home()).encode(), b"ExportedProgram"):
        assert trace not in data, trace


def test_weights_have_their_parameters_names(models: dict[str, ir.Model], tiny: Checkpoint) -> None:
    state = tiny.model.state_dict()
    for model in models.values():
        for name, value in model.graph.initializers.items():
            tensor = value.const_value.numpy()
            if tensor.dtype != np.float32 or tensor.ndim < 2:
                continue
            parameter = state[name.removesuffix(".T")].numpy()
            np.testing.assert_array_equal(tensor, parameter.T if name.endswith(".T") else parameter)


def test_matrices_have_one_layout(models: dict[str, ir.Model]) -> None:
    # Paper's dialect: the projection of the pooled vector (two dimensions) also makes the memory (three).
    assert "memory_projection.weight.T" in models["vision"].graph.initializers
    assert "memory_projection.weight.T" in models["memory"].graph.initializers
    # The tied head is the embedding as it is, and no transposed copy of it.
    names = [name for name in models["decoder"].graph.initializers if "embedding" in name]
    assert names == ["text.token_embedding.weight"]


def test_tracing_twice_gives_the_same_bytes(tiny: Checkpoint, traced: dict[str, bytes]) -> None:
    info = graph_contract(model_info(tiny), tiny.preprocess.size)["memory"]
    again = ir.serde.serialize_model(onnx_graphs.to_onnx(traceable("memory", tiny, info))).SerializeToString()
    assert again == traced["memory"]


@pytest.mark.parametrize(
    ("opset", "domain", "operator", "message"),
    [
        (21, "", "Relu", None),  # the control
        (23, "", "Relu", r"asked the exporter for opset 21, got \{'': 23\}"),
        (21, "", "Attention", "the graph has Attention, which is not an operator of opset 21"),
        (21, "com.microsoft", "Gelu", "the graph has com.microsoft::Gelu"),
        (21, "", "NoSuchThing", "the graph has NoSuchThing"),
    ],
)
def test_other_operators_are_refused(opset: int, domain: str, operator: str, message: str | None) -> None:
    value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node(domain, operator, [value])
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": opset}), ir_version=10)
    if message is None:
        onnx_graphs._check_standard(model, "g")
        return
    with pytest.raises(EngineError, match=message):
        onnx_graphs._check_standard(model, "g")


def test_a_graph_with_other_names_is_refused(models: dict[str, ir.Model], tiny: Checkpoint) -> None:
    contract = graph_contract(model_info(tiny), tiny.preprocess.size)
    with pytest.raises(EngineError, match=r"expected tensors \['tokens'\], got \['ids'\]"):
        onnx_graphs._check_contract(models["text"], traceable("memory", tiny, contract["memory"]))


def test_a_damaged_graph_is_refused(models: dict[str, ir.Model], tmp_path: Path) -> None:
    proto = ir.serde.serialize_model(models["memory"])
    proto.graph.node[0].input[0] = "nowhere"
    (tmp_path / "memory.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(EngineError, match=r"memory\.onnx: not valid ONNX"):
        onnx_graphs.check_file(tmp_path / "memory.onnx")
    onnx.save(ir.serde.serialize_model(models["text"]), str(tmp_path / "text.onnx"))
    onnx_graphs.check_file(tmp_path / "text.onnx")


def test_the_exporter_says_nothing(capfd: pytest.CaptureFixture[str], tiny: Checkpoint) -> None:
    import logging

    before = logging.getLogger("torch.onnx").level
    info = graph_contract(model_info(tiny), tiny.preprocess.size)["memory"]
    onnx_graphs.to_onnx(traceable("memory", tiny, info))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert logging.getLogger("torch.onnx").level == before
    assert torch.is_grad_enabled()

"""Every rule of the lint with a graph that breaks it and one that does not; and tensorrt-rtx as the judge of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import BundleError
from mammut_runtime.manifest import InputProfile
from mammut_runtime.onnx_reader import read_onnx
from mammut_runtime.tensorrt_lint import lint_bundle, lint_graph
from mammut_runtime.tensorrt_operators import NEWER, OPERATORS, PLUGINS

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
F32, F16, I64, U8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.UINT8
MATRIX = np.ones((8, 8), np.float32)
SCALE = np.float32(0.1)
Nodes = list[onnx.NodeProto]
Shape = list[int | str]
op = helper.make_node


@dataclass(frozen=True)
class Case:
    """A graph that breaks one rule, and its control: the same with `good` nodes (or shapes, or constants)."""

    rule: str
    bad: Callable[[], onnx.ModelProto]
    good: Callable[[], onnx.ModelProto]
    rtx_refuses: bool = True
    """False where tensorrt-rtx is laxer than the list for TensorRT 10.3."""


def graph(
    nodes: Nodes,
    inputs: dict[str, tuple[int, Shape]],
    output: int = F32,
    constants: dict[str, np.ndarray | np.generic] | None = None,
    *,
    opset: int = 21,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, output, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def quantized(zero: np.ndarray | np.generic) -> onnx.ModelProto:
    nodes = [
        op("QuantizeLinear", ["x", "s", "z"], ["q"]),
        op("DequantizeLinear", ["q", "s", "z"], ["d"]),
        op("MatMul", ["d", "w"], ["y"]),
    ]
    return graph(nodes, {"x": (F32, [2, 8])}, constants={"s": SCALE, "z": zero, "w": MATRIX})


def one(op_type: str, shape: Shape, dtype: int = F32, **attributes: object) -> onnx.ModelProto:
    return graph([op(op_type, ["x"], ["y"], **attributes)], {"x": (dtype, shape)}, dtype)


def bias(dtype: type) -> onnx.ModelProto:
    nodes = [op("DequantizeLinear", ["b", "s"], ["d"]), op("MatMul", ["x", "d"], ["y"])]
    return graph(nodes, {"x": (F32, [2, 8])}, constants={"b": np.ones((8, 8), dtype), "s": SCALE})


def dynamic() -> onnx.ModelProto:
    nodes = [
        op("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        op("MatMulInteger", ["q", "w", "z"], ["i"]),
        op("Cast", ["i"], ["y"], to=F32),
    ]
    return graph(nodes, {"x": (F32, [2, 8])}, constants={"w": MATRIX.astype(np.int8)})


def rows(dtype: type, cast: bool) -> onnx.ModelProto:
    nodes = [op("Gather", ["w", "x"], ["g" if cast else "y"])]
    nodes += [op("Cast", ["g"], ["y"], to=F32)] if cast else []
    return graph(nodes, {"x": (I64, [2])}, constants={"w": MATRIX.astype(dtype)})


def resize(**attributes: object) -> onnx.ModelProto:
    scales = np.array([1, 1, 2, 2], np.float32)
    return graph(
        [op("Resize", ["x", "", "s"], ["y"], **attributes)], {"x": (F32, [1, 2, 4, 8])}, constants={"s": scales}
    )


def attention() -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {name: (F32, [1, 2, 4, 8]) for name in ("q", "k", "v")}
    return graph([op("Attention", list(inputs), ["y"])], inputs, opset=23)


def by_hand(dtype: int, width: int, single: bool = False) -> onnx.ModelProto:
    """Attention as it is exported, over a past that grows, which is where the width matters."""
    inputs: dict[str, tuple[int, Shape]] = {
        "q": (dtype, ["batch", 2, "new", width]), "k": (dtype, ["batch", 2, width, "past"]),
    }  # fmt: skip
    nodes = [op("MatMul", ["q", "k"], ["scores"])]
    nodes += [op("Cast", ["scores"], ["wide"], to=F32), op("Softmax", ["wide"], ["y"])] if single else [
        op("Softmax", ["scores"], ["y"])
    ]  # fmt: skip
    return graph(nodes, inputs, F32 if single else dtype)


def mixed(cast: bool) -> onnx.ModelProto:
    nodes = [op("Cast", ["h"], ["f"], to=F32), op("Add", ["x", "f"], ["y"])] if cast else [op("Add", ["x", "h"], ["y"])]
    return graph(nodes, {"x": (F32, [2, 8]), "h": (F16, [2, 8])})


def reduce(constant: bool) -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"x": (F32, [2, 8])}
    inputs |= {} if constant else {"a": (I64, [1])}
    return graph([op("ReduceSum", ["x", "a"], ["y"])], inputs, constants={"a": np.array([1])} if constant else {})


def layer_norm(outputs: tuple[str, ...]) -> onnx.ModelProto:
    scale = np.ones(8, np.float32)
    node = op("LayerNormalization", ["x", "s"], list(outputs))
    return graph([node], {"x": (F32, [2, 8])}, constants={"s": scale}, outputs=outputs)


def top_k(count: int) -> onnx.ModelProto:
    node = op("TopK", ["x", "k"], ["y", "i"])
    return graph([node], {"x": (F32, [2, 8000])}, constants={"k": np.array([count])})


def scatter(reduction: str) -> onnx.ModelProto:
    constants = {"i": np.array([[0]]), "u": np.ones((1, 8), np.float32)}
    return graph(
        [op("ScatterND", ["x", "i", "u"], ["y"], reduction=reduction)], {"x": (F32, [2, 8])}, constants=constants
    )


def suppression() -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"b": (F32, [1, 9, 4]), "s": (F32, [1, 1, 9])}
    constants = {"m": np.array([3]), "i": np.array([0.5], np.float32)}
    return graph([op("NonMaxSuppression", ["b", "s", "m", "i"], ["y"])], inputs, I64, constants)


def product(dtype: int) -> onnx.ModelProto:
    weight = MATRIX.astype(np.float32 if dtype == F32 else np.int64)
    return graph([op("MatMul", ["x", "w"], ["y"])], {"x": (dtype, [2, 8])}, dtype, {"w": weight})


def relu() -> onnx.ModelProto:
    return one("Relu", [8, 8])


def per_channel(last: int) -> onnx.ModelProto:
    nodes = [op("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1), op("MatMul", ["x", "d"], ["y"])]
    zero = np.array([0] * 7 + [last], np.int8)
    constants = {"q": MATRIX.astype(np.int8), "s": np.full(8, 0.1, np.float32), "z": zero}
    return graph(nodes, {"x": (F32, [2, 8])}, constants=constants)


CASES = {
    "unknown operator": Case("operator", lambda: one("Det", [8, 8]), relu),
    "dynamic quantization": Case("operator", dynamic, lambda: quantized(np.int8(0))),
    "own operator": Case("operator", lambda: one("Gelu", [2, 8], domain="com.microsoft"), relu, rtx_refuses=False),
    "plugin": Case("plugin", suppression, relu),
    "attention": Case("attention", lambda: attention(), lambda: by_hand(F32, 16)),
    "head width": Case("attention", lambda: by_hand(F16, 12), lambda: by_hand(F16, 16), rtx_refuses=False),
    "head width in float32": Case("attention", lambda: by_hand(F16, 12), lambda: by_hand(F16, 12, True), False),
    "unsigned": Case("zero-point", lambda: quantized(np.uint8(3)), lambda: quantized(np.int8(0))),
    "unsigned around zero": Case("zero-point", lambda: quantized(np.uint8(0)), lambda: quantized(np.int8(0)), False),
    "asymmetric": Case("zero-point", lambda: quantized(np.int8(3)), lambda: quantized(np.int8(0))),
    "asymmetric channel": Case("zero-point", lambda: per_channel(1), lambda: per_channel(0)),
    "quantized bias": Case("bias", lambda: bias(np.int32), lambda: bias(np.int8)),
    "8-bit table": Case("quantized-constant", lambda: rows(np.int8, True), lambda: rows(np.float32, False)),
    "int64 product": Case("dtype", lambda: product(I64), lambda: product(F32)),
    "int16": Case("dtype", lambda: one("Cast", [2, 8], to=TensorProto.INT16), lambda: one("Cast", [2, 8], to=I64)),
    "mixed floats": Case("types", lambda: mixed(False), lambda: mixed(True)),
    "antialias": Case("resize", lambda: resize(mode="linear", antialias=1), lambda: resize(mode="linear")),
    "cubic": Case("resize", lambda: resize(mode="cubic"), lambda: resize(mode="nearest"), rtx_refuses=False),
    "axes unknown": Case("constant", lambda: reduce(False), lambda: reduce(True)),
    "three outputs": Case("outputs", lambda: layer_norm(("y", "m", "i")), lambda: layer_norm(("y",))),
    "many best": Case("operator", lambda: top_k(4000), lambda: top_k(40)),
    "scatter adds": Case("operator", lambda: scatter("add"), lambda: scatter("none")),
    "opset": Case("opset", lambda: graph([op("Relu", ["x"], ["y"])], {"x": (F32, [2])}, opset=25), relu, False),
}


def written(model: onnx.ModelProto, folder: Path, name: str = "g") -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def profiles_of(path: Path) -> dict[str, InputProfile]:
    """One for every input with free sizes: 1 to 8, past from 0."""
    inputs = read_onnx(path.read_bytes(), path.name).inputs
    found = {}
    for value in inputs:
        assert value.shape is not None
        if any(isinstance(size, str) for size in value.shape):
            limits = [
                (size,) * 3 if isinstance(size, int) else (0 if size == "past" else 1, 4, 8) for size in value.shape
            ]
            found[value.name] = InputProfile(*(tuple(limit[i] for limit in limits) for i in range(3)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    bad, good = written(case.bad(), tmp_path, "bad"), written(case.good(), tmp_path, "good")
    findings = lint_graph(bad, profiles_of(bad))
    assert findings and findings[0].rule == case.rule, [each.describe() for each in findings]
    assert all(each.graph == "bad" and each.reason and each.remedy for each in findings)
    assert lint_graph(good, profiles_of(good)) == ()


@pytest.mark.parametrize("name", CASES)
def test_tensorrt_rtx_agrees(name: str, tmp_path: Path) -> None:
    """What it refuses, the lint finds; what the lint passes, it builds."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    from mammut_export.rtx_gate import build

    case = CASES[name]
    good = written(case.good(), tmp_path, "good")
    assert build(good, profiles_of(good), ("SM86",)).problems == ()
    bad = written(case.bad(), tmp_path, "bad")
    assert build(bad, profiles_of(bad), ("SM86",)).ok is not case.rtx_refuses


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (None, "no profile for its free sizes"),
        (InputProfile((1,), (1,), (1,)), "sizes, expected 2 each"),
        (InputProfile((2, 8), (1, 8), (4, 8)), "expected minimum <= optimum <= maximum"),
        (InputProfile((1, 8), (1, 8), (1, 9)), "where the graph has 8"),
        (InputProfile((1, 8), (2, 8), (4, 8)), None),
    ],
)
def test_profile(profile: InputProfile | None, words: str | None, tmp_path: Path) -> None:
    path = written(one("Relu", ["batch", 8]), tmp_path)
    findings = lint_graph(path, {} if profile is None else {"x": profile})
    assert [each.rule for each in findings] == ([] if words is None else ["profile"])
    assert words is None or words in findings[0].describe()


def test_names_the_node_and_the_remedy(tmp_path: Path) -> None:
    model = dynamic()
    model.graph.node[0].name = "block.0/Quantize"
    first = lint_graph(written(model, tmp_path))[0]
    assert first.describe() == (
        "g: block.0/Quantize (DynamicQuantizeLinear): TensorRT does not have it; ranges must be known beforehand: "
        "export with --precision int8 and --calibration"
    )


def test_looks_into_branches(tmp_path: Path) -> None:
    def branch(op_type: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info("b", F32, None)
        return helper.make_graph([op(op_type, ["x"], ["b"])], "branch", [], [value])

    def choice(op_type: str) -> onnx.ModelProto:
        node = op("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch(op_type))
        return graph([node], {"c": (TensorProto.BOOL, []), "x": (F32, [8, 8])})

    assert [each.op_type for each in lint_graph(written(choice("Det"), tmp_path))] == ["Det"]
    assert lint_graph(written(choice("Abs"), tmp_path)) == ()


def test_zero_points_outside_of_the_file_are_read(tmp_path: Path) -> None:
    for last, rules in ((1, ["zero-point"]), (0, [])):
        model = per_channel(last)
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
        assert [each.rule for each in lint_graph(tmp_path / "m.onnx")] == rules
        (tmp_path / "weights.bin").unlink()


def test_tiny_bundle() -> None:
    """Made for onnxruntime: nothing but profiles is missing."""
    bundle = Bundle.open(TINY)
    assert {each.rule for each in lint_bundle(bundle)} == {"profile"}
    fitting = {name: profiles_of(bundle.graph_path(name)) for name in bundle.manifest.graphs}
    manifest = replace(bundle.manifest, target="tensorrt", profiles=fitting)
    assert lint_bundle(replace(bundle, manifest=manifest)) == ()


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x3a\x05ab"])
def test_not_onnx(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"^g\.onnx: not a readable ONNX file"):
        lint_graph(tmp_path / "g.onnx")


def test_table_is_of_real_operators() -> None:
    """A typing mistake in the table would let nothing through, or everything."""
    old = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "Scatter", "Upsample", "GroupNormalization"}
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert OPERATORS.keys() - standard <= old
    assert standard >= NEWER and standard >= PLUGINS
    assert not OPERATORS.keys() & NEWER

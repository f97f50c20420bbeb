"""The audit finds the nodes that float16 spoils, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mammut_calibration.feeds import Feeds
from mammut_export.half_arithmetic import EXACT, HALF, MOST_ROWS, _some_rows, operator
from mammut_export.range_audit import ERROR_LIMIT, LARGEST, audit, audit_graph, drawn_feeds
from mammut_runtime.bundle import Bundle

F32 = TensorProto.FLOAT
TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
op = helper.make_node
RANDOM = np.random.default_rng(7)
X = RANDOM.standard_normal((2, 6, 64)).astype(np.float32)
W = (RANDOM.standard_normal((64, 64)) / 8).astype(np.float32)


def written(folder: Path, nodes: list[Any], *, shape: tuple[int, ...] = X.shape, **constants: Any) -> Path:
    """A graph tokens -> present_k.0, which are half in a bundle for tensorrt."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("tokens", F32, list(shape))],
        [helper.make_tensor_value_info("present_k.0", F32, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = folder / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def islands(path: Path, *feeds: np.ndarray) -> dict[str, str]:
    found = audit_graph(path, "g", [{"tokens": each} for each in feeds], threads=1)
    return {each.node: each.reason for each in found.islands}


def products(folder: Path) -> Path:
    nodes = [
        op("MatMul", ["tokens", "w"], ["a"], name="first"),
        op("Add", ["a", "bias"], ["b"], name="bias"),
        op("MatMul", ["b", "w"], ["present_k.0"], name="second"),
    ]
    return written(folder, nodes, w=W, bias=np.zeros(64, np.float32))


def test_a_value_above_half_makes_islands(tmp_path: Path) -> None:
    path = products(tmp_path)
    loud = X.copy()
    loud[1, 2, 3] = 1e6
    found = audit_graph(path, "g", [{"tokens": loud}], threads=1)
    assert found.names == {"first", "bias", "second"}
    worst = found.islands[0]
    assert worst.reason == "overflow" and worst.largest > 65_504
    assert worst.describe().startswith("first (MatMul): overflow, largest value 1e+06")
    assert islands(path, X) == {}
    assert (
        islands(path, X, loud)
        == islands(path, loud, X)
        == {"first": "overflow", "bias": "overflow", "second": "overflow"}
    )


def test_headroom(tmp_path: Path) -> None:
    """What is seen must leave room for what was not: a quarter of the range."""
    node = [op("Relu", ["tokens"], ["present_k.0"], name="relu")]
    path = written(tmp_path, node, shape=(4,))
    assert islands(path, np.full(4, LARGEST * 1.01, np.float32)) == {"relu": "overflow"}
    assert islands(path, np.full(4, LARGEST * 0.99, np.float32)) == {}


def test_tiny_values(tmp_path: Path) -> None:
    path = products(tmp_path)
    assert set(islands(path, X * 1e-6).values()) == {"underflow"}


@pytest.mark.parametrize(("spread", "reason"), [(400.0, "arithmetic"), (1.0, None)])
def test_the_variance_of_a_layer_norm(spread: float, reason: str | None, tmp_path: Path) -> None:
    """Values of 400 fit into float16 and their squares do not."""
    node = [op("LayerNormalization", ["tokens", "s"], ["present_k.0"], name="norm")]
    path = written(tmp_path, node, s=np.ones(64, np.float32))
    assert islands(path, X * spread) == ({} if reason is None else {"norm": reason})


@pytest.mark.parametrize(("offset", "found"), [(400.0, {"scores", "attend"}), (1.0, set[str]())])
def test_a_softmax_over_large_scores(offset: float, found: set[str], tmp_path: Path) -> None:
    """Scores of 400 are rounded to 1/4: the node that makes them is an island too, what comes before it is not."""
    nodes = [
        op("MatMul", ["tokens", "w"], ["a"], name="product"),
        op("Add", ["a", "offset"], ["scores"], name="scores"),
        op("Softmax", ["scores"], ["present_k.0"], name="attend"),
    ]
    assert islands(written(tmp_path, nodes, w=W, offset=np.float32(offset)), X).keys() == found


def test_the_blame_goes_past_moves(tmp_path: Path) -> None:
    nodes = [
        op("Add", ["tokens", "offset"], ["a"], name="scores"),
        op("Transpose", ["a"], ["t"], perm=[0, 2, 1], name="turn"),
        op("Softmax", ["t"], ["present_k.0"], name="attend"),
    ]
    assert islands(written(tmp_path, nodes, offset=np.float32(100)), X).keys() == {"scores", "turn", "attend"}


@pytest.mark.parametrize("large", [True, False])
def test_a_norm(large: bool, tmp_path: Path) -> None:
    nodes = [op("ReduceL2", ["tokens", "axes"], ["present_k.0"], name="length")]
    path = written(tmp_path, nodes, axes=np.array([-1]))
    assert islands(path, X * (300 if large else 1)) == ({"length": "arithmetic"} if large else {})


def test_same_data_same_islands(tmp_path: Path) -> None:
    path = products(tmp_path)
    feeds: list[Feeds] = [{"tokens": X * 1e-6}]
    assert audit_graph(path, "g", feeds, threads=1) == audit_graph(path, "g", feeds, threads=1)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes"),
    [
        ("MatMul", [X, W], {}),
        ("Gemm", [X[0], W, W[0]], {"transB": 1}),
        ("Conv", [RANDOM.standard_normal((2, 3, 8, 8)), RANDOM.standard_normal((5, 3, 4, 4))], {"strides": [4, 4]}),
        ("LayerNormalization", [X, W[0], W[1]], {"epsilon": 1e-5, "axis": -1}),
        ("Softmax", [X], {"axis": -1}),
        ("Gelu", [X], {}),
        ("ReduceMean", [X, np.array([1])], {"keepdims": 0}),
        ("ReduceSum", [X, np.array([-1])], {"keepdims": 0}),
        ("ReduceL2", [X, np.array([-1])], {"keepdims": 0}),
        ("Div", [X, np.abs(X) + 1], {}),
    ],
)
def test_operators_are_onnx_operators(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    """Exactly, what ONNX' own reference gives; in half, close to it and not the same."""
    from onnx.reference import ReferenceEvaluator

    typed = [each if each.dtype == np.int64 else np.asarray(each, np.float32) for each in inputs]
    names = [f"x{index}" for index in range(len(typed))]
    graph = helper.make_graph(
        [op(op_type, names, ["y"], **attributes)],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in zip(names, typed, strict=True)
        ],
        [helper.make_tensor_value_info("y", F32, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (wanted,) = ReferenceEvaluator(model).run(None, dict(zip(names, typed, strict=True)))
    compute = operator(op_type)
    assert compute is not None
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()}
    exact, half = compute(EXACT, typed, given), compute(HALF, typed, given)
    largest = np.abs(wanted).max()
    ours = np.sort(exact.ravel())
    np.testing.assert_allclose(ours, np.sort(wanted.ravel()), atol=2e-6 * largest, rtol=1e-5)
    assert 0 < np.abs(half - exact).max() < ERROR_LIMIT * largest


def test_tiny_bundle() -> None:
    """Nothing in it is large; what follows from the graph is there. One line a node, for the report."""
    bundle = Bundle.open(TINY)
    feeds = drawn_feeds(bundle, threads=1)
    found = audit(bundle, feeds, threads=1)
    assert found.keys() == bundle.manifest.graphs.keys()
    assert {each.reason for graph in found.values() for each in graph.islands} == {"graph"}
    assert {"ReduceL2", "Clip", "Div"} <= found["vision"].names
    assert found["text"].runs > 1 and found["decoder"].runs > 1
    assert len(found["vision"].describe()) == 1 + len(found["vision"].islands)


def test_a_large_product_is_judged_by_the_same_rows() -> None:
    """Of values that float16 holds as one, the rows must not depend on what is beyond it: else two different rows are
    compared, and the error is that of having nothing in common."""
    values = (1 + 1e-4 * np.random.default_rng(0).random((1, 150, 8))).astype(np.float32)
    chosen = _some_rows(values)
    assert chosen.shape[1] <= MOST_ROWS < values.shape[1]
    assert np.array_equal(HALF.round(chosen), _some_rows(HALF.round(values)))
    numbered = values.copy()
    numbered[0, :, 0] = np.arange(150) / 256  # which row it is, exact in float16; never its largest value
    assert np.array_equal(_some_rows(numbered)[..., 0], _some_rows(HALF.round(numbered))[..., 0])
    largest = np.abs(numbered).max(axis=-1)[0]  # the control: by the values themselves, other rows come first
    assert set(np.argsort(-largest)[:32]) != set(np.argsort(-HALF.round(largest), kind="stable")[:32])

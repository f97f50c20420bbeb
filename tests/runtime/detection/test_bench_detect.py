"""benchmarks/bench_detect.py runs; its figures are not the point here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mammut_runtime.model import Model

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_detect", BENCHMARKS / "bench_detect.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_detect", module)
    spec.loader.exec_module(module)
    return module


def test_the_figures_of_one_bundle(bench: Any, detecting: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(bench, "NAMES", (1, 3))
    monkeypatch.setattr(Model, "load", lambda *_, **__: detecting.model())
    row = bench.measured(detecting.folder, 1, 1)
    assert row["size"] == 64 and row["stages_ms"] == {}  # the toy's graph is a function
    assert set(row["names"]) == {"1", "3"} and row["names"]["3"]["detect_ms"] > 0
    assert row["change_ms"]["one_of_20"] > 0 and 0 < row["memory_mb"]["1"] <= row["memory_mb"]["1203"]
    json.dumps(row)
    names = {count: {**row["names"]["1"], "detect_ms": 50.0} for count in ("1", "20", "365", "1203")}
    bench.show({"model": "demo", **row, "threads": 4, "names": names})
    names["1203"] = {**names["1"], "detect_ms": 70.0}
    names["20"] = {**names["1"], "detect_ms": 150.0}
    bench.show({"model": "demo", **row, "threads": 4, "names": names})
    shown = capsys.readouterr().out
    assert shown.count("1203 names over 1") == 2 and "1.40     expected <= 1.3: FALLS SHORT" in shown
    assert "20.00     expected >= 10.0: pass" in shown and "6.67     expected >= 10.0: FALLS SHORT" in shown


def test_there_are_so_many_names(bench: Any) -> None:
    names = bench.all_names()
    assert len(names) == len(set(names)) == 1203 and names[0] == "car"


def test_the_parts_of_a_graph_are_told_by_the_names_of_its_weights(bench: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper

    def weight(name: str) -> Any:
        return helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [2.0])

    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "vision.weight"], ["seen"]),
        helper.make_node("Mul", ["seen", "pyramid.weight"], ["level"]),
        helper.make_node("Mul", ["level", "regions.weight"], ["region"]),
        helper.make_node("MatMul", ["classes", "column"], ["names"]),
        helper.make_node("Mul", ["region", "names"], ["boxes"]),
        helper.make_node("Add", ["boxes", "novel"], ["scores"]),
    ]
    inputs = [("pixels", [1, 3, 4, 4]), ("classes", ["classes", 2]), ("novel", ["classes"])]
    weights = [weight(f"{name}.weight") for name in ("vision", "pyramid", "regions")]
    weights.append(helper.make_tensor("column", onnx.TensorProto.FLOAT, [2], [1.0, 1.0]))
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("boxes", "scores")],
        weights,
    )
    assert bench._stage_of_nodes(graph) == [0, 0, 1, 2, 0, 2, 2]
    assert bench._crossings(graph, [0, 0, 1, 2, 0, 2, 2]) == [("level", 1), ("names", 0), ("seen", 0)]
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "detector.onnx").write_bytes(model.SerializeToString())
    found = bench.stages_ms(folder, 4, 1, 1)
    assert list(found) == ["encode", "proposals", "heads"] and sum(found.values()) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

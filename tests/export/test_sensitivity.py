"""The effect of a layer is that of a graph in which only that layer is quantized; a broken layer leads the list."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_tensor

from mammut_calibration.activations import layers
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.feeds import record_feeds
from mammut_calibration.layers import graph_errors
from mammut_calibration.table import CalibrationTable
from mammut_export.quantize import write_quantized
from mammut_export.sensitivity import LayerSensitivity, output_error, rank_layers
from mammut_runtime.bundle import Bundle
from mammut_runtime.canary import canary_picture
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import InputError

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
SCHEMES = [("onnxruntime", "int8"), ("onnxruntime", "int8-dynamic"), ("openvino", "int8"), ("tensorrt", "int4")]
BROKEN = "text.self_blocks.1.mlp.up/MatMul"


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(18):
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        picture = np.clip(canary_picture(seed, (40, 48)).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)
        (folder / f"{seed:02d}.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    return open_dataset([folder])


@pytest.fixture(scope="module")
def table(tiny: Bundle, data: Dataset) -> CalibrationTable:
    return calibrate(tiny, data, CalibrateOptions(threads=1, max_tokens=6))


@pytest.fixture(scope="module")
def feeds(tiny: Bundle, data: Dataset):
    return record_feeds(tiny, data, 2, threads=1)


@pytest.fixture
def write(tiny: Bundle, table: CalibrationTable, tmp_path: Path):
    """Quantizes one graph into a new folder."""

    def make(graph: str, scheme: str, target: str = "onnxruntime", keep: frozenset[str] = frozenset()) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write_quantized(tiny, folder, {graph: scheme}, target, table, keep={graph: keep})
        return folder

    return make


def multiply_scale(folder: Path, graph: str, weight: str, factor: float) -> None:
    """Break a weight's scale, wherever it is stored: as a damaged or wrong quantization would have it.

    Scales of a weight W are the initializer "W_scale" (int8, int8-dynamic) or "W_blocks_scale" (int4).
    """
    path = folder / f"{graph}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name in (f"{weight}_scale", f"{weight}_blocks_scale"))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    path.write_bytes(model.SerializeToString())


def weight_of(bundle: Bundle, graph: str, name: str) -> str:
    model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
    return next(layer.weight for layer in layers(model) if layer.name == name)


def error_of(tiny: Bundle, folder: Path, graph: str, feeds) -> float:
    """Of all outputs, run by the engine itself."""
    runs = []
    for path in (tiny.graph_path(graph), folder / f"{graph}.onnx"):
        engine = open_engine(path, "onnxruntime", EngineOptions(threads=1))
        runs.append([engine.run(feed) for feed in feeds[graph]])
        engine.close()
    return output_error(runs[0], iter(runs[1]))


@pytest.mark.parametrize(("target", "scheme"), SCHEMES)
@pytest.mark.parametrize("graph", ["text", "decoder"])
def test_a_scale_that_is_four_times_too_large_is_named(tiny, write, feeds, graph, target, scheme):
    folder = write(graph, scheme, target)
    before = rank_layers(tiny, folder, {graph: scheme}, feeds, threads=1)
    assert before[0].output_error < 0.3  # control: whole, no layer stands out
    assert max(each.local_error for each in before) < 0.2
    multiply_scale(folder, graph, weight_of(tiny, graph, BROKEN), 4)
    worst = rank_layers(tiny, folder, {graph: scheme}, feeds, threads=1)[0]
    assert (worst.graph, worst.layer) == (graph, BROKEN)
    assert worst.local_error == pytest.approx(3, rel=0.2)
    found = graph_errors(graph, tiny.graph_path(graph), folder / f"{graph}.onnx", feeds[graph], threads=1)
    assert max(found, key=lambda error: error.relative_error).layer == BROKEN
    assert worst.local_error == pytest.approx(max(error.relative_error for error in found), rel=1e-3)


@pytest.mark.parametrize(("graph", "scheme"), [("vision", "int8"), ("memory", "int8-dynamic"), ("decoder", "int4")])
def test_the_effect_is_that_of_a_graph_with_one_quantized_layer(tiny, write, feeds, graph, scheme):
    ranked = rank_layers(tiny, write(graph, scheme), {graph: scheme}, feeds, threads=1)
    names = {each.layer for each in ranked}
    for each in (ranked[0], ranked[-1]):
        alone = write(graph, scheme, keep=frozenset(names - {each.layer}) | kept_anyway(tiny, graph, names))
        assert each.output_error == pytest.approx(error_of(tiny, alone, graph, feeds), rel=0.02)
    assert ranked[0].output_error > 1.05 * ranked[-1].output_error  # control: they are not all alike


def kept_anyway(bundle: Bundle, graph: str, quantized: set[str]) -> frozenset[str]:
    model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
    return frozenset(layer.name for layer in layers(model)) - quantized


def test_keeping_the_first_layers_recovers_most(tiny, write, feeds):
    ranked = rank_layers(tiny, write("decoder", "int4"), {"decoder": "int4"}, feeds, threads=1)
    names = [each.layer for each in ranked]
    whole = error_of(tiny, write("decoder", "int4"), "decoder", feeds)
    first = error_of(tiny, write("decoder", "int4", keep=frozenset(names[:4])), "decoder", feeds)
    rng = np.random.default_rng(0)
    others = [
        error_of(tiny, write("decoder", "int4", keep=frozenset(rng.choice(names, 4, replace=False))), "decoder", feeds)
        for _ in range(4)
    ]
    assert first < 0.8 * whole
    assert first < min(others)


def test_kept_layers_and_float_graphs_are_not_ranked(tiny, write, feeds):
    keep = frozenset(["text.self_blocks.0.qkv/MatMul"])
    folder = write("text", "int8", keep=keep)
    ranked = rank_layers(tiny, folder, {"vision": "fp32", "memory": "fp16", "text": "int8"}, feeds, threads=1)
    assert {each.graph for each in ranked} == {"text"}
    model = onnx.load(str(tiny.graph_path("text")), load_external_data=False)
    assert {each.layer for each in ranked} == {layer.name for layer in layers(model)} - keep
    errors = [each.output_error for each in ranked]
    assert errors == sorted(errors, reverse=True)


def test_bytes_are_what_keeping_the_layer_costs(tiny, write, feeds):
    folder = write("text", "int8")
    ranked = rank_layers(tiny, folder, {"text": "int8"}, feeds, threads=1)
    each = next(each for each in ranked if each.layer == "text.self_blocks.0.qkv/MatMul")
    # 24 x 72 weights in 1 byte and not 4, 72 scales and zero points, the activation's scale and zero point.
    assert each.bytes == 24 * 72 * 3 - 72 * 5 - 5


def test_without_time_the_local_error_decides(tiny, write, feeds):
    folder = write("text", "int8")
    ranked = rank_layers(tiny, folder, {"text": "int8"}, feeds, budget_s=0, threads=1)
    assert all(each.output_error is None for each in ranked)
    errors = [each.local_error for each in ranked]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_layers_without_an_output_error_come_last():
    from mammut_export.sensitivity import _worst_first

    found = [
        LayerSensitivity("text", str(index), local, output, 1)
        for index, (local, output) in enumerate([(0.1, None), (0.2, 0.001), (0.3, None), (0.1, 0.5)])
    ]
    assert [each.layer for each in sorted(found, key=_worst_first)] == ["3", "1", "2", "0"]


def test_errors(tiny, write, feeds):
    folder = write("text", "int8")
    with pytest.raises(InputError, match="no recorded inputs for the graph 'text'"):
        rank_layers(tiny, folder, {"text": "int8"}, {"text": []}, threads=1)
    other = folder.parent / "other"
    shutil.copytree(TINY, other)
    shutil.copy(TINY / "vision.onnx", other / "text.onnx")
    with pytest.raises(InputError, match="is not in the candidate"):
        rank_layers(tiny, other, {"text": "int8"}, feeds, threads=1)


def test_output_error_takes_the_worst_kind_and_centres_logits():
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    ones = np.ones((1, 4), np.float32)
    before = [{"logits": logits, "present_k.0": ones, "present_v.0": ones}]
    shifted = [{"logits": logits + 5, "present_k.0": ones * 2, "present_v.0": ones}]
    assert output_error(before, iter(shifted)) == pytest.approx(0, abs=1e-6)
    doubled = [{"logits": logits * 2, "present_k.0": ones, "present_v.0": ones}]
    assert output_error(before, iter(doubled)) == pytest.approx(1)
    halves = [{"cross_k.0": ones, "cross_k.1": ones, "cross_v.0": ones}]
    changed = [{"cross_k.0": ones * 2, "cross_k.1": ones, "cross_v.0": ones}]
    assert output_error(halves, iter(changed)) == pytest.approx(np.sqrt(0.5))
    broken = [{"cross_k.0": ones * np.nan, "cross_k.1": ones, "cross_v.0": ones}]
    assert output_error(halves, iter(broken)) == np.inf

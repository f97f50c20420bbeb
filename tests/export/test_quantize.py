"""Quantized graphs: what is in them, what they compute, and that the engines of their target run them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mammut_calibration.activations import layers
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.feeds import record_feeds
from mammut_calibration.layers import graph_errors
from mammut_calibration.statistics import Range
from mammut_calibration.table import CalibrationTable
from mammut_export.quantize import SCHEMES, QuantizedLayers, higher_scheme, quantize_graph, write_quantized
from mammut_export.quantize_weights import int4_blocks, int8_channels
from mammut_runtime.bundle import Bundle
from mammut_runtime.canary import canary_picture
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import InputError

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
GRAPHS = ("vision", "text", "memory", "decoder")
QUANTIZED = [
    (target, scheme) for target, schemes in SCHEMES.items() for scheme in schemes if scheme not in ("fp32", "fp16")
]
LARGEST_ERROR = {"int8": 0.03, "int8-dynamic": 0.03, "int4": 0.2}
"""Of a layer; the tiny model's random weights are harder than a trained model's."""


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


@pytest.fixture(scope="module")
def written(tiny: Bundle, table: CalibrationTable, tmp_path_factory: pytest.TempPathFactory):
    """(target, scheme) -> the folder with all graphs in that scheme, and the reports; each made once."""
    made: dict[tuple[str, str], tuple[Path, tuple[QuantizedLayers, ...]]] = {}

    def write(target: str, scheme: str):
        if (target, scheme) not in made:
            folder = tmp_path_factory.mktemp(f"{target}-{scheme}")
            _, reports = write_quantized(tiny, folder, dict.fromkeys(GRAPHS, scheme), target, table)
            made[target, scheme] = folder, reports
        return made[target, scheme]

    return write


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "scheme"), QUANTIZED)
def test_every_layer_is_near_its_original(tiny, written, feeds, target, scheme):
    folder, reports = written(target, scheme)
    for graph, report in zip(GRAPHS, reports, strict=True):
        missing: list[str] = []
        found = graph_errors(
            graph, tiny.graph_path(graph), folder / f"{graph}.onnx", feeds[graph], threads=1, note=missing.append
        )
        assert not missing  # names are kept: every layer of the reference is there
        errors = {error.layer: error.relative_error for error in found}
        assert set(errors) == {*report.quantized, *report.kept}
        assert max(errors.values()) < LARGEST_ERROR[scheme]
        assert all(errors[name] < 1e-5 for name in report.kept)
        assert all(errors[name] > 1e-4 for name in report.quantized)  # control: something was rounded
        assert (report.graph, report.scheme) == (graph, scheme)


def test_layers_are_those_that_calibration_observes(tiny, written):
    _, reports = written("openvino", "int8")
    for graph, report in zip(GRAPHS, reports, strict=True):
        model = onnx.load(str(tiny.graph_path(graph)), load_external_data=False)
        assert set(report.quantized) == {layer.name for layer in layers(model)}
        assert report.kept == ()


def test_convolution_is_kept_for_onnx_runtime(written):
    _, reports = written("onnxruntime", "int8")
    assert reports[0].kept == ("vision.patch_embedding/Conv",)
    assert all(report.kept == () for report in reports[1:])


@pytest.mark.parametrize(("target", "scheme"), QUANTIZED)
def test_weights_are_smaller_and_stored_once(tiny, written, target, scheme):
    folder, _ = written(target, scheme)
    size = (folder / "weights.bin").stat().st_size
    assert size < 0.45 * (TINY / "weights.bin").stat().st_size
    places: dict[bytes, set[int]] = {}
    for graph in GRAPHS:
        for value in ir.load(folder / f"{graph}.onnx").graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                places.setdefault(hashlib.sha256(tensor.tobytes()).digest(), set()).add(tensor.offset)
    assert all(len(offsets) == 1 for offsets in places.values())
    assert len(places) > 10


def test_text_and_decoder_share_the_table_and_the_tied_projection(written):
    folder, _ = written("onnxruntime", "int8")
    offsets = set()
    for graph in ("text", "decoder"):
        value = ir.load(folder / f"{graph}.onnx").graph.initializers["text.token_embedding.weight_quantized"]
        offsets.add(value.const_value.offset)
        assert len(list(value.uses())) == (2 if graph == "decoder" else 1)
    assert len(offsets) == 1


def test_the_same_request_gives_the_same_bytes(tiny, table, written, tmp_path):
    schemes = dict.fromkeys(GRAPHS, "int4")
    write_quantized(tiny, tmp_path, schemes, "onnxruntime", table)
    folder, _ = written("onnxruntime", "int4")
    assert {path.name for path in tmp_path.iterdir()} == {"weights.bin", *(f"{graph}.onnx" for graph in GRAPHS)}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_each_graph_has_its_own_scheme(tiny, table, feeds, tmp_path):
    schemes = {"vision": "int8", "text": "int8-dynamic", "decoder": "int4"}
    infos, reports = write_quantized(tiny, tmp_path, schemes, "onnxruntime", table)
    assert infos == tiny.manifest.graphs
    assert [report.scheme for report in reports] == ["int8", "int8-dynamic", "fp32", "int4"]
    operators = {
        graph: {node.op_type for node in ir.load(tmp_path / f"{graph}.onnx").graph.all_nodes()} for graph in GRAPHS
    }
    assert "QuantizeLinear" in operators["vision"] and "QuantizeLinear" not in operators["decoder"]
    assert "MatMulInteger" in operators["text"]
    assert not any("Quantize" in each or "Dequantize" in each for each in operators["memory"])
    before, after = run(tiny.graph_path("memory"), feeds), run(tmp_path / "memory.onnx", feeds)
    np.testing.assert_array_equal(before["cross_k.0"], after["cross_k.0"])  # the control: a graph that stays is exact


def test_kept_layers_stay_float(tiny, table, feeds, tmp_path):
    name = "text.self_blocks.0.qkv/MatMul"
    _, reports = write_quantized(
        tiny, tmp_path, {"text": "int8"}, "onnxruntime", table, keep={"text": frozenset([name])}
    )
    report = next(each for each in reports if each.graph == "text")
    assert report.kept == (name,) and name not in report.quantized
    errors = graph_errors("text", tiny.graph_path("text"), tmp_path / "text.onnx", feeds["text"], threads=1)
    assert {error.layer for error in errors if error.relative_error < 1e-5} == {name}


# --- arithmetic -----------------------------------------------------------------------------------------------------


def layer(
    op_type: str = "MatMul", bias: bool = False, rows: int = 32, **attributes: int
) -> tuple[ir.Model, np.ndarray]:
    """x float32[n, rows] -> one product -> y, and its weight as [in, out]."""
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(rows, 6)).astype(np.float32)
    transposed = attributes.get("transB", 0)
    constants = {"w": np.ascontiguousarray(weight.T) if transposed else weight}
    if bias:
        constants["b"] = rng.normal(size=6).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", rows]))
    initializers = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in constants.items()
    ]
    node = ir.Node("", op_type, [x, *initializers], [ir.AttrInt64(key, value) for key, value in attributes.items()])
    node.name, node.outputs[0].name = f"block/{op_type}", "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 6])
    for value in initializers:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 21}, name="one")
    return ir.Model(graph, ir_version=10), weight


def computed(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """By ONNX's reference implementation, not an engine."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])


FORMS = [("MatMul", False, {}), ("Gemm", False, {"transB": 1}), ("Gemm", True, {}), ("Gemm", True, {"transB": 1})]


@pytest.mark.parametrize(("op_type", "bias", "attributes"), FORMS)
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_int8_is_what_it_says(target, op_type, bias, attributes):
    model, weight = layer(op_type, bias, **attributes)
    offset = model.graph.initializers["b"].const_value.numpy() if bias else 0
    quantize_graph(model, "one", "int8", target, {"x": Range(-1.0, 3.0)})
    x = np.random.default_rng(3).uniform(-1.5, 3.5, (5, 32)).astype(np.float32)  # some outside the range
    if target == "onnxruntime":
        scale, zero, low, high = np.float32(4 / 255), 64, 0, 255
    else:
        scale, zero, low, high = np.float32(3 / 127), 0, -128, 127
    rounded = (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale
    expected = rounded @ int8_channels(weight, 1).restored() + offset
    np.testing.assert_allclose(computed(model, x), expected, atol=1e-4)
    assert [node.name for node in model.graph if node.name == f"block/{op_type}"] == [f"block/{op_type}"]


@pytest.mark.parametrize(("op_type", "bias", "attributes"), FORMS)
def test_int8_dynamic_is_what_it_says(op_type, bias, attributes):
    model, weight = layer(op_type, bias, **attributes)
    offset = model.graph.initializers["b"].const_value.numpy() if bias else 0
    quantize_graph(model, "one", "int8-dynamic", "onnxruntime", None)
    x = np.random.default_rng(3).uniform(-1, 3, (5, 32)).astype(np.float32)
    scale = (x.max() - x.min()) / 255
    zero = np.rint(-x.min() / scale)
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    np.testing.assert_allclose(computed(model, x), rounded @ int8_channels(weight, 1).restored() + offset, atol=1e-3)


@pytest.mark.parametrize(("op_type", "bias", "attributes"), FORMS)
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_int4_is_what_it_says(target, op_type, bias, attributes):
    block = 64 if target == "tensorrt" else 16
    model, weight = layer(op_type, bias, rows=128, **attributes)
    offset = model.graph.initializers["b"].const_value.numpy() if bias else 0
    quantize_graph(model, "one", "int4", target, None, block=16)
    x = np.random.default_rng(3).normal(size=(5, 128)).astype(np.float32)
    expected = x @ int4_blocks(weight, block, target != "tensorrt").restored() + offset
    np.testing.assert_allclose(computed(model, x), expected, atol=1e-4)
    (scales,) = (value.const_value.numpy() for name, value in model.graph.initializers.items() if "scale" in name)
    assert (scales > 0).all() == (target == "tensorrt")


@pytest.mark.parametrize(
    "seen", [{}, {"x": Range(0.0, 0.0)}, {"x": Range(float("nan"), 1.0)}, {"x": Range(0.0, 1e-44)}]
)
@pytest.mark.parametrize("target", list(SCHEMES))
def test_layer_without_a_usable_range_is_kept(target, seen):
    model, _ = layer()
    report = quantize_graph(model, "one", "int8", target, seen)
    assert report == QuantizedLayers("one", "int8", (), ("block/MatMul",))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert quantize_graph(model, "one", "int8", target, {"x": Range(-1, 1)}).kept == ()  # control


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_layer_with_a_weight_that_is_not_finite_is_kept(scheme, bad):
    model, weight = layer()
    weight = weight.copy()
    weight[3, 2] = bad
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    report = quantize_graph(model, "one", scheme, "onnxruntime", {"x": Range(-1, 1)})
    assert report.kept == ("block/MatMul",)


def test_layers_of_other_forms_are_kept():
    model, _ = layer("Gemm", transA=1, rows=12)
    assert quantize_graph(model, "one", "int8", "onnxruntime", {"x": Range(-1, 1)}).kept == ("block/Gemm",)
    model, _ = layer(rows=12)
    assert quantize_graph(model, "one", "int4", "onnxruntime", None).kept == ("block/MatMul",)  # no block divides 12
    model, _ = layer(rows=24)
    assert quantize_graph(model, "one", "int4", "onnxruntime", None).kept == ()


def test_fp16_stores_halves_where_the_engine_computes_in_float():
    for target, expected in (("onnxruntime", ir.DataType.FLOAT16), ("tensorrt", ir.DataType.FLOAT)):
        model, _ = layer()
        assert quantize_graph(model, "one", "fp16", target, None) == QuantizedLayers("one", "fp16", (), ())
        assert model.graph.initializers["w"].const_value.dtype == expected


# --- engines --------------------------------------------------------------------------------------------------------


def run(path: Path, feeds, target: str = "onnxruntime") -> dict[str, np.ndarray]:
    engine = open_engine(path, target, EngineOptions(threads=1))
    try:
        return engine.run(feeds[path.stem][-1])
    finally:
        engine.close()


@pytest.mark.parametrize(("target", "scheme"), [each for each in QUANTIZED if each[0] != "tensorrt"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_target_runs_it(tiny, written, feeds, graph, target, scheme):
    if target == "openvino":
        pytest.importorskip("openvino")
    folder, _ = written(target, scheme)
    expected = run(tiny.graph_path(graph), feeds)
    for name, value in run(folder / f"{graph}.onnx", feeds, target).items():
        limit = 0.05 if scheme != "int4" else 0.3
        assert np.linalg.norm(value - expected[name]) < limit * np.linalg.norm(expected[name]), name


def test_both_engines_compute_the_same_int4(written, feeds):
    """Negative scales and 4-bit data in a shared file are not what every engine is tested with."""
    pytest.importorskip("openvino")
    folder, _ = written("openvino", "int4")
    for graph in GRAPHS:
        first, second = (run(folder / f"{graph}.onnx", feeds, target) for target in ("onnxruntime", "openvino"))
        for name, value in first.items():
            np.testing.assert_allclose(value, second[name], atol=2e-2 * np.abs(value).max())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("int8", "MatMulIntegerToFloat"), ("int8-dynamic", "DynamicQuantizeMatMul"), ("int4", "MatMulNBits")],
)
def test_onnx_runtime_fuses_every_product(written, tmp_path, scheme, expected):
    import onnxruntime

    folder, reports = written("onnxruntime", scheme)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "decoder.onnx"), settings, providers=["CPUExecutionProvider"])
    model = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    products = len([name for name in reports[3].quantized if not name.endswith("Gather")])
    fused = operators.count(expected) + operators.count("QGemm")
    if scheme == "int4":  # the kernel takes blocks from 16 on; some of the tiny model's widths have no such factor
        nodes = ir.load(folder / "decoder.onnx").graph
        blocks = [node.attributes.get_int("block_size") for node in nodes if node.op_type == "DequantizeLinear"]
        assert len(blocks) == products
        products = len([block for block in blocks if block >= 16])
    assert fused == products >= 3
    assert operators.count("DequantizeLinear") == (len(blocks) - products if scheme == "int4" else 0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_builds_it(written, graph, scheme):
    trt = pytest.importorskip("tensorrt_rtx")
    folder, _ = written("tensorrt", scheme)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(folder / f"{graph}.onnx")), [
        parser.get_error(index).desc() for index in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        open_sizes = [size == -1 for size in tensor.shape]
        if any(open_sizes):
            shapes = [
                [wanted if is_open else size for is_open, size in zip(open_sizes, tensor.shape, strict=True)]
                for wanted in (1, 2, 4)
            ]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_requests(tiny, table, tmp_path):
    def write(schemes, target="onnxruntime", table=table, **rest):
        return lambda: write_quantized(tiny, tmp_path, schemes, target, table, **rest)

    cases = [
        (write({"vision": "int8"}, "npu"), "target: expected one of onnxruntime, openvino, tensorrt, got 'npu'"),
        (
            write({"vision": "int8-dynamic"}, "openvino"),
            "precision for openvino: expected one of fp32, fp16, int8, int4",
        ),
        (write({"vision": "int2"}), "precision for onnxruntime: expected one of .* got 'int2'"),
        (write({"boxes": "int8"}), "no graph 'boxes' in the bundle, only vision, text, memory, decoder"),
        (write({"vision": "int8"}, keep={"boxes": frozenset()}), "no graph 'boxes'"),
        (write({"vision": "int8"}, table=None), "int8 needs the ranges of activations; calibrate first"),
        (write({"vision": "int8"}, keep={"vision": frozenset(["x"])}), "vision: no layer 'x' to keep"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    model, _ = layer()
    with pytest.raises(InputError, match="one: int8 needs the ranges"):
        quantize_graph(model, "one", "int8", "onnxruntime", None)


def test_only_float32_bundles_are_quantized(tiny, table, tmp_path):
    halves = dataclasses.replace(tiny, manifest=dataclasses.replace(tiny.manifest, precision="fp16"))
    with pytest.raises(InputError, match="expected an fp32 bundle to quantize, got fp16"):
        write_quantized(halves, tmp_path, {"vision": "int8"}, "onnxruntime", table)


def test_layers_kept_from_int4_may_be_in_eight_bits(tiny, feeds, tmp_path):
    name = "text.self_blocks.0.qkv/MatMul"
    errors = {}
    for keep_as in ("fp32", higher_scheme("int4", "onnxruntime", calibrated=False)):
        folder = tmp_path / keep_as
        folder.mkdir()
        keep, higher = {"text": frozenset([name])}, {"text": keep_as}
        _, reports = write_quantized(tiny, folder, {"text": "int4"}, "onnxruntime", None, keep=keep, keep_as=higher)
        report = next(each for each in reports if each.graph == "text")
        assert report.kept == (name,)
        assert report.eight_bits == (() if keep_as == "fp32" else (name,))
        found = graph_errors("text", tiny.graph_path("text"), folder / "text.onnx", feeds["text"], threads=1)
        errors[keep_as] = next(each.relative_error for each in found if each.layer == name)
    assert errors["fp32"] < 1e-5 < 1e-3 < errors["int8-dynamic"] < LARGEST_ERROR["int8-dynamic"]


def test_higher_scheme_is_one_that_the_target_runs():
    assert higher_scheme("int4", "onnxruntime", calibrated=False) == "int8-dynamic"
    assert higher_scheme("int4", "openvino", calibrated=True) == "int8"
    assert higher_scheme("int4", "tensorrt", calibrated=False) == "fp32"
    assert higher_scheme("int8", "openvino", calibrated=True) == "fp32"
    model, _ = layer()
    with pytest.raises(InputError, match=r"precision for openvino: .* got 'int8-dynamic'"):
        quantize_graph(model, "one", "int4", "openvino", None, keep_as="int8-dynamic")
    with pytest.raises(InputError, match="one: int8 needs the ranges"):
        quantize_graph(model, "one", "int4", "openvino", None, frozenset(["block/MatMul"]), keep_as="int8")

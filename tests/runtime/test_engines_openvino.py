"""OpenVINO on a small graph made here: its numbers, its refusals in words, and the memory it must not share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime.engines import Engine, EngineOptions, open_engine
from mammut_runtime.errors import EngineError, InputError

pytest.importorskip("openvino", reason="needs OpenVINO: pip install mammut-edge[openvino]")

from mammut_runtime.engines import openvino as module

ONE = EngineOptions(threads=1)
TINY = Path(__file__).parents[1] / "data" / "tiny-bundle"


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> Path:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scaled float32[batch, 3] = numbers * 2; last int64[batch] = ids[:, -1]; doubled = past twice; same = doubled."""
    helper = pytest.importorskip("onnx").helper
    from onnx import TensorProto

    info, node = helper.make_tensor_value_info, helper.make_node
    return save(
        tmp_path_factory.mktemp("graphs") / "small.onnx",
        [
            node("Mul", ["numbers", "two"], ["scaled"]),
            node("Gather", ["ids", "end"], ["last"], axis=1),
            node("Concat", ["past", "past"], ["doubled"], axis=1),
            node("Identity", ["doubled"], ["same"]),
        ],
        [
            info("numbers", TensorProto.FLOAT, ["batch", 3]),
            info("ids", TensorProto.INT64, ["batch", "length"]),
            info("past", TensorProto.FLOAT, ["batch", "past", 2]),
        ],
        [
            info("scaled", TensorProto.FLOAT, ["batch", 3]),
            info("last", TensorProto.INT64, ["batch"]),
            info("doubled", TensorProto.FLOAT, ["batch", "past2", 2]),
            info("same", TensorProto.FLOAT, ["batch", "past2", 2]),
        ],
        [
            helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
            helper.make_tensor("end", TensorProto.INT64, [], [-1]),
        ],
    )


@pytest.fixture(scope="module")
def engine(graph: Path) -> Iterator[Engine]:
    opened = open_engine(graph, "openvino", ONE)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """y float32[n, 64] = x float32[n, 512] @ the weights, and those."""
    helper = pytest.importorskip("onnx").helper
    from onnx import TensorProto, numpy_helper

    weights = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    info = helper.make_tensor_value_info
    path = save(
        tmp_path_factory.mktemp("graphs") / "product.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [info("x", TensorProto.FLOAT, ["n", 512])],
        [info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    return path, weights


def feeds(batch: int = 2, past: int = 1) -> dict[str, Any]:
    return {
        "numbers": np.arange(3 * batch, dtype=np.float32).reshape(batch, 3),
        "ids": np.arange(4 * batch).reshape(batch, 4),
        "past": np.ones((batch, past, 2), np.float32),
    }


def test_run(engine: Engine) -> None:
    outputs = engine.run(feeds())
    assert list(outputs) == ["scaled", "last", "doubled", "same"]
    np.testing.assert_array_equal(outputs["scaled"], feeds()["numbers"] * 2)
    np.testing.assert_array_equal(outputs["last"], [3, 7])
    assert outputs["last"].dtype == np.int64 and outputs["scaled"].dtype == np.float32
    np.testing.assert_array_equal(outputs["same"], outputs["doubled"])


def test_sizes_may_be_anything_also_nothing(engine: Engine) -> None:
    """An empty cache is how every caption begins."""
    for batch, past in ((1, 0), (5, 3), (1, 1)):
        assert engine.run(feeds(batch, past))["doubled"].shape == (batch, 2 * past, 2)


def test_arrays_that_are_not_contiguous(engine: Engine) -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4).T[:2]
    np.testing.assert_array_equal(engine.run(feeds() | {"numbers": numbers})["scaled"], numbers * 2)


def test_nothing_is_shared_with_the_caller(engine: Engine, graph: Path) -> None:
    """Inputs and outputs of an earlier call stay as they are. The control is OpenVINO called as its examples do."""
    one, seven = feeds() | {"numbers": np.ones((2, 3), np.float32)}, feeds() | {"numbers": np.full((2, 3), 7, "f4")}
    first = engine.run(one)
    engine.run(seven)
    assert one["numbers"][0, 0] == 1 and first["scaled"][0, 0] == 2

    compiled = module.core().compile_model(str(graph), "CPU")
    compiled(one)
    compiled.create_infer_request().infer(seven)
    if one["numbers"][0, 0] == 1:
        pytest.skip("this version of OpenVINO no longer overwrites inputs, so there is no control")
    assert one["numbers"][0, 0] == 7


def test_outputs_outlive_the_request_and_the_engine(graph: Path) -> None:
    """The control: the array that a request shows is its own buffer, and the next call writes into it."""
    opened = open_engine(graph, "openvino", ONE)
    kept = opened.run(feeds())["scaled"]
    opened.run({name: each * 0 for name, each in feeds().items()})
    opened.close()
    np.testing.assert_array_equal(kept, feeds()["numbers"] * 2)
    assert kept.flags.owndata

    request = module.core().compile_model(str(graph), "CPU").create_infer_request()
    request.infer(feeds())
    shown = request.get_output_tensor(0).data
    request.infer({name: each * 0 for name, each in feeds().items()})
    assert not shown.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.zeros((2, 3))}, r"input numbers must be float32\[\?, 3\], got float64\[2, 3\]"),
        ({"numbers": np.zeros((2, 4), np.float32)}, r"input numbers must be float32\[\?, 3\], got float32\[2, 4\]"),
        ({"past": np.zeros((2, 2), np.float32)}, r"input past must be float32\[\?, \?, 2\], got float32\[2, 2\]"),
        ({"extra": np.zeros(1)}, "inputs missing: none; unknown: extra"),
        ({"ids": None}, "inputs missing: ids; unknown: none"),
    ],
)
def test_feeds_that_do_not_fit(engine: Engine, change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (feeds() | change).items() if value is not None}
    with pytest.raises(EngineError, match=rf"small\.onnx: {message}"):
        engine.run(given)


def test_what_openvino_throws_is_an_engine_error(product: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine goes on working. The check of feeds is taken away, so that OpenVINO itself meets the bad one."""
    opened = open_engine(product[0], "openvino", ONE)
    with monkeypatch.context() as patch:
        patch.setattr("mammut_runtime.engines.feeds.GraphInputs.check", lambda *_: None)
        with pytest.raises(EngineError, match=r"product\.onnx: OpenVINO failed: ") as caught:
            opened.run({"x": np.zeros((1, 3), np.float32)})
    assert "\n" not in str(caught.value) and ".cpp:" not in str(caught.value)
    assert opened.run({"x": np.zeros((1, 512), np.float32)})["y"].shape == (1, 64)


def test_closed(graph: Path) -> None:
    opened = open_engine(graph, "openvino", ONE)
    opened.close()
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened.run(feeds())


def test_damaged_and_missing_graphs(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    for name in ("bad.onnx", "none.onnx"):
        with pytest.raises(EngineError, match=rf"{name}: OpenVINO [0-9.]+ refuses it: "):
            open_engine(tmp_path / name, "openvino")


@pytest.mark.parametrize("device", ["GPU.7", "NPU.7", "TOASTER", ""])
def test_a_device_that_is_not_there(graph: Path, device: str) -> None:
    """The error names those that are; nothing else is taken in its place."""
    with pytest.raises(EngineError, match=rf"device {device} is not there, only .*CPU"):
        open_engine(graph, "openvino", EngineOptions(device=device))


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "MULTI:CPU,GPU", "HETERO:CPU"])
def test_devices_that_choose_by_themselves(graph: Path, device: str) -> None:
    with pytest.raises(EngineError, match=rf"device {device} chooses by itself .*; name one of those here: .*CPU"):
        open_engine(graph, "openvino", EngineOptions(device=device))


def test_names_of_devices() -> None:
    module.check_device("GPU", ("CPU", "GPU.0", "GPU.1"))
    module.check_device("GPU.1", ("CPU", "GPU.0", "GPU.1"))
    with pytest.raises(
        EngineError, match=r"device GPU\.2 is not there, only CPU, GPU\.0; it needs Intel's OpenCL driver"
    ):
        module.check_device("GPU.2", ("CPU", "GPU.0"))


def test_another_device_than_asked_for_is_an_error(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO is asked where it put the graph. Here it is made to believe that the processor is called GPU."""
    monkeypatch.setattr(module, "devices", lambda: ("CPU", "GPU"))
    original = module.core()

    class OnCpu:
        def read_model(self, path: str) -> Any:
            return original.read_model(path)

        def compile_model(self, model: Any, _: str, settings: dict[str, Any]) -> Any:
            return original.compile_model(model, "CPU", settings)

    monkeypatch.setattr(module, "core", OnCpu)
    with pytest.raises(EngineError, match=r"small\.onnx: asked for GPU, OpenVINO would run it on CPU"):
        open_engine(graph, "openvino", EngineOptions(device="GPU"))


def test_missing_library_says_what_to_install(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"needs OpenVINO, .*; pip install mammut-edge\[openvino\]"):
        open_engine(graph, "openvino")


@pytest.mark.parametrize(
    ("version", "right"),
    [("2025.1.0-1-releases/2025/1", False), ("2024.6", False), ("dev", False), ("2025.2.0-1", True), ("2027.0", True)],
)
def test_version_floor(version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvino.__version__", version)
    if right:
        assert module.library().__version__ == version
    else:
        with pytest.raises(EngineError, match=r"OpenVINO .* is too old, expected 2025\.2 or newer; pip install"):
            module.library()


@pytest.mark.parametrize(("keep", "released"), [(False, [64, 2]), (True, [])])
def test_buffers_of_large_calls_are_kept_only_where_asked_for(
    graph: Path, keep: bool, released: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Any = open_engine(graph, "openvino", EngineOptions(threads=1, memory_arena=keep))
    original, found = opened._compiled, []

    class Compiled:
        def release_memory(self) -> None:
            found.append(batch)
            original.release_memory()

    monkeypatch.setattr(opened, "_compiled", Compiled())
    for batch in (1, 64, 1, 2):
        np.testing.assert_array_equal(opened.run(feeds(batch))["scaled"], feeds(batch)["numbers"] * 2)
    assert found == released


def test_several_threads_share_an_engine(engine: Engine) -> None:
    wrong = []

    def work(batch: int) -> None:
        for _ in range(50):
            if not np.array_equal(engine.run(feeds(batch))["scaled"], feeds(batch)["numbers"] * 2):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_float32_unless_the_device_may_choose(product: tuple[Path, Any]) -> None:
    """The control: with the device's own choice, a processor that has bfloat16 is a thousand times further off."""
    path, weights = product
    x = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    right = x.astype(np.float64) @ weights.astype(np.float64)

    def error(options: EngineOptions) -> float:
        return float(np.abs(open_engine(path, "openvino", options).run({"x": x})["y"] - right).max())

    assert error(ONE) < 1e-4
    control = module.core().compile_model(str(path), "CPU")
    if "bfloat16" not in str(control.get_property("INFERENCE_PRECISION_HINT")):
        pytest.skip("this processor computes in float32 anyway, so there is no control")
    assert error(EngineOptions(threads=1, device_precision=True)) > 1e-2


def test_attention_of_any_length_after_length_1(tmp_path: Path) -> None:
    """The control: the same graph as OpenVINO compiles it by itself, called with length 1 first, gives garbage."""
    helper = pytest.importorskip("onnx").helper
    from onnx import TensorProto

    info, node, size = helper.make_tensor_value_info, helper.make_node, ["batch", 2, "length", 16]
    path = save(
        tmp_path / "attention.onnx",
        [
            node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q", "kt"], ["scores"]),
            node("Softmax", ["scores"], ["weights"], axis=-1),
            node("MatMul", ["weights", "v"], ["heads"]),
            node("Transpose", ["heads"], ["y"], perm=[0, 2, 1, 3]),
        ],
        [info(name, TensorProto.FLOAT, size) for name in "qkv"],
        [info("y", TensorProto.FLOAT, ["batch", "length", 2, 16])],
        [],
    )
    source = np.random.default_rng(0)
    calls = [{name: source.standard_normal((1, 2, n, 16)).astype(np.float32) for name in "qkv"} for n in (1, 77, 5)]

    def right(call: dict[str, Any]) -> Any:
        scores = np.exp(call["q"] @ call["k"].transpose(0, 1, 3, 2))
        return (scores / scores.sum(-1, keepdims=True) @ call["v"]).transpose(0, 2, 1, 3)

    opened = open_engine(path, "openvino", ONE)
    for call in calls:
        np.testing.assert_allclose(opened.run(call)["y"], right(call), atol=1e-4)
    request = module.core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    errors = []
    for call in calls:
        request.infer(call)
        errors.append(np.abs(request.get_output_tensor(0).data - right(call)).max())
    if max(errors) < 1e-3:
        pytest.skip("this version of OpenVINO, or this processor, does not have the fault, so there is no control")


def test_compile_cache(product: tuple[Path, Any], tmp_path: Path) -> None:
    path, x = product[0], np.ones((1, 512), np.float32)
    cached = EngineOptions(threads=1, compile_cache=tmp_path / "new" / "cache")
    results = [open_engine(path, "openvino", options).run({"x": x})["y"] for options in (ONE, cached, cached)]
    np.testing.assert_array_equal(results[1], results[2])
    np.testing.assert_array_equal(results[0], results[2])
    assert list((tmp_path / "new" / "cache").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"compile_cache: .*file cannot be a folder \(.*\); give another one"):
        open_engine(path, "openvino", EngineOptions(compile_cache=tmp_path / "file"))


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_other_weights_are_not_taken_from_the_cache(tmp_path: Path, outside: bool) -> None:
    """The same graph at the same path with other weights, in the file or outside it: the cache must not know it."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, numpy_helper

    helper = onnx.helper

    info = helper.make_tensor_value_info
    for factor in (1.0, 3.0):
        weights = np.full((512, 64), factor, np.float32)
        path = save(
            tmp_path / "product.onnx",
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [info("x", TensorProto.FLOAT, ["n", 512])],
            [info("y", TensorProto.FLOAT, ["n", 64])],
            [numpy_helper.from_array(weights, "w")],
        )
        if outside:
            (tmp_path / "weights.bin").unlink(missing_ok=True)  # onnx would append
            whole = onnx.load(str(path))
            onnx.save(whole, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
        opened = open_engine(path, "openvino", EngineOptions(threads=1, compile_cache=tmp_path / "cache"))
        assert opened.run({"x": np.ones((1, 512), np.float32)})["y"][0, 0] == 512 * factor

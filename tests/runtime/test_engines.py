"""Engines: ONNX Runtime on a small graph made here, its refusals in words, and the fake."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.engines import onnxruntime as module
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.errors import EngineError, InputError


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scaled float32[batch, 3] = numbers * 2; last int64[batch] = ids[:, -1]; a loop over past of any length."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["numbers", "two"], ["scaled"]),
        helper.make_node("Gather", ["ids", "end"], ["last"], axis=1),
        helper.make_node("Concat", ["past", "past"], ["doubled"], axis=1),
    ]
    info = helper.make_tensor_value_info
    inputs = [
        info("numbers", TensorProto.FLOAT, ["batch", 3]),
        info("ids", TensorProto.INT64, ["batch", "length"]),
        info("past", TensorProto.FLOAT, ["batch", "past", 2]),
    ]
    outputs = [
        info("scaled", TensorProto.FLOAT, ["batch", 3]),
        info("last", TensorProto.INT64, ["batch"]),
        info("doubled", TensorProto.FLOAT, ["batch", "past2", 2]),
    ]
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("end", TensorProto.INT64, [], [-1]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "small", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("graphs") / "small.onnx"
    onnx.save(model, str(path))
    return path


def feeds(batch: int = 2, past: int = 1) -> dict[str, Any]:
    return {
        "numbers": np.arange(3 * batch, dtype=np.float32).reshape(batch, 3),
        "ids": np.arange(4 * batch).reshape(batch, 4),
        "past": np.ones((batch, past, 2), np.float32),
    }


def test_run(graph: Path) -> None:
    engine = open_engine(graph, "onnxruntime", EngineOptions(threads=1))
    outputs = engine.run(feeds())
    assert set(outputs) == {"scaled", "last", "doubled"}
    np.testing.assert_array_equal(outputs["scaled"], feeds()["numbers"] * 2)
    np.testing.assert_array_equal(outputs["last"], [3, 7])


def test_sizes_may_be_anything_also_nothing(graph: Path) -> None:
    """An empty cache is how every caption begins."""
    engine = open_engine(graph, "onnxruntime")
    for batch, past in ((1, 0), (5, 3), (1, 1)):
        assert engine.run(feeds(batch, past))["doubled"].shape == (batch, 2 * past, 2)


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(threads=2, spinning=True),
        EngineOptions(threads=2, spin_us=0),
        EngineOptions(threads=1, memory_arena=True),
        EngineOptions(threads=1, prepack=False),
    ],
)
def test_options_change_nothing_in_the_numbers(graph: Path, options: EngineOptions) -> None:
    np.testing.assert_array_equal(open_engine(graph, "onnxruntime", options).run(feeds())["last"], [3, 7])


@pytest.mark.parametrize(
    ("version", "options", "spins", "duration"),
    [
        ("1.32.0", EngineOptions(), "1", "50"),
        ("1.32.0", EngineOptions(spin_us=7), "1", "7"),
        ("1.32.0", EngineOptions(spin_us=0), "0", None),
        ("1.32.0", EngineOptions(spinning=True), "1", None),
        ("1.25.1", EngineOptions(), "0", None),  # it would spin for long
    ],
)
def test_how_long_threads_spin(
    version: str, options: EngineOptions, spins: str, duration: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    settings = module._session_options(module.library(), options)
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == spins
    if duration is not None:
        assert settings.get_session_config_entry("session.intra_op.spin_duration_us") == duration
    else:
        with pytest.raises(RuntimeError):
            settings.get_session_config_entry("session.intra_op.spin_duration_us")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.zeros((2, 3))}, r"input numbers must be float32\[batch, 3\], got float64\[2, 3\]"),
        ({"numbers": np.zeros((2, 4), np.float32)}, r"input numbers must be float32\[batch, 3\], got float32\[2, 4\]"),
        ({"past": np.zeros((2, 2), np.float32)}, r"input past must be float32\[batch, past, 2\], got float32\[2, 2\]"),
        ({"extra": np.zeros(1)}, "inputs missing: none; unknown: extra"),
        ({"ids": None}, "inputs missing: ids; unknown: none"),
    ],
)
def test_feeds_that_do_not_fit(graph: Path, change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (feeds() | change).items() if value is not None}
    with pytest.raises(EngineError, match=rf"small\.onnx: {message}"):
        open_engine(graph, "onnxruntime").run(given)


def test_what_onnx_runtime_throws_is_an_engine_error(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A length of 0 has no last id: the graph itself fails. It is said once, by us."""
    with pytest.raises(EngineError, match=r"small\.onnx: ONNX Runtime failed: .*out of data bounds") as caught:
        open_engine(graph, "onnxruntime").run(feeds() | {"ids": np.zeros((2, 0), np.int64)})
    assert "\n" not in str(caught.value) and ".cc:" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_closed(graph: Path) -> None:
    engine = open_engine(graph, "onnxruntime")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(feeds())


def test_damaged_and_missing_graphs(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    for name in ("bad.onnx", "none.onnx"):
        with pytest.raises(EngineError, match=rf"{name}: ONNX Runtime [0-9.]+ refuses it: "):
            open_engine(tmp_path / name, "onnxruntime")


def test_other_targets() -> None:
    message = (
        "for 'coreml', this runtime has engines for 'onnxruntime', 'openvino', 'tensorrt'; export .* --target onnx"
    )
    with pytest.raises(EngineError, match=message):
        open_engine(Path("any.onnx"), "coreml")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("onnxruntime", {"device": "GPU"}, r"device \(--device\) is an option of openvino, and .* runs on onnxr"),
        ("onnxruntime", {"device_precision": True}, r"\(--device-precision\) is an option of openvino"),
        ("onnxruntime", {"compile_cache": Path("cache")}, r"\(--compile-cache\) is an option of openvino"),
        ("openvino", {"spinning": True}, r"spinning \(--spinning\) is an option of onnxruntime, and .* runs on openv"),
        ("openvino", {"prepack": False}, r"prepack \(--low-memory\) is an option of onnxruntime"),
        ("openvino", {"allow_fallback": True}, r"allow_fallback \(--allow-fallback\) is an option of onnxruntime"),
        ("openvino", {"providers": ("CUDAExecutionProvider",)}, r"\(--provider\) is an option of onnxruntime"),
    ],
)
def test_options_of_another_engine_are_refused(target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_engine(Path("any.onnx"), target, EngineOptions(**options))


def test_providers_are_never_replaced_silently(graph: Path) -> None:
    options = EngineOptions(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider is not there, only .*CPU.*; install onnxruntime-gpu"):
        open_engine(graph, "onnxruntime", options)
    with pytest.raises(InputError, match=r"NoSuchProvider is unknown; ONNX Runtime knows .*CUDAEx.*, and here .*CPUEx"):
        open_engine(graph, "onnxruntime", EngineOptions(providers=("NoSuchProvider",)))


AZURE = "AzureExecutionProvider"
"""In the usual wheels, and it takes no node of ours."""


def needs_azure() -> None:
    if AZURE not in module.library().get_available_providers():
        pytest.skip("this build of ONNX Runtime has no second provider to try")


def test_the_cpu_does_not_jump_in_unasked(graph: Path) -> None:
    """The error says which nodes went where; with the fallback allowed the same graph runs."""
    needs_azure()
    if not module.records_placement(module.library()):
        pytest.skip("this version of ONNX Runtime does not tell which nodes went where")
    wanted = rf"small\.onnx: {AZURE} cannot run the whole graph. Nodes: {AZURE} 0; {module.CPU} 3 \(1 Mul, .*allow_fall"
    with pytest.raises(EngineError, match=wanted):
        open_engine(graph, "onnxruntime", EngineOptions(providers=(AZURE,)))
    for providers in ((AZURE,), (AZURE, module.CPU)):
        options = EngineOptions(providers=providers, allow_fallback=True)
        assert open_engine(graph, "onnxruntime", options).run(feeds())["last"].tolist() == [3, 7]


def test_the_cpu_behind_another_provider_is_a_fallback_too(graph: Path) -> None:
    needs_azure()
    with pytest.raises(InputError, match=r"CPUExecutionProvider beside others is a fallback; allow it with allow_fall"):
        open_engine(graph, "onnxruntime", EngineOptions(providers=(AZURE, module.CPU)))


def test_provider_options(graph: Path) -> None:
    needs_azure()
    options = EngineOptions(providers=(AZURE,), provider_options=((AZURE, "key", "value"),), allow_fallback=True)
    assert open_engine(graph, "onnxruntime", options).run(feeds())["last"].tolist() == [3, 7]
    with pytest.raises(InputError, match=r"'backend_path' is for QNNExecutionProvider, which is not among the prov"):
        EngineOptions(provider_options=(("QNNExecutionProvider", "backend_path", "libQnnHtp.so"),))


def test_versions_that_do_not_tell_where_nodes_went_are_strict_too(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_azure()
    monkeypatch.setattr(module, "records_placement", lambda _: False)
    with pytest.raises(EngineError, match=r"small\.onnx: ONNX Runtime .* refuses it: .*fallback to CPU EP has been"):
        open_engine(graph, "onnxruntime", EngineOptions(providers=(AZURE,)))


def test_missing_library_says_what_to_install(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"needs ONNX Runtime, .*; pip install mammut-edge\[onnxruntime\]"):
        open_engine(graph, "onnxruntime")


@pytest.mark.parametrize(("version", "right"), [("1.19.2", False), ("0.9", False), ("dev", False), ("1.20.0", True)])
def test_version_floor(version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    if right:
        assert module.library().__version__ == version
    else:
        with pytest.raises(EngineError, match=r"ONNX Runtime .* is too old, expected 1\.20 or newer"):
            module.library()


def test_several_threads_share_an_engine(graph: Path) -> None:
    engine, wrong = open_engine(graph, "onnxruntime", EngineOptions(threads=1)), []

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": -1}, r"threads must be a whole number from 0 \(all cores\) to 1024, got -1"),
        ({"threads": 2.0}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"spin_us": -1}, r"spin_us must be a whole number from 0 \(sleep at once\) to 1000000, got -1"),
        ({"providers": ()}, "providers must be one or more names"),
        ({"providers": "CPUExecutionProvider"}, "providers must be one or more names"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineOptions(**changes)


def test_physical_cores_follow_the_process() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    code += "from mammut_runtime.engines.onnxruntime import physical_cores; print(physical_cores())"
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("this system does not tell which cores a process may use")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
    assert module.physical_cores() >= 1


def test_package_imports_no_engine_and_no_opencv() -> None:
    """Importing the package is free; the control shows that the check can fail."""
    check = "import sys; print(sorted({'onnxruntime', 'cv2', 'numpy', 'tokenizers'} & set(sys.modules)))"
    for code, expected in (
        ("import mammut_runtime;", "[]"),
        ("import mammut_runtime; mammut_runtime.CaptionOptions;", "[]"),
        ("import mammut_runtime; mammut_runtime.Model;", "['cv2', 'numpy']"),
    ):
        found = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


def test_every_public_name_is_there() -> None:
    import mammut_runtime

    for name in mammut_runtime.__all__:
        assert getattr(mammut_runtime, name) is not None
    assert set(mammut_runtime.__all__) <= set(dir(mammut_runtime))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = mammut_runtime.Nothing


def test_fake_engine() -> None:
    engine = FakeEngine(lambda given: {"twice": given["x"] * 2})
    assert engine.run({"x": np.ones(2)})["twice"].tolist() == [2, 2]
    assert len(engine.calls) == 1 and engine.calls[0]["x"].tolist() == [1, 1]
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({"x": np.ones(2)})

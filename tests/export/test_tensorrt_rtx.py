"""Every graph of the demo, in every precision for tensorrt, as TensorRT itself sees it (tensorrt-rtx needs no GPU).

In the suite for one compute capability; `ALL_CAPABILITIES=1 pytest tests/export/test_tensorrt_rtx.py` builds for all.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from mammut.checkpoint import load_checkpoint
from mammut_calibration.activations import activation_names, read_graph
from mammut_calibration.feeds import Feeds
from mammut_calibration.observe import ObservedEngine
from mammut_calibration.statistics import Range
from mammut_export.contents import complete, text_rule, write_graphs
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.profiles import profiles_for
from mammut_export.quantize import quantize_graph
from mammut_export.range_audit import audit, drawn_feeds
from mammut_export.rtx_gate import CAPABILITIES, build
from mammut_export.typed_bundle import write_typed
from mammut_runtime.bundle import Bundle
from mammut_runtime.manifest import Canary, Scheme, is_between
from mammut_runtime.onnx_reader import FLOAT, FLOAT16, read_onnx
from mammut_runtime.tensorrt_lint import lint_graph

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
SCHEMES: tuple[Scheme, ...] = ("fp32", "fp16", "int8", "int4")
TOLERANCE: dict[Scheme, float] = {"fp32": 5e-5, "fp16": 5e-3, "int4": 5e-3}
"""Of an output's largest value, as parity.DEFAULT_TOLERANCE. Not for int8, where a value that is rounded to the other
side jumps by a whole step."""
DRIFT = 0.005
"""1 - mean cosine: what the gate allows (drift.DriftLimits)."""


class Ranges(dict[str, Range]):
    """Smallest and largest of what was seen: calibration in small."""

    def watch(self, name: str, value: np.ndarray) -> None:
        old = self.get(name, Range(0.0, 0.0))
        self[name] = Range(min(old.low, float(value.min())), max(old.high, float(value.max())))


class Table:
    """In the place of a CalibrationTable."""

    def __init__(self, ranges: Mapping[str, Ranges]) -> None:
        self._ranges = ranges

    def ranges(self, graph: str, method: str) -> Ranges:
        return self._ranges[graph]

    def check_fits(self, bundle: Bundle) -> None:
        """It was made from this very bundle."""


@dataclass(frozen=True)
class Demo:
    """The demo in float32, in the four precisions for tensorrt, and int8 and int4 before they are typed."""

    folder: Path

    @property
    def reference(self) -> Bundle:
        return Bundle.open(self.folder / "reference", verify=False)

    def feeds(self, graph: str) -> list[Feeds]:
        """What the runtime feeds while it looks at the drawn pictures."""
        data = (self.folder / "feeds").read_bytes()
        found: list[Feeds] = pickle.loads(data)[graph]  # written by this file
        return found

    def typed(self, graph: str, scheme: str) -> Path:
        return self.folder / scheme / f"{graph}.onnx"

    def untyped(self, graph: str, scheme: str) -> Path:
        folder = self.folder / f"untyped-{scheme}"
        return (folder if folder.exists() else self.folder / "reference") / f"{graph}.onnx"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Made once, also for several test workers: tracing takes most of this file's time."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.mktemp("demo") if run is None else tmp_path_factory.getbasetemp().parent
    folder = base / f"rtx-{run}"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not (folder / "done").exists():
            assert time.monotonic() < deadline, "the worker that makes the demo has failed"
            time.sleep(0.2)
        return Demo(folder)
    try:
        make_demo(folder)
    finally:
        (folder / "done").touch()  # whoever waits should fail now, not in five minutes
    return Demo(folder)


def make_demo(folder: Path) -> None:
    checkpoint = load_checkpoint("demo")
    schemes: dict[str, Scheme] = dict.fromkeys(GRAPHS, "fp32")
    rule, size = text_rule(checkpoint, None), checkpoint.model.config.embed_dim
    row = (rule.start_id, *[rule.end_id] * ((rule.text_length or 2) - 1))
    nothing = Canary(0, row, (0.0,) * size, (0.0,) * size, (), 1e-3)  # not asked about here, and slow to compute
    for name in ("reference", *SCHEMES, "untyped-int8", "untyped-int4"):
        (folder / name).mkdir()
    graphs = write_graphs(folder / "reference", checkpoint, schemes)
    complete(folder / "reference", checkpoint, "onnxruntime", schemes, graphs, rule, nothing)
    reference = Bundle.open(folder / "reference")
    feeds = drawn_feeds(reference, threads=1)
    (folder / "feeds").write_bytes(pickle.dumps(feeds))
    ranges = {name: ranges_of(reference.graph_path(name), feeds[name]) for name in GRAPHS}
    islands = {name: each.names for name, each in audit(reference, feeds, threads=1).items()}
    for scheme in SCHEMES:
        table = Table(ranges) if scheme == "int8" else None
        write_typed(reference, folder / scheme, dict.fromkeys(GRAPHS, scheme), table, islands)  # type: ignore[arg-type]
        for graph in GRAPHS if scheme in ("int8", "int4") else ():
            model = ir.external_data.load_to_model(ir.load(reference.graph_path(graph)))
            quantize_graph(model, graph, scheme, "tensorrt", ranges[graph])
            ir.save(model, folder / f"untyped-{scheme}" / f"{graph}.onnx")


def ranges_of(path: Path, feeds: Sequence[Feeds]) -> Ranges:
    found = Ranges()
    engine = ObservedEngine(path, activation_names(read_graph(path), "linear"), found.watch, threads=1)
    for each in feeds:
        engine.run(each)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_builds(graph: str, scheme: Scheme, demo: Demo) -> None:
    profiles = profiles_for(demo.reference.manifest)[graph]
    path = demo.typed(graph, scheme)
    assert lint_graph(path, profiles) == ()
    for name in CAPABILITIES[scheme] if os.environ.get("ALL_CAPABILITIES") else ("SM86",):
        assert build(path, profiles, (name,)).problems == (), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_types(graph: str, scheme: Scheme, demo: Demo) -> None:
    """Half between the graphs, float32 where an application looks; all float32 in fp32."""
    found = read_onnx(demo.typed(graph, scheme).read_bytes(), graph)
    for value in (*found.inputs, *found.outputs):
        if value.dtype in (FLOAT, FLOAT16):
            assert value.dtype == (FLOAT16 if is_between(value.name) and scheme != "fp32" else FLOAT), value


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_numbers(graph: str, scheme: Scheme, demo: Demo) -> None:
    """The typed graph on ONNX Runtime, against the same quantization in float32: what the types alone change."""
    reference, typed = _session(demo.untyped(graph, scheme)), _session(demo.typed(graph, scheme))
    for feeds in demo.feeds(graph):
        wanted = reference.run(None, feeds)
        got = typed.run(None, _fitting(feeds, typed))
        for output, one, other in zip(reference.get_outputs(), got, wanted, strict=True):
            error = np.abs(one.astype(np.float64) - other).max() / np.abs(other).max()
            if scheme in TOLERANCE:
                assert error <= TOLERANCE[scheme], output.name
            if output.name != "norm":
                assert _drift(one, other) <= DRIFT, output.name


def test_table_and_head_are_one(demo: Demo) -> None:
    """An 8-bit table is stored once, though the text tower, the decoder and its vocabulary projection read it."""
    sizes = {scheme: (demo.folder / scheme / "weights.bin").stat().st_size for scheme in SCHEMES}
    assert sizes["fp16"] < 0.52 * sizes["fp32"]
    assert sizes["int8"] < 0.30 * sizes["fp32"]
    assert sizes["int4"] < sizes["int8"]


def test_layer_names_stay(demo: Demo) -> None:
    """So that a profile of an engine can be read, and layers compared."""
    for graph in GRAPHS:
        names = {node.name for node in read_onnx(demo.reference.read(f"{graph}.onnx"), graph).nodes}
        typed = read_onnx(demo.typed(graph, "fp16").read_bytes(), graph).nodes
        assert names <= {node.name for node in typed}
        assert {node.op_type for node in typed if node.name not in names} <= {"Cast"}


def test_another_targets_graph_is_refused(demo: Demo, tmp_path: Path) -> None:
    """The control of test_builds: the same graph as it is quantized for OpenVINO."""
    model = ir.external_data.load_to_model(ir.load(demo.reference.graph_path("text")))
    quantize_graph(model, "text", "int4", "openvino", None)
    ir.save(model, tmp_path / "text.onnx")
    profiles = profiles_for(demo.reference.manifest)["text"]
    assert "Quantized constant" in build(tmp_path / "text.onnx", profiles, ("SM86",)).problems[0]
    assert lint_graph(tmp_path / "text.onnx", profiles)[0].rule == "quantized-constant"


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32; else 8-bit activations
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _fitting(feeds: Feeds, session: onnxruntime.InferenceSession) -> Feeds:
    half = {each.name for each in session.get_inputs() if each.type == "tensor(float16)"}
    return {name: value.astype(np.float16) if name in half else value for name, value in feeds.items()}


def _drift(one: np.ndarray, other: np.ndarray) -> float:
    """1 - mean cosine over the last axis, of those vectors that are not 0."""
    left, right = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosines = (left * right).sum(axis=-1)[norms > 0] / norms[norms > 0]
    return float(1 - cosines.mean())

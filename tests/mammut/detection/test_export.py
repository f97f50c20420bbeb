"""The forward as a graph: what the exporter makes of it, on ONNX Runtime, OpenVINO and for TensorRT.

Scores and boxes are compared proposal by proposal: with random weights, places of equal centerness may change order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mammut_export.graphs
from mammut.detection.detector import Detector
from mammut_export.graphs import TraceableGraph
from mammut_export.onnx_graphs import to_onnx
from mammut_runtime.manifest import GraphInfo, InputProfile, TensorInfo

Made = Callable[..., Detector]
WIDTH, SIZE, PROPOSALS = 24, 64, 12


class Flat(nn.Module):
    """One named argument and the rest, as the exporter calls graphs."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, *names: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.model(pixels, *names)
        return found


@pytest.fixture(scope="module")
def exported(make_any_detector: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path]:
    """The fuller dialect, with windows: tracing takes most of this file's time."""
    detector = make_any_detector("openmammut", window=2, global_layers=(1,))
    inputs = (
        TensorInfo("pixels", "float32", ("batch", 3, SIZE, SIZE)),
        TensorInfo("classes", "float32", ("classes", WIDTH)),
        TensorInfo("novel", "float32", ("classes",)),
    )
    outputs = (
        TensorInfo("boxes", "float32", ("batch", PROPOSALS, 4)),
        TensorInfo("scores", "float32", ("batch", PROPOSALS, "classes")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mammut_export.graphs.TRACED_SIZES, "classes", 5)
        graph = TraceableGraph("detector", Flat(detector).eval(), GraphInfo("detector.onnx", inputs, outputs), 24)
        model = to_onnx(graph)
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    ir.save(model, path)
    return detector, path


def feeds(batch: int, classes: int) -> dict[str, np.ndarray]:
    draw = torch.Generator().manual_seed(100 * batch + classes)
    rows = F.normalize(torch.randn(classes, WIDTH, generator=draw), dim=-1)
    return {
        "pixels": torch.randn(batch, 3, SIZE, SIZE, generator=draw).numpy(),
        "classes": rows.numpy(),
        "novel": (torch.rand(classes, generator=draw) > 0.5).float().numpy(),
    }


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Each wanted proposal is there, its box within 0.01 pixels and its scores within 1e-4."""
    for boxes, scores, right_boxes, right_scores in zip(*found, *wanted, strict=True):
        apart = np.abs(boxes[:, None] - right_boxes[None]).max(axis=2)
        apart = np.maximum(apart / 0.01, np.abs(scores[:, None] - right_scores[None]).max(axis=2) / 1e-4)
        assert (apart.min(axis=0) < 1).all()


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (3, 20), (2, 1203)])
def test_engines_agree(exported: tuple[Detector, Path], batch: int, classes: int) -> None:
    detector, path = exported
    given = feeds(batch, classes)
    with torch.no_grad():
        wanted = [each.numpy() for each in detector(*(torch.from_numpy(each) for each in given.values()))]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    same(session.run(None, given), wanted)
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    found = compiled(given)
    same([np.array(found[index]) for index in range(2)], wanted)
    with pytest.raises(AssertionError):  # the control
        same([wanted[0] + 0.5, wanted[1]], wanted)


def test_tensorrt_builds_it(exported: tuple[Detector, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    from mammut_export.rtx_gate import build
    from mammut_runtime.tensorrt_lint import lint_graph

    _, path = exported
    profiles = {
        "pixels": InputProfile((1, 3, SIZE, SIZE), (1, 3, SIZE, SIZE), (4, 3, SIZE, SIZE)),
        "classes": InputProfile((1, WIDTH), (20, WIDTH), (1203, WIDTH)),
        "novel": InputProfile((1,), (20,), (1203,)),
    }
    assert lint_graph(path, profiles) == ()
    assert build(path, profiles, ("SM86",)).problems == ()

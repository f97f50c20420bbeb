"""Tubes on the engines: traced like every graph, the same numbers on ONNX Runtime and OpenVINO, taken by TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mammut import presets
from mammut.config import TubeConfig, VideoConfig
from mammut.model import Mammut, with_video
from mammut_export.graphs import TraceableGraph
from mammut_export.onnx_graphs import save, to_onnx
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.manifest import GraphInfo, InputProfile, TensorInfo

VIDEO = VideoConfig(
    4,
    (
        TubeConfig((1, 16, 16), (2, 16, 16)),
        TubeConfig((2, 8, 8), (2, 16, 16), (0, 4, 4), (2, 1, 1)),
        TubeConfig((3, 8, 8), (1, 32, 32), (0, 4, 4), (1, 2, 2)),
        TubeConfig((4, 4, 4), (4, 8, 8)),
    ),
)
"""Everything there is: patches, neighbours in time and in space, boxes that overlap."""


class Clips(nn.Module):
    def __init__(self, model: Mammut) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode_video(frames)


@pytest.fixture(scope="module")
def model() -> Mammut:
    torch.manual_seed(0)
    made = with_video(Mammut(presets.tiny()), VIDEO).eval().requires_grad_(False)
    assert made.tubes is not None
    made.tubes.gate.fill_(0.5)
    return made


@pytest.fixture(scope="module")
def graph(model: Mammut, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = model.config.video_tokens
    info = GraphInfo(
        "video.onnx",
        (TensorInfo("frames", "float32", ("batch", 4, 3, 32, 32)),),
        (TensorInfo("tokens", "float32", ("batch", tokens, 32)), TensorInfo("embedding", "float32", ("batch", 24))),
    )
    path = tmp_path_factory.mktemp("tubes") / "video.onnx"
    save(to_onnx(TraceableGraph("video", Clips(model), info, 24)), path)
    return path


def _frames(clips: int) -> np.ndarray:
    return np.random.default_rng(clips).standard_normal((clips, 4, 3, 32, 32)).astype(np.float32)


def _run(path: Path, target: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    engine = open_engine(path, target, EngineOptions(threads=1))
    try:
        return engine.run(dict(feeds))
    finally:
        engine.close()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_engines_give_the_cores_numbers(model: Mammut, graph: Path, target: str) -> None:
    pytest.importorskip({"onnxruntime": "onnxruntime", "openvino": "openvino"}[target])
    for clips in (1, 3):
        frames = _frames(clips)
        found = _run(graph, target, {"frames": frames})
        tokens, embedding = model.encode_video(torch.from_numpy(frames))
        np.testing.assert_allclose(found["tokens"], tokens, atol=2e-5)
        np.testing.assert_allclose(found["embedding"], embedding, atol=2e-5)
        other = model.encode_video(torch.from_numpy(frames[:, ::-1].copy()))[0]  # control: the clip backwards
        assert np.abs(found["tokens"] - other.numpy()).max() > 0.01


def test_tensorrt_builds_them(graph: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    from mammut_export.rtx_gate import build

    sizes = [(clips, 4, 3, 32, 32) for clips in (1, 2, 4)]
    assert build(graph, {"frames": InputProfile(*sizes)}, ("SM86",)).problems == ()

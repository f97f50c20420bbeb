"""The tiny checkpoint and its traced graphs, made once: tracing takes seconds, everything after it milliseconds."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs
from mammut_export.contents import contract_of
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.graphs import TraceableGraph, traceable

torch.set_num_threads(1)
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """tests/make_tiny_bundle.py."""
    spec = importlib.util.spec_from_file_location("make_tiny_bundle", TESTS / "make_tiny_bundle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint that the committed bundle is made from."""
    checkpoint: Checkpoint = maker.tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return checkpoint


@pytest.fixture(scope="session")
def tiny_video(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint of the committed bundle with a video graph: the same weights, and tubes."""
    checkpoint: Checkpoint = maker.tiny_video_checkpoint(tmp_path_factory.mktemp("video-checkpoint"))
    return checkpoint


@pytest.fixture(scope="session")
def tiny_detector(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint of the committed bundle with a detector: the same weights, and a detector of random ones."""
    checkpoint: Checkpoint = maker.tiny_detector_checkpoint(tmp_path_factory.mktemp("detector-checkpoint"))
    return checkpoint


@pytest.fixture(scope="session")
def traced(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Graph → what onnx_graphs.to_onnx gives, as bytes with the weights inside. Test workers share one tracing."""
    return _traces("pictures", tiny, GRAPHS, tmp_path_factory)


@pytest.fixture(scope="session")
def traced_video(
    tiny_video: Checkpoint, traced: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The same of the checkpoint with tubes. The picture's encoder and the text tower do not depend on them."""
    return traced | _traces("video", tiny_video, ("video", "memory", "decoder"), tmp_path_factory)


def _traces(
    kind: str, checkpoint: Checkpoint, names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return {name: _trace(checkpoint, name, names) for name in names}
    folder = tmp_path_factory.getbasetemp().parent / f"traced-{kind}-{run}"
    folder.mkdir(exist_ok=True)
    for name in names:
        try:
            (folder / f"{name}.lock").mkdir()
        except FileExistsError:
            continue  # another worker has it in hand
        (folder / f"{name}.part").write_bytes(_trace(checkpoint, name, names))
        (folder / f"{name}.part").rename(folder / name)
    deadline = time.monotonic() + 300
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, "the worker that traces has failed"
        time.sleep(0.2)
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def models(traced: dict[str, bytes]) -> dict[str, ir.Model]:
    """Fresh copies of the traced graphs."""
    return {name: _model(data) for name, data in traced.items()}


@pytest.fixture
def traced_once(traced: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter takes the tiny checkpoint's graphs from `traced` instead of tracing them again."""

    def recall(graph: TraceableGraph) -> ir.Model:
        return _model(traced[graph.name])

    monkeypatch.setattr(onnx_graphs, "to_onnx", recall)


@pytest.fixture
def video_traced_once(traced_video: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the tiny checkpoint that has tubes, for bundles with a video graph."""

    def recall(graph: TraceableGraph) -> ir.Model:
        return _model(traced_video[graph.name])

    monkeypatch.setattr(onnx_graphs, "to_onnx", recall)


@pytest.fixture
def spoilt_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An exporter with a fault: one number of weights.bin is wrong."""
    from mammut_export import contents

    right = contents.write_graphs

    def wrong(folder: Path, *rest: Any) -> object:
        info = right(folder, *rest)
        path = folder / "weights.bin"
        data = bytearray(path.read_bytes())
        middle = len(data) // 2 // 4 * 4
        data[middle + 2 : middle + 4] = b"\x40\x40"  # a float32 of about 3
        path.write_bytes(data)
        return info

    monkeypatch.setattr(contents, "write_graphs", wrong)
    yield


def _trace(checkpoint: Checkpoint, name: str, graphs: tuple[str, ...]) -> bytes:
    model = onnx_graphs.to_onnx(traceable(name, checkpoint, contract_of(checkpoint, graphs)[name]))
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def _model(data: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(data))

"""The trained demo model on real photos: what 8 bits cost there. A model with random weights says little about that."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mammut.checkpoint import load_checkpoint
from mammut_calibration.activations import activation_names, read_graph
from mammut_calibration.data import Damaged, open_dataset
from mammut_calibration.observe import ObservedEngine
from mammut_calibration.statistics import TensorCollector
from mammut_export import onnx_graphs
from mammut_export.contents import model_info
from mammut_export.graphs import traceable
from mammut_export.quantize import quantize_graph
from mammut_export.quantize_weights import PackingStore
from mammut_export.weights import move_to_store
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.manifest import graph_contract
from mammut_runtime.preprocess import Preprocessor

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "photos-000.tar"
torch.set_num_threads(1)


@pytest.mark.shared
@pytest.mark.skipif(not PHOTOS.exists(), reason="the shared data are not here")
def test_embeddings_of_photos_stay_where_they_are(tmp_path):
    checkpoint = load_checkpoint("demo")
    info = graph_contract(model_info(checkpoint), checkpoint.preprocess.size)["vision"]
    model = onnx_graphs.to_onnx(traceable("vision", checkpoint, info))
    traced = ir.serde.serialize_model(model)
    reference = written(tmp_path / "fp32", traced, None, "onnxruntime", {})
    preprocess = Preprocessor(checkpoint.preprocess)
    photos = [
        preprocess(sample.image)[None] for sample in open_dataset([PHOTOS], limit=40) if not isinstance(sample, Damaged)
    ]
    collectors: dict[str, TensorCollector] = defaultdict(TensorCollector)
    names = activation_names(read_graph(reference))
    engine = ObservedEngine(reference, names, lambda name, value: collectors[name].add(value), threads=1)
    for pixels in photos[:24]:
        engine.run({"pixels": pixels})
    ranges = {name: collector.result().range() for name, collector in collectors.items()}
    expected = embeddings(reference, "onnxruntime", photos[24:])
    cosines = {}
    for target, scheme in (("onnxruntime", "int8"), ("onnxruntime", "int8-dynamic"), ("openvino", "int8")):
        if target == "openvino":
            pytest.importorskip("openvino")
        path = written(tmp_path / f"{target}-{scheme}", traced, scheme, target, ranges)
        cosines[target, scheme] = (embeddings(path, target, photos[24:]) * expected).sum(axis=1)
    assert all(each.mean() >= 0.999 and each.min() >= 0.998 for each in cosines.values()), cosines
    # The control: ranges four times too small cut most values off.
    cut = {name: type(seen)(seen.low / 4, seen.high / 4) for name, seen in ranges.items()}
    path = written(tmp_path / "cut", traced, "int8", "onnxruntime", cut)
    assert (embeddings(path, "onnxruntime", photos[24:]) * expected).sum(axis=1).mean() < 0.99


def written(folder: Path, traced, scheme, target: str, ranges) -> Path:
    folder.mkdir()
    model = ir.serde.deserialize_model(traced)
    if scheme is not None:
        quantize_graph(model, "vision", scheme, target, ranges)
    with PackingStore(folder / "weights.bin") as store:
        move_to_store(model, store)
    onnx_graphs.save(model, folder / "vision.onnx")
    return folder / "vision.onnx"


def embeddings(path: Path, target: str, photos) -> np.ndarray:
    """float32[photos, E], unit length."""
    engine = open_engine(path, target, EngineOptions(threads=1))
    found = [engine.run({"pixels": pixels})["embedding"][0] for pixels in photos]
    engine.close()
    return np.stack(found)

"""A bundle with a detector, the committed one: every precision and target, its profiles, limits, canary and lint."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx_ir as ir
import pytest

from mammut.checkpoint import Checkpoint
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.drift import MEASURES, DriftLimits
from mammut_calibration.table import CalibrationTable
from mammut_export.canary import observed_canary
from mammut_export.gate import Gate, Quantized
from mammut_export.lattice import replay
from mammut_export.measure import here
from mammut_export.parity import DEFAULT_TOLERANCE, verify
from mammut_export.profiles import ProfileLimits, profiles_for
from mammut_export.range_audit import drawn_feeds
from mammut_export.rtx_gate import build
from mammut_export.samples import drawn_samples
from mammut_export.typed import structural_islands
from mammut_runtime.bundle import Bundle, hash_files, write_manifest
from mammut_runtime.canary import canary_picture, compare
from mammut_runtime.engines import open_engine
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.errors import VerificationError
from mammut_runtime.manifest import TOKENIZER_FILE, WEIGHTS_FILE, GraphInfo, Scheme
from mammut_runtime.memory_use import measure_memory, unique_weight_bytes
from mammut_runtime.model import Model
from mammut_runtime.onnx_external import external_tensors
from mammut_runtime.tensorrt_lint import lint_bundle

TINY = Path(__file__).parent.parent / "data" / "tiny-detector-bundle"
LOOSE = DriftLimits(*[-1.0] * len(MEASURES))
ALL: list[tuple[Scheme, str]] = [
    ("int8", "onnxruntime"),
    ("int8-dynamic", "onnxruntime"),
    ("int4", "onnxruntime"),
    ("int8", "openvino"),
    ("int4", "openvino"),
    ("fp32", "tensorrt"),
    ("fp16", "tensorrt"),
    ("int8", "tensorrt"),
    ("int4", "tensorrt"),
]
NAMES = ("red heart", "yellow sun", "a small house")


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 pictures."""
    folder = tmp_path_factory.mktemp("detector") / "data"
    folder.mkdir()
    for seed in range(40):
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        picture = np.clip(canary_picture(seed, (40, 48)).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{seed:02d}.png"), picture)
    return open_dataset([folder])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def table(reference: Bundle, data: Dataset) -> CalibrationTable:
    return calibrate(reference, data.split()[0], CalibrateOptions(threads=1))


def gate_for(reference: Bundle, data: Dataset | None, limits: DriftLimits, target: str, **rest: Any) -> Gate:
    def complete(folder: Path, graphs: Mapping[str, GraphInfo], schemes: Mapping[str, Scheme]) -> None:
        (folder / TOKENIZER_FILE).write_bytes((TINY / TOKENIZER_FILE).read_bytes())
        manifest = dataclasses.replace(
            reference.manifest,
            target=target,  # type: ignore[arg-type]
            precision="fp32" if set(schemes.values()) == {"fp32"} else "mixed",
            graphs=dict(graphs),
            files=hash_files(folder),
        )
        if target == "tensorrt":
            manifest = dataclasses.replace(manifest, profiles=profiles_for(manifest))
        write_manifest(folder, manifest)

    return Gate(reference, target, data, complete, limits=limits, options=here(target, 1), **rest)


def made(reference: Bundle, folder: Path, schemes: Mapping[str, Scheme], target: str, **rest: Any) -> Quantized:
    """Without a judge, so fast."""
    gate = gate_for(reference, None, LOOSE, target, **rest)
    graphs, layers = gate._write(folder, schemes, {}, {})
    gate._complete(folder, graphs, schemes)
    return Quantized(dict(schemes), graphs, layers, None, LOOSE, (), (), ())


def test_every_shape_and_number_of_names(reference: Bundle, tiny_detector: Checkpoint) -> None:
    """1 to 1,203 names: boxes within half a pixel, scores within a thousandth."""
    info = reference.manifest.graphs["detector"]
    engine = open_engine(reference.graph_path("detector"), "onnxruntime", here("onnxruntime", 1))
    names = []
    for label, got, wanted in replay("detector", tiny_detector, info, engine):
        names.append(wanted["scores"].shape[2])
        np.testing.assert_allclose(got["boxes"], wanted["boxes"], atol=0.5, err_msg=label)
        np.testing.assert_allclose(got["scores"], wanted["scores"], atol=1e-3, err_msg=label)
        assert np.abs(wanted["boxes"]).max() > 1 and wanted["scores"].max() > 1e-4, label  # something is compared
    assert names == [1, 20, 365, 1203]


def test_the_runtime_finds_what_the_core_finds(reference: Bundle, tiny_detector: Checkpoint) -> None:
    samples = drawn_samples()
    parity = verify(TINY, reference.manifest, tiny_detector, samples, DEFAULT_TOLERANCE["fp32"])
    assert parity.problems == [] and len(parity.detections) == len(samples)
    assert sum(each.found for each in parity.detections) > 10
    other = dataclasses.replace(tiny_detector.detector.config, nms_iou=0.9)  # type: ignore[union-attr]
    tiny_detector.detector.config, kept = other, tiny_detector.detector.config  # type: ignore[union-attr]
    try:  # the control: NMS is the rule's of the bundle on both sides, the objectness power is the graph's
        tiny_detector.detector.config = dataclasses.replace(kept, objectness_power=0.5)  # type: ignore[union-attr]
        wrong = verify(TINY, reference.manifest, tiny_detector, samples[:2], DEFAULT_TOLERANCE["fp32"])
    finally:
        tiny_detector.detector.config = kept  # type: ignore[union-attr]
    assert any("detector.scores" in each for each in wrong.problems)
    assert any(each.startswith("detections in") for each in wrong.problems)


@pytest.mark.parametrize(("scheme", "target"), ALL)
def test_every_precision(reference: Bundle, table: CalibrationTable, folder: Path, scheme: Scheme, target: str) -> None:
    """It opens, finds about the same, and what the detector shares with the picture encoder is stored once."""
    if target == "openvino":
        pytest.importorskip("openvino")
    schemes = dict.fromkeys(reference.manifest.graphs, scheme)
    result = made(reference, folder, schemes, target, table=table if scheme == "int8" else None)
    layers = {each.graph: each for each in result.layers}
    if scheme not in ("fp16", "fp32"):
        encoder = {name for name in layers["vision"].quantized if name.startswith("vision.")}
        assert encoder and encoder <= set(layers["detector"].quantized)
        assert len(layers["detector"].quantized) > len(layers["vision"].quantized)
    opened = Bundle.open(folder)
    picture = canary_picture(5, (60, 80))
    with Model(reference) as before, Model(opened, here(target, 1)) as after:
        outputs = []
        for model in (before, after):
            rows = model.classifier(NAMES, model.detector.rule.templates).embeddings
            square = model.detector.square(picture, "rgb")
            outputs.append(model.detector.run([square], rows, np.ones(len(NAMES), np.float32)))
        assert outputs[1][0].dtype == outputs[1][1].dtype == np.float32
        assert np.isfinite(outputs[1][0]).all() and np.isfinite(outputs[1][1]).all()
        if scheme in ("fp32", "fp16"):
            near = np.abs(outputs[0][0][0][:, None] - outputs[1][0][0][None]).max(axis=2).min(axis=1)
            assert (near < 0.5).mean() >= 0.9
        assert len(after.detect(picture, list(NAMES), threshold=0.001)) > 0
        assert (folder / WEIGHTS_FILE).stat().st_size <= 1.05 * unique_weight_bytes(after)
    if target == "tensorrt":
        assert lint_bundle(opened) == ()
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            path = folder / opened.manifest.graphs["detector"].file
            assert build(path, opened.manifest.profiles["detector"], ("SM86",)).problems == ()


def test_float16_is_held_against_pytorch(reference: Bundle, tiny_detector: Checkpoint, folder: Path) -> None:
    made(reference, folder, dict.fromkeys(reference.manifest.graphs, "fp16"), "tensorrt")
    manifest = Bundle.open(folder).manifest
    samples = drawn_samples()[:2]
    parity = verify(folder, manifest, tiny_detector, samples, DEFAULT_TOLERANCE["fp16"])
    assert parity.problems == []


def test_what_chooses_computes_in_float32(reference: Bundle) -> None:
    graph = ir.load(reference.graph_path("detector")).graph
    islands = structural_islands(graph)
    kinds = {node.op_type for node in graph if islands.get(str(node.name), "").startswith("decides")}
    assert {"TopK", "Sigmoid", "MaxPool", "Floor", "Exp"} - kinds <= {"Floor"}
    assert not kinds & {"MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization", "Gelu"}
    vision = ir.load(reference.graph_path("vision")).graph  # the control: nothing is chosen there
    assert not any("decides" in why for why in structural_islands(vision).values())


def test_weights_are_stored_once(reference: Bundle) -> None:
    """The detector adds its own to weights.bin, and nothing that the picture encoder has but its positions."""
    with Model(reference) as model:
        assert (TINY / WEIGHTS_FILE).stat().st_size <= 1.05 * unique_weight_bytes(model)
    alone = {name: sizes(reference, name) for name in ("vision", "detector")}
    shared = alone["vision"].keys() & alone["detector"].keys()
    assert sum(alone["vision"][each] for each in shared) == sum(alone["vision"].values()) - 16 * 32 * 4
    assert sum(alone["detector"].values()) > sum(alone["detector"][each] for each in shared)


def sizes(bundle: Bundle, graph: str) -> dict[tuple[int, int], int]:
    file = bundle.manifest.graphs[graph].file
    found = external_tensors(bundle.read(file), file)
    return {(each.offset_bytes, each.length_bytes or 0): each.length_bytes or 0 for each in found}


def test_judged_on_detections(reference: Bundle, data: Dataset, folder: Path) -> None:
    """With only the detector quantized, detections differ and embeddings do not; layers are kept until it passes."""
    schemes: dict[str, Scheme] = {"vision": "fp32", "detector": "int4", "text": "fp32"}
    limits = dataclasses.replace(LOOSE, detection_agreement=0.995)
    result = gate_for(reference, data, limits, "onnxruntime").make(folder, schemes)
    assert result.drift is not None and not result.failures
    first, last = result.rounds[0], result.rounds[-1]
    assert len(first.failures) == 1 and first.failures[0].startswith("detection_agreement") and last.kept > 0
    measures = result.drift.measures
    assert measures["embedding_cosine_min"] == pytest.approx(1.0) and measures["detection_agreement"] >= 0.995


def test_profiles(reference: Bundle) -> None:
    found = profiles_for(reference.manifest, ProfileLimits(pictures=3, names=365))["detector"]
    width = reference.manifest.model.embed_dim
    assert (found["classes"].minimum, found["classes"].maximum) == ((1, width), (365, width))
    assert found["novel"].maximum == (365,) and found["pixels"].maximum == (3, 3, 64, 64)
    assert profiles_for(reference.manifest)["detector"]["classes"].maximum == (1203, width)


def test_the_canary_has_boxes(reference: Bundle) -> None:
    canary = reference.manifest.canary
    assert 1 <= len(canary.boxes) <= 4
    with Model(reference) as model:
        answers = model.canary_answers(canary)
        assert model.replay_canary().ok
    assert answers.boxes is not None
    again = observed_canary(reference, canary)
    assert [each.score for each in again.boxes] == pytest.approx([each.score for each in canary.boxes], abs=1e-4)
    for spoilt in (answers.boxes + 0.01, answers.boxes * np.nan):  # the control
        result = compare(canary, dataclasses.replace(answers, boxes=spoilt.astype(np.float32)))
        assert not result.ok and "boxes differ by" in result.message and result.worst_error > 0.005


def test_boxes_without_a_detector_are_refused(reference: Bundle) -> None:
    plain = Bundle.open(TINY.with_name("tiny-bundle")).manifest
    with pytest.raises(ValueError, match=r"canary\.boxes: expected none in a bundle without 'detector', got"):
        dataclasses.replace(plain, canary=dataclasses.replace(plain.canary, boxes=reference.manifest.canary.boxes))
    assert plain.canary.boxes == () and b'"boxes"' not in (TINY.with_name("tiny-bundle") / "manifest.json").read_bytes()


def test_a_detector_that_computes_something_else_is_noticed(reference: Bundle) -> None:
    def open_graph(name: str) -> Any:
        engine = open_engine(reference.graph_path(name), "onnxruntime", here("onnxruntime", 1))
        if name != "detector":
            return engine
        return FakeEngine(lambda feeds: {key: value * 0.9 for key, value in engine.run(feeds).items()})

    with Model(reference, open_graph=open_graph) as model, pytest.raises(VerificationError, match="boxes differ by"):
        model.replay_canary()


def test_memory_counts_the_detector() -> None:
    opened = []
    bundle = Bundle.open(TINY)

    def open_graph(name: str) -> Any:
        engine = open_engine(bundle.graph_path(name), "onnxruntime", here("onnxruntime", 1))
        return FakeEngine(lambda feeds: (opened.append(name), engine.run(feeds))[1])  # type: ignore[func-returns-value]

    with Model(bundle, open_graph=open_graph) as model:
        use = measure_memory(model, here("onnxruntime", 1))
    assert set(opened) == {"vision", "detector", "text"} and use.unique_weights > 0


def test_feeds_for_an_audit(reference: Bundle) -> None:
    feeds = drawn_feeds(reference, threads=1)["detector"]
    assert feeds and all(set(each) == {"pixels", "classes", "novel"} for each in feeds)
    assert all(not each["novel"].any() for each in feeds)  # the names it was trained with

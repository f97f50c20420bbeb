from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut.checkpoint import Checkpoint
from mammut_export.contents import text_rule
from mammut_export.export import ExportResult, export
from mammut_export.options import ExportOptions
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import CheckpointError, InputError, VerificationError
from mammut_runtime.model import Model

QUICK = ExportOptions(max_tokens=6)


@pytest.fixture
def result(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> ExportResult:
    return export(tiny, tmp_path / "bundle", QUICK)


def test_a_bundle_is_whole_and_works(result: ExportResult) -> None:
    with Model.load(result.path) as model:
        assert model.replay_canary().ok
        manifest = model.manifest
        seen = model.encode(np.zeros((40, 50, 3), np.uint8))
        assert seen.embedding.shape == (24,)
        assert len(seen.caption().ids) <= 6
    assert (manifest.target, manifest.precision, manifest.opset) == ("onnxruntime", "fp32", 21)
    assert manifest.parity.keys() >= {"vision.embedding", "text.embedding", "decoder.logits"}
    assert manifest.text.max_tokens == 6
    assert manifest.made_by["checkpoint"] == "tiny" and len(manifest.made_by["checkpoint_sha256"]) == 64
    files = {"vision.onnx", "text.onnx", "memory.onnx", "decoder.onnx", "weights.bin", "tokenizer.json"}
    assert manifest.files.keys() == files | {"report.json", "report.html"}
    assert result.bundle_bytes == sum(path.stat().st_size for path in result.path.iterdir())


def test_weights_are_stored_once(result: ExportResult) -> None:
    assert (result.path / "weights.bin").stat().st_size < 1.02 * result.plan.unique_weight_bytes
    assert result.plan.separate_weight_bytes > 1.2 * result.plan.unique_weight_bytes  # control: sharing is worth it


def test_exporting_twice_gives_the_same_files(
    result: ExportResult, tiny: Checkpoint, traced_once: None, tmp_path: Path
) -> None:
    again = export(tiny, tmp_path / "again", QUICK)
    timed = {"report.json", "report.html", "manifest.json"}  # the reports hold times, the manifest their hashes
    for path in result.path.iterdir():
        if path.name not in timed:
            assert path.read_bytes() == (again.path / path.name).read_bytes(), path.name
    first, second = (json.loads((each.path / "manifest.json").read_bytes()) for each in (result, again))
    for manifest in (first, second):
        for name in ("report.json", "report.html"):
            del manifest["files"][name]
    assert first == second


@pytest.mark.parametrize(
    ("tasks", "graphs"), [(("search",), {"vision", "text"}), (("caption",), {"vision", "memory", "decoder"})]
)
def test_tasks_decide_the_graphs(
    tiny: Checkpoint, traced_once: None, tmp_path: Path, tasks: tuple[str, ...], graphs: set[str]
) -> None:
    made = export(tiny, tmp_path / "bundle", ExportOptions(tasks=tasks, max_tokens=6))
    bundle = Bundle.open(made.path)
    assert bundle.manifest.graphs.keys() == graphs
    assert made.bundle_bytes < 340_000
    with Model.load(made.path) as model:
        assert model.replay_canary().ok


def test_fp16_is_half_the_size(result: ExportResult, tiny: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((20, 30, 3), 90, np.uint8))
    options = ExportOptions(precision="fp16", max_tokens=6, pictures=(tmp_path / "grey.png",))
    halved = export(tiny, tmp_path / "halved", options)
    sizes = [(each.path / "weights.bin").stat().st_size for each in (halved, result)]
    assert 0.49 < sizes[0] / sizes[1] < 0.55
    manifest = Bundle.open(halved.path).manifest
    assert manifest.precision == "fp16" and manifest.quantization["decoder"].weights == "float16"
    assert 0 <= manifest.quantization["vision"].drift["embedding"] < 1e-5
    whole = Bundle.open(result.path).manifest
    assert manifest.parity["decoder.logits"].tolerance > 10 * whole.parity["decoder.logits"].tolerance


def test_a_wrong_weight_publishes_nothing(
    tiny: Checkpoint, traced_once: None, spoilt_weights: None, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match="does not compute what PyTorch computes"):
        export(tiny, tmp_path / "bundle", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_weight_leaves_the_old_bundle(
    result: ExportResult, tiny: Checkpoint, spoilt_weights: None, tmp_path: Path
) -> None:
    before = Bundle.open(result.path).content_hash
    with pytest.raises(VerificationError):
        export(tiny, result.path, QUICK, overwrite=True)
    assert Bundle.open(result.path).content_hash == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_tolerance_decides(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="tolerance"):
        export(tiny, tmp_path / "bundle", ExportOptions(max_tokens=6, tolerance=1e-9))
    assert not (tmp_path / "bundle").exists()


def test_an_existing_bundle_is_replaced_only_when_asked(result: ExportResult, tiny: Checkpoint) -> None:
    with pytest.raises(InputError, match="exists already"):
        export(tiny, result.path, QUICK)
    before = (result.path / "manifest.json").read_bytes()
    export(tiny, result.path, ExportOptions(max_tokens=5), overwrite=True)
    assert (result.path / "manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tflite"}, "target: expected one of onnxruntime, openvino, tensorrt, got 'tflite'"),
        ({"precision": "int3"}, "precision: expected one of fp32, fp16, int8, .* or auto for .*, got 'int3'"),
        ({"target": "tensorrt", "precision": "auto"}, "TensorRT builds on the device; choose fp16, int8 or int4"),
        ({"tasks": ("sing",)}, r"tasks: expected one or more of caption, ask, .*, got 'sing'"),
        ({"tolerance": 0.0}, "tolerance: expected a number above 0"),
        ({"tolerance": float("nan")}, "tolerance: expected a number above 0"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExportOptions(**options)  # type: ignore[arg-type]


def test_max_tokens_must_fit_the_context(tiny: Checkpoint) -> None:
    assert text_rule(tiny, None).max_tokens == text_rule(tiny, 23).max_tokens == 23
    with pytest.raises(InputError, match="max_tokens: expected at most 23, got 24; the model has 24 positions"):
        text_rule(tiny, 24)


def test_a_checkpoint_that_no_bundle_can_describe(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    prompts = dataclasses.replace(tiny, prompts={"ask": "no placeholder"})
    with pytest.raises(CheckpointError, match=r"no bundle can be made of it: prompts\.ask: expected \{question\} once"):
        export(prompts, tmp_path / "bundle", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    steps: list[str] = []
    export(tiny, tmp_path / "bundle", QUICK, progress=steps.append)
    assert steps[0].startswith("tracing") and "comparing captions" in steps and steps[-1] == "publishing"

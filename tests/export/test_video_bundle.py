"""A bundle with a video graph, made of the committed one: every precision and target, its profiles, limits and lint."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.drift import MEASURES, DriftLimits
from mammut_calibration.table import CalibrationTable
from mammut_export.export import _embedding_drift
from mammut_export.gate import Gate, Quantized
from mammut_export.measure import here
from mammut_export.profiles import ProfileLimits, profiles_for
from mammut_export.rtx_gate import build
from mammut_runtime.bundle import Bundle, hash_files, write_manifest
from mammut_runtime.canary import canary_picture, moving_crops
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.manifest import TOKENIZER_FILE, WEIGHTS_FILE, GraphInfo, Scheme
from mammut_runtime.memory_use import unique_weight_bytes
from mammut_runtime.model import Model
from mammut_runtime.onnx_external import external_tensors
from mammut_runtime.tensorrt_lint import lint_bundle

TINY = Path(__file__).parent.parent / "data" / "tiny-video-bundle"
LOOSE = DriftLimits(*[-1.0] * len(MEASURES))
ALL: list[tuple[Scheme, str]] = [
    ("int8", "onnxruntime"),
    ("int4", "onnxruntime"),
    ("int8", "openvino"),
    ("fp16", "tensorrt"),
    ("int8", "tensorrt"),
]
"""Those that differ in kind: int8-dynamic is judged below, int4 is the same nodes for all."""


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 pictures and a clip of 12 s, a coloured square that moves."""
    folder = tmp_path_factory.mktemp("video") / "data"
    folder.mkdir()
    for seed in range(24):
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        picture = np.clip(canary_picture(seed, (40, 48)).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{seed:02d}.png"), picture)
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 8, (48, 40))
    for index in range(96):
        frame = canary_picture(100 + index // 8, (40, 48)) // 2
        frame[10:30, index % 28 : index % 28 + 20] = (20, 200, index)
        writer.write(frame)
    writer.release()
    return open_dataset([folder])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def table(reference: Bundle, data: Dataset) -> CalibrationTable:
    return calibrate(reference, data.split()[0], CalibrateOptions(threads=1, max_tokens=4))


def gate_for(reference: Bundle, data: Dataset | None, limits: DriftLimits, target: str, **rest: Any) -> Gate:
    def complete(folder: Path, graphs: Mapping[str, GraphInfo], schemes: Mapping[str, Scheme]) -> None:
        (folder / TOKENIZER_FILE).write_bytes((TINY / TOKENIZER_FILE).read_bytes())
        manifest = dataclasses.replace(
            reference.manifest,
            target=target,
            graphs=dict(graphs),
            files=hash_files(folder),  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("scheme", "target"), ALL)
def test_every_precision(reference: Bundle, table: CalibrationTable, folder: Path, scheme: Scheme, target: str) -> None:
    """Clips give about the same embedding; the picture encoder's layers are the clips' too, and stored once."""
    if target == "openvino":
        pytest.importorskip("openvino")
    schemes = dict.fromkeys(reference.manifest.graphs, scheme)
    result = made(reference, folder, schemes, target, table=table if scheme == "int8" else None)
    layers = {each.graph: each for each in result.layers}
    if scheme != "fp16":
        assert set(layers["vision"].quantized) <= set(layers["video"].quantized)
        assert all("tubes." in name or "patch_embedding" in name for name in layers["video"].kept)
    opened = Bundle.open(folder)
    frames = moving_crops(canary_picture(5, (60, 80)), 4)
    with Model(reference) as before, Model(opened, here(target, 1)) as after:
        clips = [model.encode_frames(frames) for model in (before, after)]
        assert float(clips[0].embedding @ clips[1].embedding) > (0.9 if scheme == "int4" else 0.998)
        assert len(clips[1].caption(CaptionOptions(beams=1, max_tokens=4)).ids) <= 4
        stored = (folder / WEIGHTS_FILE).stat().st_size
        assert stored <= 1.05 * unique_weight_bytes(after)
    if target == "tensorrt":
        assert lint_bundle(opened) == ()
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            for graph in ("video", "memory", "decoder"):
                path = folder / opened.manifest.graphs[graph].file
                assert build(path, opened.manifest.profiles[graph], ("SM86",)).problems == (), graph


def test_the_encoder_is_stored_once(reference: Bundle) -> None:
    """The video graph adds its tubes and positions to weights.bin, and nothing that the picture encoder has."""
    with Model(reference) as model:
        unique = unique_weight_bytes(model)
    assert (TINY / WEIGHTS_FILE).stat().st_size <= 1.05 * unique
    alone = {name: sizes(reference, name) for name in ("vision", "video")}
    shared = alone["vision"].keys() & alone["video"].keys()
    # all but the positions, and the picture's own are 16 x 32 numbers
    assert sum(alone["vision"][each] for each in shared) == sum(alone["vision"].values()) - 16 * 32 * 4
    extra = sum(alone["video"][each] for each in alone["video"].keys() - shared)
    assert extra < 0.6 * sum(alone["video"].values())  # control: without sharing it would be all of it


def sizes(bundle: Bundle, graph: str) -> dict[tuple[int, int], int]:
    file = bundle.manifest.graphs[graph].file
    found = external_tensors(bundle.read(file), file)
    return {(each.offset_bytes, each.length_bytes or 0): each.length_bytes or 0 for each in found}


def test_judged_on_clips(reference: Bundle, data: Dataset, folder: Path) -> None:
    """With only the video graph quantized, clips differ and pictures do not; its layers are kept until it passes."""
    schemes: dict[str, Scheme] = dict.fromkeys(reference.manifest.graphs, "fp32") | {"video": "int8-dynamic"}
    limits = dataclasses.replace(LOOSE, clip_cosine_min=1 - 1e-6)
    result = gate_for(reference, data, limits, "onnxruntime").make(folder, schemes)
    assert result.drift is not None and not result.failures
    first, last = result.rounds[0], result.rounds[-1]
    assert len(first.failures) == 1 and first.failures[0].startswith("clip_cosine_min") and last.kept > 2
    (video,) = (each for each in result.layers if each.graph == "video")
    assert len(video.kept) > last.kept  # the convolutions were never quantized
    measures = result.drift.measures
    assert measures["embedding_cosine_min"] == pytest.approx(1.0) and measures["clip_cosine_min"] >= 1 - 1e-6
    assert result.drift.clips == result.drift.pictures and 0 < result.drift.filmed < result.drift.clips
    assert _embedding_drift(result.drift).keys() == {"vision", "video", "text"}


def test_profiles(reference: Bundle) -> None:
    """The decoder takes a picture's tokens as usual, and a clip's at most."""
    found = profiles_for(reference.manifest, ProfileLimits(pictures=3, clips=2))
    frames, tokens = found["video"]["frames"], found["memory"]["tokens"]
    assert (frames.minimum, frames.optimum, frames.maximum) == ((1, 4, 3, 32, 32), (1, 4, 3, 32, 32), (2, 4, 3, 32, 32))
    assert (tokens.minimum, tokens.optimum, tokens.maximum) == ((1, 16, 32), (1, 16, 32), (3, 40, 32))
    assert found["decoder"]["cross_k.0"].maximum == (3, 2, 40, 12)

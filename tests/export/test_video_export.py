"""A checkpoint with tubes becomes a bundle that watches clips; without the task, or without tubes, one as before."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
from onnx import ModelProto

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs, parity
from mammut_export.export import export, plan_export
from mammut_export.graphs import TraceableGraph
from mammut_export.options import ExportOptions
from mammut_export.plan import CLIP_POSITIONS, describe, uses
from mammut_export.samples import Sample
from mammut_runtime.bundle import Bundle, write_manifest
from mammut_runtime.canary import canary_picture, moving_crops
from mammut_runtime.errors import InputError, VerificationError
from mammut_runtime.model import Model

QUICK = ExportOptions(max_tokens=6)
REMEDY = "run python tests/make_tiny_bundle.py and commit what it writes"


@pytest.fixture
def fresh(tiny_video: Checkpoint, video_traced_once: None, tmp_path: Path) -> Bundle:
    export(tiny_video, tmp_path / "bundle", ExportOptions())
    return Bundle.open(tmp_path / "bundle")


def test_the_committed_bundle_is_what_the_exporter_makes(maker: ModuleType, fresh: Bundle) -> None:
    committed = Bundle.open(maker.VIDEO_BUNDLE)
    assert sum(path.stat().st_size for path in maker.VIDEO_BUNDLE.iterdir()) < 500_000
    for part in ("model", "preprocess", "text", "graphs", "opset"):
        assert getattr(committed.manifest, part) == getattr(fresh.manifest, part), f"{part}: {REMEDY}"
    assert committed.manifest.files.keys() == fresh.manifest.files.keys(), REMEDY
    canaries = committed.manifest.canary, fresh.manifest.canary
    np.testing.assert_allclose(canaries[0].clip_embedding, canaries[1].clip_embedding, atol=1e-5)
    with Model.load(maker.VIDEO_BUNDLE) as model:
        assert model.watches and model.replay_canary().ok


def test_all_that_it_can_do_by_default(fresh: Bundle, tiny_video: Checkpoint) -> None:
    manifest = fresh.manifest
    assert manifest.graphs.keys() == {"vision", "video", "text", "memory", "decoder"}
    assert (manifest.model.video_frames, manifest.model.video_tokens) == (4, tiny_video.model.config.video_tokens)
    assert manifest.graphs["decoder"].inputs[-1].shape == ("batch", 2, "seen", 12)
    assert manifest.parity.keys() >= {"video.tokens", "video.embedding", "video.norm"}
    report = (fresh.path / "report.html").read_text()
    assert "Made of these pictures" in report and "a clip" in report
    plan = plan_export(tiny_video, ExportOptions())
    assert (fresh.path / "weights.bin").stat().st_size <= 1.05 * plan.unique_weight_bytes


def test_without_the_task_it_is_as_before(tiny_video: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, tasks=("caption", "search"))
    manifest = Bundle.open(export(tiny_video, tmp_path / "bundle", options).path).manifest
    assert "video" not in manifest.graphs and manifest.model.video_frames == 0
    assert manifest.graphs["memory"].inputs[0].shape == ("batch", 16, 32)
    assert b"video_frames" not in (tmp_path / "bundle" / "manifest.json").read_bytes()


def test_only_what_can_be_done(tiny: Checkpoint, tmp_path: Path) -> None:
    for options in (ExportOptions(tasks=("caption", "watch")), ExportOptions(precision="video=int4")):
        with pytest.raises(InputError, match=r"no tubes|no graph 'video'"):
            export(tiny, tmp_path / "bundle", dataclasses.replace(options, accept_drift=True))
    assert list(tmp_path.iterdir()) == []


def test_frames_in_another_order_are_noticed(
    tiny_video: Checkpoint, traced_video: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Control for the parity of clips: a graph that takes a clip's frames backwards is right about still ones only."""

    def backwards(graph: TraceableGraph) -> ir.Model:
        model = ir.serde.deserialize_model(ModelProto.FromString(traced_video[graph.name]))
        if graph.name == "video":
            frames = model.graph.inputs[0]
            order = ir.Value(name="order", const_value=ir.tensor(np.array([3, 2, 1, 0])))
            model.graph.register_initializer(order)
            taken = ir.Node("", "Gather", [frames, order], [ir.AttrInt64("axis", 1)], name="backwards")
            taken.outputs[0].name, taken.outputs[0].dtype = "backwards", ir.DataType.FLOAT
            model.graph.insert_before(model.graph[0], taken)
            for use in list(frames.uses()):
                if use.node is not taken:
                    use.node.replace_input_with(use.idx, taken.outputs[0])
        return model

    monkeypatch.setattr(onnx_graphs, "to_onnx", backwards)
    monkeypatch.setattr(parity, "replay", lambda *rest, **more: iter(()))  # the runtime's way alone must notice
    with pytest.raises(VerificationError, match=r"video\.(tokens|embedding) differs"):
        export(tiny_video, tmp_path / "bundle", dataclasses.replace(QUICK, tasks=("watch",)))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_runtime_gives_what_the_core_gives(
    maker: ModuleType, tiny_video: Checkpoint, tmp_path: Path, target: str
) -> None:
    """Every output at every shape, and captions token for token by the cached and the slow way (parity.py)."""
    pytest.importorskip(target)
    folder = tmp_path / "bundle"
    shutil.copytree(maker.VIDEO_BUNDLE, folder)
    manifest = dataclasses.replace(Bundle.open(folder).manifest, target=target)
    write_manifest(folder, manifest)
    samples = [Sample("x", canary_picture(9, (70, 50)), "drawn")]
    found = parity.verify(folder, manifest, tiny_video, samples, 5e-5)
    assert [(each.clip, each.verdict) for each in found.captions] == [(False, "same"), (True, "same")]
    assert not found.problems and any(each.what.startswith("clip of 4 frames") for each in found.timings)
    assert any("40 tokens" in shape for shape in found.shapes) and any("16 tokens" in shape for shape in found.shapes)
    frames = moving_crops(samples[0].pixels, 4)
    with Model.load(folder) as model:
        still = model.encode_frames(frames[:1] * 4).embedding
        assert float(still @ model.encode_frames(frames).embedding) < 0.99999


def test_the_plan(tiny_video: Checkpoint) -> None:
    plan = plan_export(tiny_video, ExportOptions())
    config, video = tiny_video.model.config, plan.graph("video")
    names = [*tiny_video.model.state_dict(), CLIP_POSITIONS]
    extra = {name for name in names if uses("video", name, config) and not uses("vision", name, config)}
    assert extra == {CLIP_POSITIONS, *(name for name in names if name.startswith("tubes.projections."))}
    assert (
        plan.clip_cross_bytes / plan.cross_bytes == 40 / 16 and video.operations > 2 * plan.graph("vision").operations
    )
    text = "\n".join(describe(plan))
    assert "for a clip of 4 frames" in text and "per clip" in text
    pictures = plan_export(tiny_video, ExportOptions(tasks=("caption",)))
    assert pictures.clip_cross_bytes == 0 and "per clip" not in "\n".join(describe(pictures))

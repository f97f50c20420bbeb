"""From a checkpoint to a quantized bundle, through the gate and all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammut.checkpoint import Checkpoint
from mammut_calibration.drift import MEASURES, DriftLimits
from mammut_export.commands import cli
from mammut_export.export import export
from mammut_export.options import ExportOptions
from mammut_export.profiles import ProfileLimits
from mammut_runtime import console
from mammut_runtime.bundle import Bundle, write_manifest
from mammut_runtime.canary import canary_picture
from mammut_runtime.doctor import examine_bundle
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import EngineError, VerificationError
from mammut_runtime.model import Model
from mammut_runtime.tensorrt_lint import lint_bundle

LOOSE = DriftLimits(*[-1.0] * len(MEASURES))
IMPOSSIBLE = DriftLimits(*[1.0] * len(MEASURES))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(40):
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        picture = np.clip(canary_picture(seed, (40, 48)).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"<b>{seed:02d}.png"), picture)
    return folder


def options(pictures: Path, **more: object) -> ExportOptions:
    chosen = {"precision": "int8", "max_tokens": 6, "limits": LOOSE, "threads": 1, "calibration": (pictures,), **more}
    return ExportOptions(**chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_int8(tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    made = export(tiny, tmp_path / "bundle", options(pictures, target=target))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    manifest = Bundle.open(made.path).manifest
    assert (manifest.target, manifest.precision) == (target, "int8")
    activations = {info.activations for info in manifest.quantization.values()}
    assert activations == {"uint8" if target == "onnxruntime" else "int8"}
    assert manifest.drift is not None and manifest.drift.failures == ()
    assert 0 < manifest.quantization["vision"].drift["embedding"] < 0.05
    report = examine_bundle(made.path)
    assert report.ok and report.warnings == ()
    with Model.load(made.path) as model:
        seen = model.encode(canary_picture(3, (50, 60)))
        assert seen.match(["a cat", "a dog"]) and seen.caption() is not None
    whole = json.loads((made.path / "report.json").read_text())
    assert whole["quantization"]["passed"] and whole["parity"]["outputs"]
    measured = whole["quantization"]["measured"]
    assert measured["quantized"]["bundle_bytes"] < measured["float32"]["bundle_bytes"]
    assert {"encode_ms", "caption_ms", "peak_memory_bytes"} <= measured["float32"].keys()
    page = (made.path / "report.html").read_text()
    assert "Captions before and after" in page and "&lt;b&gt;" in page and "<b>0" not in page


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_for_tensorrt(tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path, precision: str) -> None:
    """Typed, with profiles, lint clean; everything runs on ONNX Runtime when asked to."""
    more: dict[str, object] = {"calibration": ()} if precision == "fp32" else {}
    more["largest"] = ProfileLimits(pictures=2, texts=2, beams=3)
    made = export(tiny, tmp_path / "bundle", options(pictures, target="tensorrt", precision=precision, **more))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    bundle = Bundle.open(made.path)
    manifest = bundle.manifest
    kinds = {each.dtype for info in manifest.graphs.values() for each in info.inputs if "past" in each.name}
    assert kinds == {"float32" if precision == "fp32" else "float16"}
    assert manifest.profiles.keys() == manifest.graphs.keys() and lint_bundle(bundle) == ()
    assert manifest.profiles["vision"]["pixels"].maximum[0] == 2
    assert manifest.profiles["decoder"]["ids"].maximum[:2] == (2, 3)
    assert bool(manifest.parity) == (precision in ("fp32", "fp16"))
    on_cpu = EngineOptions(threads=1, engine="onnxruntime")
    with Model.load(made.path, on_cpu) as model:
        seen = model.encode(canary_picture(3, (50, 60)))
        again = model.see(seen.tokens, seen.embedding)
        assert seen.match(["a cat", "a dog"]) and again.caption().ids == seen.caption().ids
    report = examine_bundle(made.path, on_cpu)
    assert report.ok and report.warnings == ()
    without_engines = examine_bundle(made.path)  # where it is needed most: no GPU, nothing built
    assert not without_engines.ok
    assert without_engines.lint == tuple(f"TensorRT takes {name}" for name in manifest.graphs)
    write_manifest(made.path, dataclasses.replace(manifest, profiles={}))  # the control: open sizes without profiles
    broken = examine_bundle(made.path)
    assert broken.lint == () and all("TensorRT: " in line and "profile" in line for line in broken.warnings)
    write_manifest(made.path, manifest)
    islands = json.loads((made.path / "report.json").read_text())["float32_islands"]
    assert bool(islands["found"]) == (precision != "fp32")
    with pytest.raises(EngineError, match=r"mammut-run build|--engine onnxruntime"):
        Model.load(made.path)


def test_fp16_for_tensorrt_is_judged_too(tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path) -> None:
    wanted = options(pictures, target="tensorrt", precision="fp16", limits=DriftLimits(embedding_cosine_min=1.0))
    with pytest.raises(VerificationError, match="embedding_cosine_min"):
        export(tiny, tmp_path / "bundle", wanted)
    assert list(tmp_path.iterdir()) == []


def test_by_graph(tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path) -> None:
    made = export(tiny, tmp_path / "bundle", options(pictures, precision="vision=int4,text=fp16"))
    manifest = Bundle.open(made.path).manifest
    assert manifest.precision == "mixed"
    assert {name: info.weights for name, info in manifest.quantization.items()} == {
        "vision": "int4", "text": "float16", "memory": "float32", "decoder": "float32",
    }  # fmt: skip


def test_what_fails_the_gate_is_not_published(
    tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path
) -> None:
    """The control is the next test: the same bundle, accepted."""
    with pytest.raises(VerificationError, match=r"differs too much from float32: embedding_cosine_mean is 0\.\d+.*"):
        export(tiny, tmp_path / "bundle", options(pictures, precision="int4", limits=IMPOSSIBLE, most_kept=0.1))
    assert list(tmp_path.iterdir()) == []


def test_what_is_accepted_says_so_ever_after(
    tiny: Checkpoint, traced_once: None, pictures: Path, tmp_path: Path
) -> None:
    chosen = options(pictures, precision="int4", limits=IMPOSSIBLE, most_kept=0.1, accept_drift=True)
    made = export(tiny, tmp_path / "bundle", chosen)
    manifest = Bundle.open(made.path).manifest
    assert manifest.drift is not None and manifest.drift.failures
    report = examine_bundle(made.path)
    assert report.ok and any("--accept-drift: embedding_cosine_mean is 0." in line for line in report.warnings)
    assert "The gate is NOT passed" in (made.path / "report.html").read_text()
    assert not json.loads((made.path / "report.json").read_text())["quantization"]["passed"]


def test_accepted_without_data(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> None:
    made = export(
        tiny, tmp_path / "bundle", ExportOptions(precision="int4", max_tokens=6, accept_drift=True, threads=1)
    )
    assert Bundle.open(made.path).manifest.drift is None
    assert "never measured" in examine_bundle(made.path).warnings[0]


def test_the_command(
    tiny: Checkpoint,
    traced_once: None,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [tiny.source, str(tmp_path / "bundle"), "--precision", "int8", "--calibration", str(pictures)]
    arguments += ["--max-tokens", "6", "--threads", "1"]
    limits = [part for name in LOOSE.to_dict() for part in ("--drift-limit", f"{name}=-1")]
    assert console.run(cli, [*arguments, *limits]) == 0
    assert "drift on 10 held-out pictures: embedding cosine mean 0." in capsys.readouterr().out
    assert console.run(cli, [*arguments, *limits, "--drift-limit", "embedding_cosine_mean=1", "--overwrite"]) in (0, 1)

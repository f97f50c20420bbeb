"""A bundle that was published with --accept-drift says so wherever it is looked at."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from mammut_runtime.bundle import Bundle, write_manifest
from mammut_runtime.doctor import describe, examine, examine_bundle
from mammut_runtime.manifest import DriftInfo, QuantizationInfo

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
INT8 = {"vision": QuantizationInfo("int8", "uint8", {"embedding": 0.01})}


def bundle(folder: Path, drift: DriftInfo | None, quantization: dict[str, QuantizationInfo] | None = None) -> Path:
    path = folder / "bundle"
    shutil.copytree(TINY, path)
    manifest = Bundle.open(path).manifest
    quantization = INT8 if quantization is None else quantization
    write_manifest(path, dataclasses.replace(manifest, drift=drift, quantization=quantization))
    return path


def info(measured: float) -> DriftInfo:
    return DriftInfo("0" * 64, 20, {"embedding_cosine_mean": measured}, {"embedding_cosine_mean": 0.995})


def test_accepted(tmp_path: Path) -> None:
    report = examine([bundle(tmp_path, info(0.9))])
    (found,) = report.bundles
    assert found.warnings == (
        "published with --accept-drift: embedding_cosine_mean is 0.9000, expected at least 0.9950",
    )
    assert found.ok and report.exit_code == 0
    assert any("WARNING" in line and "--accept-drift" in line for line in describe(report))


def test_never_measured(tmp_path: Path) -> None:
    (warning,) = examine_bundle(bundle(tmp_path, None)).warnings
    assert warning == "vision: quantized, and its drift was never measured (--accept-drift)"


@pytest.mark.parametrize("quantization", [INT8, {}])
def test_control(tmp_path: Path, quantization: dict[str, QuantizationInfo]) -> None:
    drift = info(0.999) if quantization else None
    report = examine([bundle(tmp_path, drift, quantization)])
    assert report.bundles[0].warnings == ()
    assert not any("WARNING" in line for line in describe(report))

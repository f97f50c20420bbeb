"""All graphs of a bundle typed together; and the gate that needs no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mammut_export import rtx_gate, typed_bundle
from mammut_export.profiles import profiles_for
from mammut_export.typed_bundle import write_typed
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import EngineError
from mammut_runtime.manifest import Scheme, graph_contract, halves_between
from mammut_runtime.tensorrt_lint import Finding

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return Bundle.open(TINY)


def schemes(reference: Bundle, scheme: Scheme, **others: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(reference.manifest.graphs, scheme) | others


def test_fp32_changes_nothing(reference: Bundle, tmp_path: Path) -> None:
    found, reports = write_typed(reference, tmp_path, schemes(reference, "fp32"))
    assert found == reference.manifest.graphs and not halves_between(found)
    assert all(not each.quantized for each in reports)
    for info in found.values():
        assert (tmp_path / info.file).stat().st_size > 0


@pytest.mark.parametrize("decoder", ["fp16", "int4", "fp32"])
def test_one_half_graph_makes_all_between_half(decoder: Scheme, reference: Bundle, tmp_path: Path) -> None:
    chosen = schemes(reference, "fp32", decoder=decoder)
    found, reports = write_typed(reference, tmp_path, chosen)
    manifest = reference.manifest
    wanted = graph_contract(manifest.model, manifest.preprocess.size, "float32" if decoder == "fp32" else "float16")
    assert found == {name: wanted[name] for name in found}
    assert bool(next(each for each in reports if each.graph == "decoder").quantized) is (decoder == "int4")


def test_what_tensorrt_would_refuse_is_not_written(
    reference: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding("vision", "node 7", "Det", "operator", "TensorRT does not have it", "leave it out")
    monkeypatch.setattr(typed_bundle, "lint_graph", lambda path: (finding,))
    with pytest.raises(
        EngineError, match=r"^TensorRT would not take vision: vision: node 7 \(Det\): TensorRT does not"
    ):
        write_typed(reference, tmp_path, schemes(reference, "fp16"))


def test_same_bytes_every_time(reference: Bundle, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_typed(reference, tmp_path / name, schemes(reference, "fp16", decoder="int4"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_gate(reference: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    write_typed(reference, tmp_path, schemes(reference, "fp16"))
    profiles = profiles_for(reference.manifest)["memory"]
    assert list(rtx_gate.refusals(tmp_path / "memory.onnx", profiles, "fp16")) == []
    built = rtx_gate.build(tmp_path / "memory.onnx", {}, ("SM86",))
    assert not built.ok and "profile" in built.problems[0]


def test_the_gate_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineError, match=r"needs tensorrt-rtx, which does not load .*; pip install tensorrt-rtx"):
        rtx_gate.library()

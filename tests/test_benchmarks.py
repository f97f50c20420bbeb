"""The benchmarks run, on the smallest model there is: their figures are not the point here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
TINY_BUNDLE = ROOT / "tests" / "data" / "tiny-bundle"


Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a script by its path in the repository, as running it would."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load_script(name: str) -> ModuleType:
        path = ROOT / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return load_script


def test_the_runtime_and_the_reference_are_measured_and_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("benchmarks/bench_runtime.py")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    load("tests/make_tiny_bundle.py").tiny_checkpoint(tmp_path)
    checkpoint = str(tmp_path / "tiny")
    row = {
        "model": "tiny",
        "threads": 1,
        "runtime": bench.child([bench.MEASURE, "runtime", str(TINY_BUNDLE), "1", "1"], 1),
        "reference": bench.child([bench.MEASURE, "reference", checkpoint, "1", "1"], 1),
        "cold_start_s": bench.cold_start_s(TINY_BUNDLE, 1, 1),
        **bench.bundle_size(TINY_BUNDLE),
    }
    row |= bench.bound(row, read_gb_per_s=10.0)
    bench.show(row)
    shown = capsys.readouterr().out
    assert "expected >= 4.0" in shown and "expected <= 1.05: FALLS SHORT" in shown  # graphs outweigh so few weights
    assert row["runtime"]["tokens"] in (19, 20) and 0 < row["runtime"]["peak_memory_mb"] < 2000
    # every weight but the embedding and position tables is read by a step, and nothing twice
    assert 0 < row["step_reads_mb"] < row["unique_weights_mb"]


def test_a_child_that_fails_ends_the_benchmark(load: Load, tmp_path: Path) -> None:
    measuring = load("benchmarks/measuring.py")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="exit code 3"):
        measuring.child([str(tmp_path / "fails.py")], 1)
    (tmp_path / "works.py").write_text("print('text')\nprint('{\"a\": 1}')")  # control
    assert measuring.child([str(tmp_path / "works.py")], 1) == {"a": 1}


def test_timings_leave_out_warm_up_and_preparation(load: Load) -> None:
    measuring = load("benchmarks/measuring.py")
    calls: list[str] = []
    timing = measuring.timed(lambda: calls.append("work"), 3, warm_up=2, prepare=lambda: calls.append("prepare"))
    assert calls == ["prepare", "work"] * 5 and timing.repeats == 3
    assert timing.fastest_ms <= timing.median_ms <= timing.slowest_ms


def test_engines_and_precisions_are_measured_and_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells of the table, in one round; the second engine where it is installed."""
    bench = load("benchmarks/bench_engines.py")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "PICTURE_SIZE", (48, 64))
    targets = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    with bench.made("tiny", TINY_BUNDLE, targets, ["fp32", "int8"], [], 32, 1) as work:
        assert [(each.target, each.precision) for each in work.cells[:2]] == [
            ("onnxruntime", "fp32"),
            ("onnxruntime", "int8"),
        ]
        monkeypatch.setattr(bench, "TOKENS", 4)
        rows = bench.compared(
            [
                {"model": "tiny", **bench.settled(each, [bench.measured(each, 1, 1)]), "drift": None}
                for each in work.cells
            ]
        )
        assert bench.drift(TINY_BUNDLE, work, 1) == {}
        (other,) = bench.variants(work.cells[0], ["--low-memory"])
        assert bench.measured(other, 1, 1)["engine"]["prepack"] is False
    assert not list(tmp_path.glob("tiny-cells-*")), "the bundles are deleted"
    shown = bench.table(rows).splitlines()
    assert len(shown) == 2 + len(rows) and shown[2].startswith("| tiny | onnxruntime | fp32 | 0 | ")
    assert all(row["encode_speedup"] > 0 and row["tokens"] in (3, 4) for row in rows)
    said = "\n".join(bench.expectations([rows[0] | {"resident_ratio": 1.0}, rows[1] | {"encode_own_speedup": 1.6}]))
    assert "tiny, onnxruntime fp32: resident memory 1.000, expected <= 1.4: pass" in said
    assert "tiny, onnxruntime int8: encode 1.600, expected >= 1.7: FALLS SHORT" in said


def test_clips_are_measured_stage_by_stage_and_their_memory_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("benchmarks/bench_video.py")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    clip = bench.written(tmp_path / "clip.mp4", bench.moving(45))
    memory = "0.02,0.04"  # minutes
    bench.main.callback((TINY_BUNDLE,), "", clip, "", memory, False, "1")
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(shown[-1])
    (row,) = found["rows"]
    assert row["frames"] == 45 and row["length_s"] == pytest.approx(1.5) and row["scenes"] >= 1 and row["cues"] >= 1
    assert row["decode_s"] > 0 and 0 < row["encode_s"] < row["whole_s"] and row["decoding_share"] > 0
    assert row["times_real_time"] == pytest.approx(row["length_s"] / row["whole_s"]) and row["way"] == "pictures"
    assert [each["length_s"] for each in found["memory"]] == pytest.approx([1.2, 2.4], abs=0.1)
    assert any("memory, last over first" in line for line in shown)
    bench.show(row | {"model": "demo", "times_real_time": 19.0})
    bench.show(row | {"model": "demo", "times_real_time": 21.0})
    bench.show(row | {"model": "B-32", "times_real_time": 1.0})
    said = capsys.readouterr().out
    assert said.count("expected >= 20.0: FALLS SHORT") == said.count("expected >= 20.0: pass") == 1

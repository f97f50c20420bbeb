"""The benchmarks run, on the smallest model there is: their figures are not the point here."""

from __future__ import annotations

import importlib.util
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

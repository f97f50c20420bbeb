"""The forecast: its arithmetic, what it says, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mammut import presets
from mammut.checkpoint import Checkpoint
from mammut_export.forecast import DEVICES, Band, Device, forecast, this_cpu
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.plan import Plan, make_plan
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import Scheme

ROOT = Path(__file__).parent.parent.parent


def planned(precision: Scheme = "fp16", config: str = "demo", graphs: tuple[str, ...] = GRAPHS) -> Plan:
    return make_plan(getattr(presets, config)(), dict.fromkeys(graphs, precision), 20)


@pytest.fixture
def exact() -> Device:
    """Reaches all it has, and nothing is fixed."""
    peaks = {"fp32": 1e9, "fp16": 2e9, "int8": 4e9}
    one = Band(1.0, 1.0)
    return Device("x", "X", "gpu", 10**11, 0, 1e9, peaks, ("here",), one, one, Band(0.0, 0.0))


@pytest.mark.parametrize(("precision", "part"), [("fp32", 1), ("fp16", 2), ("int8", 4), ("int4", 2)])
def test_the_roofline(precision: Scheme, part: int, exact: Device) -> None:
    """Peak by precision (int4 computes in half), the longer of the two at best, their sum at worst."""
    plan = planned(precision)
    for each in forecast(plan, exact, precision).graphs:
        computing, reading = each.operations / (part * 1e9), each.read_bytes / 1e9
        assert each.seconds.best == pytest.approx(max(computing, reading))
        assert each.seconds.worst == pytest.approx(computing + reading)


def test_bytes_that_are_read() -> None:
    fp32, fp16 = (forecast(planned(each), "agx-orin", each) for each in ("fp32", "fp16"))  # type: ignore[arg-type]
    for graph in GRAPHS:
        assert fp16.graph(graph).read_bytes == pytest.approx(fp32.graph(graph).read_bytes / 2)
    table = planned("fp32").graph("text").weight_bytes - fp32.graph("text").read_bytes
    assert table > 2048 * 192 * 4  # rows are taken from it; it is not read
    assert fp32.graph("decoder").read_bytes > planned("fp32").graph("decoder").packed_bytes  # the caches


def test_a_caption_is_its_parts() -> None:
    found = forecast(planned(), "orin-nano-8gb", "fp16")
    parts = [found.graph(name).seconds for name in ("vision", "memory", "decoder")]
    assert found.caption_s is not None
    assert found.caption_s.best == pytest.approx(parts[0].best + parts[1].best + 13 * parts[2].best)
    assert forecast(planned(graphs=("vision", "text")), "orin-nano-8gb", "fp16").caption_s is None


@pytest.mark.parametrize("name", DEVICES)
def test_every_assumption_is_said(name: str) -> None:
    device = DEVICES[name]
    lines = "\n".join(forecast(planned(), name, "fp16").lines())
    assert lines.startswith("forecast, not a measurement: demo on ")
    assert f"bandwidth {device.bandwidth / 1e9:.1f} GB/s" in lines and "belong to the system" in lines
    assert device.sources and all(f"source: {each}" in lines and each.startswith("https://") for each in device.sources)
    assert ("building " in lines) is (device.kind == "gpu")
    assert all(each.seconds.best < each.seconds.worst for each in forecast(planned(), name, "fp16").graphs)


def test_a_better_device_is_faster() -> None:
    middle = [forecast(planned(config="paper_base"), name, "fp16").graph("vision").seconds for name in
              ("thor", "agx-orin", "orin-nano-8gb", "n100", "pi5")]  # fmt: skip
    assert middle == sorted(middle, key=lambda band: band.best)


def test_what_cannot_fit_is_refused() -> None:
    plan = planned("fp32", "paper_huge")
    with pytest.raises(
        InputError, match=r"paper-huge \(fp32\) cannot fit on orin-nano-8gb: running needs at least .* GB"
    ):
        forecast(plan, "orin-nano-8gb", "fp32")
    assert forecast(plan, "thor", "fp32").build_bytes is not None
    small = replace(DEVICES["thor"], memory_bytes=2 * 10**9, reserved_bytes=10**9)
    with pytest.raises(InputError, match="building engines needs at least"):
        forecast(planned(), small, "fp16")


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        ("toaster", "fp16", "device: expected one of orin-nano-8gb, .*, got 'toaster'"),
        ("thor", "int8-dynamic", "thor runs TensorRT, which has no int8-dynamic"),
    ],
)
def test_bad_input(device: str, precision: Scheme, words: str) -> None:
    with pytest.raises(InputError, match=words):
        forecast(planned(precision), device, precision)


def test_a_precision_for_each_graph() -> None:
    schemes: dict[str, Scheme] = dict.fromkeys(GRAPHS, "fp16") | {"vision": "int8"}
    found = forecast(make_plan(presets.demo(), schemes, 20), "thor", schemes)
    assert [each.precision for each in found.graphs] == ["int8", "fp16", "fp16", "fp16"]


def test_this_machine() -> None:
    device = this_cpu()
    assert device.bandwidth > 1e8 and device.peaks["int8"] >= device.peaks["fp32"] > 1e8
    assert forecast(planned("fp32"), device, "fp32").build_bytes is None


@pytest.mark.usefixtures("traced_once")
def test_the_benchmark_runs(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_forecast", ROOT / "benchmarks" / "bench_forecast.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_forecast", bench)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "config_of", lambda name: tiny.model.config)
    result = CliRunner().invoke(bench.main, ["--models", "tiny", "--precisions", "fp32", "--repeats", "2"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.output.splitlines()[-1])
    assert [each["graph"] for each in last["rows"]] == list(GRAPHS)
    assert all(each["measured_ms"] > 0 for each in last["rows"])

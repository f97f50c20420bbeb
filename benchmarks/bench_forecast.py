"""The forecast's formula against measurements on this machine: it must hold here to be worth anything elsewhere.

    python benchmarks/bench_forecast.py                      a few minutes; nothing else should run meanwhile
    python benchmarks/bench_forecast.py --models demo --precisions fp32 --repeats 3      a first look

Bandwidth and peak of this machine are measured (forecast.this_cpu); efficiencies and the fixed cost are the bands that
the forecast states. Each graph of each model is traced with random weights (the demo has its own), run on ONNX Runtime
at batch 1, and its fastest run is held against the band, as bandwidth and peak are the fastest that were seen (they
are measured again before each model). The decoder runs one step after the plan's past. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from measuring import Timing, print_surroundings, surroundings, timed

from mammut import presets
from mammut.checkpoint import Checkpoint
from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut_export import onnx_graphs
from mammut_export.forecast import Band, Device, forecast, this_cpu
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.graphs import traceable
from mammut_export.plan import Plan, make_plan
from mammut_export.quantize import quantize_graph
from mammut_export.weights import WeightStore, move_to_store
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.manifest import GraphInfo, ModelInfo, Scheme, graph_contract
from mammut_runtime.preprocess import PreprocessRule

MODELS = ("demo", "S-32")
PRECISIONS: tuple[Scheme, ...] = ("fp32", "int8-dynamic")


@click.command(help=__doc__)
@click.option("--models", default=",".join(MODELS), help="Comma-separated, of demo, tiny and the openMaMMUT sizes.")
@click.option("--precisions", default=",".join(PRECISIONS), help="Comma-separated, of fp32 and int8-dynamic.")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--repeats", type=click.IntRange(1), default=30)
def main(models: str, precisions: str, threads: int, repeats: int) -> None:
    about = surroundings()
    print_surroundings(about)
    torch.set_num_threads(threads)
    device = this_cpu(threads)
    print(f"{device.bandwidth / 1e9:.1f} GB/s, {device.peaks['fp32'] / 1e9:.0f} G operations/s in float32\n")
    rows = []
    for name in models.split(","):
        device = faster(device, this_cpu(threads))
        for precision in precisions.split(","):
            rows += compare(name, precision, device, threads, repeats)  # type: ignore[arg-type]
    inside = sum(row["inside"] for row in rows)
    print(f"\n{inside} of {len(rows)} measurements inside the forecast's band")
    machine = {"bandwidth": device.bandwidth, "peaks": dict(device.peaks)}
    print(json.dumps({"benchmark": "forecast", **about, "threads": threads, **machine, "rows": rows}))


def compare(name: str, precision: Scheme, device: Device, threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each graph of one model in one precision."""
    config = config_of(name)
    plan = make_plan(config, dict.fromkeys(GRAPHS, precision), min(40, config.text.context_length - 2))
    expected = forecast(plan, device, precision)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        contract = write_graphs(Path(folder), config, precision)
        for graph in GRAPHS:
            feeds = inputs(contract[graph], plan)
            path = Path(folder) / contract[graph].file
            with contextlib.closing(open_engine(path, "onnxruntime", EngineOptions(threads=threads))) as engine:
                measured = timed(lambda engine=engine, feeds=feeds: engine.run(feeds), repeats, 3)  # type: ignore[misc]
            rows.append(row(name, precision, expected.graph(graph).seconds, measured, graph))
    return rows


def faster(one: Device, other: Device) -> Device:
    """Two measurements of a machine: what something else that ran has slowed down is left out."""
    return replace(
        one,
        bandwidth=max(one.bandwidth, other.bandwidth),
        cache_bandwidth=max(one.cache_bandwidth, other.cache_bandwidth),
        peaks={name: max(value, other.peaks[name]) for name, value in one.peaks.items()},
    )


def row(name: str, precision: Scheme, band: Band, timing: Timing, graph: str) -> dict[str, Any]:
    best, worst, measured_ms = band.best * 1e3, band.worst * 1e3, timing.fastest_ms
    inside = bool(best <= measured_ms <= worst)
    middle = (best * worst) ** 0.5 / measured_ms
    print(
        f"{name:<8}{graph:<9}{precision:<14}forecast {best:8.3f} to {worst:8.3f} ms, measured {measured_ms:8.3f}, "
        f"middle / measured {middle:5.2f}{'' if inside else '   OUTSIDE'}"
    )
    return {
        "model": name,
        "graph": graph,
        "precision": precision,
        "best_ms": best,
        "worst_ms": worst,
        "measured_ms": measured_ms,
        "median_ms": timing.median_ms,
        "middle_by_measured": middle,
        "inside": inside,
    }


def config_of(name: str) -> MammutConfig:
    return {"demo": presets.demo, "tiny": presets.tiny}.get(name, lambda: presets.openmammut(name))()


def write_graphs(folder: Path, config: MammutConfig, precision: Scheme) -> dict[str, GraphInfo]:
    """Random weights, all graphs; the contract."""
    model = Mammut(config, pad_id=0).requires_grad_(False).eval()
    text = config.text
    info = ModelInfo(
        config.name, config.vision.tokens, config.vision.width, config.embed_dim, text.width, text.layers,
        len(text.cross_after), text.heads, text.vocab_size, 1, 1.0, 0.0, "softmax",
    )  # fmt: skip
    contract = graph_contract(info, config.vision.image_size)
    rule = PreprocessRule(config.vision.image_size, (0.5,) * 3, (0.5,) * 3)
    checkpoint = Checkpoint(model, b"", rule, {}, "random", "")  # its tokenizer is not asked for
    with WeightStore(folder / "weights.bin") as store:
        for name in GRAPHS:
            traced: ir.Model = onnx_graphs.to_onnx(traceable(name, checkpoint, contract[name]))
            quantize_graph(traced, name, precision, "onnxruntime", None)
            move_to_store(traced, store)
            onnx_graphs.save(traced, folder / contract[name].file)
    return contract


def inputs(info: GraphInfo, plan: Plan) -> dict[str, np.ndarray]:
    """One picture, one text of full length, or one token after the plan's past."""
    sizes = {"batch": 1, "beams": 1, "new": 1, "past": plan.past_tokens - 1, "length": plan.text_tokens}
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for tensor in info.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        integers = tensor.dtype == "int64"
        found[tensor.name] = random.integers(3, 40, shape) if integers else random.standard_normal(shape, np.float32)
    return found


if __name__ == "__main__":
    main()

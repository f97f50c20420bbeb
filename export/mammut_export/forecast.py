"""A forecast of latency and memory on a device that is not at hand: a roofline over the graphs of a plan.

    time of a run = the longer of (operations / peak) and (bytes of weights and caches / bandwidth), plus a fixed cost

Peaks and bandwidths are published; how much of them a real engine reaches is not, so each has a band, and the forecast
is a band: its good end lets computing and reading overlap at the better efficiency, its bad end adds them at the worse.
Everything that is assumed is printed. benchmarks/bench_forecast.py holds the same formula against measurements on the
machine at hand. A plan that cannot fit is refused here, before an hour is spent on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from mammut_export.plan import PROCESS_BYTES, GraphPlan, Plan, megabytes
from mammut_runtime.doctor import examine_machine
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import Scheme

Kind = Literal["gpu", "cpu"]
Bound = Literal["computing", "reading", "fixed cost"]
CAPTION_TOKENS = 12
"""Of the caption whose time is forecast; captions of photographs are about that long."""
THIS_CPU = "this-cpu"
MEGA, GIGA, TERA = 10**6, 10**9, 10**12


@dataclass(frozen=True)
class Band:
    """From the good end to the bad one."""

    best: float
    worst: float

    def __add__(self, other: Band) -> Band:
        return Band(self.best + other.best, self.worst + other.worst)

    def times(self, count: float) -> Band:
        return Band(self.best * count, self.worst * count)


@dataclass(frozen=True)
class Device:
    """What is published about a device, and what is assumed."""

    name: str
    title: str
    kind: Kind
    """gpu: TensorRT. cpu: ONNX Runtime or OpenVINO, all cores."""
    memory_bytes: int
    reserved_bytes: int
    """Taken by the system before we start; an assumption."""
    bandwidth: float
    """Bytes per second, published (or measured)."""
    peaks: Mapping[str, float]
    """"fp32", "fp16", "int8" -> operations per second, dense, published (or measured)."""
    sources: tuple[str, ...]
    reach: Band = field(default=Band(0.6, 0.15))
    """Part of a peak that an engine reaches: at best, at worst."""
    stream: Band = field(default=Band(0.85, 0.4))
    """Part of the bandwidth."""
    fixed_s: Band = field(default=Band(0.0002, 0.002))
    """Per run of a graph, whatever its size: launching some hundred kernels, and Python."""
    cache_bytes: int = 0
    """What stays in the last cache from run to run. At best a graph that fits is read from there."""
    cache_bandwidth: float = 0.0
    """Bytes per second, measured; 0 where it is not known."""


def _gpu(
    name: str, title: str, memory_gb: int, bandwidth_gb: float, peaks: tuple[float, float, float], *sources: str
) -> Device:
    tera = dict(zip(("fp32", "fp16", "int8"), (each * TERA for each in peaks), strict=True))
    reserved = 2 * GIGA if memory_gb <= 16 else 4 * GIGA
    return Device(name, title, "gpu", memory_gb * GIGA, reserved, bandwidth_gb * GIGA, tera, sources)


def _cpu(
    name: str, title: str, memory_gb: int, bandwidth_gb: float, peaks: tuple[float, float], *sources: str
) -> Device:
    giga = dict(zip(("fp32", "int8"), (each * GIGA for each in peaks), strict=True))
    reach, stream, fixed = Band(0.75, 0.15), Band(0.8, 0.35), Band(0.0003, 0.004)
    return Device(name, title, "cpu", memory_gb * GIGA, GIGA, bandwidth_gb * GIGA, giga, sources, reach, stream, fixed)


_ORIN = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf"
)
_ORINS = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/"
DEVICES: dict[str, Device] = {
    each.name: each
    for each in (
        # Tensor cores: int8 dense is half of the published sparse figure, fp16 half of int8 (the brief's ratios).
        _gpu(
            "orin-nano-8gb", "Jetson Orin Nano 8 GB (Super mode, 25 W)", 8, 102, (2.1, 16.7, 33.5),
            "https://developer.nvidia.com/blog/nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/", _ORIN,
        ),
        _gpu("orin-nx-16gb", "Jetson Orin NX 16 GB (25 W)", 16, 102.4, (1.9, 15, 30), _ORINS, _ORIN),
        _gpu("agx-orin", "Jetson AGX Orin 64 GB (MAXN)", 64, 204.8, (5.3, 42.5, 85), _ORINS, _ORIN),
        _gpu(
            "thor", "Jetson T5000 (Thor, MAXN)", 128, 273, (8.1, 258, 517),
            "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/",
        ),
        # 4 Gracemont cores at 2.9 GHz when all are busy: two 128-bit multiply-adds a cycle; AVX-VNNI: 4 times as many.
        _cpu(
            "n100", "Intel N100, 8 GB of DDR5-4800, one channel", 8, 38.4, (186, 742),
            "https://www.intel.com/content/www/us/en/products/sku/231803/intel-processor-n100-6m-cache-up-to-3-40-ghz/specifications.html",
        ),
        # 4 Cortex-A76 at 2.4 GHz: two 128-bit multiply-adds a cycle; dot products of bytes: 4 times as many.
        _cpu(
            "pi5", "Raspberry Pi 5, 8 GB of LPDDR4X-4267, 32 bits wide", 8, 17.1, (154, 614),
            "https://datasheets.raspberrypi.com/rpi5/raspberry-pi-5-product-brief.pdf",
        ),
    )
}  # fmt: skip
"""Name for --device -> the device. Compute peaks of the CPUs follow from clock and width of their published cores."""

CUDA_BYTES = Band(400 * MEGA, 900 * MEGA)
"""Of a process that has opened CUDA and TensorRT, before any engine. An assumption."""
BUILD_BYTES = Band(1.0 * GIGA, 2.5 * GIGA)
"""Of TensorRT's builder with its kernels, before any network. An assumption."""
BUILD_COPIES = Band(2.0, 4.0)
"""Copies of a graph's float32 weights that the builder holds at once. An assumption."""
SCRATCH_PART = Band(0.1, 0.6)
"""Scratch memory of the engines, as a part of their weights. An assumption."""


@dataclass(frozen=True)
class GraphForecast:
    """One run of one graph: a picture, a text, a token."""

    graph: str
    precision: Scheme
    operations: int
    read_bytes: float
    """Weights that are multiplied with, and caches."""
    seconds: Band
    bound: Bound
    """Which of the three is the largest at the middle of the bands."""


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    plan: Plan
    device: Device
    graphs: tuple[GraphForecast, ...]
    memory_bytes: Band
    """Of the process with all graphs open, one picture, one beam."""
    build_bytes: Band | None
    """While engines are built, one at a time; None where nothing is built."""
    caption_s: Band | None
    """Picture to a caption of CAPTION_TOKENS tokens, greedy; None without a decoder."""
    clip_caption_s: Band | None
    """The same of a clip whose frames are decoded; None without a decoder or a video graph."""

    def graph(self, name: str) -> GraphForecast:
        return next(each for each in self.graphs if each.graph == name)

    def lines(self) -> list[str]:
        """For a terminal: the figures, then every assumption."""
        device = self.device
        lines = [f"forecast, not a measurement: {self.plan.name} on {device.title}"]
        lines += [f"{'graph':<10}{'precision':<14}{'one run takes':<22}{'limited by'}"]
        for each in self.graphs:
            lines.append(f"{each.graph:<10}{each.precision:<14}{_milliseconds(each.seconds):<22}{each.bound}")
        if self.caption_s is not None:
            lines.append(f"caption    {_milliseconds(self.caption_s)} from pixels to {CAPTION_TOKENS} tokens, greedy")
        if self.clip_caption_s is not None:
            lines.append(f"clip       {_milliseconds(self.clip_caption_s)} from a clip's frames to as many tokens")
        lines.append(f"memory     {_gigabytes(self.memory_bytes)} of {device.memory_bytes / GIGA:.0f} GB")
        if self.build_bytes is not None:
            lines.append(
                f"building   {_gigabytes(self.build_bytes)} while `mammut-run build` runs, one engine at a time"
            )
        return lines + self._assumptions()

    def _assumptions(self) -> list[str]:
        device = self.device
        peaks = ", ".join(f"{name} {_rate(value)}" for name, value in device.peaks.items())
        lines = [
            "assumed:",
            f"  bandwidth {device.bandwidth / GIGA:.1f} GB/s, of which {_part(device.stream)}",
            f"  peaks {peaks} operations a second, of which {_part(device.reach)}",
            *(
                [f"  graphs of up to {megabytes(device.cache_bytes)} may stay in the cache"]
                if device.cache_bytes
                else []
            ),
            f"  {_milliseconds(device.fixed_s)} a run whatever its size; weights are read once a run; activations stay "
            f"in caches",
            f"  {device.reserved_bytes / GIGA:.0f} GB of memory belong to the system",
        ]
        if device.kind == "gpu":
            lines += [
                f"  {_gigabytes(CUDA_BYTES)} for CUDA and TensorRT",
                f"  scratch memory of {_part(SCRATCH_PART)} of the weights",
                f"  building: {_gigabytes(BUILD_BYTES)} and {BUILD_COPIES.best:.0f} to {BUILD_COPIES.worst:.0f} times "
                f"the largest graph's float32 weights",
            ]
        return [*lines, *(f"  source: {each}" for each in device.sources)]


def forecast(plan: Plan, device: Device | str, precision: Scheme | Mapping[str, Scheme]) -> Forecast:
    """Forecast a plan. device: a key of DEVICES, or a Device. precision: the plan's own, one for all or by graph.

    "this-cpu" is this machine on one thread, measured now (a second). Raises InputError for an unknown device, a
    precision that it does not run, and a plan that cannot fit.
    """
    if isinstance(device, str):
        if device not in (*DEVICES, THIS_CPU):
            raise InputError(f"device: expected one of {', '.join(DEVICES)}, {THIS_CPU}, got {device!r}")
        device = this_cpu() if device == THIS_CPU else DEVICES[device]
    names = [graph.name for graph in plan.graphs]
    schemes = dict.fromkeys(names, precision) if isinstance(precision, str) else dict(precision)
    if device.kind == "gpu" and "int8-dynamic" in schemes.values():
        raise InputError(f"{device.name} runs TensorRT, which has no int8-dynamic; choose fp16, int8 or int4")
    graphs = tuple(_graph(plan, graph, device, schemes.get(graph.name, "fp32")) for graph in plan.graphs)
    found = Forecast(
        plan,
        device,
        graphs,
        _memory(plan, device, schemes),
        _building(plan) if device.kind == "gpu" else None,
        _caption(graphs, "vision"),
        _caption(graphs, "video", plan.clip_cross_bytes / max(plan.cross_bytes, 1)),
    )
    _check_fit(found)
    return found


def this_cpu(threads: int = 1) -> Device:
    """This machine: bandwidths and peak measured, the best of a few products of a matrix with a vector or a matrix."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        large, square = torch.ones(16_384, 4096), torch.ones(1024, 1024)
        row, short = large[0].clone(), square[0].clone()
        calls: tuple[Callable[[], object], ...] = (lambda: large @ row, lambda: square @ short, lambda: square @ square)
        rounds = [[_timed(call) for call in (calls[0], calls[1], calls[1], calls[1], calls[2])] for _ in range(12)]
        reading, _, again, third, product = (min(each) for each in zip(*rounds, strict=True))
        cached = min(again, third)
    finally:
        torch.set_num_threads(before)
    machine = examine_machine()
    dots = {"avx512_vnni", "avx_vnni", "asimddp"} & set(machine.instructions)
    single = 2 * 1024**3 / product
    return Device(
        THIS_CPU,
        f"this machine ({machine.processor or 'unknown processor'}), {threads} thread{'s' * (threads > 1)}, measured",
        "cpu",
        machine.memory_bytes or 4 * GIGA,
        GIGA,
        large.numel() * 4 / reading,
        {"fp32": single, "int8": single * (4 if dots else 1)},
        ("measured on this machine",),
        reach=Band(1.25, 0.25),  # of PyTorch's product; ONNX Runtime's can be faster
        stream=Band(1.0, 0.4),
        fixed_s=Band(0.00002, 0.001),
        cache_bytes=_last_cache_bytes(),
        cache_bandwidth=square.numel() * 4 / cached,
    )


def _last_cache_bytes() -> int:
    """Size of the last cache, as Linux says; 0 elsewhere."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii").strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _graph(plan: Plan, graph: GraphPlan, device: Device, scheme: Scheme) -> GraphForecast:
    read = _multiplied_bytes(graph, scheme, device.kind)
    if graph.name == "decoder":
        read += (plan.cross_bytes + plan.cache_bytes) / (2 if _is_half(scheme, device.kind) else 1)
    peak = device.peaks[_peak_name(scheme, device)]
    computing = Band(graph.operations / (peak * device.reach.best), graph.operations / (peak * device.reach.worst))
    rate = device.bandwidth * device.stream.best
    if read <= device.cache_bytes:
        rate = max(rate, device.cache_bandwidth)
    reading = Band(read / rate, read / (device.bandwidth * device.stream.worst))
    fixed = device.fixed_s
    seconds = Band(max(computing.best, reading.best) + fixed.best, computing.worst + reading.worst + fixed.worst)
    parts: list[tuple[Bound, Band]] = [("computing", computing), ("reading", reading), ("fixed cost", fixed)]
    bound = max(parts, key=lambda part: part[1].best * part[1].worst)[0]
    return GraphForecast(graph.name, scheme, graph.operations, read, seconds, bound)


def _peak_name(scheme: Scheme, device: Device) -> str:
    if scheme in ("int8", "int8-dynamic"):
        return "int8"
    # int4 is for weights only. CPUs compute fp16 and int4 in float32.
    return "fp16" if scheme in ("fp16", "int4") and "fp16" in device.peaks else "fp32"


def _multiplied_bytes(graph: GraphPlan, scheme: Scheme, kind: Kind) -> float:
    """Weights that a run reads. A plan's packed bytes are a CPU's, which unpacks fp16 to float32 for good."""
    return graph.packed_bytes / 2 if scheme == "fp16" and kind == "gpu" else float(graph.packed_bytes)


def _is_half(scheme: Scheme, kind: Kind) -> bool:
    """Whether caches are float16: on TensorRT, unless all is fp32."""
    return kind == "gpu" and scheme != "fp32"


def _caption(graphs: tuple[GraphForecast, ...], encoder: str, tokens: float = 1.0) -> Band | None:
    """tokens: what the encoder gives the decoder to look at, as a multiple of a picture's."""
    by_name = {each.graph: each.seconds for each in graphs}
    if "decoder" not in by_name or encoder not in by_name:
        return None
    # The prompt is a few tokens in one run: about another step. What a step reads are weights, nearly all of it.
    memory = by_name["memory"].times(tokens)
    return by_name[encoder] + memory + by_name["decoder"].times(CAPTION_TOKENS + 1)


def _memory(plan: Plan, device: Device, schemes: Mapping[str, Scheme]) -> Band:
    weights = sum(_multiplied_bytes(graph, schemes.get(graph.name, "fp32"), device.kind) for graph in plan.graphs)
    if device.kind == "cpu":
        resident = plan.resident_bytes
        return Band(0.85 * resident, 1.5 * resident)
    caches = plan.cross_bytes + plan.cache_bytes
    table = plan.unique_weight_bytes  # at worst an engine keeps its own copy of every table too
    base = Band(PROCESS_BYTES, PROCESS_BYTES + table) + CUDA_BYTES + Band(weights + caches / 2, weights + caches)
    return base + Band(SCRATCH_PART.best, SCRATCH_PART.worst).times(weights)


def _building(plan: Plan) -> Band:
    largest = max(graph.parameters for graph in plan.graphs) * 4
    return BUILD_BYTES + BUILD_COPIES.times(largest)


def _check_fit(found: Forecast) -> None:
    device = found.device
    free = device.memory_bytes - device.reserved_bytes
    left = f"{device.memory_bytes / GIGA:.0f} GB less {device.reserved_bytes / GIGA:.0f} for the system"
    for what, need in (("running", found.memory_bytes), ("building engines", found.build_bytes)):
        if need is not None and need.best > free:
            raise InputError(
                f"{found.plan.name} ({found.plan.precision}) cannot fit on {device.name}: {what} needs at least "
                f"{need.best / GIGA:.1f} GB, and {left} leave {free / GIGA:.1f}; choose int8 or int4, "
                f"fewer tasks, a smaller model, or a larger device"
            )


def _milliseconds(band: Band) -> str:
    return f"{band.best * 1e3:.3g} to {band.worst * 1e3:.3g} ms"


def _gigabytes(band: Band) -> str:
    return f"{megabytes(int(band.best))} to {megabytes(int(band.worst))}"


def _rate(value: float) -> str:
    return f"{value / TERA:.3g} T" if value >= TERA else f"{value / GIGA:.3g} G"


def _part(band: Band) -> str:
    return f"{min(band.best, band.worst):.0%} to {max(band.best, band.worst):.0%}"

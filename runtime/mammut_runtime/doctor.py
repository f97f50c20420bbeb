"""What this machine offers and whether bundles work on it: the facts that a question about a problem needs first.

Looks only; opens no graph unless bundles are given, and reports what fails instead of raising.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mammut_runtime.bundle import MANIFEST_FILE, Bundle
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import MammutError, VerificationError
from mammut_runtime.manifest import Manifest
from mammut_runtime.model import Model
from mammut_runtime.strict import to_dict

DISTRIBUTION = "mammut-edge"
LIBRARIES = {
    "numpy": "numpy",
    "opencv-python-headless": "cv2",
    "tokenizers": "tokenizers",
    "ftfy": "ftfy",
    "click": "click",
}
"""Distribution → import name of what the runtime needs besides an engine."""
INSTRUCTIONS = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
"""Processor features that decide how fast a model runs, by Linux' names."""


@dataclass(frozen=True)
class LibraryReport:
    """A library as it is found here."""

    name: str
    version: str | None
    """None: not installed, or its version is not to be had."""
    problem: str | None
    """Why it cannot be used; None if it can."""


@dataclass(frozen=True)
class EngineReport:
    """An engine: its library, and the providers by which it can run a graph."""

    name: str
    version: str | None
    providers: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True)
class MachineReport:
    """The machine. None where the system does not say."""

    system: str
    python: str
    processor: str | None
    instructions: tuple[str, ...]
    logical_cores: int
    """That this process may use."""
    physical_cores: int
    """Threads an engine takes with --threads 0."""
    memory_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    """Of the container, if it has one."""


@dataclass(frozen=True)
class BundleReport:
    """A bundle: what it is, and whether it does here what it did where it was exported."""

    path: str
    name: str | None
    target: str | None
    precision: str | None
    size_bytes: int | None
    ok: bool
    canary: str | None
    """The canary's result in words; None if it was not reached."""
    problem: str | None
    warnings: tuple[str, ...]
    """What whoever uses it should know: it differs too much from float32, or TensorRT will not take a node of it."""
    lint: tuple[str, ...]
    """For TensorRT: the graphs that it will take, as far as a lint can tell."""
    exit_code: int
    """0, 1 if the canary does not reproduce, 2 if the bundle cannot be used."""


@dataclass(frozen=True)
class Report:
    """Everything."""

    version: str | None
    machine: MachineReport
    libraries: tuple[LibraryReport, ...]
    engines: tuple[EngineReport, ...]
    bundles: tuple[BundleReport, ...]

    @property
    def software(self) -> list[LibraryReport | EngineReport]:
        """Libraries and engines."""
        return [*self.libraries, *self.engines]

    @property
    def exit_code(self) -> int:
        """0 if the libraries and an engine are there and every bundle works; otherwise the worst of what was found."""
        no_engine = bool(self.engines) and all(each.problem for each in self.engines)
        broken = no_engine or any(each.problem for each in self.libraries)
        return max([2 * broken, *(each.exit_code for each in self.bundles)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain: dict[str, Any] = to_dict(self)
        return plain


def examine(bundles: Sequence[Path] = (), options: EngineOptions | None = None) -> Report:
    """Look at this machine, and replay the canary of every bundle."""
    return Report(
        version=_version(DISTRIBUTION),
        machine=examine_machine(),
        libraries=tuple(_library(name, module) for name, module in LIBRARIES.items()),
        engines=(_onnxruntime(), _openvino(), _tensorrt()),
        bundles=tuple(examine_bundle(path, options) for path in bundles),
    )


def find_bundles(places: Sequence[Path]) -> list[Path]:
    """The bundles among these folders and directly inside them, each once, in order."""
    found: dict[Path, None] = {}
    for place in places:
        if (place / MANIFEST_FILE).is_file():
            found[place] = None
        elif place.is_dir():
            inside = sorted(each.parent for each in place.glob(f"*/{MANIFEST_FILE}") if each.parent.name[0] != ".")
            found |= dict.fromkeys(inside)
        else:
            found[place] = None  # reported as what it is
    return list(found)


def examine_bundle(path: Path, options: EngineOptions | None = None) -> BundleReport:
    """Check every hash of a bundle and replay its canary."""
    name = target = precision = canary = None
    size_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    lint: tuple[str, ...] = ()
    failure: str | None = None
    code = 0
    try:
        warnings, lint = examine_graphs(Bundle.open(path, verify=False))  # first: it needs no engine and no GPU
        with Model.load(path, options) as model:
            manifest = model.manifest
            name, target, precision = manifest.model.name, manifest.target, manifest.precision
            size_bytes, warnings = bundle_bytes(path), (*drift_warnings(manifest), *warnings)
            canary = model.replay_canary().message
    except VerificationError as problem:
        canary, code = str(problem), 1
    except MammutError as problem:
        failure, code = str(problem), 2
    ok = code == 0
    return BundleReport(str(path), name, target, precision, size_bytes, ok, canary, failure, warnings, lint, code)


def drift_warnings(manifest: Manifest) -> tuple[str, ...]:
    """In words, where a quantized bundle differs more from float32 than its exporter's limits, or may do so."""
    quantized = [graph for graph, info in manifest.quantization.items() if info.weights in ("int8", "int4")]
    if not quantized:
        return ()
    if manifest.drift is None:
        return (f"{', '.join(quantized)}: quantized, and its drift was never measured (--accept-drift)",)
    return tuple(f"published with --accept-drift: {failure}" for failure in manifest.drift.failures)


def examine_graphs(bundle: Bundle) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a bundle for TensorRT: a line for each node that it will not take, and one for each graph that it will."""
    if bundle.manifest.target != "tensorrt":
        return (), ()
    from mammut_runtime.tensorrt_lint import lint_bundle

    findings = lint_bundle(bundle)
    refused = {finding.graph for finding in findings}
    taken = [name for name in bundle.manifest.graphs if name not in refused]
    return (
        tuple(f"TensorRT: {finding.describe()}" for finding in findings),
        tuple(f"TensorRT takes {name}" for name in taken),
    )


def bundle_bytes(path: Path) -> int:
    """Size of all files of a bundle."""
    return sum(each.stat().st_size for each in path.iterdir() if each.is_file())


def examine_machine() -> MachineReport:
    """Processor and memory."""
    from mammut_runtime.engines.onnxruntime import physical_cores

    processor, flags = _processor()
    memory = _memory()
    return MachineReport(
        system=platform.platform(),
        python=platform.python_version(),
        processor=processor,
        instructions=tuple(each for each in INSTRUCTIONS if each in flags),
        logical_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        physical_cores=physical_cores(),
        memory_bytes=memory[0],
        memory_available_bytes=memory[1],
        memory_limit_bytes=_number(Path("/sys/fs/cgroup/memory.max")),
    )


def peak_memory_bytes() -> int | None:
    """The most memory this process has held so far (resident set), or None where the system does not say."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        # Not getrusage: on Linux its figure survives exec, so it may be that of the program that started this one.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return None


def describe(report: Report) -> list[str]:
    """The report as lines for people."""
    machine = report.machine
    lines = [
        f"{DISTRIBUTION} {report.version or '(not installed)'}, Python {machine.python}, {machine.system}",
        f"processor    {machine.processor or 'unknown'} [{' '.join(machine.instructions) or 'no features known'}]",
        f"cores        {machine.physical_cores} physical, {machine.logical_cores} logical",
        f"memory       {_gigabytes(machine.memory_bytes)}, {_gigabytes(machine.memory_available_bytes)} free"
        + (f", limited to {_gigabytes(machine.memory_limit_bytes)}" if machine.memory_limit_bytes else ""),
    ]
    for each in report.libraries:
        lines.append(f"library      {each.name} {each.version or ''}{_unusable(each.problem)}")
    for engine in report.engines:
        providers = f" [{', '.join(engine.providers)}]" if engine.providers else ""
        lines.append(f"engine       {engine.name} {engine.version or ''}{providers}{_unusable(engine.problem)}")
    for bundle in report.bundles:
        what = f" ({bundle.name}, {bundle.target}, {bundle.precision})" if bundle.name else ""
        lines.append(f"bundle       {bundle.path}{what}: {bundle.problem or bundle.canary}")
        lines += [f"  WARNING    {warning}" for warning in bundle.warnings]
        lines += [f"  graph      {line}" for line in bundle.lint]
    if not report.bundles:
        lines.append("bundle       none found")
    return lines


def _unusable(problem: str | None) -> str:
    return f": cannot be used: {problem}" if problem else ""


def _library(distribution: str, module: str) -> LibraryReport:
    problem = None
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary may raise anything
        problem = f"{type(error).__name__}: {error}"
    return LibraryReport(distribution, _version(distribution), problem)


def _onnxruntime() -> EngineReport:
    from mammut_runtime.engines.onnxruntime import library

    try:
        ort = library()
        return EngineReport("onnxruntime", str(ort.__version__), tuple(ort.get_available_providers()), None)
    except MammutError as problem:
        return EngineReport("onnxruntime", _version("onnxruntime"), (), str(problem))


def _openvino() -> EngineReport:
    from mammut_runtime.engines.openvino import devices, library

    try:
        found = library()
        return EngineReport("openvino", str(found.__version__).split("-")[0], devices(), None)
    except MammutError as problem:
        return EngineReport("openvino", _version("openvino"), (), str(problem))


def _tensorrt() -> EngineReport:
    from mammut_runtime.engines import tensorrt_cuda, tensorrt_library

    version = None
    try:
        found = tensorrt_library.load()
        version = f"{found.version} ({found.name})"
        gpu = tensorrt_cuda.describe(0)
        return EngineReport("tensorrt", version, (f"{gpu.name} {gpu.compute_capability}",), None)
    except MammutError as problem:
        return EngineReport("tensorrt", version, (), str(problem))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str | None, frozenset[str]]:
    """Name and features. Linux lists them; elsewhere there is only a name."""
    name, flags = platform.processor() or None, frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return name, flags


def _memory() -> tuple[int | None, int | None]:
    """Bytes in all, and free for use without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, LookupError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _gigabytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"

"""An engine runs one graph: named arrays in, named arrays out. Everything above it is the same for every target.

    Engine          the interface, two methods
    EngineOptions   threads, memory, providers, devices; what an engine cannot honour it refuses by name
    open_engine     a graph file -> an Engine for the bundle's target
    check_ready     whether a target's graphs must be, and are, built on this device first
    fake.FakeEngine a Python function as an engine, for tests of applications

An engine is safe to call from several threads unless its own docstring says otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from mammut_runtime.errors import EngineError, InputError

MAX_THREADS, MAX_SPIN_US = 1024, 1_000_000
ENGINES = ("onnxruntime", "openvino", "tensorrt")
"""Targets of bundles that this runtime has an engine for."""
_ONLY = {
    "onnxruntime": ("spinning", "spin_us", "prepack", "providers", "provider_options", "allow_fallback"),
    "openvino": ("device", "device_precision", "compile_cache"),
    "tensorrt": ("library", "gpu", "engine_cache", "cuda_graphs"),
}
"""Engine → the options that no other engine understands."""
_FLAGS = {"prepack": "low-memory", "providers": "provider", "provider_options": "provider-option"}
"""Options that the commands call otherwise."""


class Engine(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every input by name to every output by name. Raises EngineError for feeds that do not fit the graph."""

    def close(self) -> None:
        """Frees the graph. Running it afterwards raises EngineError; closing it again does nothing."""


@dataclass(frozen=True)
class EngineOptions:
    """How engines use the machine. Raises InputError for values out of range."""

    threads: int = 0
    """Threads that compute one graph on the processor; 0 means the physical cores that this process may use."""
    spinning: bool = False
    """ONNX Runtime: let idle threads wait in a busy loop for long, also between calls. It eats cores that the rest of a
    device needs; with several graphs open, their pools fight."""
    spin_us: int = 50
    """ONNX Runtime 1.26 and newer: microseconds for which a thread waits in a busy loop for the next operator's work
    before it sleeps. Waking it would take longer than most operators of a decoder's step; docs/log.md has the figures.
    0, and older versions: it sleeps at once."""
    memory_arena: bool = False
    """Keep freed memory in the engine for the next call. Faster for large inputs, and it never shrinks: its size is
    that of the largest call so far, per graph. (OpenVINO keeps the buffers of a single picture or text anyway.)"""
    prepack: bool = True
    """ONNX Runtime: copy weights into memory in the order the processor likes best. Without it they stay in the mapped
    file, which all graphs share and the system may drop; beam search then took twice as long, greedy captions 1.4
    times."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime: execution providers in order of preference, by its names. A provider that is not there is an error,
    and a graph that the named ones do not take as a whole is one too."""
    provider_options: tuple[tuple[str, str, str], ...] = ()
    """ONNX Runtime: (provider, key, value), such as ("QNNExecutionProvider", "backend_path", "libQnnHtp.so")."""
    allow_fallback: bool = False
    """ONNX Runtime: let the processor compute what the named providers do not take."""
    device: str = "CPU"
    """OpenVINO: CPU, GPU, NPU or a numbered one (GPU.1). Never chosen automatically, never replaced by another."""
    device_precision: bool = False
    """OpenVINO: let the device compute in the precision it likes best (bfloat16 on some processors, float16 on GPUs).
    Faster, and further from what the bundle was tested with: tokens differed by up to 2e-2 instead of 1e-5."""
    compile_cache: Path | None = None
    """OpenVINO: folder for compiled graphs, so that the next start is faster. Its files are trusted like programs: give
    a folder that only this user writes to. Each is as large as the graph's weights."""
    engine: str | None = None
    """Another engine than the bundle's target. Only "onnxruntime", which runs every bundle: for a bundle for TensorRT
    where no engines are built, or no GPU is. None takes the target's own."""
    library: str | None = None
    """TensorRT: "tensorrt" or "tensorrt_rtx"; None takes the first of them that is installed."""
    gpu: int = 0
    """TensorRT: number of the GPU, as CUDA counts them."""
    engine_cache: Path | None = None
    """TensorRT: folder of the engines that `mammut-run build` made; None takes the user's cache folder."""
    cuda_graphs: bool = False
    """TensorRT for RTX: launch the decoder's kernels as CUDA graphs. Not measured yet, so off."""

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or not 0 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads must be a whole number from 0 (all cores) to {MAX_THREADS}, got {self.threads}")
        if isinstance(self.spin_us, bool) or not isinstance(self.spin_us, int) or not 0 <= self.spin_us <= MAX_SPIN_US:
            wanted = f"a whole number from 0 (sleep at once) to {MAX_SPIN_US}"
            raise InputError(f"spin_us must be {wanted}, got {self.spin_us}")
        if isinstance(self.providers, str) or not self.providers:
            raise InputError(f"providers must be one or more names, such as CPUExecutionProvider, got {self.providers}")
        if self.engine not in (None, "onnxruntime"):
            raise InputError(f"engine: expected onnxruntime, or nothing for the bundle's own, got {self.engine!r}")
        for provider, key, _ in self.provider_options:
            if provider not in self.providers:
                raise InputError(f"provider option {key!r} is for {provider}, which is not among the providers")


def open_engine(path: Path, target: str, options: EngineOptions | None = None) -> Engine:
    """Open one graph file of a bundle.

    target: the manifest's target, one of ENGINES.
    Raises EngineError when the engine's library is missing, too old, or does not take the graph; InputError for
    options of another engine.
    """
    options = options or EngineOptions()
    target = options.engine or target
    if target not in ENGINES:
        known = ", ".join(map(repr, ENGINES))
        raise EngineError(
            f"this bundle is for {target!r}, this runtime has engines for {known}; export the checkpoint again with "
            f"--target {ENGINES[0]}"
        )
    _refuse_foreign(options, target)
    # only who opens a graph pays for the import, and only for the engine that is used
    if target == "openvino":
        from mammut_runtime.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(path, options)
    if target == "tensorrt":
        from mammut_runtime.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(path, options)
    from mammut_runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, options)


def check_ready(bundle: Path, target: str, options: EngineOptions | None = None) -> bool:
    """Whether graphs of this target are built on the device, so that the bundle's canary should be replayed at start.

    bundle: its folder. Raises EngineError that says what to do if they are not built yet, or cannot be run here.
    """
    options = options or EngineOptions()
    if (options.engine or target) != "tensorrt":
        return False
    from mammut_runtime.engines.tensorrt import check_built

    check_built(bundle, options)
    return True


def _refuse_foreign(options: EngineOptions, target: str) -> None:
    """Options that would do nothing are a misunderstanding, not a detail."""
    usual = {each.name: each.default for each in dataclasses.fields(EngineOptions)}
    for engine, names in _ONLY.items():
        for name in names:
            if engine != target and getattr(options, name) != usual[name]:
                flag = _FLAGS.get(name, name.replace("_", "-"))
                raise InputError(
                    f"{name} (--{flag}) is an option of {engine}, and this bundle runs on {target}; leave it out, or "
                    f"export with --target {engine}"
                )

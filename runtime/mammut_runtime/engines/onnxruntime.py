"""Graphs on ONNX Runtime: one session per graph, CPU unless other providers are asked for.

The session's own errors arrive as EngineError. What ONNX Runtime would do quietly and we do not want, it is told not
to: no threads that spin for long, no arena that never shrinks, no pinning of threads to cores, no fallback to another
provider.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.engines import EngineOptions
from mammut_runtime.engines.cores import physical_cores as physical_cores
from mammut_runtime.engines.feeds import GraphInputs
from mammut_runtime.engines.placement import CPU as CPU
from mammut_runtime.engines.placement import check_placement, records_placement
from mammut_runtime.errors import EngineError, InputError

MIN_VERSION = (1, 20)
"""The first version our graphs were run with; pyproject.toml asks for the same."""
INSTALL = "pip install mammut-edge[onnxruntime]"
_PROVIDER_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu in place of onnxruntime",
    "TensorrtExecutionProvider": "onnxruntime-gpu in place of onnxruntime",
    "OpenVINOExecutionProvider": "onnxruntime-openvino in place of onnxruntime",
    "DmlExecutionProvider": "onnxruntime-directml in place of onnxruntime",
    "CoreMLExecutionProvider": "onnxruntime on macOS",
    "QNNExecutionProvider": "onnxruntime-qnn in place of onnxruntime",
    "XnnpackExecutionProvider": "a build of ONNX Runtime with XNNPACK (the ones for Android and iOS have it)",
}
_SHORT_SPIN_VERSION = (1, 26)
"""Older ones know only whether to spin, and then spin for long."""
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_FATAL_ONLY = 4
"""ONNX Runtime's log severity: its warnings are about graph optimisations, and its errors are exceptions too; both
would spill over a user's terminal."""
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
}


def library() -> Any:
    """The onnxruntime module. Raises EngineError if it is missing or older than MIN_VERSION."""
    try:
        import onnxruntime
    except ImportError as problem:
        raise EngineError(f"this bundle needs ONNX Runtime, which does not load ({problem}); {INSTALL}") from problem
    if _version(onnxruntime) < MIN_VERSION:
        version = getattr(onnxruntime, "__version__", "unknown")
        wanted = ".".join(map(str, MIN_VERSION))
        raise EngineError(f"ONNX Runtime {version} is too old, expected {wanted} or newer; {INSTALL}")
    return onnxruntime


def _version(ort: Any) -> tuple[int, int]:
    """(1, 32); (0, 0) if it cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", str(getattr(ort, "__version__", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


class OnnxRuntimeEngine:
    """One graph in an ONNX Runtime session. Safe to run from several threads."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Raises EngineError when the library, a provider or the graph cannot be used."""
        ort = library()
        self._name = path.name
        _check_providers(options, ort.get_available_providers(), ort.get_all_providers())
        try:
            session = ort.InferenceSession(
                str(path), sess_options=_session_options(ort, options), providers=_with_options(options)
            )
            session.disable_fallback()
        except Exception as problem:  # its exceptions share no class of their own
            raise EngineError(f"{path}: ONNX Runtime {ort.__version__} refuses it: {_reason(problem)}") from problem
        missing = [name for name in options.providers if name not in session.get_providers()]
        if missing:
            raise EngineError(f"{path}: provider {missing[0]} did not start; is its driver installed?")
        if _strict(options) and records_placement(ort):
            check_placement(path, session, options.providers)
        inputs = {each.name: (_DTYPES.get(each.type), tuple(each.shape)) for each in session.get_inputs()}
        self._inputs = GraphInputs(path.name, inputs)
        self._outputs = [each.name for each in session.get_outputs()]
        self._session: Any = session

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See Engine. Raises EngineError that names the input that does not fit."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._name}: this engine is closed; load the model again")
        self._inputs.check(feeds)
        try:
            outputs = session.run(self._outputs, feeds)
        except Exception as problem:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {_reason(problem)}") from problem
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        self._session = None


def _session_options(ort: Any, options: EngineOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or physical_cores()
    settings.inter_op_num_threads = 1  # our graphs are chains; ORT_SEQUENTIAL, its default, uses none anyway
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.log_severity_level = _FATAL_ONLY
    short = options.spin_us > 0 and not options.spinning and _version(ort) >= _SHORT_SPIN_VERSION
    spins = options.spinning or short
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "1" if options.spinning else "0")
    if short:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(options.spin_us))
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if _strict(options):
        # Where ONNX Runtime tells what it put where, we look ourselves: its own refusal names no node.
        entry = "session.record_ep_graph_assignment_info" if records_placement(ort) else _NO_FALLBACK
        settings.add_session_config_entry(entry, "1")
    return settings


def _strict(options: EngineOptions) -> bool:
    """Whether there is something that the processor must not take over."""
    return CPU not in options.providers and not options.allow_fallback


def _with_options(options: EngineOptions) -> list[str | tuple[str, dict[str, str]]]:
    """The providers as ONNX Runtime wants them."""
    given = {
        name: {key: value for owner, key, value in options.provider_options if owner == name}
        for name in options.providers
    }
    return [(name, given[name]) if given[name] else name for name in options.providers]


def _check_providers(options: EngineOptions, available: list[str], known: list[str]) -> None:
    """available: those of this build; known: all that ONNX Runtime can be built with."""
    for name in options.providers:
        if name not in known and name not in available:
            raise InputError(
                f"provider {name} is unknown; ONNX Runtime knows {', '.join(sorted(known))}, and here it has "
                f"{', '.join(available)}"
            )
        if name not in available:
            package = _PROVIDER_PACKAGES.get(name, "a build of ONNX Runtime that has it")
            raise EngineError(f"provider {name} is not there, only {', '.join(available)}; install {package}")
    if CPU in options.providers and options.providers != (CPU,) and not options.allow_fallback:
        raise InputError(
            f"providers: {CPU} beside others is a fallback; allow it with allow_fallback (--allow-fallback), or leave "
            f"it out to have the graph on {options.providers[0]} as a whole"
        )


def _reason(problem: Exception) -> str:
    """ONNX Runtime's message on one line, without its source positions."""
    text = re.sub(r"/[^ ]*\.(?:cc|h):\d+ ", "", " ".join(str(problem).split()))
    return text[:500] or type(problem).__name__

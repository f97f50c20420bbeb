"""Graphs on ONNX Runtime: one session per graph, CPU unless other providers are asked for.

The session's own errors arrive as EngineError. What ONNX Runtime would do quietly and we do not want, it is told not
to: no spinning threads, no arena that never shrinks, no pinning of threads to cores, no fallback to another provider.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import EngineError

MIN_VERSION = (1, 20)
"""The first version our graphs were run with; pyproject.toml asks for the same."""
CPU = "CPUExecutionProvider"
INSTALL = "pip install mammut-edge[onnxruntime]"
_PROVIDER_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu in place of onnxruntime",
    "TensorrtExecutionProvider": "onnxruntime-gpu in place of onnxruntime",
    "OpenVINOExecutionProvider": "onnxruntime-openvino in place of onnxruntime",
    "DmlExecutionProvider": "onnxruntime-directml in place of onnxruntime",
    "CoreMLExecutionProvider": "onnxruntime on macOS",
    "QNNExecutionProvider": "onnxruntime-qnn in place of onnxruntime",
}
_FATAL_ONLY = 4
"""ONNX Runtime's log severity: its warnings are about graph optimisations, and its errors are exceptions too; both
would spill over a user's terminal."""
_DTYPES = {
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
    found = re.match(r"(\d+)\.(\d+)", str(getattr(onnxruntime, "__version__", "")))
    if not found or (int(found[1]), int(found[2])) < MIN_VERSION:
        version = getattr(onnxruntime, "__version__", "unknown")
        wanted = ".".join(map(str, MIN_VERSION))
        raise EngineError(f"ONNX Runtime {version} is too old, expected {wanted} or newer; {INSTALL}")
    return onnxruntime


class OnnxRuntimeEngine:
    """One graph in an ONNX Runtime session. Safe to run from several threads."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Raises EngineError when the library, a provider or the graph cannot be used."""
        ort = library()
        self._name = path.name
        _check_providers(options.providers, ort.get_available_providers())
        try:
            session = ort.InferenceSession(
                str(path), sess_options=_session_options(ort, options), providers=list(options.providers)
            )
            session.disable_fallback()
        except Exception as problem:  # its exceptions share no class of their own
            raise EngineError(f"{path}: ONNX Runtime {ort.__version__} refuses it: {_reason(problem)}") from problem
        missing = [name for name in options.providers if name not in session.get_providers()]
        if missing:
            raise EngineError(f"{path}: provider {missing[0]} did not start; is its driver installed?")
        self._inputs = {each.name: (_DTYPES.get(each.type), tuple(each.shape)) for each in session.get_inputs()}
        self._outputs = [each.name for each in session.get_outputs()]
        self._session: Any = session

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See Engine. Raises EngineError that names the input that does not fit."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._name}: this engine is closed; load the model again")
        self._check(feeds)
        try:
            outputs = session.run(self._outputs, feeds)
        except Exception as problem:
            raise EngineError(f"{self._name}: ONNX Runtime failed: {_reason(problem)}") from problem
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        self._session = None

    def _check(self, feeds: dict[str, NDArray[Any]]) -> None:
        """Some 10 us for a decoder with 40 inputs. ONNX Runtime checks too, in words that do not help the caller."""
        if feeds.keys() != self._inputs.keys():
            missing, unknown = self._inputs.keys() - feeds.keys(), feeds.keys() - self._inputs.keys()
            raise EngineError(f"{self._name}: inputs missing: {_listed(missing)}; unknown: {_listed(unknown)}")
        for name, (dtype, shape) in self._inputs.items():
            feed = feeds[name]
            if feed.dtype != dtype or not _fits(feed.shape, shape):
                wanted = f"{dtype}[{', '.join(map(str, shape))}]"
                raise EngineError(f"{self._name}: input {name} must be {wanted}, got {feed.dtype}{list(feed.shape)}")


def _fits(shape: tuple[int, ...], expected: tuple[int | str | None, ...]) -> bool:
    if len(shape) != len(expected):
        return False
    return all(not isinstance(want, int) or want == size for size, want in zip(shape, expected, strict=True))


def _session_options(ort: Any, options: EngineOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or physical_cores()
    settings.inter_op_num_threads = 1  # our graphs are chains; ORT_SEQUENTIAL, its default, uses none anyway
    settings.enable_cpu_mem_arena = options.memory_arena
    settings.log_severity_level = _FATAL_ONLY
    spinning = "1" if options.spinning else "0"
    settings.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    settings.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    if not options.prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    if CPU not in options.providers:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return settings


def _check_providers(wanted: Iterable[str], available: list[str]) -> None:
    for name in wanted:
        if name not in available:
            package = _PROVIDER_PACKAGES.get(name, "an ONNX Runtime package that has it")
            raise EngineError(f"provider {name} is not there, only {', '.join(available)}; install {package}")


@cache
def physical_cores() -> int:
    """Physical cores that this process may use: at least 1. Hyper-threads, other processes' cores (taskset) and more
    than a container's CPU quota do not count."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows: the system does not say; half of the threads is right for most
        return max(1, (os.cpu_count() or 2) // 2)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _container_cores()))


def _siblings(cpu: int) -> str:
    """The hyper-threads of this one's core, as the kernel writes them ("0,4"); the number itself where it does not."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except (OSError, ValueError):
        return str(cpu)


def _container_cores() -> int:
    """Cores that the control group grants, rounded up; very many where there is no limit."""
    unlimited = 1 << 20
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return unlimited if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return unlimited


def _reason(problem: Exception) -> str:
    """ONNX Runtime's message on one line, without its source positions."""
    text = re.sub(r"/[^ ]*\.(?:cc|h):\d+ ", "", " ".join(str(problem).split()))
    return text[:500] or type(problem).__name__


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:8]) + (" ..." if len(shown) > 8 else "") if shown else "none"

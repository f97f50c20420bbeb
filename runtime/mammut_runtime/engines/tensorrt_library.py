"""Which TensorRT is there: `tensorrt` 10.x (all of JetPack 6), 11.x, or `tensorrt_rtx`, behind one handle.

What our code uses is in all three; where they differ, it is decided here.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mammut_runtime.errors import EngineError, InputError

FLOORS = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 2)}
"""Library → the oldest version whose API we use; 10.3 is JetPack 6's. In the order in which they are tried."""
INSTALL = {
    "tensorrt": "on a Jetson `sudo apt install python3-libnvinfer` (JetPack's own package, for the system's Python or "
    "a venv made with --system-site-packages: 3.12 on JetPack 7, 3.10 on JetPack 6, too old for this software), "
    "elsewhere `pip install tensorrt`",
    "tensorrt_rtx": "`pip install tensorrt-rtx` (RTX graphics cards)",
}
EXTRA = "pip install mammut-edge[tensorrt]"
"""Brings cuda-python; TensorRT itself is NVIDIA's to give."""
_KEPT_MESSAGES = 20
_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class TensorRt:
    """A usable TensorRT."""

    name: str
    """tensorrt or tensorrt_rtx."""
    version: str
    module: Any
    logger: Any
    """One for the process: TensorRT keeps the first it is given."""
    messages: list[str]
    """The errors that it logged since this was last cleared, oldest first."""

    @property
    def is_rtx(self) -> bool:
        """TensorRT for RTX compiles its kernels when an engine is opened, and can build for a GPU that is not there."""
        return self.name == "tensorrt_rtx"

    def network_flags(self) -> int:
        """For create_network: a strongly typed network, the only kind that 11.x and RTX have."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def dtype(self, data_type: Any) -> np.dtype[Any] | None:
        """A trt.DataType as NumPy has it; None for what it has not."""
        found = _DTYPES.get(data_type.name)
        return np.dtype(found) if found is not None else None

    def first_error(self) -> str:
        """What it complained about first, on one line; what follows it is mostly its consequence."""
        return " ".join((self.messages[0] if self.messages else "it gave no reason").split())[:600]

    def compute_capability(self, text: str) -> Any:
        """ "8.6" -> trt.ComputeCapability.SM86. Raises InputError for what this library cannot build for."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}
        if not self.is_rtx or text not in known:
            offered = ", ".join(known) if known and self.is_rtx else "none: only tensorrt_rtx builds for absent GPUs"
            raise InputError(f"compute capability {text!r}: {self.name} {self.version} offers {offered}")
        return known[text]


def load(name: str | None = None) -> TensorRt:
    """The TensorRT that is installed.

    name: one of FLOORS; None takes the first that is there. Raises EngineError, which says what to install, and
    InputError for another name.
    """
    if name is not None and name not in FLOORS:
        raise InputError(f"library: expected {' or '.join(FLOORS)}, got {name!r}")
    problems = []
    for each in FLOORS if name is None else (name,):
        try:
            return _load(each)
        except EngineError as problem:
            problems.append(str(problem))
    raise EngineError("; ".join(problems))


@cache
def _load(name: str) -> TensorRt:
    try:
        module = importlib.import_module(name)
    except Exception as problem:  # libraries that are missing or broken raise anything
        reason = " ".join(str(problem).split())[:200]
        raise EngineError(f"{name} does not load ({reason}); install it: {INSTALL[name]}; and {EXTRA}") from problem
    version = str(getattr(module, "__version__", "unknown"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < FLOORS[name]:
        wanted = ".".join(map(str, FLOORS[name]))
        raise EngineError(f"{name} {version} is too old, expected {wanted} or newer: {INSTALL[name]}")
    messages: list[str] = []
    return TensorRt(name, version, module, _make_logger(module, messages), messages)


def _make_logger(module: Any, messages: list[str]) -> Any:
    """TensorRT's own logger prints to the terminal; this one remembers."""

    class Remembering(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                messages.append(msg)
                del messages[_KEPT_MESSAGES:]

    return Remembering()

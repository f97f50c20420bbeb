"""An engine runs one graph: named arrays in, named arrays out. Everything above it is the same for every target.

    Engine          the interface, two methods
    EngineOptions   threads, memory, providers; what an engine cannot honour it refuses
    open_engine     a graph file -> an Engine for the bundle's target
    fake.FakeEngine a Python function as an engine, for tests of applications

An engine is safe to call from several threads unless its own docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from mammut_runtime.errors import EngineError, InputError

MAX_THREADS = 1024


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
    """Threads that compute one graph; 0 means the physical cores that this process may use."""
    spinning: bool = False
    """Let idle threads wait in a busy loop. A little faster for back-to-back calls, and it eats a core that the rest of
    a device needs; with several graphs open, their pools fight."""
    memory_arena: bool = False
    """Keep freed memory in the engine for the next call. Faster for large inputs, and it never shrinks: its size is
    that of the largest call so far, per graph."""
    prepack: bool = True
    """Copy weights into memory in the order the processor likes best. Without it they stay in the mapped file, which
    all graphs share and the system may drop; beam search then took twice as long, greedy captions 1.4 times."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers in order of preference, by ONNX Runtime's names. A provider that is not there is an error,
    and what it cannot run is an error too, unless CPUExecutionProvider follows it in the list."""

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or not 0 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads must be a whole number from 0 (all cores) to {MAX_THREADS}, got {self.threads}")
        if isinstance(self.providers, str) or not self.providers:
            raise InputError(f"providers must be one or more names, such as CPUExecutionProvider, got {self.providers}")


def open_engine(path: Path, target: str, options: EngineOptions | None = None) -> Engine:
    """Open one graph file of a bundle.

    target: the manifest's target; only "onnxruntime" so far.
    Raises EngineError when the engine's library is missing, too old, or does not take the graph.
    """
    if target != "onnxruntime":
        raise EngineError(f"this bundle is for {target!r}, this runtime has an engine for 'onnxruntime' only")
    from mammut_runtime.engines.onnxruntime import OnnxRuntimeEngine  # only who opens a graph pays for the import

    return OnnxRuntimeEngine(path, options or EngineOptions())

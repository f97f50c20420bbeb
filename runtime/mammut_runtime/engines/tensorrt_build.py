"""Builds one engine; run as a process of its own: `python -m mammut_runtime.engines.tensorrt_build`.

A builder may need gigabytes, and a library that runs out of memory ends its process: not ours. The parent
(tensorrt_jobs.py) writes a BuildTask as one line of JSON to our stdin, and reads JSON objects from our stdout, a line
each:

    {"phase": "...", "done": 3, "of": 10}           progress
    {"built": 123456}                               done; the engine, of so many bytes, is in the task's file
    {"error": "...", "kind": "graph" | "memory" | "library"}

The process ends by itself when its stdin does, so it does not outlive the parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mammut_runtime.engines.tensorrt_library import TensorRt, load
from mammut_runtime.errors import EngineError, MammutError

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual, largest."""
Report = Callable[[dict[str, Any]], None]
_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cudaerrormemoryallocation", "insufficient memory")
_SHOWN_ERRORS = 3


@dataclass(frozen=True)
class BuildTask:
    """One engine to build."""

    library: str
    onnx: str
    """The graph's file; its weights are found beside it."""
    engine: str
    """File to write to; it exists, empty."""
    profiles: Mapping[str, Shapes]
    """Input with open sizes → its shapes."""
    workspace_bytes: int
    gpu: int = 0
    compute_capability: str | None = None
    """Such as 8.6, for a GPU that is not here (tensorrt_rtx); None: the GPU that is."""
    timing: str | None = None
    """File with the builder's measurements; read, and written again. It may be empty."""

    def to_line(self) -> str:
        """JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_line(line: str) -> BuildTask:
        """What `to_line` wrote."""
        values = json.loads(line)
        values["profiles"] = {
            name: tuple(tuple(shape) for shape in shapes) for name, shapes in values["profiles"].items()
        }
        return BuildTask(**values)


class BuildFailed(EngineError):
    """A build that ended; `kind` says what the user can do about it."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def build(task: BuildTask, report: Report) -> int:
    """Build the engine; its size in bytes. Raises BuildFailed, and EngineError for a library that does not load."""
    library = load(task.library)
    if task.compute_capability is None:
        from mammut_runtime.engines import tensorrt_cuda

        tensorrt_cuda.call("cudaSetDevice", task.gpu)
    trt = library.module
    builder = trt.Builder(library.logger)
    network = builder.create_network(library.network_flags())
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(task.onnx):
        raise BuildFailed(
            f"{library.name} {library.version} does not take the graph: {_parser_errors(parser)}", "graph"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, task.workspace_bytes)
    _set_target(library, config, task.compute_capability)
    _add_profile(builder, config, network, task.profiles)
    timing = _attach_timing(config, task.timing)
    monitor = _monitor(trt, report)  # held: the configuration does not
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = _reason(library)
        raise BuildFailed(f"{library.name} {library.version} did not build it: {reason}", _kind(reason))
    content = memoryview(serialized)
    with Path(task.engine).open("r+b") as file:
        file.write(content)
    _keep_timing(config, timing, task.timing)
    return content.nbytes


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    shown = [f"node {each.node_name() or each.node()}: {' '.join(each.desc().split())}" for each in errors]
    return "; ".join(shown[:_SHOWN_ERRORS]) or "it gave no reason"


def _set_target(library: TensorRt, config: Any, compute_capability: str | None) -> None:
    if not library.is_rtx:
        return
    current = library.module.ComputeCapability.CURRENT
    config.num_compute_capabilities = 1
    wanted = library.compute_capability(compute_capability) if compute_capability else current
    if not config.set_compute_capability(wanted, 0):
        raise BuildFailed(f"{library.name} does not build for {wanted}", "library")


def _add_profile(builder: Any, config: Any, network: Any, profiles: Mapping[str, Shapes]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    open_inputs = [each.name for each in inputs if -1 in tuple(each.shape)]
    missing = [name for name in open_inputs if name not in profiles]
    if missing:
        raise BuildFailed(
            f"the manifest has no profile for {', '.join(missing[:8])}; export the bundle again with --target tensorrt",
            "graph",
        )
    if not open_inputs:
        return
    profile = builder.create_optimization_profile()
    for name in open_inputs:
        try:
            profile.set_shape(name, *profiles[name])
        except ValueError as error:
            raise BuildFailed(f"the profile of {name} does not fit: {error}", "graph") from error
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed("the profiles of the manifest do not fit the graph; export the bundle again", "graph")


def _attach_timing(config: Any, file: str | None) -> Any:
    """The builder's earlier measurements: they spare most of the time where graphs are alike."""
    if file is None:
        return None
    for content in (Path(file).read_bytes(), b""):  # what another version made is refused: begin anew
        timing = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, False):
            return timing
    return None


def _keep_timing(config: Any, timing: Any, file: str | None) -> None:
    found = config.get_timing_cache() if timing is not None and file is not None else None
    if found is not None and file is not None:
        content = found.serialize()
        if content is not None:
            Path(file).write_bytes(memoryview(content))


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phases; the inner ones come and go by hundreds."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                report({"phase": phase_name, "done": 0, "of": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                report({"phase": phase_name, "done": step + 1, "of": self._steps[phase_name]})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _reason(library: TensorRt) -> str:
    """The message that says most: one about memory explains those that follow it."""
    for message in library.messages:
        if _kind(message) == "memory":
            return " ".join(message.split())[:600]
    return library.first_error()


def _kind(message: str) -> str:
    return "memory" if any(word in message.lower() for word in _MEMORY_WORDS) else "graph"


def _leave_with(parent: Any) -> None:
    """The parent is gone when our stdin ends; a build may take many minutes more."""
    with contextlib.suppress(OSError, ValueError):
        while parent.read(1):
            pass
    os._exit(1)


def _reporting() -> Report:
    """Reports to our stdout; what libraries print goes to stderr from now on."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(event: dict[str, Any]) -> None:
        stdout.write(json.dumps(event) + "\n")
        stdout.flush()

    return report


def main() -> int:
    """The process: 0 if the engine was built."""
    report = _reporting()
    task = BuildTask.from_line(sys.stdin.readline())
    threading.Thread(target=_leave_with, args=(sys.stdin,), daemon=True).start()
    try:
        report({"built": build(task, report)})
    except BuildFailed as problem:
        report({"error": str(problem), "kind": problem.kind})
        return 1
    except MemoryError:
        report({"error": "no memory left", "kind": "memory"})
        return 1
    except (MammutError, OSError) as problem:
        report({"error": str(problem), "kind": "library"})
        return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: a thread waits for stdin, and libraries take long to say good-bye.
    code = main()
    sys.stderr.flush()
    os._exit(code)

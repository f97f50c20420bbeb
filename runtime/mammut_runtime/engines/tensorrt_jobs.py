"""Builds the engines of a bundle on this device, one at a time, each in a process of its own that is watched.

What is done is kept: a build that was interrupted goes on where it stopped. A graph whose engine is there, by this
device, with the same options, is not built again.

The process is watched rather than limited by the system: an address-space limit (RLIMIT_AS) keeps CUDA from starting,
and control groups need rights. It is ended when it holds more than the limit, or when the machine itself runs short;
and it has told Linux to be the first to go.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mammut_runtime.bundle import Bundle
from mammut_runtime.engine_cache import PART_SUFFIX, EngineCache, EngineKey, RefusedEngine
from mammut_runtime.engines import tensorrt_cuda as cuda
from mammut_runtime.engines.tensorrt import engine_key
from mammut_runtime.engines.tensorrt_build import BuildTask, Shapes
from mammut_runtime.engines.tensorrt_library import TensorRt, load
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.manifest import InputProfile

MIB = 1 << 20
RESERVE_BYTES = 256 * MIB
"""Memory of the machine that a build leaves alone."""
_LOOK_EVERY_S = 0.05
_KILLED = -9

Progress = Callable[[str, str, float], None]
"""Graph, what is being done, seconds since it began."""


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built. Raises InputError for values out of range."""

    library: str | None = None
    """tensorrt or tensorrt_rtx; None takes the first that is there."""
    gpu: int = 0
    compute_capability: str | None = None
    """Build for a GPU that is not here, such as 8.6 (tensorrt_rtx only): shows that the graphs build."""
    workspace_mib: int = 1024
    """Most memory of the GPU for one layer's scratch space, while building and running."""
    memory_mib: int | None = None
    """Most memory of the machine that the building process may hold; None: all but RESERVE_BYTES."""
    force: bool = False
    """Also build what is there already."""

    def __post_init__(self) -> None:
        for name in ("workspace_mib", "memory_mib"):
            value = getattr(self, name)
            if value is not None and not 16 <= value <= 1 << 20:
                raise InputError(f"{name}: expected 16 to {1 << 20}, got {value}")

    def kept(self) -> dict[str, Any]:
        """What makes another engine of the same graph; kept with it."""
        return {"workspace_mib": self.workspace_mib, "compute_capability": self.compute_capability}


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in the cache."""

    graph: str
    path: Path
    size_bytes: int
    seconds: float
    """0 for one that was there already."""


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do."""

    bundle: Bundle
    cache: EngineCache
    library: TensorRt
    gpu: cuda.Gpu
    keys: dict[str, EngineKey]
    """Graph → its engine."""
    done: tuple[str, ...]
    """Graphs whose engines are there."""
    refused: tuple[str, ...]
    """Why engines that are there do not count."""

    @property
    def graphs(self) -> list[str]:
        """What is to be built."""
        return [graph for graph in self.keys if graph not in self.done]


def plan_build(bundle: Bundle, cache: EngineCache, options: BuildOptions) -> BuildPlan:
    """Look what is there and what is missing. Raises InputError for a bundle of another target, EngineError for a
    library or GPU that is missing."""
    manifest = bundle.manifest
    if manifest.target != "tensorrt":
        raise InputError(
            f"{bundle.path}: is for {manifest.target}, which needs no build; export it with --target tensorrt"
        )
    library = load(options.library)
    if options.compute_capability is None:
        gpu = cuda.describe(options.gpu)
    else:
        library.compute_capability(options.compute_capability)
        gpu = cuda.Gpu("(not here)", "", options.compute_capability, "")
    keys = {graph: engine_key(bundle.content_hash, graph, library, gpu) for graph in manifest.graphs}
    done, refused = [], []
    for graph, key in keys.items():
        try:
            stored = None if options.force else cache.load(key)
        except RefusedEngine as problem:
            refused.append(f"{problem.path}: refused: {problem.why}; it is built again")
            stored = None
        if stored is not None and stored.build == options.kept():
            done.append(graph)
    return BuildPlan(bundle, cache, library, gpu, keys, tuple(done), tuple(refused))


def build_engines(
    bundle: Bundle,
    cache: EngineCache | None = None,
    options: BuildOptions | None = None,
    progress: Progress = lambda graph, phase, seconds: None,
) -> list[BuiltEngine]:
    """Build what is missing. Raises EngineError: the library refuses a graph, memory ran out, the cache cannot be
    written. Engines that were done stay."""
    options = options or BuildOptions()
    plan = plan_build(bundle, cache or EngineCache(), options)
    return run_plan(plan, options, progress)


def run_plan(plan: BuildPlan, options: BuildOptions, progress: Progress) -> list[BuiltEngine]:
    """See build_engines. All engines, in the order of the manifest."""
    built: dict[str, BuiltEngine] = {}
    if plan.graphs:
        with plan.cache.building(plan.keys[plan.graphs[0]]) as folder:
            for graph in plan.graphs:
                built[graph] = _build_one(plan, graph, folder, options, progress)
    for graph in plan.done:
        path = plan.cache.path(plan.keys[graph])
        built[graph] = BuiltEngine(graph, path, path.stat().st_size, 0.0)
    return [built[graph] for graph in plan.keys]


def _build_one(plan: BuildPlan, graph: str, folder: Path, options: BuildOptions, progress: Progress) -> BuiltEngine:
    started = time.monotonic()
    key = plan.keys[graph]
    engine, timing = (_new_part(folder, f"{graph}-{what}") for what in ("engine", "timing"))
    timing.write_bytes(plan.cache.load_timing(key))
    task = BuildTask(
        library=plan.library.name,
        onnx=str(plan.bundle.graph_path(graph)),
        engine=str(engine),
        profiles=_shapes(plan.bundle.manifest.profiles.get(graph, {})),
        workspace_bytes=options.workspace_mib * MIB,
        gpu=options.gpu,
        compute_capability=options.compute_capability,
        timing=str(timing),
    )
    try:
        _run_child(task, graph, options.memory_mib, progress)
    except EngineError as problem:
        raise EngineError(
            f"{plan.bundle.path}: {graph}: {problem}; nothing else is lost, done engines are kept"
        ) from problem
    size_bytes = engine.stat().st_size
    path = plan.cache.store(key, engine, options.kept())
    if timing.stat().st_size:
        plan.cache.store_timing(key, timing)
    return BuiltEngine(graph, path, size_bytes, time.monotonic() - started)


def _shapes(profiles: Mapping[str, InputProfile]) -> dict[str, Shapes]:
    return {name: (each.minimum, each.optimum, each.maximum) for name, each in profiles.items()}


def _new_part(folder: Path, name: str) -> Path:
    """A new, empty file for this user, which `EngineCache.building` removes if we do not."""
    path = folder / f".{name}.{secrets.token_hex(4)}{PART_SUFFIX}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror}; give another --engine-cache") from error
    return path


def _run_child(task: BuildTask, graph: str, memory_mib: int | None, progress: Progress) -> None:
    """Build in a child process. Raises EngineError without the graph's name."""
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            child_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C is ours; we end the child
        )
        try:
            event = _watch(child, task, graph, memory_mib, progress)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if "built" in event and child.returncode == 0:
            return
        raise EngineError(_explained(event, child.returncode, _tail(complaints)))


def child_command() -> Sequence[str]:
    """What starts the child."""
    return [sys.executable, "-P", "-m", "mammut_runtime.engines.tensorrt_build"]


def _watch(
    child: subprocess.Popen[bytes], task: BuildTask, graph: str, memory_mib: int | None, progress: Progress
) -> dict[str, Any]:
    """The child's last word, or why it was ended."""
    started = time.monotonic()
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    if child.stdin is None or child.stdout is None:
        raise EngineError("the building process has no pipes")
    threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True).start()
    with contextlib.suppress(OSError):
        Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(task.to_line().encode() + b"\n")
        child.stdin.flush()
    phase, last = "starting", dict[str, Any]()
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=_LOOK_EVERY_S)
            if line is None:
                child.wait()
                return last
            event = _parsed(line)
            if "phase" in event:
                phase = f"{event['phase']} {event.get('done')}/{event.get('of')}"
            elif event:
                last = event
        if problem := memory_problem(child.pid, memory_mib):
            child.kill()
            return {"error": problem, "kind": "limit"}
        progress(graph, phase, time.monotonic() - started)


def memory_problem(pid: int, memory_mib: int | None) -> str | None:
    """Why a building process must end, if it must. Linux only; elsewhere the system sees to it."""
    held = _kilobytes(Path(f"/proc/{pid}/status"), ("VmHWM", "VmSwap"))  # the peak: we look only now and then
    if memory_mib is not None and held is not None and held * 1024 > memory_mib * MIB:
        return f"the build held {held // 1024} MiB, the limit is {memory_mib} MiB"
    free = _kilobytes(Path("/proc/meminfo"), ("MemAvailable",))
    if held is not None and free is not None and free * 1024 < RESERVE_BYTES:
        return f"the machine has {free // 1024} MiB of memory left; the build held {held // 1024} MiB"
    return None


def _kilobytes(file: Path, names: Sequence[str]) -> int | None:
    """The sum of these lines of a file in /proc; None where it is not to be had."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
        found = [int(line.split()[1]) for line in lines if line.split(":")[0] in names]
    except (OSError, ValueError, IndexError):
        return None
    return sum(found) if found else None


def _read_lines(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _explained(event: Mapping[str, Any], code: int, complaints: str) -> str:
    lower = (
        "close other programs, add swap, lower --workspace-mib, or export with a smaller --max-batch or --max-beams; "
        "the graphics desktop of a Jetson takes memory too: sudo systemctl isolate multi-user.target"
    )
    message, kind = str(event.get("error", "")), event.get("kind")
    if kind == "limit":
        return f"{message}; raise --memory-mib if there is more, or {lower}"
    if kind == "memory":
        return f"memory ran out while building ({message}); {lower}"
    if kind is not None:
        return message
    if code == _KILLED:
        return f"the system ended the build, most likely because memory ran out; {lower}"
    return f"the building process ended with code {code}: {complaints or 'it said nothing'}"


def _tail(file: IO[bytes]) -> str:
    """The last line that was written to it."""
    file.seek(0)
    lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip()[:600] for line in reversed(lines) if line.strip()), "")

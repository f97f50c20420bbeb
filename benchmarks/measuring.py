"""What the benchmarks share: timing, memory, what was measured on, and children in processes of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mammut_runtime.doctor import examine_machine, peak_memory_bytes

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = ("mammut-edge", "numpy", "onnxruntime", "openvino", "torch", "opencv-python-headless", "tokenizers")


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, milliseconds."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int


def timed(
    function: Callable[[], object], repeats: int, warm_up: int = 2, prepare: Callable[[], object] | None = None
) -> Timing:
    """Call `function` warm_up times unmeasured and `repeats` times measured; `prepare` runs before each, unmeasured."""
    taken = []
    for index in range(warm_up + repeats):
        if prepare is not None:
            prepare()
        started = time.perf_counter()
        function()
        if index >= warm_up:
            taken.append((time.perf_counter() - started) * 1000)
    return Timing(statistics.median(taken), min(taken), max(taken), repeats)


def peak_megabytes() -> float:
    """The most memory this process has held so far."""
    return (peak_memory_bytes() or 0) / 1e6


def surroundings() -> dict[str, Any]:
    """Machine and versions, for the JSON line."""
    machine = examine_machine()
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": machine.processor,
        "instructions": list(machine.instructions),
        "cores": machine.physical_cores,
        "system": machine.system,
        "python": machine.python,
        "versions": versions,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def print_surroundings(about: dict[str, Any]) -> None:
    """The same for people. A machine that is busy with something else is said to be."""
    print(f"{about['processor']} [{' '.join(about['instructions'])}], {about['cores']} cores, {about['system']}")
    print("Python " + about["python"] + "".join(f", {name} {each}" for name, each in about["versions"].items()))
    load = about["load_average"]
    if load is not None and load > 0.5:
        print(f"NOTE: something else is running here (load average {load:.1f}); times will be too long")


def child(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a Python script in a process of its own, every thread pool limited; its last line of stdout is JSON."""
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | dict.fromkeys(pools, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(arguments)} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result

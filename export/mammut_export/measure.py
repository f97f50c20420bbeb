"""Bundles on the exporting machine: how their graphs are opened here, and how fast and large they are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import Engine, EngineOptions, open_engine
from mammut_runtime.errors import EngineError

REPEATS = 7
FIGURES = {
    "encode_ms": "picture to embedding, ms",
    "encode_clip_ms": "clip to embedding, ms",
    "detect_ms": "picture to detections of 20 names, ms",
    "text_1_ms": "one text to embedding, ms",
    "text_64_ms": "64 texts to embeddings, ms",
    "caption_ms": "greedy caption of 20 tokens, ms",
    "tokens_per_s": "tokens per second",
    "resident_bytes": "memory of the weights and engines, bytes",
    "peak_memory_bytes": "peak memory of the process, bytes",
    "bundle_bytes": "bundle, bytes",
    "unique_weight_bytes": "unique weights, bytes",
}
"""What `mammut-run bench` measures and a report shows → in words."""

_RUN = "import sys; from mammut_runtime.commands import main; sys.exit(main())"
"""mammut-run, whether or not its script is on the path."""


@dataclass(frozen=True)
class Measured:
    """One bundle on this machine."""

    figures: dict[str, float]
    """Some of FIGURES; medians."""


def here(target: str, threads: int = 0) -> EngineOptions:
    """How a bundle of any target runs on the exporting machine: those for TensorRT have no engines yet."""
    return EngineOptions(threads=threads, engine="onnxruntime" if target == "tensorrt" else None)


def open_here(bundle: Bundle, name: str) -> Engine:
    """A graph of a bundle of any target, on the exporting machine."""
    target = bundle.manifest.target
    return open_engine(bundle.graph_path(name), target, here(target))


def measure(bundle: Bundle, threads: int = 0) -> Measured:
    """What `mammut-run bench` says, run in a process of its own: memory is not to be told apart within this one."""
    command = [sys.executable, "-c", _RUN, "bench", "--json", "--repeats", str(REPEATS), "--threads", str(threads)]
    command += ["--bundle", str(bundle.path)]
    if bundle.manifest.target == "tensorrt":
        command += ["--engine", "onnxruntime"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"the bundle cannot be measured: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured({key: float(found[key]) for key in FIGURES if found.get(key) is not None})

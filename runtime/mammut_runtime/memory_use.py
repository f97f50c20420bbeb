"""What a bundle's weights cost in memory: their bytes, each counted once, beside what the process grows by.

The growth is counted from a process that has everything but weights: the libraries are loaded, the tokenizer is read,
and the bundle's engine has started, opened a graph of one node and run it. It ends when every graph of the bundle was
opened and used once: a picture, a clip, a text, a greedy caption, a name looked for. So it holds the weights in
whatever form the engine keeps them, what it compiled for them, and the buffers of one call.
"""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mammut_runtime.canary import canary_picture, moving_crops
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import EngineError
from mammut_runtime.model import Model
from mammut_runtime.onnx_external import external_tensors

_ONE_NODE = (
    b'\x08\n:D\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12\x01gZ\x15\n\x01x\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n'
    b"\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n\n\x03\x12\x01nB\x04\n\x00\x10\x15"
)
"""An ONNX file: y float32[n, n] = x @ x, opset 21."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes."""

    unique_weights: int
    """Of weights that the graphs take from weights.bin, each counted once."""
    resident: int | None
    """What the process grew by, all graphs open and used; None where the system does not say."""

    @property
    def ratio(self) -> float | None:
        """resident / unique_weights."""
        return None if self.resident is None or not self.unique_weights else self.resident / self.unique_weights


def measure_memory(model: Model, options: EngineOptions) -> MemoryUse:
    """Open and use every graph of a model that was just loaded: graphs that are open already do not count."""
    weights = unique_weight_bytes(model)
    texts = {"text", "decoder"} & model.manifest.graphs.keys()
    if texts:
        model.tokenizer.encode("a photo")
    start_engine(model.manifest.target, options)
    gc.collect()
    before = resident_bytes()
    model.open_graphs(*model.manifest.graphs)
    if "vision" in model.manifest.graphs:
        size = model.manifest.preprocess.size
        seen = model.encode(canary_picture(1, (size, size)))
        if "decoder" in model.manifest.graphs:
            seen.caption(CaptionOptions(beams=1))
    if model.watches:
        model.encode_frames(moving_crops(canary_picture(1, (64, 64)), model.manifest.model.video_frames))
    if "text" in model.manifest.graphs:
        model.embed_texts(["a photo"])
    if model.detects:
        embeddings = np.full((1, model.manifest.model.embed_dim), model.manifest.model.embed_dim**-0.5, np.float32)
        square = model.detector.square(canary_picture(1, (64, 64)), "rgb")
        model.detector.run([square], embeddings, np.ones(1, np.float32))
    gc.collect()
    after = resident_bytes()
    return MemoryUse(weights, None if before is None or after is None else max(0, after - before))


def start_engine(target: str, options: EngineOptions) -> None:
    """Load the engine's library and have it run a graph without weights; nothing where it runs only what was built."""
    with tempfile.TemporaryDirectory(prefix="mammut-") as folder:
        graph = Path(folder) / "one_node.onnx"
        graph.write_bytes(_ONE_NODE)
        try:
            engine = open_engine(graph, target, options)
        except EngineError:
            return
        engine.run({"x": np.ones((2, 2), np.float32)})
        engine.close()


def resident_bytes() -> int | None:
    """Memory that this process holds now (resident set), or None where the system does not say (Linux does)."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def unique_weight_bytes(model: Model) -> int:
    """Bytes of weights.bin that the bundle's graphs refer to, those of several graphs counted once."""
    ranges = set()
    for info in model.manifest.graphs.values():
        for tensor in external_tensors(model.bundle.read(info.file), info.file):
            ranges.add((tensor.location, tensor.offset_bytes, tensor.length_bytes or 0))
    return sum(length for _, _, length in ranges)

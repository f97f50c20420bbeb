"""Replays every graph at many shapes, not just the traced one: an exporter may have taken a size for a constant.

Engines run as the device will run them; the core computes the reference from the same inputs. What happens to pictures
and texts before and after the graphs is parity.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mammut.checkpoint import Checkpoint
from mammut.model import Mammut
from mammut.transformer import KeysValues
from mammut_export.detections import aligned
from mammut_export.graphs import traceable
from mammut_runtime.engines import Engine
from mammut_runtime.manifest import GraphInfo

Arrays = dict[str, NDArray[Any]]
BATCHES = (1, 2, 5)
CLIP_BATCHES = (1, 3)
DETECTIONS = ((1, 1), (2, 20), (1, 365), (3, 1203))
"""(batch, names) of the detector."""
LENGTHS = (1, 2, 7)
"""Of texts; the full context is added."""
STEPS = ((1, 1, 1, 0), (1, 1, 4, 0), (2, 1, 1, 7), (1, 3, 1, 12), (5, 2, 1, 1), (2, 3, 3, 4), (1, 4, 2, 9))
"""(batch, beams, new, past) of the decoder; a prompt and a last step that fill the context are added."""


def replay(
    graph: str, checkpoint: Checkpoint, info: GraphInfo, engine: Engine, seed: int = 0, half: bool = False
) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Run one graph at each shape of its lattice.

    half: whether float16 is involved, see detections.aligned.
    Yields what the shape was ("batch 2, beams 3, new 1, past 7"), the engine's outputs, and the core's, by name.
    """
    module, model = traceable(graph, checkpoint, info).module, checkpoint.model
    generator = torch.Generator().manual_seed(seed)
    for label, inputs in _CASES[graph](model, info, generator):
        with torch.no_grad():
            wanted = module(*inputs)
        feeds = {t.name: value.numpy().astype(t.dtype) for t, value in zip(info.inputs, inputs, strict=True)}
        names = [tensor.name for tensor in info.outputs]
        got = {name: _single(value) for name, value in engine.run(feeds).items()}
        right = {name: value.numpy() for name, value in zip(names, wanted, strict=True)}
        yield label, *(aligned(got, right, half) if graph == "detector" else (got, right))


def _single(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if value.dtype == np.float16 else value


_Cases = Iterator[tuple[str, tuple[Tensor, ...]]]


def _vision_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    size = model.config.vision.image_size
    for batch in BATCHES:
        yield f"batch {batch}", (torch.randn(batch, 3, size, size, generator=generator),)


def _video_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    size, video = model.config.vision.image_size, model.config.video
    frames = video.frames if video is not None else 0
    for batch in CLIP_BATCHES:
        yield f"batch {batch}", (torch.randn(batch, frames, 3, size, size, generator=generator),)


def _detector_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    """Names are unit vectors. A size that was taken for a constant shows with any picture; noise has few near ties."""
    size, width = info.inputs[0].shape[-1], model.config.embed_dim
    for batch, names in DETECTIONS:
        classes = torch.nn.functional.normalize(torch.randn(names, width, generator=generator), dim=-1)
        novel = (torch.arange(names) % 3 == 0).float()
        yield (
            f"batch {batch}, {names} names",
            (torch.randn(batch, 3, int(size), int(size), generator=generator), classes, novel),
        )


def _text_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    context = model.config.text.context_length
    lengths = sorted({*(min(length, context) for length in LENGTHS), context})
    for index, length in enumerate(lengths):
        batch = BATCHES[index % len(BATCHES)]
        ids = _ids(model, (batch, length), generator)
        for row in range(1, batch):  # rows end in pads, each row at another place; the first has none
            ids[row, 1 + row % length :] = model.text.pad_id
        yield f"batch {batch}, length {length}", (ids,)


def _memory_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    width, counts = model.config.vision.width, _token_counts(model, info)
    for index, batch in enumerate(BATCHES * len(counts)):
        count = counts[index % len(counts)]
        yield f"batch {batch}, {count} tokens", (torch.randn(batch, count, width, generator=generator),)


def _decoder_cases(model: Mammut, info: GraphInfo, generator: torch.Generator) -> _Cases:
    """Caches are what the core itself gives for random ids, so that their values have a real model's spread."""
    context, width = model.config.text.context_length, model.config.vision.width
    counts = _token_counts(model, info)
    steps = [step for step in STEPS if step[2] + step[3] <= context] + [(1, 1, context, 0), (1, 2, 1, context - 1)]
    for index, (batch, beams, new, past) in enumerate(steps):
        count = counts[index % len(counts)]
        tokens = torch.randn(batch, count, width, generator=generator)
        with torch.no_grad():
            memory = model.memory(tokens)
            cache = model.empty_past(batch, beams)
            if past:
                cache = model.decode_step(_ids(model, (batch, beams, past), generator), cache, memory)[1]
        label = f"batch {batch}, beams {beams}, new {new}, past {past}, {count} tokens"
        yield label, (_ids(model, (batch, beams, new), generator), *_flat(cache), *_flat(memory))


_CASES: dict[str, Callable[[Mammut, GraphInfo, torch.Generator], _Cases]] = {
    "vision": _vision_cases,
    "video": _video_cases,
    "detector": _detector_cases,
    "text": _text_cases,
    "memory": _memory_cases,
    "decoder": _decoder_cases,
}


def _token_counts(model: Mammut, info: GraphInfo) -> tuple[int, ...]:
    """What `memory` and `decoder` are given: a picture's tokens and, where their number is free, a clip's."""
    free = any("seen" in tensor.shape for tensor in info.inputs)
    return (model.config.vision.tokens, *([model.config.video_tokens] if free else []))


def _ids(model: Mammut, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, model.config.text.vocab_size, shape, generator=generator)


def _flat(pairs: list[KeysValues]) -> list[Tensor]:
    return [tensor.contiguous() for pair in pairs for tensor in pair]

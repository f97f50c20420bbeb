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

from mammut.model import Mammut
from mammut.transformer import KeysValues
from mammut_export.graphs import traceable
from mammut_runtime.engines import Engine
from mammut_runtime.manifest import GraphInfo

Arrays = dict[str, NDArray[Any]]
BATCHES = (1, 2, 5)
LENGTHS = (1, 2, 7)
"""Of texts; the full context is added."""
STEPS = ((1, 1, 1, 0), (1, 1, 4, 0), (2, 1, 1, 7), (1, 3, 1, 12), (5, 2, 1, 1), (2, 3, 3, 4), (1, 4, 2, 9))
"""(batch, beams, new, past) of the decoder; a prompt and a last step that fill the context are added."""


def replay(
    graph: str, model: Mammut, info: GraphInfo, engine: Engine, seed: int = 0
) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Run one graph at each shape of its lattice.

    Yields what the shape was ("batch 2, beams 3, new 1, past 7"), the engine's outputs, and the core's, by name.
    """
    module = traceable(graph, model, info).module
    generator = torch.Generator().manual_seed(seed)
    for label, inputs in _CASES[graph](model, generator):
        with torch.no_grad():
            wanted = module(*inputs)
        feeds = {t.name: value.numpy().astype(t.dtype) for t, value in zip(info.inputs, inputs, strict=True)}
        names = [tensor.name for tensor in info.outputs]
        got = {name: _single(value) for name, value in engine.run(feeds).items()}
        yield label, got, {name: value.numpy() for name, value in zip(names, wanted, strict=True)}


def _single(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if value.dtype == np.float16 else value


_Cases = Iterator[tuple[str, tuple[Tensor, ...]]]


def _vision_cases(model: Mammut, generator: torch.Generator) -> _Cases:
    size = model.config.vision.image_size
    for batch in BATCHES:
        yield f"batch {batch}", (torch.randn(batch, 3, size, size, generator=generator),)


def _text_cases(model: Mammut, generator: torch.Generator) -> _Cases:
    context = model.config.text.context_length
    lengths = sorted({*(min(length, context) for length in LENGTHS), context})
    for index, length in enumerate(lengths):
        batch = BATCHES[index % len(BATCHES)]
        ids = _ids(model, (batch, length), generator)
        for row in range(1, batch):  # rows end in pads, each row at another place; the first has none
            ids[row, 1 + row % length :] = model.text.pad_id
        yield f"batch {batch}, length {length}", (ids,)


def _memory_cases(model: Mammut, generator: torch.Generator) -> _Cases:
    with torch.no_grad():
        for batch in BATCHES:
            tokens = torch.randn(batch, model.config.vision.tokens, model.config.vision.width, generator=generator)
            yield f"batch {batch}", (tokens,)


def _decoder_cases(model: Mammut, generator: torch.Generator) -> _Cases:
    """Caches are what the core itself gives for random ids, so that their values have a real model's spread."""
    context, vision = model.config.text.context_length, model.config.vision
    steps = [step for step in STEPS if step[2] + step[3] <= context] + [(1, 1, context, 0), (1, 2, 1, context - 1)]
    for batch, beams, new, past in steps:
        tokens = torch.randn(batch, vision.tokens, vision.width, generator=generator)
        with torch.no_grad():
            memory = model.memory(tokens)
            cache = model.empty_past(batch, beams)
            if past:
                cache = model.decode_step(_ids(model, (batch, beams, past), generator), cache, memory)[1]
        label = f"batch {batch}, beams {beams}, new {new}, past {past}"
        yield label, (_ids(model, (batch, beams, new), generator), *_flat(cache), *_flat(memory))


_CASES: dict[str, Callable[[Mammut, torch.Generator], _Cases]] = {
    "vision": _vision_cases,
    "text": _text_cases,
    "memory": _memory_cases,
    "decoder": _decoder_cases,
}


def _ids(model: Mammut, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, model.config.text.vocab_size, shape, generator=generator)


def _flat(pairs: list[KeysValues]) -> list[Tensor]:
    return [tensor.contiguous() for pair in pairs for tensor in pair]

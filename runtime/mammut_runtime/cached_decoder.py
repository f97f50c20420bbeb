"""Inference for generation: the decoder graph together with the keys and values of everything it has been fed.

Legend: P pictures, K sequences that share a picture (beams, or candidates being scored), T new tokens, L tokens so far,
V vocabulary, H heads, d channels of a head.

The picture's own keys and values (cross K/V) are the same for all K sequences and are never repeated or reordered. What
to feed next is generation.py's and likelihood.py's business.

Keys and values are NumPy arrays or, where the engine has memory of its own, DeviceTensors that never leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.device_tensors import DeviceTensor, take
from mammut_runtime.engines import Engine

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Values = NDArray[Any] | DeviceTensor
"""float32 or float16, as the bundle has them."""


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the decoder's own cache, the same for every self-attention block."""

    layers: int
    heads: int
    head_width: int


class CachedDecoder:
    """K sequences for each of P pictures, growing by what is fed. Not for use from several threads at once.

    Arrays are replaced, never written into, so `fork` costs nothing.
    """

    def __init__(self, engine: Engine, cross: Mapping[str, Values], shape: CacheShape) -> None:
        """cross: cross_k.J and cross_v.J [P, H, N, d], as the memory graph gives them for P pictures.

        The decoder's own cache has their dtype: in a bundle they are alike.
        """
        self._engine = engine
        self._cross = dict(cross)
        any_cross = next(iter(cross.values()))
        self._pictures: int = any_cross.shape[0]
        empty = np.zeros((self._pictures, 1, shape.heads, 0, shape.head_width), any_cross.dtype)
        names = [f"{kind}.{layer}" for layer in range(shape.layers) for kind in ("k", "v")]
        self._past: dict[str, Values] = dict.fromkeys(names, empty)

    @property
    def pictures(self) -> int:
        """P."""
        return self._pictures

    @property
    def sequences(self) -> int:
        """K."""
        return int(self._any_past().shape[1])

    @property
    def length(self) -> int:
        """L, tokens fed so far, the same for all sequences."""
        return int(self._any_past().shape[3])

    @property
    def most_sequences(self) -> int | None:
        """The largest K that the engine takes; None where any will do."""
        limits: Mapping[str, tuple[int, ...]] = getattr(self._engine, "largest_inputs", {})
        return limits["ids"][1] if "ids" in limits else None

    def feed(self, ids: Ids) -> Floats:
        """Append int64[P, K, T] to the sequences; float32[P, K, V], the logits after the last token of each."""
        feeds: dict[str, Any] = {"ids": np.ascontiguousarray(ids, np.int64)}
        feeds.update({f"past_{name}": past for name, past in self._past.items()})
        feeds.update(self._cross)
        outputs = self._engine.run(feeds)
        self._past = {name: outputs[f"present_{name}"] for name in self._past}
        logits: Floats = outputs["logits"]
        return logits

    def select(self, parents: Ids) -> None:
        """Rebuild the sequences: new sequence k of picture p continues the old sequence parents[p, k].

        parents: int64[P, new K], indices below the old K. Repeats, drops and reorders; only the decoder's own cache is
        gathered.
        """
        if np.array_equal(parents, np.tile(np.arange(self.sequences), (self._pictures, 1))):
            return
        rows = np.arange(self._pictures)[:, None] * self.sequences + parents
        self._past = {name: take(past, rows, axes=2) for name, past in self._past.items()}

    def keep(self, pictures: Ids) -> None:
        """Go on with these pictures only: int64[kept], indices below P."""
        self._pictures = len(pictures)
        self._past = {name: take(past, pictures) for name, past in self._past.items()}
        self._cross = {name: take(cross, pictures) for name, cross in self._cross.items()}

    def fork(self) -> CachedDecoder:
        """Another decoder in the same state; the two go on independently and share memory until they do."""
        other = object.__new__(CachedDecoder)
        other._engine, other._pictures = self._engine, self._pictures
        other._cross, other._past = dict(self._cross), dict(self._past)
        return other

    def _any_past(self) -> Values:
        return next(iter(self._past.values()))

"""One weights.bin for all graphs of a bundle: every matrix once, at an aligned place, whatever graphs use it.

The text tower and the decoder are two passes over one set of weights, and a tied vocabulary projection is the token
embedding: equal bytes are stored once, found by their sha256. An engine maps the file into memory, so graphs that
share a weight share its pages.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mammut_runtime.manifest import WEIGHTS_FILE

INLINE_BYTES = 1024
"""Smaller tensors stay inside the graph: shapes, axes and scalars, which engines want to see when they load it."""
PAGE_BYTES = 4096
LARGE_BYTES = 256 * 1024
"""From this size a tensor begins on a page, so that it can be mapped on its own; that costs it under 1 % on average."""
SMALL_ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register."""
LARGEST_HALF = 65_504.0


class WeightStore:
    """Writes a weights.bin, each distinct content once. The same additions in the same order give the same file."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}
        self.stored_bytes = 0
        """Written so far, without the gaps of alignment."""
        self.given_bytes = 0
        """Added so far, repetitions counted: what the file would hold without sharing."""

    def add(self, array: NDArray[Any]) -> tuple[int, int]:
        """Offset and length in bytes of the array's content, little-endian, in C order."""
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        data = little.reshape(-1).view(np.uint8).data
        self.given_bytes += len(data)
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            alignment = PAGE_BYTES if len(data) >= LARGE_BYTES else SMALL_ALIGNMENT_BYTES
            self._file.write(bytes(-self._file.tell() % alignment))
            self._places[digest] = self._file.tell(), len(data)
            self._file.write(data)
            self.stored_bytes += len(data)
        return self._places[digest]

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def move_to_store(model: ir.Model, store: WeightStore) -> None:
    """Replace every initializer of INLINE_BYTES or more by a reference into the store's file."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor.nbytes < INLINE_BYTES:
            # A copy in our hands: what the exporter leaves here may still point into the PyTorch model.
            value.const_value = ir.Tensor(np.array(tensor.numpy()), name=name)
            continue
        offset, length = store.add(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
        )


def halve_matrices(model: ir.Model) -> None:
    """Store float32 initializers of two or more dimensions as float16; the graph computes in float32 as before.

    An engine undoes the cast once, when it loads the graph. A table that rows are taken from keeps its float16 form in
    memory too: only the rows taken are cast. A matrix with a value that float16 cannot hold stays as it is.
    """
    graph = model.graph
    first = graph[0]
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        array = tensor.numpy()
        if np.abs(array).max(initial=0.0) > LARGEST_HALF:
            continue
        value.const_value = ir.Tensor(array.astype(np.float16), name=value.name)
        value.dtype = ir.DataType.FLOAT16
        gathers = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
        others = [use for use in value.uses() if use.node not in gathers]
        for node in gathers:
            _cast_after(graph, node)
        if others:
            cast = _cast(value, f"{value.name}.float32")
            graph.insert_before(first, cast)
            for use in others:
                use.node.replace_input_with(use.idx, cast.outputs[0])


def half_rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a bundle stored by `halve_matrices` computes with."""
    if array.ndim < 2 or np.abs(array).max(initial=0.0) > LARGEST_HALF:
        return array
    return array.astype(np.float16).astype(np.float32)


def _cast_after(graph: ir.Graph, node: ir.Node) -> None:
    """Give a node that now yields float16 a cast to float32 behind it."""
    output = node.outputs[0]
    uses = list(output.uses())
    cast = _cast(output, f"{output.name}.float32")
    graph.insert_after(node, cast)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    output.dtype = ir.DataType.FLOAT16


def _cast(value: ir.Value, name: str) -> ir.Node:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{name}/Cast")
    cast.outputs[0].name = name
    cast.outputs[0].dtype = ir.DataType.FLOAT
    cast.outputs[0].shape = value.shape
    return cast

"""Arrays that stay in a device's memory: what an engine may return in place of a NumPy array and accept as a feed.

The decoder's cache grows by a token a step and is fed back as it is; carrying it to the host and back would cost more
than the step. So an engine with its own memory returns DeviceTensors for such outputs, and whoever holds them may look
at their shape, cut, reorder and join them, all on the device, or ask for a copy on the host: `numpy()`.

    DeviceTensor    shape, dtype, numpy(), tensor[i:j] along the first axis, take(), np.concatenate
    DeviceMemory    what an engine gives for that: allocate, copy, download
    take            the same for NumPy arrays and DeviceTensors alike

Nothing here knows CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import EngineError

Copy = tuple[int, int, int]
"""To this address, from that address, so many bytes."""


class Block(Protocol):
    """A piece of device memory. It goes back to its memory when nobody holds it any more."""

    @property
    def address(self) -> int:
        """Of its first byte."""


class DeviceMemory(Protocol):
    """Memory of one device. What is asked of it is done in the order in which it was asked."""

    def allocate(self, size_bytes: int) -> Block:
        """A block of at least this size, aligned for any use. Raises EngineError if there is no room."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies within the device."""

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Fills `out` (contiguous) from the device."""


class DeviceTensor:
    """An array in device memory: C order, never written into after it was made. Views share memory."""

    def __init__(
        self,
        memory: DeviceMemory,
        block: Block,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int = 0,
        room_bytes: int = 0,
    ) -> None:
        """offset: bytes from the beginning of the block. room_bytes: what was reserved, if that is more than it needs:
        a cache that grows from step to step finds blocks of one size to use again."""
        self.memory, self.block = memory, block
        self.shape, self.dtype = shape, dtype
        self._offset, self._room_bytes = offset, room_bytes

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.block.address + self._offset

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> NDArray[Any]:
        """A copy on the host."""
        array: NDArray[Any] = np.empty(self.shape, self.dtype)
        if array.nbytes:
            self.memory.download(self.address, array)
        return array

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """Rows of the first axis that follow each other, as a view."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"a DeviceTensor is cut along its first axis, such as [2:3], got {rows!r}; or use numpy()")
        start, stop, _ = rows.indices(self.shape[0])
        rest = self.shape[1:]
        row_bytes = math.prod(rest) * self.dtype.itemsize
        shape = (max(stop - start, 0), *rest)
        return DeviceTensor(self.memory, self.block, shape, self.dtype, self._offset + start * row_bytes)

    def take(self, rows: NDArray[np.int64], axes: int) -> DeviceTensor:
        """Rows in another order, dropped or repeated.

        rows: numbers of rows, where the first `axes` axes count as one; its shape takes their place.
        """
        rest = self.shape[axes:]
        row_bytes = math.prod(rest) * self.dtype.itemsize
        room_bytes = rows.size * (self._room_bytes // max(1, math.prod(self.shape[:axes])))
        new = self._new((*rows.shape, *rest), room_bytes)
        runs = list(_runs(rows.ravel().tolist())) if row_bytes else []
        self.memory.copy(
            [
                (new.address + to * row_bytes, self.address + first * row_bytes, count * row_bytes)
                for to, first, count in runs
            ]
        )
        return new

    def _new(self, shape: tuple[int, ...], room_bytes: int = 0) -> DeviceTensor:
        block = self.memory.allocate(max(1, room_bytes, math.prod(shape) * self.dtype.itemsize))
        return DeviceTensor(self.memory, block, shape, self.dtype, room_bytes=room_bytes)

    def __array__(self, *_: object, **__: object) -> NDArray[Any]:
        # NumPy would call this quietly, and with it the copy that all this is there to avoid.
        raise TypeError("a DeviceTensor is not copied to the host by itself; call numpy()")

    def __array_function__(
        self, function: Callable[..., Any], types: object, arguments: Sequence[Any], options: dict[str, Any]
    ) -> DeviceTensor:
        """np.concatenate along the first axis."""
        if function is not np.concatenate or len(arguments) != 1 or options.get("axis", 0) != 0:
            raise TypeError(f"{function.__name__} of a DeviceTensor: only np.concatenate along axis 0; or use numpy()")
        return _concatenate(list(arguments[0]))


def take(array: Any, rows: NDArray[np.int64], axes: int = 1) -> Any:
    """array[rows], where the first `axes` axes of the array count as one. For NumPy arrays and DeviceTensors."""
    if isinstance(array, DeviceTensor):
        return array.take(rows, axes)
    flat = array if axes == 1 else array.reshape(math.prod(array.shape[:axes]), *array.shape[axes:])
    return flat[rows]


def _concatenate(tensors: list[Any]) -> DeviceTensor:
    first = tensors[0]
    for each in tensors:
        fits = isinstance(each, DeviceTensor) and each.shape[1:] == first.shape[1:] and each.dtype == first.dtype
        if not fits or each.memory is not first.memory:
            raise EngineError("arrays of different devices, sizes or types cannot be joined; encode the pictures again")
    new = first._new((sum(len(each) for each in tensors), *first.shape[1:]))
    copies, to = [], new.address
    for each in tensors:
        if each.nbytes:
            copies.append((to, each.address, each.nbytes))
        to += each.nbytes
    first.memory.copy(copies)
    joined: DeviceTensor = new
    return joined


def _runs(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first row, count) of stretches of rows that follow each other: one copy each."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield start, rows[start], i - start
            start = i

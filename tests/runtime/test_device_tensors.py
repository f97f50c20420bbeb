"""DeviceTensors behave as the NumPy arrays they stand for, without a copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mammut_runtime.device_tensors import Copy, DeviceTensor, take
from mammut_runtime.errors import EngineError


class Piece:
    def __init__(self, address: int) -> None:
        self.address = address


class PlainMemory:
    """A DeviceMemory in one NumPy array."""

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 20, np.uint8)
        self.used, self.downloads = 256, 0
        self.copies: list[Copy] = []

    def allocate(self, size_bytes: int) -> Piece:
        address = self.used
        self.used += -(-size_bytes // 256) * 256
        return Piece(address)

    def copy(self, copies: Sequence[Copy]) -> None:
        self.copies += copies
        for to, source, size in copies:
            self.bytes[to : to + size] = self.bytes[source : source + size]

    def download(self, address: int, out: NDArray[Any]) -> None:
        self.downloads += 1
        out[...] = self.bytes[address : address + out.nbytes].view(out.dtype).reshape(out.shape)

    def tensor(self, array: NDArray[Any]) -> DeviceTensor:
        block = self.allocate(max(1, array.nbytes))
        self.bytes[block.address : block.address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return DeviceTensor(self, block, array.shape, array.dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_any_sequence_of_operations_equals_numpy(seed: int) -> None:
    source, memory = np.random.default_rng(seed), PlainMemory()
    dtype = source.choice([np.float16, np.float32])
    shape = (int(source.integers(1, 4)), int(source.integers(1, 4)), 2, int(source.integers(0, 3)), 3)
    array = source.standard_normal(shape).astype(dtype)
    tensor: Any = memory.tensor(array)
    for _ in range(5):
        pictures, beams = array.shape[:2]
        action = source.integers(4)
        if action == 0:
            rows = source.integers(0, pictures * beams, (pictures, int(source.integers(1, 4))))
            array, tensor = take(array, rows, axes=2), take(tensor, rows, axes=2)
        elif action == 1:
            rows = source.integers(0, pictures, int(source.integers(1, 4)))
            array, tensor = take(array, rows), take(tensor, rows)
        elif action == 2:
            start = int(source.integers(pictures))
            array, tensor = array[start : pictures + 5], tensor[start : pictures + 5]
        else:
            array, tensor = np.concatenate([array, array[:1]]), np.concatenate([tensor, tensor[:1]])
        assert tensor.shape == array.shape and tensor.dtype == array.dtype and len(tensor) == len(array)
        assert tensor.nbytes == array.nbytes
        array, tensor = array[:4, :4], tensor[:4] if array.shape[1] <= 4 else tensor
    assert memory.downloads == 0
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_rows_that_follow_each_other_are_one_copy() -> None:
    memory = PlainMemory()
    tensor = memory.tensor(np.arange(12, dtype=np.float32).reshape(6, 2))
    found = take(tensor, np.array([2, 3, 4, 0, 1, 1]))
    assert [size for _, _, size in memory.copies] == [24, 16, 8]
    np.testing.assert_array_equal(found.numpy()[:, 0], [4, 6, 8, 0, 2, 2])


def test_room_for_growth_follows_the_rows() -> None:
    memory = PlainMemory()
    small = memory.tensor(np.zeros((2, 4), np.float32))
    roomy = DeviceTensor(memory, small.block, (2, 4), small.dtype, room_bytes=2 * 512)
    before = memory.used
    take(roomy, np.array([0, 0, 1]))
    assert memory.used - before == 3 * 512
    before = memory.used
    take(small, np.array([0, 0, 1]))
    assert memory.used - before == 256, "a control"


def test_quiet_copies_and_other_operations_are_refused() -> None:
    tensor: Any = PlainMemory().tensor(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match=r"not copied to the host by itself; call numpy\(\)"):
        np.asarray(tensor)
    with pytest.raises(TypeError, match=r"only np\.concatenate along axis 0"):
        np.concatenate([tensor, tensor], axis=1)
    with pytest.raises(TypeError, match="stack of a DeviceTensor"):
        np.stack([tensor, tensor])
    with pytest.raises(TypeError, match=r"cut along its first axis, such as \[2:3\], got 1"):
        tensor[1]
    assert tensor.numpy().shape == (2, 3), "a control"


def test_tensors_of_two_devices_are_not_joined() -> None:
    one, other = (PlainMemory().tensor(np.zeros((1, 3), np.float32)) for _ in range(2))
    with pytest.raises(EngineError, match="of different devices, sizes or types cannot be joined"):
        np.concatenate([one, other])  # type: ignore[call-overload]
    np.concatenate([one, one])  # type: ignore[call-overload]

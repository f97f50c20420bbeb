"""A CUDA runtime without a GPU, by the names of cuda-python's: strict where a GPU would be silently wrong.

"Device memory" has addresses that the processor cannot read. Work on a stream is done only when somebody waits for it,
so that what forgets to wait reads old memory, and what writes to pinned memory too early is seen. Memory that was given
back, and what lies between blocks, cannot be touched. New memory is full of NaN.
"""

from __future__ import annotations

import ctypes
import enum
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

cudaStreamNonBlocking = 1


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStream_t:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __int__(self) -> int:
        return self.handle


class _Uuid:
    bytes = b"fake-gpu-00000000"[:16]


class cudaDeviceProp:
    name = b"Fake GPU\0\0"
    uuid = _Uuid()
    major, minor = 8, 7


class Misuse(AssertionError):
    """What would be undefined behaviour on a GPU."""


class _Machine:
    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[tuple[Callable[[], None], int]]] = {}
        """Handle → work that is waiting, and the host memory that it uses."""
        self.lock = threading.RLock()  # several threads may wait for one stream; its order is kept
        self.next_address = 0x7F00_0000_0000
        self.copies: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.limit_bytes = int(os.environ.get("FAKE_CUDA_MEMORY_BYTES", 1 << 40))
        self.failures: dict[str, cudaError_t] = {}
        if "FAKE_CUDA_ERROR" in os.environ:
            self.failures["cudaGetDeviceCount"] = cudaError_t[os.environ["FAKE_CUDA_ERROR"]]

    def used_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())

    def view(self, address: int, size_bytes: int) -> np.ndarray[Any, Any]:
        """uint8: that stretch of one live block."""
        for start, block in list(self.blocks.items()):
            if start <= address and address + size_bytes <= start + block.nbytes:
                return block[address - start : address - start + size_bytes]
        raise Misuse(f"device memory {address:#x}, {size_bytes} bytes: not inside a block that is held")

    def enqueue(self, stream: Any, work: Callable[[], None], host: int = 0) -> None:
        if int(stream) not in self.streams:
            raise Misuse(f"no stream {int(stream)}")
        self.streams[int(stream)].append((work, host))

    def drain(self, stream: Any) -> None:
        waiting = self.streams[int(stream)]
        with self.lock:
            while waiting:
                waiting.pop(0)[0]()

    def drain_all(self) -> None:
        for stream in list(self.streams):
            self.drain(stream)

    def failure(self, name: str) -> cudaError_t:
        self.calls[name] += 1
        return self.failures.get(name, cudaError_t.cudaSuccess)

    def copied(self, kind: str) -> int:
        """How often something was copied that way since the copies were last cleared."""
        return sum(each == kind for each, _ in self.copies)


MACHINE = _Machine()


def cudaGetDeviceCount() -> Any:
    error = MACHINE.failure("cudaGetDeviceCount")
    return (error, None) if error else (error, 1)


def cudaSetDevice(device: int) -> Any:
    if device != 0:
        return (cudaError_t.cudaErrorInvalidDevice,)
    return (MACHINE.failure("cudaSetDevice"),)


def cudaGetDeviceProperties(device: int) -> Any:
    return MACHINE.failure("cudaGetDeviceProperties"), cudaDeviceProp()


def cudaDriverGetVersion() -> Any:
    return cudaError_t.cudaSuccess, 12060


def cudaRuntimeGetVersion() -> Any:
    return cudaError_t.cudaSuccess, 12090


def cudaGetErrorString(error: cudaError_t) -> Any:
    return cudaError_t.cudaSuccess, error.name.removeprefix("cudaError").encode()


def cudaStreamCreateWithFlags(flags: int) -> Any:
    handle = 1000 + len(MACHINE.streams)
    MACHINE.streams[handle] = []
    return MACHINE.failure("cudaStreamCreateWithFlags"), cudaStream_t(handle)


def cudaStreamSynchronize(stream: cudaStream_t) -> Any:
    MACHINE.drain(stream)
    return (MACHINE.failure("cudaStreamSynchronize"),)


def cudaMalloc(size: int) -> Any:
    error = MACHINE.failure("cudaMalloc")
    if error or MACHINE.used_bytes() + size > MACHINE.limit_bytes:
        return cudaError_t.cudaErrorMemoryAllocation, None
    address = MACHINE.next_address
    MACHINE.next_address += -(-size // 256) * 256 + 256
    MACHINE.blocks[address] = np.full(size, 0xFF, np.uint8)
    return error, address


def cudaFree(devPtr: int) -> Any:
    MACHINE.drain_all()  # as CUDA does
    if devPtr not in MACHINE.blocks:
        raise Misuse(f"{devPtr:#x} was given back twice, or never asked for")
    del MACHINE.blocks[devPtr]
    return (MACHINE.failure("cudaFree"),)


def cudaMallocHost(size: int) -> Any:
    buffer = ctypes.create_string_buffer(b"\xff" * size, size)
    MACHINE.pinned[ctypes.addressof(buffer)] = buffer
    return MACHINE.failure("cudaMallocHost"), ctypes.addressof(buffer)


def cudaFreeHost(ptr: int) -> Any:
    used = {host for waiting in MACHINE.streams.values() for _, host in waiting}
    if any(ptr <= host < ptr + len(MACHINE.pinned[ptr]) for host in used):
        raise Misuse("pinned memory is given back while work is waiting")
    del MACHINE.pinned[ptr]
    return (MACHINE.failure("cudaFreeHost"),)


def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: cudaStream_t) -> Any:
    error = MACHINE.failure("cudaMemcpyAsync")
    MACHINE.copies.append((kind.name.removeprefix("cudaMemcpy"), count))
    if kind is cudaMemcpyKind.cudaMemcpyDeviceToDevice:
        MACHINE.enqueue(stream, lambda: _copy_within(dst, src, count))
    elif kind is cudaMemcpyKind.cudaMemcpyHostToDevice:
        _check_pinned(src, count)
        MACHINE.enqueue(stream, lambda: _upload(dst, src, count), src)
    else:
        MACHINE.enqueue(stream, lambda: _fetch(dst, src, count), dst)
        if not _is_pinned(dst):  # pageable memory: CUDA returns when it is done
            MACHINE.drain(stream)
    return (error,)


def _copy_within(to: int, source: int, count: int) -> None:
    target, content = MACHINE.view(to, count), MACHINE.view(source, count)
    if np.shares_memory(target, content):
        raise Misuse("a copy onto itself")
    target[:] = content


def _upload(to: int, source: int, count: int) -> None:
    MACHINE.view(to, count)[:] = np.frombuffer((ctypes.c_char * count).from_address(source), np.uint8)


def _fetch(to: int, source: int, count: int) -> None:
    ctypes.memmove(to, MACHINE.view(source, count).tobytes(), count)


def _is_pinned(address: int) -> bool:
    return any(start <= address < start + len(buffer) for start, buffer in MACHINE.pinned.items())


def _check_pinned(address: int, count: int) -> None:
    if not any(start <= address and address + count <= start + len(b) for start, b in MACHINE.pinned.items()):
        raise Misuse("an asynchronous copy from memory that is not pinned")

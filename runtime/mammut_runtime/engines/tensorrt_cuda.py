"""One GPU through cuda-python: its name, one stream, device memory that is used again, pinned memory, copies.

Everything is done on one stream, so things happen in the order in which they were asked for, whichever engine or thread
asked: a block that nobody holds any more may be handed out again at once, although its last use may still be running.
A program with several models on one GPU shares the stream too. What it costs is that two graphs do not overlap; a
small GPU has no room for two anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.device_tensors import Copy
from mammut_runtime.engines.tensorrt_library import EXTRA
from mammut_runtime.errors import EngineError, InputError

ALIGNMENT = 256
"""Bytes: what cudaMalloc guarantees and TensorRT expects of an address."""
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary")


@dataclass(frozen=True)
class Gpu:
    """A GPU as engines are keyed by it."""

    name: str
    uuid: str
    compute_capability: str
    """Such as 8.7."""
    driver: str


@cache
def runtime() -> Any:
    """cuda-python's module of the CUDA runtime. Raises EngineError that says how to get it."""
    problem: Exception | None = None
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second: cuda-python before 12.6.1
        try:
            return importlib.import_module(name)
        except Exception as error:
            problem = problem or error
    raise EngineError(f"cuda-python does not load ({problem}); install it: {EXTRA}") from problem


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime: its only result, or None. Raises EngineError with CUDA's own words."""
    cudart = runtime()
    error, *results = getattr(cudart, name)(*arguments)
    if error != cudart.cudaError_t.cudaSuccess:
        raise _problem(name, error)
    return results[0] if results else None


def describe(index: int) -> Gpu:
    """The GPU of this number. Raises EngineError if there is no driver or GPU, InputError for a number without one."""
    count = call("cudaGetDeviceCount")
    if not 0 <= index < count:
        raise InputError(f"gpu {index}: there {'is' if count == 1 else 'are'} {count}, numbered from 0")
    found = call("cudaGetDeviceProperties", index)
    return Gpu(
        name=bytes(found.name).split(b"\0")[0].decode("utf-8", "replace"),
        uuid=bytes(found.uuid.bytes).hex(),
        compute_capability=f"{found.major}.{found.minor}",
        driver=_driver(),
    )


class Block:
    """Device memory that goes back to its device when nobody holds it any more."""

    def __init__(self, device: CudaDevice, address: int, size_bytes: int) -> None:
        self._device, self.address, self.size_bytes = device, address, size_bytes

    def __del__(self) -> None:
        self._device.take_back(self.address, self.size_bytes)


class CudaDevice:
    """Memory and the stream of one GPU; a DeviceMemory. Safe to use from several threads."""

    def __init__(self, index: int) -> None:
        """Raises EngineError."""
        self.index = index
        self.gpu = describe(index)
        self._free: dict[int, list[int]] = defaultdict(list)
        self._users = 0
        self._lock = threading.Lock()
        self.activate()
        cudart = runtime()
        # Not the default stream: on it, TensorRT waits for the whole device around every call.
        self._stream = call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
        self._kinds = cudart.cudaMemcpyKind

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT wants it."""
        return int(self._stream)

    def activate(self) -> None:
        """Make this GPU the calling thread's."""
        call("cudaSetDevice", self.index)

    def open(self) -> None:
        """Count one more user."""
        with self._lock:
            self._users += 1

    def close(self) -> None:
        """Count one less; the last one gives unused memory back to the system."""
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._trim()

    def allocate(self, size_bytes: int) -> Block:
        """A block of the size, or up to an eighth larger, so that blocks fit again.

        What it holds is undefined. Raises EngineError that says what to lower if the GPU's memory is full.
        """
        step = max(ALIGNMENT, (1 << size_bytes.bit_length()) // 16)
        rounded = -(-size_bytes // step) * step
        try:
            return Block(self, self._free[rounded].pop(), rounded)
        except IndexError:
            pass
        self.activate()
        try:
            address = call("cudaMalloc", rounded)
        except EngineError:
            self._trim()  # blocks of other sizes may be in the way
            address = call("cudaMalloc", rounded)
        return Block(self, int(address), rounded)

    def take_back(self, address: int, size_bytes: int) -> None:
        """From a Block that nobody holds. A finalizer calls it, so it takes no lock and never raises."""
        if self._users > 0:
            self._free[size_bytes].append(address)
            return
        with contextlib.suppress(Exception):  # the program may be ending
            call("cudaFree", address)

    def copy(self, copies: Sequence[Copy]) -> None:
        """See DeviceMemory."""
        self.activate()
        for to, source, size_bytes in copies:
            self._copy(to, source, size_bytes, self._kinds.cudaMemcpyDeviceToDevice)

    def upload(self, to: int, source: Pinned, size_bytes: int) -> None:
        """From pinned memory, which must not be written to before the next `synchronize`."""
        self._copy(to, source.address, size_bytes, self._kinds.cudaMemcpyHostToDevice)

    def fetch(self, to: Pinned, source: int, size_bytes: int) -> None:
        """To pinned memory, where it is after the next `synchronize`."""
        self._copy(to.address, source, size_bytes, self._kinds.cudaMemcpyDeviceToHost)

    def download(self, address: int, out: NDArray[Any]) -> None:
        """See DeviceMemory."""
        self.activate()
        self._copy(out.ctypes.data, address, out.nbytes, self._kinds.cudaMemcpyDeviceToHost)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until all that was asked for is done. Raises EngineError if some of it failed."""
        call("cudaStreamSynchronize", self._stream)

    def _copy(self, to: int, source: int, size_bytes: int, kind: Any) -> None:
        call("cudaMemcpyAsync", to, source, size_bytes, kind, self._stream)

    def _trim(self) -> None:
        """Give blocks that nobody holds back to the system. cudaFree waits for what still uses them."""
        for addresses in list(self._free.values()):
            while addresses:
                with contextlib.suppress(IndexError):
                    call("cudaFree", addresses.pop())


class Pinned:
    """Host memory that the GPU copies from and to by itself. Grows; what it held is lost then."""

    def __init__(self) -> None:
        self.address = 0
        self._size_bytes = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The beginning of it as an array. The GPU must be done with it."""
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes > self._size_bytes:
            self.free()
            rounded = max(ALIGNMENT, 1 << (size_bytes - 1).bit_length())
            self.address, self._size_bytes = int(call("cudaMallocHost", rounded)), rounded
        if not size_bytes:
            return np.empty(shape, dtype)
        buffer: Any = (ctypes.c_char * size_bytes).from_address(self.address)
        array: NDArray[Any] = np.frombuffer(buffer, dtype).reshape(shape)
        return array

    def free(self) -> None:
        """Give it back. Again does nothing."""
        if self.address:
            address, self.address, self._size_bytes = self.address, 0, 0
            with contextlib.suppress(EngineError):
                call("cudaFreeHost", address)


_devices: dict[int, CudaDevice] = {}
_devices_lock = threading.Lock()


def device(index: int) -> CudaDevice:
    """The GPU of this number, one object for the process: engines hand tensors to each other."""
    with _devices_lock:
        if index not in _devices:
            _devices[index] = CudaDevice(index)
        return _devices[index]


def _driver() -> str:
    """CUDA's version of the driver, and the driver's own where the system says."""
    text = f"CUDA {call('cudaDriverGetVersion')}"
    for file in ("/sys/module/nvidia/version", "/etc/nv_tegra_release"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text += f", {Path(file).read_text(encoding='ascii').strip()[:200]}"
    return text


def _older_driver() -> str | None:
    """What to install where the driver is older than cuda-python's CUDA, as on a JetPack; None without a driver.

    Within a major version CUDA runs on older drivers too, so the newest cuda-python of the driver's major version fits.
    """
    ours, driver = (getattr(runtime(), name)()[1] for name in ("cudaRuntimeGetVersion", "cudaDriverGetVersion"))
    if not driver or driver // 1000 >= ours // 1000:
        return None
    versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (ours, driver)]
    return (
        f"cuda-python is for CUDA {versions[0]}, this driver for CUDA {versions[1]}; install the one that fits: "
        f"pip install 'cuda-python=={driver // 1000}.*'"
    )


def _problem(function: str, error: Any) -> EngineError:
    name = getattr(error, "name", str(error))
    words = ""
    with contextlib.suppress(Exception):
        words = runtime().cudaGetErrorString(error)[1].decode()
    if name == _OUT_OF_MEMORY:
        return EngineError(
            "the GPU's memory is full; lower the batch size, beams, or what the bundle was exported for "
            "(mammut-export --max-batch, --max-beams), drop pictures that were seen, or close other programs"
        )
    if name == "cudaErrorInsufficientDriver" and (advice := _older_driver()):
        return EngineError(f"no usable GPU: {advice}")
    if name in _NO_DRIVER:
        return EngineError(
            f"no usable GPU or driver: {words or name} ({name}); see nvidia-smi, or tegrastats on a Jetson"
        )
    return EngineError(f"CUDA failed: {function}: {words or name} ({name}); restart the program")

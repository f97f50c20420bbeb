"""A TensorRT without a GPU, by the names of the real one's: its engines run on ONNX Runtime, on the fake CUDA's memory.

Holds only what our code uses, each with the real one's parameter names (test_tensorrt_api.py compares them with the
real classes). Where the real one returns False or None and logs why, so does this one.

Environment, so that it reaches child processes: FAKE_TENSORRT_VERSION; FAKE_TENSORRT_FAIL, "WHAT:GRAPH" with WHAT one
of memory, crash, kill, hog, refuse, wait.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0")
_MAGIC = b"FAKE PLAN\n"
OPENED: list[bytes] = []
"""What was deserialized so far."""
CALLS: list[str] = []
"""Methods of engines and contexts in the order in which they were called."""


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0 if __version__.startswith("11") else 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64, BF16 = range(8)


_TYPES = {1: DataType.FLOAT, 2: DataType.UINT8, 3: DataType.INT8, 6: DataType.INT32, 7: DataType.INT64,
          9: DataType.BOOL, 10: DataType.HALF, 16: DataType.BF16}  # fmt: skip
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64, DataType.INT32: np.int32}


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError

    def _error(self, message: str) -> None:
        self.log(ILogger.Severity.ERROR, message)


class IHostMemory(bytearray):
    """The real one is no bytearray, but has a buffer as well."""

    @property
    def nbytes(self) -> int:
        return len(self)


class _Tensor:
    def __init__(self, info: Any) -> None:
        self.name: str = info.name
        self.sizes = [each.dim_param or each.dim_value for each in info.type.tensor_type.shape.dim]
        self.shape = tuple(-1 if isinstance(size, str) else size for size in self.sizes)
        self.data_type = _TYPES[info.type.tensor_type.elem_type]


class INetworkDefinition:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self.model: Any = None
        self.stem = ""

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.model.graph.input[index])


class ParserError:
    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text

    def node(self) -> int:
        return 7

    def node_name(self) -> str:
        return "blocks.0/Odd"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network, self.logger = network, logger
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, model: str) -> bool:
        import onnx

        self.network.stem = Path(model).stem
        if _failure(self.network.stem) == "refuse":
            self.errors.append(ParserError("Odd-1:\nno such operator"))
            return False
        self.network.model = onnx.load(model)
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("inconsistent")
        self.shapes[input] = [list(min), list(opt), list(max)]


class IProgressMonitor:
    def __init__(self) -> None:
        self.ready = True


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = bytes(content)

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)


class IBuilderConfig:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self.timing: ITimingCache | None = None
        self.workspace = 0

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.workspace = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.content and not cache.content.startswith(b"timing"):
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self.timing


class Builder:
    CONFIG: type[IBuilderConfig] = IBuilderConfig

    def __init__(self, logger: ILogger) -> None:
        if not getattr(logger, "ready", False):
            raise cudart.Misuse("the logger's own __init__ was not called")
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        if flags != 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            raise cudart.Misuse(f"network flags {flags}: not strongly typed")
        return INetworkDefinition(self.logger)

    def create_builder_config(self) -> IBuilderConfig:
        return self.CONFIG()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Inner", "Building", 50)
            monitor.step_complete("Inner", 0)
            monitor.phase_finish("Inner")
            monitor.step_complete("Building", 0)
        if not _survives(network.stem, self.logger):
            return None
        header = {"version": __version__, "profiles": config.profiles[0].shapes if config.profiles else {}}
        if config.timing is not None:
            config.timing.content = (config.timing.content or b"timing") + network.stem.encode()
        return IHostMemory(_MAGIC + json.dumps(header).encode() + b"\n" + network.model.SerializeToString())


class Runtime:
    ENGINE: type[ICudaEngine]

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        OPENED.append(content)
        if not content.startswith(_MAGIC):
            self.logger._error("Magic tag does not match")
            return None
        header, _, model = content[len(_MAGIC) :].partition(b"\n")
        return self.ENGINE(json.loads(header)["profiles"], model, self.logger)


class ICudaEngine:
    def __init__(self, profiles: dict[str, Any], model: bytes, logger: ILogger) -> None:
        import onnx
        import onnxruntime

        graph = onnx.load_from_string(model).graph
        self.logger, self.profiles = logger, profiles
        self.inputs = {each.name: each for each in map(_Tensor, graph.input)}
        self.outputs = {each.name: each for each in map(_Tensor, graph.output)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return (self.inputs | self.outputs)[name].data_type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.inputs | self.outputs)[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        if profile_index != 0 or name not in self.inputs:
            raise cudart.Misuse(f"no profile {profile_index} of {name}")
        return self.profiles[name]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


Runtime.ENGINE = ICudaEngine


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        CALLS.append("set_input_shape")
        low, _, high = self.engine.profiles.get(name, [shape] * 3)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.logger._error(f"{name}: shape {shape} is outside the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        CALLS.append("get_tensor_shape")
        sizes: dict[str, int] = {}
        for tensor in self.engine.inputs.values():
            if tensor.name in self.shapes:
                for size, value in zip(tensor.sizes, self.shapes[tensor.name], strict=True):
                    if sizes.setdefault(str(size), value) != value:
                        raise cudart.Misuse(f"{size} is {value} and {sizes[str(size)]}")
        found = []
        for size in self.engine.outputs[name].sizes:
            parts = str(size).replace(" ", "").split("+")
            found.append(sum(sizes.get(part, int(part) if part.isdigit() else -(10**6)) for part in parts))
        return tuple(max(size, -1) for size in found)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        CALLS.append("set_tensor_address")
        if not isinstance(memory, int) or memory % 256:
            raise cudart.Misuse(f"{name}: address {memory} is not aligned")
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        CALLS.append("execute_async_v3")
        engine = self.engine
        missing = [name for name in engine.inputs if name not in self.shapes]
        missing += [name for name in engine.inputs | engine.outputs if not self.addresses.get(name)]
        if missing:
            engine.logger._error(f"not set: {missing}")
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        outputs = {name: self.get_tensor_shape(name) for name in engine.outputs}
        cudart.MACHINE.enqueue(stream_handle, lambda: _run(engine, addresses, shapes, outputs))
        return True


def _run(
    engine: ICudaEngine, addresses: dict[str, int], shapes: dict[str, Any], outputs: dict[str, tuple[int, ...]]
) -> None:
    def view(name: str, shape: tuple[int, ...], data_type: DataType) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_NUMPY[data_type])
        size = int(np.prod(shape)) * dtype.itemsize
        return cudart.MACHINE.view(addresses[name], size).view(dtype).reshape(shape)

    feeds = {name: view(name, shapes[name], each.data_type) for name, each in engine.inputs.items()}
    for name, found in zip(outputs, engine.session.run(list(outputs), feeds), strict=True):
        if found.shape != outputs[name]:
            raise cudart.Misuse(f"{name}: {found.shape}, expected {outputs[name]}")
        view(name, outputs[name], engine.outputs[name].data_type)[...] = found


def _failure(stem: str) -> str | None:
    what, _, graph = os.environ.get("FAKE_TENSORRT_FAIL", "").partition(":")
    return what if graph == stem else None


def _survives(stem: str, logger: ILogger) -> bool:
    what = _failure(stem)
    if what == "memory":
        logger._error(
            "[virtualMemoryBuffer.cpp::resizePhysical::127] Error Code 2: OutOfMemory (Requested size was 8 GB)"
        )
        logger._error("Engine could not be created")
        return False
    if what == "crash":
        os.write(2, b"terminate called: something odd\n")
        os._exit(134)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hog":
        hoard = [np.ones(1 << 20) for _ in range(64)]
        time.sleep(20)
        del hoard
    if what == "wait":
        time.sleep(20)
    return True

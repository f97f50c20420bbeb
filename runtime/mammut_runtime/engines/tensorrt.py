"""Graphs as TensorRT engines that `mammut-run build` made on this device.

What the decoder reads and writes again at every step (its cache, the picture's keys and values) stays in the GPU's
memory: such outputs come as DeviceTensors and are fed back as they are. All else crosses through pinned memory.

An engine takes the shapes between the minimum and maximum of its profile; others are refused with both.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.device_tensors import DeviceTensor
from mammut_runtime.engine_cache import EngineCache, EngineKey, StoredEngine
from mammut_runtime.engines import EngineOptions
from mammut_runtime.engines import tensorrt_cuda as cuda
from mammut_runtime.engines.feeds import GraphInputs
from mammut_runtime.engines.tensorrt_library import TensorRt, load
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.manifest import MANIFEST_FILE, Manifest, read_manifest
from mammut_runtime.plain_files import read_regular

RESIDENT = ("cross_", "present_")
"""Outputs whose names begin so stay on the GPU."""
_MAX_MANIFEST_BYTES = 4_000_000
_PROFILE = 0
_GROWING_AXIS = 3
"""Of present_*: [batch, beams, heads, length, d]."""
_AWAY = "or have ONNX Runtime compute on the processor: --engine onnxruntime, EngineOptions(engine='onnxruntime')"


@dataclass(frozen=True)
class _Tensor:
    """An input or output of an engine."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """-1: open."""
    smallest: tuple[int, ...] = ()
    largest: tuple[int, ...] = ()
    """Of an input with open sizes; otherwise empty."""


class TensorRtEngine:
    """One graph. Safe to use from several threads, which wait for each other."""

    largest_inputs: Mapping[str, tuple[int, ...]]
    """Input with open sizes → the largest shape the engine was built for."""
    _runtime: Any
    _engine: Any
    _context: Any

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """path: the graph's ONNX file in its bundle.

        Raises EngineError when the library, a GPU or the engine is missing, or the engine is not this device's own.
        """
        self._library, self._device = _usable(options)
        manifest, bundle_hash = _manifest_of(path)
        graph = _graph_of(manifest, path)
        self._name, self._length = graph, manifest.text.context_length
        key = engine_key(bundle_hash, graph, self._library, self._device.gpu)
        stored = EngineCache(options.engine_cache).load(key)
        if stored is None:
            raise _not_built(path.parent, [graph], self._library, self._device.gpu)
        self._lock = threading.Lock()
        self._pinned: dict[str, cuda.Pinned] = {}
        self._device.activate()
        self._open(stored, options.cuda_graphs and graph == "decoder")
        self._device.open()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See Engine. Feeds may be NumPy arrays or DeviceTensors; outputs that stay on the GPU are DeviceTensors.

        Raises EngineError that names the input that does not fit, with the shapes that would.
        """
        with self._lock:
            if self._context is None:
                raise EngineError(f"{self._name}: this engine is closed; load the model again")
            self._inputs.check(feeds)
            self._check_profile(feeds)
            self._library.messages.clear()
            self._device.activate()
            shapes = self._shapes_for(feeds)
            # Pinned memory for what crosses, grown before the GPU is given anything to do.
            staged = {tensor.name: self._stage(tensor, shapes[tensor.name]) for tensor in self._crossing(feeds)}
            try:
                held = [self._bind_input(tensor, feeds[tensor.name], staged) for tensor in self._takes]
                outputs = {tensor.name: self._bind_output(tensor, shapes[tensor.name]) for tensor in self._gives}
                if not self._context.execute_async_v3(self._device.stream):
                    raise EngineError(f"{self._name}: TensorRT failed: {self._library.first_error()}")
                for name, output in outputs.items():
                    if name in staged and output.nbytes:
                        self._device.fetch(self._pinned[name], output.address, output.nbytes)
            finally:
                # also after an error: what was asked for still reads and writes memory that we hold
                self._device.synchronize()
            del held
            # a copy: the next run writes into the same pinned memory
            return {name: staged[name].copy() if name in staged else each for name, each in outputs.items()}

    def close(self) -> None:
        with self._lock:
            if self._context is None:
                return
            with contextlib.suppress(EngineError):
                self._device.activate()
            self._context = self._engine = self._runtime = None
            for each in self._pinned.values():
                each.free()
            self._pinned.clear()
            self._device.close()

    def _open(self, stored: StoredEngine, cuda_graphs: bool) -> None:
        trt, library = self._library.module, self._library
        library.messages.clear()
        self._runtime = trt.Runtime(library.logger)
        self._engine = self._runtime.deserialize_cuda_engine(stored.engine)
        if self._engine is None:
            raise EngineError(
                f"{stored.path}: {library.name} {library.version} cannot open it: {library.first_error()}; build it "
                f"again: mammut-run build BUNDLE --force"
            )
        self._context = self._make_context(cuda_graphs)
        if self._context is None:
            raise EngineError(
                f"{self._name}: no room for the engine's working memory: {library.first_error()}; close other "
                f"programs, or export with a smaller --max-batch or --max-beams"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._takes = [self._tensor(name, is_input=True) for name in inputs]
        self._gives = [self._tensor(name) for name in names if name not in inputs]
        open_sizes = {
            each.name: (each.dtype, tuple(None if size < 0 else size for size in each.shape)) for each in self._takes
        }
        self._inputs = GraphInputs(self._name, open_sizes)
        self.largest_inputs = {each.name: each.largest for each in self._takes if each.largest}

    def _make_context(self, cuda_graphs: bool) -> Any:
        if not cuda_graphs:
            return self._engine.create_execution_context()
        if not self._library.is_rtx:
            # every step has another length, and with TensorRT every length is another graph and context
            raise InputError("cuda_graphs is for tensorrt_rtx, which captures graphs of changing shapes; leave it out")
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _tensor(self, name: str, is_input: bool = False) -> _Tensor:
        data_type = self._engine.get_tensor_dtype(name)
        dtype = self._library.dtype(data_type)
        if dtype is None:
            raise EngineError(f"{self._name}: {name} is of type {data_type}, which NumPy has not; export it again")
        shape = tuple(self._engine.get_tensor_shape(name))
        smallest: tuple[int, ...] = ()
        largest: tuple[int, ...] = ()
        if is_input and -1 in shape:
            low, _, high = self._engine.get_tensor_profile_shape(name, _PROFILE)
            smallest, largest = tuple(low), tuple(high)
        return _Tensor(name, dtype, shape, smallest, largest)

    def _check_profile(self, feeds: Mapping[str, Any]) -> None:
        for each in self._takes:
            shape = feeds[each.name].shape
            limits = zip(each.smallest, shape, each.largest, strict=False)
            if not all(low <= size <= high for low, size, high in limits):
                raise EngineError(
                    f"{self._name}: input {each.name} is {list(shape)}, the engine was built for "
                    f"{list(each.smallest)} to {list(each.largest)}; lower the batch size, beams or lengths, or export "
                    f"with a larger --max-batch or --max-beams and build again"
                )

    def _shapes_for(self, feeds: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Sets the inputs' shapes; all inputs and outputs by name."""
        shapes: dict[str, tuple[int, ...]] = {each.name: tuple(feeds[each.name].shape) for each in self._takes}
        for name, shape in shapes.items():
            self._set(self._context.set_input_shape(name, shape), name)
        for each in self._gives:
            shapes[each.name] = tuple(self._context.get_tensor_shape(each.name))
            if -1 in shapes[each.name]:
                raise EngineError(f"{self._name}: TensorRT does not know the size of {each.name}; export it again")
        return shapes

    def _crossing(self, feeds: Mapping[str, Any]) -> list[_Tensor]:
        """What goes from the host to the GPU or back."""
        given = [each for each in self._takes if not isinstance(feeds[each.name], DeviceTensor)]
        return given + [each for each in self._gives if not each.name.startswith(RESIDENT)]

    def _stage(self, tensor: _Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        return self._pinned.setdefault(tensor.name, cuda.Pinned()).array(shape, tensor.dtype)

    def _bind_input(self, tensor: _Tensor, feed: Any, staged: Mapping[str, NDArray[Any]]) -> object:
        """Sets the address; gives what must be held until the engine has run."""
        held = feed if isinstance(feed, DeviceTensor) else self._uploaded(tensor, feed, staged[tensor.name])
        if held.memory is not self._device:
            raise EngineError(f"{self._name}: input {tensor.name} is on another GPU; encode the picture again")
        if held.address % cuda.ALIGNMENT:  # one picture's part of what was computed for several
            held = held.take(np.arange(len(held)), axes=1)
        self._set(self._context.set_tensor_address(tensor.name, held.address), tensor.name)
        return held

    def _uploaded(self, tensor: _Tensor, feed: NDArray[Any], staged: NDArray[Any]) -> DeviceTensor:
        block = self._device.allocate(max(1, feed.nbytes))  # an empty tensor needs an address too
        if feed.nbytes:
            staged[...] = feed
            self._device.upload(block.address, self._pinned[tensor.name], feed.nbytes)
        return DeviceTensor(self._device, block, feed.shape, feed.dtype)

    def _bind_output(self, tensor: _Tensor, shape: tuple[int, ...]) -> DeviceTensor:
        room = list(shape)
        if tensor.name.startswith("present_"):
            room[_GROWING_AXIS] = max(room[_GROWING_AXIS], self._length)
        room_bytes = math.prod(room) * tensor.dtype.itemsize
        block = self._device.allocate(max(1, room_bytes))
        held = DeviceTensor(self._device, block, shape, tensor.dtype, room_bytes=room_bytes)
        self._set(self._context.set_tensor_address(tensor.name, held.address), tensor.name)
        return held

    def _set(self, accepted: bool, name: str) -> None:
        if not accepted:
            raise EngineError(f"{self._name}: TensorRT does not take {name}: {self._library.first_error()}")


def engine_key(bundle_hash: str, graph: str, library: TensorRt, gpu: cuda.Gpu) -> EngineKey:
    """The engine of a graph for this GPU and these versions."""
    return EngineKey(
        bundle_hash,
        graph,
        gpu.name,
        gpu.uuid,
        gpu.compute_capability,
        gpu.driver,
        library.name,
        library.version,
    )


def check_built(bundle: Path, options: EngineOptions) -> None:
    """Raises EngineError that says how to build them if engines of this bundle's graphs are missing on this device.

    Looks for files only; whether they are this device's own is checked when one is opened.
    """
    library, device = _usable(options)
    manifest, bundle_hash = _manifest_of(bundle / MANIFEST_FILE)
    cache = EngineCache(options.engine_cache)
    missing = [
        graph
        for graph in manifest.graphs
        if not cache.path(engine_key(bundle_hash, graph, library, device.gpu)).exists()
    ]
    if missing:
        raise _not_built(bundle, missing, library, device.gpu)


def _usable(options: EngineOptions) -> tuple[TensorRt, cuda.CudaDevice]:
    try:
        return load(options.library), cuda.device(options.gpu)
    except EngineError as problem:
        raise EngineError(f"{problem}; {_AWAY}") from problem


def _not_built(bundle: Path, graphs: list[str], library: TensorRt, gpu: cuda.Gpu) -> EngineError:
    return EngineError(
        f"{bundle}: no engine for {', '.join(graphs)} on this device yet ({gpu.name}, {library.name} "
        f"{library.version}, driver {gpu.driver}); build: mammut-run build {bundle}, {_AWAY}"
    )


def _manifest_of(path: Path) -> tuple[Manifest, str]:
    """The manifest beside a file of a bundle, and the bundle's hash."""
    file = path.with_name(MANIFEST_FILE)
    try:
        text, _ = read_regular(file, _MAX_MANIFEST_BYTES)
    except OSError as error:
        raise EngineError(f"{file}: cannot be read ({error.strerror}); TensorRT graphs need their bundle") from error
    return read_manifest(text, str(file)), hashlib.sha256(text).hexdigest()


def _graph_of(manifest: Manifest, path: Path) -> str:
    for name, graph in manifest.graphs.items():
        if graph.file == path.name:
            return name
    raise EngineError(f"{path}: is not among the graphs of its {MANIFEST_FILE}")

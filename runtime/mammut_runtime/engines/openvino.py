"""Graphs on OpenVINO: one compiled model per graph, on the one device that was asked for.

What OpenVINO would do quietly and we do not want, it is told not to: no bfloat16 where the bundle was tested in
float32, no device that chooses itself, no pinning of threads to cores, no buffers that never shrink. Each engine has an
infer request of its own, used by one call at a time, with copies in and out: arrays that OpenVINO shares with the
caller are overwritten by later calls (test_engines_openvino.py shows it).

There is no stateful decoder (keys and values kept inside the graph): docs/log.md says what it would gain.
"""

from __future__ import annotations

import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.engines import EngineOptions
from mammut_runtime.engines.cores import physical_cores
from mammut_runtime.engines.feeds import GraphInputs, Size
from mammut_runtime.engines.mapped_weights import LOCK, MappedWeights
from mammut_runtime.errors import EngineError, InputError

MIN_VERSION = (2025, 2)
"""The first version our graphs were run with; pyproject.toml asks for the same."""
INSTALL = "pip install mammut-edge[openvino]"
_CHOOSERS = ("AUTO", "MULTI", "HETERO", "BATCH")
_DEVICE_HELP = {
    "GPU": "Intel's OpenCL driver (libOpenCL.so.1 and the compute runtime)",
    "NPU": "Intel's NPU driver",
}
_GIVE_BACK_EVERY = 64
"""Calls. It takes some milliseconds; B-32's decoder held 30 MB less after 60 steps."""
_SINK = re.compile(r"/sink_port_\d+$")


def library() -> Any:
    """The openvino module. Raises EngineError if it is missing or older than MIN_VERSION."""
    try:
        import openvino  # type: ignore[import-untyped, unused-ignore]
    except ImportError as problem:
        raise EngineError(f"this bundle needs OpenVINO, which does not load ({problem}); {INSTALL}") from problem
    version = str(getattr(openvino, "__version__", "unknown"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise EngineError(f"OpenVINO {version} is too old, expected {wanted} or newer; {INSTALL}")
    return openvino


@cache
def core() -> Any:
    """OpenVINO's Core, one for the process: devices start once, and graphs may share what they can."""
    return library().Core()


def devices() -> tuple[str, ...]:
    """The devices that OpenVINO finds here, such as ("CPU", "GPU"). Raises EngineError without the library."""
    library()
    return tuple(core().available_devices)


class OpenVinoEngine:
    """One graph, compiled. Safe to run from several threads; they take turns on the device."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Raises EngineError when the library, the device or the graph cannot be used; InputError for a cache folder
        that cannot be one."""
        self._library = library()
        self._name, self._device = path.name, options.device
        check_device(options.device, devices())
        with LOCK:
            self._weights = MappedWeights(path.parent)
            try:
                model = core().read_model(str(path))
                inputs, self._output_names = _inputs(model), _output_names(model)
                settings = _settings(options, lengths_vary=any(None in shape[1:] for _, shape in inputs.values()))
                self._compiled: Any = core().compile_model(model, options.device, settings)
                del model
            except RuntimeError as problem:
                version = self._library.__version__.split("-")[0]
                raise EngineError(f"{path}: OpenVINO {version} refuses it: {_reason(problem)}") from problem
            self._weights.found()
        self._inputs = GraphInputs(path.name, inputs)
        self._input_names = [_name_among(port, inputs, path.name) for port in self._compiled.inputs]
        self._check_placement()
        self._request: Any = self._compiled.create_infer_request()
        self._keep_buffers, self._runs = options.memory_arena, 0
        self._turn = threading.Lock()
        self._weights.give_back()

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See Engine. Raises EngineError that names the input that does not fit."""
        self._inputs.check(feeds)
        tensors = [self._library.Tensor(np.ascontiguousarray(feeds[name])) for name in self._input_names]  # copies
        with self._turn:
            if self._compiled is None:
                raise EngineError(f"{self._name}: this engine is closed; load the model again")
            try:
                outputs = self._infer(tensors)
            except RuntimeError as problem:
                raise EngineError(f"{self._name}: OpenVINO failed: {_reason(problem)}") from problem
            self._tidy(several=any(feed.shape[:1] > (1,) for feed in feeds.values()))
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        with self._turn:
            self._weights.forget()  # before the graph goes, and its mappings with it
            self._compiled = self._request = None

    def _infer(self, tensors: list[Any]) -> list[NDArray[Any]]:
        """Copies of the outputs: what a request shows is its own memory, and the next call writes into it."""
        for index, tensor in enumerate(tensors):
            self._request.set_input_tensor(index, tensor)
        self._request.start_async()  # infer() would copy every output once more
        self._request.wait()
        return [self._request.get_output_tensor(index).data.copy() for index in range(len(self._output_names))]

    def _tidy(self, several: bool) -> None:
        """Give back what a call leaves behind; only while no other one runs.

        several: it was for several pictures or texts. The buffers of one are kept, the next call needs them again:
        releasing them after every call made B-32's encoding 10 % slower, for 20 MB.
        """
        if several and not self._keep_buffers:
            self._compiled.release_memory()
        self._runs += 1
        # Matrices are packed when a call first needs them, so their pages come back: after the first calls, and later
        # for calls of another size. The arrays of a growing cache also leave holes that malloc keeps.
        if self._runs & (self._runs - 1) == 0 or self._runs % _GIVE_BACK_EVERY == 0:
            self._weights.give_back()

    def _check_placement(self) -> None:
        """Compiled for one device, it must be there."""
        found = [str(each) for each in self._compiled.get_property("EXECUTION_DEVICES")]
        wrong = [each for each in found if each != self._device and each.split(".")[0] != self._device]
        if wrong:
            raise EngineError(f"{self._name}: asked for {self._device}, OpenVINO would run it on {', '.join(found)}")


def check_device(device: str, available: tuple[str, ...]) -> None:
    """Raises EngineError, with the devices that exist, for one that does not, and for those that choose by themselves.

    "GPU" stands for the first of several ("GPU.0", "GPU.1").
    """
    existing = ", ".join(available) or "none"
    if device.split(":")[0] in _CHOOSERS:
        raise EngineError(f"device {device} chooses by itself where to run; name one of those here: {existing}")
    if device not in available and not any(each.startswith(f"{device}.") for each in available):
        needed = _DEVICE_HELP.get(device.split(".")[0])
        hint = f"; it needs {needed}" if needed else ""
        raise EngineError(f"device {device} is not there, only {existing}{hint}")


def _settings(options: EngineOptions, lengths_vary: bool) -> dict[str, Any]:
    """lengths_vary: the graph has open sizes besides the number of pictures or texts."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if not options.device_precision:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    if options.device == "CPU":
        settings |= {
            "INFERENCE_NUM_THREADS": options.threads or physical_cores(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
    if options.device == "CPU" and lengths_vary:
        # OpenVINO (seen in 2025.2 and 2026.4.1) fuses the two MatMuls and the Softmax of an attention; where the first
        # call has length 1, the fused one gives garbage at every other length (a text's embedding was off by 0.5).
        # There is no finer switch.
        settings["SNIPPETS_MODE"] = "DISABLE"
    if options.compile_cache is not None:
        try:
            options.compile_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as problem:
            raise InputError(
                f"compile_cache: {options.compile_cache} cannot be a folder ({problem.strerror}); give another one"
            ) from problem
        settings["CACHE_DIR"] = str(options.compile_cache)
    return settings


def _inputs(model: Any) -> dict[str, tuple[np.dtype[Any] | None, tuple[Size, ...]]]:
    """Name → dtype and sizes, open ones None."""
    found: dict[str, tuple[np.dtype[Any] | None, tuple[Size, ...]]] = {}
    for port in model.inputs:
        sizes = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
        found[port.get_node().get_friendly_name()] = np.dtype(port.get_element_type().to_dtype()), sizes
    return found


def _output_names(model: Any) -> list[str]:
    """The graph's own names, in its order. A port may have several (get_any_name() gives one of them, now this, now
    that); the node behind it is named after the one that the graph file says."""
    names = []
    for port in model.outputs:
        name = _SINK.sub("", port.get_node().get_friendly_name())
        if name not in port.get_names():
            raise EngineError(f"OpenVINO gives an output the names {sorted(port.get_names())}, expected {name!r} there")
        names.append(name)
    return names


def _name_among(port: Any, expected: dict[str, Any], graph: str) -> str:
    for name in port.get_names():
        if name in expected:
            return str(name)
    raise EngineError(f"{graph}: OpenVINO made an input {sorted(port.get_names())}, expected one of {list(expected)}")


def _reason(problem: Exception) -> str:
    """OpenVINO's message on one line, without its source positions."""
    text = re.sub(r"(?:Exception from|Check '[^']*' failed at) src/[^ ]*\.[ch]pp:\d+:?", "", str(problem))
    return " ".join(text.split())[:500] or type(problem).__name__

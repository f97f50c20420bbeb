"""Runs a graph on ONNX Runtime and shows what flows inside it.

The tensors are added to a copy of the graph as outputs. The copy lives in memory and takes its weights from the
bundle's own file, so nothing is written and nothing is loaded twice. Outputs that would not fit into a budget
together are computed in several runs, each a session with some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.activations import library, read_graph
from mammut_runtime.errors import EngineError

Array = NDArray[Any]
Watch = Callable[[str, Array], None]
"""Is given a tensor's name and its value in one run."""

DEFAULT_BUDGET_BYTES = 256 * 2**20
"""Most bytes of observed tensors in memory at once, as far as one tensor alone is not larger."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option that says where a graph in memory has its weights' file; since 1.20."""
_ERRORS_ONLY = 3


class ObservedEngine:
    """An Engine for one graph that also shows tensors inside it. For one thread.

    `run` gives the graph's own outputs, as any engine does.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[str],
        watch: Watch,
        *,
        threads: int = 0,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """path: the graph's file. tensors: names to show; inputs and outputs of the graph are allowed. sizes: name ->
        bytes in one run, to plan with; None estimates them. Raises EngineError when a library or the graph fails."""
        model = read_graph(path)
        self._path, self._watch = path, watch
        self._inputs = {each.name for each in model.graph.input}
        self._outputs = [each.name for each in model.graph.output]
        self._shown = frozenset(tensors)
        inner = [name for name in tensors if name not in self._inputs and name not in self._outputs]
        groups = in_groups(inner, estimated_bytes(model) if sizes is None else sizes, budget_bytes)
        self._sessions: list[tuple[Any, list[str]]] = []
        for index, group in enumerate(groups or [[]]):
            wanted = [*(self._outputs if index == 0 else ()), *group]
            session = open_session(with_outputs(model, group, keep=index == 0), path.parent, str(path), threads)
            self._sessions.append((session, wanted))

    @property
    def parts(self) -> int:
        """In how many runs the tensors are computed."""
        return len(self._sessions)

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See Engine. Shows every observed tensor once before it returns."""
        if not self._sessions:
            raise EngineError(f"{self._path.name}: this engine is closed")
        for name in self._inputs & self._shown:
            self._watch(name, feeds[name])
        outputs: dict[str, Array] = {}
        for session, wanted in self._sessions:
            try:
                values = session.run(wanted, feeds)
            except Exception as problem:  # ONNX Runtime's exceptions share no class of their own
                raise EngineError(f"{self._path.name}: ONNX Runtime failed: {_line(problem)}") from problem
            for name, value in zip(wanted, values, strict=True):
                if name in self._shown:
                    self._watch(name, value)
                if name in self._outputs:
                    outputs[name] = value
        return outputs

    def close(self) -> None:
        self._sessions = []


def open_session(model: Any, folder: Path, where: str, threads: int = 0) -> Any:
    """An onnxruntime.InferenceSession of an onnx.ModelProto in memory, on the CPU.

    folder: where the weights' file is. where: names the graph in messages. threads: 0 takes the physical cores.
    Raises EngineError.
    """
    from mammut_runtime.engines.onnxruntime import CPU, physical_cores
    from mammut_runtime.engines.onnxruntime import library as onnx_runtime

    ort = onnx_runtime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or physical_cores()
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = False  # an arena keeps the largest run's memory for good
    settings.log_severity_level = _ERRORS_ONLY
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    try:
        return ort.InferenceSession(model.SerializeToString(), sess_options=settings, providers=[CPU])
    except Exception as problem:
        raise EngineError(f"{where}: ONNX Runtime {ort.__version__} refuses it: {_line(problem)}") from problem


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:500]


def with_outputs(model: Any, names: Sequence[str], keep: bool = True) -> Any:
    """A copy of an onnx.ModelProto whose outputs are the old ones, if `keep`, and the tensors of these names.

    Nodes that no output needs are left to the engine to drop. Types of the new outputs are left to it too.
    """
    onnx = library()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not keep:
        del copy.graph.output[:]
    taken = {each.name for each in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in taken)
    return copy


def in_groups(names: Sequence[str], sizes: Mapping[str, int], budget_bytes: int) -> list[list[str]]:
    """The names in their order, cut into groups of at most that many bytes each (a larger tensor stands alone)."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = sizes.get(name, 0)
        if not groups or size > room:
            groups.append([])
            room = budget_bytes
        groups[-1].append(name)
        room -= size
    return groups


def estimated_bytes(model: Any, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Tensor -> bytes in a run with one picture or text, as far as ONNX can infer its shape.

    sizes: dimension -> its size; 1 for "batch" and "beams", 64 for any other that is not given.
    """
    onnx = library()
    given = {"batch": 1, "beams": 1, **(sizes or {})}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    for value in copy.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.dim_value = given.get(dimension.dim_param, 64)
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    found = {}
    for value in (*inferred.value_info, *inferred.output):
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        if all(shape):
            found[value.name] = int(np.prod(shape, dtype=np.int64)) * 4
    return found

"""Which nodes of a graph must stay in float32: found by running it on pictures and computing each node in float16.

For every node and every run: the largest value that it reads or writes; its result when its inputs are rounded to
float16; and its result when each of its own steps is rounded too (half_arithmetic.py). A node is an island when

- overflow: a value is larger than a quarter of what float16 holds (the pictures at hand are not all pictures);
- underflow: all values of a tensor are below float16's normal numbers;
- rounding: rounding its inputs changes its result by more than ERROR_LIMIT of the result's largest value. Then the node
  that makes the input is an island too, else nothing would be gained;
- arithmetic: computing it in float16 does.

What follows from the graph alone (typed.structural_islands) is added. The thresholds are constants and the pictures are
taken in their order: the same data give the same islands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mammut_calibration.activations import activation_names, read_graph
from mammut_calibration.data import Sample
from mammut_calibration.feeds import Feeds, record_feeds
from mammut_calibration.observe import ObservedEngine
from mammut_export import half_arithmetic, samples
from mammut_export.samples import TEXTS, drawn_samples
from mammut_export.typed import SMALLEST_NORMAL_HALF, structural_islands
from mammut_export.weights import LARGEST_HALF
from mammut_runtime.bundle import Bundle

Reason = Literal["overflow", "underflow", "rounding", "arithmetic", "graph"]
Array = NDArray[Any]

HEADROOM = 4
"""Values seen must leave this factor to float16's largest, 65,504."""
LARGEST = LARGEST_HALF / HEADROOM
ERROR_LIMIT = 2.0**-6
"""Of a node's largest result. A softmax over scores of 32 loses this much when they are rounded. With all nodes of the
demo below it (the worst at 6e-3) its outputs in float16 differ by 6e-4, a tenth of what a bundle may."""
PICTURES = 8
"""That an audit looks at, unless told otherwise."""
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Identity", "Concat"})


@dataclass(frozen=True)
class Island:
    """A node that computes in float32, and why."""

    node: str
    op_type: str
    reason: Reason
    largest: float
    """Largest finite value that it reads or writes."""
    error: float
    """Of its result in float16, as a part of the result's largest value; 0.0 where it was not computed."""
    detail: str = ""
    """For reason "graph": what."""

    def describe(self) -> str:
        """One line for a report."""
        if self.reason == "graph":
            return f"{self.node} ({self.op_type}): {self.detail}"
        error = "" if self.error == 0.0 else f", error {self.error:.2g} in float16"
        return f"{self.node} ({self.op_type}): {self.reason}, largest value {self.largest:.3g}{error}"


@dataclass(frozen=True)
class Audit:
    """What was found in one graph."""

    graph: str
    nodes: int
    """That compute with floats."""
    runs: int
    """Of the graph: calls with different inputs."""
    largest: float
    """Of all values that flow."""
    islands: tuple[Island, ...]
    """In the order of the graph."""

    @property
    def names(self) -> frozenset[str]:
        """For typed.for_tensorrt."""
        return frozenset(each.node for each in self.islands)

    def describe(self) -> list[str]:
        """For a report: a summary, then a line for each island."""
        summary = (
            f"{self.graph}: {len(self.islands)} of {self.nodes} nodes in float32; largest value {self.largest:.4g} "
            f"in {self.runs} runs"
        )
        return [summary, *(f"  {each.describe()}" for each in self.islands)]


def audit(
    reference: Bundle,
    feeds: Mapping[str, Sequence[Feeds]],
    *,
    threads: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Audit]:
    """Audit every graph of a float32 bundle. feeds: graph -> inputs, of record_feeds or drawn_feeds."""
    found = {}
    for name in reference.manifest.graphs:
        progress(f"auditing ranges of {name}")
        found[name] = audit_graph(reference.graph_path(name), name, feeds.get(name, ()), threads=threads)
    return found


def drawn_feeds(
    reference: Bundle, pictures: Sequence[samples.Sample] = (), *, threads: int = 0
) -> dict[str, list[Feeds]]:
    """Inputs for an audit without the user's data: the pictures that an export is checked with, drawn ones if none.

    Drawn ones are poor judges of what photographs do to a model; a report must say that they were used.
    """
    texts = itertools.cycle(TEXTS)
    shown = pictures[:PICTURES] or drawn_samples()
    found = [Sample(each.name, each.pixels, (next(texts),)) for each in shown]
    return record_feeds(reference, found, len(found), threads=threads)


def audit_graph(path: Path, name: str, feeds: Sequence[Feeds], *, threads: int = 0) -> Audit:
    """Audit one float32 graph file. Raises EngineError when it does not run."""
    graph = ir.load(path).graph
    auditor = _Auditor(graph)
    if feeds:
        engine = ObservedEngine(path, activation_names(read_graph(path), "all"), auditor.watch, threads=threads)
        try:
            for each in feeds:
                auditor.begin()
                engine.run(each)
        finally:
            engine.close()
    found = auditor.found
    for node, why in structural_islands(graph).items():
        found.setdefault(node, Island(node, "", "graph", 0.0, 0.0, why))
    order = {str(node.name): node.op_type for node in graph}
    islands = tuple(
        Island(node, kind, found[node].reason, found[node].largest, found[node].error, found[node].detail)
        for node, kind in order.items()
        if node in found
    )
    return Audit(name, len(auditor.judged), len(feeds), auditor.largest, islands)


class _Auditor:
    """Is shown the tensors of a run; judges a node when the last of its tensors has come."""

    def __init__(self, graph: ir.Graph) -> None:
        self._nodes = {str(node.name): node for node in graph}
        self._constants = {str(value.name): value for value in graph.initializers.values()}
        self._users: dict[str, list[str]] = {}
        for node in graph:
            for value in (*node.inputs, *node.outputs):
                if value is not None:
                    self._users.setdefault(str(value.name), []).append(str(node.name))
        self._shown: set[str] = set()
        self._values: dict[str, Array] = {}
        self.found: dict[str, Island] = {}
        self.judged: set[str] = set()
        self.largest = 0.0

    def begin(self) -> None:
        """A new run."""
        self._values.clear()
        self._shown.clear()

    def watch(self, tensor: str, value: Array) -> None:
        if value.dtype != np.float32:
            return
        self._values[tensor] = value
        self._shown.add(tensor)
        self._judge_tensor(tensor, value)
        for name in dict.fromkeys(self._users.get(tensor, ())):
            self._judge_if_complete(name)

    # --- what can be seen in one tensor -------------------------------------------------------------------------------

    def _judge_tensor(self, tensor: str, value: Array) -> None:
        finite = np.abs(value[np.isfinite(value)])
        largest = float(finite.max(initial=0.0))
        self.largest = max(self.largest, largest)
        reason: Reason
        if largest > LARGEST:
            reason = "overflow"
        elif 0 < largest < SMALLEST_NORMAL_HALF:
            reason = "underflow"
        else:
            return
        for name in self._users.get(tensor, ()):
            self._add(Island(name, "", reason, largest, 0.0))

    # --- what can be seen in one node ---------------------------------------------------------------------------------

    def _judge_if_complete(self, name: str) -> None:
        node = self._nodes[name]
        compute = half_arithmetic.operator(node.op_type)
        floats = [value for value in node.inputs if value is not None and str(value.name) not in self._constants]
        if not floats or not all(str(value.name) in self._shown for value in floats):
            return
        self.judged.add(name)
        if compute is None:
            return
        inputs = [self._array(value) for value in node.inputs if value is not None]
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        self._judge(node, compute, inputs, attributes)

    def _judge(
        self, node: ir.Node, compute: half_arithmetic.Operator, inputs: list[Array], attributes: Mapping[str, Any]
    ) -> None:
        half = half_arithmetic.HALF
        with np.errstate(all="ignore"):
            rounded = [half.round(value) if value.dtype == np.float32 else value for value in inputs]
            exact = compute(half_arithmetic.EXACT, inputs, attributes)
            of_rounded = compute(half_arithmetic.EXACT, rounded, attributes)
            in_half = compute(half, rounded, attributes)
        rounding, arithmetic = _error(of_rounded, exact), _error(in_half, of_rounded)
        largest = max(
            (float(np.abs(each[np.isfinite(each)]).max(initial=0.0)) for each in (*inputs, exact)), default=0.0
        )
        if rounding > ERROR_LIMIT:
            self._add(Island(str(node.name), "", "rounding", largest, rounding))
            for index, value in enumerate(inputs):
                if value.dtype != np.float32:
                    continue
                alone = [rounded[i] if i == index else each for i, each in enumerate(inputs)]
                with np.errstate(all="ignore"):
                    error = _error(compute(half_arithmetic.EXACT, alone, attributes), exact)
                if error > ERROR_LIMIT:
                    given = [each for each in node.inputs if each is not None][index]
                    for source in _makers(given):
                        self._add(Island(source, "", "rounding", largest, error))
        elif arithmetic > ERROR_LIMIT:
            self._add(Island(str(node.name), "", "arithmetic", largest, arithmetic))

    def _array(self, value: ir.Value) -> Array:
        name = str(value.name)
        if name in self._values:
            return self._values[name]
        tensor = self._constants[name].const_value
        assert tensor is not None
        return np.asarray(tensor.numpy())

    def _add(self, island: Island) -> None:
        """The reason that was found first stays; the figures are the worst."""
        known = self.found.get(island.node)
        if known is None:
            self.found[island.node] = island
            return
        largest, error = max(known.largest, island.largest), max(known.error, island.error)
        self.found[island.node] = Island(island.node, "", known.reason, largest, error)


def _makers(value: ir.Value) -> Iterator[str]:
    """The node that computes a value, and what moves it on the way."""
    for _ in itertools.count():
        node = value.producer()
        if node is None:
            return
        yield str(node.name)
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return
        value = node.inputs[0]


def _error(got: Array, wanted: Array) -> float:
    """Largest difference as a part of the largest wanted value; infinite where a finite value was lost."""
    finite = np.isfinite(wanted)
    if got.shape != wanted.shape or not finite.any():
        return 0.0
    largest = float(np.abs(wanted[finite]).max())
    if not np.isfinite(got[finite]).all():
        return float("inf")
    difference = float(np.abs(got[finite].astype(np.float64) - wanted[finite]).max())
    return difference / largest if largest else 0.0

"""Makes a quantized bundle that passes the gate: calibrates, quantizes, judges, and keeps layers higher until it does.

The gate compares the quantized bundle with the same checkpoint in float32, on the user's pictures that calibration did
not see (mammut_calibration.drift). A bundle that fails is made again with the layers that hurt most left in floating
point (of int4 graphs: in 8 bits first), twice as many each time. What still fails is not published, unless the user
accepts it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mammut_calibration.behaviour import Behaviour, observe
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset
from mammut_calibration.drift import Drift, DriftLimits, compare
from mammut_calibration.feeds import Feeds, record_feeds
from mammut_calibration.table import CalibrationTable
from mammut_export.precisions import QUANTIZED, SCHEMES
from mammut_export.quantize import QuantizedLayers, higher_scheme, write_quantized
from mammut_export.range_audit import PICTURES, Audit, audit, drawn_feeds
from mammut_export.samples import Sample
from mammut_export.sensitivity import LayerSensitivity, rank_layers
from mammut_export.typed_bundle import write_typed
from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import GraphInfo, Scheme

FIRST_KEPT = 2
"""Layers that are kept higher after the first failure; then twice as many, and so on."""
MOST_KEPT_BY_AUTO = 0.25
"""Share of all layers: with more kept higher, `auto` takes the next precision of a graph at fault."""
WARM_UP, TIMED_RUNS = 3, 15
_AT_FAULT = {
    "embedding_cosine_mean": ("vision",),
    "embedding_cosine_min": ("vision",),
    "text_cosine_mean": ("text",),
    "text_cosine_min": ("text",),
    "retrieval_agreement": ("vision", "text"),
    "token_agreement": ("decoder", "memory", "vision"),
    "forced_token_agreement": ("decoder", "memory", "vision"),
    "caption_agreement": ("decoder", "memory", "vision"),
    "answer_agreement": ("decoder", "memory", "vision"),
    "clip_cosine_mean": ("video",),
    "clip_cosine_min": ("video",),
    "clip_forced_token_agreement": ("decoder", "memory", "video"),
    "detection_agreement": ("detector", "text"),
}
"""Measure of drift → graphs that can spoil it, the likeliest first."""

Complete = Callable[[Path, Mapping[str, GraphInfo], Mapping[str, Scheme]], object]
"""Completes a folder that has graphs and weights to a bundle that can be opened."""


@dataclass(frozen=True)
class Round:
    """One attempt at the gate."""

    schemes: dict[str, Scheme]
    kept: int
    """Layers kept higher on purpose."""
    keep_as: dict[str, Scheme]
    """Graph → what these became."""
    failures: tuple[str, ...]
    """In words; empty if it passed."""


@dataclass(frozen=True)
class GraphTime:
    """A graph on this machine, with one of the user's pictures."""

    graph: str
    scheme: Scheme
    milliseconds: float
    """Median."""


@dataclass(frozen=True)
class Quantized:
    """The outcome of the gate."""

    schemes: dict[str, Scheme]
    graphs: dict[str, GraphInfo]
    layers: tuple[QuantizedLayers, ...]
    drift: Drift | None
    """None: there were no data to judge with, and the user accepted that."""
    limits: DriftLimits
    rounds: tuple[Round, ...]
    ranking: tuple[LayerSensitivity, ...]
    """The layers that hurt, worst first; empty if nothing had to be kept."""
    times: tuple[GraphTime, ...]
    """What `auto` chose from; else empty."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the gate is not passed, in words."""
        if self.drift is None:
            return ("the drift was not measured: there were no data",)
        return tuple(map(str, self.drift.failures(self.limits)))


class Gate:
    """The reference, the user's data and the limits; `make` and `make_fastest` give bundles that are held to them."""

    def __init__(
        self,
        reference: Bundle,
        target: str,
        data: Dataset | None,
        complete: Complete,
        *,
        limits: DriftLimits | None = None,
        table: CalibrationTable | None = None,
        options: EngineOptions | None = None,
        pictures: Sequence[Sample] = (),
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        """reference: float32, for an engine of this machine. data: pictures to calibrate and to judge with, or None.
        table: a calibration of the reference that was made before. options: for all engines. pictures: to
        audit ranges with where there are no data."""
        self._reference, self._target, self._complete = reference, target, complete
        parts: tuple[Dataset, Dataset] | tuple[None, None] = data.split() if data is not None else (None, None)
        self._calibration: Dataset | None = parts[0]
        self._held_out: Dataset | None = parts[1]
        self._limits, self._table = limits or DriftLimits(), table
        self._options, self._progress, self._pictures = options or EngineOptions(), progress, tuple(pictures)
        self._before: Behaviour | None = None
        self._feeds: dict[str, list[Feeds]] | None = None
        self._rounds: list[Round] = []
        self.audits: dict[str, Audit] = {}
        """Graph → which nodes stay in float32 and why; only for tensorrt."""
        if table is not None:
            table.check_fits(reference)
            if self._calibration is not None and table.header.data_hash != self._calibration.content_hash:
                raise InputError(
                    "the calibration table was made from other pictures than --calibration leaves for it, so it may "
                    "know those that are to judge; run mammut-calibrate on the same data, with its usual --held-out"
                )

    def make(self, folder: Path, schemes: Mapping[str, Scheme], *, most_kept: float = 1.0) -> Quantized:
        """Write the bundle into `folder`, whose files are replaced; the last attempt stays there, passed or not.

        most_kept: share of the layers that may be kept higher to pass. Layers of int4 graphs become 8 bits first, where
        the target has that, and floating point if it does not help.
        """
        made = self._attempt(folder, schemes, {}, {})
        if made.drift is None or not made.failures or not QUANTIZED & set(schemes.values()):
            return made
        self._progress("looking for the layers that hurt")
        ranking = self._rank(schemes)
        layers = _quantized_layers(made)
        for keep_as in self._higher(schemes):
            keep: dict[str, frozenset[str]] = {}
            more = FIRST_KEPT
            while made.failures:
                wider = _keep_more(made, ranking, keep, more)
                if wider == keep or _count(wider) > most_kept * layers:
                    break
                keep, more = wider, 2 * more
                made = self._attempt(folder, schemes, keep, keep_as)
        return dataclasses.replace(made, ranking=ranking)

    def _rank(self, schemes: Mapping[str, Scheme]) -> tuple[LayerSensitivity, ...]:
        """Of the quantized layers; for tensorrt, before the graphs are typed."""
        with tempfile.TemporaryDirectory(prefix="mammut-ranking-") as scratch:
            write_quantized(self._reference, Path(scratch), schemes, self._target, self._ranges(set(schemes.values())))
            return rank_layers(self._reference, Path(scratch), schemes, self._recorded(), threads=self._options.threads)

    def _higher(self, schemes: Mapping[str, Scheme]) -> tuple[dict[str, Scheme], ...]:
        """What kept layers of each graph become, in order of trying."""
        calibrated = self._calibration is not None
        first = {graph: higher_scheme(scheme, self._target, calibrated) for graph, scheme in schemes.items()}
        last: dict[str, Scheme] = dict.fromkeys(schemes, "fp32")
        return (last,) if first == last else (first, last)

    def make_fastest(self, folder: Path) -> Quantized:
        """As `make`, each graph in the precision that is fastest here among those with which the gate is passed."""
        times = list(self._time_all())
        order: dict[str, list[Scheme]] = {name: [] for name in self._reference.manifest.graphs}
        for each in sorted(times, key=lambda each: each.milliseconds):
            order[each.graph].append(each.scheme)
        while True:
            schemes = {graph: fastest[0] for graph, fastest in order.items()}
            made = dataclasses.replace(self.make(folder, schemes, most_kept=MOST_KEPT_BY_AUTO), times=tuple(times))
            slower = self._not_the_fastest(folder, made, times)
            if made.failures:
                slower = next((graph for graph in _at_fault(made) if order[graph][0] != "fp32"), None)
            if slower is None:
                return made
            order[slower].pop(0)

    def _not_the_fastest(self, folder: Path, made: Quantized, times: list[GraphTime]) -> str | None:
        """A graph that, with the layers that were kept higher, is slower than it is in its next precision."""
        kept = [each for each in made.layers if each.kept and made.rounds[-1].kept]
        for each in kept:
            rest = [t for t in times if t.graph == each.graph and t.scheme != each.scheme]
            before = next(t for t in times if t.graph == each.graph and t.scheme == "fp32")
            paths: dict[Scheme, Path] = {
                "fp32": self._reference.graph_path(each.graph),
                each.scheme: folder / made.graphs[each.graph].file,
            }
            now = _time_graph(each.graph, paths, self._target, self._recorded()[each.graph][-1], self._options)
            share = now[1].milliseconds / now[0].milliseconds
            if each.scheme != "fp32" and any(t.milliseconds / before.milliseconds < share for t in rest):
                return each.graph
        return None

    def _attempt(
        self,
        folder: Path,
        schemes: Mapping[str, Scheme],
        keep: Mapping[str, frozenset[str]],
        keep_as: Mapping[str, Scheme],
    ) -> Quantized:
        for each in folder.iterdir():
            each.unlink()
        graphs, layers = self._write(folder, schemes, keep, keep_as)
        self._complete(folder, graphs, schemes)
        drift = self._judge(folder)
        failures = tuple(map(str, drift.failures(self._limits))) if drift else ()
        self._rounds.append(Round(dict(schemes), _count(keep), dict(keep_as), failures))
        return Quantized(dict(schemes), graphs, layers, drift, self._limits, tuple(self._rounds), (), ())

    def _write(
        self,
        folder: Path,
        schemes: Mapping[str, Scheme],
        keep: Mapping[str, frozenset[str]],
        keep_as: Mapping[str, Scheme],
    ) -> tuple[dict[str, GraphInfo], tuple[QuantizedLayers, ...]]:
        table = self._ranges({*schemes.values(), *(keep_as[graph] for graph in keep)})
        if self._target != "tensorrt":
            return write_quantized(
                self._reference,
                folder,
                schemes,
                self._target,
                table,
                keep=keep,
                keep_as=keep_as,
                progress=self._progress,
            )
        if not self.audits and set(schemes.values()) != {"fp32"}:
            self.audits = audit(
                self._reference, self._recorded(), threads=self._options.threads, progress=self._progress
            )
        islands = {graph: found.names for graph, found in self.audits.items()}
        return write_typed(
            self._reference, folder, schemes, table, islands, keep=keep, keep_as=keep_as, progress=self._progress
        )

    def _judge(self, folder: Path) -> Drift | None:
        if self._held_out is None:
            return None
        if self._before is None:
            self._progress("observing the float32 bundle")
            self._before = observe(self._reference, self._held_out, options=self._options)
        self._progress("observing the quantized bundle")
        return compare(self._before, observe(folder, self._held_out, reference=self._before, options=self._options))

    def _ranges(self, schemes: set[Scheme]) -> CalibrationTable | None:
        """The calibration, made when it is first needed."""
        if self._table is None and "int8" in schemes:
            if self._calibration is None:
                raise InputError("int8 needs the ranges of your data; give pictures with --calibration")
            self._progress(f"calibrating on {len(self._calibration)} pictures")
            calibrate_options = CalibrateOptions(threads=self._options.threads)
            self._table = calibrate(self._reference, self._calibration, calibrate_options)
        return self._table

    def _recorded(self) -> dict[str, list[Feeds]]:
        """Inputs of the graphs for a few pictures: of the data, or drawn ones."""
        if self._feeds is None:
            threads = self._options.threads
            if self._calibration is None:
                self._feeds = drawn_feeds(self._reference, self._pictures, threads=threads)
            else:
                self._feeds = record_feeds(self._reference, self._calibration, PICTURES, threads=threads)
        return self._feeds

    def _time_all(self) -> tuple[GraphTime, ...]:
        """Every graph in every precision that the target has and a processor may gain from."""
        schemes = [scheme for scheme in SCHEMES[self._target] if scheme in QUANTIZED]
        times: list[GraphTime] = []
        graphs = tuple(self._reference.manifest.graphs)
        feeds = self._recorded()
        with tempfile.TemporaryDirectory(prefix="mammut-auto-") as scratch:
            paths: dict[str, dict[Scheme, Path]] = {name: {"fp32": self._reference.graph_path(name)} for name in graphs}
            for scheme in schemes:
                each = dict.fromkeys(graphs, scheme)
                folder = Path(scratch) / scheme
                folder.mkdir()
                found, _ = write_quantized(
                    self._reference, folder, each, self._target, self._ranges({scheme}), progress=self._progress
                )
                for name in graphs:
                    paths[name][scheme] = folder / found[name].file
            for name in graphs:
                self._progress(f"timing {name}")
                times += _time_graph(name, paths[name], self._target, feeds[name][-1], self._options)
        return tuple(times)


def _time_graph(
    name: str, paths: Mapping[Scheme, Path], target: str, feeds: Feeds, options: EngineOptions
) -> list[GraphTime]:
    """Taken in turns, so that other work on the machine slows all of them alike."""
    taken: dict[Scheme, list[float]] = {scheme: [] for scheme in paths}
    with contextlib.ExitStack() as stack:
        engines = {
            scheme: stack.enter_context(contextlib.closing(open_engine(path, target, options)))
            for scheme, path in paths.items()
        }
        for run in range(WARM_UP + TIMED_RUNS):
            for scheme, engine in engines.items():
                started = time.perf_counter()
                engine.run(feeds)
                if run >= WARM_UP:
                    taken[scheme].append(1000 * (time.perf_counter() - started))
    return [GraphTime(name, scheme, statistics.median(each)) for scheme, each in taken.items()]


def _at_fault(made: Quantized) -> list[str]:
    """Quantized graphs that can have caused the failures, the likeliest first."""
    failed = made.drift.failures(made.limits) if made.drift else ()
    graphs = dict.fromkeys(graph for failure in failed for graph in _AT_FAULT[failure.measure])
    quantized = {each.graph for each in made.layers if each.quantized or each.eight_bits}
    return [graph for graph in graphs if graph in quantized]


def _keep_more(
    made: Quantized, ranking: Sequence[LayerSensitivity], keep: Mapping[str, frozenset[str]], more: int
) -> dict[str, frozenset[str]]:
    """`keep` and the `more` worst layers of the graphs at fault; equal to `keep` if there are none left."""
    graphs = _at_fault(made)
    ranked = [each for each in ranking if each.graph in graphs and each.layer not in keep.get(each.graph, ())]
    wider = dict(keep)
    for each in ranked[:more]:
        wider[each.graph] = wider.get(each.graph, frozenset()) | {each.layer}
    return wider


def _count(keep: Mapping[str, frozenset[str]]) -> int:
    return sum(map(len, keep.values()))


def _quantized_layers(made: Quantized) -> int:
    return sum(len(each.quantized) for each in made.layers)

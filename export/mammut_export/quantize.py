"""Turns a bundle's float32 graphs into quantized ones, each graph with its own scheme, and stores them together.

The rewriting is ours and not an engine's quantizer: names stay, so that every layer can be compared with its original;
weights are shared by content between graphs; and nothing appears in a graph that an engine would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mammut_calibration.statistics import Method, Range
from mammut_calibration.table import CalibrationTable
from mammut_export import onnx_graphs
from mammut_export.precisions import QUANTIZED, SCHEMES
from mammut_export.quantize_nodes import Rewriter, float_layers, names_of
from mammut_export.quantize_weights import PackingStore
from mammut_export.weights import halve_matrices, move_to_store
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.manifest import WEIGHTS_FILE, GraphInfo, Scheme

INT4_BLOCK = 32
"""Weights that share a scale. Measured on ONNX Runtime: 64 makes a decoder of B-32's size 10 % faster and the demo's
answers worse (0.84 of them the same in place of 0.90)."""


@dataclass(frozen=True)
class QuantizedLayers:
    """What became of the layers of one graph: names of nodes, in the order of the graph."""

    graph: str
    scheme: Scheme
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    """Not in the scheme but higher: asked for, or no usable range was seen, or of a form that is not quantized. In
floating point, except those in `eight_bits`."""
    eight_bits: tuple[str, ...] = ()
    """Of `kept`: layers of an int4 graph that were asked for and are in 8 bits."""


def check_scheme(scheme: str, target: str) -> None:
    """Raises InputError for an unknown target, and for a scheme that the target does not run."""
    if target not in SCHEMES:
        raise InputError(f"target: expected one of {', '.join(SCHEMES)}, got {target!r}")
    if scheme not in SCHEMES[target]:
        raise InputError(f"precision for {target}: expected one of {', '.join(SCHEMES[target])}, got {scheme!r}")


def higher_scheme(scheme: Scheme, target: str, calibrated: bool) -> Scheme:
    """What to make of the layers of a graph that hurt too much in a scheme: `keep_as`, first.

    int8 for int4, because it is far closer to float32 than to int4 in error and closer to int4 in speed: the demo's
    decoder with 8 of 26 layers kept was 1.86 times as fast as in float32 with int8-dynamic, and 1.41 times with fp32.
    calibrated: whether there are ranges.
    """
    if scheme != "int4":
        return "fp32"
    if "int8-dynamic" in SCHEMES[target]:
        return "int8-dynamic"
    return "int8" if calibrated else "fp32"


def quantize_graph(
    model: ir.Model,
    graph: str,
    scheme: Scheme,
    target: str,
    ranges: Mapping[str, Range] | None,
    keep: frozenset[str] = frozenset(),
    *,
    keep_as: Scheme = "fp32",
    block: int = INT4_BLOCK,
) -> QuantizedLayers:
    """Rewrite a float32 graph in place; say what was quantized.

    ranges: of activations, by tensor name (CalibrationTable.ranges); needed for int8. keep: layers that are not to be
    in the scheme; keep_as: what they are to be instead, see `higher_scheme`. block: for int4, weights that share a
    scale, at most; a power of two from 8 on.

    fp16 stores matrices in half where the engine computes in float32; for tensorrt the graph is left as it is, since
    there a typed half graph is made of it (typed.py). Raises InputError for a scheme that the target does not run,
    for int8 without ranges, and for layers to keep that the graph does not have.
    """
    check_scheme(scheme, target)
    check_scheme(keep_as, target)
    layers = float_layers(model)
    names = tuple(names_of(layers))
    if unknown := sorted(keep - set(names)):
        raise InputError(f"{graph}: no layer {unknown[0]!r} to keep; expected names such as {names[0]!r}")
    if ranges is None and (scheme == "int8" or (keep and keep_as == "int8")):
        raise InputError(f"{graph}: int8 needs the ranges of activations; calibrate first (mammut-calibrate)")
    if scheme == "fp16" and target != "tensorrt":
        halve_matrices(model)
    if scheme in ("fp32", "fp16"):
        return QuantizedLayers(graph, scheme, (), ())
    rewriter = Rewriter(model.graph, target, ranges, block)
    became: dict[str, Scheme] = {}
    for name, node in zip(names, layers, strict=True):
        wanted = keep_as if name in keep else scheme
        became[name] = wanted if wanted in QUANTIZED and rewriter.rewrite(node, wanted) else "fp32"
    rewriter.drop_unused()
    return QuantizedLayers(
        graph,
        scheme,
        quantized=tuple(name for name in names if name not in keep and became[name] == scheme),
        kept=tuple(name for name in names if name in keep or became[name] != scheme),
        eight_bits=tuple(name for name in names if name in keep and became[name] != "fp32"),
    )


def write_quantized(
    reference: Bundle,
    folder: Path,
    schemes: Mapping[str, Scheme],
    target: str,
    table: CalibrationTable | None,
    *,
    method: Method = "minmax",
    keep: Mapping[str, frozenset[str]] | None = None,
    keep_as: Mapping[str, Scheme] | None = None,
    block: int = INT4_BLOCK,
    finish: Callable[[ir.Model, str, Scheme], None] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[dict[str, GraphInfo], tuple[QuantizedLayers, ...]]:
    """Write every graph of a float32 bundle, quantized, and one weights.bin into a folder; no manifest.

    schemes: graph -> scheme; a graph that is not named stays float32. table: needed where a scheme is int8.
    keep: graph -> layers that are not to be in its scheme. keep_as: graph -> what they become; fp32 where it is not
    named. block: as in quantize_graph. finish: is given each graph, its name and scheme before it is stored, and may
    change it and its types. Raises InputError for what does not fit together.
    """
    keep = keep or {}
    _check_request(reference, schemes, target, table, keep)
    found: dict[str, GraphInfo] = {}
    reports = []
    with PackingStore(folder / WEIGHTS_FILE) as store:
        for name, info in reference.manifest.graphs.items():
            scheme = schemes.get(name, "fp32")
            progress(f"quantizing {name} to {scheme}")
            model = ir.load(reference.graph_path(name))
            kept = keep.get(name, frozenset())
            higher = (keep_as or {}).get(name, "fp32")
            asked = scheme == "int8" or (kept and higher == "int8")
            ranges = table.ranges(name, method) if table is not None and asked else None
            reports.append(quantize_graph(model, name, scheme, target, ranges, kept, keep_as=higher, block=block))
            if finish is not None:
                finish(model, name, scheme)
            move_to_store(model, store)
            onnx_graphs.save(model, folder / info.file)
            found[name] = onnx_graphs.graph_info(model, info.file)
            if finish is None and found[name] != info:
                raise EngineError(
                    f"{name}: quantizing changed the graph's inputs or outputs; this is a mistake of ours"
                )
    for info in found.values():
        onnx_graphs.check_file(folder / info.file)
    return found, tuple(reports)


def _check_request(
    reference: Bundle,
    schemes: Mapping[str, Scheme],
    target: str,
    table: CalibrationTable | None,
    keep: Mapping[str, frozenset[str]],
) -> None:
    manifest = reference.manifest
    if manifest.precision != "fp32":
        raise InputError(f"{reference.path}: expected an fp32 bundle to quantize, got {manifest.precision}")
    for name in (*schemes, *keep):
        if name not in manifest.graphs:
            raise InputError(f"no graph {name!r} in the bundle, only {', '.join(manifest.graphs)}")
    for scheme in schemes.values():
        check_scheme(scheme, target)
    if "int8" in schemes.values():
        if table is None:
            raise InputError("int8 needs the ranges of activations; calibrate first (mammut-calibrate)")
        table.check_fits(reference)

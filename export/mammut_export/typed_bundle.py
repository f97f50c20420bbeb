"""Writes every graph of a float32 bundle as TensorRT wants it: quantized by its scheme, typed, checked by the lint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from mammut_calibration.statistics import Method
from mammut_calibration.table import CalibrationTable
from mammut_export.quantize import INT4_BLOCK, QuantizedLayers, write_quantized
from mammut_export.typed import for_tensorrt
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import EngineError
from mammut_runtime.manifest import GraphInfo, Scheme
from mammut_runtime.tensorrt_lint import lint_graph


def write_typed(
    reference: Bundle,
    folder: Path,
    schemes: Mapping[str, Scheme],
    table: CalibrationTable | None = None,
    islands: Mapping[str, frozenset[str]] | None = None,
    *,
    method: Method = "minmax",
    keep: Mapping[str, frozenset[str]] | None = None,
    keep_as: Mapping[str, Scheme] | None = None,
    block: int = INT4_BLOCK,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[dict[str, GraphInfo], tuple[QuantizedLayers, ...]]:
    """The .onnx files and one weights.bin, in `folder`; no manifest. What quantize.write_quantized is for the others.

    schemes: graph -> scheme; a graph that is not named stays float32. table: needed where a scheme is int8. islands:
    graph -> nodes that stay float32 (range_audit.Audit.names). keep, keep_as: as in write_quantized.
    What flows between the graphs is float16 unless all schemes are fp32. Raises EngineError, which names the node, for
    a graph that TensorRT would refuse.
    """
    half = any(schemes.get(name, "fp32") != "fp32" for name in reference.manifest.graphs)

    def finish(model: ir.Model, name: str, scheme: Scheme) -> None:
        for_tensorrt(model, scheme, (islands or {}).get(name, frozenset()), half=half)

    found, layers = write_quantized(
        reference,
        folder,
        schemes,
        "tensorrt",
        table,
        method=method,
        keep=keep,
        keep_as=keep_as,
        block=block,
        finish=finish,
        progress=progress,
    )
    for name, info in found.items():
        findings = [each for each in lint_graph(folder / info.file) if each.rule != "profile"]
        if findings:
            more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
            raise EngineError(f"TensorRT would not take {name}: {findings[0].describe()}{more}")
    return found, layers

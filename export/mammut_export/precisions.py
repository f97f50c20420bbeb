"""Which precisions a target has, and what a user's `--precision` means for each graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from mammut_runtime.errors import InputError
from mammut_runtime.manifest import QuantizationInfo, Scheme

Target = Literal["onnxruntime", "openvino", "tensorrt"]
TARGETS: tuple[Target, ...] = get_args(Target)
AUTO = "auto"
SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8", "int8-dynamic", "int4"),
    "openvino": ("fp32", "fp16", "int8", "int4"),
    "tensorrt": ("fp32", "fp16", "int8", "int4"),
}
"""Target → precisions of its graphs. OpenVINO runs int8-dynamic slower than fp32, TensorRT does not take it."""
QUANTIZED: frozenset[Scheme] = frozenset({"int8", "int8-dynamic", "int4"})
"""Those that change what the model says, and so must pass the gate."""
DESCRIPTION = (
    "fp32; fp16: half the size; int8; int8-dynamic: no ranges needed; int4: the smallest; auto: the fastest on this "
    "machine that passes the gate; or by graph, such as vision=int8,decoder=int4"
)


def parse_precision(text: str, graphs: Sequence[str], target: str) -> dict[str, Scheme]:
    """Graph → precision. `text`: one precision for all, or GRAPH=PRECISION pairs; graphs not named are fp32.

    Raises InputError for an unknown target, graph or precision; it says which there are.
    """
    if target not in SCHEMES:
        raise InputError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if "=" not in text:
        return dict.fromkeys(graphs, _scheme(text, target))
    chosen: dict[str, Scheme] = dict.fromkeys(graphs, "fp32")
    for pair in text.split(","):
        graph, _, name = (part.strip() for part in pair.partition("="))
        if graph not in chosen:
            raise InputError(f"precision: no graph {graph!r} in this bundle, only {', '.join(graphs)}")
        chosen[graph] = _scheme(name, target)
    return chosen


def precision_name(schemes: Mapping[str, Scheme]) -> str:
    """For the manifest: the one precision, or "mixed"."""
    names = set(schemes.values())
    return names.pop() if len(names) == 1 else "mixed"


def quantization_info(
    scheme: Scheme, target: str, drift: Mapping[str, float] | None = None, kept: Sequence[str] = ()
) -> QuantizationInfo:
    """What the manifest says of a graph. Weights of TensorRT's graphs are typed: what is not 8 or 4 bits is float16."""
    rest: Literal["float16", "float32"] = "float16" if target == "tensorrt" and scheme != "fp32" else "float32"
    measured = dict(drift or {})
    if scheme == "fp32":
        return QuantizationInfo("float32", "float32", measured)
    if scheme == "fp16":
        return QuantizationInfo("float16", rest, measured)
    if scheme == "int4":
        return QuantizationInfo("int4", rest, measured, tuple(kept))
    activations: Literal["uint8", "int8"] = "uint8" if target == "onnxruntime" else "int8"
    return QuantizationInfo("int8", activations, measured, tuple(kept))


def _scheme(name: str, target: str) -> Scheme:
    for scheme in SCHEMES[target]:
        if name == scheme:
            return scheme
    if name == AUTO:
        raise InputError(f"precision: {AUTO} is for all graphs together; give it alone")
    raise InputError(
        f"precision: expected one of {', '.join(SCHEMES[target])} or {AUTO} for target {target}, got {name!r}"
    )

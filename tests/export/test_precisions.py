from __future__ import annotations

import pytest

from mammut_export.precisions import parse_precision, precision_name, quantization_info
from mammut_runtime.errors import InputError

GRAPHS = ("vision", "text", "memory", "decoder")


def test_one_for_all() -> None:
    schemes = parse_precision("int8", GRAPHS, "openvino")
    assert schemes == dict.fromkeys(GRAPHS, "int8")
    assert precision_name(schemes) == "int8"


def test_by_graph() -> None:
    schemes = parse_precision("vision=int8, decoder = int4", GRAPHS, "onnxruntime")
    assert schemes == {"vision": "int8", "text": "fp32", "memory": "fp32", "decoder": "int4"}
    assert precision_name(schemes) == "mixed"


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("int3", "onnxruntime", "one of fp32, fp16, int8, int8-dynamic, int4 or auto for target onnxruntime, got"),
        ("int8-dynamic", "openvino", "one of fp32, fp16, int8, int4 or auto for target openvino, got 'int8-dynamic'"),
        ("fp32", "coreml", "target: expected one of onnxruntime, openvino, tensorrt, got 'coreml'"),
        ("detector=int8", "openvino", "no graph 'detector' in this bundle, only vision, text, memory, decoder"),
        ("vision=", "openvino", "got ''"),
        ("vision=int8,auto", "openvino", "no graph 'auto'"),
        ("", "openvino", "got ''"),
    ],
)
def test_unknown(text: str, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_precision(text, GRAPHS, target)


@pytest.mark.parametrize(
    ("scheme", "target", "weights", "activations"),
    [
        ("fp32", "tensorrt", "float32", "float32"),
        ("fp16", "onnxruntime", "float16", "float32"),
        ("fp16", "tensorrt", "float16", "float16"),
        ("int8", "onnxruntime", "int8", "uint8"),
        ("int8", "openvino", "int8", "int8"),
        ("int8-dynamic", "onnxruntime", "int8", "uint8"),
        ("int4", "openvino", "int4", "float32"),
        ("int4", "tensorrt", "int4", "float16"),
    ],
)
def test_what_the_manifest_says(scheme: str, target: str, weights: str, activations: str) -> None:
    info = quantization_info(scheme, target)  # type: ignore[arg-type]
    assert (info.weights, info.activations) == (weights, activations)

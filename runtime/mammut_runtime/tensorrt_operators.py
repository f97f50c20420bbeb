"""Which ONNX operators TensorRT takes, and on which kinds of numbers: the parser's published list, as a table.

Sources: onnx-tensorrt, docs/operators.md, of release 10.1 (opset 9 to 20; commit 96e7811, June 2024) and of 10.15
(opset 9 to 24): https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md. A bundle serves TensorRT 10.3
(JetPack 6) and later, so what only the later list has counts as missing. Where later versions take more types than
10.1 did, the table is the older one: a check that is too strict costs an operator, one that is too lax a device.
"""

from __future__ import annotations

from mammut_runtime import onnx_reader as onnx

FLOATS, INTEGERS, TRUTHS, QUANTIZED, BYTES = "floats", "integers", "truths", "quantized", "bytes"
KINDS = {
    onnx.FLOAT: FLOATS,
    onnx.FLOAT16: FLOATS,
    onnx.BFLOAT16: FLOATS,
    onnx.DOUBLE: FLOATS,
    onnx.INT32: INTEGERS,
    onnx.INT64: INTEGERS,
    onnx.BOOL: TRUTHS,
    onnx.INT8: QUANTIZED,
    onnx.INT4: QUANTIZED,
    17: QUANTIZED,
    onnx.UINT8: BYTES,
}
"""Element type -> kind. Types that are not here, TensorRT does not have."""
OLDEST_OPSET, NEWEST_OPSET = 9, 24


def _table() -> dict[str, frozenset[str]]:
    floats = (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum DeformConv Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf "
        "LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool "
        "MeanVarianceNormalization Mish NonMaxSuppression NonZero ParametricSoftplus Pow PRelu QuantizeLinear "
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RNN RoiAlign Round ScaledTanh "
        "Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"
    )
    numbers = (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min "
        "Mod Mul Neg Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK Pad"
    )
    anything = (
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"
    )
    found = dict.fromkeys(floats.split(), frozenset({FLOATS}))
    found |= dict.fromkeys(numbers.split(), frozenset({FLOATS, INTEGERS}))
    found |= dict.fromkeys(anything.split(), frozenset({FLOATS, INTEGERS, TRUTHS}))
    found |= dict.fromkeys(("And", "Not", "Or", "Xor"), frozenset({TRUTHS}))
    found |= dict.fromkeys(("Cast", "CastLike"), frozenset({FLOATS, INTEGERS, TRUTHS, BYTES}))
    found["DequantizeLinear"] = frozenset({QUANTIZED})
    return found


OPERATORS = _table()
"""Operator -> the kinds that its data may have."""
NEWER = frozenset(
    {"Attention", "BlackmanWindow", "HammingWindow", "HannWindow", "RMSNormalization", "RotaryEmbedding", "STFT"}
)
"""In the list of 10.15 and not in that of 10.1."""
PLUGINS = frozenset({"NonMaxSuppression", "RoiAlign"})
"""In the list, and run by a plugin or a special layer: tensorrt-rtx 1.7 has no kernel for either."""
CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
         "ReduceProd", "ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze", "CumSum", "OneHot"), (1,),
    ),
    "Slice": (3,),
    "Pad": (3,),
}  # fmt: skip
"""Operator -> inputs that must be known when the engine is built (axes, mostly)."""
FLOATS_ONLY_ALIKE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "MatMul", "Gemm", "Conv", "Concat", "Equal", "Greater",
     "GreaterOrEqual", "Less", "LessOrEqual", "LayerNormalization", "Where", "PRelu", "Clip", "QuantizeLinear"}
)  # fmt: skip
"""Operators whose floats must all be of one type: a strongly typed network converts nothing by itself."""
LARGEST_TOP_K = 3840

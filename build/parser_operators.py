"""What TensorRT's ONNX parser takes: operators and the types of their data.

Source: docs/operators.md of github.com/onnx/onnx-tensorrt, read at two releases,
    TensorRT 10.15   commit fa5aa9f61e7781d2ca8f5351d42c1f19525a6124
    TensorRT 11.0    commit 2f3fa349247d9ff52d7662cb995c82278df31a86 (10.15's table and Swish)
No other release from 10.15 on was at hand. Between these two the table grew by one row, so each version
is held to the newest of the two that is not newer than itself: 10.16 to 10.15's, 11.1 to 11.4 to 11.0's.
Three operators that ONNX dropped before opset 9 are left out.
The mode of TensorScatter is from the bindings, where KVCacheMode has LINEAR alone (10.15 to 11.4).
"""

from __future__ import annotations

OPSETS = range(9, 25)

_FLOATS = "FP32 FP16 BF16"
_NUMBERS = f"{_FLOATS} INT32 INT64"
_ALL = f"{_NUMBERS} BOOL"

_TENSORRT_10_15 = {
    _FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos
        Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
        GroupNormalization GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf
        LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool
        MeanVarianceNormalization PRelu QuantizeLinear RandomNormal RandomNormalLike
        RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round
        Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu
        Upsample""",
    _NUMBERS: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod
        Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth
        Sub Sum TopK""",
    _ALL: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    f"{_ALL} UINT8": "Cast CastLike",
    f"{_ALL} FP8 FP4 INT4": "Constant ConstantOfShape",
    "BOOL": "And Not Or Xor",
    "FP32 FP16": """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero
        RoiAlign""",
    "FP32": "STFT",
    f"{_FLOATS} INT8 FP8": "Attention",
    f"{_FLOATS} INT32": "TensorScatter",
    f"{_NUMBERS} INT8": "Gelu",
    f"{_NUMBERS} FP8": "Mean",
    "INT8 FP8 FP4 INT4": "DequantizeLinear",  # of what it reads, and QuantizeLinear of what it writes
}


def _read(table: dict[str, str]) -> dict[str, list[str]]:
    return {operator: types.split() for types, operators in table.items() for operator in operators.split()}


TABLES = {
    (10, 15): _read(_TENSORRT_10_15),
    (11, 0): _read(_TENSORRT_10_15) | {"Swish": _FLOATS.split()},
}
"""(major, minor) of TensorRT → operator → types of its data, by the names that the parser uses."""

# Restrictions of the same tables, as far as an exported graph could meet them.
UNSUPPORTED_INPUTS = {"Attention": {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}}
ONE_OUTPUT = {"Attention", "LayerNormalization"}
FIXED_ATTRIBUTES: dict[str, dict[str, object]] = {
    "Attention": {"softcap": 0.0, "qk_matmul_output_mode": 0},
    "TensorScatter": {"axis": -2, "mode": "linear"},
    "ScatterND": {"reduction": "none"},
    "TopK": {"sorted": 1},
}
RANKS = {"Attention": (4, [0, 1, 2, 3]), "TensorScatter": (4, [0, 1])}
CONSTANT_INPUTS = {
    **dict.fromkeys((name for name in TABLES[10, 15] if name.startswith("Reduce")), 1),
    "CumSum": 1,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
ZERO_INPUTS = {"QuantizeLinear": 2, "DequantizeLinear": 2}  # zero points

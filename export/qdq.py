"""Quantised engines: linear layers as QuantizeLinear and DequantizeLinear around a bfloat16 MatMul.

TensorRT makes an fp8, int8 or int4 kernel of each such MatMul. Its rules ("Quantized types" in its
documentation, and onnx-tensorrt's importer): symmetric, no zero point; a scale is an initializer; the
scale's type is that of the dequantised numbers; int4 only for constant weights, in blocks of 64 or 128
along the dimension that is summed, an even number of them. What that leaves:

          activations              weights [in, out]
    fp8   per tensor, amax / 448   per tensor, amax / 448
    int8  per tensor, amax / 127   per output channel, amax / 127
    int4  bfloat16                 per block of 64 inputs and output channel, amax / 7

Scales are bfloat16, and what is divided by them is divided by the stored number. The head, embeddings,
convolutions and vision's attention stay bfloat16, and so do linear layers that a type cannot hold: int4's
whose inputs are no whole blocks, int8's whose inputs have outliers (`LIMIT`; static scales of activations
come from calibrate.py). Never run on real hardware yet.

nvidia-modelopt 0.47 is the well-kept way to the same graphs for a model that fits into memory: it wraps
live torch modules, or loads a whole ONNX model into ONNX Runtime 1.24 (it pins onnx 1.21). Here a model
never is in memory and there is only a formula per chunk of rows to take from it, so it is no dependency;
its searches (AWQ, SmoothQuant) can be run before, on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CHUNK, Weight
from .quantize import HalfLinear

BLOCK = 64
TOP = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8}
ONNX = {"fp8": 17, "int8": 3}  # numbers of ONNX's types

# int8 keeps a layer's inputs whole while their amax is below this many times the size of a typical token:
# rounding then adds amax / 127 / √12, at most 7 % of a token's size. Inputs of `down` with the massive
# activations of a few tokens are beyond it, and would be all zeros for every other token.
LIMIT = 32.0


@dataclass(frozen=True)
class Range:
    """Of the inputs of one linear layer over the calibration data."""

    amax: float  # largest magnitude
    typical: float  # median over tokens of the root mean square


def holds(linear: nn.Linear, precision: str, seen: Range | None) -> bool:
    """Whether a layer can be quantised so; ValueError where calibration has not seen it."""
    if precision == "int4":
        return linear.in_features % BLOCK == 0 and linear.out_features % 2 == 0
    if seen is None:
        raise ValueError(f"{precision} needs the range of each layer's inputs, see calibrate.py")
    return precision == "fp8" or seen.amax <= LIMIT * seen.typical


class QdqLinear(HalfLinear):
    """Weights [in, out]; see the module. `input_scale` []: of activations, filled from the Range."""

    scales: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, precision: str):
        self.precision = precision
        super().__init__(linear, torch.bfloat16)

    def make(self, rows: int, columns: int) -> None:
        # an int4 weight is traced as int8: torch has no int4; `fill` stores two to the byte
        self.register_buffer("weight", torch.empty(columns, rows, dtype=STORED[self.precision]))
        shape = {"fp8": (), "int8": (rows,), "int4": (columns // BLOCK, rows)}[self.precision]
        self.register_buffer("scales", torch.empty(shape, dtype=torch.bfloat16))
        if self.precision != "int4":
            self.register_buffer("input_scale", torch.empty((), dtype=torch.bfloat16))

    def product(self, x: Tensor) -> Tensor:
        blocks = {"fp8": {}, "int8": {"axis": 1}, "int4": {"axis": 0, "block_size": BLOCK}}
        if self.precision != "int4":
            x = torch.onnx.ops.symbolic(
                "QuantizeLinear", (x, self.input_scale), {"output_dtype": ONNX[self.precision]},
                dtype=STORED[self.precision], shape=x.shape,
            )  # fmt: skip
            x = _dequantize(x, self.input_scale, {})
        return x @ _dequantize(self.weight, self.scales, blocks[self.precision])


def _dequantize(q: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (q, scale), attributes, dtype=torch.bfloat16, shape=q.shape
    )


def scale_of(amax: Tensor, precision: str) -> Tensor:
    """bfloat16 amax / 448, 127 or 7; 1 where amax is 0 (also where it is too small for bfloat16)."""
    scale = (amax / TOP[precision]).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize(weights: Tensor, scales: Tensor, precision: str) -> Tensor:
    """weights / scales (shapes broadcast) on the type's grid: float8 rounds to nearest, ties to even, as
    integers do; what lies outside is clipped. int4 comes as int8."""
    top = TOP[precision]
    q = (weights / scales.float()).clamp_(-top, top)
    return (q if precision == "fp8" else q.round_()).to(STORED[precision])


def pack(q: Tensor) -> Tensor:
    """int8 in [−8, 7], [rows, columns] → uint8 [rows, columns / 2], the first of each pair in the low half,
    as ONNX's int4 tensors."""
    q = q.view(torch.uint8) & 15
    return q[:, 0::2] | (q[:, 1::2] << 4)


def columns(weight: Weight, precision: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunks of a weight [out, in], each as (first column, weight [in, n], scales) of the stored [in, out].

    scales: [] for fp8, [n] for int8, [in / 64, n] for int4; n is even for int4. fp8 reads the weight twice.
    """
    scales = torch.zeros(())
    if precision == "fp8":
        for rows in weight.chunks():
            scales = torch.maximum(scales, rows.abs().max())
        scales = scale_of(scales, precision)
    start = 0
    for rows in weight.chunks(4 * CHUNK):
        if precision == "int8":
            scales = scale_of(rows.abs().amax(1), precision)
            q = quantize(rows, scales.unsqueeze(1), precision)
        elif precision == "int4":
            blocks = rows.unflatten(1, (-1, BLOCK))
            scale = scale_of(blocks.abs().amax(2), precision)
            q, scales = quantize(blocks, scale.unsqueeze(2), precision).flatten(1), scale.t()
        else:
            q = quantize(rows, scales, precision)
        yield start, q.t(), scales
        start += len(rows)

"""Quantised engines: linear layers as QuantizeLinear and DequantizeLinear around a bfloat16 MatMul.

TensorRT makes an fp8, int8 or int4 kernel of each such MatMul. Its rules ("Quantized types" in its
documentation, and onnx-tensorrt's importer): symmetric, no zero point; a scale is an initializer; the
scale's type is that of the dequantised numbers; int4 only for constant weights, in blocks of 64 or 128
along the dimension that is summed, an even number of them. What that leaves:

          activations              weights [in, out]
    fp8   per tensor, amax / 448   per tensor, amax / 448
    int8  per tensor, amax / 127   per output channel, amax / 127
    int4  bfloat16                 per block of 64 inputs and output channel, amax / 7

A checkpoint's own fp8 and symmetric int4 (packed.py) stay to the bit, with scales per output channel, or per
block of 64 or 128 inputs and output channel; fp8 in blocks of inputs and outputs is none of the engine's
granularities, and becomes amax / 448 per output channel. (TensorRT documents scales per channel, and not for
which types its kernels take them: fp8's are to be seen on hardware.)

Scales are bfloat16, and what is divided by them is divided by the stored number. The head, embeddings,
convolutions and vision's attention stay bfloat16, and so do linear layers that a type cannot hold: int4's
whose inputs are no whole blocks, int8's whose inputs have outliers (`LIMIT`; static scales of activations
come from calibrate.py, or from an fp8 checkpoint). Never run on real hardware yet.

nvidia-modelopt 0.47 is the well-kept way to the same graphs for a model that fits into memory: it wraps
live torch modules, or loads a whole ONNX model into ONNX Runtime 1.24 (it pins onnx 1.21). Here a model
never is in memory and there is only a formula per chunk of rows to take from it, so it is no dependency;
its searches (AWQ, SmoothQuant) can be run before, on the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import CHUNK, Weight
from .packed import Fp8, Int4, Quantised, spans
from .quantize import HalfLinear, Sort

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


def keeps(own: Quantised | None, precision: str) -> bool:
    """Whether a layer stays as the checkpoint has it."""
    if precision == "fp8":
        return isinstance(own, Fp8)
    fits = isinstance(own, Int4) and own.scheme.engine and own.shape[1] % own.block == 0
    return precision == "int4" and fits


class QdqLinear(HalfLinear):
    """Weights [in, out]; see the module. `input_scale` []: of activations, filled from the Range.

    own: the checkpoint's quantisation, which is kept.
    """

    scales: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, precision: str, own: Quantised | None = None):
        self.precision, self.own = precision, own
        self.block = own.block if isinstance(own, Int4) else BLOCK
        super().__init__(linear, torch.bfloat16)
        self.sort = Sort(own if isinstance(own, Int4) else None)

    def make(self, rows: int, columns: int) -> None:
        # an int4 weight is traced as int8: torch has no int4; `fill` stores two to the byte
        self.register_buffer("weight", torch.empty(columns, rows, dtype=STORED[self.precision]))
        shape = {"fp8": (), "int8": (rows,), "int4": (columns // self.block, rows)}[self.precision]
        shape = (rows,) if isinstance(self.own, Fp8) else shape
        self.register_buffer("scales", torch.empty(shape, dtype=torch.bfloat16))
        if self.precision != "int4":
            self.register_buffer("input_scale", torch.empty((), dtype=torch.bfloat16))

    def product(self, x: Tensor) -> Tensor:
        x = self.sort(x)
        blocks = {"fp8": {}, "int8": {"axis": 1}, "int4": {"axis": 0, "block_size": self.block}}
        if isinstance(self.own, Fp8):
            blocks["fp8"] = blocks["int8"]
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


def own_columns(weight: Weight) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`columns` of a weight that `keeps`: scales [n] for fp8, [in / block, n] for int4, rounded to bfloat16.

    Raises CheckpointError where a symmetric checkpoint has a zero point that is not 8.
    """
    start = 0
    for part, low, high in spans(weight, 4 * CHUNK):
        if isinstance(part, Int4):
            q, scales, zeros = part.values(low, high)
            if bool((zeros != 8).any()):
                raise CheckpointError(
                    f"{part.checkpoint.path}: tensor {part.stem}qzeros has zero points of "
                    f"{int(zeros[zeros != 8][0])}, expected 8: quantization_config says sym"
                )
            q, scales = q.to(torch.int8) - 8, part.blocks(scales).t()
        elif part.block is None:
            q, scales = part.values(low, high)
            q, scales = q.to(STORED["fp8"]), scales.squeeze(1)
        else:
            rows = part.read(low, high)
            scales = scale_of(rows.abs().amax(1), "fp8")
            q = quantize(rows, scales.unsqueeze(1), "fp8")
        yield start, q.t(), scales.to(torch.bfloat16)
        start += high - low


def static_ranges(weights: Mapping[str, Weight]) -> dict[str, Range]:
    """Of the inputs of fp8 linear layers whose checkpoint has an input_scale; the widest of merged ones."""
    ranges = {}
    for name, weight in weights.items():
        scales = [part.input_scale for part in weight.quantised() if isinstance(part, Fp8)]
        if scales and len(scales) == len(weight.parts) and None not in scales:
            amax = TOP["fp8"] * max(scale or 0.0 for scale in scales)
            ranges[name.removesuffix(".weight")] = Range(amax, amax)
    return ranges

"""What a precision makes of a module: `swap` puts others in the place of its linear layers, embeddings,
convolutions and vision attention, and says how each weight is stored.

A checkpoint's own int4 and fp8 (packed.py) are kept where the precision is theirs; what such a checkpoint has
not quantised, its head and embedding mostly, is as the precision makes it of any other checkpoint.

For the CPU, at 8 bits: a scale for each output, and inputs that are rotated and then rounded per token
(TokenLinear). That takes a prompt's products less than half the time of blocks of 64 (2.2×, Zen 4), and 8
bits a weight instead of 9, at a relative error of Gaussian weights and inputs of 1.23 % for 0.80. Without the
rotation a token's outliers would leave few steps to its other numbers: four channels in 4,096 of 20 times the
others' size, whose weights are a twentieth, cost 7.5 % then, and 1.8 % with it, where blocks cost 1.4. The
head, where half of what blocks of 64 do to an answer happened, stays in blocks, of 16.

The head, tables, and everything at 4 bits: weights in blocks along a row, in ONNX Runtime's operators. A
block has a float32 scale and an unsigned zero point: weight ≈ (q − zero_point) · scale. A product reads two
floats of a block beside its values, so 4 bits in blocks of 32 are 0.75 bytes a weight, of 64 0.625, of 128
0.56; and the larger the block, the less there is to compute: of 128 instead of 64 a prefill takes three
quarters of the time, eight streams together five sixths (AVX-512, Zen 5). The relative error on Gaussian
weights is 8.1, 9.1 and 10.1 % (llama.cpp's Q4_0: 0.56 bytes, 8.6 %); of 128 with a range cut to 93 %, whose
ends few weights reach, 9.7 %. A least-squares scale wins another 0.05 points, the best of seven cuts for each
block 0.15. 8 bits are 1.25, 1.125 and 1.06 bytes, 0.48, 0.54 and 0.59 %, and gain little from a cut or in
speed; in blocks of 128 the bits of a row depend on whether it has a partner (AVX-512 kernels of ONNX Runtime
1.32), as they do at 4 bits from 64 on. A product rounds its inputs in blocks as large.

For engines and TorchScript, 16 bits: a product has its operands in 16 bits and everything between two
products is float32 (norms, softmax, rope, activations, residual sums), because the new modules take and
return float32 and the model's own code is left alone. (In TorchScript's decoder layers the ops between
products cast as well: torchscript.FusedLayer.) Quantised engines: qdq.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import CHUNK
from .vision import Attention

if TYPE_CHECKING:
    from .checkpoint import Weight
    from .packed import Int4, Rounded
    from .qdq import Range

BITS = {"int4": 4, "int8": 8}
BLOCKS = {4: 128, 8: 64}  # bits → weights that share a scale, where that divides a row
FINE = 16  # at 8 bits, of the layers that a module's class names in FINE
ROTATED = 64  # numbers of an input of 8 bits that are rotated together: TokenLinear
CUT = {4: 0.93, 8: 1.0}  # of a block's range: what lies outside is clipped
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def block_of(columns: int, bits: int) -> int:
    """Weights that share a scale: BLOCKS[bits], or 64 or 32 where only that divides a row."""
    smaller = (block for block in (64, 32) if block < BLOCKS[bits])
    return next((b for b in (BLOCKS[bits], *smaller) if columns % b == 0), BLOCKS[bits])


def quantize(weights: Tensor, bits: int, block: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [R, K] → packed uint8 [R, blocks, block · bits / 8], scales float32 [R, blocks],
    zero points uint8 [R, ceil(blocks · bits / 8)], as MatMulNBits stores them.

    block: default block_of(K, bits); blocks = ceil(K / block); step = (high − low) / (2^bits − 1) with low ≤
    0 ≤ high the block's range, zero point = round(−low / step), scale = CUT[bits] · step, q = round(weight /
    scale) + zero point, clipped, halves to even. Values of 4 bits are packed low half first; a last,
    partial block is filled with zeros.
    """
    blocks = in_blocks(weights, block or block_of(weights.shape[1], bits))
    scales, zeros = grid(blocks, bits)
    q = blocks / scales.unsqueeze(-1)
    return stored(q.round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1), scales, zeros, bits)


def in_blocks(weights: Tensor, block: int) -> Tensor:
    """[R, K] → [R, blocks, block]."""
    return F.pad(weights, (0, -weights.shape[1] % block)).unflatten(1, (-1, block))


def grid(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """float32 [R, blocks, block] → scales and zero points of `quantize`, float32 [R, blocks] each."""
    low, high = torch.aminmax(blocks, dim=-1)
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    scales = (high - low).div_(2**bits - 1)
    scales[scales == 0] = 1.0
    zeros = (-low / scales).round_()
    return scales.mul_(CUT[bits]), zeros


def stored(q: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers [R, blocks, block] of any type, and their grid → what `quantize` returns."""
    packed, zero_points = q.to(torch.uint8), zeros.to(torch.uint8)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
        if zero_points.shape[1] % 2:
            zero_points = F.pad(zero_points, (0, 1))
        zero_points = zero_points[:, 0::2] | (zero_points[:, 1::2] << 4)
    return packed.contiguous(), scales, zero_points.contiguous()


def dequantize(packed: Tensor, scales: Tensor, zero_points: Tensor, columns: int, bits: int) -> Tensor:
    """The float32 [R, columns] that ONNX Runtime computes with."""
    if bits == 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        zero_points = torch.stack([zero_points & 15, zero_points >> 4], dim=-1).flatten(-2)
    zeros = zero_points[:, : scales.shape[1]].unsqueeze(-1)
    return ((packed.float() - zeros) * scales.unsqueeze(-1)).flatten(1)[:, :columns]


class _Quantized(nn.Module):
    weight: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, rows: int, columns: int, bits: int, block: int, embedding: bool = False):
        super().__init__()
        self.rows, self.columns, self.bits, self.block = rows, columns, bits, block
        blocks = -(-columns // block)
        size = block * bits // 8
        # the bytes are the same, the operators want different shapes
        shape = (rows, -(-columns * bits // 8)) if embedding else (rows, blocks, size)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(rows, blocks))
        self.register_buffer("zero_points", torch.empty(rows, -(-blocks * bits // 8), dtype=torch.uint8))


class QuantLinear(_Quantized):
    """com.microsoft.MatMulNBits; accuracy level 4: the input is rounded to 8 bits per block.

    own: the checkpoint's quantisation, which is kept, or gptq.py's. The operator's g_idx does not serve
    act-order: in ONNX Runtime 1.32 it makes a product of 1024 × 1024 80 times slower on a CPU, and wrong
    beside zero points.
    """

    def __init__(
        self, linear: nn.Linear, bits: int, own: Int4 | Rounded | None = None, block: int | None = None
    ):
        block = own.block if own else block or block_of(linear.in_features, bits)
        super().__init__(linear.out_features, linear.in_features, bits, block)
        self.bias = linear.bias
        self.sort = Sort(own)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sort(x)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.weight, self.scales, self.zero_points, None, self.bias),
            {
                "N": self.rows,
                "K": self.columns,
                "bits": self.bits,
                "block_size": self.block,
                "accuracy_level": 4,
            },
            dtype=x.dtype,
            shape=[*x.shape[:-1], self.rows],
            version=1,
        )


class TokenLinear(nn.Module):
    """int8 weights [in, out] with a scale per output, on inputs that are rotated, and rounded to 8 bits per
    token.

    z = x · R, q = round(127 · z / max|z|) + 128, y = (q − 128) · W · scales · max|z| / 127: R, in blocks of
    `_rotation`, spreads a token's outliers over their blocks, and W · scales ≈ Rᵀ · weightᵀ takes it back
    (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, turns whole rows so). com.microsoft's
    MatMulIntegerToFloat sums whole numbers, so that a row has the same bits in any batch; its kernels want
    unsigned inputs, and overflow on an x86 without VNNI unless told, see runtime/backends/onnx.py. A token of
    zeros is 0 / 0, which rounds to some number, times zero.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        rows, columns = linear.out_features, linear.in_features
        self.register_buffer("weight", torch.empty(columns, rows, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        op = torch.onnx.ops.symbolic
        turn = _rotation(self.weight.shape[0])
        if (size := len(turn)) > 1:
            values = turn.flatten().tolist()
            flat = op("Constant", (), {"value_floats": values}, dtype=x.dtype, shape=[size**2])
            x = (x.unflatten(-1, (-1, size)) @ flat.view(size, size)).flatten(-2)
        step = op("Constant", (), {"value_float": 1 / 127}, dtype=torch.float32, shape=[])
        middle = op("Constant", (), {"value_int": 128}, dtype=torch.int64, shape=[]).to(torch.uint8)
        largest = x.abs().amax(-1, keepdim=True)
        q = op("QuantizeLinear", (x / largest, step, middle), dtype=torch.uint8, shape=x.shape)
        y = op(
            "com.microsoft::MatMulIntegerToFloat",
            (q, self.weight, step, self.scales, middle),
            dtype=torch.float32,
            shape=[*x.shape[:-1], self.weight.shape[1]],
            version=1,
        )
        y = y * largest
        return y if self.bias is None else y + self.bias


@lru_cache
def _rotation(columns: int) -> np.ndarray:
    """The orthogonal float64 matrix that turns each block of a row: Sylvester's Hadamard matrix behind random
    signs, of the largest power of two that divides the row, up to ROTATED."""
    size = math.gcd(columns, ROTATED)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return signs[:, None] * matrix / size**0.5


def rotated(rows: Tensor) -> Tensor:
    """float32 [R, K] → weights for inputs that are rotated, see TokenLinear."""
    turn = torch.from_numpy(_rotation(rows.shape[1])).to(rows.dtype)
    return (rows.unflatten(1, (-1, len(turn))) @ turn).flatten(1)


class Sort(nn.Module):
    """Inputs [..., in] in the order of their groups, where act-order has mixed those."""

    order: Tensor | None

    def __init__(self, own: Int4 | Rounded | None):
        super().__init__()
        mixed = own is not None and own.order is not None and not own.presorted
        self.register_buffer("order", torch.empty(own.shape[1], dtype=torch.int64) if own and mixed else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        return torch.onnx.ops.symbolic("Gather", (x, self.order), {"axis": -1}, dtype=x.dtype, shape=x.shape)


class Parts(nn.Module):
    """A linear layer whose outputs come from products that differ: see packed.apart."""

    def __init__(self, linear: nn.Linear, rows: Sequence[int]):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(linear.in_features, n, bias=False) for n in rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([part(x) for part in self.parts], -1)
        return x if self.bias is None else x + self.bias


class QuantEmbedding(_Quantized):
    """com.microsoft.GatherBlockQuantized. 8 bits at any precision: rows are looked up, so that more bits
    cost no time, and hardly any memory in a mapped file. With a table of 4 bits the logits of a random
    model of a billion have a cosine of 0.703 with float32's, with this one 0.749.
    """

    def __init__(self, embedding: nn.Embedding):
        rows, columns = embedding.weight.shape
        super().__init__(rows, columns, 8, block_of(columns, 8), embedding=True)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (self.weight, ids, self.scales, self.zero_points),
            {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1},
            dtype=torch.float32,
            shape=[*ids.shape, self.columns],
            version=1,
        )


class TransposedLinear(nn.Module):
    """MatMul on weights stored [in, out]: for inputs of more than two dimensions."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.in_features, linear.out_features))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        return x if self.bias is None else x + self.bias


def token_scale(x: Tensor) -> Tensor:
    """float32 [..., width] → [..., 1]: a power of two that brings a token's largest magnitude to (1/2, 1].

    float16 ends at 65,504, and inside a residual branch real checkpoints go beyond it: inputs of `down`
    and sums that join the residual stream of 1e3 to 1e5 and more. Scaled so, no input overflows, and a
    result is at most the sum of the magnitudes of its row of weights: finite while that sum is below
    65,504, that is for 22,016 inputs while the mean magnitude of a row is below 2.9 (trained ones: 0.02).
    A power of two loses nothing but what lies 2^14 below the token's largest number: that keeps an
    absolute precision of 2^-25 of it. The float32 result is scaled back by division, as exactly.
    """
    # 2^-24, float16's smallest number: a token of zeros stays finite
    largest = x.abs().amax(-1, keepdim=True).clamp_min(2.0**-24)
    return torch.exp2(-torch.ceil(torch.log2(largest)))


class HalfLinear(nn.Module):
    """y = x Wᵀ + b: operands of the product in `dtype`, x and y float32 (x may be of that dtype already).

    `transposed`: W is stored [in, out], for a plain MatMul. `wide`: float16 scales the input, see
    token_scale; bfloat16 has float32's range. The bias is added in float32: a 16-bit sum would round
    twice, and biases of hundreds (Qwen's keys) are where that shows.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, transposed: bool = False, wide: bool = False):
        super().__init__()
        self.dtype, self.transposed = dtype, transposed
        self.wide = wide and dtype == torch.float16
        self.bias = linear.bias
        self.make(linear.out_features, linear.in_features)

    def make(self, rows: int, columns: int) -> None:
        """Create the weight and what belongs to it."""
        shape = (columns, rows) if self.transposed else (rows, columns)
        self.weight = _parameter(shape, self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ in `dtype`."""
        return x @ self.weight if self.transposed else F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            x = x.float()
            scale = token_scale(x)
            x = self.product((x * scale).to(self.dtype)).float() / scale
        else:
            x = self.product(x.to(self.dtype)).float()
        return x if self.bias is None else x + self.bias


class RowsLinear(HalfLinear):
    """int8 weights [out, in] with a scale per row, dequantised in `dtype` at each call.

    That is one elementwise kernel before the product: it saves memory, not time.
    """

    scales: Tensor

    def make(self, rows: int, columns: int) -> None:
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, 1, dtype=self.dtype))

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scales)


def quantize_rows(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 [R, K] → int8 [R, K], scales `dtype` [R, 1]: max|row| / 127 (1 for a row of zeros); weights
    are divided by the scale as it is stored, rounded half to even, and clipped to ±127."""
    scales = (weights.abs().amax(1, keepdim=True) / 127).to(dtype)
    scales[scales == 0] = 1
    return (weights / scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales


def int8_columns(weight: Weight) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`quantize_rows` of a rotated weight [out, in], in chunks as qdq.columns gives them: first column, int8
    [in, n], scales float32 [n]."""
    start = 0
    for rows in weight.chunks(4 * CHUNK):
        q, scales = quantize_rows(rotated(rows), torch.float32)
        yield start, q.t(), scales.squeeze(1)
        start += len(rows)


class HalfEmbedding(nn.Module):
    """Rows in `dtype`, looked up and then cast to float32."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype):
        super().__init__()
        self.weight = _parameter(embedding.weight.shape, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


class HalfConv2d(nn.Module):
    """A convolution of patches in `dtype`, with a float32 result."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.stride = conv.stride
        self.weight = _parameter(conv.weight.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] → [N, out, H / stride, W / stride]"""
        return F.conv2d(x.to(self.weight.dtype), self.weight, stride=self.stride).float()


def _parameter(shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def swap(
    module: nn.Module,
    precision: str,
    target: str = "cpu",
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    ranges: Mapping[str, Range] | None = None,
    weights: Mapping[str, Weight] | None = None,
) -> dict[str, str]:
    """Swap linear layers, embeddings, convolutions and vision attention for the modules above, in place.

    target: "cpu" (ONNX Runtime's operators), "engine" (ONNX for a GPU, weights [in, out]) or "torchscript"
    (weights [out, in]). `transposed`: linear layers that stay float32 in a CPU graph (TransposedLinear).
    `dtype`: of products in TorchScript whose weights alone are int8. `ranges`: of the inputs of the linear
    layers, by their names in `module`, for fp8 and int8 engines; ValueError where one is missing. `weights`:
    by parameter, for those that come quantised; `packed.apart` has been over them.

    Returns how each weight must be stored, in its parameter's dtype: name → "int4", "int8" or "int8-16", with
    blocks of 16 (`quantize`; `x.weight` becomes `x.weight`, `x.scales` and `x.zero_points`), "rows" or
    "columns" (`quantize_rows`, `int8_columns`; `x.weight` and `x.scales`), "qdq-fp8", "qdq-int8" or
    "qdq-int4" (qdq.columns; likewise, and `x.input_scale`), "own-int4" or "own-fp8" (the checkpoint's or
    gptq.py's, for the same modules; and `x.sort.order`) or "transposed"; those not named are stored as they
    are. A head that is tied to the embedding stays so in 16 bits: one parameter, [vocab, hidden].
    """
    from . import packed, qdq

    weights = weights or {}
    for name, child in list(module.named_modules()):
        if f"{name}.parts.0.weight" in weights and isinstance(child, nn.Linear):
            parts = (w.parts[0][1][0] for n, w in weights.items() if n.startswith(f"{name}.parts."))
            module.set_submodule(name, Parts(child, list(parts)))
    wide, exact, fine = (_named(module, name) for name in ("WIDE", "EXACT", "FINE"))
    tied = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    halves: dict[Tensor, Tensor] = {}  # a table's parameter → the one in its place
    half = HALVES.get(precision, dtype)
    if target == "cpu" or precision == "fp32":
        half = torch.float32
    stored: dict[str, str] = {}
    for name, child in list(module.named_modules()):
        new: nn.Module | None = None
        kind = ""
        if isinstance(child, nn.Linear):
            flip = transposed if target == "cpu" else target == "engine" and child.weight not in tied
            quantised = target == "engine" and precision in qdq.TOP and child not in exact
            own = packed.alike(weights.get(f"{name}.weight")) if precision in ("int4", "fp8") else None
            if target == "cpu" and precision == "int4" and isinstance(own, packed.Int4 | packed.Rounded):
                new, kind = QuantLinear(child, 4, own), "own-int4"
            elif target == "cpu" and precision == "int8" and child in fine:
                new, kind = QuantLinear(child, 8, block=FINE), f"int8-{FINE}"
            elif target == "cpu" and precision == "int8":
                new, kind = TokenLinear(child), "columns"
            elif target == "cpu" and precision in BITS:
                new, kind = QuantLinear(child, BITS[precision]), precision
            elif target == "torchscript" and precision == "int8":
                new, kind = RowsLinear(child, half, wide=child in wide), "rows"
            elif quantised and qdq.keeps(own, precision):
                new, kind = qdq.QdqLinear(child, precision, own), f"own-{precision}"
            elif quantised and qdq.holds(child, precision, (ranges or {}).get(name)):
                new, kind = qdq.QdqLinear(child, precision), f"qdq-{precision}"
            elif half != torch.float32:
                new = HalfLinear(child, half, flip, child in wide)
                if child.weight in halves:
                    new.weight = halves[child.weight]
            elif flip:
                new = TransposedLinear(child)
            kind = kind or ("transposed" if flip else "")
        elif isinstance(child, nn.Embedding):
            whole = child.embedding_dim % block_of(child.embedding_dim, 8) == 0
            if target == "cpu" and precision in BITS and whole:
                new, kind = QuantEmbedding(child), "int8"
            elif half != torch.float32:
                new = HalfEmbedding(child, half)
                halves[child.weight] = new.weight
        elif half != torch.float32 and isinstance(child, nn.Conv2d):
            new = HalfConv2d(child, half)
        elif half != torch.float32 and isinstance(child, Attention):
            child.dtype = half
        if new is None:
            continue
        module.set_submodule(name, new)
        if kind:
            stored[f"{name}.weight"] = kind
    return stored


def _named(module: nn.Module, attribute: str) -> set[nn.Module]:
    """The modules that their owners' classes name in `attribute`, with all that is in them."""
    return {
        inner
        for owner in module.modules()
        for name in getattr(owner, attribute, ())
        if hasattr(owner, name)
        for inner in getattr(owner, name).modules()
    }


def fill(
    module: nn.Module,
    weights: Mapping[str, Weight],
    stored: Mapping[str, str],
    count: Callable[[int, str], None] = lambda nbytes, name: None,
) -> None:
    """Fill a swapped module in memory, in chunks of rows, as TorchScript needs it.

    `stored`: what `swap` returned. `count` hears of each chunk: bytes as stored, weight. Raises
    ValueError for what only a graph's data file can hold.
    """
    for name, weight in weights.items():
        kind, start = stored.get(name, ""), 0
        if kind not in ("", "rows", "transposed"):
            raise ValueError(f"{name} is stored as {kind}")
        owner: Any = module.get_submodule(name.rpartition(".")[0])
        to = getattr(owner, name.rpartition(".")[2]).detach()
        for rows in weight.chunks():
            at = slice(start, start + len(rows))
            if kind == "rows":
                to[at], owner.scales[at] = quantize_rows(rows, owner.scales.dtype)
            elif kind == "transposed":
                to[:, at] = rows.t()
            else:
                to[at] = rows
            start += len(rows)
            count(rows.numel() * to.element_size(), name)

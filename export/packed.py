"""Checkpoints that come quantised: GPTQ and AWQ of 4 bits, and fp8.

Which linear layers are quantised is told by their tensors. Of a layer x, whose weight is [out, in]:

    gptq  x.qweight int32 [in / 8, out]: eight inputs to a number, the first one in its lowest bits
          x.qzeros int32 [groups, out / 8]: eight outputs to a number; each is one less (modulo 16) than the
          zero point, but in checkpoint_format gptq_v2
          x.scales [groups, out]; x.g_idx int32 [in]: the group of each input
    awq   x.qweight int32 [in, out / 8], x.qzeros int32 [groups, out / 8]: eight outputs to a number, from its
          lowest bits on those of places 0, 2, 4, 6, 1, 3, 5, 7
          x.scales [groups, out]; groups are consecutive inputs
    fp8   x.weight float8 e4m3 [out, in]; x.weight_scale, or x.weight_scale_inv (no inverse): one, one per
          output, or one per block of weight_block_size; x.input_scale []: where that of inputs is static

weight = (q − zero point) · scale. The formats are those of GPTQModel's and AutoAWQ's linear layers,
transformers' fine-grained fp8 and compressed-tensors' "float-quantized". With act-order (desc_act) a group's
inputs lie anywhere: they are sorted by group, and so must be the inputs of the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, NotSupportedYet
from .checkpoint import CHUNK, Checkpoint, Fields, Weight
from .quantize import block_of, dequantize, stored

PARTS = ("qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "input_scale")
PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of AWQ's outputs 0 … 7 in their number
BLOCK = 128  # the largest that a product computes with


@dataclass(frozen=True)
class Scheme:
    """quantization_config, as far as reading the tensors needs it."""

    method: str  # "gptq", "awq", "fp8" or "compressed-tensors"
    precision: str  # "int4" or "fp8"
    group: int = 0  # inputs that share a scale; −1: all
    offset: int = 0  # what stored zero points lack
    ordered: bool = False  # g_idx must be there
    symmetric: bool = False  # all zero points are 8
    block: tuple[int, int] | None = None  # outputs and inputs that share an fp8 scale

    @property
    def engine(self) -> bool:
        """Whether TensorRT's types hold it: int4 has no zero points there, and groups of 64 or 128."""
        return self.precision == "fp8" or (self.symmetric and (self.group == -1 or self.group % 64 == 0))


def scheme(config: Fields) -> Scheme | None:
    """What config.json says; None without a quantization_config.

    Raises NotSupportedYet naming quant_method, field and value, CheckpointError for what is no configuration.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{config.file}: quantization_config is {found!r}, expected an object")
    method = found.get("quant_method")

    def take(field: str, value: Any, *supported: Any) -> Any:
        """The value if it is supported; the first of these stands for one that is left out."""
        value = supported[0] if value is None else value
        if value not in supported:
            raise NotSupportedYet(
                f"{config.file}: quant_method {method!r} with {field} {value!r} is not supported yet: "
                f"{' and '.join(map(repr, supported))} {'is' if len(supported) == 1 else 'are'}"
            )
        return value

    def group(value: Any) -> int:
        if not isinstance(value, int) or not (value == -1 or (value > 0 and value % 16 == 0)):
            raise NotSupportedYet(
                f"{config.file}: quant_method {method!r} with group_size {value!r} is not supported yet: "
                "multiples of 16 and -1 are"
            )
        return value

    if method == "gptq":
        take("bits", found.get("bits"), 4)
        take("pack_dtype", found.get("pack_dtype"), "int32")
        take("is_marlin_format", found.get("is_marlin_format"), False)
        kind = found.get("checkpoint_format") or found.get("format")
        version = take("checkpoint_format", kind, "gptq", "gptq_v2")
        return Scheme(
            method, "int4", group(found.get("group_size", 128)), int(version == "gptq"),
            take("desc_act", found.get("desc_act"), False, True), take("sym", found.get("sym"), True, False),
        )  # fmt: skip
    if method == "awq":
        take("bits", found.get("bits", found.get("w_bit")), 4)
        take("version", str(found.get("version") or "gemm").lower(), "gemm")
        take("zero_point", found.get("zero_point"), True)
        return Scheme(method, "int4", group(found.get("group_size", found.get("q_group_size", 128))))
    block = None
    if method == "fp8":
        take("fmt", found.get("fmt"), "e4m3")
        take("activation_scheme", found.get("activation_scheme"), "dynamic", "static")
        block = found.get("weight_block_size")
    elif method == "compressed-tensors":
        take("format", found.get("format"), "float-quantized")
        groups: Any = found.get("config_groups")
        try:
            given = {name: dict(layers["weights"]) for name, layers in groups.items()}
        except (AttributeError, TypeError, ValueError, CheckpointError):
            raise CheckpointError(
                f"{config.file}: config_groups is {groups!r}, expected groups with weights"
            ) from None
        for name, weights in given.items():
            take(f"{name} weights.num_bits", weights.get("num_bits"), 8)
            take(f"{name} weights.type", weights.get("type"), "float")
            take(f"{name} weights.strategy", weights.get("strategy"), "tensor", "channel", "block")
            block = weights.get("block_structure") or block
    else:
        raise NotSupportedYet(
            f"{config.file}: quant_method {method!r} is not supported yet: gptq, awq, fp8 and "
            "compressed-tensors are; export the unquantised checkpoint"
        )
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise CheckpointError(f"{config.file}: weight_block_size is {block!r}, expected two positive numbers")
    return Scheme(method, "fp8", block=(block[0], block[1]) if block else None)


def names(stored: Iterable[str], quantised: Scheme) -> Iterator[str]:
    """The model's tensors, given those of the files: x.weight for x.qweight, and nothing for its scales."""
    for name in stored:
        stem, _, last = name.rpartition(".")
        if last == "qweight" and quantised.precision == "int4":
            yield f"{stem}.weight"
        elif last not in PARTS:
            yield name


def find(checkpoint: Checkpoint, quantised: Scheme, name: str) -> Quantised | None:
    """How the weight of that name is quantised; None: it is not. Raises CheckpointError for damage."""
    stem = name.removesuffix("weight")
    if not name.endswith(".weight"):
        return None
    if quantised.precision == "int4":
        there = any(checkpoint.stores(stem + part) for part in ("qweight", "scales"))
        return Int4(checkpoint, quantised, stem) if there else None
    if not checkpoint.stores(name) or checkpoint.dtype(name) != "float8_e4m3fn":
        return None
    return Fp8(checkpoint, quantised, stem)


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.mapped(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} has shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


class Int4:
    """A weight [out, in] of GPTQ or AWQ.

    order: int64 [in], the inputs sorted by group, or None where they lie so. block: how many inputs a product
    takes together, the largest part of a group up to 128; its blocks repeat a group's scale and zero point.
    presorted: the layer's inputs come in that order; outputs: int64 [out], rows come in this one: only what
    the function of that name gives.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Scheme, stem: str):
        self.checkpoint, self.scheme, self.stem = checkpoint, quantised, stem
        rows, columns = _matrix(checkpoint, stem + "qweight")
        outputs, inputs = (columns, 8 * rows) if quantised.method == "gptq" else (8 * columns, rows)
        self.shape = (outputs, inputs)
        self.group = quantised.group if quantised.group > 0 else -(-inputs // BLOCK) * BLOCK
        self.groups = -(-inputs // self.group)
        self.block = math.gcd(self.group, BLOCK)
        checkpoint.check(stem + "qzeros", (self.groups, -(-outputs // 8)))
        checkpoint.check(stem + "scales", (self.groups, outputs))
        wanted = {"qweight": ("int32",), "qzeros": ("int32",), "scales": ("float16", "bfloat16", "float32")}
        for part, types in wanted.items():
            if (found := checkpoint.dtype(stem + part)) not in types:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {stem}{part} is {found}, expected {' or '.join(types)}"
                )
        self.order = self._order() if quantised.ordered or checkpoint.stores(stem + "g_idx") else None
        self.presorted = False
        self.outputs: Tensor | None = None
        # parts of one layer with equal keys make one product
        self.key = (self.block, None if self.order is None else self.order.numpy().tobytes())

    def _order(self) -> Tensor | None:
        name, inputs = self.stem + "g_idx", self.shape[1]
        self.checkpoint.check(name, (inputs,))
        groups = self.checkpoint.read(name).long()
        place = f"{self.checkpoint.path}: tensor {name}"
        if int(groups.min()) < 0 or int(groups.max()) >= self.groups:
            raise CheckpointError(
                f"{place} names groups {int(groups.min())} to {int(groups.max())}, there are {self.groups}"
            )
        for i, count in enumerate(groups.bincount(minlength=self.groups).tolist()):
            if count != (wanted := min(self.group, inputs - i * self.group)):
                raise CheckpointError(f"{place} gives group {i} {count} inputs, expected {wanted}")
        order = groups.argsort(stable=True)
        return None if bool((order[1:] > order[:-1]).all()) else order

    def values(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [start, stop): q uint8 [n, in] in the inputs' `order`, scales float32 [n, groups], zero points
        uint8 [n, groups]."""
        take = self.checkpoint.columns
        rows = slice(start, stop) if self.outputs is None else self.outputs[start:stop]
        zeros = unpack(take(self.stem + "qzeros", slice(None)))
        if self.scheme.method == "gptq":
            q = unpack(take(self.stem + "qweight", rows).t().contiguous())
            zeros = (zeros + self.scheme.offset) & 15
        else:
            zeros = zeros.unflatten(1, (-1, 8))[..., PLACES].flatten(1)
            q = unpack(take(self.stem + "qweight", slice(start // 8, -(-stop // 8))))
            q = q.unflatten(1, (-1, 8))[..., PLACES].flatten(1)[:, start % 8 :][:, : stop - start].t()
        if self.order is not None:
            q = q.index_select(1, self.order)
        return q, take(self.stem + "scales", rows).float().t(), zeros[:, rows].t()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32 [n, in], exactly."""
        q, scales, zeros = self.values(start, stop)
        inputs = self.shape[1]
        filled = F.pad(q, (0, self.groups * self.group - inputs)).unflatten(1, (self.groups, self.group))
        rows = filled.float().sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2)).flatten(1)[:, :inputs]
        return rows if self.order is None else torch.empty_like(rows).index_copy_(1, self.order, rows)

    def blocks(self, values: Tensor) -> Tensor:
        """Scales or zero points of groups [n, groups] → of blocks [n, ceil(in / block)]."""
        return values.repeat_interleave(self.group // self.block, 1)[:, : -(-self.shape[1] // self.block)]

    def packed(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [start, stop) as MatMulNBits stores them, like quantize.quantize, in blocks of `block`."""
        q, scales, zeros = self.values(start, stop)
        q = F.pad(q, (0, -self.shape[1] % self.block)).unflatten(1, (-1, self.block))
        return stored(q, self.blocks(scales), self.blocks(zeros), 4)


class Fp8:
    """A weight [out, in] of float8 with scales float32: [], [out], or one per block.

    input_scale: of the layer's inputs, where the checkpoint has one.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Scheme, stem: str):
        self.checkpoint, self.name = checkpoint, stem + "weight"
        self.shape = rows, columns = _matrix(checkpoint, self.name)
        inverse = checkpoint.stores(self.name + "_scale_inv")
        name = self.name + ("_scale_inv" if inverse else "_scale")
        if (found := checkpoint.dtype(name)) not in ("float16", "bfloat16", "float32"):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} is {found}, expected float16, bfloat16 or float32"
            )
        self.scales = checkpoint.read(name)
        self.block = quantised.block
        shape, wanted = tuple(self.scales.shape), [[], [rows, 1]]
        if self.block:
            wanted.append([-(-rows // self.block[0]), -(-columns // self.block[1])])
        if self.scales.numel() == 1 or shape in ((rows,), (rows, 1)):
            self.block, self.scales = None, self.scales.flatten()
        elif not self.block or list(shape) != wanted[-1]:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(shape)}, "
                f"expected {' or '.join(map(str, wanted))}"
            )
        inputs = stem + "input_scale"
        self.input_scale = float(checkpoint.read(inputs).max()) if checkpoint.stores(inputs) else None
        self.key = ()

    def values(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop): float8's numbers as float32 [n, in], their scales [n, 1] or [n, in]."""
        q = self.checkpoint.stored(self.name, start, stop)
        if self.block is None:
            scales = self.scales if len(self.scales) == 1 else self.scales[start:stop]
            return q, scales.expand(len(q)).unsqueeze(1)
        down, right = self.block
        scales = self.scales[torch.arange(start, stop) // down]
        return q, scales.repeat_interleave(right, 1)[:, : q.shape[1]]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32 [n, in], exactly."""
        q, scales = self.values(start, stop)
        return q.mul_(scales)


class Rounded:
    """A weight [out, in] that an export has rounded to 4 bits, in memory; used as an Int4 without an order.

    data: packed values, scales and zero points as quantize.quantize gives them.
    """

    order = outputs = None
    presorted = False

    def __init__(self, columns: int, data: tuple[Tensor, Tensor, Tensor]):
        self.shape = len(data[0]), columns
        self.block = block_of(columns, 4)
        self.data = data
        self.key = (self.block, None)

    def packed(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [start, stop) as MatMulNBits stores them."""
        values, scales, zero_points = self.data
        return values[start:stop], scales[start:stop], zero_points[start:stop]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32 [n, in], exactly."""
        return dequantize(*self.packed(start, stop), self.shape[1], 4)


Quantised: TypeAlias = Int4 | Fp8 | Rounded


def alike(weight: Weight | None) -> Quantised | None:
    """The first part of a weight, if all its parts are quantised so that one product can take them."""
    parts = weight.quantised() if weight else []
    return parts[0] if len({p and p.key for p in parts}) == 1 else None


def apart(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Weights whose parts no single product can take become one each: x.weight → x.parts.0.weight, …"""
    result: dict[str, Weight] = {}
    for name, weight in weights.items():
        if len({p and p.key for p in weight.quantised()}) > 1:
            stem = name.removesuffix("weight")
            for i, part in enumerate(weight.parts):
                result[f"{stem}parts.{i}.weight"] = Weight(weight.checkpoint, (part,))
        else:
            result[name] = weight
    return result


def presorted(weights: dict[str, Weight]) -> dict[str, Weight]:
    """The decoder's weights with the outputs of `gate_up` in the order in which `down` wants its inputs, so
    that no step sorts these."""
    result = dict(weights)
    for name in weights:
        above = name.replace("down.weight", "gate_up.weight")
        down, gate_up = alike(weights[name]), alike(weights.get(above))
        plain = above.replace("weight", "bias") not in weights
        if (
            name != above and plain and isinstance(gate_up, Int4)
            and isinstance(down, Int4) and down.order is not None
        ):  # fmt: skip
            result[name] = replace(weights[name], own=(_changed(down, presorted=True),))
            both = (_changed(part, outputs=down.order) for part in weights[above].quantised())
            result[above] = replace(weights[above], own=tuple(both))
    return result


def _changed(part: Quantised | None, **fields: Any) -> Int4:
    assert isinstance(part, Int4)
    changed = copy(part)
    changed.__dict__.update(fields)
    return changed


def spans(weight: Weight, elements: int = CHUNK) -> Iterator[tuple[Any, int, int]]:
    """The rows of a quantised weight, about `elements` numbers at a time: (part, first row, last row + 1);
    each begins at a multiple of eight.
    """
    for part in weight.quantised():
        assert part is not None
        height, width = part.shape
        step = max(8, elements // width // 8 * 8)
        for start in range(0, height, step):
            yield part, start, min(start + step, height)


def unpack(words: Tensor) -> Tensor:
    """int32 [rows, n] → uint8 [rows, 8 n], four bits each from the lowest on."""
    bytes_ = words.view(torch.uint8)
    return torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)

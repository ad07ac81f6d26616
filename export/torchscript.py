"""A module → a TorchScript archive. Only this file depends on torch.jit's tracer, which torch has deprecated:
a successor (torch.export, AOTInductor) is a file beside it.

`vision.pt` is plain TorchScript, for any libtorch. In `decoder.pt` what stands between two products is one op
of `fused`, which whoever opens it registers first (fused/torch_op.py).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .attention import Graph, Paged
from .bundle import GraphSpec, TensorSpec
from .decoder import Decoder, Layer
from .fused import torch_op
from .quantize import HalfLinear, fill, swap

if TYPE_CHECKING:
    from .graph import GraphPlan


@cache
def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traced, it keeps its branches: which one runs is decided where the archive is opened."""
    return torch.jit.script(function)


class Product(NamedTuple):
    """y = value / scale + bias of a linear layer, not put together yet: the next op does that."""

    value: Tensor  # [T, out], in the product's type
    bias: Tensor | None
    scale: Tensor | None


def product(linear: nn.Module, x: Tensor) -> Product:
    """x [T, in], as `operand` says."""
    if not isinstance(linear, HalfLinear):
        return Product(linear(x), None, None)
    scale = None
    if linear.wide:
        x, scale = _scripted(torch_op.token_scaled)(x)
    return Product(linear.product(x), linear.bias, scale)


def operand(linear: nn.Module) -> torch.dtype:
    """The type in which `product` takes its input."""
    return linear.dtype if isinstance(linear, HalfLinear) and not linear.wide else torch.float32


class PagedOp(Paged):
    """The paged lowering in one op, which updates the caches in place; called by `FusedLayer`."""

    def __call__(  # type: ignore[override]
        self, index: int, qkv: Product, layer: Layer, logn: Tensor | None
    ) -> Tensor:
        c = self.c
        norms = (layer.q_norm.weight, layer.k_norm.weight) if c.qk_norm else (None, None)
        step = [self.inputs[s.name] for s in self.inputs_[4:7]]
        out = _scripted(torch_op.qkv_attention)(
            qkv.value, qkv.bias, logn, *norms, self.cos, self.sin, *self.caches(index), *step,
            c.heads, c.kv_heads, c.eps, c.head_dim**-0.5, c.window or -1,
        )  # fmt: skip
        return self.cut(out)


class FusedLayer(Layer):
    """`Layer` in the ops of `fused`: what it computes, in the same order. From layer to layer goes x with the
    output of `down`, which the next norm adds."""

    def forward(  # type: ignore[override]
        self, x: Tensor | tuple[Tensor, Product], attend: PagedOp, index: int, logn: Tensor | None
    ) -> Tensor | tuple[Tensor, Product]:
        x, down = x if isinstance(x, tuple) else (x, (None, None, None))
        x, normed = _add_norm(x, down, self.attention_norm, self.qkv)
        attended = attend(index, product(self.qkv, normed), self, logn)
        x, normed = _add_norm(x, product(self.o, attended), self.mlp_norm, self.gate_up)
        gate_up = product(self.gate_up, normed)
        gated = _scripted(torch_op.silu_mul)(gate_up.value, gate_up.bias, operand(self.down))
        if index + 1 == self.c.layers:
            return x + self.down(gated)
        return x, product(self.down, gated)


def _add_norm(
    x: Tensor, delta: tuple[Tensor | None, ...], norm: nn.RMSNorm, after: nn.Module
) -> tuple[Tensor, Tensor]:
    return _scripted(torch_op.add_rms_norm)(x, *delta, norm.weight, norm.eps, operand(after))


class Script(Graph):
    """The decoder, its layers fused: tensors in the order of `attention.specs` → logits alone."""

    def __init__(self, decoder: Decoder, lowering: type[PagedOp], inputs: list[TensorSpec]):
        super().__init__(decoder, lowering, inputs)
        for layer in decoder.layers:
            layer.__class__ = FusedLayer  # its modules stay, for quantize.swap

    def forward(self, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*tensors)[0]


def write(
    graph: GraphPlan, folder: Path, key: str, tell: Callable[[str], None], count: Callable[[int, str], None]
) -> GraphSpec:
    """Write `key`.pt. The weights lie in a mapped file while it is made, so that they need no memory.

    `count` hears of each chunk of weights: its bytes and the weight's name.
    """
    weights = folder / f".{key}.weights"
    try:
        module, stored = materialised(graph, weights)
        root = module.get_submodule(graph.root.removesuffix("."))
        kinds = {name.removeprefix(graph.root): kind for name, kind in stored.items()}
        fill(root, graph.weights, kinds, count)
        tell(f"tracing the {key} graph")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated: see above
            traced = torch.jit.trace(module, example(graph.inputs), check_trace=False)
            tell(f"saving {key}.pt")
            torch.jit.save(traced, str(folder / f"{key}.pt"))
    finally:
        weights.unlink(missing_ok=True)
    return GraphSpec(f"{key}.pt", graph.inputs, graph.outputs, graph.precision)


def materialised(graph: GraphPlan, file: Path) -> tuple[nn.Module, dict[str, str]]:
    """The module, its parameters mapped from a new file, and how they are to be stored (quantize.swap)."""
    with FakeTensorMode():
        module = graph.make().eval().requires_grad_(False)
        stored = swap(module, graph.precision, "torchscript", dtype=getattr(torch, graph.dtype))
    names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in module.named_buffers(remove_duplicate=False)]
    tensors = {name: _get(module, name) for name in names}
    nbytes = {id(t): -(-t.nbytes // 64) * 64 for t in tensors.values()}
    size = max(1, sum(nbytes.values()))
    with open(file, "wb") as room:  # a full disk is an error here, and a dead process when a page is written
        os.posix_fallocate(room.fileno(), 0, size)
    memory = np.memmap(file, np.uint8, "r+", shape=(size,))
    made: dict[int, Tensor] = {}
    at = 0
    for name, fake in tensors.items():
        if id(fake) not in made:  # a tied head is there once
            flat = torch.from_numpy(memory[at : at + fake.nbytes])
            made[id(fake)] = flat.view(fake.dtype).view(fake.shape)
            at += nbytes[id(fake)]
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        new = made[id(fake)]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            owner._buffers[leaf] = new
        short = name.removeprefix(graph.root)
        if short in graph.constants:
            new.copy_(graph.constants[short])
    return module, stored


def _get(module: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def example(inputs: list[TensorSpec]) -> tuple[Tensor, ...]:
    """A step of two rows, of three tokens and of one after two: every size differs from 1 and from others."""
    sizes = {"T": 4, "N": 3, "R": 2, "R1": 3, "M": 5, "K": 2, "blocks": 7}
    values = {
        "cumulative_sequence_length": [0, 3, 4],
        "past_seqlens": [0, 2],
        "block_table": [[0, -1, -1, -1, -1], [1, -1, -1, -1, -1]],
        "logits_rows": [2, 3],
    }
    tensors = []
    for spec in inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        dtype = getattr(torch, spec.dtype)
        value = torch.zeros(shape, dtype=dtype)
        if spec.name in values:
            value = torch.tensor(values[spec.name], dtype=dtype)
        assert math.prod(shape) == value.numel()
        tensors.append(value)
    return tuple(tensors)

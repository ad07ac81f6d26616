"""The ops for torch: importing this module registers them for CUDA (kernels; never run on real hardware yet).

The functions are plain torch, the same sums in the same order as the decoder's own modules; where their
tensors are on CUDA they call the ops `rtp_llm::add_rms_norm`, `qkv_attention`, `silu_mul` and `token_scaled`.
torchscript.py scripts them into the graph, both branches: on a CPU an op written in Python would cost 30 µs a
call, ten times what a norm of one token costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import rotate
from ..paged_attention.torch_op import on_cuda  # the module registers rtp_llm::paged_attention
from ..quantize import token_scale

SCHEMAS = {
    "add_rms_norm": "(Tensor x, Tensor? value, Tensor? bias, Tensor? scale, Tensor weight, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    "qkv_attention": "(Tensor value, Tensor? bias, Tensor? logn, Tensor? q_norm, Tensor? k_norm, Tensor cos, "
    "Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cumulative_sequence_length, "
    "Tensor past_seqlens, Tensor block_table, int num_heads, int kv_num_heads, float eps, float scale, "
    "int local_window_size) -> Tensor",
    "silu_mul": "(Tensor value, Tensor? bias, ScalarType dtype) -> Tensor",
    "token_scaled": "(Tensor x) -> (Tensor, Tensor)",
}


def _value(value: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    value = value.float()
    if scale is not None:
        value = value / scale
    return value if bias is None else value + bias


def add_rms_norm(
    x: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return torch.ops.rtp_llm.add_rms_norm(x, value, bias, scale, weight, eps, dtype)
    total = x if value is None else x + _value(value, bias, scale)
    return total, F.rms_norm(total, weight.shape, weight, eps).to(dtype)


def qkv_attention(
    value: Tensor,
    bias: Tensor | None,
    logn: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    num_heads: int,
    kv_num_heads: int,
    eps: float,
    scale: float,
    local_window_size: int,
) -> Tensor:
    step = cumulative_sequence_length, past_seqlens, block_table
    if value.is_cuda:
        return torch.ops.rtp_llm.qkv_attention(
            value, bias, logn, q_norm, k_norm, cos, sin, key_cache, value_cache, step[0], step[1], step[2],
            num_heads, kv_num_heads, eps, scale, local_window_size,
        )  # fmt: skip
    heads = num_heads + 2 * kv_num_heads
    x = _value(value, bias).unflatten(-1, (heads, value.shape[1] // heads))
    q, k, v = x.split([num_heads, kv_num_heads, kv_num_heads], 1)
    if q_norm is not None and k_norm is not None:
        q, k = F.rms_norm(q, q_norm.shape, q_norm, eps), F.rms_norm(k, k_norm.shape, k_norm, eps)
    if logn is not None:
        q = q * logn.unsqueeze(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    fill = key_cache.shape[3] - x.shape[2]
    if fill > 0:
        q, k, v = F.pad(q, [0, fill]), F.pad(k, [0, fill]), F.pad(v, [0, fill])
    kind = key_cache.dtype
    return torch.ops.rtp_llm.paged_attention(
        q.to(kind).flatten(1), k.to(kind).flatten(1), v.to(kind).flatten(1), key_cache, value_cache,
        step[0], step[1], step[2], num_heads, kv_num_heads, scale, local_window_size,
    )  # fmt: skip


def silu_mul(value: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if value.is_cuda:
        return torch.ops.rtp_llm.silu_mul(value, bias, dtype)
    gate, up = _value(value, bias).chunk(2, 1)
    return (F.silu(gate) * up).to(dtype)


def token_scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return torch.ops.rtp_llm.token_scaled(x)
    x = x.float()
    scale = token_scale(x)
    return (x * scale).half(), scale


for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.rtp_llm, _name):  # once a process, however often this runs
        torch.library.define(f"rtp_llm::{_name}", _schema)
        torch.library.impl(f"rtp_llm::{_name}", "CUDA", on_cuda(__package__, _name, _name))

"""`rtp_llm::paged_attention`, the op for torch: importing this module registers it.

CPU: plain torch, below. CUDA: the kernels (never run on real hardware yet). The caches are updated in place.
A graph that was traced, saved and loaded again calls it by name, so whoever loads one imports this first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import MissingDependency

NAME = "rtp_llm::paged_attention"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor cumulative_sequence_length, Tensor past_seqlens, Tensor block_table, "
    "int num_heads, int kv_num_heads, float scale, int local_window_size) -> Tensor"
)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int = -1,
) -> Tensor:
    """→ output [T, heads · D]; arguments as in the package's docstring, the caches contiguous."""
    return torch.ops.rtp_llm.paged_attention(
        query, key, value, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
        num_heads, kv_num_heads, scale, local_window_size,
    )  # fmt: skip


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
) -> Tensor:
    _, block_size, _, D = key_cache.shape
    keys, values = (c.view(-1, kv_num_heads, D) for c in (key_cache, value_cache))  # [places, kv_heads, D]
    starts, past, table = (x.long() for x in (cumulative_sequence_length, past_seqlens, block_table))
    lengths = starts.diff()

    row = torch.repeat_interleave(lengths)
    position = past[row] + torch.arange(len(row)) - starts[row]
    place = _places(table[row], position.unsqueeze(1), block_size).squeeze(1)
    mapped = (place >= 0).nonzero().squeeze(1)
    for cache, new in ((keys, key), (values, value)):
        cache.index_copy_(0, place[mapped], new.unflatten(-1, (kv_num_heads, D))[mapped])

    # decode rows go together where their lengths are alike to a factor of two; each chunk goes alone
    groups: dict[tuple[int, int], list[int]] = {}
    for r, (n, length) in enumerate(zip(lengths.tolist(), past.tolist(), strict=True)):
        if n:
            groups.setdefault((1, length.bit_length()) if n == 1 else (n, -r), []).append(r)
    q = query.unflatten(-1, (num_heads, D))
    output = torch.zeros_like(q)
    for (n, _), rows in groups.items():
        tokens = starts[rows, None] + torch.arange(n)  # [B, n]
        output[tokens] = _attend(
            q[tokens], keys, values, past[rows], table[rows], block_size, scale, local_window_size
        )
    return output.flatten(1)


def _places(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """table [B, M], positions [B, L] → index into the flat pool [B, L], negative where unmapped."""
    inside = positions // block_size < table.shape[1]
    block = table.gather(1, (positions // block_size).clamp(max=table.shape[1] - 1))
    return torch.where(inside & (block >= 0), block * block_size + positions % block_size, -1)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    table: Tensor,
    block_size: int,
    scale: float,
    window: int,
) -> Tensor:
    """q [B, n, heads, D], keys and values [places, kv_heads, D], past [B], table [B, M] → like q."""
    n = q.shape[1]
    query_position = (past.unsqueeze(1) + torch.arange(n)).unsqueeze(2)  # [B, n, 1]
    first = (past - window + 1).clamp(min=0) if window > 0 else torch.zeros_like(past)
    positions = first.unsqueeze(1) + torch.arange(int((past + n - first).max()))  # [B, L]
    place = _places(table, positions, block_size)
    mask = (positions.unsqueeze(1) <= query_position) & (place >= 0).unsqueeze(1)  # [B, n, L]
    if window > 0:
        mask &= positions.unsqueeze(1) > query_position - window
    # a place that nobody wrote may hold NaN, and 0 · NaN is NaN: read one that the row sees instead
    used = mask.any(1)
    place = torch.where(used, place, place.gather(1, used.long().argmax(1, keepdim=True)).clamp(min=0))
    k, v = (x[place].transpose(1, 2) for x in (keys, values))  # [B, kv_heads, L, D]
    causal = (
        n > 1 and window <= 0 and mask.shape[2] == n and bool(used.all())
    )  # a whole prompt: half the work
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        None if causal else mask.unsqueeze(1),
        0,
        causal,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2).where(mask.any(-1)[..., None, None], 0)


def on_cuda(package: str, kernel: str, name: str) -> Callable[..., Any]:
    """An op's CUDA implementation: `kernel` of `package`.kernels. `name`: how an error calls it."""

    def launch(*arguments: Any, **attributes: Any) -> Any:
        try:
            kernels = import_module(f"{package}.kernels")
        except ImportError as error:
            raise MissingDependency(
                f"{name} on CUDA needs the Triton language: pip install triton"
            ) from error
        return getattr(kernels, kernel)(*arguments, **attributes)

    return launch


def _fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


if not hasattr(torch.ops.rtp_llm, "paged_attention"):  # once a process, however often this runs
    torch.library.define(NAME, SCHEMA)
    torch.library.impl(NAME, "CPU", _cpu)
    torch.library.impl(NAME, "CUDA", on_cuda(__package__, "paged_attention", "paged attention"))
    torch.library.register_fake(NAME, _fake)

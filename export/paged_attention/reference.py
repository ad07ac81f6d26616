"""The op in NumPy: the specification that kernels, torch op and rewritten graphs are compared with.

Arrays are those of the package's docstring, of any float type (ml_dtypes.bfloat16 too); inputs stay as they
are, results are new arrays, and everything between is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def paged_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    cumulative_sequence_length: np.ndarray,
    past_seqlens: np.ndarray,
    block_table: np.ndarray,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int = -1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """→ output [T, heads · D], key_cache_out, value_cache_out. local_window_size −1: no window."""
    step = cumulative_sequence_length, past_seqlens, block_table
    key_cache, value_cache = cache_write(key, value, key_cache, value_cache, *step)
    output = np.zeros((len(query), num_heads, key_cache.shape[-1]))
    for tokens, scores, values in _rows(
        query, key_cache, value_cache, *step, num_heads, kv_num_heads, scale, local_window_size
    ):
        if values.size:
            m = np.maximum(scores.max(-1, keepdims=True), np.finfo(float).min)  # −inf − −inf is no number
            p = np.exp(scores - m)
            o = p @ values / np.maximum(p.sum(-1, keepdims=True), np.finfo(float).tiny)
            output[tokens] = o.swapaxes(0, 1)
    return output.reshape(query.shape).astype(query.dtype), key_cache, value_cache


def cache_write(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    cumulative_sequence_length: np.ndarray,
    past_seqlens: np.ndarray,
    block_table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """→ key_cache_out, value_cache_out: the caches with the new tokens of every row in their places."""
    key_cache, value_cache = key_cache.copy(), value_cache.copy()
    block_size, *head = key_cache.shape[1:]
    for r, past in enumerate(past_seqlens):
        for j, t in enumerate(range(*cumulative_sequence_length[r : r + 2])):
            place, offset = divmod(past + j, block_size)
            block = block_table[r, place] if place < block_table.shape[1] else -1
            if block >= 0:
                key_cache[block, offset] = key[t].reshape(head)
                value_cache[block, offset] = value[t].reshape(head)
    return key_cache, value_cache


def partial_attention(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    cumulative_sequence_length: np.ndarray,
    past_seqlens: np.ndarray,
    block_table: np.ndarray,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int = -1,
    splits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the caches as `cache_write` left them, each row's positions cut into `splits` ranges.

    → partial float32 [splits, T, heads, D], the sums of exp(s − m) · v over a range, and stats float32
    [splits, T, heads, 2]: m, the largest s = scale · q · k there, and l, the sum of exp(s − m). A range of
    which a token sees nothing has m = −inf, l = 0. Where the cuts lie is free: only what `combine` makes of
    all of them is the op's; a kernel may leave partials with l = 0 unwritten.
    """
    D = key_cache.shape[-1]
    partial = np.zeros((splits, len(query), num_heads, D), np.float32)
    stats = np.zeros((splits, len(query), num_heads, 2), np.float32)
    stats[..., 0] = -np.inf
    for tokens, scores, values in _rows(
        query, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
        num_heads, kv_num_heads, scale, local_window_size,
    ):  # fmt: skip
        parts = zip(np.array_split(scores, splits, -1), np.array_split(values, splits, 1), strict=True)
        for i, (s, v) in enumerate(parts):
            if v.size:
                m = s.max(-1, keepdims=True)
                p = np.exp(s - np.maximum(m, np.finfo(float).min))
                partial[i, tokens] = (p @ v).swapaxes(0, 1)
                stats[i, tokens] = np.concatenate([m, p.sum(-1, keepdims=True)], -1).swapaxes(0, 1)
    return partial, stats


def combine(partial: np.ndarray, stats: np.ndarray, query: np.ndarray) -> np.ndarray:
    """partial, stats of all ranges → output [T, heads · D] in the type of query, which is not read.

    Σ e^(m − M) · partial / Σ e^(m − M) · l with M the largest m; zeros where every l is 0. Partials with
    l = 0 are not read.
    """
    m, sums = stats[..., :1].astype(float), stats[..., 1:].astype(float)
    weight = np.where(sums > 0, np.exp(m - np.maximum(m.max(0), np.finfo(float).min)), 0)
    total = np.maximum((weight * sums).sum(0), np.finfo(float).tiny)
    output = (weight * np.where(sums > 0, partial, 0)).sum(0) / total
    return output.reshape(len(output), -1).astype(query.dtype)


def _rows(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    cumulative_sequence_length: np.ndarray,
    past_seqlens: np.ndarray,
    block_table: np.ndarray,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    window: int,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Of each row: its tokens, their scores [heads, n, L] (−inf where not seen), values [heads, L, D]."""
    block_size, _, D = key_cache.shape[1:]
    for r, past in enumerate(past_seqlens):
        start, end = cumulative_sequence_length[r : r + 2]
        length = min(past + end - start, block_table.shape[1] * block_size)
        seen = np.arange(length)
        query_position = past + np.arange(end - start)[:, None]
        blocks = block_table[r, seen // block_size]
        mask = (seen <= query_position) & (blocks >= 0)
        if window > 0:
            mask &= seen > query_position - window
        keys, values = (c[blocks, seen % block_size].astype(float) for c in (key_cache, value_cache))
        values[blocks < 0] = 0  # whatever index −1 found
        group = num_heads // kv_num_heads
        keys, values = (np.repeat(x.transpose(1, 0, 2), group, 0) for x in (keys, values))  # [heads, L, D]
        q = query[start:end].reshape(-1, num_heads, D).astype(float).transpose(1, 0, 2)
        scores = np.where(mask, scale * q @ keys.transpose(0, 2, 1), -np.inf)  # [heads, n, L]
        yield slice(start, end), scores, values


def operators() -> list[type]:
    """The ops of both graphs, exported and rewritten, for ReferenceEvaluator(model, new_ops=operators()).

    Attributes go by the names of the functions above; others (a plugin's) are ignored.
    """
    from onnx.reference.op_run import OpRun

    def attributes(given: dict[str, Any], *more: str) -> dict[str, Any]:
        names = {"num_heads", "kv_num_heads", "scale", "local_window_size", *more}
        return {name: value for name, value in given.items() if name in names}

    class PagedAttention(OpRun):
        op_domain = "com.microsoft"

        def _run(self, *inputs: Any, **given: Any) -> tuple[np.ndarray, ...]:
            refused = [i for i, x in enumerate(inputs[8:], 8) if x is not None and i != 16]
            if refused or given.get("do_rotary"):
                raise NotImplementedError(f"PagedAttention with inputs {refused} or do_rotary")
            known = attributes(given)
            known.setdefault("scale", inputs[3].shape[-1] ** -0.5)
            return paged_attention(*inputs[:8], **known)

    class CacheWrite(OpRun):
        op_domain = "rtp_llm"

        def _run(self, *inputs: Any, **given: Any) -> tuple[np.ndarray, ...]:
            return cache_write(*inputs)

    class PartialAttention(OpRun):
        op_domain = "rtp_llm"

        def _run(self, *inputs: Any, **given: Any) -> tuple[np.ndarray, ...]:
            return partial_attention(*inputs, **attributes(given, "splits"))

    class Combine(OpRun):
        op_domain = "rtp_llm"

        def _run(self, *inputs: Any, **given: Any) -> tuple[np.ndarray, ...]:
            return (combine(*inputs),)

    return [PagedAttention, CacheWrite, PartialAttention, Combine]

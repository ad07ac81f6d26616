"""The ops' kernels in the Triton language, and their launchers for torch.

Never run on real hardware yet: they equal `reference` under the interpreter, and compile for every target.

A decode of one token does nothing but read weights: a 7B decoder in 16 bits reads 13.2 GB, 3.9 ms at an
H100's 3.35 TB/s, 2.8 ms at an H200's 4.8. Between its products lie vectors of 4,096 to 22,016 numbers, by
their bytes tens of nanoseconds (a norm moves 16 bytes an element, 66 KB, 20 ns); what costs is the launch, 2
to 4 µs each in a CUDA graph. So what counts is their number. Launches a layer beside the 4 products:

                                       before                                                    now
    norms, residual sums                 2 + 2                                                   2
    casts around products              4 · 2                                                     –
    rope: 4 mul, add, sub, cat         2 · 7                                                     1
    its casts, and the attention's     3 + 1                                                     –
    cache write, partial, combine          3                                                     2
    silu, mul                              2                                                     1
    in all                                35                                                     6
    Qwen's bias and logn                 + 2                                                     –
    float16: scaled operands of two   + 2 · 9                                                  + 2

32 layers at 3 µs: 3.4 ms before, 0.6 ms now.

Where there are many tokens (a prompt's chunk, thousands of rows), bytes count: a layer of hidden size 4,096
and 11,008 inside, 32 heads, bf16, moves 12 + 12 bytes a token and element of the hidden size in the norms, 12
in rope, and 6 a token and element of the inside in silu_mul: 213 KB a token, 64 µs for 1,000 tokens at
3.35 TB/s (their products at 990 Tflop/s: 409 µs). Nothing is read twice from memory (rope's partners and
token_scaled's second look come from the caches), 16 bytes a thread and load.

A program has a whole token (norm, scale), 2,048 numbers of one's heads (rope), or 1,024 of one (silu_mul).
Offsets are int64. No size that changes from step to step is compiled in: tokens are the grid. A launch reads
shapes only, never a value on the device: CUDA graphs can hold it.
"""

# no `from __future__ import annotations`: the compiler reads tl.constexpr from the annotations
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..paged_attention import kernels as paged

OPTIONS = {"enable_fp_fusion": True}  # Triton language 3.9 warns where fusion is not said


@triton.jit
def _add_rms_norm(
    x, value, bias, scale, weight, total, normed,
    WIDTH: tl.constexpr, EPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLUMNS)
    inside = i < WIDTH
    y = tl.load(x + row * WIDTH + i, mask=inside, other=0.0)
    w = tl.load(weight + i, mask=inside, other=0.0)
    if value is not None:
        v = tl.load(value + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            v *= tl.div_rn(1.0, tl.load(scale + row))  # exact: powers of two
        if bias is not None:
            v += tl.load(bias + i, mask=inside, other=0.0)
        y += v
    tl.store(total + row * WIDTH + i, y, mask=inside)
    out = y * tl.rsqrt(tl.sum(y * y) / WIDTH + EPS) * w
    tl.store(normed + row * WIDTH + i, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "M"])
def _rope_write(
    value, bias, logn, q_norm, k_norm, cos, sin, cumulative, past, table, R, M, query, key_cache, value_cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CACHE_D: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Heads n … n + TILE − 1 of one token: of queries, then keys, then values."""
    token = tl.program_id(0)
    row = 0  # R: the token is nobody's
    for start in range(0, R, 128):
        r = start + tl.arange(0, 128)
        ends = tl.load(cumulative + 1 + r, mask=r < R, other=0)
        row += tl.sum(((ends <= token) & (r < R)).to(tl.int32))
    position = tl.load(past + row, mask=row < R, other=0) + token - tl.load(cumulative + row)
    mapped = (row < R) & (position < M * BLOCK_SIZE)
    block = tl.load(table + row * M.to(tl.int64) + position // BLOCK_SIZE, mask=mapped, other=-1)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE

    t = token.to(tl.int64)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, DPAD)
    turned = d < 2 * HALF
    other = tl.where(d < HALF, d + HALF, tl.where(turned, d - HALF, d))  # what d is rotated with
    is_query, is_key = n < HEADS, (n >= HEADS) & (n < HEADS + KV_HEADS)
    is_value = (n >= HEADS + KV_HEADS) & (n < HEADS + 2 * KV_HEADS)
    mask = (n < HEADS + 2 * KV_HEADS)[:, None] & (d < D)[None, :]
    at = n[:, None] * D + d[None, :]
    at_other = n[:, None] * D + other[None, :]
    first = value + t * ((HEADS + 2 * KV_HEADS) * D)
    x = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(first + at_other, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=mask, other=0.0)
        y += tl.load(bias + at_other, mask=mask, other=0.0)
    if q_norm is not None:
        norm = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
        head = d < D
        of_query, of_key = tl.load(q_norm + d, mask=head), tl.load(k_norm + d, mask=head)
        weight = tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
        x = tl.where(is_value[:, None], x, x * norm[:, None] * weight)
        of_query, of_key = tl.load(q_norm + other, mask=head), tl.load(k_norm + other, mask=head)
        weight = tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
        y = y * norm[:, None] * weight
    if logn is not None:
        factor = tl.where(is_query, tl.load(logn + t), 1.0)[:, None]
        x *= factor
        y *= factor
    angle = t * HALF + tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    s = tl.where(d < HALF, -s, s)
    x = tl.where(is_value[:, None], x, x * c[None, :] + y * s[None, :])
    x = tl.where((d < D)[None, :], x, 0.0).to(query.dtype.element_ty)

    kept = (d < CACHE_D)[None, :]
    tl.store(query + (t * HEADS + n)[:, None] * CACHE_D + d[None, :], x, mask=is_query[:, None] & kept)
    kept = (d < tl.where(block >= 0, CACHE_D, 0))[None, :]
    key = place * KV_HEADS + n - HEADS
    tl.store(key_cache + key[:, None] * CACHE_D + d[None, :], x, mask=is_key[:, None] & kept)
    key -= KV_HEADS
    tl.store(value_cache + key[:, None] * CACHE_D + d[None, :], x, mask=is_value[:, None] & kept)


@triton.jit
def _silu_mul(value, bias, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < WIDTH
    gate = tl.load(value + row * (2 * WIDTH) + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(value + row * (2 * WIDTH) + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        gate += tl.load(bias + i, mask=inside, other=0.0)
        up += tl.load(bias + WIDTH + i, mask=inside, other=0.0)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _token_scaled(x, out, scale, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLUMNS)
    largest = tl.full([COLUMNS], 2.0**-24, tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        v = tl.load(x + row * WIDTH + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(v))
    bits = tl.max(largest).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 + tl.where((bits & 0x7FFFFF) != 0, 1, 0)  # ceil(log2(largest)), exactly
    s = ((127 - tl.minimum(exponent, 126)) << 23).to(tl.float32, bitcast=True)
    for start in range(0, WIDTH, COLUMNS):
        v = tl.load(x + row * WIDTH + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + start + i, (v * s).to(tl.float16), mask=start + i < WIDTH)
    tl.store(scale + row, s)


KERNELS = {
    "add_rms_norm": _add_rms_norm, "rope_write": _rope_write, "silu_mul": _silu_mul,
    "token_scaled": _token_scaled,
}  # fmt: skip


def row_constants(width: int, limit: int = 0) -> dict[str, int]:
    """Of a program that has a whole token: 16 numbers a thread; with `limit`, at most that many at a time."""
    columns = triton.next_power_of_2(width)
    columns = min(columns, limit or columns)
    return {"WIDTH": width, "COLUMNS": columns, "num_warps": max(1, min(32, columns // 512))}


def rope_constants(
    heads: int, kv_heads: int, head_dim: int, rotary: int, eps: float, block_size: int, cache_head_dim: int
) -> dict[str, int | float]:
    padded = triton.next_power_of_2(cache_head_dim)
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "HALF": rotary // 2, "EPS": eps,
        "BLOCK_SIZE": block_size, "CACHE_D": cache_head_dim, "DPAD": padded, "TILE": max(1, 2048 // padded),
        "num_warps": 4,
    }  # fmt: skip


def add_rms_norm(
    x: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """→ sum, normed. As in the other launchers, tensors are contiguous and on CUDA, or on the CPU under
    TRITON_INTERPRET=1."""
    T, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    _add_rms_norm[(T,)](
        x, value, bias, scale, weight, total, normed, EPS=eps, **row_constants(width), **OPTIONS
    )
    return total, normed


def rope_write(
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
) -> Tensor:
    """→ query [T, heads · cache D], rotated; keys and values are written into the caches."""
    T, heads = len(value), num_heads + 2 * kv_num_heads
    _, block_size, _, cache_head_dim = key_cache.shape
    c = rope_constants(
        num_heads, kv_num_heads, value.shape[1] // heads, 2 * cos.shape[1], eps, block_size, cache_head_dim
    )
    query = torch.empty((T, num_heads * cache_head_dim), dtype=key_cache.dtype, device=value.device)
    _rope_write[(T, triton.cdiv(heads, c["TILE"]))](
        value, bias, logn, q_norm, k_norm, cos, sin,
        cumulative_sequence_length, past_seqlens, block_table, *block_table.shape,
        query, key_cache, value_cache, **c, **OPTIONS,
    )  # fmt: skip
    return query


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
    """→ output [T, heads · cache D]: paged_attention's kernels, with rope in the place of its cache write."""
    step = cumulative_sequence_length, past_seqlens, block_table
    query = rope_write(
        value, bias, logn, q_norm, k_norm, cos, sin, key_cache, value_cache, *step,
        num_heads, kv_num_heads, eps,
    )  # fmt: skip
    return paged.attend(
        query, key_cache, value_cache, *step, num_heads, kv_num_heads, scale, local_window_size
    )


def silu_mul(value: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """→ `dtype` [T, width]"""
    T, width = len(value), value.shape[1] // 2
    out = torch.empty((T, width), dtype=dtype, device=value.device)
    columns = min(1024, triton.next_power_of_2(width))
    _silu_mul[(T, triton.cdiv(width, columns))](
        value, bias, out, WIDTH=width, COLUMNS=columns, num_warps=4, **OPTIONS
    )
    return out


def token_scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """→ float16 [T, width], scale [T, 1]"""
    T, width = x.shape
    out = torch.empty_like(x, dtype=torch.float16)
    scale = torch.empty((T, 1), dtype=torch.float32, device=x.device)
    _token_scaled[(T,)](x, out, scale, **row_constants(width, 8192), **OPTIONS)
    return out, scale

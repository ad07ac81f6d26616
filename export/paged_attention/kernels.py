"""The op's three kernels in the Triton language, their launchers for torch, and their compiler to PTX.

    cache_write        new keys and values → their places in the pool
    partial_attention  every row's keys, cut into SPLITS ranges → sums of each range and their (m, l)
    combine            the ranges of a token → its output

A step of more than WHOLE tokens cuts nothing: there partial_attention writes the output, and combine is not
launched.

Never run on real hardware yet: they equal `reference` under the interpreter, and compile for every target.

Designed for the chip, per layer, b bytes an element, H_kv heads of D, L keys a row:

- Decode reads each key and value once and does 2 · group flops an element with it, in 16 bits `group` flops a
  byte (16 where a matrix of fewer rows is padded): far below the chip's ridge (H100: 990 Tflop/s over
  3.35 TB/s, 295 flops a byte), and time is bytes over bandwidth. Batch 32, L = 2048, 32 heads of 128, bf16:
  32 · 2048 · 2 · 32 · 128 · 2 = 1.07 GB, 321 µs at 3.35 TB/s. Everything else is small:
  partials 32 · 32 · 128 · 4 · 8 splits = 4.2 MB written and read again, 0.8 % (grouped 32/8: 268 MB and 3 %);
  queries and outputs 0.5 MB; block tables 4 bytes per 8 KiB.
- Bandwidth needs bytes in flight: 3.35 TB/s · 0.8 µs = 2.7 MB, 20 KB on each of 132 SMs. A program works on
  a tile of 32 keys and values (16 KiB at D = 128) while the next comes (cp.async), and three or four programs
  share an SM: 120 to 142 registers on sm_90, and ≤ 48 KiB of shared memory, allow that.
- It needs the instructions to keep up, too: decode's loop has 290 a warp for those 16 KiB on sm_90, so an SM
  could digest 96 KB/µs where its share of the bandwidth brings 25; shared memory is busy for 40 % of it.
- A program reads D · b contiguous bytes of a key, and H_kv · D · b bytes on comes the next key. So the heads
  are the fastest axis of the grid: neighbours in time are neighbours in memory; DRAM pages are used whole.
- The group's heads are the rows of one matrix, padded to the 16 of a tensor core's tile, so that keys are
  read once per group. Padding rows cost no bytes.
- Rows with many new tokens are worked on in tiles of 64 matrix rows (wgmma, tcgen05); keys come from L2. Such
  tiles fill the chip without splits, whose float32 partials would be most of their traffic: a row of n
  tiles uses SPLITS / n ranges, at least one. The others leave at once, with l = 0, and `combine` skips them.
  Without ranges there are no partials at all: of 2048 tokens, 32 heads of 128 in bf16, 67 MB of 84 are
  neither written nor read, 20 µs at 3.35 TB/s, and a launch.
- cache_write moves 4 · T · H_kv · D · b bytes. T = 32 tokens are 1 MB, 0.3 µs: a launch costs more, so only
  a prefill can show bandwidth.

Positions are int32, offsets into pools and partials int64 (a pool may exceed 2^31 elements). A launch reads
shapes only, never a value on the device: CUDA graphs can hold it.
"""

# no `from __future__ import annotations`: the compiler reads tl.constexpr from the annotations
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...errors import InternalError

SPLITS = 8
WHOLE = 512  # tokens of a step; of more, no row is split
SHARED_LIMIT = 48 * 1024  # bytes a kernel may have without being asked for more
KERNELS = ("cache_write", "partial_attention", "combine")


@triton.jit
def _find(cumulative, past, T, R, tile, TOKENS: tl.constexpr):
    """A tile is up to TOKENS tokens of one row. → its row, the row's first token and end, the tile's first
    token (no less than the end in a tile too many), and that token's position.

    Row r has the tiles from cu[r] // TOKENS + r on: enough for its tokens, whatever the lengths are. Row R
    is what T has beyond cu[R].
    """
    row = 0
    for start in range(0, R, 128):
        r = start + 1 + tl.arange(0, 128)
        ends = tl.load(cumulative + r, mask=r <= R, other=0)
        row += tl.sum(((ends // TOKENS + r <= tile) & (r <= R)).to(tl.int32))
    first = tl.load(cumulative + row)
    end = tl.where(row < R, tl.load(cumulative + row + 1, mask=row < R, other=0), T)
    token = first + (tile - first // TOKENS - row) * TOKENS
    position = tl.load(past + row, mask=row < R, other=0) + token - first
    return row, first, end, token, position


@triton.jit(do_not_specialize=["T", "R", "M"])
def _cache_write(
    key, value, key_cache, value_cache, cumulative, past, table, T, R, M, key_cache_out, value_cache_out,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first, end, token, position = _find(cumulative, past, T, R, tl.program_id(0), TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, TOKENS)
    position += i
    end = tl.where(row < R, end, 0)
    mapped = (token + i < end) & (position < M * BLOCK_SIZE)
    block = tl.load(table + row.to(tl.int64) * M + position // BLOCK_SIZE, mask=mapped, other=-1)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    mask = (block >= 0)[:, None] & (column < WIDTH)[None, :]
    source = (token + i).to(tl.int64)[:, None] * WIDTH + column[None, :]
    target = place[:, None] * WIDTH + column[None, :]
    k = tl.load(key + source, mask=mask)
    v = tl.load(value + source, mask=mask)
    tl.store(key_cache_out + target, k, mask=mask)
    tl.store(value_cache_out + target, v, mask=mask)


@triton.jit
def _tile(
    query, key_cache, value_cache, table, M, partial, stats, T, split,
    head, row, token, end, position, begin, stop,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS // GROUP tokens of one row, which ends before `end`, over keys begin … stop − 1.

    `position` is that of the first, `token`.
    """
    m_row = tl.arange(0, ROWS)
    d = tl.arange(0, DPAD)
    in_head = d < D
    of_row = token + m_row // GROUP
    valid = (m_row < ROWS // GROUP * GROUP) & (of_row < end)
    query_position = position + m_row // GROUP
    # of [T, heads]
    item = of_row.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + m_row % GROUP
    q = tl.load(query + item[:, None] * D + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)

    m = tl.full([ROWS], float("-inf"), tl.float32)  # of scores · log2(e): exp2 is the chip's own
    sums = tl.zeros(
        [ROWS, TILE], tl.float32
    )  # summed over a tile's keys at the end: warps need not meet for it
    acc = tl.zeros([ROWS, DPAD], tl.float32)
    n = tl.arange(0, TILE)
    blocks = table + row.to(tl.int64) * M
    # block ids come a tile ahead, so that copies of keys never wait for them
    block = tl.load(blocks + (begin + n) // BLOCK_SIZE, mask=begin + n < stop, other=-1)
    for start in tl.range(begin, stop, TILE, num_stages=STAGES):
        key_position = start + n
        seen = block >= 0  # no unmapped place is read, and none beyond stop
        place = block.to(tl.int64) * BLOCK_SIZE + key_position % BLOCK_SIZE
        ahead = key_position + TILE
        block = tl.load(blocks + ahead // BLOCK_SIZE, mask=ahead < stop, other=-1)
        offset = ((place * KV_HEADS + head) * D)[:, None] + d[None, :]
        mask = seen[:, None] & in_head[None, :]
        k = tl.load(key_cache + offset, mask=mask, other=0.0)
        v = tl.load(value_cache + offset, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * 1.4426950408889634)
        visible = seen[None, :] & (key_position[None, :] <= query_position[:, None])
        if WINDOW > 0:
            visible &= key_position[None, :] > query_position[:, None] - WINDOW
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        sums = sums * alpha[:, None] + p
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    item += split.to(tl.int64) * T * (KV_HEADS * GROUP)
    total = tl.sum(sums, 1)
    if stats is None:  # no other range: it is the output
        acc /= tl.where(total > 0, total, 1.0)[:, None]
    else:
        tl.store(stats + item * 2, m * 0.6931471805599453, mask=valid)  # natural logarithm's m
        tl.store(stats + item * 2 + 1, total, mask=valid)
    mask = valid[:, None] & in_head[None, :]
    tl.store(partial + item[:, None] * D + d[None, :], acc.to(partial.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "R", "M"])
def _partial_attention(
    query, key_cache, value_cache, cumulative, past, table, T, R, M, partial, stats,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    NARROW: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr,
    STAGES: tl.constexpr, WIDE_STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WIDE // GROUP  # of a tile
    head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # long ones first: the last tile of a prompt sees most

    row, first, end, token, position = _find(cumulative, past, T, R, tile, TOKENS)
    if token < end:
        tokens = tl.minimum(end - token, TOKENS)
        # keys lower … upper − 1 are seen by one of these tokens; each range is whole tiles of them
        upper = tl.minimum(position + tokens, M * BLOCK_SIZE)
        lower = 0
        if WINDOW > 0:
            lower = tl.maximum(position - WINDOW + 1, 0)
        upper = tl.where(row < R, upper, lower)
        ranges = tl.maximum(SPLITS // tl.cdiv(end - first, TOKENS), 1)
        span = tl.cdiv(tl.cdiv(upper - lower, TILE), ranges) * TILE
        begin = lower + split * span
        stop = tl.minimum(begin + span, upper)
        if begin >= stop:
            i = tl.arange(0, WIDE)
            valid = (i < TOKENS * GROUP) & (token + i // GROUP < end)
            item = split.to(tl.int64) * T + token + i // GROUP
            item = item * (KV_HEADS * GROUP) + head * GROUP + i % GROUP
            if stats is None:
                d = tl.arange(0, DPAD)
                mask = valid[:, None] & (d < D)[None, :]
                tl.store(partial + item[:, None] * D + d[None, :], 0.0, mask=mask)
            else:
                tl.store(stats + item * 2, float("-inf"), mask=valid)
                tl.store(stats + item * 2 + 1, 0.0, mask=valid)
        elif tokens <= NARROW // GROUP:
            _tile(
                query, key_cache, value_cache, table, M, partial, stats, T, split,
                head, row, token, end, position, begin, stop,
                KV_HEADS, GROUP, D, DPAD, BLOCK_SIZE, SCALE, WINDOW, NARROW, TILE, STAGES,
            )  # fmt: skip
        else:
            _tile(
                query, key_cache, value_cache, table, M, partial, stats, T, split,
                head, row, token, end, position, begin, stop,
                KV_HEADS, GROUP, D, DPAD, BLOCK_SIZE, SCALE, WINDOW, WIDE, WIDE_TILE, WIDE_STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _combine(
    partial, stats, query, T, output,
    HEADS: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, SPLITS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)  # of [T, heads]
    items = T.to(tl.int64) * HEADS
    inside = item < items
    d = tl.arange(0, DPAD)
    in_head = d < D
    largest = tl.full([ITEMS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * items + item) * 2
        largest = tl.maximum(largest, tl.load(stats + at, mask=inside, other=float("-inf")))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ITEMS], tl.float32)
    acc = tl.zeros([ITEMS, DPAD], tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * items + item
        m = tl.load(stats + at * 2, mask=inside, other=float("-inf"))
        sums = tl.load(stats + at * 2 + 1, mask=inside, other=0.0)
        weight = tl.exp2((m - largest) * 1.4426950408889634)
        mask = (sums > 0)[:, None] & in_head[None, :]
        x = tl.load(partial + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc += x * weight[:, None]
        total += sums * weight
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    mask = inside[:, None] & in_head[None, :]
    tl.store(output + item[:, None] * D + d[None, :], out.to(output.dtype.element_ty), mask=mask)


def _tiling(dtype: torch.dtype, group: int, head_dim: int) -> dict[str, int]:
    """Tile sizes of partial_attention: a key tile is about 8 KiB, so that copies fit SHARED_LIMIT."""
    padded = max(16, triton.next_power_of_2(head_dim))  # tensor cores take powers of two, from 16 on
    bytes_of_key = padded * dtype.itemsize
    narrow = max(16, triton.next_power_of_2(group))
    wide = max(64 if bytes_of_key <= 256 else 32, narrow)
    tile = max(16, min(64, 8192 // bytes_of_key))
    wide_tile = max(16, tile // 2)  # queries share the memory
    # 3: two tiles lie in shared memory, one of them on its way; 2: one
    wide_stages = 3 if bytes_of_key <= 256 else 2
    if narrow == wide:
        tile = wide_tile
    return {
        "DPAD": padded,
        "NARROW": narrow,  # rows of decode's matrix
        "TILE": tile,
        "STAGES": 3 if narrow < wide else wide_stages,
        "WIDE": wide,  # rows of prefill's
        "WIDE_TILE": wide_tile,
        "WIDE_STAGES": wide_stages,
    }


def constants(
    kernel: str,
    dtype: str,
    *,
    kv_heads: int,
    heads: int,
    head_dim: int,
    block_size: int,
    window: int = -1,
    splits: int = SPLITS,
    scale: float | None = None,
) -> dict[str, int | float]:
    """The constexprs of `kernel`, by name. scale None: head_dim ** −0.5. The same for torch and for PTX."""
    group = heads // kv_heads
    tiling = _tiling(getattr(torch, dtype), group, head_dim)
    if kernel == "cache_write":
        width = kv_heads * head_dim
        columns = min(1024, triton.next_power_of_2(width))
        return {"WIDTH": width, "BLOCK_SIZE": block_size, "TOKENS": 4, "COLUMNS": columns}
    if kernel == "combine":
        return {"HEADS": heads, "D": head_dim, "DPAD": tiling["DPAD"], "SPLITS": splits, "ITEMS": 8}
    return {
        "KV_HEADS": kv_heads, "GROUP": group, "D": head_dim, "BLOCK_SIZE": block_size, "WINDOW": window,
        "SCALE": head_dim**-0.5 if scale is None else scale, "SPLITS": splits, **tiling,
    }  # fmt: skip


def grid(kernel: str, T: Any, R: Any, constants: dict[str, int | float]) -> tuple[Any, Any, Any]:
    """Programs on x, y, z. T and R may be symbolic: they only meet + and // with plain integers."""
    c = constants
    if kernel == "cache_write":
        return T // c["TOKENS"] + R + 1, -(-c["WIDTH"] // c["COLUMNS"]), 1
    if kernel == "combine":
        return (T * c["HEADS"] + c["ITEMS"] - 1) // c["ITEMS"], 1, 1
    return c["KV_HEADS"], c["SPLITS"], T // (c["WIDE"] // c["GROUP"]) + R + 1


_FUNCTIONS = {"cache_write": _cache_write, "partial_attention": _partial_attention, "combine": _combine}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton language 3.9 warns where fusion is not said
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def signature(kernel: str, dtype: str) -> dict[str, str]:
    """The type of each argument of `kernel`, in order: inputs, int32 scalars, outputs, constexprs."""
    types = dict.fromkeys(("cumulative", "past", "table"), "*i32")
    types |= dict.fromkeys(("T", "R", "M"), "i32") | dict.fromkeys(("partial", "stats"), "*fp32")
    names = _FUNCTIONS[kernel].arg_names
    return {n: types.get(n, "constexpr" if n.isupper() else _POINTERS[dtype]) for n in names}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target. Launch: `num_warps` · 32 threads, `shared` bytes, the grid of `grid`."""

    name: str
    ptx: str
    cubin: bytes
    shared: int
    num_warps: int
    constants: dict[str, int | float]


def compile(
    kernel: str,
    dtype: str,
    capability: int,
    *,
    kv_heads: int,
    heads: int,
    head_dim: int,
    block_size: int,
    window: int = -1,
    splits: int = SPLITS,
    scale: float | None = None,
) -> Compiled:
    """PTX and cubin of `kernel` (one of KERNELS) for compute capability 80, 89, 90, 100 or 120; needs no GPU.

    Pointers are taken to be aligned to 16 bytes. InternalError when the kernel wants scratch memory, which
    only torch's launcher could give it, or more than SHARED_LIMIT.
    """
    values = constants(
        kernel, dtype, kv_heads=kv_heads, heads=heads, head_dim=head_dim, block_size=block_size,
        window=window, splits=splits, scale=scale,
    )  # fmt: skip
    types = signature(kernel, dtype)
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(_FUNCTIONS[kernel], types, values, aligned)
    # PTX 8.7: drivers from CUDA 12.8 on, the first that know all of these targets
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**_OPTIONS, "ptx_version": 87}
    )
    m = built.metadata
    scratch = m.global_scratch_size + m.profile_scratch_size
    if scratch or m.shared > SHARED_LIMIT:
        raise InternalError(
            f"{kernel} for {dtype}, heads of {head_dim}, sm_{capability}: {scratch} bytes of scratch "
            f"(limit 0), {m.shared} of shared memory (limit {SHARED_LIMIT})"
        )
    return Compiled(m.name, built.asm["ptx"], built.asm["cubin"], m.shared, m.num_warps, values)


def cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """→ key_cache, value_cache, changed in place.

    As in the other launchers, tensors are on CUDA, or on the CPU under TRITON_INTERPRET=1.
    """
    _, block_size, kv_heads, head_dim = key_cache.shape
    c = constants(
        "cache_write", _name(key), kv_heads=kv_heads, heads=kv_heads, head_dim=head_dim, block_size=block_size
    )
    T, R, M = len(key), *block_table.shape
    _cache_write[grid("cache_write", T, R, c)](
        key.contiguous(), value.contiguous(), key_cache, value_cache,
        cumulative_sequence_length, past_seqlens, block_table, T, R, M, key_cache, value_cache,
        **c, **_OPTIONS,
    )  # fmt: skip
    return key_cache, value_cache


def partial_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int = -1,
    splits: int = SPLITS,
) -> tuple[Tensor, Tensor]:
    """→ partial float32 [splits, T, heads, D], unwritten where l = 0, stats float32 [splits, T, heads, 2]."""
    items = splits, len(query), num_heads
    partial = query.new_empty((*items, key_cache.shape[-1]), dtype=torch.float32)
    stats = query.new_empty((*items, 2), dtype=torch.float32)
    _launch_attention(
        query, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
        num_heads, kv_num_heads, scale, local_window_size, splits, partial, stats,
    )  # fmt: skip
    return partial, stats


def whole_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int = -1,
) -> Tensor:
    """→ output [T, heads · D]: partial_attention's kernel where no row is split."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    _launch_attention(
        query, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
        num_heads, kv_num_heads, scale, local_window_size, 1, output, None,
    )  # fmt: skip
    return output


def _launch_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative_sequence_length: Tensor,
    past_seqlens: Tensor,
    block_table: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    window: int,
    splits: int,
    partial: Tensor,
    stats: Tensor | None,
) -> None:
    """stats None: `partial` is the output."""
    _, block_size, _, head_dim = key_cache.shape
    c = constants(
        "partial_attention", _name(query), kv_heads=kv_num_heads, heads=num_heads, head_dim=head_dim,
        block_size=block_size, window=window, splits=splits, scale=scale,
    )  # fmt: skip
    T, R, M = len(query), *block_table.shape
    _partial_attention[grid("partial_attention", T, R, c)](
        query.contiguous(), key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
        T, R, M, partial, stats, **c, **_OPTIONS,
    )  # fmt: skip


def combine(partial: Tensor, stats: Tensor, query: Tensor) -> Tensor:
    """→ output [T, heads · D] in query's type."""
    splits, T, heads, head_dim = partial.shape
    c = constants(
        "combine", _name(query), kv_heads=heads, heads=heads, head_dim=head_dim, block_size=0, splits=splits
    )
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    _combine[grid("combine", T, 0, c)](partial, stats, query, T, output, **c, **_OPTIONS)
    return output


def attend(
    query: Tensor,
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
    """→ output [T, heads · D], over caches that hold the step's own tokens already."""
    given = query, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table
    sizes: dict[str, Any] = {
        "num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale,
        "local_window_size": local_window_size,
    }  # fmt: skip
    if len(query) > WHOLE:
        return whole_attention(*given, **sizes)
    partial, stats = partial_attention(*given, **sizes)
    return combine(partial, stats, query)


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
    """→ output [T, heads · D]; the caches are updated in place."""
    step = cumulative_sequence_length, past_seqlens, block_table
    cache_write(key, value, key_cache, value_cache, *step)
    return attend(query, key_cache, value_cache, *step, num_heads, kv_num_heads, scale, local_window_size)


def bytes_moved(
    rows: Iterable[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    window: int = -1,
    splits: int = SPLITS,
) -> dict[str, int]:
    """Bytes that each kernel must move for rows of (past, new) tokens: its time is at least this / bandwidth.

    Keys and values count once a row, and partials as if every row of one token used all of its splits and
    every longer one a single range (the kernel uses SPLITS / tiles of them). More than WHOLE tokens: none.
    """
    rows = list(rows)
    whole = sum(new for _, new in rows) > WHOLE
    moved = dict.fromkeys(KERNELS, 0)
    vector = head_dim * itemsize
    for past, new in rows:
        seen = min(past + new, window + new - 1) if window > 0 else past + new
        ranges = splits if new == 1 else 1
        output = new * heads * vector
        partials = output if whole else ranges * new * heads * (head_dim + 2) * 4
        moved["cache_write"] += 4 * new * kv_heads * vector
        moved["partial_attention"] += 2 * seen * kv_heads * vector + new * heads * vector + partials
        moved["combine"] += 0 if whole else partials + output
    return moved


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

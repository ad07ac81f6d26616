"""Attention over packed tokens: one functional operation, and its lowerings.

The decoder calls `attend(layer, q, k, v)` with q [T, heads · D] and k, v [T, kv_heads · D], before rope,
and gets [T, heads · D]. A lowering holds what the step says about rows, positions and caches; it changes
nothing in place and keeps the new caches of each layer in `presents`.

`Eager` is the specification. Three become graphs (`LOWERINGS`): `Gqa` is ONNX Runtime's
GroupQueryAttention on the CPU; `Linear` is standard ONNX, which TensorRT turns into its native cache
layers; `Paged` is com.microsoft.PagedAttention over block tables, for ONNX Runtime CUDA and TorchScript,
and for TensorRT once `build` has rewritten it into plugins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bundle import TensorSpec
from .paged_attention import BLOCK_SIZE

if TYPE_CHECKING:
    from .decoder import Decoder, DecoderConfig


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rope on the leading dimensions: x [T, heads, D], cos and sin [T, rotary / 2]."""
    half = cos.shape[-1]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)


class Eager:
    """Plain torch. Row r of the step has `lengths[r]` new tokens, one row after another.

    rope_rows int64 [T]: table · max_seq_len + position of each token. `pasts[layer][r]`: keys and
    values [P, kv_heads, D] of the tokens before, already rotated; None: every row starts its sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        rope_rows: Tensor,
        lengths: Sequence[int],
        pasts: list[list[tuple[Tensor, Tensor]]] | None = None,
    ):
        self.c = decoder.config
        self.cos, self.sin = decoder.cos[rope_rows], decoder.sin[rope_rows]
        self.lengths = list(lengths)
        self.pasts = pasts
        self.presents: list[list[tuple[Tensor, Tensor]]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.c.head_dim)) for x in (q, k, v))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        out, present = [], []
        rows = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        for r, (q1, k1, v1) in enumerate(rows):
            if self.pasts:
                past_k, past_v = self.pasts[layer][r]
                k1, v1 = torch.cat([past_k, k1]), torch.cat([past_v, v1])
            present.append((k1, v1))
            key = torch.arange(len(k1), device=q.device)
            query = key[len(k1) - len(q1) :].unsqueeze(1)
            mask = key <= query
            if self.c.window:
                mask &= key > query - self.c.window
            q1, k1, v1 = (x.transpose(0, 1) for x in (q1, k1, v1))  # [heads, tokens, D]
            o = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask, enable_gqa=True)
            out.append(o.transpose(0, 1).flatten(1))
        self.presents.append(present)
        return torch.cat(out)


def cache_head_dim(head_dim: int) -> int:
    """Size of a head in the caches: GroupQueryAttention wants a multiple of 16, and the kernels are glad."""
    return -(-head_dim // 16) * 16


INPUT_IDS = TensorSpec("input_ids", "int64", ["T"])  # vocab_size + i selects row i of image_embeds
IMAGE_EMBEDS = TensorSpec("image_embeds", "float32", ["N", "hidden"])  # N ≥ 1
POSITIONS = TensorSpec("positions", "int64", ["T"])  # place in the sequence; only with logn
ROPE_ROWS = TensorSpec("rope_rows", "int64", ["T"])  # row of the stacked rope tables
LOGITS_ROWS = TensorSpec("logits_rows", "int64", ["K"])  # packed tokens that go through the head


class Lowering:
    """What the three have in common: `inputs` are the graph's, by the names of `specs`; `dtype` is that
    of queries, keys, values and caches."""

    inputs_: ClassVar[tuple[TensorSpec, ...]]
    cache: ClassVar[tuple[int | str, ...]]  # shape; the numbers' places are "kv_heads" and "D"
    pasts: ClassVar[tuple[str, str]]  # of the cache inputs, before ".{layer}"
    news: ClassVar[tuple[str, str]]  # and of the outputs that are bound to the same memory

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        self.c = c = decoder.config
        self.inputs, self.dtype = inputs, dtype
        self.padding = cache_head_dim(c.head_dim) - c.head_dim
        self.presents: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def outputs(cls, c: DecoderConfig) -> tuple[str, ...]:
        """Of the graph, for each layer."""
        return cls.news

    def caches(self, layer: int) -> tuple[Tensor, Tensor]:
        key, value = self.pasts
        return self.inputs[f"{key}.{layer}"], self.inputs[f"{value}.{layer}"]

    def rotated(self, x: Tensor) -> Tensor:
        """[T, heads · D] → the same after rope, in float32."""
        return rotate(x.unflatten(-1, (-1, self.c.head_dim)), self.cos, self.sin).flatten(1)

    def rope(self, decoder: Decoder, rows: Tensor) -> None:
        self.cos, self.sin = F.embedding(rows, decoder.cos), F.embedding(rows, decoder.sin)

    def wide(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads · D] → [T, heads · padded D], of the lowering's type."""
        if self.padding:
            x = F.pad(x.unflatten(-1, (heads, -1)), (0, self.padding)).flatten(1)
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def narrow(self, x: Tensor) -> Tensor:
        """And back, in float32."""
        return self.cut(x if x.dtype == torch.float32 else x.float())

    def cut(self, x: Tensor) -> Tensor:
        """[T, heads · padded D] → [T, heads · D]"""
        if self.padding:
            x = x.unflatten(-1, (self.c.heads, -1))[..., : self.c.head_dim].flatten(1)
        return x


class Gqa(Lowering):
    """com.microsoft.GroupQueryAttention; only this node is padded, to B slots × S tokens.

    past_key.{i} and past_value.{i}, float32 [B, kv_heads, Smax, cache_head_dim], are bound in place as
    present_key.{i} and present_value.{i}: positions + S must stay ≤ Smax for every row of the step, idle
    ones included.

    The node reads a slot's keys anew for each head. Where G > 1 heads share a key and a step has one token
    of a slot, that token goes through a second node, as G tokens of kv_heads heads: the rows of one
    product, which reads the keys once. Its caches are the same memory, bound as decode_key.{i} and
    decode_value.{i} too, and positions + G must stay ≤ Smax likewise: key and value are written G times, of
    which a mask hides all but the first, and the next step overwrites them. At one billion parameters and 4
    kv heads behind 576 tokens it takes a third off attention's time, behind 4,000 or with eight streams
    half. And it sums as chunks do: a token has the same bits alone and in a chunk, which the node's own
    kernel for one token does not give. The first node is as wide as what is left to it: in a step of single
    tokens it has none, which saves a decode another 2 %.
    """

    inputs_ = (
        INPUT_IDS,
        IMAGE_EMBEDS,
        POSITIONS,
        # row of the stacked rope tables, 0 in padding
        TensorSpec("position_ids", "int64", ["B", "S"]),
        # packed token of each padded cell; idle cells 0
        TensorSpec("pad_rows", "int64", ["B*S"]),
        # cell b · S + s of each packed token
        TensorSpec("packed_rows", "int64", ["T"]),
        # tokens of each slot in this step; 0 = idle
        TensorSpec("query_seqlens", "int32", ["B"]),
        # tokens in the slot's cache after the step − 1; 0 for an empty idle slot
        TensorSpec("seqlens_k", "int32", ["B"]),
        # at least the largest seqlens_k + 1 and at least S
        TensorSpec("total_sequence_length", "int32", []),
        LOGITS_ROWS,
    )
    cache = ("B", "kv_heads", "Smax", "D")
    pasts, news = ("past_key", "past_value"), ("present_key", "present_value")

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__(decoder, inputs, dtype)
        c, position_ids, pad_rows = self.c, inputs["position_ids"], inputs["pad_rows"]
        shape = _op("Shape", position_ids, shape=[2])
        self.pad_rows = _op("Reshape", pad_rows, shape, shape=position_ids.shape)
        self.packed_rows, self.query_seqlens = inputs["packed_rows"], inputs["query_seqlens"]
        self.positions, self.cells = position_ids, pad_rows.shape[0]
        # a table whose width is no multiple of 8 is refused by the node: rotate outside of it
        self.tables = (decoder.cos, decoder.sin) if c.rotary // 2 % 8 == 0 else None
        if not self.tables:
            column = _op("Reshape", position_ids, _ints(-1, 1), shape=[pad_rows.shape[0], 1])
            self.rope(decoder, F.embedding(self.packed_rows, column).squeeze(1))
        if _group(c) > 1:
            self._fold()

    @classmethod
    def outputs(cls, c: DecoderConfig) -> tuple[str, ...]:
        return cls.news + (("decode_key", "decode_value") if _group(c) > 1 else ())

    def _fold(self) -> None:
        """What the second node of every layer needs; a slot's only token leaves the first one."""
        c, group, last = self.c, _group(self.c), self.inputs["seqlens_k"]
        slots, longest = self.positions.shape
        lone = self.query_seqlens == 1
        self.query_seqlens = torch.where(lone, 0, self.query_seqlens)
        total = self.inputs["total_sequence_length"] + (group - 1)
        # rows of [T · (heads + 2 · kv_heads), D] for each slot, [G, 3 · kv_heads]: a head of each group,
        # and the keys and values
        queries = torch.arange(c.heads).unflatten(0, (c.kv_heads, group)).t()
        shared = torch.arange(c.heads, c.heads + 2 * c.kv_heads).expand(group, -1)
        token = self.pad_rows[:, :1].unsqueeze(-1)
        self.folded_rows = token * (c.heads + 2 * c.kv_heads) + torch.cat([queries, shared], 1)
        length = total.item()
        torch._check(length > group)
        hidden = torch.arange(length) > last.unsqueeze(-1)  # [B, L]
        bias = torch.where(hidden, -1e30, 0.0)[:, None, None].expand(slots, 1, group, -1)
        lengths = torch.where(lone, group, 0).to(torch.int32)
        ends = torch.where(lone, last + (group - 1), last)
        self.folded = (ends, total), self.positions[:, :1].expand(slots, group), bias, lengths
        most = self.query_seqlens.max()
        width: Any = most.item()
        torch._check(width >= 0)
        self.cells = slots * width
        until = _op("Reshape", most.to(torch.int64), _ints(1), shape=[1])
        self.positions, self.pad_rows = (
            _op("Slice", x, _ints(0), until, _ints(1), shape=[slots, width])
            for x in (self.positions, self.pad_rows)
        )
        slot = self.packed_rows // longest
        kept = self.packed_rows - slot * (longest - width)
        self.packed_rows = torch.where(lone[slot], self.cells + slot, kept)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, inputs = self.c, self.inputs
        if not self.tables:
            q, k = self.rotated(q), self.rotated(k)
        heads = c.heads + 2 * c.kv_heads
        qkv = self.wide(torch.cat([q, k, v], -1), heads)
        lengths = inputs["seqlens_k"], inputs["total_sequence_length"]
        cells = F.embedding(self.pad_rows, qkv)
        cells = self._node(layer, c.heads, cells, lengths, self.positions, None, self.query_seqlens)
        width = cells.shape[-1]
        cells = _op("Reshape", cells, _ints(-1, width), shape=[self.cells, width])
        if _group(c) > 1:
            size = width // c.heads
            rows = _op("Reshape", qkv, _ints(-1, size), shape=[qkv.shape[0] * heads, size])
            rows = F.embedding(self.folded_rows, rows).flatten(2)  # [B, G, 3 · kv_heads · D]
            out = self._node(layer, c.kv_heads, rows, *self.folded)
            cells = torch.cat([cells, out.unflatten(-1, (c.kv_heads, size)).transpose(1, 2).flatten(1)])
        return self.narrow(F.embedding(self.packed_rows, cells))

    def _node(
        self, layer: int, heads: int, qkv: Tensor, lengths: tuple[Tensor, Tensor], positions: Tensor,
        bias: Tensor | None, query_seqlens: Tensor,
    ) -> Tensor:  # fmt: skip
        """[B, S, (heads + 2 · kv_heads) · D] → [B, S, heads · D]"""
        c, past = self.c, self.caches(layer)
        attrs: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": c.kv_heads,
            "do_rotary": int(self.tables is not None),
            "scale": c.head_dim**-0.5,
        }
        if c.window:
            attrs["local_window_size"] = c.window
        rope = (*self.tables, positions) if self.tables else [None] * 3
        out, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (qkv, None, None, *past, *lengths, *rope, bias, *[None] * 5, query_seqlens),
            attrs=attrs,
            dtypes=[qkv.dtype] * 3,
            shapes=[[*qkv.shape[:2], heads * past[0].shape[3]], past[0].shape, past[1].shape],
            version=1,
        )
        self.presents += [key, value]
        return out


def _group(c: DecoderConfig) -> int:
    """Heads that `Gqa` computes together: those that share a key, but one where the rows of a product would
    each have a window of their own."""
    return 1 if c.window else c.heads // c.kv_heads


class Linear(Lowering):
    """Standard ONNX, opset 24: TensorScatter into a cache of slots, then Attention under a mask; padded to
    B slots × S tokens as `Gqa`.

    past_key.{i} and past_value.{i} [B, kv_heads, Smax, cache_head_dim] are bound in place as
    present_key.{i} and present_value.{i}; TensorRT's cache layers drop what lies outside in silence, so
    write_indices + S ≤ Smax is the caller's duty for every row, idle ones included. A row's cells past
    its tokens are written too: behind its last token, where the next step writes.
    """

    inputs_ = (
        INPUT_IDS,
        IMAGE_EMBEDS,
        POSITIONS,
        ROPE_ROWS,
        TensorSpec("pad_rows", "int64", ["B*S"]),  # packed token of each padded cell; idle cells 0
        TensorSpec("packed_rows", "int64", ["T"]),  # cell b · S + s of each packed token
        TensorSpec("query_positions", "int64", ["B", "S"]),  # place in the sequence; 0 in padding
        TensorSpec("key_positions", "int64", ["L"]),  # 0 … L − 1: the part of the cache that is read
        TensorSpec("write_indices", "int64", ["B"]),  # tokens in the slot's cache before the step
        LOGITS_ROWS,
    )
    cache = ("B", "kv_heads", "Smax", "D")
    pasts, news = Gqa.pasts, Gqa.news

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__(decoder, inputs, dtype)
        self.rope(decoder, inputs["rope_rows"])
        query, key = inputs["query_positions"], inputs["key_positions"]
        shape = _op("Shape", query, shape=[2])
        self.pad_rows = _op("Reshape", inputs["pad_rows"], shape, shape=query.shape)
        self.length = _op("Shape", key, shape=[1])
        query, key = query.unsqueeze(-1), key.unsqueeze(0).unsqueeze(0)
        mask = key <= query  # [B, S, L]
        if self.c.window:
            mask = mask & (key > query - self.c.window)
        self.mask = mask.unsqueeze(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, inputs = self.c, self.inputs
        heads = ((self.rotated(q), c.heads), (self.rotated(k), c.kv_heads), (v, c.kv_heads))
        q, k, v = (self._cells(x, n) for x, n in heads)
        seen = []
        for past, new in zip(self.caches(layer), (k, v), strict=True):
            cache = torch.onnx.ops.symbolic(
                "TensorScatter", (past, new, inputs["write_indices"]), {"axis": -2, "mode": "linear"},
                dtype=past.dtype, shape=past.shape, version=24,
            )  # fmt: skip
            self.presents.append(cache)
            shape = [*past.shape[:2], inputs["key_positions"].shape[0], past.shape[3]]
            seen.append(_op("Slice", cache, _ints(0), self.length, _ints(2), shape=shape))
        out = torch.onnx.ops.symbolic(
            "Attention", (q, *seen, self.mask),
            # softmax in float32 (ONNX's number of that type)
            {"scale": c.head_dim**-0.5, "is_causal": 0, "softmax_precision": 1},
            dtype=q.dtype, shape=q.shape, version=24,
        )  # fmt: skip
        width = q.shape[1] * q.shape[3]
        cells = [inputs["pad_rows"].shape[0], width]
        out = _op("Reshape", out.transpose(1, 2), _ints(-1, width), shape=cells)
        return self.narrow(F.embedding(inputs["packed_rows"], out))

    def _cells(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads · D] → [B, heads, S, padded D]."""
        x = F.embedding(self.pad_rows, self.wide(x, heads))
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Paged(Lowering):
    """com.microsoft.PagedAttention over blocks; rope in float32 outside of it, as its tables are stacked.

    key_cache.{i} and value_cache.{i} [blocks, block_size, kv_heads, cache_head_dim] are bound in place as
    key_cache_out.{i} and value_cache_out.{i}. What the node computes: paged_attention/reference.py.
    """

    inputs_ = (
        INPUT_IDS,
        IMAGE_EMBEDS,
        POSITIONS,
        ROPE_ROWS,
        TensorSpec("cumulative_sequence_length", "int32", ["R1"]),  # first packed token of each row, and T
        TensorSpec("past_seqlens", "int32", ["R"]),  # tokens of each row in the cache before the step
        TensorSpec("block_table", "int32", ["R", "M"]),  # of each row, in order; −1 = none
        # upper bounds of a row's new tokens and of its total, on the host: spares ONNX Runtime a readback
        # in every layer; nobody else looks at it
        TensorSpec("attention_metadata", "int32", [2]),
        LOGITS_ROWS,
    )
    cache = ("blocks", BLOCK_SIZE, "kv_heads", "D")
    pasts, news = ("key_cache", "value_cache"), ("key_cache_out", "value_cache_out")

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        super().__init__(decoder, inputs, dtype)
        self.rope(decoder, inputs["rope_rows"])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.c
        heads = ((self.rotated(q), c.heads), (self.rotated(k), c.kv_heads), (v, c.kv_heads))
        q, k, v = (self.wide(x, n) for x, n in heads)
        return self.narrow(self.node(layer, q, k, v))

    def node(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, inputs = self.c, self.inputs
        caches = self.caches(layer)
        rows = (inputs[s.name] for s in self.inputs_[4:7])
        absent = [None] * 8  # rope, slot mapping, sinks, norms, scales
        metadata = [*absent, inputs["attention_metadata"]] if "attention_metadata" in inputs else []
        out, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::PagedAttention",
            (q, k, v, *caches, *rows, *metadata),
            attrs={
                "num_heads": c.heads,
                "kv_num_heads": c.kv_heads,
                "scale": c.head_dim**-0.5,
                "local_window_size": c.window or -1,
            },
            dtypes=[q.dtype] * 3,
            shapes=[q.shape, caches[0].shape, caches[1].shape],
            version=1,
        )
        self.presents += [key, value]
        return out


LOWERINGS: dict[str, type[Lowering]] = {"gqa": Gqa, "linear": Linear, "paged": Paged}


def specs(
    lowering: str, c: DecoderConfig, dtype: str = "float32", metadata: bool = True
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the decoder graph, in order. `dtype`: of the caches; `metadata`: with
    attention_metadata, which only ONNX graphs take."""
    kind = LOWERINGS[lowering]
    left_out = {"positions": not c.logn, "attention_metadata": not metadata}
    inputs = [spec for spec in kind.inputs_ if not left_out.get(spec.name)]
    inputs[1] = replace(inputs[1], shape=["N", c.hidden_size])
    outputs = [TensorSpec("logits", "float32", ["K", c.vocab_size])]
    numbers: dict[int | str, int] = {"kv_heads": c.kv_heads, "D": cache_head_dim(c.head_dim)}
    cache: list[int | str] = [numbers.get(d, d) for d in kind.cache]
    for i in range(c.layers):
        inputs += [TensorSpec(f"{past}.{i}", dtype, cache) for past in kind.pasts]
        outputs += [TensorSpec(f"{new}.{i}", dtype, cache) for new in kind.outputs(c)]
    return inputs, outputs


class Graph(nn.Module):
    """The decoder as an exportable graph: tensors in the order of `specs` → logits, new caches."""

    def __init__(self, decoder: Decoder, lowering: type[Lowering], inputs: list[TensorSpec]):
        super().__init__()
        self.decoder, self.lowering = decoder, lowering
        self.names = [spec.name for spec in inputs]
        self.dtype = getattr(torch, inputs[-1].dtype)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, tensors, strict=True))
        attend = self.lowering(self.decoder, inputs, self.dtype)
        logits = self.decoder(
            inputs["input_ids"],
            inputs["image_embeds"],
            attend,
            inputs["logits_rows"],
            inputs.get("positions"),
        )
        return (logits, *attend.presents)


def _op(name: str, *inputs: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """One standard ONNX node, of the type of its first input unless told."""
    return torch.onnx.ops.symbolic(name, inputs, dtype=dtype or inputs[0].dtype, shape=shape)


def _ints(*values: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "Constant", (), {"value_ints": values}, dtype=torch.int64, shape=[len(values)]
    )

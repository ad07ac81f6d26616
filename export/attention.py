"""Attention over packed tokens: one functional operation, and its lowerings.

The decoder calls `attend(layer, q, k, v)` with q [T, heads · D] and k, v [T, kv_heads · D], before rope,
and gets [T, heads · D]. A lowering holds what the step says about rows, positions and caches; it changes
nothing in place and keeps the new caches of each layer in `presents`.

`Eager` is the specification. `Gqa` becomes ONNX Runtime's GroupQueryAttention. `linear` (standard ONNX)
and `paged` (block tables) will stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bundle import TensorSpec

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


GQA_INPUTS = (
    # vocab_size + i selects row i of image_embeds
    TensorSpec("input_ids", "int64", ["T"]),
    TensorSpec("image_embeds", "float32", ["N", "hidden"]),  # N ≥ 1
    # place in the sequence; only with logn
    TensorSpec("positions", "int64", ["T"]),
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
    # packed tokens that go through the head
    TensorSpec("logits_rows", "int64", ["K"]),
)


def cache_head_dim(head_dim: int) -> int:
    """Size of a head in the caches: GroupQueryAttention wants a multiple of 16."""
    return -(-head_dim // 16) * 16


class Gqa:
    """com.microsoft.GroupQueryAttention; only this node is padded, to B slots × S tokens.

    `inputs` are the graph's, by the names of `gqa_specs`; past_key.{i} and past_value.{i}, float32
    [B, kv_heads, Smax, cache_head_dim], are bound in place as present_key.{i} and present_value.{i}:
    positions + S must stay ≤ Smax for every row of the step, idle ones included.
    """

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor]):
        self.c = c = decoder.config
        self.inputs = inputs
        self.presents: list[Tensor] = []
        self.padding = cache_head_dim(c.head_dim) - c.head_dim
        position_ids, pad_rows = inputs["position_ids"], inputs["pad_rows"]
        shape = _op("Shape", position_ids, shape=[2])
        self.pad_rows = _op("Reshape", pad_rows, shape, shape=position_ids.shape)
        # a table whose width is no multiple of 8 is refused by the node: rotate outside of it
        self.inside = c.rotary // 2 % 8 == 0
        self.tables: list[Tensor | None] = [None] * 3
        if self.inside:
            self.tables = [decoder.cos, decoder.sin, position_ids]
        else:
            column = _op("Reshape", position_ids, _ints(-1, 1), shape=[pad_rows.shape[0], 1])
            rows = F.embedding(inputs["packed_rows"], column).squeeze(1)
            self.cos, self.sin = F.embedding(rows, decoder.cos), F.embedding(rows, decoder.sin)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, inputs = self.c, self.inputs
        if not self.inside:
            q, k = (
                rotate(x.unflatten(-1, (-1, c.head_dim)), self.cos, self.sin).flatten(1)
                for x in (q, k)
            )
        q, k, v = self._cells(q, c.heads), self._cells(k, c.kv_heads), self._cells(v, c.kv_heads)
        past = inputs[f"past_key.{layer}"], inputs[f"past_value.{layer}"]
        lengths = inputs["seqlens_k"], inputs["total_sequence_length"]
        attrs: dict[str, Any] = {
            "num_heads": c.heads,
            "kv_num_heads": c.kv_heads,
            "do_rotary": int(self.inside),
            "scale": c.head_dim**-0.5,
        }
        if c.window:
            attrs["local_window_size"] = c.window
        out, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (q, k, v, *past, *lengths, *self.tables, *[None] * 6, inputs["query_seqlens"]),
            attrs=attrs,
            dtypes=[q.dtype] * 3,
            shapes=[q.shape, past[0].shape, past[1].shape],
            version=1,
        )
        self.presents += [key, value]
        width = q.shape[-1]
        cells = _op("Reshape", out, _ints(-1, width), shape=[inputs["pad_rows"].shape[0], width])
        out = F.embedding(inputs["packed_rows"], cells)
        if self.padding:
            out = out.unflatten(-1, (c.heads, -1))[..., : c.head_dim].flatten(1)
        return out

    def _cells(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads · D] → [B, S, heads · padded D]."""
        if self.padding:
            x = F.pad(x.unflatten(-1, (heads, -1)), (0, self.padding)).flatten(1)
        return F.embedding(self.pad_rows, x)


def gqa_specs(c: DecoderConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the decoder graph, in order."""
    inputs = [spec for spec in GQA_INPUTS if spec.name != "positions" or c.logn]
    inputs[1] = replace(inputs[1], shape=["N", c.hidden_size])
    outputs = [TensorSpec("logits", "float32", ["K", c.vocab_size])]
    cache: list[int | str] = ["B", c.kv_heads, "Smax", cache_head_dim(c.head_dim)]
    for i in range(c.layers):
        for kind in ("key", "value"):
            inputs.append(TensorSpec(f"past_{kind}.{i}", "float32", cache))
            outputs.append(TensorSpec(f"present_{kind}.{i}", "float32", cache))
    return inputs, outputs


class GqaGraph(nn.Module):
    """The decoder as an exportable graph: tensors in the order of `gqa_specs` → logits, presents."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.names = [spec.name for spec in gqa_specs(decoder.config)[0]]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, tensors, strict=True))
        attend = Gqa(self.decoder, inputs)
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

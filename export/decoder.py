"""The one decoder: every language model that we export is a configuration of it.

Tokens are packed: `[T]` from any mixture of sequences, so no linear layer sees padding. Attention and
rope belong to the lowering that the caller passes (`attention.py`). It is plain torch, trainable, and
with the eager lowering the reference of `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NotSupportedYet
from .attention import Attention


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int  # rows of the embedding; ids from here on select image rows
    hidden_size: int
    intermediate_size: int  # of gate and of up
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_seq_len: int  # rows of one rope table
    eps: float
    rope_base: float = 10000.0
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0 = head_dim
    rope_scaling: Mapping[str, Any] | None = None  # transformers' dict: "linear", "llama3"
    rope_limits: tuple[int, ...] = ()  # dynamic NTK: prompt lengths, one table each; () = one table
    ntk_alphas: tuple[float, ...] = (1.0,)  # of each table
    logn: int = 0  # queries at position p are scaled by max(1, log_logn(p + 1)); 0 = off
    window: int = 0  # a token sees this many latest tokens, itself included; 0 = all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before rope
    tied: bool = False

    @property
    def limits(self) -> list[int]:
        """Longest prompt of each rope table, as bundle.RopeSpec.limits."""
        return list(self.rope_limits) or [self.max_seq_len]

    @property
    def rotary(self) -> int:
        return self.rotary_dim or self.head_dim


def ntk_tables(seq_length: int, max_seq_len: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Qwen's dynamic NTK as (limits, alphas): alpha = 2^ceil(log2(T / seq_length) + 1) − 1, at least 1.

    A prompt of T ≤ seq_length has alpha 1, T ≤ 2·seq_length 3, T ≤ 4·seq_length 7, …
    """
    limits, alphas = [seq_length], [1.0]
    while limits[-1] < max_seq_len:
        limits.append(2 * limits[-1])
        alphas.append(2 * alphas[-1] + 1)
    limits[-1] = min(limits[-1], max_seq_len)
    return tuple(limits), tuple(alphas)


def rope_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [tables · max_seq_len, rotary / 2], computed in float32 as the references do.

    Row t · max_seq_len + p: the angles of position p in table t. Raises NotSupportedYet for a kind of
    rope_scaling that is not "linear" or "llama3".
    """
    d = config.rotary
    angles = []
    for alpha in config.ntk_alphas:
        base = config.rope_base * alpha ** (d / (d - 2)) if alpha != 1 else config.rope_base
        inv_freq = 1.0 / (base ** (torch.arange(0, d, 2).float() / d))
        inv_freq = _scaled(inv_freq, config.rope_scaling)
        angles.append(torch.outer(torch.arange(config.max_seq_len).float(), inv_freq))
    table = torch.cat(angles)
    return table.cos(), table.sin()


def _scaled(inv_freq: Tensor, scaling: Mapping[str, Any] | None) -> Tensor:
    """transformers.modeling_rope_utils, `_compute_linear_scaling…` and `_compute_llama3_parameters`."""
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if kind == "default":
        return inv_freq
    assert scaling is not None
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind != "llama3":
        raise NotSupportedYet(f"rope_scaling type {kind!r} is not supported yet: use linear or llama3")
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    result = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, result)


def logn_table(config: DecoderConfig) -> Tensor:
    """float32 [max_seq_len, 1]: log_logn(p + 1) where p + 1 > logn, else 1."""
    n = config.logn
    values = [math.log(p, n) if p > n else 1.0 for p in range(1, config.max_seq_len + 1)]
    return torch.tensor(values).unsqueeze(1)


def constants(config: DecoderConfig) -> dict[str, Tensor]:
    """The decoder's buffers: tables that come from the configuration alone."""
    cos, sin = rope_tables(config)
    tables = {"cos": cos, "sin": sin}
    return {**tables, "logn": logn_table(config)} if config.logn else tables


class Layer(nn.Module):
    WIDE = ("o", "down")  # their sums join the residual stream: see quantize.swap

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.c = c
        self.attention_norm = nn.RMSNorm(c.hidden_size, c.eps)
        self.qkv = nn.Linear(c.hidden_size, (c.heads + 2 * c.kv_heads) * c.head_dim, c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.eps)
        self.o = nn.Linear(c.heads * c.head_dim, c.hidden_size, c.o_bias)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, c.eps)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor, attend: Attention, index: int, logn: Tensor | None) -> Tensor:
        """x [T, hidden] → [T, hidden]; logn [T, 1]."""
        c = self.c
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = qkv.split([n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], -1)
        if c.qk_norm:
            q = self.q_norm(q.unflatten(-1, (c.heads, c.head_dim))).flatten(1)
            k = self.k_norm(k.unflatten(-1, (c.kv_heads, c.head_dim))).flatten(1)
        if logn is not None:
            q = q * logn  # rotation is linear: before rope is as good as after
        x = x + self.o(attend(index, q, k, v))
        gate_up = self.gate_up(self.mlp_norm(x))
        gate, up = gate_up.chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    cos: Tensor  # [tables · max_seq_len, rotary / 2]
    sin: Tensor
    logn: Tensor  # [max_seq_len, 1]

    EXACT = FINE = ("head",)  # never less than 16 bits in an engine, smaller blocks on a CPU: quantize.swap

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        for name, table in constants(c).items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None,
        attend: Attention,
        logits_rows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 [K, vocab] of the packed positions `logits_rows` [K] (None: of all).

        input_ids int64 [T]: an id ≥ vocab_size selects row id − vocab_size of image_embeds
        [N ≥ 1, hidden]. positions int64 [T], place of each token in its sequence, where logn is used.
        """
        if image_embeds is None:
            x = self.embed(input_ids)
        else:
            row = input_ids - self.config.vocab_size
            is_image = row >= 0
            text = self.embed(torch.where(is_image, 0, input_ids))
            image = F.embedding(torch.where(is_image, row, 0), image_embeds)
            x = torch.where(is_image.unsqueeze(-1), image, text)
        logn = None
        if self.config.logn:
            assert positions is not None
            logn = F.embedding(positions, self.logn)
        for index, layer in enumerate(self.layers):
            x = layer(x, attend, index, logn)
        if logits_rows is not None:
            x = F.embedding(logits_rows, x)
        return self.head(self.norm(x))

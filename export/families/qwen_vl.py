"""Qwen-VL: `QWenLMHeadModel` with a `visual` section (Qwen/Qwen-VL, Qwen/Qwen-VL-Chat)."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import CheckpointError
from ..bundle import VisionSpec
from ..checkpoint import Checkpoint, Weight
from ..conversation import qwen_prompt
from ..decoder import DecoderConfig, ntk_tables
from ..vision import QwenVisual
from . import Options, Plan, max_seq_len, vision_weights


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    decoder = decoder_config(checkpoint, options)
    visual = checkpoint.config["visual"]
    with torch.device("meta"):
        vision = QwenVisual(**visual)
    if vision.hidden_size != decoder.hidden_size:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: visual.output_dim is {vision.hidden_size}, expected "
            f"{decoder.hidden_size}, the hidden_size"
        )
    if options.vision_tower:
        raise CheckpointError("--vision-tower is for LLaVA: Qwen-VL's tower is in its checkpoint")
    folder = Path(options.tokenizer) if options.tokenizer else checkpoint.path
    generation = checkpoint.json("generation_config.json")
    return Plan(
        architecture="QWenLMHeadModel",
        decoder=decoder,
        decoder_weights=decoder_weights(checkpoint, decoder),
        vision=VisionSpec("square", vision.image_size, vision.tokens, vision.hidden_size),
        make_vision=lambda: QwenVisual(**visual),
        vision_weights=vision_weights(vision, vision.sources(), checkpoint),
        **qwen_prompt(folder, generation, options),
        folders=[checkpoint.path, *([folder] if options.tokenizer else [])],
    )


def decoder_config(checkpoint: Checkpoint, options: Options) -> DecoderConfig:
    """`use_dynamic_ntk`, `use_logn_attn` and `no_bias` as modeling_qwen.py reads them."""
    c = checkpoint.config
    length = max_seq_len(c["max_position_embeddings"], options)
    limits, alphas = ntk_tables(c["seq_length"], length) if c["use_dynamic_ntk"] else ((), (1.0,))
    return DecoderConfig(
        vocab_size=checkpoint.shape("transformer.wte.weight")[0],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"] // 2,
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_attention_heads"],
        head_dim=c["kv_channels"],
        max_seq_len=length,
        eps=c["layer_norm_epsilon"],
        rope_base=c["rotary_emb_base"],
        rotary_dim=int(c["kv_channels"] * c["rotary_pct"]),
        rope_limits=limits,
        ntk_alphas=alphas,
        logn=c["seq_length"] if c["use_logn_attn"] else 0,
        qkv_bias=True,
        o_bias=not c["no_bias"],
        mlp_bias=not c["no_bias"],
    )


def decoder_weights(checkpoint: Checkpoint, d: DecoderConfig) -> dict[str, Weight]:
    hidden, width, inner = d.hidden_size, d.heads * d.head_dim, d.intermediate_size

    def weight(*parts: tuple[str, tuple[int, ...]]) -> Weight:
        return Weight(checkpoint, tuple((f"transformer.{n}", s) for n, s in parts))

    weights = {
        "embed.weight": weight(("wte.weight", (d.vocab_size, hidden))),
        "norm.weight": weight(("ln_f.weight", (hidden,))),
        "head.weight": Weight(checkpoint, (("lm_head.weight", (d.vocab_size, hidden)),)),
    }
    for i in range(d.layers):
        layer: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            "attention_norm.weight": [("ln_1.weight", (hidden,))],
            "qkv.weight": [("attn.c_attn.weight", (3 * width, hidden))],
            "qkv.bias": [("attn.c_attn.bias", (3 * width,))],
            "o.weight": [("attn.c_proj.weight", (hidden, width))],
            "mlp_norm.weight": [("ln_2.weight", (hidden,))],
            # c_proj(w1(x) · silu(w2(x))): the gate is w2
            "gate_up.weight": [("mlp.w2.weight", (inner, hidden)), ("mlp.w1.weight", (inner, hidden))],
            "down.weight": [("mlp.c_proj.weight", (hidden, inner))],
        }
        if d.o_bias:
            layer["o.bias"] = [("attn.c_proj.bias", (hidden,))]
        if d.mlp_bias:
            layer["gate_up.bias"] = [("mlp.w2.bias", (inner,)), ("mlp.w1.bias", (inner,))]
            layer["down.bias"] = [("mlp.c_proj.bias", (hidden,))]
        for name, parts in layer.items():
            weights[f"layers.{i}.{name}"] = weight(*((f"h.{i}.{n}", s) for n, s in parts))
    return weights

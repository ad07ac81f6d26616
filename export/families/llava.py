"""LLaVA: the original layout (a language model that names its CLIP folder) and the llava-hf layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, NotSupportedYet
from ..bundle import VisionSpec
from ..checkpoint import Checkpoint, Weight, resolve
from ..conversation import hf_prompt, original_prompt
from ..decoder import DecoderConfig
from ..vision import CLIP_MEAN, CLIP_STD, ClipConfig, LlavaVision
from . import Options, Plan, max_seq_len, vision_weights

KINDS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}

# what transformers takes for a field that config.json leaves out
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32, "sliding_window": 4096,
    },
    "qwen2": {
        **_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip
# LlavaConfig's, when there is no vision_config at all
HF_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14,
    "num_attention_heads": 16, "image_size": 336,
}  # fmt: skip


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    if "LlavaForConditionalGeneration" in checkpoint.config["architectures"]:
        return _plan_hf(checkpoint, options)
    return _plan_original(checkpoint, options)


def _plan_original(checkpoint: Checkpoint, options: Options) -> Plan:
    c = checkpoint.config
    architecture = next(a for a in c["architectures"] if a in KINDS)
    names = ("model.", "lm_head.weight")
    decoder = decoder_config(c, KINDS[architecture], checkpoint, names, options)
    if c.get("mm_resampler_type"):
        raise NotSupportedYet(f"mm_resampler_type {c['mm_resampler_type']!r} is not supported yet")
    feature = c.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{c.file}: mm_vision_select_feature is {feature!r}, expected 'patch' or 'cls_patch'"
        )
    aspect = c.get("image_aspect_ratio") or "square"
    if aspect not in ("square", "pad"):
        raise NotSupportedYet(f"image_aspect_ratio {aspect!r} is not supported yet: square and pad are")

    tower = Checkpoint(_tower_folder(checkpoint, options))
    make = _vision_maker(
        tower.config,
        hidden_size=decoder.hidden_size,
        select_layer=c.get("mm_vision_select_layer", -2),
        keep_cls=feature == "cls_patch",
        projector=c.get("mm_projector_type", "linear"),
    )
    with torch.device("meta"):
        vision = make()
    if vision.hidden_size != decoder.hidden_size:
        raise CheckpointError(
            f"{c.file}: the identity projector gives rows of {vision.hidden_size}, expected "
            f"{decoder.hidden_size}, the hidden_size"
        )
    sources = vision.sources()
    projector = {n: s for n, s in sources.items() if n.startswith("projector.")}
    encoder = {n: s for n, s in sources.items() if n not in projector}
    holder = tower
    inside = "model.vision_tower.vision_tower."
    if c.get("unfreeze_mm_vision_tower") and any(name.startswith(inside) for name in checkpoint):
        # it was trained along: the checkpoint's own wins over the folder
        holder, encoder = checkpoint, {n: (inside + s, t) for n, (s, t) in encoder.items()}
    folder = Path(options.tokenizer) if options.tokenizer else checkpoint.path
    return Plan(
        architecture=architecture,
        decoder=decoder,
        decoder_weights=decoder_weights(checkpoint, decoder, names),
        vision=_recipe(tower.json("preprocessor_config.json"), vision, aspect == "pad", "pillow"),
        make_vision=make,
        vision_weights={
            **vision_weights(vision, encoder, holder),
            **vision_weights(vision, projector, checkpoint),
        },
        **original_prompt(folder, checkpoint, options),
        folders=[checkpoint.path, tower.path, *([folder] if options.tokenizer else [])],
    )


def _plan_hf(checkpoint: Checkpoint, options: Options) -> Plan:
    c = checkpoint.config
    text = c.get("text_config") or {}
    kind = text.get("model_type", "llama")
    names = (_before(checkpoint, "embed_tokens.weight"), _before(checkpoint, "lm_head.weight", ""))
    names = (names[0], names[1] + "lm_head.weight")
    if "tie_word_embeddings" not in text and "tie_word_embeddings" in c:
        text = {**text, "tie_word_embeddings": c["tie_word_embeddings"]}
    decoder = decoder_config(text, kind, checkpoint, names, options)
    strategy = c.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"{c.file}: vision_feature_select_strategy is {strategy!r}, expected 'default' or 'full'"
        )
    if options.vision_tower:
        raise CheckpointError("--vision-tower is for LLaVA's original layout: this checkpoint has its own")
    make = _vision_maker(
        c.get("vision_config") or HF_VISION,
        hidden_size=decoder.hidden_size,
        select_layer=c.get("vision_feature_layer", -2),
        keep_cls=strategy == "full",
        projector="mlp2x_gelu",
        projector_bias=c.get("multimodal_projector_bias", True),
        projector_act=c.get("projector_hidden_act", "gelu"),
    )
    with torch.device("meta"):
        vision = make()
    embeddings = "embeddings.patch_embedding.weight"
    sources = vision.sources("", _before(checkpoint, "linear_1.weight"), hf=True)
    tower = _before(checkpoint, embeddings)  # "vision_tower.vision_model.", with or without the end
    sources = {
        n: (s if n.startswith("projector.") else tower + s.removeprefix("vision_model."), t)
        for n, (s, t) in sources.items()
    }
    images = checkpoint.json("preprocessor_config.json")
    if not images:  # newer processors keep it inside
        images = checkpoint.json("processor_config.json").get("image_processor", images)
    folder = Path(options.tokenizer) if options.tokenizer else checkpoint.path
    return Plan(
        architecture="LlavaForConditionalGeneration",
        decoder=decoder,
        decoder_weights=decoder_weights(checkpoint, decoder, names),
        vision=_recipe(images, vision, False, "transformers"),
        make_vision=make,
        vision_weights=vision_weights(vision, sources, checkpoint),
        **hf_prompt(folder, checkpoint, options),
        folders=[checkpoint.path, *([folder] if options.tokenizer else [])],
    )


def _before(checkpoint: Checkpoint, end: str, default: str | None = None) -> str:
    """What stands before `end` in the one tensor name that ends so: layouts differ in prefixes."""
    found = [name for name in checkpoint if name.endswith(end)]
    if len(found) == 1:
        return found[0].removesuffix(end)
    if default is not None and not found:
        return default
    raise CheckpointError(
        f"{checkpoint.path}: {len(found) or 'no'} tensors are named …{end}, expected one"
    )


def _tower_folder(checkpoint: Checkpoint, options: Options) -> Path:
    """`mm_vision_tower`: a folder (absolute, or beside or in the checkpoint), or a hub id."""
    if options.vision_tower:
        return resolve(options.vision_tower, None, "--vision-tower")
    name = checkpoint.config.get("mm_vision_tower") or checkpoint.config.get("vision_tower")
    if not name:
        raise CheckpointError(f"{checkpoint.config.file} names no mm_vision_tower: give --vision-tower")
    for base in (checkpoint.path, checkpoint.path.parent):
        if (base / name).is_dir():
            return (base / name).resolve()
    return resolve(name, None, "--vision-tower")


def _vision_maker(config: Mapping[str, Any], **arguments: Any) -> Callable[[], LlavaVision]:
    clip = config.get("vision_config", config)
    kind = clip.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise NotSupportedYet(f"vision tower of type {kind!r} is not supported yet: CLIP is")
    parsed = ClipConfig.from_json(clip)
    return lambda: LlavaVision(parsed, **arguments)


def _recipe(images: Mapping[str, Any], vision: LlavaVision, pad: bool, loading: str) -> VisionSpec:
    """preprocessor_config.json → the image recipe; what it leaves out is CLIP's default."""
    size = vision.image_size
    for field, value in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        found = images.get(field, value)
        if len(found) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(found, value, strict=True)):
            raise NotSupportedYet(f"{field} {found} is not supported yet: CLIP's {list(value)} is")
    for field in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not images.get(field, True):
            raise NotSupportedYet(f"{field} = false in preprocessor_config.json is not supported yet")
    if images.get("resample", 3) != 3:
        raise NotSupportedYet(f"resample {images['resample']} is not supported yet: 3 (bicubic) is")
    crop, resize = images.get("crop_size", size), images.get("size", size)
    if isinstance(crop, Mapping):
        crop = crop["height"] if crop.get("height") == crop.get("width") else crop
    if crop != size:
        raise CheckpointError(f"preprocessor_config.json: crop_size is {crop}, the tower wants {size}")
    if isinstance(resize, Mapping) and "shortest_edge" not in resize:
        if (resize.get("height"), resize.get("width")) != (size, size):
            raise NotSupportedYet(f"size {dict(resize)} in preprocessor_config.json is not supported yet")
        if not pad:
            return VisionSpec("square", size, vision.tokens, vision.hidden_size, loading)
    shortest = resize.get("shortest_edge", size) if isinstance(resize, Mapping) else resize
    fill = [int(255 * mean) for mean in CLIP_MEAN] if pad else []
    recipe = "pad" if pad else "crop"
    return VisionSpec(recipe, size, vision.tokens, vision.hidden_size, loading, shortest, fill)


def decoder_config(
    config: Mapping[str, Any],
    kind: str,
    checkpoint: Checkpoint,
    names: tuple[str, str],
    options: Options,
) -> DecoderConfig:
    """A Llama, Mistral or Qwen2 configuration, as transformers reads it."""
    if kind not in DEFAULTS:
        raise NotSupportedYet(f"text model {kind!r} is not supported yet: {', '.join(DEFAULTS)} are")
    c: dict[str, Any] = {**DEFAULTS[kind], **{k: v for k, v in config.items() if v is not None}}
    if c.get("hidden_act", "silu") != "silu":
        raise NotSupportedYet(f"hidden_act {c['hidden_act']!r} is not supported yet: silu is")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, before
    heads = c["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or (c.get("num_key_value_heads", heads))
    length = max_seq_len(c["max_position_embeddings"], options)
    window = config.get("sliding_window", c.get("sliding_window")) or 0  # a null switches it off
    if kind == "llama" or (kind == "qwen2" and not c.get("use_sliding_window")):
        window = 0
    if kind == "qwen2" and window and c.get("max_window_layers", 28) < c["num_hidden_layers"]:
        raise NotSupportedYet("use_sliding_window for some layers only is not supported yet")
    embeddings = f"{names[0]}embed_tokens.weight"
    return DecoderConfig(
        vocab_size=checkpoint.shape(embeddings)[0],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        max_seq_len=length,
        eps=c["rms_norm_eps"],
        rope_base=rope.get("rope_theta") or c["rope_theta"],
        rope_scaling=rope or None,
        window=window if window < length else 0,
        qkv_bias=kind == "qwen2" or bool(c.get("attention_bias")),
        o_bias=kind == "llama" and bool(c.get("attention_bias")),
        mlp_bias=kind == "llama" and bool(c.get("mlp_bias")),
        tied=bool(c.get("tie_word_embeddings")) and names[1] not in checkpoint,
    )


def decoder_weights(
    checkpoint: Checkpoint, d: DecoderConfig, names: tuple[str, str]
) -> dict[str, Weight]:
    hidden, inner, prefix = d.hidden_size, d.intermediate_size, names[0]
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim

    def weight(*parts: tuple[str, tuple[int, ...]]) -> Weight:
        return Weight(checkpoint, tuple((prefix + n, s) for n, s in parts))

    weights = {
        "embed.weight": weight(("embed_tokens.weight", (d.vocab_size, hidden))),
        "norm.weight": weight(("norm.weight", (hidden,))),
    }
    weights["head.weight"] = (
        weights["embed.weight"]
        if d.tied
        else Weight(checkpoint, ((names[1], (d.vocab_size, hidden)),))
    )
    for i in range(d.layers):
        linears: dict[str, tuple[list[tuple[str, int]], int, bool]] = {  # parts, inputs, bias
            "qkv": (
                [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                d.qkv_bias,
            ),
            "o": ([("self_attn.o_proj", hidden)], q, d.o_bias),
            "gate_up": ([("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden, d.mlp_bias),
            "down": ([("mlp.down_proj", hidden)], inner, d.mlp_bias),
        }
        layer: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            "attention_norm.weight": [("input_layernorm.weight", (hidden,))],
            "mlp_norm.weight": [("post_attention_layernorm.weight", (hidden,))],
        }
        for name, (linear, inputs, bias) in linears.items():
            layer[f"{name}.weight"] = [(f"{n}.weight", (rows, inputs)) for n, rows in linear]
            if bias:
                layer[f"{name}.bias"] = [(f"{n}.bias", (rows,)) for n, rows in linear]
        for name, parts in layer.items():
            weights[f"layers.{i}.{name}"] = weight(*((f"layers.{i}.{n}", s) for n, s in parts))
    return weights

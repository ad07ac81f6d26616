"""The families: one file each, and the table that finds the right one.

A family turns a checkpoint into a `Plan`: specs for the bundle, torch modules, and where each of their
parameters comes from. Nothing heavy is imported until a family is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, NotSupportedYet, UnknownArchitecture, UserError
from ..bundle import GenerationSpec, PromptRules, VisionSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from ..checkpoint import Checkpoint, Weight
    from ..decoder import DecoderConfig


@dataclass(frozen=True)
class Options:
    """What a caller may ask of a family."""

    max_seq_len: int | None = None  # default: the checkpoint's
    vision_tower: str | None = None  # folder or hub id, in place of the one that config.json names
    conversation: str | None = None  # chat template, in place of the one that the checkpoint implies
    tokenizer: str | None = None  # folder of the tokenizer's files, in place of the checkpoint's
    revision: str | None = None  # of a hub repository


@dataclass(frozen=True)
class Plan:
    """Everything that export needs to know of one checkpoint; nothing of it is loaded yet."""

    architecture: str
    decoder: DecoderConfig
    decoder_weights: dict[str, Weight]  # by parameter of decoder.Decoder
    vision: VisionSpec
    make_vision: Callable[[], nn.Module]
    vision_weights: dict[str, Weight]  # by parameter of that module
    prompt: PromptRules
    generation: GenerationSpec
    tokenizer: Tokenizer
    folders: list[Path]  # that were read, for the fingerprint


@dataclass(frozen=True)
class Family:
    module: str  # of this package; it has `plan(checkpoint, options) -> Plan`
    architectures: tuple[str, ...]
    hub: str  # default checkpoint

    def plan(self, checkpoint: Checkpoint, options: Options) -> Plan:
        """Raises CheckpointError (missing, mis-shaped), NotSupportedYet."""
        return importlib.import_module(f".{self.module}", __name__).plan(checkpoint, options)


FAMILIES = {
    "qwen_vl": Family("qwen_vl", ("QWenLMHeadModel",), "Qwen/Qwen-VL-Chat"),
    "llava": Family(
        "llava",
        (
            "LlavaLlamaForCausalLM",
            "LlavaMistralForCausalLM",
            "LlavaQwenForCausalLM",
            "LlavaForConditionalGeneration",
        ),
        "liuhaotian/llava-v1.5-7b",
    ),
}

COMING = (
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)


def detect(config: Mapping[str, Any]) -> tuple[str, str]:
    """config.json → (family, architecture).

    Raises UnknownArchitecture listing the known ones, NotSupportedYet for one that is coming.
    """
    named = config.get("architectures") or []
    for architecture in named:
        for name, family in FAMILIES.items():
            if architecture in family.architectures:
                if name == "qwen_vl" and "visual" not in config:
                    raise UnknownArchitecture(
                        f"architecture {architecture} without a `visual` section is the text-only Qwen: "
                        "only the vision-language model can be exported"
                    )
                return name, architecture
    for architecture in named:
        if architecture in COMING:
            raise NotSupportedYet(f"architecture {architecture} is not supported yet")
    known = ", ".join(a for f in FAMILIES.values() for a in f.architectures)
    what = ", ".join(map(str, named)) or f"of model_type {config.get('model_type')!r}"
    raise UnknownArchitecture(f"architecture {what} is unknown; known are {known}")


def max_seq_len(limit: int, options: Options) -> int:
    """The sequence length to export: the checkpoint's, or a shorter one that was asked for."""
    wanted = options.max_seq_len
    if wanted is not None and not 1 <= wanted <= limit:
        raise UserError(f"max_seq_len={wanted} must lie between 1 and {limit}, the checkpoint's limit")
    return wanted or limit


def vision_weights(
    module: nn.Module,
    sources: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]],
    checkpoint: Checkpoint,
) -> dict[str, Weight]:
    """Weights of a vision module (on the meta device) from its `sources()`.

    Raises CheckpointError naming a tensor that is missing or does not fit.
    """
    import torch

    from ..checkpoint import Weight
    from ..vision import same

    weights = {}
    for name, (source, transform) in sources.items():
        parameter = module.get_parameter(name)
        found = checkpoint.shape(source)
        if transform is same:
            checkpoint.check(source, tuple(parameter.shape))
            weights[name] = Weight(checkpoint, ((source, found),))
            continue
        try:
            fits = transform(torch.empty(found, device="meta")).shape == parameter.shape
        except (RuntimeError, ValueError, IndexError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} has shape {list(found)}, which does not make "
                f"{name} of shape {list(parameter.shape)}"
            )
        weights[name] = Weight(checkpoint, ((source, found),), transform)
    return weights


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json → generate_config fields; only what the file says."""
    fields = (
        "do_sample", "top_k", "top_p", "temperature", "min_p", "repetition_penalty",
        "no_repeat_ngram_size", "max_new_tokens", "min_new_tokens",
    )  # fmt: skip
    return {name: config[name] for name in fields if config.get(name) is not None}


def token_ids(value: Any) -> list[int]:
    """transformers' eos_token_id: a number, a list, or None."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)

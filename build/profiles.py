"""What a build is limited to, and the optimisation profiles that follow from it.

A decoder engine has two profiles, one execution context each: `decode` (a token per sequence) and `prefill`
(chunks of prompts, or a mixture). Dimensions are named in the graphs (export/attention.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InternalError, UserError
from ..export.bundle import Bundle, GraphSpec

LOGITS = 64  # rows of logits of a prefill step: sizes the head's memory; a loss takes several steps
ELEMENTS = 2**31 - 1  # of one TensorRT tensor

Range = tuple[int, int, int]  # least, best, most
Profile = dict[str, tuple[list[int], list[int], list[int]]]  # input → shapes


@dataclass(frozen=True)
class Limits:
    max_batch_size: int  # sequences of one step
    max_input_len: int  # tokens of one step
    max_seq_len: int  # tokens of a sequence, prompt and answer
    max_images: int  # of one run of the image encoder

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_seq_len: int | None = None,
        max_images: int | None = None,
    ) -> Limits:
        """The limits given, checked, and defaults. Raises UserError: field, value, what would be right."""
        most, tokens = bundle.model.max_seq_len, bundle.vision.tokens
        batch = _within("max_batch_size", max_batch_size, 16, 1, 512)
        images = _within("max_images", max_images, 4, 1, 256)
        length = _within("max_seq_len", max_seq_len, most, 1, most, ", the longest sequence of the bundle")
        if length <= tokens:
            raise UserError(
                f"max_seq_len={length} leaves no room for an image, which takes {tokens} tokens: "
                f"give from {tokens + 1} to {most}"
            )
        linear = bundle.model.attention == "linear"  # its prefill is one sequence at a time
        widest = length if linear else length * batch
        why = ", max_seq_len" if linear else ", max_batch_size · max_seq_len"
        default = max(min(2048, length), batch)
        step = _within("max_input_len", max_input_len, min(default, widest), 1, widest, why)
        if step < batch:
            raise UserError(
                f"max_input_len={step} must be at least max_batch_size={batch}: a step may hold a token of "
                "every sequence"
            )
        return cls(batch, step, length, images)


def _within(field: str, value: int | None, default: int, low: int, high: int, why: str = "") -> int:
    if value is None:
        return default
    if not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{field}={value!r} must be a number from {low} to {high}{why}")
    return value


def slot_length(max_seq_len: int) -> int:
    """Tokens of a slot of the linear caches: one or more beyond a sequence, where idle slots write."""
    return (max_seq_len // 16 + 1) * 16


def max_blocks(bundle: Bundle) -> int:
    """Blocks of a paged cache tensor [blocks, block_size, kv_heads, head_dim]."""
    sizes = {tuple(s.shape[1:]) for s in bundle.graphs["decoder"].inputs if s.name.startswith("key_cache")}
    return ELEMENTS // max(_product(shape) for shape in sizes)


def decoder_profiles(bundle: Bundle, limits: Limits) -> dict[str, Profile]:
    """Profiles of the decoder in the order of the engine. Raises InternalError for an unknown dimension."""
    graph = bundle.graphs["decoder"]
    ranges = _linear(limits) if bundle.model.attention == "linear" else _paged(bundle, limits)
    return {name: _profile(graph, {**ranges[name]}) for name in ("decode", "prefill")}


def vision_profile(bundle: Bundle, limits: Limits) -> Profile:
    n = limits.max_images
    return _profile(bundle.graphs["vision"], {"N": (1, (n + 1) // 2, n)})


def _paged(bundle: Bundle, limits: Limits) -> dict[str, dict[str, Range]]:
    batch, tokens = limits.max_batch_size, limits.max_input_len
    wide = -(-limits.max_seq_len // 16)
    blocks = max_blocks(bundle)
    both = {"M": (1, (wide + 1) // 2, wide), "blocks": (1, min(batch * wide, blocks), blocks)}
    every, some = (1, batch, batch), (1, (batch + 3) // 4, batch)
    return {
        "decode": both
        | {"T": every, "K": every, "N": (1, 1, 1), "R": every, "R1": (2, batch + 1, batch + 1)},
        "prefill": both
        | {
            "T": (1, tokens, tokens),
            "K": (1, some[1], max_logits(limits)),
            "N": (1, min(bundle.vision.tokens, tokens), tokens),
            "R": some,
            "R1": (2, some[1] + 1, batch + 1),
        },
    }


def _linear(limits: Limits) -> dict[str, dict[str, Range]]:
    batch, tokens = limits.max_batch_size, limits.max_input_len
    length = slot_length(limits.max_seq_len)
    both = {"L": (1, length // 2, length), "Smax": (length, length, length)}
    every, chunk, one = (1, batch, batch), (1, tokens, tokens), (1, 1, 1)
    return {
        "decode": both | {"T": every, "K": every, "B": every, "B*S": every, "S": one, "N": one},
        "prefill": both
        | {"T": chunk, "S": chunk, "B*S": chunk, "N": chunk, "B": one, "K": (1, 1, max_logits(limits))},
    }


def max_logits(limits: Limits) -> int:
    return max(limits.max_batch_size, min(LOGITS, limits.max_input_len))


def _profile(graph: GraphSpec, ranges: Mapping[str, Range]) -> Profile:
    profile: Profile = {}
    for spec in graph.inputs:
        names = [d for d in spec.shape if isinstance(d, str)]
        if unknown := [name for name in names if name not in ranges]:
            raise InternalError(f"{graph.path}: input {spec.name} has an unknown dimension {unknown[0]!r}")
        if names:
            low, best, high = (
                [d if isinstance(d, int) else ranges[d][i] for d in spec.shape] for i in range(3)
            )
            profile[spec.name] = (low, best, high)
    return profile


def _product(shape: tuple[int | str, ...]) -> int:
    size = 1
    for d in shape:
        size *= int(d)
    return size

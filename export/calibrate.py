"""What a model's layers read on some prompts with pictures: the ranges of it, for engines whose activations
have static scales (fp8, int8), or int4 weights that are rounded for it (gptq.py), for the CPU.

The float32 reference runs once over the prompts. Weights stream: a linear layer reads its own from the
checkpoint just before it is called and drops it after, so ranges of a 7B model need about 2 GB (worked out,
not measured); for rounding see `working`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, shown
from . import gptq
from .checkpoint import CHUNK, Weight
from .packed import Rounded
from .qdq import Range

if TYPE_CHECKING:
    from PIL import Image

    from ..runtime.prompt import EncodedPrompt, PromptEncoder
    from .decoder import DecoderConfig
    from .families import Plan

TOKENS = 2048  # packed tokens of the decoder at a time
LONGEST = 2048  # of a prompt: its attention takes memory with the square, 0.5 GB here with 32 heads
ROUNDING = 16_384  # tokens that weights are rounded for, all in one pass
PICTURES = 4  # of the vision tower at a time
QUESTIONS = (
    "Describe the picture.",
    "What colour is the circle, and what stands to the right of it?",
    "这张图片里有什么？",
    "How many shapes are there? Answer in one word.",
)


def calibrate(
    plan: Plan,
    data: Path | None = None,
    decoder: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Ranges of the vision tower's linear layers and of the decoder's (but its head), by their names.

    decoder False: the tower alone.
    data: JSONL as `rtp-llm batch` reads it: `prompt`, or a chat's `messages`, and `urls` (files, beside
    `data` where relative) for its tags or parts {"type": "image"}; other fields are ignored. Default:
    verify's texts, and questions about drawn pictures. Prompts are cut at LONGEST tokens, and at the model's
    max_seq_len. Raises UserError naming a line that is wrong.
    """
    vision, layers = _Watch(), _Watch()
    sequences, rows = _inputs(plan, _encoded(plan, data), vision, tell)
    if decoder:
        tell(f"calibrating: {sum(map(len, sequences))} tokens through the decoder")
        _decoder(plan, _batches(sequences), rows, layers)
    return vision.ranges(), layers.ranges()


def rounded(plan: Plan, data: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, Weight]:
    """The decoder's weights, with those of its linear layers and its head rounded to int4 for the inputs that
    the prompts of `data` give them behind rounded layers, towards what they give without. Of more than
    ROUNDING tokens, as many prompts are used as these hold, picked at random. The text's tokens count as much
    as the pictures', which are nine of ten and say less of an answer (Li et al., arXiv:2412.19509, weigh them
    too).

    data: as `calibrate` takes it. Raises UserError naming a line that is wrong.
    """
    encoded = _encoded(plan, data)
    mixed = random.Random(0).sample(encoded, len(encoded))
    totals = accumulate(min(_longest(plan), len(e.ids) + len(e.slots) * plan.vision.tokens) for e in mixed)
    used = [e for e, total in zip(mixed, totals, strict=True) if total <= ROUNDING]
    sequences, rows = _inputs(plan, used, _Watch(), tell)
    tell(
        f"calibrating: rounding the decoder for {sum(map(len, sequences))} tokens, "
        f"{len(used)} of {len(encoded)} prompts"
    )
    rounder, weights = _Rounder(torch.cat(sequences) >= plan.decoder.vocab_size, tell), plan.decoder_weights
    last = _decoder(plan, [sequences * 2], rows, rounder)
    rounder.round("head", weights["head.weight"], last)
    own = {f"{name}.weight": found for name, found in rounder.found.items()}
    return {k: replace(w, own=(own[k],)) if k in own else w for k, w in weights.items()}


def working(c: DecoderConfig) -> int:
    """Bytes that `rounded` takes beside the weights that it makes: five times the widest activations, since
    the MLPs or attention of both models hold so much at once, and six times the squares of the widest inputs.
    Of four layers as LLaVA-1.5-7B's an export took 11.6 GB with all, of 13.3 that it asks for.
    """
    attention = c.heads * c.head_dim
    widest = max(attention + 2 * c.kv_heads * c.head_dim, 2 * c.intermediate_size)
    return 4 * (5 * ROUNDING * widest + 6 * max(c.hidden_size, attention, c.intermediate_size) ** 2)


def _encoded(plan: Plan, data: Path | None) -> list[EncodedPrompt]:
    from ..runtime.prompt import PromptEncoder

    encoder = PromptEncoder(plan.prompt, plan.tokenizer)
    if data:
        return _read(data, encoder)
    return [encoder.encode_prompt(text, pictures) for text, pictures in _default(plan)]


def _longest(plan: Plan) -> int:
    return min(LONGEST, plan.decoder.max_seq_len)


def _inputs(
    plan: Plan, encoded: Sequence[EncodedPrompt], watch: _Watch, tell: Callable[[str], None]
) -> tuple[list[Tensor], Tensor]:
    """The decoder's: each prompt's ids, and the rows of all pictures, which ids from vocab_size on select."""
    from ..runtime.preprocess import preprocess
    from ..runtime.prompt import expand

    # glibc learns to keep what was freed, up to 32 MB a piece, and small tensors between the pieces then
    # hold gigabytes: larger pieces than 1 MB (M_MMAP_THRESHOLD is −3) go straight back to the system
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)
    pixels = [preprocess(_open(picture), plan.vision) for e in encoded for picture in e.sources]
    features = []
    with torch.device("meta"):
        tower = plan.make_vision()
    tell(f"calibrating: {len(pixels)} pictures through the vision tower")
    watch.stream(tower, plan.vision_weights)
    with torch.no_grad():
        for at in range(0, len(pixels), PICTURES):
            features.append(tower(torch.from_numpy(np.stack(pixels[at : at + PICTURES]))))
    rows = torch.cat(features).flatten(0, 1) if features else torch.zeros(1, plan.decoder.hidden_size)

    sequences, used = [], 0
    for e in encoded:
        ids, spans = expand(e, [plan.vision.tokens] * len(e.sources), plan.prompt.image.token_id)
        sequence = torch.tensor(ids)
        for start, length in spans:
            sequence[start : start + length] = plan.decoder.vocab_size + used + torch.arange(length)
            used += length
        sequences.append(sequence[: _longest(plan)])
    return sequences, rows


def _decoder(plan: Plan, batches: Iterable[list[Tensor]], rows: Tensor, watch: _Watch) -> Tensor:
    """Runs it but for its head; returns the last batch's [T, hidden]."""
    from .attention import Eager
    from .decoder import Decoder, constants

    class Forgetful(Eager):
        """Whole sequences need no caches: 32 layers of them are gigabytes."""

        def __call__(self, *args: Any) -> Tensor:
            out = super().__call__(*args)
            self.presents.clear()
            return out

    c = plan.decoder
    with torch.device("meta"):
        decoder = Decoder(c)
    weights = {k: w for k, w in plan.decoder_weights.items() if not k.startswith(("embed.", "head."))}
    decoder.set_submodule("embed", _Rows(plan.decoder_weights["embed.weight"]))
    decoder.set_submodule("head", nn.Identity())
    for name, table in constants(c).items():
        decoder.register_buffer(name, table, persistent=False)
    watch.stream(decoder, weights)
    with torch.no_grad():
        for batch in batches:
            lengths = [len(s) for s in batch]
            positions = torch.cat([torch.arange(n) for n in lengths])
            tables = [next(i for i, limit in enumerate(c.limits) if n <= limit) for n in lengths]
            table = torch.repeat_interleave(torch.tensor(tables), torch.tensor(lengths))
            attend = Forgetful(decoder, positions + table * c.max_seq_len, lengths)
            last = decoder(torch.cat(batch), rows, attend, None, positions)
    return last


def _batches(sequences: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for sequence in sequences:
        if batch and sum(map(len, batch)) + len(sequence) > TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch


class _Watch:
    """Runs a module on the meta device with streamed weights, and keeps what its linear layers read."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}
        self.sizes: dict[str, list[Tensor]] = {}  # root mean square of each token

    def ranges(self) -> dict[str, Range]:
        return {
            name: Range(amax, float(torch.cat(self.sizes[name]).median()))
            for name, amax in self.amax.items()
        }

    def product(self, name: str, weight: Weight, x: Tensor) -> Tensor:
        """What a layer makes of x [..., in], but for its bias."""
        self.amax[name] = max(self.amax.get(name, 0.0), float(x.abs().max()))
        self.sizes.setdefault(name, []).append(x.flatten(0, -2).square().mean(-1).sqrt())
        return F.linear(x, weight.read())

    def stream(self, module: nn.Module, weights: Mapping[str, Weight]) -> None:
        """Gives a module on the meta device its weights, those of its linear layers whenever they run."""
        for name, weight in weights.items():
            owner, _, parameter = name.rpartition(".")
            child = module.get_submodule(owner)
            if not isinstance(child, nn.Linear | _Streamed):
                setattr(child, parameter, nn.Parameter(weight.read(), requires_grad=False))
            elif parameter == "weight":
                module.set_submodule(owner, _Streamed(self, owner, weight, weights.get(f"{owner}.bias")))


class _Streamed(nn.Module):
    """A linear layer whose weight is read when it runs."""

    def __init__(self, watch: _Watch, name: str, weight: Weight, bias: Weight | None):
        super().__init__()
        self.watch, self.name, self.weight, self.bias = watch, name, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.watch.product(self.name, self.weight, x)
        return out if self.bias is None else out.add_(self.bias.read())


class _Rounder(_Watch):
    """Rounds each layer for what it reads. Two models run as one of twice the tokens: the first half goes on
    with the layers as they were, the second with what they became.

    image: bool [T], which tokens are a picture's.
    """

    def __init__(self, image: Tensor, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.found: dict[str, Rounded] = {}
        share = torch.where(image, image.sum(), (~image).sum())
        self.share = share.reciprocal().unsqueeze(1)
        self.tell, self.told = tell, time.monotonic()

    def product(self, name: str, weight: Weight, x: Tensor) -> Tensor:
        exact, inputs = x.chunk(2)
        found = self.round(name, weight, x)
        height, width = found.shape
        out = x.new_empty(len(x), height)
        step = max(1, CHUNK // width)
        for low in range(0, height, step):
            rows = slice(low, min(low + step, height))
            out[: len(exact), rows] = exact @ weight.read(rows.start, rows.stop).t()
            out[len(exact) :, rows] = inputs @ found.read(rows.start, rows.stop).t()
        return out

    def round(self, name: str, weight: Weight, x: Tensor) -> Rounded:
        """x [2 T, in], the exact model's inputs before those of the rounded one."""
        if time.monotonic() > self.told + 20:
            self.tell(f"calibrating: rounding {name}")
            self.told = time.monotonic()
        exact, inputs = x.chunk(2)
        shared = inputs * self.share
        try:
            # long columns: the loop over them is Python's
            data = gptq.rounded(weight.chunks(4 * CHUNK), inputs.t() @ shared, exact.t() @ shared)
        except ValueError as e:
            raise UserError(f"layer {name} cannot be rounded for the calibration data: {e}") from e
        self.found[name] = Rounded(x.shape[1], data)
        return self.found[name]


class _Rows(nn.Module):
    """An embedding that reads only the rows that are asked for."""

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        unique, places = ids.unique(return_inverse=True)
        return torch.cat([self.weight.read(i, i + 1) for i in unique.tolist()])[places]


def _default(plan: Plan) -> list[tuple[str, list[Any]]]:
    """Raw texts, and the pictures of their tags."""
    from .verify import TEXTS, pictures

    tag = plan.prompt.image.tags[0]
    asked = zip(QUESTIONS, pictures(), strict=True)
    return [*((f"{tag}\n{question}", [picture]) for question, picture in asked), *((t, []) for t in TEXTS)]


def _read(file: Path, encoder: PromptEncoder) -> list[EncodedPrompt]:
    prompts: list[EncodedPrompt] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"calibration data {file} cannot be read: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, messages, urls = fields.get("prompt"), fields.get("messages"), fields.get("urls") or []
            kinds = [type(value) for value in (prompt, messages) if value is not None]
            if kinds not in ([str], [list]) or not isinstance(urls, list):
                raise TypeError
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f'{file} line {number} is {line[:60]!r}, expected {{"prompt": "…", "urls": ["FILE", …]}} or '
                '{"messages": [{"role": "user", "content": …}, …], "urls": ["FILE", …]}'
            ) from None
        try:
            if prompt is None:
                encoded = encoder.encode_chat(messages, urls)
            else:
                encoded = encoder.encode_prompt(prompt, urls)
        except UserError as e:
            raise UserError(f"{file} line {number}: {e}") from e
        for source in encoded.sources:
            if not isinstance(source, str) or "://" in source or source.startswith("data:"):
                raise UserError(f"{file} line {number}: a picture is {shown(source)}, expected a file's path")
        encoded.sources = [file.parent / source for source in encoded.sources]
        prompts.append(encoded)
    if not prompts:
        raise UserError(f"calibration data {file} has no prompts")
    return prompts


def _open(picture: Image.Image | Path) -> Image.Image:
    from PIL import Image

    if not isinstance(picture, Path):
        return picture
    try:
        image = Image.open(picture)
        image.load()  # a cut file says so here
        return image
    except OSError as e:
        raise UserError(f"calibration picture {picture} cannot be read: {e}") from e

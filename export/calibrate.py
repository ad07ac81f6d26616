"""Ranges of the inputs of linear layers, for engines whose activations have static scales (fp8, int8).

The float32 reference runs once over some prompts with pictures. Weights stream: a linear layer reads its own
from the checkpoint just before it is called and drops it after, so a 7B model needs about 2 GB
(worked out, not measured).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from .qdq import Range

if TYPE_CHECKING:
    from PIL import Image

    from .checkpoint import Weight
    from .families import Plan

TOKENS = 2048  # packed tokens of the decoder at a time
LONGEST = 2048  # of a prompt: its attention takes memory with the square, 0.5 GB here with 32 heads
PICTURES = 4  # of the vision tower at a time
QUESTIONS = (
    "Describe the picture.",
    "What colour is the circle, and what stands to the right of it?",
    "这张图片里有什么？",
    "How many shapes are there? Answer in one word.",
)

Prompt = tuple[str, list[Any]]  # raw text, and the pictures of its tags


def calibrate(
    plan: Plan,
    data: Path | None = None,
    decoder: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Ranges of the vision tower's linear layers and of the decoder's (but its head), by their names.

    decoder False: the tower alone.
    data: JSONL as `rtp-llm batch` reads it, `prompt` and `urls` (files, beside `data` where relative);
    other fields are ignored. Default: verify's texts, and questions about drawn pictures. Prompts are cut
    at LONGEST tokens, and at the model's max_seq_len. Raises UserError
    naming a line that is wrong.
    """
    from ..runtime.preprocess import preprocess
    from ..runtime.prompt import PromptEncoder, expand

    # glibc learns to keep what was freed, up to 32 MB a piece, and small tensors between the pieces then
    # hold gigabytes: larger pieces than 1 MB (M_MMAP_THRESHOLD is −3) go straight back to the system
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)
    prompts = _read(data) if data else _default(plan)
    encoder = PromptEncoder(plan.prompt, plan.tokenizer)
    encoded = [encoder.encode_prompt(text, pictures) for text, pictures in prompts]
    pixels = [preprocess(_open(picture), plan.vision) for e in encoded for picture in e.sources]

    vision = _Watch()
    features = []
    with torch.device("meta"):
        tower = plan.make_vision()
    tell(f"calibrating: {len(pixels)} pictures through the vision tower")
    with torch.no_grad(), vision.watching(tower, plan.vision_weights):
        for at in range(0, len(pixels), PICTURES):
            features.append(tower(torch.from_numpy(np.stack(pixels[at : at + PICTURES]))))
    rows = torch.cat(features).flatten(0, 1) if features else torch.zeros(1, plan.decoder.hidden_size)

    if not decoder:
        return vision.ranges(), {}
    sequences, used = [], 0
    for e in encoded:
        ids, spans = expand(e, [plan.vision.tokens] * len(e.sources), plan.prompt.image.token_id)
        sequence = torch.tensor(ids)
        for start, length in spans:
            sequence[start : start + length] = plan.decoder.vocab_size + used + torch.arange(length)
            used += length
        sequences.append(sequence[: min(LONGEST, plan.decoder.max_seq_len)])
    tell(f"calibrating: {sum(map(len, sequences))} tokens through the decoder")
    return vision.ranges(), _decoder(plan, sequences, rows)


def _decoder(plan: Plan, sequences: Sequence[Tensor], rows: Tensor) -> dict[str, Range]:
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
    watch = _Watch()
    with torch.no_grad(), watch.watching(decoder, weights):
        for batch in _batches(sequences):
            lengths = [len(s) for s in batch]
            positions = torch.cat([torch.arange(n) for n in lengths])
            tables = [next(i for i, limit in enumerate(c.limits) if n <= limit) for n in lengths]
            table = torch.repeat_interleave(torch.tensor(tables), torch.tensor(lengths))
            attend = Forgetful(decoder, positions + table * c.max_seq_len, lengths)
            decoder(torch.cat(batch), rows, attend, torch.tensor([0]), positions)
    return watch.ranges()


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

    @contextlib.contextmanager
    def watching(self, module: nn.Module, weights: Mapping[str, Weight]) -> Iterator[None]:
        hooks = []
        for name, weight in weights.items():
            owner, _, parameter = name.rpartition(".")
            child = module.get_submodule(owner)
            if not isinstance(child, nn.Linear):
                setattr(child, parameter, nn.Parameter(weight.read(), requires_grad=False))
            elif parameter == "weight":
                own = {p: weights[f"{owner}.{p}"] for p, _ in child.named_parameters()}
                hooks += self._stream(owner, child, own)
        yield
        for hook in hooks:
            hook.remove()

    def _stream(self, name: str, linear: nn.Linear, weights: Mapping[str, Weight]) -> list[Any]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            self.amax[name] = max(self.amax.get(name, 0.0), float(x.abs().max()))
            self.sizes.setdefault(name, []).append(x.square().mean(-1).sqrt())
            for parameter, weight in weights.items():
                setattr(linear, parameter, nn.Parameter(weight.read(), requires_grad=False))

        def after(*_: Any) -> None:
            linear.to("meta")

        return [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]


class _Rows(nn.Module):
    """An embedding that reads only the rows that are asked for."""

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        unique, places = ids.unique(return_inverse=True)
        return torch.cat([self.weight.read(i, i + 1) for i in unique.tolist()])[places]


def _default(plan: Plan) -> list[Prompt]:
    from .verify import TEXTS, pictures

    tag = plan.prompt.image.tags[0]
    shown: list[Prompt] = [
        (f"{tag}\n{question}", [picture]) for question, picture in zip(QUESTIONS, pictures(), strict=True)
    ]
    return [*shown, *((text, []) for text in TEXTS)]


def _read(file: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"calibration data {file} cannot be read: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, urls = fields["prompt"], fields.get("urls") or []
            if not isinstance(prompt, str) or not isinstance(urls, list):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f'{file} line {number} is {line[:60]!r}, expected {{"prompt": "…", "urls": ["FILE", …]}}'
            ) from None
        prompts.append((prompt, [file.parent / str(url) for url in urls]))
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

"""Stage-by-stage parity of a bundle with its checkpoint's reference implementation, in float32.

The reference is transformers' own model where it has one for the layout (llava-hf), and this package's
plain torch modules otherwise: the same checkpoint tensors, no graph, no ONNX Runtime, no quantisation but the
checkpoint's own, dequantised exactly.
"""

from __future__ import annotations

import dataclasses
import os
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..errors import UserError
from . import bundle as bundles
from .bundle import Bundle
from .checkpoint import Checkpoint, resolve
from .families import FAMILIES, Options, Plan, detect
from .vision import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from ..runtime.backends import Options as RunOptions

TOLERANCE = 5e-5  # of the reference's standard deviation, float32
MARGIN = 0.005  # two best logits closer than this may change places under another summation order
# Least cosine of a stage for lower precisions; an error of r times the result leaves 1 − r² / 2. Operands
# of a product are rounded by up to 2^-12 of themselves in fp16, 2^-9 in bf16, 2^-4 in fp8; the 200 products
# of a deep model add up to some ten times that, and its own sensitivity doubles or trebles it. Measured on
# the samples, at worst: 0.999997, 0.9998, 0.993; engines in int8 0.9988, decoders in int4 0.9989.
COSINE = {"fp16": 0.999, "bf16": 0.99, "fp8": 0.98, "int8": 0.99, "int4": 0.9}
NEW_TOKENS = 16
TEXTS = (
    "Hello, world!",
    "  two spaces, a\ttab\nand 1234567890 digits ",
    "Zwölf Boxkämpfer — naïve café",
    "你好，请问这是什么？ 日本語 한국어",
    "🙂👩‍👩‍👧 e\u0301 \u00a0 ﬁ",
    "def f(x):\n    return {'a': [x**2, -1.5e-3]}",
    "<box>(1,2),(3,4)</box> </s> <|im_end|>",
)


@dataclass(frozen=True)
class Stage:
    """One comparison. difference: worst |Δ| in standard deviations of the reference (grey levels for
    pixels, unequal items for ids and tokens)."""

    name: str
    passed: bool | None  # None: nothing here to compare with
    difference: float | None = None
    cosine: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    bundle: str
    checkpoint: str
    reference: str  # what it was compared with
    precision: str
    stages: list[Stage] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(stage.passed is not False for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "passed": self.passed}


class Reference(Protocol):
    name: str

    def text_ids(self, text: str) -> list[int] | None:
        """Ids of a text without images; None: there is no independent tokenizer here."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        """float32 [size, size, 3], normalised, of an RGB picture."""

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [tokens, hidden] of uint8 [size, size, 3]."""

    def generate(self, ids: list[int], slots: list[int], pixels: np.ndarray) -> Generated:
        """Greedy continuation of a prompt whose positions `slots` are a picture's rows."""


@dataclass(frozen=True)
class Generated:
    embeds: np.ndarray  # float32 [prompt, hidden], spliced
    logits: np.ndarray  # float32 [steps, vocab]
    tokens: list[int]


def verify(
    bundle: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare a bundle with `checkpoint` (default: the one that it was exported from), run as `run` says.

    Raises BundleError, CheckpointError, and UserError where the float32 reference does not fit into
    memory.
    """
    from ..runtime.backends import Options as RunOptions

    tell = progress or (lambda _: None)
    opened = bundles.read(bundle, check_hashes=True)
    source = Checkpoint(resolve(checkpoint or opened.origin.checkpoint, flag="--checkpoint"))
    family, _ = detect(source.config)
    names = {f.name for f in dataclasses.fields(Options)}
    options = Options(**{k: v for k, v in opened.origin.options.items() if k in names})
    plan = FAMILIES[family].plan(source, options)
    _check_memory(source)
    tell("loading the reference")
    reference: Reference = (
        _Transformers(source, plan)
        if plan.architecture == "LlavaForConditionalGeneration" and source.scheme is None
        else _Torch(plan, Path(options.tokenizer or source.path))
    )
    report = Report(str(bundle), str(source.path), reference.name, opened.precision)
    for stage in _stages(opened, plan, reference, run or RunOptions(slots=1)):
        tell(stage.name)
        report.stages.append(stage)
    return report


def _check_memory(checkpoint: Checkpoint) -> None:
    import psutil

    need, free = 4 * checkpoint.parameters() * 5 // 4, psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"verify runs the reference in float32, which takes {need / 1e9:.1f} GB of memory; "
            f"{free / 1e9:.1f} GB are available: run it on a larger machine"
        )


def _stages(bundle: Bundle, plan: Plan, reference: Reference, run: RunOptions) -> Iterator[Stage]:
    from tokenizers import Tokenizer

    from ..runtime.backends import open_backend
    from ..runtime.preprocess import preprocess
    from ..runtime.prompt import PromptEncoder, expand

    rules = bundle.prompt
    tokenizer = Tokenizer.from_file(str(bundle.read_path(bundle.tokenizer)))
    prompts = PromptEncoder(rules, tokenizer)
    wrong, checked = [], 0
    for text in TEXTS:
        expected = reference.text_ids(text)
        if expected is not None:
            checked += 1
            ids, _ = expand(prompts.encode_prompt(text, []), [], rules.image.token_id)
            wrong += [text] if ids != expected else []
    if checked:
        note = f"differs on {wrong[0]!r}" if wrong else f"{checked} texts"
        yield Stage("tokenizer ids", not wrong, float(len(wrong)), None, 0.0, note)
    else:
        yield Stage("tokenizer ids", None, note="no independent tokenizer here: pip install tiktoken")

    picture = _picture()
    shown = preprocess(picture, bundle.vision)
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    expected_pixels = reference.pixels(picture)
    grey = np.rint((expected_pixels * std + mean) * 255)
    off = float(np.abs(grey - shown).max())
    yield Stage("pixels", off == 0, off, None, 0.0, f"{shown.shape[1]}×{shown.shape[0]}, grey levels")

    backend = open_backend(bundle, run)
    precision = bundle.graphs["vision"].precision
    features = reference.features(shown)
    yield _compare("vision features", features, backend.encode(shown[None])[0], precision)

    tag = rules.image.tags[0]
    encoded = prompts.encode_prompt(f"{tag}\nDescribe the picture.", [picture])
    ids, spans = expand(encoded, [bundle.vision.tokens], rules.image.token_id)
    slots = [i for start, length in spans for i in range(start, start + length)]
    generated = reference.generate(ids, slots, shown)
    precision = bundle.graphs["decoder"].precision
    if bundle.backend == "torchscript":
        yield Stage("splice", None, note="inside decoder.pt; the logits show it")
    else:
        embeds = _spliced(bundle, ids, slots, features)
        yield _compare("splice", generated.embeds, embeds, precision)

    backend.close()
    logits, tokens = _generate(bundle, run, ids, slots, features)
    yield _compare("first-token logits", generated.logits[0], logits[0], precision)
    best = np.sort(generated.logits, axis=-1)
    margins = best[:, -1] - best[:, -2]
    until = next((i for i, m in enumerate(margins) if m < MARGIN), len(margins))
    same = next(
        (i for i, (a, b) in enumerate(zip(generated.tokens, tokens, strict=True)) if a != b),
        len(tokens),
    )
    exact = precision == "fp32"
    note = f"{same} of {len(tokens)} equal" + ("" if exact else "; for information")
    if same < len(tokens) and same >= until:
        note += f"; a near tie (margin {margins[until]:.4f}) at {until}"
    passed = not exact or same >= until
    yield Stage(f"{NEW_TOKENS} greedy tokens", passed, float(len(tokens) - same), None, 0.0, note)


def _compare(name: str, expected: np.ndarray, found: np.ndarray, precision: str) -> Stage:
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    difference = float(np.abs(a - b).max() / a.std())
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    if precision == "fp32":
        return Stage(name, difference <= TOLERANCE, difference, cosine, TOLERANCE)
    least = COSINE[precision]
    return Stage(name, cosine >= least, difference, cosine, least, f"{precision}: least cosine")


def pictures() -> list[Image.Image]:
    """Four to calibrate with: shapes, the same turned and in other colours, noise, and white."""
    first = _picture()
    noise = np.random.default_rng(0).integers(0, 256, (190, 240, 3), np.uint8)
    turned = ImageOps.invert(first.transpose(Image.Transpose.ROTATE_90))
    return [first, turned, Image.fromarray(noise), Image.new("RGB", (320, 200), "white")]


def _picture() -> Image.Image:
    """A gradient with shapes, neither square nor of a round size."""
    image = Image.linear_gradient("L").resize((301, 207)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 120, 140), fill=(220, 30, 40))
    draw.polygon([(180, 20), (290, 190), (150, 170)], fill=(30, 90, 220))
    return image


# ---------------------------------------------------------------------------------- the bundle's side


def _spliced(bundle: Bundle, ids: list[int], slots: list[int], features: np.ndarray) -> np.ndarray:
    """What the decoder graph makes of a prompt before its first layer: [prompt, hidden]."""
    import onnx
    import onnxruntime as ort

    spec = bundle.graphs["decoder"]
    model = onnx.load(bundle.read_path(spec.path), load_external_data=False)
    graph = model.graph
    norm = next(n for n in graph.node if n.op_type == "RMSNormalization")
    spliced = norm.input[0]
    needed, nodes = {spliced}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    nodes.reverse()
    inputs = [i for i in graph.input if i.name in needed]
    weights = [w for w in graph.initializer if w.name in needed]
    output = onnx.helper.make_tensor_value_info(spliced, onnx.TensorProto.FLOAT, None)
    del graph.node[:], graph.input[:], graph.output[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.initializer.extend(weights)
    graph.output.append(output)
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    step = np.array(ids, np.int64)
    step[slots] = bundle.model.vocab_size + np.arange(len(slots))
    feeds = {"input_ids": step, "image_embeds": np.ascontiguousarray(features, np.float32)}
    return session.run(None, {i.name: feeds[i.name] for i in inputs})[0]


def _generate(
    bundle: Bundle, run: RunOptions, ids: list[int], slots: list[int], features: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Greedy tokens of the bundle's engine, given the reference's features."""
    import threading

    from ..runtime.backends import open_backend
    from ..runtime.engine import Engine
    from ..runtime.sampling import Sampled, Sampler
    from ..runtime.sequence import ImageSpan, SamplingParams, Sequence

    backend = open_backend(bundle, run)
    backend.encode = lambda pixels: features[None]  # type: ignore[method-assign]
    engine = Engine(backend, bundle.model)
    rows: list[np.ndarray] = []
    failed: list[Exception] = []
    done = threading.Event()

    class Listener:
        def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
            assert sampled.logits is not None
            rows.append(sampled.logits)
            return None

        def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
            pass

        def end(self, sequence: Sequence, reason: str, error: Exception | None) -> None:
            failed.extend([error] if error else [])
            done.set()

    key = b"verify"
    spans = [ImageSpan(slots[0], len(slots), key)]
    sequence = Sequence(
        tokens=list(ids),
        prompt_len=len(ids),
        params=SamplingParams(do_sample=False, return_logits=True),
        max_new_tokens=NEW_TOKENS,
        eos_ids=frozenset(),
        images=spans,
        rope_table=bundle.model.rope.table(len(ids)),
    )
    pixels = np.zeros((bundle.vision.size, bundle.vision.size, 3), np.uint8)
    engine.submit(sequence, Sampler(bundle.model.vocab_size), Listener(), {key: pixels})
    done.wait()
    engine.stop()
    if failed:
        raise failed[0]
    return np.stack(rows), sequence.tokens[len(ids) :]


# -------------------------------------------------------------------------------------- references


class _Torch:
    """The plan's torch modules, eager attention."""

    def __init__(self, plan: Plan, tokenizer: Path):
        from .decoder import Decoder, constants

        self.name = f"plain torch modules (torch {torch.__version__}) of {plan.architecture}"
        self.plan = plan
        with torch.device("meta"):
            decoder, vision = Decoder(plan.decoder), plan.make_vision()
        self.decoder = decoder.to_empty(device="cpu").eval().requires_grad_(False)
        self.vision = vision.to_empty(device="cpu").eval().requires_grad_(False)
        for name, table in constants(plan.decoder).items():
            self.decoder.get_buffer(name).copy_(table)
        for module, weights in (
            (self.decoder, plan.decoder_weights),
            (self.vision, plan.vision_weights),
        ):
            for name, weight in weights.items():
                module.get_parameter(name).copy_(weight.read())
        self._tokenize = _independent_tokenizer(plan, tokenizer)

    def text_ids(self, text: str) -> list[int] | None:
        return self._tokenize(text) if self._tokenize else None

    def pixels(self, image: Image.Image) -> np.ndarray:
        spec = self.plan.vision
        if spec.recipe == "square":
            resized = image.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
            return (np.array(resized, np.float32) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        if spec.recipe == "pad":
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), tuple(spec.fill))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        return _clip_pixels(image, spec.resize, spec.size)

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.vision(torch.from_numpy(pixels[None]))[0].numpy()

    @torch.no_grad()
    def generate(self, ids: list[int], slots: list[int], pixels: np.ndarray) -> Generated:
        from .attention import Eager

        c = self.plan.decoder
        table = next(i for i, limit in enumerate(c.limits) if len(ids) <= limit)
        prompt = torch.tensor(ids)
        prompt[slots] = c.vocab_size + torch.arange(len(slots))
        rows = torch.from_numpy(self.features(pixels))
        embeds = self.decoder.embed(torch.where(prompt < c.vocab_size, prompt, 0))
        embeds[slots] = rows
        logits: list[Tensor] = []
        tokens: list[int] = []
        step, pasts, at = prompt, None, 0
        while len(tokens) < NEW_TOKENS:
            positions = torch.arange(at, at + len(step))
            attend = Eager(self.decoder, positions + table * c.max_seq_len, [len(step)], pasts)
            last = torch.tensor([len(step) - 1])
            logits.append(self.decoder(step, rows, attend, last, positions)[0])
            tokens.append(int(logits[-1].argmax()))
            at, pasts, step = at + len(step), attend.presents, torch.tensor(tokens[-1:])
        return Generated(embeds.numpy(), torch.stack(logits).numpy(), tokens)


class _Transformers:
    """transformers' LlavaForConditionalGeneration, its tokenizer and its Pillow image processor."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan):
        import transformers

        self.name = f"transformers {transformers.__version__} LlavaForConditionalGeneration"
        folder = str(checkpoint.path)
        self.plan = plan
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def text_ids(self, text: str) -> list[int] | None:
        return self.tokenizer(text)["input_ids"]

    def pixels(self, image: Image.Image) -> np.ndarray:
        return _clip_pixels(image, self.plan.vision.resize, self.plan.vision.size)

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        x = torch.from_numpy(pixels[None]).float() / 255
        return ((x - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        found = self.model.get_image_features(pixel_values=self._normalised(pixels))
        found = getattr(found, "pooler_output", found)  # transformers 5 wraps it
        return (found if isinstance(found, Tensor) else found[0]).reshape(
            -1, self.plan.vision.hidden_size
        ).numpy()  # fmt: skip

    @torch.no_grad()
    def generate(self, ids: list[int], slots: list[int], pixels: np.ndarray) -> Generated:
        seen: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any) -> None:
            seen.append(kwargs["inputs_embeds"])

        hook = self.model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=self._normalised(pixels),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        hook.remove()
        logits = torch.cat(out.logits).numpy()
        return Generated(seen[0][0].numpy(), logits, out.sequences[0, len(ids) :].tolist())


def _clip_pixels(image: Image.Image, resize: int, size: int) -> np.ndarray:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": resize}, crop_size={"height": size, "width": size}
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)


def _independent_tokenizer(plan: Plan, folder: Path) -> Callable[[str], list[int] | None] | None:
    """tiktoken for `qwen.tiktoken`, sentencepiece for `tokenizer.model`, where they are installed."""
    try:
        if (file := folder / "qwen.tiktoken").is_file():
            import tiktoken

            from .tokenizer import QWEN_BOXES, QWEN_CONTROL, QWEN_IMAGE, QWEN_PATTERN

            lines = (line.split() for line in file.read_bytes().splitlines() if line)
            ranks = {b64decode(token): int(rank) for token, rank in lines}
            specials = [*QWEN_CONTROL, *QWEN_BOXES, *QWEN_IMAGE]
            qwen = tiktoken.Encoding(
                "qwen",
                pat_str=QWEN_PATTERN,
                mergeable_ranks=ranks,
                special_tokens={token: len(ranks) + i for i, token in enumerate(specials)},
            )
            return lambda text: qwen.encode(normalize("NFC", text), allowed_special="all")
        if (file := folder / "tokenizer.model").is_file():
            import sentencepiece

            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            bos = plan.prompt.bos_ids
            # control tokens are the tokenizer's business, not the model file's
            return lambda text: None if "</s>" in text else bos + pieces.encode(text)
    except ImportError:
        pass
    return None

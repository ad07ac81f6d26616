"""The models that gpu_check.py times: at their real size, with random weights made where they are used.

Ours is what `export --backend torchscript --precision bf16` would write, traced on the device and driven by
the real backend and engine; only the archive on disk is left out.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from make_random_checkpoint import SIZES
from torch import Tensor, nn

from rtp_llm.errors import RtpLlmError
from rtp_llm.export.attention import cache_head_dim, specs
from rtp_llm.export.bundle import Bundle, GraphSpec, ModelSpec, RopeSpec, TensorSpec
from rtp_llm.export.decoder import Decoder, DecoderConfig, constants, ntk_tables
from rtp_llm.export.quantize import swap
from rtp_llm.export.torchscript import PagedOp, Script, example
from rtp_llm.export.vision import ClipConfig, LlavaVision, QwenVisual
from rtp_llm.runtime.backends.paged import bucket
from rtp_llm.runtime.backends.torchscript import TorchScriptBackend
from rtp_llm.runtime.engine import Engine
from rtp_llm.runtime.sampling import Sampled, Sampler
from rtp_llm.runtime.sequence import ImageSpan, SamplingParams, Sequence


@dataclass(frozen=True)
class Prompt:
    """Token ids of words, behind a picture, uint8 [edge, edge, 3], or none."""

    words: list[int]
    picture: np.ndarray | None = None


def edge(model: str, size: str) -> int:
    """Pixels of a picture's side, as the image tower takes it."""
    c = SIZES[model][size]
    return c["visual" if model == "qwen_vl" else "clip"]["image_size"]


def prompts(
    model: str, size: str, count: int, words: int, seed: int | None = None, image: bool = True
) -> list[Prompt]:
    """`count` random prompts of `words` tokens and a picture each, 16 squares of some colour. With a seed
    always the same ones, and of a larger `count` these are the first."""
    random, side = np.random.default_rng(seed), edge(model, size)
    made = []
    for _ in range(count):
        ids = random.integers(3, SIZES[model][size]["vocab_size"] - 1, words).tolist()
        colours = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)  # of noise all averages are alike
        made.append(Prompt(ids, colours.repeat(side // 4, 0).repeat(side // 4, 1) if image else None))
    return made


class Answer:
    """When a prompt was given, when each token of its answer came (time.perf_counter), and the tokens."""

    def __init__(self) -> None:
        self.start = 0.0
        self.times: list[float] = []
        self.tokens: list[int] = []


def decoder_config(model: str, size: str) -> DecoderConfig:
    """What the family's plan makes of scripts/make_random_checkpoint.py's config.json."""
    c = SIZES[model][size]
    common = {
        "vocab_size": c["vocab_size"], "hidden_size": c["hidden_size"], "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
    }  # fmt: skip
    if model == "qwen_vl":
        limits, alphas = ntk_tables(c["seq_length"], 8192)
        return DecoderConfig(
            **common, intermediate_size=c["intermediate_size"] // 2, kv_heads=c["num_attention_heads"],
            head_dim=c["kv_channels"], max_seq_len=8192, eps=1e-6, rotary_dim=c["kv_channels"],
            rope_limits=limits, ntk_alphas=alphas, logn=c["seq_length"], qkv_bias=True,
        )  # fmt: skip
    return DecoderConfig(
        **common, intermediate_size=c["intermediate_size"], kv_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"], max_seq_len=4096, eps=1e-5,
    )  # fmt: skip


def vision(model: str, size: str) -> nn.Module:
    c = SIZES[model][size]
    if model == "qwen_vl":
        return QwenVisual(**c["visual"])
    return LlavaVision(ClipConfig(**c["clip"]), c["hidden_size"])


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights like a fresh checkpoint's: normal with deviation 0.02, vectors of norms about 1."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(p)
        else:
            p.detach().normal_(0, 0.02, generator=generator)


def made(make: Any, device: torch.device, precision: str) -> nn.Module:
    """`make()` on the device without a copy on the host, swapped as the TorchScript export swaps it."""
    with torch.device("meta"):
        module = make().eval().requires_grad_(False)
        swap(module, precision, "torchscript")
    module.to_empty(device=device)
    randomise(module)
    return module


class RandomBackend(TorchScriptBackend):
    """TorchScriptBackend over modules in memory. `size`: "full" or "tiny"."""

    def __init__(self, model: str, size: str, device: str, **options: Any):
        self.kind, self.size, self.precision = model, size, "bf16" if device != "cpu" else "fp32"
        c = self.config = decoder_config(model, size)
        dtype = "bfloat16" if self.precision == "bf16" else "float32"
        inputs, outputs = specs("paged", c, dtype, metadata=False)
        with torch.device("meta"):
            tower = vision(model, size)
        self.tokens, self.edge = int(tower.tokens), edge(model, size)
        pixels = [TensorSpec("pixels", "uint8", ["N", self.edge, self.edge, 3])]
        graphs = {
            "vision": GraphSpec("", pixels, [], self.precision),
            "decoder": GraphSpec("", inputs, outputs[:1], self.precision),
        }
        spec = ModelSpec(
            family=model, architecture="", vocab_size=c.vocab_size, hidden_size=c.hidden_size,
            layers=c.layers, heads=c.heads, kv_heads=c.kv_heads, head_dim=cache_head_dim(c.head_dim),
            max_seq_len=c.max_seq_len, rope=RopeSpec("linear", c.limits), attention="paged", parameters=0,
        )  # fmt: skip
        nothing: Any = None
        bundle = Bundle(
            schema=1, name=f"random {model}", backend="torchscript", precision=self.precision, model=spec,
            vision=nothing, prompt=nothing, generation=nothing, graphs=graphs, tokenizer="", files={},
            origin=nothing,
        )  # fmt: skip
        super().__init__(bundle, device=device, **options)

    def load(self) -> None:
        inputs = self.bundle.graphs["decoder"].inputs
        script = made(lambda: Script(Decoder(self.config), PagedOp, inputs), self.device, self.precision)
        for name, table in constants(self.config).items():
            getattr(script.decoder, name).copy_(table)
        parameters = {id(p): p for name, p in script.named_parameters() if "embed." not in name}
        self.weight_bytes = sum(p.nbytes for p in parameters.values())
        tower = made(lambda: vision(self.kind, self.size), self.device, self.precision)
        pixels = torch.zeros((2, self.edge, self.edge, 3), dtype=torch.uint8, device=self.device)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            arguments = tuple(t.to(self.device) for t in example(inputs))
            self._decoder = torch.jit.trace(script, arguments, check_trace=False)
            self._vision = torch.jit.trace(tower, pixels, check_trace=False)
        if self.cuda:  # weights are made on another stream than steps run on
            torch.cuda.synchronize(self.device)


class Ear(Answer):
    """The engine's listener."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[np.ndarray] = []  # float32 [vocab] of each token, where they were asked for
        self.over = threading.Event()
        self.error: RtpLlmError | None = None

    def token(self, sequence: Sequence, sampled: Sampled) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(sampled.token)
        if sampled.logits is not None:
            self.logits.append(sampled.logits)

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        pass

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        self.error = error
        self.over.set()


class Ours:
    """The engine over a RandomBackend, with room for 2048 tokens a step and all pictures of 64 answers."""

    def __init__(self, model: str, size: str, device: str, slots: int, length: int):
        self.backend = RandomBackend(model, size, device, slots=slots, max_seq_len=length)
        self.spec = self.backend.bundle.model
        self.engine = Engine(self.backend, self.spec, token_budget=2048, image_cache_bytes=2**30)

    def capture(self, most: int) -> None:
        """A CUDA graph for every batch that up to `most` answers pass through as they come and go."""
        for rows in sorted({bucket(rows, self.backend.slots) for rows in range(1, most + 1)}):
            self.ask(prompts(self.backend.kind, self.backend.size, rows, 16, image=False), 4)

    def ask(
        self, asked: list[Prompt], new: int, arrivals: Iterable[float] | None = None, logits: bool = False
    ) -> list[Ear]:
        """Greedy answers of `new` tokens. arrivals: seconds after the call at which each prompt is given
        (None: all at once).

        A picture counts as never seen before, so that nothing of its prompt is taken from a cache. Raises
        the engine's error.
        """
        params = SamplingParams(top_k=1, max_new_tokens=new, return_logits=logits)
        sequences: list[tuple[Sequence, dict[bytes, np.ndarray]]] = []
        for prompt in asked:
            tokens, spans, pixels = prompt.words, [], {}
            if prompt.picture is not None:
                key = os.urandom(16)
                pixels = {key: prompt.picture}
                spans = [ImageSpan(0, self.backend.tokens, key)]
                tokens = [0] * self.backend.tokens + tokens
            table = self.spec.rope.table(len(tokens))
            sequence = Sequence(
                list(tokens), len(tokens), params, new, frozenset(), images=spans, rope_table=table
            )
            sequences.append((sequence, pixels))
        ears = [Ear() for _ in asked]
        began = time.perf_counter()
        for (sequence, pixels), ear, at in zip(sequences, ears, arrivals or [0.0] * len(asked), strict=True):
            time.sleep(max(0.0, began + at - time.perf_counter()))
            ear.start = time.perf_counter()
            self.engine.submit(sequence, Sampler(self.spec.vocab_size), ear, pixels)
        for ear in ears:
            if not ear.over.wait(300):
                raise TimeoutError("the engine gave no answer within 300 s")
            if ear.error:
                raise ear.error
        return ears

    def stop(self) -> None:
        self.engine.stop()


def llava_config(size: str) -> Any:
    """transformers' LlavaConfig of that size."""
    import transformers as hf

    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SIZES["llava"][size]["clip"]),
        text_config=hf.LlamaConfig(**_text("llava", size)),
        image_token_index=SIZES["llava"][size]["vocab_size"] - 1, tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip


def _text(model: str, size: str) -> dict[str, Any]:
    d = decoder_config(model, size)
    return {
        "vocab_size": d.vocab_size, "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size, "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads, "num_key_value_heads": d.kv_heads, "rms_norm_eps": d.eps,
        "max_position_embeddings": d.max_seq_len, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip


class Theirs:
    """transformers' model of the same shape; for qwen_vl, which it does not have, a Qwen2 decoder, and a CLIP
    tower of Qwen's width and depth whose rows are averaged to 256."""

    def __init__(self, model: str, size: str, device: str):
        import transformers as hf

        c, self.kind, self.device = SIZES[model][size], model, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if model == "qwen_vl":
            v = c["visual"]
            tower = hf.CLIPVisionConfig(
                hidden_size=v["width"], intermediate_size=int(v["width"] * v["mlp_ratio"]),
                num_hidden_layers=v["layers"], num_attention_heads=v["heads"],
                image_size=v["image_size"], patch_size=v["patch_size"],
            )  # fmt: skip
            text = hf.Qwen2Config(**_text(model, size))
            self.tokens = 256
            self.model = self._make(lambda: hf.Qwen2ForCausalLM(text), dtype)
            self.tower = self._make(lambda: hf.CLIPVisionModel(tower), dtype)
            self.projector = self._make(lambda: nn.Linear(v["width"], text.hidden_size), dtype)
        else:
            self.tokens = (c["clip"]["image_size"] // c["clip"]["patch_size"]) ** 2
            self.model = self._make(lambda: hf.LlavaForConditionalGeneration(llava_config(size)), dtype)
        self.vocab = c["vocab_size"]

    def _make(self, build: Any, dtype: torch.dtype) -> Any:
        """Random weights on the device, in `dtype`."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                module = build().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        randomise(module)
        return module

    def _inputs(self, asked: list[Prompt]) -> dict[str, Tensor]:
        """Of prompts of equal length."""
        ids = torch.tensor([prompt.words for prompt in asked], device=self.device)
        pictures = [prompt.picture for prompt in asked if prompt.picture is not None]
        if not pictures:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = torch.from_numpy(np.stack(pictures)).to(self.device).permute(0, 3, 1, 2)
        pixels = (pixels / 127.5 - 1).to(self.model.dtype)
        if self.kind == "qwen_vl":
            rows = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
            rows = nn.functional.adaptive_avg_pool1d(rows.transpose(1, 2), self.tokens).transpose(1, 2)
            words = self.model.get_input_embeddings()(ids)
            embeds = torch.cat([self.projector(rows), words], 1)
            return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2]).long()}
        slots = torch.full((len(asked), self.tokens), self.vocab - 1, device=self.device)
        ids = torch.cat([slots, ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def ask(self, asked: list[Prompt], new: int, static: bool = False) -> list[Answer]:
        """One `generate` of exactly `new` tokens to each of these prompts, which are equally long, greedy.

        static: its compiled static cache. A token's time is that of its logits on the device: `generate`
        itself need not wait for a token before it computes the next one.
        """
        options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
        marks: list[Any] = []
        answer = Answer()
        self._wait()
        answer.start = time.perf_counter()
        begun = self._mark()
        with torch.inference_mode():
            out = self.model.generate(
                **self._inputs(asked), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                logits_processor=[lambda ids, scores: (marks.append(self._mark()), scores)[1]], **options,
            )  # fmt: skip
        self._wait()
        if out.shape[1] < new or len(marks) < new:
            raise RuntimeError(f"generate gave {min(out.shape[1], len(marks))} tokens, expected {new}")
        if self.device.type == "cuda":
            answer.times = [answer.start + begun.elapsed_time(mark) / 1e3 for mark in marks[:new]]
        else:
            answer.times = marks[:new]
        answers = [copy(answer) for _ in asked]
        for one, tokens in zip(answers, out[:, -new:].tolist(), strict=True):
            one.tokens = tokens
        return answers

    def _mark(self) -> Any:
        """This moment in the device's work: an event, or the time where it does not run ahead."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

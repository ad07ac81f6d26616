"""The models that gpu_check.py times: at their real size, with random weights made where they are used.

Ours is what `export --backend torchscript --precision bf16` would write, traced on the device and driven by
the real backend and engine; only the archive on disk is left out.
"""

from __future__ import annotations

import threading
import time
import warnings
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
from rtp_llm.runtime.backends.torchscript import TorchScriptBackend
from rtp_llm.runtime.engine import Engine
from rtp_llm.runtime.sampling import Sampled, Sampler
from rtp_llm.runtime.sequence import ImageSpan, SamplingParams, Sequence

MODELS = tuple(SIZES)


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
        self.tokens, self.edge = int(tower.tokens), int(tower.image_size)
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


class Ear:
    """A listener that keeps the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.over = threading.Event()
        self.error: RtpLlmError | None = None

    def token(self, sequence: Sequence, sampled: Sampled) -> None:
        self.times.append(time.perf_counter())

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        pass

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        self.error = error
        self.over.set()


class Ours:
    """The engine over a RandomBackend."""

    def __init__(self, model: str, size: str, device: str, slots: int, length: int):
        self.backend = RandomBackend(model, size, device, slots=slots, max_seq_len=length)
        self.spec = self.backend.bundle.model
        self.engine = Engine(self.backend, self.spec, token_budget=4096, step_ms=1000)
        self.random = np.random.default_rng(0)

    def ask(self, batch: int, prompt: int, new: int, image: bool = False) -> tuple[float, list[Ear]]:
        """Greedy answers of `new` tokens to `batch` fresh prompts → the time of asking, and who heard them.

        With `image` a fresh picture stands before the prompt's words. Raises the engine's error.
        """
        params = SamplingParams(top_k=1, max_new_tokens=new)
        asked: list[tuple[Sequence, dict[bytes, np.ndarray]]] = []
        for _ in range(batch):
            tokens = self.random.integers(0, self.spec.vocab_size, prompt).tolist()
            spans, pixels = [], {}
            if image:
                edge = self.backend.edge
                key = self.random.bytes(16)
                pixels = {key: self.random.integers(0, 256, (edge, edge, 3), dtype=np.uint8)}
                spans = [ImageSpan(0, self.backend.tokens, key)]
                tokens = [0] * self.backend.tokens + tokens
            table = self.spec.rope.table(len(tokens))
            sequence = Sequence(tokens, len(tokens), params, new, frozenset(), images=spans, rope_table=table)
            asked.append((sequence, pixels))
        ears = [Ear() for _ in asked]
        start = time.perf_counter()
        for (sequence, pixels), ear in zip(asked, ears, strict=True):
            self.engine.submit(sequence, Sampler(self.spec.vocab_size), ear, pixels)
        for ear in ears:
            if not ear.over.wait(300):
                raise TimeoutError("the engine gave no answer within 300 s")
            if ear.error:
                raise ear.error
        return start, ears

    def stop(self) -> None:
        self.engine.stop()


class Theirs:
    """transformers' model of the same shape; for qwen_vl, which it does not have, a Qwen2 decoder, and a CLIP
    tower of Qwen's width and depth whose rows are averaged to 256."""

    def __init__(self, model: str, size: str, device: str):
        import transformers as hf

        c, self.kind, self.device = SIZES[model][size], model, torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        d = decoder_config(model, size)
        text = {
            "vocab_size": d.vocab_size, "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size, "num_hidden_layers": d.layers,
            "num_attention_heads": d.heads, "num_key_value_heads": d.kv_heads, "rms_norm_eps": d.eps,
            "max_position_embeddings": d.max_seq_len, "tie_word_embeddings": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        }  # fmt: skip
        if model == "qwen_vl":
            v = c["visual"]
            tower = hf.CLIPVisionConfig(
                hidden_size=v["width"], intermediate_size=int(v["width"] * v["mlp_ratio"]),
                num_hidden_layers=v["layers"], num_attention_heads=v["heads"],
                image_size=v["image_size"], patch_size=v["patch_size"],
            )  # fmt: skip
            self.edge = v["image_size"]
            self.model = self._make(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**text)), dtype)
            self.tower = self._make(lambda: hf.CLIPVisionModel(tower), dtype)
            self.projector = self._make(lambda: nn.Linear(v["width"], d.hidden_size), dtype)
        else:
            self.edge = c["clip"]["image_size"]
            self.patches = (self.edge // c["clip"]["patch_size"]) ** 2
            config = hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**c["clip"]), text_config=hf.LlamaConfig(**text),
                image_token_index=d.vocab_size - 1, tie_word_embeddings=False,
            )  # fmt: skip
            self.model = self._make(lambda: hf.LlavaForConditionalGeneration(config), dtype)
        self.vocab = d.vocab_size

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

    def _prompt(self, batch: int, prompt: int, image: bool) -> dict[str, Tensor]:
        ids = torch.randint(2, self.vocab - 1, (batch, prompt), device=self.device)
        if not image:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = torch.randn(batch, 3, self.edge, self.edge, device=self.device, dtype=self.model.dtype)
        if self.kind == "qwen_vl":
            rows = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
            rows = nn.functional.adaptive_avg_pool1d(rows.transpose(1, 2), 256).transpose(1, 2)
            words = self.model.get_input_embeddings()(ids)
            embeds = torch.cat([self.projector(rows), words], 1)
            return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2]).long()}
        slots = torch.full((batch, self.patches), self.vocab - 1, device=self.device)
        ids = torch.cat([slots, ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def seconds(self, batch: int, prompt: int, new: int, image: bool = False, static: bool = False) -> float:
        """Of one `generate` of exactly `new` tokens, greedy. static: its compiled static cache."""
        options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
        self._wait()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                **self._prompt(batch, prompt, image), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, **options,
            )  # fmt: skip
        self._wait()
        seconds = time.perf_counter() - start
        if out.shape[1] < new:
            raise RuntimeError(f"generate gave {out.shape[1]} tokens, expected {new}")
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

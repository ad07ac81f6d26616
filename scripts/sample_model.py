"""The two sample models: their tokenizers, prompts and modules, and their checkpoints on disk.

`Sample` is what is trained; `write_checkpoint` writes it in its family's real layout and
`read_checkpoint` reads such a folder back.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import shapes
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtp_llm.export.vision import ClipConfig, LlavaVision, QwenVisual, load, resize_positions

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH, WIDTH, DEPTH = 96, 8, 128, 4  # of the towers
GRID = SIZE // PATCH
HIDDEN, LAYERS, HEADS, MLP = 128, 3, 4, 352  # of the decoders
CONTEXT = 2048
CLIP_FOLDER = "clip-vit-shapes"
VISUAL = {
    "heads": 4,
    "image_size": SIZE,
    "layers": DEPTH,
    "mlp_ratio": 3,
    "output_dim": HIDDEN,
    "patch_size": PATCH,
    "width": WIDTH,
}
CLIP = ClipConfig(WIDTH, 3 * WIDTH, DEPTH + 1, 4, SIZE, PATCH)  # the layer past −2 is never used

# -------------------------------------------------------------------------------------- tokenizers


def corpus() -> list[str]:
    """What the tokenizers are trained on: questions, answers, templates, and some English."""
    lines = [QwenPrompts.system, *LlavaPrompts.systems.values()] * 20
    lines += ["Picture 1:", "Picture 2:", "USER: ASSISTANT:", "###Human: ###Assistant:"] * 60
    lines += ["system", "user", "assistant"] * 60
    for i in range(400):
        for q in shapes.questions(shapes.draw(f"train/corpus/{i}"), locate=True):
            answer = q.answer.replace("<ref>", "").replace("</ref>", " ").replace("<box>", "")
            lines += [q.text, answer.replace("</box>", "")]
    lines += [f"Which picture has the {shape}?" for shape in shapes.SHAPES] * 40
    lines += ["the first", "the second"] * 60
    return lines + (ROOT / "LICENSE").read_text().split("\n")


class QwenPrompts:
    """Qwen-VL's ids: ranks, then specials; a chat's role, newline and content tokenised apart."""

    name, pad, forms = "qwen_vl_shapes", False, ("raw", "chat")
    system = "You are a helpful assistant."
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, ranks: dict[bytes, int]):
        first = len(ranks)
        tags = [f"<{end}{tag}>" for tag in ("ref", "box", "quad", "img") for end in ("", "/")]
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names += [f"<|extra_{i}|>" for i in range(205)] + tags + ["<imgpad>"]
        specials = {name: first + i for i, name in enumerate(names)}
        self.ranks, self.specials = ranks, specials
        self.coder = tiktoken.Encoding(
            "shapes", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = -(-(first + len(names)) // 64) * 64

    @classmethod
    def trained(cls) -> QwenPrompts:
        """512 ranks: the single bytes, then merges in the order in which they were learned."""
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(cls.pattern), "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            corpus(),
            tokenizers.trainers.BpeTrainer(
                vocab_size=512, initial_alphabet=alphabet, show_progress=False
            ),
        )
        # byte-level BPE writes byte b as a printable character: the printable ones as themselves,
        # the others, in order, as the characters from 256 on
        plain = [b for b in range(256) if chr(b) in alphabet]
        others = [b for b in range(256) if b not in plain]
        byte = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
        vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
        return cls({bytes(byte[c] for c in token): i for token, i in vocabulary})

    @classmethod
    def read(cls, folder: Path) -> QwenPrompts:
        lines = (folder / "qwen.tiktoken").read_text().splitlines()
        return cls({base64.b64decode(t): int(r) for t, r in (line.split() for line in lines)})

    def write(self, folder: Path) -> None:
        lines = [f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in self.ranks.items()]
        (folder / "qwen.tiktoken").write_text("".join(lines))

    def encode(self, text: str) -> list[int]:
        return self.coder.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.coder.decode(ids)

    def prefix(self, form: str, pictures: int, rows: int, rng: random.Random) -> list[int]:
        """All up to the last </img>; a picture's rows are −1, as no token stands there."""
        before = rng.choices(("Picture {}:", "Picture {}: ", ""), (5, 4, 1))[0]
        ids: list[int] = []
        if form == "chat":
            ids += self._turn("system", self.encode(self.system)) + self.encode("\n")
            ids += self._open("user")
        for i in range(pictures):
            ids += self.encode("\n" * (i > 0) + before.format(i + 1))
            ids += [self.specials["<img>"], *[-1] * rows, self.specials["</img>"]]
        return ids

    def turn(self, form: str, question: str, answer: str, first: bool) -> tuple[list[int], ...]:
        """Ids of the question up to the answer, ids of the answer with its end."""
        if form == "raw":
            return self.encode(f"\n{question}"), self.encode(answer + "<|endoftext|>")
        ids = self.encode(f"\n{question}" if first else question)
        if not first:
            ids = self.encode("\n") + self._open("user") + ids
        ids += self.encode("<|im_end|>") + self.encode("\n") + self._open("assistant")
        return ids, self.encode(answer + "<|im_end|>")

    def _open(self, role: str) -> list[int]:
        return self.encode("<|im_start|>") + self.encode(role) + self.encode("\n")

    def _turn(self, role: str, content: list[int]) -> list[int]:
        return self._open(role) + content + self.encode("<|im_end|>")


class LlavaPrompts:
    """LLaVA's ids: text is split at <image> and every chunk tokenised by itself."""

    name, pad, vocab_size = "llava_shapes", True, 640
    forms = ("raw", "llava_v1", "vicuna_v1", "llava_v0")
    polite = (
        "an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the"
    )
    human = f"A chat between a curious human and {polite} human's questions."
    user = f"A chat between a curious user and {polite} user's questions."
    systems = {"llava_v1": human, "vicuna_v1": user, "llava_v0": human}

    def __init__(self, model: bytes):
        self.model = model
        self.coder = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def trained(cls) -> LlavaPrompts:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_writer=out,
            model_type="bpe",
            vocab_size=cls.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=1.0,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return cls(out.getvalue())

    @classmethod
    def read(cls, folder: Path) -> LlavaPrompts:
        return cls((folder / "tokenizer.model").read_bytes())

    def write(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model)

    def encode(self, text: str) -> list[int]:
        return self.coder.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.coder.decode([i for i in ids if i > 2])

    def prefix(self, form: str, pictures: int, rows: int, rng: random.Random) -> list[int]:
        """All up to the last picture; its rows are −1."""
        ids = [1]
        if form != "raw":
            role = "###Human: " if form == "llava_v0" else " USER: "
            ids += self.encode(self.systems[form] + role)
        for i in range(pictures):
            ids += self.encode("\n") * (i > 0) + [-1] * rows
        return ids

    def turn(self, form: str, question: str, answer: str, first: bool) -> tuple[list[int], ...]:
        """Ids of the question up to the answer, ids of the answer with its end."""
        v0 = form == "llava_v0"
        after = "" if form == "raw" else "###Assistant:" if v0 else " ASSISTANT:"
        if first or form == "raw":
            ids = self.encode(f"\n{question}{after}")
        else:  # follows </s> directly: no ▁; so behind a newline, which is then dropped
            text = f"###Human: {question}{after}" if v0 else f"USER: {question}{after}"
            ids = self.encode("\n" + text)[2:]
        return ids, [*self.encode(answer), 2]


Prompts = QwenPrompts | LlavaPrompts

# ------------------------------------------------------------------------------------------ models


class Norm(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(HIDDEN)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (HIDDEN,), self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, bias: bool, eps: float):
        super().__init__()
        self.norm_1, self.norm_2 = Norm(eps), Norm(eps)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=bias)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, MLP, bias=False)
        self.gate = nn.Linear(HIDDEN, MLP, bias=False)
        self.down = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: list[Tensor] | None
    ) -> Tensor:
        """x [B, T, HIDDEN]; cos and sin [B, 1, T, d]; mask [B, 1, T, K]; cache: keys, values."""
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            h * cos + torch.cat([-h.chunk(2, -1)[1], h.chunk(2, -1)[0]], -1) * sin
            for h in (qkv[0], qkv[1])
        )
        v = qkv[2].to(k.dtype)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """What QWenLMHeadModel and LlamaForCausalLM have in common; the names are mapped on saving."""

    def __init__(self, vocab: int, bias: bool, eps: float):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, HIDDEN), nn.Linear(HIDDEN, vocab, bias=False)
        self.blocks = nn.ModuleList(Block(bias, eps) for _ in range(LAYERS))
        self.norm = Norm(eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.04)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, caches: list[list[Tensor]] | None = None
    ) -> Tensor:
        """x [B, T, HIDDEN], positions [B, T], mask [B, T, K] → [B, T, HIDDEN], for the head."""
        d = HIDDEN // HEADS
        frequencies = 10000.0 ** -(torch.arange(0, d, 2, device=x.device) / d)
        angle = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, angle.cos(), angle.sin(), mask[:, None], cache)
        return self.norm(x)


class Sample(nn.Module):
    """A tower, a decoder and the prompts of their family."""

    def __init__(self, prompts: Prompts):
        super().__init__()
        self.prompts = prompts
        qwen = isinstance(prompts, QwenPrompts)
        self.vision: QwenVisual | LlavaVision
        self.vision = (
            QwenVisual(**VISUAL, stored_tables=True) if qwen else LlavaVision(CLIP, HIDDEN)
        )
        self.decoder = Decoder(prompts.vocab_size, bias=qwen, eps=1e-6 if qwen else 1e-5)

    def tower(self) -> list[nn.Parameter]:
        late = ("attn_pool", "ln_post", "proj", "projector")
        return [p for name, p in self.vision.named_parameters() if not name.startswith(late)]

    def rows(self, features: Tensor) -> Tensor:
        """The tower's features [N, GRID², WIDTH] → the decoder's [N, rows, HIDDEN]."""
        if isinstance(self.vision, LlavaVision):
            return self.vision.projector(features)
        return self.vision.proj(self.vision.ln_post(self.vision.attn_pool(features)))

    def splice(self, ids: Tensor, features: Tensor) -> Tensor:
        """ids [B, T], −1 where the rows of features, in order, go → [B, T, HIDDEN]."""
        x = self.decoder.embed(ids.clamp(min=0))
        rows = self.rows(features).flatten(0, 1).to(x.dtype)
        return x.masked_scatter((ids < 0)[..., None], rows)


WAVES = 8  # per axis, of the tower's positions: wave lengths from 6 to 48 patches
# where the four heads of the first layers look at the start, in patches right and down
OFFSETS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
)


@torch.no_grad()
def start_tower(vision: QwenVisual) -> None:
    """The tower starts as a convolution, and the resampler as a map.

    Sines and cosines of the place fill the first dimensions of a patch, and its pixels the others;
    so a head finds the patch at an offset, because an offset turns every wave by a fixed angle.
    """
    pool, eye = vision.attn_pool, torch.eye(HIDDEN)
    omega = torch.logspace(0, -0.9, WAVES)
    side = math.isqrt(len(vision.positional_embedding))
    angle = torch.outer((torch.arange(side) + 0.5) * GRID / side, omega)  # [side, WAVES]
    waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)  # [side, 2 · WAVES]
    dims = 4 * WAVES
    places = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)
    vision.positional_embedding.mul_(0.2)
    # and once more negated: what layer norm takes away from all of them cancels out
    vision.positional_embedding[:, : 2 * dims] = torch.cat([places, -places], 1)
    vision.conv1.weight[: 2 * dims] = 0
    for block, offsets in zip(vision.transformer.resblocks, OFFSETS, strict=False):
        packed = block.attn.in_proj.weight.unflatten(0, (VISUAL["heads"], 3, -1))
        for head, (right, down) in enumerate(offsets):
            turn = torch.cat([right * omega, down * omega])
            blocks = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).unflatten(
                -1, (2, 2)
            )
            packed[head, :2] *= 0.2
            for part, matrix in enumerate((torch.block_diag(*blocks), torch.eye(dims))):
                packed[head, part, :, :dims] += 2 * matrix
                packed[head, part, :, dims : 2 * dims] -= 2 * matrix
    pool.query.mul_(0.1)
    pool.ln_q.weight.fill_(0.1)
    pool.ln_kv.weight.fill_(0.1)  # the keys are mostly places; the values are scaled back
    for linear, scale in ((pool.attn.q, 4), (pool.attn.k, 4), (pool.attn.v, 10)):
        linear.weight.copy_(scale * eye)
        linear.bias.zero_()
    pool.attn.out_proj.weight.copy_(eye)
    pool.attn.out_proj.bias.zero_()
    vision.proj.weight.copy_(eye)


@torch.no_grad()
def copy_tower(qwen: QwenVisual, llava: LlavaVision) -> None:
    """Qwen-VL's tower as a CLIP tower: nearly the same function, but for GELU and class token."""
    clip, state = llava.vision_model, {}
    clip.embeddings.patch_embedding.load_state_dict(qwen.conv1.state_dict())
    table = resize_positions(qwen.positional_embedding, GRID)
    clip.embeddings.position_embedding.weight[1:].copy_(table)
    clip.pre_layrnorm.load_state_dict(qwen.ln_pre.state_dict())
    for old, new in zip(qwen.transformer.resblocks, clip.encoder.layers, strict=True):
        state = {
            f"{to}.{kind}": value
            for name, to in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            )
            for kind, value in old.get_submodule(name).state_dict().items()
        }
        for kind, packed in old.attn.in_proj.state_dict().items():
            heads = packed.unflatten(0, (VISUAL["heads"], 3, -1))
            for part, letter in enumerate("qkv"):
                state[f"self_attn.{letter}_proj.{kind}"] = heads[:, part].flatten(0, 1)
        new.load_state_dict(state)


# ------------------------------------------------------------------------------------- checkpoints


def qwen_tensors(sample: Sample) -> dict[str, Tensor]:
    state = sample.decoder.state_dict()
    names = {
        "embed.weight": "transformer.wte.weight",
        "norm.weight": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    parts = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "qkv": "attn.c_attn",
        "out": "attn.c_proj",
        "up": "mlp.w1",
        "gate": "mlp.w2",
        "down": "mlp.c_proj",
    }
    for name in state:
        if name.startswith("blocks."):
            _, layer, part, kind = name.split(".")
            names[name] = f"transformer.h.{layer}.{parts[part]}.{kind}"
    tensors = {names[name]: value for name, value in state.items()}
    for name, value in sample.vision.checkpoint_tensors().items():
        tensors[f"transformer.visual.{name}"] = value
    return tensors


def llama_tensors(sample: Sample) -> dict[str, Tensor]:
    state = sample.decoder.state_dict()
    tensors = {
        "model.embed_tokens.weight": state["embed.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    parts = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "out": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
    }
    for layer in range(LAYERS):
        target = f"model.layers.{layer}"
        for part, name in parts.items():
            tensors[f"{target}.{name}.weight"] = state[f"blocks.{layer}.{part}.weight"]
        for letter, value in zip("qkv", state[f"blocks.{layer}.qkv.weight"].chunk(3), strict=True):
            tensors[f"{target}.self_attn.{letter}_proj.weight"] = value
    for name, value in sample.vision.projector.state_dict().items():
        tensors[f"model.mm_projector.{name}"] = value
    return tensors


QWEN_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": True,
    "fp32": False,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * MLP,  # of w1 and w2 together
    "kv_channels": HIDDEN // HEADS,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": CONTEXT,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
}
LLAVA_CONFIG = {
    "_name_or_path": "llava-v1.5-shapes",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "max_length": CONTEXT,
    "max_position_embeddings": CONTEXT,
    "mm_hidden_size": WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": CLIP_FOLDER,
    "model_type": "llava_llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": LlavaPrompts.vocab_size,
}


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _shards(folder: Path, stem: str, ending: str, tensors: dict[str, Tensor]) -> None:
    """Two shards and their index."""
    half = {name: value.half().contiguous() for name, value in sorted(tensors.items())}
    names, index = list(half), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"{stem}-0000{i + 1}-of-00002.{ending}"
        index |= dict.fromkeys(part, file)
        chosen = {name: half[name].clone() for name in part}
        if ending == "bin":
            torch.save(chosen, folder / file)
        else:
            safetensors.torch.save_file(chosen, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)
    total = sum(2 * value.numel() for value in half.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    _json(folder / f"{stem}.{ending}.index.json", content)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return {name: value.float() for name, value in tensors.items()}


def write_checkpoint(sample: Sample, folder: Path) -> None:
    """The family's real layout, in float16; beside its final place first, then renamed into it."""
    sample = sample.cpu()
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    sample.prompts.write(draft)
    if isinstance(sample.prompts, QwenPrompts):
        _write_qwen(sample, sample.prompts, draft)
    else:
        _write_llava(sample, draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _write_qwen(sample: Sample, prompts: QwenPrompts, folder: Path) -> None:
    visual = VISUAL | {"image_start_id": prompts.specials["<img>"]}
    _json(
        folder / "config.json", QWEN_CONFIG | {"visual": visual, "vocab_size": prompts.vocab_size}
    )
    end = prompts.specials["<|endoftext|>"]
    generation = {
        "chat_format": "chatml",
        "eos_token_id": end,
        "pad_token_id": end,
        "max_window_size": 6144,
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.3,
        "transformers_version": "4.31.0",
    }
    _json(folder / "generation_config.json", generation)
    tokenizer = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    _json(folder / "tokenizer_config.json", tokenizer)
    _shards(folder, "model", "safetensors", qwen_tensors(sample))


def _write_llava(sample: Sample, folder: Path) -> None:
    _json(folder / "config.json", LLAVA_CONFIG)
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_length": CONTEXT,
        "pad_token_id": 0,
        "transformers_version": "4.31.0",
    }
    _json(folder / "generation_config.json", generation)
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {name: {"content": text, **flags} for name, text in marks.items()}
    _json(folder / "special_tokens_map.json", tokens | {"pad_token": "<unk>"})
    tokenizer = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()} | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONTEXT,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    _json(folder / "tokenizer_config.json", tokenizer)
    _shards(folder, "pytorch_model", "bin", llama_tensors(sample))
    _write_clip(sample.vision.vision_model, folder / CLIP_FOLDER)


def _write_clip(tower: nn.Module, folder: Path) -> None:
    """A full CLIP checkpoint, as LLaVA expects; what LLaVA never runs in it was never trained."""
    import transformers

    vision = {name: getattr(CLIP, name) for name in CLIP.__dataclass_fields__}
    vision |= {"model_type": "clip_vision_model", "projection_dim": 16}
    text = {
        "model_type": "clip_text_model",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": 16,
        "bos_token_id": 62,
        "eos_token_id": 63,
    }
    config = {"model_type": "clip", "projection_dim": 16, "vision_config": vision}
    config |= {"text_config": text, "torch_dtype": "float16"}
    torch.manual_seed(0)
    whole = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).state_dict()
    trained = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    assert trained.keys() <= whole.keys()
    folder.mkdir()
    weights = {name: value.half() for name, value in (whole | trained).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    _json(folder / "config.json", {"architectures": ["CLIPModel"], **config})
    preprocessor = {
        "crop_size": SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": SIZE,
    }
    _json(folder / "preprocessor_config.json", preprocessor)


def read_checkpoint(folder: Path) -> Sample:
    """What `write_checkpoint` wrote, in float32."""
    tensors = _read_shards(folder)
    if (folder / "qwen.tiktoken").exists():
        sample = Sample(QwenPrompts.read(folder))
        shadow = qwen_tensors(sample)
        sources = QwenVisual(**VISUAL).sources()
        sources |= {"attn_pool.pos_embed": ("transformer.visual.attn_pool.pos_embed", lambda t: t)}
        sources["positional_embedding"] = ("transformer.visual.positional_embedding", lambda t: t)
    else:
        sample = Sample(LlavaPrompts.read(folder))
        tensors |= _read_shards(folder / CLIP_FOLDER)
        shadow = llama_tensors(sample)
        sources = sample.vision.sources()
    load(sample.vision, tensors, sources)
    with torch.no_grad():  # the decoder's tensors in `shadow` share memory with its parameters
        for name, value in shadow.items():
            if "visual." not in name and "mm_projector" not in name:
                value.copy_(tensors[name])
    return sample

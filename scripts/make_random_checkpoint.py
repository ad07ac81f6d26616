"""Write a random checkpoint in a family's real on-disk layout, at its real size or a tiny one.

    python scripts/make_random_checkpoint.py --model qwen_vl --size full --output /tmp/qwen_vl_full

Its answers mean nothing; its sizes, names and files are those of Qwen-VL-Chat and LLaVA-1.5-7B, so export,
memory and speed can be measured without a hub. Weights are written shard by shard from one random block:
memory stays below 1 GB.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rtp_llm.export.vision import ClipConfig, LlavaVision, QwenVisual

SHARD = 2 * 10**9  # bytes
Shapes = dict[str, tuple[int, ...]]

QWEN: dict[str, dict[str, Any]] = {
    "full": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "kv_channels": 128, "vocab_size": 151936, "seq_length": 2048,
        "visual": {
            "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48,
            "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664,
        },
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 4, "kv_channels": 32, "vocab_size": 896, "seq_length": 512,
        "visual": {
            "heads": 2, "image_size": 56, "image_start_id": 870, "layers": 2,
            "mlp_ratio": 4.9231, "output_dim": 128, "patch_size": 14, "width": 32,
        },
    },
}  # fmt: skip
CLIP = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
LLAVA: dict[str, dict[str, Any]] = {
    "full": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "clip": CLIP,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
        "clip": CLIP,
    },
    "0.3b": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000,
        "clip": CLIP,
    },
    "0.1b": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "clip": CLIP,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 640,
        "clip": {
            "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        },
    },
}  # fmt: skip


class Weights:
    """Safetensors shards (8 bytes header size, JSON header, data), written as they are made."""

    def __init__(self, folder: Path, seed: int, quiet: bool = False):
        self.folder = folder
        self.quiet = quiet
        torch.manual_seed(seed)
        self.noise = (torch.randn(2**25 + 2**16) * 0.02).to(torch.bfloat16).view(torch.int16).numpy()
        self.ones = torch.ones(2**20, dtype=torch.bfloat16).view(torch.int16).numpy()
        self.at = 0

    def write(self, shapes: Shapes) -> None:
        shards: list[Shapes] = [{}]
        size = 0
        for name, shape in shapes.items():
            if size and size + 2 * math.prod(shape) > SHARD:
                shards.append({})
                size = 0
            shards[-1][name] = shape
            size += 2 * math.prod(shape)
        total = 2 * sum(map(math.prod, shapes.values()))
        where, done, start = {}, 0, time.monotonic()
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            header, offset = {}, 0
            for name, shape in shard.items():
                end = offset + 2 * math.prod(shape)
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
                where[name] = file
            head = json.dumps(header).encode()
            head += b" " * (-len(head) % 8)
            with open(self.folder / file, "wb") as f:
                f.write(len(head).to_bytes(8, "little") + head)
                for name, shape in shard.items():
                    for part in self._data(name, math.prod(shape)):
                        f.write(part)
                        done += part.nbytes
            rate = done / (time.monotonic() - start + 1e-9)
            if not self.quiet:
                print(f"{file}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s",
                      file=sys.stderr)  # fmt: skip
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _data(self, name: str, count: int) -> Iterator[Any]:
        norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
        while count:
            if norm:
                part = self.ones[:count]
            else:
                self.at = (self.at + 7919) % 2**16  # no two tensors alike
                part = self.noise[self.at : self.at + min(count, 2**25)]
            count -= len(part)
            yield part


def qwen_vl(folder: Path, size: str, seed: int, quiet: bool = False) -> None:
    c = QWEN[size]
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192, "no_bias": True, "rotary_emb_base": 10000,
        "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True,
        "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer", "torch_dtype": "bfloat16",
        **c,
    }  # fmt: skip
    h, w, inner = c["hidden_size"], c["num_attention_heads"] * c["kv_channels"], c["intermediate_size"] // 2
    shapes: Shapes = {"transformer.wte.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "ln_1.weight": (h,), "attn.c_attn.weight": (3 * w, h), "attn.c_attn.bias": (3 * w,),
            "attn.c_proj.weight": (h, w), "ln_2.weight": (h,), "mlp.w1.weight": (inner, h),
            "mlp.w2.weight": (inner, h), "mlp.c_proj.weight": (h, inner),
        }  # fmt: skip
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    with torch.device("meta"):
        visual = QwenVisual(**c["visual"], stored_tables=True)
    shapes |= {f"transformer.visual.{n}": tuple(t.shape) for n, t in visual.checkpoint_tensors().items()}
    shapes |= {"transformer.ln_f.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}
    ranks = c["visual"]["image_start_id"] - 214  # <img> is the 214th special
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"chat_format": "chatml", "eos_token_id": ranks, "pad_token_id": ranks,
                    "max_window_size": 6144, "max_new_tokens": 512, "do_sample": True, "top_k": 0,
                    "top_p": 0.5})
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    )
    with open(folder / "qwen.tiktoken", "wb") as f:
        for rank, token in enumerate(_tokens(ranks)):
            f.write(base64.b64encode(token) + b" %d\n" % rank)
    Weights(folder, seed, quiet).write(shapes)


def _tokens(count: int) -> Iterator[bytes]:
    """Bytes, then pairs, then triples: a valid byte-pair vocabulary."""
    letters = bytes(range(97, 123)) + bytes(range(48, 58)) + bytes(range(65, 91)) + b" .,"
    words = (bytes(w) for n in (2, 3) for w in itertools.product(letters, repeat=n))
    return itertools.islice(itertools.chain((bytes([b]) for b in range(256)), words), count)


def llava(folder: Path, size: str, seed: int, quiet: bool = False) -> None:
    from sentencepiece import sentencepiece_model_pb2 as pb

    c = dict(LLAVA[size])
    clip = c.pop("clip")
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "clip", "torch_dtype": "bfloat16", **c,
    }  # fmt: skip
    h, inner = c["hidden_size"], c["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        kv = h // c["num_attention_heads"] * c["num_key_value_heads"]
        heads = {"q": h, "k": kv, "v": kv, "o": h}
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (w, h) for n, w in heads.items()}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (inner, h) for n in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (h, inner)
        for norm in ("input", "post_attention"):
            shapes[f"model.layers.{i}.{norm}_layernorm.weight"] = (h,)
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (c["vocab_size"], h)}
    with torch.device("meta"):
        vision = LlavaVision(ClipConfig(**clip), h, select_layer=-1)
    sources = {vision.sources()[n][0]: tuple(p.shape) for n, p in vision.named_parameters()}
    shapes |= {n: s for n, s in sources.items() if n.startswith("model.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                 "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False,
                 "legacy": False, "model_max_length": 2048}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = c["vocab_size"]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = pb.ModelProto.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{b:02X}>", kinds.BYTE) for b in range(256)]
    letters = [chr(b) for b in range(97, 123)] + ["▁"]
    words = ("".join(w) for n in (1, 2, 3, 4) for w in itertools.product(letters, repeat=n))
    pieces += [(w, kinds.NORMAL) for w in itertools.islice(words, c["vocab_size"] - len(pieces))]
    for i, (text, kind) in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(max(i - 259, 0)), type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())

    tower = folder / "clip"
    tower.mkdir(exist_ok=True)
    vision_config = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **clip}
    (tower / "config.json").write_text(
        json.dumps({"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": vision_config})
    )
    edge = clip["image_size"]
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": edge, "crop_size": edge}))
    Weights(tower, seed + 1, quiet).write({n: s for n, s in sources.items() if not n.startswith("model.")})
    Weights(folder, seed, quiet).write(shapes)


MODELS = {"qwen_vl": qwen_vl, "llava": llava}
SIZES = {"qwen_vl": QWEN, "llava": LLAVA}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--size", choices=list(LLAVA), default="full",
                        help="0.1b, 0.3b, 1b (llava only): 0.13, 0.37, 1.03 billion parameters of language "
                             "model; 0.1b takes 32768 tokens, the others 4096")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.size not in SIZES[args.model]:
        parser.error(f"--model {args.model} has the sizes {', '.join(SIZES[args.model])}, not {args.size}")
    args.output.mkdir(parents=True, exist_ok=True)
    MODELS[args.model](args.output, args.size, args.seed)


if __name__ == "__main__":
    main()

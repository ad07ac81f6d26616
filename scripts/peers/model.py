"""The same random weights for every peer: a LLaVA in transformers' layout, and its language model by itself.

FOLDER/llava is a LlavaForConditionalGeneration, FOLDER/llama the LlamaForCausalLM inside it, both bfloat16;
FOLDER/model.json counts the language model's parameters. The tokenizer has a token for each byte, so that
all peers cut a text alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from make_random_checkpoint import LLAVA
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

SPECIAL = ["<unk>", "<s>", "</s>"]


def tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE: special tokens, 256 bytes, one merge, words that no text holds, and <image> last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, "th"]
    words += [f"<{i}>" for i in range(len(words), vocabulary - 1)] + ["<image>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, normalized=False) for word in [*SPECIAL, "<image>"]])
    return made


def make(folder: Path, size: str, seed: int = 0) -> None:
    """`size` of make_random_checkpoint.LLAVA."""
    shape = dict(LLAVA[size])
    clip = shape.pop("clip")
    shape.setdefault("max_position_embeddings", 4096)
    text = LlamaConfig(
        **shape, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip), text_config=text, image_token_index=shape["vocab_size"] - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        llava = Llava(config)
        with torch.device("meta"):
            llama = LlamaForCausalLM(text)
    finally:
        torch.set_default_dtype(before)
    llama.model, llama.lm_head = llava.model.language_model, llava.lm_head
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": clip["patch_size"], "image_token": "<image>",
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    edge = clip["image_size"]
    pixels = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge},
    }  # fmt: skip
    names: dict[str, Any] = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    names["extra_special_tokens"] = {"image_token": "<image>"}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    for name, model in (("llava", llava), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer(shape["vocab_size"]).save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "llava" / "processor_config.json").write_text(json.dumps(processor))
    (folder / "llava" / "preprocessor_config.json").write_text(json.dumps(pixels))
    facts = {"parameters": llama.num_parameters(), "vocabulary": shape["vocab_size"], "edge": edge}
    (folder / "model.json").write_text(json.dumps(facts))

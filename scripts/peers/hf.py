"""transformers: in float32, or, with torchao installed and int4 or int8 asked for, its weights quantised."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL import Image
from protocol import Timed, serve
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
)


def quantise(model: torch.nn.Module, precision: str) -> None:
    """The language model's linear layers, in place. Of torchao's for a CPU these run: its other kernel at
    int4 (8-bit inputs) is not in its wheels."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=32) if precision == "int4" else Int8WeightOnlyConfig()
    quantize_(model, config, lambda m, name: isinstance(m, torch.nn.Linear) and "vision" not in name)


class Worker(Timed):
    def __init__(self, folder: Path, precision: str, threads: int, image: bool):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.folder = folder / ("llava" if image else "llama")
        kind = AutoModelForImageTextToText if image else AutoModelForCausalLM
        # torchao's int4 kernel is a hundred times slower for float32 inputs
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model = kind.from_pretrained(self.folder, dtype=dtype).eval()
        if precision != "fp32":
            quantise(self.model, precision)

    def _step(self, ids: Tensor, **more: object) -> tuple[Tensor, Tensor, object]:
        """The last positions' logits, what is greedily next, and the cache."""
        out = self.model(ids, use_cache=True, logits_to_keep=1, **more)
        return out.logits[:, -1], out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def times(self, prompts: list[list[int]], n: int) -> tuple[float, float]:
        start = time.perf_counter()
        _, ids, cache = self._step(torch.tensor(prompts))
        first = time.perf_counter()
        for _ in range(n):
            _, ids, cache = self._step(ids, past_key_values=cache)
        return first - start, (time.perf_counter() - first) / n

    def logits(self, ids: list[int]) -> dict[str, list[float]]:
        return {"logits": self._step(torch.tensor([ids]))[0][0].tolist()}

    def picture(self, path: str, text: str) -> dict[str, float]:
        processor = CLIPImageProcessorPil.from_pretrained(self.folder)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        config = self.model.config
        slots = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        start = time.perf_counter()
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        ids = torch.tensor([[config.image_token_id] * slots + tokenizer(text)["input_ids"]])
        self._step(ids, pixel_values=pixels.to(self.model.dtype))
        return {"picture": time.perf_counter() - start}

    def size(self) -> dict[str, int]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {"bytes": sum(stored(t) for t in tensors)}


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a torchao tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


if __name__ == "__main__":
    serve(Worker, None, "transformers", "torch", "torchao")

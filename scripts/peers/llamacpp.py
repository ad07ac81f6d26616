"""llama.cpp by its C API (llama-cpp-python): GGUF files written here, Q4_0 or Q8_0 in every matrix.

Streams go side by side through `llama_decode`, as its server's slots do, without the server's HTTP. The
tower's matrices are Q8_0.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.utility import SafetensorsLocal
from protocol import serve

TYPES = {name: getattr(gguf.GGMLQuantizationType, t) for name, t in
         {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}.items()}  # fmt: skip
BATCH = 1024  # tokens of a step: a whole prompt


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names of a checkpoint's bfloat16 tensors, and the tensors in float32."""
    for name, tensor in SafetensorsLocal(folder / "model.safetensors").tensors.items():
        halves = tensor.mmap_bytes().view(np.uint16).astype(np.uint32)
        yield name, (halves << 16).view(np.float32).reshape(tensor.shape)


def add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in `kind`, where its blocks of 32 fit; all else in float32."""
    if tensor.ndim != 2 or tensor.shape[1] % 32:
        kind = gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads × head_dim, hidden]: GGUF's Llama rotates neighbours, transformers halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_llama(checkpoint: Path, output: Path, precision: str) -> None:
    """A LlamaForCausalLM of model.py as GGUF; keys and names of tensors are those of GGUF's specification."""
    c = json.loads((checkpoint / "config.json").read_text())
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    w = gguf.GGUFWriter(output, "llama")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_dimension_count(head_dim)
    w.add_vocab_size(c["vocab_size"])
    words = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["content"] for token in words["added_tokens"]}
    names = sorted(words["model"]["vocab"], key=words["model"]["vocab"].__getitem__)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(names)
    w.add_token_types([gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in names])
    w.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    w.add_bos_token_id(c["bos_token_id"])
    w.add_eos_token_id(c["eos_token_id"])
    w.add_add_bos_token(False)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    for name, tensor in tensors(checkpoint):
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                tensor = interleaved(tensor, c[heads])
        add(w, known.get_name(name, [".weight"]), tensor, TYPES[precision])
    write(w)


def write_tower(checkpoint: Path, output: Path) -> None:
    """The CLIP tower and projector of model.py's LLaVA, as llama.cpp's multimodal part reads them."""
    c = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    w = gguf.GGUFWriter(output, "clip")
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("mlp")
    w.add_vision_image_size(c["image_size"])
    w.add_vision_patch_size(c["patch_size"])
    w.add_vision_embedding_length(c["hidden_size"])
    w.add_vision_feed_forward_length(c["intermediate_size"])
    w.add_vision_block_count(c["num_hidden_layers"])
    w.add_vision_head_count(c["num_attention_heads"])
    w.add_vision_projection_dim(c["projection_dim"])
    w.add_vision_attention_layernorm_eps(c["layer_norm_eps"])
    w.add_vision_image_mean([0.48145466, 0.4578275, 0.40821073])
    w.add_vision_image_std([0.26862954, 0.26130258, 0.27577711])
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, c["num_hidden_layers"])
    for name, tensor in tensors(checkpoint):
        if name.startswith("multi_modal_projector."):
            layer, part = name.removeprefix("multi_modal_projector.linear_").split(".")
            add(w, f"mm.{2 * int(layer) - 2}.{part}", tensor, TYPES["int8"])
        elif name.startswith("vision_tower.") and "post_layernorm" not in name:
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
            kind = TYPES["fp32" if "position" in name else "int8"]
            add(w, known.get_name(name, [".weight", ".bias"]), tensor, kind)
    write(w)


def prepare(folder: Path, precision: str, image: bool) -> None:
    if image:
        write_tower(folder / "llava", folder / "llava-tower.gguf")
    else:
        write_llama(folder / "llama", folder / f"llama-{precision}.gguf", precision)


class Worker:
    def __init__(self, folder: Path, precision: str, threads: int, image: bool):
        import llama_cpp  # the file is written without it

        self.lib, self.threads = llama_cpp, threads
        self.file = folder / f"llama-{precision}.gguf"
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(self.file).encode(), llama_cpp.llama_model_default_params()
        )
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context = self._context(BATCH, 1)
        if image:
            from llama_cpp import mtmd_cpp as mtmd

            params = mtmd.mtmd_context_params_default()
            params.n_threads, params.use_gpu, params.print_timings = threads, False, False
            tower = str(folder / "llava-tower.gguf").encode()
            self.mtmd, self.tower = mtmd, mtmd.mtmd_init_from_file(tower, self.model, params)
            if not self.tower:
                raise RuntimeError(f"{tower!r} was not read")

    def _context(self, length: int, streams: int) -> object:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * streams, streams
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads
        return self.lib.llama_init_from_model(self.model, params)

    def _step(self, context: object, tokens: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """(token, position, sequence, wants logits) of each → the logits wanted, [vocabulary] each."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failed = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        at = [i for i, token in enumerate(tokens) if token[3]]
        return [self._logits(context, i) for i in at]

    def _logits(self, context: object, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, i), (self.vocabulary,))

    def _times(self, context: object, prompts: list[list[int]], n: int) -> tuple[float, float]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        start = time.perf_counter()
        length = len(prompts[0])
        last = self._step(context, [
            (token, at, k, at == length - 1) for k, ids in enumerate(prompts) for at, token in enumerate(ids)
        ])  # fmt: skip
        ids = [int(row.argmax()) for row in last]
        first = time.perf_counter()
        for position in range(length, length + n):
            last = self._step(context, [(token, position, k, True) for k, token in enumerate(ids)])
            ids = [int(row.argmax()) for row in last]
        return first - start, (time.perf_counter() - first) / n

    def generate(self, ids: list[int], n: int) -> dict[str, float]:
        prefill, decode = self._times(self.context, [ids], n)
        return {"prefill": prefill, "decode": decode}

    def streams(self, prompts: list[list[int]], n: int) -> dict[str, float]:
        context = self._context(len(prompts[0]) + n, len(prompts))
        decode = self._times(context, prompts, n)[1]
        self.lib.llama_free(context)
        return {"streams": decode}

    def logits(self, ids: list[int]) -> dict[str, list[float]]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        (last,) = self._step(self.context, [(t, at, 0, at == len(ids) - 1) for at, t in enumerate(ids)])
        return {"logits": last.tolist()}

    def picture(self, path: str, text: str) -> dict[str, float]:
        mtmd = self.mtmd
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        start = time.perf_counter()
        bitmap = mtmd.mtmd_helper_bitmap_init_from_file(self.tower, path.encode(), False)
        words = mtmd.mtmd_default_marker() + text.encode()
        prompt = mtmd.mtmd_input_text(words, len(words), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        failed = mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(prompt), bitmaps, 1)
        past = self.lib.llama_pos(0)
        failed = failed or mtmd.mtmd_helper_eval_chunks(
            self.tower, self.context, chunks, 0, 0, BATCH, True, ctypes.byref(past)
        )
        if failed:
            raise RuntimeError(f"the picture was not read: {failed}")
        int(self._logits(self.context, -1).argmax())
        seconds = time.perf_counter() - start
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return {"picture": seconds}

    def size(self) -> dict[str, int]:
        return {"bytes": self.file.stat().st_size}


if __name__ == "__main__":
    serve(Worker, prepare, "llama-cpp-python")

"""What the backends with a paged cache share: the pool, a step's way to the device, CUDA graphs, sampling.

A step is packed into one buffer and sent in one copy; the decoder runs; tokens are picked on the device;
tokens, and the logits that the host asked for, come back behind one wait. A step of decodes alone is
padded to the next of a few batch sizes and replayed from a CUDA graph. The same code runs on a CPU, where
nothing is pinned, captured or waited for. (On CUDA: never run on real hardware yet.)
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...export.bundle import Bundle
from ...export.paged_attention import BLOCK_SIZE
from ..kv_cache import blocks_for
from ..step import Result, Step
from . import GRAPHS, check_vision
from .device_sampling import result

SHARE = 0.85  # of a GPU's free memory that the cache takes: activations and graphs need the rest
ALIGN = 256  # bytes: of each array in the buffer, as cudaMalloc's own blocks


class PagedBackend(ABC):
    """A subclass opens the graphs in `load` and runs them in `forward` and `forward_vision`.

    `device`: "cpu", "cuda" or "cuda:1". Raises UserError for an impossible max_seq_len or device.
    """

    mixes = paged = True
    samples = True
    token_budget = 512
    captures: ClassVar[bool] = True  # decodes are replayed from CUDA graphs

    def __init__(
        self,
        bundle: Bundle,
        slots: int = 16,
        max_seq_len: int | None = None,
        kv_cache_bytes: int | None = None,
        device: str = "cpu",
        graphs: tuple[str, ...] = GRAPHS,
    ):
        self.bundle, self.slots = bundle, slots
        self.graphs = tuple(graph for graph in graphs if graph in bundle.graphs)
        model, decoder = bundle.model, bundle.graphs["decoder"]
        length = max_seq_len or model.max_seq_len
        if not 0 < length <= model.max_seq_len:
            raise UserError(
                f"max_seq_len={max_seq_len} must lie between 1 and {model.max_seq_len}, the bundle's limit"
            )
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise UserError(f"device={device!r}: torch {torch.__version__} sees no GPU here, use 'cpu'")
        if self.cuda:
            if self.device.index is None:  # each thread has a current one of its own
                self.device = torch.device("cuda", torch.cuda.current_device())
            # sums of a split product in fp16 overflow where the whole does not
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cudnn.allow_tf32 = False  # on by default: fp32 convolutions of ten bits
        self.slot_tokens = length
        self.names = [spec.name for spec in decoder.inputs]
        self.caches = [spec for spec in decoder.inputs if len(spec.shape) == 4]
        self.dtype = getattr(torch, self.caches[0].dtype)
        heads, size = model.kv_heads, model.head_dim
        self.block_bytes = BLOCK_SIZE * heads * size * self.dtype.itemsize * len(self.caches)
        self.row_blocks = blocks_for(length)  # width of the block table
        # for good: torch deals 32 of them in turn, and each has workspaces and free blocks of its own
        streams = [torch.cuda.Stream(self.device) if self.cuda else None for _ in range(2)]
        self.stream, self._vision_stream = streams
        self.drafts = not (self.cuda and self.captures)  # a captured step has one token a row
        self._opening = threading.Lock()
        self.alone = threading.Lock()  # held by whoever encodes, and by whoever captures a CUDA graph
        self._graphs: dict[int, _Captured] = {}
        self._pool: dict[str, Tensor] = {}
        self._loaded = False
        self._open()
        budget = (kv_cache_bytes or self._free()) // self.block_bytes
        self.budget_blocks = max(1, min(budget, slots * self.row_blocks))

    @abstractmethod
    def load(self) -> None:
        """Open `self.graphs`, on `self.device`."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs by the decoder graph's names, caches included (written in place) → float32 [K, vocab].

        On the current CUDA stream, and without waiting for it.
        """

    @abstractmethod
    def forward_vision(self, pixels: Tensor) -> Tensor:
        """uint8 [N, size, size, 3] → float32 [N, tokens, hidden]."""

    @abstractmethod
    def unload(self) -> None:
        """Forget the graphs."""

    def _open(self) -> None:
        with self._opening:  # after `close` a step or a picture may come first
            if not self._loaded:
                with torch.cuda.device(self.device) if self.cuda else nullcontext():
                    self.load()
                    if self.cuda:
                        torch.cuda.synchronize()  # weights were written on another stream than ours
                self._loaded = True

    def _free(self) -> int:
        if self.cuda:
            return int(torch.cuda.mem_get_info(self.device)[0] * SHARE)
        import psutil

        return psutil.virtual_memory().available // 4

    def _caches(self) -> dict[str, Tensor]:
        """Name → [blocks, block_size, kv_heads, head_dim], at first zeros."""
        if not self._pool:  # all of them or none, where memory runs out
            self._pool = {spec.name: self._zeros(self._cache_shape()) for spec in self.caches}
        return self._pool

    def _cache_shape(self) -> tuple[int, ...]:
        m = self.bundle.model
        return self.budget_blocks, BLOCK_SIZE, m.kv_heads, m.head_dim

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.cuda:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # NumPy's pages are taken when they are written; torch writes its zeros
        flat = np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)
        return torch.from_numpy(flat).view(self.dtype).view(shape)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        check_vision(self.bundle, self.graphs)
        self._open()
        with self.alone, torch.inference_mode(), self._on(self._vision_stream):
            return self.forward_vision(torch.from_numpy(pixels).to(self.device)).float().cpu().numpy()

    def step(self, step: Step) -> Result:
        self._open()
        with torch.inference_mode(), self._on(self.stream):
            return result(self._logits(step), step.draws)

    def _logits(self, step: Step) -> Tensor:
        """float32 [K, vocab], on the device."""
        rows = len(step.logits_rows)
        decodes = max(step.counts) == 1 and rows == len(step.counts)
        words = decodes and bool((step.input_ids < self.bundle.model.vocab_size).all())
        if words and self.captures and self.cuda:
            return self._replay(step)[:rows]
        inputs = self._send(step_arrays(step, max(map(len, step.tables))))
        inputs["image_embeds"] = self._send({"": step.image_embeds})[""]
        return self.forward(inputs | self._caches())

    def _on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    def _send(self, arrays: dict[str, np.ndarray], into: Tensor | None = None) -> dict[str, Tensor]:
        """To the device in one copy; `into`: the memory that a captured graph reads."""
        places, size = {}, 0
        for name, array in arrays.items():
            places[name] = size
            size += -(-array.nbytes // ALIGN) * ALIGN
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        flat = host.numpy()
        for name, array in arrays.items():
            flat[places[name] : places[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
        if into is None:
            into = host.to(self.device, non_blocking=True)
        else:
            into.copy_(host, non_blocking=True)
        return {
            name: into[places[name] : places[name] + a.nbytes].view(_TORCH[a.dtype.name]).view(a.shape)
            for name, a in arrays.items()
        }

    def _replay(self, step: Step) -> Tensor:
        """float32 [bucket, vocab] of a step of decodes; the rows behind the step's are idle."""
        size = bucket(len(step.counts), self.slots)
        arrays = padded(step_arrays(step, self.row_blocks), size)
        if size not in self._graphs:
            self._graphs[size] = _Captured(self, arrays)
        captured = self._graphs[size]
        self._send(arrays, captured.memory)
        captured.graph.replay()
        return captured.logits

    def close(self) -> None:
        self._graphs.clear()
        self._pool.clear()
        self.unload()
        self._loaded = False
        if self.cuda:
            torch.cuda.empty_cache()


_TORCH = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


class _Captured:
    """One batch size's decoder, captured from the arrays of a real step (whose writes may be repeated)."""

    def __init__(self, backend: PagedBackend, arrays: dict[str, np.ndarray]):
        size = sum(-(-a.nbytes // ALIGN) * ALIGN for a in arrays.values())
        self.memory = torch.empty(size, dtype=torch.uint8, device=backend.device)
        inputs = backend._send(arrays, self.memory)
        inputs["image_embeds"] = torch.zeros((1, backend.bundle.model.hidden_size), device=backend.device)
        inputs |= backend._caches()
        self.inputs = inputs  # their memory is in the graph
        for _ in range(3):  # kernels are compiled and workspaces allocated before the capture
            backend.forward(inputs)
        self.graph = torch.cuda.CUDAGraph()
        # no picture meanwhile: torch cannot give cached memory back to the GPU during a capture
        with (
            backend.alone,
            torch.cuda.graph(self.graph, stream=backend.stream, capture_error_mode="thread_local"),
        ):
            self.logits = backend.forward(inputs)


def step_arrays(step: Step, width: int) -> dict[str, np.ndarray]:
    """The paged graph's inputs but caches and images, by name (export/attention.py); M = `width`."""
    table = np.full((len(step.tables), width), -1, np.int32)
    for row, blocks in zip(table, step.tables, strict=True):
        row[: len(blocks)] = blocks
    totals = [past + count for past, count in zip(step.pasts, step.counts, strict=True)]
    return {
        "input_ids": step.input_ids,
        "positions": step.positions,
        "rope_rows": step.rope_rows,
        "cumulative_sequence_length": np.cumsum([0, *step.counts], dtype=np.int32),
        "past_seqlens": np.array(step.pasts, np.int32),
        "block_table": table,
        "attention_metadata": np.array([max(step.counts), max(totals)], np.int32),
        "logits_rows": step.logits_rows,
    }


def padded(arrays: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Arrays of a step of decodes, with idle rows to `size`: they have no blocks, so nothing is written."""
    fill = {"block_table": -1}
    out = {}
    for name, a in arrays.items():
        out[name] = a
        if name in ("input_ids", "positions", "rope_rows", "past_seqlens", "block_table"):
            rest = np.full((size - len(a), *a.shape[1:]), fill.get(name, 0), a.dtype)
            out[name] = np.concatenate([a, rest])
    out["cumulative_sequence_length"] = np.arange(size + 1, dtype=np.int32)
    out["logits_rows"] = np.arange(size, dtype=np.int64)
    return out


def bucket(rows: int, slots: int) -> int:
    """The batch size that a step of `rows` decodes is padded to: powers of two, then multiples of 16."""
    size = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
    return min(size, max(slots, rows))

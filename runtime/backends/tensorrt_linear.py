"""TensorRT engines over slots: the lowering `linear`, TensorRT's native cache layers, no plugin.

Each layer's keys and values are one buffer [slots, kv_heads, slot_len, head_dim], on the device from the
start. Decodes run on the leading slots, as many as a CUDA graph was captured for, idle ones included; chunks
of prompts run one sequence at a time. TensorRT drops what is written outside of a slot in silence, so that is
checked here; an idle slot writes into its last cell, which no sequence reaches.

Tested end to end against a stand-in whose every name is in the real bindings; never run on real TensorRT yet.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import InternalError, UserError
from ..kv_cache import blocks_for
from ..step import Result, Step
from .paged import PagedBackend, _Captured, bucket
from .tensorrt import DECODE, PREFILL, TensorRTBackend, joined, split

LEAST = 64  # keys that a decode reads at least; doubled until they suffice: few CUDA graphs


class TensorRTLinearBackend(TensorRTBackend):
    """As TensorRTBackend, and a `kv_cache.SlotMemory`. `kv_cache_bytes` limits `slots`."""

    mixes = paged = False
    _slot = 0  # where the run's slots begin

    def _fit_cache(self, kv_cache_bytes: int | None) -> None:
        self.length = self.limits["slot_len"]
        each = self.block_bytes * self.length // 16
        free = kv_cache_bytes or self._free()
        if each > free:
            raise UserError(
                f"the caches of one sequence take {each} bytes, {free} are free: build the engine with a "
                "smaller --max-seq-len, or export with --kv-cache paged"
            )
        self.slots = min(self.slots, free // each)
        self.budget_blocks = self.slots * blocks_for(self.slot_tokens)

    def _cache_shape(self) -> tuple[int, ...]:
        m = self.bundle.model
        return self.slots, m.kv_heads, self.length, m.head_dim

    def step(self, step: Step) -> Result:
        if self._decodes(step):
            return PagedBackend.step(self, step)
        limits, vocab = self.limits, self.bundle.model.vocab_size
        parts = split(step, limits["max_input_len"], limits["max_logits"], vocab, rows_each=1)
        return joined([PagedBackend.step(self, part) for part in parts])

    def _decodes(self, step: Step) -> bool:
        return max(step.counts) == 1 and bool((step.input_ids < self.bundle.model.vocab_size).all())

    def _logits(self, step: Step) -> Tensor:
        need = max(past + count for past, count in zip(step.pasts, step.counts, strict=True))
        if need >= self.length:
            raise InternalError(f"a sequence of {need} tokens does not fit into slots of {self.length}")
        if self._decodes(step):
            logits = self._replay(step) if self.cuda else self.forward(self._inputs(self._arrays(step)))
            slots = np.array([step.slots[row] for row in step.logits_rows], np.int64)
            return logits.index_select(0, self._send({"slots": slots})["slots"])
        inputs = self._inputs(chunk_arrays(step, need))
        inputs["image_embeds"] = self._send({"": step.image_embeds})[""]
        self._slot = step.slots[0]
        try:
            return self.run(self._of_slots(inputs), PREFILL)
        finally:
            self._slot = 0

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.run(self._of_slots(inputs), DECODE)

    def _inputs(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        nothing = torch.zeros(1, self.bundle.model.hidden_size, device=self.device)
        return self._send(arrays) | {"image_embeds": nothing} | self._caches()

    def _of_slots(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Caches cut to the slots of the run: [B, kv_heads, slot_len, head_dim]."""
        rows = len(inputs["write_indices"])
        return inputs | {s.name: inputs[s.name].narrow(0, self._slot, rows) for s in self.caches}

    def _arrays(self, step: Step) -> dict[str, np.ndarray]:
        keys = LEAST
        while keys < max(step.pasts) + 1:
            keys *= 2
        return decode_arrays(
            step, bucket(step.slots[-1] + 1, self.slots), min(keys, self.length), self.length
        )

    def _replay(self, step: Step) -> Tensor:
        arrays = self._arrays(step)
        key = len(arrays["key_positions"]) << 16 | len(arrays["input_ids"])
        self._captured = key
        try:
            if key not in self._graphs:
                self._graphs[key] = _Captured(self, arrays)
        finally:
            self._captured = 0
        self._send(arrays, self._graphs[key].memory)
        self._graphs[key].graph.replay()
        return self._graphs[key].logits

    def copy(self, source: int, target: int, tokens: int) -> None:
        with torch.inference_mode(), self._on(self.stream):
            for cache in self._caches().values():
                cache[target, :, :tokens] = cache[source, :, :tokens]

    def release(self, slot: int, keep: int = 0) -> None:
        pass  # the buffers stay whole


def decode_arrays(step: Step, size: int, keys: int, length: int) -> dict[str, np.ndarray]:
    """The linear graph's inputs for a token of some of the first `size` slots, which read `keys` keys; row b
    is slot b, and so are its logits."""
    cells = np.arange(size, dtype=np.int64)
    ids, positions, rope_rows = (np.zeros(size, np.int64) for _ in range(3))
    write = np.full(size, length - 1, np.int64)
    ids[step.slots], positions[step.slots], rope_rows[step.slots] = (
        step.input_ids, step.positions, step.rope_rows
    )  # fmt: skip
    write[step.slots] = step.pasts
    return {
        "input_ids": ids,
        "positions": positions,
        "rope_rows": rope_rows,
        "pad_rows": cells,
        "packed_rows": cells,
        "query_positions": positions[:, None],
        "key_positions": np.arange(keys, dtype=np.int64),
        "write_indices": write,
        "logits_rows": cells,
    }


def chunk_arrays(step: Step, keys: int) -> dict[str, np.ndarray]:
    """The linear graph's inputs for a chunk of one sequence, behind which `keys` tokens lie in its slot."""
    cells = np.arange(step.counts[0], dtype=np.int64)
    return {
        "input_ids": step.input_ids,
        "positions": step.positions,
        "rope_rows": step.rope_rows,
        "pad_rows": cells,
        "packed_rows": cells,
        "query_positions": step.positions[None],
        "key_positions": np.arange(keys, dtype=np.int64),
        "write_indices": np.array(step.pasts, np.int64),
        "logits_rows": step.logits_rows,
    }

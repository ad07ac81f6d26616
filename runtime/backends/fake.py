"""A backend without a model, for testing everything above it.

The next token is a hash of all tokens of the sequence so far, read back from a fake cache: so a wrong
position, slot, order or a lost token changes the answer, as it would with a real model.
"""

from __future__ import annotations

import zlib

import numpy as np

from ...export.bundle import ModelSpec
from ..step import Step


class FakeBackend:
    mixes = True
    block_bytes = 16 * 8

    def __init__(
        self,
        model: ModelSpec,
        slots: int = 4,
        slot_tokens: int | None = None,
        budget_blocks: int | None = None,
    ):
        self.model = model
        self.slots = slots
        self.slot_tokens = slot_tokens or model.max_seq_len
        self.budget_blocks = budget_blocks or slots * -(-self.slot_tokens // 16)
        self.cache = np.full((slots, self.slot_tokens), -1, dtype=np.int64)
        self.steps = 0

    @staticmethod
    def next_token(tokens: list[int] | np.ndarray, vocab_size: int) -> int:
        """What the fake model answers after `tokens` (image slots as their rows' first numbers)."""
        return zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()) % vocab_size

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Every row of an image is the sum of its pixels."""
        n = len(pixels)
        value = pixels.reshape(n, -1).sum(axis=1).astype(np.float32) % 1000
        return np.broadcast_to(value[:, None, None], (n, 4, self.model.hidden_size)).copy()

    def step(self, step: Step) -> np.ndarray:
        self.steps += 1
        vocab = self.model.vocab_size
        images = step.input_ids - vocab
        values = np.where(
            images >= 0, step.image_embeds[np.maximum(images, 0), 0].astype(np.int64), step.input_ids
        )
        logits = []
        wanted = set(step.logits_rows.tolist())
        at = 0
        for slot, past, count in zip(step.slots, step.pasts, step.counts, strict=True):
            if (self.cache[slot, :past] < 0).any():
                raise RuntimeError(f"slot {slot} was asked for {past} tokens that it does not hold")
            self.cache[slot, past : past + count] = values[at : at + count]
            for i in range(count):
                if at + i in wanted:
                    row = np.zeros(vocab, np.float32)
                    row[self.next_token(self.cache[slot, : past + i + 1], vocab)] = 10
                    logits.append(row)
            at += count
        return np.array(logits, np.float32).reshape(-1, vocab)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[target, :tokens] = self.cache[source, :tokens]

    def release(self, slot: int, keep: int = 0) -> None:
        self.cache[slot, keep:] = -1

    def close(self) -> None:
        self.cache[:] = -1

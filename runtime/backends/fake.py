"""A backend without a model, for testing everything above it.

The next token is a hash of all tokens of the sequence so far, read back from a fake cache: so a wrong
position, slot, order or a lost token changes the answer, as it would with a real model.
"""

from __future__ import annotations

import zlib

import numpy as np

from ...export.bundle import ModelSpec
from ..sampling import log_softmax, pick
from ..step import Picks, Result, Step


class FakeBackend:
    """`paged`: the cache is a pool of blocks; `samples`: it picks the tokens that it may."""

    mixes = drafts = True
    block_bytes = 16 * 8
    token_budget = 512

    def __init__(
        self,
        model: ModelSpec,
        slots: int = 4,
        slot_tokens: int | None = None,
        budget_blocks: int | None = None,
        paged: bool = False,
        samples: bool = False,
    ):
        self.model = model
        self.slots = slots
        self.slot_tokens = slot_tokens or model.max_seq_len
        self.budget_blocks = budget_blocks or slots * -(-self.slot_tokens // 16)
        self.paged, self.samples = paged, samples
        shape = (self.budget_blocks, 16) if paged else (slots, self.slot_tokens)
        self.cache = np.full(shape, -1, dtype=np.int64)
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

    def step(self, step: Step) -> Result:
        self.steps += 1
        vocab = self.model.vocab_size
        images = step.input_ids - vocab
        values = np.where(
            images >= 0, step.image_embeds[np.maximum(images, 0), 0].astype(np.int64), step.input_ids
        )
        cache = self.cache.reshape(-1)
        logits: list[np.ndarray] = []
        picks: list[tuple[int, float]] = []
        at = 0
        for r, (past, count) in enumerate(zip(step.pasts, step.counts, strict=True)):
            cells = self._cells(step, r)
            if (cache[cells[:past]] < 0).any():
                raise RuntimeError(f"slot {step.slots[r]} was asked for {past} tokens that it does not hold")
            cache[cells[past:]] = values[at : at + count]
            for k in np.flatnonzero((step.logits_rows >= at) & (step.logits_rows < at + count)):
                row = np.zeros(vocab, np.float32)
                seen = cells[: past + step.logits_rows[k] - at + 1]
                row[self.next_token(cache[seen], vocab)] = 10
                draw = step.draws[k] if self.samples and step.draws else None
                token = pick(row, draw) if draw else 0
                picks.append((token, float(log_softmax(row)[token])))
                if draw is None:
                    logits.append(row)
            at += count
        rows = np.array(logits, np.float32).reshape(-1, vocab)
        if not self.samples or step.draws is None:
            return Result(rows)
        tokens = np.array([token for token, _ in picks], np.int64)
        logprobs = np.array([logprob for _, logprob in picks], np.float32)
        return Result(rows if len(rows) else None, Picks(tokens, logprobs))

    def _cells(self, step: Step, r: int) -> np.ndarray:
        """Where a row's tokens lie in the flat cache, from its sequence's first to this step's last."""
        places = np.arange(step.pasts[r] + step.counts[r])
        if self.paged:
            return 16 * np.array(step.tables[r])[places // 16] + places % 16
        return self.slot_tokens * step.slots[r] + places

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[target, :tokens] = self.cache[source, :tokens]

    def release(self, slot: int, keep: int = 0) -> None:
        self.cache[slot, keep:] = -1

    def close(self) -> None:
        self.cache[:] = -1

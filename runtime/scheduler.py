"""Who computes what in the next step: numbers only, no tensors.

First come, first served. A step holds one token of every decoding sequence and, within the token budget,
chunks of prompts; a sequence that ends frees its slot before the next step.
"""

from __future__ import annotations

import time
from collections import deque

from .kv_cache import SlotCache
from .sequence import Batch, Row, Sequence

LOSS_CHUNK = 64  # rows that go through the head at once for a loss: [64, vocab] logits


class Scheduler:
    """`token_budget`: tokens of one step, decodes included (at least one slot's worth of each)."""

    def __init__(self, cache: SlotCache, token_budget: int = 512):
        self.cache = cache
        self.token_budget = max(token_budget, cache.slots)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> Batch:
        """The next step's rows, ordered by slot; empty when nothing can run."""
        self._admit()
        batch: Batch = []
        budget = self.token_budget
        decodes = [s for s in self.running if s.uncomputed == 1]
        prefills = [s for s in self.running if s.uncomputed > 1]
        budget -= len(decodes)
        for s in decodes:
            batch.append(self._row(s, 1))
        for s in prefills:
            limit = min(budget, LOSS_CHUNK) if s.params.calculate_loss else budget
            count = min(s.uncomputed, limit)
            if count <= 0:
                continue
            batch.append(self._row(s, count))
            budget -= count
        return sorted(batch, key=lambda row: row.sequence.slot)

    def _admit(self) -> None:
        for sequence in [s for s in self.waiting if s.images_ready]:
            if not self.cache.admit(sequence):
                break
            self.waiting.remove(sequence)
            sequence.started = time.monotonic()
            self.running.append(sequence)

    def _row(self, s: Sequence, count: int) -> Row:
        in_prompt = s.computed < s.prompt_len
        if s.params.calculate_loss and in_prompt:
            logits = "all"
        else:
            logits = "last" if s.computed + count == len(s.tokens) else "none"
        return Row(s, s.computed, count, logits)

    def finish(self, sequence: Sequence) -> int | None:
        """Take a sequence out wherever it is; returns the slot that it freed."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
            return self.cache.release(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        return None

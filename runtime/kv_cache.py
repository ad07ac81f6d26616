"""Which sequence holds which cache block: numbers only, no tensors.

The cache is dealt in blocks of 16 tokens with reference counts. In a slot backend (`gqa`) block b lies in
slot b // blocks_per_slot, and a sequence's blocks are its slot's, in order.
"""

from __future__ import annotations

import heapq

from .sequence import Sequence

BLOCK = 16


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class SlotCache:
    """Slots of `slot_tokens` tokens each, and a budget of blocks that may be touched in all."""

    def __init__(self, slots: int, slot_tokens: int, budget_blocks: int | None = None):
        self.slots = slots
        self.blocks_per_slot = blocks_for(slot_tokens)
        self.budget = min(budget_blocks or slots * self.blocks_per_slot, slots * self.blocks_per_slot)
        self.holders = [0] * (slots * self.blocks_per_slot)
        self.used = 0
        self._free = list(range(slots))  # a heap: the lowest slot first keeps the batch dense

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that grows to `tokens` could ever be admitted."""
        return blocks_for(tokens) <= min(self.blocks_per_slot, self.budget)

    def admit(self, sequence: Sequence) -> bool:
        """Give a slot and the blocks that the sequence may grow to; False when there is no room."""
        need = blocks_for(sequence.prompt_len + sequence.max_new_tokens)
        if not self._free or self.used + need > self.budget:
            return False
        sequence.slot = heapq.heappop(self._free)
        first = sequence.slot * self.blocks_per_slot
        sequence.blocks = list(range(first, first + need))
        for block in sequence.blocks:
            self.holders[block] += 1
        self.used += need
        return True

    def release(self, sequence: Sequence) -> int:
        """Take everything back; returns the slot that became free."""
        for block in sequence.blocks:
            self.holders[block] -= 1
        self.used -= len(sequence.blocks)
        slot, sequence.slot, sequence.blocks = sequence.slot, -1, []
        heapq.heappush(self._free, slot)
        return slot

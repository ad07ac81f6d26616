"""Which sequence holds which cache block, and which prompts are kept for later: numbers only, no tensors.

The cache is dealt in blocks of 16 tokens with reference counts. In a slot backend (`gqa`) block b lies in
slot b // blocks_per_slot, and a sequence's blocks are its slot's, in order. For paged backends, whose
blocks lie anywhere, there is block_cache.py.

Prefix cache: a slot that a sequence has left keeps the leading full blocks of its prompt. A prompt that
begins alike takes the slot over, or has the rows copied into a slot of its own. Only what prefill computed
is kept, not an answer's tokens: one-row and many-row kernels differ in the last bits, and so no answer
depends on what the cache held.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Protocol

from .sequence import Sequence

BLOCK = 16


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def block_keys(sequence: Sequence) -> list[bytes]:
    """A key for each full block of the prompt, which says everything up to that block's end.

    Each is blake2b of the one before, the block's token ids and the images in it; the first one follows
    the sequence's salt and its rope table, which the cached keys were rotated by.
    """
    key = hashlib.blake2b(bytes([sequence.rope_table]) + sequence.salt, digest_size=16).digest()
    keys = []
    for start in range(0, sequence.prompt_len - BLOCK + 1, BLOCK):
        end = start + BLOCK
        block = hashlib.blake2b(key, digest_size=16)
        block.update(array("q", sequence.tokens[start:end]).tobytes())
        for span in sequence.images:
            if span.start < end and start < span.start + span.length:
                block.update(span.key + (start - span.start).to_bytes(8, "little", signed=True))
        keys.append(key := block.digest())
    return keys


def prefix_blocks(sequence: Sequence, index: Container[bytes]) -> int:
    """Leading blocks of the prompt that are in `index`, so many that at least two tokens remain.

    Two, since the logits of the last one are wanted, and a lone row is computed by another kernel.
    """
    if sequence.params.calculate_loss:
        return 0  # it wants the logits of the whole prompt
    keys = sequence.keys[: max(0, sequence.prompt_len - 2) // BLOCK]
    return next((i for i, key in enumerate(keys) if key not in index), len(keys))


def blocks_to_enter(sequence: Sequence) -> int:
    """Of the tokens so far and of the next one, unless that is the end of it (and maybe of the slot)."""
    return blocks_for(min(len(sequence.tokens) + 1, sequence.prompt_len + sequence.max_new_tokens))


class SlotMemory(Protocol):
    """The part of a backend that moves what slots hold."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The leading tokens of one slot into another."""

    def release(self, slot: int, keep: int = 0) -> None:
        """What a slot holds behind its first `keep` tokens is not needed any more."""


@dataclass
class _Slot:
    sequence: Sequence | None = None  # who runs in it
    keys: list[bytes] = field(default_factory=list)  # of its leading blocks that prefill has computed
    blocks: int = 0  # held: the sequence's, or those kept
    last_use: int = 0


class SlotCache:
    """Slots of `slot_tokens` tokens each, and a budget of blocks that may be touched in all."""

    def __init__(
        self,
        slots: int,
        slot_tokens: int,
        budget_blocks: int | None = None,
        memory: SlotMemory | None = None,
    ):
        self.slots = slots
        self.blocks_per_slot = blocks_for(slot_tokens)
        self.budget = min(budget_blocks or slots * self.blocks_per_slot, slots * self.blocks_per_slot)
        self.holders = [0] * (slots * self.blocks_per_slot)
        self.used = 0  # blocks held, by sequences or kept
        self.copies = 0  # of a prompt's beginning from one slot to another, so far
        self._memory = memory
        self._slots = [_Slot() for _ in range(slots)]
        self._empty = list(range(slots))  # a heap: the lowest slot first keeps the batch dense
        self._index: dict[bytes, set[int]] = {}  # block key → slots that hold it
        self._clock = 0

    @property
    def retained(self) -> int:
        """Blocks that no sequence holds, kept for prompts that begin alike."""
        return sum(slot.blocks for slot in self._slots if slot.sequence is None)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that grows to `tokens` could ever run."""
        return blocks_for(tokens) <= min(self.blocks_per_slot, self.budget)

    def match(self, sequence: Sequence) -> int:
        """Tokens of the prompt that are cached: whole blocks, and at least two tokens remain."""
        return BLOCK * prefix_blocks(sequence, self._index)

    def admit(self, sequence: Sequence, headroom: int = 0) -> bool:
        """Give a slot with the blocks of the tokens so far, what is cached of the prompt already computed.

        False when there is no room for that and `headroom` blocks more; then nothing has changed.
        """
        depth = prefix_blocks(sequence, self._index)
        need = blocks = blocks_to_enter(sequence)
        source = self._source(sequence.keys[depth - 1], depth) if depth else -1
        free = self.budget - self.used
        others = [i for i, slot in enumerate(self._slots) if slot.sequence is None and slot.blocks]
        others = sorted((i for i in others if i != source), key=lambda i: self._slots[i].last_use)
        spare = free + sum(self._slots[i].blocks for i in others)
        takes_over = source >= 0 and self._slots[source].sequence is None
        if takes_over and 2 * depth < len(self._slots[source].keys):
            # a short beginning is copied, and the rest stays: unless it would be the next to go anyway
            oldest = not others or self._slots[source].last_use < self._slots[others[0]].last_use
            takes_over = (not self._empty and oldest) or need + headroom > spare
        if takes_over:
            need -= depth
            spare += self._slots[source].blocks - depth
        elif not (self._empty or others):
            return False
        if need + headroom > spare:
            return False

        if takes_over:
            target = source
            self._keep(target, depth)
        elif self._empty:
            target = heapq.heappop(self._empty)
        else:
            self._drop(target := others.pop(0))
            self._empty.remove(target)
            heapq.heapify(self._empty)
        while self.used + need > self.budget:
            self._drop(others.pop(0))
        slot = self._slots[target]
        slot.sequence, sequence.slot, sequence.computed = sequence, target, depth * BLOCK
        if depth and not takes_over:
            if self._memory:
                self._memory.copy(source, target, depth * BLOCK)
            self.copies += 1
            self._register(target, sequence.keys[:depth])
        self._hold(sequence, blocks)
        self._touch(target)
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the blocks that `tokens` need; False when every other block is held by sequences."""
        need = blocks_for(tokens) - len(sequence.blocks)
        if need <= 0:
            return True
        while self.used + need > self.budget:
            kept = [i for i, slot in enumerate(self._slots) if slot.sequence is None and slot.blocks]
            if not kept:
                return False
            self._drop(min(kept, key=lambda i: self._slots[i].last_use))
        self._hold(sequence, blocks_for(tokens))
        return True

    def computed(self, sequence: Sequence) -> None:
        """More of the prompt lies in the cache: from now on others may begin with it."""
        done = min(sequence.computed, sequence.prompt_len) // BLOCK
        self._register(sequence.slot, sequence.keys[:done])

    def release(self, sequence: Sequence, retain: bool = True) -> None:
        """The sequence leaves its slot. With `retain` the computed blocks of its prompt stay."""
        index, slot = sequence.slot, self._slots[sequence.slot]
        slot.sequence, sequence.slot, sequence.blocks = None, -1, []
        # kept once, however many have computed it
        twice = slot.keys and len(self._index[slot.keys[-1]]) > 1
        self._keep(index, len(slot.keys) if retain and not twice else 0)
        self._touch(index)

    def clear(self) -> None:
        """Forget everything that no sequence holds."""
        for i, slot in enumerate(self._slots):
            if slot.sequence is None and slot.blocks:
                self._drop(i)

    def _source(self, key: bytes, depth: int) -> int:
        """The slot to begin with: best one that nobody runs in, with little behind these blocks."""
        slots = self._slots
        return min(
            self._index[key],
            key=lambda i: (slots[i].sequence is not None, len(slots[i].keys) > 2 * depth, slots[i].last_use),
        )

    def _touch(self, index: int) -> None:
        self._clock += 1
        self._slots[index].last_use = self._clock

    def _hold(self, sequence: Sequence, blocks: int) -> None:
        slot = self._slots[sequence.slot]
        first = sequence.slot * self.blocks_per_slot
        for block in range(first + slot.blocks, first + blocks):
            self.holders[block] += 1
            self.used += 1
        slot.blocks = max(slot.blocks, blocks)
        sequence.blocks = list(range(first, first + slot.blocks))

    def _register(self, index: int, keys: list[bytes]) -> None:
        slot = self._slots[index]
        for key in keys[len(slot.keys) :]:
            slot.keys.append(key)
            self._index.setdefault(key, set()).add(index)

    def _keep(self, index: int, blocks: int) -> None:
        """Cut a slot that nobody runs in down to its leading blocks."""
        slot = self._slots[index]
        for key in slot.keys[blocks:]:
            self._index[key].discard(index)
            if not self._index[key]:
                del self._index[key]
        del slot.keys[blocks:]
        first = index * self.blocks_per_slot
        for block in range(first + blocks, first + slot.blocks):
            self.holders[block] -= 1
            self.used -= 1
        if slot.blocks > blocks and self._memory:
            self._memory.release(index, blocks * BLOCK)
        slot.blocks = blocks
        if not blocks:
            heapq.heappush(self._empty, index)

    def _drop(self, index: int) -> None:
        self._keep(index, 0)

"""Blocks anywhere in one pool, for paged backends: the same dealings with the scheduler as `SlotCache`.

A sequence's block table names its blocks in order. Those that hold the full blocks of a prompt have a key
(`block_keys`), under which they are shared: a prompt that begins alike holds the very same blocks and
computes the rest, so nothing is ever copied. A block's count is the number of sequences that hold it. At
zero a block without a key is free; one with a key is kept for later, and the least recently held of
those goes first when room is needed. A shared block is never written: it is full, and whoever shares it
writes behind it.

Only what prefill computed is kept, as in `SlotCache`.
"""

from __future__ import annotations

import heapq

from .kv_cache import BLOCK, blocks_for, blocks_to_enter, prefix_blocks
from .sequence import Sequence


class BlockCache:
    """`slots`: sequences side by side, `slot_tokens`: of one at most; `budget_blocks`: of the pool."""

    copies = 0  # as SlotCache counts them

    def __init__(self, slots: int, slot_tokens: int, budget_blocks: int | None = None):
        self.slots = slots
        self.blocks_per_slot = blocks_for(slot_tokens)
        self.budget = budget_blocks or slots * self.blocks_per_slot
        self.holders = [0] * self.budget
        self._keys: list[bytes | None] = [None] * self.budget
        self._index: dict[bytes, int] = {}  # key → the block that holds it
        self._kept: dict[int, None] = {}  # blocks with a key that nobody holds, longest unheld first
        self._free = list(reversed(range(self.budget)))  # a stack
        self._places = list(range(slots))  # a heap: the lowest first keeps the batch dense

    @property
    def used(self) -> int:
        """Blocks held by sequences or kept."""
        return self.budget - len(self._free)

    @property
    def retained(self) -> int:
        """Blocks that no sequence holds, kept for prompts that begin alike."""
        return len(self._kept)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that grows to `tokens` could ever run."""
        return blocks_for(tokens) <= min(self.blocks_per_slot, self.budget)

    def match(self, sequence: Sequence) -> int:
        """Tokens of the prompt that are cached: whole blocks, and at least two tokens remain."""
        return BLOCK * prefix_blocks(sequence, self._index)

    def admit(self, sequence: Sequence, headroom: int = 0) -> bool:
        """Give a place and the blocks of the tokens so far, what is cached of the prompt already computed.

        False when there is no room for that and `headroom` blocks more; then nothing has changed.
        """
        shared = [self._index[key] for key in sequence.keys[: prefix_blocks(sequence, self._index)]]
        need = blocks_to_enter(sequence) - len(shared)
        room = len(self._free) + len(self._kept) - sum(block in self._kept for block in shared)
        if not self._places or need + headroom > room:
            return False
        for block in shared:
            self._hold(block)
        sequence.slot = heapq.heappop(self._places)
        sequence.blocks = [*shared, *(self._take() for _ in range(need))]
        sequence.computed = len(shared) * BLOCK
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the blocks that `tokens` need; False when every other block is held by sequences."""
        need = blocks_for(tokens) - len(sequence.blocks)
        if need > len(self._free) + len(self._kept):
            return False
        sequence.blocks += [self._take() for _ in range(need)]
        return True

    def computed(self, sequence: Sequence) -> None:
        """More of the prompt lies in the cache: from now on others may begin with it.

        What another one has computed at the same time is held once: this sequence gives its own up. So
        whoever holds a block with a key holds all before it, and what is kept never lacks its beginning.
        """
        done = min(sequence.computed, sequence.prompt_len) // BLOCK
        for i in reversed(range(done)):
            own, key = sequence.blocks[i], sequence.keys[i]
            if self._keys[own] is not None:
                break
            block = self._index.setdefault(key, own)
            if block == own:
                self._keys[own] = key
            else:
                self._hold(block)
                sequence.blocks[i] = block
                self._let_go(own, retain=False)

    def release(self, sequence: Sequence, retain: bool = True) -> None:
        """The sequence leaves its place. With `retain` the computed blocks of its prompt stay."""
        for block in reversed(sequence.blocks):  # an end goes before its beginning
            self._let_go(block, retain)
        heapq.heappush(self._places, sequence.slot)
        sequence.slot, sequence.blocks = -1, []

    def clear(self) -> None:
        """Forget everything that no sequence holds."""
        for block in list(self._kept):
            self._forget(block)

    def _hold(self, block: int) -> None:
        self._kept.pop(block, None)
        self.holders[block] += 1

    def _take(self) -> int:
        if not self._free:
            self._forget(next(iter(self._kept)))
        block = self._free.pop()
        self.holders[block] = 1
        return block

    def _let_go(self, block: int, retain: bool) -> None:
        self.holders[block] -= 1
        if self.holders[block]:
            return
        if self._keys[block] is None:
            self._free.append(block)
            return
        self._kept[block] = None
        if not retain:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._kept[block], self._index[key]
        self._keys[block] = None
        self._free.append(block)

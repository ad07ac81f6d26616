"""Who computes what in the next step: numbers only, no tensors.

A step holds one token of every decoding sequence and, within a token budget, drafts of what follows them
(speculation.py) and chunks of prompts. First come, first served, with two rules that keep waiting short:

- while answers stream, a step takes at most `chunk` prompt tokens, so the time between tokens is bounded;
- prompts of which few tokens are left (a short text; a picture that is cached) do not queue behind long
  ones: they share each step half and half, and long prompts enter the cache one after another. Only
  where the cache has no room for whoever came first, all wait.

Cache blocks are given as sequences grow. When none is left, the latest arrival loses its place and is
computed again later: its prompt in chunks, its answer token by token, as the first time, so that not a bit
of it changes.
"""

from __future__ import annotations

import time
from bisect import insort
from operator import attrgetter

from .block_cache import BlockCache
from .kv_cache import BLOCK, SlotCache, block_keys
from .sequence import Batch, Row, Sequence

LOSS_CHUNK = 64  # rows of a step that go through the head for losses: [64, vocab] logits
SHORT = 128  # tokens left to prefill: fewer than a step's worth even for a large model on a CPU

DRAFT_ROWS = 16  # of a step with drafts: with more, its time goes into arithmetic, which drafts do not save

_order = attrgetter("order")


class Scheduler:
    """`token_budget`: tokens of one step, decodes included. `max_running`: sequences side by side.
    `drafts`: whether the backend gains by them."""

    def __init__(
        self,
        cache: SlotCache | BlockCache,
        token_budget: int = 512,
        max_running: int | None = None,
        drafts: bool = True,
    ):
        self.cache, self.drafts = cache, drafts
        self.max_running = min(max_running or cache.slots, cache.slots)
        self.token_budget = max(token_budget, self.max_running + BLOCK)
        self.chunk = self.token_budget  # prompt tokens of a step beside decodes; the engine adapts it
        self.waiting: list[Sequence] = []  # in order of arrival, as `running`
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = self.reused_tokens = 0  # of all admitted sequences
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.order = self._arrivals
        sequence.keys = sequence.keys or block_keys(sequence)
        self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> Batch:
        """The next step's rows, ordered by slot; empty when nothing can run."""
        batch = self._decodes()
        budget = self.token_budget - sum(row.count for row in batch)
        if batch:
            budget = min(budget, max(self.chunk, BLOCK))
        return sorted([*batch, *self._prefills(budget)], key=lambda row: row.sequence.slot)

    def _decodes(self) -> Batch:
        batch: Batch = []
        for s in [s for s in self.running if s.computed >= s.prompt_len]:
            while s.slot >= 0 and not self.cache.grow(s, s.computed + 1):
                self._preempt(self.running[-1])
            if s.slot >= 0:
                batch.append(_row(s, 1))
        # prompts still find a block's worth of tokens, and nobody loses its place for a draft
        room = min(self.token_budget - BLOCK, DRAFT_ROWS) - len(batch)
        for i, row in enumerate(batch):
            draft = self._draft(row.sequence, room) if self.drafts else ()
            if draft and self.cache.grow(row.sequence, row.past + 1 + len(draft)):
                batch[i] = Row(row.sequence, row.past, 1 + len(draft), "all", draft)
                room -= len(draft)
        return batch

    def _draft(self, s: Sequence, room: int) -> tuple[int, ...]:
        """What may follow its last token, as far as it can be of use."""
        if s.lookup is None or s.uncomputed > 1:
            return ()
        return tuple(s.lookup.draft(s.tokens, min(room, s.max_new_tokens - s.output_len - 1)))

    def _prefills(self, budget: int) -> Batch:
        queue = [s for s in self.running if s.computed < s.prompt_len]
        left = {s: s.prompt_len - s.computed for s in queue}
        for s in self.waiting if len(self.running) < self.max_running else ():
            if s.images_ready and not _follows(s):
                insort(queue, s, key=_order)
                left[s] = s.prompt_len - self.cache.match(s)
        short = [n for n in left.values() if n <= SHORT]
        for_short = min(sum(short), budget if len(short) == len(left) else budget // 2)
        limits = {True: for_short, False: budget - for_short}
        batch: Batch = []
        full, copies = False, self.cache.copies
        losses = LOSS_CHUNK
        for s in queue:
            is_short = left[s] <= SHORT
            most = min(limits[is_short], losses) if s.params.calculate_loss else limits[is_short]
            limit = _chunk(left[s], most)
            if limit and s.slot < 0:
                # of a kind, whoever came first is not overtaken to a place in the cache
                full = full or not self._admit(s)
                if full:
                    continue
                full = self.cache.copies > copies  # a copy takes time too: one a step
                limit = _chunk(s.prompt_len - s.computed, most)
            if limit:
                batch.append(_row(s, limit))
                limits[is_short] -= limit
                losses -= limit if s.params.calculate_loss else 0
            else:
                limits[is_short] = 0  # what is too little for this one is not for those behind it
        return batch

    def _admit(self, s: Sequence) -> bool:
        # each running sequence may want a block soon: without room for that it would lose its place at once
        # (and again, where that has happened: much of its answer is to be computed once more)
        headroom = len(self.running) * (4 if s.started else 1)
        if len(self.running) >= self.max_running or not self.cache.admit(s, headroom):
            return False
        if not s.started:
            s.started = time.monotonic()
            s.reused = s.computed
            self.prompt_tokens += s.prompt_len
            self.reused_tokens += s.reused
        self.waiting.remove(s)
        insort(self.running, s, key=_order)
        return True

    def _preempt(self, s: Sequence) -> None:
        self.cache.release(s)
        s.computed = 0
        self.running.remove(s)
        insort(self.waiting, s, key=_order)
        self.preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is."""
        sequence.finished = True
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.slot >= 0:
            self.cache.release(sequence, retain=sequence.params.reuse_cache)


def _follows(s: Sequence) -> bool:
    """Whether another answer is still computing the prompt that this one shares with it."""
    leader = s.leader
    if leader is None or s.params.calculate_loss:  # a loss wants all of the prompt computed
        return False
    return not leader.finished and leader.computed < leader.prompt_len


def _chunk(left: int, limit: int) -> int:
    """Prompt tokens of a row: never the last one alone, which another kernel would compute."""
    if left <= limit:
        return left
    limit -= left - limit == 1
    return limit if limit >= 2 else 0


def _row(s: Sequence, count: int) -> Row:
    if s.params.calculate_loss and s.computed < s.prompt_len:
        return Row(s, s.computed, count, "all")
    return Row(s, s.computed, count, "last" if s.computed + count == len(s.tokens) else "none")

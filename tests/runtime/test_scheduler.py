"""Decodes first, prompts in order within the budget, nothing twice and nothing left over."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rtp_llm.runtime.kv_cache import SlotCache
from rtp_llm.runtime.scheduler import LOSS_CHUNK, Scheduler
from rtp_llm.runtime.sequence import Row, SamplingParams, Sequence


def sequence(prompt: int, new: int = 5, loss: int = 0) -> Sequence:
    params = SamplingParams(calculate_loss=loss)
    return Sequence([0] * prompt, prompt, params, new, frozenset())


def make(slots: int = 4, slot_tokens: int = 512, budget: int = 32, blocks: int | None = None):
    return Scheduler(SlotCache(slots, slot_tokens, blocks), budget)


def compute(batch: list[Row]) -> None:
    """What the engine does with a step: count, and append a token where one was made."""
    for row in batch:
        row.sequence.computed += row.count
        if not row.sequence.uncomputed:
            row.sequence.tokens.append(1)


def test_nothing_to_do_is_an_empty_batch() -> None:
    scheduler = make()
    assert scheduler.idle and scheduler.schedule() == []


def test_a_step_mixes_decodes_and_a_chunk_of_a_prompt() -> None:
    scheduler = make(budget=32)
    old, new = sequence(10), sequence(100)
    scheduler.add(old)
    compute(scheduler.schedule())
    scheduler.add(new)
    batch = scheduler.schedule()
    assert [(r.sequence, r.past, r.count, r.logits) for r in batch] == [
        (old, 10, 1, "last"),
        (new, 0, 31, "none"),
    ]


def test_decodes_are_never_held_up_by_prompts() -> None:
    scheduler = make(slots=4, budget=4)
    decoding = [sequence(1, 40) for _ in range(3)]
    for s in decoding:
        scheduler.add(s)
    compute(scheduler.schedule())
    scheduler.add(sequence(200))
    for _ in range(20):
        batch = scheduler.schedule()
        assert {r.sequence for r in batch} > set(decoding)
        compute(batch)


def test_prompts_are_computed_in_the_order_of_arrival() -> None:
    scheduler = make(budget=20)
    first, second, third = (sequence(n) for n in (30, 5, 30))
    for s in (first, second, third):
        scheduler.add(s)
    batch = scheduler.schedule()
    assert [(r.sequence, r.count) for r in batch] == [(first, 20)]
    compute(batch)
    batch = scheduler.schedule()
    assert [(r.sequence, r.count) for r in batch] == [(first, 10), (second, 5), (third, 5)]


def test_who_came_first_is_not_overtaken_by_a_smaller_one() -> None:
    scheduler = make(slots=4, slot_tokens=64, blocks=5)
    running, large, small = sequence(40, 8), sequence(40, 8), sequence(8, 8)
    for s in (running, large, small):
        scheduler.add(s)
    scheduler.schedule()
    assert scheduler.running == [running] and list(scheduler.waiting) == [large, small]
    scheduler.finish(running)
    scheduler.schedule()
    assert scheduler.running == [large, small]


def test_who_waits_for_images_lets_others_pass() -> None:
    scheduler = make()
    waits, ready = sequence(10), sequence(10)
    waits.images_ready = False
    scheduler.add(waits)
    scheduler.add(ready)
    assert [r.sequence for r in scheduler.schedule()] == [ready]
    waits.images_ready = True
    assert waits in {r.sequence for r in scheduler.schedule()}


def test_the_batch_is_ordered_by_slot() -> None:
    scheduler = make(slots=3, budget=64)
    first = [sequence(4) for _ in range(3)]
    for s in first:
        scheduler.add(s)
    compute(scheduler.schedule())
    scheduler.finish(first[0])
    scheduler.add(sequence(9))  # takes slot 0, and is a prefill beside decodes
    batch = scheduler.schedule()
    assert [r.sequence.slot for r in batch] == [0, 1, 2] and batch[0].count == 9


def test_a_loss_wants_the_logits_of_the_whole_prompt_in_chunks() -> None:
    scheduler = make(budget=512)
    s = sequence(150, loss=1)
    scheduler.add(s)
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        seen += [(r.past, r.count, r.logits) for r in batch]
        compute(batch)
    assert LOSS_CHUNK == 64
    assert seen == [(0, 64, "all"), (64, 64, "all"), (128, 22, "all"), (150, 1, "last")]


def test_the_budget_is_never_too_small_for_every_slot_to_decode() -> None:
    assert make(slots=8, budget=1).token_budget == 8


def test_a_sequence_that_does_not_run_frees_no_slot() -> None:
    scheduler = make(slots=1)
    running, waiting, foreign = sequence(5), sequence(5), sequence(5)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    assert scheduler.finish(waiting) is None and scheduler.finish(foreign) is None
    assert scheduler.finish(running) == 0 and scheduler.finish(running) is None
    assert scheduler.idle


class AnyLoad(RuleBasedStateMachine):
    """Requests come, run, end and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(slots=3, slot_tokens=96, budget=16, blocks=14)
        self.cache = self.scheduler.cache
        self.live: list[Sequence] = []  # in order of arrival
        self.covered: dict[Sequence, int] = {}

    @rule(
        prompt=st.integers(1, 70), new=st.integers(1, 20), loss=st.booleans(), ready=st.booleans()
    )
    def arrive(self, prompt: int, new: int, loss: bool, ready: bool) -> None:
        s = sequence(prompt, new, int(loss))
        s.images_ready = ready
        assert self.cache.fits(prompt + new)
        self.scheduler.add(s)
        self.live.append(s)
        self.covered[s] = 0

    @rule()
    def images_come(self) -> None:
        for s in self.live:
            s.images_ready = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.live)))

    def _end(self, s: Sequence) -> None:
        slot = s.slot
        assert self.scheduler.finish(s) == (slot if slot >= 0 else None)
        assert s.finished
        self.live.remove(s)

    @rule()
    def step(self) -> None:
        decoding = [s for s in self.scheduler.running if s.uncomputed == 1]
        batch = self.scheduler.schedule()
        assert sum(r.count for r in batch) <= self.scheduler.token_budget
        assert set(decoding) <= {r.sequence for r in batch}
        assert len({r.sequence for r in batch}) == len(batch)
        slots = [r.sequence.slot for r in batch]
        assert slots == sorted(slots)
        prompts = [s for s in self.scheduler.running if s.uncomputed > 1]
        counts = {r.sequence: r.count for r in batch}
        starved = [s for s in prompts if not counts.get(s)]
        assert starved == prompts[len(prompts) - len(starved) :]  # only the latest wait
        for row in batch:
            s = row.sequence
            assert row.past == s.computed == self.covered[s]  # exactly once, in order
            assert 1 <= row.count <= s.uncomputed
            self.covered[s] += row.count
            ends = row.past + row.count == len(s.tokens)
            if s.params.calculate_loss and row.past < s.prompt_len:
                assert row.logits == "all" and row.count <= LOSS_CHUNK
            else:
                assert row.logits == ("last" if ends else "none")
        compute(batch)
        for s in [s for s in self.live if s.output_len >= s.max_new_tokens]:
            self._end(s)

    @invariant()
    def counts_equal_holders(self) -> None:
        running = self.scheduler.running
        held = [b for s in running for b in s.blocks]
        assert self.cache.holders == [held.count(b) for b in range(len(self.cache.holders))]
        assert self.cache.used == len(held) <= self.cache.budget
        assert len({s.slot for s in running}) == len(running)
        assert sorted(map(id, [*running, *self.scheduler.waiting])) == sorted(map(id, self.live))

    def teardown(self) -> None:
        """Whoever is left ends in a bounded number of steps, and nothing leaks."""
        self.images_come()
        for _ in range(200):
            if not self.live:
                break
            self.step()
        assert not self.live and self.scheduler.idle
        assert self.cache.used == 0 and not any(self.cache.holders)
        assert sorted(self.cache._free) == [0, 1, 2]


AnyLoad.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
TestAnyLoad = AnyLoad.TestCase

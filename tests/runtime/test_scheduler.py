"""Answers go on in every step, prompts share what is left, nobody waits for ever, nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtp_llm.runtime.block_cache import BlockCache
from rtp_llm.runtime.kv_cache import BLOCK, SlotCache
from rtp_llm.runtime.scheduler import LOSS_CHUNK, SHORT, Scheduler
from rtp_llm.runtime.sequence import Batch, ImageSpan, SamplingParams, Sequence

_unique = iter(range(10**6, 10**9))


def sequence(prompt: int, new: int = 5, loss: int = 0, common: int = 0) -> Sequence:
    """A prompt like no other, behind `common` tokens that all have in common."""
    params = SamplingParams(calculate_loss=loss)
    tokens = [0] * common + [next(_unique) for _ in range(prompt - common)]
    return Sequence(tokens, prompt, params, new, frozenset())


def make(slots: int = 4, slot_tokens: int = 512, budget: int = 32, blocks: int | None = None) -> Scheduler:
    return Scheduler(SlotCache(slots, slot_tokens, blocks), budget)


def compute(scheduler: Scheduler, batch: Batch) -> list[Sequence]:
    """What the engine does with a step; the sequences that ended."""
    ended = []
    for row in batch:
        s = row.sequence
        s.computed += row.count
        if row.past < s.prompt_len:
            scheduler.cache.computed(s)
        if s.uncomputed:
            continue
        if s.max_new_tokens:
            s.tokens.append(s.order * 1000 + s.output_len)
        if s.output_len >= s.max_new_tokens:
            scheduler.finish(s)
            ended.append(s)
    return ended


def step(scheduler: Scheduler) -> dict[Sequence, int]:
    """One step; the tokens of each row."""
    batch = scheduler.schedule()
    compute(scheduler, batch)
    return {row.sequence: row.count for row in batch}


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for s in sequences:
        scheduler.add(s)


def test_nothing_to_do_is_an_empty_batch() -> None:
    scheduler = make()
    assert scheduler.idle and scheduler.schedule() == []


def test_a_step_mixes_decodes_and_a_chunk_of_a_prompt() -> None:
    scheduler = make(budget=32)
    old, new = sequence(10), sequence(200)
    add(scheduler, old)
    step(scheduler)
    add(scheduler, new)
    batch = scheduler.schedule()
    assert [(r.sequence, r.past, r.count, r.logits) for r in batch] == [
        (old, 10, 1, "last"),
        (new, 0, 31, "none"),
    ]


@pytest.mark.parametrize(("chunk", "tokens"), [(512, 61), (40, 40), (16, 16), (1, 16)])
def test_beside_answers_a_step_takes_a_chunk_of_prompts_at_most(chunk: int, tokens: int) -> None:
    scheduler = make(budget=64)
    decoding = [sequence(4, 60) for _ in range(3)]
    add(scheduler, *decoding)
    step(scheduler)
    scheduler.chunk = chunk
    long = sequence(400)
    add(scheduler, long)
    counts = step(scheduler)
    assert counts == {**dict.fromkeys(decoding, 1), long: tokens}


def test_with_nobody_to_hold_up_a_prompt_takes_the_whole_step() -> None:
    scheduler = make(budget=64)
    scheduler.chunk = 1
    long = sequence(400)
    add(scheduler, long)
    assert step(scheduler) == {long: 64}


def test_answers_are_never_held_up_by_prompts() -> None:
    scheduler = make(slots=4, budget=4)
    decoding = [sequence(1, 40) for _ in range(3)]
    add(scheduler, *decoding)
    step(scheduler)
    add(scheduler, sequence(500))
    for _ in range(20):
        assert set(step(scheduler)) > set(decoding)


def test_prompts_are_computed_in_the_order_of_arrival() -> None:
    scheduler = make(budget=20)
    first, second, third = (sequence(n, new=1) for n in (30, 5, 30))
    add(scheduler, first, second, third)
    assert step(scheduler) == {first: 20}
    assert step(scheduler) == {first: 10, second: 5, third: 5}


def test_a_short_prompt_is_answered_beside_a_queue_of_long_ones() -> None:
    scheduler = make(slots=4, slot_tokens=2048, budget=256)
    long = [sequence(1500) for _ in range(10)]
    add(scheduler, *long)
    assert step(scheduler) == {long[0]: 256}
    short = sequence(100)
    add(scheduler, short)
    assert step(scheduler) == {long[0]: 156, short: 100}
    assert short.output_len == 1


def test_short_prompts_take_at_most_half_of_a_step_from_long_ones() -> None:
    scheduler = make(slots=8, budget=256)
    long, short = sequence(500), [sequence(100) for _ in range(5)]
    add(scheduler, long, *short)
    assert step(scheduler) == {long: 128, short[0]: 100, short[1]: 28}


def test_a_long_prompt_of_which_little_is_left_is_a_short_one() -> None:
    scheduler = make(slots=4, budget=64)
    add(scheduler, sequence(450, new=1, common=432))
    while not scheduler.idle:
        step(scheduler)
    long, asked_again = sequence(400), sequence(460, common=432)
    add(scheduler, long, asked_again)
    assert step(scheduler) == {long: 36, asked_again: 28}
    assert asked_again.reused == 432 and scheduler.reused_tokens == 432
    assert scheduler.prompt_tokens == 450 + 400 + 460


def test_who_came_first_is_not_overtaken_by_a_smaller_one() -> None:
    scheduler = make(slots=4, slot_tokens=64, blocks=5, budget=64)
    running, large, small = sequence(40, 8), sequence(40, 8), sequence(8, 8)
    add(scheduler, running, large, small)
    scheduler.schedule()
    assert scheduler.running == [running] and scheduler.waiting == [large, small]
    scheduler.finish(running)
    scheduler.schedule()
    assert scheduler.running == [large, small]


def test_too_little_left_in_a_step_for_one_is_not_for_those_behind_it() -> None:
    scheduler = make(slots=3, budget=64)
    first, second, third = sequence(62), sequence(3), sequence(2)
    add(scheduler, first, second, third)
    assert step(scheduler) == {first: 62} and scheduler.waiting == [second, third]


def test_who_waits_for_images_lets_others_pass() -> None:
    scheduler = make()
    waits, ready = sequence(10), sequence(10)
    waits.images_ready = False
    add(scheduler, waits, ready)
    assert set(step(scheduler)) == {ready}
    waits.images_ready = True
    assert waits in step(scheduler)


def test_answers_to_one_prompt_share_its_computation() -> None:
    scheduler = make(slots=4, budget=64)
    leader = sequence(150)
    others = [sequence(150), sequence(150)]
    for s in others:
        s.leader, s.tokens = leader, list(leader.tokens)
    add(scheduler, leader, *others)
    assert [step(scheduler) for _ in range(3)] == [{leader: 64}, {leader: 64}, {leader: 22}]
    assert step(scheduler) == {leader: 1, others[0]: 6}  # one copy of the cache in a step
    assert step(scheduler) == {leader: 1, others[0]: 1, others[1]: 6}


def test_answers_that_share_blocks_need_no_copies_and_all_begin_in_one_step() -> None:
    scheduler = Scheduler(BlockCache(4, 512), 64)
    leader = sequence(60)
    others = [sequence(60), sequence(60)]
    for s in others:
        s.leader, s.tokens = leader, list(leader.tokens)
    add(scheduler, leader, *others)
    assert step(scheduler) == {leader: 60}
    assert step(scheduler) == {leader: 1, others[0]: 12, others[1]: 12}


def test_who_shares_a_prompt_computes_it_when_the_first_is_cancelled() -> None:
    scheduler = make(slots=4, budget=64)
    leader, other = sequence(150), sequence(150)
    other.leader, other.tokens = leader, list(leader.tokens)
    add(scheduler, leader, other)
    assert step(scheduler) == {leader: 64}
    scheduler.finish(leader)
    assert step(scheduler) == {other: 64} and other.computed == 128  # what was done is used


def test_the_batch_is_ordered_by_slot() -> None:
    scheduler = make(slots=3, budget=64)
    first = [sequence(4) for _ in range(3)]
    add(scheduler, *first)
    step(scheduler)
    scheduler.finish(first[0])
    add(scheduler, sequence(9))  # takes slot 0, and is a prefill beside decodes
    batch = scheduler.schedule()
    assert [r.sequence.slot for r in batch] == [0, 1, 2] and batch[0].count == 9


def test_a_loss_wants_the_logits_of_the_whole_prompt_in_chunks() -> None:
    scheduler = make(budget=512)
    s = sequence(150, loss=1)
    add(scheduler, s)
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        seen += [(r.past, r.count, r.logits) for r in batch]
        compute(scheduler, batch)
    assert LOSS_CHUNK == 64
    assert seen == [(0, 64, "all"), (64, 64, "all"), (128, 22, "all"), (150, 1, "last")]


@pytest.mark.parametrize("prompt", [33, 65, 97])
def test_a_prompts_last_token_is_never_computed_alone(prompt: int) -> None:
    scheduler = make(budget=32)
    s = sequence(prompt, new=1)
    add(scheduler, s)
    counts = []
    while not scheduler.idle:
        counts += step(scheduler).values()
    assert sum(counts) == prompt and counts[-2:] == [31, 2]


def test_a_step_has_room_for_every_answer_and_some_prompt() -> None:
    assert make(slots=8, budget=1).token_budget == 8 + BLOCK
    assert make(slots=8, budget=100).token_budget == 100
    assert Scheduler(SlotCache(8, 64), 1, max_running=3).token_budget == 3 + BLOCK


def test_no_more_run_side_by_side_than_are_allowed() -> None:
    scheduler = Scheduler(SlotCache(8, 64), 512, max_running=3)
    add(scheduler, *[sequence(5) for _ in range(6)])
    assert len(step(scheduler)) == 3 and len(scheduler.running) == 3


def test_a_sequence_that_does_not_run_frees_no_slot() -> None:
    scheduler = make(slots=1)
    running, waiting, foreign = sequence(5), sequence(5), sequence(5)
    add(scheduler, running, waiting)
    scheduler.schedule()
    used = scheduler.cache.used
    scheduler.finish(waiting)
    scheduler.finish(foreign)
    assert scheduler.cache.used == used and scheduler.running == [running] and foreign.finished
    scheduler.finish(running)
    scheduler.finish(running)
    assert scheduler.idle and scheduler.cache.used == 0


@pytest.mark.parametrize(("reuse", "kept"), [(True, 2), (False, 0)])
def test_without_reuse_nothing_is_kept(reuse: bool, kept: int) -> None:
    scheduler = make(budget=64)
    s = sequence(40, new=1)
    s.params = SamplingParams(reuse_cache=reuse)
    add(scheduler, s)
    step(scheduler)
    assert s.finished and scheduler.cache.retained == kept


def test_a_prompt_that_fills_its_slot_and_wants_no_answer_ends() -> None:
    scheduler = make(slots=2, slot_tokens=64, budget=64)
    first, second = sequence(64, new=0, loss=1), sequence(64, new=0, loss=1)
    add(scheduler, first, second)
    for _ in range(2):
        step(scheduler)
    assert first.finished and second.finished


# ---- no blocks left --------------------------------------------------------------------------------


def test_the_latest_loses_its_place_and_is_computed_as_the_first_time() -> None:
    scheduler = make(slots=3, slot_tokens=96, blocks=7, budget=64)
    first, second = sequence(30, 50), sequence(30, 30)
    add(scheduler, first, second)
    rows = []
    while not second.finished:
        batch = scheduler.schedule()
        rows += [(r.past, r.count, r.logits) for r in batch if r.sequence is second]
        compute(scheduler, batch)
    assert scheduler.preemptions == 1 and first.finished
    again = next(i for i, row in enumerate(rows) if i and row[0] < rows[i - 1][0])
    lost = rows[again - 1][0] + 1
    assert rows[:again] == [(0, 30, "last")] + [(i, 1, "last") for i in range(30, lost)]
    start = rows[again][0]  # its prompt's first block may still have been there
    assert start in (0, 16) and rows[again] == (start, 30 - start, "none")
    assert rows[again + 1 :] == [(i, 1, "none" if i < lost else "last") for i in range(30, 59)]


def test_what_is_only_kept_goes_before_anybody_loses_a_place() -> None:
    scheduler = make(slots=3, slot_tokens=96, blocks=7, budget=96)
    add(scheduler, sequence(60, new=1))
    step(scheduler)
    assert scheduler.cache.retained == 3
    add(scheduler, sequence(30, 50), sequence(10, 20))
    while not scheduler.idle:
        step(scheduler)
    assert scheduler.preemptions == 0


# ---- nobody waits for ever -------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, 40])
def test_a_long_prompt_ends_while_short_ones_keep_coming(blocks: int | None) -> None:
    scheduler = make(slots=4, slot_tokens=512, budget=64, blocks=blocks)
    add(scheduler, *[sequence(20, 8) for _ in range(8)])
    long = sequence(480, 20)
    add(scheduler, long)
    for _ in range(200):
        add(scheduler, sequence(20, 8))
        step(scheduler)
        if long.finished:
            return
    raise AssertionError("the long prompt starves")


def test_a_short_prompt_ends_while_long_ones_keep_coming() -> None:
    scheduler = make(slots=4, slot_tokens=512, budget=64)
    add(scheduler, *[sequence(480, 8) for _ in range(8)])
    step(scheduler)
    short = sequence(20, 8)
    add(scheduler, short)
    for i in range(12):
        add(scheduler, sequence(480, 8))
        assert short in step(scheduler), f"step {i}"
        if short.finished:
            return
    raise AssertionError("the short prompt starves")


# ---- any load --------------------------------------------------------------------------------------


class Watched:
    """Of a cache: writes down who came and went, and what each has computed since it came."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.covered: dict[Sequence, int] = {}
        self.came: list[Sequence] = []
        self.went: list[Sequence] = []
        self.refused: list[Sequence] = []
        self.left: dict[Sequence, int] = {}  # of those who might come: prompt tokens to compute

    def watch(self) -> None:
        for record in (self.came, self.went, self.refused, self.left):
            record.clear()  # type: ignore[attr-defined]

    def match(self, sequence: Sequence) -> int:
        found = super().match(sequence)  # type: ignore[misc]
        self.left.setdefault(sequence, sequence.prompt_len - found)
        return found

    def admit(self, sequence: Sequence, headroom: int = 0) -> bool:
        if not super().admit(sequence, headroom):  # type: ignore[misc]
            self.refused.append(sequence)
            return False
        self.covered[sequence] = reused = sequence.computed
        assert self.read(sequence, reused) == content(sequence)[:reused]  # a hit is never wrong
        self.came.append(sequence)
        return True

    def release(self, sequence: Sequence, retain: bool = True) -> None:
        self.went.append(sequence)
        del self.covered[sequence]
        super().release(sequence, retain)  # type: ignore[misc]


class Memory:
    """The tokens that lie in each slot."""

    def __init__(self, slots: int):
        self.values: list[list[object]] = [[] for _ in range(slots)]

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.values[target] = self.values[source][:tokens]

    def release(self, slot: int, keep: int = 0) -> None:
        del self.values[slot][keep:]


class WatchedSlots(Watched, SlotCache):
    def __init__(self, slots: int, slot_tokens: int, blocks: int):
        self.memory = Memory(slots)
        super().__init__(slots, slot_tokens, blocks, self.memory)

    def read(self, s: Sequence, tokens: int) -> list[object]:
        assert len(self.memory.values[s.slot]) == tokens  # and nothing of others behind it
        return list(self.memory.values[s.slot])

    def write(self, s: Sequence, past: int, values: list[object]) -> None:
        self.memory.values[s.slot] += values
        assert past + len(values) <= len(s.blocks) * BLOCK

    def check(self, running: list[Sequence]) -> None:
        held = [b for s in running for b in s.blocks]
        assert all(self.holders[b] == 1 for b in held) and len(set(held)) == len(held)
        assert sum(self.holders) == self.used == len(held) + self.retained <= self.budget
        assert set(self.holders) <= {0, 1}

    def check_empty(self) -> None:
        assert not any(self.memory.values)


class WatchedBlocks(Watched, BlockCache):
    def __init__(self, slots: int, slot_tokens: int, blocks: int):
        super().__init__(slots, slot_tokens, blocks)
        self.pool: list[object] = [None] * (blocks * BLOCK)

    def read(self, s: Sequence, tokens: int) -> list[object]:
        return [self.pool[s.blocks[at // BLOCK] * BLOCK + at % BLOCK] for at in range(tokens)]

    def write(self, s: Sequence, past: int, values: list[object]) -> None:
        for at, value in enumerate(values, past):
            block = s.blocks[at // BLOCK]
            assert self.holders[block] == 1  # never what others read
            self.pool[block * BLOCK + at % BLOCK] = value

    def check(self, running: list[Sequence]) -> None:
        held = [b for s in running for b in s.blocks]
        assert self.holders == [held.count(b) for b in range(self.budget)]
        assert self.used == len(set(held)) + self.retained <= self.budget

    def check_empty(self) -> None:
        assert self.copies == 0


def content(s: Sequence) -> list[object]:
    shown = {i.start + at: (i.key, at) for i in s.images for at in range(i.length)}
    return [(token, s.salt, shown.get(at)) for at, token in enumerate(s.tokens)]


class AnyLoad(RuleBasedStateMachine):
    """Requests come, run, end and are cancelled in any order."""

    kind: type[WatchedSlots] | type[WatchedBlocks] = WatchedSlots

    @initialize(slots=st.integers(1, 4), blocks=st.integers(20, 36), budget=st.sampled_from([1, 40, 200]))
    def make(self, slots: int, blocks: int, budget: int) -> None:
        self.cache = self.kind(slots, 320, blocks)
        self.scheduler = Scheduler(self.cache, budget)
        self.live: list[Sequence] = []  # in order of arrival
        self.ended: list[Sequence] = []

    @rule(
        prompt=st.integers(1, 70) | st.integers(1, 20) | st.integers(SHORT + 1, 280),
        new=st.integers(0, 40),
        loss=st.sampled_from([0, 0, 0, 1]),
        ready=st.sampled_from([True, True, False]),
        common=st.sampled_from([0, 20, 50, 200]),
        salt=st.sampled_from([b"", b"", b"s"]),
        image=st.sampled_from([b"", b"", b"a", b"b"]),
        answers=st.sampled_from([1, 1, 1, 3]),
    )
    def arrive(
        self,
        prompt: int,
        new: int,
        loss: int,
        ready: bool,
        common: int,
        salt: bytes,
        image: bytes,
        answers: int,
    ) -> None:
        leader = None
        tokens = sequence(prompt, common=min(prompt, common)).tokens
        for _ in range(answers):
            s = sequence(prompt, new, loss)
            s.tokens, s.salt, s.leader, s.images_ready = list(tokens), salt, leader, ready
            if image and prompt > 12:
                s.images = [ImageSpan(2, 10, image)]
            leader = leader or s
            assert self.cache.fits(prompt + new)
            self.scheduler.add(s)
            self.live.append(s)

    @rule()
    def images_come(self) -> None:
        for s in self.live:
            s.images_ready = True

    @rule(chunk=st.sampled_from([1, 20, 100, 512]))
    def adapt(self, chunk: int) -> None:
        self.scheduler.chunk = chunk

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from(self.live))
        self.scheduler.finish(s)
        self.end(s)

    def end(self, s: Sequence) -> None:
        assert s.finished and s.slot == -1 and s.blocks == []
        self.live.remove(s)  # an error if it had ended before
        self.ended.append(s)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.one_step()

    def one_step(self) -> None:
        scheduler, cache = self.scheduler, self.cache
        cache.watch()
        copies = cache.copies
        before = list(scheduler.running)
        left = {s: s.prompt_len - s.computed for s in before}
        batch = scheduler.schedule()
        counts = {row.sequence: row.count for row in batch}
        prompts = [row for row in batch if row.past < row.sequence.prompt_len]

        # the batch
        assert len(counts) == len(batch) and sum(counts.values()) <= scheduler.token_budget
        slots = [row.sequence.slot for row in batch]
        assert slots == sorted(set(slots)) and -1 not in slots
        assert sum(row.count for row in batch if row.logits == "all") <= LOSS_CHUNK
        if len(prompts) < len(batch):
            assert sum(row.count for row in prompts) <= max(scheduler.chunk, BLOCK)
        for row in batch:
            self.check_row(row.sequence, row.past, row.count, row.logits)

        # who lost a place: the latest of those who ran, and nobody else could have given a block
        for i, s in enumerate(cache.went):
            assert s is max((x for x in before if x not in cache.went[:i]), key=lambda x: x.order)
        # every answer that has its place goes on
        for s in before:
            assert s in counts or left[s] > 0 or s in cache.went

        # who came: the first of all who might have, and of a kind nobody was overtaken
        assert cache.came == sorted(cache.came, key=lambda s: s.order)
        assert len(cache.refused) <= 1
        if cache.refused:
            assert all(s.order < cache.refused[0].order for s in cache.came)
        stay = [s for s in cache.left if s in scheduler.waiting]
        for s in stay:
            assert s.images_ready
            overtook = [x for x in cache.came if x.order > s.order]
            assert all((cache.left[s] > SHORT) != (cache.left[x] > SHORT) for x in overtook)
        # the first of each kind gets a share, unless there is no place for it
        might = {s: n for s, n in left.items() if n > 0 and s not in cache.went} | cache.left
        for is_short in (True, False):
            kind = sorted((s for s in might if (might[s] <= SHORT) is is_short), key=lambda s: s.order)
            no_place = cache.refused or len(scheduler.running) == scheduler.max_running
            no_place = no_place or cache.copies > copies  # one of them a step
            if kind and (kind[0] in scheduler.running or not no_place):
                judged = any(row.logits == "all" for row in prompts)  # LOSS_CHUNK is for all together
                assert kind[0] in counts or (judged and kind[0].params.calculate_loss)
        for s in compute(scheduler, batch):
            self.end(s)

    def check_row(self, s: Sequence, past: int, count: int, logits: str) -> None:
        """Each token exactly once in a life, in order; the prompt in chunks, the answer one by one."""
        assert past == s.computed == self.cache.covered[s] and 1 <= count <= s.uncomputed
        assert self.cache.read(s, past) == content(s)[:past]
        self.cache.write(s, past, content(s)[past : past + count])
        self.cache.covered[s] += count
        ends = past + count == len(s.tokens)
        if past >= s.prompt_len:
            assert count == 1 and logits == ("last" if ends else "none")
            return
        rest = s.prompt_len - past - count
        assert rest >= 0 and rest != 1 and (count > 1 or s.prompt_len == 1)
        if s.params.calculate_loss:
            assert logits == "all"
        else:
            assert logits == ("last" if ends else "none")

    @invariant()
    def counts_equal_holders(self) -> None:
        scheduler, cache = self.scheduler, self.cache
        cache.check(scheduler.running)
        assert len({s.slot for s in scheduler.running}) == len(scheduler.running) <= scheduler.max_running
        for queue in (scheduler.running, scheduler.waiting):
            assert queue == sorted(queue, key=lambda s: s.order)
        assert sorted(map(id, [*scheduler.running, *scheduler.waiting])) == sorted(map(id, self.live))

    def teardown(self) -> None:
        """Whoever is left ends in a bounded number of steps, exactly once, and nothing is lost."""
        if not hasattr(self, "cache"):
            return
        self.images_come()
        # the first of all goes on in every step, by half of the smallest share at least, once it has a place
        for _ in range(2 * sum(s.prompt_len // (BLOCK // 2 - 1) + s.max_new_tokens + 2 for s in self.live)):
            if not self.live:
                break
            self.one_step()
            self.counts_equal_holders()
        assert not self.live and self.scheduler.idle
        assert len(set(self.ended)) == len(self.ended) == self.scheduler._arrivals
        assert self.cache.used == self.cache.retained
        self.cache.clear()
        assert self.cache.used == 0 and not any(self.cache.holders)
        self.cache.check_empty()


class AnyLoadOverBlocks(AnyLoad):
    kind = WatchedBlocks


ANY_LOAD = settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True)
AnyLoad.TestCase.settings = ANY_LOAD
AnyLoadOverBlocks.TestCase.settings = settings(ANY_LOAD, max_examples=250)
TestAnyLoad = AnyLoad.TestCase
TestAnyLoadOverBlocks = AnyLoadOverBlocks.TestCase

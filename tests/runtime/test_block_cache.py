"""Blocks of a pool: a count equals its holders, a shared block is never written, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtp_llm.runtime.block_cache import BlockCache
from rtp_llm.runtime.kv_cache import BLOCK, block_keys, blocks_for
from rtp_llm.runtime.sequence import ImageSpan, SamplingParams, Sequence


def sequence(tokens: list[int], new: int = 8, loss: int = 0, **more: object) -> Sequence:
    params = SamplingParams(calculate_loss=loss)
    s = Sequence(list(tokens), len(tokens), params, new, frozenset(), **more)  # type: ignore[arg-type]
    s.keys = block_keys(s)
    return s


def words(begins: int, tokens: int, then: int = 0) -> list[int]:
    """A prompt of `tokens` tokens, of which the first `begins` are the same for every `then`."""
    return [i if i < begins else 1000 * then + i for i in range(tokens)]


def run(cache: BlockCache, s: Sequence, retain: bool | None = None) -> Sequence:
    """Admit it and compute its prompt; with `retain` it then ends."""
    assert cache.admit(s)
    s.computed = s.prompt_len
    cache.computed(s)
    if retain is not None:
        cache.release(s, retain)
    return s


def state(cache: BlockCache) -> tuple[object, ...]:
    return list(cache.holders), dict(cache._index), list(cache._kept), list(cache._free), cache._places[:]


@pytest.mark.parametrize("new", [0, 1, 20])
def test_what_fits_runs_to_its_end_in_an_empty_cache(new: int) -> None:
    for slots, slot_tokens, budget in [(2, 64, None), (2, 64, 3), (1, 50, None), (3, 32, 100)]:
        for tokens in range(1, 100):
            cache = BlockCache(slots, slot_tokens, budget)
            fits = blocks_for(tokens + new) <= min(blocks_for(slot_tokens), cache.budget)
            assert cache.fits(tokens + new) is fits
            if fits:
                s = sequence(words(0, tokens), new)
                assert cache.admit(s) and (not new or cache.grow(s, tokens + new))
                assert len(set(s.blocks)) == blocks_for(tokens + new)


def test_the_pool_is_as_large_as_its_budget_whatever_the_slots_hold() -> None:
    assert BlockCache(2, 64, 100).budget == 100 and BlockCache(2, 64).budget == 8


def test_slots_limit_who_runs_side_by_side_and_the_lowest_place_is_given_first() -> None:
    cache = BlockCache(4, 16, 100)
    live = [sequence([i]) for i in range(4)]
    assert all(map(cache.admit, live)) and [s.slot for s in live] == [0, 1, 2, 3]
    assert not cache.admit(sequence([9]))
    for i in (3, 0, 2):
        cache.release(live[i])
        assert live[i].slot == -1 and live[i].blocks == []
    again = sequence([9])
    assert cache.admit(again) and again.slot == 0


def test_a_refused_sequence_changes_nothing() -> None:
    cache = BlockCache(2, 96, 6)
    run(cache, sequence(words(32, 40)))  # 3 blocks
    run(cache, sequence(words(0, 16, then=5)), retain=True)  # 1 block stays
    before = state(cache)
    for tokens, then, headroom in ((64, 7, 0), (47, 7, 1), (64, 5, 1)):
        s = sequence(words(0, tokens, then))
        assert not cache.admit(s, headroom) and (s.slot, s.blocks, s.computed) == (-1, [], 0)
    assert state(cache) == before
    # two of its blocks are there already: what it adds fits where all of it would not
    assert cache.admit(sequence(words(32, 70, then=1)), headroom=0)


def test_who_begins_alike_holds_the_same_blocks_and_computes_the_rest_in_its_own() -> None:
    cache = BlockCache(3, 96)
    first = run(cache, sequence(words(90, 90)))
    second = sequence(words(70, 90, then=1))
    assert cache.admit(second)
    assert second.computed == 64 and second.blocks[:4] == first.blocks[:4]
    assert not set(second.blocks[4:]) & set(first.blocks)
    assert [cache.holders[b] for b in first.blocks] == [2] * 4 + [1] * 2
    assert cache.used == 6 + 2 and cache.retained == 0 and cache.copies == 0


def test_several_answers_share_the_leaders_full_blocks() -> None:
    cache = BlockCache(4, 96)
    leader = run(cache, sequence(words(40, 40)))
    others = [run(cache, sequence(words(40, 40))) for _ in range(3)]
    assert all(s.blocks[:2] == leader.blocks[:2] for s in others)
    assert cache.used == 2 + 4  # and one of its own each, where its answer goes on


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_a_shared_block_stays_until_its_last_holder_has_gone(first_to_go: int) -> None:
    cache = BlockCache(2, 96)
    both = [run(cache, sequence(words(40, 40))), run(cache, sequence(words(40, 40)))]
    blocks = both[0].blocks[:2]
    cache.release(both[first_to_go], retain=False)
    assert [cache.holders[b] for b in blocks] == [1, 1] and cache.match(sequence(words(40, 40))) == 32
    cache.release(both[1 - first_to_go], retain=False)
    assert cache.used == 0 and cache.match(sequence(words(40, 40))) == 0


def test_what_two_compute_at_the_same_time_is_held_once_afterwards() -> None:
    cache = BlockCache(2, 96)
    both = [sequence(words(40, 40)), sequence(words(40, 40))]
    assert all(map(cache.admit, both)) and cache.used == 6
    both[1].computed = 16  # the second is ahead, then behind
    cache.computed(both[1])
    for s in both:
        s.computed = 40
        cache.computed(s)
    assert both[0].blocks[:2] == both[1].blocks[:2] and cache.used == 4
    for s in both:
        cache.release(s)
    assert cache.retained == cache.used == 2


def test_the_least_recently_held_makes_room_end_first_and_no_more_than_needed() -> None:
    cache = BlockCache(4, 96, 8)
    kept = [words(0, 50, then=i) for i in (1, 2)]
    for prompt in (*kept, kept[0]):  # the first is used again
        run(cache, sequence(prompt), retain=True)
    assert cache.used == cache.retained == 6
    assert cache.admit(sequence(words(0, 40, then=3)))  # 3 blocks
    assert [cache.match(sequence(p)) for p in kept] == [48, 32]


def test_what_is_shared_makes_no_room_for_what_is_added_to_it() -> None:
    cache = BlockCache(2, 96, 4)
    run(cache, sequence(words(40, 40)), retain=True)
    s = sequence(words(32, 60, then=1))
    assert cache.retained == 2 and not cache.admit(s, headroom=1)
    assert cache.admit(s) and s.computed == 32 and cache.used == 4


def test_a_beginning_that_is_taken_is_not_what_goes_to_make_room_for_its_end() -> None:
    cache = BlockCache(3, 96, 6)
    run(cache, sequence(words(40, 40)), retain=True)  # the longest unheld
    run(cache, sequence(words(0, 33, then=5)), retain=True)
    s = sequence(words(32, 70, then=1))
    assert cache.admit(s) and s.computed == 32
    assert len(set(s.blocks)) == 5 and cache.match(sequence(words(0, 33, then=5))) == 16


def test_growth_takes_what_is_kept_and_fails_only_when_all_is_held() -> None:
    cache = BlockCache(2, 160, 5)
    run(cache, sequence(words(0, 33, then=1)), retain=True)
    s = sequence(words(0, 15, then=2), 100)
    assert cache.admit(s) and cache.grow(s, 16) and cache.used == 3
    assert cache.grow(s, 64) and cache.retained == 1 and cache.match(sequence(words(0, 33, then=1))) == 16
    assert cache.grow(s, 80) and cache.retained == 0
    before = list(s.blocks)
    assert not cache.grow(s, 81) and s.blocks == before and cache.used == 5


def test_an_answers_tokens_are_not_reused() -> None:
    cache = BlockCache(2, 96)
    s = run(cache, sequence(words(20, 20), new=40))
    s.tokens += range(20, 60)
    assert cache.grow(s, 60)
    s.computed = 60
    cache.computed(s)
    cache.release(s)
    assert cache.retained == 1 and cache.match(sequence(words(60, 60))) == 16


def test_who_lost_its_place_begins_again_with_its_prompt_and_holds_room_for_its_answer() -> None:
    cache = BlockCache(2, 96)
    s = run(cache, sequence(words(40, 40), new=40))
    s.tokens += [7] * 20
    assert cache.grow(s, 60)
    cache.release(s)  # as a scheduler does
    s.computed = 0
    assert cache.admit(s) and (s.computed, len(s.blocks), cache.retained) == (32, 4, 0)


# ---- any order -------------------------------------------------------------------------------------


def content(s: Sequence) -> list[int]:
    """What the keys and values of each position depend on, beside those before it: one number each."""
    values = []
    for at, token in enumerate(s.tokens):
        image = next((i for i in s.images if i.start <= at < i.start + i.length), None)
        shown = (*image.key, at - image.start) if image else ()
        values.append(hash((s.rope_table, *s.salt, -1, token, *shown)) % 2**40)  # of numbers: never random
    return values


Prefix = tuple[int, ...]


def prefixes(s: Sequence, tokens: int) -> list[Prefix]:
    """The contents up to the end of each full block of the leading tokens."""
    values = content(s)
    return [tuple(values[:end]) for end in range(BLOCK, tokens + 1, BLOCK)]


@st.composite
def prompts(draw: st.DrawFn) -> Sequence:
    """Few words, pictures, salts and tables, so that many begin alike."""
    blocks = draw(st.lists(st.sampled_from([0, 0, 0, 0, 1]), min_size=1, max_size=5))
    tokens = [token for token in blocks for _ in range(BLOCK)] + [9] * draw(st.integers(1, 20))
    images = []
    if draw(st.sampled_from([False, False, True])):
        length, key = draw(st.sampled_from([(4, b"a"), (30, b"b"), (30, b"c")]))  # a picture has one length
        images = [ImageSpan(draw(st.sampled_from([3, 20])), length, key)]
    return sequence(
        tokens,
        draw(st.integers(0, 20)),
        draw(st.sampled_from([0, 0, 0, 1])),
        images=[i for i in images if i.start + i.length <= len(tokens)],
        rope_table=draw(st.sampled_from([0] * 5 + [1])),
        salt=draw(st.sampled_from([b""] * 5 + [b"s"])),
    )


class AnyUse(RuleBasedStateMachine):
    """Sequences enter, compute, grow, lose their places and end in any order, over a pool that knows what
    lies in it, beside a model that knows only which prompts were computed, held and left when."""

    @initialize(slots=st.integers(1, 4), budget=st.integers(6, 20))
    def make(self, slots: int, budget: int) -> None:
        self.cache = BlockCache(slots, 128, budget)
        self.pool = [[-1] * BLOCK for _ in range(budget)]
        self.live: dict[Sequence, int] = {}  # → leading blocks that are computed, of the prompt
        self.out: list[Sequence] = []  # lost their places
        self.left: dict[Prefix, int] = {}  # computed prefixes that nobody holds → when they were left
        self.clock = 0

    def held(self) -> set[Prefix]:
        return {p for s, blocks in self.live.items() for p in prefixes(s, blocks * BLOCK)}

    def private(self) -> int:
        return sum(len(s.blocks) - blocks for s, blocks in self.live.items())

    def make_room(self) -> None:
        """The model's own eviction: the longest left, ends before their beginnings."""
        excess = len(self.held()) + len(self.left) + self.private() - self.cache.budget
        for prefix in sorted(self.left, key=lambda p: (self.left[p], -len(p)))[: max(0, excess)]:
            del self.left[prefix]

    def admit(self, s: Sequence, headroom: int) -> None:
        cache, before = self.cache, state(self.cache)
        held = self.held()
        findable = [] if s.params.calculate_loss else prefixes(s, max(0, s.prompt_len - 2))
        depth = next((i for i, p in enumerate(findable) if p not in held | set(self.left)), len(findable))
        assert cache.match(s) == depth * BLOCK
        need = blocks_for(min(len(s.tokens) + 1, s.prompt_len + s.max_new_tokens))
        unheld = sum(p in self.left for p in findable[:depth])
        room = cache.budget - len(held) - self.private() - unheld
        fits = len(self.live) < cache.slots and need - depth + headroom <= room
        assert cache.admit(s, headroom) is fits
        if not fits:
            assert state(cache) == before and (s.slot, s.blocks, s.computed) == (-1, [], 0)
            self.out.append(s)
            return
        assert s.computed == depth * BLOCK and len(s.blocks) == need
        self.live[s] = depth
        for p in findable[:depth]:
            self.left.pop(p, None)
        self.make_room()

    @rule(s=prompts(), headroom=st.integers(0, 3))
    def arrive(self, s: Sequence, headroom: int) -> None:
        self.admit(s, headroom)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from(self.out))
        self.out.remove(s)
        self.admit(s, len(self.live))

    @rule(s=prompts(), retain=st.sampled_from([True, True, False]))
    def come_and_go(self, s: Sequence, retain: bool) -> None:
        self.admit(s, 0)
        if s in self.live:
            self.compute(s, 200)
            self.leave(s, retain)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.sampled_from([200, 40, 16, 7]))
    def go_on(self, data: st.DataObject, tokens: int) -> None:
        for s in data.draw(st.lists(st.sampled_from(list(self.live)), min_size=1, max_size=4)):
            self.compute(s, tokens)

    def compute(self, s: Sequence, tokens: int) -> None:
        if s.computed >= s.prompt_len:
            if s.output_len >= s.max_new_tokens:
                return
            if not s.uncomputed:
                s.tokens.append(3)
            room = self.cache.budget - len(self.held()) - self.private()
            grows = blocks_for(s.computed + 1) - len(s.blocks) <= room
            assert self.cache.grow(s, s.computed + 1) is grows
            if not grows:
                return
            self.make_room()
        past, s.computed = s.computed, min(s.computed + tokens, max(s.prompt_len, s.computed + 1))
        values = content(s)
        for at in range(past, s.computed):
            block = s.blocks[at // BLOCK]
            assert self.cache.holders[block] == 1 and block not in self.cache._index.values()
            self.pool[block][at % BLOCK] = values[at]
        if past < s.prompt_len:
            self.cache.computed(s)
            self.live[s] = min(s.computed, s.prompt_len) // BLOCK
            for p in self.held():
                self.left.pop(p, None)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), retain=st.sampled_from([True, True, False]), comes_back=st.booleans())
    def ends(self, data: st.DataObject, retain: bool, comes_back: bool) -> None:
        s = data.draw(st.sampled_from(list(self.live)))
        self.leave(s, retain)
        if comes_back:
            s.computed = 0
            self.out.append(s)

    def leave(self, s: Sequence, retain: bool) -> None:
        mine = prefixes(s, self.live.pop(s) * BLOCK)
        self.cache.release(s, retain)
        assert s.slot == -1 and s.blocks == []
        self.clock += 1
        if retain:
            self.left |= {p: self.clock for p in mine if p not in self.held()}

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.left.clear()

    @invariant()
    def counts_equal_holders(self) -> None:
        cache = self.cache
        blocks = [b for s in self.live for b in s.blocks]
        assert cache.holders == [blocks.count(b) for b in range(cache.budget)]
        assert all(len(set(s.blocks)) == len(s.blocks) for s in self.live)
        assert cache.retained == len(self.left)
        assert cache.used == len(set(blocks)) + cache.retained <= cache.budget
        assert len(set(blocks)) == len(self.held()) + self.private()  # each prefix is there once
        assert len({s.slot for s in self.live}) == len(self.live)
        assert all(0 <= s.slot < cache.slots for s in self.live)

    @invariant()
    def everyone_finds_its_own_values(self) -> None:
        for s in self.live:
            lies = [value for block in s.blocks for value in self.pool[block]]
            assert lies[: s.computed] == content(s)[: s.computed]

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for s in self.live:
            self.cache.release(s)
        self.cache.clear()
        assert not any(self.cache.holders) and self.cache.used == self.cache.retained == 0
        again = [sequence([i]) for i in range(self.cache.slots)]
        assert all(map(self.cache.admit, again))  # every place came back
        assert [s.slot for s in again] == list(range(self.cache.slots))
        assert self.cache.grow(again[0], BLOCK * (self.cache.budget - len(again) + 1))  # and every block
        assert sorted(b for s in again for b in s.blocks) == list(range(self.cache.budget))


AnyUse.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
TestAnyUse = AnyUse.TestCase

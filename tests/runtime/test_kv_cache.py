"""A block's count equals its holders, nothing is lost, and a hit is never wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtp_llm.runtime.backends.fake import FakeBackend
from rtp_llm.runtime.kv_cache import BLOCK, SlotCache, block_keys, blocks_for
from rtp_llm.runtime.sequence import ImageSpan, SamplingParams, Sequence


def sequence(
    tokens: int | list[int],
    new: int = 8,
    images: list[ImageSpan] | None = None,
    rope_table: int = 0,
    salt: bytes = b"",
    loss: int = 0,
) -> Sequence:
    tokens = [0] * tokens if isinstance(tokens, int) else list(tokens)
    params = SamplingParams(calculate_loss=loss)
    s = Sequence(tokens, len(tokens), params, new, frozenset(), images or [], rope_table, salt)
    s.keys = block_keys(s)
    return s


def words(begins: int, tokens: int, then: int = 0) -> list[int]:
    """A prompt of `tokens` tokens, of which the first `begins` are the same for every `then`."""
    return [i if i < begins else 1000 * then + i for i in range(tokens)]


class Memory:
    """Writes down what the cache asks of the backend."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.calls.append(("copy", source, target, tokens))

    def release(self, slot: int, keep: int = 0) -> None:
        self.calls.append(("release", slot, keep))


def run(cache: SlotCache, s: Sequence, retain: bool | None = None) -> Sequence:
    """Admit it and compute its prompt; with `retain` it then ends."""
    assert cache.admit(s)
    s.computed = s.prompt_len
    cache.computed(s)
    if retain is not None:
        cache.release(s, retain)
    return s


def full(cache: SlotCache) -> tuple[object, ...]:
    return list(cache.holders), cache.used, cache.retained


# ---- blocks and slots ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_block_is_16_tokens(tokens: int, blocks: int) -> None:
    assert BLOCK == 16 and blocks_for(tokens) == blocks


@pytest.mark.parametrize("new", [0, 1, 20])
def test_what_fits_runs_to_its_end_in_an_empty_cache(new: int) -> None:
    for slots, slot_tokens, budget in [(2, 64, None), (2, 64, 3), (1, 50, None), (3, 32, 100)]:
        for tokens in range(1, 100):
            cache = SlotCache(slots, slot_tokens, budget)
            fits = blocks_for(tokens + new) <= min(blocks_for(slot_tokens), cache.budget)
            assert cache.fits(tokens + new) is fits
            if fits:
                s = sequence(tokens, new)
                assert cache.admit(s) and (not new or cache.grow(s, tokens + new))
                assert s.blocks == list(range(blocks_for(tokens + new) if new > 1 else len(s.blocks)))
                assert len(s.blocks) <= cache.blocks_per_slot  # and none of the next slot's


def test_a_sequences_blocks_are_its_slots_in_order() -> None:
    cache = SlotCache(3, 64)
    first, second = sequence(10), sequence(words(0, 47, then=1))
    assert cache.admit(first) and cache.admit(second)
    assert cache.grow(first, 40)
    assert (first.slot, first.blocks) == (0, [0, 1, 2])
    assert (second.slot, second.blocks) == (1, [4, 5, 6])


def test_the_lowest_free_slot_is_given_first() -> None:
    cache = SlotCache(4, 16)
    live = [sequence(5) for _ in range(4)]
    for s in live:
        assert cache.admit(s)
    for i in (3, 0, 2):
        cache.release(live[i])
        assert live[i].slot == -1 and live[i].blocks == []
    again = sequence(5)
    assert cache.admit(again) and again.slot == 0


def test_a_sequence_enters_with_room_for_its_next_token_and_the_headroom_stays_free() -> None:
    cache = SlotCache(2, 64, 4)
    assert not cache.admit(sequence(48), headroom=1)
    assert cache.admit(sequence(47), headroom=1) and cache.used == 3
    again = SlotCache(2, 64, 4)
    assert again.admit(sequence(48)) and again.used == 4


def test_a_refused_sequence_changes_nothing() -> None:
    memory = Memory()
    cache = SlotCache(2, 64, 5, memory)
    run(cache, sequence(words(32, 40)))  # 3 blocks
    run(cache, sequence(words(0, 16, then=5)), retain=True)  # 1 block stays
    before, calls = full(cache), list(memory.calls)
    for refused in (sequence(words(32, 60, then=1)), sequence(words(0, 40, then=5), new=1)):
        assert not cache.admit(refused)
        assert (refused.slot, refused.blocks, refused.computed) == (-1, [], 0)
    assert not cache.admit(sequence(10), headroom=2)
    assert full(cache) == before and memory.calls == calls
    assert cache.match(sequence(words(0, 40, then=5))) == 16
    assert cache.admit(sequence(10))  # in the kept one's place
    assert not cache.admit(sequence(1))  # no slot


# ---- what counts as the same beginning -------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "cached"), [(80, 64), (66, 64), (65, 48), (64, 48), (18, 16), (17, 0), (16, 0), (1, 0)]
)
def test_whole_blocks_are_found_and_at_least_two_tokens_remain(prompt: int, cached: int) -> None:
    cache = SlotCache(2, 128)
    run(cache, sequence(words(128, 70)), retain=True)
    s = sequence(words(128, prompt))
    assert cache.match(s) == cached
    assert cache.admit(s) and s.computed == cached


def test_a_prompt_that_leaves_the_common_path_is_found_up_to_there() -> None:
    cache = SlotCache(2, 128)
    run(cache, sequence(words(100, 100)), retain=True)
    assert [cache.match(sequence(words(n, 100, then=1))) for n in (0, 15, 16, 47, 48, 95, 96)] == [
        0,
        0,
        16,
        32,
        48,
        80,
        96,
    ]


def test_a_loss_takes_nothing_from_the_cache() -> None:
    cache = SlotCache(2, 64)
    run(cache, sequence(40, loss=1), retain=True)
    assert cache.match(sequence(40)) == 32  # but others may take from it
    loss = sequence(40, loss=2)
    assert cache.match(loss) == 0 and cache.admit(loss) and loss.computed == 0


IMAGE = [ImageSpan(20, 30, b"picture")]


@pytest.mark.parametrize(
    ("other", "cached"),
    [
        (sequence(70, images=IMAGE), 64),
        (sequence(70, images=IMAGE, salt=b"key"), 0),
        (sequence(70, images=IMAGE, rope_table=1), 0),
        (sequence(70, images=[ImageSpan(20, 30, b"painting")]), 16),
        (sequence(70, images=[ImageSpan(19, 30, b"picture")]), 16),  # shows another part of it
        (sequence(70, images=[ImageSpan(10, 30, b"picture")]), 0),
        (sequence(70, images=[*IMAGE, ImageSpan(50, 4, b"picture")]), 48),
        (sequence(70), 16),
        (sequence([0] * 40 + [1] + [0] * 29, images=IMAGE), 32),
    ],
)
def test_the_same_begins_with_the_same_words_pictures_salt_and_rope_table(
    other: Sequence, cached: int
) -> None:
    cache = SlotCache(3, 80)
    run(cache, sequence(70, images=IMAGE), retain=True)
    assert cache.match(other) == cached


def test_an_answers_tokens_are_not_reused() -> None:
    cache = SlotCache(2, 96)
    s = run(cache, sequence(words(20, 20), new=40))
    s.tokens += range(20, 60)
    s.computed = 60
    cache.computed(s)
    cache.release(s)
    assert cache.retained == 1 and cache.match(sequence(words(60, 60))) == 16


def test_what_is_not_yet_computed_is_not_found() -> None:
    cache = SlotCache(2, 96)
    s, other = sequence(90), sequence(90)
    assert cache.admit(s) and cache.match(other) == 0
    for computed, cached in [(15, 0), (16, 16), (50, 48)]:
        s.computed = computed
        cache.computed(s)
        assert cache.match(other) == cached
    cache.release(s)  # cancelled in the middle
    assert cache.match(other) == 48 and cache.retained == 3


# ---- taken over, copied, dropped -------------------------------------------------------------------


def test_a_kept_slot_is_taken_over_and_gives_back_what_lies_behind() -> None:
    memory = Memory()
    cache = SlotCache(2, 96, memory=memory)
    run(cache, sequence(words(48, 90)), retain=True)
    assert memory.calls == [("release", 0, 80)]
    s = sequence(words(48, 60, then=1))
    assert cache.admit(s)
    assert (s.slot, s.computed, s.blocks, cache.retained) == (0, 48, [0, 1, 2, 3], 0)
    assert memory.calls[1:] == [("release", 0, 48)]
    assert cache.match(sequence(words(90, 90))) == 48  # the rest is forgotten


def test_a_short_beginning_is_copied_so_that_the_rest_stays() -> None:
    memory = Memory()
    cache = SlotCache(2, 96, memory=memory)
    run(cache, sequence(words(32, 90)), retain=True)
    s = sequence(words(32, 60, then=1))
    assert cache.admit(s)
    assert (s.slot, s.computed, cache.retained, cache.used) == (1, 32, 5, 9)
    assert memory.calls[1:] == [("copy", 0, 1, 32)]
    assert cache.match(sequence(words(90, 90))) == 80


@pytest.mark.parametrize("oldest", ["source", "other"])
def test_without_an_empty_slot_the_least_recently_used_goes(oldest: str) -> None:
    cache = SlotCache(2, 96, 12)
    source, other = words(32, 90), words(0, 20, then=5)
    for prompt in (source, other) if oldest == "source" else (other, source):
        run(cache, sequence(prompt), retain=True)
    assert run(cache, sequence(words(32, 60, then=1))).slot == 0
    left = cache.match(sequence(source)), cache.match(sequence(other))
    assert left == ((32, 16) if oldest == "source" else (80, 0))


def test_conversations_that_begin_alike_do_not_push_each_other_out() -> None:
    cache = SlotCache(8, 96)
    prompts = [words(32, 80, then=i) for i in range(8)]
    for prompt in [*prompts, *3 * prompts[2:4]]:
        run(cache, sequence(prompt), retain=True)
    for prompt in [*3 * [words(32, 80, then=9), words(32, 80, then=10)]]:
        run(cache, sequence(prompt), retain=True)
        assert cache.match(sequence(prompt)) == 64
    assert [cache.match(sequence(p)) for p in prompts] == [32, 32, 64, 64, 64, 64, 64, 64]


def test_a_short_beginning_is_not_copied_where_there_are_no_blocks_for_it() -> None:
    cache = SlotCache(3, 96, 6)
    run(cache, sequence(words(32, 90)), retain=True)
    s = sequence(words(32, 60, then=1))
    assert cache.admit(s)
    assert (s.slot, s.computed) == (0, 32)


def test_who_runs_is_copied_from() -> None:
    memory = Memory()
    cache = SlotCache(3, 96, memory=memory)
    first = run(cache, sequence(words(90, 90)))
    s = sequence(words(90, 90))
    assert cache.admit(s)
    assert (first.slot, s.slot, s.computed) == (0, 1, 80)
    assert memory.calls == [("copy", 0, 1, 80)]
    assert cache.used == 12  # each in blocks of its own: slots share no memory


def test_what_makes_room_is_given_back_before_the_copy_and_the_source_is_never_that() -> None:
    memory = Memory()
    cache = SlotCache(2, 96, 12, memory)
    first = run(cache, sequence(words(90, 90)))
    run(cache, sequence(words(0, 20, then=5)), retain=True)
    memory.calls.clear()
    s = sequence(words(64, 90, then=1))
    assert cache.admit(s)
    assert memory.calls == [("release", 1, 0), ("copy", first.slot, 1, 64)]


def test_what_nobody_runs_in_is_taken_over_before_a_running_one_is_copied() -> None:
    memory = Memory()
    cache = SlotCache(3, 96, memory=memory)
    run(cache, sequence(words(48, 90)))
    run(cache, sequence(words(48, 90, then=1)), retain=True)
    memory.calls.clear()
    s = sequence(words(48, 90, then=2))
    assert cache.admit(s)
    assert s.slot == 1 and memory.calls == [("release", 1, 48)]


def test_a_taken_over_slots_own_rest_makes_room() -> None:
    cache = SlotCache(2, 96, 6)
    run(cache, sequence(words(48, 90)), retain=True)
    s = sequence(words(48, 90, then=1))
    assert cache.retained == 5 and cache.admit(s)
    assert s.computed == 48 and cache.used == 6


def test_to_have_a_beginning_copied_is_not_to_be_used() -> None:
    # else a common system prompt would keep the conversation alive that it is copied from
    cache = SlotCache(4, 96, 16)
    run(cache, sequence(words(16, 80)), retain=True)
    run(cache, sequence(words(0, 80, then=1)), retain=True)
    run(cache, sequence(words(16, 20, then=2)), retain=False)
    assert cache.admit(sequence(words(0, 90, then=3))) and cache.admit(sequence(1))
    assert cache.retained == 5
    assert cache.match(sequence(words(80, 80))) == 0 and cache.match(sequence(words(0, 80, then=1))) == 64


def test_the_least_recently_used_makes_room_and_no_more_than_needed() -> None:
    cache = SlotCache(4, 64, 8)
    kept = [sequence(words(0, 40, then=i)) for i in (1, 2, 3)]
    for s in kept:
        run(cache, s, retain=True)
    run(cache, sequence(words(0, 40, then=1)), retain=True)  # used again
    assert cache.retained == 6
    assert cache.admit(sequence(words(0, 40, then=4)))
    assert [cache.match(s) for s in kept] == [32, 0, 32]


def test_no_free_slot_costs_the_least_recently_used_one() -> None:
    cache = SlotCache(3, 64)
    for i in (1, 2, 3):
        run(cache, sequence(words(0, 40, then=i)), retain=True)
    run(cache, sequence(words(0, 40, then=1)), retain=True)
    s = sequence(5)
    assert cache.admit(s) and s.slot == 1


def test_growth_costs_the_least_recently_used_and_fails_only_when_all_is_held() -> None:
    memory = Memory()
    cache = SlotCache(3, 96, 9, memory)
    s, other = sequence(15, 60), sequence(words(0, 30, then=9))
    assert cache.admit(s) and cache.grow(s, 16) and cache.used == 1
    for i in (1, 2):
        run(cache, sequence(words(0, 33 if i == 1 else 64, then=i)), retain=True)
    run(cache, sequence(words(0, 33, then=1)), retain=True)  # used again
    assert cache.used == 7 and cache.grow(s, 48) and cache.retained == 6
    memory.calls.clear()
    assert cache.grow(s, 49)
    assert memory.calls == [("release", 2, 0)] and cache.retained == 2
    assert cache.admit(other) and cache.used == 8
    assert cache.grow(s, 96) and cache.retained == 0 and s.blocks == [0, 1, 2, 3, 4, 5]
    assert not cache.grow(other, 63) and len(other.blocks) == 2
    assert cache.grow(other, 48) and cache.used == cache.budget
    assert not cache.grow(other, 49) and cache.used == cache.budget


def test_what_ends_unwanted_leaves_nothing() -> None:
    memory = Memory()
    cache = SlotCache(2, 64, memory=memory)
    s = run(cache, sequence(40), retain=False)
    assert cache.used == cache.retained == 0 and cache.match(s) == 0
    assert memory.calls == [("release", 0, 0)]


def test_the_same_prompt_is_kept_once_however_many_have_computed_it() -> None:
    cache = SlotCache(4, 64)
    same = [sequence(words(40, 40)) for _ in range(4)]
    for s in same:
        assert cache.admit(s)
    for s in same:  # side by side, none could begin with another's
        s.computed = 40
        cache.computed(s)
    for s in same:
        cache.release(s)
    assert cache.retained == 2 and cache.match(same[0]) == 32


def test_who_lost_its_place_begins_again_with_its_prompt_and_holds_room_for_its_answer() -> None:
    cache = SlotCache(2, 96)
    s = run(cache, sequence(words(40, 40), new=40))
    s.tokens += [7] * 20
    assert cache.grow(s, 60)
    s.computed = 59
    cache.release(s)  # as a scheduler does
    s.computed = 0
    assert cache.admit(s)
    assert (s.computed, len(s.blocks), cache.retained) == (32, 4, 0)


def test_a_cleared_cache_keeps_only_what_runs() -> None:
    memory = Memory()
    cache = SlotCache(3, 64, memory=memory)
    run(cache, sequence(words(0, 40, then=1)), retain=True)
    s = run(cache, sequence(words(0, 40, then=2)))
    memory.calls.clear()
    cache.clear()
    assert memory.calls == [("release", 0, 0)]
    assert cache.used == len(s.blocks) and cache.retained == 0
    assert cache.match(sequence(words(0, 40, then=1))) == 0
    assert cache.match(sequence(words(0, 40, then=2))) == 32


# ---- any order -------------------------------------------------------------------------------------


def content(s: Sequence) -> list[int]:
    """What the keys and values of each position depend on, beside those before it: one number each."""
    values = []
    for at, token in enumerate(s.tokens):
        image = next((i for i in s.images if i.start <= at < i.start + i.length), None)
        shown = (*image.key, at - image.start) if image else ()
        values.append(hash((s.rope_table, *s.salt, -1, token, *shown)) % 2**40)  # of numbers: never random
    return values


@st.composite
def prompts(draw: st.DrawFn) -> Sequence:
    """Few words, pictures, salts and tables, so that many begin alike."""
    blocks = draw(st.lists(st.sampled_from([0, 0, 1]), max_size=5))
    tokens = [token for token in blocks for _ in range(BLOCK)] + [9] * draw(st.integers(1, 20))
    images = []
    if draw(st.booleans()):
        length, key = draw(st.sampled_from([(4, b"a"), (30, b"b"), (30, b"c")]))  # a picture has one length
        images = [ImageSpan(draw(st.sampled_from([3, 16, 20])), length, key)]
    return sequence(
        tokens,
        draw(st.integers(0, 20)),
        [i for i in images if i.start + i.length <= len(tokens)],
        draw(st.sampled_from([0, 0, 0, 1])),
        draw(st.sampled_from([b"", b"", b"", b"s"])),
        draw(st.sampled_from([0, 0, 0, 1])),
    )


class AnyUse(RuleBasedStateMachine):
    """Sequences enter, compute, grow, lose their places and end in any order, over a memory that knows
    what lies in it."""

    @initialize(slots=st.integers(1, 4), budget=st.integers(8, 32))
    def make(self, slots: int, budget: int) -> None:
        self.memory = FakeBackend(None, slots, 128)  # type: ignore[arg-type]
        self.cache = SlotCache(slots, 128, budget, self.memory)
        self.live: list[Sequence] = []
        self.out: list[Sequence] = []  # lost their places
        self.told: dict[Sequence, int] = {}  # prompt tokens that the cache knows to be computed

    def cached(self, s: Sequence, without: int = -1) -> int:
        """What `match` must find: the longest common beginning of prompts, in whole blocks."""
        if s.params.calculate_loss:
            return 0
        mine = content(s)[: max(0, s.prompt_len - 2)]
        best = 0
        running = {x.slot: self.told[x] for x in self.live}
        for slot, row in enumerate(self.memory.cache.tolist()):
            if slot == without:
                continue
            known = row[: running.get(slot, len(row))]
            same = next((i for i, (a, b) in enumerate(zip(mine, known, strict=False)) if a != b), None)
            same = min(len(mine), len(known)) if same is None else same
            best = max(best, same // BLOCK * BLOCK)
        return best

    def admit(self, s: Sequence, headroom: int) -> None:
        cache, before = self.cache, (full(self.cache), self.memory.cache.copy())
        cached = self.cached(s)
        assert cache.match(s) == cached
        need = blocks_for(min(len(s.tokens) + 1, s.prompt_len + s.max_new_tokens))
        held = sum(len(x.blocks) for x in self.live)
        room = len(self.live) < cache.slots and need + headroom <= cache.budget - held
        assert cache.admit(s, headroom) is room  # all that is merely kept can make room
        if not room:
            assert full(cache) == before[0] and (self.memory.cache == before[1]).all()
            self.out.append(s)
            return
        assert s.computed == cached and len(s.blocks) == need
        assert self.memory.cache[s.slot, :cached].tolist() == content(s)[:cached]
        assert (self.memory.cache[s.slot, cached:] == -1).all()
        self.live.append(s)
        self.told[s] = cached

    @rule(s=prompts(), headroom=st.integers(0, 3))
    def arrive(self, s: Sequence, headroom: int) -> None:
        self.admit(s, headroom)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        s = data.draw(st.sampled_from(self.out))
        self.out.remove(s)
        self.admit(s, len(self.live))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.integers(1, 100))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        s = data.draw(st.sampled_from(self.live))
        if s.computed >= s.prompt_len:
            if s.output_len >= s.max_new_tokens:
                return
            if not s.uncomputed:
                s.tokens.append(3)
            retained = self.cache.retained
            if not self.cache.grow(s, s.computed + 1):
                assert self.cache.used == self.cache.budget and not self.cache.retained
                return
            if self.cache.retained < retained:  # only as much as was needed: the last one dropped was
                assert self.cache.used + self.cache.blocks_per_slot > self.cache.budget
        past, s.computed = s.computed, min(s.computed + tokens, max(s.prompt_len, s.computed + 1))
        self.memory.cache[s.slot, past : s.computed] = content(s)[past : s.computed]
        if past < s.prompt_len:
            self.cache.computed(s)
            self.told[s] = min(s.computed, s.prompt_len) // BLOCK * BLOCK

    @precondition(lambda self: self.live)
    @rule(data=st.data(), retain=st.sampled_from([True, True, False]), comes_back=st.booleans())
    def leave(self, data: st.DataObject, retain: bool, comes_back: bool) -> None:
        s = data.draw(st.sampled_from(self.live))
        self.live.remove(s)
        slot, computed = s.slot, self.told.pop(s)
        retained, elsewhere = self.cache.retained, self.cached(s, without=slot)
        self.cache.release(s, retain)
        assert s.slot == -1 and s.blocks == []
        kept = self.cache.retained - retained
        assert kept in (0, computed // BLOCK) and (retain or not kept)
        if retain and not s.params.calculate_loss:
            findable = min(computed, max(0, s.prompt_len - 2) // BLOCK * BLOCK)
            assert self.cache.match(s) == max(elsewhere, findable)
        if comes_back:
            s.computed = 0
            self.out.append(s)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.retained == 0

    @invariant()
    def counts_equal_holders(self) -> None:
        cache = self.cache
        running = {x.slot: x for x in self.live}
        assert len(running) == len(self.live)
        retained = 0
        for slot in range(cache.slots):
            first = slot * cache.blocks_per_slot
            holders = cache.holders[first : first + cache.blocks_per_slot]
            written = int((self.memory.cache[slot] != -1).sum())
            if slot in running:
                blocks = running[slot].blocks
                assert blocks == list(range(first, first + len(blocks))) and written <= len(blocks) * BLOCK
                held = len(blocks)
            else:
                assert written % BLOCK == 0  # and the rest was given back
                held = written // BLOCK
                retained += held
            assert holders == [1] * held + [0] * (cache.blocks_per_slot - held)
        assert cache.used == sum(cache.holders) <= cache.budget
        assert cache.retained == retained

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for s in self.live:
            self.cache.release(s)
        self.cache.clear()
        assert not any(self.cache.holders) and self.cache.used == self.cache.retained == 0
        assert (self.memory.cache == -1).all()
        again = [sequence(1) for _ in range(self.cache.slots)]
        assert all(self.cache.admit(s) for s in again[: self.cache.budget])  # every slot came back
        assert [s.slot for s in again] == list(range(self.cache.slots))


AnyUse.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)
TestAnyUse = AnyUse.TestCase

"""A block's count equals its holders, a slot has one sequence, and everything comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.runtime.kv_cache import BLOCK, SlotCache, blocks_for
from rtp_llm.runtime.sequence import SamplingParams, Sequence


def sequence(prompt: int, new: int = 0) -> Sequence:
    return Sequence([0] * prompt, prompt, SamplingParams(), new, frozenset())


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_block_is_16_tokens(tokens: int, blocks: int) -> None:
    assert BLOCK == 16 and blocks_for(tokens) == blocks


def test_fits_is_the_longest_that_an_empty_cache_admits() -> None:
    for slots, slot_tokens, budget in [(2, 64, None), (2, 64, 3), (1, 50, None), (3, 32, 100)]:
        for tokens in range(1, 100):
            cache = SlotCache(slots, slot_tokens, budget)
            could = blocks_for(tokens) <= min(blocks_for(slot_tokens), cache.budget)
            assert cache.fits(tokens) is could
            if could:
                assert cache.admit(sequence(tokens))


def test_a_sequences_blocks_are_its_slots_in_order() -> None:
    cache = SlotCache(3, 64)
    first, second = sequence(10, 30), sequence(64)
    assert cache.admit(first) and cache.admit(second)
    assert (first.slot, first.blocks) == (0, [0, 1, 2])
    assert (second.slot, second.blocks) == (1, [4, 5, 6, 7])


def test_the_lowest_free_slot_is_given_first() -> None:
    cache = SlotCache(4, 16)
    live = [sequence(5) for _ in range(4)]
    for s in live:
        cache.admit(s)
    for i in (3, 0, 2):
        assert cache.release(live[i]) == i
    again = sequence(5)
    cache.admit(again)
    assert again.slot == 0


def test_a_refused_sequence_takes_nothing() -> None:
    cache = SlotCache(2, 64, 5)
    assert cache.admit(sequence(60))
    refused = sequence(20)
    assert not cache.admit(refused)
    assert refused.slot == -1 and refused.blocks == [] and cache.used == 4
    assert cache.admit(sequence(16))
    assert not cache.admit(sequence(0))  # no slot


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(1, 80),
    st.none() | st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(0, 3)), max_size=40),
)
def test_any_order_of_admissions_and_releases_keeps_the_counts(
    slots: int, slot_tokens: int, budget: int | None, actions: list[tuple[int, int, int]]
) -> None:
    cache = SlotCache(slots, slot_tokens, budget)
    live: list[Sequence] = []
    for prompt, new, release in actions:
        s = sequence(prompt, new)
        if cache.fits(prompt + new) and cache.admit(s):
            live.append(s)
            assert len(s.blocks) == blocks_for(prompt + new)
        if release and live:
            gone = live.pop(release % len(live))
            slot = gone.slot
            assert cache.release(gone) == slot
            assert gone.slot == -1 and gone.blocks == []
        held = [block for x in live for block in x.blocks]
        assert cache.holders == [held.count(b) for b in range(len(cache.holders))]
        assert cache.used == len(held) <= cache.budget
        assert len({x.slot for x in live}) == len(live) <= slots
        assert all(b // cache.blocks_per_slot == x.slot for x in live for b in x.blocks)
    for s in live:
        cache.release(s)
    assert not any(cache.holders) and cache.used == 0
    assert all(cache.admit(sequence(0)) for _ in range(slots))  # every slot came back

"""An image is encoded once, what somebody needs stays, and the rest keeps to its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.runtime.vision import EmbeddingCache

ROW = 4 * 5 * 4  # bytes of one image's rows: 4 tokens × 5 × float32


def image(i: int, size: int = 2) -> dict[bytes, np.ndarray]:
    return {bytes([i]): np.full((size, size, 3), i, np.uint8)}


def encode(pixels: np.ndarray) -> np.ndarray:
    """Rows full of the pixels' first value."""
    return np.broadcast_to(pixels[:, 0, 0, :1, None], (len(pixels), 4, 5)).astype(np.float32)


def encode_some(cache: EmbeddingCache, *first: int) -> list[int]:
    """One batch, and which images were in it; `first`: those of the first who waits."""
    keys, pixels = cache.next_batch([bytes([i]) for i in first])
    if not keys:
        return []
    assert len(keys) == len(pixels) and [k[0] for k in keys] == pixels[:, 0, 0, 0].tolist()
    cache.put(keys, encode(pixels))
    return [k[0] for k in keys]


def filled(budget: int, count: int) -> EmbeddingCache:
    cache = EmbeddingCache(budget)
    for i in range(count):
        cache.hold(image(i))
        encode_some(cache)
        cache.drop(image(i))
    return cache


def test_the_same_image_of_many_requests_is_encoded_once() -> None:
    cache = EmbeddingCache(10**6)
    for _ in range(3):
        cache.hold(image(7))
    assert not cache.ready(image(7))
    assert encode_some(cache) == [7] and encode_some(cache) == []
    cache.hold(image(7))
    assert cache.ready(image(7)) and encode_some(cache) == []
    assert (cache[b"\x07"] == 7).all() and cache[b"\x07"].shape == (4, 5)


def test_an_image_that_is_being_encoded_is_not_encoded_again() -> None:
    cache = EmbeddingCache(10**6)
    cache.hold(image(7))
    keys, pixels = cache.next_batch()
    cache.hold(image(7))
    cache.hold(image(8))
    assert not cache.ready(image(7))
    cache.put(keys, encode(pixels))
    assert cache.ready(image(7)) and encode_some(cache) == [8]


def test_one_batch_is_encoded_at_a_time() -> None:
    cache = EmbeddingCache(10**6, batch=2)
    for i in range(3):
        cache.hold(image(i))
    keys, pixels = cache.next_batch()
    assert cache.next_batch()[0] == []
    cache.put(keys, encode(pixels))
    assert encode_some(cache) == [2]


def test_an_image_asked_about_again_costs_no_vision() -> None:
    cache = filled(10**6, 3)
    cache.hold(image(1))
    assert cache.ready(image(1)) and encode_some(cache) == []


def test_hits_are_the_images_that_cost_no_vision() -> None:
    cache = EmbeddingCache(10**6)
    cache.hold(image(0) | image(1))
    assert (cache.asked, cache.hits) == (2, 0)
    cache.hold(image(1) | image(2))  # 1 waits already
    assert (cache.asked, cache.hits) == (4, 1)
    keys, pixels = cache.next_batch()
    cache.hold(image(0))  # is being encoded
    assert (cache.asked, cache.hits) == (5, 2)
    cache.put(keys, encode(pixels))
    cache.hold(image(0) | image(1) | image(2) | image(3))
    assert (cache.asked, cache.hits) == (9, 5)


def test_rows_are_kept_as_they_are_and_count_as_hits_within_the_budget() -> None:
    cache = filled(2 * ROW, 2)
    given = {b"rows": np.ones((4, 5), np.float32)}
    cache.hold(given)
    assert cache.ready(given) and cache.next_batch()[0] == []
    assert cache[b"rows"] is given[b"rows"]
    assert (cache.asked, cache.hits) == (3, 1)
    assert list(cache) == [b"\x01", b"rows"] and cache.bytes == 2 * ROW
    cache.drop(given)
    cache.hold(given)
    assert cache.bytes == 2 * ROW, "kept once"


def test_who_has_waited_longest_is_encoded_first() -> None:
    cache = EmbeddingCache(10**6, batch=2)
    for i in (4, 1, 3, 1, 2):
        cache.hold(image(i))
    assert [encode_some(cache) for _ in range(3)] == [[4, 1], [3, 2], []]


def test_images_of_all_who_wait_share_batches_of_one_shape() -> None:
    cache = EmbeddingCache(10**6, batch=3)
    for i, size in enumerate([2, 2, 4, 2, 2]):
        cache.hold(image(i, size))
    assert [encode_some(cache) for _ in range(4)] == [[0, 1], [2], [3, 4], []]


def test_the_budget_drops_the_least_recently_used_first() -> None:
    cache = filled(3 * ROW, 3)
    cache.hold(image(0))  # used again
    cache.drop(image(0))
    cache.hold(image(9))
    encode_some(cache)
    cache.drop(image(9))
    assert list(cache) == [b"\x02", b"\x00", b"\x09"]
    assert cache.bytes == 3 * ROW


def test_a_held_image_stays_beyond_the_budget_and_goes_when_dropped() -> None:
    cache = EmbeddingCache(ROW)
    for i in range(3):
        cache.hold(image(i))
    encode_some(cache)
    assert cache.ready([b"\x00", b"\x01", b"\x02"]) and cache.bytes == 3 * ROW
    for i in range(3):
        cache.drop(image(i))
    assert cache.bytes == ROW and len(cache) == 1


def test_an_image_that_two_hold_stays_until_both_have_dropped_it() -> None:
    cache = EmbeddingCache(0)
    cache.hold(image(1))
    cache.hold(image(1))
    encode_some(cache, 1)
    cache.drop(image(1))
    assert cache.ready(image(1))
    cache.drop(image(1))
    assert not cache.ready(image(1)) and cache.bytes == 0


def test_an_image_that_nobody_waits_for_any_more_is_not_encoded() -> None:
    cache = EmbeddingCache(10**6)
    cache.hold(image(1))
    cache.hold(image(1))
    cache.drop(image(1))
    assert not cache.ready(image(1))
    cache.drop(image(1))
    assert encode_some(cache) == []


def test_an_image_given_up_while_it_is_encoded_is_kept_for_the_next_who_asks() -> None:
    cache = EmbeddingCache(10**6)
    cache.hold(image(1))
    keys, pixels = cache.next_batch()
    cache.drop(image(1))
    cache.put(keys, encode(pixels))
    cache.hold(image(1))
    assert cache.ready(image(1)) and cache.hits == 1


def test_an_image_keeps_no_more_memory_than_its_own_rows() -> None:
    cache = EmbeddingCache(10**6)
    for i in range(8):
        cache.hold(image(i))
    encode_some(cache)
    for rows in cache.values():
        assert rows.base is None and rows.flags.c_contiguous  # not a view of the batch


def test_a_failed_batch_is_forgotten_and_the_others_wait_on() -> None:
    cache = EmbeddingCache(10**6, batch=2)
    for i in range(4):
        cache.hold(image(i))
    assert cache.next_batch()[0] == [b"\x00", b"\x01"]
    cache.fail()
    assert not cache.ready(image(0)) and not cache.ready(image(1))
    for i in (0, 1):
        cache.drop(image(i))
    assert encode_some(cache) == [2, 3] and encode_some(cache) == []
    cache.hold(image(1))  # asked again, it gets another chance
    assert encode_some(cache) == [1]


def test_rows_for_fewer_images_than_the_batch_has_are_an_error() -> None:
    cache = EmbeddingCache(10**6)
    cache.hold(image(0) | image(1))
    keys, pixels = cache.next_batch()
    with pytest.raises(ValueError):
        cache.put(keys, encode(pixels[:1]))


def test_a_cleared_cache_holds_nothing() -> None:
    cache = filled(10**6, 3)
    cache.hold(image(5))
    cache.next_batch()
    cache.hold(image(6))
    cache.clear()
    assert len(cache) == cache.bytes == 0 and encode_some(cache) == []
    cache.hold(image(0))
    assert encode_some(cache) == [0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from("hhdbpf"), st.integers(0, 5)), max_size=60))
def test_any_order_of_use_keeps_the_accounts(budget: int, actions: list[tuple[str, int]]) -> None:
    cache = EmbeddingCache(budget * ROW, batch=2)
    held: list[int] = []
    batch: list[bytes] = []
    pixels = np.empty(0)
    encoded: list[int] = []  # batches that were begun, image by image
    for action, i in actions:
        if action == "h":
            costs = not (cache.ready(image(i)) or i in held or bytes([i]) in batch)
            hits = cache.hits
            cache.hold(image(i))
            held.append(i)
            assert cache.hits == hits + (not costs)
        elif action == "d" and i in held:
            held.remove(i)
            cache.drop(image(i))
        elif action == "b":
            new, new_pixels = cache.next_batch()
            assert not (new and batch) and len(new) <= 2 and not cache.ready(new[:1] or [b"none"])
            assert all(key[0] in held for key in new)
            if new:
                batch, pixels = new, new_pixels
                encoded += [key[0] for key in new]
        elif action == "p" and batch:
            cache.put(batch, encode(pixels))
            batch = []
        elif action == "f" and batch:
            cache.fail()
            for lost in [j for j in held if bytes([j]) in batch]:  # as the engine does
                held.remove(lost)
                cache.drop(image(lost))
            batch = []
        assert cache.bytes == sum(rows.nbytes for rows in cache.values()) == len(cache) * ROW
        unheld = [k for k in cache if k[0] not in held]
        assert not unheld or cache.bytes <= budget * ROW
        assert all((rows == key[0]).all() for key, rows in cache.items())
    if batch:
        cache.put(batch, encode(pixels))
    while more := encode_some(cache, *set(held)):
        encoded += more
    assert cache.ready([bytes([i]) for i in held])  # nobody waits for ever
    assert cache.asked - cache.hits >= len(encoded)  # each begun batch's images were counted as misses


def test_beyond_the_budget_only_the_first_who_waits_is_served() -> None:
    cache = EmbeddingCache(ROW)
    for i in range(4):
        cache.hold(image(i))
    assert encode_some(cache) == [0, 1, 2, 3]  # nothing was held yet
    for i in (5, 6):
        cache.hold(image(i))
    assert encode_some(cache) == []
    assert encode_some(cache, 6) == [6]
    for i in range(4):
        cache.drop(image(i))
    cache.drop(image(6))
    assert encode_some(cache) == [5]

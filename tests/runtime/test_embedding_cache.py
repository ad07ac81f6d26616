"""An image is encoded once, what somebody needs stays, and the rest keeps to its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.runtime.vision import EmbeddingCache

ROW = 4 * 5 * 4  # bytes of one image's rows: 4 tokens × 5 × float32


class Encoder:
    """Counts the pixels' first values that it encodes; fails where told."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.broken: set[int] = set()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        values = pixels[:, 0, 0, 0]
        self.batches.append(values.tolist())
        if self.broken & set(values.tolist()):
            raise RuntimeError("broken image")
        return np.broadcast_to(values[:, None, None], (len(pixels), 4, 5)).astype(np.float32)


def image(i: int, size: int = 2) -> dict[bytes, np.ndarray]:
    return {bytes([i]): np.full((size, size, 3), i, np.uint8)}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def filled(encoder: Encoder, budget: int, count: int) -> EmbeddingCache:
    cache = EmbeddingCache(encoder, budget)
    for i in range(count):
        cache.hold(image(i))
        cache.encode_some()
        cache.drop(image(i))
    return cache


def test_the_same_image_of_many_requests_is_encoded_once(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, 10**6)
    for _ in range(3):
        cache.hold(image(7))
    assert not cache.ready(image(7))
    assert cache.encode_some() == [b"\x07"]
    assert cache.encode_some() == []
    cache.hold(image(7))
    assert cache.ready(image(7)) and cache.encode_some() == []
    assert encoder.batches == [[7]]
    assert (cache[b"\x07"] == 7).all() and cache[b"\x07"].shape == (4, 5)


def test_an_image_asked_about_again_costs_no_vision(encoder: Encoder) -> None:
    cache = filled(encoder, 10**6, 3)
    cache.hold(image(1))
    assert cache.ready(image(1)) and cache.encode_some() == []


def test_images_of_all_who_wait_share_batches_of_one_shape(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, 10**6, batch=3)
    for i, size in enumerate([2, 2, 4, 2, 2]):
        cache.hold(image(i, size))
    while cache.encode_some():
        pass
    assert sorted(sum(encoder.batches, [])) == [0, 1, 2, 3, 4]
    assert [2] in encoder.batches and max(map(len, encoder.batches)) <= 3
    assert len(encoder.batches) == 3


def test_the_budget_drops_the_least_recently_used_first(encoder: Encoder) -> None:
    cache = filled(encoder, 3 * ROW, 3)
    cache.hold(image(0))  # used again
    cache.drop(image(0))
    cache.hold(image(9))
    cache.encode_some()
    cache.drop(image(9))
    assert list(cache) == [b"\x02", b"\x00", b"\x09"]
    assert cache.bytes == 3 * ROW


def test_a_held_image_stays_beyond_the_budget_and_goes_when_dropped(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, ROW)
    for i in range(3):
        cache.hold(image(i))
    cache.encode_some()
    assert cache.ready([b"\x00", b"\x01", b"\x02"]) and cache.bytes == 3 * ROW
    for i in range(3):
        cache.drop(image(i))
    assert cache.bytes == ROW and len(cache) == 1


def test_an_image_that_nobody_waits_for_any_more_is_not_encoded(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, 10**6)
    cache.hold(image(1))
    cache.hold(image(1))
    cache.drop(image(1))
    assert not cache.ready(image(1))
    cache.drop(image(1))
    assert cache.encode_some() == [] and encoder.batches == []


def test_an_image_keeps_no_more_memory_than_its_own_rows(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, 10**6)
    for i in range(8):
        cache.hold(image(i))
    cache.encode_some()
    for rows in cache.values():
        assert rows.base is None and rows.flags.c_contiguous  # not a view of the batch


def test_a_failed_batch_is_forgotten_and_the_others_wait_on(encoder: Encoder) -> None:
    cache = EmbeddingCache(encoder, 10**6, batch=2)
    encoder.broken = {1}
    for i in range(4):
        cache.hold(image(i))
    with pytest.raises(RuntimeError, match="broken image"):
        cache.encode_some()
    assert [cache.lost(image(i)) for i in range(4)] == [True, True, False, False]
    assert cache.encode_some() == [b"\x02", b"\x03"]
    encoder.broken = set()
    cache.hold(image(1))  # asked again, it gets another chance
    assert cache.encode_some() == [b"\x01"]


def test_a_cleared_cache_holds_nothing(encoder: Encoder) -> None:
    cache = filled(encoder, 10**6, 3)
    cache.clear()
    assert len(cache) == cache.bytes == 0
    cache.hold(image(0))
    assert cache.encode_some() == [b"\x00"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from("hde"), st.integers(0, 5)), max_size=60))
def test_any_order_of_use_keeps_the_accounts(budget: int, actions: list[tuple[str, int]]) -> None:
    cache = EmbeddingCache(Encoder(), budget * ROW, batch=2)
    held: list[int] = []
    for action, i in actions:
        if action == "h":
            cache.hold(image(i))
            held.append(i)
        elif action == "d" and i in held:
            held.remove(i)
            cache.drop(image(i))
        elif action == "e":
            cache.encode_some()
        assert cache.bytes == sum(rows.nbytes for rows in cache.values()) == len(cache) * ROW
        unheld = [k for k in cache if k[0] not in held]
        assert not unheld or cache.bytes <= budget * ROW
        assert not any(cache.lost(image(j)) for j in held)
        assert all((rows == key[0]).all() for key, rows in cache.items())
    while cache.encode_some():
        pass
    assert cache.ready([bytes([i]) for i in held])

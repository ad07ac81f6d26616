"""The device picks the token that the host would, without waiting for anything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from rtp_llm.runtime import sampling  # noqa: E402
from rtp_llm.runtime.backends import device_sampling  # noqa: E402
from rtp_llm.runtime.backends.device_sampling import pack, pick, result  # noqa: E402
from rtp_llm.runtime.sequence import SamplingParams, Sequence  # noqa: E402
from rtp_llm.runtime.step import Draw  # noqa: E402

EDGE = 1e-9  # nearer than this to a border rounding may decide

numbers = st.floats(0, 1, exclude_max=True)
draws = st.builds(
    Draw,
    u=numbers,
    temperature=st.floats(0.05, 5) | st.sampled_from([1e-30, 5e-324, 1e30]),
    top_k=st.just(0) | st.integers(1, 50),
    top_p=st.just(1.0) | st.floats(0, 1.2),
    min_p=st.just(0.0) | st.floats(0, 1),
    greedy=st.sampled_from([False] * 5 + [True]),
)


def logits_of(seed: int, rows: int, vocab: int, digits: int) -> np.ndarray:
    """With fewer digits: with ties."""
    return (3 * np.random.default_rng(seed).normal(size=(rows, vocab))).round(digits).astype(np.float32)


def by_host(row: np.ndarray, draw: Draw) -> set[int]:
    """What the host picks for this draw and for its nearest neighbours: one token, away from borders."""
    near = [draw]
    for name in ("u", "top_p", "min_p"):
        value = getattr(draw, name)
        moved = [value * (1 - EDGE) - EDGE * (name == "u"), value * (1 + EDGE) + EDGE * (name == "u")]
        if not (name == "top_p" and value >= 1) and not (name == "min_p" and value == 0):
            near += [dataclasses.replace(draw, **{name: min(max(v, 0.0), 1 - 2**-53)}) for v in moved]
    return {sampling.pick(row, one) for one in near}


def by_host_each(logits: np.ndarray, rows: list[Draw]) -> list[int]:
    return [sampling.pick(row, draw) for row, draw in zip(logits, rows, strict=True)]


def by_device(logits: np.ndarray, rows: list[Draw]) -> np.ndarray:
    return pick(torch.from_numpy(logits), pack(rows, logits.shape[1], "cpu"))[0].numpy()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(2, 40) | st.just(700),
    st.integers(0, 5),
    st.lists(draws, min_size=1, max_size=6),
)
def test_any_rows_together_are_what_the_host_picks_for_each(
    seed: int, vocab: int, digits: int, rows: list[Draw]
) -> None:
    logits = logits_of(seed, len(rows), vocab, digits)
    before = logits.copy()
    for token, row, draw in zip(by_device(logits, rows), logits, rows, strict=True):
        assert token in by_host(row, draw)
    np.testing.assert_array_equal(logits, before)


KINDS = [
    {"do_sample": False},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.0},
]


@pytest.mark.parametrize("vocab", [60, 3000])
def test_the_same_seed_gives_the_same_text_on_both(vocab: int) -> None:
    """Exactly, over whole random streams: borders are hit less than once in 1e9 draws."""
    asked = [Sequence([0], 1, SamplingParams.from_config(c), 9, frozenset()) for c in KINDS]
    host, device = ([sampling.Sampler(vocab, i, 7) for i in range(len(KINDS))] for _ in range(2))
    for step in range(60):
        logits = logits_of(step, len(KINDS), vocab, 7)
        wanted = [sampler(s, row).token for sampler, s, row in zip(host, asked, logits, strict=True)]
        rows = [sampler.draw(s) for sampler, s in zip(device, asked, strict=True)]
        assert by_device(logits, [r for r in rows if r]).tolist() == wanted


def test_more_rows_than_are_worked_on_at_a_time_are_all_picked() -> None:
    n = 2 * device_sampling.ROWS + 3
    logits = logits_of(0, n, 30, 7)
    rows = [Draw(u, 2.0, top_p=0.9) for u in np.random.default_rng(0).random(n).tolist()]
    assert by_device(logits, rows).tolist() == by_host_each(logits, rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_what_the_host_gives(bad: float) -> None:
    logits = logits_of(1, 3, 20, 3)
    logits[0, 4] = logits[1] = bad
    rows = [Draw(0.7, 1.5, top_p=0.9), Draw(0.7), Draw(0.3, 2.0)]
    assert by_device(logits, rows).tolist() == by_host_each(logits, rows)


def test_log_probabilities_are_of_the_raw_logits() -> None:
    logits = logits_of(2, 3, 500, 5)
    rows = pack([Draw(0.9, 3.0, 7), Draw(0.2), Draw(greedy=True)], 500, "cpu")
    tokens, found = pick(torch.from_numpy(logits), rows)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).gather(1, tokens[:, None])[:, 0]
    assert tokens.dtype == torch.int64 and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_the_vocabulary_is_sorted_only_where_a_draw_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("sort", "topk", "cumsum"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name, real=real, **k: (called.append(name), real(*a, **k))[1]
        )
    logits = logits_of(3, 1, 50, 5)
    for draw, wanted in (
        (Draw(greedy=True, top_p=0.5, top_k=3), []),
        (Draw(0.5), ["cumsum"]),
        (Draw(0.5, top_k=3), ["topk", "cumsum"]),
        (Draw(0.5, top_k=50), ["cumsum"]),
        (Draw(0.5, top_p=0.5), ["sort", "cumsum", "cumsum"]),
        (Draw(0.5, min_p=0.5), ["sort", "cumsum", "cumsum"]),
    ):
        called.clear()
        by_device(logits, [draw])
        assert called == wanted


def test_nothing_depends_on_the_values_of_a_tensor_before_all_is_picked() -> None:
    """With fake tensors, which have no values, whatever asks for one fails: as it would wait on a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = [Draw(0.5, 2.0, 5, 0.9, 0.1), Draw(greedy=True), Draw(0.1)]
    packed = pack(rows, 50, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = dataclasses.replace(packed, values=mode.from_tensor(packed.values))
        tokens, logprobs = pick(torch.empty(3, 50), values)
        assert tokens.shape == logprobs.shape == (3,)
        with pytest.raises(Exception, match="item|data-dependent|local_scalar"):
            tokens[0].item()


@pytest.mark.parametrize("kinds", ["", "d", "h", "dh", "hdhhd"])
def test_a_result_has_picks_for_those_with_a_draw_and_logits_for_the_others_in_order(kinds: str) -> None:
    logits = logits_of(4, len(kinds), 30, 5)
    rows = [Draw(0.3 + i / 10, 2.0) if kind == "d" else None for i, kind in enumerate(kinds)]
    found = result(torch.from_numpy(logits), rows)
    asked = [i for i, row in enumerate(rows) if row is None]
    assert found.picks is not None and found.picks.tokens.shape == found.picks.logprobs.shape == (len(kinds),)
    assert found.picks.tokens.dtype == np.int64 and found.picks.logprobs.dtype == np.float32
    if asked:
        np.testing.assert_array_equal(found.logits, logits[asked])
    for i, row in enumerate(rows):
        if row:
            token = found.picks.tokens[i]
            assert token == sampling.pick(logits[i], row)
            assert found.picks.logprobs[i] == pytest.approx(sampling.log_softmax(logits[i])[token], rel=1e-5)


def test_without_draws_a_result_is_all_logits() -> None:
    logits = logits_of(5, 3, 30, 5)
    found = result(torch.from_numpy(logits), None)
    assert found.picks is None
    np.testing.assert_array_equal(found.logits, logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_nothing_waits_until_the_result_and_it_is_the_cpus() -> None:
    logits = torch.from_numpy(logits_of(6, 5, 2000, 7))
    rows = [Draw(0.5, 2.0, 50, 0.9, 0.01), None, Draw(greedy=True), Draw(0.2), Draw(0.7, 1.5, top_k=9)]
    on_device = logits.cuda()
    result(on_device, rows)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        pick(on_device[:4], pack([r for r in rows if r], 2000, "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, wanted = result(on_device, rows), result(logits, rows)
    assert found.picks is not None and wanted.picks is not None
    np.testing.assert_array_equal(found.picks.tokens, wanted.picks.tokens)
    np.testing.assert_allclose(found.picks.logprobs, wanted.picks.logprobs, rtol=1e-5)
    np.testing.assert_array_equal(found.logits, wanted.logits)

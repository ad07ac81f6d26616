"""Every step of sampling is transformers' own, and the draw follows the exact probabilities."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rtp_llm.runtime.grammar import Matcher
from rtp_llm.runtime.sampling import Sampler, _leading, log_softmax, pick
from rtp_llm.runtime.sequence import SamplingParams, Sequence

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers.generation.logits_process")

VOCAB = 23
FAST = settings(max_examples=60, deadline=None, derandomize=True)
token_lists = st.lists(st.integers(0, 4), min_size=1, max_size=14)
seeds = st.integers(0, 10**6)


def sequence(tokens: list[int], prompt_len: int | None = None, eos: tuple[int, ...] = (), **config: Any):
    params = SamplingParams.from_config(config)
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    return Sequence(list(tokens), prompt_len, params, 100, frozenset(eos))


def scores_of(seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=VOCAB)).astype(np.float32)


def processed(s: Sequence, scores: np.ndarray) -> np.ndarray:
    before = scores.copy()
    found = Sampler(VOCAB)._process(s, scores)
    np.testing.assert_array_equal(scores, before)  # the caller's logits are not changed
    return found


def by(processor: Any, tokens: list[int], scores: np.ndarray) -> np.ndarray:
    return processor(torch.tensor([tokens]), torch.from_numpy(scores.copy())[None])[0].numpy()


@FAST
@given(token_lists, seeds, st.floats(0.3, 3))
def test_repetition_penalty_is_transformers(tokens: list[int], seed: int, penalty: float) -> None:
    found = processed(sequence(tokens, repetition_penalty=penalty), scores_of(seed))
    wanted = by(hf.RepetitionPenaltyLogitsProcessor(penalty), tokens, scores_of(seed))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@FAST
@given(token_lists, seeds, st.integers(1, 5))
def test_no_repeat_ngram_is_transformers(tokens: list[int], seed: int, n: int) -> None:
    found = processed(sequence(tokens, no_repeat_ngram_size=n), scores_of(seed))
    wanted = by(hf.NoRepeatNGramLogitsProcessor(n), tokens, scores_of(seed))
    np.testing.assert_array_equal(found, wanted)


@FAST
@given(token_lists, token_lists, seeds, st.integers(2, 4))
def test_a_sampler_that_has_followed_an_answer_asks_of_each_token_what_a_new_one_would(
    prompt: list[int], answer: list[int], seed: int, n: int
) -> None:
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    s = sequence([-1, *prompt], no_repeat_ngram_size=n, **penalties)  # an image slot first
    sampler = Sampler(VOCAB)
    for i, token in enumerate(answer):
        s.tokens.append(token)
        wanted = by(hf.RepetitionPenaltyLogitsProcessor(1.5), s.tokens[1:], scores_of(seed))
        for t in set(answer[: i + 1]):
            wanted[t] -= 0.5 + 0.25 * answer[: i + 1].count(t)
        wanted = by(hf.NoRepeatNGramLogitsProcessor(n), s.tokens, wanted)
        np.testing.assert_allclose(sampler._process(s, scores_of(seed)), wanted, rtol=1e-5)


@FAST
@given(
    token_lists, seeds, st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_bad_words_are_transformers(tokens: list[int], seed: int, words: list[list[int]]) -> None:
    assume(all(len(word) <= len(tokens) for word in words))  # longer ones transformers leaves out
    found = processed(sequence(tokens, bad_words_list=words), scores_of(seed))
    wanted = by(hf.NoBadWordsLogitsProcessor(words), tokens, scores_of(seed))
    np.testing.assert_array_equal(found, wanted)


@FAST
@given(token_lists, seeds, st.integers(0, 6), st.integers(1, 14))
def test_min_new_tokens_is_transformers(tokens: list[int], seed: int, least: int, prompt: int) -> None:
    assume(prompt <= len(tokens))
    s = sequence(tokens, prompt, (2, 7), min_new_tokens=least)
    rule = hf.MinNewTokensLengthLogitsProcessor(prompt, least, [2, 7])
    np.testing.assert_array_equal(processed(s, scores_of(seed)), by(rule, tokens, scores_of(seed)))


@FAST
@given(token_lists, st.integers(0, 14), seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_what_was_generated(
    tokens: list[int], prompt: int, seed: int, presence: float, frequency: float
) -> None:
    prompt = min(prompt, len(tokens))
    config = {"presence_penalty": presence, "frequency_penalty": frequency}
    found = processed(sequence(tokens, prompt, **config), scores_of(seed))
    wanted = scores_of(seed)
    for t in range(VOCAB):
        count = tokens[prompt:].count(t)
        wanted[t] -= (count > 0) * presence + count * frequency
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_image_slots_are_no_words_to_any_penalty() -> None:
    config = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1}
    for image in (-200, VOCAB, VOCAB + 5):
        found = processed(sequence([image] * 4, **config), scores_of(0))
        np.testing.assert_array_equal(found, scores_of(0))


def test_a_vocabularys_edge_may_be_banned() -> None:
    found = processed(sequence([1], bad_words_list=[[0], [VOCAB - 1]]), scores_of(0))
    assert np.flatnonzero(np.isneginf(found)).tolist() == [0, VOCAB - 1]


class Fixed:
    """A random stream that gives the numbers it was told."""

    def __init__(self, values: np.ndarray):
        self._values = iter(values)

    def random(self) -> float:
        return float(next(self._values))


def shares(s: Sequence, scores: np.ndarray, n: int = 400) -> np.ndarray:
    """How often each token is drawn when the random numbers fill [0, 1) evenly."""
    sampler = Sampler(VOCAB)
    sampler.random = Fixed((np.arange(n) + 0.5) / n)  # type: ignore[assignment]
    return np.bincount([sampler(s, scores).token for _ in range(n)], minlength=VOCAB) / n


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seeds,
    st.floats(0.2, 3),
    st.integers(2, VOCAB + 3) | st.just(0),
    st.floats(0.05, 1) | st.just(1.0),
    st.floats(0, 0.9) | st.just(0.0),
)
def test_temperature_top_k_top_p_and_min_p_give_transformers_probabilities(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    config = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    wanted = torch.from_numpy(scores_of(seed))[None]
    warpers: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(hf.TopKLogitsWarper(top_k))
    warpers += [hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)]
    for warper in warpers:
        wanted = warper(torch.tensor([[0]]), wanted)
    probs = torch.softmax(wanted.double(), -1)[0].numpy()
    found = shares(sequence([0], **config), scores_of(seed))
    assert np.abs(found - probs).max() <= 1.01 / 400
    assert not found[probs == 0].any()


def test_ties_at_the_border_of_top_k_stay_as_in_transformers() -> None:
    scores = np.zeros(VOCAB, np.float32)
    scores[[3, 5, 7]] = 2
    found = shares(sequence([0], top_k=2), scores)
    np.testing.assert_allclose(found[[3, 5, 7]], 1 / 3, atol=1 / 400)
    wanted = by(hf.TopKLogitsWarper(2), [0], scores)
    np.testing.assert_array_equal(found > 0, np.isfinite(wanted))


def test_top_p_zero_leaves_the_best() -> None:
    scores = scores_of(4)
    assert shares(sequence([0], top_p=0.0), scores, 50)[scores.argmax()] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_no_temperature_is_too_small(temperature: float) -> None:
    scores = scores_of(4)
    assert shares(sequence([0], temperature=temperature), scores, 50)[scores.argmax()] == 1


def test_the_draw_follows_the_probabilities() -> None:
    scores = np.full(VOCAB, -np.inf, np.float32)
    scores[:10] = scores_of(1)[:10] / 3
    probs = torch.softmax(torch.from_numpy(scores).double(), -1).numpy()[:10]
    sampler, n = Sampler(VOCAB, 0, 1234), 20000
    s = sequence([0])
    counts = np.bincount([sampler(s, scores).token for _ in range(n)], minlength=VOCAB)
    assert not counts[10:].any()
    statistic = float(((counts[:10] - n * probs) ** 2 / (n * probs)).sum())
    assert statistic < 27.88  # chi-square, 9 degrees of freedom, one in a thousand


@pytest.mark.parametrize("config", [{"top_k": 1}, {"do_sample": False}, {"temperature": 0}])
def test_greedy_takes_the_largest_after_the_processors(config: dict[str, Any]) -> None:
    scores = scores_of(2)
    best, second = np.argsort(-scores)[:2]
    assert Sampler(VOCAB)(sequence([0], **config), scores).token == best
    banned = sequence([0], **config, bad_words_list=[[int(best)]])
    assert Sampler(VOCAB)(banned, scores).token == second


def draw(sampler: Sampler, s: Sequence, n: int = 30) -> list[int]:
    return [sampler(s, scores_of(i)).token for i in range(n)]


def test_the_same_seed_draws_the_same_and_another_seed_or_answer_does_not() -> None:
    s = sequence([0])
    first = draw(Sampler(VOCAB, 0, 5), s)
    assert first == draw(Sampler(VOCAB, 0, 5), s)
    assert first != draw(Sampler(VOCAB, 0, 6), s)
    assert first != draw(Sampler(VOCAB, 1, 5), s)
    assert draw(Sampler(VOCAB), s) != draw(Sampler(VOCAB), s)


def test_any_64_bit_seed_is_taken_signed_or_not() -> None:
    s = sequence([0])
    for seed in (-1, -(2**63), 2**64 - 1, 0):
        assert draw(Sampler(VOCAB, 0, seed), s) == draw(Sampler(VOCAB, 0, seed), s)


def test_a_sampler_does_not_hear_of_others() -> None:
    s = sequence([0])
    alone = draw(Sampler(VOCAB, 0, 5), s)
    mine, other = Sampler(VOCAB, 0, 5), Sampler(VOCAB, 0, 9)
    found = []
    for i in range(30):
        other(s, scores_of(i))
        found.append(mine(s, scores_of(i)).token)
    assert found == alone


def test_a_token_takes_one_number_from_the_stream_whether_it_is_drawn_or_called_for() -> None:
    s = sequence([0], temperature=2.0, top_p=0.9)
    called, mixed = Sampler(VOCAB, 0, 5), Sampler(VOCAB, 0, 5)
    for i in range(30):
        wanted = called(s, scores_of(i)).token
        drawn = mixed.draw(s) if i % 3 else None
        assert (pick(scores_of(i), drawn) if drawn else mixed(s, scores_of(i)).token) == wanted


def test_what_a_grammar_allows_only_the_host_knows() -> None:
    s, matcher = sequence([0]), cast(Matcher, object())
    assert Sampler(VOCAB).draw(s) and Sampler(VOCAB, matcher=matcher).draw(s) is None


@FAST
@given(seeds, st.floats(0.01, 1000))
def test_log_softmax_is_torchs(seed: int, scale: float) -> None:
    x = np.random.default_rng(seed).normal(size=(3, VOCAB)).astype(np.float32) * np.float32(scale)
    wanted = torch.log_softmax(torch.from_numpy(x).double(), -1).numpy()
    np.testing.assert_allclose(log_softmax(x), wanted, rtol=1e-12, atol=1e-12)


def test_log_probabilities_are_of_the_raw_logits_whatever_the_sampling() -> None:
    scores = scores_of(3)
    logp = torch.log_softmax(torch.from_numpy(scores).double(), -1).numpy()
    s = sequence(
        [1, 2], temperature=0.3, top_k=4, repetition_penalty=1.5, top_logprobs=5,
        return_all_probs=True, return_logits=True,
    )  # fmt: skip
    sampled = Sampler(VOCAB, 0, 1)(s, scores)
    assert sampled.logprob == pytest.approx(logp[sampled.token])
    best = np.argsort(-logp)[:5]
    assert [t for t, _ in sampled.top] == best.tolist()
    np.testing.assert_allclose([p for _, p in sampled.top], logp[best])
    np.testing.assert_allclose(sampled.probs, np.exp(logp))
    np.testing.assert_array_equal(sampled.logits, scores)
    assert sampled.logits is not scores  # the backend may use its buffer again


def test_top_logprobs_of_equal_tokens_come_by_id() -> None:
    sampled = Sampler(VOCAB)(sequence([0], top_k=1, top_logprobs=4), np.zeros(VOCAB, np.float32))
    logprob = pytest.approx(-np.log(VOCAB))
    assert len(sampled.top) == 4 and all(p == logprob for _, p in sampled.top)
    ids = [t for t, _ in sampled.top]
    assert ids == sorted(ids)


def test_what_was_not_asked_for_is_not_computed() -> None:
    sampled = Sampler(VOCAB)(sequence([0]), scores_of(0))
    assert sampled.logprob is None and sampled.logits is None and sampled.probs is None
    assert sampled.top == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seeds, st.integers(257, 5000), st.floats(0.01, 0.9999), st.sampled_from([0.0, 0.1]), st.integers(0, 4)
)
def test_of_a_large_vocabulary_only_what_may_be_kept_is_sorted(
    seed: int, vocab: int, top_p: float, min_p: float, digits: int
) -> None:
    probs = np.exp(np.random.default_rng(seed).normal(size=vocab).round(digits) * 4)  # with ties
    probs /= probs.sum()
    found, whole = _leading(probs, top_p, min_p), np.argsort(-probs, kind="stable")
    np.testing.assert_array_equal(found, whole[: len(found)])
    kept = probs[whole] >= min_p * probs.max()
    kept &= np.cumsum(probs[whole]) - probs[whole] < top_p
    assert len(found) >= np.flatnonzero(kept).max() + 1

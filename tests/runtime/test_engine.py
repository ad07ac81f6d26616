"""Each answer equals what its request alone gives, whatever else happens to the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.errors import GenerationTimeout, InternalError, PromptTooLong, RtpLlmError, VisionFailed
from rtp_llm.export.bundle import ModelSpec, RopeSpec
from rtp_llm.runtime.backends.fake import FakeBackend
from rtp_llm.runtime.block_cache import BlockCache
from rtp_llm.runtime.engine import Engine, prompt_losses
from rtp_llm.runtime.sampling import Sampled, Sampler
from rtp_llm.runtime.sequence import ImageSpan, Row, SamplingParams, Sequence
from rtp_llm.runtime.speculation import PromptLookup
from rtp_llm.runtime.step import Draw, Result, Step

VOCAB, WAIT = 50, 20
MODEL = ModelSpec("f", "A", VOCAB, 4, 1, 1, 1, 16, 256, RopeSpec("linear", [256]), "gqa", 0)
IMAGES = {bytes([i]): np.full((2, 2, 3), 10 * i + 1, np.uint8) for i in range(4)}


@pytest.fixture(scope="module", params=["slots", "blocks", "blocks, samples"], autouse=True)
def kind(request: pytest.FixtureRequest) -> str:
    """Every promise holds over slots and over blocks, and whoever picks the tokens."""
    Backend.kind = request.param
    return request.param


class Backend(FakeBackend):
    """Records its steps, and breaks on order."""

    kind = "slots"

    def __init__(self, **options: Any):
        super().__init__(MODEL, paged="blocks" in self.kind, samples="samples" in self.kind, **options)
        self.shapes: list[list[int]] = []
        self.encoded: list[int] = []
        self.released: list[tuple[int, int]] = []
        self.broken_step = 0  # the step with this number fails
        self.broken_pixel = -1  # a batch with this pixel fails
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.encoded += pixels[:, 0, 0, 0].tolist()
        if (pixels == self.broken_pixel).any():
            raise MemoryError("no room")
        return super().encode(pixels)

    def step(self, step: Step) -> Result:
        self.entered.set()
        assert self.gate.wait(WAIT)
        self.shapes.append(step.counts)
        if len(self.shapes) == self.broken_step:
            raise OSError("device lost")
        return super().step(step)

    def copy(self, source: int, target: int, tokens: int) -> None:
        assert not self.paged
        super().copy(source, target, tokens)

    def release(self, slot: int, keep: int = 0) -> None:
        assert not self.paged
        self.released.append((slot, keep))
        super().release(slot, keep)


class Inline(Executor):
    """Encodes pictures at once, in the test's own thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()


class Heard:
    """A listener that remembers, and checks that nothing follows the end."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.tokens: list[int] = []
        self.sampled: list[Sampled] = []
        self.losses_: list[np.ndarray] = []
        self.ends: list[tuple[str, RtpLlmError | None]] = []
        self.done = threading.Event()
        self.on_token: Callable[[], None] = lambda: None

    def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
        assert not self.ends
        self.tokens.append(sampled.token)
        self.sampled.append(sampled)
        self.on_token()
        return "stop" if len(self.tokens) == self.stop_after else None

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        assert not self.ends and not self.tokens
        self.losses_.append(losses)

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        self.ends.append((reason, error))
        self.done.set()

    @property
    def reason(self) -> str:
        (end,) = self.ends  # exactly once
        return end[0]

    @property
    def error(self) -> RtpLlmError | None:
        (end,) = self.ends
        return end[1]


class Ask:
    """One request: text with images at its start, and who listens."""

    def __init__(
        self, text: list[int], images: tuple[int, ...] = (), new: int = 5, eos: tuple[int, ...] = (),
        stop_after: int | None = None, embedded: bool = False, **config: Any,
    ):  # fmt: skip
        tokens, spans = [], []
        key = {i: bytes([i, 1] if embedded else [i]) for i in images}
        for i in images:
            tokens.append(1)
            spans.append(ImageSpan(len(tokens), 4, key[i]))
            tokens += [-200] * 4
        params = SamplingParams.from_config(config)
        tokens += text
        self.sequence = Sequence(tokens, len(tokens), params, new, frozenset(eos), spans)
        self.heard = Heard(stop_after)
        self.images = {key[i]: IMAGES[bytes([i])] for i in images}
        if embedded:  # encoded already
            self.images = {k: FakeBackend(MODEL).encode(p[None])[0] for k, p in self.images.items()}
        self.sampler = lambda: Sampler(VOCAB, 0, params.random_seed or 0)
        self.prompt = list(tokens)

    def submit(self, engine: Engine) -> Ask:
        engine.submit(self.sequence, self.sampler(), self.heard, self.images)
        return self

    def wait(self) -> Ask:
        assert self.heard.done.wait(WAIT)
        return self

    def alone(self) -> tuple[list[int], str]:
        """Tokens and reason by a plain loop over the fake model."""
        s = self.sequence
        own = Sequence(list(self.prompt), len(self.prompt), s.params, s.max_new_tokens, s.eos_ids)
        sampler, out = self.sampler(), []
        while len(out) < s.max_new_tokens:
            logits = np.zeros(VOCAB, np.float32)
            values = list(own.tokens)
            for span in s.images:
                pixels = IMAGES[span.key[:1]].astype(int).sum() % 1000
                values[span.start : span.start + span.length] = [pixels] * span.length
            logits[FakeBackend.next_token(values, VOCAB)] = 10
            token = sampler(own, logits).token
            own.tokens.append(token)
            out.append(token)
            if len(out) == self.heard.stop_after or token in s.eos_ids:
                return out, "stop"
        return out, "length"


class Guess(PromptLookup):
    """Drafts of what comes, each right up to a place that is given, and wrong behind it."""

    def __init__(self, ask: Ask, right: list[int]):
        self.answer, self.right, self.calls = ask.alone()[0], right, 0
        self.prompt, self.most, self.told = len(ask.prompt), 0, (0, 0)

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        done = len(tokens) - self.prompt
        assert tokens[self.prompt :] == self.answer[:done]
        right = self.right[self.calls % len(self.right)]
        self.calls += 1
        coming = self.answer[done:] + [0] * 9
        draft = [t if i < right else (t + 1) % VOCAB for i, t in enumerate(coming)][: max(0, min(8, limit))]
        self.most = min(right, len(draft), max(0, len(self.answer) - done))
        return draft

    def heard(self, tokens: int, drafted: int, accepted: int) -> None:
        assert accepted <= self.most <= drafted
        self.told = self.told[0] + drafted, self.told[1] + accepted


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Backend(), MODEL, token_budget=16)
    yield made
    made.stop()


def backend_of(engine: Engine) -> Backend:
    assert isinstance(engine.backend, Backend)
    return engine.backend


def free(engine: Engine) -> None:
    """Nobody holds anything any more, and what is kept for later goes when it is told to."""
    assert engine.scheduler.idle and not engine._jobs
    cache = engine.cache
    assert cache.used == cache.retained
    cache.clear()
    assert cache.used == 0 and not any(cache.holders) and not cache._index
    places = cache._places if isinstance(cache, BlockCache) else cache._empty
    assert sorted(places) == list(range(cache.slots))
    assert not engine.images._holders and not engine.images._pixels and not engine.images._encoding


def by_hand(**options: Any) -> Engine:
    """An engine whose rounds the test takes itself."""
    own = {name: options.pop(name) for name in ("token_budget", "image_cache_bytes", "max_running")
           if name in options}  # fmt: skip
    mixes = options.pop("mixes", True)
    engine = Engine(Backend(**options), MODEL, **{"token_budget": 20, "image_cache_bytes": 2**20} | own)
    engine.backend.mixes = mixes
    engine._thread, engine._vision = threading.current_thread(), Inline()
    return engine


def round_(engine: Engine) -> None:
    try:
        engine._take_in()
        engine.step()
    except Exception as e:
        engine._fail_all(e)


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    config: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"top_k": 1},
                {"top_k": 1, "repetition_penalty": 1.3},
                {"random_seed": 3, "temperature": 3.0},
                {"random_seed": 4, "temperature": 5.0, "top_p": 0.9},
                {"top_k": 1, "calculate_loss": 2},
                {"random_seed": 5, "temperature": 4.0, "top_k": 7, "min_p": 0.05, "min_new_tokens": 3},
                {"random_seed": 6, "temperature": 4.0, "logprobs": True},
                {"random_seed": 7, "temperature": 6.0, "bad_words_list": [[4], [8, 9]]},
            ]
        )
    )
    config["reuse_cache"] = draw(st.sampled_from([True, True, False]))
    # beginnings that prompts share, to the block and not
    shared = list(range(draw(st.sampled_from([0, 0, 15, 16, 33, 40]))))
    ask = Ask(
        shared + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40 - len(shared) // 2)),
        tuple(draw(st.lists(st.integers(0, 3), max_size=3))),
        draw(st.integers(0, 8)),
        draw(st.sampled_from([(), (), tuple(range(10))])),
        draw(st.none() | st.integers(1, 6)),
        draw(st.booleans()),
        **config,
    )
    if draw(st.booleans()):
        ask.sequence.lookup = Guess(ask, draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)))
    return ask


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mix_of_requests_cancellations_and_timeouts_leaves_each_its_own_answer(
    data: st.DataObject,
) -> None:
    engine = by_hand(
        slots=data.draw(st.integers(1, 5)),
        slot_tokens=96,
        budget_blocks=data.draw(st.integers(6, 24)),
        token_budget=data.draw(st.integers(1, 40)),
        image_cache_bytes=data.draw(st.sampled_from([0, 200, 2**20])),
        max_running=data.draw(st.integers(1, 4)),
        mixes=data.draw(st.booleans()),
    )
    everyone: list[Ask] = []
    hurried: set[Ask] = set()
    for action in data.draw(st.lists(st.sampled_from("aaassssct"), max_size=30)):
        if action == "a":
            everyone.append(data.draw(asks()).submit(engine))
        elif action == "s":
            round_(engine)
        elif everyone:
            ask = data.draw(st.sampled_from(everyone))
            hurried.add(ask)
            if action == "c":
                engine.cancel(ask.sequence)
            else:
                ask.sequence.deadline = 0.0
    for _ in range(600):
        if all(a.heard.ends for a in everyone) and not engine._inbox:
            break
        round_(engine)
    for ask in everyone:
        tokens, reason = ask.alone()
        if ask in hurried and ask.heard.reason in ("cancelled", "error"):
            assert ask.heard.tokens == tokens[: len(ask.heard.tokens)]
            timeout = isinstance(ask.heard.error, GenerationTimeout)
            assert timeout or ask.heard.reason == "cancelled"
        else:
            assert (ask.heard.tokens, ask.heard.reason) == (tokens, reason)
            assert ask.heard.error is None
            assert ask.sequence.tokens == ask.prompt + tokens
    engine._take_in()
    free(engine)
    assert all(len(counts) <= engine.scheduler.max_running for counts in backend_of(engine).shapes)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(asks(), min_size=1, max_size=8), st.integers(0, 10))
def test_a_stop_at_any_time_ends_everyone_once_and_the_next_request_starts_anew(
    everyone: list[Ask], tokens: int
) -> None:
    engine = Engine(Backend(slots=2), MODEL, token_budget=16)
    reached = threading.Semaphore(0)
    for ask in everyone:
        ask.heard.on_token = reached.release
        ask.submit(engine)
    for _ in range(min(tokens, sum(len(a.alone()[0]) for a in everyone))):
        assert reached.acquire(timeout=WAIT)
    engine.stop()
    for ask in everyone:
        wanted, reason = ask.alone()
        assert ask.heard.reason in (reason, "cancelled")
        assert ask.heard.tokens == wanted[: len(ask.heard.tokens)]
    free(engine)
    assert len(engine.images) == 0
    again = Ask([1, 2, 3], (1,), 4, top_k=1).submit(engine).wait()
    assert (again.heard.tokens, again.heard.reason) == again.alone()
    engine.stop()
    engine.stop()
    free(engine)


def test_a_stopped_engine_has_no_thread(engine: Engine) -> None:
    before = threading.enumerate()
    Ask([1, 2], (1,)).submit(engine).wait()
    mine = [t for t in threading.enumerate() if t not in before]
    assert len(mine) == 2
    engine.stop()
    assert engine._thread is None and not any(t.is_alive() for t in mine)


def test_a_stop_before_anything_is_nothing() -> None:
    Engine(Backend(), MODEL).stop()


def test_threads_that_submit_together_share_steps(engine: Engine) -> None:
    backend = backend_of(engine)
    backend.gate.clear()  # all arrive while the first step runs
    Ask([9], new=1).submit(engine)
    assert backend.entered.wait(WAIT)
    everyone = [Ask([i, i + 1], new=20, top_k=1) for i in range(12)]
    threads = [threading.Thread(target=ask.submit, args=(engine,)) for ask in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    backend.gate.set()
    for ask in everyone:
        ask.wait()
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
    # three groups of four slots, twenty tokens each, where one by one takes 240
    assert backend.steps <= 70
    assert max(map(len, backend.shapes)) == 4


def test_one_step_mixes_a_chunk_of_a_prompt_with_a_decode() -> None:
    engine = by_hand()
    old, new = Ask([1, 2], new=6, top_k=1).submit(engine), Ask(list(range(40)), new=3, top_k=1)
    round_(engine)
    new.submit(engine)
    round_(engine)
    assert backend_of(engine).shapes == [[2], [1, 19]]
    while not (old.heard.ends and new.heard.ends):
        round_(engine)
    for ask in (old, new):
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()


@pytest.mark.parametrize("rounds", range(9))
def test_a_cancel_at_any_stage_frees_the_slot_its_blocks_and_its_images(rounds: int) -> None:
    engine = by_hand(slots=1)
    gone = Ask(list(range(30)), (0, 1), 50, top_k=1).submit(engine)
    stays = Ask([5, 6], (1, 2), 3, top_k=1).submit(engine)
    for _ in range(rounds):
        round_(engine)
    assert not gone.heard.ends
    engine.cancel(gone.sequence)
    engine.cancel(gone.sequence)  # twice is once
    round_(engine)
    assert gone.heard.reason == "cancelled"
    assert gone.sequence.slot == -1 and not gone.sequence.blocks
    while not stays.heard.ends:
        round_(engine)
    assert (stays.heard.tokens, stays.heard.reason) == stays.alone()
    engine.cancel(stays.sequence)  # it has ended already
    engine._take_in()
    assert stays.heard.reason == "length"
    free(engine)


def test_the_same_image_of_many_requests_is_encoded_once(engine: Engine) -> None:
    everyone = [Ask([i], (2, 3), 2, top_k=1).submit(engine) for i in range(6)]
    for ask in everyone:
        ask.wait()
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
    assert sorted(backend_of(engine).encoded) == [21, 31]


def test_an_encoder_elsewhere_is_asked_in_place_of_the_backend() -> None:
    asked: list[int] = []

    def encode(pixels: np.ndarray) -> np.ndarray:
        asked.append(len(pixels))
        return FakeBackend(MODEL).encode(pixels)

    engine = Engine(Backend(), MODEL, encode=encode)
    ask = Ask([3], (0, 1, 2), top_k=1).submit(engine).wait()
    assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
    engine.stop()
    assert sum(asked) == 3 and not backend_of(engine).encoded


def test_a_failed_image_batch_hurts_only_its_own_requests() -> None:
    engine = by_hand()
    engine.images.batch = 2
    backend_of(engine).broken_pixel = 11  # image 1
    bad = Ask([1], (0, 1)).submit(engine)
    shares = Ask([2], (1,)).submit(engine)
    good = Ask([3], (2, 3), 4, top_k=1).submit(engine)
    text = Ask([4], (), 4, top_k=1).submit(engine)
    for _ in range(12):
        round_(engine)
    for ask in (bad, shares):
        assert isinstance(ask.heard.error, VisionFailed) and ask.heard.error.code == 907
        assert "no room" in str(ask.heard.error) and not ask.heard.tokens
    for ask in (good, text):
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
    free(engine)
    backend_of(engine).broken_pixel = -1
    again = Ask([2], (1,), 3, top_k=1).submit(engine)  # it gets another chance
    for _ in range(5):
        round_(engine)
    assert (again.heard.tokens, again.heard.reason) == again.alone()


def test_a_broken_step_ends_everyone_with_an_error_and_the_next_is_served(engine: Engine) -> None:
    backend = backend_of(engine)
    backend.broken_step = 3
    backend.gate.clear()
    everyone = [Ask([i, 2], new=50, top_k=1).submit(engine) for i in range(6)]
    backend.gate.set()
    for ask in everyone:
        ask.wait()
        assert ask.heard.reason == "error" and isinstance(ask.heard.error, InternalError)
        assert "device lost" in str(ask.heard.error)
    again = Ask([7, 8], (1,), 4, top_k=1).submit(engine).wait()
    assert (again.heard.tokens, again.heard.reason) == again.alone()
    engine.stop()
    free(engine)


def test_a_timeout_ends_a_running_and_a_waiting_sequence_and_says_which_limit() -> None:
    engine = by_hand(slots=1)
    runs = Ask([1], new=50, top_k=1, timeout_ms=7).submit(engine)
    waits = Ask([1], new=50, top_k=1, timeout_ms=8).submit(engine)
    stays = Ask([3], new=4, top_k=1).submit(engine)
    round_(engine)
    runs.sequence.deadline = waits.sequence.deadline = time.monotonic()
    for _ in range(6):
        round_(engine)
    for ask, limit in ((runs, 7), (waits, 8)):
        assert isinstance(ask.heard.error, GenerationTimeout) and ask.heard.error.code == 514
        assert str(ask.heard.error) == f"timeout_ms={limit} is over"
    assert (stays.heard.tokens, stays.heard.reason) == stays.alone()
    free(engine)


def test_a_sequence_that_can_never_fit_is_refused_and_holds_up_nobody() -> None:
    engine = by_hand(slots=2, slot_tokens=64)
    long = Ask([1] * 60, (1,), 10).submit(engine)
    short = Ask([2], new=4, top_k=1).submit(engine)
    for _ in range(5):
        round_(engine)
    assert isinstance(long.heard.error, PromptTooLong)
    assert (short.heard.tokens, short.heard.reason) == short.alone()
    free(engine)


def test_no_new_tokens_computes_the_prompt_and_ends(engine: Engine) -> None:
    ask = Ask([1, 2, 3], new=0).submit(engine).wait()
    assert ask.heard.tokens == [] and ask.heard.reason == "length"
    assert ask.sequence.computed == 3


def test_iterations_count_the_steps_of_a_sequence() -> None:
    engine = by_hand()
    ask = Ask([1] * 50, new=5, top_k=1).submit(engine)
    while not ask.heard.ends:
        round_(engine)
    assert ask.sequence.iterations == 3 + 4  # chunks of 20, 20, 10 with a token, and four more
    assert ask.sequence.started > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=150),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(4, 200),
)
def test_losses_are_the_cross_entropy_of_every_word_however_the_prompt_is_cut(
    text: list[int], images: list[int], budget: int
) -> None:
    engine = by_hand(token_budget=budget, slot_tokens=256)
    ask = Ask(text, tuple(images), 2, top_k=1, calculate_loss=2).submit(engine)
    while not ask.heard.ends:
        round_(engine)
    losses = np.concatenate(ask.heard.losses_) if ask.heard.losses_ else np.empty(0)
    tokens = ask.prompt
    assert losses.shape == (len(tokens) - 1,)
    values = list(tokens)
    for span in ask.sequence.images:
        pixels = IMAGES[span.key].astype(int).sum() % 1000
        values[span.start : span.start + span.length] = [pixels] * span.length
    for i, loss in enumerate(losses):
        if tokens[i + 1] < 0:
            assert np.isnan(loss)
            continue
        guess = FakeBackend.next_token(values[: i + 1], VOCAB)
        partition = np.log(np.exp(10.0) + VOCAB - 1)
        wanted = partition - (10.0 if guess == tokens[i + 1] else 0.0)
        assert loss == pytest.approx(wanted)
    assert (ask.heard.tokens, ask.heard.reason) == ask.alone()


def test_a_chunks_losses_are_numpys_formula_and_its_last_row_predicts_the_next_chunk() -> None:
    tokens = [3, 7, -200, -200, 1, 4]
    s = Sequence(tokens, 6, SamplingParams(), 1, frozenset(), [ImageSpan(2, 2, b"k")])
    logits = np.random.default_rng(0).normal(size=(6, VOCAB)).astype(np.float32)
    x = logits.astype(np.float64)
    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    wanted = [-logp[0, 7], np.nan, np.nan, -logp[3, 1], -logp[4, 4]]
    whole = prompt_losses(Row(s, 0, 6, "all"), logits)
    np.testing.assert_allclose(whole, wanted)
    for cut in range(1, 6):
        first = prompt_losses(Row(s, 0, cut, "all"), logits[:cut])
        rest = prompt_losses(Row(s, cut, 6 - cut, "all"), logits[cut:])
        np.testing.assert_allclose(np.concatenate([first, rest]), wanted)


# ------------------------------------------------------------------------- who picks the tokens

PLAIN: list[dict[str, Any]] = [
    {"top_k": 1},
    {"do_sample": False, "logprobs": True},
    {"random_seed": 1, "temperature": 4.0},
    {"random_seed": 2, "temperature": 5.0, "top_p": 0.8},
    {"random_seed": 3, "temperature": 4.0, "top_k": 5, "return_cum_log_probs": True},
    {"random_seed": 4, "temperature": 5.0, "min_p": 0.01, "logprobs": True},
    {"random_seed": 5, "temperature": 4.0, "bad_words_list": [[1, 2, 3, 4]]},  # never comes near
]
SEEN: list[dict[str, Any]] = [
    {"top_k": 1, "repetition_penalty": 1.3},
    {"random_seed": 6, "temperature": 4.0, "presence_penalty": 1.0},
    {"random_seed": 7, "temperature": 4.0, "frequency_penalty": 1.0},
    {"random_seed": 8, "temperature": 4.0, "bad_words_list": [[4]]},
    {"random_seed": 9, "temperature": 4.0, "return_logits": True},
    {"random_seed": 10, "temperature": 4.0, "return_all_probs": True},
    {"random_seed": 11, "temperature": 4.0, "top_logprobs": 2},
    {"top_k": 1, "min_new_tokens": 12},
]


def on_a_device(backend: FakeBackend) -> None:
    """Its logits go through what torch backends sample with."""
    torch = pytest.importorskip("torch")
    from rtp_llm.runtime.backends.device_sampling import result

    logits = FakeBackend(MODEL, slots=5, paged=True).step
    backend.step = lambda step: result(  # type: ignore[method-assign]
        torch.from_numpy(logits(step).logits), step.draws
    )


@pytest.mark.parametrize("device", ["numpy", "torch"])
def test_a_backend_that_samples_gives_the_hosts_texts_and_sends_only_the_logits_that_are_wanted(
    device: str,
) -> None:
    everyone: dict[bool, list[Ask]] = {}
    for samples in (False, True):
        backend = FakeBackend(MODEL, slots=5, paged=True, samples=samples)
        if samples and device == "torch":
            on_a_device(backend)
        sent: list[int] = []
        step = backend.step

        def counted(one: Step, step: Any = step, sent: list[int] = sent) -> Result:
            result = step(one)
            sent.append(0 if result.logits is None else len(result.logits))
            return result

        backend.step = counted  # type: ignore[method-assign]
        engine = Engine(backend, MODEL, 32)
        engine._thread = threading.current_thread()
        everyone[samples] = [
            Ask([*range(i, 20 + i)], new=12, eos=(49,), **config).submit(engine)
            for i, config in enumerate(PLAIN + SEEN)
        ]
        while not all(a.heard.ends for a in everyone[samples]):
            round_(engine)
        free(engine)
        on_host = everyone[samples][len(PLAIN) if samples else 0 :]
        assert sum(sent) == sum(len(ask.heard.tokens) for ask in on_host) > 0
    for host, device in zip(everyone[False], everyone[True], strict=True):
        assert device.heard.tokens == host.heard.tokens == host.alone()[0]
        for mine, wanted in zip(device.heard.sampled, host.heard.sampled, strict=True):
            assert (mine.logprob is None) == (wanted.logprob is None) and mine.top == wanted.top
            assert mine.logprob is None or mine.logprob == pytest.approx(wanted.logprob, rel=1e-6)


def test_a_ban_that_ends_hands_the_same_stream_of_numbers_to_the_device() -> None:
    engine = by_hand()
    config: dict[str, Any] = {"random_seed": 4, "temperature": 4.0, "min_new_tokens": 3}
    ask = Ask([1, 2, 3], new=9, eos=(48,), **config).submit(engine)
    seen: list[bool] = []
    draw = engine._inbox[0].sampler.draw
    engine._inbox[0].sampler.draw = lambda s: (lambda d: (seen.append(d is None), d)[1])(draw(s))
    while not ask.heard.ends:
        round_(engine)
    assert (ask.heard.tokens, ask.heard.reason) == ask.alone() and len(ask.heard.tokens) > 3
    if engine.backend.samples:
        assert seen == [True] * 3 + [False] * (len(ask.heard.tokens) - 3)


# ------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize("right", [[0], [8], [3], [8, 0, 1, 2]])
@pytest.mark.parametrize("config", [{"top_k": 1}, {"random_seed": 3, "temperature": 4.0, "top_p": 0.9}])
def test_drafts_save_steps_and_change_neither_the_tokens_nor_what_is_told_of_them(
    right: list[int], config: dict[str, Any]
) -> None:
    told = {"logprobs": True, "top_logprobs": 2, "return_logits": True, "repetition_penalty": 1.1}
    plain, drafted = (Ask([1, 2, 3], (1,), new=40, **config, **told) for _ in range(2))
    drafted.sequence.lookup = guess = Guess(drafted, right)
    engines = by_hand(), by_hand()
    for engine, ask in zip(engines, (plain, drafted), strict=True):
        answer(engine, ask)
    for one, other in zip(plain.heard.sampled, drafted.heard.sampled, strict=True):
        assert (one.token, one.logprob, one.top) == (other.token, other.logprob, other.top)
        np.testing.assert_array_equal(one.logits, other.logits)
    s, stats = drafted.sequence, engines[1].stats()
    assert (s.drafted, s.accepted) == (stats.drafted_tokens, stats.accepted_tokens) == guess.told
    assert s.iterations == plain.sequence.iterations - s.accepted
    assert (s.accepted > 0) == any(right) and stats.generated_tokens == 40
    free(engines[1])


@pytest.mark.parametrize("ending", [{"stop_after": 5}, {"eos": tuple(range(0, VOCAB, 7))}])
def test_an_answer_that_ends_within_a_draft_ends_there(ending: dict[str, Any]) -> None:
    engine = by_hand()
    ask = Ask([1, 2, 3], new=40, top_k=1, **ending)
    assert len(ask.alone()[0]) < 40
    ask.sequence.lookup = Guess(ask, [8])
    answer(engine, ask)
    free(engine)


def test_a_step_counts_drafts_and_a_prompt_beside_them_goes_on() -> None:
    engine = by_hand(token_budget=40, slots=2)
    ask = Ask([1, 2, 3], new=60, top_k=1)
    ask.sequence.lookup = Guess(ask, [8])
    ask.submit(engine)
    round_(engine)
    other = Ask([5] * 100, new=1, top_k=1).submit(engine)
    round_(engine)
    assert sorted(backend_of(engine).shapes[-1]) == [9, 31]
    for _ in range(20):
        round_(engine)
    assert (ask.heard.tokens, other.heard.tokens) == (ask.alone()[0], other.alone()[0])


def test_drafts_fill_a_step_up_to_16_tokens_and_go_to_who_came_first() -> None:
    engine = by_hand(token_budget=200, slots=4)
    everyone = [Ask([i, 2, 3], new=60, top_k=1) for i in range(4)]
    for ask in everyone:
        ask.sequence.lookup = Guess(ask, [8])
        ask.submit(engine)
    round_(engine)
    round_(engine)
    assert backend_of(engine).shapes[-1] == [9, 5, 1, 1]
    while not all(ask.heard.ends for ask in everyone):
        round_(engine)
    assert all(ask.heard.tokens == ask.alone()[0] for ask in everyone)
    free(engine)


def test_a_backend_that_gains_nothing_by_drafts_gets_none() -> None:
    engine = by_hand()
    engine.scheduler.drafts = False
    ask = Ask([1, 2, 3], new=20, top_k=1)
    ask.sequence.lookup = Guess(ask, [8])
    assert answer(engine, ask).sequence.drafted == 0


# ---------------------------------------------------------------------------------- what is kept


def answer(engine: Engine, ask: Ask) -> Ask:
    ask.submit(engine)
    for _ in range(300):
        if ask.heard.ends:
            assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
            return ask
        round_(engine)
    raise AssertionError("it never ends")


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs() -> None:
    engine = by_hand(token_budget=64)
    text = list(range(40))
    assert answer(engine, Ask([*text, 1], top_k=1)).sequence.reused == 0
    before = sum(map(sum, backend_of(engine).shapes))
    assert answer(engine, Ask([*text, 2], new=1, top_k=1)).sequence.reused == 32
    assert sum(map(sum, backend_of(engine).shapes)) == before + 41 - 32
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.reused_tokens) == (82, 32)


def test_images_of_equal_size_and_other_content_share_nothing() -> None:
    engine = by_hand()
    text = list(range(40))
    answer(engine, Ask(text, (0,), top_k=1))
    assert answer(engine, Ask(text, (1,), top_k=1)).sequence.reused == 0
    assert answer(engine, Ask(text, (0,), top_k=1)).sequence.reused == 32


def test_salts_and_rope_tables_share_nothing() -> None:
    engine = by_hand()
    for salt, table in ((b"a", 0), (b"b", 0), (b"a", 1)):
        for reused in (0, 32):
            ask = Ask(list(range(40)), top_k=1)
            ask.sequence.salt, ask.sequence.rope_table = salt, table
            assert answer(engine, ask).sequence.reused == reused


def test_an_answer_is_not_reused_only_prompts_are() -> None:
    """Decode computes an answer's tokens with another kernel than prefill would."""
    engine = by_hand()
    first = answer(engine, Ask(list(range(20)), new=40, top_k=1))
    again = Ask([*first.prompt, *first.heard.tokens], top_k=1)
    assert answer(engine, again).sequence.reused == 16


def test_without_reuse_cache_nothing_is_kept() -> None:
    engine = by_hand()
    answer(engine, Ask(list(range(40)), top_k=1, reuse_cache=False))
    assert engine.cache.used == 0
    assert answer(engine, Ask(list(range(40)), top_k=1)).sequence.reused == 0


def test_several_answers_share_one_prefill() -> None:
    engine = by_hand(token_budget=128)
    everyone = [Ask(list(range(40)), (0,), new=2, top_k=1) for _ in range(4)]
    for ask in everyone:
        ask.sequence.leader = everyone[0].sequence if ask is not everyone[0] else None
        ask.submit(engine)
    while not all(a.heard.ends for a in everyone):
        round_(engine)
    assert all((a.heard.tokens, a.heard.reason) == a.alone() for a in everyone)
    # 45 tokens once, the 13 behind the last full block by each, and a decode each
    assert sum(map(sum, backend_of(engine).shapes)) == 45 + 3 * 13 + 4


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("mixes", [True, False])
def test_whoever_loses_its_place_answers_as_if_nothing_had_happened(mixes: bool, drafts: bool) -> None:
    engine = by_hand(slots=4, slot_tokens=96, budget_blocks=8, mixes=mixes)
    config: dict[str, Any] = {"random_seed": 5, "temperature": 4.0}
    everyone = [
        Ask([i, i + 1, 7], (i % 2,), new=60, embedded=i > 1, **config) for i in range(4)
    ]
    for ask in everyone:
        ask.sequence.lookup = Guess(ask, [0, 3, 8]) if drafts else None
        ask.submit(engine)
    everyone += [Ask([i] * 20, new=30, top_k=1, calculate_loss=2).submit(engine) for i in range(2)]
    for _ in range(2000):
        if all(a.heard.ends for a in everyone):
            break
        round_(engine)
    for ask in everyone:
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
        if ask.sequence.params.calculate_loss:
            assert sum(map(len, ask.heard.losses_)) == 19
    assert engine.stats().preemptions > 0
    free(engine)


# ------------------------------------------------------------------------- who waits for what


class SlowVision(Backend):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.encoding, self.go_on = threading.Event(), threading.Event()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.encoding.set()
        assert self.go_on.wait(WAIT)
        return super().encode(pixels)


@pytest.fixture
def slow() -> Iterator[Engine]:
    engine = Engine(SlowVision(), MODEL)
    yield engine
    engine.backend.go_on.set()  # type: ignore[attr-defined]
    engine.stop()


def test_answers_go_on_while_a_picture_is_encoded(slow: Engine) -> None:
    waits = Ask([1], (0,), top_k=1).submit(slow)
    assert slow.backend.encoding.wait(WAIT)  # type: ignore[attr-defined]
    text = Ask([2, 3], new=50, top_k=1).submit(slow).wait()
    assert (text.heard.tokens, text.heard.reason) == text.alone()
    assert not waits.heard.tokens
    same = Ask([4], (0,), top_k=1).submit(slow)  # arrives while its picture is being encoded
    slow.backend.go_on.set()  # type: ignore[attr-defined]
    for ask in (waits, same):
        ask.wait()
        assert (ask.heard.tokens, ask.heard.reason) == ask.alone()
    assert backend_of(slow).encoded == [1]
    assert (slow.stats().images, slow.stats().image_hits) == (2, 1)


def test_whoever_waits_for_a_picture_can_be_cancelled_and_times_out(slow: Engine) -> None:
    hurried = Ask([1], (0,), timeout_ms=50)
    hurried.sequence.deadline = time.monotonic() + 0.05
    cancelled = Ask([1], (0,))
    hurried.submit(slow)
    slow.cancel(cancelled.submit(slow).sequence)
    assert isinstance(hurried.wait().heard.error, GenerationTimeout)
    assert cancelled.wait().heard.reason == "cancelled"
    assert not slow.backend.go_on.is_set()  # type: ignore[attr-defined]


def test_a_step_hands_out_answers_before_it_computes_a_prompt() -> None:
    engine = by_hand(mixes=False)
    old = Ask([1, 2], new=6, top_k=1).submit(engine)
    round_(engine)
    heard: list[list[list[int]]] = []
    old.heard.on_token = lambda: heard.append(list(backend_of(engine).shapes))
    Ask(list(range(40)), new=3, top_k=1).submit(engine)
    round_(engine)
    assert heard == [[[2], [1]]]  # and then the chunk
    assert backend_of(engine).shapes == [[2], [1], [19]]


def test_a_slow_machine_takes_small_bites_of_prompts_while_answers_stream() -> None:
    class Slow(Backend):
        def step(self, step: Step) -> Result:
            time.sleep(0.001 * len(step.input_ids))
            return super().step(step)

    engine = Engine(Slow(slots=3), MODEL, token_budget=256, step_ms=30)
    streams = Ask([1, 2], new=60, top_k=1).submit(engine)
    for i in range(3):
        Ask([i] * 190, new=1, top_k=1).submit(engine).wait()
    engine.cancel(streams.sequence)
    engine.stop()
    chunks = [count for counts in backend_of(engine).shapes for count in counts if count > 2]
    assert chunks[0] > 100 and 16 <= max(chunks[-4:-1]) <= 60  # 30 ms are 30 tokens


# ------------------------------------------------------------------------------- whose fault it is


def test_a_failure_of_one_answers_sampling_or_listener_is_its_own() -> None:
    class Broken(Sampler):
        def _draw(self, sequence: Sequence) -> Draw:
            raise ValueError("odd parameters")

    engine = by_hand()
    odd, deaf, fine = (Ask([i, 2], (0,), new=6, top_k=1) for i in (1, 2, 3))
    odd.sampler = lambda: Broken(VOCAB)
    deaf.heard.on_token = lambda: [][0]
    for ask in (odd, deaf, fine):
        ask.submit(engine)
    for _ in range(20):
        round_(engine)
    for ask in (odd, deaf):
        assert isinstance(ask.heard.error, InternalError)
    assert (fine.heard.tokens, fine.heard.reason) == fine.alone()
    free(engine)


def test_the_engine_outlives_a_listener_that_fails_at_the_end_and_a_panic_of_native_code(
    engine: Engine,
) -> None:
    class Panic(BaseException):
        pass

    def fails(*_: object) -> None:
        raise OSError("nobody listens")

    deaf = Ask([1, 2], top_k=1)
    deaf.heard.end = fails  # type: ignore[method-assign]
    deaf.submit(engine)
    good = Ask([1, 3], (1,), top_k=1).submit(engine).wait()
    assert (good.heard.tokens, good.heard.reason) == good.alone()
    step, engine.backend.step = engine.backend.step, lambda _: (_ for _ in ()).throw(Panic())
    assert isinstance(Ask([1, 2]).submit(engine).wait().heard.error, InternalError)
    engine.backend.step = step
    again = Ask([1, 3], (2,), top_k=1).submit(engine).wait()
    assert (again.heard.tokens, again.heard.reason) == again.alone()


@pytest.mark.parametrize("broken", ["put", "next_batch"])
def test_no_memory_for_a_picture_hurts_only_those_who_wait_for_it(
    engine: Engine, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(engine.images, broken, no_memory)
    hurt = Ask([1], (0,), top_k=1).submit(engine).wait()
    assert hurt.heard.reason == "error"
    again = Ask([1], (0,), top_k=1).submit(engine).wait()
    assert (again.heard.tokens, again.heard.reason) == again.alone()


def test_a_request_during_a_stop_is_answered_by_the_next_start(slow: Engine) -> None:
    Ask([1], (0,), top_k=1).submit(slow)
    assert slow.backend.encoding.wait(WAIT)  # type: ignore[attr-defined]
    stopping = threading.Thread(target=slow.stop)
    stopping.start()
    late = Ask([2, 3], new=4, top_k=1)
    asking = threading.Thread(target=late.submit, args=(slow,))
    while not slow._stopping:
        time.sleep(0.001)
    asking.start()
    slow.backend.go_on.set()  # type: ignore[attr-defined]
    late.wait()
    assert (late.heard.tokens, late.heard.reason) == late.alone()
    stopping.join(WAIT)
    asking.join(WAIT)


def test_a_step_has_as_many_tokens_as_the_backend_likes_unless_told():
    backend = Backend()
    backend.token_budget = 96
    for told, budget in ((None, 96), (64, 64)):
        assert Engine(backend, MODEL, told).scheduler.token_budget == budget

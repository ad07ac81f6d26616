"""Prometheus metrics: what happened to each request, and what the engine holds and does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine import Stats

if TYPE_CHECKING:
    from ..engine import Engine
    from ..request import AuxInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("ok", "cancelled", "timeout", "user_error", "overload", "draining", "internal")
KINDS = ("chat", "raw")

# from a small model on a GPU to a 7B model with pictures on two CPU cores
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WAIT_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
TOKENS = tuple(2**n for n in range(16))
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)

GAUGES = {
    "running": ("sequences_running", "Sequences with a place in the cache."),
    "waiting": ("sequences_waiting", "Sequences that wait for images or for a place in the cache."),
    "blocks": ("cache_blocks", "Blocks of 16 tokens in the key-value cache, the budget."),
    "blocks_running": ("cache_blocks_running", "Cache blocks held by running sequences."),
    "blocks_retained": ("cache_blocks_retained", "Cache blocks of ended sequences, kept for prompts alike."),
    "block_bytes": ("cache_block_size_bytes", "Bytes of one cache block."),
    "image_bytes": ("image_cache_bytes", "Bytes of the encoded images that are kept."),
    "image_budget": ("image_cache_limit_bytes", "Budget of the encoded images that are kept."),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted sequences, image slots included."),
    "reused_tokens": ("prompt_tokens_reused", "Of the prompt tokens, those found in the prefix cache."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "drafted_tokens": ("drafted_tokens", "Tokens drafted by speculative decoding."),
    "accepted_tokens": ("drafted_tokens_accepted", "Of the drafted tokens, those that came."),
    "images": ("images", "Images asked for."),
    "image_hits": ("image_cache_hits", "Images that were encoded already, or at the moment."),
    "preemptions": ("preemptions", "Sequences put back because cache blocks ran out."),
    "steps": ("steps", "Steps of the decoder."),
}


def outcome_of(error: BaseException | None) -> str:
    """The outcome that a request counts as, from what ended it: one of ours, HTTP's, or a cancellation."""
    if error is None:
        return "ok"
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    status = getattr(error, "status_code", getattr(error, "status", 500))
    named = {408: "timeout", 429: "overload", 503: "draining"}
    return named.get(status, "user_error" if 400 <= status < 500 else "internal")


class Metrics:
    """Counts for one server, in a registry of its own; it is the engine's Observer.

    `engine` gives the engine once there is one: its numbers are read at each scrape. Any thread may
    call any method; none of them raises.
    """

    def __init__(self, engine: Callable[[], Engine | None], registry: CollectorRegistry | None = None):
        disable_created_metrics()  # a second series beside each, which nobody draws
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineCollector(engine))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"rtp_llm_{name}", text, buckets=buckets, registry=self.registry)

        self._requests = Counter(
            "rtp_llm_requests",
            "Requests that ended, by outcome and endpoint.",
            ["outcome", "kind"],
            registry=self.registry,
        )
        for outcome in OUTCOMES:  # a rate needs the zero before the first
            for kind in KINDS:
                self._requests.labels(outcome, kind)
        self._in_flight = Gauge(
            "rtp_llm_requests_in_flight", "Requests that have not ended.", registry=self.registry
        )
        self._seconds = histogram(
            "request_duration_seconds", "From a request's arrival to its end.", REQUEST_SECONDS
        )
        self._first = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", WAIT_SECONDS
        )
        self._between = histogram(
            "time_between_tokens_seconds", "Between two tokens of one answer.", TOKEN_SECONDS
        )
        self._queue = histogram(
            "queue_time_seconds", "From submission to a request's first step.", WAIT_SECONDS
        )
        self._prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of an answered request, image slots included.", TOKENS
        )
        self._generated = histogram(
            "request_generated_tokens", "Tokens generated for a request, all its answers.", TOKENS
        )
        self._fetch = histogram(
            "image_fetch_seconds", "Fetching and decoding a request's images.", WAIT_SECONDS
        )
        self._encode = histogram(
            "image_encode_seconds", "One batch of images through the vision graph.", WAIT_SECONDS
        )
        self._encode_batch = histogram(
            "image_encode_batch_images", "Images of one batch through the vision graph.", ROWS
        )
        self._step = histogram("step_seconds", "One step of the decoder.", TOKEN_SECONDS)
        self._step_rows = histogram("step_batch_sequences", "Sequences in one step of the decoder.", ROWS)
        self._step_tokens = histogram("step_tokens", "Tokens computed in one step of the decoder.", TOKENS)

    # ---- of a request: the server's calls

    def started(self) -> None:
        """A request arrived; `finished` follows exactly once."""
        self._in_flight.inc()

    def fetched(self, seconds: float) -> None:
        """A request's images were fetched and decoded."""
        self._fetch.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """`seconds`: since the request arrived."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(
        self, outcome: str, kind: str, aux: AuxInfo | None, tokens: int, seconds: float
    ) -> None:
        """A request ended.

        `outcome`: of OUTCOMES, another one counts as "internal"; `kind`: of KINDS, another one as
        "raw"; `aux`: its first answer's, None when it never ran; `tokens`: generated, all answers;
        `seconds`: since it arrived.
        """
        self._in_flight.dec()
        outcome = outcome if outcome in OUTCOMES else "internal"
        self._requests.labels(outcome, kind if kind in KINDS else "raw").inc()
        self._seconds.observe(seconds)
        if aux is not None:
            self._queue.observe(max(0.0, aux.wait_time / 1000))
            self._prompt.observe(aux.input_len)
            self._generated.observe(tokens)

    # ---- of the engine: its Observer

    def step(self, rows: int, tokens: int, seconds: float) -> None:
        self._step.observe(seconds)
        self._step_rows.observe(rows)
        self._step_tokens.observe(tokens)

    def encoded(self, images: int, seconds: float) -> None:
        self._encode.observe(seconds)
        self._encode_batch.observe(images)

    def render(self) -> bytes:
        """Everything in Prometheus' text format, of type CONTENT_TYPE."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(self, engine: Callable[[], Engine | None]):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        stats = engine.stats() if engine is not None else Stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"rtp_llm_{name}", text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"rtp_llm_{name}", text, value=getattr(stats, field))

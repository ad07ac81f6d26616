"""What all endpoints share: the pipeline, threads that prepare requests, and the numbers kept of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...errors import PromptTooLong
from ...pipeline import Pipeline
from ..request import AuxInfo, GenerateResponse, Request
from .failures import BadField, HttpError
from .metrics import Metrics
from .settings import Settings

T = TypeVar("T")
TEXT_THREADS = 4  # that tokenise; a picture's download never waits for these, nor these for it
MEDIA_THREADS = 64
CHARACTERS_A_TOKEN = 256  # more than any vocabulary's longest token: beyond it a text cannot fit
MAX_NUMBERS = 4_000_000  # in the answers to one HTTP request, about 80 MB of JSON


@dataclass
class Call:
    """One HTTP request as endpoints see it: `scope["state"]["call"]`, made by the guard."""

    id: str
    salt: bytes  # of the caller's API key
    admit: Callable[[int], None]  # takes places of CONCURRENCY_LIMIT; raises Overloaded
    began: float = field(default_factory=time.monotonic)
    preparing: list[Future[Request]] = field(default_factory=list)  # each holds a place while it runs
    # what became of it, for the log and the metrics
    error: BaseException | None = None
    aux: AuxInfo | None = None  # of its first answer
    tokens: int = 0  # generated, all answers


class Service:
    """`phase`: loading, ready or draining. `pipeline` is there from ready on."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.phase = "loading"
        self.created = int(time.time())
        self._pipeline: Pipeline | None = None
        self.metrics = Metrics(lambda: self._pipeline.model.engine if self._pipeline else None)
        self._text = _pool(TEXT_THREADS, "prepare")
        self._media = _pool(min(MEDIA_THREADS, settings.concurrency_limit), "prepare-media")

    def ready(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        pipeline.model.engine.observer = self.metrics
        if self.phase == "loading":
            self.phase = "ready"

    @property
    def loaded(self) -> bool:
        return self._pipeline is not None

    @property
    def pipeline(self) -> Pipeline:
        """Raises HttpError (503) until the model is loaded."""
        if self._pipeline is None:
            raise HttpError(503, "the model is still loading", "503_NOT_READY")
        return self._pipeline

    @property
    def model_name(self) -> str:
        return self.settings.served_model_name or self.pipeline.model.bundle.name

    @property
    def max_model_len(self) -> int:
        return self.pipeline.model.engine.backend.slot_tokens

    async def prepare(
        self,
        call: Call,
        config: dict[str, Any],
        prompt: str | list[int] | None = None,
        urls: list[str] | None = None,
        messages: list[Any] | None = None,
    ) -> Request:
        """Check a request and fetch its pictures. Raises RtpLlmError; a cancelled one is not awaited."""
        pipeline = self.pipeline
        if not self.settings.reuse_cache:
            config = {"reuse_cache": False} | config
        self._check_length(prompt if messages is None else messages)
        url_tag = pipeline.model.bundle.prompt.image.url_tag
        media = bool(urls) or (isinstance(prompt, str) and bool(url_tag) and url_tag[0] in prompt)
        if messages is not None:
            media = any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in messages)
        abandoned = threading.Event()
        preparing = (self._media if media else self._text).submit(
            pipeline.prepare,
            prompt,
            urls,
            messages=messages,
            generate_config=config,
            salt=call.salt,
            max_images=self.settings.max_images,
            arrived=call.began,
            abandoned=abandoned.is_set,
        )
        call.preparing.append(preparing)
        try:
            request = await asyncio.wrap_future(preparing)
        finally:
            abandoned.set()
        if media:
            self.metrics.fetched(time.monotonic() - call.began)
        return request

    async def text(self, work: Callable[[], T], *prompts: Any) -> T:
        """Run tokeniser work on a thread. Raises PromptTooLong for a hopeless length."""
        for prompt in prompts:
            self._check_length(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._text, work)

    def _check_length(self, prompt: Any) -> None:
        """Refuse before seconds are spent on tokenising what cannot fit."""
        limit = CHARACTERS_A_TOKEN * self.max_model_len
        if (length := _characters(prompt)) > limit:
            raise PromptTooLong(
                f"the prompt has {length} characters, which cannot fit into {self.max_model_len} tokens"
            )

    async def generate(self, call: Call, request: Request) -> AsyncGenerator[GenerateResponse, None]:
        """`Pipeline.stream`, counted and timed."""
        tokens, last = 0, 0.0
        async with aclosing(self.pipeline.stream(request)) as responses:  # type: ignore[type-var]
            async for response in responses:
                now, before = time.monotonic(), tokens
                tokens = sum(o.aux_info.output_len for o in response.generate_outputs)
                call.tokens += tokens - before
                call.aux = call.aux or response.generate_outputs[0].aux_info
                if not last:
                    self.metrics.first_token(now - call.began)
                elif tokens > before:
                    self.metrics.between_tokens(now - last)
                last = now
                if response.finished:
                    call.aux = response.generate_outputs[0].aux_info
                yield response

    def close(self) -> None:
        self.close_pools()
        if self._pipeline is not None:
            self._pipeline.stop()

    def close_pools(self) -> None:
        self._text.shutdown(wait=False, cancel_futures=True)
        self._media.shutdown(wait=False, cancel_futures=True)


def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all run from the start: a number that grows later is a leak."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    together = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(together.wait)
    together.wait()
    return pool


def check_size(requests: list[Request]) -> None:
    """Raises BadField where the answers to one HTTP request would hold too many numbers.

    The requests are those of one batch, which have one generate_config.
    """
    params, vocab = requests[0].params, requests[0].model.bundle.model.vocab_size
    each = {  # token's numbers
        "return_logits": vocab * params.return_logits,
        "return_all_probs": vocab * params.return_all_probs,
        "logprobs": (1 + params.top_logprobs) * params.logprobs,
    }
    name, count = max(each, key=lambda name: each[name]), sum(each.values())
    tokens = sum(r.max_new_tokens * r.params.answers for r in requests)
    if tokens * count > MAX_NUMBERS:
        raise BadField(
            name,
            f"{name}: {tokens} new tokens of {count} numbers each are more than the limit of "
            f"{MAX_NUMBERS:,}; lower max_new_tokens",
        )


def _characters(prompt: Any) -> int:
    """Of the texts of a prompt or of messages; a picture's URL does not count."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, list):
        return sum(map(_characters, prompt))
    if isinstance(prompt, dict):
        return sum(len(v) if isinstance(v, str) else _characters(v) for k, v in prompt.items()
                   if k in ("content", "text"))  # fmt: skip
    return 0

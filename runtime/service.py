"""What all servers and endpoints share: the pipeline, threads that prepare requests, limits, and the
numbers kept of requests."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..errors import (
    BadField,
    BundleError,
    CheckpointError,
    InternalError,
    MissingDependency,
    NotReady,
    Overloaded,
    PromptTooLong,
    RtpLlmError,
    UserError,
    shown,
)
from ..pipeline import Pipeline
from .request import AuxInfo, GenerateOutput, GenerateResponse, Request
from .server import logs
from .server.metrics import Metrics, outcome_of
from .server.settings import Settings
from .strict_json import Piece

T = TypeVar("T")
TEXT_THREADS = 4  # that tokenise; a picture's download never waits for these, nor these for it
MEDIA_THREADS = 64
CHARACTERS_A_TOKEN = 256  # more than any vocabulary's longest token: beyond it a text cannot fit
MAX_NUMBERS = 4_000_000  # in the answers to one request, about 80 MB of JSON
RETURNED = ("output_ids", "input_ids", "loss", "logprobs", "logits", "all_probs")
# of the server's own installation and model, which no client can mend
OURS = (MissingDependency, CheckpointError, BundleError)
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # of a request, for logs and messages


class Places:
    """CONCURRENCY_LIMIT's, one for each answer in work. Any thread may call."""

    def __init__(self, limit: int):
        self.limit = limit
        self.taken = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Raises UserError, Overloaded."""
        if count > self.limit:
            what = "prompts × num_return_sequences (n)"
            raise UserError(
                f"{count} answers are asked for at once ({what}), the limit is {self.limit}"
            )
        with self._lock:
            if self.taken + count > self.limit:
                raise Overloaded(
                    f"{self.taken} answers are in work, the limit is {self.limit}; try again later"
                )
            self.taken += count

    def free(self, count: int) -> None:
        with self._lock:
            self.taken -= count


@dataclass
class Call:
    """One request of a client, from its arrival (`Service.begin`) to its end (`Service.end`)."""

    id: str
    salt: bytes  # what is cached is shared only with calls of the same
    places: Places
    kind: str | None  # of metrics.KINDS; None: it asks for no answer of the model
    held: int = 0  # places
    began: float = field(default_factory=time.monotonic)
    preparing: list[Future[Request]] = field(default_factory=list)  # each holds a place while it runs
    # what became of it, for the log and the metrics
    error: BaseException | None = None
    aux: AuxInfo | None = None  # of its first answer
    tokens: int = 0  # generated, all answers

    def admit(self, count: int) -> None:
        """Take `count` places. Raises UserError, Overloaded."""
        self.places.take(count)
        self.held += count

    def leave(self) -> None:
        """Frees its places, but for those of threads that still fetch a picture: they do so at the end."""
        running = [one for one in self.preparing if not one.done()]
        self.places.free(self.held - len(running))
        self.held = 0
        for one in running:
            one.add_done_callback(lambda _: self.places.free(1))


class Service:
    """`phase`: loading, ready or draining. `pipeline` is there from ready on."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.phase = "loading"
        self.created = int(time.time())
        self._pipeline: Pipeline | None = None
        self.metrics = Metrics(lambda: self._pipeline.model.engine if self._pipeline else None)
        self.places = Places(settings.concurrency_limit)
        self._text = pool(TEXT_THREADS, "prepare")
        self._media = pool(min(MEDIA_THREADS, settings.concurrency_limit), "prepare-media")

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
        """Raises NotReady until the model is loaded."""
        if self._pipeline is None:
            raise NotReady("the model is still loading")
        return self._pipeline

    @property
    def model_name(self) -> str:
        return self.settings.served_model_name or self.pipeline.model.bundle.name

    @property
    def max_model_len(self) -> int:
        return self.pipeline.model.engine.backend.slot_tokens

    def begin(self, id: str, kind: str | None, salt: bytes = b"") -> Call:
        """A request arrived; `end` follows exactly once. `kind`: as in Call."""
        if kind:
            self.metrics.started()
        return Call(id, salt, self.places, kind)

    def end(self, call: Call, method: str, path: str, status: int) -> None:
        """Gives its places back, counts it and logs it; `status`: HTTP's, `path` without the query."""
        call.leave()
        seconds, outcome = time.monotonic() - call.began, outcome_of(call.error)
        if call.kind:
            self.metrics.finished(outcome, call.kind, call.aux, call.tokens, seconds)
        logs.request(
            method=method,
            path=path,
            status=status,
            seconds=seconds,
            outcome=outcome,
            error=call.error,
            aux=call.aux,
            tokens=call.tokens,
        )

    async def prepare(
        self,
        call: Call,
        config: dict[str, Any],
        prompt: str | list[int] | None = None,
        urls: Sequence[bytes | str] | None = None,
        messages: list[Any] | None = None,
        image_embeds: np.ndarray | None = None,
    ) -> Request:
        """`Pipeline.prepare`, on a thread. Raises RtpLlmError; a cancelled one is not awaited."""
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
            image_embeds=image_embeds,
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
        if isinstance(prompt, list) and len(prompt) > self.max_model_len:  # of ids, or of messages
            raise PromptTooLong(
                f"the prompt has {len(prompt)} token ids or messages, which cannot fit into "
                f"{self.max_model_len} tokens"
            )
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


def pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all run from the start: a number that grows later is a leak."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    together = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(together.wait)
    together.wait()
    return pool


def told(error: BaseException, call: Call) -> RtpLlmError:
    """The error itself if a client may read it, else a line with the request's id; `call` keeps it whole."""
    if isinstance(error, OURS):
        ours = InternalError(f"{type(error).__name__}: {error}")
        ours.__cause__, error = error, ours
    call.error = error
    if isinstance(error, RtpLlmError) and (error.status < 500 or isinstance(error, NotReady)):
        return error
    kind = type(error) if isinstance(error, RtpLlmError) else InternalError
    return kind(f"internal error; the server's log has it under request id {call.id}")


def check_parts(messages: list[Any], beside: bool = False) -> None:
    """Only what API.md names; the prompt encoder checks the rest.

    beside: pictures may stand beside the messages, whose parts `{"type": "image"}` say where they belong.
    """
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            where = f"messages[{i}].content[{j}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if beside and part == {"type": "image"}:
                continue
            if kind not in ("text", "image_url"):
                what = f"of type {shown(kind)}" if isinstance(part, dict) else shown(part)
                raise BadField(where, f"{where} is {what}, expected a part of type text or image_url")
            image = part.get("image_url")
            detail = image.get("detail") if isinstance(image, dict) else None
            if detail not in (None, "auto", "low", "high"):
                raise BadField(
                    where, f"{where}.image_url.detail is {shown(detail)}, expected auto, low or high"
                )


def usage_of(response: GenerateResponse) -> dict[str, Any]:
    infos = [o.aux_info for o in response.generate_outputs]
    new = sum(a.output_len for a in infos)
    return {
        "prompt_tokens": infos[0].input_len,
        "completion_tokens": new,
        "total_tokens": infos[0].input_len + new,
        "prompt_tokens_details": {"cached_tokens": infos[0].reuse_len},
    }


def returned(output: GenerateOutput) -> dict[str, Piece]:
    """What `return_*`, `logprobs` and `calculate_loss` asked for."""
    return {name: Piece(v) for name in RETURNED if (v := getattr(output, name)) is not None}


def check_size(requests: list[Request]) -> None:
    """Raises BadField where the answers to one request would hold too many numbers.

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

"""Pipeline: a prompt and pictures in, answers out; the front door for Python."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import (
    GenerateConfigError,
    ImageInputTooLong,
    ImageWrongFormat,
    InternalError,
    RtpLlmError,
    UserError,
    shown,
)
from .runtime.media import MediaPolicy
from .runtime.prompt import EncodedPrompt, PromptEncoder, expand
from .runtime.request import (
    AuxInfo,
    Collector,
    GenerateOutput,
    GenerateResponse,
    Request,
    image_list,
)
from .runtime.vision import Embedded, check_embeds

if TYPE_CHECKING:
    import numpy as np

    from .model_factory import Model

__all__ = ["AuxInfo", "GenerateOutput", "GenerateResponse", "Pipeline"]


class Pipeline:
    """Answers from a model. Threads and coroutines that share one Pipeline share one batch.

    `stop()` gives memory and threads back and may be called again and again; a later call starts them
    anew. After a `with` block a call raises.
    """

    def __init__(
        self, model: Model, tokenizer: Any = None, media_policy: MediaPolicy | None = None
    ):
        self.model = model
        # a transformers fast tokenizer carries the real one inside
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer) or model.tokenizer
        self.media_policy = media_policy or MediaPolicy()
        bundle = model.bundle
        self._prompts = PromptEncoder(
            bundle.prompt, self.tokenizer, bundle.model.vocab_size, bundle.vision.tokens
        )
        self._left = False

    def __call__(
        self,
        prompt: str | list[int],
        urls: Any = None,
        images: Any = None,
        generate_config: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Iterator[GenerateResponse]:
        """A lazy iterator: one response per step, the last one with `finished=True`.

        `prompt` holds the family's image tags; `urls` (or `images`): URLs, data URIs, paths, bytes,
        file objects or PIL images, in order. `overrides` win over `generate_config`. Leaving the
        iterator early cancels the request. Raises UserError and its kinds at the first step.
        """
        config = _merge(generate_config, overrides)
        return self._run(lambda: self.prepare(prompt, urls, images, generate_config=config))

    def chat(
        self,
        messages: list[dict[str, Any]],
        generate_config: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Iterator[GenerateResponse]:
        """The OpenAI message list, through the checkpoint's own chat template; as `__call__`.

        Text in messages is only text; pictures come from `image_url` and `image` parts.
        """
        config = _merge(generate_config, overrides)
        return self._run(lambda: self.prepare(messages=messages, generate_config=config))

    async def pipeline_async(
        self,
        prompt: str | list[int] | None = None,
        urls: Any = None,
        images: Any = None,
        generate_config: Mapping[str, Any] | None = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> AsyncIterator[GenerateResponse]:
        """The same as an async generator; `messages` instead of `prompt` for a chat."""
        config = _merge(generate_config, overrides)
        loop = asyncio.get_running_loop()
        # fetching and decoding pictures would block the loop
        request = await loop.run_in_executor(
            None,
            lambda: self.prepare(prompt, urls, images, messages=messages, generate_config=config),
        )
        async for response in self.stream(request, every_step=True):
            yield response

    def prepare(
        self,
        prompt: str | list[int] | None = None,
        urls: Any = None,
        images: Any = None,
        *,
        messages: list[dict[str, Any]] | None = None,
        generate_config: Mapping[str, Any] | None = None,
        image_embeds: np.ndarray | None = None,
        salt: bytes = b"",
        max_images: int | None = None,
        arrived: float | None = None,
        abandoned: Callable[[], bool] = bool,
    ) -> Request:
        """Check a request and load its pictures, without starting it; for servers, as `stream` is.

        With `messages`, `urls` are the pictures of the parts `{"type": "image"}` that hold none themselves.
        `image_embeds`, float32 [N, tokens, hidden], take the place of all pictures: what this model's vision
        graph has made of them. (Another model's, of the same shape, would be taken for a picture too.)
        It blocks while pictures are fetched and decoded; more than `max_images` are refused before.
        Requests share what is cached only with those of the same `salt`. `timeout_ms` counts from `arrived`
        (time.monotonic()). No further picture is decoded once `abandoned` says that nobody waits for it.
        Raises UserError and its kinds.
        """
        images = pictures_of(prompt, urls, images, messages, image_embeds)
        if image_embeds is not None:
            check_embeds(image_embeds, self.model.bundle.vision)
            images = list(range(len(image_embeds)))
        if messages is not None:
            encoded = self._prompts.encode_chat(messages, None if images is None else image_list(images))
        else:
            assert prompt is not None
            encoded = self._encode(prompt, images)
        if image_embeds is not None:
            if named := [source for source in encoded.sources if not isinstance(source, int)]:
                raise ImageWrongFormat(
                    f"image_embeds take the place of all pictures, and the request names {shown(named[0])}"
                )
            # copies: who gave them may reuse the memory
            encoded.sources = [Embedded(image_embeds[i].copy()) for i in encoded.sources]
        check_count(encoded, max_images)
        return self._request(encoded, generate_config or {}, salt, arrived, abandoned)

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """The prompt text and token ids that a chat becomes; no picture is fetched.

        The text shows one image token per picture, the ids hold the image token in every slot.
        """
        bundle = self.model.bundle
        encoded = self._prompts.encode_chat(messages)
        lengths = [bundle.vision.tokens] * len(encoded.slots)
        ids, _ = expand(encoded, lengths, bundle.prompt.image.token_id)
        return self._prompts.render_chat(messages), ids

    async def stream(
        self, request: Request, every_step: bool = False
    ) -> AsyncIterator[GenerateResponse]:
        """Start a prepared request; its responses, cumulative, until the last has `finished=True`.

        A reader that is slower than the engine gets the latest state only, so that nothing piles up
        behind it; with `every_step` one response comes per step. Leaving early cancels the request.
        """
        loop = asyncio.get_running_loop()
        ready, lock = asyncio.Event(), threading.Lock()
        events: list[Any] = []

        def publish(event: Any) -> None:
            with lock:
                if not every_step:
                    events[:] = [e for e in events if e[0] != event[0]]
                events.append(event)
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop is closed: nobody listens any more
                request.cancel()

        collector = Collector(request)
        request.start(publish)
        try:
            while not collector.finished:
                await ready.wait()
                with lock:
                    # several answers advance in one step: one response for all of them
                    all_of_them = not every_step or request.params.answers > 1
                    taken = events[: None if all_of_them else 1]
                    del events[: len(taken)]
                    if not events:
                        ready.clear()
                for event in taken:
                    collector.add(event)
                if taken:  # it was told twice otherwise
                    yield collector.response()
        finally:
            request.cancel()

    def batch(
        self, requests: Iterable[Mapping[str, Any]], in_flight: int | None = None
    ) -> Iterator[tuple[int, GenerateResponse | RtpLlmError]]:
        """Many requests sharing the batch: yields (index, last response or error) in input order.

        A request is a dict of `prompt` (with `urls` or `images`) or `messages`, and
        `generate_config`. One that fails never touches the others. At most `in_flight` (default:
        twice the slots) are taken from `requests` ahead of the answers.
        """
        window = in_flight or 2 * self.model.engine.backend.slots
        waiting: deque[tuple[int, Any]] = deque()  # (request, its events) or an error
        numbered = enumerate(requests)
        try:
            while True:
                while len(waiting) < window and (item := next(numbered, None)) is not None:
                    index, one = item
                    try:
                        request = self._one(one)
                        waiting.append((index, (request, self._start(request))))
                    except Exception as e:
                        waiting.append((index, _error(e)))
                if not waiting:
                    return
                index, started = waiting.popleft()
                if isinstance(started, RtpLlmError):
                    yield index, started
                    continue
                result: GenerateResponse | RtpLlmError
                try:
                    result = deque(self._responses(*started), maxlen=1).pop()
                except Exception as e:
                    result = _error(e)
                yield index, result
        finally:
            for _, started in waiting:
                if not isinstance(started, RtpLlmError):
                    started[0].cancel()

    def encode(self, text: str) -> list[int]:
        """Token ids as the checkpoint's own tokenizer gives them: bos included, control tokens parsed."""
        return self._prompts.text_ids(text)

    def decode(self, ids: int | list[int]) -> str:
        """Text of token ids, control tokens shown."""
        return self._prompts.text_of([ids] if isinstance(ids, int) else list(ids))

    def stop(self) -> None:
        """Release threads and caches; idempotent; a later call starts them again."""
        self.model.engine.stop()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._left = True

    def _encode(self, prompt: str | list[int], images: Any) -> EncodedPrompt:
        return self._prompts.encode_prompt(prompt, image_list(images))

    def _request(
        self,
        encoded: EncodedPrompt,
        config: Mapping[str, Any],
        salt: bytes = b"",
        arrived: float | None = None,
        abandoned: Callable[[], bool] = bool,
    ) -> Request:
        if self._left:
            raise UserError("this Pipeline's `with` block was left: make a new Pipeline")
        return Request(self.model, encoded, config, self.media_policy, salt, arrived, abandoned)

    def _one(self, one: Mapping[str, Any]) -> Request:
        known = {"prompt", "urls", "images", "messages", "generate_config"}
        if not isinstance(one, Mapping):
            raise UserError(f"batch: a request is {type(one).__name__}, expected a dict")
        if unknown := sorted(set(one) - known):
            raise UserError(f"batch: unknown field {unknown[0]!r}, known are {sorted(known)}")
        config = one.get("generate_config")
        if ("prompt" in one) == ("messages" in one):
            raise UserError("batch: a request has either prompt or messages")
        return self.prepare(
            one.get("prompt"),
            one.get("urls"),
            one.get("images"),
            messages=one.get("messages"),
            generate_config=_merge(config, {}),
        )

    def _run(self, make: Any) -> Iterator[GenerateResponse]:
        request = make()
        yield from self._responses(request, self._start(request))

    def _start(self, request: Request) -> queue.SimpleQueue[Any]:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request.start(events.put)
        return events

    def _responses(
        self, request: Request, events: queue.SimpleQueue[Any]
    ) -> Iterator[GenerateResponse]:
        collector = Collector(request)
        try:
            while not collector.finished:
                collector.add(events.get())
                # several answers advance in one step: one response for all of them
                while request.params.answers > 1 and not events.empty():
                    collector.add(events.get_nowait())
                yield collector.response()
        finally:
            request.cancel()


def _error(e: Exception) -> RtpLlmError:
    return e if isinstance(e, RtpLlmError) else InternalError(f"{type(e).__name__}: {e}")


def pictures_of(prompt: Any, urls: Any, images: Any, messages: Any, image_embeds: Any) -> Any:
    """Which of `prepare`'s arguments holds the pictures. Raises UserError for two that exclude each other."""
    if (prompt is None) == (messages is None):
        raise UserError("give either prompt or messages")
    if urls is not None and images is not None:
        raise UserError("urls and images are two names of one argument: give one of them")
    given = urls if images is None else images
    if image_embeds is not None and given is not None:
        raise UserError("image_embeds take the place of pictures: leave urls and images out")
    return given


def check_count(encoded: EncodedPrompt, max_images: int | None) -> None:
    """Raises ImageInputTooLong."""
    if max_images is not None and len(encoded.sources) > max_images:
        raise ImageInputTooLong(f"the request has {len(encoded.sources)} images, the limit is {max_images}")


def _merge(config: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if config is not None and not isinstance(config, Mapping):
        raise GenerateConfigError(f"generate_config is {config!r}, expected a dict")
    return {**(config or {}), **overrides}

"""rtp-llm's raw form, POST /: a prompt with the model's own tags, or several of them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from ..request import GenerateOutput, GenerateResponse, Request
from ..sequence import SamplingParams, answers_of
from ..service import Call, Service, check_size, returned
from ..strict_json import dumps
from . import failures
from .schemas import RawErrorResponse, RawRequest
from .wire import STREAMS, EventStream, Json, StrictRoute, last, off_loop

T = TypeVar("T")
router = APIRouter(route_class=StrictRoute, tags=["raw form"])


@router.post("/", responses=STREAMS | failures.described(RawErrorResponse))
async def raw(body: RawRequest, http: HttpRequest) -> Response:
    """Answers `prompt` as it stands; images come from `urls`, in order, or from tags with a URL."""
    service: Service = http.app.state.service
    call: Call = http.scope["state"]["call"]
    prompts = body.prompts
    config, stream = body.config()
    call.admit(len(prompts) * answers_of(config))
    requests = await _all([service.prepare(call, config, prompt=p, urls=urls) for p, urls in prompts])
    check_size(requests)
    shape = _Shape(requests, batch=body.prompt_batch is not None)
    responses = _together([service.generate(call, r) for r in requests], requests)
    if not stream:
        whole = await last(responses)
        return await off_loop(shape.large, lambda: Json(shape.answer(whole)))
    try:
        first = await anext(responses)
    except BaseException:
        await responses.aclose()
        raise
    return EventStream(_events(shape, first, responses, call))


async def _all(works: list[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; when one fails, or the caller leaves, the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(
    shape: _Shape,
    first: list[GenerateResponse],
    rest: AsyncGenerator[list[GenerateResponse], None],
    call: Call,
) -> AsyncGenerator[bytes, None]:
    latest = first
    try:
        async with aclosing(rest):
            while True:
                large = shape.large and all(r.finished for r in latest)
                yield await off_loop(large, _event, shape, latest)
                try:
                    latest = await anext(rest)
                except StopAsyncIteration:
                    break
    except Exception as e:  # the status is long sent
        yield b"data:" + dumps(failures.body(failures.known(e, call), raw=True)) + b"\r\n\r\n"
        return
    yield b"data:[done]\r\n\r\n"


def _event(shape: _Shape, latest: list[GenerateResponse]) -> bytes:
    return b"data:" + dumps(shape.answer(latest, stream=True)) + b"\r\n\r\n"


async def _together(
    streams: list[AsyncGenerator[GenerateResponse, None]], requests: list[Request]
) -> AsyncGenerator[list[GenerateResponse], None]:
    """The latest response of each, whenever one of them has news. The first that fails ends all."""
    latest = [_nothing(r.params.answers) for r in requests]
    news = asyncio.Event()

    async def follow(i: int) -> None:
        async with aclosing(streams[i]) as responses:
            async for response in responses:
                latest[i] = response
                news.set()

    tasks = [asyncio.create_task(follow(i)) for i in range(len(streams))]
    for task in tasks:
        task.add_done_callback(lambda _: news.set())
    try:
        told: list[GenerateResponse] = []  # what the reader has seen: the end may come while it is busy
        while not (told and all(r.finished for r in told)):
            await news.wait()
            news.clear()
            for task in tasks:
                if task.done():
                    task.result()
            told = list(latest)
            yield told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _nothing(answers: int) -> GenerateResponse:
    return GenerateResponse([""] * answers, [GenerateOutput() for _ in range(answers)], False)


def _large(params: SamplingParams) -> bool:
    """May encoding what is asked for take so long that others would notice?"""
    asked = params.return_logits or params.return_all_probs or params.return_input_ids
    return bool(asked or params.return_output_ids or params.logprobs or params.calculate_loss)


class _Shape:
    """Responses as the raw form's JSON."""

    def __init__(self, requests: list[Request], batch: bool):
        self._batch = batch
        self.large = any(_large(r.params) for r in requests)
        self._lists = [r.params.num_return_sequences > 0 for r in requests]
        # texts are cumulative up to here: several responses may become one event
        self._incremental = [r.params.return_incremental for r in requests]
        self._sent = [[""] * r.params.answers for r in requests]
        for r in requests:
            r.params = dataclasses.replace(r.params, return_incremental=False)

    def answer(self, latest: list[GenerateResponse], stream: bool = False) -> dict[str, Any]:
        # what is asked for besides the text comes once: with every event it would grow with the square
        full = not stream or all(r.finished for r in latest)
        shaped = [self._one(i, response, stream, full) for i, response in enumerate(latest)]
        return {"response_batch": shaped} if self._batch else shaped[0]

    def _one(self, i: int, response: GenerateResponse, stream: bool, full: bool) -> dict[str, Any]:
        texts = response.generate_texts
        if stream and self._incremental[i]:
            texts = [t[len(s) :] for t, s in zip(texts, self._sent[i], strict=True)]
            self._sent[i] = response.generate_texts
        fields: list[dict[str, Any]] = []
        for text, output in zip(texts, response.generate_outputs, strict=True):
            fields.append(
                {
                    "response": text,
                    "finished": output.finished,
                    "finish_reason": output.finish_reason,
                    "aux_info": dataclasses.asdict(output.aux_info),
                }
                | (returned(output) if full else {})
            )
        if not self._lists[i]:
            return fields[0]
        keys = dict.fromkeys(key for one in fields for key in one)
        listed: dict[str, Any] = {key: [one.get(key) for one in fields] for key in keys}
        return listed | {"finished": response.finished}

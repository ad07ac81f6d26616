"""OpenAI's chat completions: one answer, or a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from ..detokenizer import speller
from ..request import GenerateOutput, GenerateResponse, Request
from ..sequence import answers_of
from ..service import Call, Service, check_parts, check_size, usage_of
from ..strict_json import Piece, dumps
from . import failures
from .schemas import ChatRequest
from .wire import STREAMS, EventStream, Json, StrictRoute, last, off_loop

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", responses=STREAMS)
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
    """Answers a conversation; a picture is a part `image_url` of a message's content."""
    service: Service = http.app.state.service
    call: Call = http.scope["state"]["call"]
    check_parts(body.messages)
    config = body.config()
    call.admit(answers_of(config))
    request = await service.prepare(call, config, messages=body.messages)
    check_size([request])
    answer = _Answer(service, call, request)
    responses = service.generate(call, request)
    if not body.stream:
        whole = await last(responses)
        return await off_loop(request.params.logprobs, lambda: Json(answer.whole(whole)))
    try:
        first = await anext(responses)  # what fails before the first token has its status
    except BaseException:
        await responses.aclose()
        raise
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return EventStream(answer.events(first, responses, usage))


class _Answer:
    """A request's responses in OpenAI's shapes."""

    def __init__(self, service: Service, call: Call, request: Request):
        self._call = call
        self._head = {"id": f"chatcmpl-{call.id}", "created": int(time.time()), "model": service.model_name}
        self._n = request.params.answers
        self._logprobs = request.params.logprobs
        bundle, params = request.model.bundle, request.params
        eos = params.eos_token_id if params.eos_token_id is not None else bundle.generation.eos_ids
        self._eos = set() if params.ignore_eos else set(eos)
        self._spell = speller(request.model.tokenizer)

    def whole(self, response: GenerateResponse) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._tokens(output, 0),
                "finish_reason": output.finish_reason,
            }
            for i, (text, output) in enumerate(
                zip(response.generate_texts, response.generate_outputs, strict=True)
            )
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage_of(response)}

    async def events(
        self, first: GenerateResponse, rest: AsyncGenerator[GenerateResponse, None], usage: bool
    ) -> AsyncGenerator[bytes, None]:
        head = self._head | {"object": "chat.completion.chunk"}
        if usage:
            head["usage"] = None

        def chunk(
            index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
        ) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event(head | {"choices": [choice]})

        shown, counted, ended = [0] * self._n, [0] * self._n, [False] * self._n
        response = first
        try:
            async with aclosing(rest):
                for i in range(self._n):
                    yield chunk(i, {"role": "assistant", "content": "", "refusal": None})
                while True:
                    for i, output in enumerate(response.generate_outputs):
                        delta = response.generate_texts[i][shown[i] :]
                        logprobs = self._tokens(output, counted[i])
                        if delta or (logprobs and logprobs["content"]):
                            yield chunk(i, {"content": delta}, None, logprobs)
                        shown[i] += len(delta)
                        counted[i] = len(output.logprobs or ())
                        if output.finished and not ended[i]:
                            ended[i] = True
                            yield chunk(i, {}, output.finish_reason)
                    try:
                        response = await anext(rest)
                    except StopAsyncIteration:
                        break
        except Exception as e:  # the status is long sent
            yield event(failures.body(failures.known(e, self._call)))
            return
        if usage:
            yield event(head | {"choices": [], "usage": usage_of(response)})
        yield b"data: [DONE]\n\n"

    def _tokens(self, output: GenerateOutput, start: int) -> dict[str, Any] | None:
        """OpenAI's logprobs of the tokens from `start` on; the token that ends an answer is not text."""
        if not self._logprobs:
            return None
        entries = [e for e in (output.logprobs or [])[start:] if e["id"] not in self._eos]
        content = [
            Piece(
                self._token(e["id"], e["logprob"])
                | {"top_logprobs": [self._token(i, p) for i, p in e["top"]]}
            )
            for e in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._spell(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "bytes": list(spelled),
            "logprob": max(logprob, -9999.0),  # OpenAI's way to say never; JSON has no infinity
        }


def event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"

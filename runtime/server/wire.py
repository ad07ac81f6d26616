"""Bytes on the wire: strict JSON in, JSON and server-sent events out."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .failures import HttpError

T = TypeVar("T")
BIG = 1 << 18  # bytes of JSON that may be parsed on the event loop
MAX_ITEMS = 1_000_000  # separators in a body: each costs some 100 bytes, and time in which nobody else runs
MAX_DEPTH = 64
BRACKETS = bytes.maketrans(b"{}", b"[]")
TOO_DEEP = f"the body is nested deeper than {MAX_DEPTH}, the limit"
NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))


def loads(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no infinite or longer than 64-bit numbers, no half characters, at most
    MAX_ITEMS values, nested MAX_DEPTH deep.

    Raises HttpError (400).
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise HttpError(400, f"the body has more than {MAX_ITEMS:,} commas and brackets, the limit")
    try:
        value = json.loads(
            data.decode(), parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except UnicodeDecodeError as e:
        raise HttpError(400, f"the body is not UTF-8: {e.reason} at byte {e.start}") from e
    except json.JSONDecodeError as e:
        raise HttpError(400, f"the body is not JSON: {e.msg} at character {e.pos}") from e
    except RecursionError as e:
        raise HttpError(400, TOO_DEEP) from e
    if _deep(data):
        raise HttpError(400, TOO_DEEP)
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        _whole(value)
    return value


def _deep(data: bytes) -> bool:
    """Is this valid JSON nested deeper than MAX_DEPTH? In few passes, and without recursion."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    marks = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(BRACKETS, NO_MARKS)
    marks = re.sub(rb'"[^"]*"', b"", marks)
    for _ in range(MAX_DEPTH):
        marks = marks.replace(b"[]", b"")
    return bool(marks)


def _constant(name: str) -> NoReturn:
    raise HttpError(400, f"the body holds {name}, which is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise HttpError(400, f"the body holds the number {digits[:20]}…, which is too large")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise HttpError(400, f"the body holds the number {digits[:20]}, which is too large")
    return number


def _whole(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise HttpError(400, "the body holds half a character (a lone surrogate)") from e


class _StrictRequest(Request):
    async def json(self) -> Any:
        data = await self.body()
        return loads(data) if len(data) < BIG else await asyncio.to_thread(loads, data)


class StrictRoute(APIRoute):
    """FastAPI's route, its JSON bodies read by `loads`."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def dumps(value: Any) -> bytes:
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), default=_plain, allow_nan=False
    ).encode()


@dataclass(slots=True)
class Piece:
    """A part of an answer, encoded as its value; before each, other threads get a turn."""

    value: Any


def _plain(value: Any) -> Any:
    if isinstance(value, Piece):
        return value.value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return list(value)  # row by row: other threads get a turn between them
    if isinstance(value, np.ndarray):
        # JSON has no NaN (a loss's image slots) and no infinity (a logit of a banned token)
        # (numpy's own loops let go of the interpreter for so short that threads waiting for it never get it)
        return [x if math.isfinite(x) else None for x in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in an answer")


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


async def off_loop(large: bool, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)`, on a thread where it is large."""
    return await asyncio.to_thread(work, *args) if large else work(*args)


async def last(items: AsyncGenerator[T, None]) -> T:
    """The last of at least one."""
    async with aclosing(items):
        item = await anext(items)
        async for later in items:
            item = later
    return item


# of an endpoint that may stream, for the description
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class EventStream(Response):
    """Server-sent events as they come. Leaving early, for any reason, closes the generator."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

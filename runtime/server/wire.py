"""FastAPI's routes and responses: strict JSON in, JSON and server-sent events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...errors import UserError
from ..strict_json import dumps, loads
from .failures import HttpError

T = TypeVar("T")
BIG = 1 << 18  # bytes of JSON that may be parsed on the event loop


class _StrictRequest(Request):
    async def json(self) -> Any:
        data = await self.body()
        try:
            return await off_loop(len(data) >= BIG, loads, data)
        except UserError as e:  # any other exception FastAPI would answer itself
            raise HttpError(e.status, str(e), e.code_str) from e


class StrictRoute(APIRoute):
    """FastAPI's route, its JSON bodies read by `loads`."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


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

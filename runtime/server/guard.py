"""The door: pure ASGI in front of all routes. Who may ask, how much, how long; and who went away."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import Overloaded, RtpLlmError, shown
from ..service import SANE_ID, Call, Service
from . import failures, logs
from .failures import HttpError
from .settings import LOOPBACK_NAMES

OPEN = {"/health", "/health/live", "/health/ready"}  # no key needed: probes have none
ALWAYS = {"/health", "/health/live", "/health/ready", "/metrics", "/status"}  # answered while draining too
BODIES_AT_ONCE = 4  # times max_body_bytes may be held in memory by all requests together
PIECE = 1 << 16  # bytes of an answer: uvicorn holds what it was given, read or not, without limit
SMALL = 1 << 20  # bytes of a body that large ones, sent halfway, must not shut out
LINGER_SECONDS = 2.0  # a client that is refused while it sends may finish sending, to read the answer
ONCE = (b"host", b"authorization", b"content-type")
KINDS = {"/": "raw", "/v1/chat/completions": "chat", "/chat/completions": "chat"}  # of generating ones
CLIENT_GONE = 499  # in the log, where no answer was begun


class _SlowReader(asyncio.CancelledError):
    """The client left its answer unread for too long; a cancellation, which no handler answers."""


class Guard:
    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self.service = service
        self.settings = service.settings
        self._keys = [key.encode() for key in self.settings.api_key]
        self._names = self._host_names()
        self._buffered = 0  # bytes of bodies held
        self.active = 0  # requests inside, probes not counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # uvicorn's own start and stop
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        logs.request_id.set(request_id)
        kind = KINDS.get(scope["path"]) if scope["method"] == "POST" else None
        visit = _Visit(self, scope, send, self.service.begin(request_id, kind))
        counted = scope["path"] not in ALWAYS
        self.active += counted
        try:
            await self._visit(visit, scope, receive, headers)
        finally:
            self.active -= counted
            self._buffered -= visit.buffered
            self.service.end(visit.call, scope["method"], scope["path"], visit.status or CLIENT_GONE)

    async def _visit(
        self, visit: _Visit, scope: Scope, receive: Receive, headers: dict[str, str]
    ) -> None:
        try:
            key = self._check(scope, headers)
            visit.call.salt = hashlib.sha256(key).digest() if key else b""
            scope.setdefault("state", {})["call"] = visit.call
            body = await visit.read(receive, headers)
        except (HttpError, RtpLlmError) as e:
            await visit.refuse(e, receive)
        else:
            if body is not None:
                await visit.run(self._app, body, receive)

    # ---- who ----------------------------------------------------------------------------------

    def _host_names(self) -> set[str] | None:
        """Names that requests may be addressed to; None: any."""
        names = {name.lower() for name in self.settings.allowed_hosts}
        # a page of another site that had its name resolve to us would still not know the key
        if "*" in names or (self._keys and not names and not self.settings.loopback):
            return None
        if not self.settings.loopback:
            names.add(socket.gethostname().lower())
        return names | set(LOOPBACK_NAMES)

    def _check(self, scope: Scope, headers: dict[str, str]) -> bytes:
        """The caller's key, empty if none is needed. Raises HttpError."""
        path, method = scope["path"], scope["method"]
        names = [name for name, _ in scope["headers"]]
        if twice := [name for name in ONCE if names.count(name) > 1]:  # a proxy may have read the other
            raise HttpError(400, f"the header {twice[0].decode()} is given twice")
        if self._names is not None and not self._addressed(headers.get("host", "")):
            name = shown(headers.get("host", ""))
            raise HttpError(421, f"this server is not called {name} (--allowed-hosts)", "421_WRONG_HOST")
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may see two requests
            raise HttpError(400, "give Content-Length or Transfer-Encoding, not both")
        key = b""
        if self._keys and path not in OPEN and (method, path) not in (("GET", "/"), ("HEAD", "/")):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            # every key is compared, so that time tells nothing
            if not sum(hmac.compare_digest(key, known) for known in self._keys):
                raise HttpError(401, "send your API key as `Authorization: Bearer KEY`", "401_WRONG_API_KEY")
        if self.service.phase == "draining" and path not in ALWAYS:
            raise HttpError(503, "the server is shutting down", "503_DRAINING")
        if method not in ("GET", "HEAD", "OPTIONS"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                detail = f"Content-Type is {shown(kind) if kind else 'missing'}, expected application/json"
                raise HttpError(415, f"{detail} (curl: -H 'Content-Type: application/json')", "415_NOT_JSON")
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise HttpError(415, "a compressed body is not supported", "415_COMPRESSED")
        return key

    def _addressed(self, host: str) -> bool:
        assert self._names is not None
        name = re.sub(r":\d+$", "", host).strip("[]").lower().rstrip(".")
        if name in self._names:
            return True
        try:  # no foreign page can have an address as its own name and be someone else
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.settings.loopback

    # ---- how much -----------------------------------------------------------------------------

    def buffer(self, count: int, size: int) -> None:
        """Room for `count` bytes more of a body that then has `size`. Raises Overloaded."""
        shares = BODIES_AT_ONCE - (size > SMALL)  # large ones leave a share to the small
        if self._buffered + count > shares * self.settings.max_body_bytes:
            raise Overloaded("the server holds too many large requests; try again later")
        self._buffered += count


class _Visit:
    """One request's way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, send: Send, call: Call):
        self.call = call
        self.buffered = 0
        self.status = 0  # of the answer; 0: none was begun
        self._guard = guard
        self._limits = guard.settings
        self._scope = scope
        self._path = scope["path"]
        self._abort: Callable[[], None] = scope.get("state", {}).get("abort") or (lambda: None)
        self._raw_send = send
        self._complete = False

    async def send(self, message: Message) -> None:
        """Passes on, with the request's id. Raises _SlowReader."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.call.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        else:
            body, more = message.get("body", b""), message.get("more_body", False)
            for at in range(0, len(body) - PIECE, PIECE):
                await self._pass({"type": message["type"], "body": body[at : at + PIECE], "more_body": True})
            self._complete = not more
            rest = body[(len(body) - 1) // PIECE * PIECE :]
            message = {"type": message["type"], "body": rest, "more_body": more}
        await self._pass(message)

    async def _pass(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await self._raw_send(message)
        except TimeoutError as e:
            self.call.error = asyncio.CancelledError()
            self._abort()
            raise _SlowReader from e

    async def read(self, receive: Receive, headers: dict[str, str]) -> bytes | None:
        """The whole body; None when the client went away. Raises HttpError, Overloaded."""
        limit = self._limits.max_body_bytes
        too_large = HttpError(413, f"the body has more than {limit:,} bytes, the limit", "413_TOO_LARGE")
        if int(headers.get("content-length") or 0) > limit:
            raise too_large
        chunks = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.call.error = asyncio.CancelledError()
                        return None
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    self._guard.buffer(len(piece), len(chunks) + len(piece))
                    self.buffered += len(piece)
                    chunks += piece
                    if len(chunks) > limit:
                        raise too_large
        except TimeoutError as e:
            seconds = self._limits.body_seconds
            raise HttpError(408, f"the body did not arrive within {seconds:g} s", "408_BODY_TIMEOUT") from e
        return bytes(chunks)

    async def refuse(self, error: HttpError | RtpLlmError, receive: Receive) -> None:
        """Answer before the body is read, and let the client finish sending for a while.

        A connection closed on unread data would take the answer with it.
        """
        response = failures.response(error, self.call, self._path)
        headers = [*response.raw_headers, (b"connection", b"close")]
        start: Message = {"type": "http.response.start", "status": response.status_code, "headers": headers}
        try:
            await self.send(start)
            await self.send({"type": "http.response.body", "body": response.body, "more_body": True})
            if self.status != 408:
                await self._linger(receive)
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        except _SlowReader:
            pass

    async def _linger(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            pass

    async def run(self, app: ASGIApp, body: bytes, receive: Receive) -> None:
        """The routes; cancelled as soon as the client goes away or stops reading."""
        gone = asyncio.Event()
        pending = [body]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task = asyncio.ensure_future(app(self._scope, replay, self.send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            gone.set()
            if not task.done() and not self._complete:
                task.cancel()
                self.call.error = asyncio.CancelledError()
            await task
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        except Exception:  # Starlette passes on what its handler has answered and logged
            if not self._complete:
                self._abort()
        finally:
            for one in (task, watcher):
                one.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)

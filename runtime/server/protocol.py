"""uvicorn's h11 protocol with what it lacks: limits on connections, slow headers and unread answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

PIPELINED = 1 << 16  # bytes of next requests that a client may send before it has its answer


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http=`."""

    class Protocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # the guard cuts off a reader that stopped reading
            self.app_state = {**self.app_state, "abort": transport.abort}
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "503_TOO_MANY_CONNECTIONS", "too many connections; try again later")
                return
            self._watch_headers()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            self._watch_headers()
            # uvicorn reads no further than a pipelined request, and so would not see the client go away
            if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < PIPELINED:
                self.flow.resume_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._flush_or_abort()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._flush_or_abort()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(400, "507_BAD_REQUEST_FIELD", "not HTTP/1.1, or the headers are too long")
            else:
                self.transport.close()
                self._flush_or_abort()

        # ---- ours ------------------------------------------------------------------------------

        def _watch_headers(self) -> None:
            """A request's headers have a time limit from the first byte (or the connection) on."""
            waiting = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
            if not waiting:
                self._stop_watching()
            elif self._header_timer is None and not self.transport.is_closing():
                self._header_timer = self.loop.call_later(settings.header_seconds, self._headers_late)

        def _stop_watching(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _headers_late(self) -> None:
            if not self.transport.is_closing():
                seconds = settings.header_seconds
                self._refuse(408, "408_HEADER_TIMEOUT", f"the headers did not arrive within {seconds:g} s")

        def _refuse(self, status: int, code: str, message: str) -> None:
            self._stop_watching()
            kind = "server_error" if status >= 500 else "invalid_request_error"
            error = {"message": message, "type": kind, "param": None, "code": code}
            body = json.dumps({"error": error}).encode()
            head = (
                f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                f"{'Retry-After: 1' if status == 503 else 'X-Content-Type-Options: nosniff'}\r\n"
                "Connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()
            self._flush_or_abort()

        def _flush_or_abort(self) -> None:
            """A closing connection whose last bytes nobody reads would stay open for ever."""
            self.loop.call_later(settings.write_seconds, self.transport.abort)

    return Protocol

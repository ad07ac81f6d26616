"""From Settings to a running server, and down again."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from typing import Any

import uvicorn

from ...errors import UserError
from ...pipeline import Pipeline
from ..service import Service
from . import logs
from .app import make_app
from .guard import Guard
from .loading import model_path, open_pipeline
from .protocol import protocol
from .settings import Settings

log = logging.getLogger("rtp_llm.server")


class Server(uvicorn.Server):
    """Live at once; the model loads on a thread. The first signal drains, the second ends."""

    def __init__(self, service: Service):
        self.service = service
        self.guard: Guard = make_app(service)
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                self.guard,
                http=protocol(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=1,  # what is left after the drain is cancelled
            )
        )
        self.error: BaseException | None = None
        self._drain_until = float("inf")

    def load(self) -> None:
        """On a thread: the model, and a first token from it; then requests are taken."""
        try:
            pipeline = self.open()
        except BaseException as e:
            self.error = e
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # of an end that was never a start
            self.should_exit = True
            return
        self.service.ready(pipeline)
        log.info("ready: %s", self.service.model_name)

    def open(self) -> Pipeline:
        """Raises RtpLlmError."""
        return open_pipeline(self.service.settings)

    def abort(self, code: int) -> None:
        """At the second signal: end the process."""
        os._exit(code)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """uvicorn's signal handler. New requests get 503 while the running ones finish."""
        if self.service.phase == "draining":
            self.abort(128 + sig)
        self.service.phase = "draining"
        self._drain_until = time.monotonic() + self.service.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self.service.phase == "draining":
            if self.guard.active == 0 or time.monotonic() >= self._drain_until:
                return True
        return await super().on_tick(counter)


def run(settings: Settings, quiet: bool = False) -> int:
    """`serve` a model; returns the exit code, or ends the process where threads would hold it up.

    Raises RtpLlmError when the model cannot be loaded.
    """
    model_path(settings)  # while nobody is told that we listen
    serve(Server(Service(settings)), quiet)
    # downloads of those who left, and a model that was still loading, would hold up the end
    if [t for t in threading.enumerate() if t is not threading.current_thread()]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def serve(server: Server, quiet: bool = False) -> None:
    """Until a signal. `quiet`: only warnings are logged.

    Raises RtpLlmError: what went wrong while the model was loaded, or what ended the server.
    """
    settings = server.service.settings
    logs.setup(settings.json_logs, logging.WARNING if quiet else logging.INFO)
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d", shown, port)
    if settings.ft_server_test:
        log.warning("FT_SERVER_TEST=1: clients on this machine may name files below %s", os.getcwd())
    if settings.insecure and not settings.loopback and not settings.api_key:
        log.warning("--insecure: anybody who reaches %s:%d may use the model", host, port)
    loader = threading.Thread(target=server.load, name="load-model", daemon=True)
    loader.start()
    asyncio.run(server.serve(sockets=[listener]))
    if server.error is not None:
        raise server.error
    server.service.close()


def listen(settings: Settings) -> socket.socket:
    """Raises UserError: unknown host, port in use."""
    where = f"{settings.host}:{settings.start_port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.start_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as e:
        raise UserError(f"cannot listen on {where} (HOST, START_PORT): {e.strerror or e}") from e
    return listener



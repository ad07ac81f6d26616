"""From Settings to a running server, and down again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections import deque
from typing import Any

import uvicorn

from ...errors import UserError
from ...model_factory import MODEL_TYPES, ModelFactory, bundle_of
from ...pipeline import Pipeline
from .. import grammar
from ..backends import device_of
from . import logs, memory
from .app import make_app
from .guard import Guard
from .protocol import protocol
from .service import Service
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
            pipeline = _open(self.service.settings)
        except BaseException as e:
            self.error = e
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # of an end that was never a start
            self.should_exit = True
            return
        self.service.ready(pipeline)
        log.info("ready: %s", self.service.model_name)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """uvicorn's signal handler. New requests get 503 while the running ones finish."""
        if self.service.phase == "draining":
            os._exit(128 + sig)
        self.service.phase = "draining"
        self._drain_until = time.monotonic() + self.service.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self.service.phase == "draining":
            if self.guard.active == 0 or time.monotonic() >= self._drain_until:
                return True
        return await super().on_tick(counter)


def run(settings: Settings, quiet: bool = False) -> int:
    """Serve until a signal; returns the exit code, or ends the process where threads would hold it up.

    `quiet`: only warnings are logged.
    Raises RtpLlmError when the model cannot be loaded.
    """
    _path(settings)  # while nobody is told that we listen
    logs.setup(settings.json_logs, logging.WARNING if quiet else logging.INFO)
    # Pillow warns of odd pictures, and Python keeps each text for good: clients write them
    warnings.filterwarnings("ignore", module=r"PIL\.")
    listener = listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d", shown, port)
    if settings.ft_server_test:
        log.warning("FT_SERVER_TEST=1: clients on this machine may name files below %s", os.getcwd())
    if settings.insecure and not settings.loopback and not settings.api_key:
        log.warning("--insecure: anybody who reaches %s:%d may use the model", host, port)
    server = Server(Service(settings))
    loader = threading.Thread(target=server.load, name="load-model", daemon=True)
    loader.start()
    asyncio.run(server.serve(sockets=[listener]))
    if server.error is not None:
        raise server.error
    server.service.close()
    # downloads of those who left, and a model that was still loading, would hold up the end
    if [t for t in threading.enumerate() if t is not threading.current_thread()]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _path(settings: Settings) -> str:
    """Folder or hub id of what is served. Raises UserError: none, or a folder that is not there."""
    if not settings.checkpoint_path and not settings.model_type:
        raise UserError("give a model: CHECKPOINT_PATH (or --checkpoint_path), or MODEL_TYPE")
    path = settings.checkpoint_path or MODEL_TYPES.get(settings.model_type or "")
    if not path:
        raise UserError(f"MODEL_TYPE={settings.model_type!r} is unknown, known are {sorted(MODEL_TYPES)}")
    if not os.path.exists(path) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(f"CHECKPOINT_PATH={path!r} does not exist: give a folder or a hub id (owner/name)")
    return path


def _open(settings: Settings) -> Pipeline:
    """The model behind its memory table. Raises UserError when it does not fit."""
    config = settings.model_config()
    bundle = bundle_of(_path(settings), config)
    device = device_of(bundle, config.device)
    table = memory.plan(
        bundle,
        memory.memory_limit(settings.memory_limit)
        if device == "cpu"
        else memory.gpu_limit(settings.memory_limit, device),
        kv_cache_bytes=config.kv_cache_bytes,
        image_cache_bytes=config.image_cache_bytes,
        slots=config.slots,
        max_seq_len=config.max_seq_len,
        gpu=device != "cpu",
    )
    _check(table)
    config = dataclasses.replace(config, ckpt_path=str(bundle.path), kv_cache_bytes=table.cache)
    model = ModelFactory.from_model_config(config)
    with contextlib.suppress(ValueError, ImportError):  # then a request that wants a grammar is told
        grammar.prepare(model.tokenizer, model.bundle.model.vocab_size)
    pipeline = Pipeline(model, media_policy=settings.media_policy())
    deque(pipeline("Hi", generate_config={"max_new_tokens": 1, "top_k": 1}), maxlen=0)
    table = memory.measure(table, model)
    _check(table)
    print(table, flush=True)
    return pipeline


def _check(table: memory.Table) -> None:
    try:
        table.check()
    except UserError as e:
        line, _, _ = str(e).partition("\n")
        print(table, flush=True)
        raise UserError(line) from e


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



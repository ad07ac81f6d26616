"""A real server on a real socket, around the real sample model: one for the session, others as needed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.server.lifecycle import Server, listen
from rtp_llm.runtime.server.settings import Settings
from rtp_llm.runtime.service import Service

IMAGES = Path(__file__).parents[2] / "images"
LONG = {"ignore_eos": True, "max_new_tokens": 8000}  # seconds of tokens, for who means to interrupt


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(scope="session")
def long() -> dict[str, Any]:
    """A generate_config that runs until somebody interrupts it."""
    return LONG


@pytest.fixture(scope="session")
def serve() -> Any:
    """`with serve(model, **settings) as running:` another server than the session's."""
    return serving


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for a condition; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


@dataclasses.dataclass
class Running:
    url: str
    server: Server

    @property
    def pipeline(self) -> Pipeline:
        return self.server.service.pipeline

    def idle(self) -> bool:
        """Has every request left the guard and the engine?"""
        return self.server.guard.active == 0 and not self.pipeline.model.engine._jobs

    def get(self, path: str, **more: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **more)

    def post(self, path: str, json: Any = None, **more: Any) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=30, **more)

    def chat(self, content: Any, **config: Any) -> requests.Response:
        body = {"messages": [{"role": "user", "content": content}]} | config
        return self.post("/v1/chat/completions", body)


@contextlib.contextmanager
def serving(model: Any, send_buffer: int = 0, **settings: Any) -> Iterator[Running]:
    """A server on a thread; `model` None: it never becomes ready; `send_buffer`: bytes, the kernel's."""
    told = Settings(**{"start_port": 0, "header_seconds": 5.0} | settings)
    server = Server(Service(told))
    if model is not None:
        server.service.ready(Pipeline(model, media_policy=told.media_policy()))
    listener = listen(told)
    if send_buffer:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Running(f"http://127.0.0.1:{port}", server)
    finally:
        server.should_exit = True
        thread.join(20)
        server.service.close_pools()
        assert not thread.is_alive()


@contextlib.contextmanager
def shell_server(script: str, port: int, cwd: Path, log: Path) -> Iterator[None]:
    """The server that these shell lines start, from the moment that it is ready; its output in `log`."""
    with open(log, "wb") as out:
        process = subprocess.Popen(["sh", "-c", script], cwd=cwd, stdout=out, stderr=out)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"http://localhost:{port}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(ready, 120)
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def from_shell() -> Any:
    """`with from_shell(script, port, cwd, log):` a server in a process of its own."""
    return shell_server


@pytest.fixture(scope="session")
def model(qwen_bundle: Path) -> Any:
    return ModelFactory.from_huggingface(qwen_bundle)


@pytest.fixture(scope="session")
def server(model: Any) -> Iterator[Running]:
    with serving(model, allowed_local_media_path=os.fspath(IMAGES), max_images=4) as running:
        yield running
    model.engine.stop()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)

"""Live at once, ready when the model answers, draining on SIGTERM: the real program in a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests


class Program:
    """`python -m rtp_llm.start_server` on a free port, its output kept."""

    def __init__(self, *args: str, command: tuple[str, ...] = ("rtp_llm.start_server",), **env: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--start-port", "0", *args],
            env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out, self.err = "", ""
        self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("out", "err")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, f"std{name}"):
            setattr(self, name, getattr(self, name) + line)

    @property
    def url(self) -> str | None:
        found = re.search(r"listening on (http://\S+?:\d+)", self.err)
        return found[1] if found else None

    def phase(self) -> str:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/status", timeout=5).json()["status"]
        return "gone"

    def wait(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code


@contextlib.contextmanager
def program(*args: str, **more: Any) -> Iterator[Program]:
    started = Program(*args, **more)
    try:
        yield started
    finally:
        started.process.kill()
        started.wait()


@pytest.fixture
def running(qwen_bundle: Path, until) -> Iterator[Program]:
    with program(CHECKPOINT_PATH=str(qwen_bundle)) as started:
        until(lambda: started.url, 60)
        until(lambda: started.phase() == "ready", 60)
        yield started


def stream(url: str, tokens: int = 4000) -> Iterator[bytes]:
    """What is left of a stream whose first bytes are here."""
    body = {"prompt": "hi", "stream": True, "ignore_eos": True, "max_new_tokens": tokens}
    rest = requests.post(url, json=body, stream=True, timeout=30).iter_content(None)
    next(rest)
    return rest


def test_live_at_once_and_ready_only_when_the_model_answers(serve, model):
    with serve(None) as running:
        assert running.get("/health/live").status_code == 200
        for path in ("/health", "/health/ready"):
            assert (running.get(path).status_code, running.get(path).json()["status"]) == (503, "loading")
        assert running.get("/status").json() == {"status": "loading", "model": None}
        for answer in (running.post("/", {"prompt": "hi"}), running.get("/v1/models"), running.chat("hi")):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert "loading" in answer.text
        assert running.get("/metrics").status_code == 200
        assert running.get("/").status_code == 200


def test_start_up_prints_the_memory_table_and_sigterm_ends_an_idle_server_with_0(running):
    assert re.search(r"^key-value cache .*tokens", running.out, re.MULTILINE)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait(10) == 0
    assert "Traceback" not in running.err


def test_sigterm_lets_running_requests_finish_and_tells_new_ones_503(running, until):
    rest = stream(running.url, 600)
    running.process.send_signal(signal.SIGTERM)
    until(lambda: running.phase() == "draining")
    for refused in (
        requests.post(running.url, json={"prompt": "hi"}, timeout=5),
        requests.get(f"{running.url}/health/ready", timeout=5),
    ):
        assert refused.status_code == 503
    assert requests.get(f"{running.url}/health/live", timeout=5).status_code == 200
    events = b"".join(rest).decode().strip().split("\r\n\r\n")
    assert events[-1] == "data:[done]"
    assert json.loads(events[-2].removeprefix("data:"))["aux_info"]["output_len"] == 600
    assert running.wait(10) == 0


def test_a_second_sigterm_ends_it_at_once(running, until):
    rest = stream(running.url)
    running.process.send_signal(signal.SIGTERM)
    until(lambda: running.phase() == "draining")
    running.process.send_signal(signal.SIGTERM)
    assert running.wait(5) == 128 + signal.SIGTERM
    with pytest.raises(requests.RequestException):
        b"".join(rest)


def test_what_runs_longer_than_the_drain_is_cut_and_the_exit_is_0(qwen_bundle, until):
    with program("--drain-seconds", "0.2", CHECKPOINT_PATH=str(qwen_bundle)) as running:
        until(lambda: running.url and running.phase() == "ready", 60)
        rest = stream(running.url)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        with contextlib.suppress(requests.RequestException):
            assert b"[done]" not in b"".join(rest)


def test_a_picture_that_never_comes_does_not_hold_up_the_end(qwen_bundle, until):
    env = {"ALLOWED_MEDIA_DOMAINS": "localhost", "ALLOWED_MEDIA_CIDRS": "127.0.0.0/8,::1/128"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://localhost:{silent.getsockname()[1]}/x.png"
        with program("--drain-seconds", "0.2", CHECKPOINT_PATH=str(qwen_bundle), **env) as running:
            until(lambda: running.url and running.phase() == "ready", 60)
            with pytest.raises(requests.Timeout):
                requests.post(running.url, json={"prompt": f"<img>{url}</img>"}, timeout=0.5)
            running.process.send_signal(signal.SIGTERM)
            assert running.wait(10) == 0


def test_rtp_llm_serve_is_the_same_program(qwen_bundle, until):
    """Its BUNDLE may stand behind a flag that takes a value or none."""
    with program(command=("rtp_llm.cli", "serve", "--deterministic", str(qwen_bundle))) as running:
        until(lambda: running.url and running.phase() == "ready", 60)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(10) == 0


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        ((), {"CHECKPOINT_PATH": ""}, "give a model: CHECKPOINT_PATH"),
        ((), {"CHECKPOINT_PATH": "no/such/folder"}, "does not exist"),
        (("--host", "0.0.0.0"), {}, "HOST='0.0.0.0' is reachable from other machines"),
        (("--memory-limit", "1MB"), {}, "needs"),
        (("--concurrency_limit", "no"), {}, "--concurrency-limit='no' must be"),
    ],
)
def test_what_cannot_start_says_why_in_one_line_and_ends_with_2(qwen_bundle, args, env, message):
    with program(*args, **({"CHECKPOINT_PATH": str(qwen_bundle)} | env)) as failed:
        assert failed.wait(60) == 2
    last = failed.err.strip().splitlines()[-1]
    assert last.startswith("start_server: ")
    assert message in last
    assert "Traceback" not in failed.err
    assert "Shutting down" not in failed.err
    assert ("listening" in failed.err) == ("--memory-limit" in args)  # that one takes opening the model


def test_a_taken_port_is_named(serve, qwen_bundle, model):
    with serve(model) as other:
        port = other.url.rsplit(":", 1)[1]
        with program("--start-port", port, CHECKPOINT_PATH=str(qwen_bundle)) as failed:
            assert failed.wait(60) == 2
        assert f"cannot listen on 127.0.0.1:{port} (HOST, START_PORT): Address already in use" in failed.err

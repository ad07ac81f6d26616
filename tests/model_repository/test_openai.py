"""The HTTP server in front of a Triton server answers as the one that has the model itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

from rtp_llm.export.bundle import read
from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.server.lifecycle import Server, listen
from rtp_llm.runtime.server.settings import Settings
from rtp_llm.runtime.service import Service
from rtp_llm.runtime.tritonserver.front import Front
from rtp_llm.runtime.tritonserver.launch import free_ports

from .calls import until

IMAGES = Path(__file__).parents[1] / "images"
LIMITS = {"max_images": 2, "allowed_local_media_path": os.fspath(IMAGES)}
RED = os.fspath(IMAGES / "red_circle.png")
DATA = "data:image/png;base64," + base64.b64encode(Path(RED).read_bytes()).decode()
LONG = {"ignore_eos": True, "max_tokens": 8000}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}},
          "required": ["colour"], "additionalProperties": False}  # fmt: skip
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA}}


@contextlib.contextmanager
def on_a_thread(server: Server) -> Iterator[str]:
    """Its URL, from the moment that it is ready."""
    listener = listen(server.service.settings)
    server.load()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        server.service.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def local(qwen_bundle: Path) -> Iterator[str]:
    class Own(Server):
        def open(self) -> Pipeline:
            model = ModelFactory.from_huggingface(qwen_bundle)
            return Pipeline(model, media_policy=self.service.settings.media_policy())

    with on_a_thread(Own(Service(Settings(start_port=0, **LIMITS)))) as url:
        yield url


@pytest.fixture(scope="module")
def triton(serve: Any, qwen_bundle: Path) -> Any:
    return serve(qwen_bundle, settings={name: str(value) for name, value in LIMITS.items()})


@pytest.fixture(scope="module")
def front(triton: Any, qwen_bundle: Path) -> Iterator[str]:
    with on_a_thread(Front(Settings(start_port=0, **LIMITS), read(qwen_bundle), triton)) as url:
        yield url


def post(url: str, path: str, body: Any, **more: Any) -> requests.Response:
    return requests.post(url + path, json=body, timeout=30, **more)


def told(response: requests.Response) -> Any:
    """Status and body, without times, ids and what caches held."""

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(one) for one in value]
        if not isinstance(value, dict):
            return value
        drop = ("id", "created", "cost_time", "first_token_cost_time", "wait_time", "iter_count", "reuse_len",
                "prompt_tokens_details")  # fmt: skip
        return {k: cut(v) for k, v in value.items() if k not in drop}

    return response.status_code, cut(response.json())


def chat(*content: Any, **config: Any) -> tuple[str, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": list(content)}], "temperature": 0}
    return "/v1/chat/completions", body | config


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


WHAT = {"type": "text", "text": "What is this?"}
ASKED = {
    "a picture": chat(image(DATA), WHAT),
    "a file that is allowed": chat(image(RED), WHAT),
    "several answers": chat(WHAT, n=3, seed=3, temperature=1.2, max_tokens=8),
    "stop": chat(image(DATA), WHAT, stop=["circle"]),
    "logprobs": chat(image(DATA), WHAT, logprobs=True, top_logprobs=2),
    "structured": chat(WHAT, response_format=JSON_SCHEMA),
    "raw": ("/", {"prompt": "Picture 1:<img/>\nWhat is this?", "urls": [DATA], "top_k": 1}),
    "raw batch": ("/", {"prompt_batch": ["Hi", "What is a circle?"], "top_k": 1, "max_new_tokens": 5}),
    "raw ids": ("/", {"prompt": [100, 200, 300], "top_k": 1, "max_new_tokens": 5}),
    "raw returns": ("/", {"prompt": "Hi", "top_k": 1, "max_new_tokens": 2, "return_logits": True,
                          "return_output_ids": True, "num_return_sequences": 2}),
    "loss": ("/", {"prompt": "Hi there", "max_new_tokens": 0, "calculate_loss": 2}),
    "tokens": ("/tokenize", {"prompt": "Hi there"}),
    "text of tokens": ("/detokenize", {"tokens": [100, 200]}),
    "the rendered prompt": ("/v1/chat/render", chat(image(DATA), WHAT)[1]),
}  # fmt: skip
WRONG = {
    "tags": ("/", {"prompt": "Picture 1:<img/>\nWhat?"}),
    "no picture": chat(image("data:image/png;base64,AAAA"), WHAT),
    "a private address": chat(image("http://127.0.0.1:1/x.png"), WHAT),
    "a file outside": chat(image("/etc/passwd"), WHAT),
    "too many pictures": chat(image(DATA), image(DATA), image(DATA), WHAT),
    "an unknown field": chat(WHAT, tempersture=1),
    "a broken grammar": chat(WHAT, regex="("),
    "a stop word beyond the vocabulary": ("/", {"prompt": "Hi", "stop_words_list": [[10**8]]}),
    "too long": ("/", {"prompt": "word " * 6000}),
    "empty": ("/", {"prompt": ""}),
    "too many answers": chat(WHAT, n=200),
    "too many numbers": ("/", {"prompt": "Hi", "return_logits": True, "num_return_sequences": 20}),
    "no time": chat(WHAT, timeout_ms=1, **LONG),
    "not a role": ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "Hi"}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_the_local_servers(front, local, name):
    path, body = ASKED[name]
    assert told(post(front, path, body)) == told(post(local, path, body))


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_the_local_servers(front, local, name):
    path, body = WRONG[name]
    for streamed in ({}, {"stream": True}):
        there = told(post(front, path, body | streamed))
        assert there == told(post(local, path, body | streamed)) and 400 <= there[0] < 500


def streamed(url: str, asked: tuple[str, dict[str, Any]]) -> tuple[list[str], list[Any], list[Any]]:
    """Texts, finish reasons and logprobs of an OpenAI stream, put together."""
    body = asked[1] | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = [line for line in post(url, asked[0], body).text.split("\n\n") if line]
    assert done == "data: [DONE]"
    n = body.get("n", 1)
    texts, reasons, logprobs = [""] * n, [None] * n, []
    for chunk in map(json.loads, (line.removeprefix("data: ") for line in chunks)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = reasons[choice["index"]] or choice["finish_reason"]
            logprobs += (choice["logprobs"] or {}).get("content") or []
    assert chunk["usage"]["completion_tokens"] > 0 and len(chunks) > n + 2
    return texts, reasons, logprobs


@pytest.mark.parametrize("name", ["a picture", "several answers", "stop", "logprobs", "structured"])
def test_a_stream_is_the_local_servers(front, local, name):
    assert streamed(front, ASKED[name]) == streamed(local, ASKED[name])


def test_a_client_that_leaves_ends_its_request_at_triton(front):
    def running() -> int:
        return requests.get(front + "/worker_status", timeout=5).json()["running"]

    path, body = chat(WHAT, **LONG)
    for asked in (body | {"stream": True}, body):
        leave = threading.Event()
        thread = threading.Thread(target=_ask_and_leave, args=(front, path, asked, leave))
        thread.start()
        until(running)
        leave.set()
        thread.join()
        until(lambda: not running(), 3)


def _ask_and_leave(url: str, path: str, body: dict[str, Any], leave: threading.Event) -> None:
    with httpx.Client(base_url=url) as client, contextlib.suppress(httpx.ReadTimeout):
        # a whole answer takes longer than this
        with client.stream("POST", path, json=body, timeout=10 if body.get("stream") else 1.8) as response:
            pieces = response.iter_bytes()  # held: without it httpx hangs up
            next(pieces)
            leave.wait()


def test_load_and_caches_are_tritons(front):
    before = requests.get(front + "/cache_status", timeout=5).json()
    assert before["total_blocks"] > 0 and before["block_bytes"] > 0
    path, body = chat(image(DATA), WHAT)
    post(front, path, body)
    until(lambda: requests.get(front + "/cache_status", timeout=5).json()["images"] > before["images"], 3)
    metrics = requests.get(front + "/metrics", timeout=5).text
    found = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line[0] != "#"}
    assert found["rtp_llm_cache_blocks"] == before["total_blocks"]
    assert found["rtp_llm_generated_tokens_total"] > 0
    assert found['rtp_llm_requests_total{kind="chat",outcome="ok"}'] > 0


def test_each_key_has_caches_of_its_own(triton, qwen_bundle):
    settings = Settings(start_port=0, api_key=("one", "two"))
    with on_a_thread(Front(settings, read(qwen_bundle), triton)) as url:
        path, body = chat({"type": "text", "text": "Tell me of keys, " * 20})

        def cached(key: str) -> int:
            answer = post(url, path, body, headers={"Authorization": f"Bearer {key}"})
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("one") == 0 and cached("one") > 0
        assert cached("two") == 0 and cached("two") > 0
        assert post(url, path, body).status_code == 401


def test_what_there_is_besides(front):
    assert requests.get(front + "/health/ready", timeout=5).json() == {"status": "ok"}
    assert requests.get(front + "/v1/models", timeout=5).json()["data"][0]["max_images"] == 2
    assert "<title>" in requests.get(front + "/", timeout=5).text


SCRIPT = """
import sys
from pathlib import Path
from rtp_llm.errors import RtpLlmError
from rtp_llm.export.bundle import read
from rtp_llm.runtime.tritonserver.binary import find
from rtp_llm.runtime.server.settings import Settings
from rtp_llm.runtime.tritonserver.front import run
from rtp_llm.runtime.tritonserver.launch import Tritonserver

bundle, repository, cache, port = sys.argv[1:]
with Tritonserver(Path(repository), binary=find(cache=Path(cache))) as triton:
    print(triton.process.pid, flush=True)
    try:
        run(triton, read(bundle), Settings(), int(port))
    except RtpLlmError as e:
        sys.exit(str(e))
"""


@pytest.fixture
def alone(triton: Any, qwen_bundle: Path, triton_binary: Any) -> Iterator[Any]:
    """Both servers in a process of their own: it, Triton's pid, the URL."""
    port = free_ports("127.0.0.1", 0)[0]
    cache = triton_binary.path.parents[4]
    command = [sys.executable, "-c", SCRIPT, qwen_bundle, triton.repository, cache, port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: Any = subprocess.Popen(list(map(str, command)), **pipes)
    try:
        pid, url = int(process.stdout.readline()), f"http://127.0.0.1:{port}"
        until(lambda: _ready(url))
        yield process, pid, url
    finally:
        process.kill()
        process.wait()


def _ready(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url + "/health/ready", timeout=5).ok
    return False


@pytest.mark.slow
def test_a_signal_lets_running_answers_finish_and_ends_both_servers(alone):
    process, pid, url = alone
    path, body = chat(WHAT, ignore_eos=True, max_tokens=4000)
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(url, path, body)))
    thread.start()
    until(lambda: requests.get(url + "/worker_status", timeout=5).json()["running"])
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 0, process.stderr.read()
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_when_triton_ends_the_front_ends_and_says_so(alone):
    process, pid, url = alone
    os.kill(pid, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "tritonserver ended with signal 9" in process.stderr.read()

"""A client that goes away gives its slot and its cache blocks back within a second, however it goes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from .calls import LONG, Stream, generate, idle, metric, over_grpc, stream, streamed, tensors, until


@pytest.fixture(scope="module")
def server(serve, qwen_bundle):
    return serve(qwen_bundle)


@pytest.fixture(autouse=True)
def begins_and_ends_idle(server):
    until(lambda: idle(server))
    yield
    until(lambda: idle(server), 2)


def running(server: Any, count: int = 1) -> None:
    until(lambda: metric(server, "rtp_llm_sequences_running") == count)


def gives_back(server: Any, leave: Callable[[], Any]) -> None:
    """The client leaves, and a second later nothing is held."""
    running(server)
    until(lambda: metric(server, "rtp_llm_cache_blocks_running"))
    before = metric(server, "rtp_llm_requests_total", outcome="cancelled")
    leave()
    until(lambda: idle(server), 1)
    until(lambda: metric(server, "rtp_llm_requests_total", outcome="cancelled") == before + 1, 1)


def posted(server: Any, path: str, body: Any) -> socket.socket:
    data = json.dumps(body).encode()
    host, port = server.http.split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        f"POST /v2/models/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    )
    return connection


def test_a_grpc_stream_that_is_stopped(server):
    one = Stream(server)
    one.ask("one", text_input="hi", sampling_parameters=LONG)
    one.next()
    gives_back(server, lambda: one.close(cancel=True))


def test_one_stopped_stream_leaves_the_others_running(server):
    with stream(server) as stays:
        stays.ask("stays", text_input="hi", sampling_parameters=LONG | {"max_new_tokens": 4000})
        goes = Stream(server)
        for i in range(4):
            goes.ask(str(i), text_input="hi", sampling_parameters=LONG)
        running(server, 5)
        goes.close(cancel=True)
        until(lambda: metric(server, "rtp_llm_sequences_running") == 1, 1)
        assert len(stays.all(1)["stays"].ids[0]) == 4000


def test_an_http_stream_that_is_left(server):
    body = {"text_input": "hi", "sampling_parameters": json.dumps(LONG)}
    connection = posted(server, "vlm/generate_stream", body)
    assert b"text_output" in connection.recv(4096) + connection.recv(4096)
    gives_back(server, connection.close)


@pytest.mark.parametrize("path", ["vlm_complete/generate", "vlm_complete/infer"])
def test_a_whole_answer_that_nobody_waits_for_ends_by_its_time_limit(server, path):
    """Triton's HTTP does not see a client go to which it has nothing to write yet; gRPC does."""
    config = LONG | {"timeout_ms": 1500}
    body: dict[str, Any] = {"text_input": "hi", "sampling_parameters": json.dumps(config)}
    if path.endswith("infer"):
        body = {
            "inputs": [
                {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}
                for name, value in body.items()
            ]
        }
    connection = posted(server, path, body)
    running(server)
    connection.close()
    until(lambda: idle(server), 2.5)


def test_a_whole_answer_whose_grpc_call_is_cancelled(server):
    with grpc.InferenceServerClient(server.grpc) as client:
        values = {"text_input": "hi", "sampling_parameters": LONG}
        call = client.async_infer("vlm_complete", tensors(grpc, values), lambda result, error: None)
        gives_back(server, call.cancel)


def test_a_clients_deadline(server):
    """Of a whole answer, and of a stream."""
    with grpc.InferenceServerClient(server.grpc) as client:

        def whole() -> None:
            with pytest.raises(InferenceServerException, match="Deadline"):
                values = {"text_input": "hi", "sampling_parameters": LONG}
                client.infer("vlm_complete", tensors(grpc, values), client_timeout=0.5)

        waiting = threading.Thread(target=whole)
        waiting.start()
        gives_back(server, waiting.join)
    one = Stream(server, stream_timeout=0.5)
    one.ask("one", text_input="hi", sampling_parameters=LONG)
    running(server)

    def late() -> None:
        with pytest.raises(InferenceServerException, match="Deadline"):
            while True:
                one.next()

    gives_back(server, late)
    one.close()


def test_a_time_limit_of_the_request(server):
    began = time.monotonic()
    with pytest.raises(InferenceServerException, match="514_GENERATE_TIMEOUT"):
        over_grpc(server, text_input="hi", sampling_parameters=LONG | {"timeout_ms": 300})
    assert time.monotonic() - began < 2
    until(lambda: idle(server), 1)


def test_stop_ends_the_request_of_the_same_id_and_no_other(server):
    with stream(server) as one, stream(server) as other:
        one.ask("mine", text_input="hi", sampling_parameters=LONG)
        one.ask("yours", text_input="hi", sampling_parameters=LONG)
        running(server, 2)
        other.ask("mine", stop=True)
        result, final = other.next()
        assert final and list(result.as_numpy("text_output")) == [b""]
        assert not np.any(result.as_numpy("token_ids") >= 0)
        with pytest.raises(InferenceServerException, match="499_CANCELLED"):
            while True:
                _, ended = one.next()
                assert not ended
        until(lambda: metric(server, "rtp_llm_sequences_running") == 1, 1)
        result, _ = one.next()
        assert np.any(result.as_numpy("token_ids") >= 0), "yours goes on"
        other.ask("nobody's", stop=True)
        assert other.next()[1]


def test_stop_without_a_request_id_ends_nobodys_request(server):
    """Most clients give none."""
    with stream(server) as one, stream(server) as other:
        one.ask("", text_input="hi", sampling_parameters=LONG)
        running(server)
        other.ask("", stop=True)
        with pytest.raises(InferenceServerException, match="507_BAD_REQUEST_FIELD: stop"):
            other.next()
        assert not one.next()[1]


def test_clients_that_leave_all_the_time_leave_nothing_behind(server):
    def leave() -> None:
        for i in range(10):
            if i % 2:
                one = Stream(server)
                for k in range(4):
                    one.ask(f"{k}", text_input=f"hi {i} {k}", sampling_parameters=LONG)
                time.sleep(0.03 * i)
                one.close(cancel=True)
            else:
                path = ("vlm_complete/generate", "vlm/generate_stream")[i // 2 % 2]
                config = json.dumps(LONG | {"timeout_ms": 2000})
                one = posted(server, path, {"text_input": f"hi {i}", "sampling_parameters": config})
                time.sleep(0.03 * i)
                one.close()

    threads = [threading.Thread(target=leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: idle(server), 5)
    assert server.process.poll() is None
    assert streamed(server, text_input="hi", sampling_parameters={"max_new_tokens": 2}).ids
    assert generate(server, text_input="hi").status_code == 200

"""Models come, go and fall while the server stays: loading, versions, SIGTERM, a killed process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from rtp_llm.errors import UserError

from .calls import LONG, Stream, metric, over_grpc, over_http, stream, streamed, until

EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")
ASK: dict[str, Any] = {
    "text_input": "Name a colour.",
    "sampling_parameters": {"top_k": 1, "max_new_tokens": 8, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def server(serve, qwen_bundle):
    server = serve(qwen_bundle, own=True, extra=EXPLICIT)
    yield server
    server.stop(3)  # whose process a test has killed, and which waits for it


@pytest.fixture
def client(server):
    with grpc.InferenceServerClient(server.grpc) as client:
        yield client


def stubs(server: Any, model: str = "vlm") -> list[psutil.Process]:
    """The processes of a model."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if f"/{model}/" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def shared_memory(server: Any) -> int:
    """Bytes of the server's regions in /dev/shm."""
    return sum(os.stat(f).st_blocks * 512 for f in Path("/dev/shm").glob(f"{server._region}*"))


def test_a_model_that_is_unloaded_lets_everything_go_and_comes_back(server, client):
    want = streamed(server, **ASK)
    assert len(stubs(server)) == 1
    for _ in range(2):
        client.unload_model("vlm")
        until(lambda: not client.is_model_ready("vlm"))
        until(lambda: not stubs(server))
        with pytest.raises(InferenceServerException):
            over_grpc(server, **ASK)
        assert client.is_server_live() and client.is_model_ready("vlm_complete")
        client.load_model("vlm")
        assert client.is_model_ready("vlm") and len(stubs(server)) == 1
        assert streamed(server, **ASK) == want == over_http(server, **ASK)
    until(lambda: not metric(server, "rtp_llm_sequences_running"), 2)


def test_loading_again_and_again_leaves_no_shared_memory(server, client):
    def loaded_again() -> int:
        client.unload_model("vlm")
        until(lambda: not stubs(server))
        client.load_model("vlm")
        streamed(server, **ASK)
        return shared_memory(server)

    first = loaded_again()
    assert first > 0
    assert [loaded_again() for _ in range(3)][-1] <= first


def test_running_streams_finish_before_their_model_goes(server, client):
    config = LONG | {"max_new_tokens": 1000, "top_k": 1}
    with stream(server) as one:
        one.ask("one", text_input="hi", sampling_parameters=config)
        first, _ = one.next()
        client.unload_model("vlm")
        taken = int((first.as_numpy("token_ids") >= 0).sum())
        assert taken + len(one.all(1)["one"].ids[0]) >= 1000
    until(lambda: not stubs(server))
    client.load_model("vlm")
    assert streamed(server, **ASK).ids


def test_the_newest_version_is_served_and_the_one_before_goes(server, client):
    folder = server.repository / "vlm"
    want = streamed(server, **ASK)
    shutil.copytree(folder / "1", folder / "2")
    try:
        client.load_model("vlm")
        assert client.is_model_ready("vlm", "2")
        until(lambda: not client.is_model_ready("vlm", "1"))
        until(lambda: len(stubs(server)) == 1)
        assert streamed(server, **ASK) == want == over_http(server, **ASK)
        until(lambda: metric(server, "rtp_llm_requests_total") >= 1, 2)
    finally:
        shutil.rmtree(folder / "2")
        client.load_model("vlm")
    until(lambda: client.is_model_ready("vlm", "1"))
    assert streamed(server, **ASK) == want


def test_a_killed_process_is_told_and_the_next_load_works(server, client):
    want = streamed(server, **ASK)
    [stub] = until(lambda: len(found := stubs(server)) == 1 and found)
    os.kill(stub.pid, signal.SIGKILL)
    with pytest.raises(InferenceServerException, match="not healthy"):
        over_grpc(server, **ASK)
    assert client.is_server_live()
    client.unload_model("vlm")
    client.load_model("vlm")
    assert streamed(server, **ASK) == want == over_http(server, **ASK)


def test_sigterm_lets_running_streams_finish(serve, qwen_bundle):
    server = serve(qwen_bundle, own=True)
    config = LONG | {"max_new_tokens": 2500}
    want = {str(i): 2500 for i in range(4)}
    one = Stream(server)
    for name in want:
        one.ask(name, text_input="hi", sampling_parameters=config)
    whole: list[Any] = []
    waiting = threading.Thread(
        target=lambda: whole.append(over_grpc(server, text_input="hi", sampling_parameters=config))
    )
    waiting.start()
    until(lambda: metric(server, "rtp_llm_sequences_running") == 5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    answers = one.all(4)
    waiting.join()
    assert {name: len(answer.ids[0]) for name, answer in answers.items()} == want
    assert len(whole[0].ids[0]) == 2500
    one.close()
    assert server.process.wait(20) == 0
    server.stop()
    assert not list(Path("/dev/shm").glob(f"{server._region}*"))


def test_a_model_that_cannot_load_says_why(serve, qwen_bundle):
    with pytest.raises(UserError, match="104.9 MB are there .--memory-limit"):
        serve(qwen_bundle, own=True, settings={"memory_limit": "100MB"})
    with pytest.raises(UserError, match="max.images=.* must be a number"):
        serve(qwen_bundle, own=True, settings={"max_images": "many"})

"""The door: hosts, content types, keys, sizes, time limits, crowds and people who leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

HI = {"prompt": "hi", "max_new_tokens": 1}


def connect(server: Any) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def alive(sock: socket.socket) -> bool:
    """Does this connection get an answer?"""
    sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    got = b""
    while b'"ok"' not in got:
        got += (piece := sock.recv(1 << 16))
        if not piece:
            break
    return got.startswith(b"HTTP/1.1 200 OK")


def talk(server: Any, sent: bytes) -> bytes:
    """Everything that the server says to these bytes until it hangs up."""
    with connect(server) as sock:
        got = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it hung up on what we still send
            sock.sendall(sent)
            while piece := sock.recv(1 << 16):
                got += piece
        return got


def error_of(answer: bytes) -> tuple[int, str]:
    """The status, and the code of OpenAI's error shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


# ---------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8088", 200), ("[::1]:8088", 200), ("LOCALHOST.", 200),
     ("evil.example", 421), ("localhost.evil.example", 421), ("192.168.1.5", 421), ("", 421)],
)  # fmt: skip
def test_a_local_server_answers_to_local_names_only(server, host, status):
    """A page of another site may have its name resolve to 127.0.0.1."""
    for path in ("/v1/models", "/"):
        assert server.get(path, headers={"Host": host}).status_code == status


def test_more_names_are_allowed_by_flag(serve, model):
    with serve(model, allowed_hosts=("models.example",)) as running:
        assert running.get("/health", headers={"Host": "models.example:80"}).status_code == 200
        assert running.get("/health", headers={"Host": "other.example"}).status_code == 421


def test_beyond_loopback_an_address_is_a_name_too_and_with_a_key_any_name_is(serve, model):
    def asked(running: Any, host: str) -> int:
        return running.get("/health", headers={"Host": host}).status_code

    with serve(model, host="0.0.0.0", insecure=True) as running:
        assert (asked(running, "192.168.1.5:80"), asked(running, socket.gethostname())) == (200, 200)
        assert asked(running, "evil.example") == 421
    with serve(model, host="0.0.0.0", api_key=("k",)) as running:
        assert asked(running, "models.example") == 200
    with serve(model, host="0.0.0.0", api_key=("k",), allowed_hosts=("models.example",)) as running:
        assert (asked(running, "models.example"), asked(running, "evil.example")) == (200, 421)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", None],
)
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/tokenize", "/nowhere"])
def test_only_json_is_taken_so_that_no_web_pages_form_can_post(server, path, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = server.post(path, data=json.dumps(HI).encode(), headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.text


def test_no_site_is_given_access(server):
    origin = {"Origin": "https://evil.example"}
    for answer in (
        server.post("/", HI, headers=origin),
        server.get("/v1/models", headers=origin),
        requests.options(server.url + "/", headers=origin | {"Access-Control-Request-Method": "POST"}),
    ):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_key_is_asked_for_everywhere_but_at_the_page_and_for_probes(serve, model):
    with serve(model, api_key=("sesame", "other")) as running:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/status", "/nowhere"):
            assert running.get(path).status_code == 401, path
        for path in ("/", "/health", "/health/live", "/health/ready"):
            assert running.get(path).status_code == 200, path
        for wrong in ("Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sesame2", "Bearer s\xe9"):
            answer = running.post("/", HI, headers={"Authorization": wrong.encode("latin-1")})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()) == {"error_code", "error_code_str", "message"}
        for right in ("Bearer sesame", "bearer other"):
            assert running.post("/", HI, headers={"Authorization": right}).status_code == 200
        error = running.get("/v1/models").json()["error"]
        assert error["type"] == "authentication_error"


def test_callers_with_different_keys_share_no_cached_prompts(serve, model, monkeypatch):
    salts = []
    from rtp_llm.pipeline import Pipeline

    prepare = Pipeline.prepare

    def spy(self: Pipeline, *args: Any, **more: Any) -> Any:
        salts.append(more["salt"])
        return prepare(self, *args, **more)

    monkeypatch.setattr(Pipeline, "prepare", spy)
    with serve(model, api_key=("a", "b")) as running:
        for key in ("a", "b", "a"):
            running.post("/", HI, headers={"Authorization": f"Bearer {key}"})
    assert salts[0] == salts[2] != salts[1]
    assert b"a" not in salts


# ------------------------------------------------------------------------------------- request ids


@pytest.mark.parametrize("given", ["abc-123", "a" * 128])
def test_a_sane_request_id_comes_back(server, given):
    assert server.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    answer = server.post("/v1/chat/completions", {}, headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["a" * 129, "a b", "a\tb", "ä".encode(), "", "{}"])
def test_any_other_is_replaced(server, given):
    found = server.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert found != given
    assert len(found) == 32


# ------------------------------------------------------------------------------------- how much


def test_a_body_over_the_limit_is_refused_whether_its_length_is_told_or_not(serve, model):
    with serve(model, max_body_bytes=1000) as running:
        large = json.dumps({"prompt": "x" * 2000}).encode()
        headers = {"Content-Type": "application/json"}
        told = running.post("/", data=large, headers=headers)
        untold = running.post("/", data=iter([large[:900], large[900:]]), headers=headers)
        for answer in (told, untold):
            assert answer.status_code == 413
            assert answer.json()["error_code_str"] == "413_TOO_LARGE"
            assert "1,000" in answer.json()["message"]
        assert running.post("/", HI).status_code == 200


def test_a_client_that_asks_first_is_refused_before_it_sends_a_large_body(serve, model):
    with serve(model, max_body_bytes=1000) as running:
        head = (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 999999999\r\nExpect: 100-continue\r\n\r\n")  # fmt: skip
        with connect(running) as sock:
            sock.sendall(head)
            assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_all_bodies_together_have_a_limit(serve, model, until):
    with serve(model, max_body_bytes=1000, body_seconds=10.0) as running, contextlib.ExitStack() as open_:
        head = (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n")  # fmt: skip
        for _ in range(4):
            open_.enter_context(connect(running)).sendall(head + b" " * 999)
        until(lambda: running.server.guard._buffered == 4 * 999)
        answer = running.post("/", HI)
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        open_.close()
        until(lambda: running.server.guard._buffered == 0)
        assert running.post("/", HI).status_code == 200


def test_a_half_sent_body_is_told_408(serve, model, until):
    with serve(model, body_seconds=0.2) as running:
        head = (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{")  # fmt: skip
        assert error_of(talk(running, head)) == (408, "408_BODY_TIMEOUT")
        until(running.idle)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_half_sent_headers_are_told_408(serve, model, until, sent):
    with serve(model, header_seconds=0.2) as running:
        assert error_of(talk(running, sent)) == (408, "408_HEADER_TIMEOUT")
        until(lambda: not running.server.server_state.connections)


def test_headers_that_trickle_have_no_longer_time(serve, model):
    """Nor those of a connection's second request."""
    with serve(model, header_seconds=0.3, keep_alive_seconds=30.0) as running, connect(running) as sock:
        assert alive(sock)
        got = b""
        sock.settimeout(0.05)
        for letter in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100:
            with contextlib.suppress(TimeoutError):
                sock.sendall(bytes([letter]))
                if got := sock.recv(1 << 16):
                    break
        assert error_of(got) == (408, "408_HEADER_TIMEOUT")


def test_an_idle_connection_is_closed(serve, model):
    with serve(model, keep_alive_seconds=0.2) as running:
        assert talk(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\nHost: localhost\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"\x16\x03\x01\x02\x00\x01\x00\x01"],
    ids=range(6),
)  # fmt: skip
def test_what_is_not_http_gets_a_400_in_our_shape(server, sent):
    assert error_of(talk(server, sent)) == (400, "507_BAD_REQUEST_FIELD")


def test_headers_without_end_are_hung_up_on(server):
    answer = talk(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 3_000_000)
    assert answer == b"" or error_of(answer) == (400, "507_BAD_REQUEST_FIELD")


def test_too_many_connections_are_told_503_and_the_others_go_on(serve, model):
    with serve(model, max_connections=3) as running, contextlib.ExitStack() as open_:
        socks = [open_.enter_context(connect(running)) for _ in range(3)]
        assert all(map(alive, socks))
        answer = talk(running, b"")
        assert error_of(answer) == (503, "503_TOO_MANY_CONNECTIONS")
        assert b"Retry-After" in answer
        assert alive(socks[0])


def test_a_crowd_is_told_429_and_when_to_come_back(serve, model, until, long):
    with serve(model, concurrency_limit=2) as running:
        with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as open_:
            streams = [
                open_.enter_context(running.post("/", HI | long | {"stream": True}, stream=True))
                for _ in range(2)
            ]
            until(lambda: running.server.service.places.taken == 2)
            for answer in (running.post("/", HI), running.chat("hi")):
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert "409_CONCURRENCY_LIMIT_ERROR" in answer.text
            assert running.post("/tokenize", {"prompt": "hi"}).status_code == 200
            for stream in streams:
                stream.close()
            del pool
        until(running.idle)
        assert running.post("/", HI).status_code == 200
        batch = {"prompt_batch": ["hi"] * 2, "max_new_tokens": 1}
        assert running.post("/", batch).status_code == 200
        assert running.post("/", batch | {"prompt_batch": ["hi"] * 3}).status_code == 400


JSON = {"Content-Type": "application/json"}


@pytest.mark.alone
@pytest.mark.parametrize(
    "bomb",
    ['{"user":[' + "[]," * (4 << 20) + "[]]}", '{"prompt":"hi","urls":[' + "1," * 900_000 + "1]}",
     '{"prompt":[' + '"a",' * 900_000 + "1]}", "[" * 900_000 + "]" * 900_000,
     '{"messages":[' + "{}," * 450_000 + "{}]}"],
    ids=["empty lists", "wrong urls", "wrong ids", "deep", "messages"],
)  # fmt: skip
def test_others_are_answered_while_a_body_of_a_million_values_is_refused(server, bomb):
    with ThreadPoolExecutor(1) as pool:
        refused = [pool.submit(server.post, path, data=bomb, headers=JSON)
                   for path in ("/", "/v1/chat/completions")]  # fmt: skip
        stalls = []
        while not all(one.done() for one in refused):
            began = time.monotonic()
            assert server.get("/health/live").status_code == 200
            stalls.append(time.monotonic() - began)
        assert max(stalls) < 1, stalls
        assert all(one.result().status_code == 400 for one in refused)


@pytest.mark.alone
@pytest.mark.slow
def test_others_are_answered_while_the_largest_answer_is_written(server):
    rows = 4_000_000 // server.pipeline.model.bundle.model.vocab_size
    body = {"prompt": "hi", "ignore_eos": True, "num_return_sequences": 64, "max_new_tokens": rows // 64,
            "return_logits": True}  # fmt: skip
    program = f"import requests; print(len(requests.post({server.url!r}, json={body}).content))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        stalls = []
        while client.poll() is None:
            began = time.monotonic()
            assert server.get("/health/live").status_code == 200
            stalls.append(time.monotonic() - began)
        assert client.stdout and int(client.stdout.read()) > 50_000_000
    assert max(stalls) < 1, max(stalls)


def test_large_bodies_sent_halfway_leave_room_for_small_ones(serve, model, until):
    size = 2 << 20
    with serve(model, max_body_bytes=size, body_seconds=10.0) as running, contextlib.ExitStack() as open_:
        head = (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % size)  # fmt: skip
        for _ in range(3):
            open_.enter_context(connect(running)).sendall(head + b" " * (size - 1))
        until(lambda: running.server.guard._buffered == 3 * (size - 1))
        assert running.post("/", data=json.dumps(HI) + " " * (size - 100), headers=JSON).status_code == 429
        assert running.post("/", data=json.dumps(HI) + " " * (1 << 19), headers=JSON).status_code == 200


def test_the_number_of_values_in_a_body_has_a_limit_and_a_pictures_bytes_have_none(server):
    def asked(body: str) -> str:
        return server.post("/tokenize", data=body, headers=JSON).json()["error"]["message"]

    assert "1,000,000 commas" in asked('{"prompt":"hi","x":[' + "0," * 1_000_000 + "0]}")
    picture = {"type": "image_url", "image_url": "data:image/png;base64," + "Qk" * 1_500_000}
    assert server.chat([picture]).json()["error"]["code"] == "903_MM_PROCESS_ERROR"


@pytest.mark.parametrize("inner", [json.dumps("[[{\\"), json.dumps('"[[{'), "1", "{}"], ids=range(4))
@pytest.mark.parametrize("pad", ["", " " * (1 << 20)])
def test_a_body_nested_deeper_than_64_is_refused_wherever_it_is_deep(server, inner, pad):
    for depth in (64, 65, 985, 100_000):
        around = depth - 1 - (inner == "{}")
        deep = "[" * around + inner + "]" * around
        for field in ("user", "stop", "messages", "n", "tools"):
            answer = server.post("/v1/chat/completions", data=f'{{"{field}":{deep}}}{pad}', headers=JSON)
            assert answer.status_code == 400
            assert ("deeper than 64" in answer.text) == (depth > 64)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "x" * 3_000_000}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ["x" * 3_000_000]}]}),
        ("/v1/chat/completions", {"messages": [], "return_" + "x" * 3_000_000: 1}),
        ("/v1/chat/completions", {"messages": ["hi"], "return_" + "x" * 3_000_000: 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "x", "detail": "x" * 3_000_000}}]}]}),
        ("/", {"prompt": "hi", "stream": "x" * 3_000_000}),
        ("/", {"prompt": "hi", "generate_config": {"stream": {"x" * 3_000_000: 1}}}),
        ("/v1/chat/completions", {"messages": [{"role": "x" * 3_000_000, "content": "hi"}]}),
        ("/" + "x" * 30_000, {}),
        ("/", {"prompt": "hi", "x" * 3_000_000: 1}),
        ("/detokenize", {"tokens": [-(10**19)]}),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_refusal_repeats_little_of_what_was_sent(server, path, body):
    answer = server.post(path, body)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 2500


def test_each_answer_of_a_request_takes_a_place(serve, model, until):
    with serve(model, concurrency_limit=4) as running:
        for n in (4, 4.0):
            assert running.post("/", HI | {"num_return_sequences": n}).status_code == 200
        assert running.chat("hi", n=4, max_tokens=1).status_code == 200
        batch = {"prompt_batch": ["hi"] * 2, "max_new_tokens": 1, "generate_config": {"n": 3}}
        for answer in (
            running.chat("hi", n=5),
            running.chat("hi", extra_configs={"num_return_sequences": 5}),
            running.post("/", HI | {"n": 5}),
            running.post("/", batch),
        ):
            assert answer.status_code == 400
            assert "limit is 4" in answer.text
        body = HI | {"n": 3, "ignore_eos": True, "max_new_tokens": 4000, "stream": True}
        with running.post("/", body, stream=True):
            until(lambda: running.server.service.places.taken == 3)
            assert running.chat("hi", n=2, max_tokens=1).status_code == 429
            assert running.chat("hi", max_tokens=1).status_code == 200


# ----------------------------------------------------------------------------------- who goes away


def test_a_reader_that_stops_reading_is_cut_off_and_its_request_cancelled(serve, model, until):
    with serve(model, write_seconds=0.3) as running, connect(running) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # more than the kernel's buffers hold, and far more than a slow reader takes
        body = json.dumps({"prompt": "hi", "ignore_eos": True, "max_new_tokens": 6000, "stream": True,
                           "return_input_ids": True, "return_output_ids": True}).encode()  # fmt: skip
        sock.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        until(lambda: running.server.service.places.taken == 1)
        until(running.idle, 30)
        until(lambda: not running.server.server_state.connections)
    assert 'outcome="cancelled"} 1.0' in running.server.service.metrics.render().decode()


def test_who_leaves_while_its_picture_is_fetched_is_let_go_at_once(serve, model, until):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        port = silent.getsockname()[1]
        settings: dict[str, Any] = {
            "allowed_media_domains": ("localhost",),
            "allowed_media_cidrs": ("127.0.0.0/8", "::1/128"),
        }
        with serve(model, **settings) as running:
            part = {"type": "image_url", "image_url": f"http://localhost:{port}/x.png"}
            with pytest.raises(requests.Timeout):
                requests.post(
                    running.url + "/v1/chat/completions",
                    json={"messages": [{"role": "user", "content": [part]}]},
                    timeout=0.3,
                )
            until(running.idle, 2)
            assert running.chat("hi", max_tokens=1).status_code == 200


@pytest.mark.alone
def test_a_prompt_that_fails_ends_its_batch_and_places_are_held_until_threads_are_back(
    serve, model, until, monkeypatch
):
    from rtp_llm.pipeline import Pipeline
    from rtp_llm.runtime import service

    begun = []
    prepare = Pipeline.prepare

    def spy(self: Pipeline, prompt: str, *args: Any, **more: Any) -> Any:
        begun.append(prompt)
        return prepare(self, prompt, *args, **more)

    monkeypatch.setattr(service, "MEDIA_THREADS", 2)
    monkeypatch.setattr(Pipeline, "prepare", spy)
    settings: dict[str, Any] = {
        "allowed_media_domains": ("localhost",), "allowed_media_cidrs": ("127.0.0.0/8", "::1/128")
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as silent, serve(model, **settings) as running:
        guard, url = running.server.guard, f"http://localhost:{silent.getsockname()[1]}/x.png"
        slow = f"<img>{url}</img>"
        began = time.monotonic()
        answer = running.post("/", {"prompt_batch": [slow, "<img>not closed", *[slow] * 5]})
        assert answer.json()["error_code_str"] == "902_MM_WRONG_FORMAT_ERROR"
        assert time.monotonic() - began < 3
        until(running.idle)
        assert len(begun) <= 4  # the others were not even begun
        assert guard.service.places.taken == sum(prompt == slow for prompt in begun)
        silent.settimeout(5)
        while guard.service.places.taken:  # each download that ends gives its place back
            with contextlib.suppress(TimeoutError):
                silent.accept()[0].close()
                silent.settimeout(0.1)
        assert len(begun) <= 4
        assert running.post("/", HI).status_code == 200


def test_no_further_picture_is_fetched_for_who_went_away(model):
    asked = []

    def abandoned() -> bool:
        asked.append(1)
        return len(asked) > 1

    from PIL import Image

    from rtp_llm.errors import UserError
    from rtp_llm.pipeline import Pipeline

    pictures = [Image.new("RGB", (8, 8))] * 3
    with pytest.raises(UserError, match="abandoned"):
        Pipeline(model).prepare("<img/>" * 3, pictures, abandoned=abandoned)
    assert len(asked) == 2


def test_a_hundred_clients_that_vanish_leave_nothing_behind(serve, model, until, long):
    with serve(model) as running:
        running.post("/", HI)
        requests.Session().close()
        threads = threading.active_count()

        def vanish(n: int) -> None:
            body = json.dumps(HI | long | {"stream": bool(n % 2)}).encode()
            with connect(running) as sock:
                sock.sendall(
                    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) - n % 3]
                )  # fmt: skip
                if n % 2 and not n % 3:
                    sock.recv(10)

        with ThreadPoolExecutor(10) as pool:
            list(pool.map(vanish, range(100)))
        until(running.idle)
        until(lambda: not running.server.server_state.connections)
        until(lambda: not running.server.service.places.taken)
        assert running.server.guard._buffered == 0
        assert threading.active_count() <= threads + 4  # of the tokenising pool
        assert running.post("/", HI).status_code == 200


@pytest.mark.slow
def test_512_clients_that_never_read_their_answers_leave_nothing_behind(serve, model, until):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    body = json.dumps(HI | {"stream": True, "max_new_tokens": 3}).encode()
    head = (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n")  # fmt: skip
    with serve(model, concurrency_limit=600, keep_alive_seconds=1.0) as running:
        running.post("/", HI)
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        with contextlib.ExitStack() as open_:
            for _ in range(512):
                open_.enter_context(connect(running)).sendall(head % len(body) + body)
            assert running.get("/health").status_code == 200
            until(lambda: running.server.server_state.total_requests >= 512, 60)
            until(running.idle)
            until(lambda: not running.server.server_state.connections)  # although nobody closed or read
        assert len(os.listdir("/proc/self/fd")) <= files + 2
        assert threading.active_count() <= threads + 4  # of the tokenising pool
        assert running.post("/", HI).status_code == 200


# ------------------------------------------------------------------------------------------ routes


@pytest.mark.parametrize("name", ["Host", "Content-Type", "Authorization"])
def test_a_header_that_names_who_or_what_comes_once(server, name):
    given = {"Host": "localhost", "Content-Type": "application/json", "Authorization": "Bearer x"}
    lines = [f"{k}: {v}" for k, v in given.items()] + [f"{name}: {given[name]}", "Content-Length: 2"]
    answer = talk(server, "\r\n".join(["POST /tokenize HTTP/1.1", *lines, "", "{}"]).encode())
    assert error_of(answer) == (400, "507_BAD_REQUEST_FIELD")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


def test_openais_client_does_not_repeat_what_ran_out_of_its_time(server, long, until):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2, timeout=30)
    before = server.server.server_state.total_requests
    with pytest.raises(openai.APIStatusError, match="timeout_ms=20"):
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], extra_body=long | {"timeout_ms": 20}
        )
    until(lambda: server.server.server_state.total_requests > before)  # counted when its answer is sent
    assert server.server.server_state.total_requests == before + 1


def test_a_package_that_the_server_lacks_is_not_the_clients_fault(serve, model, monkeypatch, caplog):
    from rtp_llm.errors import MissingDependency

    with serve(model) as running:

        def broken(*_: Any, **__: Any) -> Any:
            raise MissingDependency("structured output needs llguidance: pip install llguidance")

        monkeypatch.setattr(running.pipeline, "prepare", broken)
        answer = running.chat("hi")
    assert answer.status_code == 500
    assert "pip" not in answer.text and answer.headers["x-request-id"] in answer.text
    assert any("pip install llguidance" in str(r.exc_info) for r in caplog.records)


def test_the_page_has_a_head_and_no_route_has_a_second_spelling(server):
    head = requests.head(server.url + "/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(server.get("/").content))
    answer = server.get("/health/", allow_redirects=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "404_NOT_FOUND")


def test_unknown_routes_and_wrong_methods_have_openais_shape(server):
    answer = server.get("/v2/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "404_NOT_FOUND")
    answer = server.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "405_METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_bug_is_a_500_with_an_id_and_no_stack_trace(serve, model, monkeypatch, stream, caplog):
    with serve(model) as running:

        def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(running.pipeline, "prepare", broken)
        answer = running.chat("hi", stream=stream)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert "secret" not in answer.text and "ZeroDivision" not in answer.text
    assert any(r.exc_info and r.exc_info[0] is ZeroDivisionError for r in caplog.records)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_the_end(
    serve, model, monkeypatch, long, path
):
    with serve(model) as running:
        whole = running.pipeline.stream

        async def breaks(request: Any) -> Any:
            async for response in whole(request):
                yield response
                await asyncio.sleep(0.1)  # the event is on its way
                raise ZeroDivisionError("secret detail")

        monkeypatch.setattr(running.pipeline, "stream", breaks)
        body = {"stream": True} | long | (
            {"prompt": "hi"} if path == "/" else {"messages": [{"role": "user", "content": "hi"}]}
        )
        answer = running.post(path, body)
        assert answer.status_code == 200
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data:"))
        assert ("error" in last) if path != "/" else (last["error_code"] == 500)
        assert "secret" not in answer.text
        assert "DONE" not in answer.text.upper()

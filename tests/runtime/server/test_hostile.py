"""Clients that mean harm, over a real socket: none gets a 5xx, none hangs, and nothing of them stays."""

from __future__ import annotations

import base64
import contextlib
import gc
import itertools
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.runtime import download, media
from rtp_llm.tests.runtime.test_media_hostile import BAD, GOOD

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, about damaged EXIF
    pytest.mark.alone,  # what is held is counted, and times are short
]

HOST = b"Host: localhost\r\n"
TYPE = b"Content-Type: application/json\r\n"
HI = json.dumps({"prompt": "hi", "max_new_tokens": 1}).encode()
QUESTION = "What is in the middle of the picture?"
# threads that stay for the next request, and never grow beyond their number
POOLS = ("prepare", "asyncio_", "rtp-llm-engine", "rtp-llm-vision")


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request's bytes."""
    more = "".join(f"{header}\r\n" for header in headers).encode()
    told = b"Content-Length: %d\r\n" % (len(body) if length is None else length)
    return b"POST %s HTTP/1.1\r\n" % path.encode() + HOST + TYPE + told + more + b"\r\n" + body


def get(target: str, *headers: str) -> bytes:
    more = "".join(f"{header}\r\n" for header in headers).encode()
    return b"GET %s HTTP/1.1\r\n" % target.encode() + HOST + more + b"\r\n"


def connect(running: Any, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    return sock


def leave(sock: socket.socket, reset: bool) -> None:
    """By FIN, or by RST."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def talk(running: Any, sent: bytes) -> bytes:
    """Everything that the server says to these bytes until it hangs up."""
    got = b""
    with connect(running) as sock:
        with contextlib.suppress(ConnectionError):  # it hung up on what we still send
            sock.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(1 << 16):
                got += piece
    return got


def statuses(answer: bytes) -> list[int]:
    return [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


# ------------------------------------------------------------------------------------- nothing stays


def threads() -> Counter[str]:
    names = [re.sub(r"\d+", "N", t.name) for t in threading.enumerate()]
    return Counter(name for name in names if not name.startswith(POOLS))


def files() -> Counter[str]:
    """Open descriptors by kind: socket, pipe, anon_inode, or a file's path."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            target = os.readlink(f"/proc/self/fd/{fd}")
            kinds[target.partition(":[")[0]] += not target.endswith("/fd")
    return +kinds


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def held(running: Any) -> dict[str, Any]:
    """All that a request may hold, as it is when there is none."""
    engine, guard = running.pipeline.model.engine, running.server.guard
    found = {
        "jobs": len(engine._jobs) + (not engine.scheduler.idle),
        "images": [len(part) for part in (engine.images._holders, engine.images._pixels,
                                          engine.images._encoding)],
        "guard": [guard.active, guard.service.places.taken, guard._buffered],
        "connections": len(running.server.server_state.connections),
        "downloads": download.DOWNLOADS - download._slots._value,
        "decoding": media.DECODING - media._decoding._free,
        "threads": threads(),
        "files": files(),
    }  # fmt: skip
    # last, for it takes a connection itself
    cache, load = running.get("/cache_status").json(), running.get("/worker_status").json()
    return found | {
        "running": load["running"] + load["waiting"] + cache["running_blocks"],
        "lost blocks": cache["total_blocks"] - cache["free_blocks"] - cache["retained_blocks"],
    }


def more(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What is held that was not. (Fewer files is no fault: a socket of an earlier test was closed since.)"""
    wrong = {k: v != before[k] for k, v in after.items()} | {"files": not after["files"] <= before["files"]}
    return {k: (after[k], before[k]) for k in wrong if wrong[k]}


NOTHING = {"running": 0, "lost blocks": 0, "jobs": 0, "images": [0, 0, 0], "guard": [0, 0, 0],
           "connections": 0, "downloads": 0, "decoding": 0}  # fmt: skip


@pytest.fixture
def hostile(serve: Any, model: Any, caplog: Any) -> Callable[..., Any]:
    """`with hostile(**settings) as running:` a server that must be, at the end, what it was."""

    @contextlib.contextmanager
    def make(**settings: Any) -> Iterator[Any]:
        with serve(model, **settings) as running:
            known = honest(running)
            gc.collect()  # what earlier tests left
            before = settled(lambda: held(running), lambda found: found.items() >= NOTHING.items())
            assert {name: before[name] for name in NOTHING} == NOTHING
            yield running
            after = settled(lambda: held(running), lambda found: not more(found, before))
            assert more(after, before) == {}
            assert honest(running) == known
            service = running.server.service
            assert len(service._text._threads) <= 4 and len(service._media._threads) <= 64
        assert not [r for r in caplog.records if r.exc_info or "Traceback" in r.getMessage()]

    return make


def settled(now: Callable[[], Any], right: Callable[[Any], bool], seconds: float = 20.0) -> Any:
    """What `now` says once it is right, or at the end of the time."""
    deadline = time.monotonic() + seconds
    while not right(found := now()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def honest(running: Any) -> tuple[str, str]:
    """What an ordinary client gets to see: an answer to a text, and one about a picture."""
    picture = {"type": "image_url", "image_url": data_uri(GOOD["trailing zip"])}
    found = []
    for content in ("hi", [picture, {"type": "text", "text": QUESTION}]):
        answer = running.chat(content, max_tokens=6, temperature=0)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["choices"][0]["message"]["content"])
    return found[0], found[1]


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ------------------------------------------------------------------------------------- slow readers


@pytest.mark.slow
def test_512_idle_slow_readers_take_no_memory_and_no_time_from_others(hostile, until):
    crowd = 512
    # the last event is more than all buffers on the way hold
    body = json.dumps({"prompt": "hi", "max_new_tokens": 15, "ignore_eos": True, "stream": True,
                       "return_logits": True}).encode()  # fmt: skip
    with hostile(concurrency_limit=crowd + 1, write_seconds=60.0, send_buffer=4096) as running:
        guard, engine = running.server.guard, running.pipeline.model.engine
        size = len(running.post("/", json.loads(body)).content)
        assert size > 200_000
        known = honest(running)
        before = anonymous_bytes()
        socks = []
        try:
            for _ in range(crowd):
                socks.append(connect(running, receive_buffer=2048))
                socks[-1].sendall(post("/", body))
            assert honest(running) == known
            # computed, and not taken away
            until(lambda: guard.service.places.taken == crowd and not engine._jobs, 60)
            assert honest(running) == known
            assert running.get("/health").status_code == 200
            with running.post("/", {"prompt": "hi", "max_new_tokens": 4000, "ignore_eos": True,
                                    "stream": True}, stream=True) as last:  # fmt: skip
                assert last.status_code == 200
                refused = running.post("/", json.loads(HI))
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            del last, refused  # they keep their sockets
            until(lambda: guard.service.places.taken == crowd)
            assert guard.service.places.taken == crowd, "nobody has left yet"
            grown = anonymous_bytes() - before
            assert grown / crowd < 3 * size, f"{grown >> 20} MB"  # numbers, text, and pieces of it
            time.sleep(1)  # none comes for them any more
            assert anonymous_bytes() - before - grown < 4 << 20
        finally:
            for i, sock in enumerate(socks):
                leave(sock, reset=bool(i % 2))


def test_an_answer_that_nobody_reads_is_not_piled_up_behind_the_socket(hostile, until):
    """Of one large answer, as of a stream, the connection holds a piece; and the place is not free before."""
    body = {"prompt": "hi", "max_new_tokens": 50, "ignore_eos": True, "return_logits": True}
    with hostile(send_buffer=4096, write_seconds=1.0) as running:
        guard, connections = running.server.guard, running.server.server_state.connections

        def unread() -> int:
            return max((c.transport.get_write_buffer_size() for c in connections), default=0)

        assert len(running.post("/", body).content) > 500_000
        with connect(running, receive_buffer=2048) as sock:
            sock.sendall(post("/", json.dumps(body).encode()))
            until(lambda: guard.service.places.taken == 1 and unread())
            assert unread() < 200_000
            until(lambda: not guard.service.places.taken)  # cut off


def test_a_raw_streams_last_event_comes_however_slow_its_reader_is(server):
    body = {"prompt": "hi", "max_new_tokens": 15, "ignore_eos": True, "stream": True, "return_logits": True}
    for _ in range(10):  # the engine is done while an event is written
        *_, last, done, _ = server.post("/", body).text.split("\r\n\r\n")
        assert done == "data:[done]"
        assert json.loads(last.removeprefix("data:"))["finished"]


def test_a_batchs_answers_have_one_limit_together(server):
    body = {"max_new_tokens": 200, "return_logits": True}
    assert server.post("/", body | {"prompt": "hi", "max_new_tokens": 1}).status_code == 200
    answer = server.post("/", body | {"prompt_batch": ["hi"] * 30})
    assert answer.status_code == 400
    assert "6000 new tokens" in answer.json()["message"]


# ------------------------------------------------------------------------------ those who go away


class SlowPictures(BaseHTTPRequestHandler):
    """Half of a picture at once, the rest after a while."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        data = GOOD["trailing zip"]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data[:40])
            time.sleep(float(self.path.rpartition("/")[2]))
            self.wfile.write(data[40:])


@pytest.fixture
def pictures() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowPictures) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://localhost:{listener.server_address[1]}"
        listener.shutdown()
        thread.join()


MEDIA = {"allowed_media_domains": ("localhost",), "allowed_media_cidrs": ("127.0.0.0/8", "::1/128")}


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_who_vanishes_at_any_point_leaves_nothing_behind(hostile, pictures, long, reset):
    def vanish(seed: int) -> None:
        rng = random.Random(seed)
        point = ["head", "body", "picture", "wait", "prefill", "stream", "whole", "pipelined"][seed % 8]
        prompt = {"prompt": "hi there " * rng.choice([1, 500])}
        if point == "picture":
            prompt = {"prompt": f"<img>{pictures}/{rng.random()}</img>"}
        if point == "prefill":
            prompt = {"prompt": [rng.randrange(300, 600) for _ in range(3000)]}
        streams = point == "stream" or (point != "whole" and rng.random() < 0.5)
        body = json.dumps(prompt | long | {"stream": streams}).encode()
        sent = post("/", body)
        if point in ("head", "body"):
            head = len(sent) - len(body)
            sent = sent[: rng.randrange(head) if point == "head" else rng.randrange(head, len(sent))]
        sock = connect(running)
        sock.sendall(sent)
        if point == "pipelined":  # in packets of their own: a server that stops reading sees no one go
            for _ in range(3):
                time.sleep(0.01)
                sock.sendall(get("/health"))
        if point == "stream":
            pieces, answer = rng.randrange(1, 5), sock.recv(1000)
            assert statuses(answer)[0] in (200, 429)  # who finds no place has all of the answer now
            for _ in range(pieces - 1 if statuses(answer) == [200] else 0):
                assert sock.recv(1000)
        else:
            time.sleep(rng.random() * 0.2)
        leave(sock, reset)

    with hostile(**MEDIA) as running, ThreadPoolExecutor(64) as pool:  # twice the engine's slots
        list(pool.map(vanish, range(200)))
        gone = time.monotonic()
        settled(lambda: len(running.pipeline.model.engine._jobs), lambda jobs: not jobs)
        assert time.monotonic() - gone < 3  # their 4000 tokens would take minutes
        pool.shutdown()


def test_who_pipelines_and_leaves_is_noticed_at_once(hostile, until, long):
    """A server that reads no further than the next request sees nobody go."""
    with hostile() as running:
        sock = connect(running)
        sock.sendall(post("/", json.dumps({"prompt": "hi"} | long).encode()))
        until(lambda: running.server.service.places.taken)
        for _ in range(3):
            sock.sendall(get("/health"))
            time.sleep(0.02)
        assert running.server.service.places.taken == 1  # it has not just come to its end
        sock.close()
        until(lambda: not running.server.service.places.taken, 1)
    assert 'outcome="cancelled"} 1.0' in running.server.service.metrics.render().decode()


def test_who_pipelines_without_end_is_not_read_without_end(hostile, until, long):
    with hostile() as running, connect(running) as sock:
        sock.sendall(post("/", json.dumps({"prompt": "hi"} | long | {"max_new_tokens": 1500}).encode()))
        until(lambda: running.server.service.places.taken)
        (one,) = running.server.server_state.connections
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while True:
                sock.sendall(get("/health") * 1000)
        assert len(one.conn.trailing_data[0]) < 1 << 20


# --------------------------------------------------------------------------------- half and crooked


def test_hundreds_of_half_sent_requests_stop_nobody_and_are_told_408(hostile):
    whole = post("/", HI)
    halves = [whole[: i * len(whole) // 300] for i in range(300)]
    with hostile(header_seconds=1.5, body_seconds=1.5) as running, contextlib.ExitStack() as open_:
        socks = [open_.enter_context(connect(running)) for _ in halves]
        for sock, half in zip(socks, halves, strict=True):
            sock.sendall(half)
        began = time.monotonic()
        for _ in range(3):
            honest(running)
        found = []
        for sock in socks:
            got = b""
            with contextlib.suppress(ConnectionError):
                while piece := sock.recv(1 << 16):
                    got += piece
            found.append(statuses(got))
        assert found == [[408]] * 300
        assert time.monotonic() - began < 10


CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + TYPE + b"Transfer-Encoding: chunked\r\n"
HI_CHUNK = b"%x\r\n%s\r\n" % (len(HI), HI)
CLOSE = "Connection: close"
WEBSOCKET = ("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")  # fmt: skip
# sent → the statuses that come back; RFC 9112 says which
SHAPES: dict[str, tuple[bytes, list[int]]] = {
    "pipelined": (get("/health") * 20 + get("/health", CLOSE), [200] * 21),
    "pipelined posts": (post("/", HI) * 5 + post("/", HI, CLOSE), [200] * 6),
    "garbage behind a request": (post("/", HI) + b"garbage\r\n\r\n", [200, 400]),
    "length too short": (post("/", HI, length=len(HI) - 5) + b"\r\n\r\n", [400, 400]),
    "length below zero": (post("/", HI, length=-1), [400]),
    "length with a sign": (post("/", HI).replace(b"Length: ", b"Length: +"), [400]),
    "length beyond all": (post("/", HI, length=10**19), [413]),
    "length of 5000 digits": (post("/", HI, length=int("9" * 4000)), [400]),
    "two lengths": (post("/", HI, "Content-Length: 1"), [400]),
    "two equal lengths": (post("/", HI, f"Content-Length: {len(HI)}", CLOSE), [200]),
    "length and chunks": (post("/", HI_CHUNK + b"0\r\n\r\n", "Transfer-Encoding: chunked", length=3), [400]),
    "length and chunks in a GET": (get("/health", "Transfer-Encoding: chunked", "Content-Length: 5")
                                   + b"0\r\n\r\n", [400]),
    "chunked twice": (CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
    "chunked, hidden": (CHUNKED.replace(b"chunked", b"xchunked") + b"\r\n0\r\n\r\n", [400]),
    "chunked, identity": (CHUNKED.replace(b"chunked", b"chunked, identity") + b"\r\n0\r\n\r\n", [400]),
    "blank before the colon": (CHUNKED.replace(b"Encoding:", b"Encoding :") + b"\r\n0\r\n\r\n", [400]),
    "good chunks": (CHUNKED + b"Connection: close\r\n\r\n" + HI_CHUNK + b"0\r\nX: y\r\n\r\n", [200]),
    "chunks of garbage": (CHUNKED + b"\r\n\xff\xfe\r\n\r\n", [400]),
    "garbage behind a chunk": (CHUNKED + b"\r\n2\r\n{}XX\r\n0\r\n\r\n", [400]),
    "chunk of endless length": (CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n{}", [400]),
    "chunk larger than memory": (CHUNKED + b"\r\nffffffffffff\r\n{}", [408]),
    "continue": (post("/", HI, "Expect: 100-continue", CLOSE), [100, 200]),
    "continue what is refused": (post("/", HI, "Expect: 100-continue").replace(TYPE, b""), [415]),
    "expects nonsense": (post("/", HI, "Expect: 200-ok", CLOSE), [200]),
    "h2c": (get("/health", "Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c",
                "HTTP2-Settings: AAMAAABkAAQAAP__"), [200]),
    "http/2 as if agreed": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", [421]),
    "websocket": (get("/health", *WEBSOCKET), [200]),
    "absolute": (get("http://localhost/health", CLOSE), [404]),
    "absolute of another": (get("http://evil.example/health", CLOSE), [404]),
    "asterisk": (get("*", CLOSE), [404]),
    "brackets": (get("[", CLOSE), [404]),
    "two slashes": (get("//evil.example/health/", CLOSE), [404]),
    "up and away": (get("/../../etc/passwd", CLOSE), [404]),
    "odd escapes": (get("/%00%ff%0d%0aX:%20y/..%2f", CLOSE), [404]),
    "tunnel": (get("localhost:80").replace(b"GET", b"CONNECT"), [415]),
    "trace": (post("/", b"", CLOSE).replace(b"POST", b"TRACE"), [405]),
    "a method of one's own": (post("/", b"", CLOSE).replace(b"POST", b"P!ST"), [405]),
    "long target": (get("/" + "a" * 60_000, CLOSE), [404]),
    "long query": (get("/health?" + "a=b&" * 15_000, CLOSE), [200]),
    "endless target": (get("/" + "a" * 500_000), [400]),
    "thousands of headers": (get("/health", CLOSE, *(f"X{i}: y" for i in range(4000))), [200]),
    "two hosts": (get("/health", "Host: evil.example"), [400]),
    "no host": (get("/health").replace(HOST, b""), [400]),
    "half a host": (get("/nowhere", CLOSE).replace(b"localhost", b"[::1"), [421]),
    "zero byte in a header": (get("/health", "X: a\0b"), [400]),
    "two types": (post("/", HI, "Content-Type: text/plain"), [400]),
    "compressed": (post("/", HI, "Content-Encoding: gzip"), [415]),
    "no body": (post("/", b"", CLOSE), [400]),
    "nested": (post("/", b"[" * 200_000, CLOSE), [400]),
    "utf-16": (post("/", HI.decode().encode("utf-16"), CLOSE), [400]),
    "not json": (post("/v1/chat/completions", b"{'a': 1}", CLOSE), [400]),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(serve: Any, model: Any) -> Iterator[Any]:
    """One server for what comes and goes at once."""
    with serve(model, header_seconds=1.0, body_seconds=0.5, keep_alive_seconds=1.0) as running:
        honest(running)
        yield running


@pytest.mark.parametrize("name", SHAPES)
def test_crooked_http_is_answered_as_the_rfc_says_and_soon(plain, name):
    sent, expected = SHAPES[name]
    began = time.monotonic()
    answer = talk(plain, sent)
    assert statuses(answer) == expected, answer[:500]
    assert time.monotonic() - began < 5
    assert b"Traceback" not in answer
    if expected[-1] >= 400:
        shape = json.loads(answer[answer.rindex(b"\r\n\r\n") :])
        assert set(shape) in ({"error"}, {"error_code", "error_code_str", "message"})
    nothing = [0, 0, 0]
    assert settled(lambda: held(plain)["guard"], lambda guard: guard == nothing) == nothing
    assert plain.get("/health").status_code == 200


def test_all_crooked_http_at_once_leaves_nothing_behind(hostile):
    with hostile(header_seconds=1.0, body_seconds=0.5, keep_alive_seconds=1.0) as running:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda shape: talk(running, shape[0]), list(SHAPES.values()) * 2))
        assert max(max(statuses(answer)) for answer in answers) < 500


# ---------------------------------------------------------------------------------------- pictures


ODD_URIS = {
    "no comma": "data:image/png;base64",
    "nothing": "data:,",
    "no base64": "data:image/png;base64,!!!!",
    "half a base64": data_uri(GOOD["trailing zip"])[:-3] + "=A=",
    "text": "data:text/html,<script>alert(1)</script>",
    "drawing": "data:image/svg+xml;utf8,<svg xmlns='x' onload='alert(1)'/>",
    "escapes": "data:," + "%41" * 100_000,
    "a file": "file:///etc/passwd",
    "another scheme": "gopher://localhost/",
    "nested": "data:image/png;base64," + base64.b64encode(b"data:image/png;base64,AAAA").decode(),
    "javascript": "javascript:alert(1)",
}


def test_odd_pictures_are_seen_whatever_type_is_claimed(hostile):
    claims = itertools.cycle(["image/png", "text/html", "image/svg+xml", ""])
    with hostile() as running:
        for (name, data), claim in zip(GOOD.items(), claims, strict=False):
            for status, text in both(running, data_uri(data, claim)):
                assert status == 200, (name, text)


@pytest.mark.slow
def test_hostile_pictures_are_one_4xx_in_our_shape_soon(hostile):
    bad = {name: data_uri(data) for name, (data, _) in BAD.items()} | ODD_URIS
    cut = {f"cut {n}": data_uri(GOOD["damaged exif"][:n]) for n in (1, 3, 20, 300)}
    with hostile() as running:
        for name, uri in (bad | cut).items():
            began = time.monotonic()
            (status, chat), (other, raw) = both(running, uri)
            assert time.monotonic() - began < 6, name
            assert 400 <= status == other < 500, (name, chat)
            error, shape = json.loads(chat)["error"], json.loads(raw)
            assert set(error) == {"message", "type", "param", "code"}
            assert set(shape) == {"error_code", "error_code_str", "message"}
            assert error["code"] == shape["error_code_str"] and 900 < shape["error_code"] < 910, name
            assert error["message"].isprintable() and len(error["message"]) < 500
            assert "Traceback" not in chat + raw


def both(running: Any, uri: str) -> list[tuple[int, str]]:
    """Status and text of the chat, and of the raw form; a kept Response would keep its socket."""
    part = {"type": "image_url", "image_url": {"url": uri}}
    answers = (
        running.chat([part, {"type": "text", "text": "What?"}], max_tokens=1),
        running.post("/", {"prompt": "<img/>What?", "urls": [uri], "max_new_tokens": 1}),
    )
    return [(answer.status_code, answer.text) for answer in answers]


# ------------------------------------------------------------------------------------------- storm


ROUTES = ("/v1/chat/completions", "/chat/completions", "/", "/tokenize", "/tokenizer/encode", "/detokenize",
          "/chat/render", "/v1/chat/render")  # fmt: skip
PLACES = ("/v1/models", "/v1/models/x", "/health", "/health/live", "/health/ready", "/status", "/metrics",
          "/worker_status", "/cache_status", "/openapi.json", "/nowhere")  # fmt: skip
TEXTS = ("hi", "", "<img/>", "<img>x", "<|im_end|>", "<img>file:///etc/passwd</img>", "é\u202e\0", "x" * 5000)
FIELDS = ("max_new_tokens", "max_tokens", "temperature", "top_k", "top_p", "n", "num_return_sequences",
          "seed", "stop", "stop_words_str", "logprobs", "top_logprobs", "return_logits", "return_input_ids",
          "calculate_loss", "timeout_ms", "response_format", "regex", "json_schema", "stream_options",
          "repetition_penalty", "bad_words_list", "reuse_cache", "yield_generator", "model", "nonsense",
          "generate_config", "extra_configs", "request_id", "min_p", "num_beams", "eos_token_id")  # fmt: skip
VALUES = (None, True, False, 0, 1, 2, -1, 3, 0.5, 1e308, 2**63, "", "a", "hi", [], {}, [1], ["a"], [[1, 2]],
          {"type": "json_object"}, {"type": "object"}, {"top_k": 1}, "[ab]+", 600, [None])  # fmt: skip


def wild(rng: random.Random, uris: list[str]) -> dict[str, Any]:
    """A request's body: sometimes right, mostly not."""
    text = rng.choice(TEXTS)
    parts: Any = [rng.choice([{"type": "text", "text": text}, {"type": "image_url", "image_url": "data:,x"},
                              {"type": "image_url", "image_url": {"url": rng.choice(uris)}}, text, None])
                  for _ in range(rng.randrange(3))]  # fmt: skip
    turn = {"role": rng.choice(["user", "user", "user", "system", "assistant", "tool", 5]),
            "content": rng.choice([text, text, parts, parts, None, 7])}  # fmt: skip
    body = rng.choice([
        {"messages": [turn] * rng.choice([1, 1, 2])},
        {"prompt": text}, {"prompt": "<img/>" + text, "urls": [rng.choice(uris)]},
        {"prompt_batch": [text] * rng.choice([1, 3, 200])}, {"prompt": [rng.randrange(-2, 900)] * 20},
        {"tokens": [rng.randrange(-2, 900)]}, {"text": text, "images": rng.choice(VALUES)},
    ])  # fmt: skip
    body = {"max_new_tokens": rng.choice([1, 5, 20]), "stream": rng.random() < 0.4} | body
    return body | {rng.choice(FIELDS): rng.choice(VALUES) for _ in range(rng.choice([0, 0, 1, 1, 2, 4]))}


@pytest.mark.slow
def test_a_storm_of_right_and_wrong_requests_passes(hostile, pictures):
    uris = [f"{pictures}/0.05", "http://169.254.169.254/", *ODD_URIS.values(),
            *(data_uri(GOOD[name]) for name in ("trailing zip", "apng", "CMYK")),
            *(data_uri(BAD[name][0]) for name in ("huge", "svg", "bad checksum"))]  # fmt: skip
    shapes = [sent for sent, _ in SHAPES.values() if len(sent) < 10_000]
    answered: Counter[int] = Counter()

    def storm(seed: int) -> Counter[int]:
        rng, found = random.Random(seed), Counter[int]()
        while time.monotonic() < end:
            sent = (
                rng.choice(shapes) if rng.random() < 0.1
                else get(rng.choice(PLACES), CLOSE) if rng.random() < 0.2
                else post(rng.choice(ROUTES), json.dumps(wild(rng, uris)).encode(), CLOSE)
            )  # fmt: skip
            if rng.random() < 0.25:
                sock = connect(running)
                sock.sendall(sent[: rng.randrange(1, len(sent))] if rng.random() < 0.3 else sent)
                time.sleep(rng.random() * 0.05)
                leave(sock, rng.random() < 0.5)
                continue
            answer = talk(running, sent)
            assert answer and max(statuses(answer)) < 500, (sent[:600], answer[:600])
            assert b"Traceback" not in answer and b"server_error" not in answer, (sent[:600], answer[:2000])
            found.update(statuses(answer))
        return found

    settings = MEDIA | {"header_seconds": 1.0, "body_seconds": 0.5, "keep_alive_seconds": 0.5}
    with hostile(concurrency_limit=6, **settings) as running, ThreadPoolExecutor(32) as pool:
        end = time.monotonic() + 12
        for found in pool.map(storm, range(32)):
            answered += found
        pool.shutdown()
    assert {200, 400, 404, 415, 429} <= set(answered), answered  # it has not only been refused at the door

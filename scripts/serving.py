"""What the programs that test serving share: a real server as a child, a request, what a process holds."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import io
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
from PIL import Image

from rtp_llm.bench import memory

CHAT = "/v1/chat/completions"
START_SECONDS = 900  # a checkpoint may have to be exported first
OVERLOADED = "409_CONCURRENCY_LIMIT_ERROR"
QUIET_SECONDS = 30  # for connections and requests to be gone


class Server:
    """`python -m rtp_llm.start_server` on a free loopback port; `with` waits until it is ready.

    Raises RuntimeError with the end of its log when it does not come up.
    """

    name = "HTTP server"
    ready = "/health/ready"

    def __init__(self, path: str, *flags: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = ["-m", "rtp_llm.start_server", "--checkpoint-path", path]
        self._command += ["--host", "127.0.0.1", "--start-port", str(port), *flags]

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        # settings of the caller's shell must not reach it
        names = {"MODEL_TYPE", "API_KEY", "TOKENIZER_PATH", "FT_SERVER_TEST", "CONCURRENCY_LIMIT"}
        env = {name: value for name, value in os.environ.items() if name not in names}
        command = [sys.executable, *self._command]
        self._process = subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log)
        until = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.get(self.ready)
                return self
            time.sleep(0.05)
        self.__exit__()
        raise RuntimeError(f"the server did not start (exit code {self.exit_code}):\n{self.log[-4000:]}")

    def __exit__(self, *_: object) -> None:
        """SIGTERM, as an operator does; then `exit_code` (0 when it drained) and `log` are there."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
        self._log.seek(0)
        self.log = self._log.read().decode(errors="replace")
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def pids(self) -> list[int]:
        """The processes that serve."""
        return [self.pid]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read()

    def json(self, path: str) -> dict[str, Any]:
        return json.loads(self.get(path))

    def engine(self) -> dict[str, float]:
        """The engine's numbers, by the names of metrics without `rtp_llm_`."""
        return numbers(self.get("/metrics").decode())

    def memory(self, *fields: str) -> int:
        """Bytes: the sum of these lines of /proc/PID/status, of all processes."""
        return sum(memory(pid, *fields) for pid in self.pids())

    def holds(self) -> dict[str, int]:
        """What must not grow: kinds of things in the processes, and requests and blocks in the engine."""
        engine, shared = self.engine(), sum(map(self.owns, os.listdir("/dev/shm")))
        found = Counter({"files in /dev/shm": shared})
        for pid in self.pids():
            found.update(process(pid))
        running = engine["cache_blocks_running"]
        return {
            **found,
            "running": int(engine["sequences_running"]),
            "waiting": int(engine["sequences_waiting"]),
            "blocks held": int(running),
            # those of ended requests are kept, and given away when somebody needs them
            "blocks free or retained": int(engine["cache_blocks"] - running),
        }

    def owns(self, name: str) -> bool:
        """Is a file in /dev/shm this server's? (The HTTP server has none: any that comes is suspicious.)"""
        return not name.startswith("rtp_llm_")

    def settled(self, before: dict[str, int] | None = None) -> dict[str, int]:
        """`holds` once it is idle, and back at `before` if it ever is; at the latest after QUIET_SECONDS."""
        until = time.monotonic() + QUIET_SECONDS
        while True:
            now = self.holds()
            idle = not (now["running"] or now["waiting"] or now["blocks held"])
            if time.monotonic() > until or (idle and not (before and grown(before, now))):
                return now
            time.sleep(0.1)

    def request(self, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Path and body of what asks for `body`, which is of the HTTP server's endpoint `path`."""
        return path, body


class Triton(Server):
    """`rtp-llm tritonserver`: requests go to `vlm` when they stream, else to `vlm_complete`, over HTTP."""

    name = "Triton"
    ready = "/v2/health/ready"

    def __init__(self, path: str, *flags: str):
        http, grpc, self._metrics = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{http}"
        ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", self._metrics]
        self._command = ["-m", "rtp_llm.cli", "tritonserver", path, "--yes", *map(str, ports), *flags]

    def pids(self) -> list[int]:
        """The server and its models, without the command that waits for them."""
        import psutil

        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]

    def owns(self, name: str) -> bool:
        return name.startswith(f"rtp_llm_{self.pid}_")

    def engine(self) -> dict[str, float]:
        # Triton's copies are a quarter of a second old
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=30) as response:
            return numbers(response.read().decode())

    def request(self, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        kept = ("messages", "prompt", "urls", "stream", "stream_options", "extra_configs")
        config = {k: v for k, v in body.items() if k not in kept} | body.get("extra_configs", {})
        asked: dict[str, Any] = {"sampling_parameters": json.dumps(config)}
        if "messages" in body:
            asked["messages"] = json.dumps(body["messages"])
        else:
            asked |= {"text_input": body["prompt"], "image_url": body["urls"]}
        model = "vlm/generate_stream" if body.get("stream") else "vlm_complete/generate"
        return f"/v2/models/{model}", asked


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def numbers(metrics: str) -> dict[str, float]:
    """Our metrics in Prometheus' text, by their names without labels: the last of each name."""
    pairs = (line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("rtp_llm_"))
    return {name.partition("{")[0].removeprefix("rtp_llm_"): float(value) for name, value in pairs}


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What is not as it was before, in words."""
    found = []
    for name, was in before.items():
        lost = after[name] != was if name == "blocks free or retained" else after[name] > was
        if lost:
            found.append(f"{name}: {was} before, {after[name]} after")
    return found


def process(pid: int) -> dict[str, int]:
    """Counts of what a process has open."""
    folder = Path(f"/proc/{pid}")
    links = []
    for entry in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    return {
        "threads": len(list((folder / "task").iterdir())),
        "file descriptors": len(links),
        "sockets": sum(link.startswith("socket:") for link in links),
    }


# ------------------------------------------------------------------------------------------- requests


@dataclass
class Answer:
    """How one request ended; times in seconds."""

    ended: str = "failed"  # ok, cancelled (by us) or failed
    detail: str = ""  # of a failure
    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    last: float = 0.0  # when its last piece came
    retries: int = 0  # after a 429

    @property
    def said(self) -> tuple[list[str], list[str], int]:
        return self.texts, self.reasons, self.tokens

    def piece(self, text: str, began: float, abort_after: int | None) -> bool:
        """More of a streamed text; whether that was the piece after which we leave."""
        now = time.monotonic()
        self.texts[0] += text
        if self.first is None:
            self.first = now - began
        else:
            self.gaps.append(now - self.last)
        self.last = now
        if 1 + len(self.gaps) == abort_after:
            self.ended = "cancelled"
        return self.ended == "cancelled"


async def ask(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    abort_after: int | None = None,
    abort_seconds: float | None = None,
) -> Answer:
    """Send one request until it ends; a stream may be left after so many pieces of text, any request
    after a time (before its first byte, perhaps)."""
    answer = Answer()
    try:
        async with asyncio.timeout(abort_seconds):
            return await _ask(client, path, body, abort_after, answer)
    except TimeoutError:
        answer.ended = "cancelled"
    except httpx.HTTPError as e:
        answer.detail = repr(e)
    return answer


async def _ask(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], abort_after: int | None, answer: Answer
) -> Answer:
    while True:
        began = time.monotonic()
        async with client.stream("POST", path, json=body) as response:
            if response.status_code == 429:
                answer.retries += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
                continue
            if response.status_code != 200:
                await response.aread()
                answer.detail = f"{response.status_code} {response.text[:200]}"
            elif path.endswith("/generate_stream"):
                await _read_triton(response, answer, began, abort_after)
            elif body.get("stream"):
                await _read_stream(response, answer, began, abort_after)
            else:
                _read_whole(json.loads(await response.aread()), answer)
        if OVERLOADED in answer.detail:  # Triton has no 429
            answer.retries, answer.detail = answer.retries + 1, ""
            await asyncio.sleep(1)
            continue
        answer.seconds = time.monotonic() - began
        return answer


async def _read_stream(
    response: httpx.Response, answer: Answer, began: float, abort_after: int | None
) -> None:
    """OpenAI's events; the answer is ok after a finish reason and [DONE], and nothing behind it."""
    answer.texts = [""]
    done = False
    if abort_after == 0:
        answer.ended = "cancelled"
        return
    async for line in response.aiter_lines():
        if not line:
            continue
        if done:
            answer.ended, answer.detail = "failed", f"after [DONE]: {line}"
            return
        if line == "data: [DONE]":
            done = True
            answer.ended = "ok" if answer.reasons else "failed"
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            answer.detail = str(event["error"])
            return
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if choice["finish_reason"]:
                answer.reasons.append(choice["finish_reason"])
            if choice["delta"].get("content"):
                if answer.piece(choice["delta"]["content"], began, abort_after):
                    return


async def _read_triton(
    response: httpx.Response, answer: Answer, began: float, abort_after: int | None
) -> None:
    """Events of `vlm`, one answer; it is ok after a finish reason."""
    answer.texts = [""]
    if abort_after == 0:
        answer.ended = "cancelled"
        return
    async for line in response.aiter_lines():
        if not line:
            continue
        event = json.loads(line.removeprefix("data: "))
        if answer.ended == "ok":
            answer.ended, answer.detail = "failed", f"after the end: {line}"
            return
        if "error" in event:
            answer.detail = str(event["error"])
            return
        if event["text_output"]:
            if answer.piece(event["text_output"], began, abort_after):
                return
        if event.get("usage"):
            answer.tokens = json.loads(event["usage"])["completion_tokens"]
            answer.reasons, answer.ended = [event["finish_reason"]], "ok"


def _read_whole(body: dict[str, Any], answer: Answer) -> None:
    if "text_output" in body:  # Triton's; one answer is no list
        texts, reasons = body["text_output"], body["finish_reason"]
        answer.texts = [texts] if isinstance(texts, str) else texts
        answer.reasons = [reasons] if isinstance(reasons, str) else reasons
        answer.tokens = json.loads(body["usage"])["completion_tokens"]
    elif "choices" in body:
        answer.texts = [choice["message"]["content"] for choice in body["choices"]]
        answer.reasons = [choice["finish_reason"] for choice in body["choices"]]
        answer.tokens = body["usage"]["completion_tokens"]
    else:
        answer.texts, answer.tokens = [body["response"]], body["aux_info"]["output_len"]
        answer.reasons = [body["finish_reason"]]
    answer.ended = "ok"


def client(server: Server, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=600, trust_env=False)


# ------------------------------------------------------------------------------------------- pictures


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def noise(rng: random.Random, side: int = 48) -> str:
    """A picture that nobody has sent before."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def drawing(name: str) -> str:
    """A drawn scene of its own (scripts/shapes.py), which the sample models understand."""
    import shapes

    buffer = io.BytesIO()
    shapes.draw(name).image.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def image_part(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of texts and parts."""
    listed = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": listed}


# -------------------------------------------------------------------------------------------- reports


def quantile(values: list[float], share: float) -> float:
    """Of the sorted values, the one below which `share` of them lie; NaN of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def table(rows: Sequence[tuple[str, ...]], *heads: str) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def report(title: str, about: str, body: str) -> str:
    """A page for benchmarks/: what, when, where, by which command."""
    import onnxruntime

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    machine = (
        f"{datetime.date.today()}; {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GB; Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}"
    )
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    command = " ".join(Path(w).name if os.path.isabs(w) else w for w in words)  # no machine's own paths
    return f"# {title}\n\n{about}\n{machine}.\n\n    python scripts/{command}\n\n{body}\n"


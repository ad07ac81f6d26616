"""A running Triton Inference Server: start, wait until ready, stop, and leave nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ...errors import InternalError, RtpLlmError, UserError
from . import binary as binaries

SHARED_MEMORY = Path("/dev/shm")
PORTS = range(15000, 32000)  # below those that Linux gives to outgoing connections
FAILURE = "failed to load '.+?' version|error: creating server|[Ff]ailed to start|already in use"
POLL = 0.2  # s
IDLE = 1.0  # s without a request, after which a stopping server no longer waits for open connections


class Tritonserver:
    """A server on a model repository; a context manager.

    Ports: 0 takes a free one. `extra`: more arguments of the program. `log`: file for what it prints [one
    that goes with the server]; `echo`: print it on stderr, too, and without `log` there alone. `timeout`: s
    until all models must be loaded. `drain`: s that running requests have to finish when it is stopped.
    """

    def __init__(
        self,
        repository: Path,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        extra: Sequence[str] = (),
        log: Path | None = None,
        *,
        host: str = "127.0.0.1",
        binary: binaries.Binary | None = None,
        drain: float = 30,
        timeout: float = 3600,
        echo: bool = False,
    ):
        self.repository, self.host, self.extra = repository, host, list(extra)
        self.binary = binary or binaries.find()
        self.drain, self.timeout, self.echo, self.log = drain, timeout, echo, log
        ports = free_ports(host, http_port, grpc_port, metrics_port)
        self.http_port, self.grpc_port, self.metrics_port = ports
        # of the shared memory of this server's Python models, to know it again when it was killed
        self._region = f"rtp_llm_{os.getpid()}_{os.urandom(4).hex()}_"
        self.resources = ExitStack()  # what goes when it is stopped
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=200)
        self._failure = ""
        self._stopped = False
        self.loading: list[str] = []  # models
        self._models: dict[int, str] = {}  # processes of Python models, and their names

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise InternalError("this server was not started")
        return self._process

    @property
    def http(self) -> str:
        return f"{_reached(self.host)}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{_reached(self.host)}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"{_reached(self.host)}:{self.metrics_port}"

    def command(self) -> list[str]:
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        return [
            str(self.binary.path),
            f"--model-repository={self.repository}",
            *self.binary.arguments,
            *(f"--{name}-address={self.host}" for name in ports),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            f"--backend-config=python,shm-region-prefix-name={self._region}",
            f"--exit-timeout-secs={max(1, round(self.drain))}",
            "--rate-limit=execution_count",
            *self.extra,
        ]

    def __enter__(self) -> Tritonserver:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop(0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the program, in a process group of its own: a terminal's Ctrl-C reaches its owner alone."""
        if self.log is None and not self.echo:
            folder = tempfile.TemporaryDirectory(prefix="rtp-llm-tritonserver-")
            self.log = Path(self.resources.enter_context(folder)) / "log"
        if self.log:
            self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = open(self.log or os.devnull, "wb", buffering=0)
        try:
            self._process = subprocess.Popen(
                self.command(), env=self.binary.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            log.close()
            raise InternalError(f"{self.binary.path} cannot be started: {e.strerror or e}") from e
        self._stopped = False
        self._reader = threading.Thread(target=self._read, args=(log,), name="tritonserver-log", daemon=True)
        self._reader.start()

    def _read(self, log: IO[bytes]) -> None:
        """On a thread: what the program prints, into the log."""
        assert self.process.stdout
        with log, self.process.stdout as stream:
            for raw in stream:
                log.write(raw)
                line = raw.decode(errors="replace").rstrip("\n")
                if self.echo:
                    print(line, file=sys.stderr, flush=True)
                self._lines.append(line)
                if found := re.search(r'"loading: (.+?):\d+"', line):
                    self.loading.append(found[1])
                elif found := re.search(r"\"successfully loaded '(.+?)'\"", line):
                    self.loading = [name for name in self.loading if name != found[1]]
                elif not self._failure and re.search(FAILURE, line):
                    self._failure = line

    def wait_until_ready(self, tell: Callable[[], None] = lambda: None) -> None:
        """Raises what ended the server before it was ready: the error of ours that a model raised while it
        loaded, else InternalError. tell: called five times a second.
        """
        end = time.monotonic() + self.timeout
        while not self.is_ready():
            if self.process.poll() is not None:
                raise self.reason()
            if time.monotonic() > end:
                raise InternalError(f"tritonserver is not ready after {self.timeout:g} s: {self._failure}")
            tell()
            time.sleep(POLL)
        self._failure = ""  # of a model that was tried and given up
        if not any(word.startswith("--model-control-mode") for word in self.extra):
            self._models = _models(self.process.pid)

    def lost(self) -> str:
        """A model whose process has ended, or "": Triton starts none again, and is "ready" all the same."""
        return next((name for pid, name in self._models.items() if _ended(pid)), "")

    def reason(self) -> RtpLlmError:
        """Why the program ended, as it told in its log."""
        if self.process.poll() is None and (model := self.lost()):
            return InternalError(
                f"the process of model {model} has ended (out of memory?); Triton starts none again"
            )
        if self._reader:
            self._reader.join(5)
        quoted = re.search(r'"(failed to load .*)"$', self._failure)
        text = self._failure
        if quoted:
            try:
                text = json.loads(f'"{quoted[1]}"')
            except ValueError:
                text = quoted[1]
            text = text.partition("\n\nAt:\n")[0]
        if found := re.match(r"failed to load '(.+?)' version \d+: (.*)", text, re.S):
            from .codes import error_of  # imports the service

            return error_of(found[2]) or InternalError(f"model {found[1]} cannot be loaded: {found[2]}")
        code = self.process.poll()
        ended = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        return InternalError(f"tritonserver ended with {ended}: {text or (self._lines or ['no output'])[-1]}")

    def is_ready(self) -> bool:
        return self._get(self.http_port, "/v2/health/ready") is not None

    def _get(self, port: int, path: str) -> str | None:
        """The body of an answer of 200; else None."""
        connection = http.client.HTTPConnection(_reached(self.host).strip("[]"), port, timeout=5)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def last_lines(self, count: int = 20) -> str:
        """Of its log, without tables."""
        return "\n".join([line for line in self._lines if line and line[0] not in "|+"][-count:])

    def stop(self, drain: float | None = None) -> int:
        """End it: running requests finish within `drain` s [as given], or it is killed; its exit code.

        Triton itself waits for idle connections, too; here they are cut when no request has run for a second.
        """
        drain = self.drain if drain is None else drain
        if self._stopped:
            return self.process.returncode
        try:
            if self._process:
                if drain and self._process.poll() is None:
                    self._process.send_signal(signal.SIGTERM)
                    end, idle = time.monotonic() + drain + 5, 0.0
                    while self._process.poll() is None and time.monotonic() < end and idle < IDLE:
                        idle = idle + POLL if self._only_waits() else 0.0
                        time.sleep(POLL)
                self.kill()
                self._process.wait()
                self._stopped = True  # and its number may become another's
                if self._reader:
                    self._reader.join(5)
        finally:
            for left in SHARED_MEMORY.glob(f"{self._region}*"):
                left.unlink(missing_ok=True)
            self.resources.close()
        return self._process.returncode if self._process else 0

    def _only_waits(self) -> bool:
        """Does nothing hold a stopping server up but connections that send no request?"""
        if not self._lines or "HTTP service connections" not in self._lines[-1]:
            return False
        running = re.findall(r"^rtp_llm_requests_in_flight(?:\{.*\})? (\S+)", self._metrics(), re.M)
        return bool(running) and not any(float(count) for count in running)

    def _metrics(self) -> str:
        return self._get(self.metrics_port, "/metrics") or ""

    def kill(self) -> None:
        """Whatever is left of it, its models' processes included."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _models(parent: int) -> dict[int, str]:
    """Process ids of Triton's Python models, and the models' names; none where there is no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                words = (stat.parent / "cmdline").read_text().split("\0")
                if match := re.search(r"([^/]+)/\d+/[^/]+\.py$", words[1] if len(words) > 1 else ""):
                    found[int(stat.parent.name)] = match[1]
    return found


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _reached(host: str) -> str:
    """How this machine reaches a server that listens on `host`."""
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{own}]" if ":" in own else own


def free_ports(host: str, *ports: int) -> list[int]:
    """The ports, with a free one for each 0. Raises UserError for one that is taken, or a host that this
    machine does not have."""
    found: list[int] = []
    for port in ports:
        if port:
            if why := _taken(host, port):
                raise UserError(f"cannot listen on {host}:{port}: {why}")
            found.append(port)
            continue
        for port in random.sample(PORTS, 200):
            if port not in (*ports, *found) and not (why := _taken(host, port)):
                found.append(port)
                break
        else:
            raise UserError(f"cannot listen on {host}: {why}")
    return found


def _taken(host: str, port: int) -> str:
    """Why nothing can listen there; "" when it can."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()
    except OSError as e:
        return e.strerror or str(e)
    return ""

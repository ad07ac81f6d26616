"""A real Triton, started, broken and stopped: by the class, and by the command as typed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rtp_llm import cli
from rtp_llm.errors import InternalError, UserError
from rtp_llm.runtime.tritonserver.binary import Binary
from rtp_llm.runtime.tritonserver.launch import SHARED_MEMORY, Tritonserver, free_ports

CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "seconds" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "word" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
SLEEPER = """
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(float(requests[0].inputs()[0].as_numpy()[0]))
        return [pb.InferenceResponse([pb.Tensor("word", np.array([b"slept"], dtype=object))])]
"""
BROKEN = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        raise {error}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One small model, which sleeps as long as it is told."""
    return _model(tmp_path / "models", SLEEPER)


def _model(folder: Path, code: str) -> Path:
    (folder / "sleeper" / "1").mkdir(parents=True)
    (folder / "sleeper" / "config.pbtxt").write_text(CONFIG)
    (folder / "sleeper" / "1" / "model.py").write_text(code)
    return folder


def _ask(address: str, path: str, body: Any = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("POST" if data else "GET", path, data)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _sleep(address: str, seconds: float) -> tuple[int, str]:
    return _ask(address, "/v2/models/sleeper/generate", {"seconds": seconds})


def _regions(server: Tritonserver) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{server._region}*"))


def test_it_serves_and_leaves_nothing(triton_binary: Binary, repository: Path) -> None:
    with Tritonserver(repository, binary=triton_binary) as server:
        assert "slept" in _sleep(server.http, 0)[1]
        assert "nv_inference_request_success" in _ask(server.metrics, "/metrics")[1]
        with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=5):
            pass
        assert _regions(server), "its models' memory is known by name"
        log = server.log
        assert log and "Started HTTPService" in log.read_text()
    assert server.process.returncode == 0 and not _regions(server) and not log.exists()


def test_a_killed_server_leaves_nothing_and_has_a_reason(triton_binary: Binary, repository: Path) -> None:
    with Tritonserver(repository, binary=triton_binary) as server:
        server.process.kill()
        server.process.wait()
        assert "tritonserver ended with signal 9" in str(server.reason())
    assert not _regions(server)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert server._region not in left, "no model's process outlives it"


def test_running_requests_finish_when_it_is_stopped(triton_binary: Binary, repository: Path) -> None:
    answers: list[tuple[int, str]] = []
    with Tritonserver(repository, binary=triton_binary) as server:
        thread = threading.Thread(target=lambda: answers.append(_sleep(server.http, 3)))
        thread.start()
        time.sleep(1)
        start = time.monotonic()
    thread.join()
    assert answers[0][0] == 200 and "slept" in answers[0][1]
    assert 1 < time.monotonic() - start < 15 and server.process.returncode == 0


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("pb.TritonModelException('507_BAD_REQUEST_FIELD: b needs \"4 GB\"')", UserError, 'b needs "4 GB"'),
        ("ZeroDivisionError('by zero')", InternalError,
         "model sleeper cannot be loaded: Internal: ZeroDivisionError: by zero"),
    ],
)  # fmt: skip
def test_what_a_model_raises_while_it_loads_is_the_error(
    triton_binary: Binary, tmp_path: Path, error: str, kind: type[Exception], message: str
) -> None:
    broken = _model(tmp_path / "models", BROKEN.format(error=error))
    with pytest.raises(kind) as failed, Tritonserver(broken, binary=triton_binary):
        pass
    assert str(failed.value) == message and type(failed.value) is kind


def test_a_taken_port_is_told_before_anything_starts(triton_binary: Binary, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Tritonserver(tmp_path, grpc_port=port, binary=triton_binary)
    with pytest.raises(UserError, match="cannot listen on no.such.host"):
        free_ports("no.such.host", 0)
    assert len(set(free_ports("127.0.0.1", 0, 0, 0))) == 3


# ------------------------------------------------------------------------------ the command as typed


def test_the_command_names_the_flag_of_a_taken_port(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["--http-port", "0", "--grpc-port", str(port), "--metrics-port", "0"]
        assert cli.main(["tritonserver", str(command.bundle), *words]) == 2
    line = f"--grpc-port: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert capsys.readouterr().err == f"rtp-llm tritonserver: {line}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give a BUNDLE, or CHECKPOINT_PATH"),
        ("no/such/bundle", "no/such/bundle does not exist: give a folder or a hub id (owner/name)"),
        ("BUNDLE --http-port 99999", "--http-port='99999' must be a port, 0 to 65535"),
        ("BUNDLE --grpc-port 8000", "--grpc-port and --http-port are both 8000: give them different ports"),
        ("BUNDLE --host 0.0.0.0", "HOST='0.0.0.0' is reachable from other machines, and Triton asks nobody"),
        ("BUNDLE --api-key k", "--api-key goes with --openai-port"),
        ("BUNDLE --vision tower", "--vision='tower' must be in-process, separate, only or HOST:PORT"),
        ("BUNDLE --vision-instances 2", "--vision-instances goes with --vision separate"),
        ("BUNDLE --vision only --vision-instances 0", "--vision-instances='0' must be a number, 1 to 64"),
        ("BUNDLE --vision only --openai-port 1", "--openai-port needs the language model"),
        ("BUNDLE --max-images many", "--max-images='many' must be a number"),
        ("BUNDLE --precision int4", "has precision fp32, 'int4' was asked for"),
        ("BUNDLE --log no/folder/log", "--log='no/folder/log' must be a file in a folder that exists, or -"),
        ("BUNDLE --force", "--force goes with --output"),
        ("BUNDLE --output m --http-port 1", "--http-port is of a server that runs"),
        ("BUNDLE --output m -- --log-info=1", "-- --log-info=1 is for a server that runs"),
        ("BUNDLE --output m --media-proxy http://a:1", "--media-proxy may hold a secret"),
        ("BUNDLE --output .", "--output . holds "),
        ("BUNDLE -- --http-port=1", "-- --http-port: give --http-port instead, before the --"),
        ("BUNDLE -- --no-such", "-- --no-such: tritonserver has no such flag"),
        ("BUNDLE --nonsense", "unknown argument --nonsense"),
    ],
)
def test_mistakes_are_one_line(
    line: str,
    message: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(command.folder)
    monkeypatch.setenv("RTP_LLM_CACHE", command.env["RTP_LLM_CACHE"])
    monkeypatch.delenv("CHECKPOINT_PATH", raising=False)
    before = sorted(command.folder.rglob("*"))
    words = [str(command.bundle) if word == "BUNDLE" else word for word in line.split()]
    ports = [] if "port" in line or "--output" in line or "BUNDLE" not in line else command.ports
    try:
        code = cli.main(["tritonserver", *words[:1], *ports, *words[1:]])
    except SystemExit as e:
        code = int(str(e.code))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert sorted(command.folder.rglob("*")) == before


class Command:
    """`rtp-llm tritonserver` in a process of its own, with folders of its own."""

    def __init__(self, folder: Path, bundle: Path, binary: Binary):
        self.folder, self.bundle = folder, bundle
        self.ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        cache = folder / "cache"
        for name in ("cache", "state", "tmp"):
            (folder / name).mkdir()
        (cache / "tritonserver").symlink_to(binary.backends.parent.parent)
        own = {"RTP_LLM_CACHE": cache, "RTP_LLM_STATE": folder / "state", "TMPDIR": folder / "tmp"}
        self.env = os.environ | {name: str(path) for name, path in own.items()}
        self.lines: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self, *words: str, python: str = sys.executable) -> subprocess.Popen[str]:
        line = [python, "-m", "rtp_llm.cli", "tritonserver", str(self.bundle), *self.ports, *words]
        self.process = subprocess.Popen(
            line, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self.process

    def _read(self) -> None:
        assert self.process and self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def ready(self) -> tuple[str, str]:
        """Addresses of HTTP and metrics."""
        assert self.process
        for _ in range(600):
            for line in self.lines:
                if found := re.match(r"ready: http://(\S+) grpc://\S+ metrics http://(\S+)/metrics", line):
                    return found[1], found[2]
            assert self.process.poll() is None, self.lines
            time.sleep(0.2)
        raise AssertionError(self.lines)

    def end(self, seconds: float = 60) -> int:
        assert self.process
        code = self.process.wait(seconds)
        time.sleep(0.2)  # the last lines
        return code

    def left(self) -> list[str]:
        """Of it in /dev/shm and among temporary files."""
        assert self.process
        mine = SHARED_MEMORY.glob(f"rtp_llm_{self.process.pid}_*")
        temporary = [p for p in (self.folder / "tmp").iterdir() if p.name != ".ses"]  # ONNX Runtime's
        return [str(path) for path in [*mine, *temporary]]


@pytest.fixture
def command(tmp_path: Path, qwen_bundle: Path, triton_binary: Binary) -> Iterator[Command]:
    made = Command(tmp_path, qwen_bundle, triton_binary)
    yield made
    if made.process and made.process.poll() is None:
        made.process.terminate()
        made.process.wait(60)


def _tokens(address: str, count: int) -> tuple[int, str]:
    config = json.dumps({"max_new_tokens": count, "top_k": 1, "ignore_eos": True})
    body = {"text_input": "Hello", "sampling_parameters": config}
    return _ask(address, "/v2/models/vlm/generate_stream", body)


@pytest.mark.slow
def test_the_command_serves_until_a_signal(command: Command) -> None:
    """It refuses what opens files or memory of the server, keeps its log apart, and cleans up."""
    process = command.start()
    http_address, metrics = command.ready()
    status, answer = _ask(http_address, "/v2/models/vlm_complete/generate", {"text_input": "Hello"})
    assert status == 200 and json.loads(answer)["text_output"]
    for path in ("systemsharedmemory/status", "cudasharedmemory/status", "logging", "trace/setting"):
        assert _ask(http_address, f"/v2/{path}")[0] == 403, path
    assert _ask(http_address, "/v2/repository/models/vlm/unload", {"a": 1})[0] == 403
    assert "rtp_llm_requests" in _ask(metrics, "/metrics")[1]
    (log,) = (command.folder / "state").glob("tritonserver-*.log")
    assert any(str(log) in line for line in command.lines) and "successfully loaded" in log.read_text()
    process.send_signal(signal.SIGINT)
    assert command.end() == 0 and not command.left()
    assert len(command.lines) <= 4, command.lines


@pytest.mark.slow
def test_a_tritonserver_on_path_serves_with_the_python_that_runs_the_command(
    command: Command, triton_binary: Binary
) -> None:
    """As in NVIDIA's container, laid out like it; the Python is one whose numpy suits the wheel's stub."""
    program = command.folder / "opt" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    (command.folder / "opt" / "backends").symlink_to(triton_binary.backends)
    libraries = triton_binary.env["LD_LIBRARY_PATH"]
    program.write_text(f'#!/bin/sh\nexport LD_LIBRARY_PATH="{libraries}"\nexec "{triton_binary.path}" "$@"\n')
    program.chmod(0o755)
    command.env["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    (command.folder / "cache" / "tritonserver").unlink()
    python = triton_binary.backends.parent / "env" / "bin" / "python3"
    process = command.start(python=str(python))
    address, _ = command.ready()
    status, answer = _ask(address, "/v2/models/vlm_complete/generate", {"text_input": "Hello"})
    assert status == 200 and json.loads(answer)["text_output"]
    process.terminate()
    assert command.end() == 0 and not command.left()
    assert not list((command.folder / "cache").iterdir()), "nothing is fetched or prepared"


@pytest.mark.slow
def test_openai_clients_reach_it_through_the_port_in_front(command: Command) -> None:
    (port,) = free_ports("127.0.0.1", 0)
    process = command.start("--openai-port", str(port), "--api-key", "k", "--vision", "separate")
    address, _ = command.ready()
    front = f"127.0.0.1:{port}"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    for _ in range(100):  # it listens when Triton is ready
        try:
            if _ask(front, "/health")[0] == 200:
                break
        except OSError:
            pass
        time.sleep(0.1)
    assert _ask(front, "/v1/chat/completions", body)[0] == 401, "the key is asked for"
    connection = http.client.HTTPConnection(front, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer
    connection.close()
    config = _ask(address, "/v2/models/vlm/config")[1]
    assert "api_key" not in config and '"separate"' in config
    process.terminate()
    assert command.end() == 0 and not command.left()


@pytest.mark.slow
def test_running_streams_finish_after_the_first_signal_and_not_after_the_second(command: Command) -> None:
    process = command.start()
    address, _ = command.ready()
    _tokens(address, 1)
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(_tokens(address, 400)))
    thread.start()
    time.sleep(0.3)
    process.terminate()
    thread.join(60)
    assert command.end() == 0
    assert answers[0][0] == 200 and '"finish_reason":"length"' in answers[0][1].replace(" ", "")
    assert not command.left()

    process = command.start("--drain-seconds", "50")
    command.lines.clear()
    address, _ = command.ready()
    slow = threading.Thread(target=lambda: _quietly(lambda: _tokens(address, 1900)))
    slow.start()
    time.sleep(0.3)
    process.terminate()
    time.sleep(0.5)
    start = time.monotonic()
    process.terminate()
    assert command.end() == 128 + signal.SIGTERM and time.monotonic() - start < 5
    slow.join(30)
    assert not command.left()


def _quietly(work: Callable[[], Any]) -> None:
    try:
        work()
    except (OSError, http.client.HTTPException):
        pass


@pytest.mark.slow
def test_an_idle_connection_does_not_hold_up_the_end(command: Command) -> None:
    """Triton itself would wait for it as long as for a request."""
    process = command.start()
    address, _ = command.ready()
    idle = http.client.HTTPConnection(address)
    idle.request("GET", "/v2/health/live")
    idle.getresponse().read()
    start = time.monotonic()
    process.terminate()
    assert command.end() == 0 and time.monotonic() - start < 10
    idle.close()
    assert not command.left()


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_one_line(command: Command) -> None:
    command.start("--memory-limit", "100MB")
    assert command.end() == 2
    assert command.lines[-1].startswith("rtp-llm tritonserver: qwen") and "give more" in command.lines[-1]
    assert len(command.lines) <= 3 and not command.left(), command.lines


@pytest.mark.slow
def test_a_server_that_dies_ends_the_command_with_its_last_lines(command: Command) -> None:
    process = command.start()
    command.ready()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert command.end() == 1
    assert command.lines[-1].startswith("rtp-llm tritonserver: tritonserver ended with signal 9")
    assert any("Started HTTPService" in line for line in command.lines[:-1])
    assert not command.left()


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--openai-port", "0"]])
def test_a_models_process_that_is_killed_ends_the_command(command: Command, words: list[str]) -> None:
    """Triton would say that it is ready, and answer nobody: who watches the command starts it anew."""
    process = command.start(*words)
    command.ready()
    server = psutil.Process(process.pid).children()[0]
    [stub] = [one for one in server.children() if "/vlm/1/model.py" in " ".join(one.cmdline())]
    stub.kill()
    assert command.end() == 1
    told = "rtp-llm tritonserver: the process of model vlm has ended"
    assert any(line.startswith(told) for line in command.lines), command.lines
    assert not command.left()


@pytest.mark.slow
def test_a_signal_while_the_models_load_ends_it(command: Command) -> None:
    process = command.start("--log", "-")
    for _ in range(300):
        if any("loading: vlm" in line for line in command.lines):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(command.lines)
    process.terminate()
    assert command.end(30) == 0 and not command.left()
    assert not list((command.folder / "state").iterdir()), "--log - writes no file"

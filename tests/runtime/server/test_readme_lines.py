"""The README's lines about the server, run as they stand: its shell lines, its curl, its Python."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "README.md").read_text().split("## As a server\n")[1].split("\n## ")[0]


def block(language: str, number: int = 0) -> str:
    return SECTION.split(f"```{language}\n")[1 + number].split("```")[0]


@pytest.fixture(scope="module")
def port(tmp_path_factory, from_shell) -> Iterator[int]:
    """The server that the first block starts, in the clone; on a free port, without the installation."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("readme")
    install, *lines = block("shell").splitlines()
    assert install.startswith("pip install") and lines[-1].startswith("python3 -m rtp_llm.start_server")
    lines[-1] = f"exec {sys.executable} -m rtp_llm.start_server --start-port {port}"
    script = "\n".join([f"export RTP_LLM_CACHE={folder}", *lines])
    with from_shell(script, port, ROOT, folder / "log"):
        yield port


def test_the_curl_lines_answer(port):
    lines = block("shell", 1).replace("localhost:8088", f"localhost:{port}").replace("curl ", "curl -sS ")
    chat, raw, stream, metrics = (
        subprocess.run(["sh", "-c", "curl -sS" + line], capture_output=True, text=True, check=True).stdout
        for line in lines.split("curl -sS")[1:]
    )
    assert json.loads(chat)["choices"][0]["message"]["content"] == "a red circle"
    assert json.loads(raw)["response"] == "a red circle"
    *chunks, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    deltas = [choice["delta"].get("content") or "" for c in chunks for choice in json.loads(c)["choices"]]
    assert done == "[DONE]" and json.loads("".join(deltas))["colour"] in ("red", "blue")
    assert "rtp_llm_" in metrics


def test_the_python_lines_answer(port, capsys):
    code = block("python").replace("localhost:8088", f"localhost:{port}")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "a red circle\n"


def test_every_endpoint_is_documented(port):
    described = requests.get(f"http://localhost:{port}/openapi.json", timeout=5).json()
    for path, methods in described["paths"].items():
        if "{" not in path and not path.startswith("/v1/chat/render"):
            for method in methods:
                assert f"`{path}`" in SECTION or f"`{method.upper()} {path}`" in SECTION, path

"""The README's lines about Triton, run as they stand: its shell lines, its curl, its Python."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rtp_llm.runtime.tritonserver.launch import free_ports

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## Triton Inference Server\n")[1].split("\n## ")[0]
PORTS = (8000, 8001, 8002, 8088)  # HTTP, gRPC, metrics, ours in front
pytestmark = pytest.mark.slow


def block(language: str, number: int = 0) -> str:
    return SECTION.split(f"```{language}\n")[1 + number].split("```")[0]


@pytest.fixture(scope="module")
def local(tmp_path_factory: Any, triton_binary: Any) -> Iterator[Any]:
    """What makes the README's ports those of the server that its first block starts."""
    folder = tmp_path_factory.mktemp("readme")
    ports = dict(zip(PORTS, free_ports("127.0.0.1", 0, 0, 0, 0), strict=True))

    def moved(text: str) -> str:
        for told, free in ports.items():
            text = text.replace(f"localhost:{told}", f"localhost:{free}")
        return text

    install, export, serve = block("shell").splitlines()
    assert install.startswith("pip install") and serve.startswith("rtp-llm tritonserver demo-bundle ")
    serve = serve.partition("#")[0].replace("--openai-port 8088", f"--openai-port {ports[8088]}")
    flags = f"--http-port {ports[8000]} --grpc-port {ports[8001]} --metrics-port {ports[8002]}"
    command = f"{sys.executable} -m rtp_llm.cli"
    lines = [
        f"export RTP_LLM_CACHE={triton_binary.path.parents[5]} RTP_LLM_STATE={folder}/state",
        export.replace("rtp-llm", command),
        f"exec {serve.replace('rtp-llm', command)} {flags}",
    ]
    script = " && ".join(lines).replace("demo-bundle", f"{folder}/demo-bundle")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["sh", "-c", script], cwd=ROOT, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not _ready(moved("http://localhost:8088/health")):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        yield moved
        process.terminate()
        assert process.wait(60) == 0, (folder / "log").read_text()
    finally:
        process.kill()


def _ready(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def test_the_curl_lines_answer(local):
    lines = local(block("shell", 1)).replace("curl ", "curl -sS ")
    run = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    whole, stream, chat, metrics = (
        subprocess.run(["sh", "-c", "curl -sS" + line], **run).stdout for line in lines.split("curl -sS")[1:]
    )
    assert json.loads(whole)["text_output"] == "a red circle"
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n") if line]
    assert "".join(event["text_output"] for event in events) == "a red circle"
    assert json.loads(events[-1]["usage"])["completion_tokens"] > 0
    assert json.loads(chat)["choices"][0]["finish_reason"] == "stop"
    assert "rtp_llm_time_to_first_token_seconds" in metrics and "nv_inference_request_success" in metrics


@pytest.mark.parametrize(
    ("number", "printed"), [(0, "a red circle\n"), (2, "['a red circle']\n")], ids=["HTTP", "TritonPipeline"]
)
def test_the_python_lines_answer(local, capsys, monkeypatch, number, printed):
    monkeypatch.chdir(ROOT)
    exec(compile(local(block("python", number)), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith(printed)


def test_the_grpc_lines_stream_what_the_chat_answers(local, capsys):
    exec(compile(local(block("python", 1)), "README.md", "exec"), {})
    asked = {"messages": [{"role": "user", "content": "What is this?"}], "temperature": 0}
    answer = requests.post(local("http://localhost:8088/v1/chat/completions"), json=asked, timeout=30).json()
    assert capsys.readouterr().out == answer["choices"][0]["message"]["content"] != ""


def test_every_input_and_output_is_named():
    for model in ("vlm", "vlm_complete", "vision_encoder"):
        for line in (ROOT / "model_repository" / model / "config.pbtxt").read_text().splitlines():
            if line.startswith("  { name: "):
                assert f"`{line.split(chr(34))[1]}`" in SECTION, (model, line)

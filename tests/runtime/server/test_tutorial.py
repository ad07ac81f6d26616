"""The tutorial's way in, word for word: its environment, its command, its client."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).parents[3]

CLIENT = '''
import requests
chat_messages = [
    {
        "role": "user",
        "content": [
        {
            "image_url": {
            "url": image_path
            },
            "type": "image_url"
        },
        {
            "text": "What is this?",
            "type": "text"
        }
        ],
        "name": None
  }
]
openai_request = {
    "temperature": 0.0,
    "top_p": 0.1,
    "messages": chat_messages
}
response = requests.post(f"http://localhost:{port}/v1/chat/completions", json=openai_request)
print(response.json())
'''

SHELL = """
export MODEL_TYPE=qwen_vl
export TOKENIZER_PATH={checkpoint}
export CHECKPOINT_PATH={checkpoint}
export FT_SERVER_TEST=1
export START_PORT={port}
exec {python} -m rtp_llm.start_server
"""


@pytest.fixture(scope="module")
def port(sample_qwen, tmp_path_factory, from_shell):
    """The tutorial's shell lines in a folder with a picture; the checkpoint is exported by the way."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "red_circle.png").write_bytes((ROOT / "tests/images/red_circle.png").read_bytes())
    (folder.parent / "outside.png").write_bytes((ROOT / "tests/images/red_circle.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    lines = SHELL.format(checkpoint=sample_qwen, port=port, python=sys.executable)
    script = f"export RTP_LLM_CACHE={folder}/cache\n{lines}"
    with from_shell(script, port, folder, folder / "log"):
        yield port
        assert "FT_SERVER_TEST=1: clients on this machine may name files" in (folder / "log").read_text()


def run(image_path: str, port: int) -> Any:
    names: dict[str, Any] = {"image_path": image_path, "port": port, "print": lambda _: None}
    exec(CLIENT, names)
    return names["response"]


def test_the_tutorials_client_gets_an_answer_about_a_file_beside_the_server(port):
    answer = run("red_circle.png", port)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "a red circle"


def test_the_raw_form_takes_the_same_file(port):
    for body in (
        {"prompt": "Picture 1:<img>red_circle.png</img>\nWhat is this?"},
        {"prompt": "Picture 1:<img/>\nWhat is this?", "urls": ["red_circle.png"]},
    ):
        answer = requests.post(f"http://localhost:{port}", json=body | {"generate_config": {"top_k": 1}})
        assert answer.json()["response"] == "a red circle"


@pytest.mark.parametrize("path", ["../outside.png", "link.png", "/etc/passwd", "file:///etc/passwd"])
def test_files_outside_the_working_directory_stay_closed(port, path):
    answer = run(path, port)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "906_MM_DOWNLOAD_FAILED"
    assert "outside" in answer.json()["error"]["message"]

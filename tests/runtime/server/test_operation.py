"""What an operator sees of a real server: its log, its metrics, and a refusal to start."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "serving.py"
spec = importlib.util.spec_from_file_location("serving", SCRIPT)
assert spec is not None and spec.loader is not None
serving = sys.modules["serving"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serving)

SECRET = "zebra-crossing"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def after(llava_bundle: Path, red_circle: Path) -> Iterator[dict[str, Any]]:
    """A server's log and metrics after an answer, a stream that was left, and failures of every kind."""
    picture = serving.data_uri(red_circle.read_bytes())
    messages = [serving.user(serving.image_part(picture), f"What is this {SECRET}?")]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    on_and_on = {"max_tokens": 400, "extra_configs": {"ignore_eos": True}}
    json_type = {"Content-Type": "application/json"}
    with serving.Server(str(llava_bundle)) as server:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
            answered = http.post(CHAT, json=body, headers={"X-Request-Id": "the-first"})
            assert answered.status_code == 200, answered.text
            with http.stream("POST", CHAT, json=body | on_and_on | {"stream": True}) as left:
                lines = left.iter_lines()
                for _ in range(12):  # the role, and some tokens
                    next(lines)
            wrong = [
                http.post(CHAT, json=body | {"temperature": SECRET}),
                http.post(CHAT, json=body | {SECRET: 1}),
                http.post(CHAT, json={"messages": SECRET}),
                http.post(CHAT, content=f'{{"messages": "{SECRET}', headers=json_type),
                http.post(CHAT, json={"messages": [serving.user(serving.image_part(f"data:,{SECRET}"))]}),
                http.post("/", json={"prompt": f"<image>{SECRET}", "urls": [f"http://127.0.0.1:9/{SECRET}"]}),
                http.post("/", json={"prompt": SECRET, "top_k": SECRET}),
                http.get(f"/nothing?prompt={SECRET}"),
            ]
            assert [r.status_code for r in wrong if not 400 <= r.status_code < 500] == []
        server.settled()
        metrics = server.get("/metrics").decode()
    yield {"log": server.log, "metrics": metrics, "answer": answered.json(), "picture": picture}


@pytest.mark.slow
def test_no_prompt_picture_or_answer_is_logged(after: dict[str, Any]) -> None:
    assert SECRET not in after["log"]
    assert after["picture"][60:120] not in after["log"]
    assert after["answer"]["choices"][0]["message"]["content"].strip() not in after["log"]


@pytest.mark.slow
def test_every_request_is_logged_once_with_its_id_and_outcome(after: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in after["log"].splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["message"] == "request" and line["method"] == "POST"]
    assert [line["outcome"] for line in requests] == ["ok", "cancelled", *["user_error"] * 7]
    first = requests[0]
    assert first["request_id"] == "the-first" and (first["path"], first["status"]) == (CHAT, 200)
    usage = after["answer"]["usage"]
    assert first["prompt_tokens"] == usage["prompt_tokens"]
    assert first["generated_tokens"] == usage["completion_tokens"] and first["images"] == 1
    assert len({line["request_id"] for line in requests}) == len(requests)
    assert all(line["error"] for line in requests[2:])


@pytest.mark.slow
def test_the_metrics_agree(after: dict[str, Any]) -> None:
    lines = (line.rpartition(" ") for line in after["metrics"].splitlines() if line[:1] != "#")
    found = {name: float(value) for name, _, value in lines}
    total = 'rtp_llm_requests_total{{kind="{}",outcome="{}"}}'
    counted = {k: v for k, v in found.items() if k.startswith("rtp_llm_requests_total") and v}
    assert counted == {
        total.format("chat", "ok"): 1,
        total.format("chat", "cancelled"): 1,
        total.format("chat", "user_error"): 5,
        total.format("raw", "user_error"): 2,
    }
    assert found["rtp_llm_requests_in_flight"] == 0
    assert found["rtp_llm_time_to_first_token_seconds_count"] == 2
    assert found["rtp_llm_queue_time_seconds_count"] == 2
    assert found["rtp_llm_image_fetch_seconds_count"] == 2
    assert found["rtp_llm_time_between_tokens_seconds_count"] >= 1


@pytest.mark.slow
def test_the_memory_table_is_printed_at_the_start(after: dict[str, Any]) -> None:
    rows = [line.split("  ")[0] for line in after["log"].splitlines() if line[:1] not in "{"]
    assert rows[:2] == ["weights, decoder", "weights, vision"]
    assert rows[2:7] == ["vision peak", "key-value cache", "image cache", "in all", "limit"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_it_is_opened(llava_bundle: Path) -> None:
    with pytest.raises(RuntimeError) as caught, serving.Server(str(llava_bundle), "--memory-limit", "100MiB"):
        pass
    text = str(caught.value)
    assert "exit code 2" in text and "104.9 MB are there (--memory-limit)" in text
    assert "Traceback" not in text

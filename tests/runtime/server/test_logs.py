"""Logs: one JSON object a line, the request's id in each, and nothing of what a client sent."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.errors import ImageDecodeError, InternalError, UserError
from rtp_llm.runtime.request import AuxInfo
from rtp_llm.runtime.server import logs

SECRET = "my-secret-prompt"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging belongs to the whole process: leave it as it was."""
    names = [None, "rtp_llm", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"]
    loggers = [logging.getLogger(name) for name in names]
    kept = [(x, x.handlers[:], x.level, x.propagate) for x in loggers]
    hook = threading.excepthook
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    threading.excepthook = hook
    logging.captureWarnings(False)


def written(json_lines: bool = True) -> io.StringIO:
    logs.setup(json_lines)
    stream = io.StringIO()
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_is_one_json_line_with_its_id_and_numbers() -> None:
    stream = written()
    token = logs.request_id.set("req-7")
    try:
        aux = AuxInfo(wait_time=20, first_token_cost_time=150, input_len=30, reuse_len=16)
        aux.multimodal_lengths = [9, 9]
        logs.request(
            method="POST", path="/v1/x", status=200, seconds=1.5, outcome="ok", aux=aux, tokens=12
        )
    finally:
        logs.request_id.reset(token)
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "rtp_llm.server",
        "message": "request",
        "request_id": "req-7",
        "method": "POST",
        "path": "/v1/x",
        "status": 200,
        "outcome": "ok",
        "seconds": 1.5,
        "prompt_tokens": 30,
        "reused_tokens": 16,
        "generated_tokens": 12,
        "images": 2,
        "queue_seconds": 0.02,
        "first_token_seconds": 0.15,
    }


def test_every_line_inside_a_request_has_its_id_and_none_outside() -> None:
    stream = written()
    logging.getLogger("rtp_llm.engine").info("before")
    token = logs.request_id.set("abc")
    logging.getLogger("uvicorn.error").warning("inside")
    logs.request_id.reset(token)
    assert [line.get("request_id") for line in lines(stream)] == [None, "abc"]


def test_uvicorn_writes_through_it_and_its_access_log_is_silent() -> None:
    stream = written()
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.access").info('%s - "%s"', "127.0.0.1", f"GET /?q={SECRET}")
    logging.getLogger("uvicorn.asgi").log(5, "receive %s", SECRET)
    (line,) = lines(stream)
    assert (line["logger"], line["message"]) == ("uvicorn.error", "Started server process [7]")


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"cannot parse {SECRET}"),
        KeyError(SECRET),
        UserError(f"messages[0].content is '{SECRET}'"),
        ImageDecodeError(f"data:image/png;base64,{SECRET} cannot be decoded"),
        FileNotFoundError(2, "No such file or directory", SECRET),
    ],
)
def test_what_a_client_sent_is_not_in_the_log_of_its_failure(error: Exception, json_lines: bool) -> None:
    stream = written(json_lines)
    try:
        try:
            raise error
        except Exception as e:
            raise RuntimeError(SECRET) from e
    except Exception:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
        logging.getLogger("asyncio").exception(f"Task exception was never retrieved\nfuture: {SECRET}")
    for outcome in ("user_error", "internal"):
        logs.request(method="POST", path="/", status=500, seconds=0, outcome=outcome, error=error)
    text = stream.getvalue()
    assert SECRET not in text
    assert type(error).__name__ in text and "RuntimeError" in text
    assert "test_logs.py:" in text, "where it happened"


def test_what_broke_in_the_engine_is_told() -> None:
    stream = written()
    error = InternalError("engine: out of memory")
    logs.request(method="POST", path="/", status=500, seconds=0, outcome="internal", error=error)
    (line,) = lines(stream)
    assert line["level"] == "error" and line["error"] == "500_UNKNOWN_ERROR"
    assert line["exception"] == ["InternalError: engine: out of memory"]


def test_a_thread_that_dies_is_logged() -> None:
    stream = written()

    def fail() -> None:
        raise ValueError(SECRET)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    (line,) = lines(stream)
    assert line["message"] == "a thread failed" and line["exception"] == ["ValueError"]


@settings(derandomize=True, deadline=None)
@given(st.text(), st.text(), st.booleans())
def test_no_client_can_write_a_line_of_its_own(path: str, identity: str, json_lines: bool) -> None:
    stream = written(json_lines)
    token = logs.request_id.set(identity)
    logs.request(method="GET", path=path, status=404, seconds=0, outcome="user_error")
    logs.request_id.reset(token)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text[:-1].isprintable()


def test_on_a_terminal_a_line_is_words() -> None:
    stream = written(json_lines=False)
    logs.request(method="GET", path="/a b", status=200, seconds=0.5, outcome="ok")
    assert 'INFO    request method=GET path="/a b" status=200 outcome=ok seconds=0.5' in stream.getvalue()

"""Every refusal has the right status on both protocols, a line to mend it by, and leaves the server ready."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import grpc as google
import numpy as np
import pytest
import requests
from PIL import Image
from tritonclient.utils import InferenceServerException

from rtp_llm import errors
from rtp_llm.runtime.tritonserver import codes

from .calls import LONG, SECONDS, metric, over_grpc, over_http, stream, streamed, tensors, until

SETTINGS = {"concurrency_limit": "3", "max_images": "2", "max_pixels": "100000", "max_body_bytes": "4MB"}
CIRCLE = (Path(__file__).parents[1] / "images" / "red_circle.png").read_bytes()
ONE = "Picture 1:<img/>\nWhat is this?"
TRITON_ERROR = {"triton_grpc_error": "true"}


def huge() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "png")
    return file.getvalue()


def message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "neither": ({"sampling_parameters": {}}, "507_BAD_REQUEST_FIELD", "text_input, input_ids or messages"),
    "both": ({"text_input": "hi", "messages": message("hi")}, "507_BAD_REQUEST_FIELD", "one of them"),
    "empty": ({"text_input": ""}, "510_EMPTY_PROMPT_ERROR", "empty"),
    "not UTF-8": ({"text_input": b"\xff\xfe"}, "507_BAD_REQUEST_FIELD", "text_input is not UTF-8"),
    "messages of bad JSON": ({"messages": "[{'role'"}, "507_BAD_REQUEST_FIELD", "messages is not JSON"),
    "messages of NaN": ({"messages": "[NaN]"}, "507_BAD_REQUEST_FIELD", "messages holds NaN"),
    "messages that are none": ({"messages": '"hi"'}, "507_BAD_REQUEST_FIELD", "expected a list"),
    "a part of a wrong type": (
        {"messages": message([{"type": "video"}])}, "507_BAD_REQUEST_FIELD", "messages[0].content[0]"
    ),
    "parameters of bad JSON": (
        {"text_input": "hi", "sampling_parameters": "{top_k"}, "507_BAD_REQUEST_FIELD",
        "sampling_parameters is not JSON",
    ),
    "parameters that are a list": (
        {"text_input": "hi", "sampling_parameters": "[1]"}, "507_BAD_REQUEST_FIELD", "expected an object"
    ),
    "an unknown field": (
        {"text_input": "hi", "sampling_parameters": {"max_token": 3}}, "604_ERROR_GENERATE_CONFIG_FORMAT",
        "'max_token'",
    ),
    "a value out of range": (
        {"text_input": "hi", "sampling_parameters": {"top_p": 3}}, "604_ERROR_GENERATE_CONFIG_FORMAT", "top_p"
    ),
    "too few pictures": ({"text_input": 2 * ONE, "image": [CIRCLE]}, "902_MM_WRONG_FORMAT_ERROR", "2"),
    "too many pictures": (
        {"text_input": 3 * ONE, "image": 3 * [CIRCLE]}, "901_MM_LONG_PROMPT_ERROR", "the limit is 2"
    ),
    "pictures without end": (
        {"text_input": "hi", "image": 200_000 * [b""]}, "901_MM_LONG_PROMPT_ERROR", "200000 images"
    ),
    "ids without end": (
        {"input_ids": np.zeros(100_000, np.int64)}, "511_LONG_PROMPT_ERROR", "100000 token ids"
    ),
    "no picture at all": ({"text_input": ONE, "image": [b"\0\1\2\3\4"]}, "903_MM_PROCESS_ERROR", "format"),
    "a picture cut short": ({"text_input": ONE, "image": [CIRCLE[:200]]}, "903_MM_PROCESS_ERROR", "damaged"),
    "bad base64": ({"text_input": ONE, "image": ["iVBORw0KGgo!"]}, "903_MM_PROCESS_ERROR", "base64"),
    "many pixels": ({"text_input": ONE, "image": [huge()]}, "901_MM_LONG_PROMPT_ERROR", "pixels"),
    "a file of the server": (
        {"text_input": ONE, "image_url": ["file:///etc/passwd"]}, "906_MM_DOWNLOAD_FAILED", "not allowed"
    ),
    "a path of the server": (
        {"text_input": ONE, "image_url": ["/etc/passwd"]}, "906_MM_DOWNLOAD_FAILED", "not allowed"
    ),
    "a host of the inside": (
        {"text_input": ONE, "image_url": ["http://127.0.0.1:8000/x"]}, "906_MM_DOWNLOAD_FAILED", "127.0.0.1"
    ),
    "a picture that messages have no place for": (
        {"messages": message("hi"), "image": [CIRCLE]}, "902_MM_WRONG_FORMAT_ERROR", "image"
    ),
    "pictures encoded elsewhere": (
        {"text_input": ONE, "image_embeds": np.zeros((1, 256, 128), np.float32)}, "507_BAD_REQUEST_FIELD",
        "allow_image_embeds=1",
    ),
    "a long prompt": ({"text_input": "word " * 4000}, "511_LONG_PROMPT_ERROR", "the limit is"),
    "a prompt that cannot fit": ({"text_input": "x" * 2_200_000}, "511_LONG_PROMPT_ERROR", "characters"),
    "a large request": ({"text_input": "x" * 4_300_000}, "507_BAD_REQUEST_FIELD", "bytes"),
    "many numbers": (
        {"text_input": "hi", "sampling_parameters": LONG | {"n": 3, "return_logits": True}},
        "507_BAD_REQUEST_FIELD", "return_logits",
    ),
    "answers above the limit": (
        {"text_input": "hi", "sampling_parameters": {"n": 4}}, "507_BAD_REQUEST_FIELD", "the limit is 3"
    ),
    "out of time": (
        {"text_input": "hi", "sampling_parameters": LONG | {"timeout_ms": 100}}, "514_GENERATE_TIMEOUT",
        "timeout_ms=100",
    ),
}  # fmt: skip
STATUS = {  # of HTTP and gRPC, by the HTTP server's status
    400: (400, google.StatusCode.INVALID_ARGUMENT),
    404: (404, google.StatusCode.NOT_FOUND),
    408: (400, google.StatusCode.CANCELLED),  # Triton has no better one of HTTP
    429: (503, google.StatusCode.UNAVAILABLE),
    500: (500, google.StatusCode.INTERNAL),
}


@pytest.fixture(scope="module")
def server(serve, qwen_bundle):
    return serve(qwen_bundle, settings=SETTINGS)


def http_status(server: Any, model: str, values: dict[str, Any]) -> tuple[int, str]:
    """/infer, by hand: tritonclient keeps the status to itself."""
    import tritonclient.http as http

    body, size = http.InferenceServerClient.generate_request_body(tensors(http, values))
    answer = requests.post(
        f"http://{server.http}/v2/models/{model}/infer", data=body, timeout=SECONDS,
        headers={"Inference-Header-Content-Length": str(size)},
    )  # fmt: skip
    return answer.status_code, answer.json().get("error", "")


def grpc_status(call: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as refused:
        call()
    return refused.value.status(), refused.value.message()


def refused_as(server: Any, values: dict[str, Any], code: str, words: str, status: int) -> None:
    http_code, grpc_code = STATUS[status]

    def asked(headers: Any = None) -> Any:
        with stream(server, headers=headers) as one:
            one.ask("one", **values)
            return one.all(1)

    told = [
        http_status(server, "vlm_complete", values),
        grpc_status(lambda: over_grpc(server, **values)),
        grpc_status(lambda: asked(TRITON_ERROR)),
        grpc_status(asked),
    ]
    assert [s for s, _ in told] == [http_code, str(grpc_code), str(grpc_code), None]
    for _, text in told:
        assert text.startswith(f"{code}: ") and words in text, text


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_its_code_on_both_protocols(server, case):
    values, code, words = REFUSED[case]
    error = codes.error_of(f"{code}: ")
    assert error is not None
    refused_as(server, values, code, words, error.status)
    assert requests.get(f"http://{server.http}/v2/health/ready", timeout=SECONDS).status_code == 200


@pytest.mark.parametrize("path", ["vlm/generate_stream", "vlm_complete/generate"])
@pytest.mark.parametrize("value", [b'"\xff"', rb'"\udc00"'])
def test_parameters_that_are_no_text_are_refused(server, path, value):
    """Triton's own JSON reader lets them through."""
    body = b'{"text_input": "hi", "top_k": %b}' % value
    answer = requests.post(f"http://{server.http}/v2/models/{path}", data=body, timeout=10)
    assert answer.status_code == 400 and "507_BAD_REQUEST_FIELD: the parameters are not UTF-8" in answer.text


def test_a_parameter_of_nan_is_refused(server):
    def asked() -> Any:
        with stream(server) as one:
            one.ask("one", text_input="hi", parameters={"temperature": float("nan")})
            return one.all(1)

    assert "507_BAD_REQUEST_FIELD: the object of parameters" in grpc_status(asked)[1]


def test_the_server_answers_after_all_that(server):
    ask = {"text_input": ONE, "image": [CIRCLE], "sampling_parameters": {"top_k": 1, "max_new_tokens": 8}}
    assert streamed(server, **ask) == over_http(server, **ask)
    until(lambda: not metric(server, "rtp_llm_requests_in_flight"), 2)


def test_an_unknown_model_is_not_found(server):
    assert http_status(server, "gpt", {"text_input": "hi"})[0] == 404
    status, text = grpc_status(lambda: over_grpc(server, model="gpt", text_input="hi"))
    assert status == str(google.StatusCode.NOT_FOUND) and "gpt" in text


def test_more_answers_than_the_limit_are_told_to_come_back(server):
    with stream(server) as busy:
        busy.ask("long", text_input="hi", sampling_parameters=LONG | {"n": 3})
        until(lambda: metric(server, "rtp_llm_requests_in_flight"))
        refused_as(server, {"text_input": "hi"}, "409_CONCURRENCY_LIMIT_ERROR", "the limit is 3", 429)
    until(lambda: not metric(server, "rtp_llm_requests_in_flight"), 2)
    assert streamed(server, text_input="hi", sampling_parameters={"n": 3, "max_new_tokens": 1}).ids


def test_one_bad_request_of_a_stream_leaves_the_others_alone(server):
    with stream(server) as one:
        one.ask("good", text_input="hi", sampling_parameters={"max_new_tokens": 20, "ignore_eos": True})
        one.ask("bad", text_input="hi", sampling_parameters={"bogus": 1})
        errors_seen, finals = [], 0
        while finals + len(errors_seen) < 2:
            try:
                finals += one.next()[1]
            except InferenceServerException as e:
                errors_seen.append(e)
    assert finals == 1 and "bogus" in errors_seen[0].message()


def test_what_we_broke_is_told_by_the_requests_id_and_logged(serve, qwen_bundle, tmp_path):
    server = serve(qwen_bundle, own=True)
    server.stop()
    model = server.repository / "vlm" / "1" / "model.py"
    model.write_text(
        "from rtp_llm.pipeline import Pipeline\n"
        "from rtp_llm.runtime.tritonserver.vlm import Vlm as TritonPythonModel\n"
        "real = Pipeline.prepare\n"
        "def prepare(self, prompt, *a, **k):\n"
        "    if prompt == 'break': raise RuntimeError('secret')\n"
        "    return real(self, prompt, *a, **k)\n"
        "Pipeline.prepare = prepare\n"
    )
    server.log = tmp_path / "log"
    with server:
        refused_as(server, {"text_input": "break"}, "500_UNKNOWN_ERROR", "request id", 500)
        _, text = http_status(server, "vlm_complete", {"text_input": "break"})
        assert "secret" not in text
        name = re.search(r"request id (\w+)", text)
        assert name and streamed(server, text_input="hi").texts
        log = server.log.read_text()
    assert server.process.poll() is not None, "the second start is stopped too"
    assert f'"request_id": "{name[1]}"' in log and "RuntimeError" in log and "secret" not in log


def test_every_error_comes_back_from_its_message():
    kinds = [errors.RtpLlmError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds:
        if kind is errors.BadField:
            continue
        found = codes.error_of("in ensemble 'vision_encoder', " + codes.message_of(kind("a: b\nc")))
        assert found is not None and isinstance(kind("x"), type(found)), kind
        assert (found.code_str, found.status, str(found)) == (kind("").code_str, kind.status, "a: b\nc")
    assert codes.error_of("Request for unknown model: 'gpt' is not found") is None

"""TritonPipeline against the real server: what it gives is what the Pipeline gives in-process."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtp_llm import errors
from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.request import GenerateResponse
from rtp_llm.runtime.triton_client import TritonPipeline
from rtp_llm.runtime.tritonserver.launch import Tritonserver

from .calls import LONG, until

IMAGES = Path(__file__).parents[1] / "images"
RED, STAR = IMAGES / "red_circle.png", IMAGES / "blue_star.png"
WHAT = "Picture 1:<img/>\nWhat is this?"


@pytest.fixture(scope="module")
def local(qwen_bundle: Path) -> Any:
    with Pipeline(ModelFactory.from_huggingface(qwen_bundle)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def remote(serve, qwen_bundle: Path) -> Any:
    with TritonPipeline(serve(qwen_bundle).grpc) as pipeline:
        yield pipeline


def last(responses: Any) -> GenerateResponse:
    return list(responses)[-1]


def same(one: GenerateResponse, other: GenerateResponse) -> None:
    """Everything but the times, which no two runs share, and what the caches held."""
    timed = dict.fromkeys(("cost_time", "first_token_cost_time", "wait_time", "iter_count", "reuse_len"), 0)
    assert one.generate_texts == other.generate_texts and one.finished == other.finished
    for a, b in zip(one.generate_outputs, other.generate_outputs, strict=True):
        assert dataclasses.replace(a.aux_info, **timed) == dataclasses.replace(b.aux_info, **timed)
        assert vars(a).keys() == vars(b).keys()
        for name in vars(a).keys() - {"aux_info"}:
            left, right = getattr(a, name), getattr(b, name)
            assert type(left) is type(right), name
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype, name
                # the stub's NumPy is an older one, whose exp may differ in the last bit
                rtol = 1e-14 if name == "all_probs" else 0
                np.testing.assert_allclose(left, right, rtol, err_msg=name)
            else:
                assert left == right, name


def running(server: Any) -> float:
    """Sequences in the engine, from the server's metrics."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("rtp_llm_sequences_running"))


@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 1},
        {"random_seed": 5, "temperature": 1.3, "num_return_sequences": 3, "max_new_tokens": 9},
        {"top_k": 1, "return_logits": True, "return_all_probs": True, "max_new_tokens": 4},
        {"top_k": 1, "logprobs": True, "top_logprobs": 3, "return_cum_log_probs": True},
        {"top_k": 1, "return_output_ids": True, "return_input_ids": True, "max_new_tokens": 3},
        {"max_new_tokens": 0, "calculate_loss": 2},
        {"max_new_tokens": 0, "calculate_loss": 1},
        {"top_k": 1, "stop_words_str": ["circle"]},
        {"top_k": 1, "regex": "(blue|green) [a-z]{3,8}"},
        {"top_k": 1, "regex": "(blue|green)", "return_logits": True},
    ],
    ids=lambda config: ",".join(config),
)
def test_an_answer_is_the_one_given_in_process(local, remote, config):
    asked = {"prompt": WHAT, "urls": [RED], "generate_config": config}
    same(last(remote(**asked)), last(local(**asked)))


def test_text_comes_as_it_grows(remote, local):
    """Several tokens at a time where they come fast."""
    asked = {"prompt": WHAT, "urls": [RED], "top_k": 1, "ignore_eos": True, "max_new_tokens": 60}
    whole = last(local(**asked)).batch_response[0]
    texts = [r.batch_response[0] for r in remote(**asked)]
    assert len(texts) > 3 and texts[-1] == whole
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    pieces = [r.batch_response[0] for r in remote(**asked, return_incremental=True)]
    assert len(pieces) > 3 and "".join(pieces) == whole


def test_logprobs_and_ids_come_with_their_tokens(remote):
    config = {"ignore_eos": True, "max_new_tokens": 60, "logprobs": True, "return_output_ids": True}
    responses = list(remote(WHAT, urls=[RED], **config))
    assert len(responses) > 3
    for response in responses:
        output = response.generate_outputs[0]
        assert [entry["id"] for entry in output.logprobs] == output.output_ids
        assert output.aux_info.output_len == len(output.output_ids)


def test_a_picture_may_be_anything_that_a_pipeline_takes(local, remote):
    picture = Image.open(RED).convert("RGB")
    memory = io.BytesIO(RED.read_bytes())
    for source in (RED, str(RED), RED.as_uri(), RED.read_bytes(), memory, picture):
        assert last(remote(WHAT, urls=[source], top_k=1)).batch_response == ["a red circle"]


def test_pictures_keep_their_order_whatever_they_are(local, remote):
    prompt = "Picture 1:<img/>\nPicture 2:<img/>\nWhat is in picture 2?"
    uri = "data:image/png;base64," + base64.b64encode(STAR.read_bytes()).decode()
    for urls in ([RED, uri], [uri, RED], [RED, STAR], [uri, uri]):
        same(last(remote(prompt, urls=urls, top_k=1)), last(local(prompt, urls=urls, top_k=1)))


def test_pictures_with_transparency_look_the_same_with_the_bundle_at_hand(
    local, serve, qwen_bundle
):
    veiled = Image.open(RED).convert("RGBA")
    veiled.putalpha(90)
    config = {"top_k": 1, "return_logits": True, "max_new_tokens": 2}
    with TritonPipeline(serve(qwen_bundle).grpc, bundle=qwen_bundle) as remote:
        same(last(remote(WHAT, urls=[veiled], **config)), last(local(WHAT, urls=[veiled], **config)))


def test_chat_takes_pictures_in_parts(local, remote):
    for part in (
        {"type": "image", "image": Image.open(RED)},
        {"type": "image", "image": RED.read_bytes()},
        {"type": "image", "path": str(RED)},
        {"type": "image_url", "image_url": {"url": str(RED)}},
        {"type": "image_url", "image_url": str(RED)},
    ):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        same(last(remote.chat(messages, top_k=1)), last(local.chat(messages, top_k=1)))


def test_pictures_beside_a_chat_go_into_its_empty_parts(local, remote):
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]

    async def ask(pipeline: Pipeline) -> GenerateResponse:
        return [r async for r in pipeline.pipeline_async(messages=messages, urls=[RED], top_k=1)][-1]

    same(asyncio.run(ask(remote)), asyncio.run(ask(local)))
    with pytest.raises(errors.ImageWrongFormat, match="2 images were given"):
        remote.prepare(messages=messages, urls=[RED, RED])
    with pytest.raises(errors.UserError, match="content\\[0\\]"):
        last(remote.chat(messages))


def test_a_prompt_may_be_token_ids(local, remote):
    ids = local.encode("What is a circle?")
    same(last(remote(ids, top_k=1, max_new_tokens=8)), last(local(ids, top_k=1, max_new_tokens=8)))


def test_a_batch_comes_in_order_and_one_failure_touches_no_other(local, remote):
    requests: list[dict[str, Any]] = [{"prompt": WHAT, "urls": [p], "generate_config": {"top_k": 1}}
                                      for p in sorted(IMAGES.glob("*.png"))]  # fmt: skip
    requests.insert(2, {"prompt": WHAT, "urls": []})
    requests.append({"messages": [{"role": "user", "content": "Hi"}], "generate_config": {"top_k": 1}})
    there, here = list(remote.batch(requests)), list(local.batch(requests))
    assert [i for i, _ in there] == list(range(len(requests)))
    for (_, a), (_, b) in zip(there, here, strict=True):
        if isinstance(b, GenerateResponse):
            same(a, b)
        else:
            assert type(a) is type(b) is errors.ImageWrongFormat and str(a) == str(b)


def test_threads_share_the_connection(local, remote):
    asked = [{"top_k": 1, "urls": [p]} for p in sorted(IMAGES.glob("*.png"))] * 3
    with ThreadPoolExecutor(16) as pool:
        there = list(pool.map(lambda one: last(remote(WHAT, **one)).batch_response, asked))
    assert there == [last(local(WHAT, **one)).batch_response for one in asked]


def test_async(local, remote):
    async def ask() -> list[GenerateResponse]:
        return [r async for r in remote.pipeline_async(WHAT, [RED], top_k=1)]

    async def leave() -> None:
        async for _ in remote.pipeline_async("Hi", **LONG):
            return

    responses = asyncio.run(ask())
    same(responses[-1], last(local(WHAT, [RED], top_k=1)))
    asyncio.run(leave())


def test_leaving_early_ends_the_request_at_the_server(serve, qwen_bundle, remote):
    server = serve(qwen_bundle)
    before = threading.active_count()
    for _ in range(3):
        responses = remote("Hi", **LONG)
        next(responses)
        until(lambda: running(server), 10)
        responses.close()
        until(lambda: not running(server), 1.5)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"prompt": WHAT, "urls": []}, errors.ImageWrongFormat),
        ({"prompt": ""}, errors.EmptyPrompt),
        ({"prompt": WHAT, "urls": [b"no picture"]}, errors.ImageDecodeError),
        ({"prompt": WHAT, "urls": ["http://127.0.0.1/x.png"]}, errors.ImageDownloadFailed),
        ({"prompt": WHAT, "urls": ["no-such-file.png"]}, errors.ImageDownloadFailed),
        ({"prompt": WHAT, "urls": [3]}, errors.ImageUnsupported),
        ({"prompt": "word " * 5000}, errors.PromptTooLong),
        ({"prompt": "Hi", "tempersture": 1}, errors.GenerateConfigError),
        ({"prompt": "Hi", "regex": "("}, errors.GenerateConfigError),
        ({"prompt": "Hi", "timeout_ms": 1}, errors.GenerationTimeout),
        ({"prompt": "half \ud800"}, errors.UserError),
        ({"prompt": [1.5]}, errors.UserError),
        ({"prompt": "Hi", "urls": ["a"], "images": ["b"]}, errors.UserError),
    ],
)
def test_errors_are_our_exceptions(remote, asked, kind):
    with pytest.raises(errors.RtpLlmError) as raised:
        last(remote(**asked))
    assert type(raised.value) is kind and "902_" not in str(raised.value)
    assert last(remote("Hi", top_k=1, max_new_tokens=2)).finished  # and the server goes on


def test_a_wrong_message_is_told_as_in_process(local, remote):
    for messages in ([{"role": "robot", "content": "Hi"}], [{"role": "user", "content": 3}], "Hi", []):
        told = []
        for pipeline in (remote, local):
            with pytest.raises(errors.UserError) as raised:
                last(pipeline.chat(messages))
            told.append(type(raised.value))
        assert told[0] is told[1], messages
    with pytest.raises(errors.UserError, match="set"):
        last(remote.chat([{"role": "user", "content": {1}}]))


def test_encode_and_decode_need_the_bundle(local, serve, qwen_bundle, remote):
    for call in (lambda: remote.encode("Hi"), lambda: remote.decode([1])):
        with pytest.raises(errors.UserError, match="bundle=PATH"):
            call()
    with TritonPipeline(serve(qwen_bundle).grpc, bundle=qwen_bundle) as pipeline:
        ids = pipeline.encode(WHAT)
        assert ids == local.encode(WHAT) and pipeline.decode(ids) == local.decode(ids)
        with pytest.raises(errors.ImageWrongFormat):  # before anything travels
            pipeline.prepare(WHAT, [])


def test_a_deadline_ends_the_call(serve, qwen_bundle):
    server = serve(qwen_bundle)
    with TritonPipeline(server.grpc, timeout=0.3) as pipeline:
        with pytest.raises(errors.GenerationTimeout, match="0.3 s"):
            last(pipeline("Hi", **LONG))
    until(lambda: not running(server), 1.5)


def test_stop_ends_running_calls_and_a_later_call_connects_again(serve, qwen_bundle):
    pipeline = TritonPipeline(serve(qwen_bundle).grpc)
    responses = pipeline("Hi", **LONG)
    next(responses)
    pipeline.stop()
    pipeline.stop()
    with pytest.raises(errors.UserError, match="stopped"):
        list(responses)
    assert last(pipeline("Hi", top_k=1, max_new_tokens=2)).finished
    with pipeline:
        pass
    with pytest.raises(errors.UserError, match="`with` block was left"):
        next(pipeline("Hi"))


def test_a_pipeline_outlives_a_restart_of_the_server(serve, qwen_bundle, triton_binary):
    with TritonPipeline("127.0.0.1:1") as nowhere, pytest.raises(errors.NotReady, match="127.0.0.1:1 "):
        last(nowhere("Hi"))
    server = serve(qwen_bundle, own=True, drain=1)
    with TritonPipeline(server.grpc) as pipeline:
        first = last(pipeline(WHAT, urls=[RED], top_k=1))
        running = pipeline("Hi", **LONG)
        next(running)
        server.process.kill()
        with pytest.raises(errors.NotReady):
            list(running)
        with pytest.raises(errors.NotReady, match="no Triton server answers"):
            last(pipeline("Hi"))
        server.stop(0)
        with Tritonserver(server.repository, grpc_port=server.grpc_port, binary=triton_binary):
            until(lambda: _answers(pipeline), 2)
            same(last(pipeline(WHAT, urls=[RED], top_k=1)), first)


def _answers(pipeline: TritonPipeline) -> bool:
    try:
        return last(pipeline("Hi", top_k=1, max_new_tokens=1)).finished
    except errors.NotReady:
        return False

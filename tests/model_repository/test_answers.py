"""What Triton answers is what the Pipeline answers, token by token, over every protocol."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline

from .calls import Answers, expected, generate, over_grpc, over_http, stream, streamed

IMAGES = Path(__file__).parents[1] / "images"
CIRCLE, STAR, SQUARE = (
    (IMAGES / f"{name}.png").read_bytes() for name in ("red_circle", "blue_star", "yellow_square")
)
URI = "data:image/png;base64," + base64.b64encode(STAR).decode()
GREEDY: dict[str, Any] = {"top_k": 1, "max_new_tokens": 16}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def tagged(tag: str, count: int) -> str:
    return "".join(f"{tag}\n" for _ in range(count)) + "What is this?"


def requests_of(tag: str) -> dict[str, dict[str, Any]]:
    """Inputs by what they are about."""
    image_part = {"type": "image_url", "image_url": {"url": URI}}
    return {
        "text": {"text_input": "Name a colour.", "sampling_parameters": GREEDY | {"ignore_eos": True}},
        "one picture": {
            "text_input": tagged(tag, 1), "image": [CIRCLE], "sampling_parameters": GREEDY
        },
        "several pictures": {
            "text_input": tagged(tag, 3), "image": [CIRCLE, SQUARE], "image_url": [URI],
            "sampling_parameters": GREEDY,
        },
        "messages": {
            "messages": [{"role": "user", "content": [image_part, {"type": "text", "text": "What?"}]}],
            "sampling_parameters": GREEDY,
        },
        "messages, pictures beside them": {
            "messages": [{"role": "user", "content": [
                {"type": "image"}, {"type": "text", "text": "Is it this?"}, {"type": "image"}
            ]}],
            "image": [CIRCLE], "image_url": [URI], "sampling_parameters": GREEDY,
        },
        "two answers, a seed": {
            "text_input": tagged(tag, 1), "image": [STAR],
            "sampling_parameters": {
                "n": 2, "seed": 7, "temperature": 1.5, "top_p": 1, "max_new_tokens": 12, "ignore_eos": True
            },
        },
        "a stop word": {
            "text_input": tagged(tag, 1), "image": [CIRCLE],
            "sampling_parameters": GREEDY | {"stop": ["circle", "rcl"], "ignore_eos": True},
        },
        "structured output": {
            "text_input": tagged(tag, 1), "image": [CIRCLE],
            "sampling_parameters": GREEDY | {"max_new_tokens": 40, "json_schema": PERSON},
        },
        "penalties": {
            "text_input": tagged(tag, 1), "image": [CIRCLE],
            "sampling_parameters": GREEDY | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        },
    }  # fmt: skip


CASES = list(requests_of(""))


@pytest.fixture(scope="module", params=["qwen", "llava"])
def served(request, serve):
    """(a server, the Pipeline on the same bundle, requests)."""
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    server = serve(bundle)
    with Pipeline(ModelFactory.from_huggingface(bundle)) as pipeline:
        tag = pipeline.model.bundle.prompt.image.tags[0]
        yield server, pipeline, requests_of(tag)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_pipelines_token_by_token(served, case):
    server, pipeline, cases = served
    want = expected(pipeline, cases[case])
    assert all(want.ids), "a model that says nothing proves nothing"
    assert streamed(server, **cases[case]) == want
    once = streamed(server, **cases[case], stream=False)
    assert once == want and once.responses == 1
    assert over_http(server, **cases[case]) == want
    assert over_grpc(server, **cases[case]) == want


def test_sixteen_different_requests_at_once_have_the_answers_of_each_alone(served):
    server, pipeline, cases = served
    want = {name: expected(pipeline, one) for name, one in cases.items()}
    with stream(server) as first, stream(server) as second:
        for one in (first, second):
            for name in cases:
                one.ask(name, **cases[name])
        assert first.all(len(cases)) == want
        assert second.all(len(cases)) == want


def test_a_stream_says_each_step_as_it_comes(served):
    server, _, _ = served
    config = {"top_k": 1, "max_new_tokens": 50, "ignore_eos": True}
    answer = streamed(server, text_input="Count.", sampling_parameters=config)
    assert 5 < answer.responses <= 50, "a reader who is slow gets several steps in one response"
    assert len(answer.ids[0]) == 50


def test_generate_takes_and_gives_plain_json(served):
    server, pipeline, cases = served
    case = cases["one picture"]
    want = expected(pipeline, case)
    encoded = base64.b64encode(CIRCLE).decode()
    body = generate(
        server, text_input=case["text_input"], image=encoded, sampling_parameters=json.dumps(GREEDY)
    ).json()
    assert body["text_output"] == want.texts[0] and body["finish_reason"] == want.reasons[0]
    # as elsewhere, fields beside the inputs are sampling parameters
    body = generate(server, text_input=case["text_input"], image=encoded, parameters=GREEDY).json()
    assert body["text_output"] == want.texts[0]


def test_the_prompt_is_said_first_where_that_is_asked_for(served):
    server, pipeline, cases = served
    for name in ("one picture", "messages"):
        values, want = cases[name], expected(pipeline, cases[name])
        if name == "messages":
            prompt, _ = pipeline.render(values["messages"])
        else:
            prompt = values["text_input"]
        for ask in (streamed, over_http):
            assert ask(server, **values, exclude_input_in_output=False).texts == [prompt + want.texts[0]]


def test_the_prompt_is_said_first_of_pictures_beside_messages_too(served):
    server, pipeline, _ = served
    said = "Whose is it?"
    values = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": said}]}],
              "image": [CIRCLE], "sampling_parameters": GREEDY}  # fmt: skip
    prompt = copy.deepcopy(values["messages"])
    prompt[0]["content"][0]["image"] = CIRCLE
    whole = pipeline.render(prompt)[0] + over_http(server, **values).texts[0]
    for ask in (streamed, over_http):
        assert ask(server, **values, exclude_input_in_output=False).texts == [whole]


def test_request_parameters_may_be_fractions(served):
    server, pipeline, _ = served
    config = {"top_p": 0.5, "temperature": 0.25, "random_seed": 3, "max_new_tokens": 8, "ignore_eos": True}
    want = expected(pipeline, {"text_input": "Hi", "sampling_parameters": config})
    more = {"top_p": config.pop("top_p"), "temperature": config.pop("temperature")}
    for given in ({"sampling_parameters": config | {"top_p": 0.9}}, {}):
        parameters = more if given else more | config
        answer = over_http(server, text_input="Hi", parameters=parameters, **given)
        assert answer == want


def test_what_return_fields_ask_for_comes_with_the_last_response(served):
    server, pipeline, _ = served
    config = GREEDY | {"max_new_tokens": 3, "ignore_eos": True, "return_input_ids": True, "logprobs": True,
                       "return_output_ids": True, "top_logprobs": 2, "calculate_loss": 2}  # fmt: skip
    config |= {"return_logits": True, "return_all_probs": True}
    output = list(pipeline("Hi there", generate_config=config))[-1].generate_outputs[0]
    for ask in (streamed, over_http):
        answer = ask(server, text_input="Hi there", sampling_parameters=config)
        assert answer.ids == [output.output_ids]
        details = answer.details[0]
        assert sorted(details) == [
            "all_probs", "input_ids", "logits", "logprobs", "loss", "output_ids"
        ]  # fmt: skip
        assert details["input_ids"] == output.input_ids and details["output_ids"] == output.output_ids
        assert details["loss"] == pytest.approx(output.loss, rel=1e-4)
        for mine, its in zip(details["logprobs"], output.logprobs, strict=True):
            assert mine["id"] == its["id"] and mine["logprob"] == pytest.approx(its["logprob"], rel=1e-3)
        assert len(details["logits"]) == len(details["all_probs"]) == 3
        assert sum(details["all_probs"][0]) == pytest.approx(1)
    assert streamed(server, text_input="Hi", sampling_parameters=GREEDY).details == []


def test_usage_counts_tokens_and_has_the_times(served):
    server, pipeline, cases = served
    usage = streamed(server, **cases["several pictures"]).usage
    assert usage["prompt_tokens"] > 3 * pipeline.model.bundle.vision.tokens
    info = usage["aux_info"][0]
    assert info["output_len"] == usage["completion_tokens"]
    assert info["multimodal_lengths"] == [pipeline.model.bundle.vision.tokens] * 3
    assert 0 < info["first_token_cost_time"] <= info["cost_time"]


def test_requests_share_the_cache_only_with_those_of_the_same_salt(served):
    server, _, _ = served
    prompt = "A prompt that nobody else has, long enough for several blocks of the cache. " * 4

    def reused(parameters: Any) -> int:
        with stream(server) as one:
            one.ask("one", text_input=prompt, sampling_parameters=GREEDY, parameters=parameters)
            answer: Answers = one.all(1)["one"]
        return answer.usage["aux_info"][0]["reuse_len"]

    assert not reused({"cache_salt": "ours"})
    assert reused({"cache_salt": "ours"})
    assert not reused({"cache_salt": "theirs"}) and not reused(None)
    assert over_http(
        server, text_input=prompt, sampling_parameters=GREEDY, parameters={"cache_salt": "theirs"}
    ).usage["aux_info"][0]["reuse_len"], "vlm_complete passes it on"

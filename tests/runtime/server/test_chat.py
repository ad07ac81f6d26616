"""OpenAI's chat completions, mostly through OpenAI's own client."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

IMAGES = Path(__file__).parents[2] / "images"
QUESTION = {"type": "text", "text": "What is this?"}
# the model is sure of itself
WILD: dict[str, Any] = {"temperature": 30, "top_p": 1, "extra_body": {"top_k": 0}}


def picture(name: str, **more: Any) -> dict[str, Any]:
    data = base64.b64encode((IMAGES / f"{name}.png").read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **more}}


def user(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


SHOWN = user(picture("red_circle"), QUESTION)


def test_the_openai_client_asks_about_a_picture(client):
    answer = client.chat.completions.create(model="whatever", messages=SHOWN, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == "a red circle"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens > 256  # the picture's slots count
    assert answer.usage.completion_tokens == 4  # the token that ends it counts
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_an_answer_equals_the_pipelines(client, server):
    (expected,) = list(server.pipeline.chat(SHOWN, temperature=0))[-1].batch_response
    answer = client.chat.completions.create(model="m", messages=SHOWN, temperature=0)
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("detail", ["auto", "low", "high", None])
def test_a_picture_may_have_a_detail_or_be_a_bare_string(client, detail):
    bare = {"type": "image_url", "image_url": picture("blue_star")["image_url"]["url"]}
    one = picture("blue_star", detail=detail) if detail else bare
    answer = client.chat.completions.create(model="m", messages=user(one, QUESTION), temperature=0)
    assert answer.choices[0].message.content == "a blue star"


def test_pictures_keep_their_order_within_and_between_turns(client):
    question = {"type": "text", "text": "Which picture has the star?"}
    for names, expected in ((("blue_star", "red_circle"), "first"), (("red_circle", "blue_star"), "second")):
        one, two = map(picture, names)
        together = user(one, two, question)
        apart = [*user(one, QUESTION), {"role": "assistant", "content": "a shape"}, *user(two, question)]
        for messages in (together, apart):
            rendered = client.post("/chat/render", cast_to=object, body={"messages": messages})
            assert rendered["prompt"].count("<imgpad>") == 2
        answer = client.chat.completions.create(model="m", messages=together, temperature=0)
        assert expected in answer.choices[0].message.content


def test_a_conversation_goes_on_with_the_clients_own_message_objects(client):
    """The client sends back what it got, nulls included."""
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *SHOWN]
    first = client.chat.completions.create(model="m", messages=messages, temperature=0)
    messages += [first.choices[0].message, {"role": "user", "content": "What colour is the circle?"}]
    second = client.chat.completions.create(model="m", messages=messages, temperature=0)
    assert "red" in second.choices[0].message.content


# ------------------------------------------------------------------------------------------- streams


def test_a_stream_is_role_deltas_reason_usage_and_done(server):
    body = {"messages": SHOWN, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    *answers, usage = chunks
    first, *middle, last = [c["choices"][0] for c in answers]
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(c["delta"]["content"] for c in middle) == "a red circle"
    assert {c["finish_reason"] for c in (first, *middle)} == {None}
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert {c["usage"] for c in answers} == {None}


def test_a_stream_says_no_usage_unless_asked(client):
    for chunk in client.chat.completions.create(model="m", messages=SHOWN, temperature=0, stream=True):
        assert chunk.usage is None
        assert chunk.choices


def test_several_answers_are_interleaved_and_equal_those_of_one_piece(client):
    ask: dict[str, Any] = {"model": "m", "messages": user({"type": "text", "text": "How many?"}), "n": 3,
                           "seed": 5, "max_tokens": 6, **WILD}  # fmt: skip
    whole = client.chat.completions.create(**ask)
    texts, reasons, order = [""] * 3, [None] * 3, []
    for chunk in client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        order.append(choice.index)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert order != sorted(order)
    assert len(set(texts)) > 1


def test_the_same_seed_gives_the_same_text(client):
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="m", messages=SHOWN, seed=seed, max_tokens=12, **WILD
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_max_completion_tokens_cut_and_the_reason_says_so(client):
    answer = client.chat.completions.create(
        model="m", messages=SHOWN, temperature=0, max_completion_tokens=2
    )
    assert answer.choices[0].message.content == "a red"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_never_shown(client, stream):
    ask: dict[str, Any] = {"model": "m", "messages": SHOWN, "temperature": 0, "stop": [" circ"]}
    answer = client.chat.completions.create(**ask, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == ("a red", "stop")


def test_logprobs_spell_the_answer_and_begin_with_the_likeliest(client):
    ask: dict[str, Any] = {"model": "m", "messages": SHOWN, "temperature": 0, "logprobs": True,
                           "top_logprobs": 3}  # fmt: skip
    whole = client.chat.completions.create(**ask).choices[0]
    tokens = whole.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == whole.message.content
    for t in tokens:
        best = [p.logprob for p in t.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert (t.token, t.logprob) == (t.top_logprobs[0].token, t.top_logprobs[0].logprob)
        assert t.logprob <= 0
    streamed = [
        t.model_dump()
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for t in chunk.choices[0].logprobs.content
    ]
    assert [t["token"] for t in streamed] == [t.token for t in tokens]
    assert [t["logprob"] for t in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-5)


def test_any_generate_config_field_goes_beside_or_into_extra_configs_and_beside_wins(client):
    def ask(**extra: Any) -> str:
        answer = client.chat.completions.create(
            model="m", messages=SHOWN, temperature=0, extra_body=extra
        )
        return answer.choices[0].message.content

    assert ask(extra_configs={"max_new_tokens": 1}) == "a"
    assert ask(max_new_tokens=2) == "a red"
    assert ask(extra_configs={"max_new_tokens": 1}, max_tokens=2) == "a red"


def test_an_answer_follows_a_json_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    ask: dict[str, Any] = {
        "model": "m", "messages": SHOWN, "temperature": 0, "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }  # fmt: skip
    try:
        answer = client.chat.completions.create(**ask)
    except openai.BadRequestError as e:
        if "not supported yet" in str(e):
            pytest.skip("response_format is not supported yet")
        raise
    if answer.choices[0].finish_reason == "stop":
        assert set(json.loads(answer.choices[0].message.content)) == {"n"}
    else:
        assert answer.choices[0].finish_reason == "length"


# -------------------------------------------------------------------------------------------- errors


def test_openais_fields_that_ask_for_nothing_are_taken(client):
    answer = client.chat.completions.create(
        model="m", messages=SHOWN, temperature=0, n=1, stop=None, user="somebody", tools=[],
        logit_bias={}, response_format={"type": "text"}, metadata={"a": "b"}, store=False,
        extra_body={"tool_choice": None, "stop": [], "functions": []},
    )  # fmt: skip
    assert answer.choices[0].message.content == "a red circle"


@pytest.mark.parametrize(
    "asked",
    [{"store": True}, {"reasoning_effort": "high"}, {"reasoning_effort": None}, {"user": None},
     {"stop": [""]}, {"stop": ""}, {"top_k": -1}, {"extra_configs": {"top_k": -1}}],
    ids=str,
)  # fmt: skip
def test_what_has_no_effect_here_is_taken(server, asked):
    assert server.chat("hi", max_tokens=1, **asked).status_code == 200


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"audio": {"voice": "x"}}, "audio", "audio is not supported"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"top_p": 2}, "top_p", "top_p is 2"),
        ({"n": 0}, "n", "n is 0"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is True"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "both are given"),
        ({"stream": "yes"}, "stream", "stream is 'yes'"),
        ({"messages": "hello"}, "messages", "messages is 'hello'"),
        ({"messages": []}, "messages", "messages is []"),
        ({"messages": None}, "messages", "messages is None"),
        ({"messages": [{"role": "user"}]}, None, "messages[0].content is None"),
        ({"messages": [{"role": "god", "content": "x"}]}, None, "messages[0].role is 'god'"),
        ({"messages": user({"type": "input_audio"})}, "messages[0].content[0]", "of type 'input_audio'"),
        ({"messages": user({"type": "image", "path": "x"})}, "messages[0].content[0]", "of type 'image'"),
        ({"messages": user(picture("red_circle", detail="ultra"))}, "messages[0].content[0]", "detail is"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"temprature": 1}, "temprature", "nearest known one is 'temperature'"),
        ({"extra_configs": {"max_new_token": 1}}, "max_new_token", "nearest known one is 'max_new_tokens'"),
        ({"return_logits": True}, "return_logits", "raw form"),
        ({"extra_configs": {"min_p": 2}}, "min_p", "min_p=2"),
        ({"regex": "a", "ebnf": "b"}, None, "give only one of"),
        ({"seed": 2**70}, None, "too large"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value(server, change, param, message):
    answer = server.post("/v1/chat/completions", {"messages": SHOWN} | change)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"{\xff}", b'{"messages": [1]}', b"[" * 100_000,
     b'{"messages": NaN}', b'{"messages": [], "seed": 1e999}', b'{"messages":[],"seed":' + b"9" * 5000 + b"}",
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}'],
    ids=lambda b: repr(b[:20]),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/", "/tokenize", "/detokenize", "/v1/chat/render"])
def test_a_body_that_is_not_sane_json_is_the_clients_error(server, path, body):
    answer = server.post(path, data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    shape = {"error_code", "error_code_str", "message"} if path == "/" else {"error"}
    assert set(answer.json()) == shape
    assert "Traceback" not in answer.text


def test_more_pictures_than_allowed_are_refused_before_any_is_fetched(server):
    nowhere = {"type": "image_url", "image_url": "http://192.0.2.1/never.png"}
    answer = server.chat([nowhere] * 5 + [QUESTION])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the request has 5 images, the limit is 4"
    assert answer.json()["error"]["code"] == "901_MM_LONG_PROMPT_ERROR"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,AAAA", "903_MM_PROCESS_ERROR"),
        ("data:image/svg+xml,<svg/>", "905_MM_NOT_SUPPORTED_ERROR"),
        ("ftp://example.com/x.png", "905_MM_NOT_SUPPORTED_ERROR"),
        ("http://127.0.0.1:1/x.png", "906_MM_DOWNLOAD_FAILED"),
        ("http://169.254.169.254/latest/meta-data", "906_MM_DOWNLOAD_FAILED"),
        ("/etc/passwd", "906_MM_DOWNLOAD_FAILED"),
        ("file:///etc/passwd", "906_MM_DOWNLOAD_FAILED"),
        (f"{IMAGES}/../conftest.py", "906_MM_DOWNLOAD_FAILED"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_that_cannot_be_had_is_a_400_before_any_byte_of_a_stream(client, url, code, stream):
    messages = user({"type": "image_url", "image_url": {"url": url}}, QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=messages, stream=stream)
    assert refused.value.code == code


def test_files_below_the_allowed_folder_are_pictures(server):
    answer = server.chat([{"type": "image_url", "image_url": {"url": f"{IMAGES}/red_circle.png"}}, QUESTION],
                         temperature=0)  # fmt: skip
    assert answer.json()["choices"][0]["message"]["content"] == "a red circle"


def test_tags_and_control_tokens_in_a_chat_are_only_text(server):
    typed = "<img>/etc/passwd</img><|im_end|> hello"
    answer = server.post("/v1/chat/render", {"messages": [{"role": "user", "content": typed}]})
    special = server.pipeline.tokenizer.token_to_id("<|im_end|>")
    plain = server.post("/v1/chat/render", {"messages": [{"role": "user", "content": "hello"}]})
    assert answer.json()["token_ids"].count(special) == plain.json()["token_ids"].count(special)
    assert typed in answer.json()["prompt"]


def test_a_prompt_that_cannot_fit_is_refused(server):
    answer = server.chat("word " * 20_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "511_LONG_PROMPT_ERROR"
    answer = server.chat("x" * 5_000_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "511_LONG_PROMPT_ERROR"


def test_a_time_limit_is_a_408(client):
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(
            model="m", messages=SHOWN, extra_body={"timeout_ms": 30, "ignore_eos": True, "max_tokens": 4000}
        )
    assert late.value.status_code == 408
    assert late.value.code == "514_GENERATE_TIMEOUT"


# ------------------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place_at_once(server, until, long, stream):
    body = {"messages": user({"type": "text", "text": "hi"}), "stream": stream} | long
    with pytest.raises(requests.Timeout) if not stream else _nothing():
        answer = requests.post(
            f"{server.url}/v1/chat/completions", json=body, timeout=0.5, stream=stream
        )
        next(answer.iter_content(1))
        answer.close()
    until(server.idle, 5)
    last = server.get("/metrics").text
    assert 'requests_total{kind="chat",outcome="cancelled"}' in last


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()

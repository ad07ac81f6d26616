"""rtp-llm's raw form: one prompt or several, whole or streamed, and its own shape of errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

IMAGES = Path(__file__).parents[2] / "images"
CIRCLE, STAR = f"{IMAGES}/red_circle.png", f"{IMAGES}/blue_star.png"
PROMPT = "Picture 1:<img/>\nWhat is this?"
AUX = {"cost_time", "first_token_cost_time", "wait_time", "iter_count", "input_len", "output_len",
       "prefix_len", "reuse_len", "drafted_len", "accepted_len", "multimodal_lengths",
       "cum_log_probs"}  # fmt: skip


def events(answer: Any) -> list[dict[str, Any]]:
    """The stream's JSON objects; its frame is checked."""
    assert answer.status_code == 200
    *parts, end, rest = answer.text.split("\r\n\r\n")
    assert (end, rest) == ("data:[done]", "")
    assert all(part.startswith("data:{") for part in parts)
    return [json.loads(part.removeprefix("data:")) for part in parts]


@pytest.mark.parametrize("prompt", ["prompt", "text"])
@pytest.mark.parametrize("urls", ["urls", "images"])
@pytest.mark.parametrize("config", ["generate_config", "generation_config"])
def test_each_field_has_two_names(server, prompt, urls, config):
    body = {prompt: PROMPT, urls: [CIRCLE], config: {"top_k": 1, "max_new_tokens": 10}}
    answer = server.post("/", body).json()
    assert answer["response"] == "a red circle"
    assert answer["finished"] is True
    assert set(answer["aux_info"]) >= AUX
    assert answer["aux_info"]["multimodal_lengths"] == [256]


def test_a_tag_may_hold_the_url_itself(server):
    answer = server.post("/", {"prompt": f"Picture 1:<img>{CIRCLE}</img>\nWhat is this?", "top_k": 1})
    assert answer.json()["response"] == "a red circle"


def test_top_level_wins_over_the_config_also_under_another_name(server):
    body = {"prompt": PROMPT, "urls": [CIRCLE], "top_k": 1, "gen_length": 2}
    assert server.post("/", body | {"generate_config": {"max_new_tokens": 1}}).json()["response"] == "a red"


def test_a_batch_answers_in_order(server):
    body = {"prompt_batch": [PROMPT, PROMPT, "hi"], "urls": [[CIRCLE], [STAR], []], "top_k": 1,
            "max_new_tokens": 8}  # fmt: skip
    answers = server.post("/", body).json()["response_batch"]
    assert [a["response"] for a in answers[:2]] == ["a red circle", "a blue star"]
    alone = server.post("/", {"prompt": "hi", "top_k": 1, "max_new_tokens": 8}).json()
    assert answers[2]["response"] == alone["response"]


@pytest.mark.parametrize("count", [1, 2])
def test_several_answers_make_lists(server, count):
    body = {"prompt": PROMPT, "urls": [CIRCLE], "top_k": 1, "num_return_sequences": count}
    answer = server.post("/", body).json()
    assert answer["response"] == ["a red circle"] * count
    assert [set(a) >= AUX for a in answer["aux_info"]] == [True] * count
    assert answer["finished"] is True


@pytest.mark.parametrize(
    "asked",
    [{"stream": True}, {"yield_generator": True}, {"generate_config": {"yield_generator": True}},
     {"generate_config": {"stream": True}}],
)  # fmt: skip
def test_a_stream_is_cumulative_and_ends_with_done(server, asked):
    config = {"top_k": 1} | asked.pop("generate_config", {})
    found = events(server.post("/", {"prompt": PROMPT, "urls": [CIRCLE], "generate_config": config} | asked))
    texts = [e["response"] for e in found]
    assert texts[-1] == "a red circle"
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))
    assert [e["finished"] for e in found] == [False] * (len(found) - 1) + [True]


def test_top_level_says_no_to_the_configs_stream(server):
    body = {"prompt": "hi", "max_new_tokens": 1, "stream": False, "generate_config": {"stream": True}}
    assert "response" in server.post("/", body).json()


def test_incremental_pieces_join_to_the_whole(server):
    body = {"prompt": PROMPT, "urls": [CIRCLE], "top_k": 1, "return_incremental": True}
    assert server.post("/", body).json()["response"] == "a red circle"
    assert "".join(e["response"] for e in events(server.post("/", body | {"stream": True}))) == "a red circle"


def test_a_batch_streams_all_its_answers(server):
    body = {"prompt_batch": [PROMPT, PROMPT], "urls": [[CIRCLE], [STAR]], "top_k": 1, "stream": True}
    *_, last = events(server.post("/", body))
    assert [a["response"] for a in last["response_batch"]] == ["a red circle", "a blue star"]


def test_what_is_asked_for_comes_back(server):
    body = {"prompt": PROMPT, "urls": [CIRCLE], "top_k": 1, "max_new_tokens": 2, "return_logits": True,
            "return_output_ids": True, "return_input_ids": True, "calculate_loss": 2,
            "return_cum_log_probs": True, "logprobs": True}  # fmt: skip
    answer = server.post("/", body).json()
    vocab = server.pipeline.model.bundle.model.vocab_size
    assert [len(row) for row in answer["logits"]] == [vocab] * 2
    assert [row.index(max(row)) for row in answer["logits"]] == answer["output_ids"]
    assert len(answer["loss"]) == len(answer["input_ids"]) - 1
    assert answer["loss"].count(None) == 256  # image slots have none
    assert answer["aux_info"]["cum_log_probs"] < 0
    assert len(answer["logprobs"]) == 2


RETURNED = {"output_ids", "input_ids", "loss", "logprobs", "logits", "all_probs"}


@pytest.mark.parametrize("batch", [False, True])
def test_a_stream_holds_what_is_asked_for_once_in_its_last_event(server, batch):
    body = {"prompt": "hi", "top_k": 1, "max_new_tokens": 300, "ignore_eos": True, "return_logits": True,
            "return_all_probs": True, "return_output_ids": True, "return_input_ids": True,
            "calculate_loss": 2, "logprobs": True}  # fmt: skip
    if batch:  # one of them ends before the other
        body |= {"prompt": None, "prompt_batch": ["hi", PROMPT], "urls": [[], [CIRCLE]], "ignore_eos": False}
    *earlier, last = [e.get("response_batch", [e]) for e in events(server.post("/", body | {"stream": True}))]
    whole = server.post("/", body).json()
    assert earlier
    assert not any(RETURNED & set(answer) for answers in earlier for answer in answers)
    for streamed, answer in zip(last, whole.get("response_batch", [whole]), strict=True):
        assert RETURNED < set(streamed)
        for name in ("output_ids", "input_ids"):
            assert streamed[name] == answer[name]


def test_the_numbers_of_all_answers_to_a_request_have_one_limit(server):
    vocab = server.pipeline.model.bundle.model.vocab_size
    most = 4_000_000 // vocab  # rows
    half = {"max_new_tokens": most // 2 + 1}

    def asked(**body: Any) -> int:
        return server.post("/", {"prompt": "hi"} | body).status_code

    assert asked(max_new_tokens=most + 1, return_logits=True) == 400
    assert asked(**half, return_logits=True, return_all_probs=True) == 400
    assert asked(**half, return_logits=True, num_return_sequences=2) == 400
    assert asked(**half, return_logits=True, prompt=None, prompt_batch=["hi"] * 2) == 400
    assert asked(max_new_tokens=4000, logprobs=True, top_logprobs=20, n=64) == 400
    chat = server.chat("hi", max_tokens=4000, logprobs=True, top_logprobs=20, n=64)
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "logprobs")


@pytest.mark.parametrize(
    ("asked", "parse"),
    [
        ({"regex": "[a-c]{3}"}, lambda text: re.fullmatch("[a-c]{3}", text)),
        ({"json_schema": {"type": "boolean"}}, lambda text: text.strip() in ("true", "false")),
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_an_answer_follows_its_grammar_whole_and_streamed(server, asked, parse):
    body = {"prompt": "hi", "top_k": 1, "max_new_tokens": 60} | asked
    whole = server.post("/", body).json()
    *_, streamed = events(server.post("/", body | {"stream": True}))
    for answer in (whole, streamed):
        assert parse(answer["response"]) or answer["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"urls": []}, 400, "902_MM_WRONG_FORMAT_ERROR", "1 image tag, 0 images were given"),
        ({"prompt": "<img>x"}, 400, "902_MM_WRONG_FORMAT_ERROR", "not closed"),
        ({"prompt": ""}, 400, "510_EMPTY_PROMPT_ERROR", "empty"),
        ({"urls": ["/etc/passwd"]}, 400, "906_MM_DOWNLOAD_FAILED", "outside"),
        ({"top_p": 7}, 400, "604_ERROR_GENERATE_CONFIG_FORMAT", "top_p=7"),
        ({"top_q": 7}, 400, "604_ERROR_GENERATE_CONFIG_FORMAT", "unknown field 'top_q'"),
        ({"urls": [5]}, 400, "507_BAD_REQUEST_FIELD", "urls[0] is 5: "),
        ({"urls": [["x"]]}, 400, "507_BAD_REQUEST_FIELD", "only goes with prompt_batch"),
        ({"text": "x"}, 400, "507_BAD_REQUEST_FIELD", "two names"),
        ({"prompt": None}, 400, "507_BAD_REQUEST_FIELD", "give prompt"),
        ({"prompt": 5}, 400, "507_BAD_REQUEST_FIELD", "prompt"),
        ({"prompt": None, "prompt_batch": ["a", "b"], "urls": [["x"]]}, 400, "507_BAD_REQUEST_FIELD",
         "urls has 1 lists, prompt_batch has 2 prompts"),
        ({"prompt": None, "prompt_batch": ["a"], "urls": ["x"]}, 400, "507_BAD_REQUEST_FIELD",
         "list of lists"),
        ({"prompt": None, "prompt_batch": ["a"] * 200, "urls": None}, 400, "507_BAD_REQUEST_FIELD",
         "limit is"),
        ({"stream": 5}, 400, "507_BAD_REQUEST_FIELD", "stream"),
        ({"generate_config": {"stream": 5}}, 400, "507_BAD_REQUEST_FIELD", "stream is 5"),
        ({"return_logits": True, "max_new_tokens": 8000, "urls": [CIRCLE]}, 400, "507_BAD_REQUEST_FIELD",
         "lower max_new_tokens"),
        ({"urls": [CIRCLE], "timeout_ms": 20, "ignore_eos": True, "max_new_tokens": 4000}, 408,
         "514_GENERATE_TIMEOUT", "timeout_ms=20"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [None, True])
def test_an_error_has_its_code_in_the_raw_shape(server, change, status, code, message, stream):
    body = {"prompt": PROMPT, "urls": [CIRCLE], "stream": stream} | change
    answer = server.post("/", {k: v for k, v in body.items() if v is not None})
    if answer.status_code == 200 and code.startswith("514"):  # it came after the first token
        last = json.loads(re.findall(r"data:(\{.*\})\r\n", answer.text)[-1])
        assert "[done]" not in answer.text
    else:
        last = answer.json()
        assert answer.status_code == status
    assert last["error_code_str"] == code
    assert last["error_code"] == int(code[:3])
    assert message in last["message"]


def test_tokens_go_there_and_back(server):
    text = "What is this? <|im_end|> ähm"
    ids = server.pipeline.encode(text)
    assert server.post("/tokenize", {"prompt": text}).json()["tokens"] == ids
    encoded = server.post("/tokenizer/encode", {"prompt": text}).json()
    assert encoded["token_ids"] == ids
    assert "<|im_end|>" in encoded["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == text
    wrong = server.post("/detokenize", {"tokens": [10**9]})
    assert wrong.status_code == 400
    assert "tokens[0] is 1000000000" in wrong.json()["error"]["message"]


def test_render_shows_the_prompt_that_is_sent_to_the_model(server):
    content = [{"type": "image_url", "image_url": CIRCLE}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    expected = list(server.pipeline.chat(messages, max_new_tokens=1, return_input_ids=True))[-1]
    for path in ("/chat/render", "/v1/chat/render"):
        shown = server.post(path, {"messages": messages, "temperature": 0}).json()
        assert shown["token_ids"] == expected.generate_outputs[0].input_ids
        assert "What is this?" in shown["prompt"]
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == shown["token_ids"]


def test_operators_see_the_model_and_its_load(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert (model["object"], model["owned_by"], model["max_images"]) == ("model", "rtp-llm", 4)
    assert model["max_model_len"] == server.pipeline.model.engine.backend.slot_tokens
    assert model["input"] == ["text", "image"]
    assert server.get(f"/v1/models/{model['id']}").json() == model
    assert server.get("/v1/models/other").status_code == 404
    assert server.get("/status").json()["status"] == "ready"
    assert {"running", "waiting"} <= set(server.get("/worker_status").json())
    assert {"free_blocks", "hit_rate", "image_hit_rate"} <= set(server.get("/cache_status").json())
    assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe-eval" not in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["x-content-type-options"] == "nosniff"

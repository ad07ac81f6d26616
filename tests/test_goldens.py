"""Every recorded case of the reference implementations, through the public API, in float32."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtp_llm.build.rewrite import rewrite
from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.pipeline import GenerateOutput, Pipeline
from rtp_llm.runtime.backends.evaluator import EvaluatorBackend

FOLDER = Path(__file__).parents[2] / "shared/goldens"
SETS = ("qwenvl_A", "qwenvl_C", "llava_orig_A", "llava_hf_A")
TOLERANCE = 5e-5  # of the reference's standard deviation
MARGIN = 0.005  # below it a greedy token may flip under another summation order

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs (../shared/goldens) are not part of a clone"
)


def _cases(*kinds: str) -> list[Any]:
    found = []
    for name in SETS if FOLDER.is_dir() else ():
        for case in json.loads((FOLDER / name / "cases.json").read_text())["cases"]:
            if case["kind"] in kinds:
                found.append(pytest.param(name, case, id=f"{name}-{case['name']}"))
    return found or [pytest.param("", {}, id="absent")]


LOWERINGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "linear": {"backend": "tensorrt", "kv_cache": "linear", "device": "cpu"},  # in ONNX Runtime
    # in ONNX's reference evaluator, whose steps take as many tokens as they may, however slow they are
    "paged": {"backend": "tensorrt", "device": "cpu", "step_ms": 100_000},
    # there too: as `build` hands it to TensorRT
    "rewritten": {"backend": "tensorrt", "device": "cpu", "step_ms": 100_000},
    "torchscript": {"backend": "torchscript", "device": "cpu"},
}


class Set:
    """One golden set: its checkpoint, opened through the front door, and what was recorded."""

    def __init__(self, name: str, conversation: str | None = None, lowering: str = "gqa"):
        self.name, self.folder = name, FOLDER / name
        self.family = "qwen" if name.startswith("qwen") else "llava"
        config = ModelConfig(quantization="fp32", conversation=conversation, **LOWERINGS[lowering])
        model = ModelFactory.from_huggingface(self.folder / "checkpoint", model_config=config)
        self.pipeline = Pipeline(model, model.tokenizer)
        self.recorded = json.loads((self.folder / "cases.json").read_text())
        self.arrays = np.load(self.folder / "cases.npz")

    def images(self, case: dict[str, Any]) -> list[Any]:
        paths = [self.folder / ("" if "/" in i else "images") / i for i in case.get("images", [])]
        if self.name.startswith("llava_hf"):  # recorded from PIL objects
            return [Image.open(path) for path in paths]
        return [str(path) for path in paths]

    def array(self, case: dict[str, Any], name: str) -> np.ndarray:
        return self.arrays[f"{case['name']}.{name}"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    opened: dict[Any, Set] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTP_LLM_CACHE", str(tmp_path_factory.mktemp("goldens")))

        def open_set(name: str, conversation: str | None = None, lowering: str = "gqa") -> Set:
            key = name, conversation, lowering
            if key not in opened:
                with pytest.MonkeyPatch.context() as as_built:
                    if lowering == "rewritten":
                        exported = EvaluatorBackend.model
                        as_built.setattr(EvaluatorBackend, "model", lambda b: rewrite(exported(b), splits=3))
                    opened[key] = Set(name, conversation, lowering)
            return opened[key]

        yield open_set
    for golden in opened.values():
        golden.pipeline.stop()


def last(responses: Any) -> Any:
    return list(responses)[-1]


GREEDY = {"top_k": 1, "ignore_eos": True, "return_logits": True, "return_input_ids": True,
          "return_output_ids": True, "skip_special_tokens": False}  # fmt: skip


def asked(golden: Set, case: dict[str, Any]) -> dict[str, Any]:
    """The case as a user would ask, for Pipeline.batch: raw prompts with their tags, chats as messages."""
    config = {**GREEDY, "max_new_tokens": case["n_new"]}
    if case["kind"] == "ids":
        return {"prompt": golden.array(case, "input_ids")[0].tolist(), "generate_config": config}
    if golden.family == "llava":
        return {"prompt": case["prompt"], "images": golden.images(case), "generate_config": config}
    if case["kind"] == "raw" or case["images"]:
        return {"prompt": case.get("raw_text", case.get("text")), "generate_config": config}
    messages = [{"role": "system", "content": case["system"]}]
    for question, answer in case["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": case["query"]})
    return {"messages": messages, "generate_config": config}


def run(golden: Set, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> GenerateOutput:
    """The case alone, as a stream."""
    request = asked(golden, case)
    if golden.family == "qwen":  # its prompts name pictures relative to the set
        monkeypatch.chdir(golden.folder)
    if own_window(case):
        golden = _with_window(golden, case["max_window_size"], monkeypatch)
    ask = golden.pipeline.chat if "messages" in request else golden.pipeline
    return last(ask(**request)).generate_outputs[0]


def own_window(case: dict[str, Any]) -> bool:
    return case.get("max_window_size", 6144) != 6144


def _with_window(golden: Set, window: int, monkeypatch: pytest.MonkeyPatch) -> Set:
    import dataclasses

    rules = golden.pipeline.model.bundle.prompt
    chat = dataclasses.replace(rules.chat, history_tokens=window)
    monkeypatch.setattr(
        golden.pipeline._prompts, "rules", dataclasses.replace(rules, chat=chat), raising=True
    )
    return golden


def same_tokens(found: list[int], expected: np.ndarray, margins: np.ndarray) -> bool:
    """Equal up to the first step that may flip."""
    until = next((i for i, m in enumerate(margins) if m < MARGIN), len(margins))
    return found[:until] == expected.tolist()[:until]


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def same_ids(found: list[int], golden: Set, expected: list[int]) -> bool:
    """Equal outside of image slots, which every reference fills in its own way."""
    bundle = golden.pipeline.model.bundle
    token, tokens = bundle.prompt.image.token_id, bundle.vision.tokens
    if golden.name.startswith("llava_orig"):  # −200 once per image
        expected = [i for t in expected for i in ([t] * tokens if t == -200 else [t])]
    if golden.family == "qwen":
        start = bundle.prompt.image.prefix_ids[0]
        expected = list(expected)
        for at in [i for i, t in enumerate(expected) if t == start]:
            expected[at + 1 : at + 1 + tokens] = [token] * tokens
    return found == expected


@pytest.mark.parametrize(("name", "case"), _cases("raw", "chat", "ids"))
def test_ids_logits_and_greedy_tokens_equal_the_reference(sets, name, case, monkeypatch):
    golden = sets(name)
    output = run(golden, case, monkeypatch)
    assert same_ids(output.input_ids, golden, golden.array(case, "input_ids")[0].tolist())
    assert worst(output.logits[0], golden.array(case, "first_logits")[0]) <= TOLERANCE
    margins = golden.array(case, "step_margin")
    assert same_tokens(output.output_ids, golden.array(case, "generated_ids"), margins)
    if (margins >= MARGIN).all():
        assert worst(output.logits, golden.array(case, "logits_steps")) <= 2 * TOLERANCE


@pytest.fixture(scope="module")
def together(sets):
    """(set, lowering) → the answers to its cases by their names, computed in one batch: steps of the
    evaluator take about as long for one row as for many."""

    @functools.cache
    def answers(name: str, lowering: str) -> dict[str, GenerateOutput | Exception]:
        golden = sets(name, lowering=lowering)
        kinds = ("raw", "chat", "ids")
        cases = [c for c in golden.recorded["cases"] if c["kind"] in kinds and not own_window(c)]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(golden.folder)
            found = [one for _, one in golden.pipeline.batch(asked(golden, case) for case in cases)]
        return {
            case["name"]: one if isinstance(one, Exception) else one.generate_outputs[0]
            for case, one in zip(cases, found, strict=True)
        }

    return answers


@pytest.mark.parametrize("lowering", [name for name in LOWERINGS if name != "gqa"])
@pytest.mark.parametrize(("name", "case"), _cases("raw", "chat", "ids"))
def test_every_lowering_gives_the_reference_s_logits_and_tokens(
    sets, together, name, case, lowering, monkeypatch
):
    golden = sets(name, lowering=lowering)
    if own_window(case):
        output = run(golden, case, monkeypatch)
    else:
        output = together(name, lowering)[case["name"]]
    if isinstance(output, Exception):
        raise output
    assert worst(output.logits[0], golden.array(case, "first_logits")[0]) <= TOLERANCE
    margins = golden.array(case, "step_margin")
    assert same_tokens(output.output_ids, golden.array(case, "generated_ids"), margins)


def _pictures_first(case: dict[str, Any]) -> bool:
    """As the template writes them; LLaVA's own code cannot put one inside a chat's text either."""
    return all("<image>" not in turn.replace("<image>\n", "") for turn in case["turns"])


@pytest.mark.parametrize(
    ("name", "case"),
    [c for c in _cases("chat") if c.values[1].get("turns") and _pictures_first(c.values[1])],
)
def test_llava_chat_messages_become_the_reference_prompt(sets, name, case):
    golden = sets(name, case["conv_mode"])
    images = golden.images(case)
    messages = []
    for i, turn in enumerate(case["turns"]):
        pieces = turn.split("<image>")
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": images.pop(0)}} for _ in pieces[1:]
        ]
        text = turn.replace("<image>\n", "")
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
    config = {**GREEDY, "max_new_tokens": 1}
    output = last(golden.pipeline.chat(messages, generate_config=config)).generate_outputs[0]
    assert same_ids(output.input_ids, golden, golden.array(case, "input_ids")[0].tolist())
    assert worst(output.logits[0], golden.array(case, "first_logits")[0]) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), [c for c in _cases("chat") if c.values[1].get("messages")])
def test_llava_hf_messages_become_the_reference_prompt(sets, name, case):
    golden = sets(name)
    images = golden.images(case)
    messages = [
        {**m, "content": [{"type": "image", "image": images.pop(0)} if part["type"] == "image" else part
                          for part in m["content"]]}
        for m in case["messages"]
    ]  # fmt: skip
    config = {**GREEDY, "max_new_tokens": 1}
    output = last(golden.pipeline.chat(messages, generate_config=config)).generate_outputs[0]
    assert same_ids(output.input_ids, golden, golden.array(case, "input_ids")[0].tolist())


@pytest.mark.parametrize(("name", "case"), _cases("batch"))
def test_a_padded_batch_of_the_reference_equals_our_packed_one(sets, name, case, monkeypatch):
    golden = sets(name)
    ids, mask = golden.array(case, "input_ids"), golden.array(case, "attention_mask")
    expected = golden.array(case, "generated_ids")
    config = {**GREEDY, "max_new_tokens": expected.shape[-1]}
    requests: list[dict[str, Any]] = []
    if golden.family == "qwen":
        monkeypatch.chdir(golden.folder)
        for row, keep in zip(ids, mask, strict=True):
            # an image's slots hold its url, relative to the set's folder
            requests.append({"prompt": row[keep.astype(bool)].tolist(), "generate_config": config})
    elif "rows" in case:
        requests = [
            {"prompt": r["prompt"], "images": golden.images(r), "generate_config": config}
            for r in case["rows"]
        ]
    else:
        images = golden.images(case)
        for prompt in case["prompt"]:
            taken = [images.pop(0) for _ in range(prompt.count("<image>"))]
            requests.append({"prompt": prompt, "images": taken, "generate_config": config})
    first, margins = golden.array(case, "first_logits"), golden.array(case, "step_margin")
    for i, response in golden.pipeline.batch(requests):
        output = response.generate_outputs[0]
        assert worst(output.logits[0], first[i]) <= TOLERANCE
        row = margins[:, i] if margins.shape[0] == expected.shape[-1] else margins[i]
        assert same_tokens(output.output_ids, expected[i], row)


@pytest.mark.parametrize(("name", "case"), _cases("batch_forward"))
def test_right_padding_of_the_reference_does_not_matter(sets, name, case):
    golden = sets(name)
    first = golden.array(case, "first_logits")
    config = {**GREEDY, "max_new_tokens": 1}
    requests = [
        {"prompt": r["prompt"], "images": golden.images(r), "generate_config": config} for r in case["rows"]
    ]
    for i, response in golden.pipeline.batch(requests):
        assert worst(response.generate_outputs[0].logits[0], first[i]) <= TOLERANCE


@pytest.mark.parametrize(("name", "case"), _cases("stop_words"))
def test_stop_words_end_the_answer_where_the_reference_ends_it(sets, name, case):
    golden = sets(name)
    messages = [{"role": "system", "content": case["system"]}, {"role": "user", "content": case["query"]}]
    config = {"top_k": 1, "max_new_tokens": case["max_new_tokens"], "return_output_ids": True,
              "stop_words_list": case["stop_words_ids"], "print_stop_words": True}  # fmt: skip
    response = last(golden.pipeline.chat(messages, generate_config=config))
    assert response.batch_response[0].strip() == case["response"].strip()
    expected = golden.array(case, "generated_ids").tolist()
    end = golden.recorded["meta"]["special_ids"]["eod_id"]
    # the reference forces its end token after a stop word; ours ends with the stop word
    expected = expected[: expected.index(end)] if end in expected else expected
    assert response.generate_outputs[0].output_ids == expected


@pytest.mark.parametrize(("name", "case"), _cases("eos_stop"))
def test_the_end_token_ends_the_answer(sets, name, case):
    golden = sets(name)
    config = {"top_k": 1, "max_new_tokens": case["max_new_tokens"], "return_output_ids": True}
    response = last(golden.pipeline(case["prompt"], generate_config=config))
    assert response.generate_outputs[0].output_ids == golden.array(case, "generated_ids").tolist()
    assert response.batch_response[0].strip() == case["generated_text"].strip()


@pytest.mark.parametrize("name", SETS)
def test_encode_and_decode_equal_the_checkpoint_s_own_tokenizer(sets, name):
    golden = sets(name)
    for case in golden.recorded["tokenizer_cases"]:
        text = case.get("text", case.get("prompt"))
        ids = case.get("ids", case.get("plain"))
        if case.get("allowed_special") == "image_st" or ids is None:
            continue  # the mode of typed text in a chat
        if len(text.encode()) > 254 and golden.family == "qwen":
            continue  # a url that the reference itself cannot decode
        assert same_ids(golden.pipeline.encode(text), golden, ids)
        if golden.family == "qwen":
            assert golden.pipeline.decode(ids) == case["decode"]

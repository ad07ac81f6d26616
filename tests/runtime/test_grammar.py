"""Structured output: whatever the logits, the text that a caller reads is in the grammar."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rtp_llm.errors import GenerateConfigError
from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime import grammar
from rtp_llm.runtime.detokenizer import Detokenizer
from rtp_llm.runtime.sampling import Sampler
from rtp_llm.runtime.sequence import SamplingParams, Sequence

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

ROWS = 32  # embedding rows that no token has
FAST = settings(max_examples=80, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
families = st.sampled_from(["qwen", "llava"])


class Voice:
    """A tokenizer, its vocabulary and ends of sequence; it says random things."""

    def __init__(self, path: Path):
        model = ModelFactory.from_huggingface(path)
        self.tokenizer = model.tokenizer
        self.eos = frozenset(model.bundle.generation.eos_ids)
        self.vocab = model.bundle.model.vocab_size + ROWS

    def matcher(self, **config: Any) -> grammar.Matcher:
        asked = SamplingParams.from_config(config).grammar
        assert asked is not None
        return grammar.matcher(asked, self.tokenizer, self.vocab, self.eos)

    def say(self, seed: int, steps: int = 120, **config: Any) -> tuple[str, bool]:
        """The text, and whether it ended by itself; every promise about the way there is checked."""
        matcher = self.matcher(**{k: v for k, v in config.items() if k in GRAMMARS})
        sequence = Sequence([1], 1, SamplingParams.from_config(config), steps, self.eos)
        sampler, text = Sampler(self.vocab, 0, seed, matcher), Detokenizer(self.tokenizer)
        random = np.random.default_rng(seed)
        special = [i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special]
        grown = ""
        for _ in range(steps):
            mask = matcher.mask()
            assert mask.shape == (self.vocab,) and mask.any()
            assert not mask[-ROWS:].any()
            assert {i for i in special if mask[i]} == (set(self.eos) if matcher.accepting else set())
            logits = (3 * random.normal(size=self.vocab)).astype(np.float32)
            token = sampler(sequence, logits).token
            assert mask[token] and matcher.error is None
            sequence.tokens.append(token)
            if token not in self.eos:
                text.push([token])
            assert text.text.startswith(grown)
            grown = text.text
            if matcher.done:
                text.finish()
                return text.text, True
        text.finish()
        return text.text, False


GRAMMARS = ("response_format", "json_schema", "regex", "ebnf")


@pytest.fixture(scope="module")
def voices(qwen_bundle: Path, llava_bundle: Path) -> dict[str, Voice]:
    return {"qwen": Voice(qwen_bundle), "llava": Voice(llava_bundle)}


names = st.text('abé"\\/ \n😀{<', min_size=1, max_size=4)
leaves = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-200, 200),
        st.integers(0, 300),
    ),
    st.sampled_from(["boolean", "null", "number", ["string", "null"]]).map(lambda t: {"type": t}),
    st.lists(st.one_of(names, st.integers(-9, 9), st.none()), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([r"^[a-c]+\d$", "x", "^é{2,3}$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
)


def objects(parts: dict[str, Any], required: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": parts,
        "required": list(parts)[:required],
        "additionalProperties": False,
    }


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(objects, st.dictionaries(names, inner, max_size=3), st.integers(0, 3)),
        st.builds(
            lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 2},
            inner,
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
    ),
    max_leaves=5,
)


@FAST
@given(families, schemas, seeds)
def test_what_ends_by_itself_is_valid_under_any_schema(
    voices: dict[str, Voice], family: str, schema: dict[str, Any], seed: int
) -> None:
    text, ended = voices[family].say(seed, json_schema=schema)
    if ended:
        jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(text))


bits = st.sampled_from(
    ["a", " ", "é", r"\d", "[x-z ]", "[^a]", r"\.", "(?:foo| bar)", "😀", r"\n", r"\{", '"', "."]
)
regexes = st.recursive(
    bits,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2,3}"])).map(lambda t: f"(?:{t[0]}){t[1]}"),
    ),
    max_leaves=6,
)


@FAST
@given(families, regexes, st.booleans(), seeds)
def test_what_ends_by_itself_matches_the_whole_regex(
    voices: dict[str, Voice], family: str, regex: str, anchored: bool, seed: int
) -> None:
    text, ended = voices[family].say(seed, regex=f"^{regex}$" if anchored else regex)
    assume(all(unicodedata.category(c) != "Cn" for c in text))  # digits younger than Python's Unicode
    assert not ended or re.fullmatch(regex, text)


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_every_text_of_a_small_language_can_be_said(voices: dict[str, Voice], family: str) -> None:
    language = {f"{a}{b}" for a in ("", " ", "x", "é") for b in ("1", " 2", "\n")}
    regex = "|".join(re.escape(text).replace("\\\n", r"\n").replace("\\ ", " ") for text in language)
    assert {voices[family].say(seed, regex=regex)[0] for seed in range(400)} == language


EBNF = r"""
root  ::= sum "\n"?          # a comment
sum   ::= term (("+" | "-") term)*
term  ::= [0-9]{1,2} | "(" sum ")" | "\u00e9[\x41\]" [^\n&a-z\\] | "~&"
"""
ATOM = r"(?:\d{1,2}|é\[A\][^\n&a-z\\]|~&)"


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_what_ends_by_itself_is_derived_from_the_ebnf(voices: dict[str, Voice], family: str) -> None:
    ends = 0
    for seed in range(40):
        text, ended = voices[family].say(seed, ebnf=EBNF)
        if not ended:
            continue
        ends += 1
        text = text.removesuffix("\n")
        before = None
        while text != before:  # innermost parentheses become a number
            before, text = text, re.sub(rf"(?<!\])\({ATOM}(?:[+-]{ATOM})*\)", "0", text)
        assert re.fullmatch(rf"{ATOM}(?:[+-]{ATOM})*", text)
    assert ends > 10


def test_json_object_is_an_object(voices: dict[str, Voice]) -> None:
    found = [voices["qwen"].say(seed, response_format={"type": "json_object"}) for seed in range(20)]
    assert any(ended for _, ended in found)
    assert all(isinstance(json.loads(text), dict) for text, ended in found if ended)
    assert all(text.startswith("{") for text, _ in found)


def test_a_weak_model_cannot_write_blanks_for_ever(voices: dict[str, Voice]) -> None:
    voice = voices["qwen"]
    matcher = voice.matcher(json_schema={"type": "array", "items": {"type": "null"}, "maxItems": 2})
    blank = [i for i in range(voice.vocab) if not (voice.tokenizer.decode([i]) or "x").strip()]
    steps = 0
    while not matcher.done:
        mask = matcher.mask()
        liked = [i for i in blank if mask[i]]
        matcher.accept(liked[0] if liked else int(np.flatnonzero(mask)[-1]))
        steps += 1
        assert steps < 30


def test_several_answers_do_not_hear_of_each_other(voices: dict[str, Voice]) -> None:
    voice = voices["qwen"]
    first = voice.matcher(regex="[ab]{2}")
    second = first.copy()
    first.accept(int(np.flatnonzero(first.mask())[0]))
    first.accept(int(np.flatnonzero(first.mask())[0]))
    assert first.done and not second.done and not second.accepting
    np.testing.assert_array_equal(second.mask(), voice.matcher(regex="[ab]{2}").mask())


def test_the_grammar_wins_over_bans_that_leave_nothing(voices: dict[str, Voice]) -> None:
    voice = voices["qwen"]
    banned = [[int(i)] for i in np.flatnonzero(voice.matcher(regex="a+b").mask())]
    text, ended = voice.say(3, regex="a+b", bad_words_list=banned, min_new_tokens=50, no_repeat_ngram_size=1)
    assert re.fullmatch("a+b", text) if ended else re.fullmatch("a+", text)


def test_log_probabilities_stay_those_of_the_raw_logits(voices: dict[str, Voice]) -> None:
    voice = voices["qwen"]
    logits = np.random.default_rng(0).normal(size=voice.vocab).astype(np.float32)
    sequence = Sequence(
        [1], 1, SamplingParams.from_config({"logprobs": True, "top_logprobs": 3}), 9, voice.eos
    )
    free = Sampler(voice.vocab, 0, 1)(sequence, logits)
    bound = Sampler(voice.vocab, 0, 1, voice.matcher(regex="[ab]"))(sequence, logits)
    assert bound.top == free.top
    assert bound.logprob == pytest.approx(
        float(logits[bound.token] - np.log(np.exp(logits.astype(float)).sum()))
    )


def deep(n: int) -> dict[str, Any]:
    names = {
        f"a{i}": {"items": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]}, "type": "array"} for i in range(n)
    }
    return {"$ref": "#/$defs/a0", "$defs": names | {f"a{n}": {"type": "null"}}}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": "{"}, "json_schema='{' must be a JSON schema"),
    ({"json_schema": [1]}, r"json_schema=\[1\] must be a JSON schema"),
    ({"json_schema": {"type": float("nan")}}, "json_schema=.* must be a JSON schema"),
    ({"json_schema": {"type": "nope"}}, "json_schema: Invalid type: nope"),
    ({"json_schema": {"not": {"type": "null"}}}, "json_schema: .*not"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema: .*uniqueItems"),
    ({"json_schema": {"type": "string", "format": "nope"}}, "json_schema: .*nope"),
    ({"json_schema": {"$ref": "https://example.com/x"}}, "json_schema: .*example.com"),
    ({"json_schema": {"$ref": "#"}}, "json_schema: it matches no text"),
    ({"json_schema": {"type": "object", "minProperties": 2}}, "json_schema: minProperties=2"),
    ({"json_schema": {"enum": ["x" * 70000]}}, "json_schema=.* must be at most 65536 characters"),
    ({"regex": "("}, "regex: unclosed group"),
    ({"regex": "(?=a)b"}, "regex: look-around"),
    ({"regex": "a^b"}, "regex: "),
    ({"regex": "[^\\s\\S]"}, "regex: it matches no text"),
    ({"regex": ""}, "regex: it matches only the empty text"),
    ({"regex": "\ud800"}, "regex=.* valid Unicode"),
    ({"regex": 5}, "regex=5 must be a string"),
    ({"regex": "a" * 20000}, "regex=.* must be at most 16384 characters"),
    ({"ebnf": 'root = "a"'}, "ebnf: Expected ::="),
    ({"ebnf": "root ::= x"}, "ebnf: Rule 'x' not found"),
    ({"ebnf": "start: <[0-5]>"}, "ebnf: "),  # the library's own syntax can name control tokens
    ({"ebnf": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "ebnf: it is nested too deeply"),
    ({"response_format": {"type": "xml"}}, "response_format=.* one of text, json_object, json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format=.*'json_schema'"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format="),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"nme": "x", "schema": {}}}},
        "response_format.json_schema=.* not nme",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format.json_schema.schema: .*not",
    ),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "give only one of regex and ebnf"),
    ({"regex": "a", "stop": ["b"]}, "stop_words_str cannot be combined with regex"),
    ({"json_schema": {}, "stop_words_list": [[1]]}, "stop_words_list cannot be combined with json_schema"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos cannot be combined with"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_one_line_that_names_the_field(
    voices: dict[str, Voice], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerateConfigError, match=f"^generate_config: {message}") as e:
        voices["qwen"].matcher(**config)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


HOSTILE: list[dict[str, Any]] = [
    {"json_schema": deep(900)},  # through the end of a usual stack
    {"json_schema": {"type": "integer", "multipleOf": 99999989}},
    {"json_schema": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 25)]}},
    {"json_schema": {"patternProperties": {f"^a{i}(b|c)*d{{1,50}}": {} for i in range(1000)}}},
    {"json_schema": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
    {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}},
    {"regex": "x(b|(a{1000}){1000})"},
    {"regex": r"(\w{0,500}\p{L}){0,100}"},
    {"ebnf": 'root ::= ((("a" x{0,1000}){0,1000}){0,1000})\nx ::= "b" | "c" x'},
    {"ebnf": 'root ::= "a" root'},
    {"ebnf": 'root ::= root root | "a"?'},
]


@pytest.mark.parametrize("config", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_a_hostile_grammar_is_refused_or_followed_in_bounded_time(
    voices: dict[str, Voice], config: dict[str, Any]
) -> None:
    """Without the limits each of the first four runs for minutes or ends the process."""
    ended = threading.Event()

    def follow() -> None:  # on a thread with a usual stack, as the engine's
        try:
            matcher = voices["qwen"].matcher(**config)
            random = np.random.default_rng(0)
            for _ in range(200):
                if matcher.done or matcher.error:
                    break
                matcher.accept(int(random.choice(np.flatnonzero(matcher.mask()))))
        except GenerateConfigError:
            pass
        ended.set()

    threading.Thread(target=follow, daemon=True).start()
    assert ended.wait(20)


@pytest.fixture(scope="module")
def pipeline(qwen_bundle: Path) -> Iterator[Pipeline]:
    model = ModelFactory.from_huggingface(qwen_bundle)
    with Pipeline(model, model.tokenizer) as pipeline:
        yield pipeline


SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "sides": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["shape", "sides"],
    "additionalProperties": False,
}


def test_the_pipeline_answers_in_the_schema_and_streams_its_beginnings(pipeline: Pipeline) -> None:
    for config in (
        {"json_schema": SCHEMA, "top_k": 1},
        {"json_schema": json.dumps(SCHEMA), "random_seed": 4},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "strict": True, "schema": SCHEMA},
            }
        },
    ):
        responses = list(pipeline("What is this?", generate_config={"max_new_tokens": 100, **config}))
        last = responses[-1]
        jsonschema.validate(json.loads(last.batch_response[0]), SCHEMA)
        assert last.generate_outputs[0].finish_reason == "stop"
        for response in responses:
            assert last.batch_response[0].startswith(response.batch_response[0])
        assert len(responses) > 3


def test_several_answers_are_each_in_the_grammar(pipeline: Pipeline) -> None:
    config = {
        "regex": "[a-z]{2} [0-9]+",
        "num_return_sequences": 4,
        "random_seed": 1,
        "top_p": 1.0,
        "temperature": 3.0,
    }
    last = list(pipeline("Hello", generate_config={**config, "max_new_tokens": 60}))[-1]
    for text, output in zip(last.batch_response, last.generate_outputs, strict=True):
        assert output.finish_reason == "length" or re.fullmatch("[a-z]{2} [0-9]+", text)
    assert len(set(last.batch_response)) > 1


def test_requests_side_by_side_keep_their_own_grammars(pipeline: Pipeline) -> None:
    configs: list[dict[str, Any]] = [{"regex": f"{'ab'[i % 2]}{{{i + 1}}}"} for i in range(6)]
    configs += [{"json_schema": SCHEMA}, {}]

    async def one(config: dict[str, Any]) -> str:
        request = pipeline.prepare("What is this?", generate_config={"max_new_tokens": 60, **config})
        return [r.batch_response[0] async for r in pipeline.stream(request)][-1]

    async def everything() -> list[str]:
        return await asyncio.gather(*map(one, configs))

    texts = asyncio.run(everything())
    assert texts[:6] == ["ab"[i % 2] * (i + 1) for i in range(6)]
    jsonschema.validate(json.loads(texts[6]), SCHEMA)


def test_only_a_length_cut_breaks_it_and_says_so(pipeline: Pipeline) -> None:
    last = list(pipeline("Hi", generate_config={"regex": "a{50}", "max_new_tokens": 5}))[-1]
    assert last.generate_outputs[0].finish_reason == "length"
    assert re.fullmatch("a{5,49}", last.batch_response[0])


def test_a_wrong_grammar_is_refused_before_anything_runs(pipeline: Pipeline) -> None:
    with pytest.raises(GenerateConfigError, match="regex: unclosed group"):
        pipeline.prepare("Hi", generate_config={"regex": "("})


def test_a_grammar_that_gets_too_costly_ends_its_answer_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pipeline("Hi", generate_config={"regex": "b{30}", "max_new_tokens": 60})
    next(other)
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 40)
    with pytest.raises(GenerateConfigError, match="regex: the answer cannot go on: .*too many states"):
        list(pipeline("Hi", generate_config={"regex": "[abc]{200}", "max_new_tokens": 300}))
    assert list(other)[-1].batch_response[0] == "b" * 30

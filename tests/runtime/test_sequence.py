"""A generate_config is checked field by field, and every refusal says what would be right."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.errors import GenerateConfigError, NotSupportedYet
from rtp_llm.runtime.sequence import ALIASES, SamplingParams, Sequence

FIELDS = [f.name for f in dataclasses.fields(SamplingParams)]
parse = SamplingParams.from_config
NAN, INF = float("nan"), float("inf")

INTEGERS = {  # field: lowest, highest
    "max_new_tokens": (0, None),
    "min_new_tokens": (0, None),
    "max_input_tokens": (1, None),
    "top_k": (0, None),
    "no_repeat_ngram_size": (0, None),
    "random_seed": (-(2**63), 2**64),
    "num_return_sequences": (0, 64),
    "calculate_loss": (0, 2),
    "top_logprobs": (0, 20),
    "min_pixels": (1, None),
    "max_pixels": (1, None),
    "timeout_ms": (1, None),
}
NUMBERS: dict[str, tuple[list[float], list[float]]] = {  # field: right, wrong
    "temperature": ([0, 0.1, 1, 100.0], [-0.1, -1, INF]),
    "top_p": ([0, 0.5, 1, 1.0], [-0.01, 1.01]),
    "min_p": ([0, 0.5, 1], [-0.01, 1.01]),
    "repetition_penalty": ([0.1, 1, 2.5], [0, -1, INF]),
    "presence_penalty": ([-2, 0, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 0, 2], [-2.1, 2.1]),
}
FLAGS = [
    "do_sample", "ignore_eos", "print_stop_words", "skip_special_tokens", "return_logits",
    "return_input_ids", "return_output_ids", "return_all_probs", "return_cum_log_probs",
    "return_incremental", "logprobs", "reuse_cache",
]  # fmt: skip
LISTS: dict[str, tuple[list[tuple[Any, Any]], list[Any]]] = {  # field: (given, read), wrong
    "stop_words_str": (
        [([], []), ("x", ["x"]), (["a", "b"], ["a", "b"]), (("a",), ["a"])],
        [[""], "", [1], 5, {"a": 1}],
    ),
    "stop_words_list": (
        [([], []), ([[1, 2], [3]], [[1, 2], [3]]), ([5], [[5]])],
        [[[]], [[-1]], [["a"]], [[True]], 5, "a"],
    ),
    "bad_words_list": ([([[1], (2, 3)], [[1], [2, 3]])], [[[]], [[-1]], [[1.5]], 7]),
    "eos_token_id": ([(5, [5]), ([5, 6], [5, 6])], [[], -1, [-1], "a", [1.5], True]),
    "resized_shape": ([([224, 448], [224, 448])], [224, [1], [0, 5], [1, 2, 3], "a"]),
}
TEXTS = ["request_id", "speculative"]
GRAMMARS = ["response_format", "json_schema", "regex", "ebnf"]  # tests/runtime/test_grammar.py
UNSUPPORTED = {
    "num_beams": 2,
    "adapter_name": "lora",
    "return_hidden_states": True,
}


def test_every_field_has_a_test_here() -> None:
    known = [*INTEGERS, *NUMBERS, *FLAGS, *LISTS, *TEXTS, *GRAMMARS, *UNSUPPORTED]
    assert sorted(known) == sorted(FIELDS)


def test_nothing_given_is_the_documented_defaults() -> None:
    assert parse(None) == parse({}) == SamplingParams()
    params = parse({})
    assert params.do_sample and params.top_k == 0 and params.top_p == params.temperature == 1
    assert params.repetition_penalty == 1 and params.max_new_tokens is None
    assert params.skip_special_tokens and params.reuse_cache and not params.print_stop_words
    assert params.num_return_sequences == 0 and params.answers == 1


@pytest.mark.parametrize("field", INTEGERS)
def test_an_integer_field_takes_its_range_and_names_itself_outside(field: str) -> None:
    low, high = INTEGERS[field]
    for right in (low, low + 1, float(low + 1)):
        found = getattr(parse({field: right}), field)
        assert found == right and type(found) is int
    wrong = [low - 1, 1.5, "3", True, [1], NAN, INF, -INF]
    for value in wrong if high is None else [*wrong, high + 1]:
        with pytest.raises(GenerateConfigError) as e:
            parse({field: value})
        assert f"{field}={value!r} must be " in str(e.value)


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_field_takes_its_range_and_names_itself_outside(field: str) -> None:
    right, wrong = NUMBERS[field]
    for value in right:
        found = getattr(parse({field: value}), field)
        assert found == value and type(found) is float
    for bad in [*wrong, NAN, "0.5", True, [0.5]]:
        with pytest.raises(GenerateConfigError) as e:
            parse({field: bad})
        assert f"{field}={bad!r} must be a number" in str(e.value)


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_is_true_or_false(field: str) -> None:
    for value, meaning in [(True, True), (False, False), (1, True), (0, False)]:
        assert getattr(parse({field: value}), field) is meaning
    for bad in ["true", 2, [True]]:
        with pytest.raises(GenerateConfigError, match=f"{field}=.* must be True or False"):
            parse({field: bad})


@pytest.mark.parametrize("field", LISTS)
def test_a_list_field_reads_its_forms_and_names_itself_otherwise(field: str) -> None:
    right, wrong = LISTS[field]
    for value, meaning in right:
        assert getattr(parse({field: value}), field) == meaning
    for bad in wrong:
        with pytest.raises(GenerateConfigError, match=f"generate_config: {field}=.* must be "):
            parse({field: bad})


def test_a_request_id_is_text() -> None:
    assert parse({"request_id": "abc"}).request_id == "abc"
    with pytest.raises(GenerateConfigError, match="request_id=5 must be a string"):
        parse({"request_id": 5})


def test_speculation_has_one_method() -> None:
    assert parse({"speculative": "prompt_lookup"}).speculative == "prompt_lookup"
    assert parse({"speculative": None}).speculative is None
    for bad in ("draft_model", True, ""):
        with pytest.raises(GenerateConfigError, match=f"speculative={bad!r} must be 'prompt_lookup'"):
            parse({"speculative": bad})


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_yet_is_an_error_and_its_neutral_value_is_not(field: str) -> None:
    with pytest.raises(NotSupportedYet, match=f"{field}=.* is not supported yet; leave it out"):
        parse({field: UNSUPPORTED[field]})
    neutral = getattr(SamplingParams(), field)
    assert parse({field: neutral}) == SamplingParams()


def test_a_negative_temperature_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(GenerateConfigError) as e:
        parse({"temperature": -0.5})
    assert str(e.value) == (
        "generate_config: temperature=-0.5 must be a number ≥ 0 (0 = greedy)"
    )
    assert e.value.code == 604 and e.value.status == 400


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("max_new_token", "max_new_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("gen_len", "gen_length"),
        ("stop_word_str", "stop_words_str"),
    ],
)
def test_an_unknown_field_is_named_with_its_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(GenerateConfigError) as e:
        parse({typo: 1})
    assert str(e.value) == (
        f"generate_config: unknown field {typo!r}; the nearest known one is {nearest!r}"
    )


@given(st.text(max_size=20).filter(lambda t: t not in FIELDS and t not in ALIASES))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_unknown_field_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(GenerateConfigError) as e:
        parse({name: 1})
    assert repr(name) in str(e.value)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_field(alias: str) -> None:
    value: Any = 3
    if ALIASES[alias].startswith("return_"):
        value = alias != "output_hidden_states"
    elif alias.startswith("stop"):
        value = ["x"] if alias == "stop" else [[1]]
    assert parse({alias: value}) == parse({ALIASES[alias]: value})


def test_an_alias_and_its_field_with_two_values_is_an_error_that_names_both() -> None:
    with pytest.raises(GenerateConfigError) as e:
        parse({"max_new_tokens": 5, "gen_length": 6})
    for part in ("'gen_length'", "'max_new_tokens'", "5", "6"):
        assert part in str(e.value)
    assert parse({"max_new_tokens": 5, "gen_length": 5}).max_new_tokens == 5


def test_none_is_not_given_under_any_name() -> None:
    assert parse(dict.fromkeys(FIELDS)) == SamplingParams()
    assert parse({"max_tokens": None, "max_completion_tokens": 7}).max_new_tokens == 7
    assert parse({"max_tokens": 7, "max_completion_tokens": None}).max_new_tokens == 7
    assert parse({"top_p": None}, {"top_p": 0.3}).top_p == 0.3
    with pytest.raises(GenerateConfigError, match="unknown field 'nope'"):
        parse({"nope": None})


def test_the_callers_config_and_the_bundles_defaults_are_never_changed() -> None:
    config = {"gen_length": 5, "stop": ["a"], "stop_words_list": [[1]], "top_logprobs": 2}
    defaults = {"top_p": 0.5, "bad_words_list": [[2]]}
    before = copy.deepcopy((config, defaults))
    params = parse(config, defaults)
    params.stop_words_str.append("b")
    params.stop_words_list[0].append(9)
    params.bad_words_list[0].append(9)
    assert (config, defaults) == before
    assert parse(None).stop_words_str == []


def test_what_the_caller_gives_wins_over_the_bundles_defaults() -> None:
    defaults = {"top_p": 0.5, "top_k": 7, "max_new_tokens": 512}
    params = parse({"top_p": 0.9, "gen_length": 3}, defaults)
    assert (params.top_p, params.top_k, params.max_new_tokens) == (0.9, 7, 3)


def test_a_default_of_the_bundle_is_checked_as_well() -> None:
    with pytest.raises(GenerateConfigError, match="top_p=7 must be"):
        parse({}, {"top_p": 7})


def test_top_logprobs_asks_for_logprobs() -> None:
    assert parse({"top_logprobs": 3}).logprobs
    assert not parse({}).logprobs


@pytest.mark.parametrize(
    ("config", "greedy"),
    [
        ({}, False),
        ({"do_sample": False}, True),
        ({"top_k": 1}, True),
        ({"temperature": 0}, True),
        ({"top_k": 2, "temperature": 0.1}, False),
    ],
)
def test_greedy_is_no_sampling_or_top_1_or_no_temperature(config: dict, greedy: bool) -> None:
    assert parse(config).greedy is greedy


def test_a_sequence_counts_what_it_has_and_what_is_left() -> None:
    s = Sequence([1, 2, 3, 4, 5], 3, SamplingParams(), 9, frozenset(), computed=4)
    assert (s.output_len, s.uncomputed) == (2, 1)
    assert s in {s} and s != dataclasses.replace(s)  # itself, not its contents

"""Every chat template writes the reference's text, and is found by the checkpoint's name."""

import dataclasses
import json

import pytest

from rtp_llm.errors import CheckpointError, UserError
from rtp_llm.export import conversation
from rtp_llm.export.checkpoint import Checkpoint
from rtp_llm.export.conversation import CONVERSATIONS, chat_template, conversation_of, loops_over_parts
from rtp_llm.export.families import Options
from rtp_llm.runtime.prompt import PromptEncoder, _Template

QUESTION = [{"role": "user", "content": "<image>\nWhat is this?"}]
TWO = [*QUESTION, {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Are you sure?"}]


def rendered(name, turns):
    found = CONVERSATIONS[name]
    return _Template(found.template).render(
        turns=turns, system=found.system or "", add_generation_prompt=True
    )


def test_every_template_of_llava_is_the_references_character_by_character(goldens):
    cases = json.loads((goldens / "llava_orig_A" / "cases.json").read_text())["conv_templates"]
    assert {c["name"] for c in cases} - {"default"} <= set(CONVERSATIONS)
    for case in cases:
        name = "v0" if case["name"] == "default" else case["name"]
        assert rendered(name, QUESTION) == case["prompt_one_turn"]
        if case["prompt_two_turns"]:
            assert rendered(name, TWO) == case["prompt_two_turns"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("LLaVA-v1.6-34B", "chatml_direct"),
        ("llava-mpt-7b", "mpt"),
        ("LLaVA-7b-delta-v0", "llava_v0"),
    ],
)
def test_the_models_name_chooses_the_template(name, expected):
    assert conversation_of([name], "llava_v0") == expected


def test_an_unknown_template_is_an_error_that_lists_the_known_ones(goldens):
    checkpoint = Checkpoint(goldens / "llava_orig_A" / "checkpoint")
    with pytest.raises(UserError, match="'v7' is unknown; known are v0, vicuna_v0, llava_v0.*mpt, plain"):
        conversation.original_prompt(checkpoint.path, checkpoint, Options(conversation="v7"))


def test_a_template_can_be_chosen_against_the_name_and_brings_its_stop_word(goldens):
    checkpoint = Checkpoint(goldens / "llava_orig_A" / "checkpoint")
    fields = conversation.original_prompt(checkpoint.path, checkpoint, Options(conversation="llava_v0"))
    assert fields["prompt"].chat.name == "llava_v0"
    assert fields["generation"].stop_words == ["###"]


def test_im_start_and_im_end_frame_an_image_where_the_checkpoint_says_so(goldens):
    checkpoint = Checkpoint(goldens / "llava_orig_A" / "checkpoint")
    checkpoint.config["mm_use_im_start_end"] = True
    fields = conversation.original_prompt(checkpoint.path, checkpoint, Options())
    encoder = PromptEncoder(fields["prompt"], fields["tokenizer"])
    encoded = encoder.encode_chat([{"role": "user", "content": [{"type": "image", "image": b"x"}, "hi"]}])
    start, end = (fields["tokenizer"].token_to_id(t) for t in ("<im_start>", "<im_end>"))
    at = encoded.slots[0]
    assert encoded.ids[at - 1 : at + 1] == [start, end]


def test_a_missing_qwen_vocabulary_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="qwen.tiktoken is missing"):
        conversation.qwen_prompt(tmp_path, {}, Options())


def test_qwen_ends_at_its_three_tokens_and_takes_the_window_from_its_config(goldens):
    folder = goldens / "qwenvl_A" / "checkpoint"
    generation = {"max_window_size": 100, "top_k": 0, "eos_token_id": 656}
    fields = conversation.qwen_prompt(folder, generation, Options())
    assert fields["generation"].eos_ids == [656, 658, 657]
    assert fields["generation"].defaults == {"top_k": 0}
    assert fields["prompt"].chat.history_tokens == 100


def test_the_newest_way_of_keeping_a_chat_template_wins(tmp_path):
    assert chat_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "j"}')
    assert chat_template(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("x")
    assert chat_template(tmp_path) == "x"


def test_templates_that_loop_over_parts_are_told_from_those_that_want_a_string(goldens):
    for name in ("llava_hf_A", "qwen2vl_A", "qwen3vl_A"):
        template = chat_template(goldens / name / "checkpoint")
        assert template and loops_over_parts(template)
    assert not any(loops_over_parts(c.template) for c in CONVERSATIONS.values())


def test_rules_survive_a_bundles_json(goldens):
    from rtp_llm.export.bundle import PromptRules, _decode

    checkpoint = Checkpoint(goldens / "llava_hf_A" / "checkpoint")
    rules = conversation.hf_prompt(checkpoint.path, checkpoint, Options())["prompt"]
    assert _decode(PromptRules, json.loads(json.dumps(dataclasses.asdict(rules))), "prompt") == rules

"""What a user gets wrong: one clear line each, naming the field, the value and what would be right."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from typing import Any

import pytest
from PIL import Image

from rtp_llm import errors
from rtp_llm.export.bundle import read
from rtp_llm.export.exporter import export
from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.sequence import SamplingParams

QUESTION = "Picture 1:<img/>\nWhat is this?"


@pytest.fixture(scope="module")
def pipeline(qwen_bundle):
    with Pipeline(ModelFactory.from_huggingface(qwen_bundle)) as pipeline:
        yield pipeline


def refused(call: Any, kind: type[Exception], *parts: str) -> Exception:
    """The call raises `kind` with one line that holds all parts."""
    with pytest.raises(kind) as caught:
        list(call)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return caught.value


def test_more_tags_than_images(pipeline, red_circle):
    error = refused(
        pipeline(QUESTION + "<img/>", urls=[red_circle]), errors.ImageWrongFormat, "2 image tags", "1 image "
    )
    assert error.code_str == "902_MM_WRONG_FORMAT_ERROR"


def test_speculation_of_a_model_that_was_not_opened_for_it(pipeline):
    call = pipeline("Hi", generate_config={"speculative": "prompt_lookup"})
    refused(call, errors.GenerateConfigError, "speculative='prompt_lookup'", "ModelConfig(speculation=True)")


def test_more_images_than_tags(pipeline, red_circle):
    refused(
        pipeline(QUESTION, urls=[red_circle] * 2), errors.ImageWrongFormat, "1 image tag", "2 images"
    )


def test_url_tags_mixed_with_too_few_urls(pipeline, red_circle):
    prompt = f"<img>{red_circle}</img><img/><img/>What?"
    refused(pipeline(prompt, urls=[red_circle]), errors.ImageWrongFormat, "3 image tags", "1 image ")


def test_an_unclosed_tag(pipeline):
    refused(pipeline("<img>http://example.com/a.png"), errors.ImageWrongFormat, "<img>", "not closed")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt(pipeline, prompt):
    assert refused(pipeline(prompt), errors.EmptyPrompt, "prompt").code == 510


def test_a_prompt_that_is_too_long_names_text_image_tokens_and_limit(pipeline, red_circle):
    limit = pipeline.model.bundle.model.max_seq_len
    prompt = QUESTION + " word" * limit
    error = refused(
        pipeline(prompt, urls=[red_circle]), errors.PromptTooLong, "256 of images", f"limit is {limit - 1}"
    )
    assert error.code == 511


def test_max_input_tokens_is_a_limit(pipeline):
    refused(pipeline("Hello " * 20, max_input_tokens=5), errors.PromptTooLong, "limit is 5")


def test_a_token_id_beyond_the_vocabulary(pipeline):
    vocab = pipeline.model.bundle.model.vocab_size
    refused(pipeline([5, vocab]), errors.UserError, str(vocab), "position 1", f"0 to {vocab - 1}")
    refused(pipeline([-1]), errors.UserError, "-1")


def test_an_unreadable_image(pipeline, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"this is no picture")
    error = refused(pipeline(QUESTION, urls=[file]), errors.ImageDecodeError, "broken.png")
    assert error.code == 903


def test_a_missing_image_file(pipeline, tmp_path):
    refused(pipeline(QUESTION, urls=[tmp_path / "none.png"]), errors.ImageError, "none.png")


def test_a_one_pixel_image_is_answered(pipeline):
    image = Image.new("RGB", (1, 1), "red")
    assert list(pipeline(QUESTION, urls=[image], top_k=1, max_new_tokens=4))[-1].finished


def test_an_image_of_20000_by_20000_is_refused_by_its_size(pipeline, tmp_path):
    file = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(file)
    refused(pipeline(QUESTION, urls=[file]), errors.ImageInputTooLong, "400000000", "100,000,000")


def test_a_dead_url(pipeline):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = refused(
        pipeline(QUESTION, urls=[f"http://127.0.0.1:{port}/a.png"]),
        errors.ImageDownloadFailed,
        f"127.0.0.1:{port}",
    )
    assert error.code == 906


def test_an_unknown_config_field_names_the_nearest(pipeline):
    error = refused(
        pipeline("Hi", generate_config={"max_new_token": 3}),
        errors.GenerateConfigError,
        "'max_new_token'",
        "'max_new_tokens'",
    )
    assert error.code == 604


def test_a_negative_temperature(pipeline):
    refused(pipeline("Hi", temperature=-0.5), errors.GenerateConfigError, "temperature=-0.5", "≥ 0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 4),
        ("adapter_name", "x"),
        ("return_hidden_states", True),
    ],
)
def test_what_is_not_supported_yet_says_so(pipeline, field, value):
    refused(
        pipeline("Hi", generate_config={field: value}), errors.NotSupportedYet, field, "not supported yet"
    )


def test_an_image_size_that_has_no_effect_is_not_ignored(pipeline, red_circle):
    refused(
        pipeline(QUESTION, urls=[red_circle], max_pixels=1000), errors.GenerateConfigError, "max_pixels=1000"
    )


def test_urls_and_images_together(pipeline, red_circle):
    refused(pipeline(QUESTION, urls=[red_circle], images=[red_circle]), errors.UserError, "urls", "images")


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "robot", "content": "hi"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "video"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "image_url"),
    ],
)
def test_a_wrong_message_is_named(pipeline, message, part):
    refused(pipeline.chat([message]), errors.UserError, part)


def test_fp16_on_the_cpu(sample_qwen, tmp_path):
    with pytest.raises(errors.UserError, match="fp16.*twice the memory.*fp32"):
        export(sample_qwen, tmp_path / "b", precision="fp16")


def test_a_corrupted_bundle(qwen_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(qwen_bundle, copy)
    graph = copy / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    with pytest.raises(errors.BundleError, match=r"decoder\.onnx has \d+ bytes, expected \d+"):
        ModelFactory.from_huggingface(copy)


def test_a_bundle_whose_bytes_changed_fails_the_hash_check(qwen_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(qwen_bundle, copy)
    data = copy / "decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(errors.BundleError, match=r"decoder\.onnx\.data.*SHA-256"):
        read(copy, check_hashes=True)


def test_a_bundle_of_a_newer_schema(qwen_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(qwen_bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, "schema": manifest["schema"] + 1}))
    with pytest.raises(errors.BundleError, match="schema 2, this version reads up to 1: upgrade"):
        ModelFactory.from_huggingface(copy)


def test_a_hub_id_offline_names_the_repository_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RTP_LLM_CACHE", str(tmp_path))
    with pytest.raises(errors.CheckpointError, match="nobody/nothing.*HF_HUB_OFFLINE.*--checkpoint"):
        ModelFactory.from_huggingface("nobody/nothing")
    assert not list(tmp_path.rglob("*"))


def test_a_family_that_the_bundle_is_not_of(qwen_bundle):
    config = ModelConfig(model_type="llava", ckpt_path=str(qwen_bundle))
    with pytest.raises(errors.BundleError, match="qwen_vl.*'llava'"):
        ModelFactory.from_model_config(config)


@pytest.mark.parametrize("field", ["tokenizer_path", "vision_tower", "conversation", "revision"])
def test_what_only_an_export_could_change_is_not_ignored(qwen_bundle, field):
    config = ModelConfig(ckpt_path=str(qwen_bundle), **{field: "/path/to/other"})
    with pytest.raises(errors.BundleError, match=f"leave {field}='/path/to/other' out"):
        ModelFactory.from_model_config(config)
    if field == "tokenizer_path":  # the tutorial names it beside the model
        ModelFactory.from_model_config(ModelConfig(ckpt_path=str(qwen_bundle), **{field: str(qwen_bundle)}))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"stop": ["x"] * 33}, "33 items.*32 items"),
        ({"stop": ["x" * 129]}, "129 characters.*of 128"),
        ({"stop_words_list": [[1] * 129]}, "129 token ids.*of 128"),
        ({"bad_words_list": [[1]] * 1025}, "1025 items.*1024 items"),
        ({"no_repeat_ngram_size": 65}, "65.*0 to 64"),
        ({"repetition_penalty": 1e-30}, "1e-30.*0.01 to 100"),
    ],
)
def test_what_is_looked_for_at_every_token_is_limited(config, limit):
    with pytest.raises(errors.GenerateConfigError, match=limit):
        SamplingParams.from_config(config)


def test_a_long_value_is_cut_in_the_message():
    for config in ({"x" * 10**6: 1}, {"top_k": "x" * 10**6}, {"regex": 5 * [["y"] * 10**5]}):
        with pytest.raises(errors.GenerateConfigError) as caught:
            SamplingParams.from_config(config)
        assert len(str(caught.value)) < 600


def test_model_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().ckpt_path = "x"  # type: ignore[misc]

"""Environment names and flags: who wins, what is refused, and how a refusal reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.errors import UserError
from rtp_llm.runtime.server.settings import FIELDS, Settings, add_arguments, from_args


def settings(line: str = "", **env: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_args(parser.parse_args(line.split()), env)


def test_the_tutorials_environment_is_understood():
    paths = {"TOKENIZER_PATH": "/t", "CHECKPOINT_PATH": "/c"}
    found = settings(MODEL_TYPE="qwen_vl", FT_SERVER_TEST="1", START_PORT="12345", **paths)
    assert (found.model_type, found.tokenizer_path, found.checkpoint_path) == ("qwen_vl", "/t", "/c")
    assert found.ft_server_test and found.start_port == 12345
    config = found.model_config()
    assert (config.model_type, config.tokenizer_path, config.ckpt_path) == ("qwen_vl", "/t", "/c")


def test_settings_reach_the_model():
    line = "--max_seq_len 512 --kv-cache-bytes 1MiB --quantization int8 --chat-template qwen"
    line += " --deterministic --speculation"
    config = settings(line).model_config()
    assert (config.max_seq_len, config.kv_cache_bytes, config.precision) == (512, 1 << 20, "int8")
    assert (config.conversation, config.deterministic, config.speculation) == ("qwen", True, True)


def test_defaults_are_those_of_the_contract():
    found = settings()
    assert (found.host, found.start_port, found.reuse_cache, found.api_key) == ("127.0.0.1", 8088, True, ())


@pytest.mark.parametrize("flag", ["--start_port", "--start-port"])
def test_a_flag_wins_over_the_environment(flag):
    assert settings(f"{flag} 1", START_PORT="2").start_port == 1


@pytest.mark.parametrize(("line", "value"), [("", True), (" 1", True), (" true", True), (" 0", False)])
@pytest.mark.parametrize("name", ["ft_server_test", "deterministic", "insecure"])
def test_a_flag_of_yes_or_no_may_say_which(name, line, value):
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert getattr(settings(f"{flag}{line} --start-port 1"), name) is value


def test_checkpoint_is_another_name_of_checkpoint_path():
    assert settings("--checkpoint x").checkpoint_path == "x"


def test_every_environment_name_has_a_flag_and_the_other_way_round():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    for f in FIELDS:
        assert {f"--{f.name}", f"--{f.name.replace('_', '-')}"} <= flags


def test_an_empty_variable_is_not_set():
    assert settings(START_PORT="", API_KEY="").start_port == 8088


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("KV_CACHE_BYTES", "2GiB", "kv_cache_bytes", 2 << 30),
        ("KV_CACHE_BYTES", "1.5g", "kv_cache_bytes", 3 << 29),
        ("MEMORY_LIMIT", "4096", "memory_limit", 4096),
        ("MEMORY_LIMIT", "8GB", "memory_limit", 8 << 30),
        ("API_KEY", "a, b", "api_key", ("a", "b")),
        ("REUSE_CACHE", "0", "reuse_cache", False),
        ("DOWNLOAD_HEADERS", '{"Referer": "x"}', "download_headers", {"Referer": "x"}),
        ("MAX_IMAGES", "0", "max_images", 0),
    ],
)
def test_values_are_read(name, value, field, expected):
    assert getattr(settings(**{name: value}), field) == expected


@pytest.mark.parametrize(
    ("line", "env", "message"),
    [
        ("", {"START_PORT": "http"}, "START_PORT='http' must be a port"),
        ("--start-port 70000", {}, "--start-port='70000' must be a port"),
        ("", {"MAX_SEQ_LEN": "-1"}, "MAX_SEQ_LEN='-1' must be"),
        ("", {"CONCURRENCY_LIMIT": "0"}, "CONCURRENCY_LIMIT='0' must be"),
        ("", {"REUSE_CACHE": "maybe"}, "REUSE_CACHE='maybe' must be 1 or 0"),
        ("--kv-cache-bytes lots", {}, "--kv-cache-bytes='lots' must be a size like 2GiB"),
        ("", {"DOWNLOAD_HEADERS": "secret"}, "DOWNLOAD_HEADERS=… must be a JSON object"),
        ("", {"DOWNLOAD_HEADERS": '{"a": 1}'}, "DOWNLOAD_HEADERS=… must be a JSON object"),
        ("", {"ALLOWED_LOCAL_MEDIA_PATH": "no/such"}, "ALLOWED_LOCAL_MEDIA_PATH='no/such' must be a folder"),
        ("", {"ALLOWED_MEDIA_CIDRS": "ten"}, "ALLOWED_MEDIA_CIDRS='ten' must be networks"),
        ("", {"ALLOWED_MEDIA_CIDRS": "10.0.0.0/8"}, "set ALLOWED_MEDIA_DOMAINS too"),
        ("", {"MEDIA_PROXY": "nowhere"}, "MEDIA_PROXY is not a URL"),
        ("", {"ALLOWED_MEDIA_DOMAINS": "http://x"}, "ALLOWED_MEDIA_DOMAINS: 'http://x' is no host"),
        ("", {"DOWNLOAD_HEADERS": '{"Authorization": "secret"}'}, "set ALLOWED_MEDIA_DOMAINS"),
        ("--host 0.0.0.0", {}, "set API_KEY, or pass --insecure"),
        ("--host ::", {}, "set API_KEY, or pass --insecure"),
        ("--host example.com", {}, "set API_KEY, or pass --insecure"),
        ("", {"HOST": "0.0.0.0", "INSECURE": "1"}, "set API_KEY"),  # not by a stray variable
        ("--host 0.0.0.0", {"FT_SERVER_TEST": "1", "API_KEY": "k"}, "HOST must be 127.0.0.1"),
        ("", {"API_KEY": "schlüssel"}, "API_KEY number 1 must be of ASCII"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(line, env, message):
    with pytest.raises(UserError) as refused:
        settings(line, **env)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert settings(f"--host {host}").loopback


def test_beyond_loopback_a_key_or_insecure_is_enough():
    assert not settings("--host 0.0.0.0", API_KEY="k").loopback
    assert not settings("--host 0.0.0.0 --insecure").loopback


def test_clients_may_fetch_the_public_internet_only_unless_told_otherwise(tmp_path: Path, monkeypatch):
    policy = settings().media_policy()
    assert policy.allow_local is False and policy.allow_private is False
    assert policy.proxy is None and policy.allowed_domains is None
    monkeypatch.chdir(tmp_path)
    assert settings(FT_SERVER_TEST="1").media_policy().allow_local == str(tmp_path)
    opened = settings(
        f"--allowed-local-media-path {tmp_path} --max-pixels 5 --media-proxy http://p:1",
        ALLOWED_MEDIA_DOMAINS="a.example,*.b.example",
        ALLOWED_MEDIA_CIDRS="10.1.0.0/16",
    ).media_policy()
    assert opened.allow_local == str(tmp_path)
    assert opened.allowed_domains == ("a.example", "*.b.example")
    assert (opened.allowed_cidrs, opened.max_pixels) == (("10.1.0.0/16",), 5)
    assert (opened.proxy, opened.allow_private) == ("http://p:1", False)


def test_reuse_cache_0_is_every_requests_default(serve, model, monkeypatch):
    from rtp_llm.runtime.request import Request

    seen, start = [], Request.start

    def spy(self: Request, publish: Any) -> None:
        seen.append(self.params.reuse_cache)
        start(self, publish)

    monkeypatch.setattr(Request, "start", spy)
    with serve(model, reuse_cache=False) as running:
        running.post("/", {"prompt": "hi", "max_new_tokens": 1})
        running.post("/", {"prompt": "hi", "max_new_tokens": 1, "reuse_cache": True})
    assert seen == [False, True]

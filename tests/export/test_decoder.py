"""The decoder agrees with transformers, number for number, in every configuration that we claim."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rtp_llm.errors import NotSupportedYet, UserError
from rtp_llm.export.attention import Eager
from rtp_llm.export.checkpoint import Checkpoint, Weight
from rtp_llm.export.decoder import (
    Decoder,
    DecoderConfig,
    logn_table,
    ntk_tables,
    rope_tables,
)
from rtp_llm.export.families import Options, llava, qwen_vl

TOLERANCE = 5e-5  # of the reference's standard deviation
NAMES = ("model.", "lm_head.weight")
BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 5e5}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama without grouped queries": ("Llama", {"num_key_value_heads": 4}),
    "llama of one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with wide heads": ("Llama", {"head_dim": 40}),
    "llama of another base and eps": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3},
    ),
    "llama, linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, narrow window": ("Mistral", {"sliding_window": 7}),
    "mistral, wide heads": ("Mistral", {"sliding_window": 300, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window switched off": ("Qwen2", {"sliding_window": 5, "use_sliding_window": False}),
}


def saved(kind: str, changes: dict[str, Any], folder: Path) -> Any:
    """A tiny random transformers model, saved to `folder`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0 and norms 1 in a fresh one
            parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, kind: str) -> Decoder:
    """The decoder that a family builds of that folder, filled."""
    checkpoint = Checkpoint(folder)
    config = llava.decoder_config(checkpoint.config, kind.lower(), checkpoint, NAMES, Options())
    return filled(config, llava.decoder_weights(checkpoint, config, NAMES))


def filled(config: DecoderConfig, weights: dict[str, Weight]) -> Decoder:
    decoder = Decoder(config).eval().requires_grad_(False)
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    assert set(weights) == set(parameters)
    for name, weight in weights.items():
        weight.check()
        parameters[name].copy_(weight.read())
    return decoder


def prompts(*lengths: int, vocab: int = 97) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def assert_close(found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.std())
    assert difference <= TOLERANCE, f"{difference:.1e} standard deviations"


@pytest.mark.parametrize("name", CASES)
def test_packed_prompts_and_cached_steps_equal_transformers(name: str, tmp_path: Path):
    kind, changes = CASES[name]
    model = saved(kind, changes, tmp_path)
    decoder = loaded(tmp_path, kind)
    if window := changes.get("sliding_window"):
        assert decoder.config.window == (0 if kind == "Qwen2" or window >= 256 else window)
    sequences = prompts(41, 1, 19)
    with torch.no_grad():
        expected = [model(s[None]).logits[0] for s in sequences]

    # whole prompts, packed
    lengths = [len(s) for s in sequences]
    rows = torch.cat([torch.arange(n) for n in lengths])
    found = decoder(torch.cat(sequences), None, Eager(decoder, rows, lengths))
    assert_close(found, torch.cat(expected))

    # the long ones again in chunks: prefill 10 and 12, then 31 and 1, then 0 (done) and 6
    a, _, b = sequences
    pasts: list[list[tuple[Tensor, Tensor]]] | None = None
    at = [0, 0]
    for step in ((10, 12), (30, 1), (1, 6)):
        spans = [slice(p, p + n) for p, n in zip(at, step, strict=True)]
        ids = torch.cat([a[spans[0]], b[spans[1]]])
        rows = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        attend = Eager(decoder, rows, step, pasts)
        found = decoder(ids, None, attend)
        assert_close(found, torch.cat([expected[0][spans[0]], expected[2][spans[1]]]))
        pasts, at = attend.presents, [p + n for p, n in zip(at, step, strict=True)]


def test_logits_rows_names_the_positions_that_are_answered(tmp_path: Path):
    saved("Llama", {}, tmp_path)
    decoder = loaded(tmp_path, "Llama")
    [ids] = prompts(12)
    attend = lambda: Eager(decoder, torch.arange(12), [12])  # noqa: E731
    everything = decoder(ids, None, attend())
    rows = torch.tensor([11, 3, 3])
    torch.testing.assert_close(decoder(ids, None, attend(), rows), everything[rows])


def test_ids_beyond_the_vocabulary_select_image_rows(tmp_path: Path):
    model = saved("Llama", {}, tmp_path)
    decoder = loaded(tmp_path, "Llama")
    [ids] = prompts(12)
    images = torch.randn(5, 64)
    mixed = ids.clone()
    mixed[4:7] = 97 + torch.tensor([2, 0, 4])
    embedded = model.get_input_embeddings()(ids).detach().clone()
    embedded[4:7] = images[[2, 0, 4]]
    with torch.no_grad():
        expected = model(inputs_embeds=embedded[None]).logits[0]
    assert_close(decoder(mixed, images, Eager(decoder, torch.arange(12), [12])), expected)


@pytest.mark.parametrize("parameters", [LINEAR, LLAMA3])
def test_rope_scaling_of_older_configs_is_the_same(parameters: dict[str, Any], tmp_path: Path):
    """transformers 4 wrote rope_scaling and rope_theta, and before "type" for "rope_type"."""
    saved("Llama", {"rope_parameters": parameters}, tmp_path)
    new = rope_tables(loaded(tmp_path, "Llama").config)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        scaling = {key: rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}
        (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
        for old, expected in zip(rope_tables(loaded(tmp_path, "Llama").config), new, strict=True):
            assert torch.equal(old, expected)


def test_other_rope_scaling_is_refused_by_name():
    config = DecoderConfig(10, 8, 8, 1, 2, 2, 4, 16, 1e-6, rope_scaling={"rope_type": "yarn"})
    with pytest.raises(NotSupportedYet, match="'yarn'"):
        Decoder(config)


def test_other_activations_and_models_are_refused_by_name(tmp_path: Path):
    saved("Llama", {}, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(NotSupportedYet, match="'gelu'"):
        changed = {**checkpoint.config, "hidden_act": "gelu"}
        llava.decoder_config(changed, "llama", checkpoint, NAMES, Options())
    with pytest.raises(NotSupportedYet, match="'phi3'"):
        llava.decoder_config(checkpoint.config, "phi3", checkpoint, NAMES, Options())


@pytest.mark.parametrize("length, allowed", [(1, True), (100, True), (256, True), (257, False), (0, False)])
def test_a_shorter_sequence_may_be_asked_for_a_longer_one_not(length, allowed, tmp_path: Path):
    saved("Llama", {}, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    make = lambda: llava.decoder_config(  # noqa: E731
        checkpoint.config, "llama", checkpoint, NAMES, Options(max_seq_len=length)
    )
    if allowed:
        assert make().max_seq_len == length
    else:
        with pytest.raises(UserError, match=f"max_seq_len={length} .* 256"):
            make()


def alpha(tokens: int, seq_length: int) -> float:
    """modeling_qwen.py's get_ntk_alpha."""
    value = 2 ** math.ceil(math.log(tokens / seq_length, 2) + 1) - 1
    return max(value, 1)


@pytest.mark.parametrize("seq_length, longest", [(512, 2048), (2048, 8192), (64, 1000), (100, 100), (7, 60)])
def test_every_prompt_length_has_the_alpha_of_the_formula(seq_length: int, longest: int):
    limits, alphas = ntk_tables(seq_length, longest)
    assert limits[-1] == longest and list(limits) == sorted(set(limits))
    for tokens in range(1, longest + 1):
        table = next(i for i, limit in enumerate(limits) if tokens <= limit)
        assert alphas[table] == alpha(tokens, seq_length), tokens


def test_a_sequence_shorter_than_qwens_own_needs_one_table():
    assert ntk_tables(2048, 1000) == ((1000,), (1.0,))


def test_ntk_tables_are_rope_of_the_formulas_bases():
    limits, alphas = ntk_tables(32, 120)
    config = DecoderConfig(10, 32, 8, 1, 2, 2, 16, 120, 1e-6, 10000.0, rope_limits=limits, ntk_alphas=alphas)
    cos, sin = rope_tables(config)
    assert cos.shape == sin.shape == (len(limits) * 120, 8)
    for i, a in enumerate(alphas):
        base = 10000.0 * a ** (16 / 14)
        angles = np.outer(np.arange(120), base ** (-np.arange(0, 16, 2) / 16))
        rows = slice(i * 120, (i + 1) * 120)
        np.testing.assert_allclose(cos[rows].numpy(), np.cos(angles), atol=2e-5)
        np.testing.assert_allclose(sin[rows].numpy(), np.sin(angles), atol=2e-5)


def test_logn_scales_queries_beyond_the_trained_length_only():
    table = logn_table(DecoderConfig(10, 8, 8, 1, 2, 2, 4, 300, 1e-6, logn=100))
    assert table.shape == (300, 1)
    expected = [max(1.0, math.log(p + 1) / math.log(100)) for p in range(300)]
    np.testing.assert_allclose(table[:, 0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwenvl_A", "qwenvl_C"])
def test_qwens_decoder_equals_the_reference_on_text(name: str, goldens: Path):
    checkpoint = Checkpoint(goldens / name / "checkpoint")
    config = qwen_vl.decoder_config(checkpoint, Options())
    decoder = filled(config, qwen_vl.decoder_weights(checkpoint, config))
    arrays = np.load(goldens / name / "cases.npz")
    cases = json.loads((goldens / name / "cases.json").read_text())["cases"]
    texts = [c["name"] for c in cases if c["kind"] in ("ids", "raw", "chat") and not c.get("images")]
    texts = [name for name in texts if f"{name}.first_logits" in arrays]
    assert texts
    for case in texts:
        ids = torch.from_numpy(arrays[f"{case}.input_ids"]).long().reshape(-1)
        n = len(ids)
        table = next(i for i, limit in enumerate(config.limits) if n <= limit)
        rows = torch.arange(n) + table * config.max_seq_len
        last = torch.tensor([n - 1])
        found = decoder(ids, None, Eager(decoder, rows, [n]), last, torch.arange(n))
        expected = torch.from_numpy(arrays[f"{case}.first_logits"]).float().reshape(1, -1)
        assert_close(found, expected)

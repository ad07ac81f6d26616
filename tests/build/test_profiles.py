"""Every step that the limits allow fits a profile, whatever the limits."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.build.profiles import (
    Limits,
    decoder_profiles,
    max_blocks,
    max_logits,
    slot_length,
    vision_profile,
)
from rtp_llm.errors import InternalError
from rtp_llm.export.attention import specs
from rtp_llm.export.bundle import Bundle, GraphSpec, TensorSpec
from rtp_llm.export.decoder import DecoderConfig

from ..export.test_bundle import example


def bundle(lowering: str, heads: int = 4, size: int = 32, most: int = 2048) -> Bundle:
    """A bundle for TensorRT whose decoder has the inputs of that lowering."""
    base = example()
    config = DecoderConfig(64, 8, 16, 2, heads, heads, size, most, 1e-5, logn=most)
    inputs, outputs = specs(lowering, config)
    model = dataclasses.replace(base.model, attention=lowering, max_seq_len=most)
    pixels = TensorSpec("pixels", "uint8", ["N", 56, 56, 3])
    graphs = {
        "vision": GraphSpec("vision.onnx", [pixels], [pixels], "fp32"),
        "decoder": GraphSpec("decoder.onnx", inputs, outputs, "bf16"),
    }
    return dataclasses.replace(base, model=model, graphs=graphs, backend="tensorrt")


@st.composite
def limits(draw: st.DrawFn, lowering: str) -> Limits:
    batch = draw(st.integers(1, 64))
    length = draw(st.integers(max(17, batch), 2048))
    step = draw(st.integers(batch, length if lowering == "linear" else length * batch))
    return Limits.of(bundle(lowering), batch, step, length, draw(st.integers(1, 16)))


def fits(profile: dict, name: str, shape: list[int]) -> bool:
    low, best, high = profile[name]
    assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
    return all(a <= s <= c for a, s, c in zip(low, shape, high, strict=True))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_a_paged_step_within_the_limits_fits_prefill_and_one_of_decodes_fits_decode(data: st.DataObject):
    given = data.draw(limits("paged"))
    b = bundle("paged")
    profiles = decoder_profiles(b, given)
    assert list(profiles) == ["decode", "prefill"]
    rows = data.draw(st.integers(1, given.max_batch_size))
    blocks = data.draw(st.integers(1, math.ceil(given.max_seq_len / 16)))
    pool = data.draw(st.integers(1, max_blocks(b)))
    wanted = data.draw(st.integers(1, min(rows, max_logits(given))))
    tokens = data.draw(st.integers(rows, given.max_input_len))
    for name, count, images in (("decode", rows, 1), ("prefill", tokens, tokens)):
        shapes = {
            "input_ids": [count], "positions": [count], "rope_rows": [count], "image_embeds": [images, 8],
            "cumulative_sequence_length": [rows + 1], "past_seqlens": [rows], "block_table": [rows, blocks],
            "logits_rows": [wanted],
        }  # fmt: skip
        caches = {s.name: [pool, 16, 4, 32] for s in b.graphs["decoder"].inputs if "_cache." in s.name}
        shapes |= caches
        assert len(caches) == 4
        assert set(shapes) == set(profiles[name])  # attention_metadata has no dynamic dimension
        for key, shape in shapes.items():
            assert fits(profiles[name], key, shape), (name, key, shape)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_a_linear_chunk_fits_prefill_and_decodes_of_any_slots_fit_decode(data: st.DataObject) -> None:
    given = data.draw(limits("linear"))
    b = bundle("linear")
    profiles = decoder_profiles(b, given)
    smax = slot_length(given.max_seq_len)
    assert smax > given.max_seq_len and smax % 16 == 0
    rows = data.draw(st.integers(1, given.max_batch_size))
    tokens = data.draw(st.integers(1, given.max_input_len))
    length = data.draw(st.integers(1, smax))
    for name, b_, s, images in (("decode", rows, 1, 1), ("prefill", 1, tokens, tokens)):
        shapes = {
            "input_ids": [b_ * s], "positions": [b_ * s], "rope_rows": [b_ * s], "image_embeds": [images, 8],
            "pad_rows": [b_ * s], "packed_rows": [b_ * s], "query_positions": [b_, s],
            "key_positions": [length], "write_indices": [b_], "logits_rows": [1],
        }  # fmt: skip
        shapes |= {n: [b_, 4, smax, 32] for n in profiles[name] if n.startswith("past_")}
        assert set(shapes) == set(profiles[name])
        for key, shape in shapes.items():
            assert fits(profiles[name], key, shape), (name, key, shape)


@pytest.mark.parametrize("heads, size", [(32, 128), (8, 128), (1, 16)])
def test_no_cache_tensor_exceeds_what_tensorrt_can_index(heads: int, size: int) -> None:
    b = bundle("paged", heads, size)
    assert max_blocks(b) * 16 * heads * size < 2**31 <= (max_blocks(b) + 1) * 16 * heads * size


def test_the_encoders_profile_reaches_the_most_images() -> None:
    profile = vision_profile(bundle("paged"), Limits(8, 512, 1024, 5))
    assert profile == {"pixels": ([1, 56, 56, 3], [3, 56, 56, 3], [5, 56, 56, 3])}


def test_defaults_fit_any_bundle() -> None:
    assert Limits.of(bundle("paged", most=4096)) == Limits(16, 2048, 4096, 4)
    assert Limits.of(bundle("linear", most=64)) == Limits(16, 64, 64, 4)
    assert Limits.of(bundle("linear", most=4096), max_seq_len=100) == Limits(16, 100, 100, 4)


def test_a_dimension_that_nobody_knows_is_our_fault_and_named() -> None:
    b = bundle("paged")
    odd = GraphSpec("decoder.onnx", [TensorSpec("x", "int64", ["Q"])], [], "fp32")
    b = dataclasses.replace(b, graphs={**b.graphs, "vision": odd})
    with pytest.raises(InternalError, match="decoder.onnx: input x has an unknown dimension 'Q'"):
        vision_profile(b, Limits(8, 512, 1024, 5))

"""The arrays of a step are what its tokens are, one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.export.bundle import ModelSpec, RopeSpec
from rtp_llm.runtime.sequence import ImageSpan, Row, SamplingParams, Sequence
from rtp_llm.runtime.step import Draw, build_step

VOCAB, HIDDEN, MAX = 50, 4, 64
MODEL = ModelSpec("f", "A", VOCAB, HIDDEN, 1, 1, 1, 16, MAX, RopeSpec("linear", [16, 32, 64]), "gqa", 0)
IMAGES = {
    bytes([i]): (100 * i + np.arange(3 + i)[:, None] + np.zeros(HIDDEN)).astype(np.float32)
    for i in range(3)
}


@st.composite
def rows(draw: st.DrawFn, slot: int) -> Row:
    """Text and images in any order (the same image may come twice), and any part of it."""
    tokens: list[int] = []
    spans: list[ImageSpan] = []
    for piece in draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)):
        if piece < 3:
            key = bytes([piece])
            spans.append(ImageSpan(len(tokens), len(IMAGES[key]), key))
            tokens += [-200] * len(IMAGES[key])
        else:
            tokens += draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
    s = Sequence(tokens, len(tokens), SamplingParams(), 5, frozenset(), spans)
    s.rope_table, s.slot, s.blocks = draw(st.integers(0, 2)), slot, [slot, 7]
    start = draw(st.integers(0, len(tokens) - 1))
    count = draw(st.integers(1, len(tokens) - start))
    return Row(s, start, count, draw(st.sampled_from(["none", "last", "all"])))


batches = st.lists(st.booleans(), min_size=1, max_size=4).flatmap(
    lambda flags: st.tuples(*(rows(2 * i) for i in range(len(flags))))
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches)
def test_packed_arrays_are_a_naive_walk_over_the_tokens(batch: tuple[Row, ...]) -> None:
    draws: list[Draw | None] = [Draw(0.5), None]
    step = build_step(list(batch), IMAGES, MODEL, draws)
    assert step.draws is draws and build_step(list(batch), IMAGES, MODEL).draws is None
    at, images = 0, 0
    heads: list[int] = []
    for row in batch:
        s = row.sequence
        for place in range(row.past, row.past + row.count):
            span = next((x for x in s.images if x.start <= place < x.start + x.length), None)
            if span is None:
                assert step.input_ids[at] == s.tokens[place]
            else:
                # an image's row has an id of its own, local to the step, in order of appearance
                assert step.input_ids[at] == VOCAB + images
                wanted = IMAGES[span.key][place - span.start]
                np.testing.assert_array_equal(step.image_embeds[images], wanted)
                images += 1
            assert step.positions[at] == place
            assert step.rope_rows[at] == s.rope_table * MAX + place
            if row.logits == "all" or (row.logits == "last" and place == row.past + row.count - 1):
                heads.append(at)
            at += 1
    assert len(step.input_ids) == len(step.positions) == len(step.rope_rows) == at
    assert step.logits_rows.tolist() == heads and sum(row.heads for row in batch) == len(heads)
    assert len(step.image_embeds) == max(1, images)
    assert step.slots == [row.sequence.slot for row in batch]
    assert step.pasts == [row.past for row in batch]
    assert step.counts == [row.count for row in batch]
    assert step.tables == [row.sequence.blocks for row in batch]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batches)
def test_arrays_have_the_types_of_the_graphs_inputs(batch: tuple[Row, ...]) -> None:
    step = build_step(list(batch), IMAGES, MODEL)
    for array in (step.input_ids, step.positions, step.rope_rows, step.logits_rows):
        assert array.dtype == np.int64 and array.ndim == 1
    assert step.image_embeds.dtype == np.float32 and step.image_embeds.shape[1] == HIDDEN
    assert step.image_embeds.flags.c_contiguous


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batches)
def test_ids_of_image_rows_never_reach_the_sequences(batch: tuple[Row, ...]) -> None:
    before = [list(row.sequence.tokens) for row in batch]
    build_step(list(batch), IMAGES, MODEL)
    assert [row.sequence.tokens for row in batch] == before


def test_a_step_without_images_has_one_row_of_zeros() -> None:
    s = Sequence([1, 2], 2, SamplingParams(), 5, frozenset(), slot=0)
    step = build_step([Row(s, 0, 2, "last")], {}, MODEL)
    assert step.image_embeds.shape == (1, HIDDEN) and not step.image_embeds.any()

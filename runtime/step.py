"""A batch of rows → the arrays of one step, the same for every lowering of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..export.bundle import ModelSpec
from .sequence import Batch


@dataclass
class Step:
    """Tokens of all rows one after another: T tokens, R rows, K rows of logits, N image rows."""

    input_ids: np.ndarray  # int64 [T]; vocab_size + i selects row i of image_embeds
    image_embeds: np.ndarray  # float32 [N, hidden], N ≥ 1
    positions: np.ndarray  # int64 [T], place of each token in its sequence
    rope_rows: np.ndarray  # int64 [T], row of the stacked rope tables
    logits_rows: np.ndarray  # int64 [K], tokens that go through the head
    slots: list[int]  # [R], ascending
    pasts: list[int]  # [R], cached tokens before this step
    counts: list[int]  # [R], tokens of this step, sum T
    tables: list[list[int]]  # [R], cache blocks of each row's sequence, for paged lowerings


def build_step(batch: Batch, embeddings: Mapping[bytes, np.ndarray], model: ModelSpec) -> Step:
    """`embeddings`: image key → float32 [tokens, hidden]."""
    ids: list[np.ndarray] = []
    images: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rope_rows: list[np.ndarray] = []
    logits_rows: list[int] = []
    at = rows = 0
    for row in batch:
        s, start, end = row.sequence, row.past, row.past + row.count
        chunk = np.array(s.tokens[start:end], dtype=np.int64)
        for span in s.images:
            low, high = max(start, span.start), min(end, span.start + span.length)
            if low < high:
                images.append(embeddings[span.key][low - span.start : high - span.start])
                chunk[low - start : high - start] = model.vocab_size + np.arange(
                    rows, rows + high - low
                )
                rows += high - low
        ids.append(chunk)
        place = np.arange(start, end, dtype=np.int64)
        positions.append(place)
        rope_rows.append(place + s.rope_table * model.max_seq_len)
        if row.logits == "all":
            logits_rows += range(at, at + row.count)
        elif row.logits == "last":
            logits_rows.append(at + row.count - 1)
        at += row.count
    embeds = images or [np.zeros((1, model.hidden_size), np.float32)]
    return Step(
        input_ids=np.concatenate(ids),
        image_embeds=np.concatenate(embeds),
        positions=np.concatenate(positions),
        rope_rows=np.concatenate(rope_rows),
        logits_rows=np.array(logits_rows, dtype=np.int64),
        slots=[r.sequence.slot for r in batch],
        pasts=[r.past for r in batch],
        counts=[r.count for r in batch],
        tables=[r.sequence.blocks for r in batch],
    )

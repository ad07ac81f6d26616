"""A batch of rows → the arrays of one step, the same for every lowering of attention; and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..export.bundle import ModelSpec
from .sequence import Batch


@dataclass(frozen=True)
class Draw:
    """How a backend may pick a row's token from its raw logits, exactly as `sampling.pick` does.

    In this order: the `top_k` largest (ties at the border stay), softmax at `temperature`, the smallest
    leading set whose mass reaches `top_p`, those with at least `min_p` times the largest probability, and
    of what is left the first candidate whose cumulated probability exceeds `u` times the whole. Candidates
    stand in the order of their ids, or by falling probability where top_p or min_p is in force.
    """

    u: float = 0.0  # in [0, 1), from the sequence's own random stream: the same seed, the same text
    temperature: float = 1.0  # > 0
    top_k: int = 0  # 0 or ≥ vocab: all
    top_p: float = 1.0  # ≥ 1: all
    min_p: float = 0.0
    greedy: bool = False  # the first of the largest; then nothing else counts


@dataclass(frozen=True)
class Picks:
    """One of each row of logits; where the draw is None both are anything."""

    tokens: np.ndarray  # int64 [K]
    logprobs: np.ndarray  # float32 [K], of the tokens under the raw logits


@dataclass(frozen=True)
class Result:
    """NumPy arrays on the host, valid until the backend's next step: it may use its buffers again.

    So `Backend.step` ends with its only wait for the device, once all of this is on its way.
    """

    logits: np.ndarray | None  # float32 [H, vocab], of the rows without a draw; None is allowed if H = 0
    picks: Picks | None = None  # None: the backend does not sample, or step.draws was None; then H = K


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
    draws: list[Draw | None] | None = None  # [K]; None: the host wants that row's logits (or all rows')


def build_step(
    batch: Batch,
    embeddings: Mapping[bytes, np.ndarray],
    model: ModelSpec,
    draws: list[Draw | None] | None = None,
) -> Step:
    """`embeddings`: image key → float32 [tokens, hidden]. `draws`: of every row of logits, or None."""
    ids: list[int] = []
    images: list[np.ndarray] = []
    positions: list[int] = []
    rope_rows: list[int] = []
    logits_rows: list[int] = []
    at = rows = 0
    for row in batch:
        s, start, end = row.sequence, row.past, row.past + row.count
        ids += s.tokens[start : end - len(row.draft)]
        ids += row.draft
        for span in s.images:
            low, high = max(start, span.start), min(end, span.start + span.length)
            if low < high:
                images.append(embeddings[span.key][low - span.start : high - span.start])
                first = model.vocab_size + rows
                ids[at + low - start : at + high - start] = range(first, first + high - low)
                rows += high - low
        positions += range(start, end)
        table = s.rope_table * model.max_seq_len
        rope_rows += range(table + start, table + end)
        if row.logits == "all":
            logits_rows += range(at, at + row.count)
        elif row.logits == "last":
            logits_rows.append(at + row.count - 1)
        at += row.count
    embeds = images or [np.zeros((1, model.hidden_size), np.float32)]
    return Step(
        input_ids=np.array(ids, dtype=np.int64),
        image_embeds=np.concatenate(embeds),
        positions=np.array(positions, dtype=np.int64),
        rope_rows=np.array(rope_rows, dtype=np.int64),
        logits_rows=np.array(logits_rows, dtype=np.int64),
        slots=[r.sequence.slot for r in batch],
        pasts=[r.past for r in batch],
        counts=[r.count for r in batch],
        tables=[r.sequence.blocks for r in batch],
        draws=draws,
    )

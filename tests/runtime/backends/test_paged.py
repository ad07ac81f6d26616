"""What the backends with a paged cache share: a step becomes arrays, and the arrays arrive."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from rtp_llm.errors import UserError  # noqa: E402
from rtp_llm.export.bundle import Bundle, GraphSpec, ModelSpec, RopeSpec, TensorSpec  # noqa: E402
from rtp_llm.runtime.backends import (  # noqa: E402
    Options,
    open_backend,
    paged,
)
from rtp_llm.runtime.backends.paged import PagedBackend, bucket, padded, step_arrays  # noqa: E402
from rtp_llm.runtime.step import Draw, Step  # noqa: E402

every = settings(deadline=None, derandomize=True, max_examples=80)
VOCAB, HIDDEN = 11, 8


class Recorder(PagedBackend):
    """Its logits say which token stood where; it keeps what it was given."""

    def load(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.opened = True

    def forward(self, inputs: dict[str, Any]) -> Any:
        assert self.opened
        self.seen.append(inputs)
        chosen = inputs["input_ids"][inputs["logits_rows"]] % VOCAB
        return torch.nn.functional.one_hot(chosen, VOCAB).float()

    def forward_vision(self, pixels: Any) -> Any:
        assert self.opened and self.alone.locked()
        return pixels.half().sum((1, 2)).unsqueeze(1)

    def unload(self) -> None:
        self.opened = False


def backend(**options: Any) -> Recorder:
    model = ModelSpec(
        family="qwen_vl", architecture="", vocab_size=VOCAB, hidden_size=HIDDEN, layers=1, heads=2,
        kv_heads=2, head_dim=16, max_seq_len=64, rope=RopeSpec("linear", [64]), attention="paged",
        parameters=0,
    )  # fmt: skip
    cache = ["blocks", 16, 2, 16]
    inputs = [TensorSpec("key_cache.0", "bfloat16", cache), TensorSpec("value_cache.0", "bfloat16", cache)]
    graphs = {name: GraphSpec(f"{name}.pt", inputs, [], "bf16") for name in ("decoder", "vision")}
    nothing: Any = None
    return Recorder(
        Bundle(
            schema=1, name="", backend="torchscript", precision="bf16", model=model, vision=nothing,
            prompt=nothing, generation=nothing, graphs=graphs, tokenizer="", files={}, origin=nothing,
        ),
        **{"slots": 4, **options},
    )  # fmt: skip


def step(rows: list[tuple[int, int]], draws: list[Draw | None] | None = None, image: bool = False) -> Step:
    """Rows of (past, count), each with its own blocks; the last token of each goes through the head."""
    counts = [count for _, count in rows]
    T = sum(counts)
    positions = np.concatenate([np.arange(past, past + count) for past, count in rows])
    tables, free = [], 0
    for past, count in rows:
        tables.append(list(range(free, free := free + -(-(past + count) // 16))))
    return Step(
        input_ids=np.arange(T) % VOCAB + (VOCAB if image else 0),
        image_embeds=np.arange(VOCAB * HIDDEN, dtype=np.float32).reshape(VOCAB, HIDDEN),
        positions=positions,
        rope_rows=positions + 64,
        logits_rows=np.cumsum(counts) - 1,
        slots=list(range(len(rows))),
        pasts=[past for past, _ in rows],
        counts=counts,
        tables=tables,
        draws=draws,
    )


ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6)


@every
@given(ROWS)
def test_the_graph_s_inputs_say_where_every_token_stands_and_where_its_row_s_blocks_are(
    rows: list[tuple[int, int]],
) -> None:
    given_step = step(rows)
    arrays = step_arrays(given_step, 9)
    starts, past, table = (arrays[n] for n in ("cumulative_sequence_length", "past_seqlens", "block_table"))
    assert starts.dtype == past.dtype == table.dtype == arrays["attention_metadata"].dtype == np.int32
    for r, (before, count) in enumerate(rows):
        assert (starts[r + 1] - starts[r], past[r]) == (count, before)
        assert arrays["positions"][starts[r] : starts[r + 1]].tolist() == [*range(before, before + count)]
        blocks = given_step.tables[r]
        assert table[r].tolist() == blocks + [-1] * (9 - len(blocks))
    assert starts[0] == 0 and starts[-1] == len(arrays["input_ids"])
    most, longest = arrays["attention_metadata"].tolist()
    assert most == max(count for _, count in rows)
    assert longest == max(before + count for before, count in rows)


@every
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 5))
def test_padding_keeps_the_real_rows_and_gives_the_others_one_token_without_a_block(
    pasts: list[int], idle: int
) -> None:
    arrays = step_arrays(step([(past, 1) for past in pasts]), 4)
    rows, size = len(pasts), len(pasts) + idle
    out = padded(arrays, size)
    for name, array in arrays.items():
        assert out[name].dtype == array.dtype
        if name != "attention_metadata":
            assert (out[name][: len(array)] == array).all()
            assert len(out[name]) == size + (name == "cumulative_sequence_length")
    assert out["cumulative_sequence_length"].tolist() == [*range(size + 1)]
    assert (out["block_table"][rows:] == -1).all()
    assert (out["input_ids"][rows:] < VOCAB).all()
    assert (out["past_seqlens"][rows:] == 0).all()


@every
@given(st.integers(1, 300), st.integers(1, 300))
def test_a_bucket_holds_the_step_and_there_are_few_of_them(rows: int, slots: int) -> None:
    size = bucket(rows, slots)
    assert rows <= size <= max(rows, slots)
    assert size < 2 * rows and size - rows < 16
    assert bucket(size, slots) == size, "one graph for what is padded to it"
    small = {bucket(n, 10**6) for n in range(1, rows + 1)}
    assert len(small) <= 6 + rows // 16


ARRAYS = st.lists(
    st.tuples(st.sampled_from(["int64", "int32", "float32"]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@every
@given(ARRAYS, st.integers(0, 9), st.booleans())
def test_what_is_sent_arrives_intact_in_one_piece_of_memory(
    kinds: list[tuple[str, list[int]]], seed: int, again: bool
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {
        str(i): rng.integers(-(2**31), 2**31, shape).astype(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    where = backend()
    memory = None
    if again:  # as a captured graph is fed: into memory with older arrays
        memory = torch.full((256 * 40,), 77, dtype=torch.uint8)
        memory = memory[: sum(-(-a.nbytes // 256) * 256 for a in arrays.values())]
    sent = where._send(arrays, memory)
    assert list(sent) == list(arrays)
    for name, array in arrays.items():
        found = sent[name].numpy()
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)
    if memory is not None:
        whole = memory.untyped_storage().data_ptr()
        assert all(t.untyped_storage().data_ptr() == whole for t in sent.values())
    starts = [t.data_ptr() for t in sent.values() if t.numel()]
    assert all((a - starts[0]) % 256 == 0 for a in starts), "kernels load 16 bytes at once"


def test_rows_with_a_draw_come_back_as_tokens_and_the_others_as_logits() -> None:
    asked = step([(3, 1), (17, 2), (0, 1)], [Draw(greedy=True), None, Draw(greedy=True)])
    result = backend().step(asked)
    assert result.picks is not None and result.logits is not None
    assert result.picks.tokens[[0, 2]].tolist() == [0, 3]
    assert result.logits.shape == (1, VOCAB) and result.logits.argmax() == 2


def test_the_caches_are_zeros_of_the_graph_s_type_and_images_go_along() -> None:
    where = backend(kv_cache_bytes=5 * 16 * 2 * 16 * 2 * 2)
    assert where.budget_blocks == 5
    where.step(step([(0, 4)], image=True))
    inputs = where.seen[0]
    assert inputs["key_cache.0"].shape == (5, 16, 2, 16) and inputs["key_cache.0"].dtype == torch.bfloat16
    assert not inputs["value_cache.0"].any()
    assert inputs["image_embeds"].tolist() == step([(0, 4)]).image_embeds.tolist()


def test_a_cache_is_never_larger_than_its_slots_can_fill() -> None:
    assert backend(slots=3, kv_cache_bytes=10**9).budget_blocks == 3 * 4
    assert backend(slots=3, max_seq_len=17, kv_cache_bytes=10**9).budget_blocks == 3 * 2


def test_pictures_come_back_as_float32() -> None:
    found = backend().encode(np.ones((2, 4, 4, 3), np.uint8))
    assert found.dtype == np.float32 and found.shape == (2, 1, 3) and (found == 16).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0 must be 1 or more"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be 1 or more"),
        ({"weight_budget": 5}, "weight_budget=5 is for TensorRT engines"),
        ({"weight_budget": -1}, "weight_budget=-1 must be 0 bytes or more"),
        ({"device": "cuda:2"}, "the GPUs here are cuda:0 to cuda:1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_and_not_dropped(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        open_backend(backend().bundle, Options(**options))


def test_after_a_close_whatever_comes_first_opens_the_graphs_again() -> None:
    for first in (lambda b: b.encode(np.ones((1, 4, 4, 3), np.uint8)), lambda b: b.step(step([(0, 4)]))):
        where = backend()
        where.close()
        where.close()
        assert not where.opened
        first(where)
        assert where.opened


def test_a_cache_that_nobody_wrote_takes_no_memory() -> None:
    psutil = pytest.importorskip("psutil")
    where = backend(slots=100_000, kv_cache_bytes=400 * 10**6)
    before = psutil.Process().memory_info().rss
    assert sum(cache.nbytes for cache in where._caches().values()) > 399 * 10**6
    assert psutil.Process().memory_info().rss - before < 40 * 10**6


def test_a_cache_for_which_memory_runs_out_is_asked_for_as_a_whole_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = backend()
    real, calls = where._zeros, []

    def zeros(shape: tuple[int, ...]) -> Any:
        calls.append(shape)
        if len(calls) == 2:
            raise MemoryError
        return real(shape)

    monkeypatch.setattr(where, "_zeros", zeros)
    with pytest.raises(MemoryError):
        where.step(step([(0, 4)]))
    where.step(step([(0, 4)]))
    assert list(where._caches()) == ["key_cache.0", "value_cache.0"]


def test_pictures_and_captures_of_a_gpu_share_nothing_and_never_run_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.cuda.Stream deals 32 streams in turn: whoever takes one a picture takes the decoder's, too."""
    on: list[Any] = []

    @contextlib.contextmanager
    def stream(which: Any) -> Iterator[None]:
        on.append(which)
        yield

    @contextlib.contextmanager
    def graph(_: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert where.alone.locked()
        on.append(stream)
        yield

    streams = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams) % 32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    where = backend(device="cuda", kv_cache_bytes=10**6)
    assert where.device.index == 3, "of the thread that opens it, whichever thread runs it"
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cudnn.allow_tf32
    where.device, where.cuda = torch.device("cpu"), False  # its tensors
    for _ in range(70):
        where.encode(np.ones((1, 4, 4, 3), np.uint8))
    pictures = set(on)
    on.clear()
    with where._on(where.stream):
        paged._Captured(where, step_arrays(step([(3, 1)]), 4))
    assert len(pictures) == len(set(on)) == 1 and pictures != set(on)


def test_a_check_on_a_cpu_takes_no_budget_of_a_gpu() -> None:
    bundle = dataclasses.replace(backend().bundle, backend="tensorrt")
    with pytest.raises(UserError, match="weight_budget=5 is for TensorRT engines.*runs on cpu here"):
        open_backend(bundle, Options(device="cpu", weight_budget=5))

"""ONNX Runtime's answers equal plain torch's, and its caches stay where they are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from rtp_llm.errors import BundleError, MissingDependency, UserError, VisionGraphMissing  # noqa: E402
from rtp_llm.export import bundle as bundles  # noqa: E402
from rtp_llm.export.attention import Eager, Gqa, Graph, specs  # noqa: E402
from rtp_llm.export.bundle import (  # noqa: E402
    Bundle,
    ChatRules,
    GenerationSpec,
    ImageRules,
    ModelSpec,
    Origin,
    PromptRules,
    RopeSpec,
    VisionSpec,
)
from rtp_llm.export.checkpoint import Checkpoint, Weight  # noqa: E402
from rtp_llm.export.decoder import Decoder, DecoderConfig, constants, ntk_tables  # noqa: E402
from rtp_llm.export.graph import GraphPlan, Writer  # noqa: E402
from rtp_llm.runtime.backends import Options, open_backend  # noqa: E402
from rtp_llm.runtime.backends.onnx import OnnxBackend, pad, scatter  # noqa: E402
from rtp_llm.runtime.sequence import ImageSpan, Row, SamplingParams, Sequence  # noqa: E402
from rtp_llm.runtime.step import Step, build_step  # noqa: E402

VOCAB, HIDDEN = 101, 48
BASE = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    max_seq_len=128,
    eps=1e-6,
)
LIMITS, ALPHAS = ntk_tables(40, 128)
CONFIGS = {
    # Qwen-VL: biases, dynamic NTK tables, logn
    "qwen_vl": dataclasses.replace(BASE, qkv_bias=True, rope_limits=LIMITS, ntk_alphas=ALPHAS, logn=40),
    # LLaVA with grouped queries, a head that the caches pad (20 → 32) and rotation outside the node
    "grouped": dataclasses.replace(BASE, kv_heads=2, head_dim=20),
    "window": dataclasses.replace(BASE, kv_heads=2, window=9),
}


# heads that are large beside the rest: 4 KB of cache per token
LONG = dataclasses.replace(BASE, head_dim=64, max_seq_len=8192)


class Case:
    """One random decoder: the torch module, and its bundle."""

    def __init__(self, config: DecoderConfig, folder: Path):
        torch.manual_seed(0)
        self.config = config
        self.decoder = Decoder(config).eval().requires_grad_(False)
        for p in self.decoder.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.uniform_(0.5, 1.5)
        self.bundle = write_bundle(self.decoder, folder)

    @property
    def model(self) -> ModelSpec:
        return self.bundle.model

    def backend(self, **options: int) -> OnnxBackend:
        return OnnxBackend(self.bundle, **{"slots": 4, "threads": 1, **options})


def write_bundle(decoder: Decoder, folder: Path) -> Bundle:
    from safetensors.torch import save_file

    config = decoder.config
    source = folder / "checkpoint"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    tensors = {name: p.detach().contiguous() for name, p in decoder.named_parameters()}
    save_file(tensors, str(source / "model.safetensors"))
    checkpoint = Checkpoint(source)
    weights = {n: Weight(checkpoint, ((n, tuple(t.shape)),)) for n, t in tensors.items()}
    inputs, outputs = specs("gqa", config)
    graph = GraphPlan(
        make=lambda: Graph(Decoder(config), Gqa, specs("gqa", config)[0]),
        root="decoder.",
        weights=weights,
        constants=constants(config),
        inputs=inputs,
        outputs=outputs,
        precision="fp32",
        transposed=False,
    )
    target = folder / "bundle"
    target.mkdir()
    (target / "tokenizer.json").write_text("{}")
    spec = graph.write(target, "decoder", Writer(graph.bytes, lambda _: None))
    c = config
    model = ModelSpec(
        "test", "Test", c.vocab_size, c.hidden_size, c.layers, c.heads, c.kv_heads,
        -(-c.head_dim // 16) * 16, c.max_seq_len, RopeSpec("linear", c.limits), "gqa", 0,
    )  # fmt: skip
    rules = PromptRules([], False, ImageRules([], [], -200, [], [], False), ChatRules("jinja", "t"))
    bundles.write(
        target,
        Bundle(
            bundles.SCHEMA, "test", "onnxruntime", "fp32", model,
            VisionSpec("square", 4, 3, c.hidden_size), rules, GenerationSpec([], [], {}),
            {"decoder": spec}, "tokenizer.json", {}, Origin("", "", {}, {}),
        ),
    )  # fmt: skip
    return bundles.read(target)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            config = LONG if name == "long" else CONFIGS[name]
            made[name] = Case(config, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def backend(cases: Callable[[str], Case]) -> Iterator[OnnxBackend]:
    made = cases("qwen_vl").backend()
    yield made
    made.close()


IMAGES = {bytes([i]): np.random.default_rng(i).normal(size=(3, HIDDEN)).astype(np.float32) for i in range(3)}


def sequence(length: int, slot: int, seed: int = 0, image_at: int | None = None) -> Sequence:
    """Random tokens, with an image of 3 slots where it is wanted and fits."""
    rng = np.random.default_rng([seed, length])
    tokens = rng.integers(0, VOCAB, length).tolist()
    images = []
    if image_at is not None and image_at + 3 <= length:
        tokens[image_at : image_at + 3] = [-200] * 3
        images = [ImageSpan(image_at, 3, bytes([seed % 3]))]
    s = Sequence(tokens, length, SamplingParams(), 0, frozenset(), images)
    s.slot = slot
    return s


def reference(decoder: Decoder, s: Sequence, upto: int | None = None) -> np.ndarray:
    """Logits [tokens, vocab] of the whole sequence at once, in plain torch."""
    tokens = s.tokens[:upto]
    ids = torch.tensor([t if t >= 0 else 0 for t in tokens])
    embeds = [IMAGES[span.key] for span in s.images] or [np.zeros((1, HIDDEN), np.float32)]
    row = 0
    for span in s.images:
        for i in range(span.length):
            if span.start + i < len(tokens):
                ids[span.start + i] = VOCAB + row
            row += 1
    positions = torch.arange(len(tokens))
    eager = Eager(decoder, positions + s.rope_table * decoder.config.max_seq_len, [len(tokens)])
    stacked = torch.from_numpy(np.concatenate(embeds))
    return decoder(ids, stacked, eager, None, positions).numpy()


def run(backend: OnnxBackend, model: ModelSpec, rows: list[Row]) -> np.ndarray:
    rows = sorted(rows, key=lambda r: r.sequence.slot)
    logits = backend.step(build_step(rows, IMAGES, model)).logits
    assert logits is not None
    return logits


def feed(backend: OnnxBackend, model: ModelSpec, s: Sequence, counts: list[int] | None = None) -> np.ndarray:
    """All logits of a sequence, alone, in the given chunks."""
    out, at = [], 0
    for count in counts or [len(s.tokens)]:
        out.append(run(backend, model, [Row(s, at, count, "all")]))
        at += count
    return np.concatenate(out)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 5e-5 of the logits' standard deviation."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 5e-5 * expected.std()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CONFIGS)
def test_any_mixture_of_chunks_decodes_and_holes_gives_torchs_logits(
    name: str, seed: int, cases: Callable[[str], Case]
) -> None:
    case, random = cases(name), np.random.default_rng(seed)
    backend = case.backend()
    live = []
    for i, slot in enumerate(random.permutation(4)[: random.integers(1, 5)]):
        image_at = None if random.random() < 0.5 else int(random.integers(0, 20))
        s = sequence(int(random.integers(1, 60)), int(slot), i, image_at)
        s.rope_table = int(random.integers(len(case.config.ntk_alphas)))
        live.append((s, reference(case.decoder, s)))
    live.sort(key=lambda pair: pair[0].slot)
    sigma = np.concatenate([logits for _, logits in live]).std()
    while any(s.uncomputed for s, _ in live):
        rows, expected = [], []
        for s, logits in live:
            # 0: a sequence that rests; one that has ended is a hole
            chunk = min(s.uncomputed, int(random.choice([0, 1, 1, 7, 13, 24])))
            if not chunk:
                continue
            kind = str(random.choice(["none", "last", "all"]))
            rows.append(Row(s, s.computed, chunk, kind))
            end = s.computed + chunk
            low = {"none": end, "last": end - 1, "all": s.computed}[kind]
            expected.append(logits[low:end])
            s.computed = end
        if rows:
            found, wanted = run(backend, case.model, rows), np.concatenate(expected)
            assert found.shape == wanted.shape
            assert np.abs(found - wanted).max(initial=0) <= 5e-5 * sigma


def test_a_sequence_at_the_end_of_its_slot_may_share_a_step_with_a_long_chunk(
    cases: Callable[[str], Case],
) -> None:
    case = cases("qwen_vl")
    backend = case.backend(max_seq_len=64)
    old, new = sequence(64, 0, 1), sequence(50, 1, 2)
    feed(backend, case.model, dataclasses.replace(old, tokens=old.tokens[:63]))
    found = run(backend, case.model, [Row(old, 63, 1, "last"), Row(new, 0, 50, "last")])
    expected = [reference(case.decoder, old)[-1], reference(case.decoder, new)[-1]]
    close(found, np.array(expected))
    # and nothing ran over into a neighbouring head: the next token still sees all of it
    more = sequence(64, 1, 2)
    more.tokens[:50] = new.tokens
    close(
        run(backend, case.model, [Row(more, 50, 14, "all")]),
        reference(case.decoder, more)[50:],
    )


def snapshot(backend: OnnxBackend) -> list[np.ndarray]:
    return [array.copy() for _, _, _, array in backend._caches]


def test_a_step_writes_its_own_tokens_and_nothing_else_of_the_caches(
    backend: OnnxBackend, cases: Callable[[str], Case]
) -> None:
    model = cases("qwen_vl").model
    for slot in range(4):
        feed(backend, model, sequence(30, slot, slot))
    before = snapshot(backend)
    address = [array.ctypes.data for _, _, _, array in backend._caches]
    a, b = sequence(42, 1, 1), sequence(31, 3, 3)  # slots 0 and 2 rest
    run(backend, model, [Row(a, 30, 12, "last"), Row(b, 30, 1, "last")])
    assert [array.ctypes.data for _, _, _, array in backend._caches] == address
    written = np.zeros((4, 256), bool)
    written[1, 30:42] = written[3, 30:31] = True
    for old, (_, _, _, new) in zip(before, backend._caches, strict=True):
        changed = (old != new).any(axis=(1, 3))  # [slots, tokens]
        # what lies behind a row's tokens is not yet anybody's
        changed[1, 42:] = changed[3, 31:] = False
        np.testing.assert_array_equal(changed, written)


def memory(field: str) -> int:
    """Bytes, of this process."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def fill(backend: OnnxBackend) -> int:
    """Take every page of the caches; returns their bytes."""
    for _, _, _, array in backend._caches:
        array[:] = 0.25
    return sum(array.nbytes for _, _, _, array in backend._caches)


@linux
def test_decoding_takes_no_memory_beside_the_caches(cases: Callable[[str], Case]) -> None:
    case = cases("long")
    backend = case.backend()
    size = fill(backend)
    live = [sequence(200, slot, slot) for slot in range(4)]
    run(backend, case.model, [Row(s, 99, 1, "last") for s in live])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmHWM")
    for past in range(100, 120):
        run(backend, case.model, [Row(s, past, 1, "last") for s in live])
    assert size >= 2**27
    assert memory("VmHWM") - before < size / 20  # one cache of one layer is a quarter


def test_a_decode_step_takes_no_longer_with_32_times_the_cache(
    cases: Callable[[str], Case],
) -> None:
    case = cases("long")
    backends = [case.backend(max_seq_len=n) for n in (256, 8192)]
    assert backends[1].slot_tokens == 32 * backends[0].slot_tokens
    live = [sequence(200, slot, slot) for slot in range(4)]
    times: list[list[float]] = [[], []]
    for backend in backends:
        fill(backend)
    for past in range(100, 160):
        step = build_step([Row(s, past, 1, "last") for s in live], {}, case.model)
        for backend, taken in zip(backends, times, strict=True):
            start = time.perf_counter()
            backend.step(step)
            taken.append(time.perf_counter() - start)
    small, large = (float(np.median(t[5:])) for t in times)
    assert large < 3 * small, f"{small * 1e3:.2f} ms and {large * 1e3:.2f} ms"


@linux
def test_a_freed_slot_gives_its_pages_back(cases: Callable[[str], Case]) -> None:
    backend = cases("long").backend()
    size = fill(backend)
    full = memory("RssAnon")
    backend.release(2)
    freed = full - memory("RssAnon")
    assert 0.9 * size / 4 < freed < 1.1 * size / 4
    for _, _, _, array in backend._caches:
        assert not array[2].any()
        assert (array[[0, 1, 3]] == 0.25).all()


@linux
def test_a_cache_that_nobody_wrote_takes_no_memory(cases: Callable[[str], Case]) -> None:
    case = cases("long")
    warm = case.backend(max_seq_len=256)
    feed(warm, case.model, sequence(100, 0))
    before = memory("RssAnon")
    backend = case.backend(slots=16)
    feed(backend, case.model, sequence(100, 15))
    size = sum(array.nbytes for _, _, _, array in backend._caches)
    assert memory("RssAnon") - before < size / 10


def test_a_slot_answers_its_next_sequence_as_a_fresh_one(
    backend: OnnxBackend, cases: Callable[[str], Case]
) -> None:
    case = cases("qwen_vl")
    feed(backend, case.model, sequence(60, 1, 1))
    backend.release(1)
    after = sequence(40, 1, 2)
    close(feed(backend, case.model, after, [16, 24]), reference(case.decoder, after))


def decode_among(case: Case, others: list[tuple[int, int, int]]) -> np.ndarray:
    """Logits of one fixed sequence's 50th token; others: (slot, past, count) of its neighbours."""
    backend, mine = case.backend(), sequence(50, 1, 7)
    feed(backend, case.model, dataclasses.replace(mine, tokens=mine.tokens[:49]))
    rows = [Row(mine, 49, 1, "last")]
    for slot, past, count in others:
        s = sequence(60, slot, slot)
        if past:
            feed(backend, case.model, dataclasses.replace(s, tokens=s.tokens[:past]))
        rows.append(Row(s, past, count, "last"))
    return run(backend, case.model, rows)[int(any(slot == 0 for slot, _, _ in others))]


@pytest.mark.parametrize("name, drafts", [*((name, True) for name in CONFIGS), ("grouped", False)])
def test_a_decode_is_the_same_to_the_bit_alone_and_beside_any_decodes_and_chunks(
    name: str, drafts: bool, cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "drafts", drafts)
    case = cases(name)
    alone = decode_among(case, [])
    decodes = [[(0, 5, 1)], [(0, 55, 1), (3, 7, 1)], [(0, 20, 1), (2, 50, 1), (3, 2, 1)]]
    chunks = [[(0, 0, 12)], [(3, 0, 50)], [(0, 9, 2)], [(0, 20, 1), (2, 0, 30), (3, 11, 7)]]
    for others in decodes + chunks:
        np.testing.assert_array_equal(decode_among(case, others), alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_give_the_same_bits_one_by_one_and_in_any_chunks(
    name: str, cases: Callable[[str], Case]
) -> None:
    case, s = cases(name), sequence(60, 1, 7)
    found = []
    drafts = name != "grouped"  # which has the same bits without
    # attention's tiles hold 2 · 16 tokens here: one of 33 would stand alone in a tile
    for sizes in ([1] * 40, [9] * 4 + [4], [2, 3, 5, 8, 1, 7, 6, 8], [33, 7], [40]):
        backend = case.backend()
        backend.drafts = drafts
        feed(backend, case.model, dataclasses.replace(s, tokens=s.tokens[:20]))
        starts = np.cumsum([20, *sizes]).tolist()
        rows = zip(starts, sizes, strict=False)
        logits = [run(backend, case.model, [Row(s, past, count, "all")]) for past, count in rows]
        found.append(np.concatenate(logits))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_closed_backend_opens_again_and_answers_the_same(
    backend: OnnxBackend, cases: Callable[[str], Case]
) -> None:
    model, s = cases("qwen_vl").model, sequence(30, 2)
    first = feed(backend, model, s)
    backend.close()
    assert backend._decoder is None and not backend._caches
    backend.close()
    np.testing.assert_array_equal(feed(backend, model, s), first)


def test_the_slots_length_is_what_was_asked_for_up_to_the_models(
    cases: Callable[[str], Case],
) -> None:
    case = cases("qwen_vl")
    assert case.backend().slot_tokens == 128
    assert case.backend(max_seq_len=50).slot_tokens == 50
    with pytest.raises(UserError, match="max_seq_len=129 must lie between 1 and 128"):
        case.backend(max_seq_len=129)


def test_the_block_budget_is_what_fits_the_given_bytes(cases: Callable[[str], Case]) -> None:
    # 2 (keys and values) × 4 bytes × 2 layers × 4 heads × 16 = 1 KB a token, 16 KB a block
    assert cases("qwen_vl").backend(kv_cache_bytes=10 * 16384 + 5).budget_blocks == 10


def test_a_bundle_without_a_vision_graph_says_so(backend: OnnxBackend) -> None:
    with pytest.raises(VisionGraphMissing, match="no vision graph"):
        backend.encode(np.zeros((1, 4, 4, 3), np.uint8))


def test_a_damaged_graph_is_an_error_that_names_its_file(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    bundle = dataclasses.replace(cases("qwen_vl").bundle, path=tmp_path)
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="decoder.onnx cannot be opened"):
        OnnxBackend(bundle)


def test_an_onnx_runtime_that_is_too_old_is_told_what_is_needed(
    cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.31.2")
    with pytest.raises(MissingDependency, match="1.31.2 is installed, 1.32 or newer is needed: pip"):
        OnnxBackend(cases("qwen_vl").bundle)


@pytest.mark.parametrize(
    "flags, has",
    [("avx2 fma", False), ("avx512_vnni fsrm", True), ("avx2 avx_vnni", True), ("avx512_4vnniw", False)],
)
def test_products_are_asked_not_to_overflow_where_the_cpu_does_not_say_vnni(
    flags: str, has: bool, cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that does to them: tests/export/test_quantize.py."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    opened: list[Any] = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda path, options, **_: opened.append(options))
    monkeypatch.setattr("rtp_llm.runtime.backends.onnx.Path", lambda _: tmp_path / "cpuinfo")
    OnnxBackend(cases("qwen_vl").bundle)
    key = "session.x64quantprecision"
    if has:
        with pytest.raises(RuntimeError, match=key):
            opened[0].get_session_config_entry(key)
    else:
        assert opened[0].get_session_config_entry(key) == "1"


def test_a_bundles_own_backend_is_opened(cases: Callable[[str], Case]) -> None:
    bundle = cases("qwen_vl").bundle
    assert isinstance(open_backend(bundle, Options(slots=2)), OnnxBackend)
    with pytest.raises(UserError, match="device='cuda'.*exported for ONNX Runtime on a CPU"):
        open_backend(bundle, Options(device="cuda"))


def test_padding_puts_every_token_into_its_slots_cell() -> None:
    step = Step(
        input_ids=np.arange(6),
        image_embeds=np.zeros((1, 4), np.float32),
        positions=np.array([9, 0, 1, 2, 3, 5]),
        rope_rows=np.array([9, 100, 101, 102, 103, 5]),
        logits_rows=np.array([0, 5]),
        slots=[0, 2, 3],
        pasts=[9, 0, 5],
        counts=[1, 4, 1],
        tables=[[], [], []],
    )
    assert pad(step)["query_seqlens"].tolist() == [1, 0, 4, 1]
    inputs = pad(step, twice=True)
    inputs |= scatter(step, inputs, slot_tokens=500)
    grid = inputs["pad_rows"].reshape(4, 4)
    assert grid.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4], [5, 5, 0, 0]]
    assert inputs["packed_rows"].tolist() == [0, 8, 9, 10, 11, 12]
    assert inputs["position_ids"].tolist() == [
        [9, 0, 0, 0], [0, 0, 0, 0], [100, 101, 102, 103], [5, 0, 0, 0],
    ]  # fmt: skip
    assert inputs["query_seqlens"].tolist() == [2, 0, 4, 2]  # a lone token is there twice
    assert inputs["seqlens_k"].tolist() == [10, 0, 3, 6]
    assert inputs["total_sequence_length"].tolist() == 11
    assert inputs["query_positions"].tolist() == [
        [9, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3], [5, 0, 0, 0],
    ]  # fmt: skip
    assert inputs["key_positions"].tolist() == list(range(11))
    # the idle slot's cells go behind all that it can hold
    assert inputs["write_indices"].tolist() == [9, 500, 0, 5]
    assert inputs["query_seqlens"].dtype == inputs["seqlens_k"].dtype == np.int32

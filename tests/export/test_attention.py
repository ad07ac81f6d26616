"""The decoder graph in ONNX Runtime equals the eager decoder, whatever mixture a step holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rtp_llm.export.attention import Eager, Gqa, Graph, cache_head_dim, rotate, specs
from rtp_llm.export.checkpoint import Checkpoint, Weight
from rtp_llm.export.decoder import Decoder, DecoderConfig, constants, ntk_tables
from rtp_llm.export.graph import GraphPlan, Writer

SLOTS, LONGEST = 4, 48
PLAIN = DecoderConfig(
    vocab_size=61, hidden_size=48, intermediate_size=40, layers=2, heads=4, kv_heads=2,
    head_dim=16, max_seq_len=LONGEST, eps=1e-6,
)  # fmt: skip
LIMITS, ALPHAS = ntk_tables(8, LONGEST)
CONFIGS = {
    "plain": PLAIN,
    "head 24": replace(PLAIN, head_dim=24),
    "head 72": replace(PLAIN, head_dim=72, heads=2, kv_heads=2),
    "head 24, a third of it left alone": replace(PLAIN, head_dim=24, rotary_dim=16),
    "window, biases, one kv head": replace(
        PLAIN, window=5, kv_heads=1, qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    "rotary width 20": replace(PLAIN, head_dim=32, rotary_dim=20),
    "rotary_pct 0.5": replace(PLAIN, head_dim=64, rotary_dim=32, heads=2, kv_heads=1),
    "ntk, logn": replace(PLAIN, rope_limits=LIMITS, ntk_alphas=ALPHAS, logn=8, qkv_bias=True),
    "ntk, logn, head 24": replace(PLAIN, head_dim=24, rope_limits=LIMITS, ntk_alphas=ALPHAS, logn=8),
    "q and k norm, tied": replace(PLAIN, qk_norm=True, tied=True),
}
# the graphs are alike: these cover every branch, the others are for the long run
QUICK = {"plain", "head 24", "head 72", "window, biases, one kv head", "rotary_pct 0.5", "ntk, logn, head 24"}


def some_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter += torch.randn_like(parameter) * (0.5 if "embed" in name else 0.1)
    return decoder


def exported(decoder: Decoder, folder: Path, precision: str = "fp32") -> ort.InferenceSession:
    """The decoder graph, written by the exporter from a checkpoint of the decoder's own names."""
    c = decoder.config
    parameters = dict(decoder.named_parameters(remove_duplicate=False))
    save_file({n: p.clone() for n, p in parameters.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint(folder)
    weights = {n: Weight(checkpoint, ((n, tuple(p.shape)),)) for n, p in parameters.items()}
    make = lambda: Graph(Decoder(c), Gqa, specs("gqa", c)[0])  # noqa: E731
    graph = GraphPlan(make, "decoder.", weights, constants(c), *specs("gqa", c), precision, False)
    graph.write(folder, "decoder", Writer(graph.bytes, lambda _: None))
    return ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])


@dataclass
class Slots:
    """Slots of caches over a session; a step updates them in place."""

    session: ort.InferenceSession
    config: DecoderConfig
    lengths: list[int] = field(default_factory=lambda: [0] * SLOTS)
    tables: list[int] = field(default_factory=lambda: [0] * SLOTS)

    def __post_init__(self) -> None:
        shape = (SLOTS, self.config.kv_heads, LONGEST, cache_head_dim(self.config.head_dim))
        names = [i.name for i in self.session.get_inputs() if i.name.startswith("past_")]
        self.caches = {n: np.full(shape, 1e4, np.float32) for n in names}  # nobody may read what is stale

    def step(self, new: list[list[int]], images: np.ndarray) -> np.ndarray:
        """New tokens of every slot ([] = idle) → logits of all of them."""
        counts = [len(ids) for ids in new]
        width, total = max(counts), sum(counts)
        position_ids = np.zeros((SLOTS, width), np.int64)
        pad_rows = np.zeros(SLOTS * width, np.int64)
        packed, positions = [], []
        for slot, n in enumerate(counts):
            cells = slot * width + np.arange(n)
            pad_rows[cells] = len(packed) + np.arange(n)
            packed += list(cells)
            place = self.lengths[slot] + np.arange(n)
            position_ids[slot, :n] = self.tables[slot] * self.config.max_seq_len + place
            positions += list(place)
            self.lengths[slot] += n
        inputs: dict[str, Any] = {
            "input_ids": np.array(sum(new, []), np.int64),
            "image_embeds": images,
            "positions": np.array(positions, np.int64),
            "position_ids": position_ids,
            "pad_rows": pad_rows,
            "packed_rows": np.array(packed, np.int64),
            "query_seqlens": np.array(counts, np.int32),
            "seqlens_k": np.array([max(n - 1, 0) for n in self.lengths], np.int32),
            "total_sequence_length": np.array(max(*self.lengths, width), np.int32),
            "logits_rows": np.arange(total, dtype=np.int64),
        }
        binding = self.session.io_binding()
        for spec in self.session.get_inputs():
            if spec.name in self.caches:
                value = ort.OrtValue.ortvalue_from_numpy(self.caches[spec.name])
                binding.bind_ortvalue_input(spec.name, value)
                for new in (o.name for o in self.session.get_outputs()):
                    if new.partition("_")[2] == spec.name.removeprefix("past_"):
                        binding.bind_ortvalue_output(new, value)
            else:
                binding.bind_cpu_input(spec.name, inputs[spec.name])
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()  # logits were bound last


def reference(decoder: Decoder, ids: list[int], table: int, images: np.ndarray) -> Tensor:
    """Logits of a whole sequence at once."""
    positions = torch.arange(len(ids))
    attend = Eager(decoder, positions + table * decoder.config.max_seq_len, [len(ids)])
    return decoder(torch.tensor(ids), torch.from_numpy(images), attend, None, positions)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_mixed_steps_equal_whole_sequences(name: str, tmp_path: Path):
    """Prefill, chunks of a prompt, decode and idle slots in one step, images among the tokens."""
    config = CONFIGS[name]
    decoder = some_decoder(config)
    slots = Slots(exported(decoder, tmp_path), config)
    last = len(config.limits) - 1
    slots.tables = [0, last, min(1, last), last]
    steps = [
        [9, 0, 1, 0],  # prefill beside a prompt of one token; two empty idle slots
        [6, 4, 1, 0],  # a chunk with a past, prefill, decode
        [0, 1, 1, 17],  # an idle slot that holds tokens; a prefill longer than all before
        [1, 1, 1, 1],  # decode only
        [0, 0, 1, 0],  # one row of many
        [1, 12, 0, 2],
    ]
    generator = np.random.default_rng(0)
    images = generator.standard_normal((7, config.hidden_size)).astype(np.float32)
    sequences: list[list[int]] = [[] for _ in range(SLOTS)]
    found: list[list[np.ndarray]] = [[] for _ in range(SLOTS)]
    for counts in steps:
        # ids from the vocabulary's size on select image rows
        new = [generator.integers(0, config.vocab_size + 7, n).tolist() for n in counts]
        logits = slots.step(new, images)
        at = 0
        for slot, n in enumerate(counts):
            sequences[slot] += new[slot]
            found[slot] += list(logits[at : at + n])
            at += n
    for slot, ids in enumerate(sequences):
        expected = reference(decoder, ids, slots.tables[slot], images)
        difference = (torch.from_numpy(np.stack(found[slot])) - expected).abs().max() / expected.std()
        assert float(difference) <= 5e-5, f"slot {slot}: {float(difference):.1e} deviations"


def test_the_graph_keeps_its_promised_inputs_and_touches_only_its_own_slots(tmp_path: Path):
    config = CONFIGS["plain"]
    session = exported(some_decoder(config), tmp_path)
    inputs, outputs = specs("gqa", config)
    kinds = {"int64": "tensor(int64)", "int32": "tensor(int32)", "float32": "tensor(float)"}
    for wanted, found in ((inputs, session.get_inputs()), (outputs, session.get_outputs())):
        assert [s.name for s in wanted] == [f.name for f in found]
        assert [kinds[s.dtype] for s in wanted] == [f.type for f in found]
        assert [s.shape for s in wanted if "*" not in str(s.shape)] == [
            f.shape for s, f in zip(wanted, found, strict=True) if "*" not in str(s.shape)
        ]
    slots = Slots(session, config)
    for cache in slots.caches.values():
        cache[:] = 7
    slots.step([[1, 2, 3], [], [4], []], np.zeros((1, config.hidden_size), np.float32))
    for name, cache in slots.caches.items():
        assert (cache[[1, 3]] == 7).all() and (cache[0, :, 3:] == 7).all(), name
        assert (cache[0, :, :3] != 7).any() and (cache[2, :, 0] != 7).any(), name


def test_a_sum_and_its_norm_are_one_node_and_queries_keys_and_values_stay_one_piece(tmp_path: Path):
    config = CONFIGS["plain"]
    exported(some_decoder(config), tmp_path)
    nodes = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in nodes)
    # the first layer's norm follows the embedding, and the last one picks its rows first
    assert kinds["SkipSimplifiedLayerNormalization"] == 2 * config.layers - 1
    assert kinds["Split"] == config.layers, "gate and up"
    assert kinds["GroupQueryAttention"] == 2 * config.layers


@pytest.mark.parametrize("head, stored", [(16, 16), (24, 32), (64, 64), (72, 80), (80, 80), (128, 128)])
def test_heads_are_stored_in_multiples_of_sixteen(head: int, stored: int):
    assert cache_head_dim(head) == stored
    _, outputs = specs("gqa", replace(PLAIN, head_dim=head))
    assert outputs[-1].shape == ["B", 2, "Smax", stored]


def test_positions_are_an_input_only_where_logn_needs_them():
    assert "positions" not in [s.name for s in specs("gqa", PLAIN)[0]]
    assert "positions" in [s.name for s in specs("gqa", replace(PLAIN, logn=8))[0]]


def test_rotation_turns_pairs_half_a_width_apart_and_leaves_the_rest():
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 10), torch.randn(3, 3)
    found = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :3], x[..., 3:6]) * torch.exp(1j * angles).unsqueeze(1)
    torch.testing.assert_close(found[..., :3], pairs.real)
    torch.testing.assert_close(found[..., 3:6], pairs.imag)
    assert torch.equal(found[..., 6:], x[..., 6:])


def test_a_window_hides_all_but_the_latest_tokens():
    decoder = some_decoder(replace(PLAIN, window=4, layers=1))
    ids = list(range(20))
    images = np.zeros((1, PLAIN.hidden_size), np.float32)
    whole = reference(decoder, ids, 0, images)
    changed = reference(decoder, [50] * 16 + ids[16:], 0, images)
    torch.testing.assert_close(changed[19], whole[19])  # sees 16 … 19
    assert float((changed[18] - whole[18]).abs().max()) > 1e-3

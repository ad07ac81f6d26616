"""`linear` and `paged` equal the eager decoder whatever a step holds, as test_attention.py shows of gqa."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from rtp_llm.build.rewrite import rewrite
from rtp_llm.export.attention import LOWERINGS, Graph, cache_head_dim, specs
from rtp_llm.export.checkpoint import Checkpoint, Weight
from rtp_llm.export.decoder import Decoder, constants
from rtp_llm.export.graph import GraphPlan, Writer
from rtp_llm.export.paged_attention import BLOCK_SIZE
from rtp_llm.export.paged_attention.reference import operators
from rtp_llm.export.torchscript import PagedOp, Script

from .test_attention import CONFIGS, LONGEST, QUICK, SLOTS, reference, some_decoder

ROOM = 20  # of a slot behind LONGEST: where idle slots write
BLOCKS = 2 * SLOTS * -(-LONGEST // BLOCK_SIZE)
STEPS = [
    [9, 0, 1, 0],  # prefill beside a prompt of one token; two empty idle slots
    [6, 4, 1, 0],  # a chunk with a past, prefill, decode
    [0, 1, 1, 17],  # an idle slot that holds tokens; a prefill over a block's edge
    [1, 1, 1, 1],  # decode only
    [0, 0, 1, 0],  # one row of many
    [1, 12, 0, 2],
]


class Machine:
    """A decoder graph with its caches, stepped by slot. `kind`: linear, paged, rewritten or torchscript; what
    `folder` already holds is that graph."""

    def __init__(self, kind: str, decoder: Decoder, folder: Path):
        c = self.c = decoder.config
        self.kind, self.lengths, self.tables = kind, [0] * SLOTS, [0] * SLOTS
        parameters = dict(decoder.named_parameters(remove_duplicate=False))
        save_file({n: p.clone() for n, p in parameters.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        checkpoint = Checkpoint(folder)
        weights = {n: Weight(checkpoint, ((n, tuple(p.shape)),)) for n, p in parameters.items()}
        script, lowering = kind == "torchscript", "linear" if kind == "linear" else "paged"
        inputs, outputs = specs(lowering, c, metadata=not script)
        made = (Script, PagedOp) if script else (Graph, LOWERINGS[lowering])
        plan = GraphPlan(
            lambda: made[0](Decoder(c), made[1], inputs), "decoder.", weights, constants(c), inputs,
            outputs[:1] if script else outputs, "fp32", False,
            opset=24 if kind == "linear" else 23, kind="torchscript" if script else "engine",
        )  # fmt: skip
        if not any(folder.glob("decoder.*")):
            plan.write(folder, "decoder", Writer(plan.bytes, lambda _: None))
        self.names, self.outputs = [s.name for s in inputs], [s.name for s in outputs]
        heads, size = c.kv_heads, cache_head_dim(c.head_dim)
        slots = SLOTS, heads, LONGEST + ROOM, size
        shape = slots if kind == "linear" else (BLOCKS, BLOCK_SIZE, heads, size)
        # nobody may read what is stale
        self.caches = {
            s.name: np.full(shape, 1e4 if kind == "linear" else np.nan, np.float32)
            for s in inputs if s.name.split(".")[0].endswith(("_key", "_value", "_cache"))
        }  # fmt: skip
        order = np.random.default_rng(1).permutation(BLOCKS)
        self.blocks = order.reshape(SLOTS, -1).astype(np.int32)  # of each slot, anywhere
        if script:
            self.module = torch.jit.load(str(folder / "decoder.pt"))
        elif kind == "linear":
            self.session = ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])
        else:
            model = onnx.load(folder / "decoder.onnx")
            model = rewrite(model, 3) if kind == "rewritten" else model
            self.names = [i.name for i in model.graph.input]
            self.evaluator = ReferenceEvaluator(model, new_ops=operators())

    def step(self, new: list[list[int]], images: np.ndarray) -> np.ndarray:
        counts = [len(ids) for ids in new]
        width, pasts = max(counts), list(self.lengths)
        places = [past + np.arange(n) for past, n in zip(pasts, counts, strict=True)]
        rope = [p + t * self.c.max_seq_len for p, t in zip(places, self.tables, strict=True)]
        cells = [slot * width + np.arange(n) for slot, n in enumerate(counts)]
        pad_rows, query = np.zeros(SLOTS * width, np.int64), np.zeros((SLOTS, width), np.int64)
        for slot, (start, n) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
            pad_rows[cells[slot]] = start + np.arange(n)
            query[slot, :n] = places[slot]
        self.lengths = [past + n for past, n in zip(pasts, counts, strict=True)]
        inputs: dict[str, Any] = {
            "input_ids": np.array(sum(new, []), np.int64),
            "image_embeds": images,
            "positions": np.concatenate(places),
            "rope_rows": np.concatenate(rope),
            "logits_rows": np.arange(sum(counts), dtype=np.int64),
            "cumulative_sequence_length": np.cumsum([0, *counts], dtype=np.int32),
            "past_seqlens": np.array(pasts, np.int32),
            "block_table": self.blocks,
            "attention_metadata": np.array([width, max(self.lengths)], np.int32),
            "pad_rows": pad_rows,
            "packed_rows": np.concatenate(cells),
            "query_positions": query,
            "key_positions": np.arange(max(self.lengths), dtype=np.int64),
            "write_indices": np.array([p if n else LONGEST for p, n in zip(pasts, counts, strict=True)]),
        }  # fmt: skip
        inputs = {name: array for name, array in (inputs | self.caches).items() if name in self.names}
        if self.kind == "torchscript":
            return self.module(*(torch.from_numpy(inputs[name]) for name in self.names)).numpy()
        run = self.session.run if self.kind == "linear" else self.evaluator.run
        found = dict(zip(self.outputs, run(self.outputs, inputs), strict=True))
        for name in self.caches:
            kind, layer = name.split(".")
            new_name = kind.replace("past", "present") if self.kind == "linear" else f"{kind}_out"
            self.caches[name] = np.array(found[f"{new_name}.{layer}"])
        return found["logits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Where (config, kind) is exported: paged and rewritten begin as one graph."""

    @functools.cache
    def get(name: str, graph: str) -> Path:
        return tmp_path_factory.mktemp(graph)

    return lambda name, kind: get(name, "paged" if kind == "rewritten" else kind)


@pytest.mark.parametrize("kind", ["linear", "paged", "rewritten", "torchscript"])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_mixed_steps_equal_whole_sequences(name: str, kind: str, folder: Callable[[str, str], Path]):
    config = CONFIGS[name]
    decoder = some_decoder(config)
    machine = Machine(kind, decoder, folder(name, kind))
    last = len(config.limits) - 1
    machine.tables = [0, last, min(1, last), last]
    generator = np.random.default_rng(0)
    images = generator.standard_normal((7, config.hidden_size)).astype(np.float32)
    sequences: list[list[int]] = [[] for _ in range(SLOTS)]
    found: list[list[np.ndarray]] = [[] for _ in range(SLOTS)]
    for counts in STEPS:
        new = [generator.integers(0, config.vocab_size + 7, n).tolist() for n in counts]
        logits = machine.step(new, images)
        for slot, n in enumerate(counts):
            at = sum(counts[:slot])
            sequences[slot] += new[slot]
            found[slot] += list(logits[at : at + n])
    for slot, ids in enumerate(sequences):
        expected = reference(decoder, ids, machine.tables[slot], images)
        difference = (torch.from_numpy(np.stack(found[slot])) - expected).abs().max() / expected.std()
        assert float(difference) <= 5e-5, f"slot {slot}: {float(difference):.1e} deviations"

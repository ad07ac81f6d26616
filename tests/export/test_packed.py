"""Checkpoints that come quantised are exported as what they stand for: int4 and fp8 to the bit where the
target has them, and else dequantised. Their tensors are packed here, by the formats' own rules, in NumPy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from rtp_llm.export.checkpoint import Checkpoint
from rtp_llm.export.families import FAMILIES, Options, Plan
from rtp_llm.export.graph import GraphPlan, Writer
from rtp_llm.export.target import target

from .test_exporter import script

Arrays = dict[str, np.ndarray]
LINEAR = ("c_attn", "c_proj", "w1", "w2", *(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")))


# ---------------------------------------------------------------------------------------------- packing


def nibbles(values: np.ndarray, order: Any = range(8)) -> np.ndarray:
    """[rows, 8 n] below 16 → int32 [rows, n]; the value at place order[i] goes to bits 4 i."""
    numbers = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for i, place in enumerate(order):
        numbers |= values[:, place::8].astype(np.uint32) << np.uint32(4 * i)
    return numbers.view(np.int32)


def rounded(w: np.ndarray, groups: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[out, in] → q [out, in], scales float16 and zero points [out, groups]; groups: of each input."""
    count = groups.max() + 1
    scales, zeros = np.zeros((len(w), count), np.float16), np.full((len(w), count), 8)
    for g in range(count):
        part = w[:, groups == g]
        if symmetric:
            scales[:, g] = np.abs(part).max(1) / 7.5
        else:
            low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
            scales[:, g] = (high - low) / 15
            zeros[:, g] = np.rint(-low / scales[:, g]).clip(1, 15)
    q = np.rint(w / scales[:, groups].astype(np.float32)) + zeros[:, groups]
    return q.clip(0, 15).astype(np.int64), scales, zeros


def gptq(
    w: np.ndarray, seed: int, group: int = 128, v2: bool = False, sym: bool = True, act: str = ""
) -> tuple[Arrays, np.ndarray]:
    """Tensors of a layer, and what they stand for. act: "same" inputs' order for layers of the same width, or
    "own" for each."""
    inputs = w.shape[1]
    groups = np.arange(inputs) // (group if group > 0 else inputs)
    if act:
        groups = groups[np.random.default_rng(seed if act == "own" else inputs).permutation(inputs)]
    q, scales, zeros = rounded(w, groups, sym)
    tensors = {
        "qweight": np.ascontiguousarray(nibbles(q).T.reshape(-1, len(w))),
        "qzeros": nibbles(((zeros if v2 else zeros - 1) & 15).T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": groups.astype(np.int32),
    }
    return tensors, (q - zeros[:, groups]) * scales[:, groups].astype(np.float32)


def awq(w: np.ndarray, seed: int, group: int = 128) -> tuple[Arrays, np.ndarray]:
    groups = np.arange(w.shape[1]) // group
    q, scales, zeros = rounded(w, groups, False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": nibbles(q.T, order),
        "qzeros": nibbles(zeros.T, order),
        "scales": np.ascontiguousarray(scales.T),
    }
    return tensors, (q - zeros[:, groups]) * scales[:, groups].astype(np.float32)


def fp8(w: np.ndarray, seed: int, kind: str = "channel", static: float = 0.0) -> tuple[Arrays, np.ndarray]:
    """kind: what shares a scale: "tensor", "channel" or "block" of 128 × 128."""
    rows, columns = w.shape
    if kind == "block":
        down, right = np.arange(rows) // 128, np.arange(columns) // 128
        scales = np.zeros((down[-1] + 1, right[-1] + 1), np.float32)
        np.maximum.at(scales, np.ix_(down, right), np.abs(w) / 448)
        full, name = scales[np.ix_(down, right)], "weight_scale_inv"
    else:
        amax = np.abs(w).max(1, keepdims=True) if kind == "channel" else np.abs(w).max()
        scales = np.asarray(amax / 448, np.float32)
        full, name = scales, "weight_scale"
    q = (w / full).astype(ml_dtypes.float8_e4m3fn)
    tensors = {"weight": q, name: scales}
    if static:
        tensors["input_scale"] = np.array([static * (1 + seed)], np.float32)
    return tensors, q.astype(np.float32) * full


CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {}, {}),
    "gptq-v2": (gptq, {"v2": True, "sym": False}, {"checkpoint_format": "gptq_v2", "sym": False}),
    "gptq-asym-32": (gptq, {"group": 32, "sym": False}, {"group_size": 32, "sym": False}),
    "gptq-column": (gptq, {"group": -1}, {"group_size": -1}),
    "gptq-act": (gptq, {"act": "same"}, {"desc_act": True}),
    "gptq-act-own-32": (gptq, {"act": "own", "group": 32, "sym": False},
                        {"desc_act": True, "group_size": 32, "sym": False}),
    "awq-16": (awq, {"group": 16}, {"group_size": 16}),
    "fp8-tensor": (fp8, {"kind": "tensor"}, {}),
    "fp8-channel": (fp8, {"static": 0.01}, {}),
    "fp8-block": (fp8, {"kind": "block"}, {}),
}  # fmt: skip
GIVEN = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
             "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                  "weight_block_size": [128, 128]},
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-channel": {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                        "num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}}}},
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    return {**GIVEN.get(name, GIVEN.get(name.split("-")[0], {})), **CONFIGS[name][2]}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders qwen_vl and llava: random checkpoints with linear layers of 128, 176 and 256 inputs."""
    folder, make = tmp_path_factory.mktemp("plain"), script()
    make.LLAVA["tiny"] |= {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    for family, write in make.MODELS.items():
        (folder / family).mkdir()
        write(folder / family, "tiny", 0, quiet=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, name of a config) → the quantised checkpoint, and the plain one that it stands for."""
    folder, done = tmp_path_factory.mktemp("packed"), {}

    def get(family: str, name: str) -> tuple[Path, Path]:
        if (family, name) not in done:
            there = folder / f"{family}-{name}", folder / f"{family}-{name}-plain"
            quantise(plain / family, *there, name)
            done[family, name] = there
        return done[family, name]

    return get


def quantise(source: Path, output: Path, reference: Path, name: str) -> None:
    pack, options, _ = CONFIGS[name]
    for folder in (output, reference):
        shutil.copytree(source, folder)
    [file] = (f.name for f in source.glob("*.safetensors"))
    packed, dequantised = {}, {}
    for i, (key, tensor) in enumerate(load_file(source / file).items()):
        stem, layer = key.removesuffix("weight"), key.split(".")[-2]
        if key.endswith(".weight") and layer in LINEAR and "visual" not in key:
            tensors, stands_for = pack(tensor.float().numpy(), i, **options)
            packed |= {stem + part: as_tensor(array) for part, array in tensors.items()}
            dequantised[key] = torch.from_numpy(stands_for.astype(np.float32))
        else:
            packed[key] = dequantised[key] = tensor
    for folder, tensors in ((output, packed), (reference, dequantised)):
        (folder / "model.safetensors.index.json").unlink()
        save_file(tensors, folder / file)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(name)}))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def plan_of(folder: Path) -> Plan:
    source = Checkpoint(folder)
    family = "llava" if "Llava" in source.config["architectures"][0] else "qwen_vl"
    return FAMILIES[family].plan(source, Options())


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
def test_every_row_reads_as_the_numbers_that_it_stands_for(family: str, name: str, checkpoint: Any):
    packed, plain = map(Checkpoint, checkpoint(family, name))
    assert set(packed) == set(plain) and packed.parameters() == plain.parameters()
    for key in plain:
        assert key in packed and packed.shape(key) == plain.shape(key)
        np.testing.assert_array_equal(packed.read(key).numpy(), plain.read(key).numpy(), key)
        if key.endswith("proj.weight"):
            np.testing.assert_array_equal(packed.read(key, 3, 21).numpy(), plain.read(key, 3, 21).numpy())
    weights, expected = (plan_of(c.path).decoder_weights for c in (packed, plain))
    for key, weight in weights.items():  # merged layers, in chunks that end inside a part
        weight.check()
        for found, rows in zip(weight.chunks(3000), expected[key].chunks(3000), strict=True):
            np.testing.assert_array_equal(found.numpy(), rows.numpy(), key)


def test_transformers_dequantises_blocks_of_fp8_alike(checkpoint: Any):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = Checkpoint(checkpoint("llava", "fp8-block")[0])
    name = "model.layers.0.mlp.gate_proj.weight"
    given = {"weight": packed.mapped(name), "weight_scale_inv": packed.mapped(name + "_scale_inv")}
    [expected] = Fp8Dequantize(None).convert(given).values()
    np.testing.assert_array_equal(packed.read(name).numpy(), expected.numpy())


# ---------------------------------------------------------------------------------------- a CPU's graph


def int4(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """MatMulNBits' formula: [out, blocks, block / 2] bytes → float32 [out, blocks · block]."""
    q = np.stack([weight & 15, weight >> 4], -1).reshape(*weight.shape[:2], -1).astype(np.float32)
    zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(zeros), -1)[:, : weight.shape[1]]
    return ((q - zero[..., None]) * scales[..., None]).reshape(len(weight), -1)


def products(file: Path) -> dict[str, np.ndarray]:
    """The weights [out, in] of every MatMulNBits, as it applies them to its unsorted input, by names of the
    merged layers."""
    model = onnx.load(file)
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    gathers = {n.output[0]: n for n in model.graph.node if n.op_type == "Gather"}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs = next(a.i for a in node.attribute if a.name == "K")
        rows = int4(*(constants[name] for name in node.input[1:4]))[:, :inputs]
        if node.input[0] in gathers and gathers[node.input[0]].input[1].endswith("sort.order"):
            unsorted = np.empty_like(rows)
            unsorted[:, constants[gathers[node.input[0]].input[1]]] = rows
            rows = unsorted
        name = node.input[1].removeprefix("decoder.").split(".parts.")[0].removesuffix(".weight") + ".weight"
        found[name] = np.concatenate([found[name], rows]) if name in found else rows
    return found


def written(plan: Plan, precision: str, folder: Path, backend: str = "onnxruntime") -> GraphPlan:
    graph = GraphPlan.of_decoder(plan, target(backend), precision)
    graph.write(folder, "decoder", Writer(graph.bytes, lambda _: None))
    return graph


@pytest.mark.parametrize("family, name", [
    ("llava", "gptq"), ("llava", "gptq-act-own-32"), ("llava", "awq-16"),
    ("qwen_vl", "gptq-v2"), ("qwen_vl", "gptq-act"), ("qwen_vl", "gptq-column"), ("qwen_vl", "awq-16"),
])  # fmt: skip
def test_an_int4_graph_keeps_the_checkpoints_numbers_to_the_bit(
    family: str, name: str, checkpoint: Any, tmp_path: Path
):
    packed, plain = checkpoint(family, name)
    graph = written(plan_of(packed), "int4", tmp_path)
    size = (tmp_path / "decoder.onnx.data").stat().st_size
    assert 0.8 * size < graph.bytes < 1.2 * size
    expected = plan_of(plain).decoder_weights
    found = products(tmp_path / "decoder.onnx")
    assert set(found) == {n for n, w in expected.items() if len(w.parts[0][1]) == 2} - {"embed.weight"}
    for key, rows in found.items():
        if key != "head.weight":  # which the checkpoint does not quantise
            np.testing.assert_array_equal(rows, expected[key].read().numpy(), key)

"""Checkpoints that come quantised are exported as what they stand for: int4 and fp8 to the bit where the
target has them, and else dequantised. Their tensors are packed here, by the formats' own rules, in NumPy."""

from __future__ import annotations

import json
import re
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

from rtp_llm.errors import CheckpointError, NotSupportedYet, UserError
from rtp_llm.export.attention import Eager
from rtp_llm.export.checkpoint import Checkpoint, Weight
from rtp_llm.export.decoder import Decoder
from rtp_llm.export.exporter import Progress, export
from rtp_llm.export.families import FAMILIES, Options, Plan
from rtp_llm.export.graph import GraphPlan, Writer
from rtp_llm.export.packed import spans
from rtp_llm.export.qdq import Range, own_columns, static_ranges
from rtp_llm.export.quantize import dequantize, quantize
from rtp_llm.export.target import target
from rtp_llm.export.verify import verify
from rtp_llm.runtime.backends import Options as RunOptions

from ..random_checkpoints import script
from .test_exporter import Traced, first_logits, refused, until_tracing

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
        folder.mkdir()
        for file in source.iterdir():
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            if not file.name.endswith("index.json"):
                copy(file, folder / file.name)
    for file in source.glob("*.safetensors"):
        packed, plain = {}, {}
        for i, (key, tensor) in enumerate(load_file(file).items()):
            stem, layer = key.removesuffix("weight"), key.split(".")[-2]
            packed[key] = plain[key] = tensor
            if key.endswith(".weight") and layer in LINEAR and not re.search("visual|vision", key):
                tensors, stands_for = pack(tensor.float().numpy(), i, **options)
                del packed[key]
                packed |= {stem + part: as_tensor(array) for part, array in tensors.items()}
                plain[key] = torch.from_numpy(stands_for.astype(np.float32))
        save_file(packed, output / file.name)
        save_file(plain, reference / file.name)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(name)}))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def layer(
    folder: Path, name: str, inputs: int = 256, change: Callable[[Any], object] = lambda tensors: None
) -> tuple[Checkpoint, np.ndarray]:
    """A checkpoint of one layer x with 64 outputs, changed, and what it stands for."""
    pack, options, _ = CONFIGS[name]
    weights = np.random.default_rng(0).normal(size=(64, inputs)).astype(np.float32)
    tensors, stands_for = pack(weights, 0, **options)
    stored = {f"x.{part}": as_tensor(array) for part, array in tensors.items()}
    change(stored)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config_of(name)}))
    return Checkpoint(folder), stands_for


def configure(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))


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
    sorts = {
        n.output[0]: constants[n.input[1]]
        for n in model.graph.node
        if n.op_type == "Gather" and n.input[1].endswith(".sort.order")
    }
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs = next(a.i for a in node.attribute if a.name == "K")
        rows = int4(*(constants[name] for name in node.input[1:4]))[:, :inputs]
        rows = unsorted(rows, sorts.get(node.input[0]))
        name = node.input[1].removeprefix("decoder.").split(".parts.")[0].removesuffix(".weight") + ".weight"
        found[name] = np.concatenate([found[name], rows]) if name in found else rows
    return found


def written(plan: Plan, precision: str, folder: Path, backend: str = "onnxruntime") -> GraphPlan:
    graph = GraphPlan.of_decoder(plan, target(backend), precision)
    graph.write(folder, "decoder", Writer(graph.bytes, lambda _: None))
    return graph


def unsorted(rows: np.ndarray, order: Any) -> np.ndarray:
    if order is None:
        return rows
    found = np.empty_like(rows)
    found[:, np.asarray(order)] = rows
    return found


@pytest.mark.parametrize("name", [name for name in CONFIGS if "fp8" not in name])
def test_repacked_blocks_are_the_checkpoints_numbers_to_the_bit(name: str, tmp_path: Path):
    """In chunks, and with a last block that 176 inputs do not fill (AWQ has none such)."""
    checkpoint, stands_for = layer(tmp_path, name, 176)
    weight = Weight(checkpoint, (("x.weight", stands_for.shape),))
    pieces = [part.packed(low, high) for part, low, high in spans(weight, 6000)]
    assert len(pieces) > 1
    rows = int4(*(torch.cat(tensors).numpy() for tensors in zip(*pieces, strict=True)))[:, :176]
    found = unsorted(rows, weight.quantised()[0].order)
    np.testing.assert_array_equal(found, stands_for.astype(np.float32))


def halved(plan: Plan) -> Decoder:
    """The reference of a plain checkpoint, with the head and embedding as int4 has them."""
    decoder = Decoder(plan.decoder).eval().requires_grad_(False)
    for name, weight in plan.decoder_weights.items():
        rows = weight.read()
        if bits := {"embed.weight": 8, "head.weight": 4}.get(name):
            rows = dequantize(*quantize(rows, bits), rows.shape[1], bits)
        decoder.get_parameter(name).copy_(rows)
    return decoder


@pytest.mark.parametrize("family, name", [("llava", "gptq-act-own-32"), ("qwen_vl", "gptq-act")])
def test_auto_exports_a_bundle_of_the_numbers_to_the_bit_that_answers_like_them(
    family: str, name: str, checkpoint: Any, tmp_path: Path
):
    """But for inputs of products, which are rounded to 8 bits: at most 1 / 254 of a block's largest. The
    parts of llava's merged layers have their inputs in different orders, those of qwen_vl's in the same."""
    packed, plain = checkpoint(family, name)
    bundle = export(packed, tmp_path / "bundle")
    assert bundle.precision == bundle.graphs["decoder"].precision == "int4"
    plan = plan_of(plain)
    found = products(bundle.read_path("decoder.onnx"))
    matrices = {n for n, w in plan.decoder_weights.items() if len(w.parts[0][1]) == 2}
    assert set(found) == matrices - {"embed.weight"}
    for key in set(found) - {"head.weight"}:  # which the checkpoint does not quantise
        rows = plan.decoder_weights[key].read().numpy()
        if family == "qwen_vl" and key.endswith(("gate_up.weight", "down.weight")):  # see packed.presorted
            g_idx = Checkpoint(packed).read("transformer.h.0.mlp.c_proj.g_idx").numpy()
            order = g_idx.argsort(kind="stable")
            rows = rows[:, order] if "down" in key else rows[np.r_[order, len(order) + order]]
        np.testing.assert_array_equal(found[key], rows, key)

    decoder = halved(plan)
    ids = [5, 17, 3, 250, 9, 77, 310, 42]
    rows = torch.arange(len(ids))
    attend = Eager(decoder, rows, [len(ids)])
    expected = decoder(torch.tensor(ids), None, attend, None, rows).numpy()
    logits = first_logits(bundle, ids, np.zeros((1, bundle.model.hidden_size), np.float32))
    assert np.abs(logits - expected).max() < 0.08 * expected.std()
    best = np.sort(expected)
    clear = best[:, -1] - best[:, -2] > 0.16 * expected.std()
    assert clear.sum() >= 3
    np.testing.assert_array_equal(logits.argmax(1)[clear], expected.argmax(1)[clear])
    report = verify(bundle.path)
    assert report.passed, report.stages


def test_another_precision_is_of_the_dequantised_numbers(checkpoint: Any, tmp_path: Path):
    packed, plain = checkpoint("llava", "awq-16")
    written(plan_of(packed), "fp32", tmp_path)
    model = onnx.load(tmp_path / "decoder.onnx")
    found = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    for key, weight in plan_of(plain).decoder_weights.items():
        np.testing.assert_array_equal(found[f"decoder.{key}"], weight.read().numpy(), key)


@pytest.mark.slow
def test_a_llava_hf_checkpoint_verifies_against_its_numbers(goldens: Path, tmp_path: Path):
    """transformers itself could not load it without the format's library."""
    quantise(goldens / "llava_hf_A" / "checkpoint", tmp_path / "packed", tmp_path / "plain", "awq-16")
    report = verify(export(tmp_path / "packed", tmp_path / "bundle").path)
    assert report.passed and report.precision == "int4", report.stages
    assert report.reference.startswith("plain torch modules")


# ------------------------------------------------------------------------------------ engines, and "auto"


@pytest.mark.parametrize("name, backend, precision, says", [
    ("gptq-act", "onnxruntime", "int4", "are kept"),
    ("fp8-channel", "onnxruntime", "int8", "dequantised and stored as int8"),
    ("gptq-act", "tensorrt", "int4", "are kept"),
    ("awq-16", "tensorrt", "bf16", "dequantised and stored as bf16"),
    ("fp8-tensor", "tensorrt", "fp8", "its linear layers are kept"),
    ("fp8-block", "tensorrt", "fp8", "blocks of 128×128; it is quantised anew per output channel"),
    ("fp8-channel", "torchscript", "fp32", "dequantised and stored as fp32"),
])  # fmt: skip
def test_auto_keeps_what_the_checkpoint_has_where_the_target_can_and_says_so(
    name: str, backend: str, precision: str, says: str, checkpoint: Any, tmp_path: Path
):
    said: list[str] = []

    def listen(p: Progress) -> None:
        said.append(p.text)
        until_tracing(p)

    with pytest.raises(Traced):
        export(checkpoint("llava", name)[0], tmp_path / "out", backend=backend, progress=listen)
    assert config_of(name)["quant_method"] in said[1] and says in said[1]
    assert said[2].startswith(f"precision {precision}: ")


def test_what_is_quantised_already_is_not_rounded_for_calibration_data(checkpoint: Any, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Hello"}))
    packed = checkpoint("llava", "gptq-act")[0]
    call = lambda: export(packed, tmp_path / "out", calibration=data)  # noqa: E731
    refused(UserError, "the checkpoint is quantised already: gptq, int4", call=call)


def dequantised(file: Path) -> dict[str, np.ndarray]:
    """The weights [out, in] of every product of an engine, as it applies them to its unsorted input."""
    model = onnx.load(file)
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    made = {n.output[0]: n for n in model.graph.node}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        make = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if make is None or make.op_type != "DequantizeLinear":
            continue
        q, scales = (constants[name].astype(np.float32) for name in make.input)
        rows = (q * (scales.repeat(len(q) // len(scales), 0) if scales.ndim == 2 else scales)).T
        source = made[node.input[0]]
        if source.op_type == "Gather":
            rows = unsorted(rows, constants[source.input[1]])
        found[make.input[0].removeprefix("decoder.")] = rows
    return found


@pytest.mark.parametrize("name", ["gptq", "gptq-act", "fp8-tensor", "fp8-channel", "fp8-block"])
def test_columns_for_engines_keep_the_numbers_but_for_scales_in_bfloat16(name: str, tmp_path: Path):
    """2^-9 of a scale; the next number of int4 is 1 / 8 away, and of fp8 1 / 16."""
    checkpoint, stands_for = layer(tmp_path, name)
    weight = Weight(checkpoint, (("x.weight", stands_for.shape),))
    found = np.zeros(stands_for.shape, np.float32)
    for start, q, scales in own_columns(weight):
        assert scales.dtype == torch.bfloat16
        scale = scales.float().numpy()
        scale = scale.repeat(len(q) // len(scale), 0) if scale.ndim == 2 else scale
        found[start : start + q.shape[1]] = (q.float().numpy() * scale).T
    if name == "gptq-act":
        found = unsorted(found, weight.quantised()[0].order)
    if name == "fp8-block":  # rounded again, to steps of at most 1 / 14 of the largest of an output
        assert (np.abs(found - stands_for) <= np.abs(stands_for).max(1, keepdims=True) / 28 * 1.01).all()
    else:
        np.testing.assert_allclose(found, stands_for, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", ["gptq-act", pytest.param("fp8-channel", marks=pytest.mark.slow)])
def test_an_engines_graph_applies_them(name: str, checkpoint: Any, tmp_path: Path):
    packed, plain = checkpoint("llava", name)
    plan = plan_of(packed)
    graph = GraphPlan.of_decoder(plan, target("tensorrt"), "int4" if name == "gptq-act" else "fp8")
    linears = [n for n, w in plan.decoder_weights.items() if len(w.parts[0][1]) == 2 and "layers" in n]
    graph.ranges = {n.removesuffix(".weight"): Range(3.0, 1.0) for n in linears}
    graph.write(tmp_path, "decoder", Writer(graph.bytes, lambda _: None))
    found, expected = dequantised(tmp_path / "decoder.onnx"), plan_of(plain).decoder_weights
    assert set(found) == set(linears)
    for key, rows in found.items():
        np.testing.assert_allclose(rows, expected[key].read().numpy(), rtol=2.0**-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-act", "fp8-block", "fp8-channel"])
def test_an_engines_bundle_verifies_against_the_numbers(name: str, checkpoint: Any, tmp_path: Path):
    bundle = export(checkpoint("llava", name)[0], tmp_path / "bundle", backend="tensorrt")
    report = verify(bundle.path, run=RunOptions(slots=1, device="cpu"))
    assert report.passed and report.precision == ("int4" if name == "gptq-act" else "fp8"), report.stages


def test_static_scales_of_inputs_are_the_checkpoints_own(checkpoint: Any):
    packed, plain = checkpoint("llava", "fp8-channel")
    files = load_file(next(packed.glob("*.safetensors")))
    ranges = static_ranges(plan_of(packed).decoder_weights)
    layer = "model.layers.0.self_attn."
    widest = max(float(files[f"{layer}{x}_proj.input_scale"]) for x in "qkv")
    assert ranges["layers.0.qkv"].amax == pytest.approx(448 * widest)
    assert ranges["layers.0.o"].amax == pytest.approx(448 * float(files[f"{layer}o_proj.input_scale"]))
    assert static_ranges(plan_of(plain).decoder_weights) == {}


def test_asymmetric_zero_points_under_sym_are_refused(tmp_path: Path):
    layer(tmp_path, "gptq-v2")
    configure(tmp_path, {"sym": True})
    weight = Weight(Checkpoint(tmp_path), (("x.weight", (64, 256)),))
    with pytest.raises(CheckpointError, match="zero points of .*, expected 8: quantization_config says sym"):
        list(own_columns(weight))


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name, change, parts", [
    ("gptq", lambda t: t.pop("x.qzeros"), ["x.qzeros", "missing"]),
    ("gptq", lambda t: t.pop("x.scales"), ["x.scales", "missing"]),
    ("gptq", lambda t: t.pop("x.qweight"), ["x.qweight", "missing"]),
    ("gptq-act", lambda t: t.pop("x.g_idx"), ["x.g_idx", "missing"]),
    ("gptq", lambda t: t.update({"x.qzeros": t["x.qzeros"][:1]}), ["x.qzeros", "[1, 8]", "expected [2, 8]"]),
    ("gptq", lambda t: t.update({"x.qweight": t["x.qweight"].half()}), ["x.qweight", "float16", "int32"]),
    ("gptq", lambda t: t.update({"x.qweight": t["x.qweight"][0]}), ["x.qweight", "[64]", "a matrix"]),
    ("gptq", lambda t: t["x.g_idx"].fill_(7), ["x.g_idx", "7 to 7", "there are 2"]),
    ("gptq", lambda t: t["x.g_idx"][:3].fill_(1), ["x.g_idx", "group 0", "125", "expected 128"]),
    ("awq-16", lambda t: t.pop("x.qzeros"), ["x.qzeros", "missing"]),
    ("awq-16", lambda t: t.update({"x.scales": t["x.scales"].t().contiguous()}), ["x.scales", "[64, 16]"]),
    ("fp8-channel", lambda t: t.pop("x.weight_scale"), ["x.weight_scale", "missing"]),
    ("fp8-channel", lambda t: t.update({"x.weight_scale": torch.ones(5)}), ["[5]", "expected [] or [64, 1]"]),
    ("fp8-block", lambda t: t.update({"x.weight_scale_inv": torch.ones(2, 2)}), ["[2, 2]", "or [1, 2]"]),
])  # fmt: skip
def test_damage_is_named(name: str, change: Any, parts: list[str], tmp_path: Path):
    checkpoint, _ = layer(tmp_path, name, change=change)
    refused(CheckpointError, *parts, call=lambda: checkpoint.check("x.weight", (64, 256)))


def test_float8_without_a_config_is_refused_as_its_scales_would_be_dropped(tmp_path: Path):
    layer(tmp_path, "fp8-channel")
    (tmp_path / "config.json").write_text("{}")
    call = lambda: Checkpoint(tmp_path).check("x.weight", (64, 256))  # noqa: E731
    refused(CheckpointError, "x.weight is float8", "quantization_config", call=call)


@pytest.mark.parametrize("name, change, parts", [
    ("gptq", {"bits": 3}, ["'gptq' with bits 3", "4 is"]),
    ("gptq", {"bits": 8}, ["'gptq' with bits 8"]),
    ("gptq", {"group_size": 24}, ["group_size 24", "multiples of 16 and -1"]),
    ("gptq", {"group_size": None}, ["group_size None"]),
    ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format 'marlin'", "'gptq' and 'gptq_v2' are"]),
    ("awq-16", {"version": "gemv"}, ["'awq' with version 'gemv'", "'gemm' is"]),
    ("awq-16", {"zero_point": False}, ["zero_point False"]),
    ("fp8-block", {"fmt": "e5m2"}, ["'fp8' with fmt 'e5m2'"]),
    ("fp8-channel", {"format": "pack-quantized"}, ["'compressed-tensors' with format 'pack-quantized'"]),
    ("fp8-channel", {"config_groups": {"g": {"weights": {"num_bits": 4}}}}, ["g weights.num_bits 4"]),
    ("gptq", {"quant_method": "bitsandbytes"}, ["'bitsandbytes'", "gptq, awq, fp8", "unquantised"]),
])  # fmt: skip
def test_a_scheme_that_is_not_supported_is_named_with_what_is(
    name: str, change: dict[str, Any], parts: list[str], tmp_path: Path
):
    layer(tmp_path, name)
    configure(tmp_path, change)
    refused(NotSupportedYet, "quant_method", *parts, call=lambda: Checkpoint(tmp_path).scheme)


@pytest.mark.parametrize("name, change, parts", [
    ("fp8-block", {"weight_block_size": [128]}, ["[128]", "two positive numbers"]),
    ("fp8-channel", {"config_groups": {"g": {}}}, ["{'g': {}}", "groups with weights"]),
])  # fmt: skip
def test_a_scheme_that_is_damaged_is_named(
    name: str, change: dict[str, Any], parts: list[str], tmp_path: Path
):
    layer(tmp_path, name)
    configure(tmp_path, change)
    refused(CheckpointError, *parts, call=lambda: Checkpoint(tmp_path).scheme)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_repacking_keeps_neither_the_file_nor_a_dequantised_copy_in_memory(tmp_path: Path):
    """A layer of 4096 × 32768: 64 MB packed, 512 MB as float32; chunks are 4 million numbers."""
    inputs, outputs = 4096, 32768
    shapes = {"qweight": (inputs // 8, outputs), "qzeros": (32, outputs // 8), "scales": (32, outputs)}
    stored = {f"x.{n}": torch.zeros(s, dtype=torch.int32) for n, s in shapes.items()}
    save_file({**stored, "x.scales": stored["x.scales"].half()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config_of("gptq")}))
    del stored
    weight = Weight(Checkpoint(tmp_path), (("x.weight", (outputs, inputs)),))
    weight.quantised()
    before, growth = [resident("RssAnon"), resident("RssFile")], [0, 0]
    for part, low, high in spans(weight):
        piece = part.packed(low, high)
        for i, kind in enumerate(("RssAnon", "RssFile")):
            growth[i] = max(growth[i], resident(kind) - before[i])
        del piece
    assert growth[0] < 64 * 2**20 and growth[1] < 16 * 2**20, growth


def resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])

"""Quantised engines: what stands in the graph is the formula, and the whole decoder stays close."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from rtp_llm.export import qdq
from rtp_llm.export.attention import Eager
from rtp_llm.export.bundle import TensorSpec
from rtp_llm.export.calibrate import calibrate
from rtp_llm.export.checkpoint import Checkpoint
from rtp_llm.export.decoder import Decoder
from rtp_llm.export.families import FAMILIES, Options
from rtp_llm.export.graph import GraphPlan, Writer
from rtp_llm.export.paged_attention.reference import operators
from rtp_llm.export.qdq import Range
from rtp_llm.export.quantize import HalfLinear, swap
from rtp_llm.export.target import target

bfloat16, float8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
PRECISIONS = pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
TOP = {"fp8": 448, "int8": 127, "int4": 7}


def weight_of(array: np.ndarray, rows: int = 6) -> Any:
    """A checkpoint's weight that is read in chunks of a few rows."""
    tensor = torch.from_numpy(array)
    return SimpleNamespace(
        parts=(("", array.shape),), quantised=lambda: [], chunks=lambda elements=0: iter(tensor.split(rows))
    )


def scales_of(weights: np.ndarray, precision: str) -> np.ndarray:
    """float32 [out, in] → scales, as broadcast over [out, in]: bfloat16 of amax / 448, 127 or 7."""
    size = np.abs(weights)
    if precision == "fp8":
        amax = np.full_like(size, size.max())
    elif precision == "int8":
        amax = np.broadcast_to(size.max(1, keepdims=True), size.shape)
    else:
        amax = size.reshape(len(size), -1, 64).max(2).repeat(64, 1)
    scales = (amax / np.float32(TOP[precision])).astype(bfloat16).astype(np.float32)
    return np.where(scales > 0, scales, 1)


def rounded(x: np.ndarray, scales: Any, precision: str) -> np.ndarray:
    """Quantised and dequantised, in float32."""
    top = TOP[precision]
    q = np.clip(x / scales, -top, top)
    q = q.astype(float8).astype(np.float32) if precision == "fp8" else np.rint(q)
    return q * scales


finite = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@PRECISIONS
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), rows=st.integers(1, 10).map(lambda n: 2 * n), blocks=st.integers(1, 2))
def test_stored_weights_times_their_scales_are_the_formula(precision: str, data: Any, rows: int, blocks: int):
    array = data.draw(hnp.arrays(np.float32, (rows, 64 * blocks), elements=finite))
    found = np.zeros(array.shape, np.float32)
    for start, q, scales in qdq.columns(weight_of(array), precision):
        s = scales.float().numpy()
        if precision == "int4":
            s = s.repeat(64, 0)
            assert int(q.abs().max()) <= 7
            packed = qdq.pack(q).numpy()
            unpacked = np.stack([packed & 15, packed >> 4], -1).reshape(q.shape).astype(np.int8)
            np.testing.assert_array_equal(np.where(unpacked > 7, unpacked - 16, unpacked), q.numpy())
        assert scales.dtype == torch.bfloat16 and q.dtype == qdq.STORED[precision]
        found[start : start + q.shape[1]] = (q.float().numpy() * s).T
    expected = rounded(array, scales_of(array, precision), precision)
    np.testing.assert_array_equal(found, expected)
    assert (found[array == 0] == 0).all()


class Model(nn.Module):
    """Two products; the second one's inputs are no whole blocks of int4."""

    EXACT = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 96)
        self.second = nn.Linear(96, 10, bias=False)
        self.head = nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


RANGES = {"first": Range(5.0, 1.0), "second": Range(7.0, 1.0)}


@pytest.fixture(scope="module")
def values() -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    weights = {
        "first.weight": random.normal(size=(96, 128)) * 0.1,
        "first.bias": random.normal(size=96),
        "second.weight": random.normal(size=(10, 96)) * 0.1,
        "head.weight": random.normal(size=(4, 10)) * 0.3,
    }
    x = random.normal(size=(9, 128)).astype(np.float32)
    x[2, 3] = 9.0  # outside the calibrated range
    return {n: w.astype(np.float32) for n, w in weights.items()}, x


def written(precision: str, weights: dict[str, np.ndarray], folder: Path) -> Path:
    graph = GraphPlan(
        make=Model, root="", weights={n: weight_of(w) for n, w in weights.items()}, constants={},
        inputs=[TensorSpec("x", "float32", ["N", 128])], outputs=[TensorSpec("y", "float32", ["N", 4])],
        precision=precision, transposed=False, kind="engine", ranges=RANGES,
    )  # fmt: skip
    graph.write(folder, "model", Writer(graph.bytes, lambda _: None))
    return folder / "model.onnx"


def formula(precision: str, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The graph in NumPy, in float32 but for weights: those of the head, and of int4's second layer, are
    bfloat16, the others on their type's grid."""
    for name in ("first", "second", "head"):
        w = weights[f"{name}.weight"]
        if name == "head" or (precision == "int4" and name == "second"):
            w = w.astype(bfloat16).astype(np.float32)
        else:
            w = rounded(w, scales_of(w, precision), precision)
            if precision != "int4":
                scale = np.float32(RANGES[name].amax / TOP[precision]).astype(bfloat16)
                x = rounded(x, scale.astype(np.float32), precision)
        x = x @ w.T + weights.get(f"{name}.bias", 0)
    return x


def as_float32(path: Path) -> bytes:
    """The same graph with bfloat16 replaced by float32, for which ONNX Runtime has CPU kernels."""
    model = onnx.load(path)
    for weight in list(model.graph.initializer):
        if weight.data_type == TensorProto.BFLOAT16:
            array = numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model.SerializeToString()


@PRECISIONS
def test_onnx_runtime_computes_the_formula(precision: str, values: Any, tmp_path: Path):
    weights, x = values
    path = written(precision, weights, tmp_path)
    options = ort.SessionOptions()  # its own int8 kernels would round the second layer's input elsewhere
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(as_float32(path), options, providers=["CPUExecutionProvider"])
    expected = formula(precision, weights, x)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=0, atol=1e-4)
    # and as it stands, in bfloat16: near, as a number may fall on the next step of its grid
    [found] = ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert found.dtype == np.float32
    assert cosine(found, expected) > 0.998


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@PRECISIONS
def test_scales_are_constants_of_bfloat16_and_products_read_it(
    precision: str, values: Any, tmp_path: Path
):
    """What TensorRT asks of a strongly typed graph: see qdq.py."""
    path = written(precision, values[0], tmp_path)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    constants = {w.name: w for w in model.graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    kind = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8, "int4": TensorProto.INT4}[precision]
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 2  # no zero point
            assert constants[node.input[1]].data_type == TensorProto.BFLOAT16
            small = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            assert kind == (constants[small].data_type if small in constants else types[small])
        if node.op_type == "MatMul":
            assert types[node.output[0]] == TensorProto.BFLOAT16
    for name, seen in RANGES.items():
        if precision != "int4":
            found = numpy_helper.to_array(constants[f"{name}.input_scale"])
            assert found == np.float32(seen.amax / TOP[precision]).astype(bfloat16)


def test_int8_leaves_layers_whose_inputs_have_outliers_to_bfloat16():
    ranges = {"first": Range(qdq.LIMIT, 1.0), "second": Range(qdq.LIMIT * 1.01, 1.0)}
    model = Model()
    stored = swap(model, "int8", "engine", ranges=ranges)
    assert stored == {
        "first.weight": "qdq-int8",
        "second.weight": "transposed",
        "head.weight": "transposed",
    }
    assert type(model.second) is HalfLinear and model.second.weight.dtype == torch.bfloat16
    assert swap(Model(), "fp8", "engine", ranges=ranges)["second.weight"] == "qdq-fp8"


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_layer_that_calibration_has_not_seen_is_an_error(precision: str):
    with pytest.raises(ValueError, match="range of each layer's inputs"):
        swap(Model(), precision, "engine", ranges={"first": RANGES["first"]})


# --------------------------------------------------------------------------------- a whole decoder


LEAST = {"bf16": 0.9999, "fp8": 0.998, "int8": 0.998, "int4": 0.98}


@pytest.fixture(scope="module")
def calibrated(sample_llava: Path) -> tuple[Any, dict[str, Range]]:
    plan = FAMILIES["llava"].plan(Checkpoint(sample_llava), Options())
    return plan, calibrate(plan)[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", LEAST)
def test_an_exported_decoders_logits_are_close_to_float32(precision: str, calibrated: Any, tmp_path: Path):
    """The sample checkpoint's graph for TensorRT, run in ONNX's reference evaluator."""
    plan, ranges = calibrated
    graph = GraphPlan.of_decoder(plan, target("tensorrt"), precision)
    graph.ranges = ranges
    graph.write(tmp_path, "decoder", Writer(graph.bytes, lambda _: None))
    decoder = Decoder(plan.decoder).eval().requires_grad_(False)
    for name, weight in plan.decoder_weights.items():
        decoder.get_parameter(name).copy_(weight.read())
    ids = torch.tensor(plan.tokenizer.encode("Hello, what is this? def f(x): return x").ids)
    n = len(ids)
    expected = decoder(ids, None, Eager(decoder, torch.arange(n), [n]))

    feeds: dict[str, np.ndarray] = {
        "input_ids": ids.numpy(), "image_embeds": np.zeros((1, plan.decoder.hidden_size), np.float32),
        "rope_rows": np.arange(n), "logits_rows": np.arange(n),
        "cumulative_sequence_length": np.array([0, n], np.int32), "past_seqlens": np.zeros(1, np.int32),
        "block_table": np.array([[0, 1, 2, 3]], np.int32), "attention_metadata": np.array([n, n], np.int32),
    }  # fmt: skip
    for spec in graph.inputs:
        if spec.name.startswith(("key_cache", "value_cache")):
            feeds[spec.name] = np.zeros((4, *spec.shape[1:]), bfloat16)
    model = ReferenceEvaluator(str(tmp_path / "decoder.onnx"), new_ops=operators())
    found = model.run(["logits"], {s.name: feeds[s.name] for s in graph.inputs})[0]
    assert found.dtype == np.float32
    assert cosine(found, expected.numpy()) > LEAST[precision]

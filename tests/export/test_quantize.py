"""Weights of 8 and 4 bits: what is packed is what ONNX Runtime computes with."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from rtp_llm.export.graph import Writer
from rtp_llm.export.quantize import (
    BLOCKS,
    CUT,
    QuantEmbedding,
    QuantLinear,
    RowsLinear,
    TokenLinear,
    TransposedLinear,
    block_of,
    dequantize,
    fill,
    int8_columns,
    quantize,
    quantize_rows,
    rotated,
    swap,
)
from rtp_llm.runtime.backends.onnx import set_products

finite = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 300)), elements=finite)
both = pytest.mark.parametrize("bits", [4, 8])


def unpack(
    packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: int, bits: int
) -> np.ndarray:
    """MatMulNBits' formula, one number after another."""
    found = np.zeros((packed.shape[0], columns), np.float32)
    for row in range(packed.shape[0]):
        for column in range(columns):
            block, place = divmod(column, block_of(columns, bits))
            if bits == 8:
                q, zero = int(packed[row, block, place]), int(zeros[row, block])
            else:
                q = int(packed[row, block, place // 2]) >> 4 * (place % 2) & 15
                zero = int(zeros[row, block // 2]) >> 4 * (block % 2) & 15
            found[row, column] = np.float32(q - zero) * scales[row, block]
    return found


@both
@settings(max_examples=40, deadline=None, derandomize=True)
@given(array=matrices)
def test_dequantising_is_the_operators_formula(bits: int, array: np.ndarray):
    packed, scales, zeros = quantize(torch.from_numpy(array.copy()), bits)
    block = block_of(array.shape[1], bits)
    blocks = -(-array.shape[1] // block)
    assert packed.dtype == zeros.dtype == torch.uint8 and scales.dtype == torch.float32
    assert packed.shape == (len(array), blocks, block * bits // 8)
    assert scales.shape == (len(array), blocks)
    assert zeros.shape == (len(array), -(-blocks * bits // 8))
    found = dequantize(packed, scales, zeros, array.shape[1], bits)
    expected = unpack(packed.numpy(), scales.numpy(), zeros.numpy(), array.shape[1], bits)
    np.testing.assert_array_equal(found.numpy(), expected)


@both
@settings(max_examples=100, deadline=None, derandomize=True)
@given(array=matrices)
def test_a_weight_moves_by_a_step_at_most_beside_what_the_range_is_cut_by(bits: int, array: np.ndarray):
    packed, scales, zeros = quantize(torch.from_numpy(array.copy()), bits)
    found = dequantize(packed, scales, zeros, array.shape[1], bits).numpy()
    size = block_of(array.shape[1], bits)
    for start in range(0, array.shape[1], size):
        block = array[:, start : start + size]
        low, high = block.min(1, keepdims=True).clip(max=0), block.max(1, keepdims=True).clip(min=0)
        step = (high - low) / (2**bits - 1)
        # half a step of rounding, and half of the zero point where a value is cut at the range's end
        kept = np.clip(block, low * CUT[bits], high * CUT[bits])
        assert (np.abs(found[:, start : start + size] - kept) <= step * 1.001).all()
    assert (found[array == 0] == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 5))
def test_values_that_eight_bits_can_hold_come_back_exactly(data, rows, blocks):
    """Blocks that use their whole range: quantising is then undone without an error."""
    shape = (rows, blocks, BLOCKS[8])
    q = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 255)))
    q[..., 0], q[..., 1] = 0, 255
    zero = data.draw(hnp.arrays(np.int64, (rows, blocks, 1), elements=st.integers(0, 255)))
    weights = ((q - zero) * 2.0**-5).astype(np.float32).reshape(rows, -1)
    packed = quantize(torch.from_numpy(weights), 8)
    np.testing.assert_array_equal(dequantize(*packed, weights.shape[1], 8).numpy(), weights)


@pytest.mark.parametrize(
    "columns, blocks", [(2048, (128, 64)), (960, (64, 64)), (352, (32, 32)), (50, (128, 64))]
)
def test_a_block_divides_a_row_where_one_of_32_and_more_does(columns: int, blocks: tuple[int, int]):
    assert (block_of(columns, 4), block_of(columns, 8)) == blocks


@pytest.mark.parametrize("bits, error", [(4, 0.097), (8, 0.0054)])
def test_the_error_on_gaussian_weights_is_what_the_module_says(bits: int, error: float):
    torch.manual_seed(0)
    weights = torch.randn(512, 1024)
    found = dequantize(*quantize(weights, bits), 1024, bits)
    assert float((found - weights).norm() / weights.norm()) == pytest.approx(error, rel=0.02)


def run(op: str, attributes: dict, inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray]):
    """One com.microsoft node in ONNX Runtime; inputs named "" are absent."""
    names = [*inputs, *constants]
    order = attributes.pop("order", names)
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in inputs.items()}
    node = helper.make_node(op, order, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@both
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("columns", [32, 64, 96, 160, 20, 50, 72, 1000])
def test_onnx_runtimes_matmul_computes_with_the_dequantised_weights(bits, rows, columns):
    """Level 4 rounds each block of the input to 8 bits: at most max|x| / 127 / 2 on every element."""
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(48, columns, generator=generator) + 0.3
    x = torch.randn(rows, columns, generator=generator)
    packed, scales, zeros = quantize(weights, bits)
    block = block_of(columns, bits)
    attributes = {"N": 48, "K": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
    constants = {"w": packed.numpy(), "s": scales.numpy(), "z": zeros.numpy()}
    found = run("MatMulNBits", attributes, {"x": x.numpy()}, constants)
    dequantised = dequantize(packed, scales, zeros, columns, bits)
    expected = x @ dequantised.t()
    bound = torch.zeros_like(expected)
    for xs, ws in zip(*(m.split(block, 1) for m in (x, dequantised)), strict=True):
        bound += xs.abs().amax(1, keepdim=True) / 254 * ws.abs().sum(1)
    worst = (torch.from_numpy(found) - expected).abs() / (bound * 1.01 + 1e-4)
    assert float(worst.max()) < 1
    # and by far better on average: the bound is no excuse for a wrong nibble
    error = np.square(found - expected.numpy()).mean() ** 0.5
    assert error < 0.015 * float(expected.square().mean()) ** 0.5


@both
@pytest.mark.parametrize("columns", [64, 128, 192])
def test_onnx_runtimes_gather_gives_the_dequantised_rows(bits: int, columns: int):
    weights = torch.randn(17, columns, generator=torch.Generator().manual_seed(1))
    packed, scales, zeros = quantize(weights, bits)
    stored = packed.flatten(1).numpy()  # as QuantEmbedding shapes it
    ids = np.array([3, 0, 16, 3], np.int64)
    block = block_of(columns, bits)
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    constants = {"w": stored, "s": scales.numpy(), "z": zeros.numpy()}
    attributes["order"] = ["w", "ids", "s", "z"]
    found = run("GatherBlockQuantized", attributes, {"ids": ids}, constants)
    expected = dequantize(packed, scales, zeros, columns, bits)[ids]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)


def chunked(rows: Tensor, size: int) -> Any:
    """A checkpoint's Weight, in chunks of so many rows."""
    return SimpleNamespace(chunks=lambda _: iter(rows.split(size)))


def token_linear(weights: Tensor, bias: Tensor | None, file: Path) -> None:
    """The layer as it is in a bundle's graph: x [T, in] → y."""
    module = TokenLinear(nn.Linear(weights.shape[1], len(weights), bias is not None))
    for start, q, scales in int8_columns(chunked(weights, 7)):
        module.weight[:, start : start + len(scales)] = q
        module.scales[start : start + len(scales)] = scales
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    tokens = {"x": {0: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(
        module, (torch.zeros(5, weights.shape[1]),), file, input_names=["x"], output_names=["y"],
        dynamic_shapes=tokens, dynamo=True, opset_version=23, verbose=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A layer's graph, its weights and bias, and tokens: outliers, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    weights, bias = torch.randn(48, 200, generator=generator), torch.randn(48, generator=generator)
    weights[7] = 0
    x = torch.randn(9, 200, generator=generator) * 10.0 ** torch.arange(-4, 5).unsqueeze(1)
    x[2, 5] = 1e6
    x[3] = 0
    file = tmp_path_factory.mktemp("tokens") / "layer.onnx"
    token_linear(weights, bias, file)
    return file, weights, bias, x.numpy()


def turn_of(size: int) -> np.ndarray:
    """Hadamard's matrix behind random signs, orthogonal."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size)
    hadamard = reduce(np.kron, [np.array([[1, 1], [1, -1]])] * int(np.log2(size)))
    return np.diag(signs) @ hadamard / size**0.5


def turned(rows: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return (rows.reshape(len(rows), -1, len(turn)) @ turn).reshape(rows.shape)


def session_of(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    set_products(options)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def test_inputs_are_rounded_per_token_and_products_summed_exactly(tokens):
    file, weights, bias, x = tokens
    found = session_of(file).run(None, {"x": x})[0]
    exact = x.astype(np.float64) @ weights.numpy().T.astype(np.float64)
    turn = turn_of(8)  # the largest power of two that divides 200
    x, w = (turned(rows.astype(np.float64), turn) for rows in (x, weights.numpy()))
    steps = np.abs(w).max(1, keepdims=True) / 127
    largest = np.abs(x).max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        q = np.nan_to_num(np.rint(x / largest * 127))
        whole = np.nan_to_num(np.rint(w / steps))
    expected = q.astype(np.float64) @ whole.T * steps.T * (largest / 127)
    for row, value in enumerate(expected):
        size = np.abs(value).max()
        # a number that lies half-way between two may go to either
        np.testing.assert_allclose(found[row] - bias.numpy(), value, rtol=0, atol=2e-3 * size + 1e-5)
    np.testing.assert_array_equal(found[3], bias.numpy())
    np.testing.assert_array_equal(found[:, 7], np.broadcast_to(bias[7].numpy(), 9))
    kept = [0, 1, 4, 5, 6, 7, 8]
    error = np.linalg.norm(expected - exact, axis=1)[kept] / np.linalg.norm(exact, axis=1)[kept]
    assert error.max() < 0.02


def test_a_token_has_the_same_bits_in_any_batch(tokens):
    file, _, _, x = tokens
    session = session_of(file)
    whole = session.run(None, {"x": x})[0]
    for low, high in ((0, 1), (4, 6), (1, 9)):
        np.testing.assert_array_equal(session.run(None, {"x": x[low:high]})[0], whole[low:high])


def test_outliers_cost_a_token_no_more_than_in_blocks():
    """Channels of 20 times the others' size, whose weights are smaller, as trained ones are."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 2048, generator=generator), torch.randn(256, 2048, generator=generator)
    x[:, [3, 700, 1500]] *= 20
    w[:, [3, 700, 1500]] *= 0.05
    exact = x @ w.t()

    def error(x: Tensor, w: Tensor) -> float:
        q, scales = quantize_rows(w, torch.float32)
        step = x.abs().amax(1, keepdim=True) / 127
        return float(((x / step).round() * step @ (q * scales).t() - exact).norm() / exact.norm())

    inputs = x.unflatten(1, (-1, 64))
    step = inputs.abs().amax(2, keepdim=True) / 127
    blocks = ((inputs / step).round() * step).flatten(1) @ dequantize(*quantize(w, 8), 2048, 8).t()
    in_blocks = float((blocks - exact).norm() / exact.norm())
    assert error(rotated(x), rotated(w)) < 1.3 * in_blocks < 0.5 * error(x, w)


def test_chunks_of_columns_are_written_where_they_belong():
    weights = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    file, writer = io.BytesIO(), Writer(1, lambda _: None)
    writer.put_qdq(file, [0, 64 * 30], int8_columns(chunked(weights, 7)), 30, "decoder", "w")
    data = file.getvalue()
    q, scales = quantize_rows(rotated(weights), torch.float32)
    np.testing.assert_array_equal(np.frombuffer(data, np.int8, 64 * 30).reshape(64, 30), q.t())
    np.testing.assert_array_equal(np.frombuffer(data, np.float32, offset=64 * 30), scales[:, 0])


QEMU = shutil.which("qemu-x86_64")


@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user), to be a CPU without VNNI")
def test_products_do_not_overflow_on_a_cpu_without_vnni(tmp_path):
    """ONNX Runtime's fast kernel adds two products in 16 bits there; the backend asks for another one."""
    rng, back = np.random.default_rng(0), turn_of(64).T
    weights, x = (  # all large and positive once they are rotated
        torch.from_numpy(turned(rng.uniform(0.8, 1, shape), back)).float() for shape in ((32, 256), (4, 256))
    )
    token_linear(weights, None, tmp_path / "layer.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    program = (
        "import sys, numpy, onnxruntime\n"
        "from rtp_llm.runtime.backends import onnx\n"
        "options = onnxruntime.SessionOptions()\n"
        "onnx.vnni = lambda: sys.argv[1] != 'ours'\n"
        "onnx.set_products(options)\n"
        "session = onnxruntime.InferenceSession('layer.onnx', options, providers=['CPUExecutionProvider'])\n"
        "numpy.save(sys.argv[1], session.run(None, {'x': numpy.load('x.npy')})[0])\n"
    )
    for which in ("theirs", "ours"):
        command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", program, which]
        subprocess.run(command, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL, timeout=300)
    expected = (x @ weights.t()).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "ours.npy"), expected, rtol=0.01)
    assert np.abs(np.load(tmp_path / "theirs.npy") / expected - 1).max() > 0.5  # or this shows nothing


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Embedding(10, 64)
        self.odd = nn.Embedding(10, 40)
        self.inner = nn.Sequential(nn.Linear(40, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def test_swap_quantises_linears_and_the_embeddings_whose_rows_are_whole_blocks():
    model = Model()
    bias = model.inner[0].bias
    names = ("wide.weight", "inner.0.weight", "inner.2.weight")
    # a table is looked up: 8 bits cost no time
    assert swap(model, "int4") == dict.fromkeys(names, "int4") | {"wide.weight": "int8"}
    assert isinstance(model.wide, QuantEmbedding) and isinstance(model.odd, nn.Embedding)
    assert isinstance(model.inner[0], QuantLinear) and model.inner[0].bias is bias
    assert isinstance(model.inner[1], nn.LayerNorm)
    for module in (model.wide, model.inner[0], model.inner[2]):
        packed, scales, zeros = quantize(torch.randn(module.rows, module.columns), module.bits)
        assert module.weight.numel() == packed.numel()
        assert module.scales.shape == scales.shape and module.zero_points.shape == zeros.shape


class Answering(nn.Module):
    FINE = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(128, 128))
        self.head = nn.Linear(128, 128)


def test_int8_has_small_blocks_where_a_class_wants_them():
    weights = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    model = Answering()
    kinds = {"layers.0.weight": "columns", "head.weight": "int8-16"}
    assert swap(model, "int8") == kinds
    assert isinstance(model.layers[0], TokenLinear)
    stored = quantize(weights, 8, 16)
    shapes = [model.head.weight.shape, model.head.scales.shape, model.head.zero_points.shape]
    assert [x.shape for x in stored] == shapes
    blocks = weights.view(128, -1, 16)
    step = (blocks.amax(2) - blocks.amin(2)) / 255
    torch.testing.assert_close(stored[1], step)
    found = dequantize(*stored, 128, 8)
    assert ((found - weights).abs() <= 0.51 * step.repeat_interleave(16, 1)).all()
    assert swap(Answering(), "int4") == dict.fromkeys(kinds, "int4")


def test_swap_leaves_float32_alone_unless_it_is_to_be_transposed():
    model = Model()
    assert swap(model, "fp32") == {}
    assert isinstance(model.inner[0], nn.Linear)
    linear, x = model.inner[0], torch.randn(2, 5, 40)
    expected = linear(x)
    stored = swap(model, "fp32", transposed=True)
    assert stored == {"inner.0.weight": "transposed", "inner.2.weight": "transposed"}
    new = model.inner[0]
    assert isinstance(new, TransposedLinear)
    with torch.no_grad():
        new.weight.copy_(linear.weight.t())
    torch.testing.assert_close(new(x), expected)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@dtypes
@settings(max_examples=40, deadline=None, derandomize=True)
@given(array=matrices)
def test_a_row_of_int8_has_the_scale_that_its_largest_weight_needs(dtype: torch.dtype, array: np.ndarray):
    array = array.clip(-6e4, 6e4)
    q, scales = quantize_rows(torch.from_numpy(array), dtype)
    amax = np.abs(array).max(1)
    expected = torch.from_numpy(amax / np.float32(127)).to(dtype)
    expected[expected == 0] = 1
    assert q.dtype == torch.int8 and scales.dtype == dtype and torch.equal(scales[:, 0], expected)
    scale = expected.float().numpy()[:, None]
    np.testing.assert_array_equal(q.numpy(), np.clip(np.rint(array / scale), -127, 127))


@dtypes
def test_int8_weights_traced_by_torchscript_load_and_give_nearly_the_float_result(
    dtype: torch.dtype, tmp_path: Path
):
    """8 bits a row move a Gaussian weight by 0.6 % of its size (max|row| / 127 / √12, with maxima of 3 to 4
    spreads), and as much is left to rounding in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).requires_grad_(False)
    x = torch.randn(7, 96)
    expected = model(x)
    weights: dict[str, Any] = {
        name: SimpleNamespace(chunks=p.detach().clone().split(5).__iter__)
        for name, p in model.named_parameters()
    }
    assert swap(model, "int8", "torchscript", dtype=dtype) == {"0.weight": "rows", "2.weight": "rows"}
    assert isinstance(model[0], RowsLinear)
    fill(model, weights, {"0.weight": "rows", "2.weight": "rows"})
    torch.jit.save(torch.jit.trace(model, x[:2]), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    kinds = {b.dtype for n, b in loaded.named_buffers() if n.endswith("weight")}
    assert kinds == {torch.int8}
    found = loaded(x)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.015
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("target", ["engine", "torchscript"])
def test_a_tied_head_is_stored_once_in_16_bits(target: str):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    assert swap(model, "bf16", target) == {}
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.bfloat16
    assert model.head(model.embed(torch.tensor([3]))).dtype == torch.float32


def test_a_cpu_graph_knows_no_16_bits_and_torchscript_in_float32_changes_nothing():
    for target in ("cpu", "torchscript"):
        model = Model()
        assert swap(model, "fp32", target) == {} and isinstance(model.inner[0], nn.Linear)

"""16 bits hold the numbers of real checkpoints: outliers, and what must stay float32."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from rtp_llm.export.attention import rotate, specs
from rtp_llm.export.bundle import TensorSpec
from rtp_llm.export.decoder import Decoder, DecoderConfig, constants
from rtp_llm.export.graph import GraphPlan, Writer
from rtp_llm.export.quantize import HalfLinear, fill, swap, token_scale
from rtp_llm.export.torchscript import PagedOp, Script
from rtp_llm.export.vision import ClipConfig, LlavaVision, QwenVisual

CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=2, head_dim=16,
    max_seq_len=64, eps=1e-6, qkv_bias=True, qk_norm=True,
)  # fmt: skip
TOKENS = 24
IDS = torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(5))
HALVES = pytest.mark.parametrize("precision", ["fp16", "bf16"])
OUTLIERS = pytest.mark.parametrize("outlier", [1e3, 1e4, 1e5])
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # rounding to nearest moves a number by half of it at most


class Prompt(nn.Module):
    """The decoder on one prompt: ids [T], image rows [N, hidden] → logits. Attention in plain torch, its
    operands in `dtype` as those of the caches are; None: as they come."""

    dtype: torch.dtype | None = None

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(CONFIG)

    def forward(self, *tensors: Tensor) -> Tensor:
        ids, images = tensors
        rows = torch.arange(len(ids))
        cos, sin = F.embedding(rows, self.decoder.cos), F.embedding(rows, self.decoder.sin)
        hidden = rows.unsqueeze(0) > rows.unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kind = self.dtype or q.dtype
            q, k, v = (x.unflatten(-1, (-1, 16)) for x in (q, k, v))
            q, k = rotate(q, cos, sin) / 4, rotate(k, cos, sin)
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            q, k, v = (x.transpose(0, 1).to(kind) for x in (q, k, v))
            scores = (q @ k.transpose(1, 2)).to(cos.dtype).masked_fill(hidden, float("-inf"))
            return (scores.softmax(-1).to(kind) @ v).transpose(0, 1).flatten(1).to(cos.dtype)

        return self.decoder(ids, images, attend)


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the sizes that trained ones have: products keep the spread of what they read."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.detach().copy_(0.1 * noise + (1 if "bias" not in name else 0))
        elif "embed" in name or "query" in name:
            p.detach().copy_(noise)
        else:
            p.detach().copy_(noise / p[0].numel() ** 0.5)
    return module.eval().requires_grad_(False)


def vision(family: str) -> nn.Module:
    if family == "qwen_vl":
        return random(QwenVisual(2, 56, 3, 4.0, 128, 14, 32))
    return random(LlavaVision(ClipConfig(32, 96, 4, 2, 56, 14), 64))


def case(name: str) -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    """A module, its inputs, and the products that go down into the residual stream."""
    if name == "decoder":
        images = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
        ids = IDS.clone()
        ids[2:5] = 97 + torch.arange(3)
        return random(Prompt()), (ids, images), [f"decoder.layers.{i}" for i in range(3)]
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=generator)
    if name == "qwen_vl":
        return vision(name), (pixels,), [f"transformer.resblocks.{i}" for i in range(3)]
    return vision(name), (pixels,), [f"vision_model.encoder.layers.{i}" for i in range(3)]


CASES = pytest.mark.parametrize("name", ["decoder", "qwen_vl", "llava"])
LINEARS = {  # into the middle of the block, out of it, and out of attention
    "decoder": ("gate_up", "down", "o"),
    "qwen_vl": ("mlp.c_fc", "mlp.c_proj", "attn.out_proj"),
    "llava": ("mlp.fc1", "mlp.fc2", "self_attn.out_proj"),
}


def watched(module: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Inputs and outputs of submodules in one run."""
    seen: dict[str, Any] = {}
    hooks = [
        module.get_submodule(n).register_forward_hook(
            lambda m, args, out, n=n: seen.__setitem__(n, (args[0], out))
        )
        for n in names
    ]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def with_outliers(name: str, outlier: float) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """The module with a few rows of its weights so large that, in the first block, what `down` reads and
    writes reaches `outlier`, and what `o` writes 1,000; its inputs; and its outputs in float64."""
    module, inputs, blocks = case(name)
    middle, down, out = (f"{blocks[0]}.{linear}" for linear in LINEARS[name])

    def largest(what: str, place: int) -> Tensor:
        """Of each channel of what a layer reads (0) or writes (1)."""
        return watched(module, [what], inputs)[what][place].abs().flatten(0, -2).amax(0)

    def scale(what: str, channels: list[int], factor: float) -> None:
        layer = module.get_submodule(what)
        layer.weight[channels] *= factor
        if layer.bias is not None:
            layer.bias[channels] *= factor

    scale(out, [5], float(1e3 / largest(out, 1)[5]))  # trained attention reads no large numbers
    size, top = largest(down, 0).topk(2)
    channels = top.tolist()
    if name == "decoder":
        scale(middle, channels, float(outlier / size[0]) ** 0.5)  # the gate
        scale(middle, [96 + c for c in channels], float(outlier / largest(down, 0)[channels].max()))
    else:  # here what is read was a 16-bit result, which must be finite itself, of either sign
        for _ in range(2):  # the activation is linear only in the end
            limit = 6e4 / largest(middle, 1)[channels].max()
            scale(middle, channels, float(min(limit, outlier / largest(down, 0)[channels].max())))
    # as trained, what is written is no larger than what is read
    module.get_submodule(down).weight[:, channels] *= 2 * float(size[0] / largest(down, 0)[channels].max())
    scale(down, [3, 17], float(outlier / largest(down, 1)[[3, 17]].max()))
    assert largest(down, 0).max() > 0.9 * min(outlier, 1e4)
    assert largest(down, 1).max() > 0.9 * outlier and largest(blocks[1], 0).max() > 0.9 * outlier
    exact = copy.deepcopy(module).double()
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    return module, inputs, exact(*doubled)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """The parameters as a plan has them: read in chunks of rows, here of few."""

    def weight(p: Tensor) -> Any:
        return SimpleNamespace(
            parts=(("", tuple(p.shape)),),
            quantised=lambda: [],
            read=lambda: p.clone(),
            chunks=lambda elements=0: iter(p.split(7)),
        )

    return {n: weight(p.detach()) for n, p in module.named_parameters(remove_duplicate=False)}


def swapped(module: nn.Module, precision: str, target: str = "torchscript") -> nn.Module:
    new = copy.deepcopy(module)
    new.dtype = HALF[precision]
    stored = swap(new, precision, target)
    fill(new, weights_of(module), stored)
    return new


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def cosine(found: Tensor, expected: Tensor) -> float:
    return float(nn.functional.cosine_similarity(found.double().flatten(), expected.flatten(), 0))


floats = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=floats))
def test_a_tokens_scale_is_a_power_of_two_that_brings_its_largest_number_to_one(x: np.ndarray):
    scale = token_scale(torch.from_numpy(x)).numpy()
    mantissa, _ = np.frexp(scale)
    assert (mantissa == 0.5).all()
    largest = np.abs(x * scale).max(1)
    # at an exact power of two the logarithm may round to either side
    assert (largest[x.any(1)] >= 0.5 * 0.999).all() and (largest <= 1.001).all()
    np.testing.assert_array_equal(x * scale / scale, x)
    # scaling moves no number on float16's grid, but for those far below the largest
    held = np.abs(x * scale) >= 2.0**-14
    fits = np.abs(x) < 60000
    small = held & fits & (np.abs(x) >= 2.0**-14)
    a, b = (x * scale).astype(np.float16).astype(np.float32) / scale, x.clip(-6e4, 6e4).astype(np.float16)
    np.testing.assert_array_equal(a[small], b[small].astype(np.float32))


@CASES
@HALVES
@OUTLIERS
def test_outliers_of_real_checkpoints_leave_16_bits_finite_and_close(
    name: str, precision: str, outlier: float
):
    """What rounding does to the result is the module's own affair, and float32's error measures it: with
    16-bit operands it may be larger by the ratio of the units (2^16 for bfloat16), times two as a product
    rounds its operands too."""
    module, inputs, expected = with_outliers(name, outlier)
    bound = 2 * relative(module(*inputs), expected) * UNIT[precision] / 2.0**-24
    assert bound < 0.25
    found = swapped(module, precision)(*inputs)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    assert relative(found, expected) < bound
    assert cosine(found, expected) > 1 - bound**2 / 2


@CASES
def test_without_float32_sums_and_scaled_products_float16_is_not_finite(name: str):
    """So the test above can fail: outliers of 1e5 overflow a module that is float16 throughout, and one
    whose residual products do not scale their input."""
    module, inputs, _ = with_outliers(name, 1e5)
    halves = [x.half() if x.is_floating_point() else x for x in inputs]
    assert not copy.deepcopy(module).half()(*halves).isfinite().all()
    unscaled = swapped(module, "fp16")
    for child in unscaled.modules():
        if isinstance(child, HalfLinear):
            child.wide = False
    assert not unscaled(*inputs).isfinite().all()


@HALVES
@OUTLIERS
def test_the_fused_layers_of_torchscript_hold_them_as_well(precision: str, outlier: float):
    module, (ids, images), expected = with_outliers("decoder", outlier)
    bound = 2 * relative(module(ids, images), expected) * UNIT[precision] / 2.0**-24
    kind = str(HALF[precision]).removeprefix("torch.")
    inputs, _ = specs("paged", CONFIG, kind, metadata=False)
    script = Script(copy.deepcopy(module.decoder), PagedOp, inputs)
    stored = swap(script, precision, "torchscript")
    fill(script, weights_of(module), stored)
    T = len(ids)
    given = {
        "input_ids": ids, "image_embeds": images, "rope_rows": torch.arange(T),
        "cumulative_sequence_length": torch.tensor([0, T], dtype=torch.int32),
        "past_seqlens": torch.zeros(1, dtype=torch.int32),
        "block_table": torch.tensor([[1, 0]], dtype=torch.int32), "logits_rows": torch.arange(T),
    }  # fmt: skip
    caches = [torch.full((2, 16, 2, 16), torch.nan, dtype=HALF[precision]) for _ in range(6)]
    found = script(*given.values(), *caches)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    assert relative(found, expected) < bound


# ------------------------------------------------------------------------------------ in the graphs


def graph_of(name: str, precision: str, folder: Path, module: nn.Module, inputs: tuple[Tensor, ...]) -> Path:
    """The module written as an export writes it for an engine."""
    specs = [TensorSpec("pixels", "uint8", ["N", 56, 56, 3])]
    root, tables, weights = "", {}, weights_of(module)
    if name == "decoder":
        specs = [TensorSpec("ids", "int64", [len(IDS)]), TensorSpec("images", "float32", ["N", 64])]
        root, tables = "decoder.", constants(CONFIG)
        weights = {n.removeprefix(root): w for n, w in weights.items()}

    def make() -> nn.Module:
        new = Prompt() if name == "decoder" else vision(name)
        new.dtype = HALF.get(precision)
        return new

    graph = GraphPlan(
        make=make, root=root, weights=weights, constants=tables, inputs=specs,
        outputs=[TensorSpec("y", "float32", list(module(*inputs).shape))],
        precision=precision, transposed=False, kind="engine",
    )  # fmt: skip
    graph.write(folder, name, Writer(graph.bytes, lambda _: None))
    return folder / f"{name}.onnx"


FLOAT32 = {  # of these every floating-point input and output
    "RMSNormalization", "LayerNormalization", "Softmax", "Exp", "Erf", "Gelu", "Sigmoid", "Tanh", "Add",
    "Sub", "Div", "Mul", "ReduceMean", "Sqrt", "Reciprocal",
}  # fmt: skip


def assert_products_alone_are_16_bit(model: ir.Model, precision: str) -> None:
    half = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    kinds = set()
    for node in model.graph:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        types = {v.dtype for v in values if v.dtype is not None and v.dtype.is_floating_point()}
        kinds.add(node.op_type)
        if node.op_type in FLOAT32:
            assert types <= {ir.DataType.FLOAT}, node
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            assert types == {half}, node
    assert {"MatMul", "Softmax"} <= kinds and kinds & {"RMSNormalization", "LayerNormalization"}
    weights = {n: v for n, v in model.graph.initializers.items() if n.endswith((".weight", ".bias"))}
    assert weights
    for name, value in weights.items():
        matrix = len(value.shape) > 1 and "position_embedding" not in name
        assert value.dtype == (half if matrix else ir.DataType.FLOAT), name


@CASES
@HALVES
def test_in_the_graph_products_are_16_bit_and_everything_else_float32(
    name: str, precision: str, tmp_path: Path
):
    """And the file computes what the swapped torch module does, outliers included: float16 in ONNX Runtime,
    bfloat16, which its CPU kernels lack, in ONNX's reference evaluator."""
    module, inputs, exact = with_outliers(name, 1e4)
    path = graph_of(name, precision, tmp_path, module, inputs)
    model = ir.load(path)
    assert_products_alone_are_16_bit(model, precision)
    feeds = {v.name: x.numpy() for v, x in zip(model.graph.inputs, inputs, strict=True)}
    if precision == "fp16":
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        session = ReferenceEvaluator(str(path))
    found = torch.from_numpy(session.run(None, feeds)[0])
    expected = swapped(module, precision, "engine")(*inputs)
    bound = 2 * relative(module(*inputs), exact) * UNIT[precision] / 2.0**-24
    assert relative(found, expected.double()) < bound
    assert relative(found, exact) < bound

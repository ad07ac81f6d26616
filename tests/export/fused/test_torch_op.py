"""The fused ops in torch: on a CPU they equal the specification; their CUDA form takes what graphs pass."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.export.fused import reference, torch_op

from ..paged_attention.cases import TYPES, array, cases, tensor
from .cases import EPS, Attention, Norm, attentions, kinds, norms, tokens

FEW = settings(derandomize=True, deadline=None, max_examples=60)
UNIT = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half of the last place, relative


def tensors(arrays: list[np.ndarray | None]) -> list[torch.Tensor | None]:
    return [None if x is None else tensor(x) for x in arrays]


def rounded(got: torch.Tensor, want: np.ndarray, dtype: str) -> None:
    """`got` is `want` rounded once to `dtype`, but for float32's own error."""
    assert array(got).dtype == TYPES[dtype]
    size = np.abs(want).max()
    np.testing.assert_allclose(
        array(got).astype(float), want, rtol=1.01 * UNIT[dtype], atol=2e-6 * size + 1e-7
    )


@FEW
@given(norms((1, 7, 64, 1000)), kinds)
def test_add_rms_norm_is_the_sum_and_its_norm_rounded_once(case: Norm, dtype: str) -> None:
    total, normed = torch_op.add_rms_norm(*tensors(case.arrays()), EPS, getattr(torch, dtype))
    want = reference.add_rms_norm(*case.arrays(), EPS)
    rounded(total, want[0], "float32")
    rounded(normed, want[1], dtype)


@FEW
@given(attentions(cases((32, 80), dtypes=("float32", "float16", "bfloat16"))))
def test_qkv_attention_is_rope_and_paged_attention(case: Attention) -> None:
    a = case.attributes
    given = tensors(case.arrays())
    names = ("num_heads", "kv_num_heads", "eps", "scale", "local_window_size")
    out = torch_op.qkv_attention(*given, *(a[name] for name in names))
    want = reference.qkv_attention(*case.arrays(), **a)
    unit = UNIT[case.step.dtype]
    for got, expected in zip((out, *given[7:9]), want, strict=True):
        got, expected = array(got).astype(float), expected.astype(float)
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        error = np.linalg.norm(np.nan_to_num(got - expected))
        assert error <= 8 * unit * np.linalg.norm(np.nan_to_num(expected))


@FEW
@given(tokens, st.sampled_from([1, 5, 64]), kinds, kinds, st.booleans())
def test_silu_mul_is_rounded_once(T: int, width: int, given: str, dtype: str, biased: bool) -> None:
    rng = np.random.default_rng(width)
    value = (5 * rng.standard_normal((T, 2 * width))).astype(TYPES[given])
    bias = rng.standard_normal(2 * width, np.float32) if biased else None
    out = torch_op.silu_mul(*tensors([value, bias]), getattr(torch, dtype))
    rounded(out, reference.silu_mul(value, bias), dtype)


@FEW
@given(tokens, st.sampled_from([1, 5, 64]), kinds, st.integers(-30, 15))
def test_token_scaled_divides_by_the_power_of_two_above_the_largest(
    T: int, width: int, dtype: str, exponent: int
) -> None:
    x = np.random.default_rng(width).uniform(-1, 1, (T, width)) * 2.0**exponent
    x[:, -1] = 1.5 * 2.0**exponent
    x = x.astype(TYPES[dtype])
    out, scale = torch_op.token_scaled(tensor(x))
    want = reference.token_scaled(x)
    np.testing.assert_array_equal(scale, want[1])
    np.testing.assert_array_equal(out, want[0].astype(np.float16))


@pytest.mark.parametrize("name", torch_op.SCHEMAS)
def test_an_op_its_schema_and_its_launcher_have_the_same_arguments(name: str) -> None:
    from rtp_llm.export.fused import kernels

    schema = getattr(torch.ops.rtp_llm, name).default._schema
    for function in (getattr(torch_op, name), getattr(kernels, name)):
        assert list(inspect.signature(function).parameters) == [a.name for a in schema.arguments]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rtp_llm::{name}", "CUDA")


def test_importing_it_again_is_harmless() -> None:
    importlib.reload(torch_op)


@pytest.mark.parametrize("precision, bound, ops", [("fp32", 1e-5, 2 * 4), ("fp16", 5e-3, 2 * 6 - 1)])
def test_a_decoder_traced_over_the_kernels_computes_what_it_does_without_them(
    precision: str, bound: float, ops: int
) -> None:
    """Through torch's dispatcher to the launchers, as on CUDA, here to the interpreter. (The last layer's
    `down` stands alone, and scales its operand itself.)"""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_decoder.py")
    command: list[Any] = [sys.executable, script, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    error, calls = done.stdout.split()[-2:]
    assert float(error) < bound and int(calls) == ops

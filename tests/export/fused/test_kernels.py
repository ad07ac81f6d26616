"""The fused kernels: under the interpreter they equal the specification; they compile for every target."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rtp_llm.export.fused import kernels, reference
from rtp_llm.export.paged_attention.reference import cache_write

from ..paged_attention.cases import TYPES, Case, cases
from ..paged_attention.test_kernels import TARGETS, interpreted, stop_interpreter  # noqa: F401
from .cases import EPS, Attention, Norm, attentions, kinds, norms, tokens

FEW = settings(derandomize=True, deadline=None, max_examples=12)
# relative: half of the last place; of bfloat16 the whole, as the interpreter cuts where a GPU rounds
UNIT = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-7}

def rounded(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """`got` is `want` rounded once to `dtype`, but for float32's own error."""
    assert got.dtype == TYPES[dtype]
    size = np.nanmax(np.abs(want), initial=0)
    np.testing.assert_allclose(got.astype(float), want, rtol=1.01 * UNIT[dtype], atol=2e-6 * size + 1e-7)


@FEW
@given(norms((1, 7, 64, 100, 1000)), kinds)
def test_add_rms_norm_is_the_sum_and_its_norm_rounded_once(case: Norm, dtype: str) -> None:
    (total, normed), _ = interpreted("add_rms_norm", *case.arrays(), eps=EPS, dtype=getattr(torch, dtype))
    want = reference.add_rms_norm(*case.arrays(), EPS)
    rounded(total, want[0], "float32")
    rounded(normed, want[1], dtype)


@FEW
@given(tokens, st.sampled_from([1, 5, 64, 1100]), kinds, kinds, st.booleans())
def test_silu_mul_is_rounded_once(T: int, width: int, given: str, dtype: str, biased: bool) -> None:
    rng = np.random.default_rng(width)
    value = (5 * rng.standard_normal((T, 2 * width))).astype(TYPES[given])
    value[0, :2] = -100, 80  # where the exponential leaves float32
    bias = rng.standard_normal(2 * width, np.float32) if biased else None
    (out,), _ = interpreted("silu_mul", value, bias, dtype=getattr(torch, dtype))
    rounded(out, reference.silu_mul(value, bias), dtype)


@FEW
@given(tokens, st.sampled_from([1, 5, 64, 9000]), kinds, st.integers(-30, 15), st.booleans())
def test_token_scaled_divides_by_the_power_of_two_above_the_largest(
    T: int, width: int, dtype: str, exponent: int, exact: bool
) -> None:
    x = np.random.default_rng(width).uniform(-1, 1, (T, width)) * 2.0**exponent
    x[:, -1] = (2.0 if exact else 1.5) * 2.0**exponent  # at powers of two, too
    x = x.astype(TYPES[dtype])
    x[1:2] = 0
    (out, scale), _ = interpreted("token_scaled", x)
    want = reference.token_scaled(x)
    np.testing.assert_array_equal(scale, want[1])
    assert scale.shape == (T, 1) and out.dtype == np.float16
    np.testing.assert_array_equal(out, want[0].astype(np.float16))


def check_rope(case: Attention, before: int = 0) -> None:
    heads = {k: case.attributes[k] for k in ("num_heads", "kv_num_heads", "eps")}
    *vectors, keys, values, cumulative, past, table = case.arrays()
    (query,), after = interpreted("rope_write", *case.arrays(), before=before, **heads)
    q, *new = (y.reshape(len(y), -1) for y in reference.rope(*vectors, width=case.step.head_dim, **heads))
    rounded(query, q, case.step.dtype)
    want = cache_write(*new, keys.astype(float), values.astype(float), cumulative, past, table)
    for got, expected in zip(after[7:9], want, strict=True):
        rounded(got, expected, case.step.dtype)  # what was NaN and is nobody's stays NaN


@FEW
@given(attentions(cases((32, 80, 128), dtypes=("float32", "float16", "bfloat16"))))
def test_rope_turns_queries_and_puts_keys_and_values_into_their_blocks(case: Attention) -> None:
    check_rope(case)


def test_more_rows_than_are_searched_at_once() -> None:
    check_rope(Attention(Case(rows=((3, 1), (0, 2)) * 66, kv_heads=1, spare_tokens=4)))


def test_pools_beyond_2_31_elements_are_addressed() -> None:
    case = Case(rows=((20, 1), (7, 3)), kv_heads=2, group=1, head_dim=64, dtype="float16")
    check_rope(Attention(case), before=2**31 // (16 * 2 * 64) + 1)


@pytest.mark.parametrize(
    "case",
    [
        Attention(Case(rows=((700, 1), (0, 9), (3, 0)), group=7, head_dim=128, dtype="float16"), bias=True),
        Attention(Case(rows=((40, 1), (0, 5)), head_dim=80, window=20), fill=8, logn=True),
        pytest.param(
            Attention(Case(rows=((0, 510), (20, 1), (9, 6)), kv_heads=1, group=1), norm=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a decode beside a prompt", "padded heads in a window", "more tokens than are split"],
)
def test_attention_from_the_product_s_output_is_rope_and_paged_attention(case: Attention) -> None:
    (output,), _ = interpreted("qkv_attention", *case.arrays(), **case.attributes)
    want = reference.qkv_attention(*case.arrays(), **case.attributes)[0].astype(float)
    assert output.dtype == TYPES[case.step.dtype]
    error = np.linalg.norm(output.astype(float) - want) / np.linalg.norm(want)
    assert error < {"float32": 1e-5, "float16": 2e-3}[case.step.dtype]


POINTERS = {"cumulative": "*i32", "past": "*i32", "table": "*i32", "R": "i32", "M": "i32"}
VARYING = ("value", "out", "normed", "query", "key_cache", "value_cache")
SIZES: dict[str, dict[str, Any]] = {
    "add_rms_norm": {**kernels.row_constants(4096), "EPS": 1e-5},
    "rope_write": kernels.rope_constants(32, 8, 128, 128, 1e-5, 16, 128),
    "silu_mul": {"WIDTH": 11008, "COLUMNS": 1024, "num_warps": 4},
    "token_scaled": kernels.row_constants(11008, 8192),
}
OPTIONAL = {"add_rms_norm": ("bias", "scale"), "rope_write": ("bias", "logn", "q_norm", "k_norm"),
            "silu_mul": ("bias",), "token_scaled": ()}  # fmt: skip


def compiled(name: str, capability: int, dtype: str = "*bf16", bare: bool = False, **sizes: Any) -> Any:
    function = kernels.KERNELS[name]
    values = {**SIZES[name], **sizes}
    warps = values.pop("num_warps")
    absent = dict.fromkeys(OPTIONAL[name]) if bare else {}
    types = {
        n: "constexpr" if n in absent or (n.isupper() and n not in POINTERS)
        else POINTERS.get(n, dtype if n in VARYING else "*fp32")
        for n in function.arg_names
    }  # fmt: skip
    if name == "token_scaled":
        types["out"] = "*fp16"
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(function, types, {**values, **absent}, aligned)
    options = {**kernels.OPTIONS, "num_warps": warps, "ptx_version": 87}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_it_compiles_for_every_target_without_scratch_and_within_48_kib(name: str, capability: int) -> None:
    for bare in (False, True):
        built = compiled(name, capability, bare=bare)
        m = built.metadata
        assert re.search(rf"^\.target sm_{capability}a?$", built.asm["ptx"], re.M)
        assert built.asm["cubin"][:4] == b"\x7fELF"
        assert m.global_scratch_size == m.profile_scratch_size == 0 and m.shared <= 48 * 1024
        assert ".local" not in built.asm["ptx"], "an array that does not fit into registers"


@pytest.mark.parametrize("dtype", ["*fp32", "*fp16"])
def test_every_type_and_the_sizes_of_real_models_compile(dtype: str) -> None:
    for width in (64, 3584, 5120, 8192, 16384):
        built = compiled("add_rms_norm", 90, dtype, **kernels.row_constants(width))
        assert built.metadata.shared <= 48 * 1024
    for head_dim, cache in ((64, 64), (72, 80), (256, 256)):
        sizes = kernels.rope_constants(28, 4, head_dim, head_dim // 2, 1e-6, 16, cache)
        compiled("rope_write", 90, dtype, **sizes)
    compiled("silu_mul", 90, dtype, WIDTH=28672)
    compiled("token_scaled", 90, dtype, **kernels.row_constants(28672, 8192))


def test_vectors_move_16_bytes_at_a_time() -> None:
    for name in kernels.KERNELS:
        ptx = compiled(name, 90, bare=True).asm["ptx"]
        loads = re.findall(r"ld\.global\S*(\.v\d\.b\d+)", ptx)
        assert ".v4.b32" in loads or ".v2.b64" in loads, name

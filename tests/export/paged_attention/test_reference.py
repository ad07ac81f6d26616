"""The specification of the op against a formula per token, torch's attention, and its own three parts."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from rtp_llm.export.paged_attention import reference

from .cases import Case, cases

FEW = settings(derandomize=True, deadline=None, max_examples=40)


@FEW
@given(cases((8, 16, 24)))
def test_every_token_gets_the_softmax_over_the_keys_it_sees(case: Case) -> None:
    q, k, v, key_cache, value_cache, cu, past, table = case.arrays()
    got = reference.paged_attention(q, k, v, key_cache, value_cache, cu, past, table, **case.attributes)[0]
    D, heads = case.head_dim, case.kv_heads * case.group
    want = np.zeros((len(q), heads, D))
    for r, (length, new) in enumerate(case.rows):
        if case.unmapped and r == len(case.rows) - 1:
            continue
        for j in range(new):
            position, token = length + j, cu[r] + j
            first = max(0, position - case.window + 1) if case.window > 0 else 0
            for h in range(heads):
                g, weights, vectors = h // case.group, [], []
                for t in range(first, position + 1):
                    if t < length:
                        where = table[r, t // case.block_size], t % case.block_size, g
                        key, vector = key_cache[where], value_cache[where]
                    else:
                        key, vector = (x[cu[r] + t - length].reshape(-1, D)[g] for x in (k, v))
                    score = np.dot(q[token].reshape(-1, D)[h].astype(float), key.astype(float))
                    weights.append(math.exp(score / math.sqrt(D)))
                    vectors.append(vector.astype(float))
                want[token, h] = np.average(vectors, axis=0, weights=weights)
    np.testing.assert_allclose(got, want.reshape(q.shape), rtol=0, atol=2e-6)


def test_a_prompt_from_nothing_is_torchs_causal_attention() -> None:
    case = Case(rows=((0, 37),), kv_heads=2, group=3, head_dim=64)
    arrays = case.arrays()
    q, k, v = (torch.from_numpy(x).unflatten(-1, (-1, 64)).transpose(0, 1) for x in arrays[:3])
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)
    got = reference.paged_attention(*arrays, **case.attributes)[0]
    np.testing.assert_allclose(got, want, atol=2e-6)


@FEW
@given(cases((8,)))
def test_the_caches_gain_exactly_the_new_tokens(case: Case) -> None:
    _, k, v, key_cache, value_cache, cu, past, table = case.arrays()
    outs = reference.cache_write(k, v, key_cache, value_cache, cu, past, table)
    for new, before, out in zip((k, v), (key_cache, value_cache), outs, strict=True):
        want = before.copy().reshape(-1, case.kv_heads * case.head_dim)
        for r in range(len(case.rows)):
            for j in range(case.rows[r][1]):
                place, offset = divmod(int(past[r]) + j, case.block_size)
                if table[r, place] >= 0:
                    want[table[r, place] * case.block_size + offset] = new[cu[r] + j]
        np.testing.assert_array_equal(out, want.reshape(before.shape))


@FEW
@given(cases((8, 24), dtypes=("float32", "float16", "bfloat16")), st.sampled_from([1, 3, 8, 64]))
def test_the_three_parts_make_the_op(case: Case, splits: int) -> None:
    q, k, v, key_cache, value_cache, *step = case.arrays()
    want, *caches = reference.paged_attention(q, k, v, key_cache, value_cache, *step, **case.attributes)
    written = reference.cache_write(k, v, key_cache, value_cache, *step)
    partial, stats = reference.partial_attention(q, *written, *step, **case.attributes, splits=splits)
    partial[stats[..., 1] == 0] = np.nan  # such partials may stay unwritten
    got = reference.combine(partial, stats, q)
    assert got.dtype == want.dtype == q.dtype
    np.testing.assert_array_equal(np.stack(written).astype(float), np.stack(caches).astype(float))
    step_of_type = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=step_of_type, atol=1e-6)


def test_inputs_stay_as_they_are() -> None:
    case = Case(rows=((5, 3), (16, 1)))
    arrays, before = case.arrays(), case.arrays()
    reference.paged_attention(*arrays, **case.attributes)
    for now, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(now, then)


def model(case: Case, arrays: tuple[np.ndarray, ...], nodes: list[onnx.NodeProto]) -> ReferenceEvaluator:
    types = [helper.np_dtype_to_tensor_dtype(x.dtype) for x in arrays]
    inputs = [
        helper.make_tensor_value_info(f"i{i}", t, x.shape)
        for i, (t, x) in enumerate(zip(types, arrays, strict=True))
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("out", "keys", "values")]
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 24), ("com.microsoft", 1), ("rtp_llm", 1))]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    made = helper.make_model(graph, opset_imports=opsets)
    return ReferenceEvaluator(made, new_ops=reference.operators())


@pytest.mark.parametrize("window", [-1, 4])
def test_onnx_graphs_of_the_op_and_of_its_parts_evaluate_to_it(window: int) -> None:
    case = Case(rows=((30, 1), (0, 18), (17, 5)), window=window)
    arrays = case.arrays()
    feeds = {f"i{i}": x for i, x in enumerate(arrays)} | {"i8": np.array([18, 31], np.int32)}
    names = [f"i{i}" for i in range(8)]
    whole = helper.make_node(
        "PagedAttention", [*names, *[""] * 8, "i8"], ["out", "keys", "values"],
        domain="com.microsoft", do_rotary=0, **case.attributes,
    )  # fmt: skip
    plugin = {"domain": "rtp_llm", "plugin_version": "1", "aot": 1}
    parts = [
        helper.make_node("CacheWrite", names[1:], ["keys", "values"], **plugin),
        helper.make_node(
            "PartialAttention", ["i0", "keys", "values", *names[5:]], ["partial", "stats"],
            splits=5, **case.attributes, **plugin,
        ),
        helper.make_node("Combine", ["partial", "stats", "i0"], ["out"], **plugin),
    ]  # fmt: skip
    want = reference.paged_attention(*arrays, **case.attributes)
    for nodes in ([whole], parts):
        got = model(case, (*arrays, feeds["i8"]), nodes).run(None, feeds)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)

"""The rewritten graph computes what the exported one does, and nothing but the attention is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rtp_llm.build.rewrite import rewrite
from rtp_llm.errors import BundleError
from rtp_llm.export.paged_attention.reference import operators

HEADS, KV_HEADS, D, BLOCK, BLOCKS = 4, 2, 16, 16, 12
ROW_INPUTS = ["cumulative_sequence_length", "past_seqlens", "block_table"]


def attention(layer: int, **attributes: object) -> onnx.NodeProto:
    inputs = [f"{name}.{layer}" for name in ("query", "key", "value", "key_cache", "value_cache")]
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3} | attributes
    return helper.make_node(
        "PagedAttention",
        [*inputs, *ROW_INPUTS, *[""] * 8, "attention_metadata"],
        [f"attended.{layer}", f"key_cache_out.{layer}", f"value_cache_out.{layer}"],
        f"attention {layer}",
        domain="com.microsoft",
        **attributes,
    )


def decoder(dtype: int = TensorProto.FLOAT, **attributes: object) -> onnx.ModelProto:
    """Two layers of projections and attention; the second one looks 20 tokens back."""
    random = np.random.default_rng(0)
    nodes, weights, inputs, outputs = [], [], [], []
    for layer, source in enumerate(["x", "attended.0"]):
        for name, width in [("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)]:
            weight = random.standard_normal((HEADS * D, width * D)).astype(np.float32) / 8
            tensor = numpy_helper.from_array(weight, f"{name}.weight.{layer}")
            if dtype != TensorProto.FLOAT:
                tensor = helper.make_tensor(tensor.name, dtype, weight.shape, weight)
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [source, tensor.name], [f"{name}.{layer}"]))
        window = {"local_window_size": 20} if layer else {}
        nodes.append(attention(layer, **window, **attributes))
        for name in ("key_cache", "value_cache"):
            shape = ["blocks", BLOCK, KV_HEADS, D]
            inputs.append(helper.make_tensor_value_info(f"{name}.{layer}", dtype, shape))
            outputs.append(helper.make_tensor_value_info(f"{name}_out.{layer}", dtype, shape))
    rows = [helper.make_tensor_value_info(n, TensorProto.INT32, None) for n in ROW_INPUTS]
    metadata = helper.make_tensor_value_info("attention_metadata", TensorProto.INT32, [2])
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("x", dtype, ["T", HEADS * D]), *rows, metadata, *inputs],
        [helper.make_tensor_value_info("attended.1", dtype, ["T", HEADS * D]), *outputs],
        weights,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4).filter(
        lambda rows: any(new for _, new in rows)
    ),
    splits=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, derandomize=True, deadline=None)
def test_the_rewritten_graph_gives_the_originals_numbers(
    rows: list[tuple[int, int]], splits: int, seed: int
) -> None:
    """Rows of (past, new): prefill (0, n), a later chunk (p, n), decode (p, 1) and idle (p, 0), mixed."""
    random = np.random.default_rng(seed)
    past, new = np.array(rows, np.int32).T
    table = random.permutation(4 * len(rows)).astype(np.int32).reshape(len(rows), 4)
    feeds = {
        "x": random.standard_normal((new.sum(), HEADS * D)).astype(np.float32),
        "cumulative_sequence_length": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "past_seqlens": past.copy(),
        "block_table": table,
    }
    for layer in range(2):
        for name in ("key_cache", "value_cache"):
            cache = random.standard_normal((table.size, BLOCK, KV_HEADS, D))
            feeds[f"{name}.{layer}"] = cache.astype(np.float32)
    model = decoder()
    metadata = {"attention_metadata": np.array([new.max(), (past + new).max()], np.int32)}
    wanted = ReferenceEvaluator(model, new_ops=operators()).run(None, feeds | metadata)
    found = ReferenceEvaluator(rewrite(model, splits), new_ops=operators()).run(None, feeds)
    for output, one, other in zip(model.graph.output, found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=output.name)


@pytest.mark.slow
@pytest.mark.parametrize("sample", ["qwen_vl_shapes", "llava_shapes"])
def test_an_exported_decoder_gives_the_same_numbers_rewritten(
    sample: str, float32_engine_bundle: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """A chunk with a past, a decode and a prefill in one step, with a picture's rows where they belong."""
    folder = float32_engine_bundle(sample, "paged")
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    sizes = {"T": 14, "N": 3, "R1": 4, "R": 3, "M": 2, "K": 3, "blocks": 6}
    past, new = np.array([20, 7, 0], np.int32), np.array([5, 1, 8], np.int32)
    place = np.concatenate([np.arange(n) + p for p, n in zip(past, new, strict=True)])
    random = np.random.default_rng(1)
    vocabulary = (
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    )  # from here on: rows of pictures
    feeds = {
        "input_ids": np.concatenate([random.integers(0, 250, 11), vocabulary + np.arange(3)]),
        "positions": place,
        "rope_rows": place,
        "cumulative_sequence_length": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "past_seqlens": past,
        "block_table": np.arange(6, dtype=np.int32)[::-1].reshape(3, 2),
        "attention_metadata": np.array([8, 25], np.int32),
        "logits_rows": np.array([4, 5, 13]),
    }
    for value in model.graph.input:
        if value.name not in feeds:
            shape = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = random.standard_normal(shape).astype(np.float32)

    answers = []
    for changed in (model, rewrite(model, 8)):
        given = {value.name: feeds[value.name] for value in changed.graph.input}
        onnx.load_external_data_for_model(changed, str(folder))
        answers.append(ReferenceEvaluator(changed, new_ops=operators()).run(None, given))
    for output, one, other in zip(model.graph.output, *answers, strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4, err_msg=output.name)


def test_all_but_the_attention_stays_as_it_was() -> None:
    model = decoder(TensorProto.BFLOAT16)
    before = model.SerializeToString(deterministic=True)
    new = rewrite(model, 8)
    assert model.SerializeToString(deterministic=True) == before

    assert [n for n in new.graph.node if n.domain == ""] == [n for n in model.graph.node if n.domain == ""]
    kinds = [n.op_type for n in new.graph.node if n.domain != "" or n.op_type == "PagedAttention"]
    assert kinds == ["CacheWrite", "PartialAttention", "Combine"] * 2
    names = [value.name for value in model.graph.input if value.name != "attention_metadata"]
    assert [value.name for value in new.graph.input] == names
    assert [(o.domain, o.version) for o in new.opset_import] == [("", 23), ("rtp_llm", 1)]

    for changed in (new, model):  # without what may differ the two are one file
        del changed.graph.node[:], changed.graph.input[:], changed.opset_import[:]
    assert new.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_weights_in_external_data_are_neither_read_nor_moved(tmp_path: Path) -> None:
    model = decoder()
    onnx.save(
        model,
        tmp_path / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.onnx.data",
        size_threshold=0,
    )
    data = tmp_path / "decoder.onnx.data"
    stored, content = data.stat(), data.read_bytes()
    data.rename(tmp_path / "away")  # reading it would now fail

    new = rewrite(onnx.load(tmp_path / "decoder.onnx", load_external_data=False), 8)
    onnx.save(new, tmp_path / "rewritten.onnx")
    assert not data.exists()
    (tmp_path / "away").rename(data)
    assert (data.stat().st_mtime_ns, data.read_bytes()) == (stored.st_mtime_ns, content)
    for old, kept in zip(
        decoder().graph.initializer, onnx.load(tmp_path / "rewritten.onnx").graph.initializer, strict=True
    ):
        np.testing.assert_array_equal(numpy_helper.to_array(old), numpy_helper.to_array(kept))


def test_the_attention_reads_the_writers_outputs_and_never_the_pools() -> None:
    writer, reader, combine = [n for n in rewrite(decoder(), 8).graph.node if n.domain == "rtp_llm"][:3]
    assert writer.output == reader.input[1:3] == ["key_cache_out.0", "value_cache_out.0"]
    assert list(combine.input) == [*reader.output, "query.0"] and list(combine.output) == ["attended.0"]


def test_every_plugin_node_says_what_tensorrts_parser_asks_for() -> None:
    nodes = [n for n in rewrite(decoder(), 5).graph.node if n.domain == "rtp_llm"]
    for node in nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"rtp_llm" and attributes["plugin_version"] == b"1"
        assert attributes["aot"] == 1
        if node.op_type == "PartialAttention":
            window = 20 if "1" in node.name else -1
            known = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "local_window_size": window, "splits": 5}
            assert known.items() <= attributes.items() and attributes["scale"] == np.float32(0.3)


def test_metadata_that_something_else_reads_stays() -> None:
    model = decoder()
    model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.INT32, [2]))
    model.graph.node.append(helper.make_node("Identity", ["attention_metadata"], ["seen"]))
    assert "attention_metadata" in [value.name for value in rewrite(model, 8).graph.input]


def test_a_graph_without_paged_attention_comes_back_unchanged() -> None:
    model = decoder()
    del model.graph.node[3:]
    del model.opset_import[1:]
    assert rewrite(model, 8) == model


@pytest.mark.parametrize(
    ("attributes", "inputs", "named"),
    [
        ({"do_rotary": 1}, {}, "do_rotary = 1"),
        ({"softcap": 30.0}, {}, "softcap = 30.0"),
        ({}, {8: "cos"}, r"inputs \[0, 1, 2, 3, 4, 5, 6, 7, 8, 16\]"),
        ({}, {7: ""}, "inputs"),
    ],
)
def test_what_the_plugins_do_not_have_is_refused_by_name(attributes, inputs, named: str) -> None:
    model = decoder(**attributes)
    for index, name in inputs.items():
        model.graph.node[3].input[index] = name
    with pytest.raises(BundleError, match=f"'attention 0' has .*{named}"):
        rewrite(model, 8)


def test_attributes_at_values_that_change_nothing_are_taken() -> None:
    rewrite(decoder(do_rotary=0, softcap=0.0, rotary_interleaved=0, is_causal=1), 8)

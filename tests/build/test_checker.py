"""The checker names what TensorRT's ONNX parser does not list, and nothing that it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtp_llm.build.checker import check
from rtp_llm.build.parser_operators import TABLES
from rtp_llm.build.rewrite import rewrite

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list]],
    *weights: onnx.TensorProto,
    opset: int = 24,
) -> onnx.ModelProto:
    """A model of `nodes`, whose last output is the graph's."""
    values = [helper.make_tensor_value_info(name, *type_) for name, type_ in inputs.items()]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    opsets = [helper.make_opsetid(d, opset if d == "" else 1) for d in {"", *(n.domain for n in nodes)}]
    proto = helper.make_graph(nodes, "g", values, [output], weights)
    return helper.make_model(proto, opset_imports=opsets, ir_version=10)


def node(kind: str, inputs: str, output: str = "y", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    names = [name.strip() for name in inputs.split(",")]
    return helper.make_node(kind, names, output.split(), f"the {kind}", domain=domain, **attributes)


def one(kind: str, inputs: dict[str, tuple[int, list]], *weights: onnx.TensorProto, **more: Any) -> list[str]:
    version = more.pop("version", "10.15.1.29")
    names = more.pop("names", ", ".join([*inputs, *(w.name for w in weights)]))
    outputs, opset = more.pop("output", "y"), more.pop("opset", 24)
    return check(graph([node(kind, names, outputs, **more)], inputs, *weights, opset=opset), version)


SCALE = numpy_helper.from_array(np.float32(1), "scale")
ZERO_3 = numpy_helper.from_array(np.int8(3), "zero")
HEADS = {name: (BF16, ["B", 4, "S", 16]) for name in ("q", "k", "v")}


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.1.11", "11.1.0.106", "11.4.0.106"])
def test_what_the_exported_graphs_are_made_of_passes_everywhere(version: str) -> None:
    cache, new = (BF16, ["B", 4, "L", 16]), (BF16, ["B", 4, "S", 16])
    write = {"cache": cache, "new": new, "at": (TensorProto.INT64, ["B"])}
    assert one("TensorScatter", write, axis=-2, version=version) == []
    mask = {"mask": (TensorProto.BOOL, ["B", 1, "S", "S"])}
    assert one("Attention", HEADS | mask, scale=0.25, version=version) == []
    rope = {"x": new, "cos": (BF16, ["S", 8]), "sin": (BF16, ["S", 8]), "at": (TensorProto.INT64, ["B", "S"])}
    assert one("RotaryEmbedding", rope, version=version) == []
    assert one("RMSNormalization", {"x": (FLOAT, ["T", 8]), "w": (FLOAT, [8])}, version=version) == []
    pixels = {"x": (TensorProto.UINT8, ["N", 8, 8, 3])}
    assert one("Cast", pixels, to=FLOAT, version=version) == []
    scale = helper.make_tensor("scale", BF16, [1], [0.5])
    zero = numpy_helper.from_array(np.zeros(1, np.int8), "zero")
    for kind, zeros in [("INT8", [zero]), ("FLOAT8E4M3FN", []), ("INT4", [])]:
        stored = getattr(TensorProto, kind)
        x = {"x": (BF16, [4, 1])}
        chosen = {} if zeros else {"output_dtype": stored}
        assert one("QuantizeLinear", x, scale, *zeros, axis=1, version=version, **chosen) == []
        assert one("DequantizeLinear", {"x": (stored, [4, 1])}, scale, *zeros, axis=1, version=version) == []


@pytest.mark.parametrize(
    ("problem", "found"),
    [
        ("node 'the Unique': Unique (opset 24) is not an operator of TensorRT 10.15",
         one("Unique", {"x": (FLOAT, [4])})),
        ("node 'the Shape': Shape reads 'x' as DOUBLE; TensorRT 10.15 lists FP32, FP16, BF16",
         one("Shape", {"x": (TensorProto.DOUBLE, [4, 4])})),
        ("node 'the Cast': Cast writes 'y' as FLOAT8E5M2;",
         one("Cast", {"x": (FLOAT, [4])}, to=TensorProto.FLOAT8E5M2)),
        ("opset 25: TensorRT 10.15 takes opsets 9 to 24", one("Relu", {"x": (FLOAT, [4])}, opset=25)),
        ("opset 8: TensorRT 10.15 takes opsets 9 to 24", one("Relu", {"x": (FLOAT, [4])}, opset=8)),
        ("node 'the Attention': Attention has input past_key, which TensorRT 10.15 does not take",
         one("Attention", HEADS | {"past": (BF16, ["B", 4, "P", 16])}, names="q,k,v,,past")),
        ("node 'the Attention': Attention reads 'q' of 3 dimensions; TensorRT 10.15 needs 4",
         one("Attention", HEADS | {"q": (BF16, ["B", "S", 64])}, q_num_heads=4, kv_num_heads=4)),
        ("node 'the Attention': Attention has softcap = 30.0; TensorRT 10.15 takes 0.0 alone",
         one("Attention", HEADS, softcap=30.0)),
        ("node 'the TensorScatter': TensorScatter has mode = circular; TensorRT 10.15 takes linear alone",
         one("TensorScatter", {"c": HEADS["q"], "u": HEADS["q"]}, mode="circular")),
        ("node 'the LayerNormalization': LayerNormalization has 2 outputs; TensorRT 10.15 gives the first",
         one("LayerNormalization", {"x": (FLOAT, [4, 8]), "w": (FLOAT, [8])}, output="y mean")),
        ("node 'the ReduceMean': ReduceMean computes 'axes'; TensorRT 10.15 needs a constant there",
         one("ReduceMean", {"x": (FLOAT, [4, 8]), "axes": (TensorProto.INT64, [1])})),
        ("node 'the DequantizeLinear': DequantizeLinear has a zero point 'zero' that is not 0;",
         one("DequantizeLinear", {"x": (TensorProto.INT8, [4])}, SCALE, ZERO_3)),
        ("node 'the QuantizeLinear': QuantizeLinear writes 'y' as UINT8; TensorRT 10.15 lists INT8, FP8,",
         one("QuantizeLinear", {"x": (FLOAT, [4])}, SCALE)),
        ("node 'the Swish': Swish (opset 24) is not an operator of TensorRT 10.16",
         one("Swish", {"x": (FLOAT, [4])}, version="10.16.1.11")),
        ("TensorRT 10.13.0 is older than 10.15", one("Relu", {"x": (FLOAT, [4])}, version="10.13.0")),
        ("node 'the CacheRead': rtp_llm::CacheRead is no registered plugin: there are CacheWrite, Combine,",
         one("CacheRead", {"x": (FLOAT, [4])}, domain="rtp_llm")),
        ("node 'the Gelu': com.microsoft::Gelu is not known to TensorRT 10.15: export with --backend tensor",
         one("Gelu", {"x": (FLOAT, [4])}, domain="com.microsoft")),
    ],
)  # fmt: skip
def test_each_problem_is_one_line_that_names_the_node_and_what_would_be_right(
    problem: str, found: list[str]
) -> None:
    assert len(found) == 1 and found[0].startswith(problem), found


def test_swish_came_with_11_0() -> None:
    assert one("Swish", {"x": (FLOAT, [4])}, version="11.4.0.106") == []


def test_types_are_known_behind_the_plugins_too() -> None:
    """Inference cannot see through a plugin: what Combine and CacheWrite give has their inputs' types."""
    inputs = {"partial": (FLOAT, None), "stats": (FLOAT, None), "query": (HALF, ["T", 64]), "no": (HALF, [1])}
    nodes = [
        node("Combine", "partial, stats, query", "attended", domain="rtp_llm"),
        node("Not", "attended", "wrong"),
    ]
    assert (
        check(graph(nodes, inputs), "11.1")
        == ["node 'the Not': Not reads 'attended' as FP16; TensorRT 11.1 lists BOOL"]
        or check(graph(nodes[:1] + [node("NonZero", "attended")], inputs), "11.1") == []
    )
    quantize = node("DequantizeLinear", "attended, no")
    assert check(graph([nodes[0], quantize], inputs), "11.1") == [
        "node 'the DequantizeLinear': DequantizeLinear reads 'attended' as FP16;"
        " TensorRT 11.1 lists INT8, FP8, FP4, INT4"
    ]


def test_branches_and_functions_are_walked_as_well() -> None:
    inner = helper.make_graph([node("Unique", "x", "z")], "b", [], [helper.make_empty_tensor_value_info("z")])
    branch = node("If", "c", then_branch=inner, else_branch=inner)
    model = graph([branch], {"c": (TensorProto.BOOL, []), "x": (FLOAT, [4])})
    assert [line.split(":")[0] for line in check(model, "10.15")] == ["node 'the Unique'"] * 2

    model = graph([node("F", "x", domain="ours")], {"x": (FLOAT, [4])})
    model.functions.append(
        helper.make_function("ours", "F", ["x"], ["z"], [node("Unique", "x", "z")], model.opset_import)
    )
    assert [line.split(":")[0] for line in check(model, "10.15")] == ["node 'the Unique'"]


def test_every_operator_of_the_table_is_one_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    for table in TABLES.values():
        assert set(table) <= known


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.1.11", "11.1.0.106", "11.4.0.106"])
@pytest.mark.parametrize("bundle", ["qwen_bundle", "llava_bundle"])
def test_the_sample_bundles_vision_graph_passes_and_their_onnx_runtime_decoder_is_refused(
    bundle: str, version: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(bundle)
    vision = onnx.load(path / "vision.onnx", load_external_data=False)
    assert check(vision, version) == []
    decoder = onnx.load(path / "decoder.onnx", load_external_data=False)
    problems = check(decoder, version)
    target = ".".join(version.split(".")[:2])
    attention = [n for n in decoder.graph.node if n.op_type == "GroupQueryAttention"]
    refused = f"com.microsoft::GroupQueryAttention is not known to TensorRT {target}"
    assert sum(refused in line for line in problems) == len(attention) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["paged", "linear"])
@pytest.mark.parametrize("sample", ["qwen_vl_shapes", "llava_shapes"])
def test_both_graphs_of_an_engine_bundle_pass_with_every_type_known(
    sample: str, kv_cache: str, float32_engine_bundle: Callable[[str, str], Path]
) -> None:
    path = float32_engine_bundle(sample, kv_cache)
    for name in ("vision", "decoder"):
        model = onnx.load(path / f"{name}.onnx", load_external_data=False)
        if name == "decoder" and kv_cache == "paged":
            assert check(model, "10.15"), "ONNX Runtime's node was not named"
            model = rewrite(model, 8)
        for version in ("10.15.1.29", "11.4.0.106"):
            assert check(model, version) == []
        # no type is lost on the way: a wrong one would be seen in the last node too
        i = max(i for i, node in enumerate(model.graph.node) if node.op_type == "MatMul")
        name = model.graph.node[i].name
        cast = helper.make_node("Cast", model.graph.node[i].input[:1], ["double"], "c", to=TensorProto.DOUBLE)
        model.graph.node[i].input[0] = "double"
        model.graph.node.insert(i, cast)
        assert f"node {name!r}: MatMul reads 'double' as DOUBLE" in "".join(check(model, "10.15"))


def test_a_paged_graph_passes_once_rewritten() -> None:
    step = {n: (TensorProto.INT32, ["R"]) for n in ("lengths", "past", "table")}
    pools = {n: (BF16, ["blocks", 16, 2, 16]) for n in ("keys", "values")}
    inputs = {n: (BF16, ["T", 32]) for n in ("q", "k", "v")} | pools | step
    attention = node(
        "PagedAttention",
        ", ".join(inputs),
        "y keys_out values_out",
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=2,
        scale=0.25,
    )
    model = graph([attention], inputs)
    assert check(model, "10.15") == [
        "node 'the PagedAttention': com.microsoft::PagedAttention is ONNX Runtime's; TensorRT 10.15 needs the"
        " plugins that build.rewrite puts in its place"
    ]
    assert check(rewrite(model, 8), "10.15") == []

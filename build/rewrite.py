"""com.microsoft::PagedAttention → the three plugins that TensorRT runs in its place.

    CacheWrite(key, value, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table)
        → key_cache_out, value_cache_out
    PartialAttention(query, key_cache_out, value_cache_out, cumulative_sequence_length, past_seqlens,
                     block_table) → partial, stats
    Combine(partial, stats, query) → output

One node cannot be one plugin: a plugin is one kernel without workspace. PartialAttention reads what
CacheWrite wrote, never the pool that came in: that edge is all that orders the two.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from ..errors import BundleError

DOMAIN = "rtp_llm"
KINDS = ("CacheWrite", "PartialAttention", "Combine")
STEP = slice(5, 8)  # cumulative_sequence_length, past_seqlens, block_table
METADATA = 16  # attention_metadata, read by ONNX Runtime alone
TAKEN = {"num_heads", "kv_num_heads", "scale", "local_window_size"}
WITHOUT_EFFECT = {"do_rotary": 0, "rotary_interleaved": 0, "softcap": 0.0, "is_causal": 1}  # at these values

# What TensorRT's parser looks for on a node that it has no importer for (onnx-tensorrt, onnxOpImporters.cpp:
# importFallbackPluginImporter and createPlugin; loadFields matches the other attributes to fields by name).
PLUGIN: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}


def rewrite(model: onnx.ModelProto, splits: int) -> onnx.ModelProto:
    """A copy of `model` with every PagedAttention node replaced, and without the input attention_metadata
    unless something else reads it. All else is the same to the byte; weights in external data are neither
    read nor moved, so the copy belongs beside the same data file.

    splits: into how many ranges PartialAttention cuts each row's context.
    BundleError: a node uses what the plugins do not have (rotation, softcap, a slot mapping …).
    """
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    nodes: list[onnx.NodeProto] = []
    metadata: set[str] = set()
    for node in model.graph.node:
        if (node.domain, node.op_type) != ("com.microsoft", "PagedAttention"):
            nodes.append(node)
            continue
        nodes.extend(_plugins(node, splits))
        metadata.update(node.input[METADATA:])
    del graph.node[:]
    graph.node.extend(nodes)

    read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    for value in [value for value in graph.input if value.name in metadata - read]:
        graph.input.remove(value)

    domains = {node.domain for node in nodes}
    for opset in [
        o for o in rewritten.opset_import if o.domain == "com.microsoft" and o.domain not in domains
    ]:
        rewritten.opset_import.remove(opset)
    if DOMAIN in domains:
        rewritten.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return rewritten


def _plugins(node: onnx.NodeProto, splits: int) -> list[onnx.NodeProto]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    needed = {"num_heads", "kv_num_heads", "scale"} - attributes.keys()
    inputs = [i for i, name in enumerate(node.input) if name]
    problem = ""
    if needed:
        problem = f"has no attribute {', '.join(sorted(needed))}"
    elif inputs[:8] != list(range(8)) or set(inputs[8:]) - {METADATA}:
        problem = f"has inputs {inputs}; the plugins take 0 to 7 (and 16, unread)"
    elif len(node.output) != 3 or not all(node.output):
        problem = "must have three outputs: the attention and both caches, updated"
    else:
        for name, value in attributes.items():
            if name not in TAKEN and WITHOUT_EFFECT.get(name) != value:
                problem = f"has attribute {name} = {value}, which the plugins do not have"
    if problem:
        raise BundleError(f"PagedAttention node {node.name!r} {problem}: export the bundle again")

    query, key, value, key_cache, value_cache = node.input[:5]
    step = node.input[STEP]
    output, *caches = node.output
    partial, stats = f"{output}.partial", f"{output}.stats"
    attributes = {
        "num_heads": attributes["num_heads"],
        "kv_num_heads": attributes["kv_num_heads"],
        "scale": attributes["scale"],
        "local_window_size": attributes.get("local_window_size", -1),
        "splits": splits,
    }

    def plugin(kind: str, inputs: list[str], outputs: list[str], **more: Any) -> onnx.NodeProto:
        name = f"{node.name}.{kind}"
        return helper.make_node(kind, inputs, outputs, name, domain=DOMAIN, **PLUGIN, **more)

    return [
        plugin("CacheWrite", [key, value, key_cache, value_cache, *step], caches),
        plugin("PartialAttention", [query, *caches, *step], [partial, stats], **attributes),
        plugin("Combine", [partial, stats, query], [output]),
    ]

"""Names what TensorRT's ONNX parser would refuse in a graph, before TensorRT is asked.

Proven against the parser's own table of operators (parser_operators.py), not against the parser: never run on
real TensorRT yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto, helper, numpy_helper

from .parser_operators import (
    CONSTANT_INPUTS,
    FIXED_ATTRIBUTES,
    ONE_OUTPUT,
    OPSETS,
    RANKS,
    TABLES,
    UNSUPPORTED_INPUTS,
    ZERO_INPUTS,
)
from .rewrite import DOMAIN, KINDS

STANDARD = ("", "ai.onnx")
NAMES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
}  # the others go by ONNX's name


def check(model: onnx.ModelProto, tensorrt_version: str, plugins: Collection[str] = KINDS) -> list[str]:
    """One line per problem that TensorRT `tensorrt_version` ("10.15.1.29") would have with `model`, whose
    weights need not be loaded; an empty list: none found. `plugins`: the registered ones of domain rtp_llm.
    Types that ONNX's shape inference cannot tell are not judged.
    """
    version = tuple(int(part) for part in tensorrt_version.split(".")[:2])
    tables = [known for known in TABLES if known <= version]
    if not tables:
        return [f"TensorRT {tensorrt_version} is older than 10.15, the first that bundles are built for"]
    walk = _Walk(model, TABLES[max(tables)], f"TensorRT {version[0]}.{version[1]}", plugins)
    return [*walk.opset_problems(), *walk.problems(model.graph)]


class _Walk:
    def __init__(
        self, model: onnx.ModelProto, table: dict[str, list[str]], target: str, plugins: Collection[str]
    ) -> None:
        self.model, self.table, self.target, self.plugins = model, table, target, plugins
        self.opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=1)
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.types: dict[str, onnx.TypeProto.Tensor] = {}
        self.constants: dict[str, TensorProto | None] = {}
        self._learn(onnx.shape_inference.infer_shapes(_standing_in(model)).graph)

    def _learn(self, graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.elem_type:
                self.types[value.name] = value.type.tensor_type
        for tensor in graph.initializer:
            self.constants[tensor.name] = tensor
            shape = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            self.types[tensor.name] = shape.tensor_type
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = next(
                    (a.t for a in node.attribute if a.name == "value"), None
                )
            for inner in _subgraphs(node):
                self._learn(inner)

    def opset_problems(self) -> Iterator[str]:
        if self.opset not in OPSETS:
            takes = f"{OPSETS[0]} to {OPSETS[-1]}"
            yield f"opset {self.opset}: {self.target} takes opsets {takes}"

    def problems(self, graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[str]:
        for node in graph.node:
            for problem in self._node(node):
                kind = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
                yield f"node {node.name or node.output[0]!r}: {kind} {problem}"
            for inner in _subgraphs(node):
                yield from self.problems(inner)
            if function := self.functions.get((node.domain, node.op_type)):
                yield from self.problems(function)

    def _node(self, node: onnx.NodeProto) -> Iterator[str]:
        if (node.domain, node.op_type) in self.functions:
            return
        if node.domain == DOMAIN:
            if node.op_type not in self.plugins:
                yield f"is no registered plugin: there are {', '.join(sorted(self.plugins)) or 'none'}"
        elif (node.domain, node.op_type) == ("com.microsoft", "PagedAttention"):
            yield f"is ONNX Runtime's; {self.target} needs the plugins that build.rewrite puts in its place"
        elif node.domain not in STANDARD:
            yield f"is not known to {self.target}: export with --backend tensorrt"
        elif node.op_type not in self.table:
            yield f"(opset {self.opset}) is not an operator of {self.target}"
        else:
            yield from self._types(node)
            yield from self._restrictions(node)

    def _types(self, node: onnx.NodeProto) -> Iterator[str]:
        """The table lists types of the data: of what shares a type with the first input or output."""
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        given = list(_formal(node.input, schema.inputs))
        made = list(_formal(node.output, schema.outputs))
        listed = self.table[node.op_type]
        if node.op_type == "DequantizeLinear":
            judged = [(given[0][0], "reads", listed)]
        elif node.op_type == "QuantizeLinear":
            judged = [(given[0][0], "reads", listed), (made[0][0], "writes", self.table["DequantizeLinear"])]
        else:
            free = {c.type_param_str for c in schema.type_constraints if len(c.allowed_type_strs) > 1}
            data = {variable for _, variable in (*given[:1], *made[:1])} & free
            judged = [(name, "reads", listed) for name, variable in given if variable in data]
            judged += [(name, "writes", listed) for name, variable in made if variable in data]
        for name, verb, types in judged:
            if name in self.types:
                kind = self.types[name].elem_type
                found = NAMES.get(kind, TensorProto.DataType.Name(kind))
                if found not in types:
                    yield f"{verb} {name!r} as {found}; {self.target} lists {', '.join(types)}"

    def _restrictions(self, node: onnx.NodeProto) -> Iterator[str]:
        kind, inputs = node.op_type, dict(enumerate(node.input))
        for index, name in UNSUPPORTED_INPUTS.get(kind, {}).items():
            if inputs.get(index):
                yield f"has input {name}, which {self.target} does not take"
        if kind in ONE_OUTPUT and any(node.output[1:]):
            yield f"has {len(node.output)} outputs; {self.target} gives the first alone"
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            value = value.decode() if isinstance(value, bytes) else value
            wanted = FIXED_ATTRIBUTES.get(kind, {}).get(attribute.name, value)
            if value != wanted:
                yield f"has {attribute.name} = {value}; {self.target} takes {wanted} alone"
        rank, indexes = RANKS.get(kind, (0, []))
        for name in [inputs[i] for i in indexes if inputs.get(i) in self.types]:
            found = len(self.types[name].shape.dim)
            if self.types[name].HasField("shape") and found != rank:
                yield f"reads {name!r} of {found} dimensions; {self.target} needs {rank}"
        axes = inputs.get(CONSTANT_INPUTS.get(kind, -1))
        if axes and axes not in self.constants:
            yield f"computes {axes!r}; {self.target} needs a constant there"
        zero = self.constants.get(inputs.get(ZERO_INPUTS.get(kind, -1), ""))
        if zero is not None and not zero.external_data and numpy_helper.to_array(zero).any():
            yield f"has a zero point {node.input[2]!r} that is not 0; {self.target} needs 0"


def _formal(names: Collection[str], formals: Collection[onnx.defs.OpSchema.FormalParameter]) -> Iterator:
    """(name, variable of its type) of each value given; a variadic formal stands for all the rest."""
    formals = list(formals)
    for i, name in enumerate(names):
        if name:
            yield name, formals[min(i, len(formals) - 1)].type_str


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def _standing_in(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference, which knows no plugins: Identity nodes of the same types in their place."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    same = {"CacheWrite": [2, 3], "Combine": [2]}  # output i is like input same[i]
    for node in model.graph.node:
        if node.domain != DOMAIN:
            copy.graph.node.append(node)
            continue
        for output, index in zip(node.output, same.get(node.op_type, []), strict=False):
            copy.graph.node.append(helper.make_node("Identity", [node.input[index]], [output]))
    return copy

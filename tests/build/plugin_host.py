"""Stands for TensorRT around its own Python code for plugins: what the ONNX parser and the builder ask of a
plugin, in their order. Run in a process of its own (conftest.Bindings.run), given

    builds  [{"capability", "nodes", "sizes"} …], to be made one after the other:
        capability  "9.0"
        nodes       [{"kind", "attributes", "inputs": [[shape, type] …]} …]; a dynamic dimension is a name
        sizes       {name: number}: what the dynamic dimensions are

It leaves `result`: of each build, of each node, what TensorRT would have learnt.
"""

import numpy as np
import tensorrt as trt


class Expr:
    """IDimensionExpr: a number, and whether it is known when the engine is built."""

    def __init__(self, value, constant=True):
        self.value, self.constant = value, constant

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        assert self.constant
        return self.value


OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "MAX": max,
    "MIN": min,
}


class Builder:
    def constant(self, value):
        return Expr(value)

    def operation(self, operation, a, b):
        return Expr(OPERATIONS[operation.name](a.value, b.value), a.constant and b.constant)


class Registry(dict):
    def register_creator(self, creator, namespace):
        self[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name, version, namespace):
        return self[name, version, namespace]


class Plain:
    """For classes that only TensorRT's libraries can make."""


registry = Registry()
trt.get_plugin_registry = lambda: registry
trt.IDimensionExpr = Expr
trt.ISymExpr = Plain
trt.DimsExprs = lambda length: [None] * length

from rtp_llm.build import plugins  # noqa: E402

DTYPES = {"float16": trt.float16, "bfloat16": trt.bfloat16, "float32": trt.float32, "int32": trt.int32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fields_of(creator, attributes):
    """As the parser fills them: the creator's fields in order, an INT as int32, a FLOAT as float32."""
    fields, memory = [], []  # a field does not own its data
    for field in creator.field_names:
        value = attributes[field.name]  # the parser would warn, and the plugin lack an argument
        is_int = isinstance(value, int)
        memory.append(np.array([value], np.int32 if is_int else np.float32))
        kind = trt.PluginFieldType.INT32 if is_int else trt.PluginFieldType.FLOAT32
        assert field.type == kind, field.name
        fields.append(trt.PluginField(field.name, memory[-1], kind))
    return trt.PluginFieldCollection(fields), memory


def described(shape, dtype):
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.dims = trt.Dims([e.value if e.constant else -1 for e in shape])
    desc.desc.type = dtype
    return desc


def ask(node, sizes):
    attributes = dict(node["attributes"])
    version = attributes.pop("plugin_version"), attributes.pop("plugin_namespace")
    creator = registry.get_creator(node["kind"], *version)
    fields, memory = fields_of(creator, attributes)
    request = trt.QuickPluginCreationRequest
    request = request.STRICT_AOT if attributes.pop("aot") else request.STRICT_JIT
    plugin = creator.create_plugin(node["kind"], version[1], fields, trt.TensorRTPhase.BUILD, request)

    shapes = [
        [Expr(sizes[d], False) if isinstance(d, str) else Expr(d) for d in shape]
        for shape, _ in node["inputs"]
    ]
    types = [DTYPES[dtype] for _, dtype in node["inputs"]]
    output_types = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
    assert len(output_types) == plugin.get_num_outputs()
    outputs = plugin.get_output_shapes(shapes, [], Builder())

    everything = [*shapes, *outputs]
    io = [described(s, t) for s, t in zip(everything, [*types, *output_types], strict=True)]
    offered = plugin.get_supported_format_combinations(io, len(shapes))
    combinations = [offered[i : i + len(io)] for i in range(0, len(offered), len(io))]
    plugin.configure_plugin(io[: len(shapes)], io[len(shapes) :])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)

    class Scalars(dict):
        nbSymExprs = 0

    launch, scalars = Plain(), Scalars()
    plugin.get_launch_params(shapes, io, len(shapes), launch, scalars, Builder())
    in_desc, out_desc = [d.desc for d in io[: len(shapes)]], [d.desc for d in io[len(shapes) :]]
    name, ptx = plugin.get_kernel(in_desc, out_desc)
    assert len(scalars) == scalars.nbSymExprs
    assert all(s.dtype == trt.PluginArgDataType.INT32 for s in scalars.values())
    return {
        "types": [DTYPE_NAMES[t] for t in output_types],
        "shapes": [[e.value for e in shape] for shape in outputs],
        "static": [[e.value if e.constant else None for e in shape] for shape in outputs],
        "aliased": [plugin.get_aliased_input(i) for i in range(len(outputs))],
        "formats": [[DTYPE_NAMES[d.type] for d in combination] for combination in combinations],
        "linear": all(d.format == trt.TensorFormat.LINEAR for d in offered),
        "grid": [launch.grid_x.expr.value, launch.grid_y.expr.value, launch.grid_z.expr.value],
        "block": [launch.block_x.expr.value, launch.block_y.expr.value, launch.block_z.expr.value],
        "shared": launch.shared_mem.expr.value,
        "scalars": [scalars[i].expr.value for i in range(len(scalars))],
        "name": name,
        "ptx": ptx.decode(),
    }


result = []
for build in builds:  # noqa: F821
    plugins.register(build["capability"])
    result.append([ask(node, build["sizes"]) for node in build["nodes"]])

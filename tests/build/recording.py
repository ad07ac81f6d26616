"""A stand-in for `tensorrt`, drawn from the real bindings of one version, that records every call.

It has the names that the real module has and no others; arguments are bound to the signatures in the real
docstrings. Networks are ONNX models, a plan is a pickle of one, and an engine runs it in onnx.reference on
the memory that its tensors' addresses name. Like TensorRT it refuses by returning False or None: shapes
outside of the profile, missing addresses, a cache whose output lies elsewhere, a plan of another version.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import math
import pickle
import re
import types
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# runs where the real bindings are
PARAMETERS = '''
def parameters(doc, name):
    """Every overload of a pybind docstring: its parameters' names, whether they have a default."""
    found = []
    for line in (doc or "").splitlines():
        line = line.split(". ", 1)[-1] if line[:1].isdigit() else line
        if not line.startswith(name + "(") or line.startswith(name + "(*args"):
            continue
        depth, text, parts = 0, "", []
        for c in line[len(name) + 1 :]:
            depth += (c in "([<{") - (c in ")]>}")
            if depth < 0:
                break
            if c == "," and not depth:
                parts.append(text)
                text = ""
            else:
                text += c
        parts = [p.strip() for p in [*parts, text] if p.strip()]
        found.append([[p.split(":")[0].strip(), "=" in p] for p in parts if p.split(":")[0] != "self"])
    return found
'''

# collects what the stand-in may have
COLLECT = (
    PARAMETERS
    + """
import inspect
import tensorrt as trt

def describe(cls):
    if hasattr(cls, "__members__"):
        return {"enum": {name: int(value) for name, value in cls.__members__.items()}}
    methods, properties, nested = {}, {}, {}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            properties[name] = value.fset is not None
        elif isinstance(value, type):
            if not name.startswith("__"):
                nested[name] = describe(value)
        elif name == "__init__" or not name.startswith("_"):
            doc = getattr(getattr(cls, name), "__doc__", None)
            if callable(getattr(cls, name)) and parameters(doc, name):
                methods[name] = parameters(doc, name)
    return {"methods": methods, "properties": properties, "nested": nested}

result = {"version": trt.__version__, "classes": {}, "functions": {}}
for name in dir(trt):
    value = getattr(trt, name)
    if isinstance(value, type):
        result["classes"][name] = describe(value)
    elif callable(value) and parameters(value.__doc__, name):
        result["functions"][name] = parameters(value.__doc__, name)
"""
)

CALLBACKS = {"ILogger", "IProgressMonitor", "IStreamWriter"}  # which the application derives from
DTYPES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8",
}  # fmt: skip


@dataclass
class Call:
    name: str  # "Builder.create_network"; "IBuilderConfig.progress_monitor=" for a property that is set
    args: dict[str, Any]


def bind(name: str, overloads: list[list[list[Any]]], args: tuple[Any, ...], kwargs: dict[str, Any]):
    """The arguments by their real names; TypeError if no overload takes them."""
    for parameters in overloads:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [
                inspect.Parameter(p, kind, default=None if d else inspect.Parameter.empty)
                for p, d in parameters
            ]
        )
        try:
            return dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            continue
    raise TypeError(f"{name} takes {overloads}, was called with {args} {kwargs}")


class Recording:
    """`module` is the stand-in; `calls` all that was called. The rest sets how it behaves."""

    def __init__(self, spec: dict[str, Any], capability: str = "9.0"):
        self.spec, self.capability = spec, capability
        self.calls: list[Call] = []
        self.refuses: list[str] = []  # what the parser says of a graph
        self.fails: str = ""  # what a build says
        self.module: Any = types.ModuleType("tensorrt")
        self.module.__version__ = spec["version"]
        for name, what in spec["classes"].items():
            setattr(self.module, name, self._class(name, what))
        for name, overloads in spec["functions"].items():
            setattr(self.module, name, self._function(name, overloads))

    def named(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of that name."""
        return [call.args for call in self.calls if call.name == name]

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def _function(self, name: str, overloads: list[Any]) -> Any:
        def function(*args: Any, **kwargs: Any) -> None:
            self.calls.append(Call(name, bind(name, overloads, args, kwargs)))

        return function

    def _class(self, name: str, what: dict[str, Any]) -> type:
        if "enum" in what:
            return enum.IntEnum(name, what["enum"])  # type: ignore[return-value]
        record, behaviour = self, globals().get(f"_{name}", object)
        members: dict[str, Any] = {n: self._class(n, w) for n, w in what["nested"].items()}

        def method(key: str, overloads: list[Any]) -> Any:
            act = getattr(behaviour, key, None) if hasattr(behaviour, key) and key != "__init__" else None

            def call(this: Any, *args: Any, **kwargs: Any) -> Any:
                given = bind(f"{name}.{key}", overloads, args, kwargs)
                record.calls.append(Call(f"{name}.{key}", given))
                return act(this, **given) if act else None

            return call

        def initialise(this: Any, *args: Any, **kwargs: Any) -> None:
            object.__setattr__(this, "_", types.SimpleNamespace(record=record, trt=record.module))
            given = bind(name, what["methods"].get("__init__", [[]]), args, kwargs)
            record.calls.append(Call(name, given))
            if hasattr(behaviour, "start"):
                behaviour.start(this, **given)

        def get(key: str) -> Any:
            act = getattr(behaviour, f"get_{key}", None)
            return lambda this: act(this) if act else getattr(this._, key, None)

        def put(key: str) -> Any:
            act = getattr(behaviour, f"set_{key}", None)

            def set_(this: Any, value: Any) -> None:
                record.calls.append(Call(f"{name}.{key}=", {"value": value}))
                act(this, value) if act else setattr(this._, key, value)

            return set_

        def refuse(this: Any, key: str, value: Any) -> None:
            known = inspect.getattr_static(type(this), key, None)
            if type(this).__name__ == name and not isinstance(known, property):
                raise AttributeError(f"TensorRT {record.spec['version']}: {name} has no {key}")
            object.__setattr__(this, key, value)

        for key, overloads in what["methods"].items():
            if not (name in CALLBACKS and key != "__init__"):
                members[key] = method(key, overloads)
        for key, settable in what["properties"].items():
            members[key] = property(get(key), put(key) if settable else None)
        members |= {"__init__": initialise, "__setattr__": refuse}
        if name in CALLBACKS:
            callbacks = [key for key in what["methods"] if key != "__init__"]

            def derived(cls: Any, **kwargs: Any) -> None:
                missing = [key for key in callbacks if not hasattr(cls, key)]
                if missing:
                    raise TypeError(f"{cls.__name__} does not override {name}.{missing[0]}")

            members["__init_subclass__"] = classmethod(derived)
        return type(name, (), members)


def _make(this: Any, name: str, **state: Any) -> Any:
    """An object that only TensorRT makes."""
    cls = getattr(this._.trt, name)
    made = cls.__new__(cls)
    object.__setattr__(made, "_", types.SimpleNamespace(record=this._.record, trt=this._.trt, **state))
    return made


def _error(logger: Any, text: str) -> None:
    logger.log(logger._.trt.ILogger.Severity.ERROR, text)


# ------------------------------------------------------------------------------------------- builder


class _Builder:
    def start(self: Any, logger: Any) -> None:
        assert isinstance(logger, self._.trt.ILogger) and logger._, "a logger that was not initialised"
        self._.logger = logger

    def create_network(self: Any, flags: int = 0) -> Any:
        return _make(self, "INetworkDefinition", flags=flags, model=None)

    def create_builder_config(self: Any) -> Any:
        flags = {self._.trt.BuilderFlag.TF32}
        return _make(self, "IBuilderConfig", profiles=[], enabled=flags, preview=set(), timings=None)

    def create_optimization_profile(self: Any) -> Any:
        return _make(self, "IOptimizationProfile", shapes={})

    def build_serialized_network_to_stream(self: Any, network: Any, config: Any, writer: Any) -> bool:
        record, logger = self._.record, self._.logger
        watch = getattr(config._, "progress_monitor", None)
        try:
            _check_build(network._.model, config)
        except ValueError as e:
            _error(logger, str(e))
            return False
        if record.fails:
            _error(logger, record.fails)
            return False
        if watch:
            watch.phase_start("Building Engine", None, 2)
            watch.phase_start("Tactic Search", "Building Engine", 3)
            for step in range(3):
                if not watch.step_complete("Tactic Search", step):
                    return False
            watch.phase_finish("Tactic Search")
            for step in range(2):
                if not watch.step_complete("Building Engine", step):
                    return False
            watch.phase_finish("Building Engine")
        if config._.timings:
            config._.timings._.entries += 1
        plan = pickle.dumps(
            {
                "version": record.spec["version"],
                "capability": record.capability,
                "model": network._.model.SerializeToString(),
                "profiles": [p._.shapes for p in config._.profiles],
                "streams": "WEIGHT_STREAMING" in {flag.name for flag in config._.enabled},
            }
        )
        chunks = (plan[i : i + 2**20] for i in range(0, len(plan), 2**20))
        return all(writer.write(chunk) == len(chunk) for chunk in chunks)


def _check_build(model: Any, config: Any) -> None:
    """What a build refuses."""
    inputs = _tensors(model.graph.input)
    aliases = any(n.domain == "rtp_llm" and n.op_type == "CacheWrite" for n in model.graph.node)
    if aliases and config._.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03 not in config._.preview:
        raise ValueError("plugin CacheWrite aliases its inputs, which is a preview feature")
    for i, profile in enumerate(config._.profiles):
        shapes = profile._.shapes
        if unknown := set(shapes) - set(inputs):
            raise ValueError(f"profile {i} names {unknown}, which are no inputs")
        for name, (_, shape) in inputs.items():
            if name not in shapes:
                if not all(isinstance(d, int) for d in shape):
                    raise ValueError(f"profile {i} says nothing of the dynamic input {name}")
                continue
            for given in shapes[name]:
                fixed = [isinstance(d, str) or d == g for d, g in zip(shape, given, strict=True)]
                if not all(fixed):
                    raise ValueError(f"profile {i} gives {name} {given}, it is {shape}")
            if math.prod(shapes[name][2]) > 2**31 - 1:
                raise ValueError(f"profile {i}: {name} has more than 2^31 - 1 elements")


def _tensors(values: Any) -> dict[str, tuple[np.dtype, list[int | str]]]:
    import onnx

    return {
        v.name: (
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)),
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


class _OnnxParser:
    def start(self: Any, network: Any, logger: Any) -> None:
        self._.network, self._.errors = network, []

    def parse_from_file(self: Any, model: str) -> bool:
        import onnx

        self._.network._.model = onnx.load(model)
        self._.errors = self._.record.refuses
        return not self._.errors

    def get_num_errors(self: Any) -> int:
        return len(self._.errors)

    def get_error(self: Any, index: int) -> Any:
        return _make(self, "ParserError", text=self._.errors[index])


class _ParserError:
    def desc(self: Any) -> str:
        return self._.text

    def node_name(self: Any) -> str:
        return "a node"

    def node_operator(self: Any) -> str:
        return "AnOp"


class _IOptimizationProfile:
    def set_shape(self: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        for low, best, high in zip(min, opt, max, strict=True):
            if not 0 <= low <= best <= high:
                raise ValueError(f"{input}: {min}, {opt}, {max}")
        self._.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class _IBuilderConfig:
    def add_optimization_profile(self: Any, profile: Any) -> int:
        self._.profiles.append(profile)
        return len(self._.profiles) - 1

    def set_flag(self: Any, flag: Any) -> None:
        self._.enabled.add(self._.trt.BuilderFlag(flag))

    def clear_flag(self: Any, flag: Any) -> None:
        self._.enabled.discard(self._.trt.BuilderFlag(flag))

    def set_preview_feature(self: Any, feature: Any, enable: bool) -> None:
        (self._.preview.add if enable else self._.preview.discard)(self._.trt.PreviewFeature(feature))

    def create_timing_cache(self: Any, serialized_timing_cache: Any) -> Any:
        blob = bytes(serialized_timing_cache)
        found = re.fullmatch(rb"timings of ([\d.]+): (\d+)", blob)
        if blob and not found:
            return None
        owner, entries = (found[1].decode(), int(found[2])) if found else (self._.record.capability, 0)
        return _make(self, "ITimingCache", owner=owner, entries=entries)

    def set_timing_cache(self: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._.owner != self._.record.capability and not ignore_mismatch:
            return False
        self._.timings = cache
        return True

    def get_timing_cache(self: Any) -> Any:
        return self._.timings


class _ITimingCache:
    def serialize(self: Any) -> bytes:
        return f"timings of {self._.owner}: {self._.entries}".encode()


# ------------------------------------------------------------------------------------------- runtime


class _Runtime:
    def start(self: Any, logger: Any) -> None:
        self._.logger = logger

    def deserialize_cuda_engine(self: Any, serialized_engine: Any) -> Any:
        from onnx import load_from_string
        from onnx.reference import ReferenceEvaluator

        from rtp_llm.export.paged_attention.reference import operators

        try:
            plan = pickle.loads(serialized_engine)
        except Exception:
            _error(self._.logger, "magic tag does not match")
            return None
        record = self._.record
        if (plan["version"], plan["capability"]) != (record.spec["version"], record.capability):
            _error(self._.logger, "the plan was built by another version or for another GPU")
            return None
        model = load_from_string(plan["model"])
        inputs, outputs = _tensors(model.graph.input), _tensors(model.graph.output)
        engine = _make(
            self, "ICudaEngine", logger=self._.logger, plan=plan, inputs=inputs, outputs=outputs,
            run=ReferenceEvaluator(model, new_ops=operators()), budget=None,
            aliases=_aliases(model),
        )  # fmt: skip
        return engine


def _aliases(model: Any) -> dict[str, str]:
    """Outputs that are an input, updated."""
    outputs, found = {o.name for o in model.graph.output}, {}
    for node in model.graph.node:
        if node.op_type == "CacheWrite":
            found |= dict(zip(node.output, node.input[2:4], strict=True))
        elif node.op_type == "TensorScatter":
            found[node.output[0]] = node.input[0]
    return {out: source for out, source in found.items() if out in outputs}


class _ICudaEngine:
    def get_num_io_tensors(self: Any) -> int:
        return len(self._.inputs) + len(self._.outputs)

    def get_num_optimization_profiles(self: Any) -> int:
        return len(self._.plan["profiles"])

    def get_tensor_name(self: Any, index: int) -> str:
        return [*self._.inputs, *self._.outputs][index]

    def get_tensor_mode(self: Any, name: str) -> Any:
        mode = self._.trt.TensorIOMode
        return mode.INPUT if name in self._.inputs else mode.OUTPUT

    def get_tensor_dtype(self: Any, name: str) -> Any:
        dtype, _ = {**self._.inputs, **self._.outputs}[name]
        return self._.trt.DataType[DTYPES[dtype.name]]

    def get_tensor_profile_shape(self: Any, name: str, profile_index: int) -> Any:
        return list(self._.plan["profiles"][profile_index].get(name, [self._.inputs[name][1]] * 3))

    def get_aliased_input_tensor(self: Any, name: str) -> Any:
        return self._.aliases.get(name)

    def get_device_memory_size_for_profile_v2(self: Any, profile_index: int) -> int:
        return 1000 + profile_index

    def get_streamable_weights_size(self: Any) -> int:
        return 10**6 if self._.plan["streams"] else 0

    def set_weight_streaming_budget_v2(self: Any, value: int) -> None:
        assert self._.plan["streams"], "built without weight streaming"
        self._.budget = value

    def create_execution_context(self: Any, strategy: Any = None) -> Any:
        return _make(
            self, "IExecutionContext", engine=self, profile=None, shapes={}, addresses={},
            memory=(0, 0), managed=strategy == self._.trt.ExecutionContextAllocationStrategy.USER_MANAGED,
        )  # fmt: skip


class _IExecutionContext:
    def set_optimization_profile_async(self: Any, profile_index: int, stream_handle: int) -> bool:
        # contexts may share a profile: PreviewFeature.PROFILE_SHARING_0806 is on in 10, and gone in 11
        if profile_index not in range(len(self._.engine._.plan["profiles"])):
            return False
        self._.profile = profile_index
        self._.shapes.clear()
        return True

    def set_device_memory(self: Any, memory: int, size: int) -> None:
        self._.memory = (memory, size)

    def set_input_shape(self: Any, name: str, shape: Any) -> bool:
        engine = self._.engine._
        if self._.profile is None or name not in engine.inputs:
            return False
        ranges = engine.plan["profiles"][self._.profile].get(name)
        low, _, high = ranges or [engine.inputs[name][1]] * 3
        if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            _error(
                engine.logger, f"profile {self._.profile}: {name} {tuple(shape)} is outside of {low}, {high}"
            )
            return False
        self._.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self: Any, name: str, memory: int) -> bool:
        engine = self._.engine._
        if name not in engine.inputs and name not in engine.outputs:
            return False
        self._.addresses[name] = memory
        return True

    def infer_shapes(self: Any) -> list[str]:
        return [
            name
            for name, (_, shape) in self._.engine._.inputs.items()
            if name not in self._.shapes and not all(isinstance(d, int) for d in shape)
        ]

    def execute_async_v3(self: Any, stream_handle: int) -> bool:
        engine = self._.engine._
        need = 1000 + self._.profile if self._.profile is not None else 0
        without = [name for name in (*engine.inputs, *engine.outputs) if not self._.addresses.get(name)]
        problem = ""
        if self._.profile is None:
            problem = "no profile was chosen"
        elif self._.managed and (not self._.memory[0] or self._.memory[1] < need):
            problem = "no device memory was given"
        elif missing := _IExecutionContext.infer_shapes(self):
            problem = f"no shape was given to {missing}"
        elif without:
            problem = f"no address was given to {without}"
        for out, source in engine.aliases.items():
            if not problem and self._.addresses[out] != self._.addresses[source]:
                problem = f"{out} must lie where {source} lies"
        if problem:
            _error(engine.logger, problem)
            return False
        feeds = {}
        for name, (dtype, shape) in engine.inputs.items():
            feeds[name] = _at(self._.addresses[name], dtype, self._.shapes.get(name, shape)).copy()
        for name, value in zip(engine.outputs, engine.run.run(None, feeds), strict=True):
            dtype = engine.outputs[name][0]
            _at(self._.addresses[name], dtype, value.shape)[...] = value.astype(dtype)
        return True


def _at(address: int, dtype: np.dtype, shape: Any) -> np.ndarray:
    """The memory there as an array."""
    size = max(1, math.prod(shape) * dtype.itemsize)
    memory = (ctypes.c_char * size).from_address(address)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype.name == "bfloat16" else dtype
    return np.frombuffer(memory, kind, math.prod(shape)).reshape(shape)

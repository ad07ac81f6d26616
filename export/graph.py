"""A module → an ONNX graph, or a TorchScript archive, with weights that stream.

Graphs are traced on fake tensors; weights go from the mapped checkpoint through their transform into the
graph's data file in chunks of rows, so memory does not grow with the model.
"""

from __future__ import annotations

import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InternalError
from .bundle import GraphSpec, TensorSpec
from .checkpoint import CHUNK, Weight
from .families import Plan
from .target import Target

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import Tensor, nn

    from .qdq import Range


OPSETS = {"linear": 24}  # TensorScatter and its Attention; else 23


@dataclass(frozen=True)
class Progress:
    """What `export` tells its `progress` callback: a line of text, or bytes written; `build`: steps."""

    text: str
    done: int = 0  # bytes
    total: int = 0  # bytes; 0: only a line of text
    seconds: float = 0.0  # since the first byte

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float:
        """Seconds until the last byte, at the rate so far."""
        return (self.total - self.done) / self.rate if self.rate else 0.0


@dataclass
class GraphPlan:
    """A module to be exported, with where its weights come from."""

    make: Callable[[], nn.Module]  # the module whose forward takes `inputs` in order
    root: str  # what stands before the names of `weights` in that module
    weights: Mapping[str, Weight]
    constants: Mapping[str, Tensor]  # buffers that are computed
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: str
    transposed: bool  # store float32 linear layers for MatMul
    kind: str = "cpu"  # quantize.swap's target
    dtype: str = "float32"  # of its matrix products
    opset: int = 23
    ranges: Mapping[str, Range] = field(default_factory=dict)  # of linear layers' inputs, see calibrate.py

    @classmethod
    def of_vision(cls, plan: Plan, made_for: Target, precision: str) -> GraphPlan:
        v = plan.vision
        return cls(
            make=plan.make_vision,
            root="",
            weights=plan.vision_weights,
            constants={},
            inputs=[TensorSpec("pixels", "uint8", ["N", v.size, v.size, 3])],
            outputs=[TensorSpec("image_embeds", "float32", ["N", v.tokens, v.hidden_size])],
            precision=precision,
            transposed=True,
            kind=made_for.kind,
            dtype=made_for.dtype(precision),
        )

    @classmethod
    def of_decoder(cls, plan: Plan, made_for: Target, precision: str) -> GraphPlan:
        from .attention import LOWERINGS, Graph, specs
        from .decoder import Decoder, constants
        from .packed import apart, presorted

        lowering = made_for.attention
        script = made_for.kind == "torchscript"
        weights = apart(plan.decoder_weights) if precision == "int4" else plan.decoder_weights
        if made_for.kind == "cpu" and precision == "int4":
            weights = presorted(weights)
        inputs, outputs = specs(lowering, plan.decoder, made_for.dtype(precision), metadata=not script)

        def make() -> nn.Module:
            if script:
                from .torchscript import PagedOp, Script

                return Script(Decoder(plan.decoder), PagedOp, inputs)
            return Graph(Decoder(plan.decoder), LOWERINGS[lowering], inputs)

        return cls(
            make=make,
            root="decoder.",
            weights=weights,
            constants=constants(plan.decoder),
            inputs=inputs,
            outputs=outputs[:1] if script else outputs,
            precision=precision,
            transposed=False,
            opset=OPSETS.get(lowering, 23),
            kind=made_for.kind,
            dtype=made_for.dtype(precision),
        )

    @property
    def bytes(self) -> int:
        """Size of the data file, nearly."""
        from .packed import Int4, alike
        from .quantize import BLOCKS

        per_weight = {
            "fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "rows": 1.0, "qdq": 0.5 + 2 / 64,
            "int8": 1.02, "int4": 0.5 + 4.5 / BLOCKS[4],
        }  # fmt: skip
        quantised = self.precision
        if self.kind != "cpu":
            quantised = {"int8": "rows", "int4": "qdq"}.get(quantised, quantised)
        size = 0.0
        for name, weight in self.weights.items():
            elements = sum(math.prod(shape) for _, shape in weight.parts)
            kind = quantised if len(weight.parts[0][1]) == 2 else "fp32"
            if kind in ("fp8", "rows", "qdq") and name in ("embed.weight", "head.weight"):
                kind = "bf16"
            if kind == "int4" and name == "embed.weight" and self.kind == "cpu":
                kind = "int8"
            own = alike(weight) if kind == "int4" else None
            size += elements * (0.5 + 4.5 / own.block if isinstance(own, Int4) else per_weight[kind])
        return int(size) + sum(t.nbytes for t in self.constants.values())

    def write(self, folder: Path, key: str, writer: Writer) -> GraphSpec:
        """Write `key`.onnx and its data file, or `key`.pt."""
        if self.kind == "torchscript":
            from . import torchscript

            return torchscript.write(
                self, folder, key,
                lambda text: writer.tell(Progress(text)),
                lambda nbytes, name: writer.count(nbytes, key, name),
            )  # fmt: skip
        import onnx_ir as ir

        writer.tell(Progress(f"tracing the {key} graph"))
        model, stored = self._trace()
        data = f"{key}.onnx.data"
        with open(folder / data, "wb") as file:
            self._fill(model, stored, file, data, key, writer)
        ir.save(model, folder / f"{key}.onnx")
        return GraphSpec(f"{key}.onnx", self.inputs, self.outputs, self.precision)

    def _trace(self) -> tuple[ir.Model, dict[str, str]]:
        """The ONNX graph without weights, and how each weight is stored (quantize.swap)."""
        import onnx_ir.passes.common as passes
        import torch
        from onnxscript.optimizer import fold_constants
        from torch._subclasses.fake_tensor import FakeTensorMode

        from .quantize import swap

        # example sizes differ, so that no two dynamic dimensions are taken for one; none is 0 or 1
        names = sorted({d for spec in self.inputs for d in spec.shape if isinstance(d, str)})
        example = {name: 5 + 2 * i for i, name in enumerate(names)}
        for weight in self.weights.values():
            weight.quantised()  # what it reads to know that would be fake below
        with _quiet(), FakeTensorMode():
            module = self.make().eval().requires_grad_(False)
            ranges = {self.root + name: seen for name, seen in self.ranges.items()}
            weights = {self.root + name: weight for name, weight in self.weights.items()}
            stored = swap(
                module, self.precision, self.kind, transposed=self.transposed, ranges=ranges, weights=weights
            )
            tensors, dynamic = [], []
            for spec in self.inputs:
                shape = [example[d] if isinstance(d, str) else d for d in spec.shape]
                tensors.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
                dynamic.append(
                    {i: torch.export.Dim.DYNAMIC for i, d in enumerate(spec.shape) if isinstance(d, str)}
                )
            shapes: Any = (tuple(dynamic),) if self.root else tuple(dynamic)
            exported = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,  # it looks into the weights
                opset_version=self.opset,
                input_names=[spec.name for spec in self.inputs],
                output_names=[spec.name for spec in self.outputs],
                verbose=False,
            )
        assert program is not None
        model = program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # fake
        passes.CommonSubexpressionEliminationPass()(model)  # before equal constants become two initializers
        fold_constants(model, onnx_shape_inference=False, input_size_limit=64, output_size_limit=64)
        passes.CommonSubexpressionEliminationPass()(model)
        if self.kind == "cpu":
            self._join(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)  # stack traces, with this machine's paths
        self._cast_bytes_first(model)
        self._name_dimensions(model)
        return model, stored

    def _join(self, model: ir.Model) -> None:
        """Fewer nodes, each of which costs a decode some microseconds: what is split and put together again
        was whole; a residual sum and the norm behind it are one operator of ONNX Runtime's on the CPU."""
        import onnx_ir as ir

        replace = ir.convenience.replace_all_uses_with
        for node in list(model.graph):
            before: Any = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
            kinds = node.op_type, before.op_type if before else ""
            values: list[Any] = list(before.inputs) if before else []
            if kinds == ("Concat", "Split") and tuple(node.inputs) == tuple(before.outputs):
                replace(node.outputs[0], values[0])
            elif kinds == ("RMSNormalization", "Add") and values[0].shape == values[1].shape:
                normed, summed = (
                    ir.Value(name=f"{old.name}_joined", shape=old.shape, type=old.type)
                    for old in (node.outputs[0], before.outputs[0])
                )
                both = ir.node(
                    "SkipSimplifiedLayerNormalization",
                    [*values, node.inputs[1]],
                    {"epsilon": node.attributes["epsilon"].as_float()},
                    domain="com.microsoft",
                    outputs=[normed, ir.Value(name=""), ir.Value(name=""), summed],
                )
                model.graph.insert_before(before, both)
                replace((node.outputs[0], before.outputs[0]), (normed, summed))

    def _cast_bytes_first(self, model: ir.Model) -> None:
        """TensorRT lets a uint8 input into a Cast and nothing else: its sizes are read off the floats."""
        for spec, value in zip(self.inputs, model.graph.inputs, strict=True):
            users = [node for node, _ in value.uses()]
            casts = [node for node in users if node.op_type == "Cast"]
            if spec.dtype == "uint8" and casts:
                model.graph.remove(casts[0])
                model.graph.insert_before(model.graph[0], casts[0])
                for node in users:
                    if node.op_type == "Shape":
                        node.replace_input_with(0, casts[0].outputs[0])

    def _name_dimensions(self, model: ir.Model) -> None:
        """Dynamic dimensions get the names that the specs give them, in the whole graph."""
        import onnx_ir as ir

        names: dict[str, str] = {}
        for spec, value in zip(self.inputs, model.graph.inputs, strict=True):
            assert value.name == spec.name and value.shape is not None
            names.update(
                (str(d), n) for d, n in zip(value.shape, spec.shape, strict=True) if isinstance(n, str)
            )
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d), str(d))
                                        for d in value.shape])  # fmt: skip
        for spec, value in zip(self.outputs, model.graph.outputs, strict=True):
            value.shape = ir.Shape(spec.shape)

    def _fill(
        self,
        model: ir.Model,
        stored: Mapping[str, str],
        file: Any,
        location: str,
        key: str,
        writer: Writer,
    ) -> None:
        """Stream every weight into `file` and point the graph's initializers at it."""
        import onnx_ir as ir
        import torch
        from onnx_ir import tensor_adapters

        from . import packed, qdq
        from .quantize import int8_columns, quantize

        waiting = {n: v for n, v in model.graph.initializers.items() if v.const_value is None}
        offset = 0

        def place(name: str) -> int:
            """Reserve room for an initializer; returns where."""
            nonlocal offset
            value = waiting.pop(name)
            assert value.dtype is not None and value.shape is not None
            length = math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8
            align = 4096 if length > 2**16 else 64  # pages, where it matters: ONNX Runtime maps the file
            at = offset = -(-offset // align) * align
            value.const_value = ir.ExternalTensor(
                location, at, length, value.dtype, shape=value.shape, name=name, base_dir=""
            )
            offset += length
            return at

        for name in list(waiting):
            if name not in waiting:
                continue  # written with its weight
            short = name.removeprefix(self.root)
            base = re.sub(r"\.(scales|zero_points|input_scale|sort\.order)$", ".weight", short)
            kind = stored.get(self.root + base, "plain")
            stem = self.root + base.removesuffix("weight")
            if short in self.constants:
                writer.put(file, place(name), self.constants[short], key, short)
            elif base not in self.weights:
                raise InternalError(f"{key} graph: nothing fills the tensor {name}")
            elif kind.startswith("int") or (kind == "own-int4" and self.kind == "cpu"):
                places = [place(self.root + base)]
                places += [place(stem + part) for part in ("scales", "zero_points")]
                weight = self.weights[base]
                if kind == "own-int4":
                    pieces = (part.packed(low, high) for part, low, high in packed.spans(weight))
                else:
                    numbers = [int(n) for n in kind[3:].split("-")]  # bits, and a block that is not usual
                    pieces = (quantize(rows, *numbers) for rows in weight.chunks())
                writer.put_quantized(file, places, pieces, key, base)
            elif kind.startswith(("columns", "qdq-", "own-")):
                value = waiting[stem + "weight"]
                assert value.shape is not None
                if kind.endswith("int4"):
                    value.dtype = ir.DataType.INT4
                places = [place(stem + part) for part in ("weight", "scales")]
                width = int(value.shape.numpy()[1])
                weight = self.weights[base]
                if kind == "columns":
                    columns = int8_columns(weight)
                else:
                    columns = qdq.columns(weight, kind[4:]) if kind[0] == "q" else qdq.own_columns(weight)
                writer.put_qdq(file, places, columns, width, key, base)
                if stem + "input_scale" in waiting:
                    amax = self.ranges[base.removesuffix(".weight")].amax
                    scale = qdq.scale_of(torch.tensor(amax), kind[4:])
                    writer.put(file, place(stem + "input_scale"), scale, key, base)
            else:
                value = waiting[name]
                assert value.dtype is not None
                dtype = tensor_adapters.to_torch_dtype(value.dtype)
                if kind == "transposed":
                    assert value.shape is not None
                    width = int(value.shape.numpy()[1])
                    writer.put_transposed(file, place(name), self.weights[base], dtype, width, key, base)
                else:
                    writer.put_rows(file, place(name), self.weights[base], dtype, key, base)
            if stem + "sort.order" in waiting:
                own = packed.alike(self.weights[base])
                assert isinstance(own, packed.Int4) and own.order is not None
                writer.put(file, place(stem + "sort.order"), own.order, key, base)
            if file.tell() != offset:
                raise InternalError(f"{key} graph: {name} was stored with another size than its shape's")


class Writer:
    """Puts tensors at their places in a data file, in chunks, and reports progress."""

    def __init__(self, total: int, tell: Callable[[Progress], None]):
        self.total, self.tell = total, tell
        self.done = 0
        self.start = 0.0

    def put(self, file: Any, at: int, tensor: Tensor, key: str, name: str) -> int:
        """Write a tensor's elements at an offset; returns the number of bytes."""
        file.seek(at)
        file.write(_bytes(tensor))
        self.count(tensor.nbytes, key, name)
        return tensor.nbytes

    def count(self, nbytes: int, key: str, name: str) -> None:
        """Bytes of a weight were stored: tell how far the export is."""
        now = time.monotonic()
        self.start = self.start or now
        self.done = min(self.done + nbytes, self.total)
        self.tell(Progress(f"{key} {name}", self.done, self.total, now - self.start))

    def put_rows(
        self, file: Any, at: int, weight: Weight, dtype: torch.dtype, key: str, name: str
    ) -> None:
        for rows in weight.chunks():
            at += self.put(file, at, rows.to(dtype), key, name)

    def put_transposed(
        self, file: Any, at: int, weight: Weight, dtype: torch.dtype, width: int, key: str, name: str
    ) -> None:
        """A matrix [width, in] as [in, width], in chunks of its rows: each becomes a block of columns, which
        is written piece by piece; that costs a system call each, and no memory."""
        start = 0
        for rows in weight.chunks(4 * CHUNK):  # longer pieces, fewer calls
            self.put_columns(file, at, rows.t().to(dtype), start, width, key, name)
            start += len(rows)

    def put_columns(
        self, file: Any, at: int, block: Tensor, start: int, width: int, key: str, name: str
    ) -> None:
        """A block [in, n] as columns `start` … of a matrix [in, width] that is stored at `at`."""
        for i, piece in enumerate(_bytes(block).reshape(len(block), -1)):
            file.seek(at + (i * width + start) * block.itemsize)
            file.write(piece)
        self.count(block.nbytes, key, name)

    def put_qdq(
        self, file: Any, places: list[int], columns: Iterator[tuple[int, Tensor, Tensor]], width: int,
        key: str, name: str,
    ) -> None:  # fmt: skip
        """A matrix [width, in] and its scales as qdq.columns and quantize.int8_columns cut them."""
        from . import qdq

        for start, q, scales in columns:
            if scales.dim() == 2:  # int4
                self.put_columns(file, places[0], qdq.pack(q), start // 2, width // 2, key, name)
                self.put_columns(file, places[1], scales, start, width, key, name)
            else:
                self.put_columns(file, places[0], q, start, width, key, name)
                self.put(file, places[1] + start * scales.dim() * scales.itemsize, scales, key, name)

    def put_quantized(
        self, file: Any, places: list[int], pieces: Iterator[tuple[Tensor, ...]], key: str, name: str
    ) -> None:
        """Chunks of rows as quantize.quantize gives them."""
        for piece in pieces:
            for i, tensor in enumerate(piece):
                places[i] += self.put(file, places[i], tensor, key, name)


def _bytes(tensor: Tensor) -> Any:
    """The elements as a flat uint8 array; NumPy has no bfloat16 and no float8."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""Checkpoint → bundle: the steps, in order.

Graphs are traced on fake tensors; weights go from the mapped checkpoint through their transform into the
graph's data file in chunks of rows, so memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import (
    BundleError,
    CheckpointError,
    InternalError,
    MissingDependency,
    NotSupportedYet,
    UserError,
)
from . import bundle as bundles
from .bundle import Bundle, GraphSpec, ModelSpec, Origin, RopeSpec, TensorSpec
from .checkpoint import Checkpoint, Weight, resolve, size_text
from .families import FAMILIES, Options, Plan, detect

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, nn

EXPORTER = "1"  # raise it when the same checkpoint and options give another bundle
PRECISIONS = ("auto", "fp32", "int8", "int4")
OPSET = 23
CHUNK = 2**22  # weights transformed at a time
SMALL = 2_000_000_000  # parameters up to which "auto" on a CPU keeps float32
WORKING = 2**30  # bytes of memory that an export takes beside its largest chunk


@dataclass(frozen=True)
class Progress:
    """What `export` tells its `progress` callback: a line of text, or bytes written so far."""

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


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    backend: str = "onnxruntime",
    precision: str = "auto",
    vision_precision: str = "fp32",
    max_seq_len: int | None = None,
    vision_tower: str | None = None,
    conversation: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Export a checkpoint folder or hub id to the bundle folder `output`, and open that.

    model: the family, checked against the checkpoint. precision: of the decoder's linear layers, head
    and embedding; "auto" is int4 above two billion parameters and fp32 below. vision_precision: of the
    image encoder's linear layers. vision_tower, conversation, tokenizer: in place of what the checkpoint
    names. output: default `./<name>-<backend>-<precision>`; a bundle of the same checkpoint and options
    that is already there is kept, unless `force`. A failed export leaves nothing behind.

    Raises CheckpointError (missing or damaged checkpoint), UnknownArchitecture, NotSupportedYet,
    BundleError (`output` is something else), UserError (impossible options; disk or memory too small).
    """
    tell = progress or (lambda _: None)
    _check_options(model, backend, precision, vision_precision)
    try:
        import onnx_ir  # noqa: F401
        import torch  # noqa: F401
    except ImportError as e:
        raise MissingDependency(
            f"an export needs {e.name}: pip install torch onnx onnxscript onnx-ir"
        ) from e

    source = Checkpoint(resolve(checkpoint, revision, tell=lambda text: tell(Progress(text))))
    family, architecture = detect(source.config)
    if model not in (None, family):
        raise CheckpointError(f"{checkpoint} is a {family} checkpoint, --model is {model!r}")
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method")
        raise NotSupportedYet(
            f"{checkpoint} is quantised with {method!r}, which is not supported yet: "
            "export the unquantised checkpoint"
        )
    options = Options(max_seq_len, vision_tower, conversation, tokenizer, revision)
    plan = FAMILIES[family].plan(source, options)
    for weight in plan.decoder_weights.values():
        weight.check()

    count = _parameters(plan.decoder_weights) + _parameters(plan.vision_weights)
    if precision == "auto":
        precision = "int4" if count > SMALL else "fp32"
    name = _name(checkpoint)
    final = Path(output) if output is not None else Path(f"{name}-{backend}-{precision}")
    origin = Origin(
        checkpoint=str(source.path) if Path(checkpoint).exists() else str(checkpoint),
        fingerprint="-".join(Checkpoint(f).fingerprint() for f in plan.folders),
        options={
            "precision": precision,
            "vision_precision": vision_precision,
            **dataclasses.asdict(options),
        },
        tools=_tools(),
    )
    tell(Progress(f"{name}: {family}, {architecture}, {_count(count)} parameters"))
    if (kept := _kept(final, origin)) and not force:
        tell(Progress(f"{final} is already the export of this checkpoint (--force redoes it)"))
        return kept

    graphs = {
        "vision": _Graph.of_vision(plan, vision_precision),
        "decoder": _Graph.of_decoder(plan, precision),
    }
    total = sum(g.bytes for g in graphs.values())
    _check_space(final, total, precision, tell)
    writer = _Writer(total, tell)
    try:
        with bundles.writing(final) as folder:
            # not its own save(), whose error on a full disk is no OSError
            text = plan.tokenizer.to_str(pretty=True)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
            specs = {key: graph.write(folder, key, writer) for key, graph in graphs.items()}
            if writer.done < total:  # which was an estimate
                tell(Progress("all weights", total, total, time.monotonic() - writer.start))
            tell(Progress("computing checksums"))
            bundles.write(
                folder,
                Bundle(
                    schema=bundles.SCHEMA,
                    name=name,
                    backend=backend,
                    precision=precision,
                    model=_model_spec(plan, family, count),
                    vision=plan.vision,
                    prompt=plan.prompt,
                    generation=plan.generation,
                    graphs=specs,
                    tokenizer="tokenizer.json",
                    files={},
                    origin=origin,
                ),
            )
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk became full while writing {final}; nothing was left there") from e
        raise
    tell(Progress(f"wrote {final} ({size_text(total)})"))
    return bundles.read(final)


class StderrProgress:
    """Progress as lines on stderr; bytes as one line that is overwritten where it is a terminal."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._open = False

    def __call__(self, p: Progress) -> None:
        terminal = sys.stderr.isatty()
        if not p.total:
            print(("\n" if self._open else "") + p.text, file=sys.stderr, flush=True)
            self._open = False
            return
        now = time.monotonic()
        if p.done < p.total and now - self._shown < (0.2 if terminal else 10):
            return
        self._shown = now
        line = (
            f"{p.text[:36]:36} {p.done / p.total:4.0%} of {size_text(p.total)}, {p.rate / 1e6:.0f} MB/s, "
            f"{int(p.left) // 60}:{int(p.left) % 60:02} left"
        )
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._open = terminal


def _check_options(model: str | None, backend: str, precision: str, vision_precision: str) -> None:
    if model is not None and model not in FAMILIES:
        raise UserError(f"--model is {model!r}, known families are {', '.join(FAMILIES)}")
    if backend in ("torchscript", "tensorrt"):
        raise NotSupportedYet(f"backend {backend!r} is not supported yet: use onnxruntime")
    if backend != "onnxruntime":
        raise UserError(f"backend is {backend!r}, expected onnxruntime, torchscript or tensorrt")
    for field, value in (("precision", precision), ("vision_precision", vision_precision)):
        if value == "fp16":
            raise UserError(
                f"{field} fp16 is refused on the CPU: it runs by expanding to float32, which takes twice "
                "the memory and gains nothing; use fp32, int8 or int4"
            )
        if value in ("bf16", "fp8"):
            raise UserError(f"{field} {value} needs a GPU: on the CPU use fp32, int8 or int4")
        if value not in PRECISIONS or (value == "auto" and field != "precision"):
            raise UserError(f"{field} is {value!r}, expected {', '.join(PRECISIONS)}")


def _parameters(weights: Mapping[str, Weight]) -> int:
    parts = {(w.checkpoint.path, *part) for w in weights.values() for part in w.parts}
    return sum(math.prod(shape) for _, _, shape in parts)


def _name(checkpoint: str | os.PathLike[str]) -> str:
    path = Path(checkpoint)
    name = path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w.-]+", "-", name) or "model"


def _tools() -> dict[str, str]:
    from importlib import metadata

    tools = {"rtp_llm": __version__, "exporter": EXPORTER}
    for package in ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            tools[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tools


def _kept(final: Path, origin: Origin) -> Bundle | None:
    """The bundle at `final` if it is what this export would make; BundleError if it is no bundle."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    if not bundles.is_bundle(final):
        raise BundleError(f"{final} exists and is no bundle: it is not overwritten, give another --output")
    try:
        there = bundles.read(final)
    except BundleError:
        return None  # damaged or of another schema: export anew
    ours = [(o.fingerprint, o.options, o.tools.get("rtp_llm"), o.tools.get("exporter"))
            for o in (there.origin, origin)]  # fmt: skip
    return there if ours[0] == ours[1] else None


def _check_space(final: Path, total: int, precision: str, tell: Callable[[Progress], None]) -> None:
    import psutil

    folder = final.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free, memory = shutil.disk_usage(folder).free, psutil.virtual_memory()
    need = total + total // 100 + 2**26
    tell(Progress(
        f"precision {precision}: {size_text(total)} on disk ({size_text(free)} free), about "
        f"{size_text(total * 3 // 2)} of memory to open it ({size_text(memory.total)} here)"
    ))  # fmt: skip
    if need > free:
        raise UserError(f"{folder} has {size_text(free)} free, the bundle needs {size_text(need)}: "
                        "give another --output" + _smaller(precision))  # fmt: skip
    if memory.available < WORKING:
        raise UserError(
            f"an export needs {size_text(WORKING)} of memory, {size_text(memory.available)} are available"
        )
    if total > memory.total:
        raise UserError(
            f"{precision} weights take {size_text(total)}, this machine has "
            f"{size_text(memory.total)} of memory" + _smaller(precision)
        )


def _smaller(precision: str) -> str:
    return "" if precision == "int4" else "; or export with --precision int4"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _model_spec(plan: Plan, family: str, count: int) -> ModelSpec:
    from .attention import cache_head_dim

    d = plan.decoder
    return ModelSpec(
        family=family,
        architecture=plan.architecture,
        vocab_size=d.vocab_size,
        hidden_size=d.hidden_size,
        layers=d.layers,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=cache_head_dim(d.head_dim),
        max_seq_len=d.max_seq_len,
        rope=RopeSpec("linear", d.limits),
        attention="gqa",
        parameters=count,
    )


# ------------------------------------------------------------------------------------------- graphs


@dataclass
class _Graph:
    """A module to be exported, with where its weights come from."""

    make: Callable[[], nn.Module]  # the module whose forward takes `inputs` in order
    root: str  # what stands before the names of `weights` in that module
    weights: Mapping[str, Weight]
    constants: Mapping[str, Tensor]  # buffers that are computed
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: str
    transposed: bool  # store float32 linear layers for MatMul

    @classmethod
    def of_vision(cls, plan: Plan, precision: str) -> _Graph:
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
        )

    @classmethod
    def of_decoder(cls, plan: Plan, precision: str) -> _Graph:
        from .attention import GqaGraph, gqa_specs
        from .decoder import Decoder, constants

        inputs, outputs = gqa_specs(plan.decoder)
        return cls(
            make=lambda: GqaGraph(Decoder(plan.decoder)),
            root="decoder.",
            weights=plan.decoder_weights,
            constants=constants(plan.decoder),
            inputs=inputs,
            outputs=outputs,
            precision=precision,
            transposed=False,
        )

    @property
    def bytes(self) -> int:
        """Size of the data file, nearly."""
        per_weight = {"fp32": 4.0, "int8": 1 + 4 / 32 + 1 / 32, "int4": 0.5 + 4 / 32 + 0.5 / 32}
        size = 0.0
        for weight in self.weights.values():
            elements = sum(math.prod(shape) for _, shape in weight.parts)
            matrix = len(weight.parts[0][1]) == 2
            size += elements * per_weight[self.precision if matrix else "fp32"]
        return int(size) + sum(t.nbytes for t in self.constants.values())

    def write(self, folder: Path, key: str, writer: _Writer) -> GraphSpec:
        """Write `key`.onnx and its data file."""
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
        with _quiet(), FakeTensorMode():
            module = self.make().eval().requires_grad_(False)
            stored = swap(module, self.precision, self.transposed)
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
                opset_version=OPSET,
                input_names=[spec.name for spec in self.inputs],
                output_names=[spec.name for spec in self.outputs],
                verbose=False,
            )
        assert program is not None
        model = program.model
        for value in model.graph.initializers.values():
            value.const_value = None  # fake
        fold_constants(model, onnx_shape_inference=False, input_size_limit=64, output_size_limit=64)
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)  # stack traces, with this machine's paths
        self._name_dimensions(model)
        return model, stored

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
        writer: _Writer,
    ) -> None:
        """Stream every weight into `file` and point the graph's initializers at it."""
        import onnx_ir as ir

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
            base = re.sub(r"\.(scales|zero_points)$", ".weight", short)
            kind = stored.get(self.root + base, "plain")
            if short in self.constants:
                writer.put(file, place(name), self.constants[short], key, short)
            elif base not in self.weights:
                raise InternalError(f"{key} graph: nothing fills the tensor {name}")
            elif kind in ("int4", "int8"):
                places = [place(self.root + base)]
                stem = self.root + base.removesuffix("weight")
                places += [place(stem + part) for part in ("scales", "zero_points")]
                writer.put_quantized(file, places, self.weights[base], int(kind[3:]), key, base)
            elif kind == "transposed":
                writer.put(file, place(name), self.weights[base].read().t(), key, base)
            else:
                writer.put_rows(file, place(name), self.weights[base], key, base)
            if file.tell() != offset:
                raise InternalError(f"{key} graph: {name} was stored with another size than its shape's")


class _Writer:
    """Puts tensors at their places in a data file, in chunks, and reports progress."""

    def __init__(self, total: int, tell: Callable[[Progress], None]):
        self.total, self.tell = total, tell
        self.done = 0
        self.start = 0.0

    def put(self, file: Any, at: int, tensor: Tensor, key: str, name: str) -> int:
        """Write a tensor's elements at an offset; returns the number of bytes."""
        self.start = self.start or time.monotonic()
        data = tensor.contiguous().numpy().reshape(-1).view("uint8")
        file.seek(at)
        file.write(data)
        self.done = min(self.done + data.nbytes, self.total)
        seconds = time.monotonic() - self.start
        self.tell(Progress(f"{key} {name}", self.done, self.total, seconds))
        return data.nbytes

    def put_rows(self, file: Any, at: int, weight: Weight, key: str, name: str) -> None:
        for rows in _chunks(weight):
            at += self.put(file, at, rows, key, name)

    def put_quantized(
        self, file: Any, places: list[int], weight: Weight, bits: int, key: str, name: str
    ) -> None:
        from .quantize import quantize

        for rows in _chunks(weight):
            for i, tensor in enumerate(quantize(rows, bits)):
                places[i] += self.put(file, places[i], tensor, key, name)


def _chunks(weight: Weight) -> Iterator[Tensor]:
    if weight.transform is not None:
        yield weight.read()  # whole: the rows may become others
        return
    height = sum(shape[0] if shape else 1 for _, shape in weight.parts)
    step = max(1, CHUNK // max(1, math.prod(weight.parts[0][1][1:])))
    for start in range(0, height, step):
        yield weight.read(start, min(start + step, height))


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

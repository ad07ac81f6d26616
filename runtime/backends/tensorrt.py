"""TensorRT engines over the paged cache: plans that `rtp-llm build` made for this GPU.

A decoder plan has two profiles, decode and prefill. A step within the decode profile runs there; each
captured CUDA graph has an execution context of its own, since shapes and addresses are frozen in the graph,
and all contexts of an engine share one scratch memory, since they never run at the same time. Caches are
updated in place: their outputs are bound to their inputs' addresses.

Tested end to end against a stand-in whose every name is in the real bindings; never run on real TensorRT yet.
"""

from __future__ import annotations

import dataclasses
import mmap
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ... import trt as door
from ...errors import BundleError, InternalError, MissingDependency, UserError
from ...export.bundle import Bundle, EngineSpec
from ...trust import check
from ..step import Picks, Result, Step
from . import GRAPHS
from .paged import PagedBackend, bucket

PLUGIN = "1"  # version of the attention plugin in the plans that this code runs, as build/plugins.py
DECODE, PREFILL = 0, 1  # profiles of a decoder plan
LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_images")


class TensorRTBackend(PagedBackend):
    """`weight_budget`: bytes of streamable weights of each engine that stay on the GPU, for plans built with
    --weight-streaming; None: all. `trusted`: open plans that were not built on this machine, see trust.py.

    `slots` is at most the max_batch_size that the engine was built for. Raises BundleError for a bundle
    without engines or with engines of another GPU or version, each with the command that mends it;
    MissingDependency without TensorRT; UserError without a GPU or for an impossible max_seq_len.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(
        self,
        bundle: Bundle,
        slots: int = 16,
        max_seq_len: int | None = None,
        kv_cache_bytes: int | None = None,
        device: str = "cuda",
        weight_budget: int | None = None,
        trusted: bool = False,
        graphs: tuple[str, ...] = GRAPHS,
    ):
        if device.split(":")[0] not in self.devices:
            raise UserError(f"device={device!r}: a bundle for tensorrt runs on cuda")
        check_engines(bundle, device)
        self.trusted = trusted
        self.limits = bundle.engines["decoder"].limits
        most = self.limits["max_seq_len"]
        if max_seq_len is not None and max_seq_len > most:
            raise UserError(
                f"max_seq_len={max_seq_len}: the engine was built for {most}; for more: "
                + build_command(bundle, max_seq_len=max_seq_len)
            )
        if weight_budget is not None and not bundle.engines["decoder"].options.get("weight_streaming"):
            raise UserError(
                f"weight_budget={weight_budget}: the engines keep all weights on the GPU; to stream them: "
                + build_command(bundle, weight_streaming=True)
            )
        self.weight_budget = weight_budget
        self._captured = 0  # batch size of the CUDA graph whose context is wanted
        slots = min(slots, self.limits["max_batch_size"])
        super().__init__(bundle, slots, max_seq_len or most, kv_cache_bytes, device, graphs)
        if "decoder" in graphs:
            self._fit_cache(kv_cache_bytes)

    def _fit_cache(self, kv_cache_bytes: int | None) -> None:
        self.budget_blocks = min(self.budget_blocks, self.limits["max_blocks"])

    def load(self) -> None:
        # each time, for they may have changed since
        engines = self.bundle.engines.items()
        check(self.bundle, [spec.path for key, spec in engines if key in self.graphs], self.trusted)
        trt = door.load()
        log = door.logger(trt)
        if "decoder" in self.graphs:
            self._decoder = Engine(trt, log, self._plan("decoder"), self.device, self.weight_budget)
            outputs = [spec.name for spec in self.bundle.graphs["decoder"].outputs[1:]]
            self._in_place = dict(zip(outputs, [spec.name for spec in self.caches], strict=True))
        self._vision: Callable[[Tensor], Tensor] | None = None
        if "vision" in self.graphs:
            path = self._plan("vision")
            self._vision = (
                _torchscript(path, self.device) if path.suffix == ".pt" else self._encoder(trt, log, path)
            )

    def _plan(self, key: str) -> Path:
        return self.bundle.read_path(self.bundle.engines[key].path)

    def _encoder(self, trt: Any, log: Any, path: Path) -> Callable[[Tensor], Tensor]:
        vision, device = self.bundle.vision, self.device
        encoder = Engine(trt, log, path, device, self.weight_budget)

        def encode(pixels: Tensor) -> Tensor:  # without `self`: a cycle would keep the engine after `unload`
            rows = torch.empty(len(pixels), vision.tokens, vision.hidden_size, device=device)
            encoder.run(0, 0, {"pixels": pixels}, {"image_embeds": rows})
            return rows

        return encode

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens, rows = len(inputs["input_ids"]), len(inputs["logits_rows"])
        decodes = max(tokens, rows) <= self.limits["max_batch_size"] and len(inputs["image_embeds"]) == 1
        return self.run(inputs, DECODE if decodes else PREFILL)

    def run(self, inputs: dict[str, Tensor], profile: int) -> Tensor:
        """One run of the decoder: float32 [K, vocab]."""
        rows = inputs["logits_rows"]
        if not len(rows):  # a profile begins at one row
            inputs = inputs | {"logits_rows": torch.zeros(1, dtype=rows.dtype, device=self.device)}
        logits = torch.empty(max(1, len(rows)), self.bundle.model.vocab_size, device=self.device)
        outputs = {out: inputs[source] for out, source in self._in_place.items()}
        self._decoder.run(profile, self._captured, inputs, {"logits": logits} | outputs)
        return logits[: len(rows)]

    def forward_vision(self, pixels: Tensor) -> Tensor:
        assert self._vision is not None
        parts = pixels.split(self.bundle.engines["vision"].limits["max_images"])
        return torch.cat([self._vision(part) for part in parts])

    def step(self, step: Step) -> Result:
        limits = self.limits
        parts = split(step, limits["max_input_len"], limits["max_logits"], self.bundle.model.vocab_size)
        return joined([super(TensorRTBackend, self).step(part) for part in parts])

    def _replay(self, step: Step) -> Tensor:
        self._captured = bucket(len(step.counts), self.slots)
        try:
            return super()._replay(step)
        finally:
            self._captured = 0

    def unload(self) -> None:
        self._decoder = self._vision = None  # type: ignore[assignment]


class Engine:
    """A plan on the device, and its execution contexts, by profile and CUDA graph."""

    def __init__(self, trt: Any, log: Any, path: Path, device: torch.device, weight_budget: int | None):
        self.trt, self.log, self.device = trt, log, device
        self.runtime = trt.Runtime(log)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"TensorRT {trt.__version__} cannot open {path}: {self._why()}")
        if weight_budget is not None and engine.streamable_weights_size:
            engine.weight_streaming_budget_v2 = min(weight_budget, engine.streamable_weights_size)
        self.engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.dtypes = {name: door.torch_dtype(trt, engine.get_tensor_dtype(name)) for name in names}
        profiles = range(engine.num_optimization_profiles)
        size = max(engine.get_device_memory_size_for_profile_v2(i) for i in profiles)
        self.scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self.contexts: dict[tuple[int, int], _Context] = {}

    def run(
        self, profile: int, graph: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Enqueue on the current stream. Inputs that the plan does not have are left out.

        graph: 0, or which CUDA graph this is captured into. Tensors must live until the stream is there.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if (profile, graph) not in self.contexts:
            self.contexts[profile, graph] = _Context(self, profile, stream)
        self.contexts[profile, graph].run(self, {n: inputs[n] for n in self.inputs}, outputs, stream)

    def failed(self, what: str) -> InternalError:
        return InternalError(f"TensorRT {self.trt.__version__} {what}: {self._why()}")

    def _why(self) -> str:
        lines = self.log.errors[-3:]
        self.log.errors.clear()  # of this failure; not of the next one too
        return "; ".join(lines) or "it does not say why"


class _Context:
    """An execution context, told only what has changed.

    It does not hold its engine: that cycle would keep gigabytes of a GPU until Python looks for cycles.
    """

    def __init__(self, owner: Engine, profile: int, stream: int):
        managed = owner.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = owner.engine.create_execution_context(managed)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise owner.failed(f"makes no execution context for profile {profile}")
        context.set_device_memory(owner.scratch.data_ptr(), owner.scratch.nbytes)
        self.context = context
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def run(
        self, owner: Engine, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int
    ) -> None:
        context, changed = self.context, False
        for name, tensor in inputs.items():
            shape = tuple(tensor.shape)
            if self.shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise owner.failed(f"refuses the shape {list(shape)} of {name}")
                self.shapes[name], changed = shape, True
        for name, tensor in (*inputs.items(), *outputs.items()):
            if tensor.dtype != owner.dtypes[name]:
                raise InternalError(f"{name} is {tensor.dtype}, the engine's is {owner.dtypes[name]}")
            if not tensor.is_contiguous():
                raise InternalError(f"{name} is not contiguous")
            address = tensor.data_ptr()
            if self.addresses.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise owner.failed(f"refuses the address of {name}")
                self.addresses[name] = address
        if changed:
            try:
                missing = context.infer_shapes()
            except RuntimeError as e:  # shapes that do not go together
                raise owner.failed(f"infers no shapes ({e})") from e
            if missing:
                raise owner.failed(f"misses the shapes of {', '.join(missing)}")
        if not context.execute_async_v3(stream):
            raise owner.failed("could not run")


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The encoder that torch_tensorrt made: TorchScript with an engine inside."""
    try:
        import torch_tensorrt  # noqa: F401  (registers what the archive calls)
    except (ImportError, OSError) as e:
        raise MissingDependency(f"{path.name} needs torch_tensorrt: pip install torch-tensorrt") from e
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except Exception as e:
        line = str(e).strip().splitlines()[0]
        raise BundleError(f"{path} cannot be opened by torch {torch.__version__}: {line}") from e


# ------------------------------------------------------------------------------------- what may be opened


def build_command(bundle: Bundle, **given: Any) -> str:
    """The command that builds the engines, with these arguments of `build`, and else as they were built."""
    known: dict[str, Any] = {}
    for spec in bundle.engines.values():
        known |= {name: value for name, value in spec.limits.items() if name in LIMITS} | spec.options
    words = ["rtp-llm", "build", str(bundle.path)]
    for name, value in (known | given).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def check_engines(bundle: Bundle, device: str = "cuda") -> None:
    """Refuse a bundle whose engines are missing or are of another GPU than `device`, TensorRT or plugin."""
    if missing := [key for key in bundle.graphs if key not in bundle.engines]:
        raise BundleError(
            f"bundle {bundle.name} has no {missing[0]} engine yet; on the machine that will run it: "
            + build_command(bundle)
            + "; without a GPU --device cpu runs the graphs slowly, as a check"
        )
    number = device.partition(":")[2]
    trt, gpu = door.load(), door.gpu(int(number) if number else None)
    for key, spec in bundle.engines.items():
        here = EngineSpec(
            spec.path, gpu.name, gpu.capability, trt.__version__, PLUGIN if spec.plugin else "", {}
        )
        for field, name in (
            ("gpu", "GPU"),
            ("compute_capability", "compute capability"),
            ("tensorrt", "TensorRT"),
            ("plugin", "plugin version"),
        ):
            built, found = getattr(spec, field), getattr(here, field)
            if built != found:
                raise BundleError(
                    f"the {key} engine of bundle {bundle.name} was built for {name} {built}, "
                    f"here is {found}: {build_command(bundle)}"
                )


# ------------------------------------------------------------- steps larger than the engine's limits


def split(step: Step, tokens: int, heads: int, vocab: int, rows_each: int | None = None) -> list[Step]:
    """A step in parts of at most `tokens` tokens, `heads` rows of logits and `rows_each` rows, in order; a
    row may be cut, as prefill is cut into chunks."""
    most = rows_each or len(step.counts)
    if len(step.input_ids) <= tokens and len(step.logits_rows) <= heads and len(step.counts) <= most:
        return [step]
    wanted = set(step.logits_rows.tolist())
    parts: list[Step] = []
    rows: list[tuple[int, int, int]] = []  # row, its tokens before, its tokens in this part
    start = at = logits = 0

    def finish() -> None:
        nonlocal rows, start, logits
        if rows:
            parts.append(_part(step, start, at, rows, vocab))
        rows, start, logits = [], at, 0

    for r, count in enumerate(step.counts):
        for i in range(count):
            more = at in wanted
            new = not rows or rows[-1][0] != r
            if at - start == tokens or logits + more > heads or (new and len(rows) == most):
                finish()
            if rows and rows[-1][0] == r:
                rows[-1] = (r, rows[-1][1], rows[-1][2] + 1)
            else:
                rows.append((r, i, 1))
            at, logits = at + 1, logits + more
    finish()
    return parts


def _part(step: Step, start: int, end: int, rows: list[tuple[int, int, int]], vocab: int) -> Step:
    ids = step.input_ids[start:end]
    images = ids[ids >= vocab] - vocab
    embeds = np.zeros((1, step.image_embeds.shape[1]), np.float32)
    if len(images):
        low, high = int(images.min()), int(images.max()) + 1
        embeds, ids = step.image_embeds[low:high], np.where(ids >= vocab, ids - low, ids)
    inside = (step.logits_rows >= start) & (step.logits_rows < end)
    draws = step.draws
    return dataclasses.replace(
        step,
        input_ids=ids,
        image_embeds=embeds,
        positions=step.positions[start:end],
        rope_rows=step.rope_rows[start:end],
        logits_rows=step.logits_rows[inside] - start,
        slots=[step.slots[r] for r, _, _ in rows],
        pasts=[step.pasts[r] + before for r, before, _ in rows],
        counts=[count for _, _, count in rows],
        tables=[step.tables[r] for r, _, _ in rows],
        draws=None if draws is None else [d for d, here in zip(draws, inside, strict=True) if here],
    )


def joined(results: list[Result]) -> Result:
    """The result of a step that was run in parts."""
    if len(results) == 1:
        return results[0]
    logits = [r.logits for r in results if r.logits is not None and len(r.logits)]
    picks = [r.picks for r in results if r.picks is not None]
    return Result(
        np.concatenate(logits) if logits else None,
        Picks(np.concatenate([p.tokens for p in picks]), np.concatenate([p.logprobs for p in picks]))
        if picks
        else None,
    )

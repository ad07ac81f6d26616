"""The seam between the engine and what computes: one file per backend, imported only when chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import MissingDependency, UserError, VisionGraphMissing
from ...export.bundle import Bundle
from ..step import Result, Step

DEVICES = r"cpu|cuda(:\d{1,2})?"  # names of them
GRAPHS = ("decoder", "vision")


class Backend(Protocol):
    """Runs the two graphs of a bundle. One thread calls `encode`, one calls everything else.

    One whose cache is slots is a `kv_cache.SlotMemory` too.
    """

    slots: int  # sequences that fit side by side
    slot_tokens: int  # tokens of one sequence at most
    budget_blocks: int  # cache blocks of 16 tokens that may be touched in all
    block_bytes: int  # of one block
    mixes: bool  # decodes and chunks of prompts go through one `step`; else each through its own
    paged: bool  # the cache is one pool of `budget_blocks` blocks, found by `Step.tables`; else slots
    drafts: bool  # a decode may have several tokens of a sequence, for the price of about one
    token_budget: int  # tokens of a step that it computes fastest
    samples: bool  # `step` picks the tokens of rows that have a draw; else it returns all logits

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] → float32 [N, tokens, hidden]."""
        ...

    def step(self, step: Step) -> Result:
        """Writes the step's keys and values into the caches; logits, and tokens where it samples."""
        ...

    def close(self) -> None:
        """Give back all memory; the next call of `encode` or `step` takes it again."""
        ...


@dataclass(frozen=True)
class Options:
    """How a bundle is run; None: the backend's own choice. See model_factory.ModelConfig."""

    slots: int = 16
    max_seq_len: int | None = None
    kv_cache_bytes: int | None = None
    threads: int | None = None
    deterministic: bool = False
    speculation: bool = False
    device: str | None = None
    trust_engines: bool = False
    weight_budget: int | None = None
    graphs: tuple[str, ...] = GRAPHS  # that are opened: `encode` needs "vision", `step` the decoder


def open_backend(bundle: Bundle, options: Options = Options()) -> Backend:
    """The backend that the bundle was exported for.

    Raises UserError for options that it does not have, MissingDependency, BundleError for graphs that
    cannot be opened here or may not be trusted.
    """
    backend = _open(bundle, options)
    if options.speculation and not backend.drafts:
        raise UserError(
            f"speculation: bundle {bundle.name} decodes in CUDA graphs of one token a sequence: leave it out"
        )
    backend.drafts = options.speculation
    return backend


def _open(bundle: Bundle, options: Options) -> Backend:
    o, attention = options, bundle.model.attention
    for field in ("threads", "max_seq_len"):
        if (value := getattr(o, field)) is not None and value < 1:
            raise UserError(f"{field}={value} must be 1 or more; leave it out for the default")
    if o.weight_budget is not None and o.weight_budget < 0:
        raise UserError(f"weight_budget={o.weight_budget} must be 0 bytes or more; leave it out for all")
    sizes: dict[str, Any] = {
        "slots": o.slots, "max_seq_len": o.max_seq_len, "kv_cache_bytes": o.kv_cache_bytes,
        "graphs": o.graphs,
    }  # fmt: skip
    device = device_of(bundle, o.device)
    if o.weight_budget is not None and (bundle.backend != "tensorrt" or device == "cpu"):
        raise UserError(
            f"weight_budget={o.weight_budget} is for TensorRT engines, bundle {bundle.name} is for "
            f"{bundle.backend} and runs on {device} here: leave it out"
        )
    # with device="cpu" a GPU's ONNX graphs run without engines, as a check: `linear` is standard ONNX
    if attention == "gqa" or (attention == "linear" and device == "cpu"):
        if bundle.graphs["decoder"].inputs[-1].dtype == "bfloat16":
            raise UserError(
                f"device='cpu': ONNX Runtime has no bfloat16 on a CPU, as bundle {bundle.name} has: to "
                "check its numbers export with --precision fp32, or with --kv-cache paged"
            )
        from .onnx import OnnxBackend

        return OnnxBackend(bundle, **sizes, threads=o.threads, deterministic=o.deterministic)
    if o.deterministic:
        raise UserError(
            f"deterministic: bundle {bundle.name} ({bundle.backend}, {attention}) cannot promise that"
        )
    sizes["device"] = device
    if o.threads and device == "cpu":
        import torch

        torch.set_num_threads(o.threads)
    if bundle.backend == "onnxruntime" and device != "cpu":
        from .onnx_paged import OnnxPagedBackend

        return OnnxPagedBackend(bundle, **sizes)
    if bundle.backend == "torchscript":
        from ...trust import check
        from .torchscript import TorchScriptBackend

        check(bundle, [bundle.graphs[g].path for g in o.graphs if g in bundle.graphs], o.trust_engines)
        return TorchScriptBackend(bundle, **sizes)
    if device == "cpu":
        from .evaluator import EvaluatorBackend

        return EvaluatorBackend(bundle, **sizes)
    sizes |= {"trusted": o.trust_engines, "weight_budget": o.weight_budget}
    if attention == "linear":
        from .tensorrt_linear import TensorRTLinearBackend

        return TensorRTLinearBackend(bundle, **sizes)
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, **sizes)


def check_vision(bundle: Bundle, graphs: tuple[str, ...]) -> None:
    """Raises VisionGraphMissing unless the bundle has a vision graph, and `graphs` opens it."""
    if "vision" not in bundle.graphs:
        raise VisionGraphMissing(f"bundle {bundle.name} has no vision graph")
    if "vision" not in graphs:
        raise VisionGraphMissing(f"the vision graph of bundle {bundle.name} is left to somebody else here")


def device_of(bundle: Bundle, device: str | None = None) -> str:
    """Where a bundle runs: "cpu", "cuda" or "cuda:1"; None: where it was exported for.

    Raises UserError for another name and for a GPU under a CPU's bundle, MissingDependency without torch.
    """
    if device is not None and not re.fullmatch(DEVICES, device):
        raise UserError(f"device={device!r} must be cpu, cuda or a GPU's number like cuda:1")
    if bundle.model.attention == "gqa":
        if device not in (None, "cpu"):
            raise UserError(
                f"device={device!r}: bundle {bundle.name} was exported for ONNX Runtime on a CPU; for a "
                "GPU export the checkpoint with --device cuda, or with --backend torchscript or tensorrt"
            )
        return "cpu"
    try:
        import torch
    except ImportError as e:
        raise MissingDependency(f"a {bundle.backend} bundle runs on torch: pip install torch") from e
    if device is None and bundle.backend == "torchscript" and not torch.cuda.is_available():
        return "cpu"
    number, there = int((device or "").partition(":")[2] or 0), torch.cuda.device_count()
    if there and number >= there:
        raise UserError(f"device={device!r}: the GPUs here are cuda:0 to cuda:{there - 1}")
    return device or "cuda"

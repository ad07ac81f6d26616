"""The seam between the engine and what computes: one file per backend, imported only when chosen."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...export.bundle import Bundle
from ..step import Step


class Backend(Protocol):
    """Runs the two graphs of a bundle. One thread calls `encode`, one calls everything else."""

    slots: int  # sequences that fit side by side
    slot_tokens: int  # tokens of one slot
    budget_blocks: int  # cache blocks of 16 tokens that may be touched in all
    block_bytes: int  # of one block
    mixes: bool  # decodes and chunks of prompts go through one `step`; else each through its own

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] → float32 [N, tokens, hidden]."""
        ...

    def step(self, step: Step) -> np.ndarray:
        """Writes the step's keys and values into the caches; float32 logits [K, vocab]."""
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The leading tokens of one slot into another."""
        ...

    def release(self, slot: int, keep: int = 0) -> None:
        """What a slot holds behind its first `keep` tokens may go back to the system."""
        ...

    def close(self) -> None:
        """Give back all memory; the next call of `encode` or `step` takes it again."""
        ...


def open_backend(bundle: Bundle, **options: object) -> Backend:
    """The backend that the bundle was exported for; `options` are its constructor's."""
    if bundle.backend == "onnxruntime":
        from .onnx import OnnxBackend

        return OnnxBackend(bundle, **options)  # type: ignore[arg-type]
    from ...errors import NotSupportedYet

    raise NotSupportedYet(
        f"bundle {bundle.name}: backend {bundle.backend!r} is not supported yet, "
        "export with --backend onnxruntime"
    )

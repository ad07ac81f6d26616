"""What a bundle is made for: the backend that runs it, the lowering of its attention, its precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .packed import Scheme

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
BACKENDS = ("onnxruntime", "torchscript", "tensorrt")
KV_CACHES = ("paged", "linear")
SMALL = 2_000_000_000  # parameters up to which "auto" on a CPU keeps float32


@dataclass(frozen=True)
class Target:
    """`attention`: "gqa", "paged" or "linear". `precisions`: of its weights, the first one is the default.

    `kind`: how quantize.swap makes its modules: "cpu" (ONNX Runtime's CPU operators), "engine" (ONNX in 16
    bits or QDQ, for a GPU) or "torchscript".
    """

    backend: str
    device: str
    attention: str
    kind: str
    precisions: tuple[str, ...]

    def precision(self, wanted: str, parameters: int, own: Scheme | None = None) -> str:
        """The precision for "auto"; others as they are.

        own: the checkpoint's quantisation, which is kept where the target has it; a CPU takes int8 for fp8.
        """
        if wanted != "auto":
            return wanted
        if own and self.kind == "cpu":
            return "int4" if own.precision == "int4" else "int8"
        if own and own.engine and own.precision in self.precisions:
            return own.precision
        if self.kind == "cpu":
            return "int4" if parameters > SMALL else "fp32"
        if self.kind == "torchscript":
            return "bf16" if cuda() else "fp32"
        return "bf16"

    def dtype(self, precision: str) -> str:
        """Of activations in matrix products, and of the caches: a name of numpy's or ml_dtypes'."""
        if self.kind == "cpu" or precision == "fp32":
            return "float32"
        if precision == "fp16":
            return "float16"
        if self.kind == "torchscript" and precision == "int8" and not cuda():
            return "float32"
        return "bfloat16"

    def vision_precision(self, wanted: str | None, precision: str) -> str:
        """Default: as exact as the decoder's activations; beside an int4 decoder on a CPU int8, which is
        faster than float32 and a quarter of its memory (benchmarks/precision.md has its price)."""
        if wanted:
            return wanted
        if self.kind == "cpu" and precision == "int4":
            return "int8"
        return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[self.dtype(precision)]


def target(backend: str, device: str | None = None, kv_cache: str | None = None) -> Target:
    """The target of an export; UserError for what does not exist or does not go together."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}, expected onnxruntime, torchscript or tensorrt")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device is {device!r}, expected cpu or cuda")
    if kv_cache not in (None, *KV_CACHES):
        raise UserError(f"kv_cache is {kv_cache!r}, expected paged or linear")
    if kv_cache and backend != "tensorrt":
        raise UserError(f"kv_cache {kv_cache} is a choice of backend tensorrt, backend is {backend}")
    if backend == "tensorrt":
        if device == "cpu":
            raise UserError("device cpu does not go with backend tensorrt: leave it out")
        precisions = ("bf16", "fp16", "fp8", "int8", "int4", "fp32")
        return Target(backend, "cuda", kv_cache or "paged", "engine", precisions)
    if backend == "torchscript":
        if device:
            raise UserError(
                f"device {device}: a torchscript bundle runs on both, leave it out (or give it to serve)"
            )
        return Target(backend, "any", "paged", "torchscript", ("bf16", "fp16", "fp32", "int8"))
    if device == "cuda":
        return Target(backend, "cuda", "paged", "engine", ("bf16", "fp16"))
    return Target(backend, "cpu", "gqa", "cpu", ("fp32", "int8", "int4"))


def check_precision(made_for: Target, field: str, precision: str) -> None:
    """UserError naming what the target takes; "auto" is the caller's to allow."""
    if precision in made_for.precisions:
        return
    if precision not in PRECISIONS:
        names = ", ".join([*(["auto"] if field == "precision" else []), *made_for.precisions])
        raise UserError(f"{field} is {precision!r}, expected {names}")
    if made_for.kind == "cpu" and precision == "fp16":
        raise UserError(
            f"{field} fp16 is refused on the CPU: it runs by expanding to float32, which takes twice "
            "the memory and gains nothing; use fp32, int8 or int4"
        )
    if made_for.kind == "cpu":
        raise UserError(
            f"{field} {precision} is not for ONNX Runtime on a CPU: use fp32, int8 or int4; or export with "
            f"--backend {'torchscript or ' * (precision == 'bf16')}tensorrt"
        )
    where = f"backend {made_for.backend}" + (" on cuda" if made_for.backend == "onnxruntime" else "")
    raise UserError(f"{field} {precision} is none of {where}: use {', '.join(made_for.precisions)}")


def cuda() -> bool:
    """Whether torch sees a GPU here."""
    import torch

    return torch.cuda.is_available()

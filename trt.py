"""The one door to TensorRT: its late import, and what differs between 10.15 and 11.x.

No other file compares versions of it. Networks are strongly typed: precision is what the ONNX says.
Every name used is in the real bindings (tests/build/test_names.py). Never run on real hardware yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import MissingDependency, UserError

OLDEST = (10, 15)


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str  # "9.0"
    memory: int  # bytes


def load() -> Any:
    """The module `tensorrt`. Raises MissingDependency where it is absent, broken or older than 10.15."""
    try:
        import tensorrt as trt
    except (ImportError, OSError) as e:  # the latter: of its libraries
        if isinstance(e, ModuleNotFoundError) and e.name == "tensorrt":
            raise MissingDependency("TensorRT is not installed: pip install 'tensorrt>=10.15'") from e
        raise MissingDependency(
            f"TensorRT cannot be loaded ({e}): pip install --force-reinstall 'tensorrt>=10.15'"
        ) from e
    if _numbers(trt.__version__)[:2] < OLDEST:
        raise MissingDependency(
            f"TensorRT {trt.__version__} is installed, 10.15 or later is needed: "
            "pip install --upgrade tensorrt"
        )
    return trt


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def version() -> str:
    """Of the installed TensorRT: "10.15.1.29". A plan runs on the version that built it. Raises as `load`."""
    return load().__version__


def gpu(index: int | None = None) -> Gpu:
    """The GPU with that number; None: the one that torch would use. Raises MissingDependency without torch,
    UserError without a GPU."""
    try:
        import torch
    except ImportError as e:
        raise MissingDependency("TensorRT engines need torch, with CUDA: pip install torch") from e
    if not torch.cuda.is_available():
        raise UserError(
            f"TensorRT engines need an NVIDIA GPU, and torch {torch.__version__} sees none here: run it on "
            "the machine that has one; `rtp-llm doctor` tells what is missing"
        )
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return Gpu(found.name, f"{found.major}.{found.minor}", found.total_memory)


def logger(trt: Any, tell: Callable[[str], None] | None = None) -> Any:
    """A TensorRT logger that keeps the lines of errors in its list `errors` and tells of warnings.

    It must outlive everything made with it.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            levels = trt.ILogger.Severity
            line = " ".join(msg.split())
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.errors.append(line)
            elif severity == levels.WARNING and tell:
                tell(line)

    return Log()


def create_network(trt: Any, builder: Any) -> Any:
    """An empty, strongly typed network: a flag in 10.x, always so in 11, which deprecates the flag."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))


def torch_dtype(trt: Any, dtype: Any) -> Any:
    """TensorRT's data type → torch's; KeyError for one that torch does not have."""
    import torch

    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.UINT8: torch.uint8,
    }[dtype]

"""A process that runs the kernels under the Triton language's interpreter, for test_kernels.py here and in
fused/.

A process of its own: TRITON_INTERPRET holds for everything that imports triton, and then nothing compiles.
It reads pickled (name of a launcher, arrays or None, keyword arguments, blocks of pool before the caches)
from its standard input and answers with the launcher's results and all arrays as they are afterwards. The
launcher "step" is the torch op's CUDA implementation.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from cases import array, tensor
from triton.runtime import interpreter

from rtp_llm.export.fused import kernels as fused
from rtp_llm.export.paged_attention import kernels, torch_op


def bfloat16_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """The interpreter keeps bfloat16 as uint16, and would multiply the bits."""
    x, y = (
        (h.data.astype(np.uint32) << 16).view(np.float32) if h.data.dtype == np.uint16 else h.data
        for h in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(x, y, dtype=np.float32) + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = bfloat16_dot
STEP = torch_op.on_cuda(torch_op.__package__, "paged_attention", "paged attention")


def call(name: str, arrays: list[np.ndarray | None], attributes: dict[str, Any], before: int) -> Any:
    tensors = [None if x is None else tensor(x) for x in arrays]
    if before:  # pages nobody touches cost no memory
        for i, x in enumerate(tensors):
            if x is not None and x.ndim == 4:
                tensors[i] = torch.empty((before + len(x), *x.shape[1:]), dtype=x.dtype)
                tensors[i][before:] = x
        tensors[-1] = torch.where(tensors[-1] >= 0, tensors[-1] + before, -1)
    launcher = STEP if name == "step" else getattr(fused, name, None) or getattr(kernels, name)
    results = launcher(*tensors, **attributes)
    results = results if isinstance(results, tuple) else (results,)
    return [
        [None if x is None else array(x[before:] if x.ndim == 4 and len(x) > before else x) for x in xs]
        for xs in (results, tensors)
    ]


while request := sys.stdin.buffer.read(8):
    question = pickle.loads(sys.stdin.buffer.read(int.from_bytes(request, "little")))
    answer = pickle.dumps(call(*question))
    sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
    sys.stdout.buffer.flush()

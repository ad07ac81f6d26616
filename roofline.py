"""What memory and arithmetic of this machine allow a decoder: the lines that `rtp-llm bench` draws.

By the roofline of Williams, Waterman and Patterson (2009) a step takes at least

    memory       (W + k·C) / B                   seconds
    arithmetic   2·M / R + 4·L·H·D·A / R32       seconds

W  bytes of the weights of all products, with scales and zero points, without tables that are looked up
C  tokens whose keys and values are read, k bytes each
B  bytes a second that all threads read from an array larger than the caches: a model that fits into a cache
   may pass this limit
M  multiplications with weights, those of the head for rows of logits only
R  operations a second of a large product at the decoder's precision, R32 at fp32, both in ONNX Runtime
A  pairs of a query and a key that it sees, in L layers of H heads of D
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from .export.bundle import Bundle
from .runtime.backends.onnx import import_onnxruntime, set_products
from .runtime.kv_cache import BLOCK

READ = 2**30  # bytes, to measure the bandwidth
ROWS, SIDE = 512, 4096  # the product that measures the arithmetic is [ROWS, SIDE] × [SIDE, SIDE]
INT4_BLOCK = 128  # weights that share a scale: export/quantize.py's, which imports torch
PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "MatMulIntegerToFloat")
Number = Any  # or an array of numbers


def repeated(run: Callable[[], float], repeat: int) -> dict[str, Any]:
    """Results of `repeat` runs after one that warms up, and their median, least and most."""
    run()
    return spread([run() for _ in range(repeat)])


def spread(runs: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(runs), "least": min(runs), "most": max(runs), "runs": list(runs)}


@dataclass(frozen=True)
class Work:
    """Of one decoder, by the letters above."""

    weight_bytes: int  # W
    weights: int  # M of a token, without the head
    head_weights: int  # M of a row of logits
    kv_bytes: float  # k
    attention: int  # 4·L·H·D

    def memory(self, bandwidth: float, rows: Number, cached: Number) -> Number:
        """Tokens a second of steps with `rows` tokens that read the keys and values of `cached`."""
        return rows * bandwidth / (self.weight_bytes + self.kv_bytes * cached)

    def arithmetic(self, rate: float, rate32: float, rows: Number, heads: Number, pairs: Number) -> Number:
        """Tokens a second of steps with `rows` tokens, `heads` of them with logits."""
        products = 2 * (rows * self.weights + heads * self.head_weights)
        return rows / (products / rate + self.attention * pairs / rate32)


def work(bundle: Bundle, block_bytes: int) -> Work:
    """Read off the graph of a decoder for ONNX Runtime on a CPU. block_bytes: of a cache block."""
    import onnx

    model = onnx.load(bundle.read_path(bundle.graphs["decoder"].path), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    size = weights = head = 0
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.input[1] not in stored:
            continue
        for tensor in (stored[name] for name in node.input[1:] if name in stored):
            size += math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        count = math.prod(stored[node.input[1]].dims)
        if node.op_type == "MatMulNBits":  # packed
            count = math.prod(a.i for a in node.attribute if a.name in ("N", "K"))
        if node.output[0] == "logits":
            head += count
        else:
            weights += count
    m = bundle.model
    return Work(size, weights, head, block_bytes / BLOCK, 4 * m.layers * m.heads * m.head_dim)


def bandwidth(threads: int, repeat: int) -> dict[str, Any]:
    """Bytes a second that so many threads read."""
    size = min(READ, psutil.virtual_memory().available // 4)
    parts = np.array_split(np.ones(size // 8, np.int64), threads)

    def read() -> float:
        began = time.perf_counter()
        list(pool.map(np.max, parts))  # the fastest of NumPy's reductions
        return sum(part.nbytes for part in parts) / (time.perf_counter() - began)

    with ThreadPoolExecutor(threads) as pool:
        return repeated(read, repeat)


def product_rate(precision: str, threads: int, repeat: int) -> dict[str, Any]:
    """Operations a second of one product as a decoder of fp32, int8 or int4 has most of them; int8's without
    the rounding of its inputs."""
    import onnx.helper as make
    from onnx import TensorProto, numpy_helper

    rng = np.random.default_rng(0)
    x = rng.random((ROWS, SIDE), np.float32)
    weights: list[Any]
    if precision == "fp32":
        node = make.make_node("Gemm", ["x", "0"], ["y"], transB=1)
        weights = [rng.random((SIDE, SIDE), np.float32)]
    elif precision == "int8":
        node = make.make_node("MatMulIntegerToFloat", [*"x0123"], ["y"], domain="com.microsoft")
        x = rng.integers(0, 256, (ROWS, SIDE), np.uint8)
        weights = [rng.integers(-127, 128, (SIDE, SIDE), np.int8), np.float32(1 / 127),
                   rng.random(SIDE, np.float32), np.uint8(128)]  # fmt: skip
    else:
        sizes: dict[str, Any] = {"N": SIDE, "K": SIDE, "bits": 4, "block_size": INT4_BLOCK}
        node = make.make_node(
            "MatMulNBits", [*"x012"], ["y"], domain="com.microsoft", accuracy_level=4, **sizes
        )
        blocks = SIDE // INT4_BLOCK
        weights = [
            rng.integers(0, 256, (SIDE, blocks, INT4_BLOCK // 2), np.uint8),
            rng.random((SIDE, blocks), np.float32),
            rng.integers(0, 256, (SIDE, blocks // 2), np.uint8),
        ]
    named = [numpy_helper.from_array(np.asarray(w), str(i)) for i, w in enumerate(weights)]
    kinds = make.np_dtype_to_tensor_dtype(x.dtype), TensorProto.FLOAT
    ends = [make.make_tensor_value_info(*end, [ROWS, SIDE]) for end in zip("xy", kinds, strict=True)]
    opsets = [make.make_opsetid("", 23), make.make_opsetid("com.microsoft", 1)]
    graph = make.make_graph([node], "product", ends[:1], ends[1:], named)
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    set_products(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def multiply() -> float:
        began = time.perf_counter()
        session.run(None, {"x": x})
        return 2 * ROWS * SIDE * SIDE / (time.perf_counter() - began)

    return repeated(multiply, repeat)


def limits(
    bundle: Bundle,
    block_bytes: int,
    threads: int,
    repeat: int,
    batches: Sequence[int],
    prompt_tokens: int,
    context: int,
) -> dict[str, Any]:
    """Measure the machine; tokens a second that it allows to decode at each of `batches`, every answer with
    `context` tokens behind it, and to prefill a prompt. {"missing": why} where that is not known."""
    if bundle.model.attention != "gqa":
        return {"missing": "known for bundles of ONNX Runtime on a CPU only"}
    try:
        decoder = work(bundle, block_bytes)
    except ImportError:
        return {"missing": "they need onnx: pip install onnx"}
    read = bandwidth(threads, repeat)
    rates = {precision: product_rate(precision, threads, repeat) for precision in ("fp32", "int8", "int4")}
    b, r, r32 = (found["median"] for found in (read, rates[bundle.precision], rates["fp32"]))

    def of(rows: int, heads: int, cached: int, pairs: int) -> dict[str, float]:
        return {
            "memory": decoder.memory(b, rows, cached),
            "arithmetic": decoder.arithmetic(r, r32, rows, heads, pairs),
        }

    return {
        "decoder": dataclasses.asdict(decoder),
        "context": context,
        "read_bytes_per_second": read,
        "operations_per_second": rates,
        "prefill_tokens_per_second": of(
            prompt_tokens, 1, prompt_tokens, prompt_tokens * (prompt_tokens + 1) // 2
        ),
        "decode_tokens_per_second": {str(n): of(n, n, n * context, n * context) for n in batches},
    }

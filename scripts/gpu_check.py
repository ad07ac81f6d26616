"""What this GPU makes of the project: equality first, then speed against what the chip allows.

    python scripts/gpu_check.py --output report --goldens ../shared/goldens
    python scripts/gpu_check.py --output report --part decode transformers --model qwen_vl
    timeout 580 python scripts/gpu_check.py --output report --part serving --minutes 4

Each part stands alone, takes minutes, and adds its rows to OUTPUT/gpu_check.json and gpu_check.md, each row
as soon as it is known: a part that is killed leaves what it has measured, and one that fails is reported and
the others go on. Runs in a checkout, installed or not.

    machine               what there is; memory bandwidth and bf16 product rate, measured
    kernels               the attention's and the fused kernels against the NumPy references in float64
    goldens               TorchScript, ONNX Runtime CUDA and TensorRT, where installed, against --goldens
    kernel-times          share of the measured bandwidth
    decode                full-size random models through the engine: tokens per second, time to first token
    transformers          the same shapes in transformers' generate
    compiled              and with its compiled static cache
    serving               1 to 64 answers at once through the engine, each to a picture of its own
    serving-transformers  the same prompts as one batch in generate; words alone in its continuous batching
    serving-vllm          the same prompts in vLLM, where installed

Exit code 0: all bounds hold; 1: a bound or an equality is missed, or a part failed; 2: nothing could be run.
`--device cpu --size tiny` runs the same code on tiny shapes without a GPU, where times mean nothing and no
bound on them is applied. Never run on real hardware yet.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETS = ("qwenvl_A", "qwenvl_C", "llava_orig_A", "llava_hf_A")
BACKENDS = ("torchscript", "onnxruntime", "tensorrt")
SHARE = 0.7  # of the measured bandwidth, for kernels
WEIGHTS = 0.8  # of the weight-bandwidth limit, for decode at batch 1
# our part, theirs → at which batch or number of streams our tokens per second must be how many times theirs
FASTER: dict[tuple[str, str], dict[int, float]] = {
    ("decode", "transformers"): {1: 4.0},
    ("decode", "compiled"): {1: 1.2},
    ("serving", "serving-transformers"): {},
    ("serving", "serving-vllm"): {1: 1.0, 32: 1.0},
}
PROMPT = 128  # tokens of words before a decode
QUESTION = 64  # tokens of words behind a served picture
LENGTH = {"full": 1024, "tiny": 512}  # tokens that a sequence may have
RATE = 8.0  # prompts a second of the Poisson row: about a third of what full size was worked out to bear
ALONE = 16  # tokens of each answer that are compared with the answer given alone
TOGETHER = 0.995  # cosine of their logits; another picture makes it 0.991 and less in the tiny models
# ‖ours − reference‖ / ‖reference‖; float32 products are exact float32
KERNEL_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
LOGITS_ERROR = 5e-4  # largest, of the reference's standard deviation, in float32 (another chip's sums)
COSINE = 0.998  # of logits in 16 bits; bf16 on a CPU has 0.9987 to 0.9999 on these sets
MARGIN = 0.005  # as in tests/test_goldens.py: below it a greedy token may flip


@dataclass
class Row:
    """One line of the report; `ok` None: nothing was promised."""

    name: str
    value: float | str
    unit: str = ""
    bound: str = ""
    ok: bool | None = None


@dataclass
class Context:
    device: str  # "cuda" or "cpu"
    size: str
    models: list[str]
    batches: list[int]
    streams: list[int]
    backends: list[str]
    goldens: Path | None
    new: int  # tokens of a timed answer
    deadline: float  # time.monotonic()

    @property
    def real(self) -> bool:
        return self.device != "cpu"

    def least(self, name: str, value: float, unit: str, least: float, bound: str = "") -> Row:
        """A row whose value must reach `least`, on a real machine at full size."""
        held = value >= least if self.real and self.size == "full" else None
        return Row(name, value, unit, f"≥ {bound or f'{least:g}'}", held)

    def late(self) -> bool:
        return time.monotonic() > self.deadline


# ------------------------------------------------------------------------------------------ measuring


def seconds_each(run: Callable[[], Any], device: str, calls: int = 10, repeats: int = 15) -> float:
    """Median time of one call: `calls` of them in a CUDA graph, its replays timed by events after a warm-up.

    So no launch waits for the host. On a CPU: a plain clock around one call.
    """
    import torch

    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are being made there
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        for _ in range(2):
            graph.replay()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy on the device, bytes read plus bytes written."""
    import torch

    size = 2**31 if device != "cpu" else 2**24
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_each(lambda: target.copy_(source), device, calls=5)


def products(device: str) -> float:
    """Operations per second of a large bf16 matrix product, 2 n³ each."""
    import torch

    n = 8192 if device != "cpu" else 128
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / seconds_each(lambda: a @ b, device, calls=5)


def guarded(label: str, rows: Iterator[Row]) -> Iterator[Row]:
    """`rows`, and one that says so where they end in an error: what comes after them is still measured."""
    try:
        yield from rows
    except Exception as e:
        traceback.print_exc()
        yield Row(
            f"{label}: failed", f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}", ok=False
        )


# --------------------------------------------------------------------------------------------- parts


def machine(c: Context) -> Iterator[Row]:
    import torch

    yield Row("host", f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if c.real:
        p = torch.cuda.get_device_properties(c.device)
        yield Row("GPU", p.name)
        yield Row("compute capability", f"{p.major}.{p.minor}")
        yield Row("multiprocessors", p.multi_processor_count)
        yield Row("memory", p.total_memory / 2**30, "GiB")
        yield Row("L2", getattr(p, "L2_cache_size", 0) / 2**20, "MiB")
        yield Row("CUDA of torch", torch.version.cuda or "none")
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=30)
            yield Row("driver", found.stdout.strip().splitlines()[0] if found.stdout.strip() else "unknown")
    for package in ("torch", "triton", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt"):
        yield Row(package, _version(package))
    yield Row("memory bandwidth, copy", bandwidth(c.device) / 1e9, "GB/s")
    yield Row("bf16 product", products(c.device) / 1e12, "Tflop/s")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def arrays(
    rows: list[tuple[int, int]],
    kv_heads: int,
    heads: int,
    head_dim: int,
    dtype: Any,
    device: str,
    nan: bool = False,
) -> list[Any]:
    """The op's eight inputs for rows of (past, new tokens), over blocks in random order. `nan`: wherever the
    pool holds no past token."""
    import torch

    totals = [past + new for past, new in rows]
    blocks = [-(-total // 16) for total in totals]
    ids = torch.randperm(sum(blocks) + 3)
    table = torch.full((len(rows), max(blocks) + 1), -1, dtype=torch.int32)
    at = 0
    for r, count in enumerate(blocks):
        table[r, :count] = ids[at : at + count]
        at += count
    T = sum(new for _, new in rows)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, device=device, dtype=dtype)

    caches = [normal(len(ids), 16, kv_heads, head_dim) for _ in range(2)]
    if nan:
        unused = torch.ones(len(ids), 16, dtype=torch.bool)
        for r, (past, _) in enumerate(rows):
            t = torch.arange(past)
            unused[table[r, t // 16].long(), t % 16] = False
        for cache in caches:
            cache[unused.to(device)] = torch.nan
    starts = torch.tensor([0, *(new for _, new in rows)]).cumsum(0).int().to(device)
    past = torch.tensor([past for past, _ in rows], dtype=torch.int32, device=device)
    vectors = [normal(T, n * head_dim) for n in (heads, kv_heads, kv_heads)]
    return [*vectors, *caches, starts, past, table.to(device)]


def kernels(c: Context) -> Iterator[Row]:
    """paged_attention and the torch op against reference.py in float64, on fresh inputs."""
    import numpy as np
    import torch

    from rtp_llm.export.paged_attention import kernels as ours
    from rtp_llm.export.paged_attention import reference

    if c.real:
        from rtp_llm.export.paged_attention.torch_op import paged_attention
    else:  # the torch op would not run the kernels

        def paged_attention(*args: Any) -> Any:  # type: ignore[misc]
            names = ("num_heads", "kv_num_heads", "scale", "local_window_size")
            return ours.paged_attention(*args[:8], **dict(zip(names, args[8:], strict=True)))

    mixtures: dict[str, list[tuple[int, int]]] = {
        "decode": [(2047, 1), (1, 1), (0, 1), (511, 1), (512, 1), (1000, 1)],
        "prefill": [(0, 300), (0, 17)],
        "chunk": [(480, 130), (16, 64)],
        "mixed": [(777, 1), (0, 0), (0, 129), (300, 40), (15, 1)],
    }
    shapes = [(32, 32, 128, -1), (8, 32, 128, -1), (4, 32, 64, -1), (8, 32, 80, 100), (2, 16, 256, -1)]
    dtypes = ["bfloat16", "float16", "float32"]
    if c.size == "tiny":
        mixtures = {"decode": [(20, 1), (0, 1)], "mixed": [(5, 1), (0, 17)]}
        shapes, dtypes = [(2, 4, 16, -1), (1, 2, 32, 7)], ["float32", "float16"]
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))

    def compared(kv_heads: int, heads: int, head_dim: int, window: int, dtype: str) -> Iterator[Row]:
        worst, where = 0.0, ""
        for name, rows in mixtures.items():
            given = arrays(rows, kv_heads, heads, head_dim, getattr(torch, dtype), c.device, nan=True)
            exact = [g.double().cpu().numpy() for g in given[:5]] + [g.cpu().numpy() for g in given[5:]]
            poison = [torch.full((8, *given[0].shape), torch.nan, device=c.device) for _ in range(2)]
            del poison  # what the launchers allocate is not left at zero
            scale = head_dim**-0.5
            out = paged_attention(*given, heads, kv_heads, scale, window)
            expected, *caches = reference.paged_attention(
                *exact, num_heads=heads, kv_num_heads=kv_heads, scale=scale, local_window_size=window
            )
            error = np.linalg.norm(out.double().cpu().numpy() - expected) / np.linalg.norm(expected)
            for found, cache in zip(given[3:5], caches, strict=True):
                if not np.array_equal(found.double().cpu().numpy(), cache, equal_nan=True):
                    error = np.inf
            if not error <= worst:  # NaN too
                worst, where = float(np.nan_to_num(error, nan=np.inf)), name
        limit = KERNEL_ERROR[dtype]
        yield Row(label(*shape, dtype), worst, f"error ({where})", f"≤ {limit:g}", worst <= limit)

    def label(kv_heads: int, heads: int, head_dim: int, window: int, dtype: str) -> str:
        return f"{dtype}, heads {heads}/{kv_heads} of {head_dim}" + f", window {window}" * (window > 0)

    for shape in shapes:
        for dtype in dtypes:
            yield from guarded(label(*shape, dtype), compared(*shape, dtype))
    for dtype in dtypes:
        yield from guarded(f"{dtype}, fused", _fused_errors(c, dtype, shapes[0]))


def fused_arguments(c: Context, dtype: Any, shape: Any, rows: list[tuple[int, int]], inner: int) -> Any:
    """Name → arguments of each fused kernel, for rows of (past, new tokens); hidden size heads · head_dim."""
    import torch

    kv_heads, heads, head_dim, _ = shape
    _, _, _, *caches, starts, past, table = arrays(rows, kv_heads, heads, head_dim, dtype, c.device)
    T, hidden = sum(new for _, new in rows), heads * head_dim

    def normal(*size: int, kind: Any = torch.float32) -> Any:
        return torch.randn(size, device=c.device, dtype=kind)

    qkv, angle = (heads + 2 * kv_heads) * head_dim, 3 * normal(T, head_dim // 2)
    scale = torch.exp2(torch.randint(-5, 5, (T, 1), device=c.device).float())
    return {
        "add_rms_norm": [normal(T, hidden), normal(T, hidden, kind=dtype), normal(hidden), scale,
                         normal(hidden), 1e-5, dtype],
        "rope_write": [normal(T, qkv, kind=dtype), normal(qkv), normal(T, 1), normal(head_dim),
                       normal(head_dim), angle.cos(), angle.sin(), *caches, starts, past, table,
                       heads, kv_heads, 1e-5],
        "silu_mul": [normal(T, 2 * inner, kind=dtype), normal(2 * inner), dtype],
        "token_scaled": [1e5 * normal(T, inner)],
    }  # fmt: skip


def _fused_errors(c: Context, dtype: str, shape: Any) -> Iterator[Row]:
    import numpy as np
    import torch

    from rtp_llm.export.fused import kernels as ours
    from rtp_llm.export.fused import reference
    from rtp_llm.export.paged_attention.reference import cache_write

    rows, inner = ([(777, 1), (0, 0), (0, 129)], 11008) if c.size == "full" else ([(5, 1), (0, 3)], 24)
    for name, given in fused_arguments(c, getattr(torch, dtype), shape, rows, inner).items():
        exact = [
            x.cpu().numpy() if x.dtype == torch.int32 else x.double().cpu().numpy()
            for x in given if isinstance(x, torch.Tensor)
        ]  # fmt: skip
        found = getattr(ours, name)(*given)
        found = list(found) if isinstance(found, tuple) else [found]
        limit = KERNEL_ERROR[dtype]
        if name == "rope_write":
            heads, kv_heads, eps = given[-3:]
            sizes = {"num_heads": heads, "kv_num_heads": kv_heads, "eps": eps, "width": shape[2]}
            query, *new = (x.reshape(len(x), -1) for x in reference.rope(*exact[:7], **sizes))
            expected, found = (query, *cache_write(*new, *exact[7:])), [*found, *given[7:9]]
        elif name == "add_rms_norm":
            expected = reference.add_rms_norm(*exact, given[-2])
        else:
            expected = getattr(reference, name)(*exact)
            expected = expected if isinstance(expected, tuple) else (expected,)
        if name == "token_scaled":
            limit = KERNEL_ERROR["float16"]
        pairs = [(x.double().cpu().numpy(), y) for x, y in zip(found, expected, strict=True)]
        worst = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)
        worst = float(np.nan_to_num(worst, nan=np.inf))
        yield Row(f"{dtype}, {name}", worst, "error", f"≤ {limit:g}", worst <= limit)


def kernel_times(c: Context) -> Iterator[Row]:
    """Batch 32, context 2048. Share = bytes / time / bandwidth; bytes: the least possible, by bytes_moved.

    cache_write: the 32 prompts of 2048 tokens, as 32 tokens move less than a launch costs.
    """
    batch, context = (32, 2048) if c.size == "full" else (2, 20)
    shapes = [(32, 32, 128), (8, 32, 128), (4, 32, 64), (8, 32, 256)]
    if c.size == "tiny":
        shapes = [(2, 4, 16)]
    rate = bandwidth(c.device)
    yield Row("memory bandwidth, copy", rate / 1e9, "GB/s")
    for i, shape in enumerate(shapes):
        rows = _times(c, *shape, rate, batch, context, promised=i < 2)
        yield from guarded("heads {1}/{0} of {2}".format(*shape), rows)
        _release(c)
    for T in (1, context):
        yield from guarded(f"fused, {T} tokens", _fused_times(c, shapes[0], rate, T))


def _fused_times(c: Context, shape: tuple[int, ...], rate: float, T: int) -> Iterator[Row]:
    """Of one token what counts is the time, which is a launch's. Bytes: of all arguments and results, but of
    the caches only the new rows. (rope_write is promised no share: it waits for block tables.)"""
    import torch

    from rtp_llm.export.fused import kernels as ours

    dtype, inner = (torch.bfloat16, 11008) if c.size == "full" else (torch.float32, 24)
    for name, given in fused_arguments(c, dtype, (*shape, -1), [(0, T)], inner).items():
        run = getattr(ours, name)
        made = run(*given)
        seconds = seconds_each(lambda: run(*given), c.device)  # noqa: B023
        yield Row(f"{name}, {T} tokens", seconds * 1e6, "µs")
        if T > 1:
            tensors = [x for x in (*given, *(made if isinstance(made, tuple) else [made]))
                       if isinstance(x, torch.Tensor) and x.ndim < 4]  # fmt: skip
            moved = sum(x.nbytes for x in tensors)
            if name == "rope_write":
                moved += 2 * T * shape[0] * shape[2] * dtype.itemsize
            title, share = f"{name}, {T} tokens: share of bandwidth", moved / seconds / rate
            yield Row(title, share) if name == "rope_write" else c.least(title, share, "", SHARE)


def _times(
    c: Context,
    kv_heads: int,
    heads: int,
    head_dim: int,
    rate: float,
    batch: int,
    context: int,
    promised: bool,
) -> Iterator[Row]:
    import torch

    from rtp_llm.export.paged_attention import kernels as ours

    dtype = torch.bfloat16 if c.real else torch.float32
    label = f"heads {heads}/{kv_heads} of {head_dim}"
    sizes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": head_dim**-0.5}
    decodes, prompts = [(context - 1, 1)] * batch, [(0, context)] * batch

    def decoding(q: Any, k: Any, v: Any, keys: Any, values: Any, *step: Any) -> Any:
        partial, stats = ours.partial_attention(q, keys, values, *step, **sizes)
        return ours.combine(partial, stats, q)

    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": dtype.itemsize}
    least, prompt = ours.bytes_moved(decodes, **shape), ours.bytes_moved(prompts, **shape)
    unsplit = ours.bytes_moved(decodes, **shape, splits=0)
    runs: list[tuple[str, Callable[..., Any], list[tuple[int, int]], int]] = [
        (
            "attention (partial + combine), decode",
            decoding,
            decodes,
            least["partial_attention"] + least["combine"],
        ),
        (  # what a decode would take if its rows were not split: 0 ranges of partials
            "whole_attention, decode",
            lambda q, k, v, *a: ours.whole_attention(q, *a, **sizes),
            decodes,
            unsplit["partial_attention"] + unsplit["combine"],
        ),
        ("whole op, decode", lambda *a: ours.paged_attention(*a, **sizes), decodes, sum(least.values())),
        ("cache_write, prompts", lambda *a: ours.cache_write(*a[1:]), prompts, prompt["cache_write"]),
    ]
    for name, run, rows, moved in runs:
        given = arrays(rows, kv_heads, heads, head_dim, dtype, c.device)
        seconds = seconds_each(lambda: run(*given), c.device)  # noqa: B023
        yield Row(f"{name}, {label}", seconds * 1e6, "µs")
        title, share = f"{name}, {label}: share of bandwidth", moved / seconds / rate
        yield c.least(title, share, "", SHARE) if promised and name[0] != "w" else Row(title, share)
    one = arrays([(0, context)], kv_heads, heads, head_dim, dtype, c.device)
    seconds = seconds_each(lambda: ours.paged_attention(*one, **sizes), c.device)
    flops = 2 * heads * head_dim * context * (context + 1)  # two products, half of the square
    yield Row(f"whole op, a prompt of {context}, {label}", seconds * 1e6, "µs")
    yield Row(f"whole op, a prompt of {context}, {label}: rate", flops / seconds / 1e12, "Tflop/s")


def decode(c: Context) -> Iterator[Row]:
    """The engine over full-size random weights in bf16: PagedBackend, CUDA graphs, sampling on the device.

    Tokens per second: those of all answers between the moment when the last of them has its first tokens and
    the moment when the first of them ends, over that time. Limit = bandwidth / bytes of the weights that a
    token reads: all but the embedding table. Time to first token: submission of pixels and words to the
    first token, median of five pictures.
    """
    rate = bandwidth(c.device)
    yield Row("memory bandwidth, copy", rate / 1e9, "GB/s")
    yield from _each(c, lambda model: _ours(c, model, rate))


def _ours(c: Context, model: str, rate: float) -> Iterator[Row]:
    from gpu_models import Ours, prompts

    def words(batch: int, count: int = PROMPT) -> Any:
        return prompts(model, c.size, batch, count, image=False)

    ours = Ours(model, c.size, c.device, max(c.batches) + 1, LENGTH[c.size])
    try:
        limit = rate / ours.backend.weight_bytes
        yield Row(f"{model}: weights read per token", ours.backend.weight_bytes / 1e9, "GB")
        yield Row(f"{model}: limit at batch 1", limit, "tokens/s")
        for batch in c.batches:
            title = f"{model}, batch {batch}: tokens per second"
            if c.late():
                yield Row(title, "skipped: out of time")
                continue
            ours.ask(words(batch), 8)  # kernels compiled, graphs captured
            found = [_tokens_per_second(ours.ask(words(batch), c.new)) for _ in range(3)]
            value = statistics.median(found)
            yield Row(title, value, "tokens/s")
            if batch == 1:
                title = f"{model}, batch 1: share of the weight-bandwidth limit"
                yield c.least(title, value / limit, "", WEIGHTS)
        yield _first_token(c, model, ours)
    finally:
        ours.stop()


def _first_token(c: Context, model: str, server: Any) -> Row:
    from gpu_models import prompts

    firsts = []
    for _ in range(6):
        (answer,) = server.ask(prompts(model, c.size, 1, 16), 2)
        firsts.append(answer.times[0] - answer.start)
    return Row(f"{model}: time to first token, one image", statistics.median(firsts[1:]) * 1e3, "ms")


def _tokens_per_second(answers: list[Any]) -> float:
    begin = max(answer.times[min(4, len(answer.times) - 2)] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    if end <= begin:  # too short an answer for a common stretch
        begin, end = min(answer.times[0] for answer in answers), max(answer.times[-1] for answer in answers)
    return sum(begin < t <= end for answer in answers for t in answer.times) / (end - begin)


def transformers(c: Context) -> Iterator[Row]:
    """`generate` as it comes (eager). Tokens per second = batch · (new − 1) / (last token − first token)."""
    yield from _theirs(c, static=False)


def compiled(c: Context) -> Iterator[Row]:
    """`generate(cache_implementation="static")`, which compiles the forward of a decode."""
    yield from _theirs(c, static=True)


def _theirs(c: Context, static: bool) -> Iterator[Row]:
    yield from _each(c, lambda model: _generate(c, model, static))


def _generate(c: Context, model: str, static: bool) -> Iterator[Row]:
    import torch
    from gpu_models import Theirs, prompts

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    theirs = Theirs(model, c.size, c.device)
    for batch in c.batches:
        title = f"{model}, batch {batch}: tokens per second"
        if c.late():
            yield Row(title, "skipped: out of time")
            continue
        found = []
        warm = 2 if static else 1  # the second one captures its graphs
        for _ in range(warm + 3):
            times = theirs.ask(prompts(model, c.size, batch, PROMPT, image=False), c.new, static)[0].times
            found.append(batch * (c.new - 1) / max(times[-1] - times[0], 1e-9))
        yield Row(title, statistics.median(found[warm:]), "tokens/s")
    if static:
        count = int(torch._dynamo.utils.counters["frames"]["ok"])
        yield Row(
            f"{model}: frames that torch compiled", count, ok=count > 0 if c.real else None, bound="≥ 1"
        )
    else:
        yield _first_token(c, model, theirs)


def _release(c: Context) -> None:
    import torch

    gc.collect()
    if c.real:
        torch.cuda.empty_cache()


def _each(c: Context, part: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The part's rows of each model asked for, of which one at a time is in memory."""
    for model in c.models:
        yield from guarded(model, part(model))
        _release(c)


# ------------------------------------------------------------------------------------------- serving


def serving(c: Context) -> Iterator[Row]:
    """--streams answers of --new-tokens at once through the engine, each to a picture of its own and QUESTION
    tokens of words; and as many as the most of them by a Poisson process of RATE prompts a second.

    All three serving parts give the same prompts (gpu_models.prompts) and count by gpu_serving.figures; of
    three runs the one of median tokens per second is reported. Pictures come as pixels of the tower's size.
    Share of the bandwidth limit: the least time of a step while all answers run, gpu_serving.step_bytes /
    bandwidth at a length of prompt + new / 2, over the time it takes. Answers: their first ALONE tokens, and
    the logits of a run that fetches them, against those of the same prompt alone; bf16 products of another
    batch have other last bits, so tokens that nearly tie may flip.
    """
    rate = bandwidth(c.device)
    yield Row("memory bandwidth, copy", rate / 1e9, "GB/s")
    yield from _each(c, lambda model: _serving(c, model, rate))


def _serving(c: Context, model: str, rate: float) -> Iterator[Row]:
    from gpu_models import Ours
    from gpu_serving import cosine, flips, step_bytes

    most = max(c.streams)
    ours = Ours(model, c.size, c.device, most + 1, LENGTH[c.size])

    def more(label: str, answers: list[Any]) -> Iterator[Row]:
        count, length = len(answers), ours.backend.tokens + QUESTION + c.new / 2
        share = step_bytes(ours, count, length) / rate * _tokens_per_second(answers) / count
        yield Row(f"{label}: share of the bandwidth limit", share)
        flipped, gap = flips(answers, alone)
        unit = f"of {count} in {min(c.new, ALONE)} tokens, at most {gap:.2g} std of the logits from a tie"
        yield Row(f"{label}: answers that flip beside the others", flipped, unit)
        together = ours.ask(_questions(c, model, count), ALONE, logits=True)
        found = cosine(together, alone)
        title = f"{label}: least cosine of logits with those given alone"
        yield Row(title, found, "", f"≥ {TOGETHER}", found >= TOGETHER)

    try:
        ours.capture(most)
        alone = [ours.ask([prompt], ALONE, logits=True)[0] for prompt in _questions(c, model, most)]
        yield from _served(c, model, ours, more=more)
        yield from _poisson(c, model, ours)
    finally:
        ours.stop()


def _questions(c: Context, model: str, count: int, seed: int = 0) -> Any:
    from gpu_models import prompts

    return prompts(model, c.size, count, QUESTION, seed)


def _served(
    c: Context, model: str, server: Any, kind: str = "", more: Callable[..., Iterator[Row]] | None = None
) -> Iterator[Row]:
    """The rows of each of --streams; `more` makes some of the answers to the questions of seed 0."""
    import torch
    from gpu_serving import figures

    for count in c.streams:
        label = f"{model}, streams {count}{kind}"
        if c.late():
            yield Row(f"{label}: tokens per second", "skipped: out of time")
            continue
        if c.real:
            torch.cuda.reset_peak_memory_stats()
        server.ask(_questions(c, model, count, 3), 4)  # shapes seen for the first time
        runs = [server.ask(_questions(c, model, count, seed), c.new) for seed in range(3)]
        for answer in (answer for run in runs for answer in run):
            if not len(answer.times) == len(answer.tokens) == c.new:
                raise RuntimeError(f"{label}: an answer of {len(answer.tokens)} tokens, expected {c.new}")
        found = sorted((figures(run) for run in runs), key=lambda f: f["tokens per second"])[1]
        for name, (value, unit) in found.items():
            yield Row(f"{label}: {name}", value, unit)
        if c.real:
            yield Row(f"{label}: memory at its peak", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        if more:
            yield from more(label, runs[0])


def _poisson(c: Context, model: str, server: Any) -> Iterator[Row]:
    from gpu_serving import arrivals, figures

    count = max(c.streams)
    label = f"{model}, streams {count} by Poisson, {RATE:g}/s"
    if c.late():
        yield Row(f"{label}: tokens per second", "skipped: out of time")
        return
    answers = server.ask(_questions(c, model, count, 4), c.new, arrivals(count, RATE))
    for name, (value, unit) in figures(answers).items():
        yield Row(f"{label}: {name}", value, unit)


def serving_transformers(c: Context) -> Iterator[Row]:
    """The prompts of `serving` as one batch in `generate`, which ends together; and in transformers' own
    continuous batching, which takes no pictures: words alone, as many as the picture would have been."""
    yield from _each(c, lambda model: _serving_transformers(c, model))


def _serving_transformers(c: Context, model: str) -> Iterator[Row]:
    from gpu_models import Theirs
    from gpu_serving import Continuous

    theirs = Theirs(model, c.size, c.device)
    yield from _served(c, model, theirs)
    yield from _peer(
        f"{model}: continuous batching",
        lambda: Continuous(theirs, c.size == "tiny"),
        lambda continuous: _served(c, model, continuous, ", words alone"),
    )


def serving_vllm(c: Context) -> Iterator[Row]:
    """The prompts of `serving` in vLLM; the pictures are PIL's, of the tower's size, which it prepares."""
    from gpu_serving import Vllm

    def rows(vllm: Any) -> Iterator[Row]:
        yield from _served(c, model, vllm)
        yield from _poisson(c, model, vllm)

    for model in c.models:
        most = max(c.streams)
        yield from _peer(f"{model}: vLLM", lambda: Vllm(model, c.size, most, LENGTH[c.size]), rows)  # noqa: B023
        _release(c)


def _peer(label: str, make: Callable[[], Any], rows: Callable[[Any], Iterator[Row]]) -> Iterator[Row]:
    """Rows of a server that is not ours, of which nothing is promised; where it fails, one that says why."""
    try:
        server = make()
        try:
            yield from rows(server)
        finally:
            server.stop()
    except Exception as e:
        yield Row(label, f"not run: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1][:300]}")


# ------------------------------------------------------------------------------------------- goldens


def goldens(c: Context) -> Iterator[Row]:
    """The recorded answers of the reference implementations. float32 (TorchScript): first logits and greedy
    tokens, as tests/test_goldens.py; 16 bits: cosine of the first logits, and tokens without a bound."""
    import torch

    if c.goldens is None:
        yield Row("goldens", "skipped: give their folder with --goldens")
        return
    torch.backends.cudnn.allow_tf32 = False  # the patches' convolution
    for backend in c.backends:
        if missing := _missing(backend, c):
            yield Row(backend, f"skipped: {missing}")
            continue
        for precision in ("fp32", "bf16") if backend == "torchscript" else ("bf16",):
            sets = [name for name in SETS if (c.goldens / name).is_dir()]
            if not sets:
                raise FileNotFoundError(f"--goldens {c.goldens} has none of {', '.join(SETS)}")
            for name in sets[: 1 if c.size == "tiny" else None]:
                rows = _golden_set(c, c.goldens / name, backend, precision)
                yield from guarded(f"{backend} {precision}, {name}", rows)


def _missing(backend: str, c: Context) -> str:
    if backend == "onnxruntime":
        if not importlib.util.find_spec("onnxruntime"):
            return "onnxruntime is not installed"
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no CUDA provider"
    if backend == "tensorrt":
        if not importlib.util.find_spec("tensorrt"):
            return "tensorrt is not installed"
        if not c.real:
            return "no GPU"
    return ""


def _golden_set(c: Context, folder: Path, backend: str, precision: str) -> Iterator[Row]:
    import numpy as np

    recorded = json.loads((folder / "cases.json").read_text())
    expected = np.load(folder / "cases.npz")
    cases = [case for case in recorded["cases"] if case["kind"] in ("raw", "ids", "chat")]
    cases = [case for case in cases if case.get("max_window_size", 6144) == 6144]
    cases = cases[: 3 if c.size == "tiny" else None]
    label = f"{backend} {precision}, {folder.name}"
    worst, cosine, equal, total, wrong = 0.0, 1.0, 0, 0, []
    with _opened(c, folder / "checkpoint", backend, precision) as pipeline:
        for case in cases:
            output = _answer(pipeline, folder, case, expected)
            logits = expected[f"{case['name']}.first_logits"][0].astype(float)
            found = output.logits[0].astype(float)
            worst = max(worst, float(np.nan_to_num(np.abs(found - logits).max(), nan=np.inf) / logits.std()))
            cosine = min(cosine, float(found @ logits / np.linalg.norm(found) / np.linalg.norm(logits)))
            margins = expected[f"{case['name']}.step_margin"]
            until = next((i for i, m in enumerate(margins) if m < MARGIN), len(margins))
            tokens = expected[f"{case['name']}.generated_ids"].tolist()
            if output.output_ids[:until] != tokens[:until]:
                wrong.append(case["name"])
            equal += sum(a == b for a, b in zip(output.output_ids, tokens, strict=False))
            total += len(tokens)
    if not cases:
        raise ValueError(f"{folder} has no case of kind raw or ids")
    if precision == "fp32":
        yield Row(
            f"{label}: largest difference of logits",
            worst,
            "std",
            f"≤ {LOGITS_ERROR:g}",
            worst <= LOGITS_ERROR,
        )
        yield Row(f"{label}: greedy tokens", f"{len(cases) - len(wrong)} of {len(cases)} cases",
                  "", "all" + (f"; not {', '.join(wrong)}" if wrong else ""), not wrong)  # fmt: skip
    else:
        yield Row(f"{label}: least cosine of logits", cosine, "", f"≥ {COSINE}", cosine >= COSINE)
        yield Row(f"{label}: greedy tokens that are the reference's", equal / max(total, 1))


@contextmanager
def _opened(c: Context, checkpoint: Path, backend: str, precision: str) -> Iterator[Any]:
    from tokenizers import Tokenizer

    from rtp_llm.export.exporter import export
    from rtp_llm.model_factory import Model
    from rtp_llm.pipeline import Pipeline
    from rtp_llm.runtime.backends import Options, open_backend
    from rtp_llm.runtime.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        options = {"device": "cuda"} if backend == "onnxruntime" else {}
        bundle = export(checkpoint, Path(folder) / "bundle", backend=backend, precision=precision, **options)
        if backend == "tensorrt":
            from rtp_llm.build.builder import build

            bundle = build(bundle.path, max_batch_size=8, opt_level=1)
        opened = open_backend(bundle, Options(slots=8, device=c.device, trust_engines=True))
        tokenizer = Tokenizer.from_file(str(bundle.read_path(bundle.tokenizer)))
        with Pipeline(Model(bundle, tokenizer, Engine(opened, bundle.model))) as pipeline:
            yield pipeline


def _answer(pipeline: Any, folder: Path, case: dict[str, Any], expected: Any) -> Any:
    from PIL import Image

    config = {"top_k": 1, "ignore_eos": True, "return_logits": True, "return_output_ids": True,
              "max_new_tokens": case["n_new"]}  # fmt: skip
    prompt, images = case.get("raw_text", case.get("text", case.get("prompt"))), None
    if case["kind"] == "ids":
        prompt = expected[f"{case['name']}.input_ids"][0].tolist()
    elif folder.name.startswith("llava"):
        images = [folder / ("" if "/" in i else "images") / i for i in case.get("images", [])]
        if folder.name.startswith("llava_hf"):  # recorded from PIL objects
            images = [Image.open(path) for path in images]
    before = Path.cwd()
    os.chdir(folder)  # Qwen's prompts name their pictures
    try:
        if case["kind"] == "chat" and folder.name.startswith("qwen") and not case["images"]:
            messages = [{"role": "system", "content": case["system"]}]
            for question, answer in case["history"]:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": case["query"]})
            *_, last = pipeline.chat(messages, generate_config=config)
        else:
            *_, last = pipeline(prompt, images=images, generate_config=config)
    finally:
        os.chdir(before)
    return last.generate_outputs[0]


# -------------------------------------------------------------------------------------------- report

PARTS: dict[str, Callable[[Context], Iterator[Row]]] = {
    "machine": machine, "kernels": kernels, "goldens": goldens, "kernel-times": kernel_times,
    "decode": decode, "transformers": transformers, "compiled": compiled, "serving": serving,
    "serving-transformers": serving_transformers, "serving-vllm": serving_vllm,
}  # fmt: skip


def ratios(c: Context, parts: dict[str, Any]) -> list[Row]:
    """Ours over theirs, of the tokens per second that are known, with the bounds of FASTER."""

    def known(part: str) -> dict[str, float]:
        rows = parts.get(part, {}).get("rows", [])
        return {r["name"]: r["value"] for r in rows if isinstance(r["value"], float)}

    rows = []
    for (part, other), bounds in FASTER.items():
        ours = known(part)
        for name, value in known(other).items():
            if name not in ours or not value:
                continue
            if count := re.fullmatch(r"\w+, (?:batch|streams) (\d+): tokens per second", name):
                title, ratio = f"{name}, over {other}", ours[name] / value
                least = bounds.get(int(count[1]))
                rows.append(c.least(title, ratio, "×", least) if least else Row(title, ratio, "×"))
            elif name.endswith("time to first token, one image"):
                rows.append(Row(f"{name}, {other} over ours", value / ours[name], "×"))
    return rows


def run_part(name: str, c: Context, parts: dict[str, Any], save: Callable[[], None]) -> list[Row]:
    """Its rows, which stand in `parts` and are saved one by one, beside those of earlier runs that this one
    does not measure again."""
    began = time.monotonic()
    before = parts.get(name, {}).get("rows", [])
    rows: list[Row] = []

    def keep(done: bool) -> None:
        fresh = {row.name for row in rows}
        kept = [r for r in before if r["name"] not in fresh and (not done or _other(r["name"], c))]
        seconds = round(time.monotonic() - began, 1)
        parts[name] = {"seconds": seconds, "rows": kept + [asdict(row) for row in rows]}
        save()

    print(f"\n{name}", flush=True)
    try:
        for row in PARTS[name](c):
            rows.append(row)
            print("  " + line(row), flush=True)
            keep(False)
    except Exception as e:
        error = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"
        traceback.print_exc()
        print(f"  FAILED: {error}", flush=True)
        rows.append(Row(f"{name}: failed", error, ok=False))
    _release(c)
    keep(True)
    return rows


def _other(name: str, c: Context) -> bool:
    """Whether a row of an earlier run is of a model, a batch or a backend that this run leaves out."""
    model = name.split(",")[0].split(":")[0]
    if model in ("qwen_vl", "llava"):
        size = re.search(r", (batch|streams) (\d+)", name)
        asked = {"batch": c.batches, "streams": c.streams}
        return model not in c.models or (size is not None and int(size[2]) not in asked[size[1]])
    backend = name.split(",")[0].split(" ")[0].rstrip(":")
    return backend in BACKENDS and backend not in c.backends


def line(row: Row) -> str:
    verdict = {None: "", True: "ok", False: "MISSED"}[row.ok]
    return f"{row.name}: {text(row.value)} {row.unit}".rstrip() + (
        f" ({row.bound}) {verdict}" if row.bound else ""
    )


def text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def report(c: Context, found: dict[str, Any]) -> str:
    lines = ["# GPU check", "", f"{found['machine']}; {found['when']}; size {c.size}.", ""]
    parts = {**found["parts"]}
    if rows := ratios(c, found["parts"]):
        parts["ratios"] = {"rows": [asdict(r) for r in rows]}
    for name, part in parts.items():
        lines += [f"## {name}", ""]
        if part.get("command"):
            lines += [f"`{part['command']}`, {part['seconds']} s", ""]
        if part["rows"]:
            lines += ["| what | value | bound | |", "|---|---|---|---|"]
        for r in part["rows"]:
            verdict = {None: "", True: "ok", False: "**missed**"}[r["ok"]]
            value = f"{text(r['value'])} {r['unit']}".strip()
            lines.append(f"| {r['name']} | {value} | {r['bound']} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- main


def make_importable() -> None:
    """The repository's root is the package: a link with its name, in a folder of its own, stands first."""
    folder = tempfile.mkdtemp(prefix="gpu_check-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.symlink(ROOT, os.path.join(folder, "rtp_llm"))
    sys.path[:0] = [folder, str(ROOT / "scripts")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder of the report")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--goldens", type=Path, help="folder of the reference outputs")
    parser.add_argument("--model", nargs="+", choices=["qwen_vl", "llava"], default=["qwen_vl", "llava"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="of serving")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="of goldens")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a timed answer")
    parser.add_argument("--minutes", type=float, default=8, help="after them a part starts no measurement")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial of this program")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    args = parser.parse_args(argv)
    if min(*args.batch, *args.streams) < 1 or args.new_tokens < 8:
        parser.error("--batch and --streams must be at least 1, --new-tokens at least 8")
    if args.device == "cpu" and args.size == "full":
        parser.error("--device cpu goes with --size tiny")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
    except ImportError:
        print("gpu_check needs torch: pip install torch", file=sys.stderr)
        return 2
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"gpu_check needs a CUDA GPU, and torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    if args.device != "cpu":
        torch.cuda.set_device(torch.device(args.device).index or 0)
    make_importable()
    c = Context(
        args.device, args.size, args.model, sorted(args.batch), sorted(args.streams), args.backend,
        args.goldens and args.goldens.resolve(), args.new_tokens, 0.0,
    )  # fmt: skip
    where = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    name = f"{where}, torch {torch.__version__}"
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "gpu_check.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if found.get("machine") != name or found.get("size") != args.size:  # another machine's numbers do not mix
        found = {"machine": name, "size": args.size, "parts": {}}
    words = " ".join(["python scripts/gpu_check.py", *(argv if argv is not None else sys.argv[1:])])

    def save() -> None:
        found["when"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        found["parts"][part]["command"] = words
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        (args.output / "gpu_check.md").write_text(report(c, found))

    rows: list[Row] = []
    for part in args.part:
        c.deadline = time.monotonic() + 60 * args.minutes
        rows += run_part(part, c, found["parts"], save)
    if set(args.part) & {part for pair in FASTER for part in pair}:
        rows += ratios(c, found["parts"])
    bad = [line(row) for row in rows if row.ok is False]
    print(f"\n{args.output / 'gpu_check.md'}: " + (f"{len(bad)} missed" if bad else "all bounds hold"))
    for one in bad:
        print("  " + one)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

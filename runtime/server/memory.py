"""The start-up table: what the server will hold in memory, and whether that fits.

Before anything is opened `plan` knows the files and the budgets, so what cannot fit is refused before the
machine swaps. After a warm-up `measure` knows what the weights and a full batch of images really take.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..backends.onnx import vnni
from ..kv_cache import BLOCK, blocks_for

if TYPE_CHECKING:
    import numpy as np

    from ...export.bundle import Bundle
    from ...model_factory import Model

PROGRAM = 200 * 10**6  # Python, ONNX Runtime and the tokenizer, before any weight
# of the file, on top of it, while ONNX Runtime repacks weights of 4 bits, or of 8 for a CPU without VNNI
LOADING = 0.5
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class Weights:
    graph: str
    precision: str
    bytes: int
    mapped: bool = False  # stay in the file: the system takes their pages back when it needs room
    repacked: bool = False  # by ONNX Runtime, while it opens the graph

    @property
    def held(self) -> int:
        """Bytes that only this process's end gives back."""
        return 0 if self.mapped else self.bytes

    @property
    def loading(self) -> int:
        """Bytes at the worst moment of opening the graph."""
        return self.held + int(LOADING * self.bytes if self.repacked else 0)


@dataclass(frozen=True)
class Limit:
    bytes: int
    source: str  # "--memory-limit", "the cgroup's limit", "available memory"


@dataclass(frozen=True)
class Table:
    """What the server holds in memory; every size in bytes."""

    name: str  # of the bundle
    limit: Limit
    weights: tuple[Weights, ...]
    cache: int  # budget of keys and values
    images: int  # budget of encoded images
    tokens: int  # that fit into the cache, all sequences together
    longest: int  # tokens of the longest sequence
    vision: int | None = None  # peak of a full batch; None before it was measured
    measured: int | None = None  # what the process held after the warm-up, without cache and images
    smallest: str = "int4"  # precision that bundles of this kind can have

    @property
    def need(self) -> int:
        """Bytes at the worst moment that can be foreseen."""
        running = self.cache + self.images
        if self.measured is not None:
            return self.measured + running
        held = sum(w.held for w in self.weights)
        opening = max([w.loading - w.held for w in self.weights], default=0)
        return PROGRAM + held + max(running + (self.vision or 0), opening)

    def check(self) -> None:
        """Raises UserError that names what to change when it does not fit."""
        if self.need <= self.limit.bytes:
            return
        advice = []
        cache = (self.cache - (self.need - self.limit.bytes)) // 10**6 * 10**6
        fits = dataclasses.replace(self, cache=cache).need <= self.limit.bytes
        if fits and cache * self.tokens >= self.cache * BLOCK:  # a block at least
            advice.append(f"--kv-cache-bytes {cache} (now {size(self.cache)})")
        heavy = max(self.weights, key=lambda w: w.loading)
        if heavy.precision != self.smallest and not heavy.mapped:
            advice.append(
                f"a bundle exported with --precision {self.smallest} (this one is {heavy.precision})"
            )
        if not advice:
            advice.append("a smaller model")
        raise UserError(
            f"{self.name} needs {size(self.need)} of memory, {size(self.limit.bytes)} are there "
            f"({self.limit.source}): give more, or use {', or '.join(advice)}\n{self}"
        )

    def __str__(self) -> str:
        rows = [
            (
                f"weights, {w.graph}",
                size(w.bytes),
                w.precision
                + (", mapped from the file" if w.mapped else "")
                + (f", {size(w.loading)} while it opens" if w.loading > w.held else ""),
            )
            for w in self.weights
        ]
        if self.vision is None:
            rows.append(("vision peak", "?", "measured at the warm-up"))
        else:
            rows.append(("vision peak", size(self.vision), "a full batch of images"))
        rows += [
            ("key-value cache", size(self.cache), f"{self.tokens:,} tokens, {self.longest:,} a sequence"),
            ("image cache", size(self.images), "encoded images"),
            ("in all", size(self.need), "at most, the program included"),
            ("limit", size(self.limit.bytes), self.limit.source),
        ]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:>{second}}  {c}" for a, b, c in rows)


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def plan(
    bundle: Bundle,
    limit: Limit,
    *,
    kv_cache_bytes: int | None = None,
    image_cache_bytes: int,
    slots: int,
    max_seq_len: int | None = None,
    available: int | None = None,
    gpu: bool = False,
    weight_budget: int | None = None,
) -> Table:
    """What the bundle will need, from its files. `available`: free memory, as now unless given.
    `weight_budget`: bytes of the weights of each TensorRT engine that stay on the GPU; None: all.

    Without `kv_cache_bytes` the cache gets a quarter of the limit or half of what the weights leave,
    whichever is less (of a `gpu`, which nobody else wants, five sixths of what the weights leave), and
    never more than all slots can fill: pass `table.cache` on to the backend.
    Raises UserError when `kv_cache_bytes` is less than a block.
    """
    available = _available() if available is None else available
    model = bundle.model
    engines = bundle.engines if gpu else {}  # a check on a CPU opens the graphs
    limits = engines["decoder"].limits if "decoder" in engines else {}
    weights = []
    for graph, spec in sorted(bundle.graphs.items()):
        # of a TensorRT bundle only the plans are opened
        file = engines[graph].path if graph in engines else spec.path
        total = sum(f.size for name, f in bundle.files.items() if name.startswith(file))
        if graph in engines and weight_budget is not None:
            total = min(total, weight_budget)
        # as the backend does: large float32 weights are not copied
        mapped = model.attention == "gqa" and spec.precision == "fp32" and total > available // 4
        repacked = model.attention == "gqa" and (
            spec.precision == "int4" or (spec.precision == "int8" and not vnni())
        )
        weights.append(Weights(graph, spec.precision, total, mapped, repacked))
    number = 4 if bundle.graphs["decoder"].inputs[-1].dtype == "float32" else 2  # bytes, in the caches
    block = 2 * number * model.layers * model.kv_heads * model.head_dim * BLOCK
    if kv_cache_bytes is not None and kv_cache_bytes < block:
        raise UserError(
            f"--kv-cache-bytes {kv_cache_bytes} is less than {BLOCK} tokens of {bundle.name} take: "
            f"give {block} or more"
        )
    longest = min(max_seq_len or model.max_seq_len, limits.get("max_seq_len", UNLIMITED))
    # a slot of TensorRT's own cache layers is there as a whole
    each = limits.get("slot_len", longest)
    most = min(slots, limits.get("max_batch_size", slots)) * blocks_for(each)
    left = limit.bytes - PROGRAM - sum(w.held for w in weights) - image_cache_bytes
    share = left * 5 // 6 if gpu else min(limit.bytes // 4, left // 2)
    wanted = kv_cache_bytes or max(block, share)
    blocks = max(1, min(wanted // block, most))
    longest = min(longest, blocks * BLOCK)
    smallest = {"torchscript": "int8", "onnxruntime": "int4" if model.attention == "gqa" else "bf16"}
    return Table(
        bundle.name, limit, tuple(weights), blocks * block, image_cache_bytes, blocks * BLOCK, longest,
        smallest=smallest.get(bundle.backend, "int4"),
    )  # fmt: skip


def measure(table: Table, model: Model) -> Table:
    """The table with the vision peak as measured: one full batch goes through the vision graph.

    Call it while the engine has no request. On a GPU the memory is the GPU's.
    """
    if "vision" not in model.bundle.graphs:
        return dataclasses.replace(table, vision=0, measured=_anonymous())
    import numpy as np

    side, batch = model.bundle.vision.size, model.engine.images.batch
    backend = model.engine.backend
    backend.encode(np.zeros((1, side, side, 3), np.uint8))  # opens the graph
    gpu = getattr(backend, "device", None) if getattr(backend, "cuda", False) else None
    vision = peak(lambda: backend.encode(np.zeros((batch, side, side, 3), np.uint8)), gpu)
    # of a GPU's weights their files tell: what else is there may be another process's
    return dataclasses.replace(table, vision=vision, measured=None if gpu else _anonymous())


def peak(work: Callable[[], np.ndarray], gpu: Any = None) -> int:
    """Bytes that the process, or its share of a GPU, grew by at the worst moment of `work`."""
    if gpu is not None:
        import torch

        torch.cuda.reset_peak_memory_stats(gpu)
        before, free = torch.cuda.memory_allocated(gpu), torch.cuda.mem_get_info(gpu)[0]
        work()
        # what ONNX Runtime and TensorRT take is none of torch's, and they keep it
        taken = free - torch.cuda.mem_get_info(gpu)[0]
        return max(taken, torch.cuda.max_memory_allocated(gpu) - before)
    _reset_peak()
    before = _status("VmRSS")
    work()
    return max(0, max(_status("VmHWM"), _status("VmRSS")) - before)


def memory_limit(flag: int | None, root: Path = Path("/")) -> Limit:
    """`flag` (bytes, --memory-limit), else the least of the cgroups' limits and available memory."""
    if flag is not None:
        return Limit(flag, "--memory-limit")
    free = Limit(_available() + _anonymous(), "available memory")
    cgroup = cgroup_limit(root)
    if cgroup is not None and cgroup < free.bytes:
        return Limit(cgroup, "the cgroup's limit")
    return free


def gpu_limit(flag: int | None, device: str) -> Limit:
    """`flag` (--memory-limit), else the free memory of a GPU. Raises UserError where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"device {device}: torch {torch.__version__} sees no GPU here")
    return Limit(torch.cuda.mem_get_info(device)[0], "free on the GPU") if flag is None else Limit(
        flag, "--memory-limit"
    )


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """The least memory limit of this process's cgroup and those above it, v1 or v2; None without one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        # in a container the path may be the host's: then only the mount itself is there
        for folder in (group, *group.parents):
            if folder == mount or mount in folder.parents:
                found += _number(folder / name)
    return min(found, default=None)


def _number(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() and int(text) < UNLIMITED else []


def _available() -> int:
    import psutil

    return psutil.virtual_memory().available


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak may be an older one's: never too small
        pass


def _anonymous() -> int:
    """Bytes that this process owns; mapped files are not counted."""
    return _status("RssAnon")


def _status(field: str) -> int:
    """A size of this process from /proc, in bytes; elsewhere its resident size."""
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    import psutil

    return psutil.Process().memory_info().rss

"""ONNX Runtime on the CPU: the `gqa` lowering (and `linear`, to check it), caches in place.

Each layer's keys and values are one buffer [slots, kv_heads, ≥ 2 · slot_tokens, head_dim]. A step runs on a
contiguous slice of slots, which is bound as both past and present, so nothing is copied. Untouched pages
of a buffer cost no memory, and a freed slot's pages go back to the system.

Attention has a kernel of its own for one token of a sequence, and sums in another order where one token
is left of a chunk that it cuts into tiles. The latter is there twice, so that nothing depends on where a
prompt is cut; and decodes and chunks go through steps of their own, so that nothing depends on the other
rows of a step: an answer is the same to the bit whoever else is there. A token whose heads share keys
avoids that kernel (export/attention.py), and has the same bits alone and in any chunk or draft. Where
they do not, every decode's token is there twice too when drafts are allowed; that costs 1 to 7 % of a
lone answer's decode, 2 to 19 % of eight (benchmarks/speculation.md). (At int4 a lone row of a product has
a kernel of its own too. Weights that stay mapped are an exception: how their products are cut may depend
on the rows and the threads.)
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BundleError, MissingDependency, UserError
from ...export.bundle import Bundle
from ..kv_cache import BLOCK
from ..step import Result, Step
from . import GRAPHS, check_vision

if TYPE_CHECKING:
    import onnxruntime as ort


def import_onnxruntime() -> Any:
    """Raises MissingDependency where it is not installed, or older than the operators of our graphs."""
    try:
        import onnxruntime
    except ImportError as e:
        raise MissingDependency(
            "ONNX Runtime is not installed: pip install onnxruntime (or onnxruntime-gpu)"
        ) from e
    major, minor = onnxruntime.__version__.split(".")[:2]
    if (int(major), int(minor)) < (1, 32):  # the first whose attention takes rows of several lengths
        raise MissingDependency(
            f"ONNX Runtime {onnxruntime.__version__} is installed, 1.32 or newer is needed: "
            "pip install -U onnxruntime (or onnxruntime-gpu)"
        )
    return onnxruntime


class OnnxBackend:
    """`deterministic`: int4 answers do not depend on the batch either, since its kernel for a lone row is
    never used; a lone answer is slower by up to a third.

    Raises BundleError when a graph cannot be opened, MissingDependency without ONNX Runtime,
    UserError for an impossible max_seq_len.
    """

    mixes = paged = samples = False
    drafts = True
    # A prefill is 1.02 to 1.04 times as fast as in steps of 512, whose activations fall out of the cores'
    # caches, and takes half the memory. In steps of 128 it is no faster.
    token_budget = 256

    def __init__(
        self,
        bundle: Bundle,
        slots: int = 16,
        max_seq_len: int | None = None,
        kv_cache_bytes: int | None = None,
        threads: int | None = None,
        deterministic: bool = False,
        graphs: tuple[str, ...] = GRAPHS,
    ):
        self.bundle, self.graphs = bundle, graphs
        model = bundle.model
        self.slots = slots
        length = max_seq_len or model.max_seq_len
        if not 0 < length <= model.max_seq_len:
            raise UserError(
                f"max_seq_len={max_seq_len} must lie between 1 and {model.max_seq_len}, the bundle's limit"
            )
        self.slot_tokens = length
        self.dtype = np.dtype(bundle.graphs["decoder"].inputs[-1].dtype)
        self.block_bytes = BLOCK * 2 * self.dtype.itemsize * model.layers * model.kv_heads * model.head_dim
        kv_cache_bytes = kv_cache_bytes or available_memory() // 4
        self.budget_blocks = max(1, kv_cache_bytes // self.block_bytes)
        self.threads = threads or physical_cores()
        self._lock = threading.Lock()
        self._decoder: ort.InferenceSession | None = None
        self._vision: ort.InferenceSession | None = None
        self._caches: list[tuple[str, list[str], mmap.mmap | None, np.ndarray]] = []
        self._bound: dict[tuple[int, int], ort.IOBinding] = {}
        self._inputs = {s.name for s in bundle.graphs["decoder"].inputs}
        self._folds = any(s.name.startswith("decode_") for s in bundle.graphs["decoder"].outputs)
        # weights that are not repacked have a kernel of their own for a lone row, as int4 has
        self._pairs = deterministic or self._stays_mapped("decoder")
        if "decoder" in graphs:
            self._open_decoder()

    def _session(self, graph: str) -> ort.InferenceSession:
        ort = import_onnxruntime()
        self._value = ort.OrtValue.ortvalue_from_numpy
        spec = self.bundle.graphs[graph]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # shapes change every step: a pattern would never repeat
        # Threads spin for as long as the next node may take to come: waking them costs a decode a tenth of
        # its time. Spinning for longer wins 3 % more, and loses up to 40 % where anybody else wants the
        # cores: the other graph, sampling, a server's event loop.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        set_products(options)
        if self._stays_mapped(graph):
            # Repacked weights are a copy. As they are they stay in the mapped file, whose pages the
            # system takes back when it needs room.
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = self.bundle.read_path(spec.path)
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as e:
            line = str(e).splitlines()[0]
            raise BundleError(f"{path} cannot be opened by ONNX Runtime: {line}") from e
        return session

    def _stays_mapped(self, graph: str) -> bool:
        spec = self.bundle.graphs[graph]
        size = sum(f.size for name, f in self.bundle.files.items() if name.startswith(spec.path))
        return spec.precision == "fp32" and size > available_memory() // 4

    def _open_decoder(self) -> None:
        if self._decoder is None:
            self._decoder = self._session("decoder")
        if not self._caches:
            model = self.bundle.model
            # the nodes want room behind every row's past for a step's longest row, at worst a second slot,
            # and for a token's heads
            room = self.slot_tokens + max(self.slot_tokens, model.heads)
            shape = (self.slots, model.kv_heads, room, model.head_dim)
            outputs = self.bundle.graphs["decoder"].outputs
            for i in range(model.layers):
                for kind in ("key", "value"):
                    memory, array = _allocate(shape, self.dtype)
                    news = [s.name for s in outputs if s.name.endswith(f"_{kind}.{i}")]
                    self._caches.append((f"past_{kind}.{i}", news, memory, array))

    def _binding(self, low: int, high: int) -> ort.IOBinding:
        """With the slots from low to high of every cache in place: [n, kv_heads, tokens, dim]."""
        if (low, high) not in self._bound:
            if len(self._bound) > 64:
                self._bound.clear()
            self._open_decoder()
            assert self._decoder is not None
            binding = self._decoder.io_binding()
            for past, news, _, array in self._caches:
                value = self._value(array[low:high])
                binding.bind_ortvalue_input(past, value)
                for new in news:
                    binding.bind_ortvalue_output(new, value)
            self._bound[low, high] = binding
        return self._bound[low, high]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        check_vision(self.bundle, self.graphs)
        with self._lock:
            if self._vision is None:  # a text-only user never pays for it
                self._vision = self._session("vision")
        return self._vision.run(["image_embeds"], {"pixels": pixels})[0]

    def step(self, step: Step) -> Result:
        logits = [self._run(part) for part in split(step)]
        return Result(np.concatenate(logits) if len(logits) > 1 else logits[0])

    def _run(self, step: Step) -> np.ndarray:
        wanted = len(step.logits_rows)
        if self._pairs:
            step = paired(step)
        binding = self._binding(step.slots[0], step.slots[-1] + 1)
        cells = pad(step, self.drafts and not self._folds)
        if self.bundle.model.attention == "linear":
            cells |= scatter(step, cells, self.slot_tokens)
        feeds = {
            "input_ids": step.input_ids,
            "image_embeds": step.image_embeds,
            "positions": step.positions,
            "logits_rows": step.logits_rows,
            "rope_rows": step.rope_rows,
            **cells,
        }
        for name in self._inputs & feeds.keys():
            binding.bind_cpu_input(name, feeds[name])
        logits = np.empty((len(step.logits_rows), self.bundle.model.vocab_size), np.float32)
        value = self._value(logits)
        binding.bind_ortvalue_output("logits", value)
        assert self._decoder is not None
        self._decoder.run_with_iobinding(binding)
        return logits[:wanted]

    def copy(self, source: int, target: int, tokens: int) -> None:
        for *_, array in self._caches:
            array[target, :, :tokens] = array[source, :, :tokens]

    def release(self, slot: int, keep: int = 0) -> None:
        for _, _, memory, array in self._caches:
            if memory is None:
                continue
            size, head = array[slot].nbytes, array[slot, 0].nbytes
            begin = slot * size
            behind = keep * array.itemsize * array.shape[-1]
            ends = range(begin + head, begin + size + 1, head) if keep else [begin + size]
            for end in ends:
                start = (end - head + behind) if keep else begin
                start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                end = end // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        with self._lock:
            self._decoder = self._vision = None
            self._bound.clear()
            self._caches.clear()


def split(step: Step) -> list[Step]:
    """A step whose padded cells would be mostly empty, in parts: chunks in slots that lie far apart."""
    if max(step.counts) == 1:
        return [step]
    cuts, ends = [0], np.cumsum([0, *step.counts])
    for i in range(1, len(step.slots)):
        first = cuts[-1]
        longest, tokens = max(step.counts[first : i + 1]), int(ends[i + 1] - ends[first])
        if longest > 1 and (step.slots[i] - step.slots[first] + 1) * longest > 4 * tokens:
            cuts.append(i)
    if len(cuts) == 1:
        return [step]
    parts = []
    for low, high in itertools.pairwise([*cuts, len(step.slots)]):
        start, end = int(ends[low]), int(ends[high])
        rows = step.logits_rows
        parts.append(
            Step(
                step.input_ids[start:end],
                step.image_embeds,
                step.positions[start:end],
                step.rope_rows[start:end],
                rows[(rows >= start) & (rows < end)] - start,
                step.slots[low:high],
                step.pasts[low:high],
                step.counts[low:high],
                step.tables[low:high],
            )
        )
    return parts


def paired(step: Step) -> Step:
    """The step with no lone row in any matrix product: where their number is odd, the last is there twice.

    Kernels take two rows at a time, and another computes the one that is left.
    """
    twice: dict[str, Any] = {}
    if len(step.input_ids) % 2:
        twice = {n: _with_last_twice(getattr(step, n)) for n in ("input_ids", "positions", "rope_rows")}
    if len(step.logits_rows) % 2:
        twice["logits_rows"] = _with_last_twice(step.logits_rows)
    return dataclasses.replace(step, **twice)


def _with_last_twice(rows: np.ndarray) -> np.ndarray:
    return np.append(rows, rows[-1])


def pad(step: Step, twice: bool = False) -> dict[str, np.ndarray]:
    """Inputs of `gqa`'s padded attention nodes: B slots, from the first to the last one in use, × S = the
    longest row.

    An idle slot is a row of no tokens. Of a row of 17, 33, … tokens, and if `twice` of 1, the last one is
    there twice, the second time behind what is its own in the cache, where the next step writes:
    GroupQueryAttention's tiles hold a multiple of 16 tokens, and none may hold a lone one. Contract:
    export/attention.py.
    """
    low = step.slots[0]
    widths = [count + (count % 16 == 1 and (count > 1 or twice)) for count in step.counts]
    n, longest = step.slots[-1] + 1 - low, max(widths)
    lengths = np.zeros(n, np.int32)
    totals = np.zeros(n, np.int32)
    position_ids = np.zeros((n, longest), np.int64)
    pad_rows = np.zeros((n, longest), np.int64)
    packed_rows = np.zeros(len(step.input_ids), np.int64)
    at = 0
    for slot, past, count, width in zip(step.slots, step.pasts, step.counts, widths, strict=True):
        row = slot - low
        lengths[row], totals[row] = width, past + width
        position_ids[row, :count] = step.rope_rows[at : at + count]
        pad_rows[row, :width] = np.minimum(np.arange(at, at + width), at + count - 1)
        packed_rows[at : at + count] = row * longest + np.arange(count)
        at += count
    return {
        "position_ids": position_ids,
        "pad_rows": pad_rows.reshape(-1),
        "packed_rows": packed_rows,
        "query_seqlens": lengths,
        "seqlens_k": np.maximum(totals - 1, 0).astype(np.int32),
        "total_sequence_length": np.array(totals.max(), np.int32),
    }


def scatter(step: Step, cells: dict[str, np.ndarray], slot_tokens: int) -> dict[str, np.ndarray]:
    """What `linear` wants beside `cells`, the inputs that `pad` made."""
    positions = np.zeros_like(cells["position_ids"])
    # the cells of idle slots are written too: behind everything that a slot can hold
    write_indices = np.full(len(positions), slot_tokens, np.int64)
    at = 0
    for slot, past, count in zip(step.slots, step.pasts, step.counts, strict=True):
        positions[slot - step.slots[0], :count] = step.positions[at : at + count]
        write_indices[slot - step.slots[0]] = past
        at += count
    return {
        "query_positions": positions,
        "key_positions": np.arange(int(cells["total_sequence_length"]), dtype=np.int64),
        "write_indices": write_indices,
    }


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> tuple[mmap.mmap | None, np.ndarray]:
    """A buffer whose pages are taken when they are written."""
    size = int(np.prod(shape)) * dtype.itemsize
    if sys.platform != "linux":
        return None, np.zeros(shape, dtype)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, size, flags=flags)
    # a head's tokens lie far apart: with huge pages one token would take 2 MB in each head
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, dtype).reshape(shape)


def physical_cores() -> int:
    """Processors that this process may use, hyper-threads counted once where the system tells."""
    try:
        import psutil

        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    except ImportError:
        cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return cores


def set_products(options: ort.SessionOptions) -> None:
    """Without VNNI, products of 8 bits (export/quantize.py, TokenLinear) go to kernels that do not overflow.

    They take twice as long as the others, and ONNX Runtime keeps weights of another sign for them: the
    decoder of 1.1 billion holds 1.47 GB instead of 1.07. Processors that are no x86 do not look at it.
    """
    if not vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")


def vnni() -> bool:
    """Has this x86 processor VNNI, as Linux says? Elsewhere nobody does."""
    path = Path("/proc/cpuinfo")
    return path.exists() and bool(re.search(r"\bavx(512)?_vnni\b", path.read_text()))


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    import psutil

    return psutil.virtual_memory().available

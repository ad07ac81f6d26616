"""The kernels: under the interpreter they equal the specification, and they compile for every target."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rtp_llm.errors import InternalError
from rtp_llm.export.paged_attention import kernels, reference

from .cases import Case, cases

TOLERANCE = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}
HEADS = (64, 80, 96, 128, 256)
TARGETS = (80, 89, 90, 100, 120)


class Interpreter:
    """interpreter.py, beside this file; started at the first call."""

    process: subprocess.Popen[bytes] | None = None

    def __call__(self, name: str, *arrays: np.ndarray, before: int = 0, **attributes: Any) -> Any:
        """→ the launcher's results, and the arrays afterwards."""
        if self.process is None:
            script = Path(__file__).with_name("interpreter.py")
            self.process = subprocess.Popen(
                [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        question = pickle.dumps((name, arrays, attributes, before))
        self.process.stdin.write(len(question).to_bytes(8, "little") + question)
        self.process.stdin.flush()
        size = self.process.stdout.read(8)
        assert size, "the interpreter died; its traceback is on standard error"
        return pickle.loads(self.process.stdout.read(int.from_bytes(size, "little")))


interpreted = Interpreter()


@pytest.fixture(scope="module", autouse=True)
def stop_interpreter() -> Iterator[None]:
    yield
    if interpreted.process:
        interpreted.process.stdin.close()
        interpreted.process.wait(30)
        interpreted.process = None


def close(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=0, atol=TOLERANCE[dtype])


def check_parts(case: Case, splits: int, before: int = 0) -> None:
    """Each kernel alone, on what the specification gives it."""
    q, k, v, key_cache, value_cache, *step = case.arrays()
    output, *written = reference.paged_attention(q, k, v, key_cache, value_cache, *step, **case.attributes)
    _, after = interpreted("cache_write", k, v, key_cache, value_cache, *step, before=before)
    for got, want in zip(after[2:4], written, strict=True):
        np.testing.assert_array_equal(got.astype(float), want.astype(float))

    attributes = {**case.attributes, "splits": splits}
    (partial, stats), _ = interpreted("partial_attention", q, *written, *step, before=before, **attributes)
    close(reference.combine(partial, stats, q), output, case.dtype)

    partial, stats = reference.partial_attention(q, *written, *step, **attributes)
    partial[stats[..., 1] == 0] = np.nan
    (got,), _ = interpreted("combine", partial, stats, q)
    assert got.dtype == q.dtype
    close(got, output, case.dtype)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(cases(HEADS, dtypes=("float32", "float16", "bfloat16")), st.sampled_from([1, 3, 8]))
def test_each_kernel_equals_the_reference_for_any_mixture_of_rows(case: Case, splits: int) -> None:
    check_parts(case, splits)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=25)
@given(cases((16, *HEADS), 150, dtypes=("float32", "float16", "bfloat16")), st.sampled_from([1, 2, 3, 8, 16]))
def test_each_kernel_equals_the_reference_for_many_more_mixtures(case: Case, splits: int) -> None:
    check_parts(case, splits)


@pytest.mark.parametrize(
    "case",
    [
        Case(
            rows=((700, 1), (0, 90), (3, 0), (300, 40)), kv_heads=1, group=7, head_dim=128, dtype="bfloat16"
        ),
        Case(rows=((700, 1), (130, 66)), kv_heads=1, group=1, head_dim=64, window=400, dtype="float16"),
        Case(rows=((40, 1), (0, 5)), kv_heads=1, group=71, head_dim=64),
        Case(rows=((0, 510), (20, 1), (9, 6)), kv_heads=1, group=1),
        Case(
            rows=((0, 505), (4, 0), (30, 8)),
            kv_heads=1,
            group=3,
            head_dim=80,
            window=20,
            spare_tokens=5,
            unmapped=True,
            dtype="bfloat16",
        ),
    ],
    ids=["long contexts", "long window", "71 heads on one", "more tokens than are split", "and no keys"],
)
def test_the_torch_op_on_cuda_is_the_kernels_one_after_another(case: Case) -> None:
    (output,), after = interpreted("step", *case.arrays(), **case.attributes)
    want = reference.paged_attention(*case.arrays(), **case.attributes)
    close(output, want[0], case.dtype)
    for got, cache in zip(after[3:5], want[1:], strict=True):
        np.testing.assert_array_equal(got.astype(float), cache.astype(float))


def test_more_rows_than_are_searched_at_once() -> None:
    check_parts(Case(rows=((3, 1), (0, 2)) * 66, kv_heads=1, group=2, spare_tokens=4), splits=1)


def test_pools_beyond_2_31_elements_are_addressed() -> None:
    case = Case(rows=((20, 1), (7, 3)), kv_heads=2, group=1, head_dim=64, dtype="float16")
    check_parts(case, splits=2, before=2**31 // (16 * 2 * 64) + 1)


def built(kernel: str, capability: int, dtype: str = "bfloat16", **sizes: Any) -> kernels.Compiled:
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16} | sizes
    return kernels.compile(kernel, dtype, capability, **sizes)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_it_compiles_for_every_target_without_scratch_and_within_48_kib(kernel: str, capability: int) -> None:
    compiled = built(kernel, capability)  # raises where scratch or shared memory exceed
    assert re.search(rf"^\.target sm_{capability}a?$", compiled.ptx, re.M)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert 0 <= compiled.shared <= 48 * 1024
    entry = re.search(rf"\.entry {compiled.name}\((.*?)\)", compiled.ptx, re.S).group(1)
    kinds = [".ptr" in line or ".u64" in line for line in entry.splitlines() if ".param" in line]
    types = [t for t in kernels.signature(kernel, "bfloat16").values() if t != "constexpr"]
    assert kinds == [t[0] == "*" for t in types] + [True, True], (
        "the compiler's two hidden pointers come last"
    )


def test_attention_copies_keys_ahead_16_bytes_at_a_time_and_multiplies_on_tensor_cores() -> None:
    instructions = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
    for capability, instruction in instructions.items():
        ptx = built("partial_attention", capability).ptx
        assert instruction in ptx
        sizes = set(re.findall(r"cp\.async\.c\w\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx))
        assert sizes == {"0x10"}, f"sm_{capability}"


@pytest.mark.parametrize("capability", TARGETS)
def test_the_kernel_that_writes_the_output_itself_compiles_for_every_target(capability: int) -> None:
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16}
    constants = kernels.constants("partial_attention", "bfloat16", splits=1, **sizes) | {"stats": None}
    types = kernels.signature("partial_attention", "bfloat16") | {"partial": "*bf16", "stats": "constexpr"}
    source = ASTSource(kernels._partial_attention, types, constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels._OPTIONS)
    assert built.metadata.shared <= 48 * 1024
    assert "st.global" in built.asm["ptx"] and ".entry" in built.asm["ptx"]


def test_more_tokens_than_are_split_are_answered_by_one_kernel_that_writes_no_partials() -> None:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 8, "head_dim": 64, "itemsize": 2}
    split, whole = (kernels.bytes_moved([(0, new)], **sizes) for new in (512, 513))
    output = 513 * 8 * 64 * 2
    assert split["combine"] > 0 == whole["combine"]
    assert whole["partial_attention"] == 2 * output + 2 * output  # queries, output; keys, values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEADS)
def test_every_head_size_and_type_stays_within_48_kib(head_dim: int, dtype: str) -> None:
    built("partial_attention", 90, dtype, head_dim=head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_every_target_takes_every_head_size_and_group(capability: int) -> None:
    """All pairs on one target, the smallest and the largest on the others."""
    every = capability == 90
    for head_dim in (16, *HEADS) if every else (16, max(HEADS)):
        for group in (1, 7, 32) if every else (1, 32):
            built("partial_attention", capability, head_dim=head_dim, heads=8 * group, window=512, splits=16)


def test_a_kernel_beyond_the_limits_is_an_error_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHARED_LIMIT", 1000)
    with pytest.raises(InternalError, match=r"partial_attention.*heads of 128, sm_90.*limit 1000"):
        built("partial_attention", 90)


def test_grids_cover_every_tile_of_any_row_lengths() -> None:
    sizes: dict[str, Any] = {"heads": 28, "kv_heads": 4, "head_dim": 128, "block_size": 16}
    rng = np.random.default_rng(0)
    for kernel, tokens in (("partial_attention", 64 // 7), ("cache_write", 4)):
        c = kernels.constants(kernel, "bfloat16", **sizes)
        for _ in range(50):
            lengths = rng.integers(0, 40, rng.integers(1, 9))
            T, R = int(lengths.sum()), len(lengths)
            tiles = kernels.grid(kernel, T, R, c)[2 if kernel == "partial_attention" else 0]
            starts = np.concatenate([[0], lengths.cumsum()])
            ends = [starts[r] // tokens + r + -(-n // tokens) for r, n in enumerate(lengths)]
            assert max(ends) <= tiles <= T // tokens + R + 1


def test_bytes_moved_is_the_sum_that_the_docstring_works_out() -> None:
    sizes: dict[str, Any] = {"heads": 32, "head_dim": 128, "itemsize": 2, "splits": 8}
    full = kernels.bytes_moved([(2047, 1)] * 32, kv_heads=32, **sizes)
    assert full["partial_attention"] == pytest.approx(32 * 2048 * 2 * 32 * 128 * 2, rel=0.01)
    assert full["cache_write"] == 32 * 4 * 32 * 128 * 2
    assert full["combine"] == pytest.approx(32 * 32 * 128 * (8 * 4 + 2), rel=0.02)
    windowed = kernels.bytes_moved([(2047, 1)] * 32, kv_heads=32, window=256, **sizes)
    kept = full["partial_attention"] - windowed["partial_attention"]
    assert kept == 32 * (2048 - 256) * 2 * 32 * 128 * 2

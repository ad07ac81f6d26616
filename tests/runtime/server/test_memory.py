"""The start-up table: what cannot fit is refused with the setting that would help."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtp_llm.errors import UserError
from rtp_llm.export.bundle import Bundle, EngineSpec, FileSpec, read
from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.runtime.server import memory
from rtp_llm.runtime.server.memory import Limit, plan

GB = 10**9


def sized(bundle: Bundle, decoder: float, vision: float, precision: str = "int4") -> Bundle:
    """The bundle as if its graphs were that many GB."""
    files = {
        "decoder.onnx": FileSpec(0, ""),
        "decoder.onnx.data": FileSpec(int(decoder * GB), ""),
        "vision.onnx.data": FileSpec(int(vision * GB), ""),
    }
    graphs = dict(bundle.graphs)
    graphs["decoder"] = dataclasses.replace(graphs["decoder"], precision=precision)
    model = dataclasses.replace(bundle.model, layers=32, kv_heads=32, head_dim=128)
    return dataclasses.replace(bundle, files=files, graphs=graphs, model=model)


@pytest.fixture(scope="module")
def bundle(llava_bundle: Path) -> Bundle:
    return read(llava_bundle)


def planned(bundle: Bundle, limit: float, **options: Any) -> memory.Table:
    options = {"image_cache_bytes": 0, "slots": 16, "available": int(limit * GB)} | options
    return plan(bundle, Limit(int(limit * GB), "--memory-limit"), **options)


def test_int4_needs_half_its_file_more_while_it_opens(bundle: Bundle) -> None:
    table = planned(sized(bundle, decoder=4, vision=0), limit=12, kv_cache_bytes=GB)
    assert table.need == memory.PROGRAM + 6 * GB
    assert "6.0 GB while it opens" in str(table)
    idle = planned(sized(bundle, decoder=4, vision=0), limit=12, kv_cache_bytes=3 * GB)
    assert idle.need == pytest.approx(memory.PROGRAM + 7 * GB, rel=0.01), "the cache is not yet there then"


def test_large_float_weights_stay_in_their_file_and_need_no_room(bundle: Bundle) -> None:
    small = planned(sized(bundle, decoder=1, vision=2), limit=12, kv_cache_bytes=GB)
    assert [w.mapped for w in small.weights] == [False, False]
    large = planned(sized(bundle, decoder=1, vision=4), limit=12, kv_cache_bytes=GB)
    assert {w.graph: w.mapped for w in large.weights} == {"decoder": False, "vision": True}
    assert small.need - large.need == 2 * GB
    assert "mapped from the file" in str(large)


def test_the_cache_is_whole_blocks_and_says_the_tokens_that_fit(bundle: Bundle) -> None:
    table = planned(sized(bundle, 1, 0), limit=12, kv_cache_bytes=GB)
    block = 2 * 4 * 32 * 32 * 128 * 16
    assert table.tokens == GB // block * 16 and table.cache == table.tokens // 16 * block <= GB
    assert f"{table.tokens:,} tokens" in str(table)


def test_a_cache_too_small_for_a_block_is_refused(bundle: Bundle) -> None:
    block = 2 * 4 * 32 * 32 * 128 * 16
    assert planned(sized(bundle, 1, 0), limit=12, kv_cache_bytes=block).cache == block
    with pytest.raises(UserError, match=f"--kv-cache-bytes 1024 is less than .* give {block} or more"):
        planned(sized(bundle, 1, 0), limit=12, kv_cache_bytes=1024)


def test_by_default_the_cache_leaves_room_and_never_exceeds_what_the_slots_can_fill(bundle: Bundle) -> None:
    quarter = planned(sized(bundle, 1, 0), limit=12)
    assert 2.9 * GB < quarter.cache <= 3 * GB
    tight = planned(sized(bundle, 4, 0), limit=6.5)
    assert 1 * GB < tight.cache < 1.2 * GB
    tight.check()
    full = planned(sized(bundle, 1, 0), limit=500, slots=2, max_seq_len=160)
    assert (full.tokens, full.longest) == (320, 160)


def test_what_fits_is_not_refused_and_a_byte_less_is(bundle: Bundle) -> None:
    table = planned(sized(bundle, 4, 1), limit=12)
    exact = dataclasses.replace(table, limit=Limit(table.need, "--memory-limit"))
    exact.check()
    with pytest.raises(UserError):
        dataclasses.replace(exact, limit=Limit(table.need - 1, "--memory-limit")).check()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_refusal_names_the_size_the_limit_and_what_would_help(bundle: Bundle, precision: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(sized(bundle, 9, 0, precision), limit=6, available=100 * GB).check()
    text = str(caught.value)
    assert "6.0 GB are there (--memory-limit)" in text
    assert ("--precision int4" in text) == (precision != "int4")


@pytest.mark.parametrize(
    ("backend", "precision", "advice"),
    [("torchscript", "fp32", "int8"), ("torchscript", "int8", ""), ("tensorrt", "bf16", "int4"),
     ("onnxruntime", "fp16", "bf16")],
)  # fmt: skip
def test_a_refusal_of_a_gpus_bundle_names_a_precision_that_its_backend_has(
    bundle: Bundle, backend: str, precision: str, advice: str
) -> None:
    heavy = sized(bundle, 9, 0, precision)
    model = dataclasses.replace(heavy.model, attention="paged")
    heavy = dataclasses.replace(heavy, backend=backend, model=model)
    with pytest.raises(UserError) as caught:
        planned(heavy, limit=6).check()
    found = re.search(r"exported with --precision (\w+)", str(caught.value))
    assert (found[1] if found else "") == advice


def test_only_onnx_runtime_on_a_cpu_repacks_int4(bundle: Bundle) -> None:
    engines = sized(bundle, decoder=4, vision=0)
    engines = dataclasses.replace(
        engines, backend="tensorrt", model=dataclasses.replace(engines.model, attention="paged")
    )
    assert "while it opens" not in str(planned(engines, limit=12))


def engines(bundle: Bundle, kv_cache: str, **limits: int) -> Bundle:
    """As if plans of 5 and 2 GB were built of graphs of 9 and 4."""
    files = {**sized(bundle, 9, 4, "bf16").files, "decoder.plan": FileSpec(5 * GB, ""),
             "vision.plan": FileSpec(2 * GB, "")}  # fmt: skip
    plans = {k: EngineSpec(f"{k}.plan", "", "9.0", "11", "", limits) for k in ("vision", "decoder")}
    model = dataclasses.replace(bundle.model, attention=kv_cache)
    return dataclasses.replace(bundle, files=files, engines=plans, backend="tensorrt", model=model)


def test_engines_take_their_plans_on_a_gpu_less_what_is_streamed_and_the_graphs_on_a_cpu(
    bundle: Bundle,
) -> None:
    made = engines(bundle, "paged", max_batch_size=4, max_seq_len=512)
    sizes = {
        name: {w.graph: w.bytes // GB for w in planned(made, limit=40, **options).weights}
        for name, options in (
            ("gpu", {"gpu": True}), ("cpu", {}), ("budget", {"gpu": True, "weight_budget": 3 * GB})
        )
    }
    assert sizes == {
        "gpu": {"decoder": 5, "vision": 2},
        "cpu": {"decoder": 9, "vision": 4},
        "budget": {"decoder": 3, "vision": 2},
    }


def test_the_cache_of_engines_holds_what_they_were_built_for_and_whole_slots(bundle: Bundle) -> None:
    paged = planned(engines(bundle, "paged", max_batch_size=4, max_seq_len=512), limit=400, gpu=True)
    assert (paged.tokens, paged.longest) == (4 * 512, 512)
    linear = engines(bundle, "linear", max_batch_size=4, max_seq_len=512, slot_len=528)
    assert planned(linear, limit=400, gpu=True).tokens == 4 * 528


def test_a_peak_on_a_gpu_counts_what_torch_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10 * GB, 7 * GB])
    for name, answer in (
        ("reset_peak_memory_stats", lambda gpu: None),
        ("memory_allocated", lambda gpu: GB),
        ("max_memory_allocated", lambda gpu: 2 * GB),
        ("mem_get_info", lambda gpu: (next(free), 80 * GB)),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", answer)
    assert memory.peak(lambda: np.zeros(1), "cuda:0") == 3 * GB


def test_the_cache_size_that_a_refusal_names_fits(bundle: Bundle) -> None:
    heavy = sized(bundle, 4, 0)
    with pytest.raises(UserError, match="--kv-cache-bytes") as caught:
        planned(heavy, limit=8, kv_cache_bytes=5 * GB).check()
    named = int(str(caught.value).split("--kv-cache-bytes ")[1].split()[0])
    planned(heavy, limit=8, kv_cache_bytes=named).check()
    with pytest.raises(UserError) as caught:
        planned(heavy, limit=6).check()
    assert "--kv-cache-bytes" not in str(caught.value), "no cache is small enough"


def test_after_the_warm_up_the_table_has_the_measured_peak(llava_bundle: Path, bundle: Bundle) -> None:
    config = ModelConfig(ckpt_path=str(llava_bundle), kv_cache_bytes=10**7)
    model = ModelFactory.from_model_config(config)
    try:
        before = planned(bundle, limit=4, kv_cache_bytes=10**7)
        after = memory.measure(before, model)
    finally:
        model.engine.stop()
    assert "measured at the warm-up" in str(before) and "a full batch of images" in str(after)
    assert after.vision is not None and after.measured is not None and 10**7 < after.measured < 3 * GB
    assert after.need == after.measured + after.cache


def test_a_peak_counts_what_was_given_back() -> None:
    memory.peak(lambda: np.zeros(1))
    assert 90e6 < memory.peak(lambda: np.ones(100 * 10**6, np.uint8)[:1].copy()) < 150e6
    assert memory.peak(lambda: np.zeros(1)) < 20e6, "an earlier peak is another's"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": "max"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": "5000"}, 5000),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": "4000",
                "sys/fs/cgroup/a/b/memory.max": "5000",
            },
            4000,
        ),
        ({"proc/self/cgroup": "0::/host/path", "sys/fs/cgroup/memory.max": "6000"}, 6000),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "7000\n",
            },
            7000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_a_containers_limit_is_found(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.cgroup_limit(tmp_path) == limit


def test_the_limit_is_the_flag_else_the_containers_else_what_is_free(tmp_path: Path) -> None:
    assert memory.memory_limit(123) == Limit(123, "--memory-limit")
    assert memory.memory_limit(None, tmp_path).source == "available memory"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4096\n")
    assert memory.memory_limit(None, tmp_path) == Limit(4096, "the cgroup's limit")

"""ONNX Runtime on a graph with PagedAttention. Its CPU provider has no kernel for that, so the node is
written out in standard operators; everything else is what runs on a GPU: binding, caches in place, steps."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from rtp_llm.errors import BundleError, MissingDependency, UserError, VisionGraphMissing  # noqa: E402
from rtp_llm.export import bundle as bundles  # noqa: E402
from rtp_llm.export.bundle import Bundle  # noqa: E402
from rtp_llm.pipeline import Pipeline  # noqa: E402
from rtp_llm.runtime.backends.onnx import OnnxBackend  # noqa: E402
from rtp_llm.runtime.backends.onnx_paged import OnnxPagedBackend  # noqa: E402
from rtp_llm.runtime.step import Step  # noqa: E402

from .answers import assert_equal_answers, opened, requests  # noqa: E402
from .written_out import write_out  # noqa: E402


class Both:
    """One checkpoint's paged bundle, whose graph is changed, and its answers from the gqa bundle."""

    def __init__(self, paged: Path, gqa: Path, images: Path):
        self.paged = bundles.read(paged)
        write_out(self.paged.read_path("decoder.onnx"))
        self.requests = requests(self.paged, images)
        reference = bundles.read(gqa)
        with opened(reference, OnnxBackend(reference)) as pipeline:
            self.expected = [answer for _, answer in pipeline.batch(self.requests)]


@pytest.fixture(scope="module")
def qwen(exported: dict[str, Path], qwen_bundle: Path, red_circle: Path, tmp_path_factory: Any) -> Both:
    paged = shutil.copytree(exported["paged"], tmp_path_factory.mktemp("qwen") / "paged")
    return Both(paged, qwen_bundle, red_circle.parent)


@pytest.fixture(scope="module")
def llava(float32_engine_bundle: Any, llava_bundle: Path, red_circle: Path, tmp_path_factory: Any) -> Both:
    shared = float32_engine_bundle("llava_shapes", "paged")
    paged = shutil.copytree(shared, tmp_path_factory.mktemp("llava") / "paged")
    return Both(paged, llava_bundle, red_circle.parent)


@pytest.fixture(params=["qwen", "llava"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def paged(both: Both, token_budget: int = 512, **options: Any) -> Pipeline:
    return opened(both.paged, OnnxPagedBackend(both.paged, device="cpu", **options), token_budget)


def test_many_requests_at_once_have_the_answers_of_gqa(both: Both) -> None:
    with paged(both) as pipeline:
        found = [answer for _, answer in pipeline.batch(both.requests, in_flight=len(both.requests))]
        assert pipeline.model.engine.stats().steps < 40, "one after another"
    assert_equal_answers(found, both.expected)


def test_prompts_in_chunks_and_shared_prefixes_have_the_same_answers(both: Both) -> None:
    with paged(both, token_budget=24) as pipeline:
        for _ in range(2):
            found = [answer for _, answer in pipeline.batch(both.requests)]
            assert_equal_answers(found, both.expected)
        assert pipeline.model.engine.stats().reused_tokens > 100


def test_answers_stay_the_same_where_the_pool_is_too_small_for_all(qwen: Both) -> None:
    block = OnnxPagedBackend(qwen.paged, device="cpu").block_bytes
    with paged(qwen, slots=8, kv_cache_bytes=40 * block) as pipeline:
        found = [answer for _, answer in pipeline.batch(qwen.requests)]
    assert_equal_answers(found, qwen.expected)


def prompt(count: int, table: list[int], past: int = 0) -> Step:
    ids = np.arange(1, count + 1)
    positions = np.arange(past, past + count)
    return Step(
        input_ids=ids, image_embeds=np.zeros((1, 64), np.float32), positions=positions, rope_rows=positions,
        logits_rows=np.array([count - 1]), slots=[0], pasts=[past], counts=[count], tables=[table],
    )  # fmt: skip


@pytest.fixture
def backend(qwen: Both) -> Iterator[OnnxPagedBackend]:
    backend = OnnxPagedBackend(qwen.paged, device="cpu", slots=1)
    yield backend
    backend.close()


def step(backend: OnnxPagedBackend, step: Step) -> np.ndarray:
    width = backend.bundle.model.hidden_size
    step = dataclasses.replace(step, image_embeds=np.zeros((1, width), np.float32))
    logits = backend.step(step).logits
    assert logits is not None
    return logits


def test_a_step_writes_the_blocks_of_its_table_in_the_pool_s_own_memory_and_no_others(
    backend: OnnxPagedBackend,
) -> None:
    pool = backend._caches()
    for cache in pool.values():
        cache.fill_(7)
    memory = {name: cache.data_ptr() for name, cache in pool.items()}
    step(backend, prompt(20, [5, 2]))
    assert {name: cache.data_ptr() for name, cache in backend._caches().items()} == memory
    for cache in pool.values():
        changed = (cache != 7).any(-1).any(-1)  # [blocks, 16]
        assert changed[5].all() and changed[2, :4].all()
        assert changed.sum() == 20


def test_a_prompt_in_two_steps_is_the_prompt_in_one(backend: OnnxPagedBackend) -> None:
    whole = step(backend, prompt(20, [5, 2]))
    first = prompt(18, [1, 4])
    step(backend, dataclasses.replace(first, logits_rows=np.array([], np.int64)))
    rest = dataclasses.replace(prompt(2, [1, 4], past=18), input_ids=np.array([19, 20]))
    np.testing.assert_allclose(step(backend, rest), whole, atol=1e-4)


def test_memory_that_was_given_back_is_taken_again(backend: OnnxPagedBackend) -> None:
    before = step(backend, prompt(5, [0]))
    backend.close()
    assert not backend._pool
    np.testing.assert_array_equal(step(backend, prompt(5, [0])), before)


def test_what_cannot_be_opened_is_said_in_one_line(qwen: Both, tmp_path: Path) -> None:
    graphs = {"decoder": qwen.paged.graphs["decoder"]}
    broken = dataclasses.replace(qwen.paged, path=tmp_path, graphs=graphs)
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be opened by ONNX Runtime: ") as caught:
        OnnxPagedBackend(broken, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused(qwen: Both) -> None:
    with pytest.raises(UserError, match="'cuda'.* sees no GPU here, use 'cpu'"):
        OnnxPagedBackend(qwen.paged, device="cuda")


def test_without_a_vision_graph_pictures_are_refused_and_words_are_not(qwen: Both) -> None:
    graphs = {"decoder": qwen.paged.graphs["decoder"]}
    bundle: Bundle = dataclasses.replace(qwen.paged, graphs=graphs)
    backend = OnnxPagedBackend(bundle, device="cpu", slots=1)
    assert np.isfinite(step(backend, prompt(3, [0]))).all()
    with pytest.raises(VisionGraphMissing):
        backend.encode(np.zeros((1, 56, 56, 3), np.uint8))


def test_a_cuda_provider_that_cannot_be_loaded_is_named_and_nothing_runs_on_the_cpu_instead(
    backend: OnnxPagedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists a provider whose libraries are missing, and falls back in silence."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    backend.cuda, backend.device = True, torch.device("cuda", 0)
    try:
        with pytest.raises(MissingDependency, match="cannot load its CUDA provider.*pip install"):
            backend.load()
    finally:
        backend.cuda, backend.device = False, torch.device("cpu")

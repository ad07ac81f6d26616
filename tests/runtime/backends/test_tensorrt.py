"""The TensorRT backends end to end against a stand-in that has the real bindings' names and runs the plan's
graph in onnx.reference: what they answer is what the ONNX bundle of the same checkpoint answers."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rtp_llm import trt
from rtp_llm.build import plugins
from rtp_llm.build.builder import build
from rtp_llm.errors import BundleError, InternalError, MissingDependency, UserError
from rtp_llm.export import bundle as bundles
from rtp_llm.export.bundle import Bundle
from rtp_llm.export.exporter import export
from rtp_llm.model_factory import Model, ModelConfig, ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.backends import tensorrt as module
from rtp_llm.runtime.backends.tensorrt import TensorRTBackend, check_engines, split
from rtp_llm.runtime.backends.tensorrt_linear import TensorRTLinearBackend
from rtp_llm.runtime.engine import Engine
from rtp_llm.runtime.step import Draw, Step

once = pytest.mark.parametrize("bindings", ["11.4.0.106"], indirect=True, scope="session")
KINDS = {"paged": TensorRTBackend, "linear": TensorRTLinearBackend}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in runs on the host's memory."""
    monkeypatch.setattr(TensorRTBackend, "devices", ("cuda", "cpu"))


@pytest.fixture
def small(tensorrt: Any, paged: Path, linear: Path) -> dict[str, Bundle]:
    """Built for less than a prompt in one step, so that steps are cut."""
    return {
        kv: build(path, max_batch_size=4, max_input_len=96, max_seq_len=400, max_images=2)
        for kv, path in (("paged", paged), ("linear", linear))
    }


def opened(bundle: Bundle) -> Pipeline:
    # not open_backend, which gives such a bundle on a CPU to a check without TensorRT
    backend = KINDS[bundle.model.attention](bundle, device="cpu")
    tokenizer = Tokenizer.from_file(str(bundle.read_path(bundle.tokenizer)))
    return Pipeline(Model(bundle, tokenizer, Engine(backend, bundle.model)))


@pytest.fixture(scope="module")
def reference(qwen_bundle: Path) -> Iterator[Pipeline]:
    """The same checkpoint on ONNX Runtime's CPU, float32."""
    model = ModelFactory.from_model_config(ModelConfig(ckpt_path=str(qwen_bundle)))
    pipeline = Pipeline(model)
    yield pipeline
    pipeline.stop()


GREEDY = {"top_k": 1, "max_new_tokens": 6, "ignore_eos": True, "return_output_ids": True}


def requests(images: Path) -> list[dict[str, Any]]:
    tag = "Picture 1:<img/>\n"
    return [
        {"prompt": tag + "What is in the picture?", "urls": [images / "red_circle.png"]},
        {"prompt": tag + "Which colour?", "urls": [images / "blue_star.png"]},
        {"prompt": "Hello, who are you? Tell me something about shapes and colours."},
        {"prompt": tag + "What is in the picture?", "urls": [images / "red_circle.png"]},  # shares a prefix
        {"prompt": "a"},
        {"prompt": tag + "Where is it?", "urls": [images / "red_circle.png"]},
    ]


@pytest.mark.parametrize("bindings", ["10.15.1.29", "11.4.0.106"], indirect=True, scope="session")
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_answers_are_those_of_the_onnx_bundle(
    small: dict[str, Bundle], reference: Pipeline, red_circle: Path, kv: str
) -> None:
    """Six requests in four slots, images among them, prompts cut by the limits, prefixes shared."""
    asked = [{**r, "generate_config": {**GREEDY, "return_logits": i % 2}} for i, r in
             enumerate(requests(red_circle.parent))]  # fmt: skip
    expected = [r for _, r in reference.batch(asked)]
    with opened(small[kv]) as pipeline:
        assert pipeline.model.engine.backend.slots == 4
        found = [r for _, r in pipeline.batch(asked)]
    for a, b in zip(expected, found, strict=True):
        one, other = a.generate_outputs[0], b.generate_outputs[0]
        assert one.output_ids == other.output_ids
        if one.logits is not None:
            np.testing.assert_allclose(other.logits, one.logits, atol=2e-4 * one.logits.std())


@pytest.mark.slow
@once
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_bf16_engines_pick_the_same_tokens(
    tensorrt: Any, reference: Pipeline, sample_qwen: Path, red_circle: Path, tmp_path: Path, kv: str
) -> None:
    """The default of engines; logits within the rounding of eight bits."""
    bundle = export(sample_qwen, tmp_path / "bf16", backend="tensorrt", precision="bf16", kv_cache=kv)
    bundle = build(bundle.path, max_batch_size=4, max_input_len=96, max_seq_len=400)
    config = {**GREEDY, "return_logits": True}
    asked = [{**r, "generate_config": config} for r in requests(red_circle.parent)[:3]]
    expected = [r for _, r in reference.batch(asked)]
    with opened(bundle) as pipeline:
        assert pipeline.model.engine.backend.dtype == torch.bfloat16
        found = [r for _, r in pipeline.batch(asked)]
    for a, b in zip(expected, found, strict=True):
        one, other = a.generate_outputs[0], b.generate_outputs[0]
        assert one.output_ids == other.output_ids
        np.testing.assert_allclose(other.logits, one.logits, atol=0.1 * one.logits.std())


@once
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_losses_of_a_prompt_longer_than_a_step_are_those_of_the_onnx_bundle(
    small: dict[str, Bundle], reference: Pipeline, red_circle: Path, kv: str
) -> None:
    config = {"calculate_loss": 1, "max_new_tokens": 1, "top_k": 1}
    ask = dict(requests(red_circle.parent)[0], generate_config=config)
    ((_, expected),) = reference.batch([ask])
    with opened(small[kv]) as pipeline:
        ((_, found),) = pipeline.batch([ask])
    np.testing.assert_allclose(
        found.generate_outputs[0].loss, expected.generate_outputs[0].loss, rtol=1e-3, atol=1e-4
    )


@once
def test_tensorrt_is_called_in_its_order_with_its_arguments(
    small: dict[str, Bundle], tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt.calls.clear()
    backend = TensorRTBackend(small["paged"], device="cpu")
    t = tensorrt.module
    assert "Runtime.deserialize_cuda_engine" in tensorrt.names()
    tensorrt.calls.clear()
    first = step_of([[5, 6, 7]], [0], [[0]])
    backend.step(first)
    names = tensorrt.names()
    managed = {"strategy": t.ExecutionContextAllocationStrategy.USER_MANAGED}
    assert names[0] == "ICudaEngine.create_execution_context" and tensorrt.calls[0].args == managed
    assert names[1:3] == [
        "IExecutionContext.set_optimization_profile_async", "IExecutionContext.set_device_memory"
    ]  # fmt: skip
    assert names[-2:] == ["IExecutionContext.infer_shapes", "IExecutionContext.execute_async_v3"]
    shapes = {a["name"]: a["shape"] for a in tensorrt.named("IExecutionContext.set_input_shape")}
    assert shapes["input_ids"] == (3,) and shapes["block_table"] == (1, 1)
    assert "attention_metadata" not in shapes  # the engine has no such input
    addresses = {a["name"]: a["memory"] for a in tensorrt.named("IExecutionContext.set_tensor_address")}
    for i in range(3):
        for kind in ("key", "value"):
            assert addresses[f"{kind}_cache_out.{i}"] == addresses[f"{kind}_cache.{i}"]
    tensorrt.calls.clear()
    backend.step(step_of([[8]], [3], [[0]]))
    again = {a["name"] for a in tensorrt.named("IExecutionContext.set_input_shape")}
    assert "input_ids" in again and "key_cache.0" not in again  # only what has changed is told
    assert "ICudaEngine.create_execution_context" not in tensorrt.names()
    profiles = tensorrt.named("IExecutionContext.set_optimization_profile_async")
    backend.step(step_of([list(range(20))], [4], [[0, 1]]))
    profiles = tensorrt.named("IExecutionContext.set_optimization_profile_async")
    assert [p["profile_index"] for p in profiles] == [1]  # decode was there; prefill has its own


def step_of(ids: list[list[int]], pasts: list[int], tables: list[list[int]], **more: Any) -> Step:
    """A step of text alone, the last token of each row through the head."""
    counts = [len(row) for row in ids]
    places = [np.arange(p, p + n) for p, n in zip(pasts, counts, strict=True)]
    step = Step(
        input_ids=np.concatenate([np.array(row, np.int64) for row in ids]),
        image_embeds=np.zeros((1, 128), np.float32),
        positions=np.concatenate(places),
        rope_rows=np.concatenate(places),
        logits_rows=np.cumsum(counts) - 1,
        slots=list(range(len(ids))),
        pasts=pasts,
        counts=counts,
        tables=tables,
    )
    return dataclasses.replace(step, **more)


@once
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_a_step_without_logits_only_writes_the_cache(
    small: dict[str, Bundle], kv: str, tensorrt: Any
) -> None:
    backend = KINDS[kv](small[kv], device="cpu")
    nothing = backend.step(step_of([[5, 6, 7]], [0], [[0]], logits_rows=np.array([], np.int64)))
    assert nothing.logits is not None and nothing.logits.shape == (0, 768)
    in_two = backend.step(step_of([[8, 9]], [3], [[0]])).logits
    other = KINDS[kv](small[kv], device="cpu")
    np.testing.assert_allclose(in_two, other.step(step_of([[5, 6, 7, 8, 9]], [0], [[0]])).logits, atol=1e-4)


@once
def test_an_idle_slot_is_not_touched(small: dict[str, Bundle], tensorrt: Any) -> None:
    """Slot 1 stands between two that decode, and holds a prefix for later."""
    backend = TensorRTLinearBackend(small["linear"], device="cpu")
    chunk = step_of([[5, 6, 7]], [0], [[0]])
    for slot in (0, 1, 2):
        backend.step(dataclasses.replace(chunk, slots=[slot]))
    before = {name: cache[1, :, :400].clone() for name, cache in backend._caches().items()}
    full = dataclasses.replace(step_of([[8], [8]], [3, 3], [[0], [0]]), slots=[0, 2])
    logits = backend.step(full).logits
    for name, cache in backend._caches().items():
        assert torch.equal(cache[1, :, :400], before[name])
    alone = backend.step(step_of([[8]], [3], [[0]])).logits
    np.testing.assert_allclose(logits, np.repeat(alone, 2, axis=0), atol=1e-4)


@once
def test_a_write_beyond_a_slot_is_refused_by_the_host(small: dict[str, Bundle], tensorrt: Any) -> None:
    backend = TensorRTLinearBackend(small["linear"], device="cpu")
    with pytest.raises(InternalError, match="a sequence of 417 tokens does not fit into slots of 416"):
        backend.step(step_of([[8]], [416], [[0]]))


class Replayed:
    """In place of a captured CUDA graph: runs again what it was made from, in the same context."""

    def __init__(self, backend: Any, arrays: dict[str, np.ndarray]):
        self.memory = torch.empty(sum(-(-a.nbytes // 256) * 256 for a in arrays.values()), dtype=torch.uint8)
        inputs = backend._send(arrays, self.memory)
        inputs["image_embeds"] = torch.zeros(1, backend.bundle.model.hidden_size)
        self.backend, self.inputs, self.key = backend, inputs | backend._caches(), backend._captured
        self.logits = torch.empty(len(arrays["logits_rows"]), backend.bundle.model.vocab_size)
        self.graph = self

    def replay(self) -> None:
        self.backend._captured, before = self.key, self.backend._captured
        self.logits.copy_(self.backend.forward(self.inputs))
        self.backend._captured = before


@once
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_each_cuda_graph_keeps_a_context_of_its_own_and_answers_the_same(
    small: dict[str, Bundle], tensorrt: Any, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    for place in ("paged", "tensorrt_linear"):
        monkeypatch.setattr(f"rtp_llm.runtime.backends.{place}._Captured", Replayed)
    plain, graphs = (KINDS[kv](small[kv], device="cpu") for _ in range(2))
    blocks = [[5 * r + i for i in range(5)] for r in range(4)]
    for backend in (plain, graphs):
        for r in range(4):
            chunk = step_of([list(range(r, 60 + r))], [0], [blocks[r]])
            backend.step(dataclasses.replace(chunk, slots=[r]))
    tensorrt.calls.clear()
    for turn, rows in enumerate(([0, 1, 2, 3], [0], [0, 1], [0, 1, 2], [0, 2], [0, 1, 2, 3], [0])):
        pasts = [60 + turn] * len(rows)  # some rows again write where they wrote: what was there is replaced
        step = step_of([[7 + r] for r in rows], pasts, [blocks[r] for r in rows])
        step = dataclasses.replace(step, slots=rows)
        expected = plain.step(step).logits
        found = graphs._replay(step).numpy()
        found = found[rows] if kv == "linear" else found[: len(rows)]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    keys = [key for key in graphs._decoder.contexts if key[1]]
    # batches of 1, 2 and 4; over slots those that hold them, each with 64 keys and then with 128
    assert len(keys) == len(graphs._graphs) == (3 if kv == "paged" else 5)
    contexts = [graphs._decoder.contexts[key] for key in keys]
    assert len({id(c.context) for c in contexts}) == len(keys)
    for key, context in zip(keys, contexts, strict=True):
        captured = graphs._graphs[key[1]]
        for name in ("input_ids", "logits_rows"):
            assert context.shapes[name] == tuple(captured.inputs[name].shape)
            assert context.addresses[name] == captured.inputs[name].data_ptr()


@once
def test_pictures_are_encoded_in_parts_of_the_engines_limit(
    small: dict[str, Bundle], tensorrt: Any, reference: Pipeline
) -> None:
    backend = TensorRTBackend(small["paged"], device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    found = backend.encode(pixels)
    np.testing.assert_allclose(found, reference.model.engine.backend.encode(pixels), atol=1e-3)
    shapes = [
        a["shape"] for a in tensorrt.named("IExecutionContext.set_input_shape") if a["name"] == "pixels"
    ]
    assert shapes == [(2, 96, 96, 3), (1, 96, 96, 3)]


@once
@pytest.mark.parametrize("kv", ["paged", "linear"])
def test_the_encoders_engine_is_opened_alone(
    small: dict[str, Bundle], tensorrt: Any, reference: Pipeline, kv: str
) -> None:
    bundle = small[kv]
    bundle.read_path(bundle.engines["decoder"].path).write_bytes(b"rubbish")
    backend = KINDS[kv](bundle, device="cpu", graphs=("vision",))
    pixels = np.zeros((1, 96, 96, 3), np.uint8)
    want = reference.model.engine.backend.encode(pixels)
    np.testing.assert_allclose(backend.encode(pixels), want, atol=1e-3)


@once
def test_streamed_weights_stay_within_their_budget(paged: Path, tensorrt: Any) -> None:
    bundle = build(paged, max_seq_len=400, weight_streaming=True)
    TensorRTBackend(bundle, device="cpu", weight_budget=1234)
    assert tensorrt.named("ICudaEngine.weight_streaming_budget_v2=") == [{"value": 1234}] * 2


@once
def test_a_budget_for_engines_that_stream_nothing_is_refused_with_the_command(
    small: dict[str, Bundle], tensorrt: Any
) -> None:
    with pytest.raises(UserError, match="weight_budget=9: .*rtp-llm build .*--max-seq-len 400 --weight-str"):
        TensorRTBackend(small["paged"], device="cpu", weight_budget=9)


@once
def test_what_is_closed_gives_its_engines_back_at_once(small: dict[str, Bundle], tensorrt: Any) -> None:
    backend = TensorRTBackend(small["paged"], device="cpu")
    backend.step(step_of([[5, 6, 7]], [0], [[0]]))
    backend.encode(np.zeros((1, 96, 96, 3), np.uint8))
    held = weakref.ref(backend._decoder), weakref.ref(backend._decoder.scratch)
    held += (weakref.ref(inspect.getclosurevars(backend._vision).nonlocals["encoder"]),)
    gc.disable()  # memory of a GPU does not wait until Python looks for cycles
    try:
        backend.close()
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


@once
def test_plans_that_have_changed_are_not_opened_again_after_a_close(
    small: dict[str, Bundle], tensorrt: Any
) -> None:
    backend = TensorRTBackend(small["paged"], device="cpu")
    backend.close()
    plan = small["paged"].read_path("decoder.plan")
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(BundleError, match="decoder.plan has changed since it was built"):
        backend.step(step_of([[5]], [0], [[0]]))


def test_an_archive_of_torch_tensorrt_that_cannot_be_opened_is_a_bundle_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    (tmp_path / "vision.pt").write_bytes(b"rubbish")
    with pytest.raises(BundleError, match="vision.pt cannot be opened by torch"):
        module._torchscript(tmp_path / "vision.pt", torch.device("cpu"))


@once
def test_an_error_of_tensorrt_is_told_once(small: dict[str, Bundle], tensorrt: Any) -> None:
    backend = TensorRTBackend(small["paged"], device="cpu")
    engine = backend._decoder
    engine.log.log(tensorrt.module.ILogger.Severity.ERROR, "first")
    assert str(engine.failed("could not run")).endswith("could not run: first")
    assert str(engine.failed("could not run")).endswith("it does not say why")


@once
def test_the_gpu_that_is_checked_is_the_one_that_runs(
    small: dict[str, Bundle], tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = trt.gpu()
    monkeypatch.setattr(trt, "gpu", lambda i=None: here if i != 1 else dataclasses.replace(here, name="B"))
    check_engines(small["paged"], "cuda")
    check_engines(small["paged"], "cuda:0")
    with pytest.raises(BundleError, match="was built for GPU NVIDIA Test 9, here is B"):
        check_engines(small["paged"], "cuda:1")


@once
def test_the_cache_is_no_larger_than_the_engine_can_index_and_slots_fit_its_batch(
    small: dict[str, Bundle], tensorrt: Any
) -> None:
    backend = TensorRTBackend(small["paged"], device="cpu", slots=100)
    assert backend.slots == 4 and backend.slot_tokens == 400
    assert backend.budget_blocks == 4 * 25
    each = 2 * 3 * 4 * 416 * 32 * 4  # k and v, layers, heads, tokens, size, bytes
    few = TensorRTLinearBackend(small["linear"], device="cpu", kv_cache_bytes=2 * each + 1)
    assert few.slots == 2 and few.budget_blocks == 2 * 25
    with pytest.raises(UserError, match=f"one sequence take {each} bytes, {each - 1} are free"):
        TensorRTLinearBackend(small["linear"], device="cpu", kv_cache_bytes=each - 1)


@once
def test_a_longer_sequence_than_the_engines_is_refused_with_the_command(
    small: dict[str, Bundle], tensorrt: Any
) -> None:
    with pytest.raises(
        UserError, match="the engine was built for 400; for more: rtp-llm build .*--max-seq-len 500"
    ):
        TensorRTBackend(small["paged"], device="cpu", max_seq_len=500)


# ------------------------------------------------------------------------------------------- refusals


@once
def test_a_bundle_without_engines_names_the_command(linear: Path, tensorrt: Any) -> None:
    with pytest.raises(BundleError, match=f"no vision engine yet; .*: rtp-llm build {linear};"):
        TensorRTBackend(bundles.read(linear), device="cpu")


@once
@pytest.mark.parametrize(
    "change, message",
    [
        ({"gpu": "NVIDIA Other"}, "was built for GPU NVIDIA Other, here is NVIDIA Test 9"),
        ({"compute_capability": "8.0"}, "was built for compute capability 8.0, here is 9.0"),
        ({"tensorrt": "10.15.0.0"}, "was built for TensorRT 10.15.0.0, here is 11.4.0.106"),
        ({"plugin": "0"}, "was built for plugin version 0, here is 1"),
    ],
)
def test_engines_made_elsewhere_are_refused_before_they_are_opened(
    small: dict[str, Bundle], tensorrt: Any, change: dict[str, str], message: str
) -> None:
    bundle = small["paged"]
    engines = {**bundle.engines, "decoder": dataclasses.replace(bundle.engines["decoder"], **change)}
    tensorrt.calls.clear()
    with pytest.raises(BundleError) as caught:
        TensorRTBackend(dataclasses.replace(bundle, engines=engines), device="cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    flags = "--max-images 2 --max-batch-size 4 --max-input-len 96 --max-seq-len 400"
    assert str(caught.value).endswith(f": rtp-llm build {bundle.path} {flags}")
    assert tensorrt.calls == []


@once
def test_a_damaged_plan_is_a_bundle_error_with_tensorrts_words(
    small: dict[str, Bundle], tensorrt: Any
) -> None:
    bundle = small["paged"]
    bundle.read_path("decoder.plan").write_bytes(b"rubbish")
    with pytest.raises(BundleError, match="cannot open .*decoder.plan: magic tag does not match"):
        TensorRTBackend(bundle, device="cpu", trusted=True)


@once
def test_a_plan_that_was_not_built_here_is_not_opened(small: dict[str, Bundle], tensorrt: Any) -> None:
    bundle = small["paged"]
    TensorRTBackend(bundle, device="cpu")
    plan = bundle.read_path("decoder.plan")
    plan.write_bytes(plan.read_bytes() + b" ")
    tensorrt.calls.clear()
    with pytest.raises(BundleError, match="--trust-engines"):
        TensorRTBackend(bundle, device="cpu")
    assert tensorrt.calls == []
    TensorRTBackend(bundle, device="cpu", trusted=True)


def test_without_tensorrt_one_line_says_what_to_install(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = bundles.EngineSpec("x.plan", "a", "9.0", "10.15.1.29", "", {})
    bundle = dataclasses.replace(bundles.read(linear), engines={"vision": spec, "decoder": spec})
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="TensorRT is not installed: pip install"):
        check_engines(bundle)


def test_a_cpu_is_refused(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTBackend, "devices", ("cuda",))
    with pytest.raises(UserError, match="device='cpu': a bundle for tensorrt runs on cuda"):
        TensorRTBackend(bundles.read(linear), device="cpu")


# ------------------------------------------------------------------------------------------- cutting steps


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_a_cut_step_is_the_same_tokens_in_order_within_the_limits(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any))
    total, vocab = sum(counts), 50
    ids = np.array(data.draw(st.lists(st.integers(0, vocab - 1), min_size=total, max_size=total)), np.int64)
    pictured = sorted(data.draw(st.sets(st.integers(0, total - 1))))
    ids[pictured] = vocab + np.arange(len(pictured))
    wanted = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1)))), np.int64)
    pasts = data.draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts)))
    embeds = np.arange(max(1, len(pictured)), dtype=np.float32)[:, None]
    places = np.concatenate([np.arange(p, p + n) for p, n in zip(pasts, counts, strict=True)])
    step = Step(ids, embeds, places, places + 100, wanted, list(range(len(counts))), pasts, counts,
                [[r] for r in range(len(counts))], [Draw(u=float(i)) for i in wanted])  # fmt: skip
    tokens, heads, rows = (data.draw(st.integers(1, 8)) for _ in range(3))
    parts = split(step, tokens, heads, vocab, rows)

    def flat(s: Step) -> list[tuple]:
        """What each token is, row by row."""
        found, at = [], 0
        for slot, past, count, table in zip(s.slots, s.pasts, s.counts, s.tables, strict=True):
            for i in range(count):
                token = int(s.input_ids[at])
                value = ("image", float(s.image_embeds[token - vocab, 0])) if token >= vocab else token
                draw = None
                if at in s.logits_rows.tolist():
                    draw = s.draws[s.logits_rows.tolist().index(at)].u
                assert s.positions[at] == past + i and s.rope_rows[at] == past + i + 100
                found.append((slot, past + i, value, draw, tuple(table)))
                at += 1
        assert at == len(s.input_ids)
        return found

    assert sum((flat(part) for part in parts), []) == flat(step)
    for part in parts:
        assert 0 < len(part.input_ids) <= tokens and len(part.logits_rows) <= heads
        assert len(part.counts) <= rows and len(part.image_embeds) >= 1
        assert len(part.image_embeds) == max(1, int((part.input_ids >= vocab).sum()))


def test_the_plugin_version_is_the_builders() -> None:
    assert module.PLUGIN == plugins.VERSION
    assert trt.OLDEST == (10, 15)

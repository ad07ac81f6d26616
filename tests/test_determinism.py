"""An answer is the same to the bit whoever else is in the batch, whatever the cache held, whatever was
drafted, and however often it lost its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtp_llm.export.exporter import export
from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.pipeline import GenerateOutput, GenerateResponse, Pipeline

Open = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def bundles(
    sample_qwen: Path, sample_llava: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    samples = {"fp32": sample_qwen, "int8": sample_llava, "int4": sample_llava}
    return {p: export(sample, folder / p, precision=p).path for p, sample in samples.items()}


@pytest.fixture
def open_(bundles: dict[str, Path]) -> Iterator[Open]:
    opened: list[Pipeline] = []

    def make(precision: str, **config: Any) -> Pipeline:
        deterministic = precision == "int4"  # which has a kernel of its own for a lone row
        model = ModelFactory.from_model_config(
            ModelConfig(ckpt_path=str(bundles[precision]), deterministic=deterministic, **config)
        )
        opened.append(Pipeline(model))
        return opened[-1]

    yield make
    for pipeline in opened:
        pipeline.stop()


def requests(images: Path) -> list[dict[str, Any]]:
    """Text and pictures, greedy and seeded, of several lengths; some begin alike."""
    pictures = [images / n for n in ("red_circle.png", "blue_star.png", "green_triangle.png")]
    made: list[dict[str, Any]] = []
    for i, words in enumerate([1, 2, 40, 3, 11, 25, 60, 7]):
        parts: list[Any] = [{"type": "image", "image": p} for p in pictures[: i % 3]]
        parts.append({"type": "text", "text": " ".join(["What is this?"] * words)})
        config = {"max_new_tokens": 12, "ignore_eos": True, "return_logits": True}
        config |= {"top_k": 1} if i % 2 else {"random_seed": i, "temperature": 2.0}
        made.append({"messages": [{"role": "user", "content": parts}], "generate_config": config})
    return made


def outputs(pipeline: Pipeline, asked: list[dict[str, Any]], **config: Any) -> list[GenerateOutput]:
    """Of each request, all sharing the batch."""
    asked = [r | {"generate_config": r["generate_config"] | config} for r in asked]
    answers = [answer for _, answer in pipeline.batch(asked)]
    return [a.generate_outputs[0] for a in answers if isinstance(a, GenerateResponse)]


def logits(*args: Any, **config: Any) -> list[np.ndarray | None]:
    """float32 [steps, vocab] of each request."""
    return [o.logits for o in outputs(*args, **config)]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_no_answer_depends_on_the_batch_or_on_the_cache(
    precision: str, open_: Open, red_circle: Path
) -> None:
    pipeline, asked = open_(precision), requests(red_circle.parent)
    alone = [logits(pipeline, [r], reuse_cache=False)[0] for r in asked]
    assert pipeline.model.engine.stats().reused_tokens == 0
    together = logits(pipeline, asked * 2)
    stats = pipeline.model.engine.stats()
    assert stats.reused_tokens > 0, "the second half begins like the first"
    for one, other in zip([*alone, *alone], together, strict=True):
        assert np.array_equal(one, other)
    small_bites = open_(precision, token_budget=48, max_batch_size=3)
    for one, other in zip(alone, logits(small_bites, asked), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_answer_shows_that_it_lost_its_place(precision: str, open_: Open, red_circle: Path) -> None:
    roomy = open_(precision)
    config = requests(red_circle.parent)[0]["generate_config"] | {"max_new_tokens": 120}
    asked = [{"prompt": "What is this? " * n, "generate_config": config} for n in (1, 4, 2, 3, 5)]
    alone = [outputs(roomy, [r], reuse_cache=False)[0] for r in asked]
    longest = max(a.aux_info.input_len for a in alone) + 120
    tight = open_(precision, kv_cache_bytes=roomy.model.engine.backend.block_bytes * (longest // 16 + 6))
    together = logits(tight, asked)
    assert tight.model.engine.stats().preemptions > 0
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.logits, other)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_no_answer_depends_on_what_was_drafted(precision: str, open_: Open, red_circle: Path) -> None:
    pipeline, asked = open_(precision, speculation=True), requests(red_circle.parent)
    for length in (1, 5, 23, 64, 150):  # of texts that repeat themselves, and so do the answers to them
        config = {"top_k": 1, "max_new_tokens": 80, "ignore_eos": True, "return_logits": True}
        asked.append({"prompt": "red circle, blue star; " * length, "generate_config": config})
    plain = [outputs(pipeline, [r], reuse_cache=False)[0] for r in asked]
    ways = {"reuse_cache": False, "speculative": "prompt_lookup"}
    drafted = [outputs(pipeline, [r], **ways)[0] for r in asked]
    together = outputs(pipeline, asked, speculative="prompt_lookup")
    for one, *others in zip(plain, drafted, together, strict=True):
        for other in others:
            assert np.array_equal(one.logits, other.logits)
            assert other.aux_info.output_len == one.aux_info.output_len
        assert others[0].aux_info.iter_count == one.aux_info.iter_count - others[0].aux_info.accepted_len
    long = [o.aux_info for o in drafted[-5:]]
    assert sum(a.accepted_len for a in long) > sum(a.output_len for a in long) / 20
    assert pipeline.model.engine.stats().accepted_tokens >= sum(a.accepted_len for a in long)


def test_several_answers_equal_those_computed_one_by_one(open_: Open, red_circle: Path) -> None:
    pipeline = open_("fp32")
    config = {"max_new_tokens": 8, "random_seed": 3, "temperature": 3.0, "return_output_ids": True}

    def ids(**more: Any) -> list[list[int]]:
        *_, last = pipeline("<img/> What?", urls=[red_circle], generate_config=config | more)
        return [o.output_ids for o in last.generate_outputs]

    several = ids(num_return_sequences=4)
    assert ids(num_return_sequences=4, reuse_cache=False) == several
    assert ids() == several[:1] and len({tuple(x) for x in several}) > 1


@pytest.mark.slow
def test_a_cached_prompt_keeps_to_its_rope_table(tmp_path: Path) -> None:
    """Dynamic NTK with seq_length 512: prompts of 500 and 520 tokens that share 480 are rotated apart."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    try:
        from make_random_checkpoint import qwen_vl
    finally:
        sys.path.pop(0)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    qwen_vl(checkpoint, "tiny", 0, quiet=True)
    pipeline = Pipeline(
        ModelFactory.from_huggingface(export(checkpoint, tmp_path / "b", precision="fp32").path)
    )
    rope = pipeline.model.bundle.model.rope
    assert rope.table(500) != rope.table(520)
    random = np.random.default_rng(0)
    shared = random.integers(0, 256, 480).tolist()
    prompts = [shared + random.integers(0, 256, n).tolist() for n in (20, 40, 20, 40)]
    found = {}
    for reuse in (False, True):
        for i, prompt in enumerate(prompts):
            config = {"top_k": 1, "max_new_tokens": 8, "ignore_eos": True, "return_logits": True}
            *_, last = pipeline(prompt, generate_config=config, reuse_cache=reuse)
            output = last.generate_outputs[0]
            found[reuse, i] = output.logits
            assert output.aux_info.reuse_len == (480 if reuse and i >= 2 else 0)
    for i in range(4):
        assert np.array_equal(found[False, i], found[True, i])
    pipeline.stop()

"""The same mixed requests to two backends of one checkpoint, and their answers compared."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from rtp_llm.export.bundle import Bundle
from rtp_llm.model_factory import Model
from rtp_llm.pipeline import GenerateResponse, Pipeline
from rtp_llm.runtime.engine import Engine

GREEDY = {"top_k": 1, "max_new_tokens": 8, "ignore_eos": True, "return_output_ids": True}
SAMPLED = {**GREEDY, "top_k": 0, "temperature": 1.5}


def opened(bundle: Bundle, backend: Any, token_budget: int = 512) -> Pipeline:
    tokenizer = Tokenizer.from_file(str(bundle.read_path(bundle.tokenizer)))
    return Pipeline(Model(bundle, tokenizer, Engine(backend, bundle.model, token_budget)))


def requests(bundle: Bundle, images: Path) -> list[dict[str, Any]]:
    """One picture, two, none; some alike at the beginning; greedy, sampled, two answers, a loss."""

    def ask(text: str, *pictures: str, config: dict[str, Any] = GREEDY) -> dict[str, Any]:
        tags = [f"Picture {i + 1}:<img/>\n" for i in range(len(pictures))]
        if bundle.model.family == "llava":
            tags = ["<image>\n" for _ in pictures]
        urls = [images / f"{picture}.png" for picture in pictures]
        return {"prompt": "".join(tags) + text, "urls": urls, "generate_config": config}

    return [
        ask("What is in the picture?", "red_circle", config={**GREEDY, "return_logits": True}),
        ask("Which colours?", "red_circle", "blue_star", config={**GREEDY, "return_logits": True}),
        ask("Hello, who are you? Tell me something about shapes.", config={**GREEDY, "return_logits": True}),
        ask("What is in the picture?", "red_circle"),
        ask("a", config={**SAMPLED, "seed": 1}),
        ask("Where is it?", "yellow_square", config={**SAMPLED, "seed": 7, "n": 2}),
        ask("Where is it?", "red_circle", config={**SAMPLED, "seed": 3, "top_p": 0.9}),
        ask("How many shapes?", "red_circle_blue_star", config={**GREEDY, "calculate_loss": 1}),
        ask("What is it?", "blue_star", config={**SAMPLED, "seed": 5, "repetition_penalty": 1.3}),
    ]


def ids(response: Any) -> list[Any]:
    assert isinstance(response, GenerateResponse), response
    return [output.output_ids for output in response.generate_outputs]


def assert_equal_answers(found: Items[Any], expected: Items[Any], tolerance: float = 5e-5) -> None:
    """Texts and tokens; logits and losses to `tolerance` of the logits' standard deviation."""
    for a, b in zip(found, expected, strict=True):
        assert ids(a) == ids(b)
        assert a.generate_texts == b.generate_texts
        for one, other in zip(a.generate_outputs, b.generate_outputs, strict=True):
            assert (one.logits is None) == (other.logits is None)
            if other.logits is not None:
                assert np.abs(one.logits - other.logits).max() < tolerance * other.logits.std()
            if other.loss is not None:
                np.testing.assert_allclose(one.loss, other.loss, rtol=1e-4)

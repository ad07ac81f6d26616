"""How often a bundle of a sample checkpoint answers right, through the Pipeline: the yardstick of precisions.

    python scripts/eval_sample.py BUNDLE [BUNDLE …] --scenes 300

The scenes are held-out ones (scripts/shapes.py), asked as raw prompts and as chats, all in one batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shapes

from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline

CONFIG = {"top_k": 1, "max_new_tokens": 48}


def requests(family: str, scenes: int) -> Iterator[tuple[str, shapes.Question, dict[str, Any]]]:
    """(form, question, request) of every question."""
    drawn = [shapes.draw(f"held-out/{i}") for i in range(scenes)]
    grounds = family == "qwen_vl"
    asked = [([scene.image], q) for scene in drawn for q in shapes.questions(scene, locate=grounds)]
    half = scenes // 2
    for one, two in zip(drawn[:half], drawn[half:], strict=False):
        asked += [([one.image, two.image], q) for q in shapes.which(one, two)]
    for images, q in asked:
        if family == "qwen_vl":
            tags = "".join(f"Picture {n + 1}:<img/>\n" for n in range(len(images)))
        else:
            tags = "<image>\n" * len(images)
        yield "raw", q, {"prompt": tags + q.text, "images": images, "generate_config": CONFIG}
        parts = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": q.text}]
        yield "chat", q, {"messages": [{"role": "user", "content": content}], "generate_config": CONFIG}


def right(q: shapes.Question, answer: str) -> bool:
    return shapes.overlap(answer, q.box) >= 0.5 if q.box else answer.strip() == q.answer


def evaluate(bundle: str, scenes: int) -> tuple[dict[tuple[str, str], list[bool]], float]:
    """(kind, form) → right or wrong, and the seconds that it took."""
    model = ModelFactory.from_huggingface(bundle)
    asked = list(requests(model.bundle.model.family, scenes))
    scores: dict[tuple[str, str], list[bool]] = defaultdict(list)
    start = time.monotonic()
    with Pipeline(model) as pipeline:
        for i, response in pipeline.batch(request for _, _, request in asked):
            if isinstance(response, Exception):
                raise response
            form, q, _ = asked[i]
            scores[q.kind, form].append(right(q, response.batch_response[0]))
    return scores, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--scenes", type=int, default=300)
    args = parser.parse_args()
    for bundle in args.bundles:
        scores, seconds = evaluate(bundle, args.scenes)
        count = sum(map(len, scores.values()))
        print(f"\n{bundle}: {count} questions in {seconds:.0f} s\n\n| question | raw | chat | of |")
        print("| --- | ---: | ---: | ---: |")
        for kind in dict.fromkeys(kind for kind, _ in scores):
            raw, chat = (scores[kind, form] for form in ("raw", "chat"))
            shares = " | ".join(f"{100 * sum(s) / len(s):.1f} %" for s in (raw, chat))
            print(f"| {kind} | {shares} | {len(raw)} |")


if __name__ == "__main__":
    main()

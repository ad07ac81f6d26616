"""How often a bundle of a sample checkpoint answers right, through the Pipeline: the yardstick of precisions.

    python scripts/eval_sample.py FP32 [BUNDLE …] --scenes 300
    python scripts/eval_sample.py FP32 --calibration-data FOLDER --scenes 100

The scenes are held-out ones (scripts/shapes.py), asked as raw prompts and as chats, all in one batch. Every
further bundle is compared with the first, question by question: how many answers are other ones (flips; of a
box, whether it is right), how many of them were right only before (lost) or only after (won), and how likely
so uneven a split of these would be if neither bundle were better (McNemar's exact test, two-sided).

--calibration-data writes FOLDER/prompts.jsonl and its pictures instead, for `rtp-llm export --calibration`:
the same questions about other scenes, each with its answer; a chat goes on with another question.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shapes

from rtp_llm.export import bundle as bundles
from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline

CONFIG = {"top_k": 1, "max_new_tokens": 48}


def requests(
    family: str, scenes: int, tag: str = "held-out"
) -> Iterator[tuple[str, shapes.Question, dict[str, Any]]]:
    """(form, question, request) of every question about the scenes whose names begin with the tag."""
    drawn = [shapes.draw(f"{tag}/{i}") for i in range(scenes)]
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


def write_calibration(folder: Path, family: str, scenes: int) -> None:
    """Answered questions as `rtp-llm export --calibration` reads them: prompts.jsonl, and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = list(requests(family, scenes, "calibration"))  # kept, or a picture's id would be another's later
    names: dict[int, str] = {}
    blank = "" if family == "qwen_vl" else " "  # as the samples were trained
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for form, q, request in asked:
            if form == "raw":
                pictures = request["images"]
                line: dict[str, Any] = {"prompt": request["prompt"] + blank + q.answer}
            else:
                *parts, text = request["messages"][0]["content"]
                pictures = [part["image"] for part in parts]
                content = [*({"type": "image"} for _ in parts), text]
                line = {"messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": q.answer},
                    {"role": "user", "content": "What is this?"},
                ]}  # fmt: skip
            for picture in pictures:
                if id(picture) not in names:
                    names[id(picture)] = f"{len(names)}.png"
                    picture.save(folder / names[id(picture)])
            line["urls"] = [names[id(picture)] for picture in pictures]
            file.write(json.dumps(line) + "\n")


def right(q: shapes.Question, answer: str) -> bool:
    return shapes.overlap(answer, q.box) >= 0.5 if q.box else answer.strip() == q.answer


Scores = list[tuple[str, shapes.Question, str, bool]]


def evaluate(bundle: str, scenes: int) -> tuple[Scores, float]:
    """(form, question, answer, right or wrong) of every question, and the seconds that it took."""
    model = ModelFactory.from_huggingface(bundle)
    asked = list(requests(model.bundle.model.family, scenes))
    scores: Scores = []
    start = time.monotonic()
    with Pipeline(model) as pipeline:
        for i, response in pipeline.batch(request for _, _, request in asked):
            if isinstance(response, Exception):
                raise response
            form, q, _ = asked[i]
            answer = response.batch_response[0]
            scores.append((form, q, answer, right(q, answer)))
    return scores, time.monotonic() - start


def by_chance(lost: int, won: int) -> float:
    """McNemar's exact test: the probability of a split at least as uneven, each side being equally likely."""
    n = lost + won
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--calibration-data", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.calibration_data:
        family = bundles.read(args.bundles[0]).model.family
        return write_calibration(args.calibration_data, family, args.scenes)
    first: Scores = []
    for bundle in args.bundles:
        scores, seconds = evaluate(bundle, args.scenes)
        found: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for form, q, _, good in scores:
            found[q.kind, form].append(good)
        print(f"\n{bundle}: {len(scores)} questions in {seconds:.0f} s\n\n| question | raw | chat | of |")
        print("| --- | ---: | ---: | ---: |")
        for kind in dict.fromkeys(kind for kind, _ in found):
            raw, chat = (found[kind, form] for form in ("raw", "chat"))
            shares = " | ".join(f"{100 * sum(s) / len(s):.1f} %" for s in (raw, chat))
            print(f"| {kind} | {shares} | {len(raw)} |")
        if not first:
            first = scores
            continue
        lost = won = flips = 0
        for (_, q, before, was), (_, _, now, good) in zip(first, scores, strict=True):
            lost, won = lost + (was > good), won + (good > was)
            flips += (was != good) if q.box else (before != now)
        share, chance = 100 * flips / len(scores), by_chance(lost, won)
        print(f"\nagainst {args.bundles[0]}: {share:.2f} % flips, {lost} lost, {won} won, p = {chance:.2g}")


if __name__ == "__main__":
    main()

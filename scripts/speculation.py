"""What prompt-lookup speculation gains and costs: ratios of interleaved pairs in one run.

    python scripts/make_random_checkpoint.py --model llava --size 1b --output llava_1b
    rtp-llm export --checkpoint llava_1b --output llava_1b_int4 --precision int4
    python scripts/speculation.py llava_1b_int4 --output benchmarks/speculation.md

    quote   the answer is a long number of the prompt, digit by digit (a regular expression says so): ≥ 1.5
    greedy  the model's own greedy text
    digits  sampled ones: each was there before, and what followed then is mostly wrong now: ≥ 0.95
    noise   tokens sampled from all of the vocabulary, which hardly ever repeat: ≥ 0.95

Each ratio is the time from the first token to the last without speculation over that with it.
Exit code 1: a median misses its mark.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import serving

from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.pipeline import Pipeline

MARKS = {"quote": 1.5, "digits": 0.95, "noise": 0.95}


def config_of(kind: str, text: str, seed: int, new: int) -> dict[str, Any]:
    if kind == "quote":
        return {"top_k": 1, "regex": text}
    if kind == "greedy":
        return {"top_k": 1, "ignore_eos": True, "max_new_tokens": new}
    if kind == "digits":
        return {"random_seed": seed, "temperature": 1000.0, "regex": f"[0-9]{{{new}}}"}
    return {"random_seed": seed, "ignore_eos": True, "max_new_tokens": new}


def measure(pipeline: Pipeline, kinds: list[str], pairs: int, new: int) -> dict[str, list[dict[str, float]]]:
    """Of each pair: the ratio, tokens drafted and accepted and come, whether both texts are one."""
    rng = random.Random("speculation")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for pair in range(pairs + 1):
        for kind in kinds:
            text = "".join(rng.choice("0123456789") for _ in range(new))
            config = config_of(kind, text, pair, new) | {"reuse_cache": False}
            ways: list[dict[str, Any]] = [{}, {"speculative": "prompt_lookup"}]
            done = {}
            for way in rng.sample(ways, 2):  # which of the two goes first must not matter
                *_, last = pipeline(f"Repeat: {text}\n", generate_config=config | way)
                done[bool(way)] = last.generate_texts[0], last.generate_outputs[0].aux_info
            (plain, a), (drafted, b) = done[False], done[True]
            seconds = [aux.cost_time - aux.first_token_cost_time for aux in (a, b)]
            if pair:  # the first warms up
                found[kind].append({
                    "ratio": seconds[0] / seconds[1], "drafted": b.drafted_len, "accepted": b.accepted_len,
                    "came": b.output_len, "equal": plain == drafted,
                })  # fmt: skip
    return found


def shown(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| text | ratio | least | most | drafted of 100 tokens | accepted | equal texts | promised |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, rows in found.items():
        ratios = [row["ratio"] for row in rows]
        total = {name: sum(row[name] for row in rows) for name in ("drafted", "accepted", "came", "equal")}
        lines.append(
            f"| {kind} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} "
            f"| {100 * total['drafted'] / total['came']:.0f} | {100 * total['accepted'] / total['came']:.0f} "
            f"| {total['equal']} of {len(rows)} | {f'≥ {MARKS[kind]}' if kind in MARKS else '–'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="BUNDLE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=["quote", "greedy", "digits", "noise"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a report")
    args = parser.parse_args()
    config = ModelConfig(kv_cache_bytes=2**28, speculation=True)
    model = ModelFactory.from_huggingface(args.path, None, config)
    with Pipeline(model) as pipeline:
        found = measure(pipeline, args.only, args.pairs, args.new_tokens)
    print(shown(found))
    if args.output:
        assert __doc__ is not None
        what = __doc__.split("\n\n")
        text = f"{what[2]}\n\n{what[3].splitlines()[0]}\n\n{shown(found)}"
        about = "Medians of interleaved pairs (scripts/speculation.py)."
        args.output.write_text(serving.report("Ratios of speculation", about, text))
    medians = {kind: statistics.median(row["ratio"] for row in rows) for kind, rows in found.items()}
    missed = [kind for kind, mark in MARKS.items() if kind in medians and medians[kind] < mark]
    for kind in missed:
        print(f"missed: {kind}: {medians[kind]:.3f} is less than {MARKS[kind]}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

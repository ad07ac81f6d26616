"""Many clients at once against a real server: every answer is the one given alone, and nothing is lost.

    python scripts/load_test.py BUNDLE --clients 32 --seconds 60 --output benchmarks/load.md

BUNDLE: a bundle, or a checkpoint. Flags that are not of this program go to the server. The clients send
texts and pictures, conversations, greedy and seeded requests, streams and whole answers, both endpoints;
a part of the streams is aborted. Then a second server, to which nobody else talks and which reuses no prompt,
answers each request that was answered. Exit code 1: a promise was broken, and the table says which.

With --triton a Triton server with the same bundle gets the same requests, in turns with the HTTP server, and
must reach 0.9 of its tokens a second.

An int4 answer may differ where the lone run's two best logits are closer than 0.1 of the logits' deviation
(`flips`); the first step at which the texts part is looked up in the same model run in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import serving
import shapes
from serving import CHAT, Answer, Server, Triton, ask, image_part, quantile, user

IMAGES = Path(__file__).parent.parent / "tests" / "images"
TAGS = {"qwen_vl": "Picture 1:<img/>\n", "llava": "<image>\n"}
SHARE = 0.9  # of the HTTP server's throughput that Triton must reach
TURNS = 4  # of each server, in a run with both
MARGIN = 0.1  # of the logits' standard deviation


@dataclass
class Case:
    path: str
    body: dict[str, Any]
    abort_after: int | None = None  # pieces of text
    abort_seconds: float | None = None
    answer: Answer | None = None
    alone: Answer | None = None

    @property
    def greedy(self) -> bool:
        return self.body.get("temperature") == 0


class Workload:
    """Requests by number: the same seed, the same requests."""

    def __init__(self, seed: str, family: str, drawings: int, new_tokens: int):
        self.seed, self.family, self.new_tokens = seed, family, new_tokens
        self.known = [serving.data_uri(file.read_bytes()) for file in sorted(IMAGES.glob("*.png"))]
        self.drawn = [serving.drawing(f"{seed}/{i}") for i in range(drawings)]

    def case(self, number: int) -> Case:
        rng = random.Random(f"{self.seed}/{number}")
        sampling: dict[str, Any] = {"temperature": 0}
        if rng.random() < 0.5:
            sampling = {"temperature": rng.choice((0.5, 1.0, 1.5)), "top_p": 0.95, "seed": number}
        # the samples' own answers are short: half of the requests go on
        sampling["max_tokens"] = rng.randint(2, self.new_tokens)
        sampling["extra_configs"] = {"ignore_eos": rng.random() < 0.5}
        kind = rng.choice(("text", "text", "image", "image", "images", "turns", "raw"))
        if kind == "raw":
            prompt = TAGS[self.family] + self._question(rng)
            settings = {k: v for k, v in sampling.items() if k != "extra_configs"}
            settings |= sampling["extra_configs"]
            return Case("/", {"prompt": prompt, "urls": [self._picture(rng)], **settings})
        if kind == "text":
            messages = [user(self._question(rng) + f" ({rng.randint(0, 999)})")]
        elif kind == "turns":
            messages = [user(image_part(self._picture(rng)), self._question(rng))]
            for _ in range(rng.randint(1, 2)):
                messages += [{"role": "assistant", "content": "a red circle"}, user(self._question(rng))]
        else:
            pictures = [image_part(self._picture(rng)) for _ in range(1 if kind == "image" else 2)]
            messages = [user(*pictures, self._question(rng))]
        body = {"messages": messages, **sampling}
        if rng.random() < 0.1:
            return Case(CHAT, body | {"n": 2})
        if rng.random() < 0.3:
            return Case(CHAT, body, abort_seconds=rng.uniform(0, 0.5) if rng.random() < 0.2 else None)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Case(CHAT, body, abort_after=rng.randint(0, 6) if rng.random() < 0.3 else None)

    def _question(self, rng: random.Random) -> str:
        questions = ("What is this?", "How many shapes are there?")
        return rng.choice((*questions, *(f"What colour is the {shape}?" for shape in shapes.SHAPES)))

    def _picture(self, rng: random.Random) -> str:
        return rng.choice(self.known if rng.random() < 0.3 or not self.drawn else self.drawn)


async def _load(server: Server, workload: Workload, clients: int, seconds: float, first: int) -> list[Case]:
    """All clients for that long; each sends its next request when its last one ended."""
    cases: list[Case] = []
    until = time.monotonic() + seconds

    async with serving.client(server, clients) as http:

        async def one() -> None:
            while time.monotonic() < until:
                case = workload.case(first + len(cases))
                cases.append(case)
                request = server.request(case.path, case.body)
                case.answer = await ask(http, *request, case.abort_after, case.abort_seconds)

        await asyncio.gather(*(one() for _ in range(clients)))
    return cases


async def _alone(server: Server, cases: list[Case]) -> None:
    told: dict[str, Answer] = {}
    async with serving.client(server, 1) as http:
        for case in cases:
            whole = {k: v for k, v in case.body.items() if k not in ("stream", "stream_options")}
            if (key := json.dumps([case.path, whole])) not in told:
                told[key] = await ask(http, case.path, whole)
            case.alone = told[key]


def _excused(case: Case, pipeline: Any) -> bool:
    """Did the lone run's two best logits come as close as that before the texts parted?

    In which step the texts part is known only up to what the detokenizer held back: any close call up to
    there counts.
    """
    import numpy as np

    config = {"temperature": 0, "max_new_tokens": case.body["max_tokens"], "return_logits": True}
    config |= case.body["extra_configs"] if case.path == CHAT else {"ignore_eos": case.body["ignore_eos"]}
    if case.path == CHAT:
        responses = pipeline.chat(case.body["messages"], config)
    else:
        responses = pipeline(case.body["prompt"], case.body["urls"], generate_config=config)
    assert case.answer is not None
    for response in responses:
        logits = response.generate_outputs[0].logits
        best = np.partition(logits, -2, axis=1)
        if ((best[:, -1] - best[:, -2]) < MARGIN * logits.std(axis=1)).any():
            return True
        if not case.answer.texts[0].startswith(response.batch_response[0]):
            return False
    return False


def _judge(cases: list[Case], precision: str, path: str) -> tuple[dict[str, int], list[str]]:
    """Counts of equal, flipped and wrong answers, and the broken promises."""
    broken = []
    for case in cases:
        assert case.answer is not None
        if case.answer.ended == "failed":
            broken.append(f"a request failed: {case.answer.detail}")
    answered = [c for c in cases if c.answer and c.answer.ended == "ok"]
    differ = [c for c in answered if c.alone and c.alone.said != (c.answer.said if c.answer else None)]
    wrong, flips = differ, []
    if differ and precision == "int4":
        from rtp_llm.model_factory import ModelFactory
        from rtp_llm.pipeline import Pipeline

        with Pipeline(ModelFactory.from_huggingface(path)) as pipeline:
            flips = [c for c in differ if not c.greedy or _excused(c, pipeline)]
        wrong = [c for c in differ if c not in flips]
    for case in wrong:
        assert case.answer is not None and case.alone is not None
        broken.append(f"not the answer given alone: {case.answer.said} and {case.alone.said}")
    counts = {"equal": len(answered) - len(differ), "flips": len(flips), "wrong": len(wrong)}
    return counts, broken


def run(path: str, flags: list[str], args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The numbers of each server, and the promises that were broken."""
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(Server(path, *flags))
        loads = [_Loaded(http)]
        about = http.json("/v1/models")["data"][0]
        if args.triton:
            loads.append(_Loaded(stack.enter_context(Triton(path, *flags))))
        workload = Workload(args.seed, about["family"], args.drawings, args.new_tokens)
        for load in loads:
            load.warm(workload, args)
        # in turns, for the machine is not the same at all times
        turns = TURNS if args.triton else 1
        for turn in range(turns):
            for load in loads[:: 1 if turn % 2 == 0 else -1]:
                load.run(workload, args.clients, args.seconds / turns)
        for load in loads:
            load.end()
    with Server(path, "--reuse-cache", "0", *flags) as server:
        asyncio.run(_alone(server, [case for load in loads for case in load.answered]))
    numbers = [load.numbers(about, path, args.clients) for load in loads]
    broken = [f"{load.server.name}: {line}" for load in loads for line in load.broken]
    if args.triton:
        one, other = (n["tokens_per_second"] for n in numbers)
        numbers[1]["of_the_http_server"] = other / one
        if other < SHARE * one:
            broken.append(f"Triton: {other / one:.2f} of the HTTP server's throughput, {SHARE} were promised")
    return numbers, broken


class _Loaded:
    """A server under load, and what it did."""

    def __init__(self, server: Server):
        self.server = server
        self.cases: list[Case] = []
        self.seconds = 0.0
        self.broken: list[str] = []

    def warm(self, workload: Workload, args: argparse.Namespace) -> None:
        # threads and connections come as they are needed: the burst needs as many as the load
        asyncio.run(_load(self.server, workload, 2 * args.clients, args.warm_up, 10**9))
        self.before = self.server.settled()

    def run(self, workload: Workload, clients: int, seconds: float) -> None:
        began = time.monotonic()
        self.cases += asyncio.run(_load(self.server, workload, clients, seconds, len(self.cases)))
        self.seconds += time.monotonic() - began

    def end(self) -> None:
        self.after = self.server.settled(self.before)
        self.peak = self.server.memory("VmHWM")
        self.engine = self.server.engine()

    @property
    def answered(self) -> list[Case]:
        return [c for c in self.cases if c.answer and c.answer.ended == "ok"]

    def numbers(self, about: dict[str, Any], path: str, clients: int) -> dict[str, Any]:
        """After the end of the server; `broken` has then what it broke."""
        self.broken = [f"left behind: {line}" for line in serving.grown(self.before, self.after)]
        self.broken += [f"{self.after[n]} still {n}" for n in ("running", "waiting") if self.after[n]]
        if self.server.exit_code:
            self.broken.append(f"the server's exit code after SIGTERM is {self.server.exit_code}")
        counts, more = _judge(self.cases, about["precision"], path)
        self.broken += more
        answers = [c.answer for c in self.cases if c.answer]
        ended = Counter(a.ended for a in answers)
        first = [a.first for a in answers if a.first is not None]
        gaps = [gap for a in answers for gap in a.gaps]
        engine = self.engine
        return {
            "server": self.server.name,
            "model": about["id"],
            "precision": about["precision"],
            "clients": clients,
            "seconds": self.seconds,
            "requests": len(self.cases),
            **{f"requests_{name}": ended[name] for name in ("ok", "cancelled", "failed")},
            "retries_after_429": sum(a.retries for a in answers),
            **{f"answers_{name}": count for name, count in counts.items()},
            "first_token_seconds": {"p50": quantile(first, 0.5), "p95": quantile(first, 0.95)},
            "between_tokens_seconds": {"p50": quantile(gaps, 0.5), "p95": quantile(gaps, 0.95)},
            "requests_per_second": len(self.answered) / self.seconds,
            "tokens_per_second": sum(a.tokens for a in answers) / self.seconds,
            "prefix_hit_rate": engine["prompt_tokens_reused_total"] / (engine["prompt_tokens_total"] or 1),
            "image_hit_rate": engine["image_cache_hits_total"] / (engine["images_total"] or 1),
            "peak_memory_bytes": self.peak,
            "before": self.before,
            "after": self.after,
        }


def shown(numbers: list[dict[str, Any]]) -> str:
    columns = [_column(n) for n in numbers]
    heads = ["", *(n["server"] if len(numbers) > 1 else "" for n in numbers)]
    if len(numbers) > 1:
        for column, n in zip(columns, numbers, strict=True):
            column["tokens a second, of the HTTP server's"] = f"{n.get('of_the_http_server', 1):.2f}"
    return serving.table([(name, *(c[name] for c in columns)) for name in columns[0]], *heads)


def _column(n: dict[str, Any]) -> dict[str, str]:
    first, between = n["first_token_seconds"], n["between_tokens_seconds"]
    after = n["after"]
    counted = {name: f"{was} → {after[name]}" for name, was in n["before"].items() if name != "blocks held"}
    return {
        "model": f"{n['model']}, {n['precision']}",
        "clients, seconds": f"{n['clients']}, {n['seconds']:.0f}",
        "requests: answered, cancelled by us, failed":
            f"{n['requests']}: {n['requests_ok']}, {n['requests_cancelled']}, {n['requests_failed']}",
        "sent again after a 429": f"{n['retries_after_429']}",
        "answers as given alone, flipped (int4 only), wrong":
            f"{n['answers_equal']}, {n['answers_flips']}, {n['answers_wrong']}",
        "time to first token, p50 and p95": f"{first['p50']:.3f} s, {first['p95']:.3f} s",
        "between tokens, p50 and p95": f"{between['p50']:.3f} s, {between['p95']:.3f} s",
        "requests a second": f"{n['requests_per_second']:.2f}",
        "tokens a second": f"{n['tokens_per_second']:.1f}",
        "hit rates: prompt tokens, images": f"{n['prefix_hit_rate']:.0%}, {n['image_hit_rate']:.0%}",
        "peak memory of the server (VmHWM)": f"{n['peak_memory_bytes'] / 1e9:.2f} GB",
        **counted,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="BUNDLE")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=5, metavar="SECONDS")
    parser.add_argument("--drawings", type=int, default=200, help="pictures beside those of tests/images")
    parser.add_argument("--new-tokens", type=int, default=48, help="of the longest answer")
    parser.add_argument("--seed", default="load")
    parser.add_argument("--triton", action="store_true", help="a Triton server beside the HTTP server")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON in place of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a report")
    args, flags = parser.parse_known_args()
    numbers, broken = run(args.path, flags, args)
    if args.json:
        print(json.dumps({**numbers[0], "triton": numbers[1:], "broken": broken}, indent=1))
    else:
        print(shown(numbers))
    for line in broken[:20]:
        print(f"broken: {line}", file=sys.stderr)
    if args.output:
        about = f"{args.clients} clients for {args.seconds:g} seconds (the script tells what they send)."
        title = "Load test: Triton beside the HTTP server" if args.triton else "Load test"
        args.output.write_text(serving.report(title, about, shown(numbers)))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

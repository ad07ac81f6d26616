"""Does the server grow? Thousands of requests with pictures of their own, a third of them aborted.

    rtp-llm export --checkpoint tests/checkpoints/llava_shapes --output demo-bundle
    python scripts/leak_test.py demo-bundle --requests 10000 --output benchmarks/leaks.md

Caches are meant to fill up, so theirs are small here and full after the warm-up. RssAnon + VmSwap is read
after every 20th request; its slope over the number of requests, with a 95 % confidence interval from the
means of 40 equal stretches (neighbouring samples are not independent), must not exceed 1 KB a request.
Threads, file descriptors, sockets and /dev/shm must be what they were. Exit code 1: a promise was broken.

With --triton the requests go to a Triton server: the numbers are those of it and of its models' processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import serving
from serving import CHAT, Server, Triton, ask, image_part, user

SLOPE_LIMIT = 1024.0  # bytes a request
STRETCHES = 40
SAMPLE_EVERY = 20
CACHES = ["--kv-cache-bytes", "16MiB", "--image-cache-bytes", "1MiB", "--max-seq-len", "512"]


@dataclass(frozen=True)
class Slope:
    """Bytes a request, with the ends of the 95 % confidence interval."""

    value: float
    low: float
    high: float


def slope(samples: list[tuple[int, int]], stretches: int = STRETCHES) -> Slope:
    """Least squares through the means of equal stretches of (requests, bytes). Needs 4 stretches."""
    size = max(1, len(samples) // stretches)
    parts = [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]
    xs = [statistics.fmean(x for x, _ in part) for part in parts]
    ys = [statistics.fmean(y for _, y in part) for part in parts]
    line = statistics.linear_regression(xs, ys)
    free = len(xs) - 2
    left = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    middle = statistics.fmean(xs)
    error = math.sqrt(left / free / sum((x - middle) ** 2 for x in xs))
    width = _student(free) * error
    return Slope(line.slope, line.slope - width, line.slope + width)


def _student(free: int) -> float:
    """97.5 % quantile of Student's t, by the first terms of its expansion; 4 % too small at 2 degrees."""
    z = 1.959964
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


def case(number: int) -> dict[str, Any]:
    """What `ask` takes: request `number` of a sequence that repeats itself nowhere."""
    rng = random.Random(number)
    picture = image_part(serving.noise(rng))
    body: dict[str, Any] = {
        "messages": [user(picture, f"What is this? ({number})")],
        "temperature": rng.choice((0, 1)),
        "max_tokens": 12,
        "extra_configs": {"ignore_eos": True},
    }
    streamed = {"stream": True}
    match number % 6:
        case 0:  # before an answer can be there
            return {"body": body | streamed, "abort_seconds": rng.uniform(0, 0.02)}
        case 1:
            return {"body": body | streamed, "abort_after": rng.randint(0, 4)}
        case 2 | 3:
            return {"body": body | streamed}
        case 4:
            return {"body": body | {"n": 2}}
        case _:
            return {"body": body | {"messages": [user(f"What is this? ({number})")]}}


async def _send(
    server: Server, clients: int, first: int, count: int
) -> tuple[Counter[str], list[tuple[int, int]], list[str]]:
    """How `count` requests ended, samples of (requests, bytes), and what failed."""
    ended: Counter[str] = Counter()
    samples: list[tuple[int, int]] = []
    failed: list[str] = []
    numbers = iter(range(first, first + count))
    async with serving.client(server, clients) as http:

        async def one() -> None:
            for number in numbers:
                asked = case(number)
                request = server.request(CHAT, asked.pop("body"))
                answer = await ask(http, *request, **asked)
                ended[answer.ended] += 1
                if answer.ended == "failed":
                    failed.append(answer.detail)
                if (done := ended.total()) % SAMPLE_EVERY == 0:
                    samples.append((done, server.memory("RssAnon", "VmSwap")))

        await asyncio.gather(*(one() for _ in range(clients)))
    return ended, samples, failed


def run(path: str, flags: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The numbers, and the promises that were broken."""
    kind = Triton if args.triton else Server
    with kind(path, *CACHES, *flags) as server:
        asyncio.run(_send(server, 2 * args.clients, 10**9, args.warm_up))
        before = server.settled()
        began = time.monotonic()
        ended, samples, failed = asyncio.run(_send(server, args.clients, 0, args.requests))
        seconds = time.monotonic() - began
        after = server.settled(before)
    grows = slope(samples)
    broken = [f"left behind: {line}" for line in serving.grown(before, after)]
    broken += [f"a request failed: {line}" for line in failed[:5]]
    if grows.high > SLOPE_LIMIT:
        broken.append(f"memory grows by up to {grows.high:.0f} bytes a request, at most 1024 were promised")
    if ended["cancelled"] < 0.9 * args.requests / 3:
        broken.append(f"only {ended['cancelled']} of {args.requests} requests were aborted")
    numbers = {
        "requests": args.requests,
        "clients": args.clients,
        "seconds": seconds,
        "ended": dict(ended),
        "slope_bytes_a_request": vars(grows),
        "rss_anon_and_swap_bytes": {"first": samples[0][1], "last": samples[-1][1]},
        "before": before,
        "after": after,
    }
    return numbers, broken


def shown(n: dict[str, Any]) -> str:
    grows, memory = n["slope_bytes_a_request"], n["rss_anon_and_swap_bytes"]
    counted = [
        (name, f"{n['before'][name]} → {n['after'][name]}") for name in n["before"] if name != "blocks held"
    ]
    rows = [
        ("requests, clients, seconds", f"{n['requests']:,}, {n['clients']}, {n['seconds']:.0f}"),
        ("answered, aborted by us, failed",
         ", ".join(f"{n['ended'].get(name, 0):,}" for name in ("ok", "cancelled", "failed"))),
        ("RssAnon + VmSwap, first and last", " → ".join(f"{b / 1e6:.1f} MB" for b in memory.values())),
        ("slope, bytes a request (95 % confidence)",
         f"{grows['value']:.0f} ({grows['low']:.0f} to {grows['high']:.0f})"),
        *counted,
    ]  # fmt: skip
    return serving.table(rows, "", "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="BUNDLE")
    parser.add_argument("--requests", type=int, default=12_000)
    parser.add_argument("--warm-up", type=int, default=2_000, metavar="REQUESTS")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--triton", action="store_true", help="a Triton server in place of the HTTP server")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON in place of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a report")
    args, flags = parser.parse_known_args()
    if args.requests < 4 * SAMPLE_EVERY:
        parser.error(f"--requests {args.requests} must be at least {4 * SAMPLE_EVERY}")
    numbers, broken = run(args.path, flags, args)
    print(json.dumps(numbers | {"broken": broken}, indent=1) if args.json else shown(numbers))
    for line in broken:
        print(f"broken: {line}", file=sys.stderr)
    if args.output:
        about = f"{args.requests:,} requests after {args.warm_up:,} to warm up (the script tells which)."
        title = "Leaks of Triton" if args.triton else "Leaks"
        args.output.write_text(serving.report(title, about, shown(numbers)))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""What serving gains and costs, as ratios of interleaved pairs in one run.

    python scripts/make_random_checkpoint.py --model llava --size 1b --output llava_1b
    rtp-llm export --checkpoint llava_1b --output llava_1b_int4 --precision int4
    python scripts/serving_ratios.py llava_1b_int4 --output benchmarks/serving_ratios.md

    text     8 streams one after another, over the same 8 at once (prompts ≤ 32 tokens, 128 new): ≥ 1.6
    images   the same with a picture in each prompt
    second   time to first token of a second question about a picture, over the first question's: ≤ 0.2
    elsewhere  the same picture in another conversation: batches through the vision graph: 0
    http     p50 time between tokens of a stream over HTTP, over the Pipeline's: ≤ 1.03

Every prompt and picture is new, so no pair meets the caches of another. For `http` a second server has the
Pipeline's own model, in this process: two instances of one model differ by more than the mark.
Exit code 1: a median misses its mark.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import serving
from serving import CHAT, Server, image_part, quantile, user

WORDS = "how many small boxes are on the left of a large red one if we look at it from above".split()
MARKS = {"text": (1.6, None), "second": (None, 0.2), "elsewhere": (None, 0.0), "http": (None, 1.03)}


class Stream:
    """One streamed request by the plainest client there is: seconds to its first token and between tokens."""

    def __init__(self, url: str, path: str, body: dict[str, Any]):
        where = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=600)
        self.first = float("nan")
        self.gaps: list[float] = []
        began = last = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {response.read()[:500]!r}")
        tokens = 0
        for line in response:
            if not line.startswith(b'data:{"') and not line.startswith(b'data: {"'):
                continue
            now = time.perf_counter()
            come = tokens + 1 if path == CHAT else _tokens(line)
            if come == tokens:
                continue
            if tokens == 0:
                self.first = now - began
            else:  # a reader that was late gets several tokens at once
                self.gaps += [(now - last) / (come - tokens)] * (come - tokens)
            last = now
            tokens = come
        connection.close()


def _tokens(line: bytes) -> int:
    return json.loads(line.removeprefix(b"data:"))["aux_info"]["output_len"]


class Ratios:
    def __init__(
        self, server: Server, pipeline: Any, local: str, seed: str, streams: int, new_tokens: int
    ):
        self.server, self.pipeline, self.local = server, pipeline, local
        self.rng = random.Random(seed)
        self.streams, self.new = streams, new_tokens

    def _words(self, count: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=count))

    def _chat(self, messages: list[Any], new: int) -> dict[str, Any]:
        config = {"temperature": 0, "max_tokens": new, "extra_configs": {"ignore_eos": True}}
        return {"messages": messages, "stream": True, **config}

    def _together(self, pictures: bool) -> tuple[float, float]:
        """Seconds one after another, and at once."""

        def bodies() -> list[dict[str, Any]]:
            made = []
            for _ in range(self.streams):
                parts = [image_part(serving.noise(self.rng))] if pictures else []
                made.append(self._chat([user(*parts, self._words(6))], self.new))
            return made

        one_by_one, at_once = bodies(), bodies()
        began = time.perf_counter()
        for body in one_by_one:
            Stream(self.server.url, CHAT, body)
        middle = time.perf_counter()
        with ThreadPoolExecutor(self.streams) as pool:
            list(pool.map(lambda body: Stream(self.server.url, CHAT, body), at_once))
        return middle - began, time.perf_counter() - middle

    def text(self) -> float:
        alone, together = self._together(pictures=False)
        return alone / together

    def images(self) -> float:
        alone, together = self._together(pictures=True)
        return alone / together

    def second(self) -> float:
        picture = image_part(serving.noise(self.rng))
        first, second = (
            Stream(self.server.url, CHAT, self._chat([user(picture, self._words(6))], 2)).first
            for _ in range(2)
        )
        return second / first

    def elsewhere(self) -> float:
        """Images through the vision graph for a picture that another conversation has shown."""
        picture = image_part(serving.noise(self.rng))
        Stream(self.server.url, CHAT, self._chat([user(picture, self._words(6))], 2))
        before = self._encoded()
        assert before, "the first one was not encoded"
        said = [user(self._words(20)), {"role": "assistant", "content": self._words(4)}]
        Stream(self.server.url, CHAT, self._chat([*said, user(picture, self._words(6))], 2))
        return self._encoded() - before

    def _encoded(self) -> float:
        name = b"rtp_llm_image_encode_batch_images_sum "
        lines = self.server.get("/metrics").splitlines()
        return float(next(line for line in lines if line.startswith(name)).removeprefix(name))

    def http(self) -> float:
        config = {"top_k": 1, "max_new_tokens": self.new, "ignore_eos": True}

        def in_process() -> float:
            times = [time.perf_counter() for _ in self.pipeline(self._words(6), generate_config=config)]
            return quantile([b - a for a, b in zip(times, times[1:], strict=False)], 0.5)

        def over_http() -> float:
            body = {"prompt": self._words(6), "stream": True, **config}
            return quantile(Stream(self.local, "/", body).gaps, 0.5)

        # which of the two goes first must not matter
        if self.rng.random() < 0.5:
            plain = in_process()
            return over_http() / plain
        served = over_http()
        return served / in_process()


@contextlib.contextmanager
def _served(pipeline: Any) -> Iterator[str]:
    """The URL of a server on a thread of this process, which has the pipeline's model."""
    from rtp_llm.runtime.server import lifecycle
    from rtp_llm.runtime.server.settings import Settings
    from rtp_llm.runtime.service import Service

    settings = Settings(start_port=0)
    server, listener = lifecycle.Server(Service(settings)), lifecycle.listen(settings)
    server.service.ready(pipeline)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        server.service.close_pools()


def measure(path: str, flags: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    from rtp_llm.model_factory import ModelConfig, ModelFactory
    from rtp_llm.pipeline import Pipeline

    kinds = ("text", "images", "second", "elsewhere", "http")
    found: dict[str, list[float]] = {kind: [] for kind in kinds if kind in args.only}
    config = ModelConfig(kv_cache_bytes=2**28)
    with (
        Server(path, *flags) as server,
        Pipeline(ModelFactory.from_huggingface(path, None, config)) as here,
        _served(here) as local,
    ):
        ratios = Ratios(server, here, local, args.seed, args.streams, args.new_tokens)
        for pair in range(args.pairs + 1):
            for kind, values in found.items():
                value = getattr(ratios, kind)()
                if pair:  # the first warms up
                    values.append(value)
                    print(f"{kind} {value:.3f}", file=sys.stderr)
    return found


def missed(found: dict[str, list[float]]) -> list[str]:
    lines = []
    for kind, values in found.items():
        low, high = MARKS.get(kind, (None, None))
        median = statistics.median(values)
        kept = (low is None or median >= low) and (high is None or median <= high)
        if not kept:  # not a number is not kept either
            wanted = f"at least {low}" if low is not None else f"at most {high}"
            lines.append(f"{kind}: the median is {median:.3f}, {wanted} was promised")
    return lines


def shown(found: dict[str, list[float]]) -> str:
    marks = {
        kind: f"≥ {low}" if low is not None else f"≤ {high:g}" for kind, (low, high) in MARKS.items()
    }
    rows = [
        f"| {kind} | {statistics.median(v):.3f} | {min(v):.3f} | {max(v):.3f} | {len(v)} "
        f"| {marks.get(kind, '–')} |"
        for kind, v in found.items()
    ]
    heads = "| ratio | median | least | most | pairs | promised |\n|---|---:|---:|---:|---:|---:|"
    return "\n".join([heads, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="BUNDLE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=["text", "images", "second", "elsewhere", "http"])
    parser.add_argument("--seed", default="ratios")
    parser.add_argument("--json", action="store_true", help="every ratio as JSON in place of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a report")
    args, flags = parser.parse_known_args()
    found = measure(args.path, flags, args)
    print(json.dumps(found, indent=1) if args.json else shown(found))
    for line in missed(found):
        print(f"missed: {line}", file=sys.stderr)
    if args.output:
        assert __doc__ is not None
        meaning = __doc__.split("\n\n")[2]
        about = "Medians of interleaved pairs (scripts/serving_ratios.py tells what they are)."
        args.output.write_text(serving.report("Ratios of serving", about, f"{meaning}\n\n{shown(found)}"))
    return 1 if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())

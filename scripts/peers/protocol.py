"""What a peer's worker speaks: JSON objects, a line each, a question on stdin and its answer on stdout.

`prepare(folder, precision, image)` makes of model.py's FOLDER what a worker reads: for the language model,
and then, with `image`, what the whole LLaVA needs beside it. A worker is a class with
`__init__(folder, precision, threads, image)` and a method per question:

    generate(ids, n)      → {"prefill": s, "decode": s}: to the first token; per token of the n after it
    streams(prompts, n)   → {"streams": s}: per step in which every one of the prompts' answers gains a token
    logits(ids)           → {"logits": [vocabulary]}, of the last position
    picture(path, text)   → {"picture": s}: from the picture's file to the first token
    size()                → {"bytes": weights of the language model}

NotImplementedError with the reason, raised where a peer cannot: only that row is left out. Nothing here
needs more than Python: every peer lives in a virtual environment of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any


class Timed:
    """`generate` and `streams` of a worker that computes all prompts of a question in one batch."""

    def times(self, prompts: list[list[int]], n: int) -> tuple[float, float]:
        """Seconds to the first tokens, and of one of the n steps after them."""
        raise NotImplementedError

    def generate(self, ids: list[int], n: int) -> dict[str, float]:
        prefill, decode = self.times([ids], n)
        return {"prefill": prefill, "decode": decode}

    def streams(self, prompts: list[list[int]], n: int) -> dict[str, float]:
        return {"streams": self.times(prompts, n)[1]}


def memory() -> dict[str, int]:
    """Bytes of this process: the peak, and what is resident now without a file and from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: 1024 * int(lines[key].split()[0]) for name, key in names.items()}


def serve(worker: Any, prepare: Any, *packages: str) -> None:
    """`prepare FOLDER PRECISION IMAGE`, or `serve FOLDER PRECISION THREADS IMAGE` until stdin ends.

    The first answer, unasked, has the versions of those of `packages` that are installed, or a reason.
    """
    command, folder, precision, *rest = sys.argv[1:]
    if command == "prepare":
        try:
            prepare(Path(folder), precision, rest[0] == "1")
        except NotImplementedError as e:
            sys.exit(str(e))
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    loaded = None
    for line in itertools.chain(['{"do": "load"}'], sys.stdin):
        question = json.loads(line)
        do = question.pop("do")
        try:
            if do == "load":
                loaded = worker(Path(folder), precision, int(rest[0]), rest[1] == "1")
                answer = {"versions": versions(packages)}
            else:
                answer = memory() if do == "memory" else getattr(loaded, do)(**question)
        except NotImplementedError as e:
            answer = {"reason": str(e)}
        except Exception as e:
            answer = {"reason": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=out, flush=True)


def versions(packages: tuple[str, ...]) -> str:
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)

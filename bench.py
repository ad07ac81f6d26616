"""`rtp-llm bench`: how fast a bundle answers on this machine, beside what the machine allows (roofline.py).

Prompts are random token ids, of which no two begin alike, and pictures are new unless they are called known.
The first run of each measurement warms up and is not counted.

load          from the first import in a fresh process to the first token of a short text; the bundle's files
              are in the page cache
first token   from the call, pictures being JPEG files, to the token
prefill       tokens of a text prompt over the time from its first step to its first token
decode        tokens over time while all answers of the batch are being written: their prompts are cached
capacity      requests a second when all are there at once; every second one has a new picture
arrivals      the same requests as a Poisson process; their times count from the arrival, the rates of
              what is answered go to the end of the last answer
memory        most resident bytes of this process (VmHWM) from opening the bundle to the last arrival; and
              the most of its anonymous and of its file pages, looked at every 50 ms
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import io
import json
import os
import platform
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from . import __version__
from .doctor import _gpu, version
from .errors import InternalError, MissingDependency, RtpLlmError, UserError
from .export.bundle import Bundle
from .model_factory import ModelConfig, ModelFactory
from .pipeline import Pipeline
from .roofline import Work, limits, repeated, spread
from .runtime.backends import device_of
from .runtime.backends.onnx import physical_cores
from .runtime.kv_cache import BLOCK

PICTURE = (640, 480)
SHARES = (0.3, 0.6, 0.9)  # of the capacity, at which requests arrive
LOAD = """
import time
began = time.perf_counter()
import json, sys
from rtp_llm.bench import first_step
print(first_step(json.loads(sys.argv[1])) - began)
"""


@dataclass(frozen=True)
class Settings:
    """`batches`: answers side by side. `repeat`: counted runs of each measurement. `requests`: of each rate
    of arrivals."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    batches: Sequence[int] = (1, 2, 4, 8)
    repeat: int = 5
    requests: int = 32

    def check(self, bundle: Bundle, config: ModelConfig) -> None:
        """Raises UserError that names the flag."""
        least = {"prompt_tokens": BLOCK, "new_tokens": 2, "repeat": 1, "requests": 1}
        given = [(name, getattr(self, name), low) for name, low in least.items()]
        for name, value, low in [*given, *(("batch", batch, 1) for batch in self.batches)]:
            if value < low:
                raise UserError(f"--{name.replace('_', '-')} {value} must be {low} or more")
        if (most := max(self.batches)) > config.max_batch_size:
            raise UserError(
                f"--batch {most} must be at most {config.max_batch_size}: so many run side by side"
            )
        limit = config.max_seq_len or bundle.model.max_seq_len
        if (tokens := self.prompt_tokens + self.new_tokens) > limit:
            raise UserError(
                f"--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens} are {tokens} "
                f"tokens, the longest sequence has {limit}"
            )


def measure(
    bundle: Bundle, config: ModelConfig, settings: Settings, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Every figure with all its runs, as `rtp-llm bench --json` prints them: times in seconds, sizes in
    bytes, rates a second. What does not fit into a sequence is None.

    tell: hears what is being measured. Raises UserError for settings that the bundle cannot have, and what
    opening it raises.
    """
    settings.check(bundle, config)
    config = dataclasses.replace(config, ckpt_path=str(bundle.path))
    threads = config.threads or physical_cores()
    with _Memory() as resident, Pipeline(ModelFactory.from_model_config(config)) as pipeline:
        found = _Bench(pipeline, settings).figures(tell)
        peak = resident.peak()
        block_bytes = pipeline.model.engine.backend.block_bytes
    tell("load time")
    load = repeated(partial(load_seconds, config), settings.repeat)
    tell("the machine's limits")
    context = settings.prompt_tokens + settings.new_tokens // 2
    packages = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "numpy")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {**machine(device_of(bundle, config.device)), "threads": threads},
        "versions": {"rtp_llm": __version__, "python": platform.python_version()}
        | {name: there for name in packages if (there := version(name))},
        "bundle": {
            "name": bundle.name,
            "family": bundle.model.family,
            "parameters": bundle.model.parameters,
            "backend": bundle.backend,
            "attention": bundle.model.attention,
            "precision": bundle.precision,
            "vision_precision": bundle.origin.options.get("vision_precision"),
            "bytes": sum(file.size for file in bundle.files.values()),
            "picture_tokens": bundle.vision.tokens,
        },
        "settings": {**dataclasses.asdict(settings), "picture": list(PICTURE)},
        "export_seconds": bundle.origin.seconds,
        "load_seconds": load,
        **found,
        "memory_bytes": peak,
        "limits": limits(
            bundle, block_bytes, threads, settings.repeat, settings.batches, settings.prompt_tokens, context
        ),
    }


def load_seconds(config: ModelConfig) -> float:
    """From the first import in a fresh process to the first token. Raises InternalError."""
    given = json.dumps(dataclasses.asdict(config))
    done = subprocess.run([sys.executable, "-c", LOAD, given], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InternalError(f"{config.ckpt_path} was not opened in a fresh process: {why}")
    return float(done.stdout.splitlines()[-1])


def first_step(config: dict[str, Any]) -> float:
    """Open a bundle and compute one token; when it was there (time.perf_counter()). In `load_seconds`."""
    with Pipeline(ModelFactory.from_model_config(ModelConfig(**config))) as pipeline:
        next(pipeline([0] * BLOCK, generate_config={"max_new_tokens": 1}))
        return time.perf_counter()


class _Bench:
    """What is measured through an open pipeline."""

    def __init__(self, pipeline: Pipeline, settings: Settings):
        self.pipeline, self.settings = pipeline, settings
        bundle, tokenizer = pipeline.model.bundle, pipeline.tokenizer
        special, rules = tokenizer.get_added_tokens_decoder(), bundle.prompt.image
        known = (i for i in range(bundle.model.vocab_size) if i not in special)
        self.words = [i for i in known if tokenizer.id_to_token(i) is not None]
        self.image = [*rules.prefix_ids, rules.token_id, *rules.suffix_ids]
        engine = pipeline.model.engine
        limit = min(engine.backend.slot_tokens, engine.cache.budget * BLOCK)
        self.room = limit - settings.prompt_tokens  # tokens beside a prompt's text
        self.image_tokens = len(self.image) - 1 + bundle.vision.tokens
        self.rng = random.Random(0)  # another run has the same prompts
        self.prompts = [self.prompt() for _ in range(max(settings.batches))]  # of `decode`

    def figures(self, tell: Callable[[str], None]) -> dict[str, Any]:
        repeat = self.settings.repeat
        tell("time to first token")
        texts = [self.first([]) for _ in range(repeat + 1)][1:]
        first: dict[str, Any] = {"text": spread([seconds for seconds, _ in texts])}
        again = self.pictures(1)
        asked: dict[str, tuple[int, Callable[[], list[bytes]]]] = {
            "1 picture": (1, lambda: self.pictures(1)),
            "1 picture, known": (1, lambda: again),
            "4 pictures": (4, lambda: self.pictures(4)),
        }
        for kind, (count, pictures) in asked.items():
            runs = partial(self.picture_seconds, pictures)
            first[kind] = repeated(runs, repeat) if count * self.image_tokens < self.room else None
        decode = {}
        for batch in self.settings.batches:
            tell(f"decode at batch {batch}")
            decode[str(batch)] = repeated(partial(self.decode, batch), repeat)
        tell("capacity")
        capacity = self.capacity()
        arrivals = []
        for share in SHARES:
            tell(f"arrivals at {share:.0%} of the capacity")
            arrivals.append({"share": share, **self.arrivals(share * capacity)})
        return {
            "first_token_seconds": first,
            "prefill_tokens_per_second": spread([rate for _, rate in texts]),
            "decode_tokens_per_second": decode,
            "capacity_requests_per_second": capacity,
            "arrivals": arrivals,
        }

    def prompt(self, pictures: int = 0) -> list[int]:
        words = self.rng.choices(self.words, k=self.settings.prompt_tokens)
        return [i for word in words[:pictures] for i in (word, *self.image)] + words[pictures:]

    def pictures(self, count: int) -> list[bytes]:
        """JPEG files of coloured clouds."""
        files = []
        for _ in range(count):
            small = Image.frombytes("RGB", (16, 12), self.rng.randbytes(3 * 16 * 12))
            small.resize(PICTURE).save(file := io.BytesIO(), "JPEG")
            files.append(file.getvalue())
        return files

    def config(self, new_tokens: int, reuse_cache: bool = False) -> dict[str, Any]:
        return {"top_k": 1, "ignore_eos": True, "max_new_tokens": new_tokens, "reuse_cache": reuse_cache}

    def first(self, pictures: list[bytes]) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second of the prefill."""
        prompt = self.prompt(len(pictures))
        began = time.perf_counter()
        response = next(self.pipeline(prompt, images=pictures, generate_config=self.config(1)))
        seconds = time.perf_counter() - began
        times = response.generate_outputs[0].aux_info
        return seconds, 1000 * times.input_len / (times.first_token_cost_time - times.wait_time)

    def picture_seconds(self, pictures: Callable[[], list[bytes]]) -> float:
        return self.first(pictures())[0]

    def decode(self, batch: int) -> float:
        """Tokens a second of `batch` answers side by side."""
        config = self.config(self.settings.new_tokens, reuse_cache=True)
        requests = [self.pipeline.prepare(prompt, generate_config=config) for prompt in self.prompts[:batch]]
        times: list[list[float]] = [[] for _ in requests]
        ended: queue.SimpleQueue[RtpLlmError | None] = queue.SimpleQueue()

        def listen(at: list[float], event: tuple[int, Any, RtpLlmError | None]) -> None:
            at.append(time.perf_counter())
            _, snapshot, error = event
            if error or snapshot[1].finished:
                ended.put(error)

        def start(_: object) -> None:
            for request, at in zip(requests, times, strict=True):
                request.start(partial(listen, at))

        # the end of this one is heard on the engine's thread, so that one step begins them all
        self.pipeline.prepare(self.prompts[0], generate_config=self.config(1)).start(start)
        for _ in requests:
            if error := ended.get():
                raise error
        return decode_rate(times)

    def mixture(self) -> list[dict[str, Any]]:
        fits = self.image_tokens + self.settings.new_tokens <= self.room
        config = self.config(self.settings.new_tokens)
        counts = [i % 2 if fits else 0 for i in range(self.settings.requests)]
        return [
            {"prompt": self.prompt(n), "images": self.pictures(n), "generate_config": config} for n in counts
        ]

    def capacity(self) -> float:
        """Requests a second."""
        asked = self.mixture()
        began = time.perf_counter()
        for _, answer in self.pipeline.batch(asked, in_flight=len(asked)):
            if isinstance(answer, RtpLlmError):
                raise answer
        return len(asked) / (time.perf_counter() - began)

    def arrivals(self, rate: float) -> dict[str, Any]:
        """`rate`: requests a second."""
        asked = self.mixture()
        # given their number, the arrivals of a Poisson process are uniform in its time
        due = sorted(self.rng.uniform(0, len(asked) / rate) for _ in asked)

        async def answer(arrived: float, request: dict[str, Any]) -> list[float]:
            await asyncio.sleep(arrived - time.perf_counter())
            responses = self.pipeline.pipeline_async(**request)
            return [round(time.perf_counter() - arrived, 6) async for _ in responses]

        async def answers() -> list[list[float]]:
            began = time.perf_counter()
            pairs = zip(due, asked, strict=True)
            return await asyncio.gather(*(answer(began + at, request) for at, request in pairs))

        tokens = asyncio.run(answers())
        ends = (at + times[-1] for at, times in zip(due, tokens, strict=True))
        seconds = max(len(asked) / rate, *ends)
        between = [gap for times in tokens for gap in np.diff(times)]
        return {
            "offered_requests_per_second": rate,
            "requests_per_second": len(tokens) / seconds,
            "tokens_per_second": sum(map(len, tokens)) / seconds,
            "first_token_seconds": _quantiles([times[0] for times in tokens]),
            "between_tokens_seconds": _quantiles(between),
            "requests": [{"arrived": at, "tokens": times} for at, times in zip(due, tokens, strict=True)],
        }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in (("p50", 0.5), ("p95", 0.95))}


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second, from the times of each answer's tokens.

    Counted are the steps from the last first token to the first last token: each has a token of every answer.
    Raises UserError when there is none.
    """
    latest = max(times, key=lambda at: at[0])
    end = min(at[-1] for at in times)
    steps = [at for at in latest if at <= end]
    if len(steps) < 2:
        raise UserError(f"--new-tokens is too small: {len(times)} answers were never being written together")
    return len(times) * (len(steps) - 1) / (steps[-1] - steps[0])


def memory(pid: int | str, *fields: str) -> int:
    """Bytes: the sum of these lines of /proc/PID/status."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in fields)


class _Memory:
    """Most bytes of this process within `with`; nothing is known where there is no /proc."""

    def __init__(self) -> None:
        self._most = {"RssAnon": 0, "RssFile": 0}
        self._left = threading.Event()

    def __enter__(self) -> _Memory:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _look(self) -> None:
        with suppress(OSError):
            while not self._left.wait(0.05):
                self._most = {name: max(most, memory("self", name)) for name, most in self._most.items()}

    def peak(self) -> dict[str, int] | None:
        with suppress(OSError):
            most = self._most
            return {"all": memory("self", "VmHWM"), "anonymous": most["RssAnon"], "file": most["RssFile"]}
        return None


def machine(device: str) -> dict[str, Any]:
    """Facts about it; memory in bytes."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "device": device,
        "gpu": None if device == "cpu" else _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }


# --------------------------------------------------------------------------------------- for people


def tables(report: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """What `measure` found, in rows of cells: where from, the figures, the arrivals."""
    m, b, s, found = report["machine"], report["bundle"], report["settings"], report["limits"]
    about: list[tuple[str, ...]] = [
        ("bundle", f"{b['name']}, {b['backend']}, {b['precision']}, {b['parameters']:,} parameters, "
                   f"{b['bytes'] / 1e6:,.0f} MB"),
        ("machine", f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory'] / 1e9:.0f} GB, "
                    f"{m['system']}" + (f", {m['gpu']}" if m["gpu"] else "")),
        ("versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())),
        ("measured", f"{report['date']}, {s['repeat']} runs each: median, least, most"),
        ("prompts", f"{s['prompt_tokens']} tokens of text; a picture is {b['picture_tokens']} more"),
    ]  # fmt: skip
    if "missing" in found:
        about.append(("limits", found["missing"]))
    rows: list[tuple[str, ...]] = [("", "median", "least", "most", "limit", "by")]

    def row(name: str, figure: dict[str, Any] | None, shown: Callable[[float], str], *limit: str) -> None:
        cells = (
            [shown(figure[key]) for key in ("median", "least", "most")]
            if figure
            else ["does not fit", "", ""]
        )
        rows.append((name, *cells, *(limit or ("", ""))))

    def lowest(limit: dict[str, float]) -> tuple[str, str]:
        name = min(limit, key=limit.__getitem__)
        return _number(limit[name]), name

    for kind, figure in report["first_token_seconds"].items():
        row(f"first token, {kind}", figure, _time)
    limit = lowest(found["prefill_tokens_per_second"]) if "missing" not in found else ()
    row("prefill, tokens a second", report["prefill_tokens_per_second"], _number, *limit)
    for batch, figure in report["decode_tokens_per_second"].items():
        limit = lowest(found["decode_tokens_per_second"][batch]) if "missing" not in found else ()
        row(f"decode at batch {batch}, tokens a second", figure, _number, *limit)
    row("load", report["load_seconds"], _time)
    if "missing" not in found:
        row("memory read, GB/s", found["read_bytes_per_second"], lambda rate: _number(rate / 1e9))
        for precision, figure in found["operations_per_second"].items():
            row(f"{precision} products, Gop/s", figure, lambda rate: _number(rate / 1e9))
    export, peak = report["export_seconds"], report["memory_bytes"]
    rows.append(("export", "not recorded" if export is None else _time(export), *[""] * 4))
    if peak:
        for key, name in (("all", ""), ("anonymous", ", anonymous"), ("file", ", of files")):
            rows.append((f"peak memory{name}, MB", _number(peak[key] / 1e6), *[""] * 4))
    arrivals: list[tuple[str, ...]] = [
        ("arrivals", "requests/s", "answered/s", "tokens/s", "first token p50", "p95", "between p50", "p95")
    ]
    for a in report["arrivals"]:
        times = (
            a[key][q] for key in ("first_token_seconds", "between_tokens_seconds") for q in ("p50", "p95")
        )
        rates = (a[f"{name}_per_second"] for name in ("offered_requests", "requests", "tokens"))
        arrivals.append((f"{a['share']:.0%} of the capacity", *map(_number, rates), *map(_time, times)))
    return [about, rows, arrivals]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw what `measure` found, as PNG. Raises MissingDependency without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependency("no plot: it needs matplotlib: pip install matplotlib") from e
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    rates, first, load = figure.subplots(1, 3)
    m, b, s, found = report["machine"], report["bundle"], report["settings"], report["limits"]
    figure.suptitle(
        f"{b['name']}, {b['backend']} {b['precision']}; {m['gpu'] or m['cpu']}, {m['threads']} threads; "
        f"{report['date'][:10]}; medians of {s['repeat']} runs with the least and the most"
    )

    decode, prefill = report["decode_tokens_per_second"], report["prefill_tokens_per_second"]
    batches, prompt = [*map(int, decode)], s["prompt_tokens"]
    if "missing" not in found:
        read = found["read_bytes_per_second"]["median"]
        rate, rate32 = (found["operations_per_second"][p]["median"] for p in (b["precision"], "fp32"))
        decoder, rows = Work(**found["decoder"]), np.geomspace(1, prompt, 100)
        cached = rows * found["context"]
        by_memory = decoder.memory(read, rows, cached)
        by_arithmetic = decoder.arithmetic(rate, rate32, rows, rows, cached)
        rates.plot(rows, by_memory, label=f"decode, limit by memory ({read / 1e9:.1f} GB/s)")
        text = f"decode, limit by arithmetic ({rate / 1e9:,.0f} Gop/s)"
        rates.plot(rows, by_arithmetic, color="tab:red", label=text)
        lowest = min(found["prefill_tokens_per_second"].values())
        rates.plot(prompt, lowest, "_", color="black", markersize=20, label="prefill, limit")
    for name, figures, at, marker in (
        ("decode", [*decode.values()], batches, "o"),
        ("prefill", [prefill], [prompt], "s"),
    ):
        medians = np.array([f["median"] for f in figures])
        errors = np.abs([[f[end] for f in figures] for end in ("least", "most")] - medians)
        rates.errorbar(at, medians, errors, fmt=marker, color="black", capsize=3, label=f"{name}, measured")
    rates.set(xscale="log", yscale="log", title="Throughput", ylabel="tokens a second")
    rates.set_xlabel("tokens in a step: answers side by side, or the prompt")
    rates.set_xticks([*batches, prompt], [*decode, str(prompt)])
    rates.set_xticks([], minor=True)

    kinds = {kind: f for kind, f in report["first_token_seconds"].items() if f}
    for place, f in enumerate(kinds.values()):
        first.barh(place, 1000 * f["median"], color="tab:blue", alpha=0.4)
        runs = [1000 * run for run in f["runs"]]
        first.plot(runs, [place] * len(runs), "|", color="black", markersize=14)
    first.set_yticks(range(len(kinds)), list(kinds))
    first.invert_yaxis()
    first.set(title=f"Time to first token, {s['prompt_tokens']} tokens of text", xlabel="ms")

    offered = [a["offered_requests_per_second"] for a in report["arrivals"]]
    for key, name, colour in (("first_token_seconds", "first token", "tab:blue"),
                              ("between_tokens_seconds", "between tokens", "tab:orange")):  # fmt: skip
        for q, style in (("p50", "o-"), ("p95", "o--")):
            times = [1000 * a[key][q] for a in report["arrivals"]]
            load.plot(offered, times, style, color=colour, label=f"{name}, {q}")
    ticks = [
        f"{a['offered_requests_per_second']:.3g}/s\n{a['share']:.0%}\n{_number(a['tokens_per_second'])}/s"
        for a in report["arrivals"]
    ]
    load.set_xticks(offered, ticks)
    load.set(yscale="log", title="Poisson arrivals", ylabel="ms")
    load.set_xlabel("requests offered, share of the capacity, tokens answered")
    load.margins(x=0.2)
    for axes in (rates, load):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)

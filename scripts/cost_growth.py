"""How cost grows: longer prompts, larger batches, more pictures, larger models; and what a start costs.

    python scripts/cost_growth.py FOLDER --output benchmarks/cost_growth.md

Each point is measured in a process of its own, on LLaVA with random weights at int4, which
make_random_checkpoint.py makes and this exports into FOLDER where it is missing. A straight line a + b·x is
laid through all points of an axis but the last (least squares of relative errors) and drawn on to that one;
what lies more than 15 % above it is worse than linear. ONNX Runtime's profiler tells attention, matrix
products and other nodes apart; the rest of the time is Python's. Attention has a square of its own: over a
prompt it is held against its floating-point operations, and the rest of the prompt against the line.

The numbers stand in a .json beside the page, and what is there is not measured again. Of the page, what
stands above "## Measured" is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import serving

Point = dict[str, Any]
SMALL = "0.1b"  # of all axes but the models': the less the products take, the more shows of all else
# axis → what x is, and of each x the size of the model and the arguments of `measure`
AXES: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "prompt": (
        "tokens of the prompt",
        {str(n): (SMALL, {"prompt": n}) for n in (128, 512, 1024, 2048, 4096, 8192, 16384)},
    ),
    "batch": (
        "answers side by side, 128 tokens of prompt each",
        {str(n): (SMALL, {"prompt": 128, "batch": n, "new_tokens": 64}) for n in (1, 2, 4, 8, 16)},
    ),
    "images": (
        "pictures of the prompt, 576 tokens each",
        {str(n): (SMALL, {"prompt": 64, "images": n}) for n in (0, 1, 2, 4, 8, 16)},
    ),
    "model": (
        "billion weights in matrix products, 512 tokens of prompt",
        {size: (size, {"prompt": 512}) for size in ("0.1b", "0.3b", "1b", "full")},
    ),
}
STARTS = ("cold", "warm")  # of the largest model
TOLERANCE = 1.15
SECONDS = 4  # a point is measured again and again for so long, and its best is taken
PARTS = {"GroupQueryAttention": "attention", "MatMulNBits": "products"}
WORD = "jj"  # a token of the random vocabularies, however many stand together
MARK = "## Measured"


class Watch:
    """The engine's Observer: when each step ended, what encoding took, and what the process held itself."""

    def __init__(self, batch: int):
        self.batch = batch
        self.steps: list[tuple[int, int, int]] = []  # ns since 1970, sequences, tokens
        self.encoding = 0.0
        self.own = 0

    def step(self, rows: int, tokens: int, seconds: float) -> None:
        if rows == tokens == self.batch and self.steps[-1][1:] != (rows, tokens):  # once: it takes time
            self.own = max(self.own, serving.memory(os.getpid(), "RssAnon"))
        self.steps.append((time.time_ns(), rows, tokens))

    def encoded(self, images: int, seconds: float) -> None:
        self.encoding += seconds


def measure(path: str, prompt: int, batch: int = 1, images: int = 0, new_tokens: int = 16) -> Point:
    """Cost of `batch` equal prompts at once, of `prompt` tokens of text and so many pictures.

    Seconds: `first`, until all have their first token; `encoding`, of the pictures before; `step`, in which
    each gets one more; and the parts of the first and the last. Bytes: `peak`, the most that was resident;
    `own`, without mapped files, as the steps began. Changes this process: call it in a fresh one.
    """
    import onnxruntime

    class Profiled(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = f"{path}-{os.getpid()}"

    onnxruntime.SessionOptions = Profiled
    from rtp_llm.model_factory import ModelConfig, ModelFactory
    from rtp_llm.pipeline import Pipeline

    room = prompt + 600 * images + new_tokens + 16
    config = ModelConfig(max_seq_len=room, max_batch_size=batch)
    model = ModelFactory.from_huggingface(path, model_config=config)
    pipeline = Pipeline(model)
    watch = model.engine.observer = Watch(batch)
    text = "<image>" * images + WORD * (prompt - 1)
    greedy = {"top_k": 1, "max_new_tokens": new_tokens, "ignore_eos": True, "reuse_cache": False}
    rng, tries, until = np.random.default_rng(0), [], time.monotonic() + SECONDS
    while not tries or time.monotonic() < until:
        watch.steps, watch.encoding = [], 0.0
        pictures = [_picture(rng) for _ in range(images)]
        request = {"prompt": text, "images": pictures, "generate_config": greedy}
        began = time.time_ns()
        answers = [response for _, response in pipeline.batch([request] * batch)]
        if failed := [a for a in answers if isinstance(a, Exception)]:
            raise failed[0]
        full = [end for end, rows, tokens in watch.steps if rows == tokens == batch]
        if len(full) < 2:  # tiny answers, of which one had ended before the other began
            if time.monotonic() > until + 60:
                raise RuntimeError(f"{batch} answers of {new_tokens} tokens never ran side by side")
            continue
        first = max(end for end, rows, tokens in watch.steps if tokens > rows)
        # a mean, as its parts are: of a median less than nothing may be left for Python
        step = (full[-1] - full[0]) / (len(full) - 1)
        windows = (began, first), (full[0], full[-1])
        tries.append((first - began, step, watch.encoding, *windows, len(full) - 1))
    session = model.engine.backend._decoder  # type: ignore[attr-defined]
    origin, profile = session.get_profiling_start_time_ns(), Path(session.end_profiling())
    pipeline.stop()
    events = json.loads(profile.read_text())
    for file in profile.parent.glob(f"{profile.name.split('_')[0]}*.json"):  # the vision graph's too
        file.unlink()
    fast, quick = min(tries), min(tries, key=lambda t: t[1])
    tokens = answers[0].generate_outputs[0].aux_info.input_len
    return {
        "tokens": tokens,
        "first": fast[0] / 1e9,
        "encoding": fast[2],
        "first_parts": split(events, origin, fast[3], fast[0] / 1e9 - fast[2]),
        "step": quick[1] / 1e9,
        "step_parts": split(events, origin, quick[4], quick[1] / 1e9, quick[5]),
        "peak": serving.memory(os.getpid(), "VmHWM"),
        "own": watch.own,
        "attention_flops": batch * attention_flops(tokens, model.bundle.model),
        "products": products(model.bundle.read_path(model.bundle.graphs["decoder"].path)),
    }


def _picture(rng: np.random.Generator) -> Any:
    from PIL import Image

    return Image.fromarray(rng.integers(0, 256, (336, 336, 3), np.uint8))


def split(events: list[Point], origin: int, window: tuple[int, int], seconds: float, steps: int = 1) -> Point:
    """Seconds of each part of a step, from the profiler's `events` in a window of so many steps.

    `origin` and `window`: ns since 1970; an event's `ts` and `dur`: µs, since `origin`. `seconds` is what all
    parts of a step take together: Python's is what the nodes leave of it.
    """
    parts = dict.fromkeys([*PARTS.values(), "other nodes"], 0.0)
    for event in events:
        node = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if node and window[0] <= origin + 1000 * event["ts"] < window[1]:
            parts[PARTS.get(event["args"]["op_name"], "other nodes")] += event["dur"] / 1e6 / steps
    return {**parts, "Python": seconds - sum(parts.values())}


def attention_flops(tokens: int, model: Any) -> float:
    """Of a causal prompt: 2 products of 2 · head_dim operations for every head, layer and pair of tokens."""
    return 4 * model.head_dim * model.heads * model.layers * tokens * (tokens + 1) / 2


def products(graph: Path) -> int:
    """Weights in a graph's matrix products."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    sizes = [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    return sum(size["K"] * size["N"] for size in sizes)


def start(path: str) -> Point:
    """Seconds from the process's start to the first token of a text of 16 tokens, by what they went into.

    `read`: bytes that came from the disk. Changes this process: call it in a fresh one.
    """
    import psutil

    marks = [("", psutil.Process().create_time())]

    def mark(name: str) -> None:
        marks.append((name, time.time()))

    from rtp_llm import model_factory
    from rtp_llm.pipeline import Pipeline
    from rtp_llm.runtime.backends import onnx

    onnx.import_onnxruntime()
    mark("imports")
    bundle = model_factory.read(path)
    tokenizer = model_factory.open_tokenizer(bundle)
    mark("manifest and tokenizer")
    backend = onnx.OnnxBackend(bundle)
    mark("ONNX Runtime's session")
    engine = model_factory.Engine(backend, bundle.model)
    pipeline = Pipeline(model_factory.Model(bundle, tokenizer, engine))
    next(iter(pipeline(WORD * 15, max_new_tokens=2)))
    mark("first token")
    lines = Path("/proc/self/io").read_text().splitlines()
    found = {
        **{name: now - before for (_, before), (name, now) in zip(marks, marks[1:], strict=False)},
        "read": int(dict(line.split(": ") for line in lines)["read_bytes"]),
        "peak": serving.memory(os.getpid(), "VmHWM"),
        "own": serving.memory(os.getpid(), "RssAnon"),
    }
    pipeline.stop()
    return found


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ----------------------------------------------------------------------------------------- the whole of it


def bundle(folder: Path, size: str) -> Path:
    """The model of a size as a bundle in `folder`, made where it is missing."""
    from make_random_checkpoint import llava

    from rtp_llm.export.exporter import export

    made, checkpoint = folder / f"llava-{size}-int4", folder / f"llava-{size}"
    if not made.exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        llava(checkpoint, size, seed=0)
        export(checkpoint, made, precision="int4")
        for file in checkpoint.rglob("*.safetensors"):
            file.unlink()
    return made


def calls(axis: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each x of an axis the size of the model and what a child is told beside its path."""
    return AXES[axis][1] if axis in AXES else {how: ("full", {"start": how}) for how in STARTS}


def child(call: dict[str, Any]) -> Point:
    """What a fresh process measures. Raises RuntimeError with the end of what it said."""
    done = subprocess.run(
        [sys.executable, __file__, "--call", json.dumps(call)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{call}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """a, b of a + b·x through all points but the last: least squares of relative errors."""
    b, a = np.polyfit(x[:-1], y[:-1], 1, w=1 / np.array(y[:-1]))
    return float(a), float(b)


def costs(axis: str, measured: dict[str, Point]) -> dict[str, tuple[list[float], list[float]]]:
    """Each cost of an axis and what it should be in a line with: (x, y), seconds or GB."""
    # where there is no picture the vision graph is not even opened: that is on no line
    measured = {name: p for name, p in measured.items() if name != "0"}
    found = list(measured.values())
    if axis == "model":
        x = [p["products"] / 1e9 for p in found]
    elif axis == "prompt":
        x = [float(p["tokens"]) for p in found]
    else:
        x = [float(name) for name in measured]
    attention = [p["first_parts"]["attention"] for p in found]
    kinds = {
        "first token, without attention and encoding": (
            x, [p["first"] - p["encoding"] - a for p, a in zip(found, attention, strict=True)]
        ),
        "attention until then": ([p["attention_flops"] / 1e9 for p in found], attention),
        "encoding": (x, [p["encoding"] for p in found]),
        "a step": (x, [p["step"] for p in found]),
        "memory of its own": (x, [p["own"] / 1e9 for p in found]),
        "peak resident memory": (x, [p["peak"] / 1e9 for p in found]),
    }  # fmt: skip
    return {name: (a, b) for name, (a, b) in kinds.items() if all(b)}


def verdicts(axis: str, measured: dict[str, Point]) -> list[tuple[str, ...]]:
    """Rows of a table: each cost's line, what it says of the last point, what was measured, the judgement."""
    rows = []
    for name, (x, y) in costs(axis, measured).items():
        a, b = line(x, y)
        ratio = y[-1] / (a + b * x[-1])
        unit = "GB" if "memory" in name else "s"
        of = "10⁹ operations" if name.startswith("attention") else AXES[axis][0].split(",")[0]
        verdict = "worse than linear" if ratio > TOLERANCE else "no worse than linear"
        through = f"{a:.3g} {unit} + {b:.3g} {unit} × {of}"
        ends = (f"{a + b * x[-1]:.3g} {unit}", f"{y[-1]:.3g} {unit}", f"{ratio:.2f}")
        rows.append((f"{axis}: {name}", through, *ends, verdict))
    return rows


def page(results: dict[str, dict[str, Point]], chart: str) -> str:
    """The page's part of numbers, with the chart of that file name."""
    measured = {axis: results[axis] for axis in AXES if axis in results}
    heads = ("cost", "line through the others", "line at the last point", "measured", "ratio", "")
    judged = [row for axis, found in measured.items() for row in verdicts(axis, found)]
    text = [f"![Each cost and its line]({chart})", serving.table(judged, *heads)]
    parts = [*PARTS.values(), "other nodes", "Python"]
    for axis, found in measured.items():
        rows = [
            (
                x,
                f"{p['first']:.3f}", f"{p['encoding']:.3f}", *(f"{p['first_parts'][k]:.3f}" for k in parts),
                f"{1000 * p['step']:.1f}", *(f"{1000 * p['step_parts'][k]:.1f}" for k in parts),
                f"{p['own'] / 1e9:.2f}", f"{p['peak'] / 1e9:.2f}",
            )
            for x, p in found.items()
        ]  # fmt: skip
        heads = ("", "first token, s", "encoding", *parts, "step, ms", *parts, "own, GB", "peak, GB")
        text += [f"### {AXES[axis][0].capitalize()}", serving.table(rows, *heads)]
    if starts := results.get("start"):
        names = list(next(iter(starts.values())))
        rows = [
            (name, *(f"{p[name] / 1e9:.2f} GB" if name in ("read", "peak", "own") else f"{p[name]:.2f} s"
                     for p in starts.values()))
            for name in names
        ]  # fmt: skip
        text += ["### From the process's start to the first token", serving.table(rows, "", *starts)]
    return "\n\n".join(text)


def draw(results: dict[str, dict[str, Point]], file: Path) -> None:
    """A panel for each axis: what was measured, its line, and the line with attention's square."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, axis in zip(panels.flat, [a for a in AXES if a in results], strict=False):
        of = costs(axis, results[axis])
        rest, attention = "first token, without attention and encoding", "attention until then"
        x = of[rest][0]
        first = [p["first"] for name, p in results[axis].items() if name != "0"]
        lines = {name: np.polyval(line(*xy)[::-1], xy[0]) for name, xy in of.items()}
        straight = lines[rest] + lines.get("encoding", 0)
        panel.plot(x, first, "o", color="C0", label="first token, s")
        panel.plot(x, straight, "--", color="C0", label="its line")
        panel.plot(x, straight + lines[attention], ":", color="C0", label="and attention's operations")
        for name, unit, colour in (("a step", "s", "C1"), ("memory of its own", "GB", "C2")):
            panel.plot(x, of[name][1], "o", color=colour, label=f"{name}, {unit}")
            panel.plot(x, lines[name], "--", color=colour)
        panel.loglog()
        panel.set_xlabel(AXES[axis][0])
        panel.grid(alpha=0.3)
    panels.flat[0].legend()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", nargs="?", help="of the models; needs 25 GB")
    parser.add_argument("--axis", action="append", choices=[*AXES, "start"], help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("cost_growth.md"))
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        call = json.loads(args.call)
        print(json.dumps(start(call["path"]) if "start" in call else measure(**call)))
        return
    if not args.folder:
        parser.error("FOLDER is missing")
    numbers = args.output.with_suffix(".json")
    results: dict[str, dict[str, Point]] = json.loads(numbers.read_text()) if numbers.exists() else {}
    for axis in args.axis or [*AXES, "start"]:
        for x, (size, call) in calls(axis).items():
            if x in results.setdefault(axis, {}):
                continue
            path = bundle(args.folder, size)
            if x == "cold":
                forget(path)
            results[axis][x] = child({"path": str(path), **call})
            print(axis, x, results[axis][x], file=sys.stderr, flush=True)
            numbers.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.output.with_suffix(".png"))
    body = f"{MARK}\n\n{page(results, args.output.with_suffix('.png').name)}"
    made = serving.report("How cost grows", "LLaVA with random weights at int4.", body)
    if args.output.exists():
        made = args.output.read_text().partition(MARK)[0] + MARK + made.partition(MARK)[2]
    args.output.write_text(made)


if __name__ == "__main__":
    main()

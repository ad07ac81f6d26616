"""Checkpoint → bundle: the steps, in order."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import (
    BundleError,
    CheckpointError,
    MissingDependency,
    UserError,
)
from . import bundle as bundles
from .bundle import Bundle, ModelSpec, Origin, RopeSpec
from .checkpoint import Checkpoint, Weight, resolve, size_text
from .families import FAMILIES, Options, Plan, detect
from .graph import GraphPlan, Progress, Writer
from .target import Target, check_precision, target

if TYPE_CHECKING:
    from .packed import Scheme

EXPORTER = "5"  # raise it when the same checkpoint and options give another bundle
WORKING = 2**30  # bytes of memory that an export takes beside its largest chunk


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    backend: str = "onnxruntime",
    device: str | None = None,
    kv_cache: str | None = None,
    precision: str = "auto",
    vision_precision: str | None = None,
    max_seq_len: int | None = None,
    vision_tower: str | None = None,
    conversation: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Export a checkpoint folder or hub id to the bundle folder `output`, and open that.

    model: the family, checked against the checkpoint. backend, device, kv_cache: what will run it, see
    target.py. precision: of the decoder's linear layers, head and embedding; "auto" is what a quantised
    checkpoint has (packed.py), else bf16 for a GPU, and on a CPU int4 above two billion parameters and fp32
    below. vision_precision: of the image encoder's linear layers; default int8 beside int4 on a CPU, else as
    exact as the decoder's activations. vision_tower, conversation, tokenizer: in place of what the checkpoint
    names. calibration: JSONL of prompts, for fp8 and int8 engines and for a CPU's int4, see calibrate.py.
    output: default `./<name>-<backend>-<precision>`; a bundle of the same checkpoint and options that is
    already there is kept, unless `force`. A failed export leaves nothing behind.

    Raises CheckpointError (missing or damaged checkpoint), UnknownArchitecture, NotSupportedYet,
    BundleError (`output` is something else), UserError (impossible options; disk or memory too small).
    """
    tell = progress or (lambda _: None)
    if model is not None and model not in FAMILIES:
        raise UserError(f"--model is {model!r}, known families are {', '.join(FAMILIES)}")
    made_for = target(backend, device, kv_cache)
    if precision != "auto":
        check_precision(made_for, "precision", precision)
    if vision_precision is not None:
        check_precision(made_for, "vision_precision", vision_precision)
    packages = ["torch", *([] if backend == "torchscript" else ["onnx", "onnxscript", "onnx_ir"])]
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as e:
        names = " ".join(packages).replace("_", "-")
        raise MissingDependency(f"an export needs {e.name}: pip install {names}") from e

    source = Checkpoint(resolve(checkpoint, revision, tell=lambda text: tell(Progress(text))))
    began = time.monotonic()  # it is on this disk
    family, architecture = detect(source.config)
    if model not in (None, family):
        raise CheckpointError(f"{checkpoint} is a {family} checkpoint, --model is {model!r}")
    own = source.scheme
    options = Options(max_seq_len, vision_tower, conversation, tokenizer, revision)
    plan = FAMILIES[family].plan(source, options)
    for weight in plan.decoder_weights.values():
        weight.check()

    count = _parameters(plan.decoder_weights) + _parameters(plan.vision_weights)
    precision = made_for.precision(precision, count, own)
    vision_precision = made_for.vision_precision(vision_precision, precision)
    ranged = made_for.kind == "engine" and bool({precision, vision_precision} & {"fp8", "int8"})
    rounds = bool(calibration) and made_for.kind == "cpu" and precision == "int4"
    if calibration and not (ranged or rounds):
        raise UserError(
            "calibration is for fp8 and int8 of backend tensorrt and for int4 of onnxruntime on the cpu, "
            f"not for {precision} of {backend} on {made_for.device}"
        )
    if rounds and own:
        raise UserError(
            f"calibration rounds unquantised weights, the checkpoint is quantised already: {own.method}, "
            f"{own.precision}"
        )
    name = _name(checkpoint)
    final = Path(output) if output is not None else Path(_folder(name, made_for, precision))
    origin = Origin(
        checkpoint=str(source.path) if Path(checkpoint).exists() else str(checkpoint),
        fingerprint="-".join(Checkpoint(f).fingerprint() for f in plan.folders),
        options={
            "backend": backend,
            "attention": made_for.attention,
            "precision": precision,
            "vision_precision": vision_precision,
            "calibration": _calibration(calibration),
            **dataclasses.asdict(options),
        },
        tools=_tools(),
    )
    tell(Progress(f"{name}: {family}, {architecture}, {_count(count)} parameters"))
    if own:
        tell(Progress(_own(own, precision, made_for)))
    if (kept := _kept(final, origin, tell)) and not force:
        tell(Progress(f"{final} is already the export of this checkpoint (--force redoes it)"))
        return kept

    graphs = {
        "vision": GraphPlan.of_vision(plan, made_for, vision_precision),
        "decoder": GraphPlan.of_decoder(plan, made_for, precision),
    }
    total = sum(g.bytes for g in graphs.values())
    # a TorchScript graph's weights are there twice while it is written
    twice = max(g.bytes for g in graphs.values()) if backend == "torchscript" else 0
    working = WORKING * (2 if ranged or rounds else 1)
    if rounds:
        from .calibrate import working as rounding

        working += rounding(plan.decoder) + graphs["decoder"].bytes
    _check_space(final, total, twice, precision, made_for, working, tell)
    data = Path(calibration) if calibration else None
    if rounds and data:
        from .calibrate import rounded

        graphs["decoder"].weights = rounded(plan, data, lambda text: tell(Progress(text)))
    if ranged:
        from .calibrate import calibrate
        from .qdq import static_ranges

        ranges = calibrate(plan, data, precision in ("fp8", "int8"), lambda text: tell(Progress(text)))
        for graph, seen in zip(graphs.values(), ranges, strict=True):
            graph.ranges = {**seen, **(static_ranges(graph.weights) if precision == "fp8" else {})}
    writer = Writer(total, tell)
    try:
        with bundles.writing(final) as folder:
            # not its own save(), whose error on a full disk is no OSError
            text = plan.tokenizer.to_str(pretty=True)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
            specs = {key: graph.write(folder, key, writer) for key, graph in graphs.items()}
            if writer.done < total:  # which was an estimate
                tell(Progress("all weights", total, total, time.monotonic() - writer.start))
            tell(Progress("computing checksums"))
            bundles.write(
                folder,
                Bundle(
                    schema=bundles.SCHEMA,
                    name=name,
                    backend=backend,
                    precision=precision,
                    model=_model_spec(plan, family, count, made_for.attention),
                    vision=plan.vision,
                    prompt=plan.prompt,
                    generation=plan.generation,
                    graphs=specs,
                    tokenizer="tokenizer.json",
                    files={},
                    origin=origin,
                ),
                began,
            )
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk became full while writing {final}; nothing was left there") from e
        raise
    tell(Progress(f"wrote {final} ({size_text(total)})"))
    made = bundles.read(final)
    if backend == "torchscript":  # archives are programs: these were made here
        from ..trust import record

        record([made.read_path(spec.path) for spec in made.graphs.values()])
    return made


class StderrProgress:
    """Progress as lines on stderr; bytes as one line that is overwritten where it is a terminal."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._open = False

    def __call__(self, p: Progress) -> None:
        terminal = sys.stderr.isatty()
        if not p.total:
            print(("\n" if self._open else "") + p.text, file=sys.stderr, flush=True)
            self._open = False
            return
        now = time.monotonic()
        if p.done < p.total and now - self._shown < (0.2 if terminal else 10):
            return
        self._shown = now
        line = self.line(p)
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._open = terminal

    def line(self, p: Progress) -> str:
        return (
            f"{p.text[:36]:36} {p.done / p.total:4.0%} of {size_text(p.total)}, {p.rate / 1e6:.0f} MB/s, "
            f"{int(p.left) // 60}:{int(p.left) % 60:02} left"
        )


def _own(own: Scheme, precision: str, made_for: Target) -> str:
    """What becomes of the checkpoint's quantisation."""
    text = f"the checkpoint is quantised: {own.method}, {own.precision}"
    if precision != own.precision:
        return f"{text}; it is dequantised and stored as {precision}"
    if not own.engine and made_for.kind == "engine":
        return f"{text}; it is quantised anew: an engine's int4 is symmetric, in groups of 64 or 128"
    if own.block:
        return f"{text} in blocks of {own.block[0]}×{own.block[1]}; it is quantised anew per output channel"
    return f"{text}; its linear layers are kept"


def _parameters(weights: Mapping[str, Weight]) -> int:
    parts = {(w.checkpoint.path, *part) for w in weights.values() for part in w.parts}
    return sum(math.prod(shape) for _, _, shape in parts)


def _name(checkpoint: str | os.PathLike[str]) -> str:
    path = Path(checkpoint)
    name = path.resolve().name if path.exists() else path.name
    return re.sub(r"[^\w.-]+", "-", name) or "model"


def _folder(name: str, made_for: Target, precision: str) -> str:
    kind = "-linear" if made_for.attention == "linear" else ""
    return f"{name}-{made_for.backend}{kind}-{precision}"


def _calibration(file: str | os.PathLike[str] | None) -> dict[str, str] | None:
    """Which prompts they were: a file's content may change."""
    if file is None:
        return None
    try:
        return {"file": os.fspath(file), "sha256": bundles.sha256(Path(file))}
    except OSError as e:
        raise UserError(f"calibration data {os.fspath(file)} cannot be read: {e.strerror}") from e


def _tools() -> dict[str, str]:
    from importlib import metadata

    tools = {"rtp_llm": __version__, "exporter": EXPORTER}
    for package in ("torch", "triton", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            tools[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return tools


def _kept(final: Path, origin: Origin, tell: Callable[[Progress], None]) -> Bundle | None:
    """The bundle at `final` if it is what this export would make; BundleError if it is no bundle."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    if not bundles.is_bundle(final):
        raise BundleError(f"{final} exists and is no bundle: it is not overwritten, give another --output")
    try:
        there = bundles.read(final)
    except BundleError:
        return None  # damaged or of another schema: export anew
    ours = [(o.fingerprint, o.options, o.tools.get("rtp_llm"), o.tools.get("exporter"))
            for o in (there.origin, origin)]  # fmt: skip
    if ours[0] != ours[1]:
        return None
    if there.backend == "torchscript":
        from ..trust import check

        try:
            check(there, [spec.path for spec in there.graphs.values()])
        except BundleError:  # opening it would be refused, with the advice to make it here
            tell(Progress(f"{final} was not made on this machine, or has changed since: exporting it anew"))
            return None
    return there


def _check_space(
    final: Path,
    total: int,
    twice: int,
    precision: str,
    made_for: Target,
    working: int,
    tell: Callable[[Progress], None],
) -> None:
    import psutil

    folder = final.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free, memory = shutil.disk_usage(folder).free, psutil.virtual_memory()
    need = total + twice + total // 100 + 2**26
    smaller = _smaller(precision, made_for)
    opened = "and more than that of a GPU's memory to run it"
    if made_for.device != "cuda":
        opened = f"about {size_text(total * 3 // 2)} of memory to open it ({size_text(memory.total)} here)"
    tell(Progress(
        f"precision {precision}: {size_text(total)} on disk ({size_text(free)} free), {opened}"
    ))  # fmt: skip
    if need > free:
        raise UserError(f"{folder} has {size_text(free)} free, the export needs {size_text(need)}: "
                        f"give another --output{smaller}")  # fmt: skip
    if memory.available < working:
        raise UserError(
            f"an export needs {size_text(working)} of memory, {size_text(memory.available)} are available"
        )
    if total > memory.total and made_for.kind == "cpu":  # a GPU's bundle may be for another machine
        raise UserError(
            f"{precision} weights take {size_text(total)}, this machine has "
            f"{size_text(memory.total)} of memory{smaller}"
        )


def _smaller(precision: str, made_for: Target) -> str:
    """Advice: the smallest precision of the target, where it is another."""
    least = next((p for p in ("int4", "int8") if p in made_for.precisions), precision)
    return "" if precision == least else f"; or export with --precision {least}"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _model_spec(plan: Plan, family: str, count: int, attention: str) -> ModelSpec:
    from .attention import cache_head_dim

    d = plan.decoder
    return ModelSpec(
        family=family,
        architecture=plan.architecture,
        vocab_size=d.vocab_size,
        hidden_size=d.hidden_size,
        layers=d.layers,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=cache_head_dim(d.head_dim),
        max_seq_len=d.max_seq_len,
        rope=RopeSpec("linear", d.limits),
        attention=attention,
        parameters=count,
    )

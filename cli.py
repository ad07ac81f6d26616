"""The command line: rtp-llm export | verify | inspect | chat | batch | serve | doctor, and what is coming.

Nothing heavy is imported before a command runs. Exit codes: 0, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import NotSupportedYet, RtpLlmError, UserError
from .runtime.server.settings import FIELDS, FLAGS, add_arguments

if TYPE_CHECKING:
    from .export.bundle import Bundle
    from .export.exporter import Progress
    from .model_factory import ModelConfig
    from .pipeline import Pipeline
    from .runtime.batch import Tally

COMING = {
    "build": "compile a bundle's graphs into TensorRT plans for this GPU",
    "tritonserver": "run a bundle in Triton Inference Server",
    "bench": "time to first token, tokens per second, throughput under load",
}
VERDICT = {True: "ok", False: "FAILED", None: "not checked"}  # of a stage of verify
BUNDLE = "bundle folder; or a checkpoint folder or hub id, which is exported into the cache first"


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    top = Parser(
        prog="rtp-llm",
        description="Compile vision-language models into bundles and answer from them.",
        epilog="example:\n  rtp-llm export --model qwen_vl --checkpoint tests/checkpoints/qwen_vl_shapes "
        '--output demo-bundle\n  rtp-llm chat demo-bundle --image photo.jpg "What is this?"',
    )
    top.add_argument("--version", action="version", version=f"rtp-llm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, example: str, prints_facts: bool = False) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}")
        sub.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress and no remarks")
        if prints_facts:
            sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    sub = command(
        "export", "checkpoint → bundle", "rtp-llm export --model qwen_vl --checkpoint Qwen/Qwen-VL-Chat", True
    )
    sub.add_argument("--model", help="family: qwen_vl, llava (default: what the checkpoint says)")
    sub.add_argument("--checkpoint", metavar="PATH", help="folder or hub id (default: CHECKPOINT_PATH, "
                     "then the family's hub id)")  # fmt: skip
    sub.add_argument("--output", metavar="BUNDLE", help="default: ./<name>-<backend>-<precision>")
    sub.add_argument("--backend", default="onnxruntime", help="onnxruntime; coming: torchscript, tensorrt")
    sub.add_argument("--vision-precision", default="fp32", metavar="P", help="of the image encoder [fp32]")
    sub.add_argument("--force", action="store_true", help="export again although the bundle is there")
    _checkpoint_options(sub)

    sub = command("verify", "stage-by-stage parity against the checkpoint's reference",
                  "rtp-llm verify demo-bundle", True)  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("--checkpoint", metavar="PATH", help="default: the one that the bundle's record names")
    _checkpoint_options(sub)

    sub = command("inspect", "what a bundle holds, in one screen", "rtp-llm inspect demo-bundle", True)
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("--hashes", action="store_true", help="check the SHA-256 of every file too")
    _checkpoint_options(sub)

    sub = command("chat", "one answer, or a conversation",
                  'rtp-llm chat demo-bundle --image photo.jpg "What is this?"')  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("prompt", nargs="?", metavar="PROMPT", help="without it: a conversation")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="or URL; repeatable")
    sub.add_argument(
        "--raw", action="store_true", help="PROMPT is the model's raw prompt, image tags included"
    )
    sub.add_argument("--system", metavar="TEXT", help="system message")
    sub.add_argument("--max-new-tokens", type=int, metavar="N")
    sub.add_argument("--temperature", type=float, metavar="T", help="0 = greedy")
    sub.add_argument("--top-p", type=float, metavar="P")
    sub.add_argument("--top-k", type=int, metavar="K")
    sub.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    _checkpoint_options(sub, threads=True)

    sub = command("batch", "many requests from a file; run it again to go on after a break",
                  "rtp-llm batch demo-bundle in.jsonl out.jsonl\n\n"
                  "a line of in.jsonl, config fields at top level or in generate_config:\n"
                  '  {"id": 7, "prompt": "Picture 1:<img/>\\nWhat is this?", "urls": ["photo.jpg"], '
                  '"max_new_tokens": 50}')  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("input", metavar="in.jsonl", type=Path)
    sub.add_argument("output", metavar="out.jsonl", type=Path)
    sub.add_argument("--force", action="store_true", help="begin anew although out.jsonl is there")
    _checkpoint_options(sub, threads=True)

    sub = command("serve", "the HTTP server", "rtp-llm serve demo-bundle --start-port 8088")
    sub.add_argument("bundle", nargs="?", metavar="BUNDLE", help=f"{BUNDLE} (default: CHECKPOINT_PATH)")
    add_arguments(sub)

    command("doctor", "what works on this machine, and how to mend what does not", "rtp-llm doctor", True)
    for name, text in COMING.items():
        sub = command(name, f"(coming) {text}", f"rtp-llm {name} demo-bundle")
    return top


def _checkpoint_options(sub: Parser, threads: bool = False) -> None:
    group = sub.add_argument_group("of a checkpoint")
    group.add_argument("--precision", default="auto", metavar="P",
                       help="fp32, int8, int4, auto (int4 above 2 billion parameters) [auto]")  # fmt: skip
    group.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of the longest sequence")
    group.add_argument("--tokenizer", metavar="PATH", help="folder, if not the checkpoint's")
    group.add_argument("--vision-tower", metavar="PATH", help="folder or hub id, if not the one it names")
    group.add_argument("--conversation", metavar="NAME", help="chat template, if not the one it implies")
    group.add_argument("--revision", metavar="REV", help="of a hub repository")
    if threads:
        sub.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    top = parser()
    args, unknown = top.parse_known_args(argv)
    optional = {"chat": "prompt", "serve": "bundle"}.get(args.command, "")
    if optional and getattr(args, optional) is None and unknown and not unknown[0].startswith("-"):
        setattr(args, optional, unknown.pop(0))  # argparse takes no optional positional after an option
    try:
        if args.command in COMING:
            raise NotSupportedYet(f"`rtp-llm {args.command}` is not supported yet in {__version__}")
        if unknown:
            top.error(f"{args.command}: unknown argument {unknown[0]}")
        return int(globals()[f"_{args.command}"](args))
    except KeyboardInterrupt:
        return _fail(args, 130, "interrupted")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RtpLlmError as e:
        return _fail(args, e.exit_code, str(e))
    except Exception as e:
        return _fail(args, 1, f"{type(e).__name__}: {e} (--debug shows where)")


def _fail(args: argparse.Namespace, code: int, line: str) -> int:
    if args.debug:
        import traceback

        traceback.print_exc()
    print(f"rtp-llm {args.command}: {' '.join(line.split())}", file=sys.stderr)
    return code


def _config(args: argparse.Namespace) -> ModelConfig:
    from .model_factory import ModelConfig

    return ModelConfig(
        ckpt_path=args.bundle,
        tokenizer_path=args.tokenizer,
        act_type=None if args.precision == "auto" else args.precision,
        max_seq_len=args.max_seq_len,
        revision=args.revision,
        vision_tower=args.vision_tower,
        conversation=args.conversation,
        threads=getattr(args, "threads", None),
    )


def _progress(args: argparse.Namespace) -> Callable[[Progress], None]:
    """Of an export: lines on stderr, unless --quiet."""
    from .export.exporter import StderrProgress

    return (lambda _: None) if args.quiet else StderrProgress()


def _bundle(args: argparse.Namespace) -> Bundle:
    from .model_factory import bundle_of

    return bundle_of(args.bundle, _config(args), _progress(args))


def _pipeline(args: argparse.Namespace) -> Pipeline:
    from .model_factory import ModelFactory
    from .pipeline import Pipeline

    return Pipeline(ModelFactory.from_model_config(_config(args), _progress(args)))


# ----------------------------------------------------------------------------------------- commands


def _export(args: argparse.Namespace) -> int:
    from .export.exporter import export
    from .model_factory import MODEL_TYPES

    if args.model is not None and args.model not in MODEL_TYPES:
        raise UserError(f"--model is {args.model!r}, known families are {', '.join(MODEL_TYPES)}")
    checkpoint = args.checkpoint or os.environ.get("CHECKPOINT_PATH") or MODEL_TYPES.get(args.model)
    if not checkpoint:
        raise UserError("give --checkpoint PATH, or --model for the family's own checkpoint")
    bundle = export(
        checkpoint,
        args.output,
        model=args.model,
        backend=args.backend,
        precision=args.precision,
        vision_precision=args.vision_precision,
        max_seq_len=args.max_seq_len,
        vision_tower=args.vision_tower,
        conversation=args.conversation,
        tokenizer=args.tokenizer,
        revision=args.revision,
        force=args.force,
        progress=_progress(args),
    )
    print(json.dumps(facts(bundle)) if args.json else bundle.path)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .export.verify import verify

    report = verify(_bundle(args).path, checkpoint=args.checkpoint)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        print(f"reference: {report.reference}")
        rows: list[Sequence[str]] = [("stage", "", "difference", "cosine", "tolerance", "")]
        for stage in report.stages:
            numbers = (_number(n) for n in (stage.difference, stage.cosine, stage.tolerance))
            rows.append((stage.name, VERDICT[stage.passed], *numbers, stage.note))
        _table(rows)
        print("passed" if report.passed else "FAILED")
    return 0 if report.passed else 1


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 0.99 or abs(value) > 1 else f"{value:.6f}"


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def facts(bundle: Bundle) -> dict[str, Any]:
    """What `export` and `inspect` print with --json: bundle.json, the bundle's place and its size."""
    from .export.bundle import to_json

    size = sum(f.size for f in bundle.files.values())
    return {"path": str(bundle.path), "bytes": size, **to_json(bundle)}


def _inspect(args: argparse.Namespace) -> int:
    from .export.bundle import read

    bundle = _bundle(args)
    if args.hashes:
        read(bundle.path, check_hashes=True)
    if args.json:
        print(json.dumps(facts(bundle)))
        return 0
    m, v, p, g = bundle.model, bundle.vision, bundle.prompt, bundle.generation
    tables = f", {len(m.rope.limits)} tables" if len(m.rope.limits) > 1 else ""
    size = f", resized to {v.resize}" if v.resize else ""
    tags = [*p.image.tags, *(["URL".join(p.image.url_tag)] if p.image.url_tag else [])]
    total = sum(f.size for f in bundle.files.values())
    _table([
        ("bundle", f"{bundle.name} (schema {bundle.schema}), {_size(total)} in {bundle.path}"),
        ("runs on", f"{bundle.backend}, {bundle.precision}"),
        ("model", f"{m.family}, {m.architecture}, {m.parameters:,} parameters"),
        ("decoder", f"{m.layers} layers, width {m.hidden_size}, {m.heads} heads ({m.kv_heads} of keys, "
                    f"{m.head_dim} wide), attention {m.attention}"),
        ("context", f"{m.max_seq_len} tokens, positions {m.rope.positions}{tables}"),
        ("vocabulary", f"{m.vocab_size} rows, {bundle.tokenizer}"),
        ("pictures", f"{v.recipe}{size}, {v.size}×{v.size}, {v.tokens} tokens each, loaded as {v.loading}"),
        ("tags", ", ".join(tags)),
        ("chat", f"{p.chat.name} ({p.chat.kind})"),
        ("ends at", f"ids {g.eos_ids}" + (f", words {g.stop_words}" if g.stop_words else "")),
        ("defaults", ", ".join(f"{k}={v}" for k, v in g.defaults.items()) or "none"),
        ("made from", f"{bundle.origin.checkpoint} ({bundle.origin.fingerprint[:16]})"),
        ("made by", ", ".join(f"{k} {v}" for k, v in bundle.origin.tools.items())),
    ])  # fmt: skip
    for key, graph in bundle.graphs.items():
        print(f"\n{key}: {graph.path}, {graph.precision}")
        for mark, tensors in (("→", graph.inputs), ("←", graph.outputs)):
            for t in tensors[:8]:
                print(f"  {mark} {t.name} {t.dtype} [{', '.join(map(str, t.shape))}]")
            if len(tensors) > 8:
                print(f"  {mark} … {len(tensors) - 8} more, to {tensors[-1].name}")
    print("\nfiles" + (" (hashes are right)" if args.hashes else ""))
    _table([("", name, _size(f.size), f.sha256[:16]) for name, f in bundle.files.items()])
    return 0


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _serve(args: argparse.Namespace) -> int:
    from .start_server import serve

    for f in FIELDS:  # a flag took the BUNDLE behind it for its value
        value = getattr(args, f.name)
        if f.default is False and not args.bundle and value and value.lower() not in FLAGS:
            args.bundle = value
            setattr(args, f.name, "1")
    if args.bundle and args.checkpoint_path:
        raise UserError("BUNDLE and --checkpoint-path are two names of one thing: give one of them")
    args.checkpoint_path = args.bundle or args.checkpoint_path
    return serve(args, quiet=args.quiet)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    checks = examine()
    if args.json:
        print(json.dumps([vars(c) for c in checks]))
    else:
        _table([(c.name, c.status, c.found) for c in checks])
        for c in checks:
            if c.fix and not (args.quiet and c.status != "broken"):
                print(f"\n{c.name}: {c.fix}")
    return 1 if any(c.status == "broken" for c in checks) else 0


def _batch(args: argparse.Namespace) -> int:
    from .runtime.batch import run

    shown = 0.0
    terminal = sys.stderr.isatty()

    def progress(t: Tally) -> None:
        nonlocal shown
        now = time.monotonic()
        if args.quiet or (t.done < t.total and now - shown < (0.2 if terminal else 10)):
            return
        shown = now
        line = f"{t.done} of {t.total}, {t.failed} failed, {t.rate:.2f} a second, {t.left:.0f} s left"
        print(
            f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
        )

    def open_pipeline() -> Pipeline:
        return _pipeline(args)

    try:
        tally = run(open_pipeline, args.input, args.output, force=args.force, progress=progress)
    except KeyboardInterrupt:
        print("\nrtp-llm batch: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if not args.quiet:
        if terminal and shown:
            print(file=sys.stderr)
        before = f" ({tally.before} were there)" if tally.before else ""
        print(f"{tally.done} answers in {args.output}{before}, {tally.failed} failed", file=sys.stderr)
    return 1 if tally.failed else 0


def _chat(args: argparse.Namespace) -> int:
    if args.raw and args.prompt is None:
        raise UserError("--raw needs a PROMPT")
    if args.raw and args.system is not None:
        raise UserError("--system does not go with --raw: write it into the prompt")
    from .talk import Talk, picture

    images = [picture(name) for name in args.image]
    names = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
             "top_k": args.top_k, "random_seed": args.seed}  # fmt: skip
    config = {k: v for k, v in names.items() if v is not None}
    with _pipeline(args) as pipeline:
        talk = Talk(pipeline, config, args.system, args.quiet)
        if args.raw:
            talk.show(pipeline(args.prompt, urls=images, generate_config=config))
            return 0
        talk.images = images
        if args.prompt is not None:
            talk.ask(args.prompt)
            return 0
        return talk.loop()


if __name__ == "__main__":
    sys.exit(main())

"""The command line: rtp-llm export | build | verify | inspect | chat | batch | serve | tritonserver | bench |
doctor.

Nothing heavy is imported before a command runs. Exit codes: 0, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import MissingDependency, RtpLlmError, UserError
from .runtime.server.settings import FIELDS, FLAGS, add_arguments
from .runtime.tritonserver.options import add_flags, options_of

if TYPE_CHECKING:
    from .export.bundle import Bundle
    from .export.graph import Progress
    from .model_factory import ModelConfig
    from .pipeline import Pipeline
    from .runtime.batch import Tally

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
    sub.add_argument("--vision-precision", metavar="P", help="of the image encoder [16 bits of an engine; on "
                     "a CPU int8 beside int4, else fp32]")  # fmt: skip
    sub.add_argument("--calibration", metavar="FILE", help="prompts, JSONL as of rtp-llm batch: to "
                     "round a CPU's int4 for [each weight to its nearest]; to measure the ranges of fp8 and "
                     "int8 engines on [a few of our own]")  # fmt: skip
    sub.add_argument("--force", action="store_true", help="export again although the bundle is there")
    sub.add_argument("--no-build", action="store_true", help="tensorrt: stop before the engines are built")
    _checkpoint_options(sub)
    _build_options(sub.add_argument_group("of the engines (tensorrt, see rtp-llm build)"))

    sub = command("build", "compile a bundle's graphs into TensorRT plans for this GPU",
                  "rtp-llm build demo-bundle --max-batch-size 32 --max-seq-len 4096", True)  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle for tensorrt")
    _build_options(sub)

    sub = command("verify", "stage-by-stage parity against the checkpoint's reference",
                  "rtp-llm verify demo-bundle", True)  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("--checkpoint", metavar="PATH", help="default: the one that the bundle's record names")
    _checkpoint_options(sub, runs=True)

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
    _checkpoint_options(sub, runs=True)

    sub = command("batch", "many requests from a file; run it again to go on after a break",
                  "rtp-llm batch demo-bundle in.jsonl out.jsonl\n\n"
                  "a line of in.jsonl, config fields at top level or in generate_config:\n"
                  '  {"id": 7, "prompt": "Picture 1:<img/>\\nWhat is this?", "urls": ["photo.jpg"], '
                  '"max_new_tokens": 50}')  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    sub.add_argument("input", metavar="in.jsonl", type=Path)
    sub.add_argument("output", metavar="out.jsonl", type=Path)
    sub.add_argument("--force", action="store_true", help="begin anew although out.jsonl is there")
    _checkpoint_options(sub, runs=True)

    sub = command("serve", "the HTTP server", "rtp-llm serve demo-bundle --start-port 8088")
    sub.add_argument("bundle", nargs="?", metavar="BUNDLE", help=f"{BUNDLE} (default: CHECKPOINT_PATH)")
    add_arguments(sub)

    sub = command("tritonserver", "run a bundle in Triton Inference Server",
                  "rtp-llm tritonserver demo-bundle --http-port 8000 -- --log-verbose=1\n\n"
                  "what stands behind -- is for tritonserver itself")  # fmt: skip
    sub.add_argument("bundle", nargs="?", metavar="BUNDLE", help=f"{BUNDLE} (default: CHECKPOINT_PATH)")
    add_flags(sub)

    sub = command("bench", "time to first token, tokens per second, throughput under load",
                  "rtp-llm bench demo-bundle --output bench.json", True)  # fmt: skip
    sub.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    for name, default, help in (
        ("--prompt-tokens", 128, "of text, in each prompt"),
        ("--new-tokens", 64, "of each answer"),
        ("--repeat", 5, "counted runs of each measurement"),
        ("--requests", 32, "of each rate of arrivals"),
    ):
        sub.add_argument(name, type=int, default=default, metavar="N", help=f"{help} [{default}]")
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
                     help="answers that are decoded side by side [1 2 4 8]")  # fmt: skip
    sub.add_argument("--output", type=Path, metavar="FILE.json", help="every run; a plot beside it, FILE.png")
    _checkpoint_options(sub, runs=True)

    command("doctor", "what works on this machine, and how to mend what does not", "rtp-llm doctor", True)
    return top


def _checkpoint_options(sub: Parser, runs: bool = False) -> None:
    group = sub.add_argument_group("of a checkpoint")
    group.add_argument("--backend", metavar="B", help="onnxruntime, torchscript, tensorrt [onnxruntime]")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 [what the bundle was exported for]")
    group.add_argument("--kv-cache", metavar="KIND", help="of tensorrt: paged, linear [paged]")
    group.add_argument("--precision", default="auto", metavar="P",
                       help="CPU: fp32, int8, int4 [int4 above 2 billion parameters]; torchscript: bf16, "
                       "fp16, fp32, int8; tensorrt: bf16, fp16, fp8, int8, int4, fp32 [bf16]; auto: the "
                       "checkpoint's own quantisation, where it has one")  # fmt: skip
    group.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of the longest sequence")
    group.add_argument("--tokenizer", metavar="PATH", help="folder, if not the checkpoint's")
    group.add_argument("--vision-tower", metavar="PATH", help="folder or hub id, if not the one it names")
    group.add_argument("--conversation", metavar="NAME", help="chat template, if not the one it implies")
    group.add_argument("--revision", metavar="REV", help="of a hub repository")
    if runs:
        sub.add_argument("--trust-engines", action="store_true",
                         help="open TorchScript archives and TensorRT plans, which are programs, though they "
                         "were not made on this machine")  # fmt: skip
        sub.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")


def _build_options(sub: argparse._ActionsContainer) -> None:
    """Of `build`; `export` has them too."""
    for name, help in (
        ("--max-batch-size", "sequences of one step [16]"),
        ("--max-input-len", "tokens of one step [2048]"),
        ("--max-images", "pictures of one run of the encoder [4]"),
        ("--opt-level", "0 builds fastest, 5 searches longest [3]"),
    ):
        sub.add_argument(name, type=int, metavar="N", help=help)
    if "--max-seq-len" not in sub._option_string_actions:  # a checkpoint's option too
        sub.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of the longest sequence")
    sub.add_argument("--workspace", metavar="SIZE", help="scratch memory of a kernel, like 2GiB [the GPU's]")
    sub.add_argument("--refit", action="store_true", help="weights can be exchanged in the plan")
    sub.add_argument("--weight-streaming", action="store_true", help="weights can stay in host memory")
    sub.add_argument("--timing-cache", metavar="FILE", help="[one per GPU and TensorRT in the cache folder]")
    sub.add_argument("--vision-compiler", metavar="C", help="tensorrt, torch_tensorrt [tensorrt]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    top = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    after: list[str] = []  # of another program
    if words[:1] == ["tritonserver"] and "--" in words:
        cut = words.index("--")
        words, after = words[:cut], words[cut + 1 :]
    args, unknown = top.parse_known_args(words)
    args.after, args.line = after, shlex.join(["rtp-llm", *words])
    optional = {"chat": "prompt", "serve": "bundle", "tritonserver": "bundle"}.get(args.command, "")
    if optional and getattr(args, optional) is None and unknown and not unknown[0].startswith("-"):
        setattr(args, optional, unknown.pop(0))  # argparse takes no optional positional after an option
    try:
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
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package in ("", __package__):
            return _fail(args, 1, f"{e} (--debug shows where)")
        return _fail(args, 2, f"{args.command} needs {package} here: pip install {package.replace('_', '-')}")
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
        backend=args.backend,
        device=args.device,
        kv_cache=args.kv_cache,
        trust_engines=getattr(args, "trust_engines", False),
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
    given = _build_arguments(args)
    if args.backend != "tensorrt" and (names := [*given, *(["no_build"] * args.no_build)]):
        raise UserError(f"--{names[0].replace('_', '-')} goes with --backend tensorrt only")
    if args.no_build and given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is of the build that --no-build leaves out")
    if args.backend == "tensorrt" and not args.no_build:
        from .build.builder import check

        check(given)  # before the export, which takes longer
    bundle = export(
        checkpoint,
        args.output,
        model=args.model,
        backend=args.backend or "onnxruntime",
        device=args.device,
        kv_cache=args.kv_cache,
        calibration=args.calibration,
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
    if bundle.backend == "tensorrt" and not args.no_build:
        from .errors import MissingDependency
        from .runtime.backends.tensorrt import build_command
        from .trt import gpu, load

        try:
            load(), gpu()
        except (MissingDependency, UserError) as e:
            check(given, bundle)
            if not args.quiet:
                print(f"no engines were built: {e}; there: {build_command(bundle, **given)}", file=sys.stderr)
        else:
            if args.max_seq_len is not None:
                given["max_seq_len"] = args.max_seq_len
            if not _has_engines(bundle, given):
                bundle = _built(args, bundle.path)
            elif not args.quiet:
                print("its engines are kept; anew: " + build_command(bundle), file=sys.stderr)
    print(json.dumps(facts(bundle)) if args.json else bundle.path)
    return 0


def _has_engines(bundle: Bundle, given: dict[str, Any]) -> bool:
    """Engines that open on this machine, and were built with these arguments of the build."""
    from .build.builder import built_with
    from .errors import BundleError
    from .runtime.backends.tensorrt import check_engines
    from .trust import check

    try:
        check_engines(bundle)
        check(bundle, [spec.path for spec in bundle.engines.values()])
    except BundleError:
        return False
    return built_with(bundle, given)


def _build(args: argparse.Namespace) -> int:
    bundle = _built(args, Path(args.bundle))
    print(json.dumps(facts(bundle)) if args.json else bundle.path)
    return 0


def _build_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those of builder.build that were given."""
    names = ("max_batch_size", "max_input_len", "max_images", "opt_level", "workspace", "refit",
             "weight_streaming", "timing_cache", "vision_compiler")  # fmt: skip
    # 0 is a value, and equal to False
    given = {n: value for n in names if (value := getattr(args, n)) is not None and value is not False}
    if "workspace" in given:
        given["workspace"] = _bytes("--workspace", given["workspace"])
    return given


def _built(args: argparse.Namespace, path: Path) -> Bundle:
    from .build.builder import build
    from .build.progress import StderrProgress

    given = _build_arguments(args)
    if args.max_seq_len is not None:
        given["max_seq_len"] = args.max_seq_len
    return build(path, **given, progress=None if args.quiet else StderrProgress())


def _bytes(flag: str, text: str) -> int:
    from .runtime.server.settings import _size

    try:
        return _size(text)
    except (ValueError, KeyError, OverflowError) as e:
        raise UserError(f"{flag}={text!r} must be a size like 2GiB") from e


def _verify(args: argparse.Namespace) -> int:
    from .export.verify import verify
    from .runtime.backends import Options

    run = Options(slots=1, device=args.device, trust_engines=args.trust_engines, threads=args.threads)
    report = verify(_bundle(args).path, checkpoint=args.checkpoint, run=run)
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
    device = " on a GPU" if bundle.backend == "onnxruntime" and m.attention != "gqa" else ""
    calibration = bundle.origin.options.get("calibration")
    _table([
        ("bundle", f"{bundle.name} (schema {bundle.schema}), {_size(total)} in {bundle.path}"),
        ("runs on", f"{bundle.backend}{device}, {bundle.precision}"),
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
        *([("calibrated", f"{calibration['file']} ({calibration['sha256'][:16]})")] if calibration else []),
        ("made by", ", ".join(f"{k} {v}" for k, v in bundle.origin.tools.items())),
    ])  # fmt: skip
    for key, graph in bundle.graphs.items():
        print(f"\n{key}: {graph.path}, {graph.precision}")
        for mark, tensors in (("→", graph.inputs), ("←", graph.outputs)):
            for t in tensors[:8]:
                print(f"  {mark} {t.name} {t.dtype} [{', '.join(map(str, t.shape))}]")
            if len(tensors) > 8:
                print(f"  {mark} … {len(tensors) - 8} more, to {tensors[-1].name}")
    if bundle.backend == "tensorrt" and not bundle.engines:
        print(f"\nengines: none yet: rtp-llm build {bundle.path}")
    for key, engine in bundle.engines.items():
        plugin = f", attention plugin {engine.plugin}" if engine.plugin else ""
        print(f"\n{key} engine: {engine.path}, for {engine.gpu} (compute capability "
              f"{engine.compute_capability}) and TensorRT {engine.tensorrt}{plugin}")  # fmt: skip
        built = engine.limits | engine.options
        print("  " + ", ".join(f"{name} {value}" for name, value in built.items()))
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

    _find_bundle(args)
    if args.bundle and args.checkpoint_path:
        raise UserError("BUNDLE and --checkpoint-path are two names of one thing: give one of them")
    args.checkpoint_path = args.bundle or args.checkpoint_path
    return serve(args, quiet=args.quiet)


def _find_bundle(args: argparse.Namespace) -> None:
    """A flag of a setting took the BUNDLE behind it for its value."""
    for f in FIELDS:
        value = getattr(args, f.name, None)
        if f.default is False and not args.bundle and value and value.lower() not in FLAGS:
            args.bundle = value
            setattr(args, f.name, "1")


def _tritonserver(args: argparse.Namespace) -> int:
    from .export.bundle import is_bundle
    from .model_factory import bundle_of
    from .runtime.tritonserver import binary, command

    if args.check:
        if args.yes:
            binary.find(fetch=True)
        parts = binary.examine()
        _table([(p.name, "ok" if p.there else "missing" if p.needed else "note", p.found) for p in parts])
        for p in parts:
            if p.fix:
                print(f"\n{p.name}: {p.fix}")
        return 0 if all(p.there or not p.needed for p in parts) else 1
    _find_bundle(args)
    options = options_of(args, args.after)
    path = args.bundle or os.environ.get("CHECKPOINT_PATH")
    if not path:
        raise UserError("give a BUNDLE, or CHECKPOINT_PATH")
    if not os.path.exists(path) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(f"{path} does not exist: give a folder or a hub id (owner/name)")

    def ask(question: str) -> bool:
        if args.yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return bool(args.yes)
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def open_bundle() -> Bundle:
        return bundle_of(path, options.settings.model_config(), _progress(args))

    # a bundle is looked at before Triton is; a checkpoint is exported when everything else is right
    bundle = open_bundle() if is_bundle(path) else None
    return command.run(options, lambda: bundle or open_bundle(), ask, args.quiet)


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


def _bench(args: argparse.Namespace) -> int:
    from .bench import Settings, measure, plot, tables

    if args.output and (args.output.suffix != ".json" or not args.output.absolute().parent.is_dir()):
        raise UserError(f"--output {args.output} must be a .json file in a folder that exists")
    settings = Settings(args.prompt_tokens, args.new_tokens, args.batch, args.repeat, args.requests)

    def tell(text: str) -> None:
        if not args.quiet:
            print(f"measuring {text}", file=sys.stderr, flush=True)

    report = {"command": args.line, **measure(_bundle(args), _config(args), settings, tell)}
    if args.json:
        print(json.dumps(report))
    else:
        for rows in tables(report):
            _table(rows)
            print()
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        try:
            plot(report, args.output.with_suffix(".png"))
        except MissingDependency as e:
            print(f"rtp-llm bench: {e}", file=sys.stderr)
    return 0


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

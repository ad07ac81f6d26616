"""The flags of `rtp-llm tritonserver`, checked before anything is opened. Imports nothing heavy."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ..server.settings import FIELDS, Settings, add_arguments, from_args

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
# settings that Triton has no use for; those of FRONT are of the HTTP server that --openai-port puts there
LEFT_OUT = ("checkpoint_path", "start_port", "ft_server_test")
FRONT = (
    "api_key",
    "allowed_hosts",
    "served_model_name",
    "max_connections",
    "header_seconds",
    "body_seconds",
    "write_seconds",
    "keep_alive_seconds",
)  # fmt: skip
OWN = ("host", "insecure")
# what an export was told: the bundle knows it
EXPORT = ("model_type", "tokenizer_path", "act_type", "quantization", "backend", "kv_cache", "chat_template")
SECRET = ("download_headers", "media_proxy")  # any client may read a model's config.pbtxt
FIXED = {  # flags of tritonserver that ours take the place of
    **{f"--{name}-port": f"--{name}-port" for name in PORTS},
    **{f"--{name}-address": "--host" for name in PORTS},
    "--exit-timeout-secs": "--drain-seconds",
    "--allow-http": "",
    "--rate-limit": "",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command, in groups."""
    parser.add_argument("--check", action="store_true", help="what is there to run it, and what is missing")
    parser.add_argument("-y", "--yes", action="store_true",
                        help="download Triton without asking, if it is not here")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="only assemble the model repository there")
    parser.add_argument("--force", action="store_true", help="replace DIR although it holds something else")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", metavar="PORT", help=f"0: any free one [{port}]")
    parser.add_argument(
        "--openai-port", metavar="PORT", help="our own HTTP server too, in front, with OpenAI's API"
    )
    parser.add_argument("--vision", metavar="WHERE", default="in-process",
                        help="pictures are encoded in-process, by a model of their own (separate), or by the "
                        "Triton at HOST:PORT (gRPC); only: that model alone [in-process]")  # fmt: skip
    parser.add_argument("--vision-instances", metavar="N", help="of that model [1]")
    parser.add_argument(
        "--log", metavar="FILE", help="what Triton prints; -: stderr [a file of the state folder]"
    )
    fields = [f for f in FIELDS if f.name not in LEFT_OUT]
    add_arguments(parser.add_argument_group("of the models"), [f for f in fields if f.name not in FRONT])
    add_arguments(parser.add_argument_group("of --openai-port"), [f for f in fields if f.name in FRONT])


@dataclasses.dataclass(frozen=True)
class Options:
    """All flags, checked."""

    settings: Settings
    given: dict[str, str]  # settings that were given, by flag or environment
    output: Path | None
    force: bool
    ports: dict[str, int]
    openai_port: int | None
    vision: str
    vision_instances: int
    log: Path | None
    echo: bool
    extra: list[str]  # for tritonserver


def options_of(
    args: argparse.Namespace, extra: Sequence[str], env: Mapping[str, str] = os.environ
) -> Options:
    """Raises UserError naming the flag or the variable, before anything is opened."""
    offered = [f for f in FIELDS if f.name not in LEFT_OUT]
    env = {name: env[name] for f in offered if f.metadata["env"] and (name := f.name.upper()) in env}
    flags = {f.name: value for f in offered if (value := getattr(args, f.name, None)) is not None}
    if not args.openai_port:
        if alone := [name for name in FRONT if name in flags]:
            raise UserError(
                f"--{alone[0].replace('_', '-')} goes with --openai-port: Triton itself has no such thing"
            )
        env = {name: value for name, value in env.items() if name.lower() not in FRONT}
    host = flags.get("host") or env.get("HOST") or "127.0.0.1"
    insecure = from_args(argparse.Namespace(insecure=flags.get("insecure")), {}).insecure
    settings = from_args(argparse.Namespace(**{**flags, "host": host, "insecure": "1"}), env)
    if not settings.loopback and not insecure:
        raise UserError(
            f"HOST={host!r} is reachable from other machines, and Triton asks nobody for a key: pass "
            "--insecure where only those reach it who may"
        )
    given = {name.lower(): value for name, value in env.items() if value} | flags
    given = {name: value for name, value in given.items() if name not in (*FRONT, *OWN, *EXPORT)}
    if "allowed_local_media_path" in given:  # the server may be started elsewhere
        given["allowed_local_media_path"] = str(settings.allowed_local_media_path)

    named = {name: getattr(args, f"{name}_port") for name in PORTS}
    ports = {name: _port(f"--{name}-port", value, PORTS[name]) for name, value in named.items()}
    front = None if args.openai_port is None else _port("--openai-port", args.openai_port, 0)
    taken: dict[int, str] = {}
    for name, port in {**ports, "openai": front or 0}.items():
        if port and (other := taken.setdefault(port, name)) != name:
            raise UserError(f"--{name}-port and --{other}-port are both {port}: give them different ports")
    if args.vision not in ("in-process", "separate", "only") and not _address(args.vision):
        raise UserError(f"--vision={args.vision!r} must be in-process, separate, only or HOST:PORT")
    if args.openai_port is not None and args.vision == "only":
        raise UserError("--openai-port needs the language model, which --vision only leaves out")
    instances = args.vision_instances
    if instances is not None and args.vision not in ("separate", "only"):
        raise UserError("--vision-instances goes with --vision separate or --vision only")
    if instances is not None and not (instances.isdecimal() and 1 <= int(instances) <= 64):
        raise UserError(f"--vision-instances={instances!r} must be a number, 1 to 64")
    if args.output is not None:
        running = {"log": args.log, "openai-port": args.openai_port, "host": flags.get("host")}
        running |= {f"{name}-port": value for name, value in named.items()}
        if alone := [name for name, value in running.items() if value is not None]:
            raise UserError(f"--{alone[0]} is of a server that runs, --output only assembles: leave one out")
        if extra:
            raise UserError(f"-- {extra[0]} is for a server that runs, --output only assembles")
        if alone := [name for name in SECRET if name in flags]:
            raise UserError(
                f"--{alone[0].replace('_', '-')} may hold a secret, and clients see what --output writes: "
                f"set {alone[0].upper()} where tritonserver is started"
            )
    elif args.force:
        raise UserError("--force goes with --output")
    for word in extra:
        flag = word.partition("=")[0]
        if flag in FIXED:
            own = FIXED[flag]
            raise UserError(
                f"-- {flag}: give {own} instead, before the --" if own else f"-- {flag} is set already"
            )
    log = None if args.log in (None, "-") else Path(args.log)
    if log and (log.is_dir() or not log.absolute().parent.is_dir()):
        raise UserError(f"--log={args.log!r} must be a file in a folder that exists, or -")
    return Options(
        settings=settings, given=given, output=None if args.output is None else Path(args.output),
        force=args.force, ports=ports, openai_port=front, vision=args.vision,
        vision_instances=int(instances or 1), log=log, echo=args.log == "-" or args.debug, extra=list(extra),
    )  # fmt: skip


def _port(name: str, value: str | None, default: int) -> int:
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and int(value) <= 65535):
        raise UserError(f"{name}={value!r} must be a port, 0 to 65535")
    return int(value)


def _address(text: str) -> bool:
    found = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", text)
    return bool(found) and 0 < int(text.rpartition(":")[2]) <= 65535

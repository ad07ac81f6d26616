"""What a server is told: environment names and flags (the flag wins) → one checked Settings."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from ...model_factory import ModelConfig
    from ..media import MediaPolicy

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
FLAGS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False, "": False}
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _count(low: int, high: float = float("inf")) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    return read


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e6:
        raise ValueError
    return number


def _size(text: str) -> int:
    """Bytes: 2147483648, 2G, 2GB, 2GiB (units are powers of 1024)."""
    short = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = short[-1:] if short[-1:] in UNITS else ""
    return _count(1)(str(int(float(short.removesuffix(unit)) * UNITS[unit])))


def _flag(text: str) -> bool:
    return FLAGS[text.strip().lower()]


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _networks(text: str) -> tuple[str, ...]:
    for cidr in (found := _list(text)):
        ipaddress.ip_network(cidr, strict=False)
    return found


def _headers(text: str) -> dict[str, str]:
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError
    return found


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError
    return str(Path(text).resolve())


def _setting(
    default: Any, read: Callable[[str], Any], right: str, text: str, env: bool = True
) -> Any:
    """`read` turns a string into the value or raises; `right` says what it must be; `text` is the help."""
    return dataclasses.field(
        default=default, metadata={"read": read, "right": right, "help": text, "env": env}
    )


def _text(default: str | None, text: str) -> Any:
    return _setting(default, str, "a string", text)


@dataclass(frozen=True)
class Settings:
    """Each field is an environment name in capitals and a flag: `start_port`, START_PORT, --start_port."""

    model_type: str | None = _text(None, "the family: qwen_vl, llava [what the checkpoint says]")
    checkpoint_path: str | None = _text(None, "checkpoint folder, hub id or bundle folder")
    tokenizer_path: str | None = _text(None, "tokenizer folder, if not the checkpoint's")
    act_type: str | None = _text(None, "precision of the weights, like fp32")
    quantization: str | None = _text(None, "int8, int4 or fp8 (tensorrt); wins over act_type")
    backend: str | None = _text(None, "onnxruntime, torchscript, tensorrt [what the bundle is for]")
    device: str | None = _text(None, "cpu, cuda, cuda:1 [what the bundle is for]")
    kv_cache: str | None = _text(None, "of tensorrt: paged, linear [what the bundle is for]")
    trust_engines: bool = _setting(
        False, _flag, "1 or 0", "open archives and plans, which are programs, of other machines", env=False
    )
    max_seq_len: int | None = _setting(
        None, _count(1), "a number of tokens", "tokens of the longest sequence"
    )
    chat_template: str | None = _text(None, "name of the conversation template, if not the implied one")
    served_model_name: str | None = _text(None, "name in /v1/models and in answers [the bundle's]")
    reuse_cache: bool = _setting(
        True, _flag, "1 or 0", "0: requests share no cached prompts, unless they ask to [1]"
    )
    deterministic: bool = _setting(
        False, _flag, "1 or 0", "answers never depend on the batch, int4 included [0]"
    )
    speculation: bool = _setting(
        False, _flag, "1 or 0", "requests may ask for speculative decoding; others are a little slower [0]"
    )
    memory_limit: int | None = _setting(
        None, _size, "a size like 8GiB", "memory the whole server may take; refused when it cannot do"
    )
    kv_cache_bytes: int | None = _setting(
        None, _size, "a size like 2GiB", "of keys and values [a quarter of the free memory]"
    )
    weight_budget: int | None = _setting(
        None, _size, "a size like 8GiB", "weights kept on the GPU, of engines built with --weight-streaming"
    )
    image_cache_bytes: int = _setting(2**28, _size, "a size like 256MiB", "of encoded pictures [256MiB]")

    host: str = _text("127.0.0.1", "address to listen on [127.0.0.1]")
    start_port: int = _setting(
        8088, _count(0, 65535), "a port, 0 to 65535", "port to listen on; 0: any free one [8088]"
    )
    api_key: tuple[str, ...] = _setting(
        (), _list, "keys", "key that clients must send as `Authorization: Bearer KEY`; several: with commas"
    )
    insecure: bool = _setting(
        False, _flag, "1 or 0", "listen beyond this machine without an API key", env=False
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), _list, "host names", "names besides localhost that requests may be sent to, with commas; * any"
    )
    concurrency_limit: int = _setting(
        128, _count(1), "a number ≥ 1", "answers in work at the same time; more are told 429 [128]"
    )
    max_connections: int = _setting(1024, _count(1), "a number ≥ 1", "open connections [1024]")
    max_body_bytes: int = _setting(64 << 20, _size, "a size like 64MiB", "of one request's body [64MiB]")
    max_images: int = _setting(16, _count(0), "a number ≥ 0", "pictures of one request [16]")
    max_pixels: int = _setting(
        50_000_000, _count(1), "a number of pixels", "of one picture, as sent [50000000]"
    )
    header_seconds: float = _setting(15.0, _seconds, "seconds", "for a request's headers to arrive [15]")
    body_seconds: float = _setting(60.0, _seconds, "seconds", "for a request's body to arrive [60]")
    write_seconds: float = _setting(
        60.0, _seconds, "seconds", "that a client may leave its answer unread before it is cut off [60]"
    )
    keep_alive_seconds: float = _setting(
        30.0, _seconds, "seconds", "that an idle connection stays open [30]"
    )
    drain_seconds: float = _setting(
        30.0, _seconds, "seconds", "for running requests to finish after SIGTERM [30]"
    )
    allow_image_embeds: bool = _setting(
        False, _flag, "1 or 0", "1: Triton's vlm takes encoded pictures, which nobody can check [0]"
    )
    json_logs: bool = _setting(True, _flag, "1 or 0", "one JSON object a line; 0: for people [1]")

    allowed_local_media_path: str | None = _setting(
        None, _folder, "a folder that exists", "folder below which `image_url` may name files [none]"
    )
    allowed_media_domains: tuple[str, ...] | None = _setting(
        None, _list, "host names", "hosts that pictures may come from, with commas, like *.example.com [all]"
    )
    allowed_media_cidrs: tuple[str, ...] = _setting(
        (), _networks, "networks like 10.1.0.0/16", "private networks that allowed domains may lie in"
    )
    media_proxy: str | None = _text(None, "http://host:port through which pictures are fetched")
    download_headers: dict[str, str] | None = _setting(
        None, _headers, 'a JSON object of strings like {"Referer": "x"}', "sent when fetching pictures (JSON)"
    )
    ft_server_test: bool = _setting(
        False, _flag, "1 or 0", "1: files of the working directory may be named as pictures, on loopback only"
    )

    def __post_init__(self) -> None:
        if not (self.loopback or self.api_key or self.insecure):
            raise UserError(
                f"HOST={self.host!r} is reachable from other machines: set API_KEY, or pass --insecure"
            )
        if self.ft_server_test and not self.loopback:
            raise UserError(
                f"FT_SERVER_TEST=1 opens files to clients, so HOST must be 127.0.0.1, not {self.host!r}"
            )
        if self.allowed_media_cidrs and not self.allowed_media_domains:
            raise UserError(
                "ALLOWED_MEDIA_CIDRS opens private networks to named hosts only: "
                "set ALLOWED_MEDIA_DOMAINS too"
            )
        if bad := [key for key in self.api_key if not key.isascii() or not key.isprintable()]:
            raise UserError(f"API_KEY number {self.api_key.index(bad[0]) + 1} must be of ASCII characters")
        try:
            self.media_policy()
        except UserError as e:  # it knows its own fields' names
            names = {"allowed_domains": "ALLOWED_MEDIA_DOMAINS", "headers": "DOWNLOAD_HEADERS",
                     "max_pixels": "MAX_PIXELS", "proxy": "MEDIA_PROXY"}  # fmt: skip
            words = re.split(r"(\w+)", str(e))
            raise UserError("".join(names.get(word, word) for word in words)) from e

    @property
    def loopback(self) -> bool:
        """Is the server reachable from this machine only?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def media_policy(self) -> MediaPolicy:
        """What clients may make this server fetch: the public internet, and what is allowed above."""
        from ..media import WEB_FORMATS, MediaPolicy

        local: bool | str = self.allowed_local_media_path or (os.getcwd() if self.ft_server_test else False)
        return MediaPolicy(
            allow_local=local,
            allowed_domains=self.allowed_media_domains,
            allow_private=False,
            allowed_cidrs=self.allowed_media_cidrs,
            formats=WEB_FORMATS,
            max_bytes=20 << 20,
            timeout=10,
            max_pixels=self.max_pixels,
            headers=self.download_headers or {},
            proxy=self.media_proxy,
        )

    def model_config(self) -> ModelConfig:
        from ...model_factory import ModelConfig

        return ModelConfig(
            model_type=self.model_type,
            ckpt_path=self.checkpoint_path,
            tokenizer_path=self.tokenizer_path,
            act_type=self.act_type,
            quantization=self.quantization,
            backend=self.backend,
            device=self.device,
            kv_cache=self.kv_cache,
            trust_engines=self.trust_engines,
            weight_budget=self.weight_budget,
            max_seq_len=self.max_seq_len,
            conversation=self.chat_template,
            kv_cache_bytes=self.kv_cache_bytes,
            image_cache_bytes=self.image_cache_bytes,
            deterministic=self.deterministic,
            speculation=self.speculation,
        )


FIELDS = dataclasses.fields(Settings)


def add_arguments(
    parser: argparse._ActionsContainer, fields: Iterable[dataclasses.Field[Any]] = FIELDS
) -> None:
    """A flag per setting, spelled as its environment name is or with dashes."""
    for f in fields:
        names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        if f.name == "checkpoint_path":  # as `rtp-llm export` spells it
            names["--checkpoint"] = None
        if f.name == "act_type":
            names["--precision"] = None
        how: dict[str, Any] = {"metavar": "0|1" if f.default is True else "VALUE"}
        if f.default is False:
            how = {"metavar": "0|1", "nargs": "?", "const": "1"}
        text = f.metadata["help"] + (f"; environment: {f.name.upper()}" if f.metadata["env"] else "")
        parser.add_argument(*names, dest=f.name, help=text.replace("%", "%%"), **how)


def from_args(args: argparse.Namespace, env: Mapping[str, str] | None = None) -> Settings:
    """Flags over environment over defaults. Raises UserError naming the flag or the variable."""
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    for f in FIELDS:
        given, name = getattr(args, f.name, None), f"--{f.name.replace('_', '-')}"
        if given is None and f.metadata["env"]:
            given, name = env.get(f.name.upper()) or None, f.name.upper()
        if given is None:
            continue
        try:
            values[f.name] = f.metadata["read"](given)
        except (ValueError, KeyError, OverflowError) as e:
            shown = "…" if f.name == "download_headers" else repr(given)  # it may hold a secret
            raise UserError(f"{name}={shown} must be {f.metadata['right']}") from e
    return Settings(**values)

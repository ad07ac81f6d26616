"""The bundle: the only thing that export hands on to build and runtime.

A bundle is a folder: `bundle.json` (everything below, as JSON), `tokenizer.json`, and the graphs with
their external weights. Whoever holds it needs no checkpoint, no family code and no network.
This module imports nothing heavy: the runtime and `--help` load it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError

SCHEMA = 1
MANIFEST = "bundle.json"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str  # numpy's name: "int64", "float32", "uint8"
    shape: list[int | str]  # a string names a dynamic dimension


@dataclass(frozen=True)
class GraphSpec:
    path: str  # inside the bundle, of the .onnx (or .pt, .plan) file
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: str  # of its weights: fp32, int8, int4, …


@dataclass(frozen=True)
class RopeSpec:
    """How the runtime gives positions to the decoder.

    The decoder graph holds `len(limits)` stacked cos/sin tables of `max_seq_len` rows each; a sequence
    uses table t for life, where t is the first with `prompt length <= limits[t]`. One entry
    (max_seq_len) means a rope that does not depend on the prompt's length. More than one is
    Qwen-VL's dynamic NTK.
    """

    positions: str  # "linear"; "mrope" is coming
    limits: list[int]

    def table(self, prompt_len: int) -> int:
        """The table of a sequence with a prompt of that many tokens; the last one for a longer prompt."""
        return next((i for i, n in enumerate(self.limits) if prompt_len <= n), len(self.limits) - 1)


@dataclass(frozen=True)
class ModelSpec:
    family: str  # row of the family table: "qwen_vl", "llava", …
    architecture: str  # as config.json writes it
    vocab_size: int  # rows of the embedding table; ids from here on select image rows in a step
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # as stored in the caches: zero-padded to a multiple of 16 where needed
    max_seq_len: int
    rope: RopeSpec
    attention: str  # lowering of the decoder graph: "gqa", "paged", "linear"
    parameters: int  # of the checkpoint, for information


@dataclass(frozen=True)
class VisionSpec:
    """The image recipe: what preprocess.py does before the vision graph sees uint8 pixels.

    recipe
        "square": resize to size×size without keeping the aspect (Qwen-VL).
        "crop": shortest side to `resize`, then centre crop to size×size (CLIP's processor).
        "pad": square canvas of colour `fill`, then as "crop" (LLaVA-1.5).
    loading
        "pillow": convert("RGB"), alpha dropped, no EXIF (original code bases);
        "transformers": EXIF applied and alpha dropped for paths, URLs and bytes; PIL objects as
        transformers 5 does: alpha on white, no EXIF.
    """

    recipe: str
    size: int
    tokens: int  # rows that one image becomes
    hidden_size: int  # of each row
    loading: str = "pillow"
    resize: int = 0
    fill: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ImageRules:
    """How images stand in a prompt."""

    tags: list[str]  # literal tags whose image comes from `urls`, in order: ["<img/>"], ["<image>"]
    url_tag: list[str]  # ["<img>", "</img>"]: the tag itself names the image; [] where there is none
    token_id: int  # stands in every image slot of input_ids; -200, or an id ≥ vocab_size, or a token's
    prefix_ids: list[int]  # ids before the slots of each image: [<img>]
    suffix_ids: list[int]  # and after them: [</img>]
    inline: bool  # True: tags are tokens of the tokenizer, the whole text is tokenised at once (-hf);
    # False: text is cut at the tags, each chunk tokenised by itself, bos only first


@dataclass(frozen=True)
class Piece:
    text: str  # literal template text; "{content}" alone is the turn's content
    special: bool = False  # True: control tokens in it are parsed (only ever for template text)


@dataclass(frozen=True)
class ChatRules:
    """How a message list becomes a prompt.

    kind "pieces": each turn is `turns[role]`, a list of pieces that are tokenised apart and joined
    (Qwen-VL). kind "jinja": `template` renders the messages to text that is tokenised as one raw
    prompt, typed text staying literal. It sees `messages` (OpenAI's, whose contents are lists of parts
    where `parts` is True, else strings with the images first), `system` (the caller's, or the default),
    `turns` (the messages without it), `add_generation_prompt` and the strings of `tokens`.
    """

    kind: str
    name: str  # "chatml", "llava_v1", …
    turns: dict[str, list[Piece]] = field(default_factory=dict)
    generation: list[Piece] = field(default_factory=list)  # the open assistant turn
    system: str | None = None  # default system text
    image: str = ""  # how an image part is written: "Picture {n}:{image}\n", "{image}\n"
    template: str = ""
    parts: bool = False
    tokens: dict[str, str] = field(default_factory=dict)  # {"bos_token": "<s>", …}
    history_tokens: int = 0  # newest turns while their sum stays strictly below; 0 = all


@dataclass(frozen=True)
class PromptRules:
    bos_ids: list[int]  # before every raw prompt and chat
    nfc: bool  # normalise text to NFC before anything else
    image: ImageRules
    chat: ChatRules


@dataclass(frozen=True)
class GenerationSpec:
    eos_ids: list[int]  # generation ends at any of them
    stop_words: list[str]  # and at any of these strings
    defaults: dict[str, Any]  # generate_config fields from generation_config.json


@dataclass(frozen=True)
class FileSpec:
    size: int
    sha256: str


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT plan that `rtp-llm build` made of a graph: it runs on this GPU and version alone."""

    path: str  # inside the bundle
    gpu: str  # name
    compute_capability: str  # "9.0"
    tensorrt: str  # "10.15.1.29"
    plugin: str  # version of the attention plugin inside; "" where there is none
    limits: dict[str, int]  # that it was built for, of build/builder.py
    options: dict[str, Any] = field(default_factory=dict)  # of the build, where they are not the default


@dataclass(frozen=True)
class Origin:
    checkpoint: str  # path or hub id, for `verify`
    fingerprint: str
    options: dict[str, Any]  # of the export
    tools: dict[str, str]  # name → version
    seconds: float | None = None  # that the export took; None: made before that was recorded


@dataclass(frozen=True)
class Bundle:
    schema: int
    name: str
    backend: str  # "onnxruntime", "torchscript", "tensorrt"
    precision: str
    model: ModelSpec
    vision: VisionSpec
    prompt: PromptRules
    generation: GenerationSpec
    graphs: dict[str, GraphSpec]  # "vision", "decoder"
    tokenizer: str  # file name
    files: dict[str, FileSpec]  # every file but bundle.json
    origin: Origin
    engines: dict[str, EngineSpec] = field(default_factory=dict)  # "vision", "decoder": plans of the graphs
    path: Path = Path()  # set by `read`; not written

    def read_path(self, name: str) -> Path:
        """Absolute path of a file of the bundle."""
        return self.path / name


def _decode(cls: Any, value: Any, where: str) -> Any:
    """JSON value → `cls`, checking every field; raises BundleError naming the field."""
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if cls is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _decode(option, value, where)
            except BundleError:
                continue
        raise BundleError(f"{MANIFEST}: {where} is {value!r}, expected {cls}")
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, dict):
            raise BundleError(f"{MANIFEST}: {where} is {value!r}, expected an object")
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "path" or cls is not Bundle}
        if unknown := sorted(set(value) - set(fields)):
            raise BundleError(f"{MANIFEST}: unknown field {where}.{unknown[0]}")
        kwargs = {}
        for name, f in fields.items():
            if name in value:
                kwargs[name] = _decode(hints[name], value[name], f"{where}.{name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleError(f"{MANIFEST}: {where}.{name} is missing")
        made: Any = cls
        return made(**kwargs)
    if origin is list:
        if not isinstance(value, list):
            raise BundleError(f"{MANIFEST}: {where} is {value!r}, expected a list")
        return [_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{MANIFEST}: {where} is {value!r}, expected an object")
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if cls is type(None):
        if value is None:
            return None
    elif isinstance(value, cls) and not (cls is int and isinstance(value, bool)):
        return value
    raise BundleError(f"{MANIFEST}: {where} is {value!r}, expected {getattr(cls, '__name__', cls)}")


def is_bundle(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / MANIFEST).is_file()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read(path: str | os.PathLike[str], check_hashes: bool = False) -> Bundle:
    """Open a bundle: schema, presence and size of each file; hashes on request.

    Raises BundleError with one line that names what is wrong.
    """
    root = Path(path).resolve()
    manifest = root / MANIFEST
    if not root.exists():
        raise BundleError(f"{path} is not a bundle: it does not exist")
    if not manifest.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{manifest} is not valid JSON: {e}") from e
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int):
        raise BundleError(f"{manifest}: schema is {schema!r}, expected {SCHEMA}")
    if schema > SCHEMA:
        raise BundleError(
            f"{path} has bundle schema {schema}, this version reads up to {SCHEMA}: "
            "upgrade rtp_llm, or export the checkpoint again with this version"
        )
    if schema < SCHEMA:
        raise BundleError(f"{path} has bundle schema {schema}, expected {SCHEMA}: export it again")
    bundle = _decode(Bundle, data, "bundle")
    for name, spec in bundle.files.items():
        try:
            file = (root / name).resolve()
            there = file.is_file()
        except (OSError, ValueError) as e:  # too long, or with a NUL
            raise BundleError(f"{MANIFEST}: file {name[:80]!r} is no file name") from e
        if not file.is_relative_to(root):
            raise BundleError(f"{MANIFEST}: file {name!r} lies outside the bundle")
        if not there:
            raise BundleError(f"{path}: file {name} is missing; export the checkpoint again")
        if file.stat().st_size != spec.size:
            raise BundleError(
                f"{path}: file {name} has {file.stat().st_size} bytes, expected {spec.size}: "
                "the bundle is corrupted, export it again with --force"
            )
        if check_hashes and (found := sha256(file)) != spec.sha256:
            raise BundleError(f"{path}: file {name} has SHA-256 {found}, expected {spec.sha256}")
    parts = [*bundle.graphs.values(), *bundle.engines.values()]
    for name in [bundle.tokenizer, *(part.path for part in parts)]:
        if name not in bundle.files:
            raise BundleError(f"{MANIFEST}: {name!r} is used but not listed in files")
    return dataclasses.replace(bundle, path=root)


def to_json(bundle: Bundle) -> dict[str, Any]:
    data = dataclasses.asdict(bundle)
    del data["path"]
    return data


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh folder beside `path`, renamed to it when the block ends well.

    On an error, Ctrl-C included, nothing stays; an existing `path` is replaced only at the end.
    """
    final = Path(path).resolve()  # a link stays one
    final.parent.mkdir(parents=True, exist_ok=True)
    _tidy(final)
    partial, old = (final.parent / f".{final.name}.{kind}-{os.getpid()}" for kind in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        try:
            if final.exists():
                final.rename(old)
            partial.rename(final)
        except BaseException:
            if old.exists() and not final.exists():
                old.rename(final)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)


def _tidy(final: Path) -> None:
    """Of exports that were killed: a half bundle goes, an old one that they had set aside comes back."""
    for left in list(final.parent.iterdir()):
        found = re.fullmatch(rf"\.{re.escape(final.name)}\.(partial|old)-(\d{{1,9}})", left.name)
        if not found or (int(found[2]) != os.getpid() and _alive(int(found[2]))):
            continue
        if found[1] == "old" and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staging(bundle: Bundle) -> Iterator[Path]:
    """A folder inside a bundle for what is being added to it, on the same disk; gone at the end.

    What lies beside it under its name and an ending goes too, and the leftovers of killed builds.
    """
    for left in bundle.path.glob(".build-*"):
        pid = re.match(r"\.build-(\d{1,9})", left.name)
        if not pid or not _alive(int(pid[1])):
            _remove(left)
    folder = bundle.path / f".build-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        for left in bundle.path.glob(f"{folder.name}*"):
            _remove(left)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write(folder: Path, bundle: Bundle, began: float | None = None) -> Bundle:
    """Hash every file of `folder` and write its bundle.json; returns the bundle as written.

    began: time.monotonic() at the start of the export, whose seconds are recorded.
    """
    files = {
        str(f.relative_to(folder)): FileSpec(f.stat().st_size, sha256(f))
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != MANIFEST
    }
    if began is not None:
        origin = dataclasses.replace(bundle.origin, seconds=round(time.monotonic() - began, 1))
        bundle = dataclasses.replace(bundle, origin=origin)
    return _record(folder, dataclasses.replace(bundle, files=files))


def add_engines(bundle: Bundle, engines: Mapping[str, EngineSpec], staged: Mapping[str, Path]) -> Bundle:
    """Move the plans `staged` (name in the bundle → where it lies, on the same disk) into a bundle that is in
    its place, in place of the engines there.

    Interrupted at any point, the bundle is one without engines, or the old or the new one.
    """
    old = {engine.path for engine in bundle.engines.values()}
    files = {name: spec for name, spec in bundle.files.items() if name not in old}
    added = {name: FileSpec(path.stat().st_size, sha256(path)) for name, path in staged.items()}
    if old:
        _record(bundle.path, dataclasses.replace(bundle, files=files, engines={}))
    for name, path in staged.items():
        path.replace(bundle.path / name)
    new = dataclasses.replace(bundle, files={**files, **added}, engines=dict(engines))
    new = _record(bundle.path, new)
    for name in old - set(added):
        (bundle.path / name).unlink(missing_ok=True)
    return new


def _record(folder: Path, bundle: Bundle) -> Bundle:
    """Write bundle.json in one stroke."""
    text = json.dumps(to_json(bundle), indent=1, ensure_ascii=False)
    partial = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    return bundle

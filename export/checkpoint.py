"""Checkpoints: config files, and weights by name without loading them.

Safetensors and PyTorch's .bin shards are memory-mapped; a read copies only the rows asked for, and gives
the mapped pages back. Pickles are read weights-only. Quantised weights (packed.py) are read as the float32
numbers that they stand for.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MissingDependency

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import Quantised, Scheme

LEGACY_LIMIT = 2 * 2**30  # bytes of a pickle from before torch 1.6, which cannot be mapped

CHUNK = 2**22  # weights transformed at a time

FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.safetensors", "*.bin"]


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    flag: str = "--checkpoint",
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """The folder of a checkpoint: `name` itself, or the hub repository of that name, downloaded.

    tell: hears the size of a download before it begins. Raises CheckpointError, naming the repository
    and `flag` (which takes a local folder) when the hub cannot be reached or the disk is too small.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    repository = os.fspath(name)
    if path.exists():
        raise CheckpointError(f"{name} is a file: {flag} takes the checkpoint's folder")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} does not exist: {flag} takes a folder or a hub id (owner/name)")
    try:
        import huggingface_hub
    except ImportError as e:
        raise MissingDependency(
            f"downloading {repository} needs huggingface_hub: pip install huggingface_hub"
        ) from e
    try:
        ignore = []
        if not huggingface_hub.is_offline_mode():
            info = huggingface_hub.HfApi().model_info(
                repository, revision=revision, files_metadata=True
            )
            sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
            if any(f.endswith(".safetensors") for f in sizes):
                ignore = ["*.bin"]
            _announce(repository, sizes, ignore, tell)
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=FILES, ignore_patterns=ignore
        )
    except CheckpointError:
        raise
    except Exception as e:  # the hub's client raises its own, requests' and OS errors
        offline = os.environ.get("HF_HUB_OFFLINE", "not set")
        line = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(
            f"repository {repository} cannot be had from the hub (HF_HUB_OFFLINE is {offline}): {line}; "
            f"give a local folder with {flag} PATH"
        ) from e
    return Path(folder)


def size_text(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _announce(
    repository: str, sizes: dict[str, int], ignore: list[str], tell: Callable[[str], None]
) -> None:
    """Tell a download's size; refuse one that the disk cannot hold."""
    import shutil
    from fnmatch import fnmatch

    from huggingface_hub.constants import HF_HUB_CACHE

    wanted = {
        name: size
        for name, size in sizes.items()
        if any(fnmatch(name, p) for p in FILES) and not any(fnmatch(name, p) for p in ignore)
    }
    total = sum(wanted.values())
    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    size = size_text(total)
    tell(f"{repository}: {size} to download, but for what the hub's cache already has")
    if total > free and not list(folder.glob(f"models--{repository.replace('/', '--')}/snapshots/*")):
        raise CheckpointError(
            f"{repository} is {size}, {folder} has {size_text(free)} free: set HF_HOME to a larger disk"
        )


class Fields(dict[str, Any]):
    """A JSON object; indexing a field that it lacks raises CheckpointError."""

    file = Path("config.json")

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"{self.file} has no field {name!r}")


class Checkpoint:
    """A checkpoint folder. Raises CheckpointError wherever it is not what it claims to be."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.json("config.json", required=True)
        self._tensors: dict[str, dict[str, Tensor]] = {}  # of the shards opened so far
        self._shard_of = self._find()  # tensor name → file
        self._quantised: dict[str, Quantised | None] = {}  # of the weights asked for so far

    @cached_property
    def scheme(self) -> Scheme | None:
        """How the checkpoint is quantised; raises what packed.scheme does."""
        from .packed import scheme

        return scheme(self.config) if "quantization_config" in self.config else None

    @cached_property
    def _names(self) -> dict[str, str]:
        """The model's tensors, as keys."""
        if self.scheme is None:
            return self._shard_of
        from .packed import names

        return dict.fromkeys(names(self._shard_of, self.scheme), "")

    def quantised(self, name: str) -> Quantised | None:
        """How a weight is stored, if it is quantised."""
        if self.scheme is None:
            return None
        if name not in self._quantised:
            from .packed import find

            self._quantised[name] = find(self, self.scheme, name)
        return self._quantised[name]

    def stores(self, name: str) -> bool:
        """Whether the files have a tensor of that name."""
        return name in self._shard_of

    def json(self, name: str, required: bool = False) -> Fields:
        """A JSON file of the folder; empty when it is not there and not required."""
        file = self.path / name
        if not file.is_file():
            if required:
                raise CheckpointError(f"{self.path} is no checkpoint: it has no {name}")
            return Fields()
        try:
            data = json.loads(file.read_text(encoding="utf-8"), object_hook=Fields)
        except ValueError as e:
            raise CheckpointError(f"{file} is not valid JSON: {e}") from e
        if not isinstance(data, dict):
            raise CheckpointError(f"{file} holds {type(data).__name__}, expected an object")
        fields = Fields(data)
        fields.file = file
        return fields

    def _find(self) -> dict[str, str]:
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if not (self.path / index).is_file():
                continue
            shards: Any = self.json(index).get("weight_map")
            names = list(shards.values()) if isinstance(shards, dict) else []
            if not names or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{self.path / index} has no weight_map")
            for shard in sorted(set(names)):
                file = self.path / shard
                if file.parent != self.path:
                    raise CheckpointError(f"{index}: shard {shard!r} lies outside the checkpoint")
                if not file.is_file():
                    raise CheckpointError(f"{self.path}: shard {shard}, named by {index}, is missing")
            return shards
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if files := sorted(f.name for f in self.path.glob(pattern)):
                return {name: f for f in files for name in self._open(f)}
        raise CheckpointError(f"{self.path} has no weights: no *.safetensors and no pytorch_model*.bin")

    def _open(self, shard: str) -> dict[str, Tensor]:
        if shard not in self._tensors:
            file = self.path / shard
            read = _safetensors if file.suffix == ".safetensors" else _pickle
            self._tensors[shard] = read(file)
        return self._tensors[shard]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def mapped(self, name: str) -> Tensor:
        """A tensor as it is stored, mapped from its file."""
        if name not in self._shard_of:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        shard = self._shard_of[name]
        tensors = self._open(shard)
        if name not in tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing in its shard {shard}")
        return tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        quantised = self.quantised(name)
        return quantised.shape if quantised else tuple(self.mapped(name).shape)

    def dtype(self, name: str) -> str:
        """"float16", "bfloat16", "float32", …"""
        return str(self.mapped(name).dtype).removeprefix("torch.")

    def bytes(self, name: str) -> int:
        return self.mapped(name).nbytes

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the tensor is there, with this shape, and may be read."""
        if (found := self.shape(name)) != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(found)}, expected {list(shape)}"
            )
        if self.stores(name) and self.dtype(name) == "float8_e4m3fn" and not self.quantised(name):
            raise CheckpointError(f"{self.path}: tensor {name} is float8, quantization_config says no fp8")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor as float32, copied; integers keep their type.

        The pages of the map that were read are given back.
        """
        if quantised := self.quantised(name):
            return quantised.read(*slice(start, stop).indices(quantised.shape[0])[:2])
        return self.stored(name, start, stop)

    def stored(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `read`, without the scales of an fp8 weight."""
        import torch

        mapped = self.mapped(name)
        if mapped.dim():
            mapped = mapped[start:stop]
        dtype = torch.float32 if mapped.is_floating_point() else mapped.dtype
        rows = mapped.to(dtype, copy=True).contiguous()
        _release(mapped)
        return rows

    def columns(self, name: str, which: slice | Tensor) -> Tensor:
        """Columns of a matrix as it is stored, copied; pages are given back."""
        mapped = self.mapped(name)
        part = mapped[:, which].clone().contiguous()
        _release(mapped)
        return part

    def parameters(self) -> int:
        return sum(math.prod(self.shape(name)) for name in self)

    def fingerprint(self) -> str:
        """Hash over the config files' contents, and name, size and time of every other file."""
        digest = hashlib.sha256()
        for file in sorted(self.path.iterdir()):
            if file.suffix in (".json", ".jinja") and file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
            elif file.is_file() and any(file.match(p) for p in FILES):
                stat = file.stat()
                digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def _safetensors(file: Path) -> dict[str, Tensor]:
    """Format: 8 bytes little-endian header size, JSON header, data (safetensors' README)."""
    import torch

    types = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    }  # fmt: skip
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(start - 8)) if start <= size else None
            # private, so that torch may have its writable view; nobody writes
            memory = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE,
                               prot=mmap.PROT_READ | mmap.PROT_WRITE) if size else b""  # fmt: skip
    except ValueError as e:
        raise CheckpointError(f"shard {file} is no safetensors file: {e}") from e
    if header is None:
        raise CheckpointError(f"shard {file} is truncated: {size} bytes, its header ends at {start}")
    specs = {}
    try:
        header.pop("__metadata__", None)
        for name, spec in header.items():
            low, high = map(int, spec["data_offsets"])
            specs[name] = (str(spec["dtype"]), [int(n) for n in spec["shape"]], low, high)
            if low < 0:
                raise ValueError(f"tensor {name} starts at {low}")
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"shard {file} is no safetensors file: its header is damaged ({e!r})") from e
    end = start + max((high for _, _, _, high in specs.values()), default=0)
    if end > size:
        raise CheckpointError(f"shard {file} is truncated: {size} bytes, its header wants {end}")
    tensors = {}
    for name, (kind, shape, low, high) in specs.items():
        if (dtype := types.get(kind)) is None:
            raise CheckpointError(f"shard {file}: tensor {name} has unknown type {kind}")
        count = math.prod(shape)
        if count * dtype.itemsize != high - low:
            raise CheckpointError(
                f"shard {file}: tensor {name} has {high - low} bytes, its shape {shape} and type "
                f"{kind} want {count * dtype.itemsize}"
            )
        flat = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=start + low)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    return tensors


def _pickle(file: Path) -> dict[str, Tensor]:
    import zipfile

    import torch

    mapped = zipfile.is_zipfile(file)
    size = file.stat().st_size
    with open(file, "rb") as f:
        is_zip = f.read(4) == b"PK\x03\x04"
    if is_zip and not mapped:
        raise CheckpointError(f"shard {file} is truncated: {size} bytes, its zip directory is missing")
    if not mapped and size > LEGACY_LIMIT:
        raise CheckpointError(
            f"shard {file} ({size / 2**30:.1f} GB) is in torch's format from before 1.6, which cannot be "
            "memory-mapped: load it and torch.save it again"
        )
    try:
        tensors = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as e:
        line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"shard {file} cannot be read as weights only: {line}") from e
    if not isinstance(tensors, dict):
        raise CheckpointError(f"shard {file} holds {type(tensors).__name__}, expected tensors by name")
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def _release(mapped: Tensor) -> None:
    """Give whole pages of a mapped tensor back; they are read from the file when needed again."""
    if not hasattr(mmap, "MADV_DONTNEED") or not mapped.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-mapped.data_ptr() // page) * page
    length = (mapped.data_ptr() + mapped.nbytes) // page * page - start
    # a legacy pickle lies in anonymous memory, where this would be a loss: those storages are resizable
    if length > 0 and not mapped.untyped_storage().resizable():
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Weight:
    """Where a module's parameter comes from: tensors of a checkpoint, one below the other.

    parts: (name, shape) each; transform: of a single whole tensor, for small ones; own: its quantised parts
    where packed.presorted changed them, or what gptq.py made of it. `check` raises CheckpointError for a
    tensor that is missing or has another shape.
    """

    checkpoint: Checkpoint
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transform: Callable[[Tensor], Tensor] | None = None
    own: tuple[Quantised, ...] = ()

    def check(self) -> None:
        for name, shape in self.parts:
            self.checkpoint.check(name, shape)

    def quantised(self) -> list[Quantised | None]:
        """How each part is stored; nothing where a transform makes the weight."""
        if self.transform is not None:
            return []
        return list(self.own) or [self.checkpoint.quantised(name) for name, _ in self.parts]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) as float32."""
        import torch

        if self.transform is not None:
            return self.transform(self.checkpoint.read(self.parts[0][0]))[start:stop].contiguous()
        rows, at = [], 0
        for name, shape in self.parts:
            height = shape[0] if shape else 1
            low, high = max(start - at, 0), height if stop is None else min(stop - at, height)
            if low < high:
                rows.append(self.checkpoint.read(name, low, high))
            at += height
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def chunks(self, elements: int = CHUNK) -> Iterator[Tensor]:
        """All rows, in order, as float32, about `elements` numbers at a time and an even number of rows."""
        if self.transform is not None:
            yield self.read()  # whole: the rows may become others
            return
        height = sum(shape[0] if shape else 1 for _, shape in self.parts)
        step = max(2, elements // max(1, math.prod(self.parts[0][1][1:])) // 2 * 2)
        for start in range(0, height, step):
            yield self.read(start, min(start + step, height))

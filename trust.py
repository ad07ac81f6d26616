"""TorchScript archives and TensorRT plans are code: opened only if built on this machine, or with trust.

A registry of SHA-256, one file of the user's own: `trusted.json` in $RTP_LLM_STATE, else
$XDG_STATE_HOME/rtp_llm, else ~/.local/state/rtp_llm. A file's content is what counts, so a bundle may be
moved. A file once found good is known again by device, inode, size and change time, without hashing
gigabytes at every start: whoever can set those back can do worse.

ONNX graphs are data: a bundle of backend "onnxruntime" is never checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict

from .errors import BundleError
from .export.bundle import Bundle

log = logging.getLogger(__name__)
SETTLED = 2.0  # s; a file that changed more recently may change again without another change time


class Registry(TypedDict):
    files: dict[str, str]  # SHA-256 → where the file lay when it was recorded
    seen: dict[str, str]  # device:inode:size:ctime in ns → SHA-256


def registry_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("RTP_LLM_STATE") or Path(state) / "rtp_llm") / "trusted.json"


def record(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Files that this machine has just built. Where nothing can be written, a warning says so."""
    hashed = [(Path(path).resolve(), *_hash(Path(path))) for path in paths]

    def add(registry: Registry) -> None:
        for path, digest, identity in hashed:
            registry["files"][digest] = str(path)
            if identity:
                registry["seen"][identity] = digest

    try:
        _update(add)
    except (OSError, BundleError) as e:
        log.warning(
            "what was built here will not be known as such: %s; set RTP_LLM_STATE to a folder of yours, "
            "or open it with --trust-engines",
            e,
        )


def check(bundle: Bundle, names: Iterable[str], trusted: bool = False) -> None:
    """Raises BundleError unless each file was built on this machine, or the caller trusts the bundle.

    `names`: files of the bundle that are about to be opened as code, whatever they are called.
    """
    if trusted or bundle.backend == "onnxruntime":
        return
    registry = _read()
    new: dict[str, str] = {}
    for name in names:
        path = bundle.read_path(name).resolve()
        if registry["seen"].get(_identity(path.stat())) in registry["files"]:
            continue
        digest, identity = _hash(path)
        if digest not in registry["files"]:
            known = str(path) in registry["files"].values()
            raise BundleError(
                f"{path} {'has changed since it was' if known else 'was not'} built on this machine, and "
                "whoever made it can run any code here with your rights once it is loaded: build it here, "
                "or pass --trust-engines if you trust where it comes from"
            )
        if identity:
            new[identity] = digest
    if new:
        try:
            _update(lambda registry: registry["seen"].update(new))
        except OSError as e:  # it is hashed again next time
            log.debug("cannot write %s: %s", registry_path(), e)


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_ctime_ns}"


def _hash(path: Path) -> tuple[str, str]:
    """SHA-256, and by what to know the file again: empty while it may still change unnoticed."""
    with open(path, "rb") as file:
        before = _identity(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        stat = os.fstat(file.fileno())
    settled = _identity(stat) == before and abs(time.time() - stat.st_ctime) >= SETTLED
    return digest, before if settled else ""


def _read() -> Registry:
    """Raises BundleError when the registry is not the user's own, or damaged."""
    path = registry_path()
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
                raise BundleError(f"{path} can be written by others: remove it, or chown and chmod 600 it")
            data = json.load(file)
    except FileNotFoundError:
        return Registry(files={}, seen={})
    except (OSError, ValueError) as e:
        raise BundleError(f"{path} cannot be read ({e}): remove it, and build the engines again") from e
    if not isinstance(data, dict) or not all(isinstance(data.get(k), dict) for k in ("files", "seen")):
        raise BundleError(f"{path} is no registry of built files: remove it, and build the engines again")
    return Registry(files=data["files"], seen=data["seen"])


def _update(change: Callable[[Registry], None]) -> None:
    """Read, change and replace the registry, one process at a time."""
    path = registry_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        registry = _read()
        change(registry)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # of a process that was killed
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            json.dump(registry, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        os.close(lock)

"""TensorRT's timings of kernels, kept between builds: one file per GPU and TensorRT version."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..trt import Gpu


def default_path(gpu: Gpu, version: str) -> Path:
    """In `RTP_LLM_CACHE`, else in the user's cache folder."""
    own = os.environ.get("RTP_LLM_CACHE")
    cache = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rtp_llm")
    name = re.sub(r"[^\w.-]+", "-", f"{gpu.name}-sm{gpu.capability}-tensorrt{version}")
    return cache / "timing" / f"{name}.cache"


def load(config: Any, path: Path, chosen: bool = False) -> Any:
    """Attach the timings at `path` to a builder config; fresh ones where there are none that it takes.

    The cache returned must outlive the build. `chosen` by the user: a file there that TensorRT does not read
    is a UserError, since `save` would overwrite it.
    """
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        blob, chosen = b"", False
    except OSError as e:
        if chosen:
            raise UserError(f"timing_cache={str(path)!r} cannot be read: {e.strerror}") from e
        blob = b""
    try:
        cache = config.create_timing_cache(blob)
    except (RuntimeError, TypeError):
        cache = None
    if cache is None and chosen:
        raise UserError(
            f"timing_cache={str(path)!r} is no timing cache that this TensorRT reads, and would be "
            "overwritten: remove it, or give another file"
        )
    if cache is None or not config.set_timing_cache(cache, False):  # of another GPU or driver
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def save(config: Any, path: Path) -> str:
    """Write what a build has measured; why that was not possible, which costs only time at the next build."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache = config.get_timing_cache()
        partial.write_bytes(cache.serialize())
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        return f"{path} cannot be written: {e.strerror}"
    return ""

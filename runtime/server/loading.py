"""From Settings to a pipeline that has answered once, within the memory that there is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections import deque

from ...errors import UserError
from ...model_factory import MODEL_TYPES, ModelFactory, bundle_of
from ...pipeline import Pipeline
from .. import grammar
from ..backends import device_of
from ..engine import Encode
from . import memory
from .settings import Settings


def model_path(settings: Settings) -> str:
    """Folder or hub id of what is served. Raises UserError: none, or a folder that is not there."""
    if not settings.checkpoint_path and not settings.model_type:
        raise UserError("give a model: CHECKPOINT_PATH (or --checkpoint_path), or MODEL_TYPE")
    path = settings.checkpoint_path or MODEL_TYPES.get(settings.model_type or "")
    if not path:
        raise UserError(f"MODEL_TYPE={settings.model_type!r} is unknown, known are {sorted(MODEL_TYPES)}")
    if not os.path.exists(path) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(f"CHECKPOINT_PATH={path!r} does not exist: give a folder or a hub id (owner/name)")
    return path


def open_pipeline(settings: Settings, encode: Encode | None = None) -> Pipeline:
    """The model behind its memory table; `encode`: see ModelConfig. Raises UserError when it does not fit."""
    config = dataclasses.replace(settings.model_config(), encode=encode)
    bundle = bundle_of(model_path(settings), config)
    device = device_of(bundle, config.device)
    table = memory.plan(
        bundle,
        memory.memory_limit(settings.memory_limit)
        if device == "cpu"
        else memory.gpu_limit(settings.memory_limit, device),
        kv_cache_bytes=config.kv_cache_bytes,
        image_cache_bytes=config.image_cache_bytes,
        slots=config.slots,
        max_seq_len=config.max_seq_len,
        gpu=device != "cpu",
        weight_budget=config.weight_budget,
    )
    _check(table)
    config = dataclasses.replace(config, ckpt_path=str(bundle.path), kv_cache_bytes=table.cache)
    model = ModelFactory.from_model_config(config)
    with contextlib.suppress(ValueError, ImportError):  # then a request that wants a grammar is told
        grammar.prepare(model.tokenizer, model.bundle.model.vocab_size)
    pipeline = Pipeline(model, media_policy=settings.media_policy())
    deque(pipeline("Hi", generate_config={"max_new_tokens": 1, "top_k": 1}), maxlen=0)
    table = memory.measure(table, model)
    _check(table)
    print(table, flush=True)
    return pipeline


def _check(table: memory.Table) -> None:
    try:
        table.check()
    except UserError as e:
        line, _, _ = str(e).partition("\n")
        print(table, flush=True)
        raise UserError(line) from e

"""Fixtures: a bundle for TensorRT, and the stand-in for `tensorrt` on a machine with a GPU."""

from __future__ import annotations

import functools
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import trt

from .recording import COLLECT, Recording

GPU = trt.Gpu("NVIDIA Test 9", "9.0", 80 * 2**30)


@pytest.fixture(scope="session")
def spec(bindings: Any) -> dict[str, Any]:
    return bindings.run(COLLECT)


@pytest.fixture(scope="session")
def exported(sample_qwen: Path, made_once: Callable[..., Path]) -> dict[str, Path]:
    """The Qwen-VL sample for TensorRT in float32: "paged" and "linear"; shared, so not to be changed."""

    def make(kv: str, folder: Path) -> None:
        from rtp_llm.export.exporter import export

        export(sample_qwen, folder, backend="tensorrt", precision="fp32", kv_cache=kv)

    kinds = ("paged", "linear")
    return {kv: made_once(f"qwen_vl_shapes-tensorrt-{kv}", functools.partial(make, kv)) for kv in kinds}


@pytest.fixture
def paged(exported: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported["paged"], tmp_path / "paged")


@pytest.fixture
def linear(exported: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported["linear"], tmp_path / "linear")


@pytest.fixture
def tensorrt(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recording:
    """The stand-in in place of `tensorrt`, on a machine with a GPU."""
    import torch._dynamo  # noqa: F401  before it finds the stand-in, which it takes for a package

    recording = Recording(spec)
    monkeypatch.setitem(sys.modules, "tensorrt", recording.module)
    monkeypatch.setattr(trt, "gpu", lambda index=None: GPU)
    monkeypatch.setenv("RTP_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RTP_LLM_STATE", str(tmp_path / "state"))
    plugins = types.SimpleNamespace(register=lambda capability: None, VERSION="1", SPLITS=8)
    monkeypatch.setattr("rtp_llm.build.plugins", plugins, raising=False)
    return recording

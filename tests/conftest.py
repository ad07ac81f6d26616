"""Fixtures that many tests share: the reference outputs, the sample checkpoints and their bundles."""

from __future__ import annotations

import atexit
import copy
import fcntl
import functools
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.errors import InternalError, MissingDependency
from rtp_llm.export.bundle import Bundle
from rtp_llm.runtime.tritonserver import binary

from . import random_checkpoints

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and a dead one is slow to notice
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what tests build is not to be trusted later
os.environ["RTP_LLM_STATE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["RTP_LLM_STATE"], ignore_errors=True)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference outputs, which lies beside the clone."""
    path = ROOT.parent / "shared" / "goldens"
    if not path.is_dir():
        pytest.skip("no reference outputs: ../shared/goldens, beside the clone, does not exist")
    return path


@pytest.fixture(scope="session")
def sample_qwen() -> Path:
    return ROOT / "tests" / "checkpoints" / "qwen_vl_shapes"


@pytest.fixture(scope="session")
def sample_llava() -> Path:
    return ROOT / "tests" / "checkpoints" / "llava_shapes"


@pytest.fixture(scope="session")
def red_circle() -> Path:
    return ROOT / "tests" / "images" / "red_circle.png"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For pytest-xdist's loadfile without its own order, which does not know of slow tests: files that take
    long come first."""
    if hasattr(config, "workerinput"):
        weight = Counter[str]()
        for item in items:
            weight[item.location[0]] += 20 if item.get_closest_marker("slow") else 1
        items.sort(key=lambda item: -weight[item.location[0]])


@pytest.fixture(autouse=True)
def one_registry() -> None:
    """torch.onnx makes its registry of functions anew for every graph, a sixth of the time of a small export:
    here, once a process, from the second export on."""
    if found := sys.modules.get("torch.onnx._internal.exporter._registration"):
        _keep_registry(found.ONNXRegistry)


@functools.cache
def _keep_registry(kind: Any) -> None:
    make = functools.cache(kind.from_torchlib)

    def from_torchlib(*args: Any, **more: Any) -> Any:
        registry = copy.copy(make(*args, **more))
        registry.functions = {name: list(known) for name, known in registry.functions.items()}
        return registry

    kind.from_torchlib = staticmethod(from_torchlib)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is KeyboardInterrupt, as it is not in a process that began in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, make) → a folder that make(folder) filled, in whichever of pytest-xdist's workers came first;
    shared, so not to be changed."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = base / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                half = folder.with_name(f"{name}.half")
                shutil.rmtree(half, ignore_errors=True)
                make(half)
                half.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoints(made_once: Callable[..., Path]) -> Path:
    """Folders qwen_vl and llava, of random weights; shared, so not to be changed."""
    return made_once("checkpoints", random_checkpoints.make)


def _export(checkpoint: Path, output: Path) -> Bundle:
    from rtp_llm.export.exporter import export

    return export(checkpoint, output, precision="fp32")


@pytest.fixture(scope="session")
def qwen_bundle(sample_qwen: Path, made_once: Callable[..., Path]) -> Path:
    """The Qwen-VL sample as a float32 bundle; shared, so not to be changed."""
    return made_once("qwen", functools.partial(_export, sample_qwen))


@pytest.fixture(scope="session")
def llava_bundle(sample_llava: Path, made_once: Callable[..., Path]) -> Path:
    """The LLaVA sample as a float32 bundle; shared, so not to be changed."""
    return made_once("llava", functools.partial(_export, sample_llava))


@pytest.fixture(scope="session")
def triton_binary() -> binary.Binary:
    """The program, fetched once into the tests' cache; skipped where it cannot be had."""
    cache = os.environ.get("RTP_LLM_TEST_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rtp_llm", "tests"
    )
    try:
        return binary.find(fetch=True, cache=Path(cache, "tritonserver"))
    except (InternalError, MissingDependency) as e:
        pytest.skip(f"no Triton Inference Server: {e}")

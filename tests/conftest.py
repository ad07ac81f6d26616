"""Fixtures that many tests share: the reference outputs, the sample checkpoints and their bundles."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from rtp_llm.errors import InternalError, MissingDependency
from rtp_llm.export.bundle import Bundle
from rtp_llm.runtime.tritonserver import binary

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


def _export(checkpoint: Path, output: Path) -> Bundle:
    from rtp_llm.export.exporter import export

    return export(checkpoint, output, precision="fp32")


@pytest.fixture(scope="session")
def qwen_bundle(sample_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen-VL sample as a float32 bundle; shared, so not to be changed."""
    return _export(sample_qwen, tmp_path_factory.mktemp("bundles") / "qwen").path


@pytest.fixture(scope="session")
def llava_bundle(sample_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaVA sample as a float32 bundle; shared, so not to be changed."""
    return _export(sample_llava, tmp_path_factory.mktemp("bundles") / "llava").path


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

"""TensorRT's real Python bindings without its libraries: every class, method and docstring is NVIDIA's own,
only the factories answer None. One TensorRT per process, so tests run code in a process of its own."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .engines import exported, linear, paged, spec, tensorrt  # noqa: F401  (fixtures)

VERSIONS = ("10.15.1.29", "10.16.1.11", "11.1.0.106", "11.4.0.106")

LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
EMPTY = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "getBuilderPluginRegistry",
        "initLibNvInferPlugins",
    )
)

# runs the code with the given values as its globals, and hands back its `result`
RUNNER = """
import json, sys
code, values, answer = sys.argv[1:]
scope = {"__name__": "bindings_test", **json.loads(values)}
exec(compile(open(code).read(), code, "exec"), scope)
with open(answer, "w") as file:
    json.dump(scope.get("result"), file)
"""


@dataclass(frozen=True)
class Bindings:
    version: str
    path: Path  # the folder to put on a Python's path: `import tensorrt` then finds these bindings

    def run(self, code: str, **values: Any) -> Any:
        """Runs `code` in a new process that sees these bindings, with `values` (JSON) as its globals; gives
        back what it left in its global `result` (JSON). A failing process fails the test with its output."""
        with tempfile.TemporaryDirectory() as folder:
            source, answer = Path(folder, "code.py"), Path(folder, "answer.json")
            source.write_text(code)
            done = subprocess.run(
                [sys.executable, "-c", RUNNER, str(source), json.dumps(values), str(answer)],
                env={**os.environ, "PYTHONPATH": str(self.path)},
                cwd=folder,  # not the clone: its folders would shadow packages
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode:
                pytest.fail(f"TensorRT {self.version}:\n{done.stdout}{done.stderr}", pytrace=False)
            return json.loads(answer.read_text())


@pytest.fixture(scope="session", params=VERSIONS)
def bindings(request: pytest.FixtureRequest) -> Bindings:
    """The real bindings, one version after the other; skipped where they cannot be had."""
    path, problem = _install(request.param)
    if problem:
        pytest.skip(f"no TensorRT {request.param} bindings: {problem}")
    return Bindings(request.param, path)


@pytest.fixture(scope="session")
def float32_engine_bundle(made_once: Callable[..., Path]) -> Callable[[str, str], Path]:
    """(sample, "paged" or "linear") → its bundle for TensorRT in float32; shared, so not to be changed."""

    def get(sample: str, kv_cache: str) -> Path:
        def make(folder: Path) -> None:
            from rtp_llm.export.exporter import export

            checkpoint = Path(__file__).parent.parent / "checkpoints" / sample
            export(checkpoint, folder, backend="tensorrt", kv_cache=kv_cache, precision="fp32")

        return made_once(f"{sample}-tensorrt-{kv_cache}", make)

    return get


@functools.cache
def _install(version: str) -> tuple[Path, str]:
    """The folder that holds the bindings, filled once; or why it cannot be filled."""
    cache = os.environ.get("RTP_LLM_TEST_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rtp_llm", "tests"
    )
    path = Path(cache, f"tensorrt-{version}-cp{sys.version_info.major}{sys.version_info.minor}")
    if path.is_dir():
        return path, ""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not sys.platform.startswith("linux") or not compiler:
        return path, "needs Linux and gcc"
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "install", "-q", "--retries=0", "--timeout=20"]
    else:  # a venv that uv made
        install = ["uv", "pip", "install", "-q", "--python", sys.executable]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wheel = Path(folder, "wheel")
            package = f"tensorrt-cu13-bindings=={version}"
            _command([*install, "--no-deps", "--only-binary=:all:", "--target", wheel, package])
            # NVIDIA's package `tensorrt` is this module under another name
            package_folder = (wheel / "tensorrt_bindings").rename(wheel / "tensorrt")
            Path(folder, "empty.c").write_text(EMPTY)
            for name in LIBRARIES:
                library = f"lib{name}.so.{version.split('.')[0]}"
                shared = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", Path(folder, "empty.c")]
                _command([*shared, "-o", package_folder / library])
            os.rename(wheel, path)
    except FileExistsError:
        pass
    except (OSError, subprocess.TimeoutExpired, RuntimeError) as error:
        if not path.is_dir():  # another process may have been quicker
            return path, str(error)
    return path, ""


def _command(command: list[Any]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=180)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])

"""The second compiler of the image encoder: its names are in the real sources of torch_tensorrt, and what it
makes is opened by the TensorRT backend."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtp_llm.build import torch_tensorrt as ours
from rtp_llm.build.builder import build
from rtp_llm.errors import BundleError, MissingDependency
from rtp_llm.export import bundle as bundles
from rtp_llm.runtime.backends.onnx import OnnxBackend
from rtp_llm.runtime.backends.tensorrt import TensorRTBackend

from .recording import Recording

once = pytest.mark.parametrize("bindings", ["11.1.0.106"], indirect=True, scope="session")


@pytest.fixture(scope="session", params=["2.11.0", "2.14.0"])  # TensorRT 10.15, TensorRT 11.1
def wheel(request: pytest.FixtureRequest) -> zipfile.ZipFile:
    """The real sources, downloaded once into the cache; skipped where they cannot be had."""
    cache = os.environ.get("RTP_LLM_TEST_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rtp_llm", "tests"
    )
    folder = Path(cache, f"torch_tensorrt-{request.param}")
    if not (found := list(folder.glob("*.whl"))):
        quietly = ["-q", "--no-deps", "--only-binary=:all:", "--retries=0", "--timeout=20"]
        command = [sys.executable, "-m", "pip", "download", *quietly, "-d", str(folder)]
        command.append(f"torch_tensorrt=={request.param}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if done.returncode:
            why = (done.stderr or done.stdout).strip().splitlines()[-1]
            pytest.skip(f"no torch_tensorrt {request.param}: {why}")
        found = list(folder.glob("*.whl"))
    return zipfile.ZipFile(found[0])


def parameters(wheel: zipfile.ZipFile, file: str, function: str) -> set[str]:
    tree = ast.parse(wheel.read(f"torch_tensorrt/{file}"))
    (found,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    return {a.arg for a in (*found.args.args, *found.args.kwonlyargs)}


def used() -> dict[str, set[str]]:
    """Keyword arguments of each function of torch_tensorrt that we call."""
    calls: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(Path(ours.__file__).read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch_tensorrt":
            calls.setdefault(node.attr, set())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if getattr(node.func.value, "id", "") == "torch_tensorrt":
                calls.setdefault(node.func.attr, set()).update(k.arg for k in node.keywords if k.arg)
    return calls


def test_every_function_and_argument_is_in_the_real_sources(wheel: zipfile.ZipFile) -> None:
    calls = used()
    assert set(calls) == {"compile", "save", "Input"}
    front = parameters(wheel, "_compile.py", "compile")
    assert {"module", "ir", "inputs"} <= front
    # the rest is handed on to the dynamo compiler
    assert calls["compile"] - front <= parameters(wheel, "dynamo/_compiler.py", "compile")
    assert calls["save"] <= parameters(wheel, "_compile.py", "save")
    assert b'"torchscript"' in wheel.read("torch_tensorrt/_compile.py")
    source = wheel.read("torch_tensorrt/_Input.py").decode()
    for name in ("shape", "min_shape", "opt_shape", "max_shape", "dtype"):
        assert (
            f'"{name}" in kwargs' in source or f'k in kwargs for k in ["{name}"' in source or name in source
        )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A stand-in for torch_tensorrt that compiles nothing and saves as the real one does; hears the calls."""
    heard: list[tuple[str, dict[str, Any]]] = []

    def compile(module: torch.nn.Module, **settings: Any) -> torch.nn.Module:
        heard.append(("compile", settings))
        return module

    def save(module: Any, file_path: str, output_format: str, arg_inputs: list[torch.Tensor]) -> None:
        heard.append(("save", {"file_path": file_path, "output_format": output_format}))
        torch.jit.save(torch.jit.trace(module, arg_inputs, check_trace=False), file_path)

    def spec(**shapes: Any) -> dict[str, Any]:
        return shapes

    fake = types.SimpleNamespace(compile=compile, save=save, Input=spec)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(ours, "DEVICE", "cpu")
    monkeypatch.setattr(TensorRTBackend, "devices", ("cuda", "cpu"))
    return heard


@once
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_the_encoder_it_makes_answers_as_the_graph_does(
    paged: Path, tensorrt: Recording, compiler: list[tuple[str, dict[str, Any]]], qwen_bundle: Path
) -> None:
    bundle = build(paged, max_seq_len=400, max_images=3, opt_level=1, vision_compiler="torch_tensorrt")
    (_, settings), (_, saved) = compiler
    sizes = {f"{k}_shape": [n, 96, 96, 3] for k, n in (("min", 1), ("opt", 2), ("max", 3))}
    assert settings["inputs"] == [sizes | {"dtype": torch.uint8}]
    assert settings["ir"] == "dynamo" and settings["optimization_level"] == 1 and settings["disable_tf32"]
    assert saved["output_format"] == "torchscript"
    assert bundle.engines["vision"].path == "vision.pt" and "vision.pt" in bundle.files
    assert len(tensorrt.named("Builder")) == 1  # the decoder's
    assert {p.name for p in paged.iterdir()} == {*bundle.files, "bundle.json"}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
    expected = OnnxBackend(bundles.read(qwen_bundle), slots=1).encode(pixels)
    found = TensorRTBackend(bundle, device="cpu").encode(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())


@once
def test_without_it_one_line_says_what_to_install(
    paged: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingDependency, match="pip install 'torch-tensorrt>=2.11'") as caught:
        build(paged, vision_compiler="torch_tensorrt")
    assert "\n" not in str(caught.value) and tensorrt.calls == []


@once
def test_a_checkpoint_that_has_changed_is_refused(
    paged: Path, tensorrt: Recording, compiler: list[tuple[str, dict[str, Any]]]
) -> None:
    file = paged / "bundle.json"
    data = json.loads(file.read_text())
    data["origin"]["fingerprint"] = "another"
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="is not the checkpoint that .* was exported from: export it again"):
        build(paged, vision_compiler="torch_tensorrt")
    assert not bundles.read(paged).engines

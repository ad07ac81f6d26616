"""The package installs and runs outside the clone, and the lists that describe it stay complete."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import requests

from rtp_llm.runtime.tritonserver.binary import Binary

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_PACKAGES = {"tests", "scripts", "benchmarks", "dist", "demo-bundle"}


def test_packages_list_is_complete() -> None:
    folders = {
        f.parent.relative_to(ROOT)
        for f in ROOT.rglob("*.py")
        if not any(part.startswith(".") for part in f.relative_to(ROOT).parts)
        and f.relative_to(ROOT).parts[0] not in NOT_PACKAGES
        and f.relative_to(ROOT).parts[0::2] != ("model_repository", "1")  # Triton's models are data
    }
    names = {".".join(["rtp_llm", *folder.parts]) for folder in folders}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pinned = {line.split("==")[0].replace("-", "_") for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["export"], *extras["cpu"], *extras["test"]]
    names = {r.lower().replace("-", "_") for r in wanted}
    names = {"".join(c if c.isalnum() or c == "_" else " " for c in n).split()[0] for n in names}
    assert names - {"vlmbundle", "setuptools"} <= pinned
    assert "torch==2.13.0" in lines


def test_pytest_collects_every_test_file(tmp_path: Path) -> None:
    """A folder like tests/build must not be skipped in silence."""
    files = {f.relative_to(ROOT).as_posix() for f in (ROOT / "tests").rglob("test_*.py")}
    sample = {name for name in files if "checkpoints" not in name}
    copy = tmp_path / "clone"
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("checkpoints", "*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name in sample:  # their imports do not matter here
        (copy / name).write_text("def test_it(): pass\n")
    (copy / "tests/conftest.py").unlink()
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=copy, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = {line.split("::")[0] for line in out.splitlines() if "::" in line}
    assert found == sample


def test_no_machine_paths_or_registries() -> None:
    """Nothing tracked names one person's machine, or a package registry's host."""
    words = ["/" + "work/", "/" + "root/", "/opt/" + "pypi", "pypi" + ".org", "pytorch" + ".org/whl"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked or [p.name for p in ROOT.iterdir() if p.is_file()]:
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".sh", ".md", ".toml", ".txt", ".cfg", ".in", ""}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [w for w in words if w in text], name


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, built from a copy without .git and .venv."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "any name"
    skip = shutil.ignore_patterns(
        ".*", "checkpoints", "benchmarks", "*.egg-info", "__pycache__", "demo-bundle"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    before = {path.relative_to(copy) for path in (copy / "build").rglob("*")}
    code = "from setuptools import build_meta as b; print(b.build_sdist({0!r}))"
    _run([sys.executable, "-c", code.format(str(folder))], copy)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    _run([*wheel, "-w", str(folder), "."], copy)
    after = {path.relative_to(copy) for path in (copy / "build").rglob("*")}
    assert after == before, "setuptools' build folder must not be the package build/"
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def _run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_the_wheel_and_the_sdist_hold_every_file_of_tritons_models(distributions: dict[str, Path]) -> None:
    skip = {"__pycache__", "__init__.py"}
    models = [f for f in (ROOT / "model_repository").rglob("*") if f.is_file() and not skip & set(f.parts)]
    wanted = {f.relative_to(ROOT).as_posix() for f in models}
    assert {"model_repository/vlm/config.pbtxt", "model_repository/vlm/1/model.py"} <= wanted
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        assert {f"rtp_llm/{name}" for name in wanted} <= set(wheel.namelist())
    with tarfile.open(distributions["sdist"]) as sdist:
        assert wanted <= {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_outside_the_clone(
    kind: str,
    distributions: dict[str, Path],
    tmp_path: Path,
    sample_qwen: Path,
    red_circle: Path,
    request: pytest.FixtureRequest,
) -> None:
    _run([sys.executable, "-m", "venv", "--without-pip", "venv"], tmp_path)
    python = str(tmp_path / "venv/bin/python")
    site = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    # torch and the like come from the environment of the tests; a .pth file in a .pth folder is not
    # read, so its editable rtp_llm stays out
    import numpy

    (site / "test_environment.pth").write_text(str(Path(numpy.__file__).resolve().parent.parent) + "\n")
    _run([*pip, str(distributions[kind])], tmp_path)

    where = "import rtp_llm, rtp_llm.runtime.backends; print(rtp_llm.__file__)"
    assert _run([python, "-c", where], tmp_path).stdout.startswith(str(site))
    assert not (site / "rtp_llm/tests").exists() and not (site / "rtp_llm/scripts").exists()

    program = str(tmp_path / "venv/bin/rtp-llm")
    _run(
        [program, "export", "--model", "qwen_vl", "--checkpoint", str(sample_qwen), "--output", "b"], tmp_path
    )
    chat = [program, "chat", "b", "--image", str(red_circle), "--temperature", "0", "What is this?"]
    done = _run(chat, tmp_path)
    assert done.stdout.strip() == "a red circle"
    if kind == "wheel":
        _serves([program, "serve", "b", "--start-port", "0"], tmp_path, red_circle)
        binary = request.getfixturevalue("triton_binary")
        _serves_through_triton([program, "tritonserver", "b"], tmp_path, red_circle, binary)


def _serves(command: list[str], cwd: Path, picture: Path) -> None:
    """The installed program answers over HTTP, shows its page and stops when told."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    with subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            url = next(m[0] for line in process.stderr if (m := re.search(r"http://[\w.:]+", line)))
            next(line for line in process.stderr if "ready" in line)
            data = base64.b64encode(picture.read_bytes()).decode()
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                     {"type": "text", "text": "What is this?"}]  # fmt: skip
            body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
            answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["message"]["content"] == "a red circle"
            assert "<html" in requests.get(url, timeout=10).text
        finally:
            process.terminate()
        assert process.wait(30) == 0


def _serves_through_triton(command: list[str], cwd: Path, picture: Path, binary: Binary) -> None:
    """Triton finds the installed package's models, and the runtime in that environment."""
    (cwd / "cache").mkdir()
    (cwd / "cache" / "tritonserver").symlink_to(binary.backends.parent.parent)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    env["RTP_LLM_CACHE"] = str(cwd / "cache")
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    with subprocess.Popen([*command, *ports], cwd=cwd, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            ready = re.compile(r"(?<=ready: )http://[\w.:]+")
            url = next(m[0] for line in process.stderr if (m := ready.search(line)))
            data = base64.b64encode(picture.read_bytes()).decode()
            body = {"text_input": "Picture 1:<img/>\nWhat is this?", "image": data,
                    "sampling_parameters": '{"top_k": 1, "max_new_tokens": 20}'}  # fmt: skip
            answer = requests.post(f"{url}/v2/models/vlm_complete/generate", json=body, timeout=60).json()
            assert answer["text_output"] == "a red circle"
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_help_is_quick() -> None:
    """Best of five, since machines are noisy."""
    best = 9.0
    for _ in range(5):
        code = "import sys; from rtp_llm.cli import main; main(['--help'])"
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", code], capture_output=True, cwd="/")
        best = min(best, time.monotonic() - start)
    assert best < 0.5


def test_export_runs_from_the_root_of_a_clone() -> None:
    """`python -m export`, without rtp_llm being importable by that name."""
    for module in ("export", "rtp_llm.export"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--model", "nothing"], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr == "rtp-llm export: --model is 'nothing', known families are qwen_vl, llava\n"

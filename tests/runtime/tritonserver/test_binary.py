"""Where Triton comes from, what it says when it cannot come, and what `--check` and the doctor tell."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import sys
from pathlib import Path

import pytest

from rtp_llm import cli, doctor
from rtp_llm.errors import InternalError, MissingDependency
from rtp_llm.runtime.tritonserver import binary
from rtp_llm.runtime.tritonserver.binary import Binary


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, on a machine without a tritonserver on PATH."""
    monkeypatch.setenv("RTP_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(binary.shutil, "which", lambda name, **_: None)
    return tmp_path / "cache" / "tritonserver"


def test_the_program_of_the_wheel_is_complete(triton_binary: Binary) -> None:
    """Its own stub for this Python, numpy 1 in front of everything of ours."""
    assert triton_binary.problem() is None
    assert "python" in triton_binary.backend_names()
    assert triton_binary.numpy().startswith("1.")
    assert {"--http-port", "--grpc-restricted-protocol", "--rate-limit"} <= triton_binary.flags


def test_a_package_that_the_models_lack_is_told_before_anything_starts(
    triton_binary: Binary, tmp_path: Path
) -> None:
    error = "ModuleNotFoundError: No module named 'prometheus_client'"
    (tmp_path / "python3").write_text(f'#!/bin/sh\necho "{error}"')
    (tmp_path / "python3").chmod(0o755)
    env = triton_binary.env | {"PATH": f"{tmp_path}{os.pathsep}{triton_binary.env['PATH']}"}
    what, fix = dataclasses.replace(triton_binary, env=env).problem() or ("", "")
    assert what.endswith(error) and fix.endswith(" pip install prometheus_client")


def test_models_see_what_the_running_python_sees(triton_binary: Binary) -> None:
    seen = triton_binary._run(["python3", "-c", "import rtp_llm, sys; print(rtp_llm.__file__, sys.prefix)"])
    import rtp_llm

    package, prefix = seen.split()
    assert package == rtp_llm.__file__ and prefix != sys.prefix


def test_a_tritonserver_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA's container: its own backends, and the Python that runs the command."""
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '  --http-port <integer>'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    found = binary.find()
    assert found.path == program and found.arguments == [] and found.flags == {"--http-port"}
    assert shutil.which("python3", path=found.env["PATH"]) == str(Path(sys.executable).parent / "python3")
    what, fix = found.problem() or ("", "")
    assert "no Python backend in /opt/tritonserver/backends" in what and "container" in fix


def test_nothing_is_downloaded_unasked(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_download", lambda wheel: pytest.fail("downloaded"))
    with pytest.raises(MissingDependency, match="--check --yes downloads it .*or run inside"):
        binary.find()
    asked: list[str] = []
    with pytest.raises(MissingDependency):
        binary.find(fetch=lambda question: bool(asked.append(question)))
    assert len(asked) == 1 and str(nowhere) in asked[0] and "MB" in asked[0]


@pytest.mark.parametrize(("typed", "downloads"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_a_terminal_is_asked(
    nowhere: Path,
    qwen_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: str,
    downloads: bool,
) -> None:
    def download(wheel: Path) -> None:
        raise InternalError("downloaded")

    terminal = io.StringIO(typed)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(binary, "_download", download)
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    assert cli.main(["tritonserver", str(qwen_bundle), *ports]) == (1 if downloads else 2)
    err = capsys.readouterr().err
    assert f"Download it (about 75 MB) into {nowhere}? [y/N] " in err
    assert ("downloaded" in err) == downloads


def test_uv_does_it_where_pip_is_missing(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for uv tells what it was asked for, and fails as uv does."""
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "error: $*" >&2\nexit 2\n')
    uv.chmod(0o755)
    monkeypatch.setattr(binary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="needs pip or uv"):
        binary.find(fetch=True)
    monkeypatch.setattr(binary.shutil, "which", lambda name, **_: str(uv) if name == "uv" else None)
    with pytest.raises(InternalError) as failed:
        binary.find(fetch=True)
    words = str(failed.value).split()
    assert {"pip", "install", "--no-deps", "--require-hashes", "--target"} <= set(words)


def test_a_download_that_fails_leaves_nothing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "WHEEL", "nvidia-pytriton==0.0.0")
    with pytest.raises(InternalError, match="cannot be downloaded: .*nvidia-pytriton") as failed:
        binary.find(fetch=True)
    assert "\n" not in str(failed.value)
    assert [path.name for path in nowhere.iterdir()] == [".lock"]


def test_a_wheel_with_another_hash_is_refused(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package stands in for the wheel."""
    monkeypatch.setattr(binary, "WHEEL", "six==1.16.0")
    monkeypatch.setattr(binary, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InternalError, match="cannot be downloaded: .*(HASH|hash)"):
        binary.find(fetch=True)
    assert [path.name for path in nowhere.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MINOR", 13, "needs numpy 1, which there is for Python 3.11 and 3.12, this is 3.13"),
        ("platform.machine", lambda: "aarch64", "is for Linux on x86_64, this is Linux aarch64"),
        ("platform.libc_ver", lambda: ("glibc", "2.31"), "needs glibc 2.35, this is glibc 2.31"),
        ("platform.libc_ver", lambda: ("", ""), "needs glibc 2.35, this is another libc"),
    ],
)
def test_machines_that_the_wheel_does_not_run_on_are_told(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, message: str
) -> None:
    monkeypatch.setattr(f"rtp_llm.runtime.tritonserver.binary.{name}", value)
    with pytest.raises(MissingDependency, match=f"{message}.*: run inside NVIDIA's container"):
        binary.find(fetch=True)


def test_a_stub_without_its_libpython_or_of_another_python_is_told(
    triton_binary: Binary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's stub for Python 3.8, whose library is on hardly any machine."""
    stubs = triton_binary.path.parent.parent / "python_backend_stubs"
    (tmp_path / "python").mkdir()
    shutil.copy(stubs / "3.8" / binary.STUB, tmp_path / "python")
    other = Binary(triton_binary.path, tmp_path, None, triton_binary.env)
    assert (other.problem() or [""])[0] == f"Triton's Python stub runs Python 3.8, this is 3.{binary.MINOR}"
    monkeypatch.setattr(binary, "MINOR", 8)
    what, fix = other.problem() or ("", "")
    if "libpython3.8" in what:
        assert what.endswith("which is not on this machine") and "apt-get install libpython3.8" in fix


def test_check_prints_what_is_missing_and_its_fix(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tritonserver", "--check"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("tritonserver   missing  no tritonserver on PATH nor in ")
    assert "\ntritonserver: rtp-llm tritonserver --check --yes downloads it" in out


def test_check_is_content_with_a_complete_one(
    triton_binary: Binary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(binary, "_cache", lambda: triton_binary.backends.parent.parent)
    assert cli.main(["tritonserver", "--check"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [["tritonserver", "ok"], ["backends", "ok"], ["python", "ok"]]


def test_the_doctor_asks_the_same_function(nowhere: Path) -> None:
    check = doctor._tritonserver()
    part = binary.examine()[0]
    assert (check.status, check.found, check.fix) == (doctor.NOTE, part.found, part.fix)

"""Code that others built is opened only with trust; what this machine built is known wherever it lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtp_llm import trust
from rtp_llm.errors import BundleError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTP_LLM_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "trusted.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    real = trust._hash
    monkeypatch.setattr(trust, "_hash", lambda path: (names.append(path.name), real(path))[1])
    return names


def bundle_at(folder: Path, backend: str = "torchscript", **files: bytes) -> Any:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return SimpleNamespace(backend=backend, path=folder, read_path=lambda name: folder / name)


def age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written so far have lain there for an hour."""
    now = time.time()
    monkeypatch.setattr(trust.time, "time", lambda: now + 3600)


def test_what_was_built_here_is_opened_and_what_was_not_is_not(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path / "b", decoder=b"mine", vision=b"theirs")
    trust.record([tmp_path / "b" / "decoder"])
    trust.check(bundle, ["decoder"])
    with pytest.raises(BundleError) as e:
        trust.check(bundle, ["decoder", "vision"])
    line = str(e.value)
    assert str(tmp_path / "b" / "vision") in line and "was not built on this machine" in line
    assert "run any code here with your rights" in line and "--trust-engines" in line and "\n" not in line


def test_trust_opens_anything_and_needs_no_registry(tmp_path: Path, state: Path) -> None:
    trust.check(bundle_at(tmp_path / "b", "tensorrt", plan=b"theirs"), ["plan"], trusted=True)
    assert not state.exists()


def test_onnx_bundles_are_data(tmp_path: Path, hashed: list[str]) -> None:
    trust.check(bundle_at(tmp_path / "b", "onnxruntime", decoder=b"theirs"), ["decoder"])
    assert not hashed


@pytest.mark.parametrize("aged", [False, True])
def test_a_changed_file_is_refused_even_of_equal_size(
    aged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_at(tmp_path / "b", plan=b"mine")
    if aged:
        age(monkeypatch)
    trust.record([tmp_path / "b" / "plan"])
    trust.check(bundle, ["plan"])
    before = (tmp_path / "b" / "plan").stat()
    (tmp_path / "b" / "plan").write_bytes(b"mime")
    os.utime(tmp_path / "b" / "plan", ns=(before.st_atime_ns, before.st_mtime_ns))  # as one who hides it
    with pytest.raises(BundleError, match="plan has changed since it was built on this machine.*--trust-eng"):
        trust.check(bundle, ["plan"])


def test_a_bundle_may_be_moved_or_copied(tmp_path: Path) -> None:
    bundle_at(tmp_path / "b", plan=b"mine")
    trust.record([tmp_path / "b" / "plan"])
    trust.check(bundle_at(tmp_path / "copy", plan=b"mine"), ["plan"])
    (tmp_path / "b").rename(tmp_path / "moved")
    trust.check(bundle_at(tmp_path / "moved"), ["plan"])


def test_a_known_file_is_not_hashed_again(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_at(tmp_path / "b", plan=b"mine", other=b"mine too")
    trust.record([tmp_path / "b" / "plan", tmp_path / "b" / "other"])  # just written: may still change
    hashed.clear()
    age(monkeypatch)
    trust.check(bundle, ["plan", "other"])
    assert hashed == ["plan", "other"]
    hashed.clear()
    trust.check(bundle, ["plan", "other"])
    assert not hashed
    copy = bundle_at(tmp_path / "copy", plan=b"mine")
    for wanted in (["plan"], []):
        trust.check(copy, ["plan"])
        assert hashed == wanted
        hashed.clear()


def test_what_is_seen_counts_for_nothing_where_its_hash_was_never_built(tmp_path: Path, state: Path) -> None:
    bundle = bundle_at(tmp_path / "b", plan=b"theirs")
    trust.record([])
    data = json.loads(state.read_text())
    data["seen"][trust._identity((tmp_path / "b" / "plan").stat())] = "0" * 64
    state.write_text(json.dumps(data))
    with pytest.raises(BundleError):
        trust.check(bundle, ["plan"])


def test_the_registry_is_the_users_alone_whatever_the_umask(tmp_path: Path, state: Path) -> None:
    old = os.umask(0)
    try:
        trust.record([bundle_at(tmp_path / "b", plan=b"mine").read_path("plan")])
    finally:
        os.umask(old)
    assert state.stat().st_mode & 0o777 == 0o600 and state.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_registry_that_others_can_write_is_not_believed(mode: int, tmp_path: Path, state: Path) -> None:
    bundle = bundle_at(tmp_path / "b", plan=b"mine")
    trust.record([bundle.read_path("plan")])
    state.chmod(mode)
    with pytest.raises(BundleError, match="can be written by others"):
        trust.check(bundle, ["plan"])
    state.chmod(0o640)
    trust.check(bundle, ["plan"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3, "seen": {}}', '{"files": {}}'])
def test_a_damaged_registry_is_one_line_that_says_what_to_do(text: str, tmp_path: Path, state: Path) -> None:
    bundle = bundle_at(tmp_path / "b", plan=b"mine")
    trust.record([])
    state.write_text(text)
    with pytest.raises(BundleError, match="trusted.json .*: remove it"):
        trust.check(bundle, ["plan"])


def test_where_nothing_can_be_written_a_build_ends_well_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RTP_LLM_STATE", str(tmp_path / "file" / "state"))
    trust.record([bundle_at(tmp_path / "b", plan=b"mine").read_path("plan")])
    assert "--trust-engines" in caplog.text and "RTP_LLM_STATE" in caplog.text


def test_processes_that_record_together_lose_nothing(tmp_path: Path, state: Path) -> None:
    bundle = bundle_at(tmp_path / "b", **{f"plan{i}": bytes([i]) for i in range(40)})
    code = "import sys; from rtp_llm import trust\nfor path in sys.argv[1:]: trust.record([path])"
    files = [str(bundle.read_path(f"plan{i}")) for i in range(40)]
    made = [subprocess.Popen([sys.executable, "-c", code, *files[i::4]]) for i in range(4)]
    assert [process.wait(60) for process in made] == [0] * 4
    assert len(json.loads(state.read_text())["files"]) == 40
    trust.check(bundle, [f"plan{i}" for i in range(40)])


def test_the_registrys_place_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.registry_path().parent == Path(os.environ["RTP_LLM_STATE"])
    monkeypatch.delenv("RTP_LLM_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert trust.registry_path() == Path("/somewhere/rtp_llm/trusted.json")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert trust.registry_path() == Path("/home/somebody/.local/state/rtp_llm/trusted.json")

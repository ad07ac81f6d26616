"""`rtp-llm doctor` finds what is broken and says how to mend it."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from rtp_llm import cli, doctor
from rtp_llm.doctor import BROKEN, NOTE, OK, Check


def _by_name(
    monkeypatch: pytest.MonkeyPatch, *broken: str, gpu: str | None = None, **versions: str | None
) -> Any:
    """All checks with some modules not importable and some distributions (not) installed."""
    real_version, real_import = doctor.version, importlib.import_module

    def version(name: str) -> str | None:
        return versions.get(name.replace("-", "_"), real_version(name))

    def import_module(name: str, *args: Any) -> Any:
        if name in broken:
            raise ImportError(f"{name}: undefined\nsymbol")
        return real_import(name, *args)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    return {check.name: check for check in doctor.examine()}


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = _by_name(monkeypatch)
    assert [checks[n].status for n in ("python", "packages", "torch", "export", "onnxruntime")] == [OK] * 5
    assert "CPU" in checks["onnxruntime"].found
    assert all(c.fix for c in checks.values() if c.status == BROKEN)
    assert cli.main(["doctor", "--json"]) == 0
    assert {c["name"] for c in json.loads(capsys.readouterr().out)} == set(checks)


def test_two_onnx_runtimes_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    check = _by_name(monkeypatch, onnxruntime_gpu="1.32.0")["onnxruntime"]
    assert check.status == BROKEN
    assert check.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
    check = _by_name(monkeypatch, onnxruntime_gpu="1.32.0", gpu="NVIDIA")["onnxruntime"]
    assert check.fix.endswith("pip install onnxruntime-gpu")


def test_an_onnx_runtime_that_is_too_old_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.24.4")
    check = _by_name(monkeypatch)["onnxruntime"]
    assert (check.status, check.fix.split(" (")[0]) == (BROKEN, "pip install -U onnxruntime")
    assert "1.24.4 is installed, 1.32 or newer is needed" in check.found


def test_missing_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = _by_name(monkeypatch, "PIL", "onnx", "onnxruntime", torch=None)
    assert (checks["packages"].status, checks["packages"].fix) == (BROKEN, "pip install pillow")
    assert "\n" not in checks["packages"].found
    assert (checks["export"].status, checks["export"].fix) == (NOTE, "pip install onnx")
    assert (checks["onnxruntime"].status, checks["torch"].status) == (BROKEN, NOTE)


def test_another_package_of_the_same_import_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check = _by_name(monkeypatch, rtp_llm="0.2.0")["python"]
    assert check.status == BROKEN and "pip uninstall rtp-llm" in check.fix


def test_offline_and_a_dead_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE" in _by_name(monkeypatch)["hub"].fix
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    check = _by_name(monkeypatch)["hub"]
    assert check.status == NOTE and "http://127.0.0.1:9 cannot be reached" in check.found


def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("gpu", NOTE, "none", "buy one")])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "gpu  note  none\n\ngpu: buy one\n"
    monkeypatch.setattr(doctor, "examine", lambda: [Check("python", BROKEN, "old", "newer")])
    assert cli.main(["doctor"]) == 1


def test_a_check_that_raises_is_a_broken_check() -> None:
    def check() -> Check:
        raise RuntimeError("two\nlines")

    assert doctor._safe("x", check).found == "RuntimeError: two lines"


def test_an_old_tensorrt_is_named_with_the_version_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    old = types.ModuleType("tensorrt")
    old.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    check = _by_name(monkeypatch)["tensorrt"]
    assert check.status == NOTE and "10.3.0" in check.found and "10.15" in check.found

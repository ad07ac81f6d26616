"""The comparison with peers, on a tiny model: this project and transformers, and one that dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.alone  # streams must meet
SCRIPTS = Path(__file__).parents[2] / "scripts"
# it loads, and ends when it is asked
DYING = """#!/bin/sh
[ "$2" = prepare ] && exit
echo '{"versions": "dying 1.0"}'
read line
echo "out of memory" >&2
exit 3
"""


def compare(command: str, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "compare_peers.py"), command, str(folder), *words],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two measurements in float32; `genai` dies when it is asked, `openvino` is not installed."""
    folder = tmp_path_factory.mktemp("peers")
    python = folder / "venvs" / "genai" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(DYING)
    python.chmod(0o755)
    words = ["--size", "tiny", "--precision", "fp32", "--rounds", "2"]
    short = ["--prompt-tokens", "24", "--new-tokens", "256", "--streams", "3"]
    compare("run", folder, *words, *short, "--only", "ours", "genai", "openvino", "transformers")
    compare("run", folder, *words, *short, "--image", "--only", "ours", "transformers")
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def test_in_float32_our_logits_are_those_of_transformers(measured: list[dict[str, Any]]) -> None:
    facts = measured[0]["facts"]
    assert facts["ours"]["error"] < 1e-5 and facts["transformers"]["error"] == 0
    assert facts["transformers"]["bytes"] == pytest.approx(4 * 182592, rel=0.01)
    # ours has the angles of 4096 positions too
    assert facts["ours"]["bytes"] == pytest.approx(4 * (182592 + 2 * 4096 * 8), rel=0.05)


def test_every_round_has_the_times_of_all_that_live(measured: list[dict[str, Any]]) -> None:
    text, image = measured
    assert [len(one["rounds"]) for one in measured] == [2, 2]
    for name in ("ours", "transformers"):
        for one in text["rounds"]:
            assert set(one[name]) == {"prefill", "decode", "streams"} and min(one[name].values()) > 0
        assert all(one[name]["picture"] > 0 for one in image["rounds"])
        assert 1e7 < text["facts"][name]["memory"]["peak"] < 1e10


def test_who_dies_or_is_missing_is_reported_and_the_others_go_on(measured: list[dict[str, Any]]) -> None:
    reasons = measured[0]["reasons"]
    assert reasons == {
        "genai": {"generate": "its process ended with status 3: out of memory"},
        "openvino": {"load": "not installed: compare_peers.py setup"},
    }


def test_who_cannot_be_prepared_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "peers"))
    import protocol

    def prepare(folder: Path, precision: str, image: bool) -> None:
        raise NotImplementedError("it knows no pictures")

    monkeypatch.setattr(sys, "argv", ["worker", "prepare", "folder", "int4", "1"])
    with pytest.raises(SystemExit, match=r"^it knows no pictures$"):
        protocol.serve(None, prepare)


def test_the_report_has_the_ratio_of_each_round_s_pair(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "peers.md"
    compare("report", folder, "--output", str(output))
    one = json.loads(output.with_suffix(".json").read_text())[0]
    ratios = sorted(r["transformers"]["decode"] / r["ours"]["decode"] for r in one["rounds"])
    page = output.read_text()
    assert f"; {np.median(ratios):.2f}× ({ratios[0]:.2f} to {ratios[1]:.2f}) |" in page
    assert "- ONNX Runtime GenAI, generate: its process ended with status 3" in page
    assert str(folder) not in page


def test_llama_cpp_computes_from_our_gguf_what_transformers_does(folder: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: it writes llama.cpp's files")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(SCRIPTS / "peers"))
    import llamacpp

    llamacpp.prepare(folder, "fp32", False)
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 600, 40)]
    found = llamacpp.Worker(folder, "fp32", 2, False).logits(ids)["logits"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, -1].numpy()
    # its cache is in 16 bits
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)

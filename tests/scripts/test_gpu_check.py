"""gpu_check.py on a machine without a GPU: its plumbing runs from end to end on tiny shapes, so that on the
machine that has one nothing fails but what is to be found out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from .test_serving_scripts import SCRIPTS, load  # noqa: E402

# what such a machine lacks; and the package is found by its own means alone
BARE = """
import runpy, sys
absent = {"fastapi", "pydantic", "uvicorn", "llguidance", "tensorrt", "onnxscript", "onnx_ir"}
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Bare(f) for f in sys.meta_path if "editable" not in repr(f)]
root = sys.argv.pop(1)
sys.path[:] = [p for p in sys.path if p not in ("", root)]
sys.argv[0] = f"{root}/scripts/gpu_check.py"
sys.path.insert(0, f"{root}/scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE, str(SCRIPTS.parent), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd="/")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    load("make_random_checkpoint")
    load("gpu_models")
    return load("gpu_check")


@pytest.mark.slow
def test_every_part_runs_on_a_bare_machine_and_leaves_its_rows_in_one_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    goldens = SCRIPTS.parents[1] / "shared" / "goldens"
    given = ["--goldens", goldens] if goldens.is_dir() else []
    tiny = ["--device", "cpu", "--size", "tiny", "--output", tmp_path, "--new-tokens", 8, "--batch", 1, 3]
    done = run(*tiny, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(found) == [
        "machine",
        "kernels",
        "goldens",
        "kernel-times",
        "decode",
        "transformers",
        "compiled",
    ]
    rows = {part: {r["name"]: r for r in found[part]["rows"]} for part in found}
    assert all(r["ok"] is not False for part in rows.values() for r in part.values())
    assert sum(r["ok"] is True for r in rows["kernels"].values()) == 4 + 2 * 4
    fused = [name for name in rows["kernel-times"] if name.startswith("add_rms_norm, ")]
    assert len(fused) == 3, "one token; many, and their share of the bandwidth"
    if given:
        assert rows["goldens"]["torchscript fp32, qwenvl_A: greedy tokens"]["ok"] is True
        assert rows["goldens"]["onnxruntime"]["value"].startswith("skipped: ")
    for part in ("decode", "transformers", "compiled"):
        for model in ("qwen_vl", "llava"):
            for batch in (1, 3):
                assert rows[part][f"{model}, batch {batch}: tokens per second"]["value"] > 0
    text = (tmp_path / "gpu_check.md").read_text()
    for title in [*found, "ratios"]:
        assert f"## {title}\n" in text
    assert "qwen_vl, batch 1: tokens per second, over transformers" in text

    again = run(*tiny, "--part", "decode", "--model", "llava")
    assert again.returncode == 0, again.stdout + again.stderr
    after = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert {r["name"] for r in after["decode"]["rows"]} == set(rows["decode"]), "one model's rows were lost"
    assert after["transformers"] == found["transformers"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_so_and_the_exit_code_is_2(tmp_path: Path) -> None:
    done = run("--output", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"gpu_check needs a CUDA GPU, and torch {torch.__version__} sees none\n"
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(c: Any) -> Any:
        yield script.Row("first", 1.0)
        raise RuntimeError("no such thing\nand a second line")

    def missed(c: Any) -> Any:
        yield script.Row("speed", 3.0, "m/s", "≥ 4", False)
        yield from script.guarded("half", broken(c))
        yield script.Row("after", 2.0)

    monkeypatch.setattr(script, "PARTS", {**script.PARTS, "kernels": broken, "kernel-times": missed})
    monkeypatch.setattr(script, "make_importable", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # put back afterwards
    words = ["--device", "cpu", "--size", "tiny", "--output", str(tmp_path)]
    assert script.main([*words, "--part", "kernels", "kernel-times"]) == 1
    end = capsys.readouterr().out.split("gpu_check.md: ")[1]
    assert end.startswith("3 missed\n")
    assert "kernels: failed: RuntimeError: no such thing" in end and "second line" not in end
    assert "speed: 3 m/s (≥ 4) MISSED" in end and "half: failed: RuntimeError" in end
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| first | 1 |  |  |" in text and "| after | 2 |  |  |" in text
    assert "| speed | 3 m/s | ≥ 4 | **missed** |" in text


def test_bounds_hold_on_a_real_machine_at_full_size_only(script: ModuleType) -> None:
    def row(device: str, size: str, value: float) -> Any:
        c = script.Context(device, size, [], [], [], None, 8, math.inf)
        return c.least("share", value, "", 0.7).ok

    assert row("cuda", "full", 0.71) is True and row("cuda", "full", 0.69) is False
    assert row("cuda", "full", math.nan) is False
    assert row("cpu", "tiny", 0.1) is None


def test_ratios_are_ours_over_theirs_and_bound_at_batch_1(script: ModuleType) -> None:
    def part(**values: float) -> dict[str, Any]:
        names = {"one": "llava, batch 1: tokens per second", "eight": "llava, batch 8: tokens per second",
                 "first": "llava: time to first token, one image"}  # fmt: skip
        return {"rows": [{"name": names[k], "value": v} for k, v in values.items()]}

    c = script.Context("cuda", "full", [], [], [], None, 8, math.inf)
    parts = {
        "decode": part(one=100.0, eight=400.0, first=20.0),
        "transformers": part(one=24.0, eight=200.0, first=50.0),
        "compiled": part(one=90.0),
    }
    found = {r.name: (round(r.value, 3), r.ok) for r in script.ratios(c, parts)}
    assert found == {
        "llava, batch 1: tokens per second, over transformers": (4.167, True),
        "llava, batch 8: tokens per second, over transformers": (2.0, None),
        "llava: time to first token, one image, transformers over ours": (2.5, None),
        "llava, batch 1: tokens per second, over compiled": (1.111, False),
    }


def test_tokens_per_second_count_the_stretch_in_which_all_answers_run(script: ModuleType) -> None:
    class Ear:
        def __init__(self, start: float, step: float, count: int):
            self.times = [start + step * i for i in range(count)]

    together = [Ear(0, 0.1, 100), Ear(3, 0.1, 50)]  # the second one joins late, at half of the first
    assert script._tokens_per_second(together) == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize("model", ["qwen_vl", "llava"])
def test_the_models_timed_are_those_of_the_random_checkpoints(
    script: ModuleType, model: str, tmp_path: Path
) -> None:
    from rtp_llm.export.checkpoint import Checkpoint
    from rtp_llm.export.families import FAMILIES, Options

    models, checkpoints = sys.modules["gpu_models"], sys.modules["make_random_checkpoint"]
    checkpoints.MODELS[model](tmp_path, "tiny", 0, True)
    plan = FAMILIES[model].plan(Checkpoint(tmp_path), Options())
    assert models.decoder_config(model, "tiny") == plan.decoder
    with torch.device("meta"):
        expected, found = plan.make_vision(), models.vision(model, "tiny")
    assert {n: p.shape for n, p in found.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }


def test_a_random_model_in_memory_reads_every_weight_but_the_embedding(script: ModuleType) -> None:
    models = sys.modules["gpu_models"]
    backend = models.RandomBackend("llava", "tiny", "cpu", slots=2, max_seq_len=256)
    c = models.decoder_config("llava", "tiny")
    layer = c.hidden_size * (4 * c.hidden_size + 3 * c.intermediate_size + 2)
    words = c.layers * layer + c.hidden_size * (c.vocab_size + 1)
    assert backend.weight_bytes == 4 * words

"""gpu_check.py on a machine without a GPU: its plumbing runs from end to end on tiny shapes, so that on the
machine that has one nothing fails but what is to be found out."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

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
    load("gpu_serving")
    return load("gpu_check")


@pytest.mark.slow
def test_every_part_runs_on_a_bare_machine_and_leaves_its_rows_in_one_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    goldens = SCRIPTS.parents[1] / "shared" / "goldens"
    given = ["--goldens", goldens] if goldens.is_dir() else []
    tiny = ["--device", "cpu", "--size", "tiny", "--output", tmp_path, "--new-tokens", 8, "--batch", 1, 3]
    tiny += ["--streams", 1, 3]
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
        "serving",
        "serving-transformers",
        "serving-vllm",
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
    for model in ("qwen_vl", "llava"):
        for label in ("streams 1", "streams 3", "streams 3 by Poisson, 8/s"):
            for name in ("tokens per second", "time to first token, p95", "time between tokens, p95"):
                assert rows["serving"][f"{model}, {label}: {name}"]["value"] > 0
        assert rows["serving"][f"{model}, streams 3: share of the bandwidth limit"]["value"] > 0
        together = rows["serving"][f"{model}, streams 3: least cosine of logits with those given alone"]
        assert together["value"] > 1 - 1e-5, "float32: whoever else is in the batch, to rounding"
        for label in ("streams 3", "streams 3, words alone"):
            assert rows["serving-transformers"][f"{model}, {label}: tokens per second"]["value"] > 0
        if not importlib.util.find_spec("vllm"):
            assert rows["serving-vllm"][f"{model}: vLLM"]["value"].startswith("not run: ModuleNotFoundError")
    text = (tmp_path / "gpu_check.md").read_text()
    for title in [*found, "ratios"]:
        assert f"## {title}\n" in text
    assert "qwen_vl, batch 1: tokens per second, over transformers" in text
    assert "llava, streams 3: tokens per second, over serving-transformers" in text

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


def test_a_part_that_is_killed_leaves_the_rows_it_had_and_those_of_before(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"values": [1.0, 2.0]}

    def part(c: Any) -> Any:
        for name, value in zip("ab", given["values"], strict=False):
            yield script.Row(name, value)
        if len(given["values"]) < 2:
            raise KeyboardInterrupt  # no Exception, as a signal

    monkeypatch.setattr(script, "PARTS", {**script.PARTS, "kernels": part})
    monkeypatch.setattr(script, "make_importable", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # put back afterwards
    words = ["--device", "cpu", "--size", "tiny", "--output", str(tmp_path), "--part", "kernels"]
    assert script.main(words) == 0
    given["values"] = [3.0]
    with pytest.raises(KeyboardInterrupt):
        script.main(words)
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["kernels"]["rows"]
    assert {r["name"]: r["value"] for r in rows} == {"a": 3.0, "b": 2.0}


def test_bounds_hold_on_a_real_machine_at_full_size_only(script: ModuleType) -> None:
    def row(device: str, size: str, value: float) -> Any:
        c = script.Context(device, size, [], [], [], [], None, 8, math.inf)
        return c.least("share", value, "", 0.7).ok

    assert row("cuda", "full", 0.71) is True and row("cuda", "full", 0.69) is False
    assert row("cuda", "full", math.nan) is False
    assert row("cpu", "tiny", 0.1) is None


def test_ratios_are_ours_over_theirs_and_bound_where_a_goal_is_set(script: ModuleType) -> None:
    def part(**values: float) -> dict[str, Any]:
        names = {"one": "llava, batch 1: tokens per second", "eight": "llava, batch 8: tokens per second",
                 "first": "llava: time to first token, one image",
                 "some": "llava, streams 8: tokens per second",
                 "many": "llava, streams 32: tokens per second",
                 "poisson": "llava, streams 32 by Poisson, 8/s: tokens per second"}  # fmt: skip
        return {"rows": [{"name": names[k], "value": v} for k, v in values.items()]}

    c = script.Context("cuda", "full", [], [], [], [], None, 8, math.inf)
    parts = {
        "decode": part(one=100.0, eight=400.0, first=20.0),
        "transformers": part(one=24.0, eight=200.0, first=50.0),
        "compiled": part(one=90.0),
        "serving": part(some=50.0, many=90.0, poisson=10.0),
        "serving-vllm": part(some=100.0, many=100.0, poisson=11.0),
    }
    found = {r.name: (round(r.value, 3), r.ok) for r in script.ratios(c, parts)}
    assert found == {
        "llava, batch 1: tokens per second, over transformers": (4.167, True),
        "llava, batch 8: tokens per second, over transformers": (2.0, None),
        "llava: time to first token, one image, transformers over ours": (2.5, None),
        "llava, batch 1: tokens per second, over compiled": (1.111, False),
        "llava, streams 8: tokens per second, over serving-vllm": (0.5, None),
        "llava, streams 32: tokens per second, over serving-vllm": (0.9, False),
    }


def test_tokens_per_second_count_the_stretch_in_which_all_answers_run(script: ModuleType) -> None:
    class Ear:
        def __init__(self, start: float, step: float, count: int):
            self.times = [start + step * i for i in range(count)]

    together = [Ear(0, 0.1, 100), Ear(3, 0.1, 50)]  # the second one joins late, at half of the first
    assert script._tokens_per_second(together) == pytest.approx(20, rel=0.05)


def answer(start: float, times: list[float], tokens: list[int] | None = None) -> Any:
    made = sys.modules["gpu_models"].Answer()
    made.start, made.times, made.tokens = start, times, tokens or [0] * len(times)
    return made


def test_figures_of_two_answers_are_those_worked_out_by_hand(script: ModuleType) -> None:
    found = sys.modules["gpu_serving"].figures([answer(1.0, [1.5, 1.6, 1.8]), answer(2.0, [2.1, 2.4, 3.0])])
    assert {name: round(value, 6) for name, (value, _) in found.items()} == {
        "tokens per second": 3.0,  # 6 in the 2 s from 1.0 to 3.0
        "time to first token, p50": 300.0,  # of 100 and 500 ms
        "time to first token, p95": 480.0,
        "time between tokens, p50": 250.0,  # of 100, 200, 300 and 600 ms
        "time between tokens, p95": 555.0,
    }


def test_an_answer_flips_where_it_leaves_the_one_given_alone_and_the_gap_is_of_the_logits_there(
    script: ModuleType,
) -> None:
    alone = [answer(0, [0, 0, 0], [2, 0, 1]) for _ in range(3)]
    for one in alone:
        one.logits = [torch.tensor(row).numpy() for row in ([0.0, 1, 3], [4.0, 2, 0], [0.0, 9, 0])]
    given = [answer(0, [], [2, 0, 1, 7]), answer(0, [], [2, 1, 0, 7]), answer(0, [], [2, 2, 1, 7])]
    count, gap = sys.modules["gpu_serving"].flips(given, alone)
    assert count == 2 and gap == pytest.approx(4 / math.sqrt(8 / 3))  # the third one's: 4 against 0
    assert sys.modules["gpu_serving"].flips(given[:1], alone) == (0, 0.0)


@pytest.mark.parametrize("model", ["qwen_vl", "llava"])
def test_logits_of_another_picture_are_told_from_those_of_another_batch(
    script: ModuleType, model: str
) -> None:
    models, cosine = sys.modules["gpu_models"], sys.modules["gpu_serving"].cosine
    ours = models.Ours(model, "tiny", "cpu", 4, 512)
    asked = models.prompts(model, "tiny", 3, 64, seed=0)
    alone = [ours.ask([prompt], 8, logits=True)[0] for prompt in asked]
    assert cosine(ours.ask(asked, 8, logits=True), alone) > 1 - 1e-5
    pictures = [prompt.picture for prompt in models.prompts(model, "tiny", 3, 64, seed=9)]
    others = [replace(prompt, picture=picture) for prompt, picture in zip(asked, pictures, strict=True)]
    assert cosine(ours.ask(others, 8, logits=True), alone) < script.TOGETHER
    ours.stop()


def test_a_step_reads_all_weights_once_and_the_keys_and_values_of_each_answer(script: ModuleType) -> None:
    models, serving = sys.modules["gpu_models"], sys.modules["gpu_serving"]
    ours = models.Ours("llava", "tiny", "cpu", 2, 256)
    c = models.decoder_config("llava", "tiny")
    keys = 2 * c.layers * c.kv_heads * c.head_dim * 4  # float32
    assert serving.step_bytes(ours, 3, 100.5) == ours.backend.weight_bytes + 3 * 100.5 * keys
    ours.stop()


@pytest.mark.alone
def test_prompts_arrive_when_the_poisson_process_says(script: ModuleType) -> None:
    models, serving = sys.modules["gpu_models"], sys.modules["gpu_serving"]
    many = serving.arrivals(4000, 8.0)
    gaps = [b - a for a, b in zip([0.0, *many], many, strict=False)]
    assert many[-1] / 4000 == pytest.approx(1 / 8, rel=0.05)
    assert sum(gap > 1 / 8 for gap in gaps) / 4000 == pytest.approx(math.exp(-1), rel=0.05)
    ours = models.Ours("llava", "tiny", "cpu", 4, 256)
    first, second = ours.ask(models.prompts("llava", "tiny", 2, 4), 2, [0.05, 0.25])
    ours.stop()
    assert second.start - first.start == pytest.approx(0.2, abs=0.04)
    assert first.times[-1] < second.start, "the first one was answered meanwhile"


def test_fewer_prompts_of_a_seed_are_the_first_of_more(script: ModuleType) -> None:
    prompts = sys.modules["gpu_models"].prompts
    few, more = prompts("qwen_vl", "tiny", 2, 5, seed=3), prompts("qwen_vl", "tiny", 4, 5, seed=3)
    assert [p.words for p in few] == [p.words for p in more[:2]]
    assert all((a.picture == b.picture).all() for a, b in zip(few, more, strict=False))
    assert len({p.picture.tobytes() for p in more}) == 4


def test_vllm_is_given_a_llava_that_transformers_opens_and_gives_as_many_places_to_a_picture(
    script: ModuleType, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sys.modules["gpu_serving"].write_config("llava", "tiny", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    (prompt,) = sys.modules["gpu_models"].prompts("llava", "tiny", 1, 4)
    given = processor(text="<image> w5 w7", images=[Image.fromarray(prompt.picture)], return_tensors="pt")
    assert given["input_ids"].tolist() == [[config.image_token_id] * 16 + [5, 7]]  # (56 / 14)² patches
    assert tuple(given["pixel_values"].shape) == (1, 3, 56, 56)
    assert model.config.vision_config.image_size == 56


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

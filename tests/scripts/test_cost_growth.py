"""The program that measures how cost grows: its lines, its counts, and its points on a tiny model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import cost_growth  # noqa: E402
import make_random_checkpoint  # noqa: E402

sys.path.remove(str(SCRIPTS))

TINY = make_random_checkpoint.LLAVA["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cost_growth.bundle(tmp_path_factory.mktemp("sizes"), "tiny")


def point(**changed: float) -> dict[str, Any]:
    parts = {"attention": 0.5, "products": 0.1, "other nodes": 0.1, "Python": 0.1}
    numbers = {"tokens": 128, "first": 1.0, "encoding": 0.0, "step": 0.1, "peak": 2e9, "own": 1e9}
    more = {"attention_flops": 1e9, "products": 1e9}
    return {**numbers, **more, "first_parts": dict(parts), "step_parts": dict(parts), **changed}


def test_a_cost_on_its_line_is_told_from_one_that_leaves_it() -> None:
    xs = (1, 2, 4, 8, 16)
    measured = {str(n): point(step=3 + 2 * n, own=(4 + n) * 1e9, attention_flops=n * 1e9) for n in xs}
    measured["16"]["step"] *= 2
    rows = {row[0]: row[1:] for row in cost_growth.verdicts("batch", measured)}
    assert rows["batch: a step"] == (
        "3 s + 2 s × answers side by side", "35 s", "70 s", "2.00", "worse than linear"
    )  # fmt: skip
    assert rows["batch: memory of its own"][2:] == ("20 GB", "1.00", "no worse than linear")


def test_the_square_of_attention_is_held_against_its_operations_and_not_against_the_line() -> None:
    model = SimpleNamespace(head_dim=64, heads=12, layers=12)
    measured = {}
    for n in (128, 512, 2048, 8192):
        flops = cost_growth.attention_flops(n, model)
        seconds = flops / 50e9
        parts = {"attention": seconds, "products": n / 1000, "other nodes": 0.0, "Python": 0.0}
        measured[str(n)] = point(tokens=n, first=seconds + n / 1000, first_parts=parts, attention_flops=flops)
    rows = cost_growth.verdicts("prompt", measured)
    assert {row[0]: row[4] for row in rows}["prompt: attention until then"] == "1.00"
    assert {row[0]: row[4] for row in rows}["prompt: first token, without attention and encoding"] == "1.00"


def test_attentions_operations_are_those_that_torch_counts() -> None:
    heads, dim, tokens = 3, 16, 7
    with FlopCounterMode(display=False) as counter:
        for n in range(1, tokens + 1):  # a token sees itself and those before
            query, keys = torch.ones(heads, 1, dim), torch.ones(heads, n, dim)
            torch.bmm(torch.bmm(query, keys.mT), keys)
    model = SimpleNamespace(head_dim=dim, heads=heads, layers=2)
    assert cost_growth.attention_flops(tokens, model) == 2 * counter.get_total_flops()


@pytest.mark.alone
def test_a_point_counts_its_tokens_and_accounts_for_all_of_its_time(tiny: Path) -> None:
    call = {"path": str(tiny), "prompt": 40, "batch": 2, "images": 3}
    found = cost_growth.child(call)
    edge = TINY["clip"]["image_size"] // TINY["clip"]["patch_size"]
    text = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(39 * cost_growth.WORD).ids
    assert found["tokens"] == 1 + 3 * edge**2 + len(text) > 80
    parts = found["first_parts"]
    assert sum(parts.values()) + found["encoding"] == pytest.approx(found["first"])
    assert sum(found["step_parts"].values()) == pytest.approx(found["step"])
    assert min(*parts.values(), *found["step_parts"].values(), found["encoding"]) > 0
    assert found["peak"] >= found["own"] > 20e6
    assert not list(tiny.parent.glob("*.json"))  # the profiles


def test_the_weights_in_products_are_counted_as_config_json_has_them(tiny: Path) -> None:
    h, inner = TINY["hidden_size"], TINY["intermediate_size"]
    expected = TINY["num_hidden_layers"] * (4 * h * h + 3 * h * inner) + h * TINY["vocab_size"]
    assert cost_growth.products(tiny / "decoder.onnx") == expected


def test_a_start_is_accounted_for_from_the_process_to_the_first_token(tiny: Path) -> None:
    found = cost_growth.child({"path": str(tiny), "start": "warm"})
    assert list(found)[:4] == ["imports", "manifest and tokenizer", "ONNX Runtime's session", "first token"]
    assert all(0 < seconds < 60 for seconds in list(found.values())[:4])
    assert found["peak"] >= found["own"] > 20e6


def test_files_that_are_forgotten_are_not_in_memory_any_more(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(2**20))
    with open(tmp_path / "weights", "rb") as f:
        try:
            assert os.preadv(f.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
            cost_growth.forget(tmp_path)
            os.preadv(f.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return  # it would have to be read from the disk
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                pytest.skip("this file system cannot tell")
            raise
    pytest.fail("it is still there")


def test_the_page_has_each_axis_and_keeps_what_is_written_above_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "growth.md"
    page.write_text("# Mine\n\nfound and explained\n\n## Measured\n\nstale")
    axes = cost_growth.AXES.items()
    results = {axis: {x: point(step=i + 1.0) for i, x in enumerate(xs)} for axis, (_, xs) in axes}
    start = {"imports": 0.5, "first token": 1.5, "read": 4e9, "peak": 6e9, "own": 5e9}
    results["start"] = {"cold": start, "warm": {**start, "read": 0}}
    page.with_suffix(".json").write_text(json.dumps(results))
    command = [sys.executable, str(SCRIPTS / "cost_growth.py"), str(tmp_path), "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("# Mine\n\nfound and explained\n\n## Measured\n") and "stale" not in text
    for axis, (x, _) in axes:
        assert f"| {axis}: a step |" in text and f"### {x.capitalize()}" in text
    assert "| read | 4.00 GB | 0.00 GB |" in text and "(growth.png)" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

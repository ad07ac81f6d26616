"""The programs that test serving: a few seconds of each against a real server, and what they judge by."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.alone
@pytest.mark.slow
def test_under_load_every_answer_is_the_one_given_alone_and_nothing_is_left_behind(
    llava_bundle: Path, tmp_path: Path
) -> None:
    short = ["--clients", "8", "--seconds", "3", "--warm-up", "2", "--drawings", "20", "--new-tokens", "16"]
    # fewer places than clients: some are told 429 and come again
    short += ["--concurrency-limit", "6"]
    done = run("load_test.py", str(llava_bundle), *short, "--json", "--output", str(tmp_path / "load.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["broken"] == [] and numbers["requests_failed"] == 0
    assert numbers["answers_equal"] == numbers["requests_ok"] > 10
    assert numbers["requests_cancelled"] > 0 and numbers["retries_after_429"] > 0
    assert numbers["requests"] == numbers["requests_ok"] + numbers["requests_cancelled"]
    page = (tmp_path / "load.md").read_text()
    assert "time to first token, p50 and p95" in page and str(tmp_path) not in page


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch, triton_binary: Any) -> None:
    """The program is there for a command that is started."""
    monkeypatch.setenv("RTP_LLM_CACHE", str(triton_binary.path.parents[4].parent))


@pytest.mark.alone
@pytest.mark.slow
def test_triton_gets_the_same_load_and_is_measured_beside(
    llava_bundle: Path, tmp_path: Path, triton_cache: None
) -> None:
    short = ["--clients", "8", "--seconds", "6", "--warm-up", "2", "--drawings", "20", "--new-tokens", "16"]
    short += ["--concurrency-limit", "6", "--triton", "--output", str(tmp_path / "load.md")]
    done = run("load_test.py", str(llava_bundle), *short, "--json")
    numbers = json.loads(done.stdout)
    # a run of seconds tells nothing of throughput
    assert [line for line in numbers["broken"] if "throughput" not in line] == [], done.stderr
    (triton,) = numbers["triton"]
    assert triton["answers_equal"] == triton["requests_ok"] > 10
    assert triton["requests_cancelled"] > 0 and triton["retries_after_429"] > 0
    assert 0.3 < triton["of_the_http_server"] < 3
    page = (tmp_path / "load.md").read_text()
    assert "|  | HTTP server | Triton |" in page and "of the HTTP server's" in page


@pytest.mark.alone
@pytest.mark.slow
def test_leaks_of_triton_are_those_of_all_its_processes(
    llava_bundle: Path, tmp_path: Path, triton_cache: None
) -> None:
    short = ["--requests", "120", "--warm-up", "120", "--triton", "--output", str(tmp_path / "leaks.md")]
    done = run("leak_test.py", str(llava_bundle), *short, "--json")
    numbers = json.loads(done.stdout)
    assert [line for line in numbers["broken"] if "memory grows" not in line] == [], done.stderr
    assert numbers["ended"]["ok"] + numbers["ended"]["cancelled"] == 120
    assert numbers["before"]["files in /dev/shm"] > 0, "the region that Python models share with the server"
    assert "Leaks of Triton" in (tmp_path / "leaks.md").read_text()


@pytest.mark.alone
@pytest.mark.slow
def test_the_ratios_are_measured(llava_bundle: Path, tmp_path: Path) -> None:
    short = ["--pairs", "1", "--streams", "2", "--new-tokens", "64"]
    short += ["--output", str(tmp_path / "ratios.md")]
    done = run("serving_ratios.py", str(llava_bundle), *short, "--json")
    assert done.returncode in (0, 1), done.stderr  # 1: a sample is too small to keep the promises
    found = json.loads(done.stdout)
    assert sorted(found) == ["elsewhere", "http", "images", "second", "text"], done.stderr
    assert found.pop("elsewhere") == [0], "a picture that was shown elsewhere is not encoded again"
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
    assert "| second |" in (tmp_path / "ratios.md").read_text()


@pytest.mark.alone
@pytest.mark.slow
def test_the_leak_test_counts_and_measures(llava_bundle: Path, tmp_path: Path) -> None:
    short = ["--requests", "120", "--warm-up", "60", "--output", str(tmp_path / "leaks.md")]
    done = run("leak_test.py", str(llava_bundle), *short, "--json")
    numbers = json.loads(done.stdout)
    # memory still moves in so short a run; everything else must hold
    assert [line for line in numbers["broken"] if "memory grows" not in line] == [], done.stderr
    assert numbers["ended"]["ok"] + numbers["ended"]["cancelled"] == 120
    assert numbers["ended"]["cancelled"] >= 36
    assert "slope, bytes a request" in (tmp_path / "leaks.md").read_text()


def noisy(leak: int, seed: int) -> list[tuple[int, int]]:
    """Memory that a leak of so many bytes a request hides in."""
    rng = random.Random(seed)
    return [(n, 10**8 + leak * n + rng.randint(0, 4 * 10**6)) for n in range(20, 12_001, 20)]


@pytest.mark.parametrize(("leak", "passes"), [(0, True), (500, True), (1500, False)])
def test_a_leak_is_told_from_noise(leak: int, passes: bool) -> None:
    leak_test = load("leak_test")
    assert (leak_test.slope(noisy(leak, 1)).high <= leak_test.SLOPE_LIMIT) == passes


def test_the_interval_holds_the_true_slope_19_times_in_20() -> None:
    leak_test = load("leak_test")
    found = [leak_test.slope(noisy(500, seed)) for seed in range(200)]
    assert 0.9 <= sum(f.low < 500 < f.high for f in found) / 200 <= 0.99


def test_the_slope_is_least_squares_with_students_interval() -> None:
    """Against numpy's fit and a table of Student's t."""
    import numpy as np

    leak_test = load("leak_test")
    rng = np.random.default_rng(0)
    xs = np.arange(40) * 10.0
    ys = 5 * xs + rng.normal(0, 30, 40)
    found = leak_test.slope([(int(x), float(y)) for x, y in zip(xs, ys, strict=True)])
    (value, _), covariance = np.polyfit(xs, ys, 1, cov=True)
    assert found.value == pytest.approx(value)
    assert (found.high - found.low) / 2 == pytest.approx(2.0244 * covariance[0, 0] ** 0.5, rel=1e-3)


def test_what_grew_and_what_vanished_is_told() -> None:
    serving = load("serving")
    before = {"threads": 20, "sockets": 3, "blocks free or retained": 100}
    assert serving.grown(before, {"threads": 19, "sockets": 3, "blocks free or retained": 100}) == []
    after = {"threads": 21, "sockets": 3, "blocks free or retained": 99}
    assert serving.grown(before, after) == [
        "threads: 20 before, 21 after",
        "blocks free or retained: 100 before, 99 after",
    ]


def judged(answer: dict[str, Any], alone: dict[str, Any], precision: str = "fp32") -> Any:
    load_test = load("load_test")
    case = load_test.Case("/v1/chat/completions", {"temperature": 1})
    usual = {"ended": "ok", "texts": ["a"], "reasons": ["stop"], "tokens": 1}
    case.answer, case.alone = (load_test.Answer(**usual | changed) for changed in (answer, alone))
    return load_test._judge([case], precision, "")


def test_another_answer_or_a_lost_one_breaks_the_promise() -> None:
    assert judged({}, {}) == ({"equal": 1, "flips": 0, "wrong": 0}, [])
    for changed in ({"texts": ["b"]}, {"reasons": ["length"]}, {"tokens": 2}):
        counts, broken = judged(changed, {})
        assert counts["wrong"] == 1 and "not the answer given alone" in broken[0], changed
    _, broken = judged({"ended": "failed", "detail": "500 oops"}, {})
    assert broken == ["a request failed: 500 oops"]


def test_the_same_seed_gives_the_same_requests() -> None:
    load_test = load("load_test")
    one, two = (load_test.Workload("seed", "llava", 2, 16) for _ in range(2))
    assert [one.case(i) for i in range(30)] == [two.case(i) for i in range(30)]
    assert one.case(1) != load_test.Workload("other", "llava", 2, 16).case(1)

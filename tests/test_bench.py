"""`rtp-llm bench`: a short run on the sample has every figure, and the limits are those of the formulae."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rtp_llm import bench, cli, roofline
from rtp_llm.errors import UserError
from rtp_llm.export import quantize
from rtp_llm.export.bundle import read
from rtp_llm.export.exporter import export

SHORT = "--prompt-tokens 32 --new-tokens 12 --batch 1 3 --repeat 2 --requests 6".split()


@pytest.fixture(scope="module")
def done(qwen_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a short run through the command line, and its plot."""
    output = tmp_path_factory.mktemp("bench") / "found.json"
    with pytest.MonkeyPatch.context() as patch:  # a machine's limits take longer than the rest
        patch.setattr(roofline, "READ", 2**26)
        patch.setattr(roofline, "SIDE", 512)
        assert cli.main(["bench", str(qwen_bundle), *SHORT, "--quiet", "--output", str(output)]) == 0
    return json.loads(output.read_text()), output.with_suffix(".png")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """All that have a spread, by where they stand."""
    found = {}

    def walk(where: str, value: Any) -> None:
        if isinstance(value, dict) and "runs" in value:
            found[where] = value
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{where}/{name}", inner)

    walk("", report)
    return found


def test_every_figure_is_there_with_each_of_its_runs(done: tuple[dict[str, Any], Path]) -> None:
    found = figures(done[0])
    kinds = ("text", "1 picture", "4 pictures", "1 picture, known")
    assert set(found) == {
        *(f"/first_token_seconds/{kind}" for kind in kinds),
        *(f"/decode_tokens_per_second/{batch}" for batch in (1, 3)),
        *(f"/limits/operations_per_second/{precision}" for precision in ("fp32", "int8", "int4")),
        "/prefill_tokens_per_second",
        "/load_seconds",
        "/limits/read_bytes_per_second",
    }
    for name, figure in found.items():
        assert len(figure["runs"]) == 2 and min(figure["runs"]) > 0, name
        assert figure["median"] == pytest.approx(np.median(figure["runs"])), name
        assert (figure["least"], figure["most"]) == (min(figure["runs"]), max(figure["runs"])), name


def test_the_report_says_what_was_measured_where(
    done: tuple[dict[str, Any], Path], qwen_bundle: Path
) -> None:
    report = done[0]
    assert report["command"].startswith(f"rtp-llm bench {qwen_bundle} --prompt-tokens 32")
    assert report["bundle"]["precision"] == "fp32" and report["bundle"]["backend"] == "onnxruntime"
    assert (
        report["versions"]["onnxruntime"] and report["machine"]["cpu"] and report["machine"]["threads"] >= 1
    )
    assert report["date"][:2] == "20" and report["settings"]["batches"] == [1, 3]
    assert report["export_seconds"] > 0
    peak = report["memory_bytes"]
    assert max(peak["anonymous"], peak["file"]) <= peak["all"] <= report["machine"]["memory"]


def test_each_arrival_is_answered_with_the_tokens_asked_for(done: tuple[dict[str, Any], Path]) -> None:
    report = done[0]
    shares = [a["share"] for a in report["arrivals"]]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] < 1
    for a in report["arrivals"]:
        rate = a["offered_requests_per_second"]
        assert rate == pytest.approx(a["share"] * report["capacity_requests_per_second"])
        assert [len(request["tokens"]) for request in a["requests"]] == [12] * 6
        assert all(0 <= request["arrived"] <= 6 / rate for request in a["requests"])
        assert all(request["tokens"] == sorted(request["tokens"]) for request in a["requests"])
        assert 0 < a["requests_per_second"] <= rate * (1 + 1e-9), "no more than were offered"
        assert a["tokens_per_second"] == pytest.approx(12 * a["requests_per_second"])
        firsts = [request["tokens"][0] for request in a["requests"]]
        assert a["first_token_seconds"]["p50"] == pytest.approx(np.median(firsts))
        assert a["between_tokens_seconds"]["p50"] <= a["between_tokens_seconds"]["p95"]


def test_the_table_shows_the_figures_in_one_screen(
    done: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for rows in bench.tables(done[0]):
        cli._table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert sum(line.startswith("first token, ") for line in lines) == 4
    (decode,) = [line.split() for line in lines if line.startswith("decode at batch 3, tokens a second ")]
    assert decode[7] == bench._number(done[0]["decode_tokens_per_second"]["3"]["median"])


def test_the_plot_is_a_picture(done: tuple[dict[str, Any], Path]) -> None:
    with Image.open(done[1]) as plot:
        plot.load()
        assert plot.format == "PNG" and plot.width >= 1200 and plot.height >= 400
        assert len(plot.convert("RGB").getcolors(2**20) or ()) > 50, "lines and letters"


def test_without_matplotlib_the_table_and_the_json_still_come(
    qwen_bundle: Path,
    done: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: done[0])  # once is enough
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["bench", str(qwen_bundle), "--output", str(tmp_path / "found.json")]) == 0
    out, err = capsys.readouterr()
    assert "decode at batch 3" in out and json.loads((tmp_path / "found.json").read_text())["arrivals"]
    assert err == "rtp-llm bench: no plot: it needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 1 17", "--batch 17 must be at most 16: so many run side by side"),
        ("--batch 0", "--batch 0 must be 1 or more"),
        (
            "--prompt-tokens 8192",
            "--prompt-tokens 8192 and --new-tokens 64 are 8256 tokens, the longest sequence",
        ),
        ("--max-seq-len 100", "the longest sequence has 100"),
        ("--prompt-tokens 15", "--prompt-tokens 15 must be 16 or more"),
        ("--new-tokens 1", "--new-tokens 1 must be 2 or more"),
        ("--repeat 0", "--repeat 0 must be 1 or more"),
        ("--requests 0", "--requests 0 must be 1 or more"),
    ],
)
def test_what_a_bundle_cannot_have_is_one_line_before_anything_is_measured(
    words: str, message: str, qwen_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(qwen_bundle), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_decode_counts_only_steps_in_which_every_answer_gets_a_token() -> None:
    # steps of 10 ms; the third answer begins 5 steps after the first, while the others are slowed to 50 ms
    early = [0.05 * i for i in range(6)] + [0.25 + 0.01 * i for i in range(1, 20)]
    late = [0.25 + 0.01 * i for i in range(25)]
    assert bench.decode_rate([early, early, late]) == pytest.approx(3 / 0.01)
    with pytest.raises(UserError, match="--new-tokens is too small"):
        bench.decode_rate([[0.0, 1.0], [1.5, 2.5]])


def test_decode_writes_all_answers_to_their_end(qwen_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[float]]] = []
    monkeypatch.setattr(bench, "decode_rate", lambda times: seen.append(times) or 1.0)
    model = bench.ModelFactory.from_huggingface(qwen_bundle)
    with bench.Pipeline(model) as pipeline:
        measured = bench._Bench(pipeline, bench.Settings(prompt_tokens=40, new_tokens=20, batches=(5,)))
        for _ in range(2):
            measured.decode(5)
        reused = model.engine.stats().reused_tokens
    assert [[len(at) for at in times] for times in seen] == [[20] * 5] * 2
    assert reused >= 5 * 32, "the second time nothing but the last tokens of the prompts is computed"


def test_without_limits_the_table_says_why_and_the_plot_still_comes(
    qwen_bundle: Path, done: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    bundle = read(qwen_bundle)
    found = roofline.limits(bundle, 16, 1, 1, [1], 32, 40)
    assert found == {"missing": "they need onnx: pip install onnx"}
    paged = dataclasses.replace(bundle, model=dataclasses.replace(bundle.model, attention="paged"))
    assert "on a CPU only" in roofline.limits(paged, 16, 1, 1, [1], 32, 40)["missing"]
    report = done[0] | {"limits": found}
    assert ("limits", found["missing"]) in bench.tables(report)[0]
    bench.plot(report, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        plot.load()


def test_pictures_that_do_not_fit_are_left_out(
    qwen_bundle: Path, done: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config = bench.ModelConfig(max_seq_len=400)  # a picture has 256 tokens
    with bench.Pipeline(bench.ModelFactory.from_huggingface(qwen_bundle, None, config)) as pipeline:
        found = bench._Bench(pipeline, bench.Settings(32, 12, (1,), 1, 2)).figures(lambda _: None)
    first = found["first_token_seconds"]
    assert first["1 picture"]["median"] > 0 and first["4 pictures"] is None
    report = done[0] | {"first_token_seconds": first}
    assert ("first token, 4 pictures", "does not fit", "", "", "", "") in bench.tables(report)[1]
    bench.plot(report, tmp_path / "plot.png")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_decoders_work_is_read_off_its_graph(
    precision: str, llava_bundle: Path, sample_llava: Path, tmp_path: Path
) -> None:
    """Against the checkpoint's own matrices, and their size at 8 and 4 bits."""
    bundle = read(llava_bundle)
    if precision != "fp32":
        bundle = export(sample_llava, tmp_path / "bundle", precision=precision)
    config = json.loads((sample_llava / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sample_llava.glob("*.bin"):
        weights |= torch.load(file, weights_only=True)
    matrices = {name: w.numel() for name, w in weights.items() if w.dim() == 2}
    layers = sum(count for name, count in matrices.items() if name.startswith("model.layers."))
    found = roofline.work(bundle, block_bytes=1600)
    assert (found.weights, found.head_weights) == (layers, matrices["lm_head.weight"])
    assert (found.kv_bytes, found.attention) == (100, 4 * config["num_hidden_layers"] * config["hidden_size"])
    stored = 0.0
    for name in matrices:
        if name.startswith("model.layers.") or name == "lm_head.weight":
            rows, columns = weights[name].shape
            block = next(size for size in (128, 64, 32) if columns % size == 0)
            # half a byte a value, and a float32 and half a byte a block
            size = {"fp32": 4.0, "int4": 0.5 + 4.5 / block}
            # a byte a value, and a float32 and a byte a block of the head, a float32 an output elsewhere
            size["int8"] = 1 + (5 / 16 if name == "lm_head.weight" else 4 / columns)
            stored += rows * columns * size[precision]
    assert found.weight_bytes == pytest.approx(stored, rel=0.01)


def test_the_products_that_are_timed_have_the_exports_blocks() -> None:
    assert roofline.INT4_BLOCK == quantize.BLOCKS[4]


def test_limits_are_those_of_the_roofline() -> None:
    """By hand: 1000 bytes of weights and 10 bytes a cached token at 1 kB/s; 100 + 20 weights at 1 kop/s."""
    decoder = roofline.Work(weight_bytes=1000, weights=100, head_weights=20, kv_bytes=10, attention=8)
    assert decoder.memory(1000, rows=4, cached=100) == pytest.approx(4 / 2)
    # 2·(4·100 + 4·20) / 1000 + 8·50 / 2000 = 0.96 + 0.2 seconds
    assert decoder.arithmetic(1000, 2000, rows=4, heads=4, pairs=50) == pytest.approx(4 / 1.16)
    # a prompt's head is one row: 2·(4·100 + 20) / 1000 = 0.84 seconds
    assert decoder.arithmetic(1000, 2000, rows=4, heads=1, pairs=0) == pytest.approx(4 / 0.84)


def test_a_bundle_from_before_has_no_export_time(
    done: tuple[dict[str, Any], Path], qwen_bundle: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(qwen_bundle, tmp_path / "old")
    data = json.loads((old / "bundle.json").read_text())
    assert data["origin"].pop("seconds") > 0
    (old / "bundle.json").write_text(json.dumps(data))
    assert read(old).origin.seconds is None
    rows = bench.tables(done[0] | {"export_seconds": None})[1]
    assert next(row for row in rows if row[0] == "export")[1] == "not recorded"

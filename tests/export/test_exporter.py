"""An export gives what the checkpoint says, once; what fails leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from rtp_llm.errors import (
    BundleError,
    CheckpointError,
    NotSupportedYet,
    UnknownArchitecture,
    UserError,
)
from rtp_llm.export import bundle as bundles
from rtp_llm.export import exporter, graph
from rtp_llm.export import target as targets
from rtp_llm.export.attention import Eager
from rtp_llm.export.bundle import Bundle
from rtp_llm.export.checkpoint import Checkpoint
from rtp_llm.export.decoder import Decoder
from rtp_llm.export.exporter import Progress, StderrProgress, export
from rtp_llm.export.families import FAMILIES, Options, Plan
from rtp_llm.runtime.backends.onnx import set_products

from ..random_checkpoints import script

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc and /dev")


@pytest.fixture(scope="session")
def exported(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, precision) → (bundle, progress); each is exported once."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(family: str, precision: str) -> tuple[Bundle, list[Progress]]:
        if (family, precision) not in done:
            progress: list[Progress] = []
            output = folder / f"{family}-{precision}"
            made = export(checkpoints / family, output, precision=precision, progress=progress.append)
            done[family, precision] = made, progress
        return done[family, precision]

    return get


@pytest.fixture
def own(exported: Any, tmp_path: Path) -> Path:
    """A copy of the float32 llava bundle, to be changed."""
    shutil.copytree(exported("llava", "fp32")[0].path, tmp_path / "own")
    return tmp_path / "own"


class Traced(Exception):
    """The export has come to its first graph: it is not a no-op, and nothing was wrong before."""


def until_tracing(p: Progress) -> None:
    if p.text.startswith("tracing"):
        raise Traced


def refused(error: type[Exception], *parts: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def plan_of(folder: Path, family: str) -> Plan:
    return FAMILIES[family].plan(Checkpoint(folder), Options())


def session_of(bundle: Bundle, graph: str) -> ort.InferenceSession:
    path, options = bundle.read_path(bundle.graphs[graph].path), ort.SessionOptions()
    set_products(options)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def first_logits(bundle: Bundle, ids: list[int], images: np.ndarray) -> np.ndarray:
    """Logits of a whole prompt in one empty slot."""
    n = len(ids)
    rows = np.arange(n, dtype=np.int64)
    inputs: dict[str, np.ndarray] = {
        "input_ids": np.array(ids, np.int64), "image_embeds": images, "positions": rows,
        "position_ids": rows[None], "pad_rows": rows, "packed_rows": rows,
        "query_seqlens": np.array([n], np.int32), "seqlens_k": np.array([n - 1], np.int32),
        "total_sequence_length": np.array(n, np.int32), "logits_rows": rows,
    }  # fmt: skip
    m = bundle.model
    cache = np.zeros((1, m.kv_heads, n + m.heads, m.head_dim), np.float32)
    for spec in bundle.graphs["decoder"].inputs:
        if spec.name.startswith("past_"):
            inputs[spec.name] = cache
    wanted = {spec.name for spec in bundle.graphs["decoder"].inputs}
    feed = {k: v for k, v in inputs.items() if k in wanted}
    return session_of(bundle, "decoder").run(["logits"], feed)[0]


@pytest.mark.parametrize("precision, least", [("fp32", 0.999999), ("int8", 0.9995), ("int4", 0.95)])
@pytest.mark.parametrize("family", ["qwen_vl", "llava"])
def test_both_graphs_compute_what_the_checkpoint_says(
    family: str, precision: str, least: float, exported: Any, checkpoints: Path
):
    bundle, progress = exported(family, precision)
    plan = plan_of(checkpoints / family, family)
    assert (bundle.precision, bundle.model.family) == (precision, family)
    assert bundle.graphs["decoder"].precision == precision
    assert bundle.graphs["vision"].precision == ("int8" if precision == "int4" else "fp32")

    vision = plan.make_vision().eval().requires_grad_(False)
    for name, parameter in vision.named_parameters():
        parameter.copy_(plan.vision_weights[name].read())
    size = bundle.vision.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=generator)
    expected = vision(pixels)
    [features] = session_of(bundle, "vision").run(None, {"pixels": pixels.numpy()})
    assert features.shape == (2, bundle.vision.tokens, bundle.vision.hidden_size)
    off = 0.1 if precision == "int4" else 5e-5
    assert np.abs(features - expected.numpy()).max() <= off * float(expected.std())

    decoder = Decoder(plan.decoder).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(plan.decoder_weights[name].read())
    v = bundle.model.vocab_size
    ids = [5, 17, *range(v, v + 12), 3, 250, 9]
    images = features[1]
    rows = torch.arange(len(ids))
    attend = Eager(decoder, rows, [len(ids)])
    want = decoder(torch.tensor(ids), torch.from_numpy(images), attend, None, rows).numpy()
    found = first_logits(bundle, ids, images)
    cosine = (found * want).sum() / np.linalg.norm(found) / np.linalg.norm(want)
    assert cosine >= least
    if precision == "fp32":
        assert np.abs(found - want).max() <= 5e-5 * want.std()

    lines = [p.text for p in progress if not p.total]
    assert family in lines[0] and "wrote" in lines[-1]
    steps = [p for p in progress if p.total]
    assert all(a.done <= b.done <= b.total for a, b in zip(steps, steps[1:], strict=False))
    assert steps[-1].done == steps[-1].total and steps[-1].rate > 0


def test_lower_precision_makes_smaller_files(exported: Any):
    sizes = [exported("llava", p)[0].files["decoder.onnx.data"].size for p in ("fp32", "int8", "int4")]
    assert sizes[0] > 1.5 * sizes[1] and sizes[1] > 1.1 * sizes[2]


def test_a_bundle_is_whole_and_holds_no_trace_of_its_making(exported: Any):
    bundle, _ = exported("llava", "fp32")
    assert bundles.read(bundle.path, check_hashes=True) == bundle
    on_disk = {str(f.relative_to(bundle.path)) for f in bundle.path.rglob("*") if f.is_file()}
    assert on_disk == {*bundle.files, "bundle.json"}
    assert {"torch", "onnx", "rtp_llm", "exporter"} <= set(bundle.origin.tools)
    graph = bundle.read_path("decoder.onnx").read_bytes()
    for trace in (b"site-packages", os.fsencode(Path(__file__).parents[2]), b".partial-"):
        assert trace not in graph


def test_the_same_export_twice_gives_the_same_bytes(exported: Any, checkpoints: Path, tmp_path: Path):
    first, _ = exported("llava", "fp32")
    again = export(checkpoints / "llava", tmp_path / "again", precision="fp32")
    assert again.files == first.files


# ------------------------------------------------------------------------------------ again, and other


def test_the_same_again_is_a_no_op_that_says_so(own: Path, checkpoints: Path):
    before = {f: f.stat().st_mtime_ns for f in own.iterdir()}
    said: list[str] = []
    for _ in range(2):
        found = export(checkpoints / "llava", own, precision="fp32", progress=lambda p: said.append(p.text))
    assert found == bundles.read(own)
    assert {f: f.stat().st_mtime_ns for f in own.iterdir()} == before
    assert "is already the export of this checkpoint (--force redoes it)" in said[-1]
    # "auto" that comes to the same is the same
    export(checkpoints / "llava", own, progress=until_tracing)


def test_force_exports_anew(own: Path, checkpoints: Path):
    with pytest.raises(Traced):
        export(checkpoints / "llava", own, precision="fp32", force=True, progress=until_tracing)
    assert bundles.read(own, check_hashes=True)  # a failed one keeps the old


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "int8"},
        {"vision_precision": "int8"},
        {"max_seq_len": 100},
        {"conversation": "llava_v1"},
    ],
)
def test_another_option_exports_anew(changed: dict[str, Any], own: Path, checkpoints: Path):
    options = {"precision": "fp32", **changed}
    with pytest.raises(Traced):
        export(checkpoints / "llava", own, progress=until_tracing, **options)


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "config.json", "clip/config.json"])
def test_a_changed_checkpoint_exports_anew(file: str, own: Path, checkpoints: Path, tmp_path: Path):
    folder = tmp_path / "llava"
    shutil.copytree(checkpoints / "llava", folder)  # copies times, as copy2 does
    export(folder, own, precision="fp32", progress=until_tracing)
    if file.endswith(".json"):
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, "note": "changed"}))
    else:
        os.utime(folder / file, (1, 1))
    with pytest.raises(Traced):
        export(folder, own, precision="fp32", progress=until_tracing)


@pytest.mark.parametrize("tool", ["rtp_llm", "exporter"])
def test_a_bundle_of_another_version_is_exported_anew(tool: str, own: Path, checkpoints: Path):
    data = json.loads((own / "bundle.json").read_text())
    data["origin"]["tools"][tool] = "0.0.older"
    (own / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(Traced):
        export(checkpoints / "llava", own, precision="fp32", progress=until_tracing)


@pytest.mark.parametrize("damage", ["size", "schema", "tools"])
def test_a_damaged_bundle_is_exported_anew(damage: str, own: Path, checkpoints: Path):
    if damage == "size":
        os.truncate(own / "decoder.onnx.data", 10)
    else:
        data = json.loads((own / "bundle.json").read_text())
        data["schema"] += damage == "schema"
        if damage == "tools":
            data["origin"]["tools"] = {}
        (own / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(Traced):
        export(checkpoints / "llava", own, precision="fp32", progress=until_tracing)


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_what_is_no_bundle_is_never_overwritten(kind: str, checkpoints: Path, tmp_path: Path):
    output = tmp_path / "mine"
    if kind == "file":
        output.write_text("my thesis")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("my thesis")
    else:
        shutil.copytree(checkpoints / "llava", output)
    before = sorted(f.name for f in tmp_path.rglob("*"))
    for force in (False, True):
        call = lambda: export(checkpoints / "llava", output, force=force)  # noqa: B023, E731
        refused(BundleError, str(output), "not overwritten", "--output", call=call)
    assert sorted(f.name for f in tmp_path.rglob("*")) == before


def test_an_empty_folder_may_become_the_bundle(checkpoints: Path, tmp_path: Path):
    with pytest.raises(Traced):
        export(checkpoints / "llava", tmp_path, progress=until_tracing)
    assert list(tmp_path.iterdir()) == []


def test_output_is_named_after_checkpoint_backend_and_precision(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names: list[Path] = []
    monkeypatch.setattr(exporter, "_check_space", lambda final, *_, **__: names.append(final))
    monkeypatch.setattr(exporter.GraphPlan, "write", lambda *_: (_ for _ in ()).throw(Traced()))
    with pytest.raises(Traced):
        export(checkpoints / "llava")
    assert names == [Path("llava-onnxruntime-fp32")]
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- failures


def test_ctrl_c_in_the_middle_leaves_nothing(checkpoints: Path, tmp_path: Path, ctrl_c: None):
    def interrupt(p: Progress) -> None:
        if p.done > 20_000:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        export(checkpoints / "llava", tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from rtp_llm.export.exporter import export

def kill(p):
    if p.done > 20_000:
        os.kill(os.getpid(), signal.SIGKILL)

export(sys.argv[1], sys.argv[2], precision="fp32", force=True, progress=kill)
"""


def test_kill_9_in_the_middle_leaves_no_half_bundle(own: Path, checkpoints: Path):
    """Nothing at the place of the bundle but the old one; the next export takes the leftovers away."""
    command = [sys.executable, "-c", KILLED, str(checkpoints / "llava"), str(own)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [f for f in own.parent.iterdir() if f != own]
    assert len(left) == 1 and re.fullmatch(r"\.own\.partial-\d+", left[0].name)
    assert bundles.read(own, check_hashes=True)
    with pytest.raises(Traced):
        export(checkpoints / "llava", own, precision="int8", progress=until_tracing)
    assert list(own.parent.iterdir()) == [own]


def full_disk(*parts: str, checkpoints: Path, folder: Path) -> None:
    call = lambda: export(checkpoints / "llava", folder / "out")  # noqa: E731
    refused(UserError, "the disk became full", str(folder / "out"), *parts, call=call)
    assert list(folder.iterdir()) == []


@linux
def test_a_full_disk_leaves_nothing_and_says_so(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = lambda path, mode: open("/dev/full", mode)  # noqa: E731
    monkeypatch.setattr(graph, "open", opened, raising=False)
    full_disk("nothing was left", checkpoints=checkpoints, folder=tmp_path)


@linux
@pytest.mark.parametrize("file", ["tokenizer.json", "vision.onnx", "bundle.json"])
def test_the_disk_may_become_full_at_any_file(
    file: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every file is made by another library; /dev/full gives each the system's own error."""
    mkdir = Path.mkdir

    # it is written under another name first
    name = f".bundle.json.{os.getpid()}" if file == "bundle.json" else file

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(self, *args, **kwargs)
        if "partial" in self.name:
            (self / name).symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", full)
    if file == "bundle.json":  # all before it is there already
        monkeypatch.setattr(exporter.GraphPlan, "write", lambda self, folder, key, writer: None)
    full_disk(checkpoints=checkpoints, folder=tmp_path)


def test_too_little_free_disk_is_refused_before_anything_is_written(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = lambda folder: SimpleNamespace(free=10**6)  # noqa: E731
    monkeypatch.setattr(exporter.shutil, "disk_usage", usage)
    output = tmp_path / "deep" / "out"
    call = lambda: export(checkpoints / "llava", output)  # noqa: E731
    refused(UserError, str(tmp_path), "1.0 MB free", "--output", "--precision int4", call=call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend, factor", [("onnxruntime", 1), ("torchscript", 1.5)])
def test_a_torchscript_export_asks_for_the_room_of_its_weights_twice(
    backend: str, factor: float, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(exporter, "size_text", lambda n: asked.append(n) or f"{n}")
    usage = lambda folder: SimpleNamespace(free=10**6)  # noqa: E731
    monkeypatch.setattr(exporter.shutil, "disk_usage", usage)
    call = lambda: export(checkpoints / "llava", tmp_path / "b", backend=backend, precision="fp32")  # noqa: E731
    refused(UserError, "1000000 free", call=call)
    total, need = asked[2], asked[-1]
    assert need - 2**26 >= factor * total


def test_weights_larger_than_this_machine_are_exported_for_another_ones_gpu(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import psutil

    memory = SimpleNamespace(available=10**10, total=10**5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    said: list[str] = []
    export(checkpoints / "llava", tmp_path / "b", backend="tensorrt", progress=lambda p: said.append(p.text))
    assert "of a GPU's memory to run it" in said[1]


@pytest.mark.parametrize(
    "available, total, says",
    [(10**8, 10**12, "100.0 MB are available"), (10**10, 10**5, "this machine has 0.1 MB")],
)
def test_too_little_memory_is_refused_before_anything_is_written(
    available: int, total: int, says: str, checkpoints: Path, tmp_path: Path, monkeypatch: Any
):
    import psutil

    memory = SimpleNamespace(available=available, total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    call = lambda: export(checkpoints / "llava", tmp_path / "out")  # noqa: E731
    refused(UserError, says, "memory", call=call)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("threshold, precision", [(2_000_000_000, "fp32"), (1000, "int4")])
def test_auto_is_float32_for_small_and_int4_for_large_models(
    threshold: int, precision: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert targets.SMALL == 2_000_000_000
    monkeypatch.setattr(targets, "SMALL", threshold)
    said: list[str] = []

    def listen(p: Progress) -> None:
        said.append(p.text)
        until_tracing(p)

    with pytest.raises(Traced):
        export(checkpoints / "llava", tmp_path / "out", progress=listen)
    assert said[1].startswith(f"precision {precision}: ")


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"precision": "fp16"}, ["precision fp16", "twice the memory", "fp32, int8 or int4"]),
        ({"vision_precision": "fp16"}, ["vision_precision fp16", "fp32, int8 or int4"]),
        ({"precision": "bf16"}, ["precision bf16 is not for ONNX Runtime on a CPU"]),
        ({"precision": "fp8"}, ["precision fp8 is not for ONNX Runtime on a CPU"]),
        ({"vision_precision": "fp8"}, ["vision_precision fp8 is not for ONNX Runtime on a CPU"]),
        ({"precision": "int3"}, ["'int3'", "auto, fp32, int8, int4"]),
        ({"vision_precision": "auto"}, ["vision_precision is 'auto'"]),
        ({"backend": "tflite"}, ["'tflite'", "onnxruntime, torchscript or tensorrt"]),
        ({"backend": "tensorrt", "device": "cpu"}, ["device cpu", "tensorrt"]),
        ({"backend": "torchscript", "device": "cuda"}, ["device cuda", "runs on both"]),
        ({"device": "tpu"}, ["'tpu'", "cpu or cuda"]),
        ({"kv_cache": "linear"}, ["kv_cache linear", "backend tensorrt", "onnxruntime"]),
        ({"backend": "tensorrt", "kv_cache": "ring"}, ["'ring'", "paged or linear"]),
        ({"backend": "torchscript", "precision": "int4"}, ["int4", "bf16, fp16, fp32, int8"]),
        ({"device": "cuda", "precision": "fp32"}, ["fp32", "onnxruntime on cuda", "bf16, fp16"]),
        ({"model": "gpt"}, ["'gpt'", "qwen_vl, llava"]),
        ({"model": "qwen_vl"}, ["is a llava checkpoint", "'qwen_vl'"]),
        ({"max_seq_len": 10**6}, ["max_seq_len=1000000", "4096"]),
        ({"conversation": "klingon"}, ["'klingon'", "llava_v1"]),
        ({"tokenizer": "/no/such/folder"}, ["/no/such/folder"]),
    ],
)
def test_an_impossible_option_is_refused_in_one_line(
    options: dict[str, Any], parts: list[str], checkpoints: Path, tmp_path: Path
):
    call = lambda: export(checkpoints / "llava", tmp_path / "out", **options)  # noqa: E731
    refused(UserError, *parts, call=call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, error, parts",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            UnknownArchitecture,
            ["GPT2LMHeadModel is unknown", "QWenLMHeadModel", "LlavaLlamaForCausalLM"],
        ),
        (
            {"architectures": ["QWenLMHeadModel"]},
            UnknownArchitecture,
            ["QWenLMHeadModel", "text-only Qwen"],
        ),
        (
            {"architectures": ["Qwen2VLForConditionalGeneration"]},
            NotSupportedYet,
            ["Qwen2VLForConditionalGeneration is not supported yet"],
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            NotSupportedYet,
            ["'bitsandbytes'", "export the unquantised checkpoint"],
        ),
        ({"hidden_size": 128}, CheckpointError, ["tensor", "has shape", "expected"]),
        ({"num_hidden_layers": 3}, CheckpointError, ["layers.1", "missing"]),
        ({"mm_projector_type": "mlp3x_gelu"}, CheckpointError, ["model.mm_projector.4", "missing"]),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_says_why(
    change: dict[str, Any], error: Any, parts: list[str], checkpoints: Path, tmp_path: Path
):
    folder = tmp_path / "llava"
    shutil.copytree(checkpoints / "llava", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(error, *parts, call=lambda: export(folder, tmp_path / "out"))
    assert [f.name for f in tmp_path.iterdir()] == ["llava"]


def test_a_truncated_checkpoint_is_named_and_leaves_nothing(checkpoints: Path, tmp_path: Path):
    folder = tmp_path / "llava"
    shutil.copytree(checkpoints / "llava", folder)
    [file] = folder.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    call = lambda: export(folder, tmp_path / "out")  # noqa: E731
    refused(CheckpointError, file.name, "truncated", call=call)
    assert [f.name for f in tmp_path.iterdir()] == ["llava"]


def test_progress_on_a_pipe_is_lines_of_text(capsys: pytest.CaptureFixture[str]):
    show = StderrProgress()
    show(Progress("reading"))
    show(Progress("decoder embed.weight", 10**6, 2 * 10**6, 0.5))
    show(Progress("decoder head.weight", 2 * 10**6, 2 * 10**6, 1.0))
    show(Progress("done"))
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert err.splitlines()[0] == "reading" and err.splitlines()[-1] == "done"
    assert "100% of 2.0 MB, 2 MB/s, 0:00 left" in err
    assert dataclasses.replace(Progress("x", 10**6, 3 * 10**6), seconds=1.0).left == 2.0


# --------------------------------------------------------------------------------------------- memory

PEAK = """
import re, sys, threading, time
import torch, onnx_ir, transformers
from pathlib import Path
from rtp_llm.export.exporter import export

def anon():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

start, peak = 0, 0
def listen(p):
    global start, peak
    if p.total:  # tracing and its imports are behind the first graph
        start = start or anon()
        peak = max(peak, anon())

def watch():
    while True:
        listen(type("P", (), {"total": start}))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
export(sys.argv[1], sys.argv[2], precision=sys.argv[3], progress=listen)
print(peak - start)
"""


@pytest.mark.slow
@linux
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    make = script()
    make.LLAVA["wide"] = {
        **make.LLAVA["tiny"], "hidden_size": 2560, "intermediate_size": 13312,
        "num_attention_heads": 20, "num_key_value_heads": 20, "num_hidden_layers": 2,
    }  # fmt: skip
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    make.llava(folder, "wide", 0, quiet=True)
    config = json.loads((folder / "config.json").read_text())  # short rope tables: they are no weights
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    [file] = folder.glob("*.safetensors")
    assert file.stat().st_size > 500e6  # and twice that as float32
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "out"), "int4"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    growth = int(done.stdout)
    assert growth < 200e6, f"{growth / 1e6:.0f} MB"


def test_torchscript_in_int8_made_without_a_gpu_multiplies_in_float32(sample_qwen: Path, tmp_path: Path):
    made = export(sample_qwen, tmp_path / "b", backend="torchscript", precision="int8")
    from rtp_llm.export.fused import torch_op  # noqa: F401

    decoder = torch.jit.load(made.read_path("decoder.pt"))
    types = {t.dtype for t in (*decoder.parameters(), *decoder.buffers())}
    assert types == {torch.int8, torch.float32}
    assert {spec.dtype for spec in made.graphs["decoder"].inputs if len(spec.shape) == 4} == {"float32"}


def test_torchscript_tells_of_its_bytes_to_the_last(sample_qwen: Path, tmp_path: Path):
    told: list[Progress] = []
    export(sample_qwen, tmp_path / "b", backend="torchscript", precision="bf16", progress=told.append)
    counted = [p for p in told if p.total]
    assert len(counted) > 50 and counted[-1].done == counted[-1].total
    assert {p.text.split()[0] for p in counted} >= {"vision", "decoder"}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"precision": "int8"}, "for int4 of onnxruntime on the cpu, not for int8 of onnxruntime on cpu"),
        ({"precision": "fp32", "vision_precision": "int4"}, "not for fp32 of onnxruntime on cpu"),
        ({"device": "cuda"}, "not for bf16 of onnxruntime on cuda"),
        ({"backend": "tensorrt", "precision": "int4"}, "not for int4 of tensorrt on cuda"),
        ({"precision": "int4"}, "calibration data no/such cannot be read"),
    ],
)
def test_calibration_is_refused_where_nothing_uses_it(
    options: Any, says: str, checkpoints: Path, tmp_path: Path
):
    call = lambda: export(checkpoints / "llava", tmp_path / "b", **options, calibration="no/such")  # noqa: E731
    refused(UserError, says, call=call)
    assert list(tmp_path.iterdir()) == []


def test_calibration_data_that_changed_is_another_export(checkpoints: Path, tmp_path: Path):
    data, options = tmp_path / "data.jsonl", {"backend": "tensorrt", "precision": "int8"}
    said: list[str] = []

    def run(prompt: str, listen: Any = lambda p: said.append(p.text)) -> None:
        data.write_text(json.dumps({"prompt": prompt}))
        export(checkpoints / "llava", tmp_path / "b", **options, calibration=data, progress=listen)

    run("Hello")
    assert not any("already the export" in line for line in said)
    run("Hello")
    assert "already the export" in said[-1]
    with pytest.raises(Traced):
        run("world", until_tracing)

"""The builder end to end against a recording stand-in of `tensorrt` that has the real bindings' names."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import cli, trt, trust
from rtp_llm.build import builder, timing_cache
from rtp_llm.build.builder import build
from rtp_llm.build.progress import Progress, StderrProgress, monitor
from rtp_llm.errors import BundleError, InternalError, MissingDependency, UserError
from rtp_llm.export import bundle as bundles

from .recording import Recording

# what does not depend on TensorRT's version
once = pytest.mark.parametrize("bindings", ["11.4.0.106"], indirect=True, scope="session")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_build_adds_both_plans_and_records_what_they_run_on(paged: Path, tensorrt: Recording) -> None:
    before = bundles.read(paged)
    built = build(paged, max_batch_size=8, max_input_len=512, max_seq_len=1024, max_images=3)
    assert built == bundles.read(paged, check_hashes=True)
    for key, limits in (
        ("vision", {"max_images": 3}),
        (
            "decoder",
            {"max_batch_size": 8, "max_input_len": 512, "max_seq_len": 1024, "max_logits": 64}
            # 2^31 - 1 elements of [blocks, 16, 4, 32]
            | {"max_blocks": 1048575},
        ),
    ):
        engine = built.engines[key]
        assert engine.path == f"{key}.plan" and built.files[engine.path].size > 1000
        assert (engine.gpu, engine.compute_capability) == ("NVIDIA Test 9", "9.0")
        assert engine.tensorrt == tensorrt.spec["version"]
        assert engine.plugin == ("1" if key == "decoder" else "")
        assert engine.limits == limits
    assert sorted(set(built.files) - set(before.files)) == ["decoder.plan", "vision.plan"]
    rest = dataclasses.replace(built, engines={}, files=before.files)
    assert rest == before
    trust.check(built, ["decoder.plan", "vision.plan"])  # built here, so trusted
    assert {p.name for p in paged.iterdir()} == {*built.files, "bundle.json"}


def test_tensorrt_is_called_in_its_order_with_its_arguments(paged: Path, tensorrt: Recording) -> None:
    build(paged, max_batch_size=8, max_input_len=512, max_seq_len=1024, opt_level=2, workspace=2**30,
          refit=True, weight_streaming=True)  # fmt: skip
    t = tensorrt.module
    order = [
        "Builder", "Builder.create_network", "OnnxParser", "OnnxParser.parse_from_file",
        "Builder.create_builder_config", "IBuilderConfig.progress_monitor=",
        "IBuilderConfig.builder_optimization_level=", "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.clear_flag", "IBuilderConfig.set_flag", "IBuilderConfig.set_flag",
        "Builder.create_optimization_profile", "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile", "IBuilderConfig.create_timing_cache",
        "IBuilderConfig.set_timing_cache", "Builder.build_serialized_network_to_stream",
        "IBuilderConfig.get_timing_cache", "ITimingCache.serialize",
    ]  # fmt: skip
    names = tensorrt.names()
    second = names.index("Builder", names.index("Builder") + 1)
    assert [name for name in names[:second] if name in order] == order
    flag = 1 << int(t.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert tensorrt.named("Builder.create_network") == [{"flags": flag}] * 2
    assert tensorrt.named("IBuilderConfig.builder_optimization_level=") == [{"value": 2}] * 2
    pool = {"pool": t.MemoryPoolType.WORKSPACE, "pool_size": 2**30}
    assert tensorrt.named("IBuilderConfig.set_memory_pool_limit") == [pool] * 2
    flags = [t.BuilderFlag.REFIT, t.BuilderFlag.WEIGHT_STREAMING]
    assert [a["flag"] for a in tensorrt.named("IBuilderConfig.set_flag")] == flags * 2
    alias = {"feature": t.PreviewFeature.ALIASED_PLUGIN_IO_10_03, "enable": True}
    assert tensorrt.named("IBuilderConfig.set_preview_feature") == [alias]
    files = [Path(a["model"]) for a in tensorrt.named("OnnxParser.parse_from_file")]
    assert files[0] == paged / "vision.onnx" and files[1].parent == paged  # beside their weights
    shapes = [
        (a["input"], a["min"], a["opt"], a["max"]) for a in tensorrt.named("IOptimizationProfile.set_shape")
    ]
    assert shapes[0] == ("pixels", [1, 96, 96, 3], [2, 96, 96, 3], [4, 96, 96, 3])
    assert [s[1:] for s in shapes if s[0] == "input_ids"] == [([1], [8], [8]), ([1], [512], [512])]
    assert [s[1:] for s in shapes if s[0] == "block_table"] == [
        ([1, 1], [8, 32], [8, 64]), ([1, 1], [2, 32], [8, 64])
    ]  # fmt: skip


@once
def test_without_options_no_flag_of_tensorrt_is_touched(linear: Path, tensorrt: Recording) -> None:
    build(linear)
    called = set(tensorrt.names())
    assert not called & {"IBuilderConfig.set_flag", "IBuilderConfig.set_memory_pool_limit"}
    assert "IBuilderConfig.set_preview_feature" not in called  # no plugin, nothing aliased by one
    assert bundles.read(linear).engines["decoder"].plugin == ""


def test_progress_is_tensorrts_own(linear: Path, tensorrt: Recording) -> None:
    heard: list[Progress] = []
    build(linear, progress=heard.append)
    steps = [(p.text, p.done, p.total) for p in heard if p.total]
    one = [("Building Engine · Tactic Search", i, 3) for i in (1, 2, 3)]
    one += [("Building Engine", i, 2) for i in (1, 2)]
    assert steps == [(f"{key}: {t}", a, b) for key in ("vision", "decoder") for t, a, b in one]
    lines = [p.text for p in heard if not p.total]
    assert tensorrt.spec["version"] in lines[0] and "NVIDIA Test 9" in lines[0]
    assert "decoder.plan" in lines[-1]


def test_progress_reaches_a_terminal_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = StderrProgress()
    show(Progress("building"))
    show(Progress("decoder: Tactic Search", 1, 4, 61.0))
    assert capsys.readouterr().err.splitlines() == ["building", f"{'decoder: Tactic Search':40}  25%, 1:01"]


@once
def test_timings_are_kept_per_gpu_and_version_and_used_again(
    linear: Path, tensorrt: Recording, tmp_path: Path
):
    build(linear)
    (file,) = (tmp_path / "cache" / "timing").iterdir()
    assert file.name == f"NVIDIA-Test-9-sm9.0-tensorrt{tensorrt.spec['version']}.cache"
    assert file.read_bytes() == b"timings of 9.0: 2"
    build(linear)
    assert file.read_bytes() == b"timings of 9.0: 4"
    assert tensorrt.named("IBuilderConfig.create_timing_cache")[2]["serialized_timing_cache"] == (
        b"timings of 9.0: 2"
    )


@once
def test_timings_of_another_gpu_are_begun_anew(linear: Path, tensorrt: Recording, tmp_path: Path) -> None:
    file = tmp_path / "timings"
    file.write_bytes(b"timings of 8.0: 9")
    build(linear, timing_cache=file)
    assert file.read_bytes() == b"timings of 9.0: 2"


@once
def test_timings_that_cannot_be_written_are_told_and_the_build_ends_well(
    linear: Path, tensorrt: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    heard: list[str] = []
    build(linear, timing_cache=tmp_path / "t", progress=lambda p: heard.append(p.text))
    lost = f"the timings of this build are lost: {tmp_path / 't'} cannot be written: Permission denied"
    assert heard.count(lost) == 2


@once
def test_engines_are_built_on_the_gpu_of_the_caller(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT builds for the current one of its thread, which is not the caller's."""
    chosen: list[tuple[int, int]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda n: chosen.append((n, threading.get_ident())))
    build(linear)
    assert [number for number, _ in chosen] == [3, 3]
    assert threading.get_ident() not in {thread for _, thread in chosen}


@once
def test_a_file_that_is_no_timing_cache_is_not_overwritten(
    linear: Path, tensorrt: Recording, tmp_path: Path
) -> None:
    file = tmp_path / "letter"
    file.write_bytes(b"Dear")
    with pytest.raises(UserError, match="letter' is no timing cache"):
        build(linear, timing_cache=file)
    assert file.read_bytes() == b"Dear" and bundles.read(linear).engines == {}


@once
def test_a_second_build_replaces_the_engines(linear: Path, tensorrt: Recording) -> None:
    build(linear, max_batch_size=2)
    built = build(linear, max_batch_size=4)
    assert built.engines["decoder"].limits["max_batch_size"] == 4
    assert bundles.read(linear, check_hashes=True) == built
    assert {p.name for p in linear.iterdir()} == {*built.files, "bundle.json"}


@once
@pytest.mark.parametrize(
    "limits, message",
    [
        ({"max_batch_size": 0}, "max_batch_size=0 must be a number from 1 to 512"),
        ({"max_images": 1000}, "max_images=1000 must be a number from 1 to 256"),
        ({"max_seq_len": 9000}, "max_seq_len=9000 must be a number from 1 to 8192, the longest sequence of"),
        ({"max_seq_len": 256}, "max_seq_len=256 leaves no room for an image, which takes 256 tokens: give"),
        ({"max_seq_len": 512, "max_input_len": 513}, "max_input_len=513 must be a number from 1 to 512, max"),
        ({"max_input_len": 3, "max_batch_size": 4}, "max_input_len=3 must be at least max_batch_size=4"),
        ({"opt_level": 6}, "opt_level=6 must be a number from 0 to 5"),
        ({"workspace": 5}, "workspace=5 must be bytes from"),
        ({"workspace": 2**39}, f"workspace={2**39} is more than the GPU's memory, {80 * 2**30} bytes"),
        ({"vision_compiler": "x"}, "vision_compiler='x', expected tensorrt or torch_tensorrt"),
        ({"timing_cache": "/"}, "timing_cache='/' is a folder, give a file"),
    ],
)  # fmt: skip
def test_limits_are_checked_before_tensorrt_starts(
    linear: Path, tensorrt: Recording, limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(linear, **limits)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert tensorrt.calls == []


def test_a_bundle_for_another_backend_is_refused_with_the_export_command(qwen_bundle: Path) -> None:
    with pytest.raises(
        UserError, match="rtp-llm export --backend tensorrt --model qwen_vl --checkpoint .*shapes"
    ):
        build(qwen_bundle)


def test_without_tensorrt_one_line_says_what_to_install(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency) as caught:
        build(linear)
    assert "pip install" in str(caught.value) and "\n" not in str(caught.value)


def test_an_older_tensorrt_is_refused(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(__version__="10.8.0.43")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(MissingDependency, match="TensorRT 10.8.0.43 is installed, 10.15 or later is needed"):
        build(linear)


@once
def test_without_a_gpu_one_line_says_so(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt.module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="need an NVIDIA GPU, and torch .* sees none here"):
        build(linear)


@once
def test_a_gpu_too_old_for_the_precision_is_refused(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "gpu", lambda index=None: trt.Gpu("NVIDIA Old", "7.5", 2**34))
    bundle = bundles.read(linear)
    for key, field in (("decoder", "precision"), ("vision", "vision-precision")):
        graphs = bundle.graphs | {key: dataclasses.replace(bundle.graphs[key], precision="bf16")}
        made = dataclasses.replace(bundle, graphs=graphs)
        monkeypatch.setattr(bundles, "read", lambda path, made=made: made)
        with pytest.raises(
            UserError, match=f"^{field} bf16 needs .* 8.0, NVIDIA Old has 7.5: .*--{field} fp16"
        ):
            build(linear)


@once
def test_every_error_of_the_parser_is_told(linear: Path, tensorrt: Recording) -> None:
    before = listing(linear)
    tensorrt.refuses = ["first\nproblem", "second problem"]
    with pytest.raises(BundleError) as caught:
        build(linear)
    assert "does not take the vision graph" in str(caught.value)
    assert "node 'a node' (AnOp): first problem; node 'a node' (AnOp): second problem" in str(caught.value)
    assert listing(linear) == before


@once
def test_a_graph_with_an_operator_that_tensorrt_lacks_is_refused_before_it_starts(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtp_llm.build.checker.check", lambda model, version: ["node 'x': Foo is unknown"])
    with pytest.raises(BundleError, match="vision: node 'x': Foo is unknown; decoder: node 'x'"):
        build(linear)
    assert tensorrt.named("Builder") == []


@once
def test_a_failed_build_says_why_and_leaves_the_bundle_as_it_was(paged: Path, tensorrt: Recording) -> None:
    build(paged)
    before = listing(paged)
    tensorrt.fails = "out of\nmemory"
    with pytest.raises(InternalError, match="could not build the vision engine: out of memory"):
        build(paged, max_batch_size=2)
    assert listing(paged) == before


@once
def test_a_second_export_keeps_the_engines_unless_it_asks_for_others(
    paged: Path, sample_qwen: Path, tensorrt: Recording, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", "--checkpoint", str(sample_qwen), "--backend", "tensorrt", "--precision", "fp32"]

    def builds(*flags: str) -> int:
        tensorrt.calls.clear()
        assert cli.main([*args, "--output", str(paged), *flags]) == 0
        return len(tensorrt.named("Builder"))

    first = ["--max-batch-size", "4", "--max-images", "2", "--refit", "--opt-level", "1"]
    assert builds(*first) == 2, "there were none"
    plans = listing(paged)
    capsys.readouterr()
    for flags in (first, [], ["--refit"], ["--timing-cache", str(paged.parent / "timings")]):
        assert builds(*flags) == 0 and listing(paged) == plans
    assert "rtp-llm build" in (line := capsys.readouterr().err.splitlines()[-1])
    assert {"--max-batch-size 4", "--max-images 2", "--refit", "--opt-level 1"} <= set(
        re.findall(r"--[a-z-]+(?: \d)?", line)
    )
    for flags in (["--max-batch-size", "5"], ["--weight-streaming"], ["--opt-level", "2"], ["--force"]):
        assert builds(*flags) == 2, flags
    assert bundles.read(paged).engines["vision"].options == {}
    bundle = bundles.read(paged)
    elsewhere = {k: dataclasses.replace(e, gpu="NVIDIA Other") for k, e in bundle.engines.items()}
    bundles._record(paged, dataclasses.replace(bundle, engines=elsewhere))
    assert builds() == 2, "those of another GPU"
    bundle.read_path("decoder.plan").write_bytes(bundle.read_path("decoder.plan").read_bytes()[::-1])
    assert builds() == 2, "which were not built here"


@once
def test_an_interrupted_build_stops_tensorrt_and_leaves_the_bundle_as_it_was(
    paged: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    build(paged)
    before = listing(paged)
    held: list[threading.Event] = []
    stopped: list[bool] = []

    def capture(t: Any, engine: str, tell: Any, stop: threading.Event) -> Any:
        held.append(stop)
        return monitor(t, engine, tell, stop)

    def press(p: Progress) -> None:
        if p.total:
            time.sleep(0.2)  # the main thread waits by then; a pool joins no thread that it is starting
            os.kill(os.getpid(), signal.SIGINT)
            stopped.append(held[0].wait(10))

    monkeypatch.setattr(builder, "monitor", capture)
    with pytest.raises(KeyboardInterrupt):
        build(paged, max_batch_size=2, progress=press)
    assert stopped == [True]  # at the first of five steps TensorRT was told to stop
    assert listing(paged) == before


@once
def test_a_full_disk_is_told_and_leaves_the_bundle_as_it_was(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, path: Path, mode: str):
            path.touch()

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = listing(linear)
    monkeypatch.setattr(builder, "open", Full, raising=False)
    with pytest.raises(UserError, match="the disk became full while writing vision.plan"):
        build(linear)
    assert listing(linear) == before


@once
def test_a_disk_too_small_is_told_before_tensorrt_starts(
    linear: Path, tensorrt: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))
    with pytest.raises(UserError, match="has 5.0 MB free, the plans need 10.0 MB"):
        build(linear)
    assert tensorrt.calls == []


@once
def test_what_the_callback_raises_ends_the_build(linear: Path, tensorrt: Recording) -> None:
    def fail(p: Progress) -> None:
        if p.total:
            raise ValueError("the terminal is gone")

    with pytest.raises(ValueError, match="the terminal is gone"):
        build(linear, progress=fail)
    assert not bundles.read(linear).engines


@once
def test_what_a_killed_build_left_goes_with_the_next(linear: Path, tensorrt: Recording) -> None:
    (linear / ".build-999999999").mkdir()
    (linear / ".build-999999999" / "vision.plan").write_bytes(b"half")
    (linear / ".build-999999999.onnx").write_bytes(b"half")
    build(linear)
    assert not list(linear.glob(".*"))


def test_timings_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RTP_LLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache.default_path(trt.Gpu("A/B 100", "8.0", 0), "10.15.1.29")
    assert path == tmp_path / "rtp_llm" / "timing" / "A-B-100-sm8.0-tensorrt10.15.1.29.cache"


@once
def test_engines_of_a_bundle_are_read_as_written_and_must_be_listed(
    linear: Path, tensorrt: Recording
) -> None:
    build(linear)
    file = linear / "bundle.json"
    data = json.loads(file.read_text())
    data["engines"]["decoder"]["path"] = "elsewhere.plan"
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="'elsewhere.plan' is used but not listed in files"):
        bundles.read(linear)

"""The command line around GPU bundles, on a machine that has neither a GPU nor TensorRT: what a user types,
and the one line that a mistake gives."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rtp_llm import cli, doctor
from rtp_llm.build.profiles import Limits
from rtp_llm.doctor import NOTE, OK
from rtp_llm.export import bundle as bundles
from rtp_llm.export.bundle import EngineSpec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture(scope="module")
def tensorrt_bundle(sample_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without engines; shared, so not to be changed."""
    path = tmp_path_factory.mktemp("tensorrt") / "b"
    args = ["--backend", "tensorrt", "--no-build", "--output", str(path), "-q"]
    assert cli.main(["export", "--checkpoint", str(sample_qwen), *args]) == 0
    return path


@pytest.fixture(scope="module")
def torchscript_bundle(sample_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32; shared, so not to be changed."""
    path = tmp_path_factory.mktemp("torchscript") / "b"
    args = ["--backend", "torchscript", "--precision", "fp32", "--output", str(path), "-q"]
    assert cli.main(["export", "--checkpoint", str(sample_qwen), *args]) == 0
    return path


Captured = pytest.CaptureFixture[str]


def fails(capsys: Captured, *args: Any) -> str:
    """The line that a command exits with 2 for."""
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n")
    return err.splitlines()[-1]


# --------------------------------------------------------------------------------------- TensorRT


def test_export_to_tensorrt_ends_well_without_it_and_says_what_is_missing_and_what_to_run(
    tensorrt_bundle: Path, sample_qwen: Path, capsys: Captured
) -> None:
    args = ["export", "--checkpoint", str(sample_qwen), "--backend", "tensorrt", "--output"]
    assert cli.main([*args, str(tensorrt_bundle)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tensorrt_bundle}\n"
    assert err.splitlines()[-1] == (
        "no engines were built: TensorRT is not installed: pip install 'tensorrt>=10.15'; "
        f"there: rtp-llm build {tensorrt_bundle}"
    )


def test_the_build_that_export_leaves_to_another_machine_is_printed_with_its_options(
    tensorrt_bundle: Path, sample_qwen: Path, capsys: Captured
) -> None:
    args = ["export", "--checkpoint", str(sample_qwen), "--backend", "tensorrt", "--output"]
    flags = "--max-batch-size 32 --opt-level 0 --workspace 2GiB --refit --vision-compiler torch_tensorrt"
    assert cli.main([*args, str(tensorrt_bundle), *flags.split(), "--timing-cache", "my cache"]) == 0
    flags = flags.replace("2GiB", str(2**31)).replace(" --vision", " --timing-cache 'my cache' --vision")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"; there: rtp-llm build {tensorrt_bundle} {flags}")


def test_build_without_tensorrt_says_so_and_leaves_the_bundle_alone(
    tensorrt_bundle: Path, capsys: Captured
) -> None:
    before = sorted(tensorrt_bundle.iterdir())
    line = fails(capsys, "build", tensorrt_bundle)
    assert line == "rtp-llm build: TensorRT is not installed: pip install 'tensorrt>=10.15'"
    assert sorted(tensorrt_bundle.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-batch-size 0", "max_batch_size=0 must be a number from 1 to 512"),
        ("--max-images 0", "max_images=0 must be"),
        ("--max-seq-len 0", "max_seq_len=0 must be a number from 1 to 8192"),
        ("--max-batch-size 64 --max-input-len 8", "max_input_len=8 must be at least max_batch_size=64"),
        ("--opt-level 9", "opt_level=9 must be a number from 0 to 5"),
        ("--workspace lots", "--workspace='lots' must be a size like 2GiB"),
        ("--vision-compiler foo", "vision_compiler='foo', expected tensorrt or torch_tensorrt"),
        ("--timing-cache .", "timing_cache='.' is a folder, give a file"),
    ],
)
def test_a_wrong_number_for_the_engines_is_named_by_build_and_by_export_without_tensorrt_too(
    tensorrt_bundle: Path, sample_qwen: Path, flags: str, message: str, capsys: Captured
) -> None:
    assert message in fails(capsys, "build", tensorrt_bundle, *flags.split())
    if "seq-len" not in flags:  # a checkpoint's option there
        args = ["--checkpoint", sample_qwen, "--backend", "tensorrt", "--output", tensorrt_bundle]
        assert message in fails(capsys, "export", *args, *flags.split())


def test_the_lowest_level_of_optimisation_reaches_the_builder(
    tensorrt_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def build(path: Path, **given: Any) -> bundles.Bundle:
        seen.update(given)
        return bundles.read(path)

    monkeypatch.setattr("rtp_llm.build.builder.build", build)
    assert cli.main(["build", str(tensorrt_bundle), "--opt-level", "0", "-q"]) == 0
    assert seen == {"opt_level": 0, "progress": None}


def test_a_bundle_without_engines_names_the_build_and_verify_runs_it_on_the_cpu(
    tensorrt_bundle: Path, capsys: Captured
) -> None:
    line = fails(capsys, "chat", tensorrt_bundle, "hi")
    assert f"rtp-llm build {tensorrt_bundle}" in line and "--device cpu" in line
    assert cli.main(["inspect", str(tensorrt_bundle)]) == 0
    assert f"engines: none yet: rtp-llm build {tensorrt_bundle}" in capsys.readouterr().out
    assert cli.main(["verify", str(tensorrt_bundle), "--device", "cpu", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert next(s for s in stages if s["name"] == "first-token logits")["cosine"] > 0.9999


def test_inspect_shows_what_engines_were_built_for(
    tensorrt_bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tensorrt_bundle, copy)
    bundle = bundles.read(copy)
    (tmp_path / "plan").write_bytes(b"a plan")
    limits = vars(Limits.of(bundle, max_batch_size=3))
    engine = EngineSpec("decoder.plan", "NVIDIA H100", "9.0", "10.15.1.29", "1", limits)
    bundles.add_engines(bundle, {"decoder": engine}, {"decoder.plan": tmp_path / "plan"})
    assert cli.main(["inspect", str(copy)]) == 0
    screen = capsys.readouterr().out
    assert "for NVIDIA H100 (compute capability 9.0) and TensorRT 10.15.1.29, attention plugin 1" in screen
    assert "max_batch_size 3" in screen


# ------------------------------------------------------------------------------------ TorchScript


def test_chat_and_verify_run_a_torchscript_bundle(
    torchscript_bundle: Path, red_circle: Path, capsys: Captured
) -> None:
    args = ["chat", str(torchscript_bundle), "--image", str(red_circle), "--temperature", "0", "-q"]
    assert cli.main([*args, "What is this?"]) == 0
    assert capsys.readouterr().out == "a red circle\n"
    assert cli.main(["verify", str(torchscript_bundle)]) == 0
    assert capsys.readouterr().out.endswith("passed\n")


def test_archives_of_another_machine_are_refused_until_trusted_or_made_here(
    torchscript_bundle: Path,
    sample_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(torchscript_bundle, copy)
    monkeypatch.setenv("RTP_LLM_STATE", str(tmp_path / "another machine"))
    ask = ["chat", str(copy), "hi", "--max-new-tokens", "1", "-q"]
    line = fails(capsys, *ask)
    assert "decoder.pt was not built on this machine" in line and "--trust-engines" in line
    assert cli.main([*ask, "--trust-engines"]) == 0
    export = ["export", "--checkpoint", str(sample_qwen), "--backend", "torchscript", "--precision", "fp32"]
    assert cli.main([*export, "--output", str(copy)]) == 0
    assert "not made on this machine, or has changed since: exporting it anew" in capsys.readouterr().err
    assert cli.main(ask) == 0


def test_a_cut_archive_is_a_corrupted_bundle(
    torchscript_bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(torchscript_bundle, copy)
    with open(copy / "decoder.pt", "r+b") as file:
        file.truncate(100_000)
    assert "decoder.pt has 100000 bytes, expected" in fails(capsys, "chat", copy, "hi")


def test_an_interrupted_torchscript_export_leaves_nothing(
    sample_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.jit, "save", interrupt)
    args = ["export", "--checkpoint", str(sample_qwen), "--backend", "torchscript", "-q"]
    assert cli.main([*args, "--output", str(tmp_path / "b")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_mapped_weights_is_an_error_before_any_page_is_written(
    sample_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    args = ["export", "--checkpoint", sample_qwen, "--backend", "torchscript", "--output", tmp_path / "b"]
    assert "the disk became full while writing" in fails(capsys, *args)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export --checkpoint Q --backend torchscript --precision fp8", "use bf16, fp16, fp32, int8"),
        ("export --checkpoint Q --precision bf16", "or export with --backend torchscript or tensorrt"),
        ("export --checkpoint Q --device cuda --precision fp32", "onnxruntime on cuda: use bf16, fp16"),
        ("export --checkpoint Q --device tpu", "device is 'tpu', expected cpu or cuda"),
        ("export --checkpoint Q --backend torchscript --kv-cache linear", "a choice of backend tensorrt"),
        ("export --checkpoint Q --backend torchscript --calibration x", "calibration is for fp8 and int8"),
        ("export --checkpoint Q --backend tensorrt --precision fp8 --calibration x", "data x cannot be read"),
        (
            "export --checkpoint Q --backend torchscript --opt-level 0",
            "--opt-level goes with --backend tenso",
        ),
        ("export --checkpoint Q --backend tensorrt --no-build --refit", "--refit is of the build"),
        ("build T", "T is a bundle for torchscript, only one for tensorrt is built"),
        ("build no/such", "no/such is not a bundle: it does not exist"),
        ("chat T hi --device cuda", "device='cuda': torch"),
        ("chat T hi --device tpu", "device is 'tpu', expected cpu, cuda"),
        ("chat T hi --backend foo", "backend is 'foo', expected onnxruntime or torchscript or tensorrt"),
        ("chat T hi --backend onnxruntime", "has backend torchscript, 'onnxruntime' was asked for"),
        ("chat T hi --kv-cache linear", "kv_cache='linear' is a choice of tensorrt"),
        ("chat T hi --precision bf16", "has precision fp32, 'bf16' was asked for"),
        ("chat T hi --threads 0", "threads=0 must be 1 or more"),
        ("chat T hi --max-seq-len 0", "max_seq_len=0 must be 1 or more"),
        ("chat Q hi --backend torchscript --device tpu", "device is 'tpu', expected cpu, cuda"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, message: str, torchscript_bundle: Path, sample_qwen: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTP_LLM_CACHE", str(tmp_path / "cache"))
    Path("T").symlink_to(torchscript_bundle)
    args = [{"Q": str(sample_qwen)}.get(word, word) for word in line.split()]
    assert message in fails(capsys, *args)
    assert {p.name for p in tmp_path.iterdir()} == {"T"}


def test_a_missing_package_is_named_with_its_pip_command(
    tensorrt_bundle: Path,
    sample_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    args = ["export", "--checkpoint", sample_qwen, "--backend", "tensorrt", "--output", tmp_path / "b"]
    assert "an export needs onnxscript: pip install torch onnx onnxscript onnx-ir" in fails(capsys, *args)


# ---------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_holds_for_engines_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for gpu, status in (("NVIDIA H100", NOTE), (None, OK)):
        monkeypatch.setattr(doctor, "_gpu", lambda gpu=gpu: gpu)
        checks = {check.name: check for check in doctor.examine()}
        assert checks["tensorrt"].status == NOTE
        assert "pip install 'tensorrt>=10.15'" in checks["tensorrt"].fix
        assert "not supported" not in checks["tensorrt"].found
        assert checks["triton language"].status == status
    assert "pip uninstall" not in checks["onnxruntime"].fix

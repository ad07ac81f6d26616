"""The assembled repository: complete, readable by Triton, and written without harm to what is there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from rtp_llm import cli, trust
from rtp_llm.errors import BundleError, UserError
from rtp_llm.export.bundle import Bundle, EngineSpec, read
from rtp_llm.runtime.tritonserver import command, repository
from rtp_llm.runtime.tritonserver.binary import Binary
from rtp_llm.runtime.tritonserver.options import options_of
from rtp_llm.runtime.tritonserver.repository import LANGUAGE, VISION, assemble, check_output


def _config(folder: Path, model: str) -> str:
    return (folder / model / "config.pbtxt").read_text()


def _parameters(folder: Path, model: str) -> dict[str, str]:
    """Of a config.pbtxt, as Triton's own parser (protobuf's text format) reads them."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(_config(folder, model), model_config_pb2.ModelConfig())
    return {name: value.string_value for name, value in config.parameters.items()}


@pytest.mark.parametrize(
    ("vision", "models"),
    [
        ("in-process", LANGUAGE),
        ("tower.example:8001", LANGUAGE),
        ("separate", LANGUAGE + VISION),
        ("only", VISION),
    ],
)
def test_each_way_to_encode_pictures_has_its_models(
    qwen_bundle: Path, tmp_path: Path, vision: str, models: tuple[str, ...]
) -> None:
    folder = assemble(read(qwen_bundle), tmp_path / "models", vision)
    assert {path.name for path in folder.iterdir()} == set(models)
    for name in models:
        assert not re.search(r"\$\w", _config(folder, name)), "a field of the template is left"
        assert (folder / name / "1").is_dir()
        assert [p.suffix for p in (folder / name).glob("*.pbtxt")] == [".pbtxt"]
    if "vlm" in models:
        assert _parameters(folder, "vlm")["vision"] == vision


def test_any_path_and_setting_survives_the_pbtxt(qwen_bundle: Path, tmp_path: Path) -> None:
    odd = dataclasses.replace(read(qwen_bundle), path=Path('/a "b"\\c $d\n/e'))
    settings = {"max_images": "4", "chat_template": 'a"b\\$x\n{é}'}
    folder = assemble(odd, tmp_path / "models", settings=settings)
    found = _parameters(folder, "vlm")
    assert found["bundle"] == str(odd.path)
    assert json.loads(found["settings"]) == settings


def test_a_repository_replaces_only_one_of_ours(qwen_bundle: Path, tmp_path: Path) -> None:
    bundle, output = read(qwen_bundle), tmp_path / "models"
    check_output(output, bundle)
    assemble(bundle, output)
    check_output(output, bundle)
    (output / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds 'mine.txt', which is no model of ours: --force"):
        check_output(output, bundle)
    check_output(output, bundle, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, give a folder"):
        check_output(tmp_path / "file", bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "models"]


@pytest.mark.parametrize("place", ["bundle", "above", "inside", "here"])
def test_force_never_takes_the_bundle_or_the_working_folder(
    qwen_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = qwen_bundle / "x"
    where = {"bundle": qwen_bundle, "above": qwen_bundle.parent, "inside": inside, "here": tmp_path}
    with pytest.raises(UserError, match="give a folder"):
        check_output(where[place], read(qwen_bundle), force=True)


def test_output_only_assembles(
    qwen_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server is looked for, and every setting given is written down."""
    monkeypatch.setenv("MAX_IMAGES", "3")
    monkeypatch.setenv("MAX_PIXELS", "1000")
    line = ["tritonserver", str(qwen_bundle), "--output", str(tmp_path / "m"), "--max-pixels", "2000"]
    assert cli.main(line) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'm'}\n" and "tritonserver --model-repository=" in err
    settings = json.loads(_parameters(tmp_path / "m", "vlm")["settings"])
    assert settings == {"max_images": "3", "max_pixels": "2000"}


def test_secrets_of_the_environment_are_not_written_down(
    qwen_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "k1")
    monkeypatch.setenv("ALLOWED_MEDIA_DOMAINS", "example.com")
    monkeypatch.setenv("DOWNLOAD_HEADERS", '{"Authorization": "k2"}')
    monkeypatch.setenv("MEDIA_PROXY", "http://me:k3@proxy:1")
    assert cli.main(["tritonserver", str(qwen_bundle), "--output", str(tmp_path / "m"), "-q"]) == 0
    settings = json.loads(_parameters(tmp_path / "m", "vlm")["settings"])
    assert settings == {"allowed_media_domains": "example.com"}


def _with_engine(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle for TensorRT, whose plan of the vision graph is some bytes."""
    folder.mkdir()
    (folder / "vision.plan").write_bytes(b"plan")
    engine = EngineSpec("vision.plan", "H200", "9.0", "10.15", "", {"max_images": 5})
    return dataclasses.replace(bundle, backend="tensorrt", engines={"vision": engine}, path=folder)


@pytest.fixture
def engine_bundle(qwen_bundle: Path, tmp_path: Path) -> Bundle:
    return _with_engine(read(qwen_bundle), tmp_path / "engines")


def test_a_plan_of_another_machine_is_refused_without_trust(engine_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--trust-engines"):
        assemble(engine_bundle, tmp_path / "models", "separate")
    assert not (tmp_path / "models").exists()


def test_a_plan_is_served_by_tritons_own_backend(engine_bundle: Bundle, tmp_path: Path) -> None:
    trust.record([engine_bundle.read_path("vision.plan")])
    folder = assemble(engine_bundle, tmp_path / "models", "separate", vision_instances=3)
    tower = folder / "vision_tower"
    assert (tower / "1/model.plan").read_bytes() == b"plan" and not (tower / "1/model.py").exists()
    config = _config(folder, "vision_tower")
    assert "tensorrt_plan" in config and re.search(r"max_batch_size: 5\b", config)
    assert re.search(r"\bcount: 3\b", config)
    os.unlink(engine_bundle.read_path("vision.plan"))
    assert (tower / "1/model.plan").read_bytes() == b"plan", "the folder runs without the bundle's file"


def test_a_repository_that_goes_again_copies_no_gigabytes(engine_bundle: Bundle, tmp_path: Path) -> None:
    folder = assemble(engine_bundle, tmp_path / "models", "only", trusted=True, copies=False)
    plan = folder / "vision_tower/1/model.plan"
    assert plan.is_symlink() and plan.resolve() == engine_bundle.read_path("vision.plan").resolve()


def test_a_bundle_without_engines_is_told_how_to_build_them(engine_bundle: Bundle, tmp_path: Path) -> None:
    bare = dataclasses.replace(engine_bundle, engines={})
    with pytest.raises(BundleError, match="no engine of its vision graph yet: rtp-llm build"):
        assemble(bare, tmp_path / "models", "only")


def test_every_template_lies_in_the_package() -> None:
    for name in LANGUAGE + VISION:
        assert (repository.TEMPLATES / name / "config.pbtxt").is_file(), name


def test_a_backend_that_the_program_lacks_is_told_before_it_starts(
    engine_bundle: Bundle, tmp_path: Path, triton_binary: Binary
) -> None:
    """The wheel's Triton has the Python backend only, NVIDIA's container all of them."""
    args = cli.parser().parse_args(["tritonserver", "b", "--vision", "separate"])
    with pytest.raises(UserError, match="Triton's tensorrt backend, .* has only python: run inside NVIDIA's"):
        command._check_backend(options_of(args, [], {}), triton_binary, engine_bundle)
    other = dataclasses.replace(triton_binary, backends=tmp_path / "backends")
    for name in ("python", "tensorrt"):
        (other.backends / name).mkdir(parents=True)
        (other.backends / name / f"libtriton_{name}.so").touch()
    command._check_backend(options_of(args, [], {}), other, engine_bundle)

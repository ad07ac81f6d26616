"""A bundle is read as it was written, or refused with one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtp_llm.errors import BundleError
from rtp_llm.export import bundle as bundles
from rtp_llm.export.bundle import (
    SCHEMA,
    Bundle,
    ChatRules,
    EngineSpec,
    GenerationSpec,
    GraphSpec,
    ImageRules,
    ModelSpec,
    Origin,
    Piece,
    PromptRules,
    RopeSpec,
    TensorSpec,
    VisionSpec,
)


def example() -> Bundle:
    tensor = TensorSpec("pixels", "uint8", ["N", 56, 56, 3])
    rope = RopeSpec("linear", [512, 1024])
    return Bundle(
        schema=SCHEMA,
        name="tiny",
        backend="onnxruntime",
        precision="int4",
        model=ModelSpec("llava", "LlavaLlamaForCausalLM", 64, 8, 2, 2, 1, 16, 1024, rope, "gqa", 123),
        vision=VisionSpec("pad", 56, 16, 8, fill=[122, 116, 104]),
        prompt=PromptRules(
            bos_ids=[1],
            nfc=False,
            image=ImageRules(["<image>"], [], -200, [], [], False),
            chat=ChatRules("pieces", "x", turns={"user": [Piece("{content}"), Piece("</s>", True)]}),
        ),
        generation=GenerationSpec([2], ["###"], {"top_p": 0.5, "do_sample": True}),
        graphs={"vision": GraphSpec("graphs/vision.onnx", [tensor], [tensor], "fp32")},
        tokenizer="tokenizer.json",
        files={},
        origin=Origin("somewhere", "abc", {"precision": "auto", "max_seq_len": None}, {"torch": "2"}),
    )


def write_example(folder: Path, bundle: Bundle | None = None) -> Bundle:
    (folder / "graphs").mkdir(parents=True, exist_ok=True)
    (folder / "graphs" / "vision.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_bytes(b"{}")
    return bundles.write(folder, bundle or example())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_example(tmp_path / "bundle")
    return tmp_path / "bundle"


def change(folder: Path, edit: Any) -> None:
    """Apply `edit` to the folder's bundle.json."""
    file = folder / "bundle.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def refused(folder: Path, *parts: str, **kwargs: Any) -> None:
    with pytest.raises(BundleError) as caught:
        bundles.read(folder, **kwargs)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_reading_gives_what_was_written(folder: Path):
    written = write_example(folder)
    found = bundles.read(folder, check_hashes=True)
    assert found == dataclasses.replace(written, path=folder)
    assert set(found.files) == {"graphs/vision.onnx", "tokenizer.json"}
    assert found.read_path("graphs/vision.onnx").read_bytes() == b"graph"


def test_no_path_of_this_machine_is_written(folder: Path):
    assert str(folder) not in (folder / "bundle.json").read_text()
    assert "path" not in json.loads((folder / "bundle.json").read_text())


def test_a_bundle_may_be_moved(folder: Path, tmp_path: Path):
    before = bundles.read(folder)
    folder.rename(tmp_path / "elsewhere")
    after = bundles.read(tmp_path / "elsewhere", check_hashes=True)
    assert dataclasses.replace(after, path=before.path) == before


def test_a_relative_path_is_read_and_stays_valid(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    found = bundles.read("bundle")
    monkeypatch.chdir("/")
    assert found.read_path("tokenizer.json").is_file()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, values, max_size=3)
any_bundle = st.builds(
    dataclasses.replace,
    st.just(example()),
    name=texts,
    backend=texts,
    precision=texts,
    model=st.from_type(ModelSpec),
    vision=st.from_type(VisionSpec),
    prompt=st.from_type(PromptRules),
    generation=st.builds(GenerationSpec, defaults=objects),
    graphs=st.dictionaries(
        texts, st.from_type(GraphSpec).map(lambda g: dataclasses.replace(g, path="graphs/vision.onnx"))
    ),
    origin=st.builds(Origin, options=objects),
)
st.register_type_strategy(str, texts)  # no lone surrogates: they are no text


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(bundle=any_bundle)
def test_any_bundle_survives_being_written_and_read(bundle: Bundle, tmp_path: Path):
    written = write_example(tmp_path, bundle)
    assert bundles.read(tmp_path, check_hashes=True) == dataclasses.replace(written, path=tmp_path)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path):
    assert not bundles.is_bundle(tmp_path)
    refused(tmp_path, str(tmp_path), "is not a bundle", "bundle.json")
    refused(tmp_path / "nowhere", "nowhere is not a bundle")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(text: bytes, folder: Path):
    (folder / "bundle.json").write_bytes(text)
    refused(folder, str(folder / "bundle.json"), "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"schema": "1"}', '{"schema": null}'])
def test_a_manifest_without_schema_is_refused(text: str, folder: Path):
    (folder / "bundle.json").write_text(text)
    refused(folder, "schema is", f"expected {SCHEMA}")


def test_a_newer_schema_says_to_upgrade(folder: Path):
    change(folder, lambda d: d.update(schema=SCHEMA + 1, surprise={}))
    refused(folder, f"schema {SCHEMA + 1}", f"reads up to {SCHEMA}", "upgrade rtp_llm")


def test_an_older_schema_says_to_export_again(folder: Path):
    change(folder, lambda d: d.update(schema=SCHEMA - 1))
    refused(folder, f"schema {SCHEMA - 1}", f"expected {SCHEMA}", "export it again")


@pytest.mark.parametrize(
    "edit, where",
    [
        (lambda d: d.update(color=1), "unknown field bundle.color"),
        (lambda d: d["model"].update(moe=1), "unknown field bundle.model.moe"),
        (lambda d: d.update(path="/"), "unknown field bundle.path"),
        (lambda d: d.update(schema=True), "bundle.schema is True, expected int"),
        (lambda d: d.pop("graphs"), "bundle.graphs is missing"),
        (lambda d: d["model"]["rope"].pop("limits"), "bundle.model.rope.limits is missing"),
        (lambda d: d["model"].update(layers="2"), "bundle.model.layers is '2', expected int"),
        (lambda d: d["model"].update(layers=True), "bundle.model.layers is True, expected int"),
        (lambda d: d["model"].update(layers=2.0), "bundle.model.layers is 2.0, expected int"),
        (lambda d: d.update(model=[]), "bundle.model is [], expected an object"),
        (lambda d: d.update(files=[]), "bundle.files is [], expected an object"),
        (lambda d: d["prompt"].update(bos_ids=1), "bundle.prompt.bos_ids is 1, expected a list"),
        (lambda d: d["prompt"].update(bos_ids=[None]), "bundle.prompt.bos_ids[0] is None, expected int"),
        (
            lambda d: d["graphs"]["vision"]["inputs"][0].update(shape=["N", 1.5]),
            "bundle.graphs.vision.inputs[0].shape[1] is 1.5",
        ),
        (lambda d: d["prompt"]["chat"].update(system=3), "bundle.prompt.chat.system is 3"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(edit: Any, where: str, folder: Path):
    change(folder, edit)
    refused(folder, f"bundle.json: {where}")


def test_a_missing_file_is_named(folder: Path):
    (folder / "graphs" / "vision.onnx").unlink()
    refused(folder, "graphs/vision.onnx is missing", "export the checkpoint again")


def test_a_file_of_another_size_is_named_with_both_sizes(folder: Path):
    (folder / "tokenizer.json").write_bytes(b"{ }")
    refused(folder, "tokenizer.json has 3 bytes, expected 2", "--force")


def test_changed_contents_are_found_when_hashes_are_asked_for(folder: Path):
    (folder / "tokenizer.json").write_bytes(b"[]")
    assert bundles.read(folder).name == "tiny"  # opening stays quick
    refused(folder, "tokenizer.json has SHA-256", "expected 44136fa3", check_hashes=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "graphs/../../secret", "link"])
def test_no_file_of_a_bundle_lies_outside_it(name: str, folder: Path):
    secret = folder.parent / "secret"
    secret.write_text("x")
    (folder / "link").symlink_to(secret)
    change(folder, lambda d: d["files"].update({name: {"size": 1, "sha256": ""}}))
    refused(folder, repr(name), "outside the bundle")


@pytest.mark.parametrize(
    "name, says",
    [("", "missing"), ("graphs", "missing"), ("a\0b", "no file name"), ("x" * 5000, "no file name")],
)
def test_a_name_that_is_no_file_is_refused(name: str, says: str, folder: Path):
    change(folder, lambda d: d["files"].update({name: {"size": 1, "sha256": ""}}))
    refused(folder, says)


@pytest.mark.parametrize("name", ["../secret", "other.onnx"])
def test_what_is_used_must_be_listed(name: str, folder: Path):
    change(folder, lambda d: d["graphs"]["vision"].update(path=name))
    refused(folder, repr(name), "not listed in files")
    change(folder, lambda d: d.update(tokenizer=name))
    refused(folder, repr(name), "not listed in files")


# -------------------------------------------------------------------------------------------- writing


def test_a_bundle_appears_only_when_it_is_whole(tmp_path: Path):
    final = tmp_path / "deep" / "bundle"
    with bundles.writing(final) as partial:
        assert partial.parent == final.parent and not final.exists()
        (partial / "x").touch()
    assert [f.name for f in final.parent.iterdir()] == ["bundle"]
    assert [f.name for f in final.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), SystemExit(1)])
def test_nothing_stays_of_a_failed_one_and_the_old_one_is_kept(error: BaseException, tmp_path: Path):
    final = tmp_path / "bundle"
    write_example(final)
    with pytest.raises(type(error)), bundles.writing(final) as partial:
        (partial / "x").write_bytes(b"half")
        raise error
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]
    assert bundles.read(final).name == "tiny"


def test_an_existing_one_is_replaced_whole(folder: Path):
    with bundles.writing(folder) as partial:
        write_example(partial, dataclasses.replace(example(), name="new"))
    assert bundles.read(folder, check_hashes=True).name == "new"
    assert [f.name for f in folder.parent.iterdir()] == ["bundle"]


def test_leftovers_of_a_killed_export_go_those_of_a_living_one_stay(folder: Path):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    for pid in (child.pid, os.getppid()):
        for kind in ("partial", "old"):
            left = folder.parent / f".bundle.{kind}-{pid}"
            left.mkdir()
            (left / "vision.onnx.data").write_bytes(b"half")
    strange = folder.parent / ".bundle.partial-not-a-pid"
    strange.mkdir()
    with bundles.writing(folder) as partial:
        write_example(partial)
    names = {f.name for f in folder.parent.iterdir()}
    assert {f".bundle.partial-{os.getppid()}", strange.name, "bundle"} <= names
    assert not any(re.fullmatch(rf".*-{child.pid}", name) for name in names)


def test_a_kill_between_the_two_renames_does_not_lose_the_old_bundle(folder: Path):
    """The one moment with nothing at `final`: the next export, if it fails too, must leave the old."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    folder.rename(folder.parent / f".bundle.old-{child.pid}")
    with pytest.raises(KeyboardInterrupt), bundles.writing(folder):
        raise KeyboardInterrupt
    assert bundles.read(folder).name == "tiny"


def test_a_failing_rename_puts_the_old_bundle_back(folder: Path, monkeypatch: pytest.MonkeyPatch):
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), bundles.writing(folder) as partial:
        write_example(partial)
    assert bundles.read(folder).name == "tiny"
    assert [f.name for f in folder.parent.iterdir()] == ["bundle"]


def test_a_link_to_a_bundle_stays_one(folder: Path, tmp_path: Path):
    link = tmp_path / "links" / "latest"
    link.parent.mkdir()
    link.symlink_to(folder)
    with bundles.writing(link) as partial:
        write_example(partial, dataclasses.replace(example(), name="new"))
    assert link.is_symlink() and bundles.read(folder).name == "new"
    assert [f.name for f in link.parent.iterdir()] == ["latest"]


def with_engines(bundle: Bundle, staged: Path, content: bytes) -> Bundle:
    staged.mkdir(exist_ok=True)
    names = ("vision.plan", "decoder.plan")
    for name in names:
        (staged / name).write_bytes(content)
    engines = {n: EngineSpec(n, "A GPU", "9.0", "10.15.1.29", "1", {"max_images": 4}) for n in names}
    return bundles.add_engines(bundle, engines, {name: staged / name for name in names})


def test_engines_are_added_and_replaced_with_their_hashes(folder: Path):
    for content in (b"first", b"second one"):
        added = with_engines(bundles.read(folder), folder / "staged", content)
        assert bundles.read(folder, check_hashes=True) == added
        assert folder.joinpath("decoder.plan").read_bytes() == content
        assert list((folder / "staged").iterdir()) == []


@pytest.mark.parametrize("at", range(6))
def test_adding_engines_may_be_cut_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    """Then the bundle has the old engines, none, or the new ones, and is whole."""
    old = with_engines(bundles.read(folder), folder / "staged", b"first")
    moves = iter(range(99))
    replace = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if next(moves) == at:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    try:
        with_engines(old, folder / "staged", b"second one")
    except KeyboardInterrupt:
        assert at < 4
    monkeypatch.undo()
    found = bundles.read(folder, check_hashes=True)
    contents = {(folder / engine.path).read_bytes() for engine in found.engines.values()}
    assert contents == ({b"first"} if at == 0 else set() if at < 4 else {b"second one"})

"""Checkpoints: the same tensors from every format, mapped and not loaded, and one line for each damage."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtp_llm.errors import CheckpointError, UserError
from rtp_llm.export.checkpoint import Checkpoint, Weight, resolve

CONFIG = {"architectures": ["Nobody"]}
FORMATS = ["safetensors", "zip", "legacy"]


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7),
        "half": torch.randn(4, 3).half(),
        "brain": torch.randn(6, 2).bfloat16(),
        "ids": torch.arange(9),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "bias": torch.randn(11),
        "scalar": torch.tensor(3.5),
        "flags": torch.tensor([True, False]),
    }


def save(folder: Path, tensors: dict[str, Tensor], kind: str = "safetensors", shards: int = 1) -> Path:
    """Write a checkpoint folder, with an index where it has several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    where = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{end}" if shards > 1 else f"{stem}.{end}"
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % shards == i}
        where.update(dict.fromkeys(part, file))
        if kind == "safetensors":
            from safetensors.torch import save_file

            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=kind == "zip")
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


def refused(call: Any, *parts: str) -> str:
    """`call` raises CheckpointError, in one line that names every part."""
    with pytest.raises(CheckpointError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line
    return line


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_tensors_that_were_saved(kind: str, shards: int, tmp_path: Path):
    tensors = some_tensors()
    checkpoint = Checkpoint(save(tmp_path, tensors, kind, shards))
    assert sorted(checkpoint) == sorted(tensors)
    assert checkpoint.parameters() == sum(t.numel() for t in tensors.values())
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        assert checkpoint.bytes(name) == tensor.nbytes
        found = checkpoint.read(name)
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        if tensor.dim():
            assert torch.equal(checkpoint.read(name, 1, 3), expected[1:3])


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_read_stays_when_the_map_is_given_back(kind: str, tmp_path: Path):
    big = torch.arange(2**18, dtype=torch.float32).reshape(512, 512)  # many whole pages
    checkpoint = Checkpoint(save(tmp_path, {"big": big}, kind))
    first = checkpoint.read("big", 100, 300)
    again = checkpoint.read("big")
    first += 1  # a copy: nobody else sees it
    assert torch.equal(again, big) and torch.equal(checkpoint.read("big"), big)


def test_safetensors_at_unaligned_offsets_are_read(tmp_path: Path):
    save(tmp_path, {"x": torch.zeros(1)})
    data = b"\x07" + torch.tensor([1.5, -2.5]).numpy().tobytes()
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "pair": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write_safetensors(tmp_path / "model.safetensors", header, data)
    assert Checkpoint(tmp_path).read("pair").tolist() == [1.5, -2.5]


def write_safetensors(file: Path, header: Any, data: bytes) -> None:
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def memory(kind: str) -> int:
    """Resident bytes of this process: RssAnon, RssFile."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_reading_in_chunks_keeps_neither_the_file_nor_its_pages_in_memory(kind: str, tmp_path: Path):
    rows, columns = 38400, 4096  # 300 MB of float16
    save(tmp_path, {"x": torch.zeros(1)}, kind)
    if kind == "safetensors":  # a sparse file
        spec = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
        write_safetensors(tmp_path / "model.safetensors", {"big": spec}, b"")
        start = (tmp_path / "model.safetensors").stat().st_size
        os.truncate(tmp_path / "model.safetensors", start + 2 * rows * columns)
    else:
        rows //= 3
        big = torch.empty(rows, columns, dtype=torch.float16)
        torch.save({"big": big}, tmp_path / "pytorch_model.bin")
        del big
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("big", 0, 8)
    before = memory("RssAnon"), memory("RssFile")
    growth = [0, 0]
    for at in range(0, rows, 512):
        chunk = checkpoint.read("big", at, at + 512)  # 8 MB as float32
        for i, what in enumerate(("RssAnon", "RssFile")):
            growth[i] = max(growth[i], memory(what) - before[i])
        del chunk
    assert growth[0] < 48 * 2**20 and growth[1] < 32 * 2**20, growth


class Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_does_not_run(kind: str, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    save(folder, {"x": torch.zeros(1)}, kind)
    fuse = tmp_path / "it ran"
    bomb = {"x": torch.zeros(1), "y": Bomb(fuse)}
    file = folder / "pytorch_model.bin"
    torch.save(bomb, file, _use_new_zipfile_serialization=kind == "zip")
    refused(lambda: Checkpoint(folder), str(file), "weights only")
    assert not fuse.exists()


@pytest.mark.parametrize(
    "kind, keep, says",
    [
        ("safetensors", 0.9, "truncated"),
        ("safetensors", 0.01, "truncated"),
        ("safetensors", 0.0, "truncated"),
        ("zip", 0.9, "truncated"),
        ("legacy", 0.9, "cannot be read"),
        ("zip", 0.0, "cannot be read"),
    ],
)
def test_a_truncated_shard_is_named(kind: str, keep: float, says: str, tmp_path: Path):
    save(tmp_path, some_tensors(), kind)
    [file] = [f for f in tmp_path.iterdir() if f.suffix != ".json"]
    full = file.stat().st_size
    os.truncate(file, int(full * keep))
    line = refused(lambda: Checkpoint(tmp_path), file.name, says)
    if says == "truncated":
        assert f"{int(full * keep)} bytes" in line


@pytest.mark.parametrize(
    "header",
    [
        [1, 2],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [1]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"x": {"dtype": "F32", "shape": ["one"], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-400, -396]}},
        {"x": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: Any, tmp_path: Path):
    save(tmp_path, {"x": torch.zeros(1)})
    write_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    refused(lambda: Checkpoint(tmp_path), "model.safetensors")


def test_a_size_that_does_not_fit_its_shape_is_named(tmp_path: Path):
    save(tmp_path, {"x": torch.zeros(1)})
    header = {"layer.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 10]}}
    write_safetensors(tmp_path / "model.safetensors", header, bytes(10))
    refused(lambda: Checkpoint(tmp_path), "layer.weight", "10 bytes", "[2, 3]", "want 12")


def test_a_missing_shard_is_named_with_the_index_that_wants_it(tmp_path: Path):
    save(tmp_path, some_tensors(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(lambda: Checkpoint(tmp_path), "model-00002-of-00003.safetensors", "index.json", "missing")


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path: Path):
    checkpoint = Checkpoint(save(tmp_path, some_tensors()))
    refused(lambda: checkpoint.read("nobody.weight"), "nobody.weight", "missing")
    refused(lambda: checkpoint.check("nobody.weight", (1,)), "nobody.weight", "missing")


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path):
    save(tmp_path, some_tensors(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    checkpoint = Checkpoint(tmp_path)
    refused(lambda: checkpoint.read("ghost"), "ghost", "model-00001-of-00002.safetensors")


def test_a_mis_shaped_tensor_is_named_with_both_shapes(tmp_path: Path):
    checkpoint = Checkpoint(save(tmp_path, some_tensors()))
    checkpoint.check("a.weight", (5, 7))
    refused(lambda: checkpoint.check("a.weight", (7, 5)), "a.weight", "[5, 7]", "expected [7, 5]")
    weight = Weight(checkpoint, (("bias", (11,)), ("a.weight", (6, 7))))
    refused(weight.check, "a.weight", "[5, 7]", "expected [6, 7]")


@pytest.mark.parametrize("shard", ["../model.safetensors", "{outside}/model.safetensors", "sub/../../x.bin"])
def test_an_index_may_not_name_a_file_outside(shard: str, tmp_path: Path):
    outside = save(tmp_path / "outside", {"x": torch.zeros(1)})
    save(tmp_path, {"x": torch.zeros(1)})
    folder = tmp_path / "checkpoint"
    save(folder, {"x": torch.zeros(1)})
    name = shard.format(outside=outside)
    index = {"weight_map": {"x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: Checkpoint(folder), repr(name), "outside the checkpoint")


@pytest.mark.parametrize("weights", [None, {}, [], {"x": 3}, {"x": None}])
def test_an_index_without_a_map_is_refused(weights: Any, tmp_path: Path):
    save(tmp_path, {"x": torch.zeros(1)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    refused(lambda: Checkpoint(tmp_path), "model.safetensors.index.json", "weight_map")


def test_shards_that_are_links_are_followed_as_in_the_hub_cache(tmp_path: Path):
    folder = save(tmp_path / "snapshot", some_tensors(), shards=2)
    for file in folder.glob("*.safetensors"):
        blob = tmp_path / hashlib.sha256(file.name.encode()).hexdigest()
        file.rename(blob)
        file.symlink_to(blob)
    assert Checkpoint(folder).read("ids").tolist() == list(range(9))


def test_a_folder_without_config_or_weights_is_no_checkpoint(tmp_path: Path):
    refused(lambda: Checkpoint(tmp_path), str(tmp_path), "config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: Checkpoint(tmp_path), str(tmp_path), "no weights")
    (tmp_path / "config.json").write_text("{]")
    refused(lambda: Checkpoint(tmp_path), "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(lambda: Checkpoint(tmp_path), "config.json", "expected an object")


def test_a_field_that_the_config_lacks_is_named_with_the_file(tmp_path: Path):
    config = Checkpoint(save(tmp_path, some_tensors())).config
    assert config.get("hidden_size") is None
    refused(lambda: config["hidden_size"], "config.json", "'hidden_size'")


def test_a_hub_id_without_a_hub_names_repository_variable_and_flag(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    call = lambda: resolve("nobody/no-such-model", flag="--vision-tower")  # noqa: E731
    refused(call, "nobody/no-such-model", "HF_HUB_OFFLINE is 1", "--vision-tower PATH")


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "./a/b", "/nowhere/at/all", "~/a-b-c-d"])
def test_a_path_that_is_neither_folder_nor_hub_id_says_so(name: str):
    refused(lambda: resolve(name), name, "does not exist", "--checkpoint")


def test_a_file_is_no_checkpoint_folder(tmp_path: Path):
    (tmp_path / "x.bin").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "x.bin")


def test_the_fingerprint_follows_configs_and_weights_and_nothing_else(tmp_path: Path):
    checkpoint = Checkpoint(save(tmp_path, some_tensors()))
    seen = [checkpoint.fingerprint()]
    (tmp_path / "README.md").write_text("hello")
    assert checkpoint.fingerprint() == seen[0]
    os.utime(tmp_path / "config.json", (1, 1))  # same contents
    assert checkpoint.fingerprint() == seen[0]
    (tmp_path / "generation_config.json").write_text("{}")
    seen.append(checkpoint.fingerprint())
    os.utime(tmp_path / "model.safetensors", (1, 1))
    seen.append(checkpoint.fingerprint())
    assert len(set(seen)) == 3


def test_a_weight_of_several_parts_reads_any_rows_as_if_they_were_one(tmp_path: Path):
    torch.manual_seed(1)
    parts = {"q": torch.randn(4, 3), "k": torch.randn(2, 3), "v": torch.randn(5, 3)}
    checkpoint = Checkpoint(save(tmp_path, parts))
    weight = Weight(checkpoint, tuple((n, tuple(t.shape)) for n, t in parts.items()))
    whole = torch.cat(list(parts.values()))
    assert torch.equal(weight.read(), whole)
    for start in range(11):
        for stop in range(start + 1, 12):
            assert torch.equal(weight.read(start, stop), whole[start:stop])
    turned = Weight(checkpoint, (("v", (5, 3)),), torch.t)
    assert torch.equal(turned.read(1, 2), parts["v"].t()[1:2])

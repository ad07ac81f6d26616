"""Calibration sees what the float32 reference sees, whole or streamed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rtp_llm.errors import UserError
from rtp_llm.export import calibrate as calibration
from rtp_llm.export import gptq
from rtp_llm.export.attention import Eager
from rtp_llm.export.calibrate import calibrate, rounded
from rtp_llm.export.checkpoint import Checkpoint, Weight
from rtp_llm.export.decoder import Decoder
from rtp_llm.export.families import FAMILIES, Options, Plan
from rtp_llm.runtime.preprocess import preprocess
from rtp_llm.runtime.prompt import PromptEncoder, expand


@pytest.fixture(params=["qwen_vl", "llava"])
def plan(request: pytest.FixtureRequest) -> Plan:
    folder = request.getfixturevalue({"qwen_vl": "sample_qwen", "llava": "sample_llava"}[request.param])
    return FAMILIES[request.param].plan(Checkpoint(folder), Options())


def inputs_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """What each linear layer reads, kept by hooks of the test's own."""
    seen: dict[str, list[Tensor]] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_pre_hook(
                lambda m, args, n=name: seen.setdefault(n, []).append(args[0].flatten(0, -2))
            )
    return seen


def filled(module: nn.Module, weights: dict[str, Weight]) -> nn.Module:
    for name, weight in weights.items():
        module.get_parameter(name).detach().copy_(weight.read())
    return module.eval().requires_grad_(False)


def assert_ranges(found: dict[str, calibration.Range], seen: dict[str, list[Tensor]]) -> None:
    assert found.keys() == seen.keys()
    for name, tensors in seen.items():
        x = torch.cat(tensors).double().numpy()
        assert found[name].amax == pytest.approx(np.abs(x).max(), rel=1e-4)
        sizes = np.sort(np.sqrt((x**2).mean(1)))
        assert found[name].typical == pytest.approx(sizes[(len(sizes) - 1) // 2], rel=1e-3)


def test_streamed_ranges_are_those_of_the_whole_model(
    plan: Plan, tmp_path: Path, red_circle: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each prompt alone through whole modules in memory, against one pass over packed batches."""
    monkeypatch.setattr(calibration, "TOKENS", 300)  # several batches
    monkeypatch.setattr(calibration, "PICTURES", 1)
    tag = plan.prompt.image.tags[0]
    (tmp_path / "red.png").write_bytes(red_circle.read_bytes())
    lines: list[dict[str, Any]] = [
        {"prompt": f"{tag}\nWhat is this?", "urls": ["red.png"], "max_new_tokens": 5},
        {"prompt": "Hello, world!"},
        {"prompt": f"{tag} and {tag}", "urls": ["red.png", str(red_circle)]},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    vision, decoder = calibrate(plan, data)

    tower = filled(plan.make_vision(), plan.vision_weights)
    seen = inputs_of(tower)
    pixels = torch.from_numpy(preprocess(Image.open(red_circle), plan.vision)[None])
    rows = tower(pixels)[0]
    assert_ranges(vision, {n: x * 3 for n, x in seen.items()})

    whole = filled(Decoder(plan.decoder), plan.decoder_weights)
    seen = inputs_of(whole)
    for line in lines:
        run(whole, plan, line["prompt"], rows, len(line.get("urls", [])))
    del seen["head"]
    assert_ranges(decoder, seen)


def run(decoder: nn.Module, plan: Plan, prompt: str, rows: Tensor, count: int) -> Tensor:
    """The prompt alone, with `count` times the picture of these rows; which tokens are the picture's."""
    encoded = PromptEncoder(plan.prompt, plan.tokenizer).encode_prompt(prompt, [None] * count)
    ids, spans = expand(encoded, [len(rows)] * count, plan.prompt.image.token_id)
    sequence = torch.tensor(ids)
    for start, length in spans:
        sequence[start : start + length] = plan.decoder.vocab_size + torch.arange(length)
    n = len(ids)
    table = next(i for i, limit in enumerate(plan.decoder.limits) if n <= limit)
    attend = Eager(decoder, torch.arange(n) + table * plan.decoder.max_seq_len, [n])
    decoder(sequence, rows, attend, None, torch.arange(n))
    return sequence >= plan.decoder.vocab_size


def test_each_layer_is_rounded_for_what_the_rounded_ones_before_it_give(
    plan: Plan, tmp_path: Path, red_circle: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it was rounded for is what it reads in the whole decoder when all is rounded, beside what it reads
    when nothing is: the mean of pictures and that of text, added."""
    prompts = {f"{plan.prompt.image.tags[0]}\nWhat is this?": [str(red_circle)], "Hello, world!": []}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": p, "urls": urls}) for p, urls in prompts.items()))
    given: list[tuple[Tensor, Tensor]] = []
    real = gptq.rounded

    def spy(rows: Any, squares: Tensor, cross: Tensor) -> Any:
        given.append((squares.clone(), cross.clone()))
        return real(rows, squares, cross)

    monkeypatch.setattr(gptq, "rounded", spy)
    weights = rounded(plan, data)
    monkeypatch.undo()

    seen = {}
    for kind in ("rounded", "exact"):
        decoder = filled(Decoder(plan.decoder), plan.decoder_weights)
        if kind == "rounded":
            for name, weight in weights.items():
                for part in weight.own:
                    decoder.get_parameter(name).copy_(part.read(0, part.shape[0]))
        seen[kind] = inputs_of(decoder)
        tower = filled(plan.make_vision(), plan.vision_weights)
        with Image.open(red_circle) as image:
            rows = tower(torch.from_numpy(preprocess(image, plan.vision)[None]))[0]
        image = torch.cat([run(decoder, plan, p, rows, len(urls)) for p, urls in prompts.items()])
    assert int(image.sum()) == plan.vision.tokens

    def mean(name: str, kind: str) -> Tensor:
        x, y = (torch.cat(seen[k][name]) for k in (kind, "rounded"))
        return sum((x[part].t() @ y[part] / int(part.sum()) for part in (image, ~image)), torch.zeros(()))

    assert len(given) == len(seen["rounded"]) == 4 * plan.decoder.layers + 1
    for i, (name, found) in enumerate(zip(seen["rounded"], given, strict=True)):
        wanted = [mean(name, kind) for kind in ("rounded", "exact")]
        for here, there in zip(found, wanted, strict=True):
            assert float((here - there).norm() / there.norm()) < 1e-4, name
        if i:
            assert float((wanted[0] - wanted[1]).norm() / wanted[0].norm()) > 3e-4, name


def test_of_too_many_prompts_as_many_are_used_as_fit(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibration, "ROUNDING", 100)
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"Hello, world number {i}!" * 3}) for i in range(50)]
    data.write_text("\n".join(lines))
    told: list[str] = []
    rounded(plan, data, told.append)
    found = re.search(r"rounding the decoder for (\d+) tokens, (\d+) of 50 prompts", told[-1])
    assert found and 50 < int(found[1]) <= 100 and 1 <= int(found[2]) < 10


def test_lines_may_be_chats(plan: Plan, tmp_path: Path, red_circle: Path):
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [*content, {"type": "image", "image": "own.png"}]},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": messages, "urls": [str(red_circle), "other.png"]}))
    [found] = calibration._encoded(plan, data)
    assert found.sources == [red_circle, tmp_path / "other.png", tmp_path / "own.png"]
    expected = PromptEncoder(plan.prompt, plan.tokenizer).encode_chat(messages, ["a", "b"])
    assert found.ids == expected.ids and found.slots == expected.slots


def test_default_data_are_texts_and_pictures(plan: Plan):
    told: list[str] = []
    vision, decoder = calibrate(plan, tell=told.append)
    layers = {f"layers.{i}.{n}" for i in range(plan.decoder.layers) for n in ("qkv", "o", "gate_up", "down")}
    assert set(decoder) == layers
    assert all(r.amax > r.typical > 0 for r in (*vision.values(), *decoder.values()))
    assert told[0] == "calibrating: 4 pictures through the vision tower"
    assert calibrate(plan, decoder=False) == (vision, {})


def test_one_linear_layer_is_in_memory_at_a_time(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    with torch.device("meta"):
        tower = plan.make_vision()
    linears = {f"{n}.weight" for n, m in tower.named_modules() if isinstance(m, nn.Linear)}
    weights = {plan.vision_weights[name].parts: name for name in linears}
    read: list[StorageWeakRef] = []
    there: list[int] = []
    real = Weight.read

    def spy(weight: Weight, *rows: Any) -> Tensor:
        found = real(weight, *rows)
        if weight.parts in weights:
            there.append(sum(not storage.expired() for storage in read))
            read.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(Weight, "read", spy)
    calibration._Watch().stream(tower, plan.vision_weights)
    with torch.no_grad():
        tower(torch.zeros(1, plan.vision.size, plan.vision.size, 3, dtype=torch.uint8))
    assert there == [0] * len(linears)


@pytest.mark.parametrize(
    "text, part",
    [
        ("{not json", "line 1 is '{not json'"),
        ('{"prompt": "a"}\n["b"]', "line 2"),
        ('{"prompt": 5}', "line 1"),
        ('{"text": "a"}', "line 1"),
        ("\n", "has no prompts"),
        ('{"prompt": "a", "urls": "x.png"}', "line 1"),
        ('{"prompt": "a", "messages": []}', 'expected {"prompt": "…", "urls": ["FILE", …]} or {'),
        ('{"messages": "a"}', "line 1: messages is str, expected a list"),
        ('{"messages": []}', "line 1: messages hold no text"),
        ('{"messages": [{"role": "me", "content": "a"}]}', "line 1: messages[0].role is 'me', expected"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: the messages have 1"),
        ('{"prompt": "<image>", "urls": []}', "line 1: the prompt has 1 image tag, 0 images were given"),
        ('{"prompt": "<image>", "urls": [5]}', "line 1: a picture is 5, expected a file's path"),
        ('{"prompt": "<image>", "urls": ["http://a/b.png"]}', "picture is 'http://a/b.png', expected"),
    ],
)
def test_a_line_that_is_wrong_is_named(text: str, part: str, sample_llava: Path, tmp_path: Path):
    plan = FAMILIES["llava"].plan(Checkpoint(sample_llava), Options())
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    with pytest.raises(UserError) as caught:
        calibrate(plan, data)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_missing_data_and_pictures_are_named(sample_llava: Path, tmp_path: Path):
    plan = FAMILIES["llava"].plan(Checkpoint(sample_llava), Options())
    with pytest.raises(UserError, match="nothing.jsonl cannot be read"):
        calibrate(plan, tmp_path / "nothing.jsonl")
    data = tmp_path / "data.jsonl"
    tag = plan.prompt.image.tags[0]
    data.write_text(json.dumps({"prompt": f"{tag} hm", "urls": ["gone.png"]}))
    with pytest.raises(UserError, match="gone.png cannot be read"):
        calibrate(plan, data)

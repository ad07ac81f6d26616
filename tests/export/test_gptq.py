"""GPTQ rounds as its formula says, and what it knows of a layer's inputs makes its results better."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtp_llm import cli
from rtp_llm.export import bundle as bundles
from rtp_llm.export import calibrate as calibration
from rtp_llm.export.calibrate import rounded as rounded_for
from rtp_llm.export.exporter import export
from rtp_llm.export.gptq import DAMPING, rounded
from rtp_llm.export.quantize import block_of, dequantize, quantize
from rtp_llm.runtime.preprocess import preprocess
from rtp_llm.runtime.prompt import PromptEncoder, expand

from .test_exporter import first_logits, plan_of, session_of
from .test_packed import products


def case(rows: int, columns: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [rows, columns], correlated inputs of very different sizes [inputs, columns], their squares."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(inputs, columns, generator=g) @ mix * torch.randn(columns, generator=g).exp()
    return torch.randn(rows, columns, generator=g), x, x.t() @ x / inputs


def behind_errors(x: Tensor, seed: int) -> Tensor:
    """What the unrounded model may have in place of x [inputs, columns]: they differ by what depends on x."""
    g = torch.Generator().manual_seed(seed + 1)
    columns = x.shape[1]
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=g) / columns**0.5
    return x @ mix


def error(found: Tensor, weights: Tensor, x: Tensor, exact: Tensor | None = None) -> float:
    wanted = weights @ (x if exact is None else exact).t()
    return float((found @ x.t() - wanted).norm() / wanted.norm())


def values(packed: Tensor) -> np.ndarray:
    q = packed.flatten(1).numpy()
    return np.stack([q & 15, q >> 4], -1).reshape(len(q), -1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 40), inputs=st.integers(1, 60), seed=st.integers(0, 2**32)
)
@example(rows=2, columns=150, inputs=400, seed=0)  # two lazy batches, the last block is partial
@example(rows=2, columns=160, inputs=40, seed=1)  # blocks of 32, and fewer inputs than columns
def test_values_are_those_of_optimal_brain_surgeon(rows: int, columns: int, inputs: int, seed: int):
    """Every value is nearest to what float64 wants there, after the values that were chosen before it: each
    time the inverse of what remains of the Hessian is computed anew."""
    weights, x, squares = case(rows, columns, inputs, seed)
    cross = behind_errors(x, seed).t() @ x / inputs
    packed, scales, zero_points = rounded([weights], squares, cross)
    block = block_of(columns, 4)
    q = values(packed).astype(float)
    z = values(zero_points)[:, : scales.shape[1]].repeat(block, 1)
    s = scales.double().numpy().repeat(block, 1)
    assert (q == z)[:, columns:].all()  # zeros fill the last block

    hessian = squares.double().numpy()
    change = cross.double().numpy() - hessian
    hessian += DAMPING * hessian.diagonal().mean() * np.eye(columns)
    wanted = weights.double().numpy() @ (np.eye(columns) + change @ np.linalg.inv(hessian))
    blocks = np.pad(wanted, [(0, 0), (0, -columns % block)]).reshape(rows, -1, block)
    steps = (blocks.max(2).clip(0) - blocks.min(2).clip(None, 0)) / 15
    assert scales.numpy() == pytest.approx(0.93 * steps, rel=1e-3)
    assert (np.abs(z[:, ::block] + blocks.min(2).clip(None, 0) / steps) < 0.505).all()
    rest = list(np.argsort(-squares.diagonal().numpy(), kind="stable"))
    while rest:
        i = rest[0]
        ideal = np.clip(wanted[:, i] / s[:, i] + z[:, i], 0, 15)
        assert (np.abs(q[:, i] - ideal) < 0.505).all()
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        left = wanted[:, i] - (q[:, i] - z[:, i]) * s[:, i]
        wanted[:, rest] -= np.outer(left / inverse[0, 0], inverse[0])
        rest = rest[1:]


def test_products_with_other_inputs_of_the_same_kind_err_less():
    weights, x, _ = case(64, 704, 6000, 0)
    seen, other = x.split(3000)
    squares = seen.t() @ seen / 3000
    found = dequantize(*rounded([weights], squares, squares), 704, 4)
    plain = dequantize(*quantize(weights, 4), 704, 4)
    assert error(found, weights, other) < 0.6 * error(plain, weights, other)


def test_errors_of_the_layers_before_are_made_up_for():
    weights, x, _ = case(64, 704, 6000, 0)
    exact = behind_errors(x, 0)
    seen, other = x.split(3000)
    squares, cross = (inputs[:3000].t() @ seen / 3000 for inputs in (x, exact))
    aimed, unaimed = (dequantize(*rounded([weights], squares, c), 704, 4) for c in (cross, squares))
    assert error(aimed, weights, other, exact[3000:]) < 0.6 * error(unaimed, weights, other, exact[3000:])


@pytest.mark.parametrize("columns", [128, 150])
def test_inputs_without_correlation_leave_plain_rounding(columns: int):
    weights, _, _ = case(5, columns, 1, 0)
    for squares in (torch.diag(torch.rand(columns)), torch.zeros(columns, columns)):
        assert all(map(torch.equal, rounded([weights], squares, squares), quantize(weights, 4)))


def test_inputs_that_are_always_zero_are_rounded_plainly_and_change_nothing_else():
    weights, x, _ = case(5, 128, 300, 0)
    dead = torch.arange(128) % 3 == 0
    x[:, dead] = 0
    squares = x.t() @ x / 300
    found = values(rounded([weights], squares, squares)[0])
    assert (found[:, dead] == values(quantize(weights, 4)[0])[:, dead]).all()
    moved = weights.clone()
    moved[:, dead] = moved[:, dead].clamp(-0.1, 0.1)  # not the ends of a block's range
    moved[:, 0], moved[:, 3] = weights.amin(1), weights.amax(1)
    weights[:, 0], weights[:, 3] = weights.amin(1), weights.amax(1)
    again = (values(rounded([w], squares, squares)[0])[:, ~dead] for w in (weights, moved))
    assert np.array_equal(*again)


def test_rows_in_chunks_are_the_same_rows():
    weights, x, squares = case(40, 150, 400, 0)
    parts = weights.split([1, 16, 23])
    assert all(map(torch.equal, rounded([weights], squares, squares), rounded(iter(parts), squares, squares)))
    cross = behind_errors(x, 0).t() @ x / 400
    whole, chunks = rounded([weights], squares, cross), rounded(iter(parts), squares, cross)
    assert torch.allclose(whole[1], chunks[1]) and torch.equal(whole[2], chunks[2])
    assert (whole[0] == chunks[0]).float().mean() > 0.99  # sums of floats depend on the number of rows


def test_squares_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match="no Cholesky factor: their mean is nan"):
        rounded([torch.ones(2, 32)], torch.full((32, 32), torch.nan), torch.eye(32))


# ------------------------------------------------------------------------------------ a whole decoder


def shapes() -> Any:
    file = Path(__file__).parents[2] / "scripts" / "shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["shapes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_calibrated_bundle_is_closer_to_float32_and_as_large(
    sample_qwen: Path, qwen_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(calibration, "ROUNDING", 6000)
    scenes, plan = shapes(), plan_of(sample_qwen, "qwen_vl")
    tag = "Picture 1:<img/>\n"
    lines: list[dict[str, Any]] = []
    for i in range(12):
        scene = scenes.draw(f"calibration/{i}")
        scene.image.save(tmp_path / f"{i}.png")
        q = scenes.questions(scene, locate=True)[-1]
        turns = [("user", [{"type": "image"}, {"type": "text", "text": q.text}]), ("assistant", q.answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines += [{"prompt": tag + q.text + q.answer, "urls": [f"{i}.png"]},
                  {"messages": messages, "urls": [f"{i}.png"]}]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    said: list[str] = []
    made = {
        "fp32": bundles.read(qwen_bundle),
        "plain": export(sample_qwen, tmp_path / "plain", precision="int4"),
        "calibrated": export(sample_qwen, tmp_path / "calibrated", precision="int4", calibration=data,
                             progress=lambda p: said.append(p.text)),
    }  # fmt: skip
    assert any("tokens, 20 of 24 prompts" in line for line in said)
    files = [made[key].read_path("decoder.onnx.data") for key in ("plain", "calibrated")]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert cli.main(["inspect", str(tmp_path / "calibrated")]) == 0
    assert f"calibrated  {data} (" in capsys.readouterr().out

    expected = rounded_for(plan, data)
    found = products(made["calibrated"].read_path("decoder.onnx"))
    assert "head.weight" in found and len(found) == 4 * plan.decoder.layers + 1
    for name, rows in found.items():
        own = expected[name].own[0]
        assert np.array_equal(rows, own.read(0, own.shape[0]).numpy())

    encoder, vision = PromptEncoder(plan.prompt, plan.tokenizer), session_of(made["fp32"], "vision")
    errors: dict[str, list[float]] = {"plain": [], "calibrated": []}
    for i in range(8):
        scene = scenes.draw(f"held-out/{i}")
        q = scenes.questions(scene, locate=True)[-1]
        encoded = encoder.encode_prompt(tag + q.text + q.answer, [scene.image])
        ids, [(start, length)] = expand(encoded, [plan.vision.tokens], 0)
        ids[start : start + length] = range(plan.decoder.vocab_size, plan.decoder.vocab_size + length)
        [features] = vision.run(None, {"pixels": preprocess(scene.image, plan.vision)[None]})
        right = first_logits(made["fp32"], ids, features[0])
        for key, kept in errors.items():
            wrong = first_logits(made[key], ids, features[0]) - right
            kept.append(float(np.linalg.norm(wrong) / np.linalg.norm(right)))
    assert max(np.divide(errors["calibrated"], errors["plain"])) < 1
    assert np.mean(errors["calibrated"]) < 0.8 * np.mean(errors["plain"])

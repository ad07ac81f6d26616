"""`verify`: parity stage by stage, and that it can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rtp_llm.export.exporter import export
from rtp_llm.export.verify import verify

STAGES = ["tokenizer ids", "pixels", "vision features", "splice", "first-token logits", "16 greedy tokens"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("qwenvl_C", "plain torch modules"),
        ("llava_orig_A", "plain torch modules"),
        ("llava_hf_A", "transformers"),
    ],
)
def test_a_float32_bundle_agrees_with_its_reference_in_every_stage(goldens, tmp_path, name, reference):
    export(goldens / name / "checkpoint", tmp_path / "bundle", precision="fp32")
    report = verify(tmp_path / "bundle")
    assert reference in report.reference
    assert [stage.name for stage in report.stages] == STAGES
    assert all(stage.passed for stage in report.stages), report.stages
    assert report.passed


def test_an_int8_bundle_of_the_sample_passes_by_cosine(sample_qwen, tmp_path):
    export(sample_qwen, tmp_path / "bundle", precision="int8")
    report = verify(tmp_path / "bundle")
    stages = {stage.name: stage for stage in report.stages}
    assert report.passed, report.stages
    assert stages["first-token logits"].cosine < 0.999999  # it is not float32


def test_another_checkpoint_fails_from_the_vision_features_on(goldens, tmp_path):
    import torch

    changed = tmp_path / "checkpoint"
    shutil.copytree(goldens / "qwenvl_C/checkpoint", changed)
    export(changed, tmp_path / "bundle", precision="fp32")
    for shard in changed.glob("*.bin"):
        Path(shard).chmod(0o644)
        tensors = torch.load(shard, weights_only=True)
        torch.save({k: v * 1.001 if v.dim() > 1 else v for k, v in tensors.items()}, shard)
    report = verify(tmp_path / "bundle", changed)
    failed = [stage.name for stage in report.stages if stage.passed is False]
    assert not report.passed
    assert "vision features" in failed and "first-token logits" in failed
    assert "pixels" not in failed

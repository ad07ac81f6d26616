"""The training script still runs, and writes what the exporter reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rtp_llm.export.exporter import export

SCRIPT = Path(__file__).parents[2] / "scripts/train_sample.py"


@pytest.mark.slow
def test_a_smoke_run_writes_both_checkpoints_in_layouts_that_export(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family in ("qwen_vl", "llava"):
        bundle = export(tmp_path / f"{family}_shapes", tmp_path / family, precision="fp32")
        assert bundle.model.family == family

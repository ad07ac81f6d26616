"""Random checkpoints with as few layers as there can be: an export of one is quicker than of a sample."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def script() -> Any:
    """scripts/make_random_checkpoint.py, with one layer in its tiny decoders."""
    file = Path(__file__).parents[1] / "scripts" / "make_random_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_random_checkpoint", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for table in (module.QWEN, module.LLAVA):
        table["tiny"]["num_hidden_layers"] = 1
    module.QWEN["tiny"]["visual"]["layers"] = 1
    module.LLAVA["tiny"]["clip"]["num_hidden_layers"] = 2
    return module


def make(folder: Path) -> None:
    """The folders qwen_vl and llava."""
    for name, write in script().MODELS.items():
        (folder / name).mkdir(parents=True)
        write(folder / name, "tiny", 0, quiet=True)

"""ONNX Runtime GenAI: the graph of its own model builder, whose blocks are of 32 as ours are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from protocol import Timed, serve


def prepare(folder: Path, precision: str, image: bool) -> None:
    output = folder / f"genai-{precision}"
    if image:
        raise NotImplementedError("its model builder knows no LLaVA")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", folder / "llama", "-o", output]
    subprocess.run([*command, "-p", precision, "-e", "cpu", "-c", folder / "cache"], check=True)


class Worker(Timed):
    def __init__(self, folder: Path, precision: str, threads: int, image: bool):
        self.folder = folder / f"genai-{precision}"
        config = og.Config(str(self.folder))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)

    def times(self, prompts: list[list[int]], n: int) -> tuple[float, float]:
        start = time.perf_counter()
        params = og.GeneratorParams(self.model)
        length = len(prompts[0]) + n + 1
        params.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False
        )
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(n):
            generator.generate_next_token()
        return first - start, (time.perf_counter() - first) / n

    def logits(self, ids: list[int]) -> dict[str, list[float]]:
        generator = og.Generator(self.model, og.GeneratorParams(self.model))
        generator.append_tokens(np.array([ids], np.int32))
        return {"logits": generator.get_logits().reshape(-1, generator.get_logits().shape[-1])[-1].tolist()}

    def size(self) -> dict[str, int]:
        return {"bytes": (self.folder / "model.onnx.data").stat().st_size}


if __name__ == "__main__":
    serve(Worker, prepare, "onnxruntime-genai", "onnxruntime")

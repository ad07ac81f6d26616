"""OpenVINO GenAI: optimum-intel's export, symmetric blocks of 32, answered by its continuous batching."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from PIL import Image
from protocol import Timed, serve
from safetensors.torch import load_file, save_file

WHOLE_PROMPT = 2**20  # tokens of a step; a prompt would be cut in pieces of 256 else


def prepare(folder: Path, precision: str, image: bool) -> None:
    source, task = ("llava", "image-text-to-text") if image else ("llama", "text-generation-with-past")
    weights = ["--weight-format", precision]
    if precision == "int4":
        weights += ["--sym", "--group-size", "32", "--ratio", "1.0"]
    program = Path(sys.executable).with_name("optimum-cli")
    output = folder / f"openvino-{source}-{precision}"
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as copy:
        if image:
            rename_tower(folder / source, Path(copy))
        checkpoint = copy if image else folder / source
        command = [program, "export", "openvino", "--model", checkpoint, "--task", task, *weights]
        subprocess.run([*command, output], check=True)


def rename_tower(checkpoint: Path, copy: Path) -> None:
    """The names that the transformers which optimum-intel wants knows: under others it makes up weights."""
    shutil.copytree(checkpoint, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    names = {n: n.replace("vision_tower.", "vision_tower.vision_model.") for n in tensors}
    save_file({names[n]: t for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})


class Worker(Timed):
    def __init__(self, folder: Path, precision: str, threads: int, image: bool):
        self.properties = {"INFERENCE_NUM_THREADS": threads}
        self.folder = folder / f"openvino-{'llava' if image else 'llama'}-{precision}"
        if image:
            self.pipeline = genai.VLMPipeline(str(self.folder), "CPU", **self.properties)
            return
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = WHOLE_PROMPT
        self.pipeline = genai.ContinuousBatchingPipeline(str(self.folder), scheduler, "CPU", self.properties)
        self.asked = 0

    def times(self, prompts: list[list[int]], n: int) -> tuple[float, float]:
        """Of the steps until every answer has its first token, and of one step afterwards."""
        config = genai.GenerationConfig(max_new_tokens=n + 1, min_new_tokens=n + 1, ignore_eos=True)
        config.do_sample = False
        handles = []
        start = time.perf_counter()
        for ids in prompts:
            tokens = ov.Tensor(np.array([ids], np.int64))
            handles.append(self.pipeline.add_request(self.asked, tokens, config))
            self.asked += 1
        waiting = handles
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        first, steps = time.perf_counter(), 0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            steps += 1
        return first - start, (time.perf_counter() - first) / steps

    def logits(self, ids: list[int]) -> dict[str, list[float]]:
        """The pipeline shows none: the same graph, compiled once more."""
        model = ov.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.properties)
        tokens = np.array([ids], np.int64)
        inputs = {
            "input_ids": tokens, "attention_mask": np.ones_like(tokens),
            "position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        return {"logits": model(inputs)["logits"][0, -1].tolist()}

    def picture(self, path: str, text: str) -> dict[str, float]:
        config = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, apply_chat_template=False)
        config.do_sample = False
        start = time.perf_counter()
        pixels = ov.Tensor(np.array(Image.open(path).convert("RGB")))
        self.pipeline.generate(f"<image>{text}", images=[pixels], generation_config=config)
        return {"picture": time.perf_counter() - start}

    def size(self) -> dict[str, int]:
        return {"bytes": (self.folder / "openvino_model.bin").stat().st_size}


if __name__ == "__main__":
    serve(Worker, prepare, "openvino-genai", "optimum-intel")

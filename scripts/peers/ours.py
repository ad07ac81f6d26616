"""rtp_llm: the LLaVA checkpoint exported as users export it, answered by Pipeline."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from protocol import serve

from rtp_llm.model_factory import ModelConfig, ModelFactory
from rtp_llm.pipeline import Pipeline

GREEDY = {"top_k": 1, "ignore_eos": True}


def prepare(folder: Path, precision: str, image: bool) -> None:
    if image:  # the bundle has it
        return
    from rtp_llm.export.exporter import export  # imports torch, which answering does without

    export(folder / "llava", folder / f"ours-{precision}", precision=precision)


class Worker:
    def __init__(self, folder: Path, precision: str, threads: int, image: bool):
        # peers load no tower when they are asked for text alone
        encode = None if image else lambda pixels: pixels
        config = ModelConfig(threads=threads, encode=encode)
        self.pipeline = Pipeline(ModelFactory.from_huggingface(folder / f"ours-{precision}", None, config))

    def _times(self, prompt: Any, n: int, into: list[float], **more: Any) -> None:
        for _ in self.pipeline(prompt, generate_config=GREEDY | {"max_new_tokens": n}, **more):
            into.append(time.perf_counter())

    def generate(self, ids: list[int], n: int) -> dict[str, float]:
        times = [time.perf_counter()]
        self._times(ids, n + 1, times)
        return {"prefill": times[1] - times[0], "decode": (times[-1] - times[1]) / n}

    def streams(self, prompts: list[list[int]], n: int) -> dict[str, float]:
        times: list[list[float]] = [[] for _ in prompts]
        threads = [
            threading.Thread(target=self._times, args=(ids, n + 1, own))
            for ids, own in zip(prompts, times, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begun, over = max(t[0] for t in times), min(t[-1] for t in times)
        if begun >= over:
            raise ValueError(f"the streams did not meet: they need more than {n} tokens")
        tokens = sum(begun < at <= over for t in times for at in t)
        return {"streams": len(prompts) * (over - begun) / tokens}

    def logits(self, ids: list[int]) -> dict[str, list[float]]:
        config = GREEDY | {"max_new_tokens": 1, "return_logits": True}
        (response,) = self.pipeline(ids, generate_config=config)
        return {"logits": response.generate_outputs[0].logits[0].tolist()}

    def picture(self, path: str, text: str) -> dict[str, float]:
        times = [time.perf_counter()]
        self._times(f"<image>{text}", 1, times, images=[path])
        return {"picture": times[1] - times[0]}

    def size(self) -> dict[str, int]:
        """Its table of embeddings and its head included, its graph not."""
        bundle = self.pipeline.model.bundle
        graph = bundle.graphs["decoder"].path
        return {"bytes": sum(f.size for n, f in bundle.files.items() if n.startswith(graph) and n != graph)}


if __name__ == "__main__":
    serve(Worker, prepare, "vlmbundle", "onnxruntime")

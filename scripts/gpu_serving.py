"""What gpu_check.py's serving parts measure: many answers at once, and who else gives them.

Every server has `ask(prompts, new) -> answers`, here as in gpu_models.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_models import Answer, Ear, Ours, Prompt, Theirs, edge, llava_config
from make_random_checkpoint import SIZES

from rtp_llm.export.paged_attention import BLOCK_SIZE


def figures(answers: list[Answer]) -> dict[str, tuple[float, str]]:
    """Name → value and unit, over all answers to one `ask`.

    Tokens per second: all tokens / (last token − first prompt). Time to first token: of each answer, from its
    prompt. Time between tokens: of each answer, from token to token.
    """
    seconds = max(a.times[-1] for a in answers) - min(a.start for a in answers)
    first = [1e3 * (a.times[0] - a.start) for a in answers]
    between = np.concatenate([1e3 * np.diff(a.times) for a in answers])
    found = {"tokens per second": (sum(len(a.times) for a in answers) / seconds, "tokens/s")}
    for name, values in (("time to first token", first), ("time between tokens", between)):
        for share in (50, 95):
            found[f"{name}, p{share}"] = float(np.percentile(values, share)), "ms"
    return found


def step_bytes(ours: Ours, rows: int, length: float) -> float:
    """What a decode step of `rows` answers, `length` tokens long each, must read: all weights but the
    embedding table, once, and each answer's keys and values: 2 · layers · kv_heads · head_dim a token."""
    return ours.backend.weight_bytes + rows * length * ours.backend.block_bytes / BLOCK_SIZE


def arrivals(count: int, rate: float) -> list[float]:
    """Seconds at which a Poisson process of `rate` a second gives `count` prompts; always the same."""
    return np.random.default_rng(0).exponential(1 / rate, count).cumsum().tolist()


def flips(answers: list[Answer], alone: list[Ear]) -> tuple[int, float]:
    """How many answers leave the one that the same prompt was given alone, as far as that goes, and how far
    from a tie: the largest of (its logit − the logit of the other token) / standard deviation of the logits,
    where they part. (0, 0.0) if none does."""
    gaps = []
    for answer, one in zip(answers, alone, strict=False):
        pairs = zip(answer.tokens, one.tokens, one.logits, strict=False)
        gaps += [(x[b] - x[a]) / x.std() for a, b, x in pairs if a != b][:1]
    return len(gaps), float(max(gaps, default=0.0))


def cosine(answers: list[Ear], alone: list[Ear]) -> float:
    """The least cosine of an answer's logits with those of the same prompt alone, as long as the tokens
    before them are the same; -1 where one is NaN."""
    least = 1.0
    for answer, one in zip(answers, alone, strict=False):
        for a, b, x, y in zip(answer.tokens, one.tokens, answer.logits, one.logits, strict=False):
            found = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            least = min(least, found if found == found else -1.0)
            if a != b:
                break
    return least


class Continuous:
    """transformers' continuous batching over `theirs`: words alone, since it takes no pictures; where a
    picture would be, as many words more."""

    def __init__(self, theirs: Theirs, tiny: bool):
        import transformers as hf
        from transformers.generation import ContinuousBatchingConfig

        self.theirs = theirs
        greedy = hf.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        # on a CPU it would take a share of the memory of the machine
        sizes: dict[str, Any] = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 256} if tiny else {}
        self.context = theirs.model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        )
        self.manager = self.context.__enter__()  # which also captures its CUDA graphs

    def ask(self, asked: list[Prompt], new: int) -> list[Answer]:
        """Greedy answers of `new` tokens, all asked at once. Raises RuntimeError with the reason of one that
        fails."""
        random = np.random.default_rng()
        words = [random.integers(3, self.theirs.vocab - 1, self.theirs.tokens).tolist() for _ in asked]
        inputs = [more + prompt.words for more, prompt in zip(words, asked, strict=True)]
        answers: dict[str, Answer] = {}
        self.manager.add_requests(inputs, max_new_tokens=new, record_timestamps=True)
        while len(answers) < len(asked):
            result = self.manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(result.error if result else "continuous batching gave nothing for 60 s")
            if result.is_finished():
                answer = answers[result.request_id] = Answer()
                answer.start, answer.times = result.created_time, result.timestamps
                answer.tokens = result.generated_tokens
        return list(answers.values())

    def stop(self) -> None:
        self.context.__exit__(None, None, None)


class Vllm:
    """vLLM's engine over the same shapes with random weights of its own. It prepares pictures itself, as it
    has no way around that; the others get pixels. Never run here yet."""

    def __init__(self, model: str, size: str, slots: int, length: int):
        from vllm import LLM, SamplingParams

        # the tags of a picture, which vLLM turns into its places
        self.tags = [151857, 151858] if model == "qwen_vl" else [SIZES["llava"][size]["vocab_size"] - 1]
        self.folder = tempfile.TemporaryDirectory()
        write_config(model, size, Path(self.folder.name))
        self.engine = LLM(
            self.folder.name, load_format="dummy", dtype="bfloat16", max_model_len=length,
            max_num_seqs=slots, gpu_memory_utilization=0.8, trust_remote_code=True,
        ).llm_engine  # fmt: skip
        self.params = SamplingParams

    def ask(self, asked: list[Prompt], new: int, arrivals: Iterable[float] | None = None) -> list[Answer]:
        """As Ours.ask."""
        from PIL import Image

        params = self.params(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        answers = [Answer() for _ in asked]
        waiting = deque(zip(arrivals or [0.0] * len(asked), range(len(asked)), strict=True))
        began = time.perf_counter()
        while waiting or self.engine.has_unfinished_requests():
            while waiting and began + waiting[0][0] <= time.perf_counter():
                _, i = waiting.popleft()
                answers[i].start = time.perf_counter()
                picture = np.array(asked[i].picture)
                picture[0, :4] = np.frombuffer(os.urandom(12), np.uint8).reshape(4, 3)  # not in its caches
                data = {"image": Image.fromarray(picture)}
                prompt = {"prompt_token_ids": self.tags + asked[i].words, "multi_modal_data": data}
                self.engine.add_request(str(i), prompt, params)
            if not self.engine.has_unfinished_requests():
                time.sleep(max(0.0, began + waiting[0][0] - time.perf_counter()))
                continue
            for output in self.engine.step():
                answer = answers[int(output.request_id)]
                answer.tokens = list(output.outputs[0].token_ids)
                answer.times += [time.perf_counter()] * (len(answer.tokens) - len(answer.times))
        return answers

    def stop(self) -> None:
        del self.engine  # its process ends with it


def write_config(model: str, size: str, folder: Path) -> None:
    """A checkpoint without weights: config.json, tokenizer.json and what prepares pictures, as vLLM wants
    them. For qwen_vl there is config.json alone: the rest is a program on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    c = SIZES[model][size]
    if model == "qwen_vl":
        config = {"architectures": ["QwenVLForConditionalGeneration"], "model_type": "qwen", **c}
        (folder / "config.json").write_text(json.dumps(config))
        return
    llava_config(size).save_pretrained(folder)
    words = {f"w{i}": i for i in range(c["vocab_size"] - 1)} | {"<image>": c["vocab_size"] - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w0",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(folder)  # fmt: skip
    side = edge(model, size)
    pictures = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": c["clip"]["patch_size"], "image_token": "<image>",
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(json.dumps(processor))

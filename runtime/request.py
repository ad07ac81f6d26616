"""One request: prompt and images → sequences for the engine, and the engine's tokens → responses."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GenerateConfigError, GenerationTimeout, PromptTooLong, RtpLlmError, UserError
from .detokenizer import Detokenizer
from .grammar import Matcher, matcher
from .media import LoadedImage, MediaPolicy, fetch_all
from .preprocess import image_key, preprocess
from .prompt import EncodedPrompt, expand
from .sampling import Sampled, Sampler
from .sequence import ImageSpan, SamplingParams, Sequence
from .speculation import PromptLookup
from .vision import Embedded

if TYPE_CHECKING:
    from ..model_factory import Model

DEFAULT_NEW_TOKENS = 1024


@dataclass
class AuxInfo:
    """Times in ms."""

    cost_time: float = 0.0
    first_token_cost_time: float = 0.0
    wait_time: float = 0.0  # from submission to the first step
    iter_count: int = 0
    input_len: int = 0
    output_len: int = 0
    prefix_len: int = 0
    reuse_len: int = 0
    drafted_len: int = 0  # tokens of drafts, with `speculative`
    accepted_len: int = 0  # of those, as they came
    multimodal_lengths: list[int] = field(default_factory=list)
    cum_log_probs: float | None = None


@dataclass
class GenerateOutput:
    """What was not asked for is None."""

    output_ids: list[int] | None = None
    input_ids: list[int] | None = None  # expanded: the family's image token in every image slot
    finished: bool = False
    aux_info: AuxInfo = field(default_factory=AuxInfo)
    loss: float | np.ndarray | None = None  # sum, or float64 [prompt − 1] with NaN for image slots
    logits: np.ndarray | None = None  # float32 [steps, vocab], row 0 from the prompt's last position
    hidden_states: None = None
    all_probs: np.ndarray | None = None  # float64 [steps, vocab], softmax of the logits
    logprobs: list[dict[str, Any]] | None = None  # per token: id, logprob, top [(id, logprob)]
    finish_reason: str | None = None  # "stop" or "length"


@dataclass
class GenerateResponse:
    generate_texts: list[str]
    generate_outputs: list[GenerateOutput]
    finished: bool

    @property
    def batch_response(self) -> list[str]:
        return self.generate_texts


class _Rows:
    """Rows [n, width] that grow without copying all of them at every step."""

    def __init__(self) -> None:
        self._data: np.ndarray | None = None
        self._n = 0

    def append(self, row: np.ndarray) -> None:
        if self._data is None:
            self._data = np.empty((8, len(row)), row.dtype)
        elif self._n == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._n] = row
        self._n += 1

    def view(self) -> np.ndarray | None:
        return None if self._data is None else self._data[: self._n]


class _Answer:
    """One of a request's answers. It listens on the engine's thread and hands finished snapshots on."""

    def __init__(
        self,
        sequence: Sequence,
        model: Model,
        publish: Callable[[tuple[int, Any, Any]], None],
        index: int,
        matcher: Matcher | None = None,
    ):
        self._matcher = matcher
        self.sequence = sequence
        self.params = sequence.params
        self.index = index
        self._publish = publish
        stops = [] if self.params.ignore_eos or matcher else model.bundle.generation.stop_words
        self._text = Detokenizer(
            model.tokenizer,
            skip_special_tokens=self.params.skip_special_tokens,
            stop=[*stops, *self.params.stop_words_str],
            print_stop_words=self.params.print_stop_words,
        )
        self._pushed = 0  # generated tokens that the detokenizer has seen
        self._submitted = time.monotonic()
        self._first = 0.0
        self._logits, self._probs = _Rows(), _Rows()
        self._losses: list[np.ndarray] = []
        self._cum_log_probs = 0.0
        self._logprobs: list[dict[str, Any]] = []

    def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
        if not self._first:
            self._first = time.monotonic()
        if sampled.logits is not None:
            self._logits.append(sampled.logits)
        if sampled.probs is not None:
            self._probs.append(sampled.probs)
        if sampled.logprob is not None:
            self._cum_log_probs += sampled.logprob
            self._logprobs.append(
                {"id": sampled.token, "logprob": sampled.logprob, "top": sampled.top}
            )
        generated = sequence.tokens[sequence.prompt_len :]
        held, stopped = self._held_back(generated)
        ready = generated[self._pushed : len(generated) - held]
        self._pushed += len(ready)
        self._text.push(ready)
        if self._text.stopped is not None or stopped:
            return "stop"
        if sampled.token in sequence.eos_ids:
            return "stop"
        if self._matcher and (self._matcher.done or self._matcher.error):
            return "stop"
        if sequence.output_len < sequence.max_new_tokens:  # the last one comes with `end`
            self._publish((self.index, self._snapshot(None), None))
        return None

    def _held_back(self, generated: list[int]) -> tuple[int, bool]:
        """How many of the last tokens belong, or may yet belong, to a stop word; and whether one ended."""
        show = self.params.print_stop_words
        if generated[-1] in self.sequence.eos_ids:
            return (0 if show else 1), True
        held = 0
        for word in self.params.stop_words_list:
            if generated[-len(word) :] == word:
                return (0 if show else len(word)), True
            for n in range(min(len(word) - 1, len(generated)), held, -1):
                if generated[-n:] == word[:n]:
                    held = n
                    break
        return held, False

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        self._losses.append(losses)

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        if error is None and self._matcher and self._matcher.error:
            error = GenerateConfigError(f"generate_config: {self._matcher.error}")
        if error is None and reason == "length":
            self._text.push(sequence.tokens[sequence.prompt_len + self._pushed :])
        if error is None and reason in ("stop", "length"):
            self._text.finish()
            self._publish((self.index, self._snapshot(reason), None))
        else:
            error = error or UserError("the request was cancelled: the pipeline was stopped")
            self._publish((self.index, None, error))

    def _snapshot(self, reason: str | None) -> tuple[str, GenerateOutput]:
        s, p = self.sequence, self.params
        now = time.monotonic()
        output = GenerateOutput(
            finished=reason is not None,
            finish_reason=reason,
            aux_info=AuxInfo(
                cost_time=1000 * (now - self._submitted),
                first_token_cost_time=1000 * ((self._first or now) - self._submitted),
                wait_time=1000 * (s.started - self._submitted),
                iter_count=s.iterations,
                input_len=s.prompt_len,
                output_len=s.output_len,
                reuse_len=s.reused,
                drafted_len=s.drafted,
                accepted_len=s.accepted,
                multimodal_lengths=[span.length for span in s.images],
                cum_log_probs=self._cum_log_probs if p.return_cum_log_probs else None,
            ),
            logits=self._logits.view(),
            all_probs=self._probs.view(),
        )
        if p.return_output_ids:
            output.output_ids = s.tokens[s.prompt_len :]
        if p.return_input_ids:
            output.input_ids = s.tokens[: s.prompt_len]
        if p.logprobs:
            output.logprobs = list(self._logprobs)
        if p.calculate_loss:
            losses = np.concatenate(self._losses) if self._losses else np.empty(0)
            output.loss = float(np.nansum(losses)) if p.calculate_loss == 1 else losses
        return self._text.text, output


class Request:
    """A checked request, ready to start. Raises UserError and its kinds when it is made."""

    def __init__(
        self,
        model: Model,
        encoded: EncodedPrompt,
        config: Mapping[str, Any] | None,
        policy: MediaPolicy,
        salt: bytes = b"",
        arrived: float | None = None,
        abandoned: Callable[[], bool] = bool,
    ):
        bundle = model.bundle
        self.model = model
        self.params = SamplingParams.from_config(config, bundle.generation.defaults)
        # of the prefix cache; what nobody may share has one of its own
        self.salt = salt if self.params.reuse_cache else secrets.token_bytes(16)
        self._check_images_config()
        self._check_speculative()
        self._check_ids()
        eos = self.params.eos_token_id
        eos = bundle.generation.eos_ids if eos is None else eos
        self.eos_ids = frozenset() if self.params.ignore_eos else frozenset(eos)
        grammar, vocab = self.params.grammar, bundle.model.vocab_size
        self._matcher = matcher(grammar, model.tokenizer, vocab, self.eos_ids) if grammar else None
        if self._matcher and self._matcher.error:
            raise GenerateConfigError(f"generate_config: {self._matcher.error}")
        limit = self.params.timeout_ms
        self.deadline = (arrived or time.monotonic()) + limit / 1000 if limit else float("inf")

        def prepared(image: LoadedImage) -> np.ndarray:
            if abandoned():
                raise UserError("the request was abandoned")
            if time.monotonic() >= self.deadline:
                raise GenerationTimeout(f"timeout_ms={limit} is over")
            return preprocess(image, bundle.vision)

        embedded = [source.rows for source in encoded.sources if isinstance(source, Embedded)]
        images = embedded or fetch_all(encoded.sources, policy, prepared)
        keys = [image_key(image, bundle.vision, salt) for image in images]
        self.pixels = dict(zip(keys, images, strict=True))
        lengths = [bundle.vision.tokens] * len(keys)
        ids, spans = expand(encoded, lengths, bundle.prompt.image.token_id)
        self.images = [
            ImageSpan(start, length, key) for (start, length), key in zip(spans, keys, strict=True)
        ]
        self.ids = ids
        self.max_new_tokens = self._fit(len(ids), sum(lengths))
        self.answers: list[_Answer] = []

    def _check_images_config(self) -> None:
        p, vision = self.params, self.model.bundle.vision
        for name in ("min_pixels", "max_pixels", "resized_shape"):
            if getattr(p, name) is not None:
                raise GenerateConfigError(
                    f"generate_config: {name}={getattr(p, name)!r} has no effect with this model: "
                    f"its images always become {vision.size}×{vision.size} pixels; leave it out"
                )

    def _check_speculative(self) -> None:
        if self.params.speculative and not self.model.engine.backend.drafts:
            raise GenerateConfigError(
                f"generate_config: speculative={self.params.speculative!r} needs a model opened for it, by "
                "ModelConfig(speculation=True) or serve --speculation; or leave it out"
            )

    def _check_ids(self) -> None:
        p, vocab = self.params, self.model.bundle.model.vocab_size
        lists = {"eos_token_id": [p.eos_token_id or []]}
        lists |= {"stop_words_list": p.stop_words_list, "bad_words_list": p.bad_words_list}
        for name, words in lists.items():
            for word in words:
                if bad := [i for i in word if i >= vocab]:
                    raise GenerateConfigError(
                        f"generate_config: {name} has token id {bad[0]}, the vocabulary has {vocab}"
                    )

    def _fit(self, prompt: int, image_tokens: int) -> int:
        """New tokens that fit behind the prompt; raises PromptTooLong."""
        p, cache = self.params, self.model.engine.cache
        slot = self.model.engine.backend.slot_tokens
        limit = min(slot, cache.budget * 16)
        least = 0 if p.max_new_tokens == 0 else 1
        if p.max_input_tokens is not None:
            limit, least = min(limit, p.max_input_tokens), least if p.max_input_tokens > limit else 0
        if prompt + least > limit:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens ({prompt - image_tokens} of text, {image_tokens} of "
                f"images), the limit is {limit - least}"
            )
        space = min(slot, cache.budget * 16) - prompt
        wanted = DEFAULT_NEW_TOKENS if p.max_new_tokens is None else p.max_new_tokens
        return min(wanted, space)

    def start(self, publish: Callable[[tuple[int, Any, Any]], None]) -> None:
        """Hand the sequences to the engine; `publish` hears (answer, snapshot, error) on its thread."""
        p, bundle = self.params, self.model.bundle
        for index in range(p.answers):
            sequence = Sequence(
                tokens=list(self.ids),
                prompt_len=len(self.ids),
                params=p,
                max_new_tokens=self.max_new_tokens,
                eos_ids=self.eos_ids,
                images=self.images,
                rope_table=bundle.model.rope.table(len(self.ids)),
                salt=self.salt,
                leader=self.answers[0].sequence if self.answers else None,
                lookup=PromptLookup(self.ids, self.images) if p.speculative else None,
                deadline=self.deadline,
            )
            matcher = self._matcher.copy() if self._matcher else None
            answer = _Answer(sequence, self.model, publish, index, matcher)
            self.answers.append(answer)
            sampler = Sampler(bundle.model.vocab_size, index, p.random_seed, matcher)
            self.model.engine.submit(sequence, sampler, answer, self.pixels)
        self.pixels = {}  # the engine has them, as long as it needs them

    def cancel(self) -> None:
        for answer in self.answers:
            self.model.engine.cancel(answer.sequence)


class Collector:
    """Snapshots of a request's answers → one GenerateResponse at a time."""

    def __init__(self, request: Request):
        self._incremental = request.params.return_incremental
        self._texts = [""] * request.params.answers
        self._sent = [""] * request.params.answers
        self._outputs = [GenerateOutput() for _ in range(request.params.answers)]

    def add(self, event: tuple[int, Any, Any]) -> None:
        """Raises the error that ended an answer."""
        index, snapshot, error = event
        if error is not None:
            raise error
        self._texts[index], self._outputs[index] = snapshot

    @property
    def finished(self) -> bool:
        return all(o.finished for o in self._outputs)

    def response(self) -> GenerateResponse:
        texts = list(self._texts)
        if self._incremental:
            texts = [t[len(s) :] for t, s in zip(self._texts, self._sent, strict=True)]
            self._sent = list(self._texts)
        outputs = [dataclasses.replace(o) for o in self._outputs]
        return GenerateResponse(texts, outputs, self.finished)


def image_list(images: Any) -> Items[Any]:
    """A caller's `urls`: None, one image, or several → a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]

"""The loop: schedule → run → sample → publish. Any thread may submit or cancel; one computes tokens, and
one encodes pictures beside it, so that a picture never stops an answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from ..errors import GenerationTimeout, InternalError, PromptTooLong, RtpLlmError, VisionFailed
from ..export.bundle import ModelSpec
from .backends import Backend
from .block_cache import BlockCache
from .kv_cache import BLOCK, SlotCache, SlotMemory, block_keys
from .sampling import Sampled, Sampler, log_softmax
from .scheduler import Scheduler
from .sequence import Batch, Row, Sequence
from .step import Draw, Result, Step, build_step
from .vision import BATCH, ELSEWHERE, EmbeddingCache

log = logging.getLogger(__name__)
Encode = Callable[[np.ndarray], np.ndarray]
NO_LOGITS = np.empty((0, 0), np.float32)
NO_PIXELS = np.empty(0, np.uint8)  # in place of a picture's, which its encoding needs and nobody else


class Listener(Protocol):
    """Hears of one sequence, on the engine's thread: be quick, never raise."""

    def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
        """A token was appended to the sequence; a finish reason ends it."""

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        """Cross entropies of the next prompt tokens, float64 [count], NaN for image slots."""

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        """Called exactly once; reason: stop, length, cancelled or error."""


class Observer(Protocol):
    """Hears what the engine did, on its threads: be quick, never raise."""

    def step(self, rows: int, tokens: int, seconds: float) -> None:
        """One step of the decoder: sequences in it, tokens computed."""

    def encoded(self, images: int, seconds: float) -> None:
        """One batch through the vision graph."""


@dataclass(frozen=True)
class Stats:
    """What an engine holds now, and what it has done since it was made."""

    running: int = 0  # sequences with a place in the cache
    waiting: int = 0
    blocks: int = 0  # cache blocks of 16 tokens, the budget
    blocks_running: int = 0  # held by running sequences
    blocks_retained: int = 0  # of ended ones, kept for prompts that begin alike
    block_bytes: int = 0
    image_bytes: int = 0  # encoded images kept
    image_budget: int = 0
    prompt_tokens: int = 0  # of admitted sequences
    reused_tokens: int = 0  # of those, found in the cache
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those, as they came
    images: int = 0  # asked for
    image_hits: int = 0  # of those, encoded already or by somebody else at the moment
    preemptions: int = 0
    steps: int = 0


@dataclass
class _Job:
    sequence: Sequence
    sampler: Sampler
    listener: Listener
    images: Mapping[bytes, np.ndarray] = field(default_factory=dict)
    judged: int = 0  # prompt tokens whose losses the listener has heard


class Engine:
    """`token_budget`: tokens of one step; None: the backend's. `max_running`: sequences side by side.
    `step_ms`: about how long running answers may wait for a chunk of somebody's prompt. `encode`: in place
    of the backend's."""

    def __init__(
        self,
        backend: Backend,
        model: ModelSpec,
        token_budget: int | None = None,
        image_cache_bytes: int = 2**28,
        max_running: int | None = None,
        step_ms: float = 200,
        encode: Encode | None = None,
    ):
        self.backend = backend
        self.model = model
        sizes = backend.slots, backend.slot_tokens, backend.budget_blocks
        self.cache = BlockCache(*sizes) if backend.paged else SlotCache(*sizes, cast(SlotMemory, backend))
        budget = backend.token_budget if token_budget is None else token_budget
        self.scheduler = Scheduler(self.cache, budget, max_running, backend.drafts)
        self.images = EmbeddingCache(image_cache_bytes, ELSEWHERE if encode else BATCH)
        self.observer: Observer | None = None
        self.step_ms = step_ms
        self.encode = encode or backend.encode
        self._jobs: dict[Sequence, _Job] = {}
        self._inbox: list[_Job] = []
        self._cancelled: list[Sequence] = []
        self._encoded: list[tuple[list[bytes], np.ndarray | BaseException]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._vision: Executor | None = None  # one thread: pictures are encoded while tokens are computed
        self._stopping = False
        self._generated = self._drafted = self._accepted = self._steps = 0

    # ---- any thread -------------------------------------------------------------------------

    def submit(
        self,
        sequence: Sequence,
        sampler: Sampler,
        listener: Listener,
        images: Mapping[bytes, np.ndarray],
    ) -> None:
        """`images`: of every image of the sequence, see EmbeddingCache.hold."""
        leader = sequence.leader
        sequence.keys = leader.keys if leader else block_keys(sequence)
        with self._wake:
            while self._stopping:
                self._wake.wait()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="rtp-llm-engine", daemon=True)
                thread.start()
                self._thread = thread
            self._inbox.append(_Job(sequence, sampler, listener, images))
            self._wake.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; nothing happens when it has ended already."""
        with self._wake:
            self._cancelled.append(sequence)
            self._wake.notify_all()

    def stats(self) -> Stats:
        scheduler, cache, images = self.scheduler, self.cache, self.images
        retained = cache.retained
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            blocks=cache.budget,
            blocks_running=cache.used - retained,
            blocks_retained=retained,
            block_bytes=self.backend.block_bytes,
            image_bytes=images.bytes,
            image_budget=images.budget,
            prompt_tokens=scheduler.prompt_tokens,
            reused_tokens=scheduler.reused_tokens,
            generated_tokens=self._generated,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            images=images.asked,
            image_hits=images.hits,
            preemptions=scheduler.preemptions,
            steps=self._steps,
        )

    def stop(self) -> None:
        """End every sequence, the threads and the backend's memory; a later submit starts anew."""
        with self._wake:
            thread = self._thread
            if thread is None:
                self.backend.close()
                return
            self._stopping = True
            self._wake.notify_all()
        thread.join()

    # ---- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        worked = False
        while True:
            with self._wake:
                if not (worked or self._inbox or self._cancelled or self._encoded or self._stopping):
                    self._wake.wait(self._patience())
                if self._stopping:
                    break
            try:
                self._take_in()
                worked = self.step()
            except BaseException as e:  # native code's panics too: nobody may be left waiting
                self._fail_all(e)
        if self._vision:
            self._vision.shutdown()
        with self._wake:  # who submits now waits, and then starts a new thread
            try:
                self._cancelled += [*self._jobs, *(job.sequence for job in self._inbox)]
                self._take_in()
                self.cache.clear()
                self.backend.close()
                self.images.clear()
            finally:
                self._thread = self._vision = None
                self._stopping = False
                self._wake.notify_all()

    def _patience(self) -> float | None:
        """Seconds to the next deadline of those who wait."""
        deadline = min((s.deadline for s in self._jobs), default=float("inf"))
        return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())

    def _take_in(self) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            encoded, self._encoded = self._encoded, []
        self._jobs |= {job.sequence: job for job in inbox}  # first: from here on nobody is lost
        for job in inbox:
            self.images.hold(job.images, counted=job.sequence.leader is None)
            job.images = dict.fromkeys(job.images, NO_PIXELS)
            job.sequence.images_ready = self.images.ready(job.images)
            if self.cache.fits(job.sequence.prompt_len + job.sequence.max_new_tokens):
                self.scheduler.add(job.sequence)
            else:  # it would wait for ever, and all behind it
                self._end(job.sequence, "error", PromptTooLong("the sequence is longer than the cache"))
        for keys, rows in encoded:
            self._take_images(keys, rows)
        for sequence in cancelled:
            self._end(sequence, "cancelled")
        now = time.monotonic()
        for sequence in [s for s in self._jobs if s.deadline <= now]:
            error = GenerationTimeout(f"timeout_ms={sequence.params.timeout_ms} is over")
            self._end(sequence, "error", error)

    def step(self) -> bool:
        """One round: a batch of images is sent off, a batch of tokens computed; False with nothing to do."""
        self._send_images()
        batch = self.scheduler.schedule()
        parts = [batch]
        if not self.backend.mixes:  # answers go on first
            parts = [[r for r in batch if r.is_chunk == chunks] for chunks in (False, True)]
        for part in filter(None, parts):
            began = time.monotonic()
            draws = self._draws(part) if self.backend.samples else None
            step = build_step(part, self.images, self.model, draws)
            self._hand_out(part, step, self.backend.step(step))
            self._measure(part, time.monotonic() - began)
        return bool(batch)

    def _draws(self, part: Batch) -> list[Draw | None]:
        """Of each row of logits: what the backend may pick itself, and what the host must see."""
        draws: list[Draw | None] = []
        for row in part:
            s = row.sequence
            draw = None
            if row.logits == "last" and s.max_new_tokens:
                with suppress(Exception):  # its own fault: then sampling on the host fails, for it alone
                    draw = self._jobs[s].sampler.draw(s)
            draws += [draw] * row.heads
        return draws

    def _hand_out(self, part: Batch, step: Step, result: Result) -> None:
        logits, at, k = result.logits, 0, 0  # rows handed out, of logits and of all
        for row in part:
            if result.picks and step.draws and row.heads and step.draws[k]:
                picked = int(result.picks.tokens[k]), float(result.picks.logprobs[k])
                self._advance(row, NO_LOGITS, picked)
            else:
                rows = row.heads
                self._advance(row, NO_LOGITS if logits is None else logits[at : at + rows])
                at += rows
            k += row.heads

    def _measure(self, part: Batch, seconds: float) -> None:
        self._steps += 1
        tokens = sum(row.count for row in part)
        if tokens >= BLOCK and any(row.is_chunk for row in part):  # adapt prompts' share to the speed seen
            wanted = self.step_ms / 1000 * tokens / max(seconds, 1e-6)
            self.scheduler.chunk = int((self.scheduler.chunk + min(wanted, self.scheduler.token_budget)) / 2)
        if self.observer:
            self.observer.step(len(part), tokens, seconds)

    def _send_images(self) -> None:
        """Start a batch of those that wait, unless one is being encoded."""
        first = next((s for s in self.scheduler.waiting if not s.images_ready), None)
        keys, pixels = self.images.next_batch(self._jobs[first].images if first else ())
        if not keys:
            return
        try:
            if self._vision is None:
                self._vision = ThreadPoolExecutor(1, thread_name_prefix="rtp-llm-vision")
            self._vision.submit(self._encode, keys, pixels)
        except RuntimeError as e:  # no thread can be started
            self._encoded.append((keys, e))

    def _encode(self, keys: list[bytes], pixels: np.ndarray) -> None:
        """On the vision thread. `pixels`: uint8 [N, size, size, 3]."""
        began = time.monotonic()
        rows: np.ndarray | BaseException
        try:
            rows = self.encode(pixels)
        except BaseException as e:
            rows = e
        with self._wake:
            self._encoded.append((keys, rows))
            self._wake.notify_all()
        if self.observer:
            self.observer.encoded(len(keys), time.monotonic() - began)

    def _take_images(self, keys: list[bytes], rows: np.ndarray | BaseException) -> None:
        if not isinstance(rows, BaseException):
            try:
                self.images.put(keys, rows)
            except Exception as e:  # no memory left
                rows = e
        if isinstance(rows, BaseException):
            self.images.fail()
            error = rows if isinstance(rows, RtpLlmError) else VisionFailed(f"vision graph: {rows}")
            for job in [j for j in self._jobs.values() if not self.images.ready(set(keys) & set(j.images))]:
                self._end(job.sequence, "error", error)
        for sequence in self.scheduler.waiting:
            sequence.images_ready = self.images.ready(self._jobs[sequence].images)

    def _advance(self, row: Row, logits: np.ndarray, picked: tuple[int, float] | None = None) -> None:
        """`logits`: float32 [row.heads, vocab] of one row of the step; or the token and its logprob."""
        sequence = row.sequence
        job = self._jobs[sequence]
        sequence.computed += row.count - len(row.draft)
        sequence.iterations += 1
        if row.past < sequence.prompt_len:
            self.cache.computed(sequence)
        losses = row.logits == "all" and not row.draft
        if losses and sequence.computed > job.judged:  # else it was preempted since
            job.listener.losses(sequence, prompt_losses(row, logits)[max(0, job.judged - row.past) :])
            job.judged = sequence.computed
        if sequence.uncomputed:
            return
        if sequence.max_new_tokens == 0:
            self._end(sequence, "length")
            return
        before = sequence.accepted
        sequence.drafted += len(row.draft)
        logits = logits[-1 - len(row.draft) :]
        for place, drafted in enumerate((*row.draft, None)):  # and behind the draft, if all of it holds
            if self._append(job, logits[place : place + 1], picked) != drafted or drafted is None:
                break
            sequence.computed += 1  # it is in the cache; what lies behind it there is written over
            sequence.accepted += 1
        if sequence.lookup and row.draft:
            accepted = sequence.accepted - before
            sequence.lookup.heard(len(sequence.tokens), len(row.draft), accepted)
            self._drafted += len(row.draft)
            self._accepted += accepted

    def _append(self, job: _Job, logits: np.ndarray, picked: tuple[int, float] | None) -> int | None:
        """The next token, from `logits` [1, vocab] or as picked; None where it is the last, or failed."""
        sequence = job.sequence
        try:
            if picked:
                sampled = job.sampler.picked(sequence, *picked)
            else:
                sampled = job.sampler(sequence, logits[0])
            sequence.tokens.append(sampled.token)
            reason = job.listener.token(sequence, sampled)
        except BaseException as e:  # its own parameters' fault, and nobody else's
            self._end(sequence, "error", _ours(e))
            return None
        self._generated += 1
        if reason is None and sampled.token in sequence.eos_ids:
            reason = "stop"
        if reason is None and sequence.output_len >= sequence.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason)
            return None
        return sampled.token

    def _end(self, sequence: Sequence, reason: str, error: RtpLlmError | None = None) -> None:
        job = self._jobs.pop(sequence, None)
        if job is None:
            return
        self.scheduler.finish(sequence)
        self.images.drop(job.images)
        try:
            job.listener.end(sequence, reason, error)
        except BaseException:
            log.exception("a listener failed at the end of its answer")

    def _fail_all(self, cause: BaseException) -> None:
        for sequence in list(self._jobs):
            self._end(sequence, "error", _ours(cause))
        self.cache.clear()  # who knows what a broken step has written


def _ours(cause: BaseException) -> RtpLlmError:
    return cause if isinstance(cause, RtpLlmError) else InternalError(f"engine: {cause!r}")


def prompt_losses(row: Row, logits: np.ndarray) -> np.ndarray:
    """Cross entropy of each prompt token that this row predicts, NaN where that is an image slot.

    `logits`: float32 [count, vocab]; result: float64 [count], one less for the prompt's last chunk.
    """
    sequence = row.sequence
    targets = sequence.tokens[row.past + 1 : min(row.past + row.count + 1, sequence.prompt_len)]
    slots = {i for span in sequence.images for i in range(span.start, span.start + span.length)}
    is_word = np.array([row.past + 1 + i not in slots for i in range(len(targets))], dtype=bool)
    losses = np.full(len(targets), np.nan)
    rows = np.flatnonzero(is_word)
    if len(rows):
        logp = log_softmax(logits[rows])
        losses[rows] = -logp[np.arange(len(rows)), np.array(targets)[rows]]
    return losses

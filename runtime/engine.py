"""The loop: schedule → run → sample → publish. One thread computes; any thread may submit or cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import GenerationTimeout, InternalError, PromptTooLong, RtpLlmError, VisionFailed
from ..export.bundle import ModelSpec
from .backends import Backend
from .kv_cache import SlotCache
from .sampling import Sampled, Sampler, log_softmax
from .scheduler import Scheduler
from .sequence import Row, Sequence
from .step import build_step
from .vision import EmbeddingCache


class Listener(Protocol):
    """Hears of one sequence, on the engine's thread: be quick, never raise."""

    def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
        """A token was appended to the sequence; a finish reason ends it."""

    def losses(self, sequence: Sequence, losses: np.ndarray) -> None:
        """Cross entropies of the next prompt tokens, float64 [count], NaN for image slots."""

    def end(self, sequence: Sequence, reason: str, error: RtpLlmError | None) -> None:
        """Called exactly once; reason: stop, length, cancelled or error."""


@dataclass
class _Job:
    sequence: Sequence
    sampler: Sampler
    listener: Listener
    images: Mapping[bytes, np.ndarray] = field(default_factory=dict)


class Engine:
    def __init__(
        self, backend: Backend, model: ModelSpec, token_budget: int = 512, image_cache_bytes: int = 2**28
    ):
        self.backend = backend
        self.model = model
        self.cache = SlotCache(backend.slots, backend.slot_tokens, backend.budget_blocks)
        self.scheduler = Scheduler(self.cache, token_budget)
        self.images = EmbeddingCache(backend.encode, image_cache_bytes)
        self._jobs: dict[Sequence, _Job] = {}
        self._inbox: list[_Job] = []
        self._cancelled: list[Sequence] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # ---- any thread -------------------------------------------------------------------------

    def submit(
        self,
        sequence: Sequence,
        sampler: Sampler,
        listener: Listener,
        images: Mapping[bytes, np.ndarray],
    ) -> None:
        """`images`: key → uint8 [size, size, 3] of every image of the sequence."""
        with self._wake:
            self._inbox.append(_Job(sequence, sampler, listener, images))
            if self._thread is None:
                self._stopping = False
                self._thread = threading.Thread(target=self._run, name="rtp-llm-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; nothing happens when it has ended already."""
        with self._wake:
            self._cancelled.append(sequence)
            self._wake.notify()

    def stop(self) -> None:
        """End every sequence, the thread and the backend's memory; a later submit starts anew."""
        with self._wake:
            thread = self._thread
            if thread is None:
                self.backend.close()
                return
            self._stopping = True
            self._wake.notify()
        thread.join()

    # ---- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._cancelled or self._jobs or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._take_in()
                self.step()
            except Exception as e:  # a broken step must not leave callers waiting
                self._fail_all(e)
        with self._wake:  # a submit waits, and then starts a new thread
            self._cancelled += [*self._jobs, *(job.sequence for job in self._inbox)]
            self._take_in()
            self.backend.close()
            self.images.clear()
            self._thread = None

    def _take_in(self) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
        for job in inbox:
            self._jobs[job.sequence] = job
            self.images.hold(job.images)
            job.sequence.images_ready = self.images.ready(job.images)
            if self.cache.fits(job.sequence.prompt_len + job.sequence.max_new_tokens):
                self.scheduler.add(job.sequence)
            else:  # it would wait for ever, and all behind it
                self._end(job.sequence, "error", PromptTooLong("the sequence is longer than the cache"))
        for sequence in cancelled:
            self._end(sequence, "cancelled")
        now = time.monotonic()
        for sequence in [s for s in self._jobs if s.deadline <= now]:
            error = GenerationTimeout(f"timeout_ms={sequence.params.timeout_ms} is over")
            self._end(sequence, "error", error)

    def step(self) -> None:
        """One round: some images, then one batch of tokens."""
        self._encode_images()
        batch = self.scheduler.schedule()
        if not batch:
            return
        logits = self.backend.step(build_step(batch, self.images, self.model))
        at = 0
        for row in batch:
            count = {"none": 0, "last": 1, "all": row.count}[row.logits]
            self._advance(row, logits[at : at + count])
            at += count

    def _encode_images(self) -> None:
        waiting = [s for s in self.scheduler.waiting if not s.images_ready]
        if not waiting:
            return
        try:
            self.images.encode_some()
        except Exception as e:
            error = e if isinstance(e, RtpLlmError) else VisionFailed(f"vision graph: {e}")
            for sequence in [s for s in waiting if self.images.lost(self._jobs[s].images)]:
                self._end(sequence, "error", error)
            return
        for sequence in waiting:
            sequence.images_ready = self.images.ready(self._jobs[sequence].images)

    def _advance(self, row: Row, logits: np.ndarray) -> None:
        """`logits`: float32 [0, 1 or row.count, vocab] of one row of the step."""
        sequence = row.sequence
        job = self._jobs[sequence]
        sequence.computed += row.count
        sequence.iterations += 1
        if row.logits == "all":
            job.listener.losses(sequence, prompt_losses(row, logits))
        if sequence.uncomputed:
            return
        if sequence.max_new_tokens == 0:
            self._end(sequence, "length")
            return
        sampled = job.sampler(sequence, logits[-1])
        sequence.tokens.append(sampled.token)
        reason = job.listener.token(sequence, sampled)
        if reason is None and sampled.token in sequence.eos_ids:
            reason = "stop"
        if reason is None and sequence.output_len >= sequence.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: str, error: RtpLlmError | None = None) -> None:
        job = self._jobs.pop(sequence, None)
        if job is None:
            return
        slot = self.scheduler.finish(sequence)
        if slot is not None:
            self.backend.release(slot)
        self.images.drop(job.images)
        job.listener.end(sequence, reason, error)

    def _fail_all(self, cause: Exception) -> None:
        error = cause if isinstance(cause, RtpLlmError) else InternalError(f"engine: {cause!r}")
        for sequence in list(self._jobs):
            self._end(sequence, "error", error)


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

"""Logits → one token, as transformers' processors and warpers define each step, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .sequence import Sequence
from .step import Draw

if TYPE_CHECKING:
    from .grammar import Matcher


@dataclass
class Sampled:
    token: int
    logprob: float | None = None  # of the token, under the raw logits
    top: list[tuple[int, float]] = field(default_factory=list)
    logits: np.ndarray | None = None  # [vocab], raw
    probs: np.ndarray | None = None  # [vocab], softmax of the raw logits


class Sampler:
    """One per sequence: its random stream does not depend on what else is in the batch, and what penalties
    ask of the tokens so far is kept from one to the next, not looked for anew in all of them.

    With a `matcher` only tokens of its grammar are taken, whatever penalties and bans say.
    """

    def __init__(
        self, vocab_size: int, answer: int = 0, seed: int | None = None, matcher: Matcher | None = None
    ):
        self.vocab_size = vocab_size
        self.matcher = matcher
        # SeedSequence wants no negative entropy; each of several answers has a stream of its own
        entropy = None if seed is None else [seed % 2**64, answer]
        self.random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        self._seen = np.zeros(vocab_size, bool)  # whether a token is among the first `_seen_in`
        self._counts = np.zeros(vocab_size, np.int32)  # of the answer's tokens among the first `_counted_in`
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of n − 1 tokens, among the first `_grams_in`
        self._seen_in = self._counted_in = self._grams_in = 0

    def __call__(self, sequence: Sequence, logits: np.ndarray) -> Sampled:
        """`logits`: float32 [vocab] of the sequence's last position; not changed."""
        params = sequence.params
        scores = self._process(sequence, logits)
        allowed = None
        if self.matcher is not None:
            allowed = np.flatnonzero(self.matcher.mask())
            scores = scores[allowed]
            if np.isneginf(scores).all():  # all of them are banned
                scores = logits[allowed]
        token = pick(scores, self._draw(sequence))
        if allowed is not None and self.matcher is not None:
            token = int(allowed[token])
            self.matcher.accept(token)
        sampled = Sampled(token)
        if params.return_logits:
            sampled.logits = logits.copy()
        if params.logprobs or params.return_cum_log_probs or params.return_all_probs:
            logp = log_softmax(logits)
            sampled.logprob = float(logp[token])
            if params.return_all_probs:
                sampled.probs = np.exp(logp)
            if n := min(params.top_logprobs, len(logp)):
                best = np.argpartition(-logp, n - 1)[:n]
                best = best[np.lexsort((best, -logp[best]))]
                sampled.top = [(int(i), float(logp[i])) for i in best]
        return sampled

    def draw(self, sequence: Sequence) -> Draw | None:
        """How the next token may be picked without the host; None where it must see the logits.

        A draw takes its number from the random stream, as a call does: a token has one or the other.
        """
        p = sequence.params
        if (
            self.matcher is not None
            or p.repetition_penalty != 1
            or p.presence_penalty
            or p.frequency_penalty
            or p.return_logits
            or p.return_all_probs
            or p.top_logprobs
            or self._banned(sequence)
        ):
            return None
        return self._draw(sequence)

    def picked(self, sequence: Sequence, token: int, logprob: float) -> Sampled:
        """The token that a backend has picked by `draw`."""
        p = sequence.params
        return Sampled(token, logprob if p.logprobs or p.return_cum_log_probs else None)

    def _draw(self, sequence: Sequence) -> Draw:
        p = sequence.params
        if p.greedy:
            return Draw(greedy=True)
        return Draw(self.random.random(), p.temperature, p.top_k, p.top_p, p.min_p)

    def _process(self, sequence: Sequence, logits: np.ndarray) -> np.ndarray:
        """Penalties and bans; float32 [vocab], a copy where anything changes."""
        p = sequence.params
        scores = logits
        if p.repetition_penalty != 1:
            scores = scores.copy()
            # image slots hold ids that are no words: they are not penalised
            new = [t for t in sequence.tokens[self._seen_in :] if 0 <= t < self.vocab_size]
            self._seen[new], self._seen_in = True, len(sequence.tokens)
            seen = np.flatnonzero(self._seen)
            at = scores[seen]
            scores[seen] = np.where(at > 0, at / p.repetition_penalty, at * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and sequence.output_len:
            scores = scores.copy()
            for t in sequence.tokens[max(self._counted_in, sequence.prompt_len) :]:
                self._counts[t] += 1
            self._counted_in = len(sequence.tokens)
            ids = np.flatnonzero(self._counts > 0)
            scores[ids] -= p.presence_penalty + p.frequency_penalty * self._counts[ids]
        if banned := self._banned(sequence):
            scores = scores.copy()
            scores[banned] = -np.inf
        return scores

    def _banned(self, sequence: Sequence) -> list[int]:
        """Ids that may not come next, whatever the logits are."""
        p = sequence.params
        banned: list[int] = []
        if (n := p.no_repeat_ngram_size) and len(sequence.tokens) + 1 >= n:
            tokens = sequence.tokens
            for i in range(max(self._grams_in, n - 1), len(tokens)):
                self._followers.setdefault(tuple(tokens[i - n + 1 : i]), []).append(tokens[i])
            self._grams_in = len(tokens)
            banned += self._followers.get(tuple(tokens[len(tokens) - n + 1 :]), [])
        for word in p.bad_words_list:
            head = word[:-1]
            if not head or sequence.tokens[-len(head) :] == head:
                banned.append(word[-1])
        if sequence.output_len < p.min_new_tokens:
            banned += sequence.eos_ids
        return [t for t in banned if 0 <= t < self.vocab_size]


def pick(scores: np.ndarray, draw: Draw) -> int:
    """The token that a draw takes of these scores (float32 [vocab])."""
    if draw.greedy:
        return int(np.argmax(scores))
    ids = np.arange(len(scores))
    if draw.top_k and draw.top_k < len(scores):
        # ties at the border stay, as in transformers
        keep = scores >= np.partition(scores, -draw.top_k)[-draw.top_k]
        ids, scores = ids[keep], scores[keep]
    x = scores.astype(np.float64)
    if not np.isfinite(x.max()):  # all is banned
        return int(ids[np.argmax(x)])
    # the largest becomes 0 first: no temperature is too small for it
    with np.errstate(over="ignore"):
        probs = np.exp((x - x.max()) / draw.temperature)
    probs /= probs.sum()
    if draw.top_p < 1 or draw.min_p:
        order = _leading(probs, draw.top_p, draw.min_p)
        probs, ids = probs[order], ids[order]
        if draw.top_p < 1:
            # the smallest set whose mass reaches top_p, never empty
            n = max(1, int(np.searchsorted(np.cumsum(probs), draw.top_p, side="left")) + 1)
            probs, ids = probs[:n], ids[:n]
        if draw.min_p:
            keep = probs >= draw.min_p * probs[0]
            probs, ids = probs[keep], ids[keep]
    edges = np.cumsum(probs)
    at = np.searchsorted(edges, draw.u * edges[-1], side="right")
    return int(ids[min(at, len(ids) - 1)])


def _leading(probs: np.ndarray, top_p: float, min_p: float) -> np.ndarray:
    """Indices by falling probability, at least all that top_p and min_p may keep.

    Sorting 150,000 of them takes longer than a step; the leading few hundred nearly always do.
    """
    n = 256
    while n < len(probs):
        border = np.partition(probs, -n)[-n]
        order = np.flatnonzero(probs >= border)
        leading = probs[order]
        if leading.sum() > top_p or border < min_p * leading.max():
            return order[np.argsort(-leading, kind="stable")]
        n *= 8
    return np.argsort(-probs, kind="stable")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities over the last axis, same shape."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

"""Prompt-lookup decoding: an answer that repeats its prompt, or itself, gets several tokens from one step.

Saxena, Prompt Lookup Decoding (2023): the tokens that followed the last few tokens where they stood before
are a draft of what comes next. One step computes the logits behind every token of the draft; the tokens
sampled from them are the answer, and the draft only tells how many of these logits were right. The sampler
takes them in order, with the penalties, the grammar and the random numbers that each token would have had.
So a draft can change how long an answer takes, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import ImageSpan

LONGEST = 8  # tokens of a draft
SUFFIX = 3  # tokens that are looked for, and less where so many are not found
LONGEST_REST = 64  # tokens without a draft


class PromptLookup:
    """One per answer. Each token is learned once; a lookup is at most three reads of a dictionary.

    Behind a draft that holds the next may be twice as long, up to `LONGEST`; behind one that holds in part
    as long as that part. Where not even its first token holds, the next one is a single token, which costs
    least, and comes only after a rest of 4 tokens, then 16, then `LONGEST_REST` tokens.
    """

    def __init__(self, prompt: list[int], images: Iterable[ImageSpan] = ()):
        self._slots = {i for span in images for i in range(span.start, span.start + span.length)}
        self._next: dict[tuple[int, ...], int] = {}  # n-gram → place of the token behind its latest one
        self._known = 1  # leading tokens that are known as what follows others
        self._length = 1
        self._rest = 0
        self._due = 0  # length of the tokens from which on there is a draft again
        self._learn(prompt)

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow. `tokens`: as at the last call, and what came since."""
        self._learn(tokens)
        length = min(self._length, limit)
        if len(tokens) < self._due or length < 1:
            return []
        for n in range(min(SUFFIX, len(tokens)), 0, -1):
            if at := self._next.get(tuple(tokens[-n:])):
                period = len(tokens) - at  # what repeats itself goes on so
                found: list[int] = []
                for i in range(length):
                    if (place := at + i % period) in self._slots:
                        break  # a picture's, which is no word
                    found.append(tokens[place])
                return found
        return []

    def _learn(self, tokens: list[int]) -> None:
        for at in range(self._known, len(tokens)):
            for n in range(1, min(SUFFIX, at) + 1):
                self._next[tuple(tokens[at - n : at])] = at
        self._known = len(tokens)

    def heard(self, tokens: int, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft held. `tokens`: of the sequence by now."""
        if accepted:
            doubled = max(self._length, min(LONGEST, 2 * drafted))
            self._length = doubled if accepted == drafted else accepted
            self._rest = 0
        else:
            self._length, self._rest = 1, min(LONGEST_REST, 4 * self._rest or 4)
            self._due = tokens + self._rest

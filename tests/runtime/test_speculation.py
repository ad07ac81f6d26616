"""What is drafted: the tokens behind the latest place that ends alike; and how much, by what held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.runtime.sequence import ImageSpan
from rtp_llm.runtime.speculation import LONGEST, PromptLookup


def scanned(tokens: list[int], count: int) -> list[int]:
    """By reading all of the tokens: what followed the longest of the last 3 to 1, at its latest place."""
    for n in (3, 2, 1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n < len(tokens) and tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for i in range(count):  # a text that runs into its own end repeats itself
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


def eager(prompt: list[int], *images: ImageSpan) -> PromptLookup:
    """One whose drafts have held so far."""
    lookup = PromptLookup(prompt, images)
    for _ in range(4):
        lookup.heard(0, 8, 8)
    return lookup


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=12),
    st.integers(1, LONGEST),
)
def test_a_draft_is_what_followed_the_latest_longest_match(
    prompt: list[int], pieces: list[list[int]], limit: int
) -> None:
    lookup, tokens = eager(prompt), list(prompt)
    for piece in [[], *pieces]:
        tokens += piece
        drafted = lookup.draft(tokens, limit)
        assert drafted == scanned(tokens, limit)
        lookup.heard(len(tokens), LONGEST, LONGEST)


def test_no_token_of_a_picture_is_drafted() -> None:
    image = ImageSpan(3, 4, b"")
    tokens = [5, 6, 7, -200, -200, -200, -200, 8, 9, 6]
    assert eager(tokens, image).draft(tokens, 8) == [7]
    assert eager(tokens, image).draft([*tokens, 7], 8) == []
    assert eager(tokens, image).draft([*tokens, 8], 1) == [9]


def drafted(truth: list[int], prompt: int) -> list[tuple[int, int]]:
    """(drafted, held) of each step of an answer, which is `truth` behind its prompt."""
    lookup, at, steps = PromptLookup(truth[:prompt]), prompt, []
    while at < len(truth):
        draft = lookup.draft(truth[:at], len(truth) - at - 1)
        held = next((i for i, t in enumerate(draft) if t != truth[at + i]), len(draft))
        at += held + 1
        if draft:
            lookup.heard(at, len(draft), held)
        steps.append((len(draft), held))
    return steps


def test_an_answer_that_repeats_its_prompt_takes_a_fifth_of_the_steps() -> None:
    prompt = list(range(100))
    steps = drafted(prompt + prompt, 101)
    assert len(steps) <= 20 and [n for n, _ in steps[:4]] == [1, 2, 4, 8]


def test_an_answer_whose_drafts_fail_drafts_three_of_a_hundred_tokens() -> None:
    # every token has been there before, with other neighbours
    truth = [t for gap in range(1, 40) for i in range(40 - gap) for t in (i, i + gap)]
    steps = drafted(truth[:1040], 40)
    assert 10 < sum(n for n, _ in steps) <= 30


def test_a_draft_that_holds_in_part_sets_the_next_ones_length_and_a_failure_a_rest() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    lookup = eager(tokens)
    assert len(lookup.draft(tokens, 8)) == 8
    lookup.heard(len(tokens), 8, 3)
    assert len(lookup.draft(tokens, 8)) == 3
    for rest in (4, 16, 64, 64):
        lookup.heard(len(tokens), 1, 0)
        for i in range(rest):
            assert lookup.draft(tokens, 8) == [], i
            tokens.append(1)
        assert len(lookup.draft(tokens, 8)) == 1
    lookup.heard(len(tokens), 1, 1)
    assert len(lookup.draft(tokens, 8)) == 2

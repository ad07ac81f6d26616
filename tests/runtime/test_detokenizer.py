"""Streamed text is the whole text: no half character, no part of a stop string, in linear time."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rtp_llm.export.tokenizer import byte_letters, from_sentencepiece, load
from rtp_llm.runtime.detokenizer import Detokenizer

IDS = st.lists(st.integers(0, 300))
CUTS = st.lists(st.integers(0, 5))


def byte_level() -> Tokenizer:
    vocab = {letter: b for b, letter in enumerate(byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, special=s) for t, s in (("<|end|>", True), ("<box>", False), ("é世", False))]
    for token in tokens:
        tokenizer.add_tokens([token])
    return tokenizer


def pieces() -> Tokenizer:
    """As a Llama tokenizer: bytes 3–258, then pieces."""
    words = ["▁", "▁a", "▁▁", "the", "▁USER", ":", "世", "é"]
    vocab = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


BYTES, PIECES = byte_level(), pieces()


def streamed(tokenizer, ids, cuts=(), **options) -> str:
    """The text, after checking that it only ever grew by what `push` returned."""
    made, shown, rest = Detokenizer(tokenizer, **options), "", list(ids)
    for cut in cuts:
        shown += made.push(rest[:cut])
        rest = rest[cut:]
        assert made.text == shown
    shown += made.push(rest)
    shown += made.finish()
    assert made.text == shown
    return shown


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_join_to_the_decoded_whole_for_any_bytes(skip):
    @settings(max_examples=300, deadline=None)
    @given(IDS, CUTS)
    def check(ids, cuts):
        expected = BYTES.decode(ids, skip_special_tokens=skip)
        assert streamed(BYTES, ids, cuts, skip_special_tokens=skip) == expected

    check()


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_join_to_the_decoded_whole_for_sentencepiece_and_valid_text(skip):
    piece = st.one_of(
        st.integers(259, 266).map(lambda i: [i]),
        st.integers(0, 2).map(lambda i: [i]),
        TEXT.map(lambda t: [3 + b for b in t.encode()]),
    )

    @settings(max_examples=300, deadline=None)
    @given(st.lists(piece), CUTS)
    def check(parts, cuts):
        ids = [i for part in parts for i in part]
        expected = PIECES.decode(ids, skip_special_tokens=skip)
        assert streamed(PIECES, ids, cuts, skip_special_tokens=skip) == expected

    check()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(), cuts=CUTS)
def test_invalid_bytes_are_one_mark_each_and_spoil_no_character_beside_them(data, cuts):
    """As sentencepiece itself decodes; tokenizers' ByteFallback drops the whole run."""
    expected, rest = "", data
    while rest:
        for n in range(1, 5):
            try:
                expected, rest = expected + rest[:n].decode(), rest[n:]
                break
            except UnicodeDecodeError:
                continue
        else:
            expected, rest = expected + "\ufffd", rest[1:]
    expected = expected.removeprefix(" ")
    assert streamed(PIECES, [3 + b for b in data], cuts) == expected


def test_a_partial_character_is_never_shown_and_becomes_a_mark_at_the_end():
    for tokenizer, first in ((BYTES, 0), (PIECES, 3)):
        ids = [first + b for b in "a🙂".encode()]
        made = Detokenizer(tokenizer)
        assert [made.push([i]) for i in ids[:-1]] == ["a", "", "", ""]
        assert made.finish().startswith("\ufffd")
        assert streamed(tokenizer, ids, [1] * 5) == "a🙂"


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
    CUTS, st.booleans(),
)  # fmt: skip
def test_no_part_of_a_stop_string_is_shown_however_the_tokens_come(text, stops, cuts, show):
    ids = list(text.encode())
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    made = Detokenizer(BYTES, stop=stops, print_stop_words=show)
    seen = []
    for cut in [*cuts, len(ids)]:
        made.push(ids[:cut])
        ids = ids[cut:]
        seen.append(made.text)
    made.finish()
    if ends:
        end, at, word = min(ends)
        assert made.text == text[: end if show else at] and made.stopped == word
    else:
        assert made.text == text and made.stopped is None
    assert all(made.text.startswith(s) for s in seen)
    assert made.push([97]) == made.finish() == "" or not ends


def test_a_stop_string_may_lie_across_tokens_and_characters():
    made = Detokenizer(BYTES, stop=["世界!"])
    grown = [made.push([b]) for b in "x世界?世界!y".encode()]
    assert "".join(grown) == made.text == "x世界?" and made.stopped == "世界!"


def test_special_tokens_are_left_out_only_when_asked_and_box_tags_never():
    ids = [97, 256, 257, 98, 999]  # <|end|>, <box>, an id without a token
    assert streamed(BYTES, ids) == "a<box>b"
    assert streamed(BYTES, ids, skip_special_tokens=False) == "a<|end|><box>b"


def test_any_other_decoder_streams_too():
    tokenizer = Tokenizer(models.WordLevel({"he": 0, "##llo": 1, "world": 2, "!": 3, "[CLS]": 4}, "!"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]"])
    for ids in ([4, 0, 1, 4, 2, 3], [0, *[4] * 30, 1]):
        assert streamed(tokenizer, ids, [1] * len(ids)) == tokenizer.decode(ids)


def test_a_long_answer_takes_linear_time():
    def seconds(tokenizer, count):
        made, start = Detokenizer(tokenizer, stop=["###", "USER:"]), time.perf_counter()
        for i in range(count):
            made.push([97 + i % 5])
        return time.perf_counter() - start

    for tokenizer in (BYTES, PIECES):
        short = min(seconds(tokenizer, 2_000) for _ in range(3))
        assert seconds(tokenizer, 40_000) < 100 * short  # 20 if linear, 400 if quadratic


def test_the_goldens_texts_come_out(goldens):
    for name, skip in (("qwenvl_A", False), ("qwenvl_C", False), ("llava_orig_A", True)):
        folder = goldens / name
        tokenizer = load(folder / "checkpoint", slow=True)
        arrays = np.load(folder / "cases.npz")
        for case in json.loads((folder / "cases.json").read_text())["cases"]:
            if isinstance(case.get("generated_text"), str):
                ids = arrays[case["name"] + ".generated_ids"].tolist()
                text = streamed(tokenizer, ids, [1] * len(ids), skip_special_tokens=skip)
                assert text.strip() == case["generated_text"].strip()


def test_a_real_sentencepiece_model_streams_its_own_text(goldens):
    tokenizer = from_sentencepiece(goldens / "llava_orig_A" / "checkpoint" / "tokenizer.model", False)

    @settings(max_examples=200, deadline=None)
    @given(TEXT)
    def check(text):
        ids = tokenizer.encode(text).ids
        assert streamed(tokenizer, ids, [1] * len(ids)) == tokenizer.decode(ids)

    check()

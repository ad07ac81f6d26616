"""A converted tokenizer gives the reference's ids and text, for any text."""

import base64
import json
import shutil
import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rtp_llm.errors import CheckpointError, NotSupportedYet
from rtp_llm.export import tokenizer as tokenizers
from rtp_llm.export.tokenizer import QWEN_BOXES, QWEN_CONTROL, QWEN_IMAGE, QWEN_PATTERN, load

MERGED = [
    *("in", "th", "er", " a", " t", "on", "nd", "re", "the", " the", "ing", "ion", "and", " and", "im"),
    *("<|", "|>", "\n\n", "  ", "    ", "ab", "ba", "aba", "aa", "aaa", "aaaa", "'s"),
    *("\u0338", "é"),
]
ANY = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [*QWEN_CONTROL[:4], *QWEN_BOXES, *QWEN_IMAGE, *MERGED, "\u0338", "e\u0301", " ", "12"]
        ),
        ANY,
    )
).map("".join)


def ranks() -> dict[bytes, int]:
    found = {bytes([b]): b for b in range(256)}
    for text in MERGED:
        found.setdefault(text.encode(), len(found))
    return found


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[Tokenizer, tiktoken.Encoding]:
    folder = tmp_path_factory.mktemp("qwen")
    lines = (base64.b64encode(t) + b" %d\n" % r for t, r in ranks().items())
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    made = load(folder)
    file = folder / "tokenizer.json"
    made.save(str(file))
    names = [*QWEN_CONTROL, *QWEN_BOXES, *QWEN_IMAGE]
    special = {name: len(ranks()) + i for i, name in enumerate(names)}
    reference = tiktoken.Encoding(
        "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks(), special_tokens=special
    )
    return Tokenizer.from_file(str(file)), reference


@settings(max_examples=300, deadline=None)
@given(PIECES)
@example("<|im_end|>\u0338")
@example("'S 's \r\n \n  x\u00a0\u3000y 12345")
def test_qwen_ids_are_tiktokens_for_any_text_with_all_special_tokens(qwen, text):
    made, reference = qwen
    text = unicodedata.normalize("NFC", text)
    expected = reference.encode(text, allowed_special="all")
    assert made.encode(text, add_special_tokens=False).ids == expected
    assert made.decode(expected, skip_special_tokens=False) == reference.decode(expected)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_qwen_control_and_image_tokens_are_plain_text_when_not_parsed_and_box_tags_stay(qwen, text):
    made, reference = qwen
    text = unicodedata.normalize("NFC", text)
    expected = reference.encode(text, allowed_special=set(QWEN_BOXES), disallowed_special=())
    literal = Tokenizer.from_str(made.to_str())
    literal.encode_special_tokens = True
    assert literal.encode(text, add_special_tokens=False).ids == expected


@given(st.lists(st.integers(0, 255 + len(MERGED))))
@settings(max_examples=200, deadline=None)
def test_qwen_text_of_any_ids_is_tiktokens(qwen, ids):
    made, reference = qwen
    ids = [i for i in ids if i < len(ranks())]
    assert made.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_skipping_special_tokens_leaves_qwens_references_and_boxes_visible(qwen):
    made, _ = qwen
    ids = made.encode("<|im_start|><ref>dog</ref><box>(1,2),(3,4)</box><img>", add_special_tokens=False).ids
    assert made.decode(ids) == "<ref>dog</ref><box>(1,2),(3,4)</box>"


def test_qwen_gives_the_goldens_ids_and_text(goldens):
    for name in ("qwenvl_A", "qwenvl_C"):
        made = load(goldens / name / "checkpoint")
        cases = json.loads((goldens / name / "cases.json").read_text())
        special = cases["meta"]["special_ids"]
        keys = {"<|endoftext|>": "eod_id", "<|im_end|>": "im_end_id", "<img>": "img_start_id"}
        keys |= {"<imgpad>": "img_pad_id", "</quad>": "quad_end_id"}
        for token, key in keys.items():
            assert made.token_to_id(token) == special[key]
        for case in cases["tokenizer_cases"]:
            if "ids" in case and "<img>" not in case["text"] and case["allowed_special"] == "all":
                text = unicodedata.normalize("NFC", case["text"])
                assert made.encode(text, add_special_tokens=False).ids == case["ids"]
                assert made.decode(case["ids"], skip_special_tokens=False) == case["decode"]


# ------------------------------------------------------------------------------------ sentencepiece

SPECIAL = ["<unk>", "<s>", "</s>"]


class SlowLlama:
    """What transformers' slow LlamaTokenizer does, written anew on sentencepiece."""

    def __init__(self, file, legacy):
        self.legacy = legacy
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        rest, first = text, True
        while rest:
            cuts = [(rest.find(s), -len(s), s) for s in SPECIAL if s in rest]
            at, _, token = min(cuts, default=(len(rest), 0, ""))
            if at:
                ids += self._stretch(rest[:at], first)
            if token:
                ids.append(SPECIAL.index(token))
            rest, first = rest[at + len(token) :], False
        return ids

    def _stretch(self, text: str, first: bool) -> list[int]:
        if self.legacy or first:
            return self.model.encode(text)
        # no dummy prefix: what comes after a letter that merges with nothing
        return self.model.encode("\u0007" + text)[len(self.model.encode("\u0007")) :]


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_ids_are_the_slow_llama_tokenizers_for_any_text(goldens, legacy):
    file = goldens / "llava_orig_A" / "checkpoint" / "tokenizer.model"
    made, slow = tokenizers.from_sentencepiece(file, legacy), SlowLlama(file, legacy)
    words = st.sampled_from(
        [*SPECIAL, "USER:", " ", "  ", "▁", "\n", "<0x0A>", "the", "image", "世界", "🙂", "\u0338"]
    )

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.one_of(words, ANY)).map("".join))
    @example(" lead")
    @example("x </s> y <s> z")
    @example("</s>x")
    def check(text):
        text = text.replace("\0", "").replace("▁", " ")
        assert made.encode(text, add_special_tokens=False).ids == slow.encode(text)

    check()


def test_llava_gives_the_goldens_ids_and_text(goldens):
    folder = goldens / "llava_orig_A"
    made = load(folder / "checkpoint", slow=True)
    for case in json.loads((folder / "cases.json").read_text())["tokenizer_cases"]:
        assert [1, *made.encode(case["prompt"], add_special_tokens=False).ids] == case["plain"]
        assert made.decode(case["plain"], skip_special_tokens=False) == case["decode"]
        assert made.decode(case["plain"], skip_special_tokens=True) == case["decode_skip"]


def test_llava_hf_gives_the_goldens_ids_and_text(goldens):
    folder = goldens / "llava_hf_A"
    made = load(folder / "checkpoint")
    for case in json.loads((folder / "cases.json").read_text())["tokenizer_cases"]:
        assert [1, *made.encode(case["text"], add_special_tokens=False).ids] == case["ids"]
        assert made.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]


def test_a_folder_with_both_files_is_read_as_the_slow_tokenizer_only_when_asked(goldens):
    folder = goldens / "llava_hf_A" / "checkpoint"
    text = "x </s> y"  # only the fast one puts ▁ after a special token
    assert load(folder).encode(text, add_special_tokens=False).ids[-2:] == [264, 536]
    assert load(folder, slow=True).encode(text, add_special_tokens=False).ids[-2:] == [514, 536]


def test_added_tokens_of_the_json_files_get_their_ids(goldens, tmp_path):
    shutil.copy(goldens / "llava_orig_A" / "checkpoint" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<im_end>": 641, "<im_start>": 640}')
    (tmp_path / "special_tokens_map.json").write_text(
        '{"pad_token": "<pad>", "eos_token": {"content": "</s>"}}'
    )
    made = load(tmp_path)
    ids = made.encode("<im_start>x<pad>", add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (640, 642)
    assert tokenizers.named(tmp_path) == {"pad_token": "<pad>", "eos_token": "</s>"}


def test_an_added_token_with_another_id_is_an_error_that_names_both(goldens, tmp_path):
    shutil.copy(goldens / "llava_orig_A" / "checkpoint" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 700}')
    with pytest.raises(CheckpointError, match="'<image>' the id 640, its files say 700"):
        load(tmp_path)


def test_gpt2s_two_files_are_qwen2s_tokenizer(goldens, tmp_path):
    folder = goldens / "qwen2vl_A" / "checkpoint"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    made, whole = load(tmp_path), load(folder)
    text = "<|im_start|>user\nWhat's 12345?  e\u0301 你好<|im_end|>"
    assert made.encode(text).ids == whole.encode(text).ids
    assert made.get_vocab_size() == whole.get_vocab_size()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("readme.txt", b"", "has no tokenizer: it needs tokenizer.json, tokenizer.model, qwen.tiktoken"),
        ("vocab.json", b"{}", "has no tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.model", b"\xff\xff", "tokenizer.model is no sentencepiece model"),
        ("qwen.tiktoken", b"QQ== 0\n!!\n", "line 2 is not 'base64 rank'"),
        ("qwen.tiktoken", b"QQ== 0\nQg== 2\n", "are not the numbers from 0 on"),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as e:
        load(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_unigram_model_is_refused_by_name(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = 1
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(NotSupportedYet, match="only sentencepiece's BPE"):
        load(tmp_path)

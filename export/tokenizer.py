"""Any tokenizer → a fast `tokenizers.Tokenizer` with the same ids, which `tokenizer.json` keeps.

Formats: `qwen.tiktoken` (a line per token: base64 of its bytes, rank), `tokenizer.json`, sentencepiece's
`tokenizer.model` (its protobuf, BPE), GPT-2's `vocab.json` and `merges.txt`. Around the last three stand
transformers' `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MissingDependency, NotSupportedYet

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# tokenization_qwen.py; digits are split one by one
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# in the order of their ids, which follow the ranks'
QWEN_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
QWEN_BOXES = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]
QWEN_IMAGE = ["<img>", "</img>", "<imgpad>"]
SPACE = "▁"  # sentencepiece's
# fields of the two JSON files that name special tokens
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load(folder: Path, slow: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint folder, without truncation and padding.

    slow: a tokenizer.model goes before a tokenizer.json, as for code that asked transformers for its
    slow tokenizers. Callers encode without special tokens: bos stands in the prompt rules. Raises
    CheckpointError (none, or a damaged one), NotSupportedYet (sentencepiece unigram), MissingDependency.
    """
    if (folder / "qwen.tiktoken").is_file():
        return from_tiktoken(folder / "qwen.tiktoken")
    model = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() and not (slow and model.is_file()):
        tokenizer = _from_json(folder / "tokenizer.json")
    elif model.is_file():
        legacy = settings(folder, "tokenizer_config.json").get("legacy")
        # transformers' default, for files older than the field
        tokenizer = from_sentencepiece(model, legacy is None or bool(legacy))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _from_merges(folder)
    else:
        raise CheckpointError(
            f"{folder} has no tokenizer: it needs tokenizer.json, tokenizer.model, qwen.tiktoken, or "
            "vocab.json with merges.txt"
        )
    _add_named(tokenizer, folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def settings(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder, {} when the file is not there."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds {type(data).__name__}, expected an object")
    return data


def named(folder: Path) -> dict[str, str]:
    """Special tokens by role: {"bos_token": "<s>", …}; tokenizer_config.json wins."""
    both = settings(folder, "special_tokens_map.json"), settings(folder, "tokenizer_config.json")
    roles = {}
    for data in both:
        for role in NAMED:
            token = data.get(role)
            if isinstance(token, Mapping):
                token = token.get("content")
            if isinstance(token, str) and token:
                roles[role] = token
    return roles


def from_tiktoken(file: Path) -> Tokenizer:
    """Qwen's byte-level BPE.

    Control and image tokens are special: not shown when those are skipped, and plain text under
    `encode_special_tokens`; the tags of references and boxes are neither. Text must be in NFC: special
    tokens are found before a normalizer would run.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                encoded, number = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(number)
    except (ValueError, binascii.Error) as e:
        raise CheckpointError(f"{file} line {len(ranks) + 1} is not 'base64 rank': {e}") from e
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise CheckpointError(f"{file}: the {len(ranks)} ranks are not the numbers from 0 on, bytes included")
    letters = byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if pair := _last_merge(token, rank, ranks):
            merges.append((spelled[pair[0]], spelled[pair[1]]))
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    # tiktoken looks a whole word up before it merges
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # one by one: a batch would put the special ones first
    for content in [*QWEN_CONTROL, *QWEN_BOXES, *QWEN_IMAGE]:
        special = content not in QWEN_BOXES
        tokenizer.add_tokens([AddedToken(content, normalized=False, special=special)])
    return tokenizer


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that becomes `token` when its bytes are merged by lower ranks only.

    In any text the parts are these: a rank's merge comes after all lower ones. None: it is never merged.
    """
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [
            (ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        lowest, i = min(candidates)
        if lowest >= rank:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def from_sentencepiece(file: Path, legacy: bool) -> Tokenizer:
    """A sentencepiece BPE model as transformers' slow LlamaTokenizer reads it.

    legacy: every stretch of text between special tokens begins with ▁; otherwise only a text's first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as e:
        raise MissingDependency(
            f"reading {file.name} needs {e.name}: pip install sentencepiece protobuf"
        ) from e
    module: Any = sentencepiece_model_pb2  # its classes are made at import
    proto = module.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as e:  # protobuf's own DecodeError
        raise CheckpointError(f"{file} is no sentencepiece model: {e}") from e
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise NotSupportedYet(f"{file} is no BPE model: only sentencepiece's BPE is supported yet")
    kind = proto.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    # what sentencepiece may merge into: neither control tokens, bytes nor unused pieces
    scores = {p.piece: p.score for p in proto.pieces if p.type in (kind.NORMAL, kind.USER_DEFINED)}
    merges = [
        (score, -i, -cut, piece[:cut], piece[cut:])
        for i, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(reverse=True)
    unknown = next((p.piece for p in proto.pieces if p.type == kind.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(proto.trainer_spec.byte_fallback),
        )
    )
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy and spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if not legacy and spec.add_dummy_prefix:
        # Metaspace does not prefix a text that begins with its own sign, which " lead" does by now. So
        # the first one writes a blank, which no text has any more, and the second makes it ▁.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []),
        ]
    )
    for piece in proto.pieces:
        if piece.type in (kind.UNKNOWN, kind.CONTROL, kind.USER_DEFINED):
            special = piece.type != kind.USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return tokenizer


def _from_json(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"{file} is no tokenizer: {e}") from e


def _from_merges(folder: Path) -> Tokenizer:
    """GPT-2's files in Qwen2's way: its pattern, NFC."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as e:
        raise CheckpointError(f"{folder}: vocab.json and merges.txt are no tokenizer: {e}") from e
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_named(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens of the JSON files that the tokenizer does not have yet; ids are checked."""
    there = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    config = settings(folder, "tokenizer_config.json")
    special = set(named(folder).values())
    for data in (settings(folder, "special_tokens_map.json"), config):
        special |= {_content(token) for token in data.get("additional_special_tokens") or []}
    wanted: dict[str, tuple[int | None, AddedToken]] = {}
    for content, number in settings(folder, "added_tokens.json").items():
        wanted[content] = (number, _added(content, content in special))
    for number, fields in (config.get("added_tokens_decoder") or {}).items():
        wanted[_content(fields)] = (int(number), _added(fields, bool(fields.get("special"))))
    for content in sorted(special):
        wanted.setdefault(content, (None, _added(content, True)))
    # numbered ones first, in their order: a new token gets the next free id
    for content, (number, token) in sorted(
        wanted.items(), key=lambda item: (item[1][0] is None, item[1][0] or 0)
    ):
        if content not in there:
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(content)
        if number not in (None, found):
            raise CheckpointError(
                f"{folder}: the tokenizer gives {content!r} the id {found}, its files say {number}"
            )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _added(token: str | Mapping[str, Any], special: bool) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, normalized=False, special=special)
    flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip")}
    normalized = bool(token.get("normalized", not special))
    return AddedToken(token["content"], special=special, normalized=normalized, **flags)

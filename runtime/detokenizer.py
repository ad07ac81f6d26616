"""Token ids → text as they come: no half characters, no part of a stop string, linear time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """Text of one answer.

    `text`: what may be shown so far; it only grows. `stopped`: the stop string that ended it, or None.
    The whole text equals `tokenizer.decode` of all ids, cut at the first stop string to be completed
    (after it, with `print_stop_words`). One difference: where a sentencepiece tokenizer's byte tokens
    make valid characters beside invalid bytes, the characters are shown, as sentencepiece does, and each
    other byte is one U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        print_stop_words: bool = False,
    ):
        self.text = ""
        self.stopped: str | None = None
        self._stop = [word for word in dict.fromkeys(stop) if word]
        self._print = print_stop_words
        self._held = ""  # decoded, and may begin a stop string
        self._decoder = _decoder(tokenizer, skip_special_tokens)

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; returns what `text` grew by. After a stop, nothing more is added."""
        if self.stopped is not None:
            return ""
        return self._add(self._decoder.push(ids), final=False)

    def finish(self) -> str:
        """No more tokens: show what was held back, U+FFFD for a character that never ended."""
        if self.stopped is not None:
            return ""
        return self._add(self._decoder.finish(), final=True)

    def _add(self, new: str, final: bool) -> str:
        text = self._held + new
        found = [(at + len(word), at, word) for word in self._stop if (at := text.find(word)) >= 0]
        if found:  # the one that was complete first, whatever the steps were
            end, at, self.stopped = min(found)
            shown, self._held = text[: end if self._print else at], ""
        else:
            keep = 0 if final else self._begun(text)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max(
            (
                n
                for word in self._stop
                for n in range(1, min(len(word), len(text) + 1))
                if text.endswith(word[:n])
            ),
            default=0,
        )


def spellings(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[bytes], int]:
    """What each of `vocab_size` ids adds to a text, and how many blanks a text's beginning loses.

    Special tokens and ids without a token add nothing. Raises ValueError where it depends on the
    tokens around.
    """
    decoder = _decoder(tokenizer, skip=True)
    if isinstance(decoder, _Window):
        raise ValueError("the tokenizer's decoder is not supported, only byte-level and sentencepiece ones")
    tokens = _Tokens(tokenizer, skip=True)
    spelled = [b"".join(decoder.spell(token) for token in tokens([i])) for i in range(vocab_size)]
    return spelled, decoder.strip


class _Decoder(Protocol):
    def push(self, ids: Iterable[int]) -> str: ...

    def finish(self) -> str: ...


def _decoder(tokenizer: Tokenizer, skip: bool) -> _ByteLevel | _Pieces | _Window:
    state: Any = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel(_Tokens(tokenizer, skip))
    rest = [k for k in kinds if k != "Replace"]
    none: dict[str, Any] = {"start": 0, "stop": 0, "content": " "}
    strip = next((s for s in steps if s.get("type") == "Strip"), none)
    literal = all("String" in s["pattern"] for s in steps if s.get("type") == "Replace")
    if rest[:2] == ["ByteFallback", "Fuse"] and rest[2:] in ([], ["Strip"]) and literal and not strip["stop"]:
        replace = [(s["pattern"]["String"], s["content"]) for s in steps if s.get("type") == "Replace"]
        return _Pieces(_Tokens(tokenizer, skip), replace, strip["content"], strip["start"])
    return _Window(tokenizer, skip)


def speller(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """A function from a token id to the bytes that the token alone stands for; control tokens as typed."""
    decoder, names = _decoder(tokenizer, False), _Tokens(tokenizer, False)

    def spell(i: int) -> bytes:
        if isinstance(decoder, _Window):
            return tokenizer.decode([i], skip_special_tokens=False).encode()
        return decoder.spell(next(iter(names([i])), ""))

    return spell


class _Tokens:
    """Strings of token ids; special ones and ids without a token are left out."""

    def __init__(self, tokenizer: Tokenizer, skip: bool):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if skip and token.special}

    def __call__(self, ids: Iterable[int]) -> Iterable[str]:
        for i in ids:
            if i not in self._skipped and (token := self._tokenizer.id_to_token(i)) is not None:
                yield token


class _ByteLevel:
    """Tokens spelled in GPT-2's letters, one per byte; bytes → UTF-8 across tokens."""

    strip = 0

    def __init__(self, tokens: _Tokens):
        self._tokens = tokens
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (b for b in range(256) if b not in printable)
        self._bytes = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._utf8.decode(self.spell(token)) for token in self._tokens(ids))

    def spell(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[letter] for letter in token])
        except KeyError:  # an added token, which stands for itself
            return token.encode()

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Sentencepiece: ▁ is a blank, <0xE4> a byte, and a text's first blank is left out."""

    def __init__(self, tokens: _Tokens, replace: list[tuple[str, str]], blank: str, strip: int):
        self._tokens = tokens
        self._replace = replace
        self._blank = blank
        self.strip = strip  # blanks at the text's beginning that are still to be left out
        self._bytes = b""  # the beginning of a character

    def push(self, ids: Iterable[int]) -> str:
        return self._begin("".join(self._one(token) for token in self._tokens(ids)))

    def _one(self, token: str) -> str:
        if match := BYTE.fullmatch(token):
            self._bytes += bytes.fromhex(match[1])
            return self._characters(final=False)
        return self._characters(final=True) + self._replaced(token)

    def _replaced(self, token: str) -> str:
        for pattern, content in self._replace:
            token = token.replace(pattern, content)
        return token

    def spell(self, token: str) -> bytes:
        match = BYTE.fullmatch(token)
        return bytes.fromhex(match[1]) if match else self._replaced(token).encode()

    def _characters(self, final: bool) -> str:
        text = ""
        while self._bytes:
            try:
                text, self._bytes = text + self._bytes.decode(), b""
            except UnicodeDecodeError as e:
                if e.reason == "unexpected end of data" and not final:
                    head, self._bytes = self._bytes[: e.start], self._bytes[e.start :]
                    return text + head.decode()
                text += self._bytes[: e.start].decode() + "\ufffd"
                self._bytes = self._bytes[e.start + 1 :]  # one U+FFFD per byte
        return text

    def _begin(self, text: str) -> str:
        while self.strip and text.startswith(self._blank):
            text, self.strip = text[len(self._blank) :], self.strip - 1
        if text:
            self.strip = 0
        return text

    def finish(self) -> str:
        return self._begin(self._characters(final=True))


class _Window:
    """Any other decoder: the text by which the last few tokens grow."""

    LEAD = 8  # tokens before the new ones that decide how those are spelled
    PATIENCE = 8  # new tokens that may wait for the end of a character

    def __init__(self, tokenizer: Tokenizer, skip: bool):
        self._tokenizer = tokenizer
        self._skip = skip
        self._skipped = _Tokens(tokenizer, skip)
        self._lead: list[int] = []
        self._new: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._one(i) for i in ids)

    def _one(self, i: int) -> str:
        if not list(self._skipped([i])):  # it must not push the lead out of the window
            return ""
        self._new.append(i)
        grown = self._grown()
        if grown.endswith("\ufffd") and len(self._new) < self.PATIENCE:
            return ""
        self._lead, self._new = (self._lead + self._new)[-self.LEAD :], []
        return grown

    def _grown(self) -> str:
        before = self._tokenizer.decode(self._lead, skip_special_tokens=self._skip)
        return self._tokenizer.decode(self._lead + self._new, skip_special_tokens=self._skip)[len(before) :]

    def finish(self) -> str:
        return self._grown() if self._new else ""

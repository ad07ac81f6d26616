"""Tags and chat turns → token ids and the places where images go.

A raw prompt is the model's own text: its control tokens and image tags are parsed. What is typed in a chat
is only text: there, control tokens and tags come from the template and from image parts alone.
"""

from __future__ import annotations

import itertools
import operator
import re
import secrets
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, EmptyPrompt, ImageWrongFormat, NotSupportedYet, UserError, shown
from ..export.bundle import Piece, PromptRules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
OUTPUT_LIMIT = 1 << 24  # characters that a template may write
RANGE_LIMIT = 10_000


@dataclass
class EncodedPrompt:
    """`ids`: tokens without image slots; `slots[i]`: where in `ids` the slots of `sources[i]` go."""

    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)

    def add(self, other: EncodedPrompt) -> None:
        self.slots += [len(self.ids) + at for at in other.slots]
        self.ids += other.ids
        self.sources += other.sources


def expand(
    encoded: EncodedPrompt, lengths: Sequence[int], token_id: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Fill in the slots: ids with `token_id` `lengths[i]` times for image i, and each (start, length)."""
    ids: list[int] = []
    spans, done = [], 0
    for at, length in zip(encoded.slots, lengths, strict=True):
        ids += encoded.ids[done:at]
        spans.append((len(ids), length))
        ids += [token_id] * length
        done = at
    return ids + encoded.ids[done:], spans


@dataclass(frozen=True)
class _Image:
    source: Any  # None: the next one given beside the prompt


@dataclass(frozen=True)
class _Turn:
    role: str
    parts: list[str | _Image]

    @property
    def images(self) -> list[_Image]:
        return [p for p in self.parts if isinstance(p, _Image)]


class PromptEncoder:
    """Prompts of one model → ids. Safe to share between threads.

    vocab_size: rows of the embedding table, the limit of a caller's ids (default: the tokenizer's size).
    image_tokens: slots of one image, to count them in a chat's history and in prompts given as ids.
    """

    def __init__(
        self,
        rules: PromptRules,
        tokenizer: Tokenizer,
        vocab_size: int | None = None,
        image_tokens: int = 0,
    ):
        self.rules = rules
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or tokenizer.get_vocab_size()
        self.image_tokens = image_tokens
        self._text = _TextEncoder(tokenizer, rules.image.tags)
        self._template = _Template(rules.chat.template) if rules.chat.kind == "jinja" else None
        image = rules.image
        tags = [re.escape(tag) for tag in sorted(image.tags, key=len, reverse=True)]
        self._tags = re.compile("|".join([*tags, *(re.escape(tag) for tag in image.url_tag[:1])]))

    def encode_prompt(self, prompt: str | Sequence[int], images: Sequence[Any] = ()) -> EncodedPrompt:
        """A raw prompt, or its ids, and the images of its open tags in order.

        Raises EmptyPrompt, ImageWrongFormat (tags and images do not match), UserError (an id outside
        the vocabulary).
        """
        if isinstance(prompt, str):
            if not prompt:
                raise EmptyPrompt("the prompt is empty")
            encoded = EncodedPrompt(list(self.rules.bos_ids))
            encoded.add(self._raw(self._normal(prompt)))
            return self._checked(_assigned(encoded, images))
        if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
            raise UserError(f"the prompt is {type(prompt).__name__}, expected a string or a list of ids")
        return self._from_ids(list(prompt), images)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any] | None = None
    ) -> EncodedPrompt:
        """OpenAI's message list. Raises EmptyPrompt, UserError naming the message that is wrong.

        images: those of the parts `{"type": "image"}` in order, which hold none themselves; raises
        ImageWrongFormat unless the numbers agree.
        """
        turns = _turns(messages, images)
        if self._template is not None:
            return self._checked(self._rendered(turns))
        return self._checked(self._pieces(turns))

    def text_ids(self, text: str) -> list[int]:
        """What the checkpoint's own tokenizer makes of a text, bos included.

        Control tokens are parsed; where its tokenizer writes image slots (Qwen-VL), they are there.
        """
        bos, text = list(self.rules.bos_ids), self._normal(text)
        if not self.rules.image.url_tag:
            return bos + self._text.encode(text)
        encoded = self._raw(text)
        lengths = [self.image_tokens] * len(encoded.slots)
        return bos + expand(encoded, lengths, self.rules.image.token_id)[0]

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens shown; an image tag for what stands for images."""
        image = self.rules.image
        if image.token_id < 0:
            parts = itertools.groupby(ids, lambda i: i == image.token_id)
            return "".join(
                image.tags[0] * len(list(part)) if is_image else self._show(list(part))
                for is_image, part in parts
            )
        if not image.url_tag:
            return self._show(list(ids))
        text, done = "", 0
        for at, i in enumerate(ids):
            high = at + 1 + self.image_tokens
            if i == image.prefix_ids[-1] and list(ids[high : high + 1]) == image.suffix_ids:
                slots = list(ids[at + 1 : high])
                if set(slots) == {image.token_id} or self._url(slots):
                    text += self._show(list(ids[done : at + 1])) + (self._url(slots) or "")
                    done = high
        return text + self._show(list(ids[done:]))

    def _show(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that a chat becomes, control tokens and one image token per image shown."""
        encoded = self.encode_chat(messages)
        number = self.rules.image.token_id
        image = (self.tokenizer.id_to_token(number) if number >= 0 else None) or self.rules.image.tags[0]
        cuts = [0, *encoded.slots, len(encoded.ids)]
        return image.join(
            self.tokenizer.decode(encoded.ids[low:high], skip_special_tokens=False)
            for low, high in itertools.pairwise(cuts)
        )

    def _normal(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"the text holds half a character (a lone surrogate) at {e.start}") from e
        # the whole text, before tags and control tokens are looked for, as the reference does
        return unicodedata.normalize("NFC", text) if self.rules.nfc else text

    def _checked(self, encoded: EncodedPrompt) -> EncodedPrompt:
        if encoded.ids and (highest := max(encoded.ids)) >= self.vocab_size:
            raise UserError(
                f"the prompt has the token {self.tokenizer.id_to_token(highest)!r} (id {highest}), the "
                f"model's vocabulary ends at {self.vocab_size}"
            )
        return encoded

    # ------------------------------------------------------------------------------- raw prompts

    def _raw(self, text: str) -> EncodedPrompt:
        if self.rules.image.inline:
            return self._inline(self._text.encode(self._aliased(text)))
        encoded = EncodedPrompt()
        for part in self._cut(text):
            if isinstance(part, str):
                encoded.ids += self._text.encode(part)
            else:
                encoded.add(self._image(part))
        return encoded

    def _aliased(self, text: str) -> str:
        """Every alias of the image tag becomes the tokenizer's own."""
        return self._tags.sub(lambda _: self.rules.image.tags[0], text)

    def _inline(self, ids: list[int], sources: Iterable[Any] = ()) -> EncodedPrompt:
        """Tokens of a whole text; its image tokens become places."""
        encoded, given = EncodedPrompt(), iter(sources)
        for i in ids:
            if i == self.rules.image.token_id:
                encoded.slots.append(len(encoded.ids))
                encoded.sources.append(next(given, None))
            else:
                encoded.ids.append(i)
        return encoded

    def _cut(self, text: str) -> list[str | _Image]:
        """Cut at image tags. Raises ImageWrongFormat for one that is not closed."""
        parts: list[str | _Image] = []
        done = 0
        opened, closed = self.rules.image.url_tag or ("", "")
        while match := self._tags.search(text, done):
            parts.append(text[done : match.start()])
            done = match.end()
            if match[0] != opened:
                parts.append(_Image(None))
                continue
            end = text.find(closed, done)
            if end < 0 or opened in text[done:end]:
                raise ImageWrongFormat(
                    f"the tag {opened} at character {match.start()} is not closed by {closed}"
                )
            parts.append(_Image(text[done:end] or None))
            done = end + len(closed)
        parts.append(text[done:])
        return [p for p in parts if p]

    def _image(self, image: _Image) -> EncodedPrompt:
        rules = self.rules.image
        ids = [*rules.prefix_ids, *rules.suffix_ids]
        return EncodedPrompt(ids, [len(rules.prefix_ids)], [image.source])

    def _from_ids(self, given: list[Any], images: Sequence[Any]) -> EncodedPrompt:
        rules = self.rules.image
        ids = []
        for at, value in enumerate(given):
            try:
                i = operator.index(value)
            except TypeError:
                i = None
            if i is None or isinstance(value, bool):
                raise UserError(f"the prompt's item {at} is {shown(value)}, expected a token id")
            if i != rules.token_id and not 0 <= i < self.vocab_size:
                raise UserError(
                    f"the prompt's token id {i} at position {at} is outside the vocabulary, "
                    f"0 to {self.vocab_size - 1}"
                )
            ids.append(i)
        if not ids:
            raise EmptyPrompt("the prompt has no token ids")
        urls = self._urls_in_slots(ids)
        encoded, at = EncodedPrompt(), 0
        runs: list[int] = []  # lengths of the image tokens' runs
        before, after = rules.prefix_ids, rules.suffix_ids
        for i, group in itertools.groupby(ids):
            run = len(list(group))
            left, right = ids[max(0, at - len(before)) : at], ids[at + run :][: len(after)]
            if i == rules.token_id and left == before and right == after:
                encoded.slots.append(len(encoded.ids))
                runs.append(run)
            else:
                encoded.ids += [i] * run
            at += run
        counts = self._images_of(runs, len(images))
        if before and ids.count(before[-1]) != len(runs):
            raise ImageWrongFormat(
                f"the prompt has token {before[-1]} {ids.count(before[-1])} times, {len(runs)} of them "
                f"before image tokens ({rules.token_id}) and {after}"
            )
        slots = [at for at, n in zip(encoded.slots, counts, strict=True) for _ in range(n)]
        sources = urls or [None] * len(slots)
        return _assigned(EncodedPrompt(encoded.ids, slots, sources), images)

    def _urls_in_slots(self, ids: list[int]) -> list[str | None]:
        """Qwen-VL's tokenizer keeps an image's URL in its slots: id b for byte b, padded with image
        tokens. Makes image tokens of all slots, in place; returns the URL of each image, or None.
        """
        rules, urls = self.rules.image, []
        if not rules.url_tag or not self.image_tokens:
            return []
        opened, closed = rules.prefix_ids[-1], rules.suffix_ids[0]
        for at, i in enumerate(ids):
            low, high = at + 1, at + 1 + self.image_tokens
            if i != opened:
                continue
            url, full = None, ids[high : high + 1] == [closed]
            if full and (held := self._url(ids[low:high])):
                url, ids[low:high] = held, [rules.token_id] * self.image_tokens
            urls.append(url)
        return urls

    def _url(self, slots: list[int]) -> str | None:
        pad = self.rules.image.token_id
        end = next((n for n, i in enumerate(slots) if i == pad), len(slots))
        if not end or any(i > 255 for i in slots[:end]) or set(slots[end:]) - {pad}:
            return None
        return bytes(slots[:end]).decode("utf-8", "replace")

    def _images_of(self, runs: list[int], count: int) -> list[int]:
        """How many images each run of image tokens stands for: one token or all its slots per image."""
        total, full = sum(runs), self.image_tokens
        if self.rules.image.prefix_ids:  # every image has its own frame
            if wrong := [n for n in runs if full and n not in (1, full)]:
                raise ImageWrongFormat(
                    f"the prompt has {wrong[0]} image tokens in a row, expected 1 or {full} for an image"
                )
            return [1] * len(runs)
        if full and total == count * full and not any(n % full for n in runs):
            return [n // full for n in runs]
        return runs

    # -------------------------------------------------------------------------------------- chats

    def _pieces(self, turns: list[_Turn]) -> EncodedPrompt:
        """Each turn in pieces that are tokenised apart; the newest turns that fit into the history."""
        chat = self.rules.chat
        system = [t for t in turns if t.role == "system"]
        if not system and chat.system is not None:
            system = [_Turn("system", [chat.system])]
        count = 0
        exchanges: list[EncodedPrompt] = []  # a question and its answer
        for turn in turns:
            if turn.role == "system":
                continue
            if turn.role == "user" or not exchanges:
                exchanges.append(EncodedPrompt())
            exchanges[-1].add(self._turn(turn, count))
            count += len(turn.images)
        encoded = EncodedPrompt(list(self.rules.bos_ids))
        for turn in system:
            encoded.add(self._turn(turn, 0))
        size, kept = self._size(encoded), exchanges[-1:]
        for exchange in reversed(exchanges[:-1]):
            size += self._size(exchange)
            if chat.history_tokens and size >= chat.history_tokens:
                break
            kept.insert(0, exchange)
        for exchange in kept:
            encoded.add(exchange)
        for piece in chat.generation:
            encoded.ids += self._piece(piece)
        return encoded

    def _size(self, encoded: EncodedPrompt) -> int:
        return len(encoded.ids) + len(encoded.slots) * self.image_tokens

    def _piece(self, piece: Piece) -> list[int]:
        return self._text.encode(piece.text) if piece.special else self._text.literal(piece.text)

    def _turn(self, turn: _Turn, images: int) -> EncodedPrompt:
        """`images`: how many the conversation had before."""
        encoded = EncodedPrompt()
        for piece in self.rules.chat.turns[turn.role]:
            if piece.text != "{content}":
                encoded.ids += self._piece(piece)
                continue
            content: list[str | _Image] = [""]  # texts and images by turns
            for part in turn.parts:
                if isinstance(part, _Image):
                    images += 1
                    before, _, after = self.rules.chat.image.replace("{n}", str(images)).partition("{image}")
                    content[-1] = f"{content[-1]}{before}"
                    content += [part, after]
                else:
                    content[-1] = f"{content[-1]}{part}"
            for item in content:
                if isinstance(item, _Image):
                    encoded.add(self._image(item))
                else:
                    encoded.ids += self._text.literal(self._normal(item))
        return encoded

    def _rendered(self, turns: list[_Turn]) -> EncodedPrompt:
        """The template's text, tokenised as a raw prompt in which typed text is only text."""
        assert self._template is not None
        chat, rules = self.rules.chat, self.rules.image
        listed, first = [], chat.system
        for turn in turns:
            typed = [self._text.guard(self._normal(p)) for p in turn.parts if isinstance(p, str)]
            content: Any
            if chat.parts:
                texts = iter(typed)
                content = [
                    {"type": "image"} if isinstance(p, _Image) else {"type": "text", "text": next(texts)}
                    for p in turn.parts
                ]
            else:  # the images first, as LLaVA has them
                tags = [
                    chat.image.replace("{image}", rules.tags[0]).replace("{n}", str(n + 1))
                    for n in range(len(turn.images))
                ]
                content = "".join(tags) + "\n".join(typed)
            listed.append({"role": turn.role, "content": content})
            if turn.role == "system":
                first = "\n".join(typed)
        text = self._template.render(
            messages=listed,
            system=first or "",
            turns=[m for m in listed if m["role"] != "system"],
            add_generation_prompt=True,
            **chat.tokens,
        )
        images = [image for turn in turns for image in turn.images]
        encoded = EncodedPrompt()
        if rules.inline:
            encoded = self._inline(self._text.mixed(text), [i.source for i in images])
        else:
            chunks = self._tags.split(text)
            encoded.ids += self._text.mixed(chunks[0])
            for chunk, image in zip(chunks[1:], [*images, *[_Image(None)] * len(chunks)], strict=False):
                encoded.add(self._image(image))
                encoded.ids += self._text.mixed(chunk)
        if len(encoded.slots) != len(images):
            raise ImageWrongFormat(
                f"the chat template {chat.name!r} wrote {len(encoded.slots)} images, the messages have "
                f"{len(images)}"
            )
        bos = self.rules.bos_ids
        if encoded.ids[: len(bos)] != bos:  # some templates write it themselves
            encoded.slots = [at + len(bos) for at in encoded.slots]
            encoded.ids = bos + encoded.ids
        return encoded


def _assigned(encoded: EncodedPrompt, images: Sequence[Any]) -> EncodedPrompt:
    """Give the open tags their images. Raises ImageWrongFormat unless the numbers agree."""
    tags = len(encoded.sources)
    open_tags = sum(source is None for source in encoded.sources)
    if open_tags != len(images):
        own = f", {tags - open_tags} of them with a URL of their own" if tags != open_tags else ""
        raise ImageWrongFormat(
            f"the prompt has {tags} image tag{'s' * (tags != 1)}{own}, "
            f"{len(images)} image{'s were' if len(images) != 1 else ' was'} given"
        )
    rest = iter(images)
    encoded.sources = [next(rest) if source is None else source for source in encoded.sources]
    return encoded


# ----------------------------------------------------------------------------------------- messages


def _turns(messages: Any, images: Sequence[Any] | None) -> list[_Turn]:
    """Check OpenAI's message list. Raises UserError naming the message and the field."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise UserError(f"messages is {type(messages).__name__}, expected a list of messages")
    turns = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {type(message).__name__}, expected an object with role and content")
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            raise NotSupportedYet(f"{where}: tools are not supported yet")
        if role not in ROLES:
            raise UserError(f"{where}.role is {shown(role)}, expected one of {', '.join(ROLES)}")
        if role == "system" and i:
            raise UserError(f"{where}: a system message can only be the first")
        if not isinstance(message.get("name"), str | None):
            raise UserError(f"{where}.name is {shown(message['name'])}, expected a string or null")
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, str):
            parts: list[str | _Image] = [content]
        elif isinstance(content, list | tuple):
            places = images is not None
            parts = [_part(part, f"{where}.content[{j}]", places) for j, part in enumerate(content)]
        else:
            raise UserError(f"{where}.content is {shown(content)}, expected a string or a list of parts")
        if role == "system" and any(isinstance(p, _Image) for p in parts):
            raise UserError(f"{where}: a system message cannot hold images")
        turns.append(_Turn(role, parts))
    if not any(part for turn in turns if turn.role != "system" for part in turn.parts):
        raise EmptyPrompt("messages hold no text and no image")
    return turns if images is None else _filled(turns, images)


def _filled(turns: list[_Turn], images: Sequence[Any]) -> list[_Turn]:
    """Give the parts that hold no image theirs. Raises ImageWrongFormat unless the numbers agree."""
    open_parts = sum(image.source is None for turn in turns for image in turn.images)
    if open_parts != len(images):
        raise ImageWrongFormat(
            f"the messages have {open_parts} image part{'s' * (open_parts != 1)} without an image, "
            f"{len(images)} image{'s were' if len(images) != 1 else ' was'} given"
        )
    rest = iter(images)

    def filled(part: str | _Image) -> str | _Image:
        return _Image(next(rest)) if isinstance(part, _Image) and part.source is None else part

    return [_Turn(turn.role, [filled(part) for part in turn.parts]) for turn in turns]


def _part(part: Any, where: str, places: bool = False) -> str | _Image:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if isinstance(part.get("text"), str):
            return part["text"]
        raise UserError(f"{where}.text is {shown(part.get('text'))}, expected a string")
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url:
            return _Image(url)
        raise UserError(f"{where}.image_url must hold a url, a non-empty string")
    if kind == "image":
        for key in ("image", "url", "path"):
            source = part.get(key)
            if source is not None and not (isinstance(source, str | bytes) and not source):
                return _Image(source)
        if places:
            return _Image(None)
        raise UserError(f"{where} has no image: give a PIL image, bytes, a path or a URL as 'image'")
    what = f"type {shown(kind)}" if isinstance(part, Mapping) else type(part).__name__
    raise UserError(f"{where} has {what}, expected a part of type text, image_url or image")


# --------------------------------------------------------------------------------- text to token ids


def _without_cache(tokenizer: Tokenizer) -> None:
    """Switch off the cache of words: 10,000 in each thread, and to SentencePiece a whole text is one word.

    A server with 64 threads would keep gigabytes of prompts that come once.
    """
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:  # only BPE and Unigram have one
        resize(0)


class _TextEncoder:
    """Text → ids in three ways: special tokens parsed, literal, or parsed only where unguarded.

    The second tokenizer never parses special tokens; instead it knows a stand-in for each, which holds
    random digits that nobody can type.
    """

    def __init__(self, tokenizer: Tokenizer, tags: Iterable[str]):
        self._tokenizer = tokenizer
        _without_cache(tokenizer)
        digits = f"{secrets.randbelow(10**24):024d}"
        self.mark = f"\ue000{digits}\ue001"
        added = tokenizer.get_added_tokens_decoder()
        self._special = {t.content: (i, t) for i, t in added.items() if t.special and t.content}
        names = sorted(self._special, key=len, reverse=True)  # the longest wins, as in tokenizers
        self._find = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        guarded = "|".join(map(re.escape, [*names, *tags]))
        self._begin = re.compile(rf"(?=(?:{guarded}))(?s:.)")
        self._stand_in = {name: f"\ue002{digits}{n}\ue003" for n, name in enumerate(names)}
        self._literal: Tokenizer | None = None
        self._real: dict[int, int] = {}  # stand-in's id → the special token's

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def literal(self, text: str) -> list[int]:
        if not self._find.search(text):
            return self.encode(text)
        return self._second().encode(text, add_special_tokens=False).ids

    def guard(self, typed: str) -> str:
        """Typed text on its way through a template: marked, so that nothing in it is parsed.

        The marks stand inside the blanks around the text, so that a template may strip those, and
        inside every special token or tag, so that no search of a template finds one.
        """
        core = typed.strip()
        if not core:
            return typed
        before, _, after = typed.partition(core)
        broken = self._begin.sub(lambda m: m[0] + self.mark, core)
        return f"{before}{self.mark}{broken}{self.mark}{after}"

    def mixed(self, text: str) -> list[int]:
        """Rendered text: special tokens are parsed, but for those that a mark breaks."""
        plain = text.replace(self.mark, "")
        parsed, at = [], 0
        for part in text.split(self.mark):
            parsed += [(at + m.start(), m[0]) for m in self._find.finditer(part)]
            at += len(part)
        if parsed == [(m.start(), m[0]) for m in self._find.finditer(plain)]:
            return self.encode(plain)
        second, pieces, done = self._second(), [], 0
        for at, token in parsed:
            pieces += [plain[done:at], self._stand_in[token]]
            done = at + len(token)
        ids = second.encode("".join([*pieces, plain[done:]]), add_special_tokens=False).ids
        return [self._real.get(i, i) for i in ids]

    def _second(self) -> Tokenizer:
        if self._literal is None:
            from tokenizers import AddedToken, Tokenizer

            second = Tokenizer.from_str(self._tokenizer.to_str())
            _without_cache(second)
            for name, (_, token) in self._special.items():
                flags = {f: getattr(token, f) for f in ("single_word", "lstrip", "rstrip")}
                second.add_tokens([AddedToken(self._stand_in[name], normalized=False, **flags)])
            second.encode_special_tokens = True
            for name, (i, _) in self._special.items():
                number = second.token_to_id(self._stand_in[name])
                assert number is not None
                self._real[number] = i
            self._literal = second
        return self._literal


# ---------------------------------------------------------------------------------------- templates


class _Template:
    """A chat template in Jinja's immutable sandbox, with limits, compiled at its first use.

    The environment is transformers': blocks are trimmed, `raise_exception`, `tojson` without escapes,
    `{% generation %}` without effect. Raises BundleError for a template that does not compile or run.
    """

    def __init__(self, source: str):
        self._source = source
        self._compiled: Any = None

    def render(self, **variables: Any) -> str:
        import jinja2

        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(_without_generation(self._source))
            text, length = [], 0
            for part in self._compiled.generate(**variables):
                length += len(part)
                if length > OUTPUT_LIMIT:
                    raise BundleError(f"the chat template writes more than {OUTPUT_LIMIT} characters")
                text.append(part)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, ZeroDivisionError) as e:
            raise BundleError(f"the chat template fails: {e}") from e
        return "".join(text)


def _without_generation(source: str) -> str:
    """`{% generation %}` marks what a model is trained on; blanks around it stay under control."""
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)


def _environment() -> Any:
    import json
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, str):
                raise SecurityError("formatting with % is not allowed")
            if operator == "**" or not all(isinstance(v, int | float) for v in (left, right)):
                if operator != "%" and not _small(operator, left, right):
                    raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def limited(*bounds: int) -> range:
        if len(found := range(*bounds)) > RANGE_LIMIT:
            raise SecurityError(f"range of {len(found)} is longer than {RANGE_LIMIT}")
        return found

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        if indent is not None and not 0 <= indent <= 16:
            raise SecurityError("tojson: indent must be 0 to 16")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent", "wordwrap", "xmlattr", "pprint"):  # they blow text up
        env.filters.pop(name)
    env.filters["tojson"] = tojson
    env.globals.pop("lipsum")
    env.globals.update(
        range=limited,
        raise_exception=raise_exception,
        strftime_now=lambda pattern: datetime.now().strftime(pattern),
    )
    return env


def _small(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        return all(isinstance(v, int | float) and abs(v) <= 1000 for v in (left, right))
    texts = [v for v in (left, right) if hasattr(v, "__len__")]
    times = [v for v in (left, right) if isinstance(v, int)]
    return all(len(v) * n <= 100_000 for v in texts for n in times)

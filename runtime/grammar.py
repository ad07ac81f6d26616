"""Structured output: a JSON schema, a regex or an EBNF grammar → the tokens that may come next.

llguidance does the work (why this one: benchmarks/grammar.md). It gets every token as the bytes that
runtime/detokenizer.py shows for it, so that what is matched is the text that a caller reads; control
tokens and embedding rows without a token have no bytes and match nothing.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import GenerateConfigError, MissingDependency
from .detokenizer import spellings
from .sequence import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

T = TypeVar("T")

# At most one blank after , and : and none elsewhere: a weak model would write blanks for ever. The
# library would read these options from a client's schema too, so that all of them are set here.
JSON_STYLE = {
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
# Grammars come from clients: what one may cost, in the library's units. A step stays below ~20 ms.
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
STACK = 2**28  # bytes, of the thread that compiles: schemas nest through $ref as deep as they are long
DIVISOR = 10_000  # digits of multipleOf: it is compiled to as many states
PATTERNS = 6  # that may hold of one string at once: their product is compiled
PATTERN_PROPERTIES = 50  # every two of them are compared


class Matcher:
    """How far one answer got in its grammar; not for several threads at once.

    `accepting`: the text so far is whole, it may end here. `done`: nothing but the end is possible.
    `error`: the grammar became too costly to follow; the answer cannot go on.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_ids: Iterable[int], field: str):
        self.error: str | None = None
        self._field = field
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = [i for i in eos_ids if i < vocab_size]
        self._look()

    def copy(self) -> Matcher:
        """Another one at the same place, for another answer."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._eos, self._field)

    def mask(self) -> np.ndarray:
        """The tokens that may come next, bool [vocab_size]; never none, unless `done` or `error`."""
        return self._mask

    def accept(self, token: int) -> None:
        """`token`: one that the mask allows; it ends the text if it is an end of sequence."""
        if token in self._eos:
            self.done = True
            return
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        self.accepting = self._matcher.is_accepting()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        self._mask[self._eos] = False  # one could be text
        self.done = self.accepting and not self._mask.any()
        if not self.accepting and not self._mask.any():
            why = _one_line(self._matcher.get_error()) or "no token fits"
            self.error = f"{self._field}: the answer cannot go on: {why}"
        self._mask[self._eos] = self.accepting


def matcher(grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> Matcher:
    """A matcher at the beginning of `grammar`; what was compiled is kept for the next request.

    `vocab_size`: rows of logits; `eos_ids`: allowed where the text may end. Raises GenerateConfigError
    that names the field and what is wrong with the grammar, MissingDependency.
    """
    try:
        compiled = _compile(tokenizer, vocab_size, grammar.kind, grammar.text)
    except ValueError as e:
        raise GenerateConfigError(f"generate_config: {grammar.field}: {e}") from None
    return Matcher(compiled.deep_copy(), vocab_size, eos_ids, grammar.field)


@lru_cache(maxsize=16)
def _compile(tokenizer: Tokenizer, vocab_size: int, kind: str, text: str) -> LLMatcher:
    """Raises ValueError."""
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError:
        raise MissingDependency("structured output needs llguidance: pip install llguidance") from None
    vocabulary, blanks = prepare(tokenizer, vocab_size)
    # the library's own choice of tokens for text that is certain would not be the detokenizer's
    start = '%llguidance {"no_forcing": true}\nstart: ' + '" " ' * blanks + "@body"
    body = {"name": "body", **_BODIES[kind](text)}
    source = json.dumps({"grammars": [{"lark_grammar": start}, body]})
    limits = LLParserLimits(**LIMITS)
    compiled = _on_a_big_stack(lambda: LLMatcher(vocabulary, source, log_level=0, limits=limits))
    if compiled.is_error():
        raise ValueError(_one_line(compiled.get_error()))
    first = Matcher(compiled, vocab_size, [], "")  # its work is kept with the compiled grammar
    if first.done:
        raise ValueError("it matches only the empty text")
    if first.error:
        limit = _one_line(compiled.get_error())
        raise ValueError(limit if limit not in ("", "NoExtensionBias") else "it matches no text")
    return compiled


@lru_cache(maxsize=4)
def prepare(tokenizer: Tokenizer, vocab_size: int) -> tuple[LLTokenizer, int]:
    """The tokens' bytes for llguidance, and how many blanks the detokenizer takes from a text's front.

    Once per model, else with the first grammar: for 150 000 tokens half a second in which no other
    thread runs, so a server does it before it is ready. The end of sequence is a token of its own,
    `vocab_size`: a request chooses its real ones. Raises ValueError for an unknown kind of tokenizer.
    """
    from llguidance import LLTokenizer

    tokens, blanks = spellings(tokenizer, vocab_size)
    return LLTokenizer(_Vocabulary([*tokens, b"eos"])), blanks  # type: ignore[arg-type]


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("with no_forcing nothing is tokenized")


def _on_a_big_stack(work: Callable[[], T]) -> T:
    """The library recurses; where the stack ends, the process would."""
    with ThreadPoolExecutor(1, "rtp-llm-grammar") as pool:
        with _STACK_SIZE:
            before = threading.stack_size(STACK)
            try:
                done = pool.submit(work)  # starts the thread
            finally:
                threading.stack_size(before)
        return done.result()


_STACK_SIZE = threading.Lock()


def _one_line(error: str) -> str:
    """What is wrong, of a message that may hold the grammar and a picture of the place."""
    why = re.search(r"^error: (.*)$", error, re.MULTILINE)
    line = why[1] if why else error.split("\n")[0]
    return line if len(line) <= 200 else line[:197] + "..."


def _json(text: str) -> dict[str, Any]:
    schema = json.loads(text)
    _check_cost(schema)
    return {"json_schema": schema | {"x-guidance": JSON_STYLE}}


def _regex(text: str) -> dict[str, Any]:
    from llguidance import LLMatcher

    # the whole text is matched anyway, and the library knows no anchors
    text = text.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", text):
        text = text[:-1]
    return {"lark_grammar": json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]}


def _ebnf(text: str) -> dict[str, Any]:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return {"lark_grammar": gbnf_to_lark(re.sub(r"\\(u\w{4}|U\w{8}|.)|[&~]", _escape, text))}
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as e:
        raise ValueError(_one_line(str(e))) from None


def _escape(match: re.Match[str]) -> str:
    r"""What the library would misread, an escape or an operator of its regexes → itself, or \x41."""
    found = match[0]
    if found[1:2] in ("u", "U") and len(found) > 2:
        character = chr(int(found[2:], 16))
    elif found in ("&", "~", r"\[", r"\]"):
        character = found[-1]
    else:
        return found
    return character if character > "\x7f" else f"\\x{ord(character):02x}"


_BODIES: dict[str, Callable[[str], dict[str, Any]]] = {"json_schema": _json, "regex": _regex, "ebnf": _ebnf}


def _check_cost(schema: Mapping[str, Any]) -> None:
    """Refuse what the library has no limit of its own for, and the one thing that it does not keep."""
    divisors: set[Decimal] = set()
    patterns = properties = 0
    merged = False  # several constraints may meet in one value
    nodes: list[Any] = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        if not isinstance(node, dict):
            continue
        nodes += node.values()
        own = isinstance(node.get("pattern"), str) or isinstance(node.get("format"), str)
        divisor = node.get("multipleOf")
        if isinstance(divisor, int | float) and math.isfinite(divisor):
            divisors.add(Decimal(repr(divisor)))
            own = True
        patterns += own
        parts = own + sum(isinstance(node.get(k), str | list) for k in ("$ref", "anyOf", "oneOf"))
        if isinstance(node.get("allOf"), list):
            parts += len(node["allOf"])
        merged |= parts > 1
        if isinstance(node.get("patternProperties"), dict):
            properties += len(node["patternProperties"])
        least, required = node.get("minProperties"), node.get("required")
        named = len(required) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > max(1, named):
            raise ValueError(
                f"minProperties={least!r} is not supported above 1 and the number of required properties"
            )
    if merged and patterns > PATTERNS:
        raise ValueError(
            f"it has {patterns} of pattern, format and multipleOf; together with schemas that are merged "
            f"(allOf, or $ref, anyOf or oneOf beside others) at most {PATTERNS} are supported"
        )
    if properties > PATTERN_PROPERTIES:
        raise ValueError(f"it has {properties} patternProperties, at most {PATTERN_PROPERTIES} are supported")
    for divisor in divisors:
        if divisor * 10 ** max(0, -int(divisor.normalize().as_tuple().exponent)) > DIVISOR:
            raise ValueError(f"multipleOf={divisor} is not supported: its digits are above {DIVISOR}")
    if merged and len(divisors) > 1:
        raise ValueError(
            "several different multipleOf together with schemas that are merged are not supported"
        )

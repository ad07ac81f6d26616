"""Compare libraries for structured output: coverage, compile time, time per mask.

    pip install llguidance outlines-core; pip install xgrammar torch
    python scripts/compare_grammars.py

Each library is optional. The vocabularies are random byte strings that contain every byte: the time of a
mask depends on how many tokens there are and on how their beginnings fan out.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES = (32_000, 151_936)
LIMIT_S = 20  # one library, one vocabulary, one grammar
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    },
    "required": ["name", "age", "tags", "box"],
    "additionalProperties": False,
}
TEXT = '{"name":"Ann Other","age":41,"tags":["red","blue"],"box":[1,2.5,30,4]}'
REGEX = r"\d{3}-[a-z]{2,10}(\.[a-z]{2,4}){1,3}"
EBNF = 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"\n'
GRAMMARS = {"JSON schema": (PERSON, TEXT), "regex": (REGEX, "123-abcdef.exam.pl"), "EBNF": (EBNF, "12+(3+4)")}
SCHEMAS = {  # a keyword, a text that it forbids
    "minLength": ({"type": "string", "minLength": 2}, '"a"'),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"b"'),
    "format date": ({"type": "string", "format": "date"}, '"2020-99-99"'),
    "maximum": ({"type": "integer", "maximum": 12}, "13"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "7"),
    "maxItems": ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, "[null,null]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, "[1]"),
    "uniqueItems": ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "[null,null]"),
    "required": ({"type": "object", "required": ["a"]}, "{}"),
    "patternProperties": ({"type": "object", "patternProperties": {"^a": {"type": "null"}}}, '{"a":1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, "{}"),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, "1"),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "1"),
    "not": ({"type": ["null", "boolean"], "not": {"type": "null"}}, "null"),
    "recursive $ref": ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}, "[1]"),
}


def vocabulary(size: int) -> list[bytes]:
    """Every byte, then words as a tokenizer has them; the last token is the end of sequence."""
    draw = random.Random(0)
    tokens = {bytes([i]): None for i in range(256)}
    letters = "etaoinshrdlucmfwypvbgkjqxz" * 8 + "ETAOIN" * 2 + "0123456789.,:;{}[]\"'()-_" + "éüß中文"
    while len(tokens) < size - 1:
        word = "".join(draw.choice(letters) for _ in range(draw.choice((1, 2, 3, 4, 5, 6, 8, 10))))
        tokens[(" " * draw.randint(0, 1) + word).encode()] = None
    return [*tokens, b"<eos>"]


class LLGuidance:
    package = "llguidance"

    def __init__(self, tokens: list[bytes]):
        import llguidance

        self._lib = llguidance

        class Words:
            is_tokenizer_wrapper = True
            bos_token_id = None

        words = Words()
        words.tokens, words.eos_token_id = tokens, len(tokens) - 1
        words.special_token_ids = [len(tokens) - 1]
        self._tokenizer = llguidance.LLTokenizer(words)

    def compile(self, kind: str, grammar: object) -> Callable[[], tuple[Callable, Callable]]:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        if kind == "JSON schema":
            body = {"json_schema": {**grammar, "x-guidance": {"whitespace_flexible": False}}}
        elif kind == "EBNF":
            body = {"lark_grammar": gbnf_to_lark(grammar)}
        else:
            body = {"lark_grammar": f"start: /{grammar}/"}
        start = {"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @body'}
        source = json.dumps({"grammars": [start, {"name": "body", **body}]})
        matcher = self._lib.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().split("\n")[0])

        def begin() -> tuple[Callable, Callable]:
            m = matcher.deep_copy()
            return lambda: np.frombuffer(m.compute_bitmask(), np.uint8), m.consume_token

        return begin


class XGrammar:
    package = "xgrammar"

    def __init__(self, tokens: list[bytes]):
        import xgrammar

        self._lib, self._size = xgrammar, len(tokens)
        info = xgrammar.TokenizerInfo(tokens, stop_token_ids=[len(tokens) - 1])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, grammar: object) -> Callable[[], tuple[Callable, Callable]]:
        if kind == "JSON schema":
            compiled = self._compiler.compile_json_schema(
                json.dumps(grammar), any_whitespace=False, separators=(",", ":"), strict_mode=False
            )
        elif kind == "EBNF":
            compiled = self._compiler.compile_grammar(grammar)
        else:
            compiled = self._compiler.compile_regex(grammar)

        def begin() -> tuple[Callable, Callable]:
            matcher = self._lib.GrammarMatcher(compiled)
            mask = self._lib.allocate_token_bitmask(1, self._size)

            def fill() -> np.ndarray:
                matcher.fill_next_token_bitmask(mask)
                return mask.numpy().view(np.uint8)[0]

            return fill, matcher.accept_token

        return begin


class Outlines:
    package = "outlines-core"

    def __init__(self, tokens: list[bytes]):
        import outlines_core

        self._lib, self._size = outlines_core, len(tokens)
        words = {word: [i] for i, word in enumerate(tokens[:-1])}
        self._vocabulary = outlines_core.Vocabulary(len(tokens) - 1, words)

    def compile(self, kind: str, grammar: object) -> Callable[[], tuple[Callable, Callable]]:
        if kind == "EBNF":
            raise ValueError("no grammars, only regexes")
        if kind == "JSON schema":
            text = json.dumps(grammar)
            grammar = self._lib.json_schema.build_regex_from_schema(text, whitespace_pattern="")
        index = self._lib.Index(grammar, self._vocabulary)

        def begin() -> tuple[Callable, Callable]:
            guide = self._lib.Guide(index)
            mask = np.zeros((self._size + 31) // 32, np.int32)

            def fill() -> np.ndarray:
                guide.write_mask_into(mask.ctypes.data, mask.size, mask.itemsize)
                return mask.view(np.uint8)

            return fill, lambda token: guide.advance(token, return_tokens=False)

        return begin


LIBRARIES = [LLGuidance, XGrammar, Outlines]


def walk(begin: Callable, text: str, times: list[float]) -> bool:
    """Byte by byte through `text`; whether it may be said and end there. The last token is the end."""
    fill, accept = begin()
    for byte in [*text.encode(), None]:
        began = time.perf_counter()
        mask = fill()
        times.append(time.perf_counter() - began)
        token = END if byte is None else byte
        if not mask[token // 8] >> token % 8 & 1:
            return False
        if byte is not None:
            accept(token)
    return True


END = 0


def one(library: type, size: int, kind: str) -> str:
    """A cell: compile time, and the median and the slowest mask of one walk."""
    global END
    tokens = vocabulary(size)
    END = size - 1
    lib = library(tokens)
    grammar, text = GRAMMARS[kind]
    began = time.perf_counter()
    begin = lib.compile(kind, grammar)
    compiled = time.perf_counter() - began
    times: list[float] = []
    said = walk(begin, text, times)
    micro = [round(1e6 * t) for t in (statistics.median(times), max(times))]
    return f"{1000 * compiled:,.1f} ms; {micro[0]:,} / {micro[1]:,} µs{'' if said else '; REFUSES THE TEXT'}"


def coverage(library: type) -> str:
    """Which keywords are enforced, refused as unsupported, or silently not kept."""
    global END
    tokens = vocabulary(1000)
    END = len(tokens) - 1
    lib = library(tokens)
    found: dict[str, list[str]] = {"enforced": [], "refused": [], "not kept": []}
    for name, (schema, forbidden) in SCHEMAS.items():
        try:
            begin = lib.compile("JSON schema", schema)
            found["not kept" if walk(begin, forbidden, []) else "enforced"].append(name)
        except Exception:
            found["refused"].append(name)
    kept = len(found["enforced"])
    rest = "; ".join(f"{k}: {', '.join(v)}" for k, v in found.items() if v and k != "enforced")
    return f"{kept} of {len(SCHEMAS)} enforced; {rest}"


def limited(*arguments: str) -> str:
    """In a process of its own: a library may take for ever, or end it."""
    try:
        run = subprocess.run(
            [sys.executable, str(Path(__file__)), *arguments], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"over {LIMIT_S} s"
    return run.stdout.strip() if run.returncode == 0 else f"fails: {run.stderr.strip().splitlines()[-1][:90]}"


def main() -> None:
    if len(sys.argv) > 2:
        library = next(lib for lib in LIBRARIES if lib.package == sys.argv[1])
        print(coverage(library) if sys.argv[2] == "coverage" else one(library, int(sys.argv[2]), sys.argv[3]))
        return
    for library in LIBRARIES:
        try:
            version = importlib.metadata.version(library.package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{library.package}: not installed, left out (pip install {library.package})")
            continue
        print(f"{library.package} {version}\n  coverage: {limited(library.package, 'coverage')}")
        for size in SIZES:
            for kind in GRAMMARS:
                print(f"  {size:,} {kind}: {limited(library.package, str(size), kind)}", flush=True)


if __name__ == "__main__":
    main()

"""The types that cross the runtime's borders: what a caller asks for, and one answer in the making.

Nothing here imports numpy or torch: the scheduler reads these and must see numbers only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import GenerateConfigError, NotSupportedYet, shown

if TYPE_CHECKING:
    from .speculation import PromptLookup

ALIASES = {
    "gen_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "random_seed",
    "n": "num_return_sequences",
    "stop": "stop_words_str",
    "stop_words_ids": "stop_words_list",
    "output_logits": "return_logits",
    "output_hidden_states": "return_hidden_states",
    "output_all_probs": "return_all_probs",
    "output_input_ids": "return_input_ids",
    "output_output_ids": "return_output_ids",
    "output_cum_log_probs": "return_cum_log_probs",
}

# characters; grammars come from clients, and what compiling one costs grows with its length
MAX_SCHEMA = 2**16
MAX_GRAMMAR = 2**14


class Grammar(NamedTuple):
    """What the text must match: `kind` is json_schema, regex or ebnf, `field` where the caller wrote it."""

    field: str
    kind: str
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """One request's `generate_config`; every field is documented in the README's table.

    Made by `from_config`; None means "not given".
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    max_input_tokens: int | None = None
    do_sample: bool = True
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    random_seed: int | None = None
    num_return_sequences: int = 0
    num_beams: int = 1
    stop_words_str: list[str] = field(default_factory=list)
    stop_words_list: list[list[int]] = field(default_factory=list)
    eos_token_id: list[int] | None = None
    ignore_eos: bool = False
    bad_words_list: list[list[int]] = field(default_factory=list)
    print_stop_words: bool = False
    skip_special_tokens: bool = True
    return_logits: bool = False
    return_input_ids: bool = False
    return_output_ids: bool = False
    return_hidden_states: bool = False
    return_all_probs: bool = False
    return_cum_log_probs: bool = False
    return_incremental: bool = False
    calculate_loss: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: dict[str, Any] | None = None  # json_object, or json_schema with the schema as JSON
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_shape: list[int] | None = None
    timeout_ms: int | None = None
    adapter_name: str | None = None
    reuse_cache: bool = True
    speculative: str | None = None
    request_id: str | None = None

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.top_k == 1 or self.temperature == 0

    @property
    def answers(self) -> int:
        return max(1, self.num_return_sequences)

    @property
    def grammar(self) -> Grammar | None:
        if self.response_format is not None:
            if self.response_format["type"] == "json_object":
                return Grammar("response_format", "json_schema", '{"type": "object"}')
            schema = self.response_format["json_schema"]["schema"]
            return Grammar("response_format.json_schema.schema", "json_schema", schema)
        for kind in ("json_schema", "regex", "ebnf"):
            if (text := getattr(self, kind)) is not None:
                return Grammar(kind, kind, text)
        return None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Check a caller's `generate_config` over a bundle's `defaults`.

        Raises GenerateConfigError naming the field, its value and what would be right;
        NotSupportedYet for a field that this version knows but cannot honour.
        """
        values: dict[str, Any] = {}
        spelled: dict[str, str] = {}  # as the caller wrote each
        for given, value in (config or {}).items():
            name = ALIASES.get(given, given)
            if name not in _FIELDS:
                near = difflib.get_close_matches(given[:64], [*_FIELDS, *ALIASES], 1)
                hint = f"; the nearest known one is {near[0]!r}" if near else ""
                raise GenerateConfigError(f"generate_config: unknown field {shown(given)}{hint}")
            if value is None:
                continue  # not given
            if name in values and values[name] != value:
                raise GenerateConfigError(
                    f"generate_config: {given!r} and {spelled[name]!r} are one field, "
                    f"and both are given: {shown(value)} and {shown(values[name])}"
                )
            values[name], spelled[name] = value, given
        merged = dict(defaults or {}) | values
        params = cls(**{k: _CHECKS[k](k, v) for k, v in merged.items()})
        if params.top_logprobs and not params.logprobs:
            params = dataclasses.replace(params, logprobs=True)
        params._check_grammar()
        for name, supported in _UNSUPPORTED.items():
            if getattr(params, name) != supported:
                raise NotSupportedYet(
                    f"generate_config: {name}={shown(getattr(params, name))} is not supported yet; "
                    f"leave it out or set it to {supported!r}"
                )
        return params

    def _check_grammar(self) -> None:
        fields = ("response_format", "json_schema", "regex", "ebnf")
        given = [name for name in fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise GenerateConfigError(f"generate_config: give only one of {' and '.join(given)}")
        for name in ("stop_words_str", "stop_words_list", "ignore_eos", "print_stop_words"):
            if given and getattr(self, name):
                raise GenerateConfigError(
                    f"generate_config: {name} cannot be combined with {given[0]}, "
                    "whose text ends where it is complete; leave it out"
                )


def answers_of(config: dict[str, Any]) -> int:
    """How many answers each prompt is to have, at least 1; what is no number is refused later."""
    asked = [v for k, v in config.items() if ALIASES.get(k, k) == "num_return_sequences"]
    return max([1, *(int(v) for v in asked if isinstance(v, int | float))])


_UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "adapter_name": None,
    "return_hidden_states": False,
}


def _fail(name: str, value: Any, right: str) -> Any:
    raise GenerateConfigError(f"generate_config: {name}={shown(value)} must be {right}")


def _int(low: int, high: float = float("inf"), right: str = "") -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> int:
        ok = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not ok or not low <= value <= high:
            _fail(name, value, right or f"an integer ≥ {low}")
        return int(value)

    return check


def _float(test: Callable[[float], bool], right: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not test(value):
            _fail(name, value, right)
        return float(value)

    return check


def _bool(name: str, value: Any) -> bool:
    if value not in (True, False, 0, 1):
        _fail(name, value, "True or False")
    return bool(value)


def _text(name: str, value: Any) -> str:
    return value if isinstance(value, str) else _fail(name, value, "a string")


def _speculative(name: str, value: Any) -> str:
    return value if value == "prompt_lookup" else _fail(name, value, "'prompt_lookup', or left out")


def _strings(name: str, value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) and s for s in value):
        _fail(name, value, "a list of non-empty strings")
    return list(value)


def _ids(name: str, value: Any) -> list[int]:
    value = [value] if isinstance(value, int) else value
    ok = isinstance(value, list | tuple) and value
    if not ok or not all(type(i) is int and i >= 0 for i in value):
        _fail(name, value, "a token id or a non-empty list of token ids")
    return list(value)


def _id_lists(name: str, value: Any) -> list[list[int]]:
    if not isinstance(value, list | tuple):
        _fail(name, value, "a list of lists of token ids")
    return [_ids(name, v) for v in value]


def _few(
    check: Callable[[str, Any], list[Any]], count: int, length: int, unit: str
) -> Callable[[str, Any], list[Any]]:
    """They are looked for at every token, while all others wait."""

    def checked(name: str, value: Any) -> list[Any]:
        words = check(name, value)
        if len(words) > count or any(len(w) > length for w in words):
            longest = max(map(len, words))
            raise GenerateConfigError(
                f"generate_config: {name} has {len(words)} items of up to {longest} {unit}, "
                f"the limit is {count} items of {length}"
            )
        return words

    return checked


def _shape(name: str, value: Any) -> list[int]:
    ok = isinstance(value, list | tuple) and len(value) == 2
    if not ok or not all(type(i) is int and i > 0 for i in value):
        _fail(name, value, "[height, width], two integers ≥ 1")
    return list(value)


def _source(limit: int) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
            _fail(name, value, "a string of valid Unicode")
        if len(value) > limit:
            _fail(name, value, f"at most {limit} characters long, and has {len(value)}")
        return value

    return check


def _schema(name: str, value: Any) -> str:
    """A schema or its JSON → its JSON."""
    right = "a JSON schema: an object, or a string with its JSON"
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return _fail(name, value, right)
    return _source(MAX_SCHEMA)(name, text) if isinstance(schema, dict) else _fail(name, value, right)


def _response_format(name: str, value: Any) -> dict[str, Any] | None:
    kinds = ("text", "json_object", "json_schema")
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in kinds:
        _fail(name, value, f"an object whose type is one of {', '.join(kinds)}")
    parts = value.get("json_schema")
    known = {"name": str, "description": str, "schema": Mapping | str, "strict": bool}
    if (kind == "json_schema") != isinstance(parts, Mapping) or set(value) - {"type", "json_schema"}:
        _fail(name, value, "{'type': …}, and only with type json_schema {'json_schema': {'schema': …}}")
    for key, part in (parts or {}).items():
        if key not in known:
            _fail(f"{name}.json_schema", parts, f"an object of {', '.join(known)}, not {key}")
        if part is not None and not isinstance(part, known[key]):
            _fail(f"{name}.json_schema.{key}", part, "of the type that OpenAI's API gives it")
    if kind == "json_schema":
        schema = _schema(f"{name}.json_schema.schema", parts.get("schema"))
        return {"type": kind, "json_schema": {"schema": schema}}
    return {"type": kind} if kind == "json_object" else None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _int(0),
    "min_new_tokens": _int(0),
    "max_input_tokens": _int(1),
    "do_sample": _bool,
    "top_k": _int(0),
    "top_p": _float(lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "temperature": _float(lambda x: 0 <= x < float("inf"), "a number ≥ 0 (0 = greedy)"),
    "min_p": _float(lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": _float(lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100"),
    "presence_penalty": _float(lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "frequency_penalty": _float(lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "no_repeat_ngram_size": _int(0, 64, "an integer from 0 to 64"),
    "random_seed": _int(-(2**63), 2**64, "an integer of at most 64 bits"),
    "num_return_sequences": _int(0, 64, "an integer from 0 to 64"),
    "num_beams": _int(1),
    "stop_words_str": _few(_strings, 32, 128, "characters"),
    "stop_words_list": _few(_id_lists, 32, 128, "token ids"),
    "eos_token_id": _ids,
    "ignore_eos": _bool,
    "bad_words_list": _few(_id_lists, 1024, 128, "token ids"),
    "print_stop_words": _bool,
    "skip_special_tokens": _bool,
    "return_logits": _bool,
    "return_input_ids": _bool,
    "return_output_ids": _bool,
    "return_hidden_states": _bool,
    "return_all_probs": _bool,
    "return_cum_log_probs": _bool,
    "return_incremental": _bool,
    "calculate_loss": _int(0, 2, "0, 1 (sum) or 2 (per token)"),
    "logprobs": _bool,
    "top_logprobs": _int(0, 20, "an integer from 0 to 20"),
    "response_format": _response_format,
    "json_schema": _schema,
    "regex": _source(MAX_GRAMMAR),
    "ebnf": _source(MAX_GRAMMAR),
    "min_pixels": _int(1),
    "max_pixels": _int(1),
    "resized_shape": _shape,
    "timeout_ms": _int(1),
    "adapter_name": _text,
    "reuse_cache": _bool,
    "speculative": _speculative,
    "request_id": _text,
}
_FIELDS = [f.name for f in dataclasses.fields(SamplingParams)]


@dataclass(frozen=True)
class ImageSpan:
    """Slots `start … start+length` of a prompt, filled by the rows of the image called `key`."""

    start: int
    length: int
    key: bytes


@dataclass(eq=False)
class Sequence:
    """One answer in the making. The front door sets the first block, the scheduler and its cache the
    second, the engine the third; and the engine appends to `tokens` and adds to `computed`."""

    tokens: list[int]  # expanded prompt, then what was generated; an image slot holds the image token
    prompt_len: int
    params: SamplingParams
    max_new_tokens: int  # resolved: the params' own, cut to the space left
    eos_ids: frozenset[int]  # empty with ignore_eos
    images: list[ImageSpan] = field(default_factory=list)
    rope_table: int = 0  # for life: it follows from the prompt's length
    salt: bytes = b""  # cached prompts are shared among equal salts only
    leader: Sequence | None = None  # another answer to the same prompt, which computes it for both
    lookup: PromptLookup | None = None  # drafts its next tokens
    deadline: float = float("inf")  # time.monotonic()

    order: int = 0  # of arrival
    keys: list[bytes] = field(default_factory=list)  # of the prompt's full blocks
    slot: int = -1  # row of the caches while running
    blocks: list[int] = field(default_factory=list)  # cache blocks held, in order
    computed: int = 0  # tokens whose keys and values are in the cache
    started: float = 0.0  # first scheduled, time.monotonic()
    reused: int = 0  # prompt tokens that were cached then

    images_ready: bool = True  # every image's rows are in the embedding cache
    iterations: int = 0  # steps that this sequence took part in
    drafted: int = 0  # tokens
    accepted: int = 0  # of those, as they came
    finished: bool = False

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step: `count` tokens from position `past` on, the `draft` last."""

    sequence: Sequence
    past: int
    count: int
    logits: str  # "none" (a prompt's inner chunk), "last", or "all" (for a loss, or with a draft)
    draft: tuple[int, ...] = ()

    @property
    def is_chunk(self) -> bool:
        """Several tokens of a prompt, not an answer's next ones."""
        return self.count > 1 and not self.draft

    @property
    def heads(self) -> int:
        """Its tokens that go through the head."""
        return {"none": 0, "last": 1, "all": self.count}[self.logits]


Batch = list[Row]  # of one step, made by the scheduler, ordered by slot

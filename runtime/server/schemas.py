"""What requests look like: checked by pydantic, shown in /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema, model_validator

from ...errors import BadField, shown
from ..sequence import ALIASES

_TEXT = {"type": "object", "required": ["type", "text"],
         "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}  # fmt: skip
_URL = {"type": "object", "required": ["url"],
        "properties": {"url": {"type": "string", "minLength": 1},
                       "detail": {"enum": ["auto", "low", "high", None]}}}  # fmt: skip
_IMAGE = {"type": "object", "required": ["type", "image_url"],
          "properties": {"type": {"const": "image_url"},
                         "image_url": {"anyOf": [{"type": "string", "minLength": 1}, _URL]}}}  # fmt: skip
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [_TEXT, _IMAGE]}}]}
_MESSAGE = {"type": "object", "required": ["role", "content"],
            "properties": {"role": {"enum": ["system", "developer", "user", "assistant"]},
                           "content": _CONTENT,
                           "name": {"type": ["string", "null"]}}}  # fmt: skip
# the prompt encoder checks them, and its messages name the one that is wrong
Messages = Annotated[
    list[Any], Field(min_length=1), WithJsonSchema({"type": "array", "minItems": 1, "items": _MESSAGE})
]


class _FailFast(FailFast):
    """A million wrong items are one error, not a million. (pydantic's own has no place in a union.)"""

    __hash__ = object.__hash__


Strings = Annotated[list[str], _FailFast()]
Ids = Annotated[list[int], _FailFast()]
Lists = Annotated[list[Strings], _FailFast()]

# of OpenAI's fields: what has no effect here whatever it is …
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "service_tier",
           "store", "reasoning_effort")  # fmt: skip
# … and what only these values, which ask for nothing, are taken of
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
}
RAW_ONLY = ("calculate_loss", "return_incremental")  # and all that begins with return_


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is obfuscated


class ChatRequest(BaseModel):
    """OpenAI's chat completion request. Any other `generate_config` field may stand beside these, or in
    `extra_configs`; what stands beside wins."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: Messages
    model: str | None = Field(None, description="any name is taken: one model is served")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, description="0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: off")
    n: int | None = Field(None, ge=1, le=64)
    stop: str | Strings | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    extra_configs: dict[str, Any] | None = Field(None, description="any generate_config field")

    def config(self) -> dict[str, Any]:
        """The generate_config. Raises BadField for what a chat cannot honour."""
        given = {k: v for k, v in self.__dict__.items() if k not in _NO_CONFIG and v is not None}
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name in REFUSED:
                if value not in REFUSED[name]:
                    raise BadField(name, f"{name} is not supported by this server; leave it out")
                continue
            given[name] = value
        if given.get("stop") in ("", [], [""]):
            del given["stop"]
        if (given.get("response_format") or {}).get("type") == "text":
            del given["response_format"]
        config = merged(self.extra_configs, given)
        if config.get("top_k") == -1:
            config["top_k"] = 0
        for name in config:
            canonical = ALIASES.get(name, name)
            if canonical in RAW_ONLY or canonical.startswith("return_"):
                name = name[:80]
                raise BadField(name, f"{name} has no place in a chat completion; use the raw form, POST /")
        if config.get("top_logprobs") and not config.get("logprobs"):
            raise BadField("top_logprobs", "top_logprobs needs logprobs to be true")
        return config


_NO_CONFIG = ("messages", "model", "stream", "stream_options", "extra_configs")


class RawRequest(BaseModel):
    """The raw form: one `prompt`, or a `prompt_batch`. Any `generate_config` field may stand beside these,
    and wins over the one inside. In a stream the texts come with every event; what `return_*`, `logprobs`
    and `calculate_loss` ask for comes once, with the last one."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str | Ids | None = None
    text: str | None = Field(None, description="another name of prompt")
    prompt_batch: Strings | None = Field(None, min_length=1)
    urls: Strings | Lists | None = None
    images: Strings | Lists | None = Field(None, description="another name of urls")
    generate_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = Field(None, description="another name of generate_config")
    yield_generator: bool | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _once(self) -> RawRequest:
        for one, other in (("prompt", "text"), ("urls", "images"), ("generate_config", "generation_config")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} are two names of one field: give one of them")
        if sum(x is not None for x in (self.prompt, self.text, self.prompt_batch)) != 1:
            raise ValueError("give prompt, or prompt_batch")
        return self

    @property
    def prompts(self) -> list[tuple[str | list[int], list[str]]]:
        """Each prompt with its images. Raises BadField unless they match."""
        images: Any = self.urls if self.urls is not None else self.images
        name = "urls" if self.urls is not None else "images"
        if self.prompt_batch is None:
            prompt = self.prompt if self.prompt is not None else self.text
            if images and not isinstance(images[0], str):
                raise BadField(name, f"{name} is a list of lists, which only goes with prompt_batch")
            return [(prompt or "", images or [])]
        images = images if images is not None else [[]] * len(self.prompt_batch)
        if images and isinstance(images[0], str):
            raise BadField(name, f"{name} must be a list of lists, one for each prompt of prompt_batch")
        if len(images) != len(self.prompt_batch):
            raise BadField(
                name, f"{name} has {len(images)} lists, prompt_batch has {len(self.prompt_batch)} prompts"
            )
        return list(zip(self.prompt_batch, images, strict=True))

    def config(self) -> tuple[dict[str, Any], bool]:
        """The generate_config, and whether to stream."""
        inner = self.generate_config if self.generate_config is not None else self.generation_config
        config = merged(inner, {k: v for k, v in (self.model_extra or {}).items() if v is not None})
        streams = [self.stream, self.yield_generator]
        for name in ("stream", "yield_generator"):
            flag = config.pop(name, None)
            if flag not in (None, True, False):
                raise BadField(name, f"{name} is {shown(flag)}, expected true or false")
            streams.append(flag)
        top = [s for s in streams[:2] if s is not None]
        return config, any(top or streams[2:])


def merged(inner: dict[str, Any] | None, top: dict[str, Any]) -> dict[str, Any]:
    """`top` wins over `inner`, also where one of them uses another name of the field."""
    names = {ALIASES.get(name, name) for name in top}
    return {k: v for k, v in (inner or {}).items() if ALIASES.get(k, k) not in names} | top


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class EncodeRequest(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt: str


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)
    tokens: Ids


class _OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Of every endpoint but the raw one."""

    error: _OpenAIError


class RawErrorResponse(BaseModel):
    """Of the raw endpoint."""

    error_code: int
    error_code_str: str
    message: str

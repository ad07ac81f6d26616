"""Triton's tensors → what a Service takes, checked; and its responses → tensors."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ...errors import (
    BadField,
    ImageInputTooLong,
    ImageWrongFormat,
    PromptTooLong,
    RtpLlmError,
    UserError,
    shown,
)
from ...export.bundle import Bundle
from ..request import GenerateResponse
from ..server.settings import FIELDS, Settings, from_args
from ..service import check_parts, returned, usage_of
from ..strict_json import MAX_ITEMS, Piece, dumps, loads
from . import codes

OUTPUTS = ("text_output", "token_ids", "finish_reason", "usage", "details")
MAGIC = re.compile(rb"\x89PNG|\xff\xd8|GIF8|RIFF....WEBP", re.DOTALL)  # of media.WEB_FORMATS


@dataclass
class Asked:
    """One request's inputs."""

    prompt: str | list[int] | None
    messages: list[Any] | None
    images: list[bytes | str]  # sources of `Pipeline.prepare`
    config: dict[str, Any]
    stream: bool
    echo: bool  # the text begins with the prompt
    image_embeds: np.ndarray | None  # float32 [N, tokens, hidden]
    fingerprint: str | None  # of the bundle that they come from
    salt: bytes


def settings_of(model_config: str) -> tuple[Settings, dict[str, str]]:
    """Settings and all parameters of a model's config. Raises UserError naming the setting."""
    config = json.loads(model_config)
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    given = loads(parameters["settings"].encode(), "the parameter settings")
    known = {f.name for f in FIELDS} - {"checkpoint_path"}
    for name, value in given.items():
        if name not in known or not isinstance(value, str):
            raise UserError(f"the parameter settings: {name}={value!r} must be a known setting, a string")
    told = argparse.Namespace(checkpoint_path=parameters["bundle"], **given)
    env = {name: os.environ[name] for name in ("DOWNLOAD_HEADERS", "MEDIA_PROXY") if name in os.environ}
    return from_args(told, env), parameters  # the two may hold secrets, and any client can read a config


def parameters_of(request: Any) -> dict[str, Any]:
    """Of a Triton request. Raises UserError: Triton lets through bytes that are no text, and NaN."""
    try:
        text = request.parameters()
    except UnicodeDecodeError as e:
        raise UserError(f"the parameters are not UTF-8: {e.reason}") from e
    found: dict[str, Any] = loads((text or "{}").encode(), "the object of parameters")
    return found


def read(
    tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], settings: Settings
) -> Asked:
    """`tensors`: the inputs given, BYTES as objects; `parameters`: of the request. Raises UserError."""
    # before anything is made of each: others wait for that
    pictures = sum(tensors[name].size for name in ("image", "image_url") if name in tensors)
    if pictures > settings.max_images:
        raise ImageInputTooLong(f"the request has {pictures} images, the limit is {settings.max_images}")
    if "input_ids" in tensors and (count := tensors["input_ids"].size) > MAX_ITEMS:
        raise PromptTooLong(f"input_ids has {count:,} token ids, the limit is {MAX_ITEMS:,}")
    size = sum(sum(map(len, t.flat)) if t.dtype == object else t.nbytes for t in tensors.values())
    if size > settings.max_body_bytes:
        raise UserError(f"the inputs have {size:,} bytes, the limit is {settings.max_body_bytes:,}")
    messages = _json(tensors, "messages", list)
    ids = tensors["input_ids"].tolist() if "input_ids" in tensors else None
    text = _text(tensors, "text_input")
    if sum(given is not None for given in (text, ids, messages)) != 1:
        raise UserError("give text_input, input_ids or messages, one of them")
    images: list[bytes | str] = [image_source(data) for data in _items(tensors, "image")]
    images += [_decoded("image_url", data) for data in _items(tensors, "image_url")]
    embeds = tensors.get("image_embeds")
    if messages is not None:
        check_parts(messages, beside=True)
    if embeds is not None:
        _check_embeds(embeds, tensors, settings)
    more = {k: v for k, v in parameters.items() if k != "cache_salt" and not k.startswith("triton_")}
    config = sampling_parameters(tensors)
    salt = parameters.get("cache_salt", "")
    if not isinstance(salt, str):
        raise BadField("cache_salt", f"cache_salt is {shown(salt)}, expected a string")
    return Asked(
        prompt=text if ids is None else ids,
        messages=messages,
        images=images,
        config=config | more,
        stream=flag(tensors, "stream", True),
        echo=not flag(tensors, "exclude_input_in_output", True),
        image_embeds=embeds,
        fingerprint=_text(tensors, "image_embeds_fingerprint"),
        salt=hashlib.sha256(salt.encode()).digest() if salt else b"",
    )


def sampling_parameters(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Raises UserError."""
    return _json(tensors, "sampling_parameters", dict) or {}


def image_source(data: bytes) -> bytes | str:
    """A picture's bytes as they are; base64 of them as a data: URI, which is read strictly."""
    if not MAGIC.match(data) and re.match(rb"[A-Za-z0-9+/_-]{4}", data):
        return "data:;base64," + data.decode("latin-1")
    return data


def flag(tensors: Mapping[str, np.ndarray], name: str, default: bool) -> bool:
    found = tensors.get(name)
    return default if found is None else bool(found.flat[0])


def _items(tensors: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    found = tensors.get(name)
    return [] if found is None else list(found.flat)


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise BadField(name, f"{name} is not UTF-8: {e.reason} at byte {e.start}") from e


def _text(tensors: Mapping[str, np.ndarray], name: str) -> str | None:
    found = _items(tensors, name)
    return _decoded(name, found[0]) if found else None


def _json(tensors: Mapping[str, np.ndarray], name: str, kind: type[Any]) -> Any:
    found = _items(tensors, name)
    if not found or not found[0]:
        return None
    if not isinstance(value := loads(found[0], name), kind):
        right = "a list" if kind is list else "an object"
        raise BadField(name, f"{name} is {shown(value)}, expected {right} as JSON")
    return value


def _check_embeds(embeds: np.ndarray, tensors: Mapping[str, np.ndarray], settings: Settings) -> None:
    if not settings.allow_image_embeds:
        raise BadField("image_embeds", "image_embeds is not taken here (the setting allow_image_embeds=1)")
    if both := {"image", "image_url"} & set(tensors):
        raise BadField("image_embeds", f"image_embeds and {sorted(both)[0]}: give one of them")


def with_pictures(messages: list[Any]) -> list[Any]:
    """Messages to render: what stands beside them is a picture too, whichever."""
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    return [
        m | {"content": [picture if part == {"type": "image"} else part for part in m["content"]]}
        if isinstance(m, dict) and isinstance(m.get("content"), list)
        else m
        for m in messages
    ]


def check_fingerprint(given: str | None, bundle: Bundle) -> None:
    """Raises ImageWrongFormat for image_embeds that do not say that they are of this bundle's model."""
    if given != bundle.origin.fingerprint:
        raise ImageWrongFormat(
            f"image_embeds_fingerprint is {shown(given)}, expected {bundle.origin.fingerprint!r}, which "
            "vision_encoder gives with its image_embeds"
        )


class Deltas:
    """A request's responses, which are cumulative → tensors of what is new."""

    def __init__(self, answers: int, prefix: str, ids_asked: bool):
        self._prefix = prefix
        self._ids_asked = ids_asked
        self._shown = [0] * answers
        self._counted = [0] * answers
        self._logged = [0] * answers  # entries of logprobs

    def news(self, latest: GenerateResponse) -> bool:
        """Is there new text in it, or logprobs? A token alone waits for the next response."""
        texts, outputs = latest.generate_texts, latest.generate_outputs
        new = any(len(text) > shown for text, shown in zip(texts, self._shown, strict=True))
        return new or any(o.logprobs is not None for o in outputs)

    def response(self, latest: GenerateResponse) -> Any:
        """An InferenceResponse."""
        texts, ids = [], []
        for i, output in enumerate(latest.generate_outputs):
            text, tokens = latest.generate_texts[i], output.output_ids or []
            texts.append((self._prefix + text[self._shown[i] :]).encode())
            ids.append(tokens[self._counted[i] :])
            self._shown[i], self._counted[i] = len(text), len(tokens)
        self._prefix = ""
        padded = np.full((len(ids), max(1, *map(len, ids))), -1, np.int32)
        for row, new in zip(padded, ids, strict=True):
            row[: len(new)] = new
        reasons = [(o.finish_reason or "").encode() for o in latest.generate_outputs]
        usage = self._usage(latest) if latest.finished else b""
        return answer(texts, padded, reasons, usage, self._details(latest))

    def _usage(self, latest: GenerateResponse) -> bytes:
        infos = [dataclasses.asdict(o.aux_info) for o in latest.generate_outputs]
        return dumps(usage_of(latest) | {"aux_info": infos})

    def _details(self, latest: GenerateResponse) -> bytes:
        """Of logprobs what is new; what else was asked for comes with the last response."""
        found = []
        for i, output in enumerate(latest.generate_outputs):
            one: dict[str, Any] = dict(returned(output)) if latest.finished else {}
            if not self._ids_asked:
                one.pop("output_ids", None)
            if output.logprobs is not None:
                one["logprobs"] = Piece(output.logprobs[self._logged[i] :])
                self._logged[i] = len(output.logprobs)
            found.append(one)
        return dumps(found) if any(found) else b""


def answer(
    texts: list[bytes],
    token_ids: np.ndarray,
    reasons: list[bytes],
    usage: bytes = b"",
    details: bytes = b"",
) -> Any:
    """An InferenceResponse; without `usage` before the last one, and then without empty `details`: each
    output costs time. `token_ids`: int32 [n, m]."""
    arrays = {
        "text_output": np.array(texts, object),
        "token_ids": token_ids,
        "finish_reason": np.array(reasons, object),
    }
    if usage:
        arrays["usage"] = np.array([usage], object)
    if usage or details:
        arrays["details"] = np.array([details], object)
    return pb.InferenceResponse([pb.Tensor(*pair) for pair in arrays.items()])


def failure(message: str) -> Any:
    """An InferenceResponse: an error, its code by its message (codes.py)."""
    code = getattr(pb.TritonError, codes.code_of(message))
    return pb.InferenceResponse(error=pb.TritonError(message, code))


@contextmanager
def loading() -> Iterator[None]:
    """Our errors as Triton shows them of a model that does not load."""
    try:
        yield
    except RtpLlmError as e:
        raise pb.TritonModelException(codes.message_of(e)) from e

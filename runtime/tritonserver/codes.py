"""Our errors as Triton's: a code by the HTTP status, and a message that begins with our code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...errors import RtpLlmError, brief

CODES = {400: "INVALID_ARG", 404: "NOT_FOUND", 408: "CANCELLED", 429: "UNAVAILABLE", 503: "UNAVAILABLE"}
CANCELLED = "499_CANCELLED: the request was cancelled"
MESSAGE = re.compile(r"\b(\d{3}_[A-Z_]+): (.*)", re.DOTALL)


def message_of(error: RtpLlmError) -> str:
    """`902_MM_WRONG_FORMAT_ERROR: text`."""
    return f"{error.code_str}: {brief(str(error))}"


def code_of(message: str) -> str:
    """Name of the pb_utils.TritonError code of a message, which Triton may have put words before."""
    if CANCELLED in message:
        return "CANCELLED"
    error = error_of(message)
    return CODES.get(error.status, "INTERNAL") if error else "INTERNAL"


def error_of(message: str) -> RtpLlmError | None:
    """The error that a message of Triton tells; None where it is Triton's own."""
    found = MESSAGE.search(message)
    kind = _KINDS.get(found[1]) if found else None
    return kind(found[2]) if found and kind else None


def _kinds(base: type[RtpLlmError]) -> Iterator[type[RtpLlmError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


_KINDS: dict[str, type[RtpLlmError]] = {}
for _kind in _kinds(RtpLlmError):  # of those with one code the first, which the others are kinds of
    _KINDS.setdefault(f"{_kind.code}_{_kind.name}", _kind)

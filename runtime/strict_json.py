"""JSON as strangers may send it, read strictly; and answers written as JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..errors import UserError

MAX_ITEMS = 1_000_000  # separators in a body: each costs some 100 bytes, and time in which nobody else runs
MAX_DEPTH = 64
BRACKETS = bytes.maketrans(b"{}", b"[]")
NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))


def loads(data: bytes, what: str = "the body") -> Any:
    """Strict JSON: UTF-8, no NaN, no infinite or longer than 64-bit numbers, no half characters, at most
    MAX_ITEMS values, nested MAX_DEPTH deep.

    Raises UserError, which calls it `what`.
    """
    try:
        return _loads(data)
    except _Refused as e:
        raise UserError(f"{what} {e}") from e


class _Refused(Exception):
    """`str()` goes on after the JSON's name."""


def _loads(data: bytes) -> Any:
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise _Refused(f"has more than {MAX_ITEMS:,} commas and brackets, the limit")
    try:
        value = json.loads(
            data.decode(), parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except UnicodeDecodeError as e:
        raise _Refused(f"is not UTF-8: {e.reason} at byte {e.start}") from e
    except json.JSONDecodeError as e:
        raise _Refused(f"is not JSON: {e.msg} at character {e.pos}") from e
    except RecursionError as e:
        raise _Refused(f"is nested deeper than {MAX_DEPTH}, the limit") from e
    if _deep(data):
        raise _Refused(f"is nested deeper than {MAX_DEPTH}, the limit")
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        _whole(value)
    return value


def _deep(data: bytes) -> bool:
    """Is this valid JSON nested deeper than MAX_DEPTH? In few passes, and without recursion."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    marks = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(BRACKETS, NO_MARKS)
    marks = re.sub(rb'"[^"]*"', b"", marks)
    for _ in range(MAX_DEPTH):
        marks = marks.replace(b"[]", b"")
    return bool(marks)


def _constant(name: str) -> NoReturn:
    raise _Refused(f"holds {name}, which is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise _Refused(f"holds the number {digits[:20]}…, which is too large")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise _Refused(f"holds the number {digits[:20]}, which is too large")
    return number


def _whole(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise _Refused("holds half a character (a lone surrogate)") from e


def dumps(value: Any) -> bytes:
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), default=_plain, allow_nan=False
    ).encode()


@dataclass(slots=True)
class Piece:
    """A part of an answer, encoded as its value; before each, other threads get a turn."""

    value: Any


def _plain(value: Any) -> Any:
    if isinstance(value, Piece):
        return value.value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return list(value)  # row by row: other threads get a turn between them
    if isinstance(value, np.ndarray):
        # JSON has no NaN (a loss's image slots) and no infinity (a logit of a banned token)
        # (numpy's own loops let go of the interpreter for so short that threads waiting for it never get it)
        return [x if math.isfinite(x) else None for x in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in an answer")

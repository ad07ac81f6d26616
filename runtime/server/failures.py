"""Whatever went wrong → an HTTP status and the body of API.md's two error shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ...errors import (
    BadField,
    GenerateConfigError,
    GenerationTimeout,
    NotReady,
    Overloaded,
    RtpLlmError,
    brief,
    shown,
)
from ..sequence import ALIASES, SamplingParams
from ..service import Call, told

RAW = "/"  # the path of the endpoint with its own shape
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = "1"


class HttpError(HTTPException):
    """A refusal that only HTTP knows: `status` 4xx or 503, `detail` a line for the client."""

    code_str: str

    def __init__(self, status: int, detail: str, code_str: str = "507_BAD_REQUEST_FIELD"):
        headers = {"Retry-After": RETRY_SECONDS} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, detail, headers=headers)
        self.code_str = code_str


def described(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI description says of refusals, in place of FastAPI's 422."""
    return {
        "4XX": {"model": model, "description": "Refused"},
        "5XX": {"model": model, "description": "Failed"},
    }


def status_of(error: BaseException) -> int:
    return error.status_code if isinstance(error, HTTPException) else getattr(error, "status", 500)


def known(error: BaseException, call: Call) -> HTTPException | RtpLlmError:
    """The error itself if a client may read it, else a line with the request's id; the log gets it whole."""
    if isinstance(error, HTTPException):
        call.error = error
        return error
    return told(error, call)


def body(error: HTTPException | RtpLlmError, raw: bool = False) -> dict[str, Any]:
    """The JSON object that a client gets."""
    status = status_of(error)
    if isinstance(error, HTTPException):
        message, code = str(error.detail), getattr(error, "code_str", "507_BAD_REQUEST_FIELD")
    else:
        message, code = str(error), error.code_str
    message = brief(message)
    if raw:
        return {"error_code": int(code.split("_")[0]), "error_code_str": code, "message": message}
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": _param(error), "code": code}}


def _param(error: HTTPException | RtpLlmError) -> str | None:
    """The field that is wrong, where one is."""
    if isinstance(error, GenerateConfigError) and (
        found := re.match(r"generate_config: (?:unknown field )?'?(\w{1,80})", str(error))
    ):
        unknown = "unknown field" in found[0]
        return found[1] if unknown or found[1] in SamplingParams.__annotations__ | ALIASES else None
    return getattr(error, "param", None)


def response(error: Exception, call: Call, path: str) -> JSONResponse:
    tell = known(error, call)
    headers = dict(getattr(tell, "headers", None) or {})
    if isinstance(tell, Overloaded | NotReady):
        headers["Retry-After"] = RETRY_SECONDS
    if isinstance(tell, GenerationTimeout):  # OpenAI's client would repeat a 408, to the same end
        headers["X-Should-Retry"] = "false"
    return JSONResponse(body(tell, raw=path == RAW), status_of(tell), headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's exception handler, for every exception."""
    if isinstance(error, RequestValidationError):
        error = validation(error.errors())
    elif isinstance(error, HTTPException) and not isinstance(error, HttpError):
        error = _routing(request, error)
    return response(error, request.scope["state"]["call"], request.url.path)


def _routing(request: Request, error: HTTPException) -> HttpError:
    if error.status_code == 404:
        return HttpError(404, f"there is no {shown(request.url.path)}", "404_NOT_FOUND")
    if error.status_code == 405:
        detail = f"{shown(request.url.path)} does not take {shown(request.method)}"
        mended = HttpError(405, detail, "405_METHOD_NOT_ALLOWED")
        mended.headers = error.headers  # Allow
        return mended
    return HttpError(error.status_code, str(error.detail))


def validation(errors: Sequence[Mapping[str, Any]]) -> BadField:
    """The first of pydantic's errors, as one line that names the field and its value."""
    first = errors[0]
    path = [str(at) for at in first["loc"] if at != "body" and not re.match(r"str$|list\[", str(at))]
    field = "".join(f"[{at}]" if at.isdigit() else f".{at}" for at in path).lstrip(".") or "the body"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return BadField(field, f"{field} is missing")
    return BadField(field, f"{field} is {shown(first.get('input'))}: {message}")

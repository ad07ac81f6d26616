"""Logs on stderr: one JSON object a line, plain text on a terminal; each with its request's id.

No prompt, picture or answer reaches a log. So an exception is told by its kind and its stack: the message
of a foreign one may quote what a client sent. Only the first line of a message is kept, for the same reason.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
import warnings
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...errors import InternalError

if TYPE_CHECKING:
    from ..request import AuxInfo

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # the server sets it
log = logging.getLogger("rtp_llm.server")
LONGEST = 200  # characters of a text that a client chose


def setup(json_lines: bool, level: int = logging.INFO) -> None:
    """Send the logs of this process, uvicorn's included, to stderr.

    uvicorn must run with `log_config=None`; its access log is silent, `request` takes its place.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if json_lines else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rtp_llm").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.INFO)  # below it uvicorn writes messages of clients
    logging.getLogger("uvicorn.access").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    # Pillow warns of odd pictures, and Python keeps each text for good: clients write them
    warnings.filterwarnings("ignore", module=r"PIL\.")
    threading.excepthook = _thread_failed


def request(
    *,
    method: str,
    path: str,
    status: int,
    seconds: float,
    outcome: str,
    error: BaseException | None = None,
    aux: AuxInfo | None = None,
    tokens: int = 0,
) -> None:
    """One line for a request that ended; `request_id` tells which.

    `path`: without its query; `status`: HTTP; `seconds`: since it arrived; `outcome`: as in metrics;
    `aux`: its first answer's; `tokens`: generated, all answers.
    """
    fields: dict[str, Any] = {
        "method": method[:LONGEST],
        "path": path[:LONGEST],
        "status": status,
        "outcome": outcome,
        "seconds": round(seconds, 4),
    }
    if aux is not None:
        fields |= {
            "prompt_tokens": aux.input_len,
            "reused_tokens": aux.reuse_len,
            "generated_tokens": tokens,
            "images": len(aux.multimodal_lengths),
            "queue_seconds": round(aux.wait_time / 1000, 4),
            "first_token_seconds": round(aux.first_token_cost_time / 1000, 4),
        }
    if error is not None:
        fields["error"] = getattr(error, "code_str", type(error).__name__)
    ours = outcome == "internal"
    log.log(
        logging.ERROR if ours else logging.INFO,
        "request",
        extra={"fields": fields},
        exc_info=error if ours and error is not None else None,
    )


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        info = args.exc_type, args.exc_value, args.exc_traceback
        log.error("a thread failed", exc_info=info)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    message = record.getMessage().splitlines() or [""]
    fields: dict[str, Any] = {"message": message[0]}
    if (identity := request_id.get()) is not None:
        fields["request_id"] = identity[:LONGEST]
    fields |= getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _exception(record.exc_info[1], record.exc_info[2])
    return fields


def _exception(error: BaseException, trace: TracebackType | None) -> dict[str, Any]:
    """Its kind, the causes' kinds, and where; a message only where no client wrote any of it."""
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(kinds) < 8:
        kinds.append(type(cause).__name__ + (f": {_reason(cause)}" if _reason(cause) else ""))
        cause = cause.__cause__ or cause.__context__
    stack = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
    return {"exception": kinds, "stack": stack}


def _reason(error: BaseException) -> str:
    known = isinstance(error, InternalError) or type(error).__module__.startswith("onnxruntime")
    if isinstance(error, OSError):  # its file name may be a client's
        return error.strerror or ""
    return (str(error).splitlines() or [""])[0][:LONGEST] if known else ""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        first = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        return json.dumps(first | _fields(record), ensure_ascii=True, default=repr)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        message, stack = fields.pop("message"), fields.pop("stack", [])
        words = " ".join(f"{name}={_word(value)}" for name, value in fields.items())
        line = f"{when} {record.levelname:<7} {_printable(message)} {words}".rstrip()
        return "\n    ".join([line, *stack])


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


def _printable(text: str) -> str:
    """Without control characters, which could rewrite a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


"""Many requests from a file: one JSON object a line in, one a line out, in the same order, resumable.

In:  {"prompt" | "messages", "urls" | "images", "generate_config", "id"}; any generate_config field may
     stand at the top level too, and wins. Blank lines are skipped. Paths count from the working folder.
Out: {"line", "key", "id", "response", "finish_reason", "aux_info", …} or {"line", "key", "id", "error"}.
     `line` counts from 1; `key` is a hash of the input line, by which a changed input is noticed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import RtpLlmError, UserError

if TYPE_CHECKING:
    from ..pipeline import GenerateResponse, Pipeline

REQUEST = ("prompt", "messages", "urls", "images")
RETURNS = ("output_ids", "input_ids", "loss", "logits", "all_probs", "logprobs")


@dataclass
class Tally:
    """How far a run is. `done` includes what was there `before` it."""

    total: int
    before: int = 0
    done: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Answers a second of this run."""
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return (self.total - self.done) / self.rate if self.rate else 0.0


def run(
    open_pipeline: Callable[[], Pipeline],
    source: Path,
    target: Path,
    *,
    force: bool = False,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Answer every line of `source` into `target`, going on after the lines already there.

    The pipeline is opened only if something is left to do. A line that fails becomes an error line.
    Raises UserError: no such file, `target` is of another input, another run is writing it.
    """
    if not source.is_file():
        raise UserError(f"no such file: {source}")
    if target.exists() and source.samefile(target):
        raise UserError(f"{source} is both input and output")
    try:
        file = open(target, "r+b" if target.exists() else "x+b")
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror}") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{target} is being written by another run") from e
        if force:
            file.truncate(0)
        tally = _resume(source, target, file)
        if tally.done < tally.total:
            with open_pipeline() as pipeline:
                tally.started = time.monotonic()
                for line in _answers(pipeline, source, tally.before):
                    file.write(json.dumps(line, ensure_ascii=False, default=_plain).encode() + b"\n")
                    file.flush()
                    tally.done += 1
                    tally.failed += "error" in line
                    if progress:
                        progress(tally)
    return tally


def _lines(source: Path) -> Iterator[tuple[int, str, bytes]]:
    """Line number, key and content of every line that is not blank."""
    with open(source, "rb") as f:
        for number, line in enumerate(f, 1):
            if line := line.strip():
                yield number, hashlib.sha256(line).hexdigest()[:16], line


def _resume(source: Path, target: Path, file: IO[bytes]) -> Tally:
    """Compare what is written with the input, and cut off a torn last line."""
    again = "give another output, or --force to begin anew"
    tally, good, torn = Tally(0), 0, False
    file.seek(0)
    for number, key, _ in _lines(source):
        tally.total += 1
        if torn or not (line := file.readline()):
            continue
        try:
            done = json.loads(line)
            if not line.endswith(b"\n"):
                raise ValueError
            there = (done["line"], done["key"])
        except (ValueError, KeyError, TypeError) as e:
            if file.read(1):  # not the last line
                raise UserError(f"{target}: line {tally.total} is none of `rtp-llm batch`: {again}") from e
            torn = True  # the run was killed while it wrote
            continue
        if there != (number, key):
            raise UserError(f"{source}: line {number} has changed since {target} was begun: {again}")
        good = file.tell()
        tally.before += 1
        tally.failed += "error" in done
    if not torn and file.readline():
        raise UserError(f"{target} has more answers than {source} has requests: {again}")
    file.seek(good)
    file.truncate()
    tally.done = tally.before
    return tally


def _answers(pipeline: Pipeline, source: Path, skip: int) -> Iterator[dict[str, Any]]:
    """Output lines in input order; every request shares the pipeline's batch."""
    taken: deque[tuple[dict[str, Any], RtpLlmError | None]] = deque()  # in order, answers outstanding

    def requests() -> Iterator[dict[str, Any]]:
        for i, (number, key, text) in enumerate(_lines(source)):
            if i < skip:
                continue
            head: dict[str, Any] = {"line": number, "key": key}
            try:
                request = _request(number, text, head)
            except RtpLlmError as e:
                taken.append((head, e))
            else:
                taken.append((head, None))
                yield request

    def unreadable() -> Iterator[dict[str, Any]]:
        while taken and (error := taken[0][1]):
            yield taken.popleft()[0] | _error(error)

    for _, result in pipeline.batch(requests()):
        yield from unreadable()
        head, _ = taken.popleft()
        yield head | (_error(result) if isinstance(result, RtpLlmError) else _answer(result))
    yield from unreadable()


def _request(number: int, text: bytes, head: dict[str, Any]) -> dict[str, Any]:
    """A line as `Pipeline.batch` takes it; its id goes to `head`."""
    try:
        line = json.loads(text)
    except ValueError as e:
        raise UserError(f"line {number} is not valid JSON: {e}") from e
    if not isinstance(line, dict):
        raise UserError(f"line {number} is {type(line).__name__}, expected an object")
    if "id" in line:
        head["id"] = line.pop("id")
    config = line.pop("generate_config", None)
    if config is not None and not isinstance(config, dict):
        raise UserError(f"line {number}: generate_config is {config!r}, expected an object")
    request = {k: line.pop(k) for k in REQUEST if k in line}
    return request | {"generate_config": {**(config or {}), **line}}


def _error(e: RtpLlmError) -> dict[str, Any]:
    return {"error": {"code": e.code, "name": e.code_str, "message": str(e)}}


def _answer(response: GenerateResponse) -> dict[str, Any]:
    """One answer: plain values; several (num_return_sequences): lists."""
    outputs = response.generate_outputs
    line: dict[str, Any] = {
        "response": response.batch_response,
        "finish_reason": [o.finish_reason for o in outputs],
        "aux_info": [asdict(o.aux_info) for o in outputs],
    }
    for name in RETURNS:
        values = [getattr(o, name) for o in outputs]
        if any(v is not None for v in values):
            line[name] = values
    return line if len(outputs) > 1 else {k: v[0] for k, v in line.items()}


def _plain(value: Any) -> Any:
    """NumPy arrays and numbers for JSON, which has no NaN and no infinity: None."""
    import numpy as np

    array = np.asarray(value)
    finite = np.isfinite(array)
    return array.tolist() if finite.all() else np.where(finite, array, np.array(None)).tolist()

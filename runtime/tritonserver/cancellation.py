"""The way back to a request's client, and whether it has gone: Triton does not tell, it wants to be asked."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb

SECONDS = 0.2  # between two rounds
SHARED_MEMORY = "/dev/shm"
LARGE = 1 << 20  # bytes: Triton's shared memory grows in such steps
log = logging.getLogger(__name__)


class Sender:
    """Triton's response sender, asked and held no longer than it may be.

    Whoever asks one after its final response crashes the server. And as long as anything holds one, be it the
    stack of an exception, its model is not unloaded and the server does not end.
    """

    def __init__(self, request: Any):
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()

    def send(self, response: Any) -> None:
        self._sender.send(response)

    def finish(self, response: Any) -> None:
        """The final response; nothing follows."""
        # a final response that finds no room leaves its request without one: Triton closes the sender first
        if size := _no_room(response):
            text = f"the server's shared memory has no room for an answer of {size:,} bytes"
            response = pb.InferenceResponse(error=pb.TritonError(f"500_UNKNOWN_ERROR: {text}"))
        with self._lock:
            sender, self._sender = self._sender, None
        sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        with self._lock:
            return self._sender is not None and self._sender.is_cancelled()


def _no_room(response: Any) -> int:
    """Bytes of a response for which shared memory may be too small; 0: it fits."""
    arrays = [tensor.as_numpy() for tensor in response.output_tensors()]
    size = sum(sum(map(len, a.flat)) if a.dtype == object else a.nbytes for a in arrays)
    if size < LARGE:
        return 0
    try:
        free = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return size if size + LARGE > free.f_bavail * free.f_frsize else 0


class Watch:
    """A thread that asks the senders of running requests, and calls `gone` each round until they end."""

    def __init__(self) -> None:
        self._running: dict[Sender, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-clients", daemon=True)
        self._thread.start()

    def begin(self, sender: Sender, gone: Callable[[], object]) -> None:
        """`gone` must be quick, and may be called more than once."""
        with self._lock:
            self._running[sender] = gone

    def end(self, sender: Sender) -> None:
        with self._lock:
            del self._running[sender]

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(SECONDS):
            with self._lock:
                running = list(self._running.items())
            for sender, gone in running:
                try:
                    if sender.is_cancelled():
                        gone()
                except Exception:  # vlm is not there, say; the others still want to be asked
                    log.exception("a request could not be cancelled")

"""Who is asked whether its client has gone, and until when."""

from __future__ import annotations

import gc
import sys
import threading
import time
import types
import weakref
from typing import Any

import numpy as np
import pytest


class Tritons:
    """Triton's response sender, as far as we use it."""

    def __init__(self, cancelled: bool = False):
        self.cancelled, self.final, self.late = cancelled, False, False

    def send(self, response: Any, flags: int = 0) -> None:
        self.final, self.sent = bool(flags), response

    def is_cancelled(self) -> bool:
        self.late |= self.final
        time.sleep(0.0005)  # Triton's takes about as long
        self.late |= self.final
        return self.cancelled


@pytest.fixture
def cancellation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as it is inside of Triton."""
    pb = types.ModuleType("triton_python_backend_utils")
    pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    pb.TritonError = str
    pb.InferenceResponse = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, pb.__name__, pb)
    from rtp_llm.runtime.tritonserver import cancellation

    monkeypatch.setattr(cancellation, "SECONDS", 0)
    return cancellation


@pytest.fixture
def watch(cancellation: Any) -> Any:
    watch = cancellation.Watch()
    yield watch
    watch.close()


def response_of(text: bytes) -> Any:
    tensor = types.SimpleNamespace(as_numpy=lambda: np.array([text], object))
    return types.SimpleNamespace(output_tensors=lambda: [tensor], error=None)


def sender_of(cancellation: Any, tritons: Tritons) -> Any:
    return cancellation.Sender(types.SimpleNamespace(get_response_sender=lambda: tritons))


def test_no_sender_is_asked_after_its_final_response(cancellation, watch):
    """The server crashes when one is."""
    asked = []

    def requests() -> None:
        for _ in range(300):
            tritons = Tritons()
            sender = sender_of(cancellation, tritons)
            watch.begin(sender, lambda: None)
            sender.send("one")
            sender.finish(response_of(b"two"))
            watch.end(sender)
            assert not sender.is_cancelled()
            asked.append(tritons)

    threads = [threading.Thread(target=requests) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1200 and all(one.final and not one.late for one in asked)


def test_nothing_holds_tritons_sender_after_the_final_response(cancellation, watch):
    """A model that is unloaded waits for it; and stacks of exceptions stay for long."""
    tritons = Tritons()
    held, sender = weakref.ref(tritons), sender_of(cancellation, tritons)
    del tritons
    watch.begin(sender, lambda: None)
    time.sleep(0.01)
    gc.collect()
    assert held() is not None
    sender.finish(response_of(b"done"))
    time.sleep(0.01)
    assert held() is None
    watch.end(sender)


def test_gone_is_called_until_the_request_ends(cancellation, watch):
    calls: list[int] = []
    stays, goes = (sender_of(cancellation, Tritons(cancelled)) for cancelled in (False, True))
    watch.begin(stays, lambda: pytest.fail("its client is there"))
    watch.begin(goes, lambda: calls.append(1))
    while len(calls) < 3:
        time.sleep(0.001)
    watch.end(goes)
    after = len(calls)
    time.sleep(0.05)
    assert len(calls) <= after + 1


def test_one_request_that_cannot_be_cancelled_leaves_the_others(cancellation, watch):
    calls: list[int] = []

    def fails() -> None:
        raise RuntimeError("model vlm is not found")

    one, other = (sender_of(cancellation, Tritons(cancelled=True)) for _ in range(2))
    watch.begin(one, fails)
    watch.begin(other, lambda: calls.append(1))
    end = time.monotonic() + 5
    while len(calls) < 3 and time.monotonic() < end:
        time.sleep(0.001)
    assert len(calls) >= 3


def test_a_final_response_without_room_in_shared_memory_is_an_error(cancellation, monkeypatch):
    """Triton would drop it, and its client wait for good."""
    room = types.SimpleNamespace(f_bavail=5, f_frsize=1 << 20)
    monkeypatch.setattr(cancellation.os, "statvfs", lambda path: room)
    for size, fits in ((100, True), (3 << 20, True), (5 << 20, False)):
        tritons = Tritons()
        sender_of(cancellation, tritons).finish(response_of(size * b"x"))
        assert tritons.final and (tritons.sent.error is None) == fits
        assert fits or f"no room for an answer of {size:,} bytes" in tritons.sent.error

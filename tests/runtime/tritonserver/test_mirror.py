"""The copy of our metrics on Triton's page."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest
from prometheus_client.core import GaugeMetricFamily


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = threading.Event()

    class Metric:
        def set(self, value: float) -> None:
            if value == 3:
                shown.set()

    class Family:
        GAUGE = COUNTER = 0

        def __init__(self, *_: Any):
            pass

        def Metric(self, labels: Any) -> Metric:
            return Metric()

    class Numbers:
        looks = 0

        def collect(self) -> Any:
            self.looks += 1
            if self.looks == 2:
                raise RuntimeError("no engine")
            yield GaugeMetricFamily("looks", "", self.looks)

    pb = types.ModuleType("triton_python_backend_utils")
    pb.MetricFamily = Family  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, pb.__name__, pb)
    monkeypatch.delitem(sys.modules, "rtp_llm.runtime.tritonserver.metrics", raising=False)
    from rtp_llm.runtime.tritonserver import metrics

    monkeypatch.setattr(metrics, "SECONDS", 0.01)
    mirror = metrics.Mirror(Numbers(), {})
    try:
        assert shown.wait(5)
    finally:
        mirror.close()

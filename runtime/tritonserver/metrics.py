"""The server's Prometheus metrics, shown on Triton's own /metrics under the same names."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import triton_python_backend_utils as pb
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample

log = logging.getLogger(__name__)
SECONDS = 0.4  # between two looks, each of some ms
HISTOGRAMS = 4  # looks to a copy of these: a token changes a hundred numbers, and a copy of one costs 50 µs


class Mirror:
    """A thread that copies what has changed in a registry.

    labels: of every series, besides its own. Two versions of a model that are loaded at the same time must
    differ in them: with the one that goes its series go.
    """

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]):
        self._registry, self._labels = registry, labels
        self._families: dict[str, Any] = {}
        self._shown: dict[tuple[Any, ...], tuple[Any, float]] = {}  # Triton's metric, and its value
        self._closed = threading.Event()
        self._copy()
        self._thread = threading.Thread(target=self._run, name="mirror-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._shown.clear()  # metrics go before their families
        self._families.clear()

    def _run(self) -> None:
        rounds = itertools.count(1)
        while not self._closed.wait(SECONDS):
            try:
                self._copy(histograms=next(rounds) % HISTOGRAMS == 0)
            except Exception:
                log.exception("metrics could not be copied")

    def _copy(self, histograms: bool = True) -> None:
        for family, sample in self._samples():
            if family.type == "histogram" and not histograms:
                continue
            key = sample.name, *sorted(sample.labels.items())
            if key not in self._shown:
                self._shown[key] = self._made(family, sample), 0.0
            metric, before = self._shown[key]
            if sample.value != before:
                if family.type == "gauge":
                    metric.set(sample.value)
                else:  # counters, and the counters that a histogram is
                    metric.increment(sample.value - before)
                self._shown[key] = metric, sample.value

    def _samples(self) -> Iterator[tuple[Metric, Sample]]:
        for family in self._registry.collect():
            for sample in family.samples:
                yield family, sample

    def _made(self, family: Metric, sample: Sample) -> Any:
        if sample.name not in self._families:
            kind = pb.MetricFamily.GAUGE if family.type == "gauge" else pb.MetricFamily.COUNTER
            self._families[sample.name] = pb.MetricFamily(sample.name, family.documentation, kind)
        return self._families[sample.name].Metric(labels=self._labels | sample.labels)

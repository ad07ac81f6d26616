"""TensorRT's own progress, as it reaches a caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..export import exporter
from ..export.graph import Progress


class StderrProgress(exporter.StderrProgress):
    """As an export's; `done` and `total` are steps of a phase of TensorRT."""

    def line(self, p: Progress) -> str:
        minutes, seconds = divmod(int(p.seconds), 60)
        return f"{p.text[:80]:40} {p.done / p.total:4.0%}, {minutes}:{seconds:02}"


def monitor(trt: Any, engine: str, tell: Callable[[Progress], None], stop: threading.Event) -> Any:
    """A TensorRT progress monitor: tells "engine: outer phase · inner phase"; `stop` ends the build.

    TensorRT calls it from several threads. What `tell` raises ends the build too, and lies in `failed`.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}  # name → parent, steps
            self.failed: BaseException | None = None
            self.lock = threading.Lock()
            self.start = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name] = (parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                names: list[str] = []
                at: str | None = phase_name
                while at in self.phases and at not in names:
                    names.insert(0, at)
                    at = self.phases[at][0]
                total = self.phases.get(phase_name, (None, 0))[1]
                try:
                    if total:
                        seconds = time.monotonic() - self.start
                        tell(Progress(f"{engine}: {' · '.join(names)}", step + 1, total, seconds))
                except BaseException as e:  # it would be lost in TensorRT
                    self.failed = self.failed or e
                return self.failed is None and not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.pop(phase_name, None)

    return Monitor()

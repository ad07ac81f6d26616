"""`--openai-port`: our HTTP server, all endpoints, in front of a Triton server that holds the model."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import threading
import time
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ...export.bundle import Bundle
from ...pipeline import Pipeline
from ..engine import Stats
from ..media import MediaPolicy
from ..server import lifecycle
from ..server.metrics import COUNTERS, GAUGES
from ..server.settings import Settings
from ..service import Service
from ..triton_client import TritonPipeline
from .launch import Tritonserver

SECONDS = 0.25  # between two looks at Triton's metrics
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever HTTP_PROXY says


def run(triton: Tritonserver, bundle: Bundle, settings: Settings, port: int, quiet: bool = False) -> None:
    """Until a signal; 0 takes a free port. `settings`: those of the models, and of the HTTP server.

    Raises UserError when the port is in use, what ended Triton when that ends.
    """
    settings = dataclasses.replace(settings, checkpoint_path=str(bundle.path), start_port=port)
    lifecycle.serve(Front(settings, bundle, triton), quiet)


class Front(lifecycle.Server):
    """The same server, whose pipeline is Triton's model. It ends when Triton or a model of it does."""

    def __init__(self, settings: Settings, bundle: Bundle, triton: Tritonserver):
        super().__init__(Service(settings))
        self._bundle, self._triton = bundle, triton

    def open(self) -> Pipeline:
        # what clients name as pictures is Triton's to fetch, or to refuse
        policy = MediaPolicy(allow_local=False)
        pipeline = TritonPipeline(self._triton.grpc, bundle=self._bundle, media_policy=policy)
        longest = self.service.settings.max_seq_len or self._bundle.model.max_seq_len
        engine: Any = RemoteEngine(self._triton.metrics, longest)
        pipeline.model.engine = engine
        return pipeline

    def abort(self, code: int) -> None:
        self._triton.stop(0)
        super().abort(code)

    async def on_tick(self, counter: int) -> bool:
        ended = self._triton.process.poll() is not None or self._triton.lost()
        if ended and self.error is None:
            self.error = self._triton.reason()
        return self.error is not None or await super().on_tick(counter)


class RemoteEngine:
    """What the HTTP server wants to know of an engine, from the metrics of the Triton server that has it.

    `slot_tokens`: of the longest sequence.
    """

    def __init__(self, metrics: str, longest: int):
        self.backend = self  # it is asked for slot_tokens only
        self.observer: Any = None
        self._url = f"http://{metrics}/metrics"
        self._longest = longest
        self._stats = self._read() or Stats()
        threading.Thread(target=self._follow, name="triton-metrics", daemon=True).start()

    @property
    def slot_tokens(self) -> int:
        return min(self._longest, 16 * self._stats.blocks or self._longest)

    def stats(self) -> Stats:
        """As it was at most half a second ago."""
        return self._stats

    def _follow(self) -> None:
        while True:
            time.sleep(SECONDS)
            self._stats = self._read() or self._stats

    def _read(self) -> Stats | None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            with DIRECT.open(self._url, timeout=5) as response:
                families = text_string_to_metric_families(response.read().decode())
            found = {sample.name: sample.value for family in families for sample in family.samples}
            names = {field: f"rtp_llm_{name}" for field, (name, _) in GAUGES.items()}
            names |= {field: f"rtp_llm_{name}_total" for field, (name, _) in COUNTERS.items()}
            return Stats(**{field: int(found.get(name, 0)) for field, name in names.items()})
        return None

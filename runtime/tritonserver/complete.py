"""Triton's model `vlm_complete`: a whole answer of `vlm` as the one response of a request."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ...errors import RtpLlmError
from ..server import logs
from ..service import pool
from ..strict_json import dumps
from . import codes
from .cancellation import Sender, Watch
from .tensors import OUTPUTS, failure, loading, parameters_of, sampling_parameters, settings_of

REFUSED = 8  # threads beyond the limit, for requests that vlm refuses


class VlmComplete:
    """The methods that the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        with loading():
            settings, _ = settings_of(args["model_config"])
        logs.setup(settings.json_logs)
        self._pool = pool(settings.concurrency_limit + REFUSED, "complete")
        self._watch = Watch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._pool.submit(self._serve, request, Sender(request))

    def finalize(self) -> None:
        self._watch.close()
        self._pool.shutdown()

    def _serve(self, request: Any, sender: Sender) -> None:
        try:
            response = self._answer(request, sender)
        except RtpLlmError as e:
            response = failure(codes.message_of(e))
        except Exception as e:  # pb raises its own kinds
            response = failure(f"500_UNKNOWN_ERROR: vlm: {e}")
        sender.finish(response)

    def _answer(self, request: Any, sender: Sender) -> Any:
        name = uuid.uuid4().hex  # nobody can guess it, and so stop it
        stop = pb.Tensor("stop", np.array([True]))
        inputs, parameters = request.inputs(), parameters_of(request)
        if numbers := {k: v for k, v in parameters.items() if isinstance(v, float)}:
            # a request to another model takes none among its parameters
            config = sampling_parameters({t.name(): t.as_numpy() for t in inputs}) | numbers
            inputs = [t for t in inputs if t.name() != "sampling_parameters"]
            inputs.append(pb.Tensor("sampling_parameters", np.array([dumps(config)], object)))
        whole = pb.InferenceRequest(
            model_name="vlm",
            request_id=name,
            requested_output_names=list(OUTPUTS),
            inputs=[*inputs, pb.Tensor("stream", np.array([False]))],
            parameters={k: v for k, v in parameters.items() if k not in numbers},
        )

        def gone() -> None:  # a request that Triton has begun for another model cannot be cancelled
            ask = pb.InferenceRequest(
                model_name="vlm", request_id=name, requested_output_names=["text_output"], inputs=[stop]
            )
            for _ in ask.exec(decoupled=True):
                pass

        if sender.is_cancelled():
            return failure(codes.CANCELLED)
        self._watch.begin(sender, gone)
        try:
            responses = [r for r in whole.exec(decoupled=True) if r.has_error() or r.output_tensors()]
        finally:
            self._watch.end(sender)
        if responses[-1].has_error():
            return failure(responses[-1].error().message())
        return pb.InferenceResponse(responses[-1].output_tensors())

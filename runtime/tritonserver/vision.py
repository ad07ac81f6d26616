"""Triton's models `vision_preprocess` and `vision_tower`: a picture → pixels → what the decoder reads."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ...errors import InternalError, RtpLlmError, VisionFailed
from ...export.bundle import Bundle
from ...export.bundle import read as read_bundle
from ..backends import open_backend
from ..backends.onnx import physical_cores
from ..media import fetch_all
from ..preprocess import preprocess
from ..server import logs
from ..server.settings import Settings
from . import codes
from .cancellation import Sender
from .tensors import failure, image_source, loading, settings_of

log = logging.getLogger(__name__)
THREADS = 8  # that decode; more wait in Triton's queue


class Preprocess:
    """image STRING [n, 1] → pixels UINT8 [n, size, size, 3], image_embeds_fingerprint STRING [n, 1]."""

    def initialize(self, args: dict[str, str]) -> None:
        settings, bundle = _opened(args)
        self._policy, self._vision = settings.media_policy(), bundle.vision
        self._fingerprint = bundle.origin.fingerprint.encode()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="preprocess")
        self._room = threading.Semaphore(THREADS)

    def execute(self, requests: list[Any]) -> None:
        """Responses come from the pool's threads, so that a large picture holds up nobody else's."""
        for request in requests:
            images = list(pb.get_input_tensor_by_name(request, "image").as_numpy().flat)
            self._room.acquire()
            self._pool.submit(self._answer, images, Sender(request))

    def finalize(self) -> None:
        self._pool.shutdown()

    def _answer(self, images: list[bytes], sender: Sender) -> None:
        response = failure(codes.CANCELLED)
        try:
            if not sender.is_cancelled():
                response = self._pixels(images)
        except BaseException as e:
            response = failure(_message(e))
        finally:
            self._room.release()
            sender.finish(response)

    def _pixels(self, images: list[bytes]) -> Any:
        sources = [image_source(data) for data in images]
        pixels = fetch_all(sources, self._policy, partial(preprocess, spec=self._vision))
        prints = np.full((len(pixels), 1), self._fingerprint, object)
        return pb.InferenceResponse(
            [pb.Tensor("pixels", np.stack(pixels)), pb.Tensor("image_embeds_fingerprint", prints)]
        )


class Tower:
    """pixels UINT8 [n, size, size, 3] → image_embeds FP32 [n, tokens, hidden]; the decoder stays closed."""

    def initialize(self, args: dict[str, str]) -> None:
        settings, bundle = _opened(args)
        groups = json.loads(args["model_config"])["instance_group"]
        threads = max(1, physical_cores() // sum(group["count"] for group in groups))
        options = dataclasses.replace(
            settings.model_config().options,
            graphs=("vision",), threads=threads if bundle.model.attention == "gqa" else None,
        )  # fmt: skip
        with loading():
            self._backend = open_backend(bundle, options)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run for all of them."""
        pixels = [pb.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        try:
            rows = self._backend.encode(np.concatenate(pixels))
        except BaseException as e:
            error = e if isinstance(e, RtpLlmError) else VisionFailed(f"vision graph: {e}")
            return [failure(_message(error)) for _ in requests]
        cuts = np.cumsum([len(one) for one in pixels])[:-1]
        return [pb.InferenceResponse([pb.Tensor("image_embeds", part)]) for part in np.split(rows, cuts)]

    def finalize(self) -> None:
        self._backend.close()


def _opened(args: dict[str, str]) -> tuple[Settings, Bundle]:
    with loading():
        settings, parameters = settings_of(args["model_config"])
        bundle = read_bundle(parameters["bundle"])
    logs.setup(settings.json_logs)
    return settings, bundle


def _message(error: BaseException) -> str:
    """What a client may read: of our own failures only their kind."""
    if isinstance(error, RtpLlmError) and error.status < 500:
        return codes.message_of(error)
    log.error("a picture could not be encoded", exc_info=error)
    kind = type(error) if isinstance(error, RtpLlmError) else InternalError
    return codes.message_of(kind("internal error; the server's log has it"))

"""Pictures that a `vision_tower` encodes: of this server (by BLS), or of another one (by gRPC)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...errors import MissingDependency, VisionFailed
from ...export.bundle import Bundle
from ..engine import Encode
from .repository import max_image_batch

TOWER = "vision_tower"
DEADLINE = 120.0  # s for what is encoded at once: a CPU takes seconds for a picture
PARALLEL = 8  # requests at once: towers and their instances share them
MESSAGE = 64 << 20  # bytes of pixels, or of what they become, in one gRPC message
SERVICE = {  # a Service without an address of its own names all pods: each gets its share
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {  # a pod that goes away; nothing is lost by encoding a picture again
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

Batch = Callable[[], int]  # pictures that the tower takes at once


def remote_encode(where: str, bundle: Bundle, deadline: float = DEADLINE) -> Encode:
    """What encodes pictures at `where`: "separate" (this server) or HOST:PORT; for ModelConfig.encode.

    Nothing is connected to yet: a tower may come later, go away and return. The function raises VisionFailed
    when there is none, when it is another model's, and after `deadline` s. Raises MissingDependency without
    tritonclient.
    """
    vision = bundle.vision
    batch, infer = _here(bundle) if where == "separate" else _elsewhere(where, bundle, deadline)
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="remote-vision")

    def encode(pixels: np.ndarray) -> np.ndarray:
        try:
            size = batch()
            parts = [pixels[i : i + size] for i in range(0, len(pixels), size)]
            rows = np.concatenate(list(pool.map(infer, parts, timeout=deadline)))
        except VisionFailed:
            raise
        except TimeoutError as e:
            raise VisionFailed(f"{TOWER} ({where}) gave no answer within {deadline:g} s") from e
        except Exception as e:
            raise VisionFailed(f"{TOWER} ({where}): {e}") from e
        wanted = (len(pixels), vision.tokens, vision.hidden_size)
        if rows.shape != wanted or rows.dtype != np.float32:
            raise VisionFailed(
                f"{TOWER} ({where}) gave {rows.dtype} {list(rows.shape)}, expected float32 {list(wanted)}"
            )
        return rows

    return encode


def _here(bundle: Bundle) -> tuple[Batch, Encode]:
    import triton_python_backend_utils as pb

    def infer(pixels: np.ndarray) -> np.ndarray:
        response = pb.InferenceRequest(
            model_name=TOWER,
            requested_output_names=["image_embeds"],
            inputs=[pb.Tensor("pixels", pixels)],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise VisionFailed(response.error().message())
        # a copy: the tensor's memory is the response's
        return np.array(pb.get_output_tensor_by_name(response, "image_embeds").as_numpy())

    return lambda: max_image_batch(bundle), infer


def _elsewhere(where: str, bundle: Bundle, deadline: float) -> tuple[Batch, Encode]:
    try:
        import tritonclient.grpc as grpc
    except ImportError as e:
        raise MissingDependency(
            f"vision={where} needs tritonclient: pip install 'vlmbundle[triton]'"
        ) from e
    vision = bundle.vision
    each = max(3 * vision.size**2, 4 * vision.tokens * vision.hidden_size)
    most = max(MESSAGE, each) + (1 << 20)
    options = {
        "grpc.max_send_message_length": most,
        "grpc.max_receive_message_length": most,
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.min_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2000,
        "grpc.service_config": json.dumps(SERVICE),
    }
    client = grpc.InferenceServerClient(where, channel_args=list(options.items()))
    lock = threading.Lock()
    known = 0  # pictures that it takes at once; 0: ask it, since it may be another one by now

    def batch() -> int:
        nonlocal known
        with lock:
            if not known:
                config = client.get_model_config(TOWER, client_timeout=deadline).config
                theirs = config.parameters["fingerprint"].string_value
                if theirs != bundle.origin.fingerprint:
                    raise VisionFailed(
                        f"{TOWER} ({where}) is of checkpoint {theirs or 'unknown'}, this model is of "
                        f"{bundle.origin.fingerprint}: start it on the same bundle"
                    )
                known = max(1, min(config.max_batch_size, MESSAGE // each))
            return known

    def infer(pixels: np.ndarray) -> np.ndarray:
        nonlocal known
        tensor = grpc.InferInput("pixels", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels)
        wanted = [grpc.InferRequestedOutput("image_embeds")]
        try:
            rows = client.infer(TOWER, [tensor], outputs=wanted, client_timeout=deadline)
        except BaseException:
            known = 0
            raise
        found: np.ndarray = rows.as_numpy("image_embeds")
        return found

    return batch, infer

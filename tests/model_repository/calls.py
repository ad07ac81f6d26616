"""A client's calls as tritonclient makes them, and what the Pipeline answers to the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import queue
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
import tritonclient.grpc as grpc
import tritonclient.http as http

from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.tritonserver.launch import Tritonserver

SECONDS = 60.0  # no call of a test takes so long
LONG = {"ignore_eos": True, "max_new_tokens": 8000}  # seconds of tokens, for who means to interrupt
TYPES = {
    np.dtype(object): "BYTES", np.dtype(bool): "BOOL",
    np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64",
}  # fmt: skip


def tensors(client: Any, values: dict[str, Any]) -> list[Any]:
    """Inputs for `client`, tritonclient.grpc or .http; dicts, and lists of dicts, become JSON."""
    inputs = []
    for name, value in values.items():
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
            value = json.dumps(value)
        if isinstance(value, bool):
            array = np.array([value])
        elif isinstance(value, np.ndarray):
            array = value
        else:
            items = value if isinstance(value, list) else [value]
            array = np.array([i.encode() if isinstance(i, str) else i for i in items], object)
        tensor = client.InferInput(name, list(array.shape), TYPES[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


@dataclasses.dataclass
class Answers:
    """The n answers of one request."""

    texts: list[str]
    ids: list[list[int]]
    reasons: list[str]
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    responses: int = 1

    def __eq__(self, other: object) -> bool:
        """Of two answers to one request; times differ, and how it was cut into responses."""
        mine, its = ((a.texts, a.ids, a.reasons, _tokens(a.usage)) for a in (self, other))  # type: ignore[attr-defined]
        return mine == its


def _tokens(usage: dict[str, Any]) -> list[Any]:
    return [usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")]


def joined(results: list[Any]) -> Answers:
    """The responses of one request, in order."""
    found: Answers | None = None
    for result in results:
        text, ids, reason, usage, details = (
            result.as_numpy(name)
            for name in ("text_output", "token_ids", "finish_reason", "usage", "details")
        )
        if found is None:
            found = Answers([""] * len(text), [[] for _ in text], [""] * len(text), responses=len(results))
        for i in range(len(text)):
            found.texts[i] += text[i].decode()
            found.ids[i] += [int(t) for t in ids[i] if t >= 0]
            found.reasons[i] = reason[i].decode()
        last = result is results[-1]
        assert (usage is not None) == last
        found.usage = json.loads(usage[0]) if last else {}
        new = json.loads(details[0]) if details is not None and details[0] else []
        found.details = found.details or [{} for _ in new]
        for old, one in zip(found.details, new, strict=bool(new)):
            logprobs = old.get("logprobs", []) + one.pop("logprobs", [])  # they come as tokens do
            old |= one | ({"logprobs": logprobs} if logprobs else {})
    assert found is not None
    return found


class Stream:
    """One gRPC stream with any number of requests in it."""

    def __init__(self, server: Tritonserver, headers: dict[str, str] | None = None, **more: Any):
        self.client = grpc.InferenceServerClient(server.grpc)
        self._events: queue.Queue[Any] = queue.Queue()
        self.running = 0  # requests whose last response has not come
        put = self._events.put
        self.client.start_stream(lambda result, error: put((result, error)), headers=headers, **more)

    def ask(self, request_id: str, model: str = "vlm", parameters: Any = None, **values: Any) -> None:
        self.running += 1
        self.client.async_stream_infer(
            model, tensors(grpc, values), request_id=request_id, parameters=parameters,
            enable_empty_final_response=True,
        )  # fmt: skip

    def next(self) -> Any:
        """(the response, whether it is its request's last). Raises InferenceServerException."""
        result, error = self._events.get(timeout=SECONDS)
        if error is not None:
            self.running -= 1
            raise error
        final = result.get_response().parameters["triton_final_response"].bool_param
        self.running -= final
        return result, final

    def all(self, count: int) -> dict[str, Answers]:
        """The answers of `count` requests, by request id."""
        results: dict[str, list[Any]] = {}
        done = 0
        while done < count:
            result, final = self.next()
            results.setdefault(result.get_response().id, []).append(result)
            done += final
        return {name: joined(found) for name, found in results.items()}

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


@contextmanager
def stream(server: Tritonserver, **more: Any) -> Iterator[Stream]:
    opened = Stream(server, **more)
    try:
        yield opened
    finally:
        # Triton 2.51 may never let go of a request that is cancelled in the moment of its end, and so not
        # of its model either, when that is unloaded
        opened.close(cancel=opened.running > 0)


def streamed(server: Tritonserver, **values: Any) -> Answers:
    with stream(server) as one:
        one.ask("one", **values)
        return one.all(1)["one"]


def over_http(
    server: Tritonserver, model: str = "vlm_complete", parameters: Any = None, **values: Any
) -> Answers:
    """/infer with tensors."""
    with http.InferenceServerClient(server.http, network_timeout=SECONDS) as client:
        return joined([client.infer(model, tensors(http, values), parameters=parameters)])


def over_grpc(server: Tritonserver, model: str = "vlm_complete", **values: Any) -> Answers:
    with grpc.InferenceServerClient(server.grpc) as client:
        return joined([client.infer(model, tensors(grpc, values), client_timeout=SECONDS)])


def generate(server: Tritonserver, model: str = "vlm_complete", **body: Any) -> requests.Response:
    """/generate with JSON."""
    return requests.post(f"http://{server.http}/v2/models/{model}/generate", json=body, timeout=SECONDS)


def expected(pipeline: Pipeline, values: dict[str, Any]) -> Answers:
    """What the Pipeline says to a request's inputs."""
    config = values.get("sampling_parameters", {}) | {"return_output_ids": True}
    images = [*values.get("image", []), *values.get("image_url", [])]
    if "messages" in values:
        left, messages = iter(images), copy.deepcopy(values["messages"])
        for part in (p for m in messages for p in m["content"] if p == {"type": "image"}):
            part["image"] = next(left)
        responses = pipeline.chat(messages, config)
    else:
        responses = pipeline(values["text_input"], urls=images, generate_config=config)
    last = list(responses)[-1]
    outputs = last.generate_outputs
    prompt, new = outputs[0].aux_info.input_len, sum(o.aux_info.output_len for o in outputs)
    return Answers(
        last.generate_texts,
        [o.output_ids or [] for o in outputs],
        [o.finish_reason or "" for o in outputs],
        {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    )


def metric(server: Tritonserver, name: str, **labels: str) -> float:
    """Sum of a metric's series on Triton's /metrics, those with all of `labels`.

    Each metric is copied there by itself, one after another: wait (`until`) for each.
    """
    text = requests.get(f"http://{server.metrics}/metrics", timeout=SECONDS).text
    series = re.findall(rf"^{name}({{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    found = [float(v) for own, v in series if all(f'{k}="{label}"' in own for k, label in labels.items())]
    assert found, name
    return sum(found)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for a condition; fails when it does not come true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def idle(server: Tritonserver) -> bool:
    """Is no request in work, and no slot or cache block held by one?"""
    names = ("requests_in_flight", "sequences_running", "sequences_waiting", "cache_blocks_running")
    return not any(metric(server, f"rtp_llm_{name}") for name in names)

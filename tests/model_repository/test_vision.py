"""The image encoder as models of its own: alone, beside the language model, and in another server."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from rtp_llm.errors import VisionFailed
from rtp_llm.export.bundle import read
from rtp_llm.model_factory import ModelFactory
from rtp_llm.pipeline import Pipeline
from rtp_llm.runtime.media import MediaPolicy, fetch
from rtp_llm.runtime.preprocess import preprocess
from rtp_llm.runtime.tritonserver.launch import Tritonserver
from rtp_llm.runtime.tritonserver.remote_vision import remote_encode

from .calls import SECONDS, expected, over_grpc, over_http, streamed, until

IMAGES = Path(__file__).parents[1] / "images"
NAMES = ("red_circle", "blue_star", "yellow_square", "green_triangle")
FILES = [(IMAGES / f"{name}.png").read_bytes() for name in NAMES]
GREEDY = {"top_k": 1, "max_new_tokens": 16}


@pytest.fixture(scope="module", params=["qwen", "llava"])
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_bundle")


@pytest.fixture(scope="module")
def tower(serve, bundle):
    return serve(bundle, vision="only")


@pytest.fixture(scope="module")
def pipeline(bundle):
    with Pipeline(ModelFactory.from_huggingface(bundle)) as pipeline:
        yield pipeline


def pixels_of(data: bytes, bundle: Path) -> np.ndarray:
    return preprocess(fetch(data, MediaPolicy()), read(bundle).vision)


def encoded(server: Any, *files: bytes) -> tuple[np.ndarray, list[bytes]]:
    """image_embeds and fingerprints by gRPC, the files as one request."""
    with grpc.InferenceServerClient(server.grpc) as client:
        image = grpc.InferInput("image", [len(files), 1], "BYTES")
        image.set_data_from_numpy(np.array(files, object)[:, None])
        result = client.infer("vision_encoder", [image], client_timeout=SECONDS)
    return result.as_numpy("image_embeds"), list(result.as_numpy("image_embeds_fingerprint").flat)


def statistics(server: Any, model: str) -> dict[str, Any]:
    answer = requests.get(f"http://{server.http}/v2/models/{model}/stats", timeout=SECONDS).json()
    return answer["model_stats"][0]


def question(pipeline: Pipeline, count: int = 1) -> str:
    return f"{pipeline.model.bundle.prompt.image.tags[0]}\n" * count + "What is this?"


# ---------------------------------------------------------------------------------- by itself


def test_vision_encoder_gives_what_the_backend_makes_of_the_picture(tower, bundle, pipeline):
    want = [pipeline.model.engine.backend.encode(pixels_of(f, bundle)[None])[0] for f in FILES]
    rows, prints = encoded(tower, *FILES)
    assert rows.dtype == np.float32 and (rows == want).all()
    assert prints == [read(bundle).origin.fingerprint.encode()] * len(FILES)
    with http.InferenceServerClient(tower.http, network_timeout=SECONDS) as client:
        image = http.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[base64.b64encode(FILES[1])]], object))
        over_http = client.infer("vision_encoder", [image]).as_numpy("image_embeds")
    assert (over_http == want[1]).all()


def test_pictures_of_several_clients_go_through_the_graph_together(tower):
    alone = [encoded(tower, f)[0] for f in FILES]
    for _ in range(5):  # on a busy machine they may come one by one
        pictures, runs = _at_once(tower, alone)
        assert pictures == 64
        if runs < 64:
            return
    raise AssertionError("64 pictures, each in a run of its own")


def _at_once(tower: Any, alone: list[np.ndarray]) -> tuple[int, int]:
    """64 pictures asked for at once → pictures encoded, runs of the graph."""
    before = _counted(tower)
    clients = [grpc.InferenceServerClient(tower.grpc) for _ in range(4)]
    asked = []
    for i in range(64):  # all of them are there before the first is done
        image = grpc.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[FILES[i % 4]]], object))
        answer: Future[Any] = Future()
        asked.append(answer)
        clients[i % 4].async_infer(
            "vision_encoder",
            [image],
            lambda result, error, f=answer: f.set_exception(error) if error else f.set_result(result),
            client_timeout=SECONDS,
        )
    for i, one in enumerate(asked):
        rows = one.result(SECONDS).as_numpy("image_embeds")
        assert (rows == alone[i % 4]).all(), "nobody's are mixed up"
    for client in clients:
        client.close()
    pictures, runs = (b - a for a, b in zip(before, _counted(tower), strict=True))
    return pictures, runs


def _counted(tower: Any) -> list[int]:
    """Pictures encoded and runs of the graph, once they grow no more: Triton counts after it answers."""
    found: list[int] = []
    while True:
        last, now = found, statistics(tower, "vision_tower")
        found = [now[key] for key in ("inference_count", "execution_count")]
        if found == last:
            return found
        time.sleep(0.5)


def test_what_cannot_be_read_fails_its_own_request_alone(tower):
    bad = {
        b"<html>not found</html>": "90[35]_MM",
        FILES[0][:100]: "903_MM_PROCESS_ERROR",
        b"": "90[35]_MM",
        b"/etc/passwd": "90[35]_MM",
    }
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(encoded, tower, f) for f in FILES]
        wrong = {data: pool.submit(encoded, tower, data) for data in bad}
        for data, one in wrong.items():
            with pytest.raises(InferenceServerException, match=bad[data]) as e:
                one.result()
            assert e.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert all(np.isfinite(one.result()[0]).all() for one in good)


def without(graph: str, bundle: Path, folder: Path) -> Path:
    """A copy of the bundle that nobody can open this graph of."""
    shutil.copytree(bundle, folder)
    for file in folder.glob(f"{graph}.*"):
        file.write_bytes(bytes(file.stat().st_size))
    return folder


@pytest.mark.slow
def test_the_tower_does_not_open_the_decoder(serve, bundle, tower, tmp_path):
    server = serve(without("decoder", bundle, tmp_path / "b"), vision="only", own=True)
    assert (encoded(server, *FILES)[0] == encoded(tower, *FILES)[0]).all()
    server.stop()


# ---------------------------------------------------------------------------------- for the language model


@pytest.fixture(params=["separate", "another server"])
def beside(request, serve, bundle):
    if request.param == "separate":
        return serve(bundle, vision="separate", settings={"allow_image_embeds": "1"})
    return serve(bundle, vision=request.getfixturevalue("tower").grpc)


def test_answers_are_the_same_with_a_tower_of_their_own(beside, pipeline):
    one = {"text_input": question(pipeline), "image": FILES[:1], "sampling_parameters": GREEDY}
    three = {"text_input": question(pipeline, 3), "image": FILES[1:], "sampling_parameters": GREEDY}
    text = {"text_input": "Name a colour.", "sampling_parameters": GREEDY | {"ignore_eos": True}}
    wants = [expected(pipeline, case) for case in (one, three, text)]
    assert all(want.ids for want in wants)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda case: streamed(beside, **case), (one, three, text))) == wants
    assert over_http(beside, **one) == wants[0]
    assert over_grpc(beside, **three) == wants[1]


def test_embeddings_of_vision_encoder_stand_for_the_picture(serve, bundle, pipeline):
    server = serve(bundle, vision="separate", settings={"allow_image_embeds": "1"})
    rows, prints = encoded(server, *FILES[:2])
    case = {"text_input": question(pipeline, 2), "sampling_parameters": GREEDY}
    given = case | {"image_embeds": rows, "image_embeds_fingerprint": [prints[0]]}
    want = expected(pipeline, case | {"image": FILES[:2]})
    assert streamed(server, **given) == want
    assert over_grpc(server, **given) == want
    for wrong, message in (
        ({"image_embeds_fingerprint": ["of another"]}, "902_.*image_embeds_fingerprint is 'of another'"),
        ({"image_embeds": rows[:1]}, "902_.*2 image tags, 1 image was given"),
        ({"image_embeds": rows[:, 1:]}, "902_.*image_embeds has shape"),
        ({"image_embeds": np.full_like(rows, np.nan)}, "902_.*image 1 of 2 holds NaN"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            over_grpc(server, **(given | wrong))


@pytest.mark.slow
def test_the_language_model_does_not_open_the_vision_graph_where_a_tower_encodes(
    serve, bundle, tower, pipeline, tmp_path
):
    case = {"text_input": question(pipeline), "image": FILES[:1], "sampling_parameters": GREEDY}
    server = serve(without("vision", bundle, tmp_path / "b"), vision=tower.grpc, own=True)
    assert streamed(server, **case) == expected(pipeline, case)
    server.stop()


@pytest.mark.slow
def test_a_dead_tower_is_a_907_of_pictures_alone_and_heals(serve, qwen_bundle):
    tower = serve(qwen_bundle, vision="only", own=True)
    port = tower.grpc_port
    server = serve(qwen_bundle, vision=tower.grpc, own=True)
    prompt = {"text_input": "Picture 1:<img/>\nWhat is this?", "sampling_parameters": GREEDY}
    want = streamed(server, **prompt, image=FILES[:1])
    tower.stop()
    with pytest.raises(InferenceServerException, match="907_MM_ENGINE_ERROR"):
        streamed(server, **prompt, image=FILES[1:2])
    assert streamed(server, **prompt, image=FILES[:1]) == want, "it is known already"
    streamed(server, text_input="Hello", sampling_parameters=GREEDY)
    with Tritonserver(tower.repository, grpc_port=port, binary=tower.binary):

        def answers() -> bool:
            try:
                return bool(streamed(server, **prompt, image=FILES[1:2]).ids)
            except InferenceServerException:
                return False

        until(answers)
    server.stop()


# ---------------------------------------------------------------------------------- the way there


@pytest.mark.slow
def test_connections_that_end_by_their_age_lose_no_picture(serve, qwen_bundle):
    """As deploy/kubernetes/tower.yaml has it, so that added pods are found."""
    tower = serve(qwen_bundle, vision="only", extra=["--grpc-max-connection-age=200"])
    encode = remote_encode(tower.grpc, read(qwen_bundle))
    pixels = np.stack([pixels_of(FILES[i % 4], qwen_bundle) for i in range(12)])
    want = encode(pixels)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        assert (encode(pixels) == want).all()


@pytest.mark.slow
def test_a_tower_that_hangs_is_told_after_the_deadline(serve, qwen_bundle):
    tower = serve(qwen_bundle, vision="only", own=True)
    encode = remote_encode(tower.grpc, read(qwen_bundle), deadline=2)
    pixels = pixels_of(FILES[0], qwen_bundle)[None]
    want = encode(pixels)
    os.killpg(tower.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(VisionFailed, match="vision_tower"):
            encode(pixels)
    finally:
        os.killpg(tower.process.pid, signal.SIGCONT)
    assert 1.5 < time.monotonic() - began < 10
    assert (encode(pixels) == want).all()
    tower.stop()


def test_a_tower_elsewhere_encodes_as_the_backend_does_in_batches_it_takes(tower, bundle, pipeline):
    encode = remote_encode(tower.grpc, read(bundle))
    pixels = np.stack([pixels_of(FILES[i % 4], bundle) for i in range(19)])  # more than it takes at once
    assert (encode(pixels) == pipeline.model.engine.backend.encode(pixels)).all()


def test_a_tower_of_another_model_is_told_apart(tower, bundle, request):
    other = "llava_bundle" if "qwen" in str(bundle) else "qwen_bundle"
    encode = remote_encode(tower.grpc, read(request.getfixturevalue(other)))
    with pytest.raises(VisionFailed, match="start it on the same bundle"):
        encode(np.zeros((1, 96, 96, 3), np.uint8))


def test_no_tower_is_told_at_once(bundle):
    encode = remote_encode("127.0.0.1:9", read(bundle))
    with pytest.raises(VisionFailed, match=r"vision_tower \(127.0.0.1:9\)"):
        encode(np.zeros((1, 96, 96, 3), np.uint8))

"""TorchScript answers what ONNX Runtime answers, both in float32 on a CPU."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from rtp_llm.errors import BundleError, UserError, VisionGraphMissing  # noqa: E402
from rtp_llm.export import bundle as bundles  # noqa: E402
from rtp_llm.export.bundle import Bundle  # noqa: E402
from rtp_llm.export.exporter import export  # noqa: E402
from rtp_llm.runtime.backends import Options, open_backend  # noqa: E402
from rtp_llm.runtime.backends.onnx import OnnxBackend  # noqa: E402
from rtp_llm.runtime.backends.torchscript import TorchScriptBackend  # noqa: E402

from .answers import assert_equal_answers, opened, requests  # noqa: E402


@pytest.fixture(scope="module", params=["qwen", "llava"])
def both(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Bundle, Bundle]:
    """TorchScript's bundle and ONNX Runtime's of one checkpoint."""
    checkpoint = request.getfixturevalue(f"sample_{request.param}")
    script = tmp_path_factory.mktemp("torchscript") / request.param
    gqa = bundles.read(request.getfixturevalue(f"{request.param}_bundle"))
    return export(checkpoint, script, backend="torchscript", precision="fp32"), gqa


@pytest.mark.parametrize("token_budget", [512, 40])
def test_a_mixed_batch_has_the_answers_of_the_onnx_bundle(
    both: tuple[Bundle, Bundle], red_circle: Path, token_budget: int
) -> None:
    script, gqa = both
    asked = requests(script, red_circle.parent)
    answers = []
    for bundle, backend in ((script, TorchScriptBackend(script)), (gqa, OnnxBackend(gqa))):
        with opened(bundle, backend, token_budget) as pipeline:
            answers.append([answer for _, answer in pipeline.batch(asked, in_flight=len(asked))])
    assert_equal_answers(*answers)


def test_a_stream_has_the_same_text_piece_by_piece(
    both: tuple[Bundle, Bundle], red_circle: Path
) -> None:
    script, gqa = both
    asked = requests(script, red_circle.parent)[0]
    streams = []
    for bundle, backend in ((script, TorchScriptBackend(script)), (gqa, OnnxBackend(gqa))):
        with opened(bundle, backend) as pipeline:
            responses = pipeline(asked["prompt"], asked["urls"], generate_config=asked["generate_config"])
            streams.append([r.batch_response[0] for r in responses])
    assert streams[0] == streams[1] and len(streams[0]) > 1


def test_one_graph_can_be_opened_alone_where_the_others_archive_is_rubbish(
    both: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    script, _ = both
    pixels = np.zeros((2, script.vision.size, script.vision.size, 3), np.uint8)
    for graph, other in (("vision", "decoder"), ("decoder", "vision")):
        shutil.copytree(script.path, tmp_path / graph)
        (tmp_path / graph / f"{other}.pt").write_bytes(bytes(script.files[f"{other}.pt"].size))
        half = dataclasses.replace(script, path=tmp_path / graph)
        backend = open_backend(half, Options(device="cpu", graphs=(graph,)))
        if graph == "vision":
            assert (backend.encode(pixels) == TorchScriptBackend(script).encode(pixels)).all()
        else:
            with pytest.raises(VisionGraphMissing, match="left to somebody else"):
                backend.encode(pixels)


def test_an_archive_that_is_none_is_said_in_one_line(both: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    (tmp_path / "decoder.pt").write_bytes(b"no archive")
    with pytest.raises(BundleError, match=r"decoder\.pt cannot be opened by torch ") as caught:
        TorchScriptBackend(dataclasses.replace(both[0], path=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [-1, 10**6])
def test_an_impossible_length_is_refused_by_name(both: tuple[Bundle, Bundle], length: int) -> None:
    limit = both[0].model.max_seq_len
    with pytest.raises(UserError, match=f"max_seq_len={length} must lie between 1 and {limit}"):
        TorchScriptBackend(both[0], max_seq_len=length)


def test_nothing_is_compiled_for_the_shape_of_a_prompt_or_a_picture() -> None:
    """On a GPU torch's fuser would, while requests wait."""
    backend = object.__new__(TorchScriptBackend)
    backend.names = []
    seen: list[bool] = []
    backend._decoder = backend._vision = lambda *_: seen.append(torch._C._get_graph_executor_optimize())
    backend.forward({})
    backend.forward_vision(torch.zeros(1))
    assert seen == [False, False] and torch._C._get_graph_executor_optimize()

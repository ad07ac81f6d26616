"""What Triton's own backends are told of the vision graph is what the graph is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from rtp_llm.export import bundle as bundles
from rtp_llm.export.bundle import Bundle, EngineSpec, TensorSpec
from rtp_llm.export.exporter import export
from rtp_llm.runtime.backends import Options, open_backend
from rtp_llm.runtime.tritonserver.repository import MAX_IMAGE_BATCH, assemble

TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
ALONE = """
import sys, numpy, torch
model = torch.jit.load(sys.argv[1])
assert "rtp_llm" not in sys.modules
print([argument.name for argument in model.forward.schema.arguments[1:]])
numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())
"""


@pytest.fixture(scope="module", params=["qwen", "llava"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"sample_{request.param}")


def tower(repository: Path) -> Any:
    text = (repository / "vision_tower" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def assert_is_the_graph(config: Any, bundle: Bundle) -> None:
    """Names, types and shapes; the graph's first dimension is the batch."""
    graph = bundle.graphs["vision"]
    for told, there in ((config.input, graph.inputs), (config.output, graph.outputs)):
        assert [described(spec) for spec in there] == [
            (t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in told
        ]
    assert config.max_batch_size > 1
    assert list(config.dynamic_batching.preferred_batch_size) == [config.max_batch_size]
    assert config.parameters["fingerprint"].string_value == bundle.origin.fingerprint
    for warmup in config.model_warmup:
        assert list(warmup.inputs["pixels"].dims) == list(config.input[0].dims)


def described(spec: TensorSpec) -> tuple[str, str, list[Any]]:
    assert spec.shape[0] == "N"
    return spec.name, TYPES[spec.dtype], spec.shape[1:]


def test_the_python_towers_config_is_the_graph(qwen_bundle, llava_bundle, tmp_path):
    for path in (qwen_bundle, llava_bundle):
        bundle = bundles.read(path)
        config = tower(assemble(bundle, tmp_path / "m", vision="only", vision_instances=3))
        assert_is_the_graph(config, bundle)
        assert (config.backend, config.max_batch_size) == ("python", MAX_IMAGE_BATCH)
        assert [group.count for group in config.instance_group] == [3]


@pytest.mark.slow
def test_the_torchscript_towers_config_is_the_archive_which_needs_nothing_of_ours(checkpoint, tmp_path):
    bundle = export(checkpoint, tmp_path / "b", backend="torchscript", precision="fp32")
    models = assemble(bundle, tmp_path / "m", vision="only")
    config = tower(models)
    assert_is_the_graph(config, bundle)
    assert config.platform == "pytorch_libtorch"
    side = bundle.vision.size
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    np.save(tmp_path / "in.npy", pixels)
    archive = models / "vision_tower" / "1" / "model.pt"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(archive), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == str([one.name for one in config.input])
    rows = np.load(tmp_path / "out.npy")
    (output,) = config.output
    assert rows.dtype == np.float32 and list(rows.shape) == [5, *output.dims]
    backend = open_backend(bundle, Options(device="cpu", graphs=("vision",)))
    np.testing.assert_allclose(rows, backend.encode(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_tensorrt_towers_config_is_the_graph_and_the_plans_limit(checkpoint, tmp_path):
    bundle = export(checkpoint, tmp_path / "b", backend="tensorrt", precision="bf16")
    (tmp_path / "b" / "new.plan").write_bytes(b"a plan")
    engine = EngineSpec("vision.plan", "H200", "9.0", "10.15", "", {"max_images": 6})
    bundle = bundles.add_engines(bundle, {"vision": engine}, {"vision.plan": tmp_path / "b" / "new.plan"})
    bundle = bundles.read(bundle.path)
    models = assemble(bundle, tmp_path / "m", vision="only", trusted=True)
    config = tower(models)
    assert_is_the_graph(config, bundle)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 6)
    assert (models / "vision_tower" / "1" / "model.plan").read_bytes() == b"a plan"
    # bf16 weights, and yet float32 at the border: bfloat16 could not cross Triton's Python backend
    graph = onnx.load(bundle.read_path(bundle.graphs["vision"].path), load_external_data=False).graph
    for values, told in ((graph.input, config.input), (graph.output, config.output)):
        types = [onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in values]
        assert [(v.name, TYPES[name]) for v, name in zip(values, types, strict=True)] == [
            (t.name, model_config_pb2.DataType.Name(t.data_type)) for t in told
        ]


def test_every_config_of_the_vision_models_is_one(qwen_bundle, tmp_path):
    """Of the others Triton itself says so, in the tests beside this one."""
    models = assemble(bundles.read(qwen_bundle), tmp_path / "m", vision="separate")
    for file in models.glob("vision_*/config.pbtxt"):
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        assert config.name == file.parent.name and config.version_policy.latest.num_versions == 1

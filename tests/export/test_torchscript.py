"""TorchScript archives: what is in them, and what it takes to make and to open them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rtp_llm.export.attention import specs
from rtp_llm.export.bundle import Bundle
from rtp_llm.export.decoder import Decoder, DecoderConfig
from rtp_llm.export.exporter import export
from rtp_llm.export.quantize import swap
from rtp_llm.export.torchscript import PagedOp, Script, example


@pytest.fixture(scope="module")
def bundle(sample_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("torchscript")
    return export(sample_llava, folder / "llava", backend="torchscript", precision="fp32")


def test_the_vision_archive_is_plain_torchscript(bundle: Bundle, llava_bundle: Path, tmp_path: Path):
    """Whoever has libtorch runs it: nothing of this package is imported."""
    import onnxruntime

    side = bundle.vision.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys, numpy, torch; model = torch.jit.load(sys.argv[1]); "
        "out = model(torch.from_numpy(numpy.load(sys.argv[2]))); numpy.save(sys.argv[3], out.numpy()); "
        "assert not [m for m in sys.modules if m.startswith('rtp_llm')]"
    )
    paths = bundle.read_path("vision.pt"), tmp_path / "pixels.npy", tmp_path / "out.npy"
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=tmp_path)
    session = onnxruntime.InferenceSession(llava_bundle / "vision.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(None, {"pixels": pixels})[0]
    found = np.load(tmp_path / "out.npy")
    assert np.abs(found - expected).max() <= 5e-5 * expected.std()


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_no_device_is_baked_into_an_archive(bundle: Bundle, graph: str):
    """Traced on a CPU, it runs on the device that it is opened for."""
    module = torch.jit.load(str(bundle.read_path(f"{graph}.pt")))
    assert "Device = " not in str(module.inlined_graph)


def test_the_decoder_s_archive_returns_logits(bundle: Bundle):
    module = torch.jit.load(str(bundle.read_path("decoder.pt")))
    spec = bundle.graphs["decoder"]
    logits = module(*example(spec.inputs))
    assert [o.name for o in spec.outputs] == ["logits"]
    assert logits.shape == (2, bundle.model.vocab_size) and logits.dtype == torch.float32


@pytest.mark.parametrize("precision, ops", [("bf16", 4), ("fp16", 6), ("fp32", 4)])
def test_a_layer_is_four_products_and_what_is_fused_between_them(precision: str, ops: int):
    """Nothing else that would be a launch on a GPU: 6 launches, as the attention is 3; 8 in float16, whose
    products into the residual stream have scaled operands."""

    def kinds(layers: int) -> Counter[str]:
        c = DecoderConfig(
            97, 64, 96, layers, 4, 2, 16, 64, 1e-6, logn=32, qkv_bias=True, qk_norm=True, mlp_bias=True
        )
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        inputs, _ = specs("paged", c, dtype, metadata=False)
        script = Script(Decoder(c), PagedOp, inputs).requires_grad_(False)
        swap(script, precision, "torchscript")
        graph = torch.jit.trace(script, example(inputs), check_trace=False).inlined_graph
        calls = Counter(
            re.search(r"rtp_llm::(\w+)", str(n))[1] for n in graph.nodes() if n.kind() == "prim::If"
        )
        return calls + Counter(n.kind() for n in graph.nodes() if n.kind().startswith("aten::"))

    more = kinds(3) - kinds(2)
    assert more.pop("aten::linear") == 4 and more.pop("qkv_attention") == 1
    assert more.total() == ops - 1 and set(more) <= {"add_rms_norm", "silu_mul", "token_scaled"}


def test_a_bundle_holds_two_archives_and_no_leftovers(bundle: Bundle):
    assert set(bundle.files) == {"vision.pt", "decoder.pt", "tokenizer.json"}
    assert {f.name for f in bundle.path.iterdir()} == {*bundle.files, "bundle.json"}

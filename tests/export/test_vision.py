"""The encoders give the references' features, train, and export with any number of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rtp_llm.errors import CheckpointError, NotSupportedYet
from rtp_llm.export.vision import (
    CLIP_MEAN,
    CLIP_STD,
    ClipConfig,
    LlavaVision,
    QwenVisual,
    load,
    make_projector,
    normalise,
    resize_positions,
)

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason="shared/goldens is not beside the repository"
)
CLIP = ClipConfig(32, 96, 4, 2, 56, 14)
VISUAL = {"heads": 2, "image_size": 56, "layers": 2, "mlp_ratio": 4.9231, "output_dim": 128}
VISUAL |= {"patch_size": 14, "width": 32, "image_start_id": 870}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.bin"):
        found |= torch.load(file, weights_only=True)
    if shards := list(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        for file in shards:
            found |= load_file(file)
    return found


def some_pixels(n: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)


def worst(name: str, array: str, encode) -> float:
    """Worst difference over a set's images, in the reference's standard deviations."""
    arrays, differences = np.load(GOLDENS / name / "cases.npz"), []
    mean, std = (np.array(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    for key in arrays.files:
        if not (key.startswith("image:") and key.endswith("." + array)):
            continue
        expected = arrays[key]
        values = arrays[key.removesuffix(array) + "pixel_values"]
        pixels = np.rint((values * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
        batch = torch.from_numpy(pixels).unsqueeze(0)
        assert np.abs(normalise(batch)[0].numpy() - values).max() <= 1e-6
        with torch.no_grad():
            found = encode(batch)[0].numpy()
        differences.append(np.abs(found - expected).max() / expected.std())
    assert differences, f"{name} has no image:*.{array}"
    print(f"{name} {array}: {len(differences)} images, worst {max(differences):.1e} deviations")
    return max(differences)


@needs_goldens
@pytest.mark.parametrize("stored_tables", [False, True])
@pytest.mark.parametrize("name", ["qwenvl_A", "qwenvl_C"])
def test_qwen_visual_equals_the_reference(name, stored_tables):
    checkpoint = GOLDENS / name / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())["visual"]
    weights = tensors(checkpoint)
    visual = QwenVisual(**config, stored_tables=stored_tables)
    load(visual, weights, visual.sources())
    assert worst(name, "vit_out", visual.encode) < 5e-6
    assert worst(name, "visual", visual) < 5e-5
    if stored_tables:
        written = visual.checkpoint_tensors()
        prefix = "transformer.visual."
        assert {prefix + name for name in written} == {k for k in weights if k.startswith(prefix)}
        assert all(torch.equal(t, weights[prefix + name].float()) for name, t in written.items())


@needs_goldens
def test_llava_vision_equals_the_original_code():
    root = GOLDENS / "llava_orig_A"
    clip = root / "openai" / "clip-vit-tiny-patch14-56"
    vision = LlavaVision(ClipConfig.from_json(json.loads((clip / "config.json").read_text())), 64)
    load(vision, tensors(clip) | tensors(root / "checkpoint"), vision.sources())
    assert worst("llava_orig_A", "features", vision) < 1e-5


@needs_goldens
def test_llava_vision_equals_transformers():
    checkpoint = GOLDENS / "llava_hf_A" / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())
    vision = LlavaVision(ClipConfig.from_json(config), 64)
    sources = vision.sources("vision_tower.", "multi_modal_projector.", hf=True)
    load(vision, tensors(checkpoint), sources)
    assert worst("llava_hf_A", "features", vision) < 1e-5


def test_select_layer_counts_as_hidden_states_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2
    )
    config.image_size, config.patch_size = 56, 14
    torch.manual_seed(0)
    reference = transformers.CLIPVisionModel(config).eval()
    weights = {
        name if name.startswith("vision_model.") else "vision_model." + name: value
        for name, value in reference.state_dict().items()
    }
    pixels = some_pixels(2, 56)
    with torch.no_grad():
        states = reference(normalise(pixels), output_hidden_states=True).hidden_states
    for layer in (-1, -2, -5, 0, 2, 4, [-2, 1]):
        for keep_cls in (False, True):
            vision = LlavaVision(CLIP, 8, layer, keep_cls, "identity")
            load(vision, weights, vision.sources())
            with torch.no_grad():
                found = vision(pixels)
            chosen = layer if isinstance(layer, list) else [layer]
            expected = torch.cat([states[i] for i in chosen], -1)[:, 0 if keep_cls else 1 :]
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
            assert found.shape[1:] == (vision.tokens, vision.hidden_size)


def test_projectors_have_the_checkpoints_names_and_shapes():
    def shapes(*args, **kwargs):
        return {k: tuple(v.shape) for k, v in make_projector(*args, **kwargs).named_parameters()}

    assert shapes("linear", 3, 5) == {"weight": (5, 3), "bias": (5,)}
    assert shapes("identity", 3, 5) == {}
    assert shapes("mlp1x_gelu", 3, 5, bias=False) == {"0.weight": (5, 3)}
    assert list(shapes("mlp3x_gelu", 3, 5, bias=False)) == ["0.weight", "2.weight", "4.weight"]
    x = torch.randn(4, 3)
    project = make_projector("mlp2x_gelu", 3, 5)
    first, second = project[0], project[2]
    exact = second(torch.nn.functional.gelu(first(x), approximate="none"))
    torch.testing.assert_close(project(x), exact)
    for kind in ("spatial_mlp", "mlp0x_gelu", "mlpx_gelu"):
        with pytest.raises(NotSupportedYet, match=kind):
            make_projector(kind, 3, 5)


def test_linear_projector_is_found_under_its_own_name():
    vision = LlavaVision(CLIP, 8, projector="linear")
    assert vision.sources()["projector.weight"][0] == "model.mm_projector.weight"


def test_what_a_checkpoint_lacks_is_named():
    visual = QwenVisual(**VISUAL)
    prefix = "transformer.visual."
    stored = QwenVisual(**VISUAL, stored_tables=True).checkpoint_tensors()
    weights = {prefix + name: value for name, value in stored.items()}
    load(visual, weights, visual.sources())
    short = weights | {prefix + "proj": torch.zeros(128, 64)}
    with pytest.raises(CheckpointError, match=r"visual\.proj: shape \[128, 64\].*\[128, 128\]"):
        load(visual, short, visual.sources())
    del weights[prefix + "ln_pre.bias"]
    with pytest.raises(CheckpointError, match=r"no tensor transformer\.visual\.ln_pre\.bias"):
        load(visual, weights, visual.sources())
    with pytest.raises(CheckpointError, match="layer -6 does not exist: the tower has 4 layers"):
        LlavaVision(CLIP, 8, -6)
    with pytest.raises(NotSupportedYet, match="'silu'"):
        LlavaVision(ClipConfig(32, 96, 4, 2, 56, 14, "silu"), 8)
    with pytest.raises(ValueError, match="stored_tables"):
        visual.checkpoint_tensors()


def test_positions_of_the_stored_grid_stay_as_they_are():
    table = torch.randn(256, 8)
    assert resize_positions(table, 16) is table
    assert resize_positions(table.half(), 5).dtype == torch.float32
    constant = resize_positions(torch.full((256, 8), 3.0), 7)
    torch.testing.assert_close(constant, torch.full((49, 8), 3.0))


def test_every_parameter_of_a_training_module_gets_a_gradient():
    torch.manual_seed(0)
    visual = QwenVisual(**VISUAL, stored_tables=True)
    visual(some_pixels(2, 56)).square().mean().backward()
    silent = [n for n, p in visual.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    vision = LlavaVision(CLIP, 64)
    vision(some_pixels(2, 56)).square().mean().backward()
    assert all(p.grad is not None for p in vision.parameters())


@pytest.mark.parametrize("make", [lambda: QwenVisual(**VISUAL), lambda: LlavaVision(CLIP, 64)])
def test_export_on_fake_tensors_serves_any_number_of_images(make, tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.manual_seed(0)
    module = make().eval()
    with FakeTensorMode():
        example = torch.zeros(2, 56, 56, 3, dtype=torch.uint8)
        n = torch.export.Dim("n", min=1, max=64)
        program = torch.export.export(make(), (example,), dynamic_shapes=({0: n},))
    assert not program.constants and not program.graph_signature.buffers  # only parameters to fill
    assert set(program.state_dict) == set(dict(module.named_parameters()))
    weights = dict(module.named_parameters())
    for images in (1, 3):
        pixels = some_pixels(images, 56)
        with torch.no_grad():
            found = torch.func.functional_call(program.module(), weights, pixels)
            torch.testing.assert_close(found, module(pixels), rtol=0, atol=1e-5)

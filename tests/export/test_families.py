"""A family finds its parts wherever a checkpoint may hold them, and names what it cannot find."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from rtp_llm.errors import CheckpointError, NotSupportedYet, UnknownArchitecture, UserError
from rtp_llm.export.attention import Eager
from rtp_llm.export.checkpoint import Checkpoint
from rtp_llm.export.decoder import Decoder
from rtp_llm.export.families import COMING, FAMILIES, Options, Plan, detect, generation_defaults, token_ids

LLAVA = ["LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints qwen_vl and llava (its tower inside, as "clip"), one weight file each."""
    file = Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_random_checkpoint", file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("tiny")
    for name, make in script.MODELS.items():
        (folder / name).mkdir()
        make(folder / name, "tiny", 0, quiet=True)
    for index in folder.rglob("*.index.json"):
        index.unlink()
        [weights] = index.parent.glob("*.safetensors")
        weights.rename(index.parent / "model.safetensors")
    return folder


@pytest.fixture
def llava(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "llava", tmp_path / "hub" / "llava"))


@pytest.fixture
def qwen(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "qwen_vl", tmp_path / "hub" / "qwen_vl"))


def plan(folder: Path, **options: Any) -> Plan:
    checkpoint = Checkpoint(folder)
    return FAMILIES[detect(checkpoint.config)[0]].plan(checkpoint, Options(**options))


def configure(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a field away."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def edit(folder: Path, new: dict[str, Tensor], gone: str = "nothing") -> None:
    """Add tensors to model.safetensors, and take those away whose name holds `gone`."""
    file = folder / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items() if gone not in n}
    save_file({**tensors, **new}, file)


def refused(error: type[Exception], *parts: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def vision_of(made: Plan) -> Any:
    """The vision module of a plan, filled."""
    vision = made.make_vision().eval().requires_grad_(False)
    parameters = dict(vision.named_parameters())
    assert set(parameters) == set(made.vision_weights)
    for name, parameter in parameters.items():
        parameter.copy_(made.vision_weights[name].read())
    return vision


def decoder_of(made: Plan) -> Decoder:
    decoder = Decoder(made.decoder).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        made.decoder_weights[name].check()
        parameter.copy_(made.decoder_weights[name].read())
    return decoder


# ---------------------------------------------------------------------------------------------- detect


@pytest.mark.parametrize(
    "config, found",
    [
        ({"architectures": ["QWenLMHeadModel"], "visual": {}}, ("qwen_vl", "QWenLMHeadModel")),
        *(({"architectures": [a]}, ("llava", a)) for a in LLAVA),
        ({"architectures": ["LlavaForConditionalGeneration"]}, ("llava", "LlavaForConditionalGeneration")),
        ({"architectures": ["Other", "LlavaLlamaForCausalLM"]}, ("llava", "LlavaLlamaForCausalLM")),
    ],
)
def test_architectures_are_found_in_the_table(config: dict[str, Any], found: tuple[str, str]):
    assert detect(config) == found


@pytest.mark.parametrize("architecture", COMING)
def test_what_is_coming_says_so(architecture: str):
    call = lambda: detect({"architectures": [architecture]})  # noqa: E731
    refused(NotSupportedYet, architecture, "not supported yet", call=call)


@pytest.mark.parametrize(
    "config, what",
    [
        ({"architectures": ["BertModel"]}, "architecture BertModel is unknown"),
        ({"architectures": ["A", "B"]}, "A, B"),
        ({"architectures": [None]}, "None"),
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"architectures": []}, "model_type None"),
        ({"architectures": None, "model_type": "x"}, "model_type 'x'"),
    ],
)
def test_an_unknown_architecture_lists_the_known_ones(config: dict[str, Any], what: str):
    known = [a for f in FAMILIES.values() for a in f.architectures]
    refused(UnknownArchitecture, what, *known, call=lambda: detect(config))


def test_the_text_only_qwen_is_told_from_qwen_vl():
    call = lambda: detect({"architectures": ["QWenLMHeadModel"]})  # noqa: E731
    refused(UnknownArchitecture, "QWenLMHeadModel", "`visual`", "text-only Qwen", call=call)


def test_generation_fields_are_those_that_the_file_says():
    config = {"top_p": 0.5, "top_k": 0, "do_sample": False, "temperature": None, "chat_format": "x"}
    assert generation_defaults(config) == {"top_p": 0.5, "top_k": 0, "do_sample": False}
    assert (token_ids(None), token_ids(0), token_ids([1, 2])) == ([], [0], [1, 2])


# ----------------------------------------------------------------------------------------- llava: tower


@pytest.mark.parametrize("place", ["inside", "beside", "absolute", "option", "older field"])
def test_the_tower_is_found(place: str, llava: Path, tmp_path: Path):
    tower = llava / "clip"
    options: dict[str, Any] = {}
    if place == "beside":
        tower = tower.rename(llava.parent / "clip")
    elif place == "absolute":
        tower = tower.rename(tmp_path / "my tower")
        configure(llava, mm_vision_tower=str(tower))
    elif place == "option":
        tower = tower.rename(tmp_path / "elsewhere")
        options["vision_tower"] = str(tower)
        configure(llava, mm_vision_tower="openai/clip-vit-large-patch14-336")
    elif place == "older field":
        configure(llava, mm_vision_tower=None, vision_tower="clip")
    made = plan(llava, **options)
    assert made.folders == [llava, tower]
    encoder = [w for n, w in made.vision_weights.items() if not n.startswith("projector.")]
    assert encoder and {w.checkpoint.path for w in encoder} == {tower}


def test_an_option_wins_over_a_tower_that_is_there(llava: Path, tmp_path: Path):
    other = Path(shutil.copytree(llava / "clip", tmp_path / "other"))
    assert plan(llava, vision_tower=str(other)).folders == [llava, other]


def test_a_tower_that_is_not_there_is_named_with_the_flag(llava: Path, monkeypatch: Any):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    configure(llava, mm_vision_tower="nobody/no-such-clip")
    refused(CheckpointError, "nobody/no-such-clip", "--vision-tower PATH", call=lambda: plan(llava))
    configure(llava, mm_vision_tower="./towers/clip")
    refused(CheckpointError, "./towers/clip", "--vision-tower", call=lambda: plan(llava))
    configure(llava, mm_vision_tower=None)
    refused(CheckpointError, "mm_vision_tower", "--vision-tower", call=lambda: plan(llava))


@pytest.mark.parametrize("unfreeze, wins", [(None, "folder"), (False, "folder"), (True, "checkpoint")])
def test_a_tower_in_the_checkpoint_counts_only_if_it_was_trained(unfreeze: Any, wins: str, llava: Path):
    frozen = load_file(llava / "clip" / "model.safetensors")
    inside = "model.vision_tower.vision_tower."
    edit(llava, {inside + n: t + 1 for n, t in frozen.items()})
    configure(llava, unfreeze_mm_vision_tower=unfreeze)
    made = plan(llava)
    shift = 0.0 if wins == "folder" else 1.0
    encoder = [w for n, w in made.vision_weights.items() if not n.startswith("projector.")]
    assert len(encoder) > 20
    for weight in encoder:
        [(name, _)] = weight.parts
        raw = weight.checkpoint.read(name)
        expected = frozen[name.removeprefix(inside)] + shift
        assert torch.equal(raw, expected.float()), name
        assert name.startswith(inside) == (wins == "checkpoint")


def test_an_unfrozen_tower_that_is_not_in_the_checkpoint_comes_from_its_folder(llava: Path):
    configure(llava, unfreeze_mm_vision_tower=True)
    assert next(iter(plan(llava).vision_weights.values())).checkpoint.path == llava / "clip"


def test_an_unfrozen_tower_that_lacks_a_tensor_is_not_filled_from_the_folder(llava: Path):
    frozen = load_file(llava / "clip" / "model.safetensors")
    inside = "model.vision_tower.vision_tower."
    gone = "encoder.layers.1.mlp.fc1.bias"
    edit(llava, {inside + n: t for n, t in frozen.items() if not n.endswith(gone)})
    configure(llava, unfreeze_mm_vision_tower=True)
    refused(CheckpointError, gone, "missing", call=lambda: plan(llava))


# ------------------------------------------------------------------------------------- llava: projector


def clip_features(folder: Path, pixels: Tensor, layer: int, keep_cls: bool) -> Tensor:
    """hidden_states[layer] of transformers' own CLIP, filled from the tower's file."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = json.loads((folder / "config.json").read_text())["vision_config"]
    model = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    stored = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    names = model.state_dict()
    if not any(n.startswith("vision_model.") for n in names):
        stored = {n.removeprefix("vision_model."): t for n, t in stored.items()}
    missing, _ = model.load_state_dict(stored, strict=False)
    # the random tower ends before its last norm, which hidden_states do not see
    assert all("post_layernorm" in n or "position_ids" in n for n in missing), missing
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        hidden = model(x, output_hidden_states=True).hidden_states[layer]
    return hidden if keep_cls else hidden[:, 1:]


def some_pixels(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("feature, tokens", [("patch", 16), ("cls_patch", 17)])
@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_projector_layer_and_feature_are_those_of_the_config(
    kind: str, layer: int, feature: str, tokens: int, llava: Path
):
    torch.manual_seed(0)
    hidden = 64
    layers: list[torch.nn.Linear]
    if kind == "linear":
        layers, names = [torch.nn.Linear(32, hidden)], ["model.mm_projector."]
    else:
        layers = [torch.nn.Linear(hidden if i else 32, hidden) for i in range(int(kind[3]))]
        names = [f"model.mm_projector.{2 * i}." for i in range(len(layers))]
    new = {}
    for prefix, module in zip(names, layers, strict=True):
        new |= {prefix + n: p.detach().clone() for n, p in module.named_parameters()}
    edit(llava, new, gone="mm_projector")
    configure(
        llava, mm_projector_type=kind, mm_vision_select_layer=layer, mm_vision_select_feature=feature
    )
    made = plan(llava)
    assert made.vision.tokens == tokens and made.vision.hidden_size == hidden
    pixels = some_pixels(56)
    expected = clip_features(llava / "clip", pixels, layer, feature == "cls_patch")
    with torch.no_grad():
        for i, module in enumerate(layers):
            expected = module(torch.nn.functional.gelu(expected) if i else expected)
    found = vision_of(made)(pixels)
    assert float((found - expected).abs().max() / expected.std()) <= 5e-5


def test_an_identity_projector_gives_the_towers_rows(llava: Path):
    """A decoder as wide as the tower."""
    text = {n: t for n, t in load_file(llava / "model.safetensors").items() if "mm_projector" not in n}
    narrow = {n: t[tuple(slice(0, {64: 32}.get(d, d)) for d in t.shape)].clone() for n, t in text.items()}
    save_file(narrow, llava / "model.safetensors")
    configure(llava, mm_projector_type="identity", hidden_size=32)
    made = plan(llava)
    pixels = some_pixels(56)
    expected = clip_features(llava / "clip", pixels, -2, False)
    assert float((vision_of(made)(pixels) - expected).abs().max() / expected.std()) <= 5e-5


def test_an_identity_projector_of_another_width_is_refused(llava: Path):
    """The tower's 32 against the decoder's 64: such rows cannot stand among its embeddings."""
    configure(llava, mm_projector_type="identity")
    refused(CheckpointError, "32", "64", call=lambda: plan(llava))


@pytest.mark.parametrize(
    "change, error, parts",
    [
        ({"mm_projector_type": "cabstract"}, NotSupportedYet, ["'cabstract'"]),
        ({"mm_resampler_type": "spatial_pool"}, NotSupportedYet, ["'spatial_pool'"]),
        ({"image_aspect_ratio": "anyres"}, NotSupportedYet, ["'anyres'", "square and pad"]),
        ({"mm_vision_select_feature": "cls"}, CheckpointError, ["'cls'", "'patch' or 'cls_patch'"]),
        ({"mm_vision_select_layer": -9}, CheckpointError, ["layer -9 does not exist"]),
        ({"hidden_act": "gelu"}, NotSupportedYet, ["'gelu'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, NotSupportedYet, ["'dynamic'"]),
        ({"hidden_size": None}, CheckpointError, ["has shape", "expected"]),
    ],
)
def test_a_llava_config_that_we_cannot_follow_is_refused(
    change: dict[str, Any], error: Any, parts: list[str], llava: Path
):
    configure(llava, **change)

    def whole() -> None:
        made = plan(llava)
        for weight in made.decoder_weights.values():
            weight.check()
        decoder_of(made)

    refused(error, *parts, call=whole)


@pytest.mark.parametrize(
    "file, aspect, recipe, resize, fill",
    [
        ({"size": 56, "crop_size": 56}, "pad", "pad", 56, [122, 116, 104]),
        ({"size": 56, "crop_size": 56}, None, "crop", 56, []),
        ({"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}, None, "crop", 60, []),
        ({"size": {"height": 56, "width": 56}, "crop_size": 56}, None, "square", 0, []),
        ({}, "pad", "pad", 56, [122, 116, 104]),
    ],
)
def test_the_image_recipe_follows_the_preprocessor_file(file, aspect, recipe, resize, fill, llava: Path):
    (llava / "clip" / "preprocessor_config.json").write_text(json.dumps(file))
    configure(llava, image_aspect_ratio=aspect)
    v = plan(llava).vision
    assert (v.recipe, v.size, v.resize, v.fill, v.loading) == (recipe, 56, resize, fill, "pillow")


@pytest.mark.parametrize(
    "file, error, parts",
    [
        ({"crop_size": 224}, CheckpointError, ["crop_size is 224", "wants 56"]),
        ({"image_mean": [0.5, 0.5, 0.5]}, NotSupportedYet, ["image_mean"]),
        ({"image_std": [1, 1, 1]}, NotSupportedYet, ["image_std"]),
        ({"do_normalize": False}, NotSupportedYet, ["do_normalize"]),
        ({"resample": 2}, NotSupportedYet, ["resample 2"]),
    ],
)
def test_a_preprocessor_that_we_cannot_follow_is_refused(file: Any, error: Any, parts: Any, llava: Path):
    (llava / "clip" / "preprocessor_config.json").write_text(json.dumps(file))
    refused(error, *parts, call=lambda: plan(llava))


# ------------------------------------------------------------------------------------------- llava: hf


HF_PREFIXES = {
    "language_model.model": {},
    "model.language_model": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "vision_tower.": "model.vision_tower.",
    },
}


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny LlavaForConditionalGeneration and its folder, in the layout of language_model.model.*"""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=90)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(96)} | {"<image>": 90, "</s>": 2}
    del words["w90"], words["w2"]
    Tokenizer(models.WordLevel(words, "w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_bos_token": False}))
    return model, folder


def rekeyed(folder: Path, prefixes: dict[str, str], tower: str) -> None:
    """Give the tensors the names of another layout; tower: what follows "vision_tower."."""
    file = folder / "model.safetensors"
    new = {}
    for name, tensor in load_file(file).items():
        rest = name.removeprefix("vision_tower.")
        if rest != name:
            name = "vision_tower." + tower + rest.removeprefix("vision_model.")
        for old, other in prefixes.items():
            if name.startswith(old):
                name = other + name.removeprefix(old)
                break
        new[name] = tensor
    save_file(new, file)


@pytest.mark.parametrize("tower", ["", "vision_model."])
@pytest.mark.parametrize("layout", HF_PREFIXES)
def test_every_hf_layout_computes_what_transformers_does(
    layout: str, tower: str, hf: tuple[Any, Path], tmp_path: Path
):
    model, source = hf
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    rekeyed(folder, HF_PREFIXES[layout], tower)
    names = list(Checkpoint(folder))
    assert any(n.startswith(f"{layout}.layers.0.") for n in names)
    made = plan(folder)
    assert made.vision.loading == "transformers" and made.vision.tokens == 4
    assert made.prompt.image.token_id == 90 and made.prompt.image.inline

    pixels = some_pixels(28)[:1]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    normalised = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    ids = torch.tensor([7, 90, 90, 90, 90, 11, 12])
    with torch.no_grad():
        expected = model(input_ids=ids[None], pixel_values=normalised).logits[0]
    rows = vision_of(made)(pixels)[0]
    step = torch.where(ids == 90, made.decoder.vocab_size + torch.arange(7) - 1, ids)
    decoder = decoder_of(made)
    found = decoder(step, rows, Eager(decoder, torch.arange(7), [7]))
    assert float((found - expected).abs().max() / expected.std()) <= 5e-5


@pytest.mark.parametrize(
    "change, error, parts",
    [
        ({"vision_feature_select_strategy": "cls"}, CheckpointError, ["'cls'", "'default' or 'full'"]),
        ({"projector_hidden_act": "relu"}, NotSupportedYet, ["'relu'"]),
        ({"text_config": {"model_type": "gemma"}}, NotSupportedYet, ["'gemma'"]),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, NotSupportedYet, ["siglip"]),
    ],
)
def test_an_hf_config_that_we_cannot_follow_is_refused(
    change: Any, error: Any, parts: Any, hf: tuple[Any, Path], tmp_path: Path
):
    folder = Path(shutil.copytree(hf[1], tmp_path / "hf"))
    configure(folder, **change)
    refused(error, *parts, call=lambda: plan(folder))


def test_full_keeps_the_class_token(hf: tuple[Any, Path], tmp_path: Path):
    folder = Path(shutil.copytree(hf[1], tmp_path / "hf"))
    configure(folder, vision_feature_select_strategy="full")
    assert plan(folder).vision.tokens == 5


def test_an_hf_checkpoint_has_its_own_tower(hf: tuple[Any, Path], tiny: Path):
    call = lambda: plan(hf[1], vision_tower=str(tiny / "llava" / "clip"))  # noqa: E731
    refused(CheckpointError, "--vision-tower", call=call)


# ---------------------------------------------------------------------------------------------- qwen_vl


def test_qwen_reads_its_flags_from_the_config(qwen: Path):
    d = plan(qwen).decoder
    assert (d.rope_limits, d.ntk_alphas) == ((512, 1024, 2048, 4096, 8192), (1, 3, 7, 15, 31))
    assert (d.logn, d.qkv_bias, d.o_bias, d.mlp_bias, d.tied) == (512, True, False, False, False)
    assert (d.intermediate_size, d.rotary, d.head_dim) == (176, 32, 32)
    configure(qwen, use_dynamic_ntk=False, use_logn_attn=False, no_bias=False, rotary_pct=0.5)
    d = plan(qwen).decoder
    assert (d.limits, d.ntk_alphas, d.logn, d.rotary) == ([8192], (1.0,), 0, 16)
    assert d.o_bias and d.mlp_bias
    d = plan(qwen, max_seq_len=700).decoder
    assert (d.max_seq_len, d.limits) == (700, [700])


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"kv_channels": None}, ["config.json", "'kv_channels'"]),
        ({"seq_length": None}, ["config.json", "'seq_length'"]),
        ({"hidden_size": 64}, ["output_dim is 128", "expected 64"]),
    ],
)
def test_a_qwen_config_that_makes_no_sense_is_refused(change: Any, parts: Any, qwen: Path):
    configure(qwen, **change)
    refused(CheckpointError, *parts, call=lambda: plan(qwen))


def test_a_qwen_checkpoint_without_a_vision_tensor_names_it(qwen: Path):
    edit(qwen, {}, gone="visual.attn_pool.query")
    refused(CheckpointError, "transformer.visual.attn_pool.query", "missing", call=lambda: plan(qwen))


def test_qwen_takes_no_other_tower(qwen: Path, tiny: Path):
    call = lambda: plan(qwen, vision_tower=str(tiny / "llava" / "clip"))  # noqa: E731
    refused(UserError, "--vision-tower", call=call)


@pytest.mark.parametrize("family", ["qwen_vl", "llava"])
def test_every_parameter_of_both_modules_has_a_source(family: str, tiny: Path):
    made = plan(tiny / family)
    decoder = Decoder(made.decoder)
    shapes = {n: tuple(p.shape) for n, p in decoder.named_parameters()}
    assert {n: tuple(w.read().shape) for n, w in made.decoder_weights.items()} == shapes
    vision_of(made)

"""The image encoders: uint8 pixels → rows for the decoder.

Plain torch modules, trainable and exportable; every forward takes uint8 [N, S, S, 3] and returns
float32 [N, tokens, hidden]. Their weight matrices are `nn.Linear` modules, which the exporter may
swap; a class's `WIDE` names those between which numbers may leave float16's range: what reads the
residual stream without a norm, and what is added to it. A module's `sources()` says from which tensor
of a checkpoint each parameter comes, and how.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, NotSupportedYet

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# of a parameter: the name of its tensor in the checkpoint, and what is done to that tensor
Source = tuple[str, Callable[[Tensor], Tensor]]


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] → float32 [N, 3, H, W], (x / 255 − mean) / std in CLIP's numbers."""
    x = pixels.float() / 255
    # scalars, as a tensor made here would be a constant without a value in a trace on fake tensors
    channels = zip(x.unbind(-1), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


class Attention(nn.Module):
    """q [.., heads, Q, d], k and v [N, heads, K, d] → [N, Q, heads · d]; every q sees every k.

    `dtype`: of both products and of the result, softmax is then float32; None: everything as it comes.
    """

    dtype: torch.dtype | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        if self.dtype is None:
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
        else:
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
            weights = (q @ k.transpose(-1, -2)).float().softmax(-1).to(self.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A square position table [n², width] → float32 [grid², width]; itself where n = grid.

    Bicubic, align_corners False, no antialias: `get_abs_pos` of Qwen-VL's visual.py.
    Differentiable.
    """
    stored = math.isqrt(table.shape[0])
    if stored == grid:
        return table
    square = table.float().unflatten(0, (stored, stored)).permute(2, 0, 1).unsqueeze(0)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return square[0].permute(1, 2, 0).flatten(0, 1)


def load(module: nn.Module, tensors: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    """Fill a module from a checkpoint's tensors (name → tensor), in the module's own dtype.

    Raises CheckpointError naming a tensor that is missing or has another shape.
    """
    for name, parameter in module.named_parameters():
        source, transform = sources[name]
        if source not in tensors:
            raise CheckpointError(f"the checkpoint has no tensor {source}")
        value = transform(tensors[source])
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{source}: shape {list(tensors[source].shape)} gives {name} {list(value.shape)}, "
                f"expected {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)


def same(tensor: Tensor) -> Tensor:
    return tensor


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.t()


def _third(part: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3)[part]


# ---------------------------------------------------------------------------------------- Qwen-VL

QUERIES = (
    16  # squared: rows per image, and entries of the stored position tables; not in config.json
)
QWEN_EPS = 1e-6


def _sincos(side: int, width: int) -> Tensor:
    """Sine and cosine of row and column [side², width]: the resampler's initial positions."""
    omega = 10000.0 ** -(torch.arange(width // 4).float() / (width // 4))
    angle = torch.outer(torch.arange(side).float(), omega)
    half = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    column, row = half.repeat(side, 1), half.repeat_interleave(side, 0)
    return torch.cat([column, row], 1)


class _QwenAttention(nn.Module):
    WIDE = ("out_proj",)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)  # rows are packed per head: [head: q, k, v]
        self.attention = Attention()
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, width] → [N, L, width]"""
        packed = self.in_proj(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        q, k, v = packed.unbind(3)  # [N, heads, L, d]
        return self.out_proj(self.attention(q, k, v))


class _QwenMlp(nn.Module):
    WIDE = ("c_proj",)

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class _QwenBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, QWEN_EPS)
        self.attn = _QwenAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, QWEN_EPS)
        self.mlp = _QwenMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _QwenTransformer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_QwenBlock(width, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class _CrossAttention(nn.Module):
    WIDE = ("out_proj",)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.attention = Attention()
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [Q, width], key and value [N, K, width] → [N, Q, width]"""
        q = self.q(query).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k = self.k(key).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v(value).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj(self.attention(q, k, v))


class _Resampler(nn.Module):
    WIDE = ("kv_proj",)

    def __init__(self, width: int, output_dim: int, grid: int, stored_tables: bool):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(_sincos(QUERIES, output_dim))
        if not stored_tables:
            self.kv_pos_embed = nn.Parameter(resize_positions(self.pos_embed.detach(), grid))
        self.query = nn.Parameter(0.02 * torch.randn(QUERIES**2, output_dim))
        if width != output_dim:
            self.kv_proj = nn.Linear(width, output_dim, bias=False)
        self.ln_q = nn.LayerNorm(output_dim, QWEN_EPS)
        self.ln_kv = nn.LayerNorm(output_dim, QWEN_EPS)
        self.attn = _CrossAttention(output_dim, output_dim // 128)

    def forward(self, x: Tensor) -> Tensor:
        """[N, grid², width] → [N, 256, output_dim]"""
        if hasattr(self, "kv_pos_embed"):
            positions: Tensor = self.kv_pos_embed
        else:
            positions = resize_positions(self.pos_embed, self.grid)
        kv = self.ln_kv(self.kv_proj(x) if hasattr(self, "kv_proj") else x)
        # positions are added to queries and keys, not to values
        return self.attn(self.ln_q(self.query) + self.pos_embed, kv + positions, kv)


class QwenVisual(nn.Module):
    """Qwen-VL's `transformer.visual`: arguments are config.json's `visual`, 256 rows come out.

    A checkpoint stores 16×16 position tables. They are resized to the patch grid once, when weights
    are loaded (`sources()` says where); with `stored_tables` the module holds them as stored and
    resizes in forward, as training needs: `checkpoint_tensors()` is then exactly a checkpoint's
    `visual`.
    """

    WIDE = ("proj",)

    def __init__(
        self,
        heads: int,
        image_size: int,
        layers: int,
        mlp_ratio: float,
        output_dim: int,
        patch_size: int,
        width: int,
        stored_tables: bool = False,
        **_: Any,  # image_start_id: the prompt's business
    ):
        super().__init__()
        self.image_size = image_size
        self.grid = grid = image_size // patch_size
        self.tokens, self.hidden_size = QUERIES**2, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        rows = QUERIES**2 if stored_tables else grid**2
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(rows, width))
        self.ln_pre = nn.LayerNorm(width, QWEN_EPS)
        self.transformer = _QwenTransformer(width, heads, int(width * mlp_ratio), layers)
        self.attn_pool = _Resampler(width, output_dim, grid, stored_tables)
        self.ln_post = nn.LayerNorm(output_dim, QWEN_EPS)
        self.proj = nn.Linear(output_dim, output_dim, bias=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """The tower alone: uint8 [N, S, S, 3] → [N, grid², width], what the resampler gets."""
        x = self.conv1(normalise(pixels).to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, self.grid))
        return self.transformer(x)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] → float32 [N, 256, output_dim]"""
        return self.proj(self.ln_post(self.attn_pool(self.encode(pixels)))).float()

    def sources(self, prefix: str = "transformer.visual.") -> dict[str, Source]:
        """Parameter → the checkpoint's name and the transform."""

        def resized(table: Tensor) -> Tensor:
            return resize_positions(table, self.grid)

        sources: dict[str, Source] = {name: (name, same) for name, _ in self.named_parameters()}
        for part, letter in enumerate("qkv"):
            for kind in ("weight", "bias"):
                sources[f"attn_pool.attn.{letter}.{kind}"] = (
                    f"attn_pool.attn.in_proj_{kind}",
                    _third(part),
                )
        sources["proj.weight"] = ("proj", _transpose)
        if "attn_pool.kv_pos_embed" in sources:
            sources["positional_embedding"] = ("positional_embedding", resized)
            sources["attn_pool.kv_pos_embed"] = ("attn_pool.pos_embed", resized)
        return {name: (prefix + source, t) for name, (source, t) in sources.items()}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The parameters as a checkpoint names and shapes them, below `transformer.visual.`.

        Only with `stored_tables`: a resized table cannot be made 16×16 again.
        """
        if hasattr(self.attn_pool, "kv_pos_embed"):
            raise ValueError("checkpoint_tensors needs QwenVisual(stored_tables=True)")
        state = {k: v.detach() for k, v in self.state_dict().items()}
        for kind in ("weight", "bias"):
            parts = [state.pop(f"attn_pool.attn.{letter}.{kind}") for letter in "qkv"]
            state[f"attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
        state["proj"] = state.pop("proj.weight").t().contiguous()
        return state


# -------------------------------------------------------------------------------- CLIP and LLaVA


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP vision tower; the defaults are transformers' CLIPVisionConfig's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipConfig:
        """From the config.json of a CLIP vision model, or of a full CLIP model."""
        config = config.get("vision_config", config)
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        return cls(**known)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise NotSupportedYet(
            f"activation {name!r} is not supported yet: {' or '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class _ClipAttention(nn.Module):
    WIDE = ("out_proj",)

    def __init__(self, c: ClipConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.attention = Attention()
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, hidden] → [N, L, hidden]"""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attention(q, k, v))


class _ClipMlp(nn.Module):
    WIDE = ("fc2",)

    def __init__(self, c: ClipConfig):
        super().__init__()
        self.act = _activation(c.hidden_act)
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _ClipLayer(nn.Module):
    def __init__(self, c: ClipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = _ClipAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = _ClipMlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Table(nn.Module):
    """Position rows: an nn.Embedding's name in the checkpoint, but no lookup."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(rows, width))


class _ClipEmbeddings(nn.Module):
    def __init__(self, c: ClipConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(0.02 * torch.randn(c.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False
        )
        rows = (c.image_size // c.patch_size) ** 2 + 1
        self.position_embedding = _Table(rows, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] → [N, 1 + patches, hidden]"""
        x = normalise(pixels).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([first, x], 1) + self.position_embedding.weight


class _ClipEncoder(nn.Module):
    def __init__(self, c: ClipConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(_ClipLayer(c) for _ in range(layers))


class _ClipVision(nn.Module):
    def __init__(self, c: ClipConfig, layers: int):
        super().__init__()
        self.embeddings = _ClipEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)  # sic
        self.encoder = _ClipEncoder(c, layers)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """hidden_states: before the first layer, and after each; [N, 1 + patches, hidden] each."""
        states = [self.pre_layrnorm(self.embeddings(pixels))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


def make_projector(
    kind: str, inputs: int, outputs: int, bias: bool = True, act: str = "gelu"
) -> nn.Module:
    """`mm_projector_type`: "linear", "mlpNx_gelu", "identity"; NotSupportedYet for others."""
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias)
    if not (match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)):
        raise NotSupportedYet(
            f"projector {kind!r} is not supported yet: linear, mlp2x_gelu (any number) or identity"
        )
    function = _activation(act)
    steps: list[nn.Module] = [nn.Linear(inputs, outputs, bias)]
    for _ in range(int(match[1]) - 1):
        steps += [_Function(function), nn.Linear(outputs, outputs, bias)]
    return nn.Sequential(*steps)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class LlavaVision(nn.Module):
    """CLIP's tower up to `hidden_states[select_layer]`, then LLaVA's projector.

    select_layer counts as hidden_states does (0: before the first layer; −1: after the last);
    several layers are joined along the features. keep_cls: the class row stays, as the first one.
    `projector` is a `make_projector` kind. Raises CheckpointError for a layer that the tower lacks.
    """

    WIDE = ("projector",)

    def __init__(
        self,
        config: ClipConfig,
        hidden_size: int,
        select_layer: int | Sequence[int] = -2,
        keep_cls: bool = False,
        projector: str = "mlp2x_gelu",
        projector_bias: bool = True,
        projector_act: str = "gelu",
    ):
        super().__init__()
        states = config.num_hidden_layers + 1
        chosen = [select_layer] if isinstance(select_layer, int) else list(select_layer)
        for index in chosen:
            if not -states <= index < states:
                raise CheckpointError(
                    f"vision layer {index} does not exist: the tower has {states - 1} layers, "
                    f"so {-states} to {states - 1}"
                )
        self.chosen = [index % states for index in chosen]
        self.keep_cls = keep_cls
        self.image_size = config.image_size
        self.tokens = (config.image_size // config.patch_size) ** 2 + keep_cls
        inputs = config.hidden_size * len(chosen)
        self.hidden_size = inputs if projector == "identity" else hidden_size
        self.vision_model = _ClipVision(config, max(self.chosen))  # later layers have no effect
        self.projector = make_projector(
            projector, inputs, hidden_size, projector_bias, projector_act
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """The tower alone: uint8 [N, S, S, 3] → [N, tokens, hidden · chosen layers]."""
        states = self.vision_model(pixels)
        x = torch.cat([states[index] for index in self.chosen], -1)
        return x if self.keep_cls else x[:, 1:]

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] → float32 [N, tokens, hidden_size]"""
        return self.projector(self.encode(pixels)).float()

    def sources(
        self, tower: str = "", projector: str = "model.mm_projector.", hf: bool = False
    ) -> dict[str, Source]:
        """Parameter → the checkpoint's name and the transform.

        tower: what stands before `vision_model.` there; projector: before `0.weight` or `weight`
        (hf: before `linear_1.weight`).
        """
        sources: dict[str, Source] = {}
        for name, _ in self.named_parameters():
            if not name.startswith("projector."):
                sources[name] = (tower + name, same)
                continue
            rest = name.removeprefix("projector.")
            if hf:  # 0, 2, … → linear_1, linear_2, …
                index, kind = rest.split(".")
                rest = f"linear_{int(index) // 2 + 1}.{kind}"
            sources[name] = (projector + rest, same)
        return sources

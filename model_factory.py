"""ModelFactory: a checkpoint, hub id or bundle → a running Model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BundleError, UserError
from .export.bundle import Bundle, is_bundle, read
from .export.target import BACKENDS, KV_CACHES
from .runtime.backends import DEVICES, GRAPHS, Options, open_backend
from .runtime.engine import Encode, Engine

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .export.graph import Progress

MODEL_TYPES = {"qwen_vl": "Qwen/Qwen-VL-Chat", "llava": "liuhaotian/llava-v1.5-7b"}


@dataclass(frozen=True)
class ModelConfig:
    """What to load and how to run it; None means the default that the README's table names.

    `ckpt_path`: checkpoint folder, hub id or bundle. `model_type`: the family, checked against the
    checkpoint. `quantization` ("int8", "int4") wins over `act_type` ("fp32", …); neither is
    `precision="auto"`. `backend` ("onnxruntime", "torchscript", "tensorrt"), `device` ("cpu", "cuda",
    "cuda:1") and `kv_cache` (of tensorrt: "paged", "linear") say what a checkpoint is exported for, and
    are checked against a bundle. Bytes and counts: `kv_cache_bytes`, `image_cache_bytes`,
    `max_batch_size` (sequences side by side), `token_budget` (tokens of one step), `threads`. `step_ms`:
    about how long running answers may wait for a piece of somebody's prompt. `deterministic`: int4
    answers do not depend on what else is in the batch either (fp32 and int8 never do on the CPU), at the
    cost of a lone answer's speed. `speculation`: requests may ask for it (`speculative`), at the cost of
    some speed of those that do not. `trust_engines`: open TorchScript archives and TensorRT plans, which
    are programs, though they were made elsewhere. `weight_budget`: bytes of weights of each engine that
    stay on the GPU, where they were built with weight streaming; None: all. `encode`: who encodes pictures
    in place of the vision graph, which is then not opened: uint8 [N, size, size, 3] → float32 [N, tokens,
    hidden].
    """

    model_type: str | None = None
    ckpt_path: str | None = None
    tokenizer_path: str | None = None
    act_type: str | None = None
    quantization: str | None = None
    max_seq_len: int | None = None
    backend: str | None = None
    device: str | None = None
    kv_cache: str | None = None
    revision: str | None = None
    vision_tower: str | None = None
    conversation: str | None = None
    kv_cache_bytes: int | None = None
    image_cache_bytes: int = 2**28
    max_batch_size: int = 16
    token_budget: int | None = None
    step_ms: int = 200
    deterministic: bool = False
    speculation: bool = False
    threads: int | None = None
    trust_engines: bool = False
    weight_budget: int | None = None
    encode: Encode | None = None

    @property
    def graphs(self) -> tuple[str, ...]:
        return GRAPHS if self.encode is None else ("decoder",)

    @property
    def options(self) -> Options:
        return Options(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Options)})

    @property
    def slots(self) -> int:
        """Of the cache: as many again as sequences run, for prompts that are kept."""
        return 2 * self.max_batch_size

    @property
    def precision(self) -> str:
        return self.quantization or self.act_type or "auto"


@dataclass
class Model:
    """An opened bundle: `tokenizer` (a `tokenizers.Tokenizer`) and the engine that all callers share."""

    bundle: Bundle
    tokenizer: Tokenizer
    engine: Engine


class ModelFactory:
    @staticmethod
    def from_huggingface(
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        model_config: ModelConfig | None = None,
    ) -> Model:
        """Open a bundle, or export a checkpoint once into the user's cache folder and open that.

        `name_or_path`: hub id, checkpoint folder, or bundle folder. The cache folder is
        `RTP_LLM_CACHE`, else `rtp_llm` in the user's cache folder. Raises CheckpointError,
        BundleError, MissingDependency.
        """
        config = model_config or ModelConfig()
        config = dataclasses.replace(
            config, ckpt_path=os.fspath(name_or_path), revision=revision or config.revision
        )
        return ModelFactory.from_model_config(config)

    @staticmethod
    def from_model_config(
        config: ModelConfig, progress: Callable[[Progress], None] | None = None
    ) -> Model:
        """As `from_huggingface`, everything in one ModelConfig.

        progress: hears of an export, in place of lines on stderr.
        """
        path = config.ckpt_path or MODEL_TYPES.get(config.model_type or "")
        if not path:
            raise UserError(
                f"ModelConfig: give ckpt_path, or a model_type of {sorted(MODEL_TYPES)}; "
                f"model_type is {config.model_type!r}"
            )
        return _open(bundle_of(path, config, progress), config)

    @staticmethod
    def create_from_env() -> Model:
        """A model from MODEL_TYPE, CHECKPOINT_PATH, TOKENIZER_PATH, ACT_TYPE, QUANTIZATION, MAX_SEQ_LEN,
        BACKEND, DEVICE and KV_CACHE; one that is empty is not set."""
        env = {name: value for name, value in os.environ.items() if value}
        length = env.get("MAX_SEQ_LEN")
        if length and not length.isdigit():
            raise UserError(f"MAX_SEQ_LEN={length!r} must be a number of tokens")
        return ModelFactory.from_model_config(
            ModelConfig(
                model_type=env.get("MODEL_TYPE"),
                ckpt_path=env.get("CHECKPOINT_PATH"),
                tokenizer_path=env.get("TOKENIZER_PATH"),
                act_type=env.get("ACT_TYPE"),
                quantization=env.get("QUANTIZATION"),
                max_seq_len=int(length) if length else None,
                backend=env.get("BACKEND"),
                device=env.get("DEVICE"),
                kv_cache=env.get("KV_CACHE"),
            )
        )


def cache_folder() -> Path:
    """Where checkpoints opened without an export step keep their bundles."""
    if own := os.environ.get("RTP_LLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtp_llm"


def bundle_of(
    path: str, config: ModelConfig, progress: Callable[[Progress], None] | None = None
) -> Bundle:
    """The bundle at `path`, or the one exported from the checkpoint there, with progress on stderr; with
    `config.encode` as if it had no vision graph.

    Raises UserError for names that do not exist, and what `export` raises.
    """
    bundle = _bundle_of(path, config, progress)
    if config.encode is None:
        return bundle
    graphs = {name: graph for name, graph in bundle.graphs.items() if name in config.graphs}
    return dataclasses.replace(bundle, graphs=graphs)


def _bundle_of(path: str, config: ModelConfig, progress: Callable[[Progress], None] | None) -> Bundle:
    for field, value, known in (
        ("backend", config.backend, BACKENDS), ("kv_cache", config.kv_cache, KV_CACHES)
    ):  # fmt: skip
        if value is not None and value not in known:
            raise UserError(f"{field} is {value!r}, expected {' or '.join(known)}")
    if config.device is not None and not re.fullmatch(DEVICES, config.device):
        raise UserError(f"device is {config.device!r}, expected cpu, cuda or a GPU's number like cuda:1")
    if is_bundle(path):
        bundle = read(path)
        if config.model_type and bundle.model.family != config.model_type:
            raise BundleError(
                f"{path} holds a {bundle.model.family} model, model_type is {config.model_type!r}"
            )
        if config.precision not in ("auto", bundle.precision):
            raise BundleError(
                f"{path} has precision {bundle.precision}, {config.precision!r} was asked for: "
                f"export the checkpoint with --precision {config.precision}"
            )
        for field, wanted, own in (
            ("backend", config.backend, bundle.backend), ("kv_cache", config.kv_cache, bundle.model.attention)
        ):  # fmt: skip
            if wanted not in (None, own):
                if field == "kv_cache" and bundle.backend != "tensorrt":
                    raise BundleError(
                        f"{path} is a bundle for {bundle.backend}, kv_cache={wanted!r} is a choice of "
                        "tensorrt: leave it out"
                    )
                raise BundleError(
                    f"{path} has {field} {own}, {wanted!r} was asked for: export the checkpoint with "
                    f"--{field.replace('_', '-')} {wanted}"
                )
        _check_options(path, bundle, config)
        return bundle
    from .export.exporter import StderrProgress, export

    backend = config.backend or "onnxruntime"
    # which GPU, and for TorchScript whether one, is a matter of running; and what is the default already
    # gives the same bundle
    device = "cuda" if backend == "onnxruntime" and (config.device or "cpu") != "cpu" else None
    options: dict[str, Any] = {
        "model": config.model_type,
        "backend": backend,
        "device": device,
        "kv_cache": None if (backend, config.kv_cache) == ("tensorrt", "paged") else config.kv_cache,
        "precision": config.precision,
        "vision_tower": config.vision_tower,
        "conversation": config.conversation,
        "tokenizer": config.tokenizer_path,
        "revision": config.revision,
    }
    # readable, and of its own for each folder (two may bear one name) and each set of options
    where = str(Path(path).resolve()) if os.path.exists(path) else path
    name = re.sub(r"[^\w.-]+", "--", Path(path).name if os.path.exists(path) else path)
    key = hashlib.sha256(json.dumps([where, options]).encode()).hexdigest()[:12]
    output = cache_folder() / "bundles" / f"{name}-{config.precision}-{key}"
    return export(path, output, **options, progress=progress or StderrProgress())


def _check_options(path: str, bundle: Bundle, config: ModelConfig) -> None:
    """What only an export can change must be what the bundle was exported with, or not be given."""
    options = bundle.origin.options
    for field, option in (
        ("tokenizer_path", "tokenizer"), ("vision_tower", "vision_tower"),
        ("conversation", "conversation"), ("revision", "revision"),
    ):  # fmt: skip
        wanted = getattr(config, field)
        own = (options.get(option), str(bundle.path), bundle.origin.checkpoint)
        if wanted and wanted not in own and os.path.realpath(wanted) not in own:
            raise BundleError(
                f"{path} is a bundle, exported with {option}={options.get(option)!r}: leave "
                f"{field}={wanted!r} out, or export the checkpoint with --{option.replace('_', '-')}"
            )


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """Raises BundleError."""
    from tokenizers import Tokenizer

    file = bundle.read_path(bundle.tokenizer)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:
        raise BundleError(f"{file} is no tokenizer: {e}") from e


def _open(bundle: Bundle, config: ModelConfig) -> Model:
    tokenizer = open_tokenizer(bundle)
    backend = open_backend(bundle, config.options)
    engine = Engine(
        backend,
        bundle.model,
        config.token_budget,
        config.image_cache_bytes,
        config.max_batch_size,
        config.step_ms,
        config.encode,
    )
    return Model(bundle, tokenizer, engine)

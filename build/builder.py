"""Bundle → TensorRT plans for the GPU of this machine, recorded in the bundle.

Tested end to end against a stand-in whose every name is in the real bindings; never run on real TensorRT yet.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from .. import trt as door
from ..errors import BundleError, InternalError, UserError
from ..export import bundle as bundles
from ..export.bundle import Bundle, EngineSpec
from ..export.checkpoint import size_text
from . import timing_cache as timings
from . import torch_tensorrt
from .profiles import (
    Limits,
    Profile,
    decoder_profiles,
    max_blocks,
    max_logits,
    slot_length,
    vision_profile,
)
from .progress import Progress, monitor

# compute capability of a precision; what is not quantised is bf16 there
NEEDS = {"bf16": "8.0", "fp8": "8.9", "int8": "8.0", "int4": "8.0"}
COMPILERS = ("tensorrt", "torch_tensorrt")


@dataclass(frozen=True)
class Options:
    """How TensorRT builds. Raises UserError: field, value, what would be right."""

    opt_level: int = 3  # 0 builds fastest, 5 searches longest
    workspace: int | None = None  # bytes of scratch memory that a kernel may take; None: all of the GPU
    refit: bool = False  # weights can be exchanged in the plan
    weight_streaming: bool = False  # weights can stay in host memory, as the runtime's budget says
    timing_cache: Path | None = None  # file; None: one per GPU and version in the user's cache folder
    vision_compiler: str = "tensorrt"

    def __post_init__(self) -> None:
        if self.opt_level not in range(6):
            raise UserError(f"opt_level={self.opt_level!r} must be a number from 0 to 5")
        if self.workspace is not None and not 2**20 <= self.workspace <= 2**40:
            raise UserError(f"workspace={self.workspace!r} must be bytes from 2^20 to 2^40")
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise UserError(f"timing_cache={str(self.timing_cache)!r} is a folder, give a file")
        if self.vision_compiler not in COMPILERS:
            raise UserError(f"vision_compiler={self.vision_compiler!r}, expected {' or '.join(COMPILERS)}")


def check(given: Mapping[str, Any], bundle: Bundle | None = None) -> None:
    """Arguments of `build`, before it: all but the limits, and those too where there is a bundle.

    Raises UserError.
    """
    names = [field.name for field in fields(Limits)]
    options = {name: value for name, value in given.items() if name not in names}
    if "timing_cache" in options:
        options["timing_cache"] = Path(options["timing_cache"])
    Options(**options)
    if bundle is not None:
        Limits.of(bundle, **{name: value for name, value in given.items() if name in names})


def built_with(bundle: Bundle, given: Mapping[str, Any]) -> bool:
    """Whether a bundle's engines were built with these arguments of `build`; those left out do not count."""
    had: dict[str, Any] = vars(Options())
    for spec in bundle.engines.values():
        had = had | spec.options | spec.limits
    return all(had.get(name) == value for name, value in given.items() if name != "timing_cache")


def build(
    path: str | os.PathLike[str],
    *,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_images: int | None = None,
    opt_level: int = 3,
    workspace: int | None = None,
    refit: bool = False,
    weight_streaming: bool = False,
    timing_cache: str | os.PathLike[str] | None = None,
    vision_compiler: str = "tensorrt",
    progress: Callable[[Progress], None] | None = None,
) -> Bundle:
    """Build both engines of a bundle into it, and open that.

    max_batch_size: sequences of one step [16]. max_input_len: tokens of one step [2048, at most
    max_seq_len]. max_seq_len: tokens of a sequence [the bundle's]. max_images: of one run of the encoder
    [4]. The others: `Options`. vision_compiler "torch_tensorrt" makes a TorchScript with the engine
    inside, from the checkpoint that the bundle's record names.

    A build that fails or is interrupted leaves the bundle as it was. Raises UserError (impossible limits,
    no GPU, full disk), BundleError (not a bundle, not for TensorRT, TensorRT does not take its graph),
    MissingDependency (no TensorRT), InternalError (TensorRT fails).
    """
    tell = progress or (lambda _: None)
    bundle = bundles.read(path)
    if bundle.backend != "tensorrt":
        raise UserError(
            f"{path} is a bundle for {bundle.backend}, only one for tensorrt is built: rtp-llm export "
            f"--backend tensorrt --model {bundle.model.family} --checkpoint {bundle.origin.checkpoint}"
        )
    limits = Limits.of(bundle, max_batch_size, max_input_len, max_seq_len, max_images)
    file = None if timing_cache is None else Path(timing_cache)
    options = Options(opt_level, workspace, refit, weight_streaming, file, vision_compiler)

    trt, gpu = door.load(), door.gpu()
    if options.vision_compiler == "torch_tensorrt":
        torch_tensorrt.load()
    _check_machine(bundle, options, gpu)
    tell(Progress(f"TensorRT {trt.__version__}, {gpu.name}, compute capability {gpu.capability}"))
    with bundles.staging(bundle) as folder:
        return _Build(bundle, limits, options, trt, gpu, folder, tell).run()


def _check_machine(bundle: Bundle, options: Options, gpu: door.Gpu) -> None:
    def number(capability: str) -> tuple[int, ...]:
        return tuple(int(n) for n in capability.split("."))

    here = number(gpu.capability)
    for key, field in (("decoder", "precision"), ("vision", "vision-precision")):
        precision = bundle.graphs[key].precision
        needed = NEEDS.get(precision, "7.5")
        if here < number(needed):
            other = "bf16" if here >= (8, 0) else "fp16"
            raise UserError(
                f"{field} {precision} needs compute capability {needed}, {gpu.name} has "
                f"{gpu.capability}: export the checkpoint with --{field} {other}"
            )
    if options.workspace and options.workspace > gpu.memory:
        raise UserError(
            f"workspace={options.workspace} is more than the GPU's memory, {gpu.memory} bytes ({gpu.name})"
        )
    need = sum(_graph_bytes(bundle, key) for key in bundle.graphs)
    free = shutil.disk_usage(bundle.path).free
    if need > free:
        raise UserError(f"{bundle.path} has {size_text(free)} free, the plans need {size_text(need)}")


def _graph_bytes(bundle: Bundle, key: str) -> int:
    """Of a graph with its weights: about what its plan takes."""
    stem = bundle.graphs[key].path
    return sum(f.size for name, f in bundle.files.items() if name.startswith(stem))


class _Build:
    def __init__(
        self,
        bundle: Bundle,
        limits: Limits,
        options: Options,
        trt: Any,
        gpu: door.Gpu,
        folder: Path,
        tell: Callable[[Progress], None],
    ):
        self.bundle, self.limits, self.options = bundle, limits, options
        self.trt, self.gpu, self.folder, self.tell = trt, gpu, folder, tell
        self.paged = bundle.model.attention == "paged"
        self.timing_cache = options.timing_cache or timings.default_path(gpu, trt.__version__)
        self.log = door.logger(trt, lambda line: tell(Progress(f"TensorRT: {line}")))
        self.stop = threading.Event()

    def run(self) -> Bundle:
        sources, plugin = self._models()
        staged: dict[str, Path] = {}
        engines: dict[str, EngineSpec] = {}
        usual = vars(Options(timing_cache=self.options.timing_cache))
        chosen = {name: value for name, value in vars(self.options).items() if value != usual[name]}
        for key, source in sources.items():
            if key == "vision" and self.options.vision_compiler == "torch_tensorrt":
                name = "vision.pt"
                self.tell(Progress("building the vision engine with torch_tensorrt, which shows no progress"))
                torch_tensorrt.compile_vision(
                    self.bundle, self.limits, self.options, self.timing_cache, self.folder / name
                )
            else:
                name = f"{key}.plan"
                self.tell(Progress(f"building the {key} engine"))
                self._interruptible(partial(self._engine, key, source, self.folder / name))
            staged[name] = self.folder / name
            engines[key] = EngineSpec(
                path=name,
                gpu=self.gpu.name,
                compute_capability=self.gpu.capability,
                tensorrt=self.trt.__version__,
                plugin=plugin if key == "decoder" else "",
                limits=self._limits(key),
                options=chosen,
            )
        self.tell(Progress("computing checksums"))
        bundle = bundles.add_engines(self.bundle, engines, staged)
        _trust(bundle, list(staged))
        size = sum(bundle.files[name].size for name in staged)
        self.tell(Progress(f"wrote {' and '.join(staged)} ({size_text(size)}) into {bundle.path}"))
        return bundles.read(bundle.path)

    def _limits(self, key: str) -> dict[str, int]:
        given = vars(self.limits)
        if key == "vision":
            return {"max_images": given["max_images"]}
        known = {name: value for name, value in given.items() if name != "max_images"}
        known["max_logits"] = max_logits(self.limits)
        if self.paged:
            known["max_blocks"] = max_blocks(self.bundle)
        else:
            known["slot_len"] = slot_length(self.limits.max_seq_len)
        return known

    def _models(self) -> tuple[dict[str, Path], str]:
        """The graphs as TensorRT takes them, and the version of their plugin. Raises BundleError for nodes
        that the installed TensorRT does not take."""
        import onnx

        from .checker import check

        sources, plugin, problems = {}, "", []
        for key, graph in self.bundle.graphs.items():
            sources[key] = self.bundle.read_path(graph.path)
            model = onnx.load(sources[key], load_external_data=False)
            if key == "decoder" and self.paged:
                from . import plugins
                from .rewrite import rewrite

                plugins.register(self.gpu.capability)
                plugin = plugins.VERSION
                model = rewrite(model, plugins.SPLITS)
                # in the bundle, as its weights are found beside it
                sources[key] = self.folder.with_name(f"{self.folder.name}.onnx")
                onnx.save(model, sources[key])
            problems += [f"{key}: {line}" for line in check(model, self.trt.__version__)]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise BundleError(
                f"TensorRT {self.trt.__version__} does not take the graphs of {self.bundle.path}: "
                + "; ".join(problems[:5]) + more
            )  # fmt: skip
        return sources, plugin

    def _engine(self, key: str, source: Path, target: Path) -> None:
        trt, options = self.trt, self.options
        builder = trt.Builder(self.log)
        network = door.create_network(trt, builder)
        parser = trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(str(source)):
            lines = []
            for i in range(parser.num_errors):
                error = parser.get_error(i)
                lines.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
            lines = lines or self.log.errors
            raise BundleError(
                f"TensorRT {trt.__version__} does not take the {key} graph of {self.bundle.path}: "
                + "; ".join(" ".join(line.split()) for line in lines)
            )
        config = builder.create_builder_config()
        watch = monitor(trt, key, self.tell, self.stop)
        config.progress_monitor = watch
        config.builder_optimization_level = options.opt_level
        if options.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if self.bundle.graphs[key].precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default: products of ten bits
        if options.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if key == "decoder" and self.paged:
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        for shapes in self._profiles(key):
            profile = builder.create_optimization_profile()
            for name, (least, best, most) in shapes.items():
                profile.set_shape(name, least, best, most)
            if config.add_optimization_profile(profile) < 0:
                raise InternalError(f"TensorRT refuses a profile of the {key} graph: {shapes}")
        chosen = self.options.timing_cache is not None
        cache = timings.load(config, self.timing_cache, chosen)  # which must outlive the build
        with open(target, "wb") as file:
            writer = _writer(trt, file)
            done = builder.build_serialized_network_to_stream(network, config, writer)
        if watch.failed:
            raise watch.failed
        if writer.failed:
            raise _readable(writer.failed, target)
        if self.stop.is_set():
            raise KeyboardInterrupt
        if problem := timings.save(config, self.timing_cache):
            self.tell(Progress(f"the timings of this build are lost: {problem}"))
        del cache
        if not done or not target.stat().st_size:
            why = "; ".join(self.log.errors[-3:]) or "it does not say why"
            raise InternalError(f"TensorRT {trt.__version__} could not build the {key} engine: {why}")

    def _profiles(self, key: str) -> list[Profile]:
        if key == "vision":
            return [vision_profile(self.bundle, self.limits)]
        return list(decoder_profiles(self.bundle, self.limits).values())

    def _interruptible(self, work: Callable[[], None]) -> None:
        """Run in another thread, since Ctrl-C does not reach Python code while TensorRT holds this one."""
        import torch

        here = torch.cuda.current_device() if torch.cuda.is_available() else None

        def on_this_gpu() -> None:
            if here is not None:  # each thread has a current one of its own
                torch.cuda.set_device(here)
            work()

        with ThreadPoolExecutor(1) as pool:
            try:
                pool.submit(on_this_gpu).result()
            except BaseException:
                self.stop.set()  # TensorRT ends at its next step, and the pool waits for that
                raise


def _trust(bundle: Bundle, names: list[str]) -> None:
    """Plans are code: these were built here, so that they are opened without --trust-engines."""
    from ..trust import record

    record([bundle.read_path(name) for name in names])


def _readable(failure: OSError, target: Path) -> Exception:
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk became full while writing {target.name}; the bundle is as it was")
    return failure


def _writer(trt: Any, file: Any) -> Any:
    """A TensorRT stream writer into a file, so that a plan is never in memory as a whole."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failed: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as e:  # not through TensorRT's C++
                self.failed = e
                return 0

    return Writer()

"""The second compiler for the image encoder: torch_tensorrt, from 2.11 on → a TorchScript with the engine
inside, which needs torch_tensorrt to run.

It compiles the torch module, not the graph, so it reads the checkpoint that the bundle was exported from.
Tested against a stand-in whose names are in the real sources; never run on real TensorRT yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, MissingDependency, UserError
from ..export.bundle import Bundle

if TYPE_CHECKING:
    from .builder import Options
    from .profiles import Limits

PRECISIONS = ("bf16", "fp16", "fp32")
DEVICE = "cuda"


def load() -> Any:
    """The module. Raises MissingDependency where it is absent or broken."""
    try:
        import torch_tensorrt
    except (ImportError, OSError) as e:
        raise MissingDependency(
            f"vision_compiler torch_tensorrt needs torch-tensorrt ({e}): pip install 'torch-tensorrt>=2.11'"
        ) from e
    return torch_tensorrt


def compile_vision(
    bundle: Bundle, limits: Limits, options: Options, timing_cache: Path, target: Path
) -> None:
    """Write `target`, a TorchScript that takes uint8 [N, size, size, 3], N up to max_images.

    Raises MissingDependency, CheckpointError, BundleError where the checkpoint has changed, UserError for a
    precision that it does not have.
    """
    torch_tensorrt = load()
    import torch

    from ..export.quantize import fill
    from ..export.torchscript import materialised

    precision = bundle.graphs["vision"].precision
    if precision not in PRECISIONS:
        raise UserError(
            f"vision_compiler torch_tensorrt takes vision precisions {', '.join(PRECISIONS)}, the bundle has "
            f"{precision}: leave it out"
        )
    graph = _graph(bundle, precision)
    weights = target.with_suffix(".weights")
    module, stored = materialised(graph, weights)
    fill(module, graph.weights, stored)
    module = module.to(DEVICE)
    weights.unlink()

    (spec,) = graph.inputs
    most = limits.max_images
    sizes = [[n, *(int(d) for d in spec.shape[1:])] for n in (1, (most + 1) // 2, most)]
    shapes = dict(zip(("min_shape", "opt_shape", "max_shape"), sizes, strict=True))
    if most == 1:
        shapes = {"shape": sizes[0]}
    pixels = torch_tensorrt.Input(**shapes, dtype=torch.uint8)
    with torch.no_grad():
        compiled = torch_tensorrt.compile(
            module,
            ir="dynamo",
            inputs=[pixels],
            min_block_size=1,
            disable_tf32=precision == "fp32",
            optimization_level=options.opt_level,
            workspace_size=options.workspace or 0,
            immutable_weights=not options.refit,
            enable_weight_streaming=options.weight_streaming,
            timing_cache_path=str(timing_cache),
        )
        example = torch.zeros(sizes[1], dtype=torch.uint8, device=DEVICE)
        torch_tensorrt.save(compiled, str(target), output_format="torchscript", arg_inputs=[example])


def _graph(bundle: Bundle, precision: str) -> Any:
    """The encoder as the exporter saw it. Raises BundleError where the checkpoint is another by now."""
    import dataclasses

    from ..export.checkpoint import Checkpoint, resolve
    from ..export.families import FAMILIES, Options
    from ..export.graph import GraphPlan
    from ..export.target import target

    known = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in bundle.origin.options.items() if name in known}
    where = bundle.origin.checkpoint
    source = Checkpoint(resolve(where, given.get("revision")))
    plan = FAMILIES[bundle.model.family].plan(source, Options(**given))
    if "-".join(Checkpoint(f).fingerprint() for f in plan.folders) != bundle.origin.fingerprint:
        raise BundleError(
            f"{where} is not the checkpoint that {bundle.path} was exported from: export it again"
        )
    return GraphPlan.of_vision(plan, target("torchscript"), precision)

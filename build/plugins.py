"""The plugins of a rewritten graph (rewrite.py): TensorRT's side of the kernels in export/paged_attention.

Ahead of time: TensorRT asks for PTX, grid and arguments while it builds, and puts them into the plan, so that
an engine needs neither Python nor the Triton language to run. CacheWrite's outputs are its inputs' memory:
the builder must set PreviewFeature.ALIASED_PLUGIN_IO_10_03.

Run against the Python half of TensorRT's bindings; never run on real TensorRT yet.
"""

# no `from __future__ import annotations`: TensorRT reads the annotations of what is registered here
import functools
import re
from typing import Any

from ..errors import BundleError, InternalError, MissingDependency
from ..export.paged_attention import BLOCK_SIZE
from .rewrite import DOMAIN

VERSION = "1"
"""TensorRT gives every quick plugin this one."""
SPLITS = 8
"""Ranges of a row's context: the default of the kernels."""

_capability = 0  # of the GPU that is built for; TensorRT registers a plugin once in a process


def register(capability: str) -> None:
    """Registers the plugins with TensorRT, to be compiled from now on for compute capability `capability`
    ("9.0"). May be called again. Needs TensorRT, which trt.load() has found, torch and the Triton language.
    """
    global _capability
    try:
        from ..export.paged_attention import kernels  # noqa: F401  a failure inside TensorRT's build says less
    except ImportError as e:
        raise MissingDependency(f"The TensorRT plugins need {e.name}: pip install torch triton") from e
    _capability = int(capability.replace(".", ""))
    _define()


@functools.cache
def _define() -> None:
    import numpy as np
    import tensorrt as trt
    import tensorrt.plugin as trtp
    from numpy.typing import NDArray

    # Attributes are arrays of one element: TensorRT before 11.4 would make an int of one by int(array), which
    # NumPy 2.4 refuses. An attribute that a kernel needs must be read by name here: none is kept in the plan.
    dtypes = {trt.float16: "float16", trt.bfloat16: "bfloat16", trt.float32: "float32"}

    def formats(types: str) -> Any:
        """d: the graph's type, f: float32, i: int32; of all inputs, then all outputs."""
        names = {"d": "FP16|BF16|FP32", "f": "FP32", "i": "INT32"}
        return trtp.AutoTuneCombination(", ".join(names[t] for t in types), "LINEAR")

    def kernel(name: str, desc: Any, T: Any, R: Any, scalars: list[Any], **sizes: Any) -> Any:
        """What TensorRT wants to know of a kernel; desc: of a tensor in the graph's type."""
        from ..export.paged_attention import kernels

        dtype = dtypes[desc.dtype]
        built = _compile(name, dtype, _capability, **sizes)
        written = [kind for kind in kernels.signature(name, dtype).values() if kind != "constexpr"]
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = kernels.grid(name, T, R, built.constants)
        launch.block_x = 32 * built.num_warps
        launch.shared_mem = built.shared
        arguments = trtp.SymIntExprs(len(scalars))
        for i, scalar in enumerate(scalars):
            arguments[i] = trtp.SymInt32(scalar)
        return built.name, visible(built.name, built.ptx, len(written)), launch, arguments

    # key, value [T, kv_heads · D]; caches [blocks, block_size, kv_heads, D]; cumulative [R + 1], past [R],
    # table [R, M]

    @trtp.register(f"{DOMAIN}::CacheWrite")
    def cache_write_shapes(
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,
        key_cache: trtp.TensorDesc,
        value_cache: trtp.TensorDesc,
        cumulative: trtp.TensorDesc,
        past: trtp.TensorDesc,
        table: trtp.TensorDesc,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        return key_cache.aliased(), value_cache.aliased()

    @trtp.autotune(f"{DOMAIN}::CacheWrite")
    def cache_write_formats(key, value, key_cache, value_cache, cumulative, past, table, outputs):
        return [formats("ddddiiidd")]

    @trtp.aot_impl(f"{DOMAIN}::CacheWrite")
    def cache_write_kernel(
        key, value, key_cache, value_cache, cumulative, past, table, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        T, R, M = key.shape_expr[0], past.shape_expr[0], table.shape_expr[1]
        block_size, kv_heads, head_dim = _static(key_cache, 1, 2, 3)
        sizes = {"kv_heads": kv_heads, "heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
        return kernel("cache_write", key, T, R, [T, R, M], **sizes)

    # query [T, heads · D] → partial [splits, T, heads, D], stats [splits, T, heads, 2]

    @trtp.register(f"{DOMAIN}::PartialAttention")
    def partial_attention_shapes(
        query: trtp.TensorDesc,
        key_cache: trtp.TensorDesc,
        value_cache: trtp.TensorDesc,
        cumulative: trtp.TensorDesc,
        past: trtp.TensorDesc,
        table: trtp.TensorDesc,
        num_heads: NDArray[np.int32],
        kv_num_heads: NDArray[np.int32],
        scale: NDArray[np.float32],
        local_window_size: NDArray[np.int32],
        splits: NDArray[np.int32],
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        items = int(splits[0]), query.shape_expr[0], int(num_heads[0])
        return (
            trtp.from_shape_expr((*items, key_cache.shape_expr[3]), trt.float32),
            trtp.from_shape_expr((*items, 2), trt.float32),
        )

    @trtp.autotune(f"{DOMAIN}::PartialAttention")
    def partial_attention_formats(query, key_cache, value_cache, cumulative, past, table, outputs):
        return [formats("dddiiiff")]

    @trtp.aot_impl(f"{DOMAIN}::PartialAttention")
    def partial_attention_kernel(
        query, key_cache, value_cache, cumulative, past, table,
        num_heads, kv_num_heads, scale, local_window_size, splits, outputs, tactic,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:  # fmt: skip
        T, R, M = query.shape_expr[0], past.shape_expr[0], table.shape_expr[1]
        block_size, kv_heads, head_dim = _static(key_cache, 1, 2, 3)
        if kv_heads != int(kv_num_heads[0]):
            raise BundleError(f"kv_num_heads is {int(kv_num_heads[0])}, but key_cache has {kv_heads}")
        return kernel(
            "partial_attention", query, T, R, [T, R, M],
            kv_heads=kv_heads, heads=int(num_heads[0]), head_dim=head_dim, block_size=block_size,
            window=int(local_window_size[0]), splits=int(splits[0]), scale=float(scale[0]),
        )  # fmt: skip

    @trtp.register(f"{DOMAIN}::Combine")
    def combine_shapes(
        partial: trtp.TensorDesc, stats: trtp.TensorDesc, query: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        return query.like()

    @trtp.autotune(f"{DOMAIN}::Combine")
    def combine_formats(partial, stats, query, outputs):
        return [formats("ffdd")]

    @trtp.aot_impl(f"{DOMAIN}::Combine")
    def combine_kernel(
        partial, stats, query, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        T = query.shape_expr[0]
        splits, heads, head_dim = _static(partial, 0, 2, 3)
        sizes = {"kv_heads": heads, "heads": heads, "head_dim": head_dim, "splits": splits}
        return kernel("combine", query, T, 0, [T], block_size=BLOCK_SIZE, **sizes)


@functools.cache  # TensorRT asks for every layer, and for some more than once
def _compile(name: str, dtype: str, capability: int, **sizes: Any) -> Any:
    from ..export.paged_attention import kernels

    return kernels.compile(name, dtype, capability, **sizes)


def _static(desc: Any, *axes: int) -> list[int]:
    sizes = [int(desc.shape[axis]) for axis in axes]
    if min(sizes) < 0:
        raise InternalError(f"sizes {axes} of a cache must be known when the engine is built: {desc.shape}")
    return sizes


def visible(name: str, ptx: str, count: int) -> str:
    """PTX whose entry `name` has its first `count` parameters only, the ones that are written in Python.

    The compiler of the Triton language appends pointers to scratch memory (two since 3.5), unread where none
    is wanted. TensorRT passes inputs, scalars and outputs; whether it adds two nulls depends on its version.
    Without them both are right: the driver takes as many arguments as the entry has.
    """
    found = re.search(rf"\.entry {re.escape(name)}\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    parameters = re.split(r",\s*", found[1]) if found else []
    if found is None or len(parameters) < count:
        raise InternalError(f"the compiled kernel {name} has {len(parameters)} parameters, not {count}")
    for hidden in [p.split()[-1] for p in parameters[count:]]:
        if re.search(rf"\b{re.escape(hidden)}\b", ptx[found.end() :]):
            raise InternalError(f"the compiled kernel {name} reads {hidden}, which TensorRT does not pass")
    kept = ",\n\t".join(parameters[:count])
    return f"{ptx[: found.start(1)]}{kept}{ptx[found.end(1) :]}"

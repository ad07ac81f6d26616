"""Inputs of the fused ops for the tests, of drawn sizes; each may lack what is optional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..paged_attention.cases import TYPES, Case

kinds = st.sampled_from(["float32", "float16", "bfloat16"])
tokens = st.integers(1, 5)
EPS = 1e-5


@dataclass(frozen=True)
class Norm:
    """Of add_rms_norm. `delta`: with the output of a product."""

    T: int
    width: int
    dtype: str = "float32"
    delta: bool = True
    bias: bool = True
    scale: bool = True
    size: float = 1.0

    def arrays(self) -> list[np.ndarray | None]:
        rng = np.random.default_rng(self.width)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        x, value, bias, weight = (normal(*s) for s in ((self.T, self.width),) * 2 + ((self.width,),) * 2)
        scale = np.exp2(rng.integers(-9, 9, (self.T, 1))).astype(np.float32)
        given = self.delta and value.astype(TYPES[self.dtype])
        optional = [a if self.delta and there else None
                    for a, there in ((given, True), (bias, self.bias), (scale, self.scale))]  # fmt: skip
        return [x * np.float32(self.size), *optional, weight]


@dataclass(frozen=True)
class Attention:
    """Of qkv_attention: `step` with heads as they come; its head_dim and the caches' are `fill` apart."""

    step: Case
    fill: int = 0
    rotary: int = 16
    bias: bool = False
    logn: bool = False
    norm: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return {**self.step.attributes, "eps": EPS}

    def arrays(self) -> list[np.ndarray | None]:
        s = self.step
        *_, keys, values, cumulative, past, table = s.arrays()
        rng = np.random.default_rng(s.seed)
        T, head_dim, heads = len(s.arrays()[0]), s.head_dim - self.fill, s.kv_heads * (s.group + 2)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        value = normal(T, heads * head_dim).astype(TYPES[s.dtype])
        bias = 3 * normal(heads * head_dim) if self.bias else None
        logn = 1 + rng.random((T, 1), np.float32) if self.logn else None
        norms = [1 + normal(head_dim) / 9 if self.norm else None for _ in range(2)]
        angles = rng.uniform(0, 7, (T, self.rotary // 2)).astype(np.float32)
        tables = np.cos(angles), np.sin(angles)
        return [value, bias, logn, *norms, *tables, keys, values, cumulative, past, table]


def norms(widths: tuple[int, ...]) -> Any:
    return st.builds(
        Norm, tokens, st.sampled_from(widths), kinds, st.booleans(), st.booleans(), st.booleans(),
        st.sampled_from([1.0, 1e-4, 1e4]),
    )  # fmt: skip


def attentions(steps: Any) -> Any:
    """Around `steps` of head size 32 or more."""
    return st.builds(
        Attention, steps, st.sampled_from([0, 0, 8, 15]), st.sampled_from([2, 16, 12]), st.booleans(),
        st.booleans(), st.booleans(),
    )  # fmt: skip

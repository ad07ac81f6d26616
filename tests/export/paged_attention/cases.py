"""Steps of the op for the tests: any mixture of rows over a pool of blocks in any order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:  # which torch does not take from NumPy
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@dataclass(frozen=True)
class Case:
    """One step: rows are (past, new tokens)."""

    rows: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int = -1
    spare_tokens: int = 0  # T beyond the last row's
    unmapped: bool = False  # the last row has no blocks, as a graph's padding
    dtype: str = "float32"
    seed: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_heads": self.kv_heads * self.group,
            "kv_num_heads": self.kv_heads,
            "scale": self.head_dim**-0.5,
            "local_window_size": self.window,
        }

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The eight inputs. Every place of the caches that holds no past token is NaN: nobody may use it."""
        rng = np.random.default_rng(self.seed)
        lengths = np.array([n for _, n in self.rows])
        past = np.array([p for p, _ in self.rows], np.int32)
        blocks = -(-(past + lengths) // self.block_size)
        table = np.full((len(self.rows), max(blocks.max(), 1) + 1), -1, np.int32)
        free = rng.permutation(blocks.sum() + 3)
        for r, count in enumerate(blocks):
            table[r, :count], free = free[:count], free[count:]
        tokens = lengths.sum() + self.spare_tokens

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(TYPES[self.dtype])

        caches = []
        for _ in range(2):
            cache = normal(blocks.sum() + 3, self.block_size, self.kv_heads, self.head_dim)
            unused = np.ones(cache.shape[:2], bool)
            for blocks_of_row, length in zip(table, past, strict=True):
                t = np.arange(length)
                unused[blocks_of_row[t // self.block_size], t % self.block_size] = False
            cache[unused] = np.nan
            caches.append(cache)
        width = self.kv_heads * self.head_dim
        if self.unmapped:
            table[-1] = -1
        q = normal(tokens, width * self.group)
        cumulative = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return q, normal(tokens, width), normal(tokens, width), *caches, cumulative, past, table


def cases(head_dims: tuple[int, ...], longest: int = 40, dtypes: tuple[str, ...] = ("float32",)) -> Any:
    """Rows of no, one and several new tokens, over pasts around block edges."""
    past = st.integers(0, longest)
    rows = st.lists(st.tuples(past, st.sampled_from([0, 1, 1, 2, 5, 15, 16, 17, 33])), min_size=1, max_size=5)
    return st.builds(
        Case,
        rows=rows.map(tuple),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 4, 8]),
        head_dim=st.sampled_from(head_dims),
        block_size=st.sampled_from([16, 32]),
        window=st.sampled_from([-1, -1, 1, 7, 20]),
        spare_tokens=st.sampled_from([0, 0, 3]),
        unmapped=st.booleans(),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 9),
    ).filter(lambda c: sum(n for _, n in c.rows) + c.spare_tokens > 0)

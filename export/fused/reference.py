"""The ops in NumPy: the specification that kernels and torch ops are compared with.

Arrays as in the package's docstring, of any float type; everything is float64, results are not rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..paged_attention import reference


def _value(value: np.ndarray, bias: np.ndarray | None, scale: np.ndarray | None = None) -> np.ndarray:
    value = value.astype(float)
    value = value if scale is None else value / scale
    return value if bias is None else value + bias


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight


def add_rms_norm(
    x: np.ndarray,
    value: np.ndarray | None,
    bias: np.ndarray | None,
    scale: np.ndarray | None,
    weight: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, np.ndarray]:
    """→ sum, normed"""
    total = x.astype(float)
    if value is not None:
        total = total + _value(value, bias, scale)
    return total, _rms_norm(total, weight, eps)


def rope(
    value: np.ndarray,
    bias: np.ndarray | None,
    logn: np.ndarray | None,
    q_norm: np.ndarray | None,
    k_norm: np.ndarray | None,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    num_heads: int,
    kv_num_heads: int,
    eps: float,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """→ query, key, value [T, heads, width], a head's dimensions from D on zeros."""
    x = _value(value, bias)
    x = x.reshape(len(x), num_heads + 2 * kv_num_heads, -1)
    q, k, v = np.split(x, [num_heads, num_heads + kv_num_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, eps), _rms_norm(k, k_norm, eps)
    if logn is not None:
        q = q * logn[:, None]
    half = cos.shape[1]
    turn = (cos + 1j * sin)[:, None]
    turned = []
    for y in (q, k):
        z = (y[..., :half] + 1j * y[..., half : 2 * half]) * turn
        turned.append(np.concatenate([z.real, z.imag, y[..., 2 * half :]], -1))
    fill = [(0, 0), (0, 0), (0, width - x.shape[2])]
    return tuple(np.pad(y, fill) for y in (*turned, v))  # type: ignore[return-value]


def qkv_attention(
    value: np.ndarray,
    bias: np.ndarray | None,
    logn: np.ndarray | None,
    q_norm: np.ndarray | None,
    k_norm: np.ndarray | None,
    cos: np.ndarray,
    sin: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    *step: np.ndarray,
    num_heads: int,
    kv_num_heads: int,
    eps: float,
    scale: float,
    local_window_size: int = -1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """→ output, key_cache_out, value_cache_out. Queries, keys and values are rounded to the caches' type."""
    heads: dict[str, Any] = {"num_heads": num_heads, "kv_num_heads": kv_num_heads}
    width = key_cache.shape[-1]
    qkv = rope(value, bias, logn, q_norm, k_norm, cos, sin, eps=eps, width=width, **heads)
    q, k, v = (y.reshape(len(y), -1).astype(key_cache.dtype) for y in qkv)
    return reference.paged_attention(
        q, k, v, key_cache, value_cache, *step, scale=scale, local_window_size=local_window_size, **heads
    )


def silu_mul(value: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    gate, up = np.split(_value(value, bias), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def token_scaled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ x · scale, scale float [T, 1]: the power of two that brings a token's largest magnitude, taken as at
    least 2^-24, to (1/2, 1]."""
    mantissa, exponent = np.frexp(np.abs(x).max(1, keepdims=True).clip(2.0**-24).astype(float))
    scale = np.ldexp(1.0, -np.where(mantissa == 0.5, exponent - 1, exponent))
    return x * scale, scale

"""Rounding to 4 bits that looks at a layer's inputs: GPTQ (Frantar et al., arXiv:2210.17323), towards what
the unrounded model gives (as GPTAQ does, Li et al., arXiv:2504.02692).

A product with rounded weights Q [R, K] errs by |Q x − W x̃|², x̃ being its input in the unrounded model and x
what the rounded layers before it make of that. With H = mean of x xᵀ this is |(Q − W*) x|², and a rest that
no Q changes, for

    W* = W + W · mean of (x̃ − x) xᵀ · H⁻¹

which is W's least-squares answer to the errors so far. It is not least where every weight is nearest to its
own: the columns of W* are rounded one after another, and what rounding leaves of one is made up for by those
still to come, as optimal brain surgeon says: with column i rounded to q,

    w_j ← w_j − (w_i − q) · U_ij / U_ii    for j > i,    UᵀU = H⁻¹, U upper triangular

Columns come in falling order of H's diagonal ("act-order"): the inputs that count most are rounded while
there is most left to make up with. Scales and zero points are those of plain rounding, fixed before ("static
groups"), so that values go back to their own places: the file knows no order, and running it costs nothing.

Cost: 3 K³ for U and W*, and 2 R K² for the columns, which is K / T of the product of W with T inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .quantize import block_of, grid, in_blocks, stored

DAMPING = 0.01  # of the diagonal's mean, added to it: what so few inputs say of H's small directions is noise
TRIES = 4  # each with ten times the damping
LAZY = 128  # columns whose errors reach the later ones together


def rounded(rows: Iterable[Tensor], squares: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [R, K], float32, in chunks of its rows → what quantize.quantize(weight, 4) stores it as.

    squares, cross: float32 [K, K], the means of x xᵀ and of x̃ xᵀ over the layer's inputs x, and what the
    unrounded model has in their place. Chunks take seven times their memory, these three times theirs. Raises
    ValueError where `squares` holds what is no number.
    """
    order, upper, change = _surgeon(squares, cross)
    found = (_rounded(torch.addmm(chunk, chunk, change), order, upper) for chunk in rows)
    values, scales, zero_points = zip(*found, strict=True)
    return torch.cat(values), torch.cat(scales), torch.cat(zero_points)


def _surgeon(squares: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns' order int64 [K], U float32 [K, K] in that order, and (cross − H) H⁻¹ in their own."""
    order = squares.diagonal().argsort(descending=True, stable=True)
    # H backwards = L Lᵀ; turned round, L⁻¹ is U: no inverse of H, which is worse conditioned
    back = order.flip(0)
    damping = DAMPING * (float(squares.diagonal().mean()) or 1.0)  # no input is ever anything but zero: any
    for _ in range(TRIES):
        damped = squares[back.unsqueeze(1), back]
        damped.diagonal().add_(damping)  # an input that is always zero gets this alone
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            change = torch.empty_like(squares)
            change[back] = torch.cholesky_solve((cross - squares).t()[back], lower)
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
            return order, inverse.flip(0, 1), change.t()
        damping *= 10
    raise ValueError(f"the inputs' squares have no Cholesky factor: their mean is {float(squares.mean())}")


def _rounded(weights: Tensor, order: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns, block = weights.shape[1], block_of(weights.shape[1], 4)
    scales, zeros = grid(in_blocks(weights, block), 4)
    by_block = scales.t().contiguous(), zeros.t().contiguous()
    w = weights.t()[order]  # a column is contiguous
    q = zeros.t().repeat_interleave(block, 0)  # what fills a last, partial block stays so: zero
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        errors = torch.empty_like(w[start:stop])
        for i, column in enumerate(order[start:stop].tolist(), start):
            scale, zero = (grid_[column // block] for grid_ in by_block)
            torch.div(w[i], scale, out=q[column]).round_().add_(zero).clamp_(0, 15)
            error = torch.sub(w[i], (q[column] - zero) * scale, out=errors[i - start]).div_(upper[i, i])
            w[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return stored(q.t().unflatten(1, (-1, block)), scales, zeros, 4)

"""Tokens from logits where the logits are: `sampling.pick` for many rows at once, in torch.

Nothing here waits for the device but the last line of `result`: which filters a batch needs is decided
from the draws, which the host knows, and no shape depends on a tensor's values. So the vocabulary is
sorted only where top_p or min_p is in force. Filters and sums are float64, as on the host: a token differs
only where rounding decides, that is within 1e-15 of the border between two.

On a CPU everything here is tested. Never run on real hardware yet.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from ..step import Draw, Picks, Result

ROWS = 32  # at a time: of 150,000 tokens each, float64, a working copy takes 39 MB


@dataclass(frozen=True)
class Draws:
    """The draws of K rows, on the device, and what the host knows of them."""

    values: torch.Tensor  # float64 [K, 6]: u, temperature, top_k (0: all), top_p, min_p, greedy (0 or 1)
    samples: bool  # some row is not greedy
    sorts: bool  # some row has top_p or min_p
    largest: int  # top_k, 0 where no row has one


def pack(draws: Items[Draw], vocab: int, device: torch.device | str) -> Draws:
    """One transfer to the device, which nobody waits for."""
    rows, sampled = [], [d for d in draws if not d.greedy]
    for d in draws:
        filters = (1.0, 0, 1.0, 0.0) if d.greedy else (d.temperature, d.top_k, d.top_p, d.min_p)
        rows.append((d.u, *filters, d.greedy))
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    values[:, 2][values[:, 2] >= vocab] = 0
    return Draws(
        _send(values, device),
        samples=bool(sampled),
        sorts=any(d.top_p < 1 or d.min_p for d in sampled),
        largest=max((d.top_k for d in sampled if d.top_k < vocab), default=0),
    )


def pick(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [K] and their log-probabilities under the raw logits, float32 [K].

    `logits`: float32 [K, vocab], on the draws' device; not changed.
    """
    tokens = logits.argmax(-1)
    if draws.samples:
        parts = zip(logits.split(ROWS), tokens.split(ROWS), draws.values.split(ROWS), strict=True)
        tokens = torch.cat([_sample(x, best, values, draws) for x, best, values in parts])
    peak = logits.amax(-1, keepdim=True)
    mass = (logits - peak).exp().sum(-1, dtype=torch.float64)
    chosen = (logits.gather(1, tokens[:, None]) - peak)[:, 0]
    return tokens, (chosen - mass.log()).float()


def _sample(logits: torch.Tensor, best: torch.Tensor, values: torch.Tensor, draws: Draws) -> torch.Tensor:
    u, temperature, top_k, top_p, min_p, greedy = values[:, :, None].unbind(1)  # [K, 1] each
    x = logits.double()
    peak = x.amax(-1, keepdim=True)
    if draws.largest:
        at = (top_k.long() - 1).clamp(min=0)
        border = x.topk(draws.largest).values.gather(1, at)  # ties with it stay
        x = x.masked_fill((x < border) & (top_k > 0), -torch.inf)
    # the largest becomes 0 first: no temperature is too small for it
    probs = ((x - peak) / temperature).exp()
    probs = probs / probs.sum(-1, keepdim=True)
    order = torch.arange(x.shape[1], device=x.device).expand_as(x)  # candidates: by id, or as sorted
    if draws.sorts:
        falling, ids = probs.sort(dim=-1, descending=True, stable=True)
        mass = falling.cumsum(-1).roll(1, -1)  # of those before each
        mass[:, 0] = -1  # the first always stays
        falling = falling.masked_fill((mass >= top_p) & (top_p < 1), 0)
        falling = falling.masked_fill(falling < min_p * falling[:, :1], 0)
        filtered = (top_p < 1) | (min_p > 0)
        probs, order = torch.where(filtered, falling, probs), torch.where(filtered, ids, order)
    edges = probs.cumsum(-1)
    hits = (edges > u * edges[:, -1:]) & (probs > 0)  # the latter: a parallel sum need not be monotone
    at = hits.to(torch.int8).argmax(-1, keepdim=True)  # the first
    token = order.gather(1, at)
    # without a hit: logits that are not finite, which have no probabilities, or rounding at the very end
    as_best = (greedy > 0) | ~hits.gather(1, at)
    return torch.where(as_best[:, 0], best, token[:, 0])


def result(logits: torch.Tensor, draws: list[Draw | None] | None) -> Result:
    """What a step returns, for `Step.draws`: picks for the rows that have one, logits for the others.

    `logits`: float32 [K, vocab]. The host waits once, after everything is on its way.
    """
    if draws is None:
        return Result(_fetch(logits)[0])
    mine, others = ([k for k, d in enumerate(draws) if (d is None) is other] for other in (False, True))
    packed = pack([d for d in draws if d], logits.shape[1], logits.device)
    tokens, logprobs = pick(_rows(logits, mine), packed)
    wanted = [_rows(logits, others)] if others else []
    found, rows, *whole = _fetch(tokens, logprobs, *wanted)
    picks = Picks(np.zeros(len(draws), np.int64), np.zeros(len(draws), np.float32))
    picks.tokens[mine], picks.logprobs[mine] = found, rows
    return Result(whole[0] if whole else None, picks)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, _send(torch.tensor(rows, dtype=torch.int64), logits.device))


def _send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _fetch(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Copies on the host; all of them are awaited together."""
    if tensors[0].device.type == "cpu":
        return [t.numpy() for t in tensors]
    hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [host.numpy() for host in hosts]

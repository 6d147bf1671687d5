"""Drawing tokens from rows of logits, all rows at once. Knows distributions and uniform numbers, no seeds and no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A token to be drawn from one row: temperature above 0, top_k 0 is all; `uniform` in [0, 1) decides."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def target_probabilities(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The distributions [n, V] (float64) that `draws` draw from: temperature, min_p, top_k, top_p, in vLLM's order."""
    rows, device = [draw.row for draw in draws], logits_RV.device
    temperature, top_p, min_p = (
        torch.tensor([[getattr(draw, name)] for draw in draws], dtype=torch.float64, device=device)
        for name in ("temperature", "top_p", "min_p")
    )
    wide = logits_RV[rows].double()
    probs = torch.softmax((wide - wide.amax(1, keepdim=True)) / temperature, dim=1)
    num_tokens = probs.shape[1]
    if any(draw.min_p > 0.0 for draw in draws):
        probs = torch.where(probs < min_p * probs.amax(1, keepdim=True), 0.0, probs)
        probs /= probs.sum(1, keepdim=True)
    limits = [draw.top_k if 0 < draw.top_k < num_tokens else num_tokens for draw in draws]
    if min(limits) == num_tokens and all(draw.top_p >= 1.0 for draw in draws):
        return probs
    top_k = torch.tensor([[limit] for limit in limits], device=device)
    best, order = torch.sort(probs, dim=1, descending=True, stable=True)
    place = torch.arange(best.shape[1], device=device)
    best = torch.where(place < top_k, best, 0.0)
    total = torch.where(top_k < num_tokens, best.sum(1, keepdim=True), 1.0)
    best /= total
    before = best.cumsum(1) - best
    best = torch.where((before >= top_p) & (place > 0), 0.0, best)
    cut = torch.zeros_like(probs).scatter_(1, order, best / best.sum(1, keepdim=True))
    return torch.where((top_k == num_tokens) & (top_p >= 1.0), probs, cut)


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each draw: the first whose cumulative probability exceeds the draw's uniform number."""
    probs = target_probabilities(logits_RV, draws)
    cumulative = probs.cumsum(1)
    wanted = torch.tensor([[draw.uniform] for draw in draws], dtype=torch.float64, device=probs.device) * cumulative[:, -1:]
    last = probs.shape[1] - 1
    found = torch.searchsorted(cumulative, wanted, right=True).clamp(max=last)
    last_possible = last - (probs > 0).flip(1).to(torch.int8).argmax(1, keepdim=True)
    tokens: list[int] = torch.where(probs.gather(1, found) > 0, found, last_possible).flatten().tolist()
    return tokens

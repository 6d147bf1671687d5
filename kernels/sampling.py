"""Drawing tokens from rows of logits, all rows at once. Knows distributions and uniform numbers, no seeds and no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.upload import upload


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
    return _probabilities(logits_RV, draws, *_tables(draws, logits_RV))


def _tables(draws: Sequence[Draw], logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Their fields, rows, and how many of the likeliest tokens each may have, in one copy to the device."""
    num_tokens = logits_RV.shape[1]
    limits = [draw.top_k if 0 < draw.top_k < num_tokens else num_tokens for draw in draws]
    fields = [(draw.temperature, draw.top_p, draw.min_p, draw.uniform) for draw in draws]
    tables = [np.array(fields, dtype=np.float64).reshape(-1, 4), np.array([draw.row for draw in draws], dtype=np.int64)]
    fields_n4, rows_n, top_k_n = upload([*tables, np.array(limits, dtype=np.int64)], logits_RV.device)
    return fields_n4, rows_n, top_k_n.unsqueeze(1)


def _probabilities(logits_RV: Tensor, draws: Sequence[Draw], fields_n4: Tensor, rows_n: Tensor, top_k: Tensor) -> Tensor:
    temperature, top_p, min_p = fields_n4[:, 0:1], fields_n4[:, 1:2], fields_n4[:, 2:3]
    wide = logits_RV.index_select(0, rows_n).double()
    probs = torch.softmax((wide - wide.amax(1, keepdim=True)) / temperature, dim=1)
    num_tokens = probs.shape[1]
    if any(draw.min_p > 0.0 for draw in draws):
        probs = torch.where(probs < min_p * probs.amax(1, keepdim=True), 0.0, probs)
        probs /= probs.sum(1, keepdim=True)
    if all(draw.top_p >= 1.0 and not 0 < draw.top_k < num_tokens for draw in draws):
        return probs
    best, order = torch.sort(probs, dim=1, descending=True, stable=True)
    place = torch.arange(best.shape[1], device=best.device)
    best = torch.where(place < top_k, best, 0.0)
    total = torch.where(top_k < num_tokens, best.sum(1, keepdim=True), 1.0)
    best /= total
    before = best.cumsum(1) - best
    best = torch.where((before >= top_p) & (place > 0), 0.0, best)
    cut = torch.zeros_like(probs).scatter_(1, order, best / best.sum(1, keepdim=True))
    return torch.where((top_k == num_tokens) & (top_p >= 1.0), probs, cut)


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each draw: the first whose cumulative probability exceeds the draw's uniform number."""
    tokens: list[int] = drawn(logits_RV, draws).tolist()
    return tokens


def drawn(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The tokens of draw_tokens, int64, where the logits are: nothing waits for them yet."""
    fields_n4, *rest = _tables(draws, logits_RV)
    probs = _probabilities(logits_RV, draws, fields_n4, *rest)
    cumulative = probs.cumsum(1)
    last = probs.shape[1] - 1
    found = torch.searchsorted(cumulative, fields_n4[:, 3:4] * cumulative[:, -1:], right=True).clamp(max=last)
    last_possible = last - (probs > 0).flip(1).to(torch.int8).argmax(1, keepdim=True)
    return torch.where(probs.gather(1, found) > 0, found, last_possible).flatten()

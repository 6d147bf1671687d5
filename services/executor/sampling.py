"""Drawing tokens from logits, with random numbers that depend on (seed, position) only. Knows no requests or trees.

The same request draws the same token at the same position alone, in a batch, under speculation or on another executor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.messages import Sampling

NUM_PROBABLE = 1024
"""Tokens that nucleus sampling looks at before it sorts the whole vocabulary."""


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1), a pure function of its arguments (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


class NonFiniteLogitsError(FloatingPointError):
    """A row that a token has to be drawn from holds NaN, or no finite value at all."""


class Draws:
    """Tokens drawn from the rows of one pass. A row costs nothing until its token is asked for, greedy ones apart."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV = logits_RV
        highest_R, greedy_R = logits_RV.max(dim=-1)
        self._greedy: list[int] = greedy_R.tolist()
        self._is_finite: list[bool] = torch.isfinite(highest_R).tolist()

    def token(self, row: int, sampling: Sampling, position: int, change: Callable[[Tensor], Tensor] | None = None) -> int:
        """The token for the absolute position `position`, from the row's logits as `change` makes them.

        Raises NonFiniteLogitsError, naming the row.
        """
        if not self._is_finite[row]:
            raise NonFiniteLogitsError(f"logits of row {row} are not finite")
        if change is None:
            if sampling.temperature <= 0.0:
                return self._greedy[row]
            return _draw(self.logits_RV[row], sampling, uniform(sampling.seed, position))
        logits_V = change(self.logits_RV[row])
        highest, greedy = logits_V.max(dim=-1)
        if not bool(torch.isfinite(highest)):
            raise NonFiniteLogitsError(f"no token is possible in row {row}")
        return int(greedy) if sampling.temperature <= 0.0 else _draw(logits_V, sampling, uniform(sampling.seed, position))


def target_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] (float64) that `sampling` draws from: temperature, min_p, top_k, top_p, in vLLM's order."""
    wide_V = logits_V.double()
    probs_V = torch.softmax((wide_V - wide_V.max()) / sampling.temperature, dim=-1)
    if sampling.min_p > 0.0:
        probs_V[probs_V < sampling.min_p * probs_V.max()] = 0.0
        probs_V /= probs_V.sum()
    num_kept = sampling.top_k if 0 < sampling.top_k < probs_V.numel() else probs_V.numel()
    if num_kept == probs_V.numel() and sampling.top_p >= 1.0:
        return probs_V
    sorted_probs, order = _most_probable(probs_V, num_kept, sampling.top_p)
    sorted_probs[num_kept:] = 0.0
    sorted_probs /= sorted_probs.sum() if num_kept < probs_V.numel() else 1.0
    before = torch.cumsum(sorted_probs, dim=0) - sorted_probs
    sorted_probs[(before >= sampling.top_p) & (torch.arange(sorted_probs.numel()) > 0)] = 0.0
    kept = torch.zeros_like(probs_V)
    kept[order] = sorted_probs / sorted_probs.sum()
    return kept


def _most_probable(probs_V: Tensor, num_kept: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Enough of the most probable tokens, sorted: sorting a whole vocabulary takes far longer than the few that matter."""
    few = min(NUM_PROBABLE, probs_V.numel())
    sorted_probs, order = torch.topk(probs_V, few)
    if num_kept <= few or (num_kept == probs_V.numel() and float(sorted_probs.sum()) > top_p):
        return sorted_probs, order
    return torch.sort(probs_V, descending=True, stable=True)


def _draw(logits_V: Tensor, sampling: Sampling, u: float) -> int:
    probs_V = target_probabilities(logits_V.cpu(), sampling)
    cumulative = torch.cumsum(probs_V, dim=0)
    index = min(int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True)), probs_V.numel() - 1)
    return index if probs_V[index] > 0 else int(torch.nonzero(probs_V)[-1, 0])

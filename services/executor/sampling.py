"""Drawing tokens from logits, with random numbers that depend on (seed, position) only. Knows no requests or trees.

The same request draws the same token at the same position alone, in a batch, under speculation or on another executor.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from common.messages import Sampling


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1), a pure function of its arguments (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


def draw_tokens(logits_RV: Tensor, samplings: Seq[Sampling], positions: Seq[int]) -> list[int]:
    """One token per row: row i is drawn by `samplings[i]` for the absolute position `positions[i]`.

    Raises FloatingPointError if a row holds no finite maximum (NaN logits), naming the row.
    """
    if len(samplings) == 0:
        return []
    greedy = torch.argmax(logits_RV, dim=-1)
    finite = torch.isfinite(logits_RV.gather(1, greedy[:, None])).squeeze(1)
    if not bool(finite.all()):
        raise FloatingPointError(f"logits of row {int(torch.nonzero(~finite)[0, 0])} are not finite")
    tokens: list[int] = greedy.tolist()
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0.0:
            tokens[row] = _draw(logits_RV[row], sampling, uniform(sampling.seed, positions[row]))
    return tokens


def target_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] (float64) that `sampling` draws from: temperature, then top_k, then top_p, as vLLM orders them."""
    wide_V = logits_V.double()
    probs_V = torch.softmax((wide_V - wide_V.max()) / sampling.temperature, dim=-1)
    num_kept = sampling.top_k if 0 < sampling.top_k < probs_V.numel() else probs_V.numel()
    if num_kept == probs_V.numel() and sampling.top_p >= 1.0:
        return probs_V
    sorted_probs, order = torch.sort(probs_V, descending=True, stable=True)
    sorted_probs[num_kept:] = 0.0
    sorted_probs /= sorted_probs.sum()
    before = torch.cumsum(sorted_probs, dim=0) - sorted_probs
    sorted_probs[(before >= sampling.top_p) & (torch.arange(probs_V.numel()) > 0)] = 0.0
    kept = torch.zeros_like(probs_V)
    kept[order] = sorted_probs / sorted_probs.sum()
    return kept


def _draw(logits_V: Tensor, sampling: Sampling, u: float) -> int:
    cumulative = torch.cumsum(target_probabilities(logits_V.cpu(), sampling), dim=0)
    index = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    return min(index, int(torch.nonzero(cumulative.diff(prepend=cumulative.new_zeros(1)))[-1, 0]))

"""What a drafter for a model is like: its layers of features, its size, its rows of the vocabulary. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 128
"""Committed tokens that a row attends to."""
MAX_DEPTH = 6


def feature_layers(num_layers: int) -> tuple[int, ...]:
    """One low, one in the middle, the last."""
    return tuple(sorted({max(1, round(0.3 * num_layers)), max(1, round(2 / 3 * num_layers)), num_layers}))


def inner_size(intermediate_size: int) -> int:
    """Its MLP is two thirds as wide as the target's."""
    return max(16, intermediate_size * 2 // 3 // 16 * 16)


def with_rest(weight_VH: Tensor, vocabulary: Sequence[int]) -> Tensor:
    """The vocabulary's rows, and their mean for all other tokens."""
    rows_VH = weight_VH[torch.tensor(vocabulary, device=weight_VH.device)]
    return torch.cat([rows_VH, rows_VH.mean(0, keepdim=True)])

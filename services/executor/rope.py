"""Rotary positions: how fast each pair of a head turns, and the tables of cos and sin. Knows no file and no model.

Shapes: P positions, D head_dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Bands:
    """Which pairs llama3 scaling slows: all that turn less than `low` times in the original context, none above `high`."""

    low: float
    high: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Turns slow down by `factor`: those of all pairs (linear scaling) or of the bands (llama3)."""

    theta: float
    factor: float = 1.0
    bands: Llama3Bands | None = None


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of the D/2 pairs, in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    slow = plain / rope.factor
    if rope.bands is None:
        return slow
    low, high = rope.bands.low, rope.bands.high
    turns = plain * rope.bands.original_positions / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * slow + share * plain


def rotary_tables(
    rope: Rope, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D], halves repeated, computed in fp32."""
    angles = torch.outer(torch.arange(num_positions).float(), frequencies(rope, head_dim))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)

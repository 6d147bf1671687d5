"""Drawing tokens from logits, with random numbers that depend on (seed, position) only. Knows no requests or trees.

The same request draws the same token at the same position alone, in a batch, under speculation or on another executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

import kernels.sampling
from common.messages import Sampling
from kernels import ops


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1), a pure function of its arguments (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


class NonFiniteLogitsError(FloatingPointError):
    """A row that a token has to be drawn from holds NaN, or no finite value at all."""


class Draws:
    """Tokens drawn from the rows of one pass: of greedy ones, and of those that `draw_ahead` is told, all in one operation."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV = logits_RV
        highest_R, greedy_R = logits_RV.max(dim=-1)
        self._greedy: list[int] = greedy_R.tolist()
        self._is_finite: list[bool] = torch.isfinite(highest_R).tolist()
        self._ahead: dict[tuple[int, int], int] = {}

    def draw_ahead(self, rows: Iterable[tuple[int, Sampling, int]]) -> None:
        """Draw these (row, sampling, position) together; nothing else than the sampling may change their logits."""
        wanted = [(row, sampling, position) for row, sampling, position in rows if sampling.temperature > 0.0]
        draws = [_draw(*each) for each in wanted if self._is_finite[each[0]]]
        tokens = ops.draw_tokens(self.logits_RV, draws)
        keys = [(row, position) for row, _, position in wanted if self._is_finite[row]]
        self._ahead.update(zip(keys, tokens, strict=True))

    def token(self, row: int, sampling: Sampling, position: int, change: Callable[[Tensor], Tensor] | None = None) -> int:
        """The token for the absolute position `position`, from the row's logits as `change` makes them.

        Raises NonFiniteLogitsError, naming the row.
        """
        if not self._is_finite[row]:
            raise NonFiniteLogitsError(f"logits of row {row} are not finite")
        if change is None:
            if sampling.temperature <= 0.0:
                return self._greedy[row]
            if (row, position) not in self._ahead:
                self.draw_ahead([(row, sampling, position)])
            return self._ahead[row, position]
        logits_V = change(self.logits_RV[row])
        highest, greedy = logits_V.max(dim=-1)
        if not bool(torch.isfinite(highest)):
            raise NonFiniteLogitsError(f"no token is possible in row {row}")
        if sampling.temperature <= 0.0:
            return int(greedy)
        return ops.draw_tokens(logits_V.unsqueeze(0), [_draw(0, sampling, position)])[0]


def target_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] (float64) that `sampling` draws from."""
    return kernels.sampling.target_probabilities(logits_V.unsqueeze(0), [_draw(0, sampling, 0)])[0]


def _draw(row: int, sampling: Sampling, position: int) -> ops.Draw:
    return ops.Draw(
        row=row,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        uniform=uniform(sampling.seed, position),
    )

"""Drawing tokens from logits, with random numbers that depend on (seed, position) only. Knows no requests or trees.

The same request draws the same token at the same position alone, in a batch, under speculation or on another executor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

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
    """Tokens drawn from the rows of one pass: of greedy ones, and of those that `draw_ahead` is told, all in one operation.

    The host waits for the device once, when the first token is looked up, and once more if rows are changed on the host.
    """

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV = logits_RV
        highest_R, greedy_R = logits_RV.max(dim=-1)
        self._greedy: list[int] = []
        self._is_finite: list[bool] = []
        self._ahead: dict[tuple[int, int], int] = {}
        self._unread: list[tuple[list[tuple[int, int]], Tensor]] = []
        self._unread_rows: Tensor | None = torch.stack((greedy_R, torch.isfinite(highest_R).long()))
        self._changed: dict[int, int] = {}
        self._changed_rows: Tensor | None = None

    def draw_ahead(self, rows: Iterable[tuple[int, Sampling, int]], changed: Sequence[int] = ()) -> None:
        """Draw these (row, sampling, position) together; nothing else than the sampling may change their logits.

        The logits of the `changed` rows go to the host together.
        """
        self._changed = {row: place for place, row in enumerate(changed)}
        wanted = [each for each in rows if each[1].temperature > 0.0]
        if wanted and not ops.uses_triton(self.logits_RV):  # there, what is drawn from such a row is just not looked at
            self._read()
            wanted = [each for each in wanted if self._is_finite[each[0]]]
        if wanted:
            tokens = ops.drawn(self.logits_RV, [_draw(*each) for each in wanted])
            self._unread.append(([(row, position) for row, _, position in wanted], tokens))

    def token(self, row: int, sampling: Sampling, position: int, change: Callable[[Tensor], Tensor] | None = None) -> int:
        """The token for the absolute position `position`, from the row's logits as `change` makes them.

        Raises NonFiniteLogitsError, naming the row.
        """
        self._read()
        if not self._is_finite[row]:
            raise NonFiniteLogitsError(f"logits of row {row} are not finite")
        if change is None:
            if sampling.temperature <= 0.0:
                return self._greedy[row]
            if (row, position) not in self._ahead:
                self.draw_ahead([(row, sampling, position)])
                self._read()
            return self._ahead[row, position]
        logits_V = change(self._row(row))
        highest, greedy = logits_V.max(dim=-1)
        if not bool(torch.isfinite(highest)):
            raise NonFiniteLogitsError(f"no token is possible in row {row}")
        if sampling.temperature <= 0.0:
            return int(greedy)
        return ops.draw_tokens(logits_V.unsqueeze(0), [_draw(0, sampling, position)])[0]

    def _row(self, row: int) -> Tensor:
        """Logits [V] that a change is made to, on the host if it was told of."""
        if row not in self._changed or self.logits_RV.device.type == "cpu":
            return self.logits_RV[row]
        if self._changed_rows is None:
            self._changed_rows = self.logits_RV[list(self._changed)].cpu()
        return self._changed_rows[self._changed[row]]

    def _read(self) -> None:
        """Take what has been computed to the host."""
        parts = [tokens for _, tokens in self._unread]
        parts = parts if self._unread_rows is None else [self._unread_rows.flatten(), *parts]
        if not parts:
            return
        values = iter((parts[0] if len(parts) == 1 else torch.cat(parts)).tolist())
        if self._unread_rows is not None:
            self._greedy = list(itertools.islice(values, len(self.logits_RV)))
            self._is_finite = [bool(value) for value in itertools.islice(values, len(self.logits_RV))]
        for keys, _ in self._unread:
            self._ahead.update(zip(keys, values, strict=False))
        self._unread, self._unread_rows = [], None


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

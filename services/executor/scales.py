"""(IA)3 on the rows of a batch: which rows which vector multiplies, forward and backward. Knows neither layers' order nor jobs.

As many operations for many adapters as for one: a table of vectors, with ones first, and a row number into it for each row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.upload import upload
from services.executor.lora import LoraWeights, Scale

BEFORE_SCALE = {
    "q_proj": "q_raw_base", "k_proj": "k_raw_base", "v_proj": "v_base", "o_proj": "o_base",
    "gate_proj": "gate_base", "up_proj": "up_base", "down_proj": "down_base",
}  # fmt: skip
"""What activation plans call the outputs of linears that (IA)3 scales."""


class ScaledRows:
    """Rows [start, end) with these weights each; without (IA)3 vectors, or without an entry, they stay as they are."""

    def __init__(self, rows: Sequence[tuple[int, int, LoraWeights]]) -> None:
        self._rows = [entry for entry in rows if entry[2].scales]
        self._numbers_T: Tensor | None = None

    def vectors(self, layer: int, module: str, *, is_input: bool) -> list[tuple[int, Scale]]:
        """The vectors of a linear's input or output, each with its row of the table."""
        return [
            (number, scale)
            for number, (*_, weights) in enumerate(self._rows, start=1)
            for scale in weights.scales.get((layer, module), ())
            if scale.is_input == is_input
        ]

    def factors(self, layer: int, module: str, x_TC: Tensor, *, is_input: bool) -> Tensor | None:
        """What each element of [T, C] is multiplied by; None if nothing is."""
        if not (found := self.vectors(layer, module, is_input=is_input)):
            return None
        dtype = functools.reduce(torch.promote_types, [scale.scale_C.dtype for _, scale in found])
        table_AC = torch.ones(len(self._rows) + 1, x_TC.shape[1], dtype=dtype, device=x_TC.device)
        torch._foreach_copy_([table_AC[number, s.columns] for number, s in found], [s.scale_C for _, s in found])
        return table_AC[self._numbers(x_TC)]

    def scaled(self, layer: int, module: str, x_TC: Tensor, *, is_input: bool) -> Tensor:
        """The rows times their vectors, or the gradient that comes back through them, in the type of x."""
        factors_TC = self.factors(layer, module, x_TC, is_input=is_input)
        return x_TC if factors_TC is None else (x_TC * factors_TC).to(x_TC.dtype)

    def add_gradients(
        self,
        layer: int,
        module: str,
        dy_TC: Tensor,
        x_TC: Tensor,
        grads: Sequence[LoraWeights],
        order_T: Tensor,
        *,
        is_input: bool,
    ) -> None:
        """Add dl = sum over rows of dy * x to the vectors of `grads`, one for each weights that have vectors.

        On a CPU row after row to what is there, in this order: so it does not matter how rows are divided among calls.
        """
        found = self.vectors(layer, module, is_input=is_input)
        vectors = [scale for weights in grads for scale in weights.scales.get((layer, module), ())]
        targets = [scale.scale_C for scale in vectors if scale.is_input == is_input]
        wide = targets[0].dtype
        table_AC = torch.zeros(len(self._rows) + 1, x_TC.shape[1], dtype=wide, device=x_TC.device)
        places = [table_AC[number, scale.columns] for number, scale in found]
        torch._foreach_copy_(places, targets)
        products_TC = dy_TC.to(wide) * x_TC.to(wide)
        table_AC.index_add_(0, self._numbers(x_TC)[order_T], products_TC[order_T])
        torch._foreach_copy_(targets, places)

    def _numbers(self, x_TC: Tensor) -> Tensor:
        if self._numbers_T is None or len(self._numbers_T) != len(x_TC):
            numbers = np.zeros(len(x_TC), dtype=np.int64)
            for number, (start, end, _) in enumerate(self._rows, start=1):
                numbers[start:end] = number
            self._numbers_T = upload([numbers], x_TC.device)[0]
        return self._numbers_T

"""Dropout on the inputs of adapters in training: masks that are functions of a row's place. Knows no adapter and no job.

A mask depends on (seed, step, sequence, position, layer, linear) alone, so that any split into windows, the backward pass and
a repetition after a loss drop the same. The targets inside one fused linear share their input and its mask.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import ops
from services.executor.adapter_spec import MODULES

_MODULE_NUMBERS = {module: number for number, module in enumerate(MODULES)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowDropout:
    """The keys (int32) and rates of rows, one each."""

    keys_T: Tensor
    rates_T: Tensor

    @classmethod
    def of_sequence(
        cls, rate: float, *, seed: int, step: int, index: int, num_rows: int, device: torch.device
    ) -> RowDropout | None:
        """The rows of slice `index` of a step; None when nothing is dropped."""
        if rate == 0.0:
            return None
        digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=4).digest()
        positions = torch.arange(num_rows, dtype=torch.int32, device=device)
        keys_T = ops.drop_keys(int.from_bytes(digest, "little"), positions)
        return cls(keys_T=keys_T, rates_T=torch.full((num_rows,), rate, dtype=torch.float64, device=device))

    @classmethod
    def joined(cls, parts: Sequence[tuple[RowDropout | None, int, int]], device: torch.device) -> RowDropout | None:
        """The rows [start, end) of each part one behind the other; None when none of them drops anything."""
        if all(part is None for part, _, _ in parts):
            return None
        rows = [RowDropout.none(end - start, device) if part is None else part._rows(start, end) for part, start, end in parts]
        return cls(keys_T=torch.cat([part.keys_T for part in rows]), rates_T=torch.cat([part.rates_T for part in rows]))

    @classmethod
    def none(cls, num_rows: int, device: torch.device) -> RowDropout:
        """Rows that keep everything."""
        return cls(
            keys_T=torch.zeros(num_rows, dtype=torch.int32, device=device),
            rates_T=torch.zeros(num_rows, dtype=torch.float64, device=device),
        )

    def _rows(self, start: int, end: int) -> RowDropout:
        return RowDropout(keys_T=self.keys_T[start:end], rates_T=self.rates_T[start:end])

    def drop(self, layer: int, module: str, x_WI: Tensor, start: int = 0) -> Tensor:
        """The inputs of a fused linear, or their gradients, of rows [start, start + W), with zeros for what is dropped."""
        rows = slice(start, start + x_WI.shape[0])
        return ops.drop(x_WI, self.keys_T[rows], self.rates_T[rows], len(MODULES) * layer + _MODULE_NUMBERS[module])

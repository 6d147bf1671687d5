"""The activations that the backward pass reads: those that the plan keeps. Knows names and rows, no formula and no choice."""

from __future__ import annotations

import torch
from torch import Tensor

from common.activation_plan import ActivationPlan


class ActivationTape:
    """Per layer the tensors of an ActivationPlan, [num_tokens, width] each. The cache has keys, values."""

    def __init__(self, plan: ActivationPlan, num_tokens: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._layers = [
            {tensor.name: torch.empty(num_tokens, tensor.width, dtype=dtype, device=device) for tensor in layer.tape}
            for layer in plan.layers
        ]

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer.values())

    def has(self, layer: int, name: str) -> bool:
        """Whether a layer's tensor is kept; what is not is not needed, or made again from what is."""
        return name in self._layers[layer]

    def kept(self, layer: int) -> frozenset[str]:
        """The names of all tensors that are kept of a layer."""
        return frozenset(self._layers[layer])

    def rows(self, layer: int, name: str, start: int, end: int) -> Tensor:
        """The places of rows [start, end): to write them, and to read them as they were written."""
        return self._layers[layer][name][start:end]

    def drop(self, layer: int) -> None:
        """Free a layer that the backward pass has left."""
        self._layers[layer].clear()

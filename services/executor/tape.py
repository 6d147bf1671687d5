"""The activations that the backward pass needs: what cannot be recomputed cheaply. Knows names and rows, no formula."""

from __future__ import annotations

import torch
from torch import Tensor

from services.executor.model_config import ModelConfig


class ActivationTape:
    """Per layer and token: x (layer input), q (after RoPE), m (before the MLP's norm), gate_up. The cache has keys, values."""

    def __init__(self, config: ModelConfig, num_tokens: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        shapes = {
            "x": (config.hidden_size,),
            "q": (config.num_heads, config.head_dim),
            "m": (config.hidden_size,),
            "gate_up": (2 * config.intermediate_size,),
        }
        self._layers = [
            {name: torch.empty(num_tokens, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
            for _ in range(config.num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer.values())

    def rows(self, layer: int, name: str, start: int, end: int) -> Tensor:
        """The places of rows [start, end): to write them, and to read them as they were written."""
        return self._layers[layer][name][start:end]

    def drop(self, layer: int) -> None:
        """Free a layer that the backward pass has left."""
        self._layers[layer].clear()

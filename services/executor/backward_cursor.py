"""Where one training sequence is on its way back, and the gradients it carries. Knows no formula and no other sequence.

Layers run from the top, windows inside a layer from the right: key j is seen by queries i >= j only, so once a window is
reached all later queries have added their share to its key and value gradients, and its own share makes them final.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from services.executor.adapter_spec import MODULES
from services.executor.lora import LoraAdapter, LoraWeights
from services.executor.model import Decoder
from services.executor.training_sequence import TrainingSequence


class BackwardCursor:
    """Adds the sequence's gradients of the adapter to `grads`; its gradient at the top, `sequence.dx_TH`, is overwritten."""

    def __init__(self, decoder: Decoder, adapter: LoraAdapter, grads: LoraWeights, sequence: TrainingSequence) -> None:
        self.adapter, self.grads, self.sequence = adapter, grads, sequence
        self.num_rows = sequence.num_rows
        self._num_layers = decoder.config.num_layers
        self._lowest = min(adapter.layers) if self.num_rows else self._num_layers
        self.layer = self._num_layers - 1
        self.end = self.num_rows
        shape = (2, self.num_rows, decoder.config.num_kv_heads, decoder.config.head_dim)
        wide = torch.promote_types(decoder.dtype, torch.float32)
        self.accumulators = torch.zeros(shape, dtype=wide, device=decoder.device)
        """Gradients of keys and values, to which the windows of a layer add."""

    @property
    def is_done(self) -> bool:
        """Whether the lowest adapted layer is finished; below it nothing is trained."""
        return self.layer < self._lowest

    @property
    def remaining_token_layers(self) -> int:
        """Work left, in tokens times layers."""
        return 0 if self.is_done else self.end + (self.layer - self._lowest) * self.num_rows

    @property
    def accumulator_bytes(self) -> int:
        """Memory of the key and value gradients."""
        return self.accumulators.nbytes

    @property
    def dk_TKD(self) -> Tensor:
        """Gradients of the layer's keys so far."""
        return self.accumulators[0]

    @property
    def dv_TKD(self) -> Tensor:
        """Gradients of the layer's values so far."""
        return self.accumulators[1]

    @property
    def last_module(self) -> str | None:
        """The linear of this layer below which nothing is trained: its own weights are the last that get a gradient."""
        if self.layer != self._lowest:
            return None
        return next(module for module in MODULES if self.adapter.has(self.layer, module))

    @property
    def kind(self) -> tuple[object, ...]:
        """Cursors of one kind need the same operations next."""
        return self.layer, self.last_module, self.sequence.tape.kept(self.layer)

    def window(self, max_rows: int) -> BackwardWindow:
        """The next rows to go back through, at most so many."""
        return BackwardWindow(self, max(self.end - max_rows, 0), self.end)

    def move(self, start: int) -> bool:
        """The rows from `start` on are through; whether that ended the layer (then the accumulators are to be zeroed)."""
        self.end = start
        if start > 0:
            return False
        self.sequence.tape.drop(self.layer)
        self.layer -= 1
        self.end = self.num_rows
        return True


class BackwardWindow(NamedTuple):
    """Rows [start, end) of a sequence in the layer that its cursor is at."""

    cursor: BackwardCursor
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        """Rows of the window."""
        return self.end - self.start

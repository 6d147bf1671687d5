"""The runs of rows that the segmented operations work on. Knows shapes, not models or requests.

Shape legend of the kernels: T rows of the batch, H hidden, N query heads, K key/value heads, D head_dim, S cache slots, L keys,
W rows of a training window, n rows of a segment, F intermediate, V vocabulary, R LoRA rank, I -> O a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AttentionSegment:
    """Rows [start, end) of the batch that attend to one sequence's keys."""

    start: int
    end: int
    slots_L: Tensor
    """int64 cache slots of all keys: the committed context, then the segment's own rows in row order."""
    mask_nn: Tensor | None = None
    """bool [n, n] over the segment's own rows, True where row i may attend to row j, itself or an ancestor; None is causal.

    It stays on the host, from where an implementation arranges it without waiting for a device.
    """

    @property
    def rows(self) -> slice:
        """The segment's rows."""
        return slice(self.start, self.end)

    def __post_init__(self) -> None:
        num_rows = self.end - self.start
        if num_rows < 1 or self.slots_L.numel() < num_rows:
            raise ValueError(f"a segment of {num_rows} rows with {self.slots_L.numel()} keys")
        if self.mask_nn is not None and self.mask_nn.shape != (num_rows, num_rows):
            raise ValueError(f"mask {tuple(self.mask_nn.shape)} of a segment of {num_rows} rows")


class AttentionPlan:
    """The segments of one batch, which every layer uses; an implementation arranges them once, in a way of its own."""

    def __init__(self, segments: Sequence[AttentionSegment], slots: Tensor | None = None) -> None:
        """`slots` are those of all segments, one behind the other, where there is such a tensor already."""
        self.segments = tuple(segments)
        self._slots = slots
        self._arranged: dict[Hashable, object] = {}

    @property
    def slots(self) -> Tensor:
        """int64 cache slots of the keys of all segments; there is at least one segment."""
        if self._slots is None:
            self._slots = torch.cat([segment.slots_L for segment in self.segments])
        return self._slots

    def arranged(self, key: Hashable, arrange: Callable[[], T]) -> T:
        """What `arrange` returned when this key was first asked for."""
        if key not in self._arranged:
            self._arranged[key] = arrange()
        return self._arranged[key]  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class LoraSegment:
    """Rows [start, end) of the batch that share one adapter: its two matrices for one target of a linear, and alpha / rank.

    Several targets may lie side by side in a fused linear's output: this one's columns are the rows of `b_OR`, from `column`.
    Of one list, segments with rows in common have no column in common.
    """

    start: int
    end: int
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    column: int = 0

    @property
    def rows(self) -> slice:
        """The segment's rows."""
        return slice(self.start, self.end)

    @property
    def columns(self) -> slice:
        """The output's columns that it updates."""
        return slice(self.column, self.column + self.b_OR.shape[0])


@dataclass(frozen=True, kw_only=True)
class BottleneckSegment:
    """Rows [start, end) of the batch that share a bottleneck adapter behind a linear; `scale` makes up for dropout."""

    start: int
    end: int
    down_RH: Tensor
    up_HR: Tensor
    activation: Literal["relu", "gelu"]
    scale: float = 1.0

    @property
    def rows(self) -> slice:
        """The segment's rows."""
        return slice(self.start, self.end)

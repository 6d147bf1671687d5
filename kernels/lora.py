"""Low-rank updates of many adapters in a number of large calls that does not depend on how many there are. Knows no model.

All adapters' A lie side by side in one matmul, a mask keeps of each row only its own adapter's part, and all B in another. So
rows are also multiplied with the matrices of others; with the ranks of common adapters that costs less than a call for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.native.lora import LoraWork
from kernels.segments import LoraSegment

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoraRows:
    """What only depends on rows and ranks: M ranks of all segments side by side. True in the mask: not this row's adapter."""

    rows: slice
    others_nM: Tensor
    scales_M: Tensor
    spans: tuple[tuple[int, int], ...]
    """First and last row of each segment, counted from `rows.start`."""


@dataclass(frozen=True, kw_only=True)
class LoraCall:
    """Segments of one type, by column; `targets` are the columns and how many segments update each."""

    segments: tuple[LoraSegment, ...]
    order: tuple[int, ...]
    """Of each, its place among the plan's segments."""
    shared: LoraRows
    targets: tuple[tuple[slice, int], ...]


class LoraPlan:
    """The segments of one linear, arranged once for as many passes as have the same rows.

    Plans of the same batch may share `masks`: a layer's rows are those of the next.
    """

    def __init__(
        self, segments: Sequence[LoraSegment], masks: dict[object, object] | None = None, order_T: Tensor | None = None
    ) -> None:
        self.segments = tuple(segments)
        self.order_T = order_T
        """int64 rows in the order in which sums over a segment's rows take them, if that is asked for and can be had."""
        self.is_single = len({(segment.start, segment.end) for segment in self.segments}) <= 1
        """All segments are targets of one adapter: at most three."""
        self._masks = {} if masks is None else masks
        self._calls: list[LoraCall] | None = None
        self._work: LoraWork | None = None
        self._arranged: dict[Hashable, object] = {}

    def arranged(self, key: Hashable, arrange: Callable[[], T]) -> T:
        """What `arrange` returned when this key was first asked for: an implementation's own arrangement."""
        if key not in self._arranged:
            self._arranged[key] = arrange()
        return self._arranged[key]  # type: ignore[return-value]

    def calls(self) -> list[LoraCall]:
        """One call per type of adapters: those that are served have the model's, those in training fp32."""
        if self._calls is None:
            by_type: dict[torch.dtype, list[int]] = {}
            for i, segment in enumerate(self.segments):
                by_type.setdefault(segment.a_RI.dtype, []).append(i)
            self._calls = [self._call(places) for places in by_type.values()]
        return self._calls

    def work(self) -> LoraWork:
        """What the compiled operation takes."""
        if self._work is None:
            self._work = LoraWork(self.segments)
        return self._work

    def _call(self, places: list[int]) -> LoraCall:
        order = tuple(sorted(places, key=lambda i: self.segments[i].column))
        ordered = tuple(self.segments[i] for i in order)
        targets = [list(group) for _, group in groupby(ordered, key=lambda segment: segment.column)]
        key = (ordered[0].a_RI.dtype, tuple((s.start, s.end, s.a_RI.shape[0], s.scale) for s in ordered))
        shared = self._masks.get(key)
        if not isinstance(shared, LoraRows):
            shared = self._masks[key] = _rows(ordered)
        return LoraCall(
            segments=ordered, order=order, shared=shared, targets=tuple((group[0].columns, len(group)) for group in targets)
        )


def _rows(segments: Sequence[LoraSegment]) -> LoraRows:
    start, end = min(segment.start for segment in segments), max(segment.end for segment in segments)
    ranks = [segment.a_RI.shape[0] for segment in segments]
    others = np.ones((end - start, sum(ranks)), dtype=np.bool_)
    edge = 0
    for segment, rank in zip(segments, ranks, strict=True):
        others[segment.start - start : segment.end - start, edge : edge + rank] = False
        edge += rank
    matrix = segments[0].a_RI
    scales = np.repeat([segment.scale for segment in segments], ranks)
    return LoraRows(
        rows=slice(start, end),
        spans=tuple((segment.start - start, segment.end - start) for segment in segments),
        others_nM=torch.from_numpy(others).to(matrix.device),
        scales_M=torch.from_numpy(scales).to(matrix),
    )


def segmented_lora(y_TO: Tensor, x_TI: Tensor, plan: LoraPlan) -> None:
    """The reference's segmented_lora of a plan's segments."""
    if plan.is_single:
        reference.segmented_lora(y_TO, x_TI, plan.segments)
        return
    for call in plan.calls():
        shared = call.shared
        a_MI = torch.cat([segment.a_RI for segment in call.segments])
        low_nM = x_TI[shared.rows].to(a_MI.dtype) @ a_MI.mT
        keep_own(low_nM, call, plan)
        for output in outputs(call):
            y_TO[shared.rows, output.columns].add_(low_nM[:, output.ranks] @ output.b_OM.mT)


class Output(NamedTuple):
    """A target of a call: its columns, all B of it side by side, and where their ranks are among the call's."""

    columns: slice
    num_segments: int
    b_OM: Tensor
    ranks: slice


def outputs(call: LoraCall) -> Iterator[Output]:
    """The targets of a call."""
    first, edge = 0, 0
    for columns, num_segments in call.targets:
        b_OM = torch.cat([segment.b_OR for segment in call.segments[first : first + num_segments]], dim=1)
        yield Output(columns, num_segments, b_OM, slice(edge, edge + b_OM.shape[1]))
        first, edge = first + num_segments, edge + b_OM.shape[1]


def keep_own(low_nM: Tensor, call: LoraCall, plan: LoraPlan) -> None:
    """Zero what is not of a row's own adapter, and scale the rest, in place."""
    if not plan.is_single:
        low_nM.masked_fill_(call.shared.others_nM, 0.0)
    low_nM.mul_(call.shared.scales_M)

"""Low-rank updates of mixed adapters and ranks: a shrink and an expand launch for all segments. Knows no request.

T rows, I -> O a linear, R rank, C columns (I or O), P parts of a shrunk sum. Segments and adapters come as tables of addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.segments import LoraSegment
from kernels.triton_ops.lang import cdiv, constexpr, dot_precision, jit, next_power_of_2, pointers, scalar, table, tl

ROWS = 16
"""Rows of a tile: the least that the matrix units multiply; decode segments have few."""
COLUMNS = 128
"""Columns of a step."""
PART_COLUMNS = 1024
"""Columns summed by one program of the shrink: 4 programs for a hidden size of 4096, so that few segments keep more busy.

It does not depend on the batch, so that neither do the results.
"""


@jit
def _shrink_kernel(
    x_ptr: scalar,
    low_ptr: scalar,
    weights_ptr: scalar,
    tiles_ptr: scalar,
    stride_xt: scalar,
    T: scalar,
    C: scalar,
    dtype_ptr: scalar,
    IS_RC: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PART_COLUMNS: constexpr,
    ALIGNED: constexpr,
    PRECISION: constexpr,
) -> None:
    """low[part, t, r] = sum over the part's columns of x[t, c] w[r, c]; w is [R, C], or [C, R] transposed"""
    tile_ptr, part = tiles_ptr + tl.program_id(0) * 4, tl.program_id(1)
    first, end, rank = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    dtype = dtype_ptr.dtype.element_ty
    w_ptr = tl.load(weights_ptr + tl.load(tile_ptr + 3)).to(tl.pointer_type(dtype))
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    row, r = first + tl.arange(0, ROWS), tl.arange(0, RANK)
    acc = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(part * PART_COLUMNS, tl.minimum((part + 1) * PART_COLUMNS, C), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row[:, None] * stride_xt + c[None, :], mask=(row < end)[:, None] & (c < C)[None, :], other=0.0)
        inside = (c < C)[:, None] & (r < rank)[None, :]
        at = r[None, :] * C + c[:, None] if IS_RC else c[:, None] * rank + r[None, :]
        acc = tl.dot(x.to(dtype), tl.load(w_ptr + at, mask=inside, other=0.0), acc, input_precision=PRECISION)
    tl.store(low_ptr + (part * T + row)[:, None] * RANK + r[None, :], acc, mask=(row < end)[:, None])


@jit
def _low_kernel(low_ptr: scalar, row: scalar, end: scalar, T: scalar, P: scalar, RANK: constexpr, ROWS: constexpr) -> scalar:
    """The sum of the parts, in their order."""
    at = row[:, None] * RANK + tl.arange(0, RANK)[None, :]
    low = tl.zeros((ROWS, RANK), tl.float32)
    for part in range(P):
        low += tl.load(low_ptr + part * T * RANK + at, mask=(row < end)[:, None], other=0.0)
    return low


@jit
def _expand_kernel(
    y_ptr: scalar,
    low_ptr: scalar,
    weights_ptr: scalar,
    scales_ptr: scalar,
    tiles_ptr: scalar,
    stride_yt: scalar,
    T: scalar,
    P: scalar,
    C: scalar,
    dtype_ptr: scalar,
    IS_RC: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    ALIGNED: constexpr,
    PRECISION: constexpr,
) -> None:
    """y[t, c] += scale * sum_r(low[t, r] w[c, r]); w is [C, R], or [R, C] transposed"""
    tile_ptr = tiles_ptr + tl.program_id(0) * 4
    first, end, rank = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    segment = tl.load(tile_ptr + 3)
    dtype = dtype_ptr.dtype.element_ty
    w_ptr = tl.load(weights_ptr + segment).to(tl.pointer_type(dtype))
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    row, r = first + tl.arange(0, ROWS), tl.arange(0, RANK)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = _low_kernel(low_ptr, row, end, T, P, RANK, ROWS)
    at = r[:, None] * C + c[None, :] if IS_RC else c[None, :] * rank + r[:, None]
    w = tl.load(w_ptr + at, mask=(r < rank)[:, None] & (c < C)[None, :], other=0.0)
    update = tl.dot(low.to(dtype), w, input_precision=PRECISION) * tl.load(scales_ptr + segment)
    inside = (row < end)[:, None] & (c < C)[None, :]
    y = y_ptr + row[:, None] * stride_yt + c[None, :]
    tl.store(y, (tl.load(y, mask=inside, other=0.0).to(tl.float32) + update).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _outer_kernel(
    grads_ptr: scalar,
    low_ptr: scalar,
    x_ptr: scalar,
    scales_ptr: scalar,
    spans_ptr: scalar,
    stride_xt: scalar,
    T: scalar,
    P: scalar,
    C: scalar,
    dtype_ptr: scalar,
    IS_RC: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PRECISION: constexpr,
) -> None:
    """grad[r, c] += scale * sum over the segment's rows of low[t, r] x[t, c]; grad is [R, C], or [C, R] transposed"""
    segment = tl.program_id(0)
    start, end, rank = (
        tl.load(spans_ptr + segment * 3),
        tl.load(spans_ptr + segment * 3 + 1),
        tl.load(spans_ptr + segment * 3 + 2),
    )
    dtype = dtype_ptr.dtype.element_ty
    grad_ptr = tl.load(grads_ptr + segment).to(tl.pointer_type(dtype))
    r, c = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        low = _low_kernel(low_ptr, row, end, T, P, RANK, ROWS)
        x = tl.load(x_ptr + row[:, None] * stride_xt + c[None, :], mask=(row < end)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(low).to(dtype), x.to(dtype), acc, input_precision=PRECISION)
    at = r[:, None] * C + c[None, :] if IS_RC else c[None, :] * rank + r[:, None]
    inside = (r < rank)[:, None] & (c < C)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + at, (grad + acc * tl.load(scales_ptr + segment)).to(dtype), mask=inside)


class _Launch:
    """The tables of one list of segments: tiles of rows, and what all launches share."""

    def __init__(self, segments: Sequence[LoraSegment], matrix: Tensor) -> None:
        tiles = [
            (first, segment.end, segment.a_RI.shape[0], i)
            for i, segment in enumerate(segments)
            for first in range(segment.start, segment.end, ROWS)
        ]
        self.segments, self.num_tiles, self._device = segments, len(tiles), matrix.device
        self.tiles = table(tuple(x for tile in tiles for x in tile), matrix.device)
        self.rank = max(16, next_power_of_2(max(segment.a_RI.shape[0] for segment in segments)))
        self.dtype = matrix.dtype
        self._shared = {"dtype_ptr": matrix, "RANK": self.rank, "ROWS": ROWS, "COLUMNS": COLUMNS}
        self._shared |= {"PRECISION": dot_precision(matrix.dtype)}
        self.scales = torch.tensor([segment.scale for segment in segments], dtype=torch.float32).to(matrix.device)

    def shrink(self, x_TC: Tensor, weights: Sequence[Tensor], *, is_rc: bool) -> Tensor:
        """[P, T, R]"""
        num_rows, num_columns = x_TC.shape
        num_parts = cdiv(num_columns, PART_COLUMNS)
        low = torch.empty((num_parts, num_rows, self.rank), dtype=torch.float32, device=x_TC.device)
        _shrink_kernel[(self.num_tiles, num_parts)](
            x_TC, low, pointers(weights), self.tiles, x_TC.stride(0), num_rows, num_columns, **self._shared, IS_RC=is_rc,
            PART_COLUMNS=PART_COLUMNS, ALIGNED=_is_aligned(weights),
        )  # fmt: skip
        return low

    def expand(self, y_TC: Tensor, low: Tensor, weights: Sequence[Tensor], *, is_rc: bool) -> None:
        num_rows, num_columns = y_TC.shape
        _expand_kernel[(self.num_tiles, cdiv(num_columns, COLUMNS))](
            y_TC, low, pointers(weights), self.scales, self.tiles, y_TC.stride(0), num_rows, low.shape[0], num_columns,
            **self._shared, IS_RC=is_rc, ALIGNED=_is_aligned(weights),
        )  # fmt: skip

    def outer(self, grads: Sequence[Tensor], low: Tensor, x_TC: Tensor, *, is_rc: bool) -> None:
        num_rows, num_columns = x_TC.shape
        spans = table(tuple(x for s in self.segments for x in (s.start, s.end, s.a_RI.shape[0])), self._device)
        _outer_kernel[(len(grads), cdiv(num_columns, COLUMNS))](
            pointers(grads), low, x_TC, self.scales, spans, x_TC.stride(0), num_rows, low.shape[0], num_columns,
            **self._shared, IS_RC=is_rc,
        )  # fmt: skip


def _is_aligned(weights: Sequence[Tensor]) -> bool:
    return all(weight.data_ptr() % 16 == 0 for weight in weights)


def _by_columns(segments: Sequence[LoraSegment], num_columns: int) -> list[tuple[slice, list[int]]]:
    """Which segments update which columns, without those that have no rows: the few targets of a fused linear launch apart."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, segment in enumerate(segments):
        if segment.end > segment.start:
            groups.setdefault((segment.column, segment.b_OR.shape[0]), []).append(i)
    if any(not 0 <= column <= column + width <= num_columns for column, width in groups):
        raise ValueError(f"columns {sorted(groups)} of {num_columns}")
    return [(slice(column, column + width), members) for (column, width), members in sorted(groups.items())]


def _launch(segments: Sequence[LoraSegment], x_TI: Tensor, y_TO: Tensor) -> _Launch:
    for segment in segments:
        rank = segment.a_RI.shape[0]
        if segment.a_RI.shape != (rank, x_TI.shape[1]) or segment.b_OR.shape != (y_TO.shape[1], rank):
            raise ValueError(
                f"a {tuple(segment.a_RI.shape)}, b {tuple(segment.b_OR.shape)} of {x_TI.shape[1]} -> {y_TO.shape[1]}"
            )
        if not 0 <= segment.start < segment.end <= x_TI.shape[0] == y_TO.shape[0]:
            raise ValueError(f"rows {segment.start} to {segment.end} of {x_TI.shape[0]} and {y_TO.shape[0]}")
    assert x_TI.stride(1) == y_TO.stride(1) == 1
    return _Launch(segments, segments[0].a_RI)


def segmented_lora(y_TO: Tensor, x_TI: Tensor, segments: Sequence[LoraSegment]) -> None:
    """Semantics: y[s:e, c] += scale * (x[s:e] @ a^T) @ b^T, in place, in the adapters' one type; y is rounded once."""
    for columns, members in _by_columns(segments, y_TO.shape[1]):
        launch = _launch([segments[i] for i in members], x_TI, y_TO[:, columns])
        low = launch.shrink(x_TI, [segment.a_RI for segment in launch.segments], is_rc=True)
        launch.expand(y_TO[:, columns], low, [segment.b_OR for segment in launch.segments], is_rc=False)


def segmented_lora_backward(dx_TI: Tensor, dy_TO: Tensor, segments: Sequence[LoraSegment]) -> None:
    """Semantics: dx[s:e] += scale * (dy[s:e, c] @ b) @ a, in place: the transposed adapter."""
    for columns, members in _by_columns(segments, dy_TO.shape[1]):
        launch = _launch([segments[i] for i in members], dx_TI, dy_TO[:, columns])
        low = launch.shrink(dy_TO[:, columns], [segment.b_OR for segment in launch.segments], is_rc=False)
        launch.expand(dx_TI, low, [segment.a_RI for segment in launch.segments], is_rc=True)


def segmented_lora_weight_backward(
    grads: Sequence[tuple[Tensor, Tensor]], dy_TO: Tensor, x_TI: Tensor, segments: Sequence[LoraSegment]
) -> None:
    """Semantics: da += scale * (dy b)^T x; db += scale * dy^T (x a^T), in place. No gradient may come twice: programs race."""
    live = [grad for grad, segment in zip(grads, segments, strict=True) if segment.end > segment.start]
    if len({tensor.data_ptr() for grad in live for tensor in grad}) < 2 * len(live):
        raise ValueError("two segments share a gradient")
    for columns, members in _by_columns(segments, dy_TO.shape[1]):
        dy = dy_TO[:, columns]
        launch = _launch([segments[i] for i in members], x_TI, dy)
        low_dy = launch.shrink(dy, [segment.b_OR for segment in launch.segments], is_rc=False)
        low_x = launch.shrink(x_TI, [segment.a_RI for segment in launch.segments], is_rc=True)
        launch.outer([grads[i][0] for i in members], low_dy, x_TI, is_rc=True)
        launch.outer([grads[i][1] for i in members], low_x, dy, is_rc=False)

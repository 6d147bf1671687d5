"""Low-rank updates of mixed adapters and ranks: a shrink and an expand launch for all adapters. Knows no request.

T rows, I -> O a linear, R rank, C columns (I, or a target's outputs), P parts of a shrunk sum, J targets of a run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.segments import LoraSegment
from kernels.triton_ops.lang import cdiv, constexpr, dot_precision, jit, pointers, scalar, tl
from kernels.triton_ops.lora_tables import MEMBER_FIELDS, ROWS, TILE_FIELDS, LoraTables, segment_tables

COLUMNS = 128
"""Columns of a step."""
PART_COLUMNS = 1024
"""Columns summed by one program of the shrink: 4 programs for a hidden size of 4096, so that few tiles keep more busy.

It does not depend on the batch, so that neither do the results.
"""


@jit
def _matrix_kernel(member_ptr: scalar, matrix_ptr: scalar, IS_B: constexpr, ALIGNED: constexpr) -> scalar:
    """A member's b, or its a."""
    address = tl.load(member_ptr + 1) if IS_B else tl.load(member_ptr)
    w_ptr = address.to(tl.pointer_type(matrix_ptr.dtype.element_ty))
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    return w_ptr


@jit
def _shrink_kernel(
    x_ptr: scalar,
    low_ptr: scalar,
    members_ptr: scalar,
    tiles_ptr: scalar,
    matrix_ptr: scalar,
    stride_xt: scalar,
    T: scalar,
    P: scalar,
    I: scalar,  # noqa: E741 (a linear's inputs)
    IS_B: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PART_COLUMNS: constexpr,
    MEMBER: constexpr,
    TILE: constexpr,
    ALIGNED: constexpr,
    PRECISION: constexpr,
) -> None:
    """low[j, part, t, r] = sum over the part's columns of x[t, c] a[r, c], or of dy[t, column + c] b[c, r]"""
    tile_ptr, part, j = tiles_ptr + tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    first, end = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    member_ptr = members_ptr + (tl.load(tile_ptr + 2) + j) * MEMBER
    rank = tl.load(member_ptr + 2) if j < tl.load(tile_ptr + 3) else tl.zeros((), tl.int64)
    if rank > 0:
        C = tl.load(member_ptr + 4) if IS_B else I.to(tl.int64)
        if part * PART_COLUMNS < C:
            w_ptr = _matrix_kernel(member_ptr, matrix_ptr, IS_B, ALIGNED)
            if IS_B:
                x_ptr += tl.load(member_ptr + 3)
            row, r = first + tl.arange(0, ROWS), tl.arange(0, RANK)
            acc = tl.zeros((ROWS, RANK), tl.float32)
            for start in range(part * PART_COLUMNS, tl.minimum((part + 1) * PART_COLUMNS, C), COLUMNS):
                c = start + tl.arange(0, COLUMNS)
                is_x = (row < end)[:, None] & (c < C)[None, :]
                x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_xt + c[None, :], mask=is_x, other=0.0)
                at = c[:, None] * rank + r[None, :] if IS_B else r[None, :] * C + c[:, None]
                w = tl.load(w_ptr + at, mask=(c < C)[:, None] & (r < rank)[None, :], other=0.0)
                acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
            at_low = ((j * P + part).to(tl.int64) * T + row)[:, None] * RANK + r[None, :]
            tl.store(low_ptr + at_low, acc, mask=(row < end)[:, None])


@jit
def _low_kernel(
    low_ptr: scalar, j: scalar, row: scalar, end: scalar, T: scalar, P: scalar, parts: scalar, RANK: constexpr, ROWS: constexpr
) -> scalar:
    """The sum of a target's parts, in their order."""
    low = tl.zeros((ROWS, RANK), tl.float32)
    for part in range(parts):
        at = ((j * P + part) * T + row)[:, None] * RANK + tl.arange(0, RANK)[None, :]
        low += tl.load(low_ptr + at, mask=(row < end)[:, None], other=0.0)
    return low


@jit
def _expand_kernel(
    y_ptr: scalar,
    low_ptr: scalar,
    members_ptr: scalar,
    tiles_ptr: scalar,
    matrix_ptr: scalar,
    stride_yt: scalar,
    T: scalar,
    P: scalar,
    I: scalar,  # noqa: E741
    IS_B: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PART_COLUMNS: constexpr,
    MEMBER: constexpr,
    TILE: constexpr,
    ALIGNED: constexpr,
    PRECISION: constexpr,
) -> None:
    """y[t, column + c] += scale * low[j, t] b[c]^T of one target, or dx[t, c] += sum over j of scale * low[j, t] a[:, c]"""
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE
    first, end, first_member = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    num_members = tl.load(tile_ptr + 3)
    row, r = first + tl.arange(0, ROWS), tl.arange(0, RANK)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    C, column = I.to(tl.int64), tl.zeros((), tl.int64)
    first_j, end_j = tl.zeros((), tl.int32), num_members
    if IS_B:
        first_j, end_j = tl.program_id(2), tl.minimum(tl.program_id(2) + 1, num_members)
        own_ptr = members_ptr + (first_member + tl.maximum(tl.minimum(first_j, num_members - 1), 0)) * MEMBER
        column, C = tl.load(own_ptr + 3), tl.where(first_j < num_members, tl.load(own_ptr + 4), 0)
    for j in range(first_j, end_j):
        member_ptr = members_ptr + (first_member + j) * MEMBER
        rank = tl.load(member_ptr + 2)
        if rank > 0:
            w_ptr = _matrix_kernel(member_ptr, matrix_ptr, IS_B, ALIGNED)
            scale = tl.load(member_ptr + 5).to(tl.int32).to(tl.float32, bitcast=True)
            parts = tl.cdiv(I, PART_COLUMNS) if IS_B else tl.cdiv(tl.load(member_ptr + 4), PART_COLUMNS).to(tl.int32)
            low = _low_kernel(low_ptr, j, row, end, T, P, parts, RANK, ROWS)
            at = c[None, :] * rank + r[:, None] if IS_B else r[:, None] * C + c[None, :]
            w = tl.load(w_ptr + at, mask=(r < rank)[:, None] & (c < C)[None, :], other=0.0)
            update += tl.dot(low.to(w.dtype), w, input_precision=PRECISION) * scale
    inside = (row < end)[:, None] & (c < C)[None, :]
    y = y_ptr + row.to(tl.int64)[:, None] * stride_yt + column + c[None, :]
    tl.store(y, (tl.load(y, mask=inside, other=0.0).to(tl.float32) + update).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _outer_kernel(
    grads_ptr: scalar,
    low_ptr: scalar,
    x_ptr: scalar,
    members_ptr: scalar,
    matrix_ptr: scalar,
    stride_xt: scalar,
    T: scalar,
    P: scalar,
    I: scalar,  # noqa: E741
    IS_B: constexpr,
    RANK: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    PART_COLUMNS: constexpr,
    MEMBER: constexpr,
    PRECISION: constexpr,
) -> None:
    """da[r, c] += scale * sum over the run's rows of low[j, t, r] x[t, c], or db[c, r] += the same with dy[t, column + c]"""
    member = tl.program_id(0)
    member_ptr = members_ptr + member * MEMBER
    rank, num_out = tl.load(member_ptr + 2), tl.load(member_ptr + 4)
    start, end, j = tl.load(member_ptr + 6).to(tl.int32), tl.load(member_ptr + 7).to(tl.int32), tl.load(member_ptr + 8)
    scale = tl.load(member_ptr + 5).to(tl.int32).to(tl.float32, bitcast=True)
    C = num_out if IS_B else I.to(tl.int64)
    if IS_B:
        x_ptr += tl.load(member_ptr + 3)
    parts = tl.cdiv(I, PART_COLUMNS) if IS_B else tl.cdiv(num_out, PART_COLUMNS).to(tl.int32)
    dtype = matrix_ptr.dtype.element_ty
    grad_ptr = tl.load(grads_ptr + member).to(tl.pointer_type(dtype))
    r, c = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        low = _low_kernel(low_ptr, j, row, end, T, P, parts, RANK, ROWS)
        is_x = (row < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_xt + c[None, :], mask=is_x, other=0.0)
        acc = tl.dot(tl.trans(low).to(dtype), x.to(dtype), acc, input_precision=PRECISION)
    at = c[None, :] * rank + r[:, None] if IS_B else r[:, None] * C + c[None, :]
    inside = (r < rank)[:, None] & (c < C)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + at, (grad + acc * scale).to(dtype), mask=inside)


class _Launch:
    """What the launches of one operation share."""

    def __init__(
        self, matrix: Tensor, members: Tensor, tiles: Tensor, num_in: int, targets: int, outputs: int, rank: int, aligned: bool
    ) -> None:
        self.num_in, self.num_targets, self.num_outputs, self.rank = num_in, targets, outputs, rank
        self._matrix, self._members, self._tiles = matrix, members, tiles
        self._named: dict[str, Any] = {"RANK": rank, "ROWS": ROWS, "COLUMNS": COLUMNS, "PART_COLUMNS": PART_COLUMNS}
        self._named |= {"MEMBER": MEMBER_FIELDS, "PRECISION": dot_precision(matrix.dtype)}
        self._tiled = {"TILE": TILE_FIELDS, "ALIGNED": aligned}

    def shrink(self, x_TC: Tensor, *, is_b: bool) -> Tensor:
        """[J, P, T, R]"""
        num_parts = cdiv(self.num_outputs if is_b else self.num_in, PART_COLUMNS)
        shape = (self.num_targets, num_parts, len(x_TC), self.rank)
        low = torch.empty(shape, dtype=torch.float32, device=x_TC.device)
        _shrink_kernel[(len(self._tiles), num_parts, self.num_targets)](
            x_TC, low, self._members, self._tiles, self._matrix, x_TC.stride(0), len(x_TC), num_parts, self.num_in,
            IS_B=is_b, **self._named, **self._tiled,
        )  # fmt: skip
        return low

    def expand(self, y_TC: Tensor, low: Tensor, *, is_b: bool) -> None:
        columns, targets = (self.num_outputs, self.num_targets) if is_b else (self.num_in, 1)
        _expand_kernel[(len(self._tiles), cdiv(columns, COLUMNS), targets)](
            y_TC, low, self._members, self._tiles, self._matrix, y_TC.stride(0), len(y_TC), low.shape[1], self.num_in,
            IS_B=is_b, **self._named, **self._tiled,
        )  # fmt: skip

    def outer(self, grads: Sequence[Tensor], low: Tensor, x_TC: Tensor, *, is_b: bool) -> None:
        _outer_kernel[(len(grads), cdiv(self.num_outputs if is_b else self.num_in, COLUMNS))](
            pointers(grads), low, x_TC, self._members, self._matrix, x_TC.stride(0), len(x_TC), low.shape[1], self.num_in,
            IS_B=is_b, **self._named,
        )  # fmt: skip


@torch.library.custom_op("heddle::segmented_lora", mutates_args=("y_TO",))
def update(
    y_TO: Tensor, x_TI: Tensor, matrix: Tensor, members: Tensor, tiles: Tensor, targets: int, outputs: int, rank: int,
    aligned: bool,
) -> None:  # fmt: skip
    """segmented_lora with its tables one by one (LoraTables), as compiled code sees it."""
    launch = _Launch(matrix, members, tiles, x_TI.shape[1], targets, outputs, rank, aligned)
    launch.expand(y_TO, launch.shrink(x_TI, is_b=False), is_b=True)


@torch.library.custom_op("heddle::segmented_lora_gradients", mutates_args=("dx_TI", "grads_a", "grads_b"))
def gradients(
    dx_TI: Tensor | None, dy_TO: Tensor, x_TI: Tensor | None, grads_a: Sequence[Tensor], grads_b: Sequence[Tensor],
    matrix: Tensor, members: Tensor, tiles: Tensor, num_in: int, targets: int, outputs: int, rank: int, aligned: bool,
) -> None:  # fmt: skip
    """segmented_lora_gradients with its tables one by one; without `dx_TI` or `x_TI` that part is left out."""
    launch = _Launch(matrix, members, tiles, num_in, targets, outputs, rank, aligned)
    low_dy = launch.shrink(dy_TO, is_b=True)
    if dx_TI is not None:
        launch.expand(dx_TI, low_dy, is_b=False)
    if x_TI is not None:
        launch.outer(grads_a, low_dy, x_TI, is_b=False)
        launch.outer(grads_b, launch.shrink(x_TI, is_b=False), dy_TO, is_b=True)


@update.register_fake
def _(*_: object) -> None: ...


@gradients.register_fake
def _(*_: object) -> None: ...


def segmented_lora(y_TO: Tensor, x_TI: Tensor, tables: Sequence[LoraTables]) -> None:
    """Semantics: y[s:e, c] += scale * (x[s:e] @ a^T) @ b^T, in place, in the adapters' type; y is rounded once a type."""
    assert x_TI.stride(1) == y_TO.stride(1) == 1
    for own in tables:
        update(y_TO, x_TI, own.matrix, own.members, own.tiles, own.most_targets, own.most_outputs, own.rank, own.is_aligned)


def segmented_lora_gradients(
    dx_TI: Tensor | None,
    dy_TO: Tensor,
    x_TI: Tensor | None,
    grads: Sequence[tuple[Tensor, Tensor]] | None,
    tables: Sequence[LoraTables],
    num_in: int,
) -> None:
    """Semantics: the reference's segmented_lora_backward, and segmented_lora_weight_backward for grads of each segment.

    Without `dx_TI` the former is left out, without `x_TI` and `grads` the latter. No gradient may come twice: programs race.
    """
    live = [grads[i] for own in tables for i in own.order] if grads is not None else []
    if len({tensor.data_ptr() for grad in live for tensor in grad}) < 2 * len(live):
        raise ValueError("two segments share a gradient")
    dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
    for own in tables:
        mine = [] if grads is None or x_TI is None else [grads[i] for i in own.order]
        gradients(
            dx_TI, dy_TO, x_TI if mine else None, [a for a, _ in mine], [b for _, b in mine], own.matrix, own.members,
            own.tiles, num_in, own.most_targets, own.most_outputs, own.rank, own.is_aligned,
        )  # fmt: skip


def checked_tables(segments: Sequence[LoraSegment], num_rows: int, num_in: int | None, num_out: int | None) -> list[LoraTables]:
    """The tables of segments that fit these rows, inputs and outputs. Raises ValueError for others."""
    for segment in segments:
        if num_in is not None and segment.a_RI.shape[1] != num_in:
            raise ValueError(f"a {tuple(segment.a_RI.shape)} for {num_in} inputs")
        if num_out is not None and not 0 <= segment.columns.start <= segment.columns.stop <= num_out:
            raise ValueError(f"columns {segment.columns.start} to {segment.columns.stop} of {num_out}")
        if not 0 <= segment.start <= segment.end <= num_rows:
            raise ValueError(f"rows {segment.start} to {segment.end} of {num_rows}")
    return segment_tables(segments)

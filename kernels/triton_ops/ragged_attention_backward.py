"""The gradients of causal attention of all training windows, in two launches: by rows, then by keys. Knows no tape.

T rows, L keys of all windows, N query heads, K key/value heads, G = N / K, D head_dim; a folded row is (row, head of group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import AttentionPlan, AttentionSegment
from kernels.triton_ops.lang import constexpr, dot_precision, jit, next_power_of_2, scalar, tl
from kernels.upload import upload

BLOCK = 64
"""Folded rows and keys of a step: the least rows that Hopper's wide instruction takes."""
FIELDS = 5


@jit
def _scored_kernel(
    q: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    slots_ptr: scalar,
    stride_s: scalar,
    first: scalar,
    end: scalar,
    position: scalar,
    log2_scale: scalar,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK: constexpr,
    PRECISION: constexpr,
) -> tuple[scalar, scalar, scalar]:
    """A block of keys and values, and the scores of the rows at these positions: -inf for keys they do not see"""
    key, offs = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_key = (key < end)[:, None] & (offs < D)[None, :]
    slot = tl.load(slots_ptr + key, mask=key < end, other=0).to(tl.int64)
    k = tl.load(k_ptr + slot[:, None] * stride_s + offs[None, :], mask=is_key, other=0.0).to(q.dtype)
    v = tl.load(v_ptr + slot[:, None] * stride_s + offs[None, :], mask=is_key, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
    return k, v, tl.where(key[None, :] <= position[:, None], scores, float("-inf"))


@jit
def _rows_kernel(
    do_ptr: scalar, q_ptr: scalar, k_ptr: scalar, v_ptr: scalar, o_ptr: scalar, dq_ptr: scalar, lse_ptr: scalar,
    delta_ptr: scalar, tiles_ptr: scalar, slots_ptr: scalar, stride_ot: scalar, stride_qt: scalar, stride_s: scalar,
    scale: scalar, log2_scale: scalar, N: constexpr, G: constexpr, D: constexpr, BLOCK_D: constexpr, BLOCK: constexpr,
    FIELDS: constexpr, PRECISION: constexpr,
) -> None:  # fmt: skip
    """o = p v with p = softmax(scale q k^T); delta = sum(do o); dq = scale * (p * (do v^T - delta)) k"""
    tile_ptr, kv_head = tiles_ptr + tl.program_id(0) * FIELDS, tl.program_id(1)
    row_start, W, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    slots_ptr += tl.load(tile_ptr + 3)
    start = tl.load(tile_ptr + 4) - W
    m, offs = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    place, head = m // G, kv_head * G + m % G
    is_row, row = place < W, row_start + place
    inside = is_row[:, None] & (offs < D)[None, :]
    at = head[:, None] * D + offs[None, :]
    q = tl.load(q_ptr + row[:, None] * stride_qt + at, mask=inside, other=0.0)
    do = tl.load(do_ptr + row[:, None] * stride_ot + at, mask=inside, other=0.0)
    acc, dq = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    end = start + tl.minimum((first + BLOCK - 1) // G + 1, W)
    k_ptr, v_ptr, position = k_ptr + kv_head * D, v_ptr + kv_head * D, start + place
    for at_key in range(0, end, BLOCK):
        k, v, scores = _scored_kernel(
            q, k_ptr, v_ptr, slots_ptr, stride_s, at_key, end, position, log2_scale, D, BLOCK_D, BLOCK, PRECISION
        )
        higher = tl.maximum(highest, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    o, lse = acc / total[:, None], highest + tl.log2(total)
    delta = tl.sum(o * do.to(tl.float32), 1)
    out = row[:, None] * (N * D) + at
    tl.store(o_ptr + out, o.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row * N + head, lse, mask=is_row)
    tl.store(delta_ptr + row * N + head, delta, mask=is_row)
    for at_key in range(0, end, BLOCK):
        k, v, scores = _scored_kernel(
            q, k_ptr, v_ptr, slots_ptr, stride_s, at_key, end, position, log2_scale, D, BLOCK_D, BLOCK, PRECISION
        )
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dq = tl.dot((p * (dp - delta[:, None]) * scale).to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@jit
def _keys_kernel(
    do_ptr: scalar,
    q_ptr: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    dk_ptr: scalar,
    dv_ptr: scalar,
    lse_ptr: scalar,
    delta_ptr: scalar,
    tiles_ptr: scalar,
    slots_ptr: scalar,
    stride_ot: scalar,
    stride_qt: scalar,
    stride_s: scalar,
    scale: scalar,
    log2_scale: scalar,
    N: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK: constexpr,
    FIELDS: constexpr,
    PRECISION: constexpr,
) -> None:
    """dv = p^T do; dk = scale * (p * (do v^T - delta))^T q, summed over the rows that see the key and the heads of its group"""
    tile_ptr, kv_head = tiles_ptr + tl.program_id(0) * FIELDS, tl.program_id(1)
    row_start, W, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    key_start, end = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)
    start = end - W
    key, offs = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    is_key = (key < end)[:, None] & (offs < D)[None, :]
    slot = tl.load(slots_ptr + key_start + key, mask=key < end, other=0).to(tl.int64)
    dtype = q_ptr.dtype.element_ty
    k = tl.load(k_ptr + slot[:, None] * stride_s + kv_head * D + offs[None, :], mask=is_key, other=0.0).to(dtype)
    v = tl.load(v_ptr + slot[:, None] * stride_s + kv_head * D + offs[None, :], mask=is_key, other=0.0).to(dtype)
    dk, dv = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for at_row in range(tl.maximum(first - start, 0) * G, W * G, BLOCK):
        m = at_row + tl.arange(0, BLOCK)
        place, head = m // G, kv_head * G + m % G
        is_row, row = place < W, row_start + place
        inside = is_row[:, None] & (offs < D)[None, :]
        at = head[:, None] * D + offs[None, :]
        q = tl.load(q_ptr + row[:, None] * stride_qt + at, mask=inside, other=0.0)
        do = tl.load(do_ptr + row[:, None] * stride_ot + at, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row * N + head, mask=is_row, other=0.0)
        delta = tl.load(delta_ptr + row * N + head, mask=is_row, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
        visible = (key[:, None] <= start + place[None, :]) & is_row[None, :]
        p = tl.where(visible, tl.exp2(tl.where(visible, scores - lse[None, :], 0.0)), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dk = tl.dot((p * (dp - delta[None, :]) * scale).to(q.dtype), q, dk, input_precision=PRECISION)
    out = (key_start + key).to(tl.int64)[:, None] * (N // G * D) + kv_head * D + offs[None, :]
    tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=is_key)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=is_key)


@dataclass(frozen=True, kw_only=True)
class BackwardTables:
    """`row_tiles` int32 [tiles, 5]: first batch row, rows, first folded row, first key, keys. `key_tiles`: instead of the first
    folded row the tile's first key among the window's. `slots` are of all keys.
    """

    row_tiles: Tensor
    key_tiles: Tensor
    slots: Tensor
    num_rows: int


def backward_tables(plan: AttentionPlan, group: int) -> BackwardTables:
    """The tables of a plan's segments, which are causal; made once for all layers."""

    def arrange() -> BackwardTables:
        rows = _tiles(plan.segments, lambda segment: (segment.end - segment.start) * group)
        keys = _tiles(plan.segments, lambda segment: segment.slots_L.numel())
        row_tiles, key_tiles = upload([rows, keys], plan.slots.device)
        num_rows = sum(segment.end - segment.start for segment in plan.segments)
        return BackwardTables(row_tiles=row_tiles, key_tiles=key_tiles, slots=plan.slots, num_rows=num_rows)

    return plan.arranged(("triton backward", group), arrange)


def _tiles(segments: Sequence[AttentionSegment], size: Callable[[AttentionSegment], int]) -> NDArray[np.int32]:
    tiles: list[tuple[int, ...]] = []
    first_key = 0
    for segment in segments:
        if segment.mask_nn is not None:
            raise ValueError("a draft tree among windows that go backward")
        rows, keys = segment.end - segment.start, segment.slots_L.numel()
        tiles += [(segment.start, rows, first, first_key, keys) for first in range(0, size(segment), BLOCK)]
        first_key += keys
    return np.array(tiles, dtype=np.int32).reshape(-1, FIELDS)


def ragged_attention_backward(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Semantics: the reference's ragged_attention_backward: (output, dq) of the rows, (dk, dv) of all keys in their order."""
    num_heads, num_kv_heads = q_TND.shape[1], k_cache_SKD.shape[1]
    if do_TND.shape != q_TND.shape or v_cache_SKD.shape != k_cache_SKD.shape or k_cache_SKD.shape[2] != q_TND.shape[2]:
        raise ValueError(f"q {tuple(q_TND.shape)}, do {tuple(do_TND.shape)}, k {tuple(k_cache_SKD.shape)}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads over {num_kv_heads}")
    tables = backward_tables(plan, num_heads // num_kv_heads)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = attend_backward(
        do_TND, q_TND, k_cache_SKD, v_cache_SKD, tables.row_tiles, tables.key_tiles, tables.slots,
        tables.num_rows < len(q_TND), scale,
    )  # fmt: skip
    return gradients


@torch.library.custom_op("heddle::ragged_attention_backward", mutates_args=())
def attend_backward(
    do_TND: Tensor,
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    row_tiles: Tensor,
    key_tiles: Tensor,
    slots: Tensor,
    has_idle_rows: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ragged_attention_backward with its tables one by one (BackwardTables), as compiled code sees it."""
    num_rows, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_cache_SKD.shape[1]
    do_TND, q_TND = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (do_TND, q_TND))
    assert k_cache_SKD.is_contiguous()
    assert v_cache_SKD.is_contiguous()
    make = torch.zeros if has_idle_rows else torch.empty
    o, dq = (make(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device) for _ in range(2))
    dk, dv = (torch.empty((slots.numel(), num_kv_heads, head_dim), dtype=q_TND.dtype, device=o.device) for _ in range(2))
    lse, delta = (torch.empty((num_rows, num_heads), dtype=torch.float32, device=q_TND.device) for _ in range(2))
    strides = (do_TND.stride(0), q_TND.stride(0), num_kv_heads * head_dim)
    scalars = (*strides, scale, scale * math.log2(math.e))
    shape: dict[str, Any] = {
        "N": num_heads,
        "G": num_heads // num_kv_heads,
        "D": head_dim,
        "BLOCK_D": max(next_power_of_2(head_dim), 16),
        "BLOCK": BLOCK,
        "FIELDS": FIELDS,
    }
    shape |= {"PRECISION": dot_precision(q_TND.dtype), "num_warps": 8}
    tensors = (do_TND, q_TND, k_cache_SKD, v_cache_SKD)
    if len(row_tiles):
        _rows_kernel[(len(row_tiles), num_kv_heads)](*tensors, o, dq, lse, delta, row_tiles, slots, *scalars, **shape)
        _keys_kernel[(len(key_tiles), num_kv_heads)](*tensors, dk, dv, lse, delta, key_tiles, slots, *scalars, **shape)
    return o, dq, dk, dv


@attend_backward.register_fake
def _(
    do_TND: Tensor, q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, row_tiles: Tensor, key_tiles: Tensor,
    slots: Tensor, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    keys = (slots.numel(), *k_cache_SKD.shape[1:])
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(q_TND.shape), q_TND.new_empty(keys), q_TND.new_empty(keys)

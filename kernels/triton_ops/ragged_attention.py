"""Attention of decode roots, trees, prefill chunks and training windows over cache slots, in one launch. Knows no model.

T rows, N query heads, K key/value heads, G = N / K, D head_dim, S cache slots, M folded rows of a tile, P partials.
A second launch combines the splits of long contexts, where there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.attention_tiles import LARGE_BLOCK, SMALL_BLOCK, SPLIT_KEYS, AttentionTiles
from kernels.triton_ops.lang import constexpr, dot_precision, jit, next_power_of_2, scalar, tl

LOG2_E = 1.4426950408889634
KEYS = 64
"""Keys of one step: with D = 128 in half precision 16 KiB each of keys and values, so that three steps fit in flight."""


@jit
def _step_kernel(
    acc: scalar,
    total: scalar,
    highest: scalar,
    q: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    slots_ptr: scalar,
    masks_ptr: scalar,
    word: scalar,
    lo: scalar,
    hi: scalar,
    context: scalar,
    row: scalar,
    is_row: scalar,
    is_tree: scalar,
    stride_s: scalar,
    scale: scalar,
    D: constexpr,
    BLOCK_D: constexpr,
    KEYS: constexpr,
    OWN: constexpr,
    PRECISION: constexpr,
) -> tuple[scalar, scalar, scalar]:
    """Online softmax over keys [lo, hi): acc = sum(exp(s - highest) v), total = sum(exp(s - highest))"""
    offs = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < hi
        slot = tl.load(slots_ptr + key, mask=inside, other=0).to(tl.int64)
        k_DL = tl.load(k_ptr + slot[None, :] * stride_s + offs[:, None], mask=inside[None, :] & (offs < D)[:, None], other=0.0)
        scores = tl.dot(q, k_DL, input_precision=PRECISION) * scale
        visible = inside[None, :] & (row >= 0)[:, None]
        if OWN:
            own = key - context
            if is_tree:
                words = tl.load(
                    masks_ptr + (word[:, None] + (own // 32)[None, :]), mask=is_row[:, None] & inside[None, :], other=0
                )
                visible = visible & (((words >> (own % 32)[None, :]) & 1) != 0)
            else:
                visible = visible & (own[None, :] <= row[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        v_LD = tl.load(v_ptr + slot[:, None] * stride_s + offs[None, :], mask=inside[:, None] & (offs < D)[None, :], other=0.0)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_LD.dtype), v_LD, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return acc, total, highest


@jit
def _tile_kernel(
    q_ptr: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    out_ptr: scalar,
    partial_ptr: scalar,
    lse_ptr: scalar,
    tile_ptr: scalar,
    slots_ptr: scalar,
    masks_ptr: scalar,
    lo: scalar,
    hi: scalar,
    stride_qt: scalar,
    stride_s: scalar,
    scale: scalar,
    K: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_M: constexpr,
    BLOCK_D: constexpr,
    KEYS: constexpr,
    PRECISION: constexpr,
) -> None:
    """out[m] = softmax(scale * q[m] k^T, masked) v over keys [lo, hi) of the tile's segment, or this split's share of it"""
    row_start, num_rows = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1)
    first, num_keys = tl.load(tile_ptr + 2), tl.load(tile_ptr + 4)
    mask_start, num_words, partial = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6), tl.load(tile_ptr + 7)
    kv_head = tl.program_id(1)
    slots_ptr += tl.load(tile_ptr + 3)
    m, offs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = (first + m) // G
    is_row, context = row < num_rows, num_keys - num_rows
    at = (kv_head * G + (first + m) % G)[:, None] * D + offs[None, :]
    inside = is_row[:, None] & (offs < D)[None, :]
    q = tl.load(q_ptr + (row_start + row)[:, None] * stride_qt + at, mask=inside, other=0.0)
    word = mask_start + row * num_words
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    acc, total, highest = _step_kernel(
        acc, total, highest, q, k_ptr, v_ptr, slots_ptr, masks_ptr, word, lo, tl.minimum(hi, context), context, row, is_row,
        mask_start >= 0, stride_s, scale, D, BLOCK_D, KEYS, False, PRECISION,
    )  # fmt: skip
    if mask_start < 0:
        hi = tl.minimum(hi, context + (first + BLOCK_M - 1) // G + 1)
    acc, total, highest = _step_kernel(
        acc, total, highest, q, k_ptr, v_ptr, slots_ptr, masks_ptr, word, tl.maximum(lo, context), hi, context, row, is_row,
        mask_start >= 0, stride_s, scale, D, BLOCK_D, KEYS, True, PRECISION,
    )  # fmt: skip
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    acc = acc / total[:, None]
    if partial < 0:
        tl.store(out_ptr + (row_start + row)[:, None] * (K * G * D) + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = ((partial + tl.program_id(2)).to(tl.int64) * K + kv_head) * BLOCK_M + m
        tl.store(partial_ptr + part[:, None] * D + offs[None, :], acc, mask=inside)
        tl.store(lse_ptr + part, tl.where(is_empty, float("-inf"), highest + tl.log2(total)), mask=is_row)


@jit
def _ragged_attention_kernel(
    q_ptr: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    out_ptr: scalar,
    partial_ptr: scalar,
    lse_ptr: scalar,
    tiles_ptr: scalar,
    slots_ptr: scalar,
    masks_ptr: scalar,
    stride_qt: scalar,
    stride_s: scalar,
    scale: scalar,
    K: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    SMALL: constexpr,
    LARGE: constexpr,
    HAS_SMALL: constexpr,
    HAS_LARGE: constexpr,
    SPLIT_KEYS: constexpr,
    KEYS: constexpr,
    PRECISION: constexpr,
) -> None:
    """One tile, one key/value head, one split of its keys; large tiles are not split."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 9
    num_keys, is_large = tl.load(tile_ptr + 4), tl.load(tile_ptr + 8) != 0
    split = tl.program_id(2)
    if HAS_LARGE:  # noqa: SIM102 (decided when the kernel is compiled)
        if is_large and split == 0:
            _tile_kernel(
                q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, tile_ptr, slots_ptr, masks_ptr, 0, num_keys, stride_qt,
                stride_s, scale, K, G, D, LARGE, BLOCK_D, KEYS, PRECISION,
            )  # fmt: skip
    if HAS_SMALL:
        lo = split * SPLIT_KEYS
        if (not is_large) and lo < num_keys:
            _tile_kernel(
                q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, tile_ptr, slots_ptr, masks_ptr, lo,
                tl.minimum(lo + SPLIT_KEYS, num_keys), stride_qt, stride_s, scale, K, G, D, SMALL, BLOCK_D, KEYS, PRECISION,
            )  # fmt: skip


@jit
def _combine_kernel(
    out_ptr: scalar,
    partial_ptr: scalar,
    lse_ptr: scalar,
    tiles_ptr: scalar,
    K: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    SPLIT_KEYS: constexpr,
) -> None:
    """out[m] = sum_s(2^lse[s, m] partial[s, m]) / sum_s(2^lse[s, m])"""
    tile_ptr, kv_head = tiles_ptr + tl.program_id(0) * 9, tl.program_id(1)
    row_start, num_rows, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    num_splits, partial = tl.cdiv(tl.load(tile_ptr + 4), SPLIT_KEYS), tl.load(tile_ptr + 7)
    m, offs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = (first + m) // G
    is_row = row < num_rows
    inside = is_row[:, None] & (offs < D)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(num_splits):
        part = ((partial + split).to(tl.int64) * K + kv_head) * BLOCK_M + m
        lse = tl.load(lse_ptr + part, mask=is_row, other=0.0)
        higher = tl.maximum(highest, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(lse - base), tl.exp2(highest - base)
        values = tl.load(partial_ptr + part[:, None] * D + offs[None, :], mask=inside, other=0.0)
        acc = acc * shrink[:, None] + values * weight[:, None]
        total = total * shrink + weight
        highest = higher
    at = (row_start + row)[:, None] * (K * G * D) + (kv_head * G + (first + m) % G)[:, None] * D + offs[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, tiles: AttentionTiles | None, scale: float
) -> Tensor:
    """Semantics: the reference's ragged_attention over the segments of `tiles`; idle rows are zero. None: no segments."""
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads = k_cache_SKD.shape[1]
    if v_cache_SKD.shape != k_cache_SKD.shape or k_cache_SKD.shape[2] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {tuple(q_TND.shape)}, k {tuple(k_cache_SKD.shape)}, v {tuple(v_cache_SKD.shape)}")
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    if tiles is None:
        return out_TND
    if tiles.group * num_kv_heads != num_heads:
        raise ValueError(f"tiles for {tiles.group} heads in a group, {num_heads} heads over {num_kv_heads}")
    assert q_TND.stride()[1:] == (head_dim, 1)
    assert k_cache_SKD.is_contiguous()
    assert v_cache_SKD.is_contiguous()
    shape = {"K": num_kv_heads, "G": tiles.group, "D": head_dim, "BLOCK_D": max(next_power_of_2(head_dim), 16)}
    num_partial_rows = tiles.num_partials * num_kv_heads * SMALL_BLOCK
    partials = torch.empty((num_partial_rows, head_dim), dtype=torch.float32, device=q_TND.device)
    lse = torch.empty(num_partial_rows, dtype=torch.float32, device=q_TND.device)
    _ragged_attention_kernel[(tiles.tiles.shape[0], num_kv_heads, tiles.max_splits)](
        q_TND, k_cache_SKD, v_cache_SKD, out_TND, partials, lse, tiles.tiles, tiles.slots, tiles.masks, q_TND.stride(0),
        num_kv_heads * head_dim, scale * LOG2_E, **shape, SMALL=SMALL_BLOCK, LARGE=LARGE_BLOCK, HAS_SMALL=tiles.has_small,
        HAS_LARGE=tiles.has_large, SPLIT_KEYS=SPLIT_KEYS, KEYS=KEYS, PRECISION=dot_precision(q_TND.dtype),
        num_warps=8 if tiles.has_large else 4, num_stages=3,
    )  # fmt: skip
    if tiles.num_partials:
        grid = (tiles.split_tiles.shape[0], num_kv_heads)
        _combine_kernel[grid](out_TND, partials, lse, tiles.split_tiles, **shape, BLOCK_M=SMALL_BLOCK, SPLIT_KEYS=SPLIT_KEYS)
    return out_TND

"""Attention of decode roots, trees, prefill chunks and training windows over cache slots, in one launch. Knows no model.

T rows, N query heads, K key/value heads, G = N / K, D head_dim, S cache slots, M folded rows of a tile.
A second launch merges the splits of long contexts, where there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.attention_tables import LARGE_BLOCK, MERGE_FIELDS, SMALL_BLOCK, WORK_FIELDS, AttentionTables
from kernels.triton_ops.lang import constexpr, dot_precision, jit, next_power_of_2, scalar, tl

LOG2_E = 1.4426950408889634
KEYS = 64
"""Keys of one step: with D = 128 in half precision 16 KiB each of keys and values, so that three steps fit in flight."""
SMALL_STAGES = 5
"""Of a launch without large tiles: a step's slots are read a stage before its keys, so it takes 5 to have two steps' keys and
values in flight (74 KB of shared memory; with 3 it is one, and 40 KB), and two programs still share a processor."""
MAX_PROGRAMS = 132 * 8
"""More than an H100's 132 processors run at once; the others' work is theirs in turn, the longest pieces first."""


@jit
def _step_kernel(
    acc: scalar, total: scalar, highest: scalar, q: scalar, k_ptr: scalar, v_ptr: scalar, slots_ptr: scalar, word_ptr: scalar,
    depth_ptr: scalar, depth: scalar, lo: scalar, hi: scalar, context: scalar, row: scalar, is_row: scalar, is_tree: scalar,
    num_words: scalar, stride_s: scalar, scale: scalar, D: constexpr, BLOCK_M: constexpr, BLOCK_D: constexpr, KEYS: constexpr,
    OWN: constexpr, WINDOW: constexpr, PRECISION: constexpr,
) -> tuple[scalar, scalar, scalar]:  # fmt: skip
    """Online softmax over keys [lo, hi): acc = sum(exp(s - highest) v), total = sum(exp(s - highest))"""
    offs = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < hi
        slot = tl.load(slots_ptr + key, mask=inside, other=0).to(tl.int64)
        k_DL = tl.load(k_ptr + slot[None, :] * stride_s + offs[:, None], mask=inside[None, :] & (offs < D)[:, None], other=0.0)
        scores = tl.dot(q, k_DL, input_precision=PRECISION) * scale
        visible = inside[None, :] & (row >= 0)[:, None]
        key_depth = key - context
        if OWN:
            own = key - context
            if is_tree:
                words = tl.zeros((BLOCK_M, KEYS), tl.int32)
                for i in tl.static_range((KEYS + 31) // 32 + 1):  # a pointer for each row, not for each row and key
                    at_word = (start - context) // 32 + i
                    has_word = tl.where(at_word < num_words, is_row, False)
                    word = tl.load(word_ptr + at_word, mask=has_word, other=0)
                    words = tl.where((own // 32 == at_word)[None, :], word[:, None], words)
                visible = visible & (((words >> (own % 32)[None, :]) & 1) != 0)
                if WINDOW > 0:
                    key_depth = tl.load(depth_ptr + own, mask=inside, other=0)
            else:
                visible = visible & (own[None, :] <= row[:, None])
        if WINDOW > 0:
            visible = visible & (depth[:, None] - key_depth[None, :] < WINDOW)
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
    q_ptr: scalar, k_ptr: scalar, v_ptr: scalar, out_ptr: scalar, partial_ptr: scalar, lse_ptr: scalar, work_ptr: scalar,
    slots_ptr: scalar, masks_ptr: scalar, stride_qt: scalar, stride_s: scalar, scale: scalar, K: constexpr, G: constexpr,
    D: constexpr, BLOCK_M: constexpr, BLOCK_D: constexpr, UNIT: constexpr, KEYS: constexpr, WINDOW: constexpr,
    PRECISION: constexpr,
) -> None:  # fmt: skip
    """out[m] = softmax(scale * q[m] k^T, masked) v over the keys of this piece of work, or its share of a split tile"""
    row_start, num_rows = tl.load(work_ptr).to(tl.int64), tl.load(work_ptr + 1)
    first, num_keys = tl.load(work_ptr + 2), tl.load(work_ptr + 4)
    mask_start, num_words, partial = tl.load(work_ptr + 5), tl.load(work_ptr + 6), tl.load(work_ptr + 7)
    lo, hi = tl.load(work_ptr + 9), tl.load(work_ptr + 10)
    kv_head = tl.program_id(1)
    slots_ptr += tl.load(work_ptr + 3)
    m, offs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = (first + m) // G
    is_row, context = row < num_rows, num_keys - num_rows
    at = (kv_head * G + (first + m) % G)[:, None] * D + offs[None, :]
    inside = is_row[:, None] & (offs < D)[None, :]
    q = tl.load(q_ptr + (row_start + row)[:, None] * stride_qt + at, mask=inside, other=0.0)
    word_ptr = masks_ptr + (mask_start + row * num_words)
    depth_ptr = masks_ptr + (mask_start + num_rows * num_words)
    depth = row
    if WINDOW > 0:
        if mask_start >= 0:
            depth = tl.load(depth_ptr + row, mask=is_row, other=0)
        else:
            lo = tl.maximum(lo, context + first // G - WINDOW + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    acc, total, highest = _step_kernel(
        acc, total, highest, q, k_ptr, v_ptr, slots_ptr, word_ptr, depth_ptr, depth, lo, tl.minimum(hi, context), context, row,
        is_row, mask_start >= 0, num_words, stride_s, scale, D, BLOCK_M, BLOCK_D, KEYS, False, WINDOW, PRECISION,
    )  # fmt: skip
    if mask_start < 0:
        hi = tl.minimum(hi, context + (first + BLOCK_M - 1) // G + 1)
    acc, total, highest = _step_kernel(
        acc, total, highest, q, k_ptr, v_ptr, slots_ptr, word_ptr, depth_ptr, depth, tl.maximum(lo, context), hi, context, row,
        is_row, mask_start >= 0, num_words, stride_s, scale, D, BLOCK_M, BLOCK_D, KEYS, True, WINDOW, PRECISION,
    )  # fmt: skip
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    acc = acc / total[:, None]
    if partial < 0:
        tl.store(out_ptr + (row_start + row)[:, None] * (K * G * D) + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = (partial.to(tl.int64) * K + kv_head * tl.load(work_ptr + 11)) * UNIT + m
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
    sizes_ptr: scalar,
    work_ptr: scalar,
    slots_ptr: scalar,
    masks_ptr: scalar,
    stride_qt: scalar,
    stride_s: scalar,
    scale: scalar,
    FIELDS: constexpr,
    K: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    SMALL: constexpr,
    LARGE: constexpr,
    HAS_SMALL: constexpr,
    HAS_LARGE: constexpr,
    KEYS: constexpr,
    WINDOW: constexpr,
    PRECISION: constexpr,
) -> None:
    """This program's pieces of work, of one key/value head: there may be more than programs, or fewer."""
    for piece in range(tl.program_id(0), tl.load(sizes_ptr), tl.num_programs(0)):
        own_ptr = work_ptr + piece * FIELDS
        is_large = tl.load(own_ptr + 8) != 0
        if HAS_LARGE:  # noqa: SIM102 (decided when the kernel is compiled)
            if is_large:
                _tile_kernel(
                    q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, own_ptr, slots_ptr, masks_ptr, stride_qt, stride_s,
                    scale, K, G, D, LARGE, BLOCK_D, SMALL, KEYS, WINDOW, PRECISION,
                )  # fmt: skip
        if HAS_SMALL:  # noqa: SIM102
            if not is_large:
                _tile_kernel(
                    q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, own_ptr, slots_ptr, masks_ptr, stride_qt, stride_s,
                    scale, K, G, D, SMALL, BLOCK_D, SMALL, KEYS, WINDOW, PRECISION,
                )  # fmt: skip


@jit
def _merge_kernel(
    out_ptr: scalar,
    partial_ptr: scalar,
    lse_ptr: scalar,
    sizes_ptr: scalar,
    merges_ptr: scalar,
    FIELDS: constexpr,
    K: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    LARGE: constexpr,
) -> None:
    """out[m] = sum_s(2^lse[s, m] partial[s, m]) / sum_s(2^lse[s, m])"""
    merge_ptr, kv_head = merges_ptr + tl.program_id(0) * FIELDS, tl.program_id(1)
    if tl.program_id(0) >= tl.load(sizes_ptr + 1):
        return
    row_start, num_rows, first = tl.load(merge_ptr).to(tl.int64), tl.load(merge_ptr + 1), tl.load(merge_ptr + 2)
    num_splits, units = tl.load(merge_ptr + 4), tl.load(merge_ptr + 5)
    partial, unit = tl.load(merge_ptr + 3).to(tl.int64), (first % LARGE) // BLOCK_M
    m, offs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = (first + m) // G
    is_row = row < num_rows
    inside = is_row[:, None] & (offs < D)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for split in range(num_splits):
        part = ((partial + split * units) * K + kv_head * units + unit) * BLOCK_M + m
        lse = tl.load(lse_ptr + part, mask=is_row, other=0.0)
        higher = tl.maximum(highest, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(lse - base), tl.exp2(highest - base)
        values = tl.load(partial_ptr + part[:, None] * D + offs[None, :], mask=inside, other=0.0)
        acc = acc * shrink[:, None] + values * weight[:, None]
        total = total * shrink + weight
        highest = higher
    total = tl.where(total == 0.0, 1.0, total)
    at = (row_start + row)[:, None] * (K * G * D) + (kv_head * G + (first + m) % G)[:, None] * D + offs[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def grid(num_pieces: int, num_kv_heads: int) -> tuple[int, int]:
    """A program for each piece of work and key/value head, as long as that is not many times more than run at once."""
    return min(num_pieces, max(MAX_PROGRAMS // num_kv_heads, 1)), num_kv_heads


def ragged_attention(
    q_TND: Tensor, k_cache_SKD: Tensor, v_cache_SKD: Tensor, tables: AttentionTables | None, scale: float
) -> Tensor:
    """Semantics: the reference's ragged_attention over the segments of `tables`; idle rows are zero. None: no segments."""
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads = k_cache_SKD.shape[1]
    if v_cache_SKD.shape != k_cache_SKD.shape or k_cache_SKD.shape[2] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {tuple(q_TND.shape)}, k {tuple(k_cache_SKD.shape)}, v {tuple(v_cache_SKD.shape)}")
    if tables is None:
        return torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    if tables.group * num_kv_heads != num_heads:
        raise ValueError(f"tables for {tables.group} heads in a group, {num_heads} heads over {num_kv_heads}")
    attended: Tensor = attend(
        q_TND, k_cache_SKD, v_cache_SKD, tables.sizes, tables.work, tables.merges, tables.slots, tables.masks,
        tables.num_partials, tables.has_small, tables.has_large, tables.num_rows < len(q_TND), scale, tables.window,
    )  # fmt: skip
    return attended


@torch.library.custom_op("heddle::ragged_attention", mutates_args=())
def attend(
    q_TND: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    sizes: Tensor,
    work: Tensor,
    merges: Tensor,
    slots: Tensor,
    masks: Tensor,
    num_partials: int,
    has_small: bool,
    has_large: bool,
    has_idle_rows: bool,
    scale: float,
    window: int,
) -> Tensor:
    """ragged_attention with its tables one by one (AttentionTables), as compiled code sees it."""
    assert q_TND.stride()[1:] == (q_TND.shape[2], 1)
    assert k_cache_SKD.is_contiguous()
    assert v_cache_SKD.is_contiguous()
    (num_kv_heads, head_dim), group = k_cache_SKD.shape[1:], q_TND.shape[1] // k_cache_SKD.shape[1]
    make = torch.zeros if has_idle_rows else torch.empty
    out_TND = make(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    shape = {"K": num_kv_heads, "G": group, "D": head_dim, "BLOCK_D": max(next_power_of_2(head_dim), 16)}
    num_partial_rows = num_partials * num_kv_heads * SMALL_BLOCK
    partials = torch.empty((num_partial_rows, head_dim), dtype=torch.float32, device=q_TND.device)
    lse = torch.empty(num_partial_rows, dtype=torch.float32, device=q_TND.device)
    _ragged_attention_kernel[grid(len(work), num_kv_heads)](
        q_TND, k_cache_SKD, v_cache_SKD, out_TND, partials, lse, sizes, work, slots, masks, q_TND.stride(0),
        num_kv_heads * head_dim, scale * LOG2_E, FIELDS=WORK_FIELDS, **shape, SMALL=SMALL_BLOCK, LARGE=LARGE_BLOCK,
        HAS_SMALL=has_small, HAS_LARGE=has_large, KEYS=KEYS, WINDOW=window, PRECISION=dot_precision(q_TND.dtype),
        num_warps=8 if has_large else 4,
        num_stages=3 if has_large else SMALL_STAGES,
    )  # fmt: skip
    if num_partials:
        _merge_kernel[(len(merges), num_kv_heads)](
            out_TND, partials, lse, sizes, merges, FIELDS=MERGE_FIELDS, **shape, BLOCK_M=SMALL_BLOCK, LARGE=LARGE_BLOCK
        )
    return out_TND


@attend.register_fake
def _(q_TND: Tensor, *_: object) -> Tensor:
    return q_TND.new_empty(q_TND.shape)

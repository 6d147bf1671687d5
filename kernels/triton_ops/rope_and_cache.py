"""RoPE on queries and keys with the write of keys and values to their slots, and its inverse. Knows no page table.

T rows, N query heads, K key/value heads, D head_dim, S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.lang import cdiv, constexpr, jit, next_power_of_2, scalar, tl

HEADS = 8
"""Heads of one program: with D = 128 in half precision, two accesses of 16 bytes for each thread of 2 warps."""


@jit
def _rotated_kernel(
    src: scalar, dst: scalar, mask: scalar, cos: scalar, cos_high: scalar, sin: scalar, sin_high: scalar, HALF: constexpr
) -> None:
    """dst = (low * cos - high * sin, high * cos' + low * sin')"""
    low = tl.load(src, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(src + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst, (low * cos - high * sin).to(dst.dtype.element_ty), mask=mask)
    tl.store(dst + HALF, (high * cos_high + low * sin_high).to(dst.dtype.element_ty), mask=mask)


@jit
def _rope_and_cache_kernel(
    q_ptr: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    cos_ptr: scalar,
    sin_ptr: scalar,
    out_ptr: scalar,
    k_cache_ptr: scalar,
    v_cache_ptr: scalar,
    slots_ptr: scalar,
    stride_qt: scalar,
    stride_kt: scalar,
    stride_vt: scalar,
    N: constexpr,
    K: constexpr,
    D: constexpr,
    BLOCK_HALF: constexpr,
    HEADS: constexpr,
) -> None:
    """out[t] = rope(q[t]); k_cache[slots[t]] = rope(k[t]); v_cache[slots[t]] = v[t]"""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head = (first + tl.arange(0, HEADS))[:, None]
    HALF: constexpr = D // 2
    offs = tl.arange(0, BLOCK_HALF)
    inside = offs < HALF
    cos = tl.load(cos_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + row * D + HALF + offs, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + row * D + HALF + offs, mask=inside, other=0.0).to(tl.float32)
    inside = inside[None, :]
    at = head * D + offs[None, :]
    if first < N:
        mask = inside & (head < N)
        _rotated_kernel(q_ptr + row * stride_qt + at, out_ptr + row * N * D + at, mask, cos, cos_high, sin, sin_high, HALF)
    if first + HEADS > N:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        mask = inside & (head >= N) & (head < N + tl.where(slot < 0, 0, K))
        at -= N * D
        dst = slot * K * D + at
        _rotated_kernel(k_ptr + row * stride_kt + at, k_cache_ptr + dst, mask, cos, cos_high, sin, sin_high, HALF)
        src = v_ptr + row * stride_vt + at
        tl.store(v_cache_ptr + dst, tl.load(src, mask=mask), mask=mask)
        tl.store(v_cache_ptr + dst + HALF, tl.load(src + HALF, mask=mask), mask=mask)


@torch.library.custom_op("heddle::rope_and_cache", mutates_args=("k_cache_SKD", "v_cache_SKD"))
def rope_and_cache(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Semantics: k_cache[slots] = rope(k); v_cache[slots] = v, in place; returns rope(q). Slots must differ.

    A row whose slot is negative is written nowhere.
    """
    num_rows, num_heads, head_dim = q_TND.shape
    num_kv_heads = k_TKD.shape[1]
    if k_TKD.shape != (num_rows, num_kv_heads, head_dim) or v_TKD.shape != k_TKD.shape or slots_T.shape != (num_rows,):
        raise ValueError(
            f"q {tuple(q_TND.shape)}, k {tuple(k_TKD.shape)}, v {tuple(v_TKD.shape)}, slots {tuple(slots_T.shape)}"
        )
    if head_dim % 2 or cos_TD.shape != (num_rows, head_dim) or sin_TD.shape != cos_TD.shape:
        raise ValueError(f"rotations {tuple(cos_TD.shape)}, {tuple(sin_TD.shape)} of {num_rows} rows of {head_dim}")
    for x in (q_TND, k_TKD, v_TKD):
        assert x.stride()[1:] == (head_dim, 1)
    for x in (cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slots_T):
        assert x.is_contiguous()
    out_TND = torch.empty((num_rows, num_heads, head_dim), dtype=q_TND.dtype, device=q_TND.device)
    if num_rows:
        tensors = (q_TND, k_TKD, v_TKD, cos_TD, sin_TD, out_TND, k_cache_SKD, v_cache_SKD, slots_T)
        strides = (q_TND.stride(0), k_TKD.stride(0), v_TKD.stride(0))
        grid = (num_rows, cdiv(num_heads + num_kv_heads, HEADS))
        shape = {"N": num_heads, "K": num_kv_heads, "D": head_dim}
        _rope_and_cache_kernel[grid](
            *tensors, *strides, **shape, BLOCK_HALF=next_power_of_2(head_dim // 2), HEADS=HEADS, num_warps=2
        )
    return out_TND


@rope_and_cache.register_fake
def _(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    return q_TND.new_empty(q_TND.shape)


@jit
def _rope_backward_kernel(
    dx_ptr: scalar,
    cos_ptr: scalar,
    sin_ptr: scalar,
    out_ptr: scalar,
    stride_t: scalar,
    N: constexpr,
    D: constexpr,
    BLOCK_HALF: constexpr,
    HEADS: constexpr,
) -> None:
    """out[t] = the rotation of dx[t] by the negative angle"""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    HALF: constexpr = D // 2
    offs = tl.arange(0, BLOCK_HALF)
    inside = offs < HALF
    cos = tl.load(cos_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + row * D + HALF + offs, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + row * D + HALF + offs, mask=inside, other=0.0).to(tl.float32)
    at = head * D + offs[None, :]
    mask = inside[None, :] & (head < N)
    _rotated_kernel(dx_ptr + row * stride_t + at, out_ptr + row * N * D + at, mask, cos, cos_high, -sin, -sin_high, HALF)


@torch.library.custom_op("heddle::rope_backward", mutates_args=())
def rope_backward(dx_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Semantics: the reference's rope_backward."""
    num_rows, num_heads, head_dim = dx_TND.shape
    if head_dim % 2 or cos_TD.shape != (num_rows, head_dim) or sin_TD.shape != cos_TD.shape:
        raise ValueError(f"rotations {tuple(cos_TD.shape)}, {tuple(sin_TD.shape)} of {num_rows} rows of {head_dim}")
    dx_TND = dx_TND if dx_TND.stride()[1:] == (head_dim, 1) else dx_TND.contiguous()
    cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
    out_TND = torch.empty((num_rows, num_heads, head_dim), dtype=dx_TND.dtype, device=dx_TND.device)
    if num_rows:
        shape = {"N": num_heads, "D": head_dim, "BLOCK_HALF": next_power_of_2(head_dim // 2), "HEADS": HEADS}
        grid = (num_rows, cdiv(num_heads, HEADS))
        _rope_backward_kernel[grid](dx_TND, cos_TD, sin_TD, out_TND, dx_TND.stride(0), **shape, num_warps=2)
    return out_TND


@rope_backward.register_fake
def _(dx_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    return dx_TND.new_empty(dx_TND.shape)

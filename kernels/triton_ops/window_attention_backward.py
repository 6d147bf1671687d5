"""The gradients of causal attention for one training window, in two launches: by rows, then by keys. Knows no tape.

W rows of the window, L keys, N query heads, K key/value heads, G = N / K, D head_dim; a folded row is (row, head of the group).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.triton_ops.lang import cdiv, constexpr, dot_precision, jit, next_power_of_2, scalar, tl

BLOCK = 64
"""Folded rows and keys of a step: the least rows that Hopper's wide instruction takes."""


@jit
def _scored_kernel(
    q: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    stride_kt: scalar,
    stride_vt: scalar,
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
    key, offs = (first + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, BLOCK_D)
    is_key = (key < end)[:, None] & (offs < D)[None, :]
    k = tl.load(k_ptr + key[:, None] * stride_kt + offs[None, :], mask=is_key, other=0.0)
    v = tl.load(v_ptr + key[:, None] * stride_vt + offs[None, :], mask=is_key, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
    return k, v, tl.where(key[None, :] <= position[:, None], scores, float("-inf"))


@jit
def _rows_kernel(
    do_ptr: scalar,
    q_ptr: scalar,
    k_ptr: scalar,
    v_ptr: scalar,
    o_ptr: scalar,
    dq_ptr: scalar,
    lse_ptr: scalar,
    delta_ptr: scalar,
    stride_ot: scalar,
    stride_qt: scalar,
    stride_kt: scalar,
    stride_vt: scalar,
    W: scalar,
    start: scalar,
    scale: scalar,
    log2_scale: scalar,
    N: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK: constexpr,
    PRECISION: constexpr,
) -> None:
    """o = p v with p = softmax(scale q k^T); delta = sum(do o); dq = scale * (p * (do v^T - delta)) k"""
    first, kv_head = tl.program_id(0) * BLOCK, tl.program_id(1)
    m, offs = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row, head = (m // G).to(tl.int64), kv_head * G + m % G
    inside = (row < W)[:, None] & (offs < D)[None, :]
    at = head[:, None] * D + offs[None, :]
    q = tl.load(q_ptr + row[:, None] * stride_qt + at, mask=inside, other=0.0)
    do = tl.load(do_ptr + row[:, None] * stride_ot + at, mask=inside, other=0.0)
    acc, dq = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total, highest = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    end = start + tl.minimum((first + BLOCK - 1) // G + 1, W)
    k_ptr, v_ptr, position = k_ptr + kv_head * D, v_ptr + kv_head * D, start + row
    for at_key in range(0, end, BLOCK):
        k, v, scores = _scored_kernel(
            q, k_ptr, v_ptr, stride_kt, stride_vt, at_key, end, position, log2_scale, D, BLOCK_D, BLOCK, PRECISION
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
    tl.store(lse_ptr + row * N + head, lse, mask=row < W)
    tl.store(delta_ptr + row * N + head, delta, mask=row < W)
    for at_key in range(0, end, BLOCK):
        k, v, scores = _scored_kernel(
            q, k_ptr, v_ptr, stride_kt, stride_vt, at_key, end, position, log2_scale, D, BLOCK_D, BLOCK, PRECISION
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
    stride_ot: scalar,
    stride_qt: scalar,
    stride_kt: scalar,
    stride_vt: scalar,
    W: scalar,
    start: scalar,
    scale: scalar,
    log2_scale: scalar,
    N: constexpr,
    G: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK: constexpr,
    PRECISION: constexpr,
) -> None:
    """dv = p^T do; dk = scale * (p * (do v^T - delta))^T q, summed over the rows that see the key and the heads of its group"""
    first, kv_head = tl.program_id(0) * BLOCK, tl.program_id(1)
    key, offs = (first + tl.arange(0, BLOCK)).to(tl.int64), tl.arange(0, BLOCK_D)
    is_key = (key < start + W)[:, None] & (offs < D)[None, :]
    k = tl.load(k_ptr + key[:, None] * stride_kt + kv_head * D + offs[None, :], mask=is_key, other=0.0)
    v = tl.load(v_ptr + key[:, None] * stride_vt + kv_head * D + offs[None, :], mask=is_key, other=0.0)
    dk, dv = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for at_row in range(tl.maximum(first - start, 0) * G, W * G, BLOCK):
        m = at_row + tl.arange(0, BLOCK)
        row, head = (m // G).to(tl.int64), kv_head * G + m % G
        inside = (row < W)[:, None] & (offs < D)[None, :]
        at = head[:, None] * D + offs[None, :]
        q = tl.load(q_ptr + row[:, None] * stride_qt + at, mask=inside, other=0.0)
        do = tl.load(do_ptr + row[:, None] * stride_ot + at, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row * N + head, mask=row < W, other=0.0)
        delta = tl.load(delta_ptr + row * N + head, mask=row < W, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
        visible = (key[:, None] <= start + row[None, :]) & (row < W)[None, :]
        p = tl.where(visible, tl.exp2(tl.where(visible, scores - lse[None, :], 0.0)), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dk = tl.dot((p * (dp - delta[None, :]) * scale).to(q.dtype), q, dk, input_precision=PRECISION)
    out = key[:, None] * (N // G * D) + kv_head * D + offs[None, :]
    tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=is_key)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=is_key)


def window_attention_backward(
    do_WND: Tensor, q_WND: Tensor, k_LKD: Tensor, v_LKD: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Semantics: the reference's window_attention_backward: (output, dq, dk, dv)."""
    num_rows, num_heads, head_dim = q_WND.shape
    num_keys, num_kv_heads, _ = k_LKD.shape
    if num_keys != start + num_rows:
        raise ValueError(f"{num_keys} keys for a window of {num_rows} rows that starts at {start}")
    if do_WND.shape != q_WND.shape or v_LKD.shape != k_LKD.shape or k_LKD.shape[2] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {tuple(q_WND.shape)}, do {tuple(do_WND.shape)}, k {tuple(k_LKD.shape)}, v {tuple(v_LKD.shape)}")
    tensors = (do_WND, q_WND, k_LKD, v_LKD)
    for x in tensors:
        assert x.stride()[1:] == (head_dim, 1)
    o, dq = (torch.empty(q_WND.shape, dtype=q_WND.dtype, device=q_WND.device) for _ in range(2))
    dk, dv = (torch.zeros(k_LKD.shape, dtype=k_LKD.dtype, device=q_WND.device) for _ in range(2))
    if not num_rows:
        return o, dq, dk, dv
    lse, delta = (torch.empty((num_rows, num_heads), dtype=torch.float32, device=q_WND.device) for _ in range(2))
    group = num_heads // num_kv_heads
    scalars = (*(x.stride(0) for x in tensors), num_rows, start, scale, scale * math.log2(math.e))
    shape: dict[str, Any] = {
        "N": num_heads,
        "G": group,
        "D": head_dim,
        "BLOCK_D": max(next_power_of_2(head_dim), 16),
        "BLOCK": BLOCK,
    }
    shape |= {"PRECISION": dot_precision(q_WND.dtype), "num_warps": 8}
    _rows_kernel[(cdiv(num_rows * group, BLOCK), num_kv_heads)](*tensors, o, dq, lse, delta, *scalars, **shape)
    _keys_kernel[(cdiv(num_keys, BLOCK), num_kv_heads)](*tensors, dk, dv, lse, delta, *scalars, **shape)
    return o, dq, dk, dv

"""RMS norm, of a sum too, and its gradient: one program per row, one read and one write. Knows no model.

T rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.lang import constexpr, jit, next_power_of_2, scalar, tl


@jit
def _rms_norm_kernel(
    x_ptr: scalar, weight_ptr: scalar, y_ptr: scalar, stride_xt: scalar, H: scalar, eps: scalar, BLOCK_H: constexpr
) -> None:
    """y = weight * round(x / sqrt(mean(x^2) + eps))"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    narrow = tl.load(x_ptr + row * stride_xt + offs, mask=mask, other=0.0)
    x = narrow.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    normed = (x * inverse).to(narrow.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + offs, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _add_rms_norm_kernel(
    x_ptr: scalar,
    residual_ptr: scalar,
    weight_ptr: scalar,
    m_ptr: scalar,
    y_ptr: scalar,
    stride_xt: scalar,
    stride_rt: scalar,
    H: scalar,
    eps: scalar,
    BLOCK_H: constexpr,
) -> None:
    """m = round(x + residual); y = weight * round(m / sqrt(mean(m^2) + eps))"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    x = tl.load(x_ptr + row * stride_xt + offs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_rt + offs, mask=mask, other=0.0).to(tl.float32)
    narrow = (x + residual).to(m_ptr.dtype.element_ty)
    tl.store(m_ptr + row * H + offs, narrow, mask=mask)
    m = narrow.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(m * m, axis=0) / H + eps)
    normed = (m * inverse).to(narrow.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + offs, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _rms_norm_backward_kernel(
    dy_ptr: scalar,
    x_ptr: scalar,
    weight_ptr: scalar,
    dx_ptr: scalar,
    stride_dyt: scalar,
    stride_xt: scalar,
    H: scalar,
    eps: scalar,
    BLOCK_H: constexpr,
) -> None:
    """dx = i * g - x * i^3 * mean(g * x) with g = dy * weight and i = 1 / rms(x)"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    x = tl.load(x_ptr + row * stride_xt + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dyt + offs, mask=mask, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    shared = inverse * inverse * inverse * (tl.sum(g * x, axis=0) / H)
    tl.store(dx_ptr + row * H + offs, (g * inverse - x * shared).to(dx_ptr.dtype.element_ty), mask=mask)


def _num_warps(block: int) -> int:
    """Eight elements of every thread: one 16-byte access in half precision."""
    return min(max(block // 256, 1), 16)


@torch.library.custom_op("heddle::rms_norm", mutates_args=())
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Semantics: the reference's rms_norm."""
    num_rows, hidden = x_TH.shape
    if weight_H.shape != (hidden,):
        raise ValueError(f"weight {tuple(weight_H.shape)} for rows of {hidden}")
    assert x_TH.stride(1) == 1
    assert weight_H.is_contiguous()
    y_TH = torch.empty((num_rows, hidden), dtype=x_TH.dtype, device=x_TH.device)
    if num_rows:
        block = next_power_of_2(hidden)
        _rms_norm_kernel[(num_rows,)](
            x_TH, weight_H, y_TH, x_TH.stride(0), hidden, eps, BLOCK_H=block, num_warps=_num_warps(block)
        )
    return y_TH


@rms_norm.register_fake
def _(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


@torch.library.custom_op("heddle::add_rms_norm", mutates_args=())
def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Semantics: the reference's add_rms_norm."""
    num_rows, hidden = x_TH.shape
    if weight_H.shape != (hidden,) or residual_TH.shape != x_TH.shape:
        raise ValueError(f"weight {tuple(weight_H.shape)}, residual {tuple(residual_TH.shape)}, rows {tuple(x_TH.shape)}")
    assert x_TH.stride(1) == residual_TH.stride(1) == 1
    assert weight_H.is_contiguous()
    m_TH, y_TH = (torch.empty((num_rows, hidden), dtype=x_TH.dtype, device=x_TH.device) for _ in range(2))
    if num_rows:
        block = next_power_of_2(hidden)
        strides = (x_TH.stride(0), residual_TH.stride(0))
        _add_rms_norm_kernel[(num_rows,)](
            x_TH, residual_TH, weight_H, m_TH, y_TH, *strides, hidden, eps, BLOCK_H=block, num_warps=_num_warps(block)
        )
    return m_TH, y_TH


@add_rms_norm.register_fake
def _(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape)


@torch.library.custom_op("heddle::rms_norm_backward", mutates_args=())
def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Semantics: the reference's rms_norm_backward."""
    num_rows, hidden = x_TH.shape
    if weight_H.shape != (hidden,) or dy_TH.shape != x_TH.shape:
        raise ValueError(f"weight {tuple(weight_H.shape)}, gradient {tuple(dy_TH.shape)}, rows {tuple(x_TH.shape)}")
    assert x_TH.stride(1) == dy_TH.stride(1) == 1
    assert weight_H.is_contiguous()
    dx_TH = torch.empty((num_rows, hidden), dtype=x_TH.dtype, device=x_TH.device)
    if num_rows:
        block = next_power_of_2(hidden)
        strides = (dy_TH.stride(0), x_TH.stride(0))
        _rms_norm_backward_kernel[(num_rows,)](
            dy_TH, x_TH, weight_H, dx_TH, *strides, hidden, eps, BLOCK_H=block, num_warps=_num_warps(block)
        )
    return dx_TH


@rms_norm_backward.register_fake
def _(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return x_TH.new_empty(x_TH.shape)

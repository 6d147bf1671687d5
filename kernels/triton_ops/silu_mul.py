"""silu(gate) * up and its gradient, elementwise over rows that hold gate and up side by side. Knows no model.

T rows, F intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.lang import cdiv, constexpr, jit, next_power_of_2, scalar, tl

MAX_BLOCK = 1024
"""Columns of one program: 8 for each of 128 threads, one 16-byte access in half precision."""


@jit
def _silu_mul_kernel(gate_up_ptr: scalar, z_ptr: scalar, stride_t: scalar, F: scalar, BLOCK_F: constexpr) -> None:
    """z = gate * sigmoid(gate) * up"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    gate = tl.load(gate_up_ptr + row * stride_t + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_t + F + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(z_ptr + row * F + offs, (gate * tl.sigmoid(gate) * up).to(z_ptr.dtype.element_ty), mask=mask)


@jit
def _silu_mul_backward_kernel(
    dz_ptr: scalar, gate_up_ptr: scalar, out_ptr: scalar, stride_zt: scalar, stride_t: scalar, F: scalar, BLOCK_F: constexpr
) -> None:
    """dgate = dz * up * s * (1 + gate * (1 - s)), dup = dz * gate * s, with s = sigmoid(gate)"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    gate = tl.load(gate_up_ptr + row * stride_t + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_t + F + offs, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + row * stride_zt + offs, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    out = out_ptr + row * 2 * F + offs
    tl.store(out, (dz * up * s * (1 + gate * (1 - s))).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + F, (dz * gate * s).to(out_ptr.dtype.element_ty), mask=mask)


def _grid(num_rows: int, num_columns: int) -> tuple[tuple[int, int], int]:
    block = min(next_power_of_2(num_columns), MAX_BLOCK)
    return (num_rows, cdiv(num_columns, block)), block


@torch.library.custom_op("heddle::silu_mul", mutates_args=())
def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """Semantics: the reference's silu_mul."""
    num_rows, double = gate_up_T2F.shape
    if double % 2:
        raise ValueError(f"{double} columns are not a gate and an up of one size")
    assert gate_up_T2F.stride(1) == 1
    z_TF = torch.empty((num_rows, double // 2), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if z_TF.numel():
        grid, block = _grid(*z_TF.shape)
        _silu_mul_kernel[grid](gate_up_T2F, z_TF, gate_up_T2F.stride(0), double // 2, BLOCK_F=block)
    return z_TF


@silu_mul.register_fake
def _(gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.new_empty((gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2))


@torch.library.custom_op("heddle::silu_mul_backward", mutates_args=())
def silu_mul_backward(dz_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    """Semantics: the reference's silu_mul_backward."""
    num_rows, double = gate_up_T2F.shape
    if double % 2 or dz_TF.shape != (num_rows, double // 2):
        raise ValueError(f"gradient {tuple(dz_TF.shape)} of {tuple(gate_up_T2F.shape)}")
    assert gate_up_T2F.stride(1) == dz_TF.stride(1) == 1
    out_T2F = torch.empty((num_rows, double), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if out_T2F.numel():
        grid, block = _grid(*dz_TF.shape)
        strides = (dz_TF.stride(0), gate_up_T2F.stride(0))
        _silu_mul_backward_kernel[grid](dz_TF, gate_up_T2F, out_T2F, *strides, double // 2, BLOCK_F=block)
    return out_T2F


@silu_mul_backward.register_fake
def _(dz_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape)

"""One AdamW update of any number of tensors in one launch. Knows no adapter or schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.triton_ops.lang import constexpr, jit, pointers, scalar, table, tl

BLOCK = 1024
"""Elements of one program: 8 for each of 128 threads, two accesses of 16 bytes in fp32."""


@jit
def _adamw_kernel(
    params_ptr: scalar,
    grads_ptr: scalar,
    exp_avg_ptr: scalar,
    exp_avg_sq_ptr: scalar,
    blocks_ptr: scalar,
    dtype_ptr: scalar,
    decay: scalar,
    beta1: scalar,
    beta2: scalar,
    eps: scalar,
    rate: scalar,
    root_correction: scalar,
    ALIGNED: constexpr,
    BLOCK: constexpr,
) -> None:
    """m = lerp(m, g, 1 - beta1); v = beta2 v + (1 - beta2) g^2; p = decay p - rate m / (sqrt(v) / root_correction + eps)"""
    block_ptr = blocks_ptr + tl.program_id(0) * 3
    index, first, size = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    pointer: constexpr = tl.pointer_type(dtype_ptr.dtype.element_ty)
    p_ptr, g_ptr = tl.load(params_ptr + index).to(pointer), tl.load(grads_ptr + index).to(pointer)
    m_ptr, v_ptr = tl.load(exp_avg_ptr + index).to(pointer), tl.load(exp_avg_sq_ptr + index).to(pointer)
    if ALIGNED:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        first, size = tl.multiple_of(first, BLOCK), tl.multiple_of(size, 16)
    offs = first + tl.arange(0, BLOCK)
    mask = offs < size
    dtype = dtype_ptr.dtype.element_ty
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    m += (1 - beta1) * (g - m)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32) * beta2 + (1 - beta2) * g * g
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32) * decay
    p -= rate * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(p_ptr + offs, p.to(dtype), mask=mask)
    tl.store(m_ptr + offs, m.to(dtype), mask=mask)
    tl.store(v_ptr + offs, v.to(dtype), mask=mask)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Semantics: the reference's adamw, in place; all tensors of one type and without gaps."""
    lists = (params, grads, exp_avg, exp_avg_sq)
    sizes = [param.numel() for param in params]
    if any([x.numel() for x in tensors] != sizes for tensors in lists):
        raise ValueError("parameters, gradients and moments differ in number or size")
    if not sum(sizes):
        return
    if len({x.dtype for tensors in lists for x in tensors}) > 1:
        raise ValueError("parameters, gradients and moments differ in type")
    blocks = [(i, first, size) for i, size in enumerate(sizes) for first in range(0, size, BLOCK)]
    step_tensors(
        list(params), list(grads), list(exp_avg), list(exp_avg_sq), [pointers(tensors) for tensors in lists],
        table(tuple(x for block in blocks for x in block), params[0].device),
        [1 - learning_rate * weight_decay, beta1, beta2, eps, learning_rate / (1 - beta1**step), (1 - beta2**step) ** 0.5],
    )  # fmt: skip


@torch.library.custom_op("heddle::adamw", mutates_args=("params", "exp_avg", "exp_avg_sq"))
def step_tensors(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    addresses: Sequence[Tensor], blocks: Tensor, factors: Sequence[float],
) -> None:  # fmt: skip
    """adamw of tensors at these addresses, as compiled code sees it."""
    tensors = (*params, *grads, *exp_avg, *exp_avg_sq)
    _adamw_kernel[(len(blocks) // 3,)](
        *addresses, blocks, params[0], *factors,
        ALIGNED=all(x.data_ptr() % 16 == 0 and x.numel() % 16 == 0 for x in tensors), BLOCK=BLOCK,
    )  # fmt: skip


@step_tensors.register_fake
def _(*_: object) -> None: ...

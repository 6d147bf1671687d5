"""Dropout with counter-based masks, one read and one write. Knows rows' keys, no adapter.

T rows, I columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_ops.lang import cdiv, constexpr, jit, next_power_of_2, scalar, tl

MAX_BLOCK = 1024


@jit
def _hash_kernel(x: scalar) -> scalar:
    """C. Wellons' lowbias32"""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _drop_kernel(
    x_ptr: scalar,
    keys_ptr: scalar,
    rates_ptr: scalar,
    out_ptr: scalar,
    stride_xt: scalar,
    salt: scalar,
    I: scalar,  # noqa: E741 (a linear's inputs)
    BLOCK_I: constexpr,
) -> None:
    """out[t, c] = 0 where hash24(key[t], salt, c) < rate[t] * 2^24, else x[t, c]"""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs < I
    key = _hash_kernel(tl.load(keys_ptr + row).to(tl.uint32, bitcast=True) + salt.to(tl.uint32))
    column = tl.full((BLOCK_I,), 0x85EBCA6B, tl.uint32) * offs.to(tl.uint32)
    hashes = _hash_kernel(key + column)
    limit = (tl.load(rates_ptr + row) * 16777216.0 + 0.5).to(tl.uint32)
    x = tl.load(x_ptr + row * stride_xt + offs, mask=mask, other=0.0)
    tl.store(out_ptr + row * I + offs, tl.where((hashes >> 8) < limit, 0.0, x), mask=mask)


@torch.library.custom_op("heddle::drop", mutates_args=())
def drop(x_TI: Tensor, keys_T: Tensor, rates_T: Tensor, salt: int) -> Tensor:
    """Semantics: `kernels.dropout.drop`."""
    num_rows, width = x_TI.shape
    if keys_T.shape != (num_rows,) or rates_T.shape != keys_T.shape:
        raise ValueError(f"keys {tuple(keys_T.shape)}, rates {tuple(rates_T.shape)} of {num_rows} rows")
    assert x_TI.stride(1) == 1
    assert keys_T.is_contiguous()
    assert rates_T.is_contiguous()
    out_TI = torch.empty((num_rows, width), dtype=x_TI.dtype, device=x_TI.device)
    if out_TI.numel():
        block = min(next_power_of_2(width), MAX_BLOCK)
        _drop_kernel[(num_rows, cdiv(width, block))](
            x_TI, keys_T, rates_T, out_TI, x_TI.stride(0), salt * 0x9E3779B9 % 2**32, width, BLOCK_I=block
        )
    return out_TI


@drop.register_fake
def _(x_TI: Tensor, *_: object) -> Tensor:
    return x_TI.new_empty(x_TI.shape)

"""Triton's names, with types: Triton ships none. Knows no operation.

Kernels annotate pointers and run-time scalars as `scalar`, compile-time values as `constexpr`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kernels.upload import upload

if TYPE_CHECKING:
    constexpr: TypeAlias = Any
    scalar: TypeAlias = Any
    tl: Any

    def cdiv(x: int, y: int) -> int: ...

    def jit(function: Callable[..., object]) -> Any: ...

    def next_power_of_2(n: int) -> int: ...
else:
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2
    from triton.language import constexpr
    from triton.language import tensor as scalar

__all__ = ["cdiv", "constexpr", "dot_precision", "jit", "next_power_of_2", "pointers", "scalar", "table", "tl"]


@functools.lru_cache(maxsize=256)
def table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """These numbers on the device; the same tensor for the same numbers, so callers only read it."""
    return upload([np.array(values, dtype=np.int64)], device)[0]


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of tensors of one type that are laid out without gaps, for a kernel that visits all of them."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(f"{tensor.dtype} on {tensor.device} beside {first.dtype} on {first.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"strides {tensor.stride()} of shape {tuple(tensor.shape)} leave gaps")
    return table(tuple(tensor.data_ptr() for tensor in tensors), first.device)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products keep all bits; the hardware's shorter type would not meet the reference's tolerance."""
    return "ieee" if dtype == torch.float32 else "tf32"

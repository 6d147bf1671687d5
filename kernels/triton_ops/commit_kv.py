"""Moves cache rows in the caches of all layers: one launch gathers them, one scatters. Knows slots, not sequences.

S cache slots, R rows moved, E elements of a row (K * D), C caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.triton_ops.lang import cdiv, constexpr, jit, next_power_of_2, pointers, scalar, tl

MAX_BLOCK = 1024
"""Elements of one program: 16 bytes for each of 128 threads in half precision; a row of 8 heads of 128."""


@jit
def _move_kernel(
    caches_ptr: scalar, staged_ptr: scalar, slots_ptr: scalar, R: scalar, E: scalar, IS_GATHER: constexpr, BLOCK_E: constexpr
) -> None:
    """staged[c, r] = cache[c][slots[r]], or the other way round"""
    r, c = tl.program_id(0), tl.program_id(1)
    offs = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = offs < E
    cache_ptr = tl.load(caches_ptr + c).to(tl.pointer_type(staged_ptr.dtype.element_ty))
    cache = tl.multiple_of(cache_ptr, 16) + tl.load(slots_ptr + r).to(tl.int64) * E + offs
    staged = staged_ptr + (c.to(tl.int64) * R + r) * E + offs
    if IS_GATHER:
        tl.store(staged, tl.load(cache, mask=mask), mask=mask)
    else:
        tl.store(cache, tl.load(staged, mask=mask), mask=mask)


def commit_kv(k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], src_slots: Tensor, dst_slots: Tensor) -> None:
    """Semantics, in every layer's cache: cache[dst] = cache[src], all reads before all writes, so the sets may overlap."""
    if src_slots.shape != dst_slots.shape:
        raise ValueError(f"src {tuple(src_slots.shape)} and dst {tuple(dst_slots.shape)} differ")
    caches = [*k_caches, *v_caches]
    if not caches or not src_slots.numel():
        return
    num_elements = caches[0][0].numel()
    if any(cache[0].numel() != num_elements or cache.data_ptr() % 16 for cache in caches):
        raise ValueError("caches of rows of different sizes, or not at a multiple of 16 bytes")
    move(caches, pointers(caches), src_slots, dst_slots)


@torch.library.custom_op("heddle::commit_kv", mutates_args=("caches",))
def move(caches: Sequence[Tensor], addresses: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """commit_kv of caches at these addresses, as compiled code sees it."""
    num_elements, num_moved = caches[0][0].numel(), src_slots.numel()
    staged = torch.empty((len(caches), num_moved, num_elements), dtype=caches[0].dtype, device=caches[0].device)
    block = min(next_power_of_2(num_elements), MAX_BLOCK)
    grid = (num_moved, len(caches), cdiv(num_elements, block))
    for slots, is_gather in ((src_slots, True), (dst_slots, False)):
        _move_kernel[grid](addresses, staged, slots, num_moved, num_elements, IS_GATHER=is_gather, BLOCK_E=block)


@move.register_fake
def _(*_: object) -> None: ...

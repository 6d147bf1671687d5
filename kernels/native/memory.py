"""Memory for weights that every pass reads: side by side, in huge pages where Linux has them. Knows bytes, not what they are.

A pass reads all weights once, and a page of 4 KiB costs a walk through page tables at its first use, on a virtual machine
through two of them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_BYTES = 1 << 21
CHUNK_BYTES = 16 * HUGE_BYTES
"""What is asked for at once; a larger tensor has memory of its own. Untouched parts take none."""
ALIGNMENT = 64


class _Arena:
    """Hands out pieces of chunks; a chunk is free again when all its pieces are."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """So many bytes that nobody else has."""
        if num_bytes > CHUNK_BYTES // 2:
            return _huge(num_bytes)
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + num_bytes > self._chunk.numel():
                self._chunk, start = _huge(CHUNK_BYTES), 0
            self._used = start + num_bytes
            return self._chunk[start : self._used]


_arena = _Arena()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, for a tensor that stays as long as its model or adapter."""
    return _arena.take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def zeros(num_elements: int, dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU, in memory of its own: it is free again as soon as the tensor is."""
    return _huge(num_elements * dtype.itemsize).view(dtype).zero_()


def _huge(num_bytes: int) -> Tensor:
    if num_bytes < HUGE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    whole = torch.empty(num_bytes + HUGE_BYTES, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_BYTES
    if (advise := _madvise()) is not None:
        advise(whole.data_ptr() + start, num_bytes // HUGE_BYTES * HUGE_BYTES, mmap.MADV_HUGEPAGE)  # a wish: may fail
    return whole[start : start + num_bytes]


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function; None where there are no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    advise: Callable[[int, int, int], int] = function
    return advise

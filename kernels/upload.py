"""Tables made on the host on their way to a device: one buffer, one copy that the host does not wait for. Knows no meaning."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

ALIGNMENT_BYTES = 64
"""Where each table begins, so that kernels may read it in wide accesses."""
_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


def upload(tables: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The tables on the device, each with its shape and type. The host's buffer is pinned where the copy may overtake it."""
    tables = [np.ascontiguousarray(table) for table in tables]
    starts = _starts([table.nbytes for table in tables])
    moved = _packed(tables, starts, starts[-1], device).to(device, non_blocking=True)
    return [_view(moved, start, table.shape, table.dtype) for table, start in zip(tables, starts, strict=False)]


class FixedTables:
    """Room for tables that are uploaded again and again, each to where it was before: launches may be recorded over it."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], DTypeLike]], device: torch.device) -> None:
        """The shape and type of each table at its largest."""
        self._rooms = [(shape, np.dtype(dtype)) for shape, dtype in shapes]
        self._starts = _starts([int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._rooms])
        self._bytes = torch.zeros(self._starts[-1], dtype=torch.uint8, device=device)
        self.tensors = [_view(self._bytes, *room) for room in zip(self._starts, *zip(*self._rooms, strict=True), strict=False)]

    def upload(self, tables: Sequence[NDArray[Any]]) -> None:
        """The first rows of every table; what follows them may be anything. Raises ValueError for one that does not fit."""
        for table, (shape, dtype) in zip(tables, self._rooms, strict=True):
            if table.dtype != dtype or table.shape[1:] != shape[1:] or len(table) > shape[0]:
                raise ValueError(f"{table.dtype} {table.shape} in room for {dtype} {shape}")
        tables = [np.ascontiguousarray(table) for table in tables]
        end = self._starts[len(tables) - 1] + tables[-1].nbytes
        self._bytes[:end].copy_(_packed(tables, self._starts, end, self._bytes.device), non_blocking=True)


def _starts(sizes_bytes: Sequence[int]) -> list[int]:
    """Where each begins, and the end."""
    aligned = (-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes_bytes)
    return list(itertools.accumulate(aligned, initial=0))


def _packed(tables: Sequence[NDArray[Any]], starts: Sequence[int], num_bytes: int, device: torch.device) -> Tensor:
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_of_host = host.numpy()
    for table, start in zip(tables, starts, strict=False):
        bytes_of_host[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
    return host


def _view(moved: Tensor, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return moved[start : start + num_bytes].view(_TYPES[dtype]).view(shape)

"""Low-rank updates of many adapters through the compiled library, one call for all. Knows segments and pointers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.native.operations import ELEMENT, LANES, check, loaded_library
from kernels.segments import LoraSegment

TASK_ROWS = 16
"""Rows of a task: they share the matrices that it reads."""
TASK_COLUMNS = 512
"""LORA_COLUMNS of the C file."""
_SEGMENT = np.dtype(
    [
        ("start", np.int64),
        ("end", np.int64),
        ("column", np.int64),
        ("num_out", np.int64),
        ("rank", np.int64),
        ("low", np.int64),
        ("a", np.uint64),
        ("b", np.uint64),
        ("half", np.int64),
        ("scale", np.float64),
    ]
)


class LoraWork:
    """Segments as the C library takes them, divided into tasks for its threads. Keeps the matrices that it points to."""

    def __init__(self, segments: Sequence[LoraSegment]) -> None:
        self._kept = [(segment.a_RI.contiguous(), segment.b_OR.contiguous()) for segment in segments]
        self._table = np.array(
            [
                (s.start, s.end, s.column, b.shape[0], a.shape[0], 0, a.data_ptr(), b.data_ptr(), ELEMENT[a.dtype], s.scale)
                for s, (a, b) in zip(segments, self._kept, strict=True)
            ],
            dtype=_SEGMENT,
        )
        floats = (self._table["end"] - self._table["start"]) * (-(-self._table["rank"] // LANES) * LANES)
        self._table["low"] = np.cumsum(floats) - floats
        down = [(i, row, end, -1) for i, s in enumerate(segments) for row, end in _pieces(s)]
        up = [(i, row, end, o) for i, row, end, _ in down for o in range(0, int(self._table["num_out"][i]), TASK_COLUMNS)]
        self._tasks = np.array(down + up, dtype=np.int64)
        self.arguments = (self._table.ctypes.data, self._tasks.ctypes.data, len(down), len(self._tasks), int(floats.sum()))


def _pieces(segment: LoraSegment) -> list[tuple[int, int]]:
    return [(row, min(row + TASK_ROWS, segment.end)) for row in range(segment.start, segment.end, TASK_ROWS)]


def segmented_lora(y_TO: Tensor, x_TI: Tensor, work: LoraWork) -> None:
    """`reference.segmented_lora` of the segments that `work` was made of."""
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    y, x = (y_TO.data_ptr(), y_TO.stride(0)), (x_TI.data_ptr(), x_TI.stride(0))
    check(loaded_library().heddle_lora(*y, *x, x_TI.shape[1], *work.arguments, ELEMENT[y_TO.dtype]))


def takes(y_TO: Tensor, x_TI: Tensor, segments: Sequence[LoraSegment]) -> bool:
    """Whether the library computes with these types (it was asked before whether it is there)."""
    known = (torch.bfloat16, torch.float32)
    return y_TO.dtype == x_TI.dtype and y_TO.stride(1) == 1 and all(s.a_RI.dtype in known for s in segments)

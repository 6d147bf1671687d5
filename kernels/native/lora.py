"""Low-rank updates of many adapters through the compiled library, one call for all. Knows segments and pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.native.operations import ELEMENT, PANEL, check, loaded_library
from kernels.segments import LoraSegment

TASK_ROWS = 16
"""Rows of a task: they share the matrices that it reads. Of long segments, which leave enough for all threads, MANY_ROWS."""
MANY_ROWS = 64
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
        floats = (self._table["end"] - self._table["start"]) * (-(-self._table["rank"] // PANEL) * PANEL)
        self._table["low"] = np.cumsum(floats) - floats
        down = [(i, row, end, -1) for i, s in enumerate(segments) for row, end in _pieces(s)]
        up = [(i, row, end, o) for i, row, end, _ in down for o in range(0, int(self._table["num_out"][i]), TASK_COLUMNS)]
        self._tasks = np.array(down + up, dtype=np.int64)
        self.arguments = (self._table.ctypes.data, self._tasks.ctypes.data, len(down), len(self._tasks), int(floats.sum()))


def _pieces(segment: LoraSegment) -> list[tuple[int, int]]:
    return _row_pieces(segment.start, segment.end)


def _row_pieces(start: int, end: int) -> list[tuple[int, int]]:
    rows = MANY_ROWS if end - start >= 2 * MANY_ROWS else TASK_ROWS
    return [(row, min(row + rows, end)) for row in range(start, end, rows)]


class AdapterTable:
    """An adapter's matrices in all layers as the C library takes them; their rows are filled in for each batch.

    `layers` are the updates of each linear of each layer, `linears` the widths of the targets that lie side by side in each.
    All targets of all linears have a place in the table; a rank of 0 is one that the adapter leaves alone.
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[LoraSegment]]], linears: Sequence[Sequence[int]]) -> None:
        columns = [(index, column) for index, widths in enumerate(linears) for column in np.cumsum([0, *widths[:-1]]).tolist()]
        places = {place: target for target, place in enumerate(columns)}
        self.table_Lt = np.zeros((len(layers), len(places)), dtype=_SEGMENT)
        self._kept: list[tuple[Tensor, Tensor]] = []
        for layer, updates in enumerate(layers):
            for index, segment in ((index, segment) for index, segments in enumerate(updates) for segment in segments):
                a_RI, b_OR = segment.a_RI.contiguous(), segment.b_OR.contiguous()
                self._kept.append((a_RI, b_OR))
                sizes = (segment.column, b_OR.shape[0], a_RI.shape[0], 0)
                fields = (0, 0, *sizes, a_RI.data_ptr(), b_OR.data_ptr(), ELEMENT[a_RI.dtype], segment.scale)
                self.table_Lt[layer, places[index, segment.column]] = fields
        self.rank = int(self.table_Lt["rank"].max(initial=0))


class LayersLora:
    """The adapters of a batch's rows in all layers: tables for every linear, made in a few numpy calls."""

    def __init__(self, rows: Sequence[tuple[int, int, AdapterTable]], linears: Sequence[Sequence[int]]) -> None:
        """`rows` are (start, end, adapter); `linears` are the widths of the targets that lie side by side in each linear."""
        tables = np.stack([table.table_Lt for _, _, table in rows], axis=1)
        tables["start"] = np.array([start for start, _, _ in rows])[None, :, None]
        tables["end"] = np.array([end for _, end, _ in rows])[None, :, None]
        floats = np.array([(end - start) * (-(-table.rank // PANEL) * PANEL) for start, end, table in rows])
        num_layers = len(tables)
        self._kept: list[object] = [table for _, _, table in rows]
        calls = np.zeros((num_layers, len(linears), 5), dtype=np.int64)
        first = 0
        for index, widths in enumerate(linears):
            own = np.ascontiguousarray(tables[:, :, first : first + len(widths)]).reshape(num_layers, -1)
            first += len(widths)
            every = np.repeat(floats, len(widths))
            own["low"] = np.cumsum(every) - every
            tasks, num_down = _tasks([(start, end) for start, end, _ in rows], widths)
            calls[:, index, 0] = own.ctypes.data + own.strides[0] * np.arange(num_layers)
            calls[:, index, 1:] = (tasks.ctypes.data, num_down, len(tasks), int(every.sum()))
            self._kept += [own, tasks]
        self._calls = calls
        self.pointer = calls.ctypes.data


def _tasks(rows: Sequence[tuple[int, int]], widths: Sequence[int]) -> tuple[np.ndarray[Any, Any], int]:
    """The tasks of one linear, and how many of them multiply with a."""
    pieces = [(i, *piece) for i, (start, end) in enumerate(rows) for piece in _row_pieces(start, end)]
    down = [(i * len(widths) + t, row, end, -1) for i, row, end in pieces for t in range(len(widths))]
    up = [
        (i * len(widths) + t, row, end, o)
        for i, row, end in pieces
        for t, width in enumerate(widths)
        for o in range(0, width, TASK_COLUMNS)
    ]
    return np.array(down + up, dtype=np.int64), len(down)


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

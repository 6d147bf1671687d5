"""Low-rank updates as tables that one launch reads, whatever the number of adapters. Knows ranks and addresses, no request.

A member is one adapter's update of one target on a run of rows; the members of one run follow each other, by column. A tile is
up to ROWS rows of a run. Members of rank 0 and tiles of no rows are padding, and do nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import LoraSegment
from kernels.upload import upload

ROWS = 16
"""Rows of a tile: the least that the matrix units multiply; decode segments have few."""
MEMBER_FIELDS = 9
TILE_FIELDS = 4
A, B, RANK, COLUMN, NUM_OUT, SCALE, START, END, PLACE = range(MEMBER_FIELDS)


@dataclass(frozen=True, kw_only=True)
class LoraTables:
    """`members` int64 [members, 9]: addresses of a and b, rank, column, outputs, bits of the fp32 scale, first row, end, place
    in its run. `tiles` int32 [tiles, 4]: first row, end, first member, members.

    `matrix` is any matrix, for its type. `order` tells of each member which segment it is, where it was made of segments.
    """

    members: Tensor
    tiles: Tensor
    matrix: Tensor
    most_targets: int
    most_outputs: int
    rank: int
    """The least power of two that holds all ranks, at least 16."""
    is_aligned: bool
    order: tuple[int, ...] = ()


def segment_tables(segments: Sequence[LoraSegment]) -> list[LoraTables]:
    """The tables of these segments, one for each type of their matrices."""
    by_type: dict[torch.dtype, list[int]] = {}
    for i, segment in enumerate(segments):
        if segment.end > segment.start:
            by_type.setdefault(segment.a_RI.dtype, []).append(i)
    return [_of_one_type(segments, places) for places in by_type.values()]


def _of_one_type(segments: Sequence[LoraSegment], places: list[int]) -> LoraTables:
    order = sorted(places, key=lambda i: (segments[i].start, segments[i].column))
    runs: dict[tuple[int, int], int] = {}
    members = []
    for i in order:
        segment = segments[i]
        place = runs[segment.start, segment.end] = runs.get((segment.start, segment.end), -1) + 1
        members.append([*_matrices(segment), segment.start, segment.end, place])
    edges = sorted(runs)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(edges)):
        raise ValueError(f"runs of rows that overlap: {edges}")
    table = np.array(members, dtype=np.int64)
    first, tiles = 0, []
    for run in edges:
        tiles += _tiles(*run, first, runs[run] + 1)
        first += runs[run] + 1
    device = segments[order[0]].a_RI.device
    on_device, tiles_on_device = upload([table, np.array(tiles, dtype=np.int32)], device)
    return _tables(table, on_device, tiles_on_device, segments[order[0]].a_RI, max(runs.values()) + 1, tuple(order))


def _tiles(start: int, end: int, first_member: int, num_members: int) -> list[tuple[int, int, int, int]]:
    return [(row, end, first_member, num_members) for row in range(start, end, ROWS)]


def _matrices(segment: LoraSegment) -> list[int]:
    """A member without its rows."""
    rank = segment.a_RI.shape[0]
    if segment.b_OR.shape[1] != rank or segment.b_OR.dtype != segment.a_RI.dtype:
        raise ValueError(f"a {tuple(segment.a_RI.shape)} beside b {tuple(segment.b_OR.shape)}, {segment.b_OR.dtype}")
    for matrix in (segment.a_RI, segment.b_OR):
        if not matrix.is_contiguous():
            raise ValueError(f"strides {matrix.stride()} of a matrix {tuple(matrix.shape)} leave gaps")
    bits = int(np.float32(segment.scale).view(np.int32))
    return [segment.a_RI.data_ptr(), segment.b_OR.data_ptr(), rank, segment.column, segment.b_OR.shape[0], bits]


def _tables(
    host: NDArray[np.int64], members: Tensor, tiles: Tensor, matrix: Tensor, most_targets: int, order: tuple[int, ...] = ()
) -> LoraTables:
    live = host[host[..., RANK] > 0]
    rank = int(live[:, RANK].max(initial=1))
    return LoraTables(
        members=members,
        tiles=tiles,
        matrix=matrix,
        most_targets=most_targets,
        most_outputs=int(live[:, NUM_OUT].max(initial=1)),
        rank=max(16, 1 << (rank - 1).bit_length()),
        is_aligned=not (live[:, A : B + 1] % 16).any(),
        order=order,
    )


class AdapterMatrices:
    """One adapter's members in all layers, made once; their rows are filled in for each batch.

    `layers` are the updates of each linear of each layer: [layer][linear][target].
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[LoraSegment]]]) -> None:
        self.num_targets = [max(len(linears[i]) for linears in layers) for i in range(len(layers[0]))]
        shape = (len(layers), len(self.num_targets), max(self.num_targets), MEMBER_FIELDS)
        self.members = np.zeros(shape, dtype=np.int64)
        self.matrix: Tensor | None = None
        for layer, linears in enumerate(layers):
            for linear, segments in enumerate(linears):
                for target, segment in enumerate(segments):
                    self.members[layer, linear, target] = [*_matrices(segment), 0, 0, target]
                    self.matrix = segment.a_RI


class BatchTables:
    """The tables of all layers' linears for the rows of one batch, in one copy to the device: (start, end, adapter) each."""

    def __init__(self, rows: Sequence[tuple[int, int, AdapterMatrices]]) -> None:
        self._linears: dict[tuple[int, int], list[LoraTables]] = {}
        by_type: dict[torch.dtype, list[tuple[int, int, AdapterMatrices]]] = {}
        for entry in rows:
            if entry[2].matrix is not None:
                by_type.setdefault(entry[2].matrix.dtype, []).append(entry)
        for entries in by_type.values():
            self._add(entries)

    def of(self, layer: int, linear: int) -> list[LoraTables]:
        """One for each type of adapters that any row has on this linear."""
        return self._linears.get((layer, linear), [])

    def _add(self, rows: Sequence[tuple[int, int, AdapterMatrices]]) -> None:
        matrix = rows[0][2].matrix
        assert matrix is not None
        num_layers, num_linears = rows[0][2].members.shape[:2]
        hosts: list[NDArray[Any]] = []
        for linear in range(num_linears):
            num_targets = max(adapter.num_targets[linear] for *_, adapter in rows)
            hosts += _linear_tables(rows, linear, num_targets) if num_targets else []
        uploaded = iter(upload(hosts, matrix.device))
        hosts_left = iter(hosts)
        for linear in range(num_linears):
            num_targets = max(adapter.num_targets[linear] for *_, adapter in rows)
            if not num_targets:
                continue
            (host, _), members, tiles = (next(hosts_left), next(hosts_left)), next(uploaded), next(uploaded)
            for layer in range(num_layers):
                if (host[layer, :, RANK] > 0).any():
                    tables = _tables(host[layer], members[layer], tiles, matrix, num_targets)
                    self._linears.setdefault((layer, linear), []).append(tables)


def _linear_tables(
    rows: Sequence[tuple[int, int, AdapterMatrices]], linear: int, num_targets: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Members of all layers [layers, entries * targets, 9] and the tiles, which all layers share."""
    own = [adapter.members[:, linear, :num_targets] for *_, adapter in rows]
    padded = [np.pad(x, ((0, 0), (0, num_targets - x.shape[1]), (0, 0))) for x in own]
    members = np.stack(padded, axis=1)
    members[..., START] = np.array([start for start, _, _ in rows])[None, :, None]
    members[..., END] = np.array([end for _, end, _ in rows])[None, :, None]
    tiles = [tile for i, (start, end, _) in enumerate(rows) for tile in _tiles(start, end, i * num_targets, num_targets)]
    return members.reshape(len(members), -1, MEMBER_FIELDS), np.array(tiles, dtype=np.int32).reshape(-1, TILE_FIELDS)

"""The segments of a batch as tables that one launch of ragged attention reads. Knows lengths and masks, no tensors' values.

A tile is up to BLOCK folded rows of a segment: the G query heads of a key/value head are rows, row-major [n, G]. The keys of a
segment of few tiles are split; each split of a tile is a piece of work. All is made on the host, from what the host knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import AttentionPlan, AttentionSegment
from kernels.upload import upload

SMALL_BLOCK = 16
"""Folded rows of a small tile: the least that the matrix units multiply."""
LARGE_BLOCK = 128
"""Folded rows of a large tile: two warpgroups of 64 rows, the least that Hopper's wide instruction takes."""
SPLIT_KEYS = 512
"""Keys of one split, for each tile of the segment: 8k keys and 8 key/value heads make 128 programs, about one for each of 132
processors. A segment of more than MAX_SPLIT_TILES tiles keeps them busy by itself.

It does not depend on the batch, so that neither do the results.
"""
MAX_SPLIT_TILES = 8
PARTIALS_PER_PIECE = 2
"""Room of a recorded launch: a decode root's piece fills 1 unit, a tree's at most 8; few passes are full of large trees."""
WORK_FIELDS = 12
MERGE_FIELDS = 6


@dataclass(frozen=True, kw_only=True)
class HostTables:
    """`work` int32 [pieces, 12]: first batch row, rows, first folded row, first key, keys, first mask word, words per mask row,
    partial, is large, keys from, keys to, units; -1: causal, or no partial. A partial is counted in units of SMALL_BLOCK rows,
    of which a tile has as many as its rows fill. `merges` int32 [units, 6], of the tiles of several splits: first batch row,
    rows, first folded row, first partial of the tile, splits, units of the tile.

    `masks` int32: for each tree a bitset per row, then the depth of each row.
    """

    work: NDArray[np.int32]
    merges: NDArray[np.int32]
    masks: NDArray[np.int32]
    num_partials: int
    num_rows: int
    has_small: bool
    has_large: bool

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Pieces of work and merges that there are: the tables may have room for more."""
        return np.array([len(self.work), len(self.merges)], dtype=np.int32)

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """What a launch reads."""
        return self.sizes, self.work, self.merges, self.masks


@dataclass(frozen=True, kw_only=True)
class AttentionTables:
    """HostTables on the device, with the slots of all keys."""

    sizes: Tensor
    work: Tensor
    merges: Tensor
    slots: Tensor
    masks: Tensor
    group: int
    window: int
    """0: none."""
    num_partials: int
    num_rows: int
    """Rows of all segments."""
    has_small: bool
    has_large: bool


def attention_tables(plan: AttentionPlan, group: int, window: int | None) -> AttentionTables:
    """The tables of a plan's segments, made once for all layers; `group` query heads share a key/value head."""
    if isinstance(plan, FixedPlan):
        return plan.tables[window]
    if window is not None and all(segment.slots_L.numel() <= window for segment in plan.segments):
        window = None

    def arrange() -> AttentionTables:
        host = host_tables(plan.segments, group, window)
        sizes, work, merges, masks = upload(host.arrays, plan.slots.device)
        return AttentionTables(
            sizes=sizes, work=work, merges=merges, slots=plan.slots, masks=masks, group=group, window=window or 0,
            num_partials=host.num_partials, num_rows=host.num_rows, has_small=host.has_small, has_large=host.has_large,
        )  # fmt: skip

    return plan.arranged(("triton", group, window), arrange)


@dataclass(frozen=True, kw_only=True)
class TableRoom:
    """How large the tables of any segments of so many rows and keys may be, so that a launch over them can be recorded."""

    num_work: int
    num_merges: int
    num_masks: int
    num_partials: int

    @classmethod
    def of(cls, num_rows: int, num_keys: int, group: int) -> TableRoom:
        """For all segments of up to `num_rows` rows and `num_keys` keys together; only their partials may still be too many.

        t tiles over L keys make t ceil(L / (t SPLIT_KEYS)) < L / SPLIT_KEYS + t pieces of work.
        """
        num_work = num_rows * -(-group // LARGE_BLOCK) + num_keys // SPLIT_KEYS
        return cls(
            num_work=num_work,
            num_merges=num_rows * -(-group // SMALL_BLOCK),
            num_masks=num_rows * (-(-num_rows // 32) + 1),
            num_partials=PARTIALS_PER_PIECE * num_work,
        )

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], type[np.int32]]]:
        """Of HostTables.arrays at their largest."""
        sizes = ((2,), (self.num_work, WORK_FIELDS), (self.num_merges, MERGE_FIELDS), (max(self.num_masks, 1),))
        return [(shape, np.int32) for shape in sizes]

    def holds(self, host: HostTables) -> bool:
        """Whether tables find room."""
        sizes = ((host.work, self.num_work), (host.merges, self.num_merges), (host.masks, max(self.num_masks, 1)))
        return all(len(table) <= size for table, size in sizes) and host.num_partials <= self.num_partials

    def tables(self, arrays: Sequence[Tensor], slots: Tensor, group: int, window: int | None, is_wide: bool) -> AttentionTables:
        """Tables in these tensors, of `shapes`; with tiles of several rows of a segment only if `is_wide`."""
        sizes, work, merges, masks = arrays
        return AttentionTables(
            sizes=sizes, work=work, merges=merges, slots=slots, masks=masks, group=group, window=window or 0,
            num_partials=self.num_partials, num_rows=0, has_small=True, has_large=is_wide,
        )  # fmt: skip

    @staticmethod
    def is_large(num_rows: int, group: int) -> bool:
        """Whether a segment of so many rows has large tiles."""
        return num_rows * group > SMALL_BLOCK


class FixedPlan(AttentionPlan):
    """The tables of any segments that find room in them, by window: they keep their place, so that a launch can be recorded."""

    def __init__(self, tables: Mapping[int | None, AttentionTables]) -> None:
        super().__init__(())
        self.tables = tables


def host_tables(segments: Sequence[AttentionSegment], group: int, window: int | None) -> HostTables:
    """The tables of these segments. The longest pieces of work come first.

    Of a window's segments the keys that no row sees are left out: distances count from the end, so nothing else changes.
    """
    work: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    words: list[NDArray[np.int32]] = []
    first_key = num_words = num_partials = 0
    for segment in segments:
        rows, keys = segment.end - segment.start, segment.slots_L.numel()
        skipped = 0 if window is None else max(keys - rows - window + 1, 0)
        mask_start, words_per_row = -1, 0
        if segment.mask_nn is not None:
            bits = _bitset(segment.mask_nn)
            words += [bits, (segment.mask_nn.numpy().sum(1) - 1).astype(np.int32)]
            mask_start, words_per_row = num_words, bits.shape[1]
            num_words += bits.size + rows
        seen, from_key = keys - skipped, first_key + skipped
        folded = rows * group
        is_large = TableRoom.is_large(rows, group)
        block = LARGE_BLOCK if is_large else SMALL_BLOCK
        split_keys = _split_keys(seen, -(-folded // block))
        splits = -(-seen // split_keys)
        for first in range(0, folded, block):
            units = -(-min(block, folded - first) // SMALL_BLOCK)
            if splits > 1:
                tops = range(first, first + units * SMALL_BLOCK, SMALL_BLOCK)
                merges += [(segment.start, rows, top, num_partials, splits, units) for top in tops]
            for split in range(splits):
                keys_of = (split * split_keys, min((split + 1) * split_keys, seen))
                partial = num_partials + split * units if splits > 1 else -1
                tile = (segment.start, rows, first, from_key, seen, mask_start, words_per_row, partial, int(is_large))
                work.append((*tile, *keys_of, units))
            num_partials += splits * units if splits > 1 else 0
        first_key += keys
    work.sort(key=lambda piece: (-piece[8], piece[9] - piece[10]))
    return HostTables(
        work=np.array(work, dtype=np.int32).reshape(-1, WORK_FIELDS),
        merges=np.array(merges, dtype=np.int32).reshape(-1, MERGE_FIELDS),
        masks=np.concatenate([x.ravel() for x in words]) if words else np.zeros(1, np.int32),
        num_partials=num_partials,
        num_rows=sum(segment.end - segment.start for segment in segments),
        has_small=not all(piece[8] for piece in work),
        has_large=any(piece[8] for piece in work),
    )


def _split_keys(num_keys: int, num_tiles: int) -> int:
    return num_tiles * SPLIT_KEYS if num_tiles <= MAX_SPLIT_TILES else num_keys


def _bitset(mask_nn: Tensor) -> NDArray[np.int32]:
    """int32 [n, ceil(n / 32)]: bit j % 32 of word j / 32 of row i is mask[i, j]."""
    num_rows = mask_nn.shape[0]
    padded = np.zeros((num_rows, -(-num_rows // 32) * 32), dtype=np.bool_)
    padded[:, :num_rows] = mask_nn.numpy()
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)

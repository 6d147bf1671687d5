"""The segments of a batch as tables that one launch of ragged attention reads. Knows lengths and masks, no tensors' values.

A tile is up to BLOCK folded rows of a segment: the G query heads of a key/value head are rows, row-major [n, G]. A small tile's
keys are split; each split is a piece of work, each large tile is one. All is made on the host, from what the host knows.
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""Keys of one split of a small tile: 8k keys and 8 key/value heads make 128 programs, about one for each of 132 processors.

It does not depend on the batch, so that neither do the results.
"""
WORK_FIELDS = 11
MERGE_FIELDS = 5


@dataclass(frozen=True, kw_only=True)
class HostTables:
    """`work` int32 [pieces, 11]: first batch row, rows, first folded row, first key, keys, first mask word, words per mask row,
    partial, is large, keys from, keys to; -1: causal, or no partial. `merges` int32 [tiles, 5], of the tiles of several splits:
    first batch row, rows, first folded row, first partial, splits. Work and merges of no rows are padding, and do nothing.

    `masks` int32: for each tree a bitset per row, then the depth of each row.
    """

    work: NDArray[np.int32]
    merges: NDArray[np.int32]
    masks: NDArray[np.int32]
    num_partials: int
    num_rows: int
    has_small: bool
    has_large: bool

    def padded(self, num_work: int, num_merges: int, num_masks: int) -> HostTables:
        """With tables of these sizes, so that a recorded launch serves many batches; it has partials for all pieces of work."""
        return HostTables(
            work=_padded(self.work, num_work),
            merges=_padded(self.merges, num_merges),
            masks=_padded(self.masks, num_masks),
            num_partials=num_work if num_merges else 0,
            num_rows=self.num_rows,
            has_small=self.has_small,
            has_large=self.has_large,
        )


@dataclass(frozen=True, kw_only=True)
class AttentionTables:
    """HostTables on the device, with the slots of all keys."""

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

    @classmethod
    def of(
        cls, host: HostTables, work: Tensor, merges: Tensor, masks: Tensor, slots: Tensor, group: int, window: int
    ) -> AttentionTables:
        """The tables of these host tables, which lie in the given tensors."""
        return cls(
            work=work, merges=merges, slots=slots, masks=masks, group=group, window=window, num_partials=host.num_partials,
            num_rows=host.num_rows, has_small=host.has_small, has_large=host.has_large,
        )  # fmt: skip


def attention_tables(plan: AttentionPlan, group: int, window: int | None) -> AttentionTables:
    """The tables of a plan's segments, made once for all layers; `group` query heads share a key/value head."""
    if window is not None and all(segment.slots_L.numel() <= window for segment in plan.segments):
        window = None

    def arrange() -> AttentionTables:
        host = host_tables(plan.segments, group, window)
        work, merges, masks = upload([host.work, host.merges, host.masks], plan.slots.device)
        return AttentionTables.of(host, work, merges, masks, plan.slots, group, window or 0)

    return plan.arranged(("triton", group, window), arrange)


def host_tables(segments: Sequence[AttentionSegment], group: int, window: int | None) -> HostTables:
    """The tables of at least one segment. The longest pieces of work come first.

    Of a window's segments the keys that no row sees are left out: distances count from the end, so nothing else changes.
    """
    if not segments:
        raise ValueError("no segments, no tables")
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
        is_large = rows * group > SMALL_BLOCK
        splits = 1 if is_large else -(-seen // SPLIT_KEYS)
        for first in range(0, rows * group, LARGE_BLOCK if is_large else SMALL_BLOCK):
            if splits > 1:
                merges.append((segment.start, rows, first, num_partials, splits))
            for split in range(splits):
                lo = split * SPLIT_KEYS
                hi = seen if is_large else min(lo + SPLIT_KEYS, seen)
                partial = num_partials + split if splits > 1 else -1
                work.append(
                    (segment.start, rows, first, from_key, seen, mask_start, words_per_row, partial, int(is_large), lo, hi)
                )
            num_partials += splits if splits > 1 else 0
        first_key += keys
    work.sort(key=lambda piece: (-piece[8], piece[9] - piece[10]))
    return HostTables(
        work=np.array(work, dtype=np.int32),
        merges=np.array(merges, dtype=np.int32).reshape(-1, MERGE_FIELDS),
        masks=np.concatenate([x.ravel() for x in words]) if words else np.zeros(1, np.int32),
        num_partials=num_partials,
        num_rows=sum(segment.end - segment.start for segment in segments),
        has_small=not all(piece[8] for piece in work),
        has_large=any(piece[8] for piece in work),
    )


def _bitset(mask_nn: Tensor) -> NDArray[np.int32]:
    """int32 [n, ceil(n / 32)]: bit j % 32 of word j / 32 of row i is mask[i, j]."""
    num_rows = mask_nn.shape[0]
    padded = np.zeros((num_rows, -(-num_rows // 32) * 32), dtype=np.bool_)
    padded[:, :num_rows] = mask_nn.numpy()
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def _padded(table: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    if len(table) > size:
        raise ValueError(f"a table of {len(table)} rows in room for {size}")
    padded = np.zeros((size, *table.shape[1:]), dtype=np.int32)
    padded[: len(table)] = table
    return padded

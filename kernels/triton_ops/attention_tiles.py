"""The segments of a batch as tables that one launch of ragged attention reads. Knows lengths and masks, no tensors' values.

A tile is up to BLOCK folded rows of a segment: the G query heads of a key/value head are rows, row-major [n, G].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.segments import AttentionSegment

SMALL_BLOCK = 16
"""Folded rows of a small tile: the least that the matrix units multiply."""
LARGE_BLOCK = 128
"""Folded rows of a large tile: two warpgroups of 64 rows, the least that Hopper's wide instruction takes."""
SPLIT_KEYS = 512
"""Keys of one split of a small tile: 8k keys and 8 key/value heads make 128 programs, about one for each of 132 processors.

It does not depend on the batch, so that neither do the results.
"""


@dataclass(frozen=True, kw_only=True)
class AttentionTiles:
    """`tiles` int32 [tiles, 9]: first batch row, rows, first folded row, first key, keys, first mask word, words per mask row,
    first partial, is large. `split_tiles` are the small tiles of more than one split. -1: causal; not split.
    """

    tiles: Tensor
    split_tiles: Tensor
    slots: Tensor
    masks: Tensor
    group: int
    num_partials: int
    max_splits: int
    has_small: bool
    has_large: bool


def attention_tiles(segments: Sequence[AttentionSegment], group: int) -> AttentionTiles:
    """Arrange the segments once for all layers; `group` query heads share a key/value head. At least one segment."""
    if not segments:
        raise ValueError("no segments, no tiles")
    device = segments[0].slots_L.device
    tiles: list[tuple[int, ...]] = []
    words: list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]] = []
    num_keys = num_words = num_partials = 0
    for segment in segments:
        rows, keys = segment.end - segment.start, segment.slots_L.numel()
        mask_start, words_per_row = -1, 0
        if segment.mask_nn is not None:
            words.append(_bitset(segment.mask_nn))
            mask_start, words_per_row = num_words, words[-1].shape[1]
            num_words += words[-1].size
        is_large = rows * group > SMALL_BLOCK
        splits = 1 if is_large else -(-keys // SPLIT_KEYS)
        for first in range(0, rows * group, LARGE_BLOCK if is_large else SMALL_BLOCK):
            partial = num_partials if splits > 1 else -1
            num_partials += splits if splits > 1 else 0
            tiles.append((segment.start, rows, first, num_keys, keys, mask_start, words_per_row, partial, int(is_large)))
        num_keys += keys
    tiles.sort(key=lambda tile: (-tile[8], -tile[4]))
    masks = np.concatenate([x.ravel() for x in words]) if words else np.zeros(1, np.int32)
    return AttentionTiles(
        tiles=torch.tensor(tiles, dtype=torch.int32).to(device),
        split_tiles=torch.tensor([tile for tile in tiles if tile[7] >= 0], dtype=torch.int32).to(device),
        slots=torch.cat([segment.slots_L for segment in segments]),
        masks=torch.from_numpy(masks).to(device),
        group=group,
        num_partials=num_partials,
        max_splits=max(1 if tile[8] else -(-tile[4] // SPLIT_KEYS) for tile in tiles),
        has_small=not all(tile[8] for tile in tiles),
        has_large=any(tile[8] for tile in tiles),
    )


def _bitset(mask_nn: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """int32 [n, ceil(n / 32)]: bit j % 32 of word j / 32 of row i is mask[i, j]."""
    num_rows = mask_nn.shape[0]
    padded = np.zeros((num_rows, -(-num_rows // 32) * 32), dtype=np.bool_)
    padded[:, :num_rows] = mask_nn.cpu().numpy()
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)

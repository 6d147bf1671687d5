"""Which passes are recorded as CUDA graphs, and their inputs: padded to a few sizes, in buffers that stay. Knows rows only.

A padded row writes no key and no value, and nobody reads what comes out of it. Nothing has recorded a graph on a device yet.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from kernels.ops import FixedPlan, TableRoom, host_tables
from kernels.upload import FixedTables
from services.executor.adapter_rows import arranged
from services.executor.batch import Batch, Segment, attention_segments, host_rows
from services.executor.features import FeatureWish, PassFeatures
from services.executor.model import Decoder, KvCache

GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NO_SLOT = -1


class GraphKey(NamedTuple):
    """What a recording is for: so many rows, whether any segment has more than a small tile holds, the states it keeps."""

    num_rows: int
    is_wide: bool
    layers: tuple[int, ...] = ()


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """The sizes that are recorded if none may be larger than this."""
    return tuple(size for size in GRAPH_SIZES if size <= max_rows)


def graph_key(segments: Seq[Segment], sizes: Seq[int], group: int, layers: tuple[int, ...] = ()) -> GraphKey | None:
    """The recording for these segments, decode roots and draft trees without adapters; None for any others, and for too many.

    `group` query heads share a key/value head.
    """
    num_rows = sum(len(segment.tokens) for segment in segments)
    size = next((size for size in sizes if size >= num_rows), None)
    if not num_rows or size is None:
        return None
    if any(each.wants_logits != "all" or each.tape is not None or each.adapter is not None for each in segments):
        return None
    return GraphKey(size, any(TableRoom.is_large(len(segment.tokens), group) for segment in segments), layers)


class PaddedPass:
    """The inputs of one key's passes, in place, and what is computed from them: the same launches whatever they hold."""

    def __init__(self, decoder: Decoder, cache: KvCache, key: GraphKey) -> None:
        self._decoder, self._cache, self._key = decoder, cache, key
        config = decoder.config
        self._group = config.num_heads // config.num_kv_heads
        self._windows = tuple(dict.fromkeys(config.windows))
        num_keys = min(key.num_rows * config.max_position_embeddings, len(cache.k[0]))
        self._room = TableRoom.of(key.num_rows, num_keys, self._group)
        rows = [((key.num_rows,), np.int64)] * 3
        self._tables = FixedTables([*rows, *self._room.shapes * len(self._windows), ((num_keys,), np.int64)], decoder.device)
        tokens_T, positions_T, slots_T, *tables, self._key_slots = self._tables.tensors
        count = len(self._room.shapes)
        plan = FixedPlan(
            {
                window: self._room.tables(
                    tables[i * count : (i + 1) * count], self._key_slots, self._group, window, key.is_wide
                )
                for i, window in enumerate(self._windows)
            }
        )
        self._batch = Batch(
            tokens_T=tokens_T, positions_T=positions_T, slots_T=slots_T, attention=plan, adapters=arranged(()), training=(),
            logit_rows=positions_T, starts=(),
        )  # fmt: skip
        self.fill(())

    def fill(self, segments: Seq[Segment]) -> bool:
        """Put the segments' rows in and pad them, in one copy; False, and nothing is done, if their keys find no room."""
        rows = host_rows(segments)
        placed = attention_segments(segments, rows.starts, torch.from_numpy(rows.keys), rows.num_keys)
        hosts = [host_tables(placed, self._group, window) for window in self._windows]
        if len(rows.keys) > len(self._key_slots) or not all(self._room.holds(host) for host in hosts):
            return False
        padding = self._key.num_rows - len(rows.tokens)
        own = [np.pad(x, (0, padding), constant_values=v) for x, v in zip(rows[:3], (0, 0, NO_SLOT), strict=True)]
        self._tables.upload([*own, *(table for host in hosts for table in host.arrays), rows.keys])
        return True

    def compute(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hidden states [T, H] and logits [T, V] of all rows, and the states that the key's layers left."""
        features = PassFeatures(FeatureWish(self._key.layers, 1))
        hidden_TH = self._decoder.forward(self._batch, self._cache, features)
        features.keep(self._decoder.config.num_layers, hidden_TH)
        return hidden_TH, self._decoder.logits(hidden_TH), features.states


class Recording:
    """A padded pass as a CUDA graph."""

    def __init__(self, padded: PaddedPass, pool: object) -> None:
        self.padded = padded
        stream: Any = cast(
            Any, torch.cuda.Stream
        )()  # a first pass beside the recording compiles kernels and makes libraries' workspaces
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            padded.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):  # type: ignore[arg-type]
            self._outputs = padded.compute()

    def replay(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What `compute` returns, in tensors that the next replay of any recording of the pool overwrites."""
        self._graph.replay()
        return self._outputs

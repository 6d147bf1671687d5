"""Which passes are recorded, and for which sizes; on a CPU none is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common.messages import LoraSpec
from kernels.upload import FixedTables
from services.executor.batch import Segment
from services.executor.features import FeatureWish, PassFeatures
from services.executor.graphs import GRAPH_SIZES, GraphKey, graph_key, graph_sizes
from services.executor.pages import Slots
from services.executor.passes import Passes
from tests.helpers import CPU, new_cache, random_adapter
from tests.tiny import tiny_pair

GROUP = 4


def segment(num_rows: int = 1, wants: str = "all", **fields: Any) -> Segment:
    rows = range(num_rows)
    return Segment(tokens=[1] * num_rows, positions=rows, context_slots=(), slots=rows, wants_logits=wants, **fields)


def key(*segments: Segment, sizes: tuple[int, ...] = GRAPH_SIZES) -> GraphKey | None:
    return graph_key(segments, sizes, GROUP)


@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (256, 256)])
def test_the_next_size_up(num_rows: int, size: int) -> None:
    assert key(*[segment()] * num_rows) == GraphKey(size, False)


def test_trees_beyond_a_small_tile_have_recordings_of_their_own() -> None:
    assert key(segment(4, parents=(-1, 0, 0, 1))) == GraphKey(4, False)
    assert key(segment(5, parents=(-1, 0, 0, 1, 1)), segment()) == GraphKey(8, True)
    assert graph_key([segment()], GRAPH_SIZES, GROUP, (1, 2)) == GraphKey(1, False, (1, 2))


def test_other_passes_are_not_recorded() -> None:
    adapter = random_adapter(tiny_pair()[1], LoraSpec(rank=2))
    assert key() is None
    assert key(*[segment()] * 257) is None
    assert key(segment(), sizes=()) is None
    assert key(segment(), segment(7, "last")) is None, "a prompt's chunk"
    assert key(segment(), segment(7, "none")) is None, "a window, or a chunk within a prompt"
    assert key(segment(), segment(adapter=adapter)) is None


def test_the_largest_size_is_a_setting() -> None:
    assert graph_sizes(0) == ()
    assert graph_sizes(100) == (1, 2, 4, 8, 16, 32, 64)
    assert graph_sizes(100000) == GRAPH_SIZES


def test_a_cpu_records_nothing() -> None:
    decoder = tiny_pair()[1]
    passes = Passes(decoder, new_cache(decoder), 256)
    assert passes.record_all() == 0
    ran = passes.run([segment()], PassFeatures(FeatureWish()))
    assert not ran.is_replay
    assert ran.starts == (0,)
    assert ran.logits_RV is not None


def test_tables_go_where_they_were() -> None:
    tables = FixedTables([((4,), np.int64), ((3, 2), np.int64), ((5,), np.int64)], CPU)
    before = [tensor.data_ptr() for tensor in tables.tensors]
    for size in (1, 3):
        given: list[Slots] = [np.arange(size), np.full((size, 2), size), np.arange(size + 2)]
        tables.upload(given)
        for tensor, array in zip(tables.tensors, given, strict=True):
            assert torch.equal(tensor[: len(array)], torch.from_numpy(array))
    assert [tensor.data_ptr() for tensor in tables.tensors] == before
    with pytest.raises(ValueError, match="in room for"):
        tables.upload([np.arange(5), np.ones((1, 2), np.int64), np.arange(1)])

"""Ragged attention in Triton against the reference in fp64: every kind of segment, alone and in one launch."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

import tests.triton_stage as stage
from kernels import reference
from kernels.segments import AttentionPlan, AttentionSegment
from kernels.triton_ops import ragged_attention as module
from kernels.triton_ops.attention_tables import AttentionTables, TableRoom, attention_tables, host_tables
from kernels.triton_ops.ragged_attention import ragged_attention
from tests.helpers import assert_matches, randn
from tests.test_kernels_attention import (
    BATCHES,
    BINARY,
    CHAIN,
    HEAD_DIM,
    NUM_SLOTS,
    RAGGED,
    ROOT,
    SCALE,
    STAR,
    ancestors,
    make_segments,
)

WIDE_TREE = [-1, *(node // 3 for node in range(40))]


def tables_of(segments: list[AttentionSegment], group: int, window: int | None = None) -> AttentionTables:
    placed = [
        AttentionSegment(
            start=segment.start, end=segment.end, slots_L=segment.slots_L.to(stage.DEVICE), mask_nn=segment.mask_nn
        )
        for segment in segments
    ]
    return attention_tables(AttentionPlan(placed), group, window)


def check(
    segments: list[AttentionSegment],
    num_rows: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None = None,
) -> None:
    q = randn(num_rows, heads[0], head_dim, dtype=dtype)
    k, v = (randn(NUM_SLOTS, heads[1], head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    unused = torch.ones(NUM_SLOTS, dtype=torch.bool)
    unused[torch.cat([segment.slots_L for segment in segments])] = False
    k[unused] = v[unused] = torch.nan
    narrow_q, narrow_k, narrow_v = (stage.put(x, dtype) for x in (q, k, v))
    out = ragged_attention(narrow_q, narrow_k, narrow_v, tables_of(segments, heads[0] // heads[1], window), SCALE)
    assert_matches(out.cpu(), reference.ragged_attention(q, k, v, segments, SCALE, window))


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_kind_of_segment(batch: list[tuple[int, list[int] | int]], dtype: torch.dtype) -> None:
    segments, num_rows = make_segments(batch, gap=1)
    check(segments, num_rows, dtype, (6, 2), HEAD_DIM)


@pytest.mark.parametrize("dtype", stage.DTYPES)
@pytest.mark.parametrize("window", [1, 4, 19])
@pytest.mark.parametrize("name", ["decodes of all lengths", "forest", "all four at once"])
def test_a_sliding_window_with_splits(name: str, window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    segments, num_rows = make_segments([*BATCHES[name], (70, RAGGED), (60, 12)], gap=0)
    check(segments, num_rows, dtype, (4, 2), HEAD_DIM, window)


def test_keys_outside_the_window_are_no_work() -> None:
    segments, _ = make_segments([(200, 1), (150, STAR), (5, 1)], gap=0)
    work = host_tables(segments, 1, 32).work
    assert sorted(work[:, 4].tolist()) == [6, 32, 31 + len(STAR)]


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 8), ((3, 1), 24), ((9, 3), 16)], ids=str)
def test_heads_and_sizes(heads: tuple[int, int], head_dim: int) -> None:
    segments, num_rows = make_segments(BATCHES["all four at once"], gap=0)
    check(segments, num_rows, torch.float32, heads, head_dim)


@pytest.mark.parametrize("context", [0, 1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("rows", [1, CHAIN, 6, WIDE_TREE], ids=["decode", "chain", "rows", "wide tree"])
def test_lengths_at_the_edges_of_blocks_and_splits(
    context: int, rows: list[int] | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    segments, num_rows = make_segments([(context, rows), (40, 1), (3, STAR)], gap=0)
    check(segments, num_rows, torch.float32, (3, 1), HEAD_DIM)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 16 keys, splits of 32, large tiles of 32 rows, so that short contexts have many."""
    monkeypatch.setattr(module, "KEYS", 16)
    monkeypatch.setattr(module, "LARGE_BLOCK", 32)
    for name in ("SPLIT_KEYS", "LARGE_BLOCK"):
        monkeypatch.setattr(f"kernels.triton_ops.attention_tables.{name}", 32)


def test_a_tree_that_fills_one_split_and_begins_another(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    segments, num_rows = make_segments([(29, BINARY), (31, CHAIN), (95, ROOT), (96, 2)], gap=0)
    assert tables_of(segments, 2).merges[:, 4].tolist() == [2, 2, 3, 4]
    check(segments, num_rows, torch.float32, (2, 1), HEAD_DIM)


def test_launches_do_not_depend_on_the_number_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    launches: list[str] = []

    class Counted:
        """Stands for a kernel and notes its launches."""

        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("_ragged_attention_kernel", "_merge_kernel"):
        monkeypatch.setattr(module, name, Counted(name))
    one: list[tuple[int, list[int] | int]] = [(40, 1)]
    many: list[tuple[int, list[int] | int]] = [(40, 1), (41, 1), (10, BINARY), (0, 30), (70, STAR), (5, 12)]
    for batch in (one, many):
        launches.clear()
        segments, num_rows = make_segments(batch, gap=0)
        check(segments, num_rows, torch.float32, (2, 1), HEAD_DIM)
        assert launches == ["_ragged_attention_kernel", "_merge_kernel"]


def test_programs_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grid that is smaller than the work, and of one that is larger, as a recorded launch's may be."""
    shrink(monkeypatch)
    segments, num_rows = make_segments([(70, 1), (12, BINARY), (0, 30), (40, 1), (90, STAR)], gap=0)
    q, k, v = (
        stage.put(randn(n, h, HEAD_DIM, seed=n), torch.float32) for n, h in ((num_rows, 4), (NUM_SLOTS, 2), (NUM_SLOTS, 2))
    )
    tables = tables_of(segments, 2)
    expected = ragged_attention(q, k, v, tables, SCALE)
    assert module.grid(len(tables.work), 2) == (len(tables.work), 2)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 6)
    assert module.grid(len(tables.work), 2) == (3, 2)
    assert torch.equal(ragged_attention(q, k, v, tables, SCALE), expected)
    room = dataclasses.replace(
        tables, work=torch.cat((tables.work, tables.work)), merges=torch.cat((tables.merges, tables.merges))
    )
    assert torch.equal(ragged_attention(q, k, v, room, SCALE), expected), "what lies behind the sizes is not looked at"


@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (1, 16), (1, 64), (4, 4)])
def test_few_sequences_behind_a_long_context_fill_the_device(rows: tuple[int, int]) -> None:
    """8k keys, Llama-3.1-8B's 8 key/value heads in groups of 4: programs enough for an H100's 132 processors, or close."""
    num_sequences, num_rows = rows
    slots = torch.arange(8192)
    segments = [
        AttentionSegment(start=i * num_rows, end=(i + 1) * num_rows, slots_L=slots, mask_nn=torch.eye(num_rows).bool())
        for i in range(num_sequences)
    ]
    host = host_tables(segments, 4, None)
    num_programs = math.prod(module.grid(len(host.work), 8))
    assert num_programs >= 128
    longest = int((host.work[:, 10] - host.work[:, 9]).max())
    assert longest <= 512 * -(-4 * num_rows // 128), "nobody waits for one long piece"


def test_a_large_tile_is_split_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    segments, num_rows = make_segments([(95, STAR), (70, 15), (60, WIDE_TREE), (5, 30)], gap=0)
    tables = tables_of(segments, 3)
    assert set(tables.work[:, 8].tolist()) == {1}, "all are large"
    assert (tables.merges[:, 4] > 1).all()
    assert {units for *_, units in tables.merges.tolist()} >= {1, 2}
    check(segments, num_rows, torch.float32, (3, 1), HEAD_DIM)


def test_no_tables_outgrow_their_room() -> None:
    """Whatever segments share so many rows and keys; partials apart, which passes full of large trees may lack."""
    generator = random.Random(0)
    for group in (1, 4, 7, 32):
        for _ in range(30):
            lengths = [(generator.randint(0, 3000), generator.randint(1, 40)) for _ in range(generator.randint(1, 9))]
            segments, start = [], 0
            for context, rows in lengths:
                mask = torch.eye(rows).bool() if generator.random() < 0.5 else None
                segments.append(
                    AttentionSegment(start=start, end=start + rows, slots_L=torch.arange(context + rows), mask_nn=mask)
                )
                start += rows
            host = host_tables(segments, group, None)
            room = TableRoom.of(start, sum(context + rows for context, rows in lengths), group)
            assert dataclasses.replace(room, num_partials=host.num_partials).holds(host)


def test_a_request_gets_the_same_result_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    segments, num_rows = make_segments([(70, 1), (12, BINARY), (0, 30)], gap=0)
    q, k, v = (
        stage.put(randn(n, h, HEAD_DIM, seed=n), torch.float32) for n, h in ((num_rows, 2), (NUM_SLOTS, 1), (NUM_SLOTS, 1))
    )
    together = ragged_attention(q, k, v, tables_of(segments, 2), SCALE)
    for segment in segments:
        rows = slice(segment.start, segment.end)
        alone = ragged_attention(q, k, v, tables_of([segment], 2), SCALE)
        assert torch.equal(alone[rows], together[rows])


def test_bits_of_the_ancestor_mask() -> None:
    segments, _ = make_segments([(0, WIDE_TREE)], gap=0)
    flat = host_tables(segments, 1, None).masks
    masks, depths = flat[: 2 * len(WIDE_TREE)].reshape(-1, 2), flat[2 * len(WIDE_TREE) :]
    assert depths.tolist() == [int(row.sum()) - 1 for row in ancestors(WIDE_TREE)]
    for i in range(len(WIDE_TREE)):
        seen = [bool(int(masks[i, j // 32]) >> (j % 32) & 1) for j in range(len(WIDE_TREE))]
        assert seen == ancestors(WIDE_TREE)[i].tolist()


def test_no_segments_and_tables_of_other_heads() -> None:
    q, k = stage.put(randn(3, 6, 8), torch.float32), stage.put(randn(9, 2, 8), torch.float32)
    assert not ragged_attention(q, k, k, None, SCALE).any()
    segments, _ = make_segments([(1, 1)], gap=0)
    with pytest.raises(ValueError, match="2 heads in a group"):
        ragged_attention(q, k, k, tables_of(segments, 2), SCALE)
    assert host_tables([], 1, None).sizes.tolist() == [0, 0]

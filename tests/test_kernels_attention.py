"""Ragged attention, the specification, the padded calls and the compiled one, against a row-by-row oracle in fp64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels import attention, ops, reference
from kernels.attention import MAX_SHARED_ROWS
from tests.helpers import assert_matches, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def planned(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the specification's arguments."""
    return lambda q, k, v, segments, *rest: attend(q, k, v, ops.AttentionPlan(segments), *rest)


IMPLEMENTATIONS = {
    "specification": reference.ragged_attention,
    "padded calls": planned(attention.ragged_attention),
    "compiled, except in fp64": planned(ops.ragged_attention),
}
NUM_SLOTS, HEAD_DIM, SCALE = 512, 8, 0.4

CHAIN = [-1, 0, 1, 2, 3]
STAR = [-1, 0, 0, 0, 0, 0]
BINARY = [-1, 0, 0, 1, 1, 2, 2]
RAGGED = [-1, 0, 0, 1, 3, 3, 2]
ROOT = [-1]

BATCHES: dict[str, list[tuple[int, list[int] | int]]] = {
    # (context length, parents of a tree or number of causal rows)
    "one decode": [(17, 1)],
    "first token": [(0, 1)],
    "decodes of one length": [(20, 1)] * 5,
    "decodes of all lengths": [(length, 1) for length in (0, 1, 7, 8, 9, 63, 100)],
    "prefill from nothing": [(0, 12)],
    "prefill chunk": [(9, 12)],
    "long chunk": [(5, MAX_SHARED_ROWS + 3)],
    "chunk of the widest shared length": [(5, MAX_SHARED_ROWS)],
    "chain": [(11, CHAIN)],
    "star": [(11, STAR)],
    "binary": [(11, BINARY)],
    "root alone": [(11, ROOT)],
    "tree without context": [(0, RAGGED)],
    "forest": [(11, CHAIN), (3, STAR), (40, BINARY), (11, ROOT), (2, RAGGED)],
    "all four at once": [(30, 1), (12, BINARY), (4, 1), (0, 9), (8, MAX_SHARED_ROWS + 9), (16, STAR), (0, 1)],
}


def ancestors(parents: Sequence[int]) -> Tensor:
    """bool [n, n], by walking up from every node."""
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        seen = node
        while seen >= 0:
            mask[node, seen] = True
            seen = parents[seen]
    return mask


def make_segments(batch: list[tuple[int, list[int] | int]], gap: int) -> tuple[list[ops.AttentionSegment], int]:
    """Segments with `gap` rows of nobody before each, on scattered slots; and the number of rows."""
    free = list(range(1, NUM_SLOTS))
    random.Random(0).shuffle(free)
    segments, end = [], 0
    for context, rows in batch:
        num_rows = rows if isinstance(rows, int) else len(rows)
        start, end = end + gap, end + gap + num_rows
        slots = torch.tensor([free.pop() for _ in range(context + num_rows)])
        mask = None if isinstance(rows, int) else ancestors(rows)
        segments.append(ops.AttentionSegment(start=start, end=end, slots_L=slots, mask_nn=mask))
    return segments, end + gap


def oracle(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, segments: list[ops.AttentionSegment], window: int = NUM_SLOTS
) -> Tensor:
    """Row by row; a row's keys in the order of their positions, of which it sees the last `window`."""
    out = torch.zeros_like(q_TND)
    group = q_TND.shape[1] // k_SKD.shape[1]
    for segment in segments:
        num_rows = segment.end - segment.start
        context = segment.slots_L.numel() - num_rows
        own = torch.ones(num_rows, num_rows).tril().bool() if segment.mask_nn is None else segment.mask_nn
        for i in range(num_rows):
            keys = [*range(context), *(context + j for j in range(num_rows) if own[i, j])][-window:]
            slots = segment.slots_L[keys]
            for head in range(q_TND.shape[1]):
                probs = (SCALE * (k_SKD[slots, head // group] @ q_TND[segment.start + i, head])).softmax(0)
                out[segment.start + i, head] = probs @ v_SKD[slots, head // group]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_each_row_attends_to_its_context_and_what_its_mask_allows(
    batch: list[tuple[int, list[int] | int]], dtype: torch.dtype, implementation: Callable[..., Tensor]
) -> None:
    segments, num_rows = make_segments(batch, gap=0)
    q = randn(num_rows, 6, HEAD_DIM, dtype=dtype)
    k, v = (randn(NUM_SLOTS, 2, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2))
    out = implementation(q.to(dtype), k.to(dtype), v.to(dtype), segments, SCALE)
    assert_matches(out, oracle(q, k, v, segments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (3, 1), (9, 3)])
def test_query_heads_share_the_keys_of_their_group(
    num_heads: int, num_kv_heads: int, implementation: Callable[..., Tensor]
) -> None:
    segments, num_rows = make_segments(BATCHES["all four at once"], gap=0)
    q = randn(num_rows, num_heads, HEAD_DIM)
    k, v = (randn(NUM_SLOTS, num_kv_heads, HEAD_DIM, seed=seed) for seed in (1, 2))
    assert_matches(implementation(q, k, v, segments, SCALE), oracle(q, k, v, segments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 2, 3, 12, 13, 14, 101, NUM_SLOTS])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_window_hides_keys_by_their_distance_in_positions(
    batch: list[tuple[int, list[int] | int]], window: int, implementation: Callable[..., Tensor]
) -> None:
    segments, num_rows = make_segments(batch, gap=0)
    q = randn(num_rows, 6, HEAD_DIM)
    k, v = (randn(NUM_SLOTS, 2, HEAD_DIM, seed=seed) for seed in (1, 2))
    assert_matches(implementation(q, k, v, segments, SCALE, window), oracle(q, k, v, segments, window))


def test_a_window_makes_long_contexts_short_and_wide_windows_cost_nothing() -> None:
    segments, _ = make_segments([(100, 1), (90, 1), (60, 1)], gap=0)
    plan = ops.AttentionPlan(segments)
    (call,) = attention.calls(plan, 3, torch.float32, 16)
    assert call.slots.numel() == 3 * 16
    assert call.bias is None
    assert attention.calls(plan, 3, torch.float32, 101) is attention.calls(plan, 3, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_rows_of_no_segment_are_zero_and_slots_of_no_segment_are_never_read(implementation: Callable[..., Tensor]) -> None:
    segments, num_rows = make_segments(BATCHES["all four at once"], gap=2)
    used = torch.cat([segment.slots_L for segment in segments])
    q, k, v = (
        randn(num_rows, 6, HEAD_DIM),
        torch.full((NUM_SLOTS, 2, HEAD_DIM), torch.nan).double(),
        randn(NUM_SLOTS, 2, HEAD_DIM),
    )
    k[used] = randn(len(used), 2, HEAD_DIM, seed=1)
    out = implementation(q, k, v, segments, SCALE)
    assert_matches(out, oracle(q, k, v, segments))
    idle = torch.ones(num_rows, dtype=torch.bool)
    for segment in segments:
        idle[segment.start : segment.end] = False
    assert idle.sum() == 2 * (len(segments) + 1)
    assert not out[idle].any()


def test_a_plan_serves_every_layer_and_type() -> None:
    segments, num_rows = make_segments(BATCHES["all four at once"], gap=0)
    plan = ops.AttentionPlan(segments)
    for layer, dtype in enumerate((torch.float64, torch.float32, torch.float64)):
        q = randn(num_rows, 6, HEAD_DIM, dtype=dtype, seed=layer)
        k, v = (randn(NUM_SLOTS, 2, HEAD_DIM, dtype=dtype, seed=10 * layer + i) for i in (1, 2))
        out = ops.ragged_attention(q.to(dtype), k.to(dtype), v.to(dtype), plan, SCALE)
        assert_matches(out, oracle(q, k, v, segments))


def test_the_number_of_calls_grows_with_lengths_not_with_segments() -> None:
    few, _ = make_segments([(20, 1), (12, STAR)], gap=0)
    many, _ = make_segments([(20, 1)] * 8 + [(12, STAR)] * 8, gap=0)
    calls = [attention.calls(ops.AttentionPlan(segments), 3, torch.float32) for segments in (few, many)]
    assert [len(padded) for padded in calls] == [2, 2]


def test_no_segments_is_fine() -> None:
    k = randn(NUM_SLOTS, 2, HEAD_DIM)
    assert not ops.ragged_attention(randn(3, 6, HEAD_DIM), k, k, ops.AttentionPlan([]), SCALE).any()


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "mask"),
    [(0, 3, None), (3, 2, None), (2, 3, torch.ones(3, 3, dtype=torch.bool))],
    ids=["no rows", "fewer keys than rows", "mask of another size"],
)
def test_impossible_segments_are_refused(num_rows: int, num_keys: int, mask: Tensor | None) -> None:
    with pytest.raises(ValueError, match="rows"):
        ops.AttentionSegment(start=1, end=1 + num_rows, slots_L=torch.arange(num_keys), mask_nn=mask)

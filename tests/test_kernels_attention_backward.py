"""Gradients of ragged attention: all windows in one call against the specification, window by window, in a wider type."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import ops, reference
from tests.helpers import OperatorCount, assert_matches, randn
from tests.test_kernels_attention import make_segments

NUM_SLOTS, HEAD_DIM, SCALE = 512, 8, 0.4
BATCHES: dict[str, list[tuple[int, int]]] = {
    # (keys before the window, its rows)
    "one row": [(0, 1)],
    "one window": [(9, 23)],
    "from nothing": [(0, 40)],
    "alike": [(7, 12)] * 4,
    "ragged": [(0, 5), (31, 2), (3, 50), (17, 17), (64, 1), (0, 33), (1, 7)],
}


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_all_windows_at_once(dtype: torch.dtype, batch: list[tuple[int, int]], heads: tuple[int, int], gap: int) -> None:
    segments, num_rows = make_segments(list(batch), gap)
    shapes = ((num_rows, heads[0]), (num_rows, heads[0]), (NUM_SLOTS, heads[1]), (NUM_SLOTS, heads[1]))
    do, q, k, v = (randn(*shape, HEAD_DIM, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    unread = torch.ones(NUM_SLOTS, dtype=torch.bool)
    for segment in segments:
        unread[segment.slots_L] = False
    k_cache, v_cache = (tensor.to(dtype).masked_fill(unread[:, None, None], torch.nan) for tensor in (k, v))
    actual = ops.ragged_attention_backward(do.to(dtype), q.to(dtype), k_cache, v_cache, ops.AttentionPlan(segments), SCALE)
    expected = reference.ragged_attention_backward(do, q, k, v, segments, SCALE)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert tensor.isfinite().all()
        assert_matches(tensor.to(dtype), wanted)


def test_the_number_of_operators_does_not_depend_on_the_number_of_windows() -> None:
    counts = []
    for num_windows in (2, 9):
        segments, num_rows = make_segments([(10, 5)] * num_windows, 0)
        do, q, k, v = (randn(n, 4, HEAD_DIM).float() for n in (num_rows, num_rows, NUM_SLOTS, NUM_SLOTS))
        plan = ops.AttentionPlan(segments)
        with OperatorCount() as operators:
            ops.ragged_attention_backward(do, q, k, v, plan, SCALE)
        counts.append(operators.by_name)
    assert counts[0] == counts[1]
    assert counts[0].total() > 0


def test_a_window_that_is_not_finite_leaves_the_others_alone() -> None:
    rng = random.Random(0)
    segments, num_rows = make_segments([(rng.randint(0, 20), rng.randint(1, 20)) for _ in range(6)], 0)
    do, q, k, v = (randn(n, 4, HEAD_DIM, seed=i).float() for i, n in enumerate((num_rows, num_rows, NUM_SLOTS, NUM_SLOTS)))
    plan = ops.AttentionPlan(segments)
    sound = ops.ragged_attention_backward(do, q, k, v, plan, SCALE)
    do[segments[2].start] = torch.inf
    spoiled = ops.ragged_attention_backward(do, q, k, v, plan, SCALE)
    edge = sum(segment.slots_L.numel() for segment in segments[:2])
    keys = slice(edge, edge + segments[2].slots_L.numel())
    for a, b, own in zip(sound, spoiled, (segments[2].rows, segments[2].rows, keys, keys), strict=True):
        others = torch.ones(len(a), dtype=torch.bool)
        others[own] = False
        assert torch.equal(a[others], b[others])
    assert not spoiled[1][segments[2].rows].isfinite().all()

"""Segmented bottleneck adapters against reference and autograd: mixes of sizes, activations and types; who shares a call."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.native.build import library
from kernels.segments import BottleneckSegment
from tests.helpers import OperatorCount, assert_close_in_norm, assert_matches, randn

NUM_HIDDEN, NUM_ROWS = 24, 40
Matrices = list[tuple[Tensor, Tensor]]


def random_segments(
    num_adapters: int, seed: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,), activation: str | None = None
) -> list[BottleneckSegment]:
    """Runs of rows with gaps between some, each with an adapter of its own."""
    rng = random.Random(seed)
    edges = sorted(rng.sample(range(NUM_ROWS + 1), 2 * num_adapters))
    segments = []
    for i, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        rank, dtype = rng.choice((1, 3, 8, 17)), dtypes[i % len(dtypes)]
        down, up = (randn(*shape, seed=seed + 2 * i + 31 * k) / 4 for k, shape in enumerate([(rank, 24), (24, rank)]))
        kind = activation or rng.choice(("relu", "gelu"))
        segments.append(
            BottleneckSegment(
                start=start, end=end, down_RH=down.to(dtype), up_HR=up.to(dtype), scale=rng.choice((1.0, 1.25)),
                activation="gelu" if kind == "gelu" else "relu",
            )
        )  # fmt: skip
    return segments


def widened(segments: list[BottleneckSegment], matrices: Matrices | None = None) -> list[BottleneckSegment]:
    matrices = matrices or [(s.down_RH.double(), s.up_HR.double()) for s in segments]
    return [
        BottleneckSegment(start=s.start, end=s.end, down_RH=down, up_HR=up, activation=s.activation, scale=s.scale)
        for s, (down, up) in zip(segments, matrices, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_every_row_gets_its_own_adapters_update(dtype: torch.dtype, seed: int) -> None:
    types = {torch.bfloat16: (torch.bfloat16, torch.float32), torch.float64: (torch.float64,)}.get(dtype, (torch.float32,))
    segments = random_segments(seed + 1, seed, types, ("relu", "gelu", None)[seed % 3])
    y = randn(NUM_ROWS, NUM_HIDDEN, dtype=dtype, seed=seed)
    actual, expected = y.to(dtype, copy=True), y.clone()
    ops.segmented_bottleneck(actual, actual, ops.BottleneckPlan(segments))
    reference.segmented_bottleneck(expected, expected.clone(), widened(segments))
    if dtype == torch.bfloat16:  # what lies between the products is rounded too
        assert_close_in_norm(actual, expected, 1e-2)
    else:
        assert_matches(actual, expected)
    assert (expected - y).abs().max() > 0.1


def gradients(segments: list[BottleneckSegment], x: Tensor, dy: Tensor, order: Tensor | None = None) -> tuple[Tensor, Matrices]:
    grads = [(torch.zeros_like(s.down_RH), torch.zeros_like(s.up_HR)) for s in segments]
    dx = torch.zeros_like(x)
    ops.segmented_bottleneck_gradients(dx, dy, x, grads, ops.BottleneckPlan(segments, order_T=order))
    return dx, grads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_of_autograd_through_the_reference(dtype: torch.dtype, seed: int) -> None:
    segments = random_segments(seed + 1, seed, (dtype,), ("gelu", "relu", None)[seed % 3])
    x, dy = (randn(NUM_ROWS, NUM_HIDDEN, seed=seed + i) for i in range(2))
    leaves = [(s.down_RH.double().clone().requires_grad_(), s.up_HR.double().clone().requires_grad_()) for s in segments]
    leaf = x.clone().requires_grad_()
    y = torch.zeros(NUM_ROWS, NUM_HIDDEN, dtype=torch.float64)
    reference.segmented_bottleneck(y, leaf, widened(segments, leaves))
    torch.autograd.backward(y, dy)
    assert leaf.grad is not None
    dx, grads = gradients(segments, x.to(dtype), dy.to(dtype))
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    assert_close_in_norm(dx, leaf.grad, rel)
    for pair, expected in zip(grads, leaves, strict=True):
        for found, wanted in zip(pair, expected, strict=True):
            assert wanted.grad is not None
            assert_close_in_norm(found, wanted.grad, rel)


@pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")
@pytest.mark.parametrize("seed", range(3))
def test_who_shares_a_call_changes_no_bit(seed: int) -> None:
    """Also not of sums over rows, which may come in two calls, those of later rows first."""
    segments = random_segments(4, seed)
    x, dy = (randn(NUM_ROWS, NUM_HIDDEN, seed=seed + i).float() for i in range(2))
    later_first = torch.cat([torch.arange(s.end - 1, s.start - 1, -1) for s in segments])
    order = torch.arange(NUM_ROWS).index_copy(0, later_first.sort().values, later_first)
    y = x.clone()
    ops.segmented_bottleneck(y, y, ops.BottleneckPlan(segments))
    dx, grads = gradients(segments, x, dy, order)
    for s, (ddown, dup) in zip(segments, grads, strict=True):
        alone, rows = x[s.rows].clone(), s.end - s.start
        own = [(torch.zeros_like(ddown), torch.zeros_like(dup))]
        for start, end in ((rows // 3, rows), (0, rows // 3)):
            if start == end:
                continue
            fields = {name: getattr(s, name) for name in ("down_RH", "up_HR", "activation", "scale")}
            plan = ops.BottleneckPlan(
                [BottleneckSegment(start=0, end=end - start, **fields)], order_T=torch.arange(end - start - 1, -1, -1)
            )
            part, dpart = alone[start:end], torch.zeros(end - start, NUM_HIDDEN)
            x_part, dy_part = (whole[s.rows][start:end] for whole in (x, dy))
            ops.segmented_bottleneck(part, part, plan)
            ops.segmented_bottleneck_gradients(dpart, dy_part, x_part, own, plan)
            assert torch.equal(dpart, dx[s.rows][start:end])
        assert torch.equal(alone, y[s.rows])
        assert all(torch.equal(a, b) for a, b in zip(own[0], (ddown, dup), strict=True))


def test_a_row_that_is_not_finite_stays_alone() -> None:
    segments = random_segments(4, 3)
    x, dy = (randn(NUM_ROWS, NUM_HIDDEN, seed=i).float() for i in range(2))
    bad, others = segments[1], [segments[0], *segments[2:]]
    x[bad.start] = torch.inf
    dx, grads = gradients(segments, x, dy)
    for s in others:
        assert dx[s.rows].isfinite().all()
    assert all(grad.isfinite().all() for i in (0, 2, 3) for grad in grads[i])
    assert not grads[1][0].isfinite().all()


def test_operators_do_not_grow_with_adapters() -> None:
    def operators(num_adapters: int) -> Counter[str]:
        segments = random_segments(num_adapters, 7)
        x, dy = (randn(NUM_ROWS, NUM_HIDDEN, seed=i).float() for i in range(2))
        gradients(segments, x, dy)  # identity matrices are made once
        grads = [(torch.zeros_like(s.down_RH), torch.zeros_like(s.up_HR)) for s in segments]
        with OperatorCount() as count:
            plan = ops.BottleneckPlan(segments)
            ops.segmented_bottleneck(x, x, plan)
            ops.segmented_bottleneck_gradients(None, dy, x, grads, plan)
        return Counter(count.by_name)

    few, many = operators(4), operators(11)
    assert few.total() > 5
    assert many - few == Counter()

"""Segmented LoRA on a CPU against the reference: mixes of adapters, ranks, types, targets; how many operators it takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_adapters
from kernels import lora, ops, reference
from kernels.segments import LoraSegment
from tests.helpers import OperatorCount, assert_matches, randn
from tests.tiny import tiny_pair

INPUTS, WIDTHS = 12, (8, 4, 4)
"""Three targets side by side, as q, k and v are."""
NUM_ROWS = 40


def random_segments(num_adapters: int, dtypes: tuple[torch.dtype, ...], seed: int) -> list[LoraSegment]:
    """Runs of rows with gaps between some, each with an adapter of its own rank on some of the targets."""
    rng = random.Random(seed)
    edges = sorted(rng.sample(range(NUM_ROWS + 1), 2 * num_adapters))
    segments = []
    for i, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        rank, dtype, scale = rng.choice((1, 3, 8)), dtypes[i % len(dtypes)], rng.choice((0.25, 2.0))
        for target in sorted(rng.sample(range(3), rng.choice((1, 2, 3)))):
            matrices = {
                "a_RI": (randn(rank, INPUTS, seed=seed + i) / 4).to(dtype),
                "b_OR": (randn(WIDTHS[target], rank, seed=seed + i + 50) / 6).to(dtype),
            }
            segments.append(LoraSegment(start=start, end=end, scale=scale, column=sum(WIDTHS[:target]), **matrices))
    return segments


def widened(segments: list[LoraSegment]) -> list[LoraSegment]:
    return [
        LoraSegment(start=s.start, end=s.end, a_RI=s.a_RI.double(), b_OR=s.b_OR.double(), scale=s.scale, column=s.column)
        for s in segments
    ]


def grouped(y: Tensor, x: Tensor, segments: list[LoraSegment]) -> None:
    """The way of machines without the compiled library."""
    lora.segmented_lora(y, x, ops.LoraPlan(segments))


@pytest.mark.parametrize("update", [grouped, ops.segmented_lora])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_row_gets_its_own_adapters_update(
    dtype: torch.dtype, adapters: tuple[torch.dtype, ...], seed: int, update: Callable[..., None]
) -> None:
    segments = random_segments(seed + 1, adapters, seed)
    x, y = randn(NUM_ROWS, INPUTS, dtype=dtype, seed=seed), randn(NUM_ROWS, sum(WIDTHS), dtype=dtype, seed=seed + 1)
    actual, expected = y.to(dtype), y.clone()
    update(actual, x.to(dtype), segments)
    reference.segmented_lora(expected, x, widened(segments))
    narrowest = torch.bfloat16 if torch.bfloat16 in (*adapters, dtype) else torch.float32
    assert_matches(actual.to(narrowest), expected)
    assert (actual != y.to(dtype)).any()


def test_rows_without_an_adapter_stay_as_they_are_and_nan_stays_in_its_row() -> None:
    segments = random_segments(6, (torch.float32,), 3)
    x, y = randn(NUM_ROWS, INPUTS).float(), randn(NUM_ROWS, sum(WIDTHS), seed=1).float()
    x[segments[0].start] = torch.nan
    actual = y.clone()
    ops.segmented_lora(actual, x, segments)
    idle = torch.ones(NUM_ROWS, dtype=torch.bool)
    for segment in segments:
        idle[segment.rows] = False
    assert idle.any()
    assert torch.equal(actual[idle], y[idle])
    assert actual.isnan().any(1).nonzero().flatten().tolist() == [segments[0].start]


def test_a_plan_shares_its_masks_with_the_next_layers() -> None:
    masks: dict[object, object] = {}
    x = randn(NUM_ROWS, INPUTS).float()
    for layer in range(3):
        segments = random_segments(5, (torch.float32,), 7)
        actual, expected = torch.zeros(NUM_ROWS, sum(WIDTHS)), torch.zeros(NUM_ROWS, sum(WIDTHS))
        plan = ops.LoraPlan(segments, masks)
        for _ in range(2):
            actual.zero_()
            lora.segmented_lora(actual, x, plan)
        reference.segmented_lora(expected, x, segments)
        assert_matches(actual, expected.double())
        assert len(masks) == 1, layer


def test_the_number_of_operators_does_not_depend_on_the_number_of_adapters() -> None:
    counts = []
    for num_adapters in (2, 5, 17):
        edges = [NUM_ROWS * i // num_adapters for i in range(num_adapters + 1)]
        plan = ops.LoraPlan(
            [
                LoraSegment(
                    start=edges[i], end=edges[i + 1], a_RI=torch.zeros(i + 1, INPUTS), b_OR=torch.zeros(width, i + 1),
                    scale=1.0, column=sum(WIDTHS[:target]),
                )
                for i in range(num_adapters)
                for target, width in enumerate(WIDTHS)
            ]
        )  # fmt: skip
        x, y = torch.zeros(NUM_ROWS, INPUTS), torch.zeros(NUM_ROWS, sum(WIDTHS))
        lora.segmented_lora(y, x, plan)
        with OperatorCount() as count:
            lora.segmented_lora(y, x, plan)
        counts.append(count.total)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_many_adapters_are_the_references(dtype: torch.dtype, seed: int) -> None:
    segments = random_segments(seed + 1, (torch.float32,), seed)
    plan = ops.LoraPlan(segments)
    x, dy = randn(NUM_ROWS, INPUTS, dtype=dtype, seed=seed), randn(NUM_ROWS, sum(WIDTHS), dtype=dtype, seed=seed + 1)
    dx = randn(NUM_ROWS, INPUTS, dtype=dtype, seed=seed + 2)
    actual, expected = dx.to(dtype), dx.clone()
    grads, wide = ([(torch.ones_like(s.a_RI), torch.ones_like(s.b_OR)) for s in of] for of in (segments, widened(segments)))
    ops.segmented_lora_gradients(actual, dy.to(dtype), x.to(dtype), grads, plan)
    reference.segmented_lora_backward(expected, dy, widened(segments))
    reference.segmented_lora_weight_backward(wide, dy, x, widened(segments))
    assert_matches(actual, expected)
    for own, oracle in zip(grads, wide, strict=True):
        for matrix, wanted in zip(own, oracle, strict=True):
            assert_matches(matrix, wanted)
            assert (matrix != 1).any()
    halves = dx.to(dtype), [(torch.ones_like(s.a_RI), torch.ones_like(s.b_OR)) for s in segments]
    ops.segmented_lora_gradients(halves[0], dy.to(dtype), None, None, plan)
    ops.segmented_lora_gradients(None, dy.to(dtype), x.to(dtype), halves[1], plan)
    assert torch.equal(halves[0], actual)
    assert all(torch.equal(a, b) for one, two in zip(halves[1], grads, strict=True) for a, b in zip(one, two, strict=True))


def test_no_rows_are_no_work() -> None:
    y = randn(3, 16).float()
    before = y.clone()
    ops.segmented_lora(y, randn(3, INPUTS).float(), [])
    assert torch.equal(y, before)


def test_the_benchmark_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_pair()[1]
    options: dict[str, Any] = {"num_rows": 8, "num_adapters": 8, "context": 5, "rounds": 1, "ranks": (2, 4, 8)}
    rows = bench_adapters.run(decoder, **options)
    assert [(row["adapters"], row["num_adapters"]) for row in rows] == [("none", 0), ("one", 1), ("many", 8)]
    monkeypatch.setattr(ops, "segmented_lora", lambda y, x, plan: None)
    with pytest.raises(ValueError, match="relative error"):
        bench_adapters.run(decoder, **options)

"""What an iteration costs by its draft nodes: as the latency model has it."""

from __future__ import annotations

import numpy as np
import pytest

from common.latency import Rows, predict_ms
from common.messages import LatencyProfile
from services.planner.costs import iteration_costs


@pytest.mark.parametrize("seed", range(20))
def test_costs_are_those_of_the_latency_model(seed: int) -> None:
    """By count of nodes and by whose they are, contexts and correction included."""
    rng = np.random.default_rng(seed)
    profile = LatencyProfile(
        points=((1, 20.0), (16, 25.0), (64, 60.0)),
        ms_per_context_token=float(rng.uniform(0, 1e-3)),
        ms_per_row_context=float(rng.uniform(0, 1e-3)),
        correction=float(rng.uniform(0.5, 2.0)),
    )
    contexts = [int(length) for length in rng.integers(1, 5000, 6)]
    rows = Rows()
    for context in contexts:
        rows = rows.with_segment(1, context)
    plain_ms = predict_ms(profile, rows)
    owners = np.sort(rng.integers(0, 6, 40))
    for owner in owners:
        rows = rows.widened(1, contexts[owner])
    costs = iteration_costs(profile, plain_ms, 6, contexts, 40)
    assert costs.of(owners) == pytest.approx(predict_ms(profile, rows))
    assert costs.of(owners[:0]) == plain_ms


@pytest.mark.parametrize("points", [((1, 20.0),), ((4, 20.0), (8, 24.0), (32, 55.0)), ((1, 5.0), (64, 5.0), (1024, 40.0))])
def test_costs_follow_points_that_every_pass_corrects(points: tuple[tuple[int, float], ...]) -> None:
    """As predict_ms, row by row, below the first point and beyond the last one too."""
    for shift in (0.0, 1.5):
        profile = LatencyProfile(points=tuple((size, ms + shift * size) for size, ms in points), correction=1.3)
        for base in (1, 6, 40):
            expected = [7.0 + predict_ms(profile, Rows(base + k)) - predict_ms(profile, Rows(base)) for k in range(65)]
            assert iteration_costs(profile, 7.0, base, [0], 64).by_count == pytest.approx(expected)

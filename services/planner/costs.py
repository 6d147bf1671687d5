"""What an iteration costs by its draft nodes: the latency model as arrays. Pure; knows no candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.messages import LatencyProfile

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """`by_count[k]`: ms of the whole iteration with k draft nodes; `per_node[i]`: ms that each node of request i adds to it for
    the context that it attends to.
    """

    by_count: Floats
    per_node: Floats

    def of(self, owners: NDArray[np.int64]) -> float:
        """ms of the iteration that holds nodes of these requests, one entry per node."""
        return float(self.by_count[len(owners)] + self.per_node[owners].sum())


def iteration_costs(profile: LatencyProfile, plain_ms: float, base_tokens: int, contexts: Sequence[int], budget: int) -> Costs:
    """Costs of 0..budget draft nodes beside `base_tokens` rows, in an iteration that takes `plain_ms` without them.

    Differences are those of `common.latency.predict_ms`: a request's context is read for its root anyway, so its nodes cost
    rows and rows times context.
    """
    base_tokens, budget = max(1, base_tokens), max(0, budget)
    rows_ms = _rows_ms(profile.points, np.arange(base_tokens, base_tokens + budget + 1))
    return Costs(
        by_count=plain_ms + profile.correction * (rows_ms - rows_ms[0]),
        per_node=np.asarray(contexts, dtype=np.float64) * (profile.correction * profile.ms_per_row_context),
    )


def _rows_ms(points: tuple[tuple[int, float], ...], num_rows: NDArray[np.int64]) -> Floats:
    """`common.latency.interpolate` of all of them at once: the points are others in each report, as passes correct them."""
    sizes, ms = np.array(points, dtype=np.float64).T
    slope = (ms[-1] - ms[-2]) / (sizes[-1] - sizes[-2]) if len(points) > 1 else 0.0
    found: Floats = np.interp(num_rows, sizes, ms) + slope * np.maximum(num_rows - sizes[-1], 0.0)
    return found

"""What an iteration costs by its draft nodes: the latency model as arrays. Pure; knows no candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.latency import interpolate
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
    table = _cost_table(profile.points, 1 << (base_tokens + budget + 1).bit_length())
    rows_ms = table[base_tokens : base_tokens + budget + 1] - table[base_tokens]
    return Costs(
        by_count=plain_ms + profile.correction * rows_ms,
        per_node=np.asarray(contexts, dtype=np.float64) * (profile.correction * profile.ms_per_row_context),
    )


@lru_cache(maxsize=16)
def _cost_table(points: tuple[tuple[int, float], ...], size: int) -> Floats:
    return np.array([interpolate(points, tokens) for tokens in range(size)])

"""From candidates to draft trees: joins pools for the selection, cuts the chosen nodes out of them. Pure; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from common.messages import DraftTree
from services.planner.drafter import Pool
from services.planner.selection import Candidates


def join(pools: Sequence[Pool]) -> Candidates:
    """The pools as flat arrays, in their order."""
    return Candidates(
        owner=np.repeat(np.arange(len(pools)), [len(pool) for pool in pools]),
        prob=np.array(list(chain.from_iterable(pool.probs for pool in pools)), dtype=np.float64),
    )


def size(pools: Sequence[Pool]) -> tuple[int, int]:
    """Levels and rows that it took to draft these pools: a row for each node that was continued, and for each root."""
    levels = max((pool.depths[-1] for pool in pools if pool.depths), default=1)
    return levels, sum(max(1, len(set(pool.parents))) for pool in pools)


def split(chosen: Sequence[int], pools: Sequence[Pool]) -> list[list[int]]:
    """The chosen indices of the joined pools (rising) as indices into each pool."""
    picked: list[list[int]] = []
    start = at = 0
    for pool in pools:
        end, own = start + len(pool), list[int]()
        while at < len(chosen) and chosen[at] < end:
            own.append(chosen[at] - start)
            at += 1
        picked.append(own)
        start = end
    return picked


def cut(pool: Pool, nodes: Sequence[int], *, request_id: str, root: int, length: int, num_required: int) -> DraftTree:
    """The tree of these nodes of the pool (rising, closed under ancestors) below the last committed token `root`."""
    place = {-1: 0} | {node: i for i, node in enumerate(nodes, 1)}
    return DraftTree(
        request_id=request_id,
        length=length,
        tokens=(root, *(pool.tokens[node] for node in nodes)),
        parents=(-1, *(place[pool.parents[node]] for node in nodes)),
        probs=(1.0, *(pool.probs[node] for node in nodes)),
        num_required=num_required,
    )

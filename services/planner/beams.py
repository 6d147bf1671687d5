"""One level of a beam search over many sequences: all children become candidates, the best go on. Knows numbers, no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from services.planner.drafter import DraftOrder, Pool

MAX_CHILDREN = 6
"""Candidates below one node."""
LEAST_LOSS = -1e-3
"""Nothing is certain: probabilities fall along a path."""


@dataclasses.dataclass(slots=True)
class Beam:
    """A node that is continued: its place in its order's pool, its parent's row among the last ones, its ancestors' slots."""

    order: int
    node: int
    log_prob: float
    row: int
    slots: list[int]


def expand(
    beams: Sequence[Beam],
    guesses: Sequence[Sequence[tuple[int, float]]],
    pools: Sequence[Pool],
    orders: Sequence[DraftOrder],
    *,
    depth: int,
    min_log_prob: float,
) -> list[Beam]:
    """The beams of the next level. `guesses` are (token, log probability) of each beam's children; `orders` how far and
    how wide each goes. All children that are likely enough join their pool, in the beams' order; the best of each order go on.
    """
    children: list[list[Beam]] = [[] for _ in pools]
    for row, (beam, found) in enumerate(zip(beams, guesses, strict=True)):
        for token, value in found:
            log_prob = beam.log_prob + min(value, LEAST_LOSS)
            if log_prob >= min_log_prob and depth <= orders[beam.order].depth:
                node = pools[beam.order].add(token, beam.node, depth, math.exp(log_prob))
                children[beam.order].append(Beam(beam.order, node, log_prob, row, beam.slots))
    best: list[Beam] = []
    for order, own in zip(orders, children, strict=True):
        if depth < order.depth:
            best += sorted(sorted(own, key=lambda beam: -beam.log_prob)[: order.width], key=lambda beam: beam.node)
    return best


def gain(beams: Sequence[Beam]) -> float:
    """The most tokens that one more level below these beams can bring."""
    return sum(math.exp(beam.log_prob) for beam in beams)

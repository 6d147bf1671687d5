"""Which draft nodes an iteration holds: those that an SLO requires, then the likeliest that fit. Pure; knows no prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

from common.latency import Rows, max_rows, predict_ms
from common.messages import LatencyProfile
from services.executor.views import Limits, SequenceView


def required_nodes(decoding: Seq[SequenceView], room: int) -> dict[str, int]:
    """Draft nodes that requests need for their SLO, as far as there is room: the planner keeps to it, late trees may not."""
    counts: dict[str, int] = {}
    for view in decoding:
        counts[view.request_id] = max(0, min(view.num_required, len(view.tree_probs), room))
        room -= counts[view.request_id]
    return counts


def with_nodes(rows: Rows, decoding: Seq[SequenceView], nodes: dict[str, int]) -> Rows:
    """The rows, and so many nodes of each sequence behind its context."""
    for view in decoding:
        rows = rows.widened(nodes[view.request_id], view.context_tokens)
    return rows


def part_ms(limit_ms: float, share: float, rows: Rows, profile: LatencyProfile) -> float:
    """How long a pass may take that spends this share of what these rows leave of the limit."""
    before_ms = predict_ms(profile, rows)
    return before_ms + share * max(0.0, limit_ms - before_ms)


def with_tree_of(view: SequenceView, num_nodes: int) -> SequenceView:
    """The view with only its most probable nodes: others bring no tokens."""
    if num_nodes == len(view.tree_probs):
        return view
    return dataclasses.replace(view, tree_probs=tuple(sorted(view.tree_probs, reverse=True)[:num_nodes]))


def room_for_nodes(
    decoding: Seq[SequenceView],
    rows: Rows,
    reserve: int,
    limit_ms: float | None,
    profile: LatencyProfile,
    limits: Limits,
    num_kept: int,
) -> int:
    """Draft nodes that fit beside `rows` and the reserve, all behind the longest context; without a limit by number alone.
    `num_kept` rows of the batch are kept for prompts, whenever their time comes.
    """
    room = limits.max_batch_tokens - rows.tokens - reserve - num_kept
    if limit_ms is None:
        return room
    context = max((view.context_tokens for view in decoding), default=0)
    beside = rows.widened(reserve, 0)
    return max_rows(profile, limit_ms, room, beside._replace(context=rows.context - context), context)


def extra_nodes(decoding: Seq[SequenceView], required: dict[str, int], room: int, min_value: float) -> dict[str, int]:
    """Draft nodes per request: the required ones, then the most probable of the rest that beat a finetuning token."""
    counts = dict(required)
    ranked = sorted(
        (
            (prob, view.request_id)
            for view in decoding
            for prob in sorted(view.tree_probs, reverse=True)[required[view.request_id] :]
            if prob > min_value
        ),
        reverse=True,
    )
    for _, request_id in ranked[: max(room, 0)]:
        counts[request_id] += 1
    return counts

"""What the next iteration holds: one token budget, three claimants (inference, speculation, finetuning). Pure.

Order of claims (design: one token budget, three claimants):
1. T*, the longest the iteration may take so that no request that can still make its TPOT or TTFT target loses it.
2. Roots of all decoding sequences. 3. Draft nodes required for an SLO, then those worth more than a finetuning token; while
prompts wait, the latter in half of what T* leaves. 4. Prefill chunks by priority and TTFT deadline. 5. Finetuning.
While a request is behind, draft nodes are not held to T*: the planner has weighed their cost against the tokens they bring.
Tokens that drafts may bring make T* longer, so that nodes come before prompts: prompts would take the time and leave no room
for the nodes that it was given for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from common.latency import Rows, max_rows, predict_ms
from common.messages import LatencyProfile
from services.executor.draft_nodes import extra_nodes, part_ms, required_nodes, room_for_nodes, with_nodes, with_tree_of
from services.executor.finetune_share import JobView, UnitSize, backward_ms, share_out, unit_size
from services.executor.views import Limits, SequenceView

LEAST_IDLE_PASSES = 2.0
"""An iteration of finetuning alone may take so many passes of one row, however slow these are: where reading the weights takes
longer than `idle_iteration_ms`, it would else have a row per pass, though many cost hardly more. Half of it goes into rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterationPlan:
    """`decode` maps request to its number of draft nodes, `prefill` to its number of prompt tokens.

    `forward` maps a job to training tokens of this pass, `backward` to whole-model token equivalents to go back
    through: parts of one too, as work comes in layers. What jobs have of these is one budget for all of them; a drafter's is
    its own, in tokens of a forward pass.
    """

    decode: dict[str, int]
    prefill: dict[str, int]
    forward: dict[str, int]
    backward: dict[str, float]
    rows: Rows
    """Of the fused forward pass."""
    limit_ms: float
    prefill_limit_ms: float
    forward_ms: float
    """Predicted for the forward pass alone."""
    predicted_ms: float
    num_starved: int = 0
    """Iterations in a row, this one included, that left waiting prompts with less than `min_prefill_tokens`."""
    unit: UnitSize | None = None
    """Set if finetuning has the device to itself: all of it, windows too, goes in units, until something comes in."""

    @property
    def num_tokens(self) -> int:
        """Rows of the fused forward pass."""
        return self.rows.tokens


def plan_iteration(
    now: float,
    sequences: Seq[SequenceView],
    jobs: Seq[JobView],
    profile: LatencyProfile,
    limits: Limits,
    num_starved: int = 0,
) -> IterationPlan:
    """The plan of the next iteration; see the module's docstring for the order of claims.

    `num_starved` is the last plan's.
    """
    decoding = [view for view in sequences if view.is_decoding and not view.is_resting]
    resting = [view for view in sequences if view.is_resting]
    waiting = sorted((view for view in sequences if not view.is_decoding), key=_prefill_order)
    rows = root_rows(view.context_tokens for view in decoding)
    base_ms = predict_ms(profile, rows if decoding else Rows(1))
    goes_in_units = bool(jobs) and not sequences and all(job.is_interruptible for job in jobs) and limits.interruptible_ms > 0
    idle_ms = max(limits.idle_iteration_ms, limits.interruptible_ms if goes_in_units else 0.0)
    limit_ms, prefill_ms, is_behind = iteration_limits_ms(now, decoding, waiting, base_ms, limits, resting, idle_ms)
    capacity = rows.tokens + max_rows(profile, limit_ms, limits.max_batch_tokens - rows.tokens, rows)
    reserve = 0 if is_behind or not jobs else int(limits.min_finetune_share * capacity)
    required = required_nodes(decoding, limits.max_batch_tokens - len(decoding))
    rows = with_nodes(rows, decoding, required)
    floor = min(limits.min_prefill_tokens, sum(view.num_uncomputed for view in waiting))
    with_required, was_behind = rows, is_behind
    for share in (limits.node_share if waiting else 1.0, 1.0):
        node_ms = None if was_behind else part_ms(limit_ms, share, with_required, profile)
        room = room_for_nodes(decoding, with_required, reserve, node_ms, profile, limits, floor)
        nodes = extra_nodes(decoding, required, room, limits.finetune_weight if jobs else 0.0)
        kept = [with_tree_of(view, nodes[view.request_id]) for view in decoding]
        kept_ms, prefill_ms, is_behind = iteration_limits_ms(now, kept, waiting, base_ms, limits, resting, idle_ms)
        if is_behind == was_behind:  # else those that were left out are what keeps a request in time
            break
    limit_ms = kept_ms
    rows = with_nodes(with_required, decoding, {name: num - required[name] for name, num in nodes.items()})
    is_due = not decoding or num_starved >= limits.max_prefill_gap
    prefill, is_starved = _prefill_chunks(waiting, rows, reserve, prefill_ms, is_due, floor, profile, limits)
    rows = _with_chunks(rows, waiting, prefill)
    share_ms = 0.0 if is_behind else limits.min_finetune_share * limit_ms
    spare_ms = max(limit_ms - predict_ms(profile, rows), share_ms)
    back_ms = _after_first_tokens_ms(decoding, waiting, prefill, profile, limits)
    forward, backward, rows = share_out(jobs, spare_ms, back_ms, not is_behind, rows, profile, limits.max_batch_tokens)
    forward_ms = predict_ms(profile, rows)
    return IterationPlan(
        decode=nodes,
        prefill=prefill,
        forward=forward,
        backward=backward,
        rows=rows,
        limit_ms=limit_ms,
        prefill_limit_ms=prefill_ms,
        forward_ms=forward_ms,
        predicted_ms=forward_ms + backward_ms(jobs, backward, profile),
        num_starved=num_starved + 1 if is_starved else 0,
        unit=unit_size(limits.idle_iteration_ms / 2, jobs, rows, profile) if goes_in_units else None,
    )


def root_rows(contexts: Iterable[int]) -> Rows:
    """One row for each decoding sequence."""
    rows = Rows()
    for context in contexts:
        rows = rows.with_segment(1, context)
    return rows


def iteration_limits_ms(
    now: float,
    decoding: Seq[SequenceView],
    waiting: Seq[SequenceView],
    base_ms: float,
    limits: Limits,
    resting: Seq[SequenceView] = (),
    idle_ms: float | None = None,
) -> tuple[float, float, bool]:
    """(T*, the same for prompts, whether some decoding request that can still recover is behind its target).

    While some rest, what anyone gets next comes within two iterations: each may take half of the slack.
    """
    turns = 2 if resting else 1
    everyone = (*decoding, *resting)
    slacks = [slack / turns for view in everyone if (slack := slack_ms(view, base_ms * turns, limits)) is not None]
    is_behind = bool(slacks) and min(slacks) < base_ms
    slacks += [left for view in waiting if (left := first_token_slack_ms(now, view, limits)) is not None and left >= base_ms]
    idle_ms = max(limits.idle_iteration_ms if idle_ms is None else idle_ms, LEAST_IDLE_PASSES * base_ms)
    usual_ms = limits.max_iteration_ms if decoding or waiting else idle_ms
    has_target = any(view.tpot_ms is not None for view in everyone)
    prefill_ms = usual_ms if has_target else max(usual_ms, limits.max_prefill_ms)
    return max(min([*slacks, usual_ms]), base_ms), max(min([*slacks, prefill_ms]), base_ms), is_behind


def first_token_slack_ms(now: float, view: SequenceView, limits: Limits) -> float | None:
    """Time until a waiting request's first token is due; None without a target."""
    return None if view.first_token_due_at is None else limits.safety * (view.first_token_due_at - now) * 1e3


def slack_ms(view: SequenceView, base_ms: float, limits: Limits) -> float | None:
    """Longest next iteration after which the request's mean TPOT meets its target; None without target or hope.

    From (l + T) / (o + E[acc]) <= tpot (AdaServe formula 2), bounded by one target per expected token so that slack saved
    up is not spent in one long stall.
    """
    if view.tpot_ms is None:
        return None
    expected = 1.0 + sum(view.tree_probs)
    target = limits.safety * view.tpot_ms
    slack = target * (view.num_decoded + expected) - view.decode_ms
    best_case_ms = view.decode_ms + base_ms * view.max_remaining / max(expected, view.tokens_per_step)
    if best_case_ms > view.tpot_ms * (view.num_decoded + view.max_remaining):
        return None
    return min(slack, target * expected)


def _prefill_order(view: SequenceView) -> tuple[int, float, float]:
    due = float("inf") if view.first_token_due_at is None else view.first_token_due_at
    return view.priority, due, view.arrived_at


def _prefill_chunks(
    waiting: Seq[SequenceView],
    rows: Rows,
    reserve: int,
    limit_ms: float,
    is_due: bool,
    floor: int,
    profile: LatencyProfile,
    limits: Limits,
) -> tuple[dict[str, int], bool]:
    """Prompt tokens per request, as many as the limit allows behind each one's context, and whether they were too few.

    Too few are less than `floor`. When these are due (see Limits.max_prefill_gap), the first in order gets them.
    """
    chunks: dict[str, int] = {}
    beside = rows.widened(reserve, 0)
    for view in waiting:
        room = min(view.num_uncomputed, limits.max_batch_tokens - beside.tokens)
        num = max_rows(profile, limit_ms, room, beside, view.context_tokens, view.num_unscored)
        if num > 0:
            chunks[view.request_id] = num
            beside = beside.with_segment(num, view.context_tokens, view.num_unscored)
        if num < view.num_uncomputed:  # who is next has to wait too, else a long prompt could be overtaken for ever
            break
    if not is_due or sum(chunks.values()) >= floor:
        return chunks, sum(chunks.values()) < floor
    return _in_order(waiting, min(floor, limits.max_batch_tokens - rows.tokens)), False


def _in_order(waiting: Seq[SequenceView], num_tokens: int) -> dict[str, int]:
    """That many prompt tokens, from the first in order on."""
    chunks: dict[str, int] = {}
    for view in waiting:
        if num_tokens <= 0:
            break
        chunks[view.request_id] = min(view.num_uncomputed, num_tokens)
        num_tokens -= chunks[view.request_id]
    return chunks


def _with_chunks(rows: Rows, waiting: Seq[SequenceView], chunks: dict[str, int]) -> Rows:
    for view in waiting:
        rows = rows.with_segment(chunks.get(view.request_id, 0), view.context_tokens, view.num_unscored)
    return rows


def _after_first_tokens_ms(
    decoding: Seq[SequenceView], waiting: Seq[SequenceView], prefill: dict[str, int], profile: LatencyProfile, limits: Limits
) -> float:
    """Longest backward work behind a pass that brings first tokens: their requests' time per token runs by then, and holds
    the next iteration too.
    """
    done = [view for view in waiting if prefill.get(view.request_id, 0) >= view.num_uncomputed]
    contexts = [view.context_tokens for view in decoding] + [view.context_tokens + view.num_uncomputed for view in done]
    next_ms = predict_ms(profile, root_rows(contexts))
    return max(
        0.0, min((limits.safety * view.tpot_ms - next_ms for view in done if view.tpot_ms is not None), default=math.inf)
    )

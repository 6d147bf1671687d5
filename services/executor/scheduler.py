"""What the next iteration holds: one token budget, three claimants (inference, speculation, finetuning). Pure.

Order of claims (design: one token budget, three claimants):
1. T*, the longest the iteration may take so that no request that can still make its TPOT or TTFT target loses it.
2. Roots of all decoding sequences. 3. Draft nodes required for an SLO. 4. Prefill chunks by priority and TTFT deadline.
5. Draft nodes worth more than a finetuning token; finetuning in what is left of f^-1(T*).
While a request is behind, draft nodes are not held to T*: the planner has weighed their cost against the tokens they bring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

from common.latency import max_tokens, predict_ms
from common.messages import LatencyProfile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Constants of an executor's scheduling."""

    max_iteration_ms: float = 250.0
    """Longest iteration while only requests without a TPOT target decode."""
    idle_iteration_ms: float = 120.0
    """Longest iteration of finetuning alone: what a request that arrives meanwhile may have to wait."""
    max_batch_tokens: int = 1024
    min_prefill_tokens: int = 32
    """Prefill goes on at this rate even when decoding leaves no time, else new requests would starve."""
    min_finetune_share: float = 0.1
    """Share of the iteration that finetuning gets whenever no request is behind its target."""
    finetune_weight: float = 0.25
    """Value of a finetuning token; a draft node's value is its probability of being accepted."""
    safety: float = 0.9
    """Share of a request's slack that an iteration may use: predictions err, and messages take time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceView:
    """A running sequence. `num_uncomputed` tokens have no KV yet: one while decoding, more while prefilling.

    `decode_ms` is the time since its first token, `num_decoded` the tokens after the first one.
    """

    request_id: str
    num_uncomputed: int
    is_decoding: bool
    context_tokens: int
    arrived_at: float
    priority: int = 0
    """Lower is prefilled earlier."""
    num_decoded: int = 0
    max_remaining: int = 1
    decode_ms: float = 0.0
    tpot_ms: float | None = None
    first_token_due_at: float | None = None
    tokens_per_step: float = 1.0
    """Mean of its decode iterations so far; what drafts may be hoped to bring."""
    tree_probs: tuple[float, ...] = ()
    num_required: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobView:
    """A finetuning job with work to do: tokens still to forward, or (backward phase) token-layers to go back through."""

    job_id: str
    forward_tokens: int
    is_backward: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterationPlan:
    """`decode` maps request to its number of draft nodes, `prefill` to its number of prompt tokens.

    `forward` maps a job to training tokens of this pass, `backward` to whole-model token equivalents to go back through.
    """

    decode: dict[str, int]
    prefill: dict[str, int]
    forward: dict[str, int]
    backward: dict[str, int]
    limit_ms: float
    forward_ms: float
    """Predicted for the forward pass alone."""
    predicted_ms: float

    @property
    def num_tokens(self) -> int:
        """Rows of the fused forward pass."""
        return len(self.decode) + sum(self.decode.values()) + sum(self.prefill.values()) + sum(self.forward.values())


def plan_iteration(
    now: float, sequences: Seq[SequenceView], jobs: Seq[JobView], profile: LatencyProfile, limits: Limits
) -> IterationPlan:
    """The plan of the next iteration; see the module's docstring for the order of claims."""
    decoding = [view for view in sequences if view.is_decoding]
    waiting = sorted((view for view in sequences if not view.is_decoding), key=_prefill_order)
    context = sum(view.context_tokens for view in decoding)
    base_ms = predict_ms(profile, max(1, len(decoding)), context)
    limit_ms, is_behind = iteration_limit_ms(now, decoding, waiting, base_ms, limits)
    capacity = min(limits.max_batch_tokens, max_tokens(profile, limit_ms, limits.max_batch_tokens, context))
    required = _required_nodes(decoding, limits.max_batch_tokens - len(decoding))
    used = len(decoding) + sum(required.values())
    reserve = 0 if is_behind or not jobs else int(limits.min_finetune_share * capacity)
    prefill = _prefill_chunks(waiting, max(capacity - used - reserve, 0), used, limits)
    used += sum(prefill.values())
    room = (limits.max_batch_tokens if is_behind else capacity) - used - reserve
    nodes = _extra_nodes(decoding, required, room, limits.finetune_weight if jobs else 0.0)
    used += sum(nodes.values()) - sum(required.values())
    inference_ms = predict_ms(profile, used, context)
    share_ms = 0.0 if is_behind else limits.min_finetune_share * limit_ms
    spare_ms = max(limit_ms - inference_ms, share_ms)
    forward, backward = _finetuning(jobs, spare_ms, used, context, inference_ms, profile, limits)
    forward_ms = predict_ms(profile, used + sum(forward.values()), context)
    return IterationPlan(
        decode=nodes,
        prefill=prefill,
        forward=forward,
        backward=backward,
        limit_ms=limit_ms,
        forward_ms=forward_ms,
        predicted_ms=forward_ms + sum(backward.values()) * profile.backward_ms_per_token,
    )


def iteration_limit_ms(
    now: float, decoding: Seq[SequenceView], waiting: Seq[SequenceView], base_ms: float, limits: Limits
) -> tuple[float, bool]:
    """(T*, whether some decoding request that can still recover is behind its target)."""
    slacks = [slack for view in decoding if (slack := slack_ms(view, base_ms, limits)) is not None]
    is_behind = bool(slacks) and min(slacks) < base_ms
    slacks += [left for view in waiting if (left := first_token_slack_ms(now, view, limits)) is not None and left >= base_ms]
    usual_ms = limits.max_iteration_ms if decoding or waiting else limits.idle_iteration_ms
    return max(min([*slacks, usual_ms]), base_ms), is_behind


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


def _required_nodes(decoding: Seq[SequenceView], room: int) -> dict[str, int]:
    """Draft nodes that requests need for their SLO, as far as there is room: the planner keeps to it, late trees may not."""
    counts: dict[str, int] = {}
    for view in decoding:
        counts[view.request_id] = max(0, min(view.num_required, len(view.tree_probs), room))
        room -= counts[view.request_id]
    return counts


def _prefill_chunks(waiting: Seq[SequenceView], capacity: int, used: int, limits: Limits) -> dict[str, int]:
    left = min(max(capacity, limits.min_prefill_tokens), limits.max_batch_tokens - used)
    chunks: dict[str, int] = {}
    for view in waiting:
        if left <= 0:
            break
        chunks[view.request_id] = min(view.num_uncomputed, left)
        left -= chunks[view.request_id]
    return chunks


def _extra_nodes(decoding: Seq[SequenceView], required: dict[str, int], room: int, min_value: float) -> dict[str, int]:
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


def _finetuning(
    jobs: Seq[JobView],
    spare_ms: float,
    used: int,
    context: int,
    inference_ms: float,
    profile: LatencyProfile,
    limits: Limits,
) -> tuple[dict[str, int], dict[str, int]]:
    """Forward windows and backward work that fit into `spare_ms` beside `used` tokens; jobs share it evenly."""
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    if used == 0 and not all(job.is_backward for job in jobs):
        # Opening a pass costs far more than a row of it, so all jobs pay that together before they share the rest.
        inference_ms = predict_ms(profile, 1, context)
        spare_ms = max(spare_ms - inference_ms, 0.0)
    for i, job in enumerate(jobs):
        share_ms = spare_ms / (len(jobs) - i)
        if job.is_backward:
            per_token = profile.backward_ms_per_token
            backward[job.job_id] = int(share_ms / per_token) if per_token > 0 else limits.max_batch_tokens
            spare_ms -= backward[job.job_id] * per_token
            continue
        room = limits.max_batch_tokens - used
        rows = max_tokens(profile, inference_ms + share_ms, used + room, context) - used
        tokens = max(0, min(rows, room, job.forward_tokens))
        cost_ms = predict_ms(profile, used + tokens, context) - inference_ms
        forward[job.job_id] = tokens
        used += tokens
        inference_ms += max(cost_ms, 0.0)
        spare_ms -= max(cost_ms, 0.0)
    return {k: v for k, v in forward.items() if v > 0}, {k: v for k, v in backward.items() if v > 0}

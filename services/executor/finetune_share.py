"""How an iteration's spare time is shared among finetuning jobs: forward windows and backward work. Pure; knows no request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.latency import Rows, drafter_ms_per_token, max_rows, predict_ms
from common.messages import LatencyProfile

MIN_WINDOW_ALONE = 32
"""Rows of a window when nothing else is in the pass, whatever it is predicted to cost: while other processes hold the cores,
small passes take as long as larger ones, and windows that shrink with what was learned of them would never find that out.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobView:
    """A finetuning job with work to do: tokens still to forward, behind its `context_tokens`, or (backward phase) token-layers
    to go back through.
    """

    job_id: str
    forward_tokens: int
    is_backward: bool
    context_tokens: int = 0
    is_evaluation: bool = False
    """Nothing goes back after its forward pass."""
    is_drafter: bool = False
    """Backward it trains a drafter's head, which is counted in tokens of the model's forward pass."""
    in_flight: Rows | None = None
    """Of a forward pass that goes in units: its backward work is the rest of that, in tokens of it."""

    @property
    def is_interruptible(self) -> bool:
        """Whether all that it does alone can go in units, and stop between them."""
        return not self.is_evaluation and not self.is_drafter

    def back_ms_per_token(self, profile: LatencyProfile) -> float:
        """Of its backward work."""
        if self.in_flight is not None:
            return predict_ms(profile, self.in_flight) / self.in_flight.tokens
        return drafter_ms_per_token(profile) if self.is_drafter else profile.backward_ms_per_token


class UnitSize(NamedTuple):
    """The most that a unit of work does before it is asked what came in: in tokens of a whole pass, or of all the way back."""

    forward: float = math.inf
    backward: float = math.inf


WHOLE = UnitSize()
"""No bound, for work that nobody waits for."""


def unit_size(unit_ms: float, jobs: Sequence[JobView], rows: Rows, profile: LatencyProfile) -> UnitSize:
    """Units of about so many ms, of the passes that are on their way, of one of `rows`, and of backward work."""
    passes = [job.in_flight for job in jobs if job.in_flight is not None] + ([rows] if rows.tokens else [])
    forward_ms = max((predict_ms(profile, each) / each.tokens for each in passes), default=0.0)
    back_ms = profile.backward_ms_per_token
    return UnitSize(unit_ms / forward_ms if forward_ms > 0 else math.inf, unit_ms / back_ms if back_ms > 0 else math.inf)


def backward_ms(jobs: Sequence[JobView], backward: Mapping[str, float], profile: LatencyProfile) -> float:
    """Predicted of a plan's backward work."""
    return sum(backward.get(job.job_id, 0.0) * job.back_ms_per_token(profile) for job in jobs)


def share_out(
    jobs: Sequence[JobView],
    spare_ms: float,
    back_ms: float,
    is_owed: bool,
    rows: Rows,
    profile: LatencyProfile,
    max_batch_tokens: int,
) -> tuple[dict[str, int], dict[str, float], Rows]:
    """Forward windows and backward work that fit into `spare_ms` beside `rows`, and the rows then; jobs share it evenly.

    Backward work gets at most `back_ms`. When finetuning `is_owed` its share, a window has a row even if that costs more: else
    a share below it would starve the job; and MIN_WINDOW_ALONE rows without requests.
    """
    forward: dict[str, int] = {}
    backward: dict[str, float] = {}
    spent_ms = predict_ms(profile, rows)
    is_alone = rows.tokens == 0
    if is_alone and not all(job.is_backward for job in jobs):
        # Opening a pass costs far more than a row of it, so all jobs pay that together before they share the rest.
        spent_ms = predict_ms(profile, Rows(1))
        spare_ms = max(spare_ms - spent_ms, 0.0)
    for i, job in enumerate(jobs):
        share_ms = spare_ms / (len(jobs) - i)
        if job.is_backward:
            per_token = job.back_ms_per_token(profile)
            back_share_ms = min(share_ms, back_ms)
            backward[job.job_id] = back_share_ms / per_token if per_token > 0 else max_batch_tokens
            spare_ms -= back_share_ms
            back_ms -= back_share_ms
            continue
        room = min(max_batch_tokens - rows.tokens, job.forward_tokens)
        tokens = max_rows(profile, spent_ms + share_ms, room, rows, job.context_tokens)
        if is_owed and not any(forward.values()):
            tokens = max(tokens, min(room, MIN_WINDOW_ALONE if is_alone else 1))
        rows = rows.with_segment(tokens, job.context_tokens)
        cost_ms = max(predict_ms(profile, rows) - spent_ms, 0.0)
        forward[job.job_id] = tokens
        spent_ms += cost_ms
        spare_ms -= cost_ms
    return {k: v for k, v in forward.items() if v > 0}, {k: v for k, v in backward.items() if v > 0}, rows

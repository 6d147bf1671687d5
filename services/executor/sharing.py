"""Whose turn the next iteration is: finetuning shares it with inference, or they take turns. Pure; knows no job's content.

`token` is Heddle's own: both in every iteration. The others are what FlexLLM was compared with (dossier 5.5), in this engine:
`temporal:N` is N iterations of inference, then a whole mini-batch (its sequences forward and all the way back) while inference
waits; `dynamic` chooses N anew by the prompts that wait and the rate of arrivals, by a rule of ours: theirs is not published.
A mini-batch is what a job has in work at once. Without requests there is no turn to wait for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from common.latency import Rows, predict_ms
from common.messages import LatencyProfile
from common.sharing import TOKEN, Sharing
from services.executor.finetune_share import JobView
from services.executor.scheduler import IterationPlan, plan_iteration
from services.executor.views import Limits, SequenceView

DYNAMIC_FREQUENCIES = (64, 512)
"""The most and the least frequent mini-batches of `dynamic`: those of the fixed frequencies that it is compared with."""
ARRIVAL_WINDOW_S = 10.0
MAX_ARRIVALS = 1024
WHOLE_MS = 1e7
"""An iteration as long as a mini-batch takes."""


class Turns(NamedTuple):
    """What of past iterations the next one's turn depends on."""

    sharing: Sharing = TOKEN
    num_starved: int = 0
    """The last plan's."""
    num_served: int = 0
    """Inference iterations since the last mini-batch."""
    is_training: bool = False
    """A mini-batch is in work, and inference waits."""
    num_forwarded: int = 0
    """Its tokens so far."""
    arrivals: tuple[float, ...] = ()
    """When requests came in the last ARRIVAL_WINDOW_S."""


def plan_turn(
    now: float,
    sequences: Sequence[SequenceView],
    jobs: Sequence[JobView],
    profile: LatencyProfile,
    limits: Limits,
    turns: Turns,
) -> tuple[IterationPlan, Turns]:
    """The plan of the next iteration, and what the one after it is to know."""
    if turns.sharing.name == "token":
        plan = plan_iteration(now, sequences, jobs, profile, limits, turns.num_starved)
        return plan, turns._replace(num_starved=plan.num_starved)
    turns = turns._replace(arrivals=recent_arrivals(now, sequences, turns.arrivals))
    frequency = turns.sharing.frequency or dynamic_frequency(sequences, jobs, profile, turns.arrivals)
    if jobs and (turns.is_training or not sequences or turns.num_served >= frequency):
        return _mini_batch(now, jobs, profile, limits, turns)
    plan = plan_iteration(now, sequences, [], profile, limits, turns.num_starved)
    num_served = turns.num_served + bool(sequences)
    return plan, turns._replace(num_starved=plan.num_starved, num_served=num_served, is_training=False, num_forwarded=0)


def dynamic_frequency(
    sequences: Sequence[SequenceView], jobs: Sequence[JobView], profile: LatencyProfile, arrivals: Sequence[float]
) -> int:
    """Inference iterations per mini-batch: twice as many for each request that a mini-batch would keep waiting.

    These are the prompts that wait now, and those that are to be expected while it runs.
    """
    num_tokens = sum(job.forward_tokens for job in jobs)
    batch_ms = predict_ms(profile, Rows(num_tokens)) + num_tokens * profile.backward_ms_per_token
    num_waiting = sum(not view.is_decoding for view in sequences)
    num_expected = len(arrivals) / ARRIVAL_WINDOW_S * batch_ms / 1e3
    most, least = DYNAMIC_FREQUENCIES
    return min(least, round(most * math.exp2(min(num_waiting + num_expected, 16.0))))


def recent_arrivals(now: float, sequences: Sequence[SequenceView], known: Sequence[float]) -> tuple[float, ...]:
    """Arrivals of the window's length before now: those that are known, and of the sequences those that came after them."""
    newest = known[-1] if known else -1.0
    fresh = sorted(view.arrived_at for view in sequences if view.arrived_at > newest)
    return tuple(at for at in (*known, *fresh) if at > now - ARRIVAL_WINDOW_S)[-MAX_ARRIVALS:]


def _mini_batch(
    now: float, jobs: Sequence[JobView], profile: LatencyProfile, limits: Limits, turns: Turns
) -> tuple[IterationPlan, Turns]:
    """The next part of a mini-batch: forward as long as there is something to forward, then all the way back."""
    forward = [job for job in jobs if not job.is_backward]
    is_last = all(job.is_evaluation for job in forward)
    back = [job for job in jobs if job.is_backward]
    chosen = back if is_last and back else forward
    limits = dataclasses.replace(limits, idle_iteration_ms=WHOLE_MS, interruptible_ms=0.0)
    plan = plan_iteration(now, [], chosen, profile, limits)
    num_forwarded = turns.num_forwarded + sum(plan.forward.values())
    back_ms = num_forwarded * profile.backward_ms_per_token if plan.backward else 0.0
    plan = dataclasses.replace(plan, limit_ms=plan.forward_ms + back_ms, predicted_ms=plan.forward_ms + back_ms)
    if is_last:
        return plan, turns._replace(num_served=0, is_training=False, num_forwarded=0)
    return plan, turns._replace(is_training=True, num_forwarded=num_forwarded)

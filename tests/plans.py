"""Views of sequences and jobs for the tests of the scheduler, by hand and at random."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from typing import Any

from common.latency import Rows, make_profile
from common.messages import LatencyProfile
from services.executor.finetune_share import JobView
from services.executor.scheduler import IterationPlan, plan_iteration
from services.executor.views import Limits, SequenceView

LINEAR = LatencyProfile(points=((1, 10.1), (1001, 110.1)), backward_ms_per_token=0.2)
"""10 ms, and 0.1 ms per token."""
JOB = JobView(job_id="job", forward_tokens=100_000, is_backward=False)
BACKWARD = dataclasses.replace(JOB, job_id="back", is_backward=True)


def decoding(request_id: str = "d", **fields: Any) -> SequenceView:
    values: dict[str, Any] = {"num_uncomputed": 1, "is_decoding": True, "context_tokens": 50, "arrived_at": 0.0}
    return SequenceView(request_id=request_id, **(values | {"num_decoded": 10, "max_remaining": 20} | fields))


def waiting(request_id: str, num_tokens: int, **fields: Any) -> SequenceView:
    values: dict[str, Any] = {"is_decoding": False, "context_tokens": 0, "arrived_at": 0.0}
    return SequenceView(request_id=request_id, num_uncomputed=num_tokens, **(values | fields))


def plan(
    *views: SequenceView | JobView, profile: LatencyProfile = LINEAR, num_starved: int = 0, **limits: Any
) -> IterationPlan:
    sequences = [view for view in views if isinstance(view, SequenceView)]
    jobs = [view for view in views if isinstance(view, JobView)]
    return plan_iteration(0.0, sequences, jobs, profile, Limits(**limits), num_starved)


@dataclasses.dataclass(frozen=True)
class Case:
    sequences: list[SequenceView]
    jobs: list[JobView]
    profile: LatencyProfile
    limits: Limits
    num_starved: int

    @functools.cached_property
    def plan(self) -> IterationPlan:
        return plan_iteration(0.0, self.sequences, self.jobs, self.profile, self.limits, self.num_starved)

    @property
    def decoding(self) -> list[SequenceView]:
        return [view for view in self.sequences if view.is_decoding]

    @property
    def waiting(self) -> list[SequenceView]:
        return [view for view in self.sequences if not view.is_decoding]

    def rows(self, nodes: dict[str, int], prefill: dict[str, int], forward: dict[str, int] | None = None) -> Rows:
        """What a pass of these draft nodes, prompt tokens and training tokens costs by."""
        rows = Rows()
        for view in self.decoding:
            rows = rows.with_segment(1 + nodes.get(view.request_id, 0), view.context_tokens)
        for view in self.waiting:
            rows = rows.with_segment(prefill.get(view.request_id, 0), view.context_tokens, view.num_unscored)
        for job in self.jobs:
            rows = rows.with_segment((forward or {}).get(job.job_id, 0), job.context_tokens)
        return rows


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    sequences = [random_sequence(f"r{i}", rng) for i in range(rng.choice([0, 1, 3, 12]))]
    jobs = [
        JobView(
            job_id=f"j{i}",
            forward_tokens=rng.randint(1, 800),
            is_backward=rng.random() < 0.5,
            context_tokens=rng.choice([0, rng.randint(1, 3000)]),
        )
        for i in range(rng.choice([0, 1, 1, 3]))
    ]
    measured = list(itertools.accumulate((rng.uniform(0.1, 30) for _ in range(4)), initial=rng.uniform(1, 40)))
    profile = make_profile(
        list(zip((1, 16, 64, 256, 1024), measured, strict=True)),
        ms_per_context_token=rng.choice([0.0, rng.uniform(0.0, 0.002)]),
        ms_per_row_context=rng.choice([0.0, rng.uniform(0.0, 0.0002)]),
        ms_per_scored_row=rng.choice([0.0, rng.uniform(0.0, 0.5)]),
        backward_ms_per_token=rng.uniform(0.01, 1),
    )
    limits = Limits(
        max_batch_tokens=rng.choice([16, 64, 512]),
        min_prefill_tokens=rng.choice([1, 32]),
        max_iteration_ms=rng.uniform(20, 250),
        idle_iteration_ms=rng.uniform(20, 150),
    )
    return Case(sequences, jobs, profile, limits, rng.choice([0, limits.max_prefill_gap - 1, limits.max_prefill_gap]))


def random_sequence(request_id: str, rng: random.Random) -> SequenceView:
    due = rng.choice([None, rng.uniform(0, 10)])
    if rng.random() < 0.4:
        context = rng.choice([0, rng.randint(1, 6000)])
        fields = {"arrived_at": rng.uniform(0, 10), "first_token_due_at": due, "context_tokens": context}
        num_tokens = rng.randint(1, 300)
        return waiting(request_id, num_tokens, num_unscored=rng.choice([0, 0, num_tokens - 1, num_tokens // 2]), **fields)
    probs = tuple(sorted((rng.random() for _ in range(rng.randint(0, 8))), reverse=True))
    num_decoded, tpot_ms = rng.randint(0, 30), rng.choice([None, rng.uniform(5, 200)])
    return decoding(
        request_id,
        context_tokens=rng.randint(1, 500),
        num_decoded=num_decoded,
        decode_ms=num_decoded * rng.uniform(5, 100),
        max_remaining=rng.randint(1, 100),
        tpot_ms=tpot_ms,
        tree_probs=probs,
        num_required=rng.randint(0, 10),
    )

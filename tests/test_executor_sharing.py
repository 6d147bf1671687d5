"""Finetuning and inference in turns, which token-level sharing is compared with: on plain values and on an engine."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest

from common.config import ConfigError
from common.messages import LoraSpec, OptimizerStep
from common.sharing import Sharing, parse_sharing
from services.executor.config import ExecutorConfig
from services.executor.finetune import new_job
from services.executor.finetune_share import JobView
from services.executor.scheduler import IterationPlan, plan_iteration
from services.executor.sharing import Turns, dynamic_frequency, plan_turn, recent_arrivals
from services.executor.views import Limits, SequenceView
from tests.helpers import training_slice
from tests.plans import JOB, LINEAR, decoding, waiting
from tests.tiny import NUM_TOKENS, Driver, all_requests, random_prompt, tiny_engine, tiny_pair

GROUP = JobView(job_id="job", forward_tokens=600, is_backward=False)
GROUP_BACK = dataclasses.replace(GROUP, forward_tokens=0, is_backward=True)
EVALUATION = JobView(job_id="job/evaluation", forward_tokens=300, is_backward=False, is_evaluation=True)
LIMITS = Limits(max_batch_tokens=400)


class Life:
    """Plans one iteration after another; the job's group goes forward and back as they say."""

    def __init__(self, sharing: str, group: JobView = GROUP) -> None:
        self.turns = Turns(parse_sharing(sharing))
        self._group = self._job = group
        self.now = 0.0

    def plan(self, *sequences: SequenceView) -> IterationPlan:
        plan, self.turns = plan_turn(self.now, sequences, [self._job], LINEAR, LIMITS, self.turns)
        left = self._job.forward_tokens - sum(plan.forward.values())
        self._job = dataclasses.replace(self._job, forward_tokens=left, is_backward=left == 0)
        if plan.backward or (left == 0 and self._job.is_evaluation):
            self._job = self._group
        return plan


def kind(plan: IterationPlan) -> str:
    training = "forward" if plan.forward else "backward" if plan.backward else ""
    return training if not plan.decode else f"{training} beside inference" if training else "inference"


def test_after_its_iterations_of_inference_comes_a_whole_mini_batch() -> None:
    life = Life("temporal:3")
    kinds = [kind(life.plan(decoding(tpot_ms=150.0))) for _ in range(12)]
    assert kinds == [*["inference"] * 3, "forward", "forward", "backward"] * 2, "600 tokens are two passes of at most 400"


def test_all_of_a_mini_batch_is_planned_whatever_it_costs_the_requests() -> None:
    life = Life("temporal:1")
    plans = [life.plan(decoding(tpot_ms=20.0), waiting("w", 5)) for _ in range(4)]
    assert [plan.forward for plan in plans] == [{}, {"job": 400}, {"job": 200}, {}]
    assert plans[3].backward["job"] >= GROUP.forward_tokens
    assert plans[3].predicted_ms == pytest.approx(600 * LINEAR.backward_ms_per_token)


def test_without_requests_there_is_no_turn_to_wait_for() -> None:
    life = Life("temporal:512")
    assert [kind(life.plan()) for _ in range(6)] == ["forward", "forward", "backward"] * 2
    assert kind(life.plan()) == "forward"
    assert [kind(life.plan(decoding())) for _ in range(4)] == ["forward", "backward", "inference", "inference"]


def test_a_validation_sequence_is_a_mini_batch_of_its_own() -> None:
    life = Life("temporal:2", EVALUATION)
    assert [kind(life.plan(decoding())) for _ in range(6)] == ["inference", "inference", "forward"] * 2


def test_token_level_sharing_is_the_plan_of_the_scheduler() -> None:
    views = [decoding(tpot_ms=100.0), waiting("w", 30)]
    plan, turns = plan_turn(1.0, views, [JOB], LINEAR, LIMITS, Turns())
    assert plan == plan_iteration(1.0, views, [JOB], LINEAR, LIMITS)
    assert plan.decode
    assert plan.forward
    assert turns == Turns(num_starved=plan.num_starved)


def test_dynamic_sharing_gives_way_to_prompts_that_wait_and_to_a_rate_of_arrivals() -> None:
    def frequency(num_waiting: int, num_arrivals: int) -> int:
        views = [decoding(), *(waiting(str(i), 50) for i in range(num_waiting))]
        return dynamic_frequency(views, [GROUP], LINEAR, [0.0] * num_arrivals)

    assert frequency(0, 0) == 64
    assert frequency(1, 0) == 128
    assert frequency(9, 0) == frequency(0, 10_000) == 512
    by_rate = [frequency(0, num) for num in (0, 20, 40, 80, 160)]
    assert by_rate == sorted(set(by_rate))


def test_arrivals_are_counted_once_and_forgotten_after_the_window() -> None:
    first = recent_arrivals(10.0, [waiting("a", 5, arrived_at=9.0), waiting("b", 5, arrived_at=8.0)], ())
    assert first == (8.0, 9.0)
    again = recent_arrivals(11.0, [decoding("a", arrived_at=9.0), waiting("c", 5, arrived_at=10.5)], first)
    assert again == (8.0, 9.0, 10.5)
    assert recent_arrivals(18.5, [], again) == (9.0, 10.5)


def test_spellings() -> None:
    assert parse_sharing("token") == Sharing()
    assert parse_sharing("dynamic") == Sharing("dynamic")
    assert parse_sharing("temporal:64") == Sharing("temporal", 64)
    for text in ("", "temporal", "temporal:0", "temporal:-1", "temporal:10000000", "spatial"):
        with pytest.raises(ValueError, match="temporal:N"):
            parse_sharing(text)
    with pytest.raises(ConfigError, match="finetune_sharing must be token, dynamic or temporal:N"):
        ExecutorConfig(model_dir="m", finetune_sharing="temporal:x")


def test_turns_change_neither_answers_nor_losses() -> None:
    losses, answers = {}, {}
    for sharing in ("token", "temporal:2"):
        engine = tiny_engine(copy.copy(tiny_pair()[1]), num_pages=512, sharing=parse_sharing(sharing))
        engine.training.open(new_job("job", LoraSpec(rank=2), 0, engine.decoder, engine.cache), lease=1)
        for step, index in itertools.product(range(3), range(2)):
            update = OptimizerStep(learning_rate=1e-2) if index else None
            engine.training.accept(training_slice(random_prompt(20, seed=step), step=step, index=index, optimizer=update))
        for request in all_requests():
            assert engine.submit(request, None) is None
        driver = Driver(engine)
        streams = driver.run()
        answers[sharing] = dict(streams.tokens)
        losses[sharing] = [event.step.loss for event in driver.events if event.step]
        mixed = [i for i in driver.iterations if i.decode_tokens and i.finetune_tokens]
        assert bool(mixed) == (sharing == "token")
    assert len(losses["token"]) == 3
    assert losses["temporal:2"] == pytest.approx(losses["token"], rel=1e-5)
    assert answers["temporal:2"] == answers["token"]
    assert all(len(tokens) == NUM_TOKENS for tokens in answers["token"].values())

"""Order, batches, weights and learning rates of a job's steps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from common.messages import OptimizerStep
from services.trainer.dataset import TrainingSequence
from services.trainer.schedule import StepPlan, epoch_order, learning_rate_factor, make_slices, optimizer_step, plan_steps
from services.trainer.spec import JobSpec, Scheduler

PLAN = StepPlan(num_sequences=10, batch_size=4, n_epochs=3, seed=7)


def test_every_epoch_holds_every_sequence_once() -> None:
    assert (PLAN.steps_per_epoch, PLAN.total_steps) == (3, 9)
    for epoch in range(3):
        batches = [PLAN.batch(3 * epoch + position) for position in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(index for batch in batches for index in batch) == list(range(10))


def test_order_depends_on_seed_and_epoch_only() -> None:
    orders = {epoch_order(10, seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    epoch_order.cache_clear()
    assert epoch_order(10, 7, 0) == (2, 4, 5, 7, 8, 1, 6, 9, 0, 3)


def test_order_is_fair() -> None:
    first = Counter(epoch_order(4, seed, 0)[0] for seed in range(400))
    assert all(60 < first[index] < 140 for index in range(4))


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (12, 10), (1, 1), (0, 1)])
def test_learning_rates_are_those_of_transformers(scheduler: Scheduler, warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    make: Any = {
        "constant": lambda o: optimization.get_constant_schedule_with_warmup(o, warmup),
        "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, warmup, total),
        "cosine": lambda o: optimization.get_cosine_schedule_with_warmup(o, warmup, total),
    }[scheduler]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make(optimizer)
    for step in range(total):
        assert 0.5 * learning_rate_factor(scheduler, step, warmup, total) == pytest.approx(schedule.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        schedule.step()


def test_learning_rates_by_hand() -> None:
    def rates(scheduler: Scheduler) -> list[float]:
        return [learning_rate_factor(scheduler, step, 2, 6) for step in range(6)]

    assert rates("constant") == [0, 0.5, 1, 1, 1, 1]
    assert rates("linear") == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_the_multiplier_scales_the_learning_rate() -> None:
    spec = JobSpec(
        model="m", training_file="f", seed=0, learning_rate_multiplier=3.0, base_learning_rate=1e-3, scheduler="linear",
        weight_decay=0.1, max_grad_norm=0.5,
    )  # fmt: skip
    expected = OptimizerStep(learning_rate=1.5e-3, weight_decay=0.1, max_grad_norm=0.5)
    update = optimizer_step(spec, 5, 10)
    assert update.learning_rate == pytest.approx(expected.learning_rate)
    assert (update.weight_decay, update.max_grad_norm) == (0.1, 0.5)
    assert plan_steps(spec, 9) == StepPlan(num_sequences=9, batch_size=4, n_epochs=3, seed=0)


def test_slices_weigh_every_trained_token_of_a_step_the_same() -> None:
    sequences = [TrainingSequence((1, 2, 3), (False, False, True)), TrainingSequence((4, 5, 6, 7), (False, True, True, True))]
    update = OptimizerStep(learning_rate=0.1)
    slices = make_slices("job", 2, 5, sequences, update)
    assert [item.weights for item in slices] == [(0.0, 0.0, 0.25), (0.0, 0.25, 0.25, 0.25)]
    assert [(item.step, item.index, item.lease, item.tokens) for item in slices] == [
        (5, 0, 2, (1, 2, 3)),
        (5, 1, 2, (4, 5, 6, 7)),
    ]
    assert [item.optimizer for item in slices] == [None, update]

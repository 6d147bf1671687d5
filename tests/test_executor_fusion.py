"""One pass for decoding, drafts, prefill and finetuning: none of the four changes what the others compute."""

from __future__ import annotations

import functools

import msgspec
import pytest
import safetensors.torch
from torch import Tensor
from torch.testing import assert_close

from common.messages import DraftTree, LoraSpec, OptimizerStep, Slo, TrainingSlice
from services.executor.engine import Engine, Iteration
from services.executor.finetune import new_job
from services.executor.job_steps import StepResult
from services.executor.sequences import Sequence
from services.executor.views import Limits
from tests.drafts import Draft, oracle_draft
from tests.helpers import training_slice
from tests.tiny import Driver, greedy, random_prompt, tiny_engine, tiny_pair, tiny_request

LENGTHS = {"r0": 5, "r1": 40, "r2": 64, "r3": 17, "r4": 80}
NUM_TOKENS = 16
LIMITS = Limits(max_batch_tokens=48, min_prefill_tokens=4)
STEP = OptimizerStep(learning_rate=1e-2, weight_decay=0.1)
SLICES = [
    training_slice(random_prompt(23, seed=1), step=0, index=0),
    training_slice(random_prompt(60, seed=2), step=0, index=1, optimizer=STEP),
    training_slice(random_prompt(41, seed=3), step=1, index=0, optimizer=STEP),
]


@functools.cache
def truth() -> dict[str, list[int]]:
    model, _ = tiny_pair()
    return {name: greedy(model, random_prompt(n, seed=n), NUM_TOKENS) for name, n in LENGTHS.items()}


def open_job(engine: Engine, job_id: str = "job", slices: list[TrainingSlice] | None = None) -> None:
    engine.training.open(new_job(job_id, LoraSpec(rank=4, alpha=8.0), 7, engine.decoder, engine.cache), lease=1)
    for item in slices or SLICES:
        fields = {name: getattr(item, name) for name in item.__struct_fields__} | {"job_id": job_id}
        engine.training.accept(TrainingSlice(**fields))


def submit(engine: Engine) -> None:
    for i, (name, n) in enumerate(LENGTHS.items()):
        engine.submit(tiny_request(name, random_prompt(n, seed=n), NUM_TOKENS, arrived_at=float(i)), None)


def state(engine: Engine, job_id: str = "job") -> dict[str, Tensor]:
    """Adapter and moments of a job: after one step, the first moment is a tenth of the gradient."""
    job = engine.training.held(job_id, 1)
    assert job is not None
    return safetensors.torch.load(job.checkpoint())


def steps(driver: Driver, job_id: str = "job") -> list[StepResult]:
    return [event.step for event in driver.events if event.step is not None and event.job_id == job_id]


@functools.cache
def trained_alone() -> tuple[list[StepResult], dict[str, Tensor]]:
    engine = tiny_engine(tiny_pair()[1], num_pages=128)
    open_job(engine)
    driver = Driver(engine)
    driver.run()
    return steps(driver), state(engine)


def urgent(draft: Draft, num_required: int) -> Draft:
    """The same trees, some nodes of which are required for an SLO: these come before prefill."""

    def with_requirement(sequence: Sequence) -> DraftTree | None:
        tree = draft(sequence)
        return None if tree is None else msgspec.structs.replace(tree, num_required=num_required)

    return with_requirement


def holds_all_four(iteration: Iteration) -> bool:
    counts = (iteration.decode_tokens, iteration.draft_tokens, iteration.prefill_tokens, iteration.finetune_tokens)
    return min(counts) > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_pass_that_holds_all_four_kinds_of_tokens(seed: int) -> None:
    engine = tiny_engine(tiny_pair()[1], num_pages=128, limits=LIMITS)
    driver = Driver(engine, urgent(oracle_draft(truth(), seed, max_depth=3), 2))
    submit(engine)
    open_job(engine)
    streams = driver.run()
    assert sum(map(holds_all_four, driver.iterations)) >= 3
    assert max(iteration.decode_tokens + iteration.draft_tokens for iteration in driver.iterations) > 10
    assert streams.tokens == truth(), "training changed what was generated"
    expected_steps, expected_state = trained_alone()
    assert [step.num_tokens for step in steps(driver)] == [22 + 59, 40]
    for actual, expected in zip(steps(driver), expected_steps, strict=True):
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert (actual.step, actual.num_tokens, actual.num_sequence_tokens, actual.num_correct) == (
            expected.step,
            expected.num_tokens,
            expected.num_sequence_tokens,
            expected.num_correct,
        )
    actual_state = state(engine)
    for name, tensor in expected_state.items():
        # AdamW divides a gradient by its own size, so rounding of the smallest ones moves weights by a part of a step.
        atol = 1e-5 if name.startswith("exp_avg") else 0.01 * STEP.learning_rate
        assert_close(actual_state[name], tensor, rtol=1e-5, atol=atol)
    assert expected_steps[0].grad_norm > 0.1
    assert engine.pages.num_free == engine.pages.num_pages


def test_windows_of_a_sequence_are_spread_over_passes() -> None:
    engine = tiny_engine(tiny_pair()[1], num_pages=128, limits=LIMITS)
    driver = Driver(engine)
    submit(engine)
    open_job(engine)
    driver.run()
    windows = [iteration.finetune_tokens for iteration in driver.iterations if iteration.finetune_tokens]
    assert sum(windows) == 22 + 59 + 40
    assert len(windows) > 3, "so that the comparison above is one of windows with whole sequences"


def test_jobs_side_by_side_train_as_if_alone() -> None:
    engine = tiny_engine(tiny_pair()[1], num_pages=192, limits=LIMITS)
    driver = Driver(engine, oracle_draft(truth(), 1))
    submit(engine)
    for job_id in ("one", "two"):
        open_job(engine, job_id)
    driver.run()
    expected_steps, _ = trained_alone()
    for job_id in ("one", "two"):
        assert [step.loss for step in steps(driver, job_id)] == pytest.approx([step.loss for step in expected_steps], rel=1e-5)


def test_a_request_that_is_behind_its_target_stops_training_until_it_has_caught_up() -> None:
    """A pass takes 5 ms, the target is 7 ms a token, and the request has lost 20 ms."""
    now = [1000.0]
    engine = tiny_engine(tiny_pair()[1], num_pages=128, clock=lambda: now[0])
    driver = Driver(engine)
    engine.submit(tiny_request("r", random_prompt(5, seed=5), 200, slo=Slo(tpot_ms=7.0)), None)
    driver.step()
    now[0] += 0.020
    open_job(engine)
    counts = []
    for _ in range(30):
        counts.append(driver.step().finetune_tokens)
        now[0] += 0.005
    assert counts[:10] == [0] * 10
    assert sum(counts) > 0
    assert driver.run().tokens["r"][:NUM_TOKENS] == truth()["r0"]


def test_a_job_that_diverges_frees_its_pages_and_hurts_nobody() -> None:
    engine = tiny_engine(tiny_pair()[1], num_pages=128, limits=LIMITS)
    driver = Driver(engine)
    submit(engine)
    bad = training_slice(random_prompt(20), weights=(0.0, *[3e38] * 19), optimizer=STEP)
    open_job(engine, "bad", [bad])
    open_job(engine, "good")
    assert driver.run().tokens == truth()
    (failure,) = [event for event in driver.events if event.failure]
    assert (failure.job_id, failure.lease) == ("bad", 1)
    assert "inf" in failure.failure
    assert engine.training.lease("bad") is None
    assert len(steps(driver, "good")) == 2
    assert engine.pages.num_free == engine.pages.num_pages


def out_of_memory(*_: object) -> None:
    raise MemoryError("no room")


@pytest.mark.parametrize("where", ["start_next", "cursors"])
def test_a_failing_job_ends_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder = tiny_pair()
    engine = tiny_engine(decoder)
    open_job(engine)
    open_job(engine, "other")
    submit(engine)
    failing = engine.training.held("job", 1)
    assert failing is not None
    monkeypatch.setattr(failing, where, out_of_memory)
    driver = Driver(engine)
    driver.run()
    assert driver.streams.tokens == truth()
    (failure,) = [event for event in driver.events if event.failure]
    assert (failure.job_id, failure.lease, failure.failure) == ("job", 1, "no room")
    assert len(steps(driver, "other")) == 2
    assert engine.training.held("job", 1) is None
    engine.training.close_all()
    assert engine.pages.num_free == engine.pages.num_pages

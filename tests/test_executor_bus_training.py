"""A trainer's orders to an executor over a real bus: jobs, leases, slices, steps, checkpoints, jobs that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from common import subjects
from common.artifacts import read_object
from common.messages import (
    AdapterChecked,
    AdapterRecord,
    CheckAdapter,
    CheckpointWritten,
    CloseJob,
    JobClosed,
    JobFailed,
    JobOpened,
    LoraSpec,
    OptimizerStep,
    Rejected,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)
from services.executor import training_link
from services.executor.lora import LoraAdapter
from tests.executor_stage import MODEL, TIMEOUT_S, Connect, Gate, Stage, known_profile, open_job, running_executor, write_model
from tests.tiny import NUM_TOKENS, PROMPTS, random_prompt, tiny_request, truth

OPTIMIZER = OptimizerStep(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir, max_jobs=2) as stage:
        yield stage


async def test_a_job_without_ranks_is_under_no_limit_of_ranks(
    connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    scales = LoraSpec(method="ia3", target_modules=("k_proj",))
    async with running_executor(connect, model_dir, max_lora_rank=4) as stage:
        refused = await stage.order(open_job(lora=LoraSpec(rank=5)))
        assert refused.message.startswith("lora.rank 5 is over max_lora_rank 4")
        wide = LoraSpec(method="bottleneck", rank=5, non_linearity="relu", target_modules=("o_proj",))
        assert (await stage.order(open_job(lora=wide))).message == refused.message
        assert isinstance(await stage.order(open_job(lora=scales)), JobOpened)
        written = await stage.order(WriteCheckpoint(job_id="job", lease=1, artifact="vectors"))
        assert isinstance(written, CheckpointWritten)
        record = AdapterRecord(name="x", base_model=MODEL, created_at=1.0, artifact="vectors", lora=scales)
        either: Any = AdapterChecked | Rejected
        checked = await stage.client.request(subjects.check_adapter(MODEL), CheckAdapter(record=record), either)
        assert isinstance(checked, AdapterChecked), checked


def make_slice(step: int, index: int = 0, *, seed: int = 0, **fields: Any) -> TrainingSlice:
    """A sequence of 40 tokens; it ends its step unless told otherwise."""
    tokens = random_prompt(40, seed)
    values: dict[str, Any] = {
        "job_id": "job",
        "lease": 1,
        "tokens": tokens,
        "weights": (0.0, *[1.0 / 39] * 39),
        "optimizer": OPTIMIZER,
    } | fields
    return TrainingSlice(step=step, index=index, **values)


async def train(stage: Stage, steps: Sequence[int], **fields: Any) -> list[StepDone]:
    """Steps of one slice each, as they were reported."""
    done: list[StepDone] = []
    for step in steps:
        await accepted(stage, make_slice(step, seed=step, **fields))
        key = (step, fields.get("lease", 1))
        report = await stage.progress.first(partial(_is_step, key))
        assert isinstance(report, StepDone)
        done.append(report)
    return done


def _is_step(key: tuple[int, int], event: StepDone | SequenceEvaluated | JobFailed) -> bool:
    return isinstance(event, StepDone) and (event.step, event.lease) == key


async def accepted(stage: Stage, item: TrainingSlice) -> None:
    """The slice is taken."""
    assert await stage.order(item) == SliceAccepted(job_id=item.job_id, step=item.step, index=item.index)


async def opened(stage: Stage, step: int = 0, **fields: Any) -> None:
    """The job is opened at this step."""
    order = open_job(**fields)
    assert await stage.order(order) == JobOpened(job_id=order.job_id, executor_id=stage.executor_id, step=step)


async def refused(stage: Stage, order: Any, reason: str) -> Rejected:
    """The order is refused for this reason."""
    answer = await stage.order(order)
    assert isinstance(answer, Rejected)
    assert answer.reason == reason
    assert answer.message
    return answer


async def test_steps_are_trained_and_reported(stage: Stage) -> None:
    await opened(stage)
    await accepted(stage, make_slice(0, 0, optimizer=None))
    await accepted(stage, make_slice(0, 1, seed=1))
    (first,) = await stage.progress.hold(1)
    assert isinstance(first, StepDone)
    assert (first.job_id, first.lease, first.step) == ("job", 1, 0)
    assert (first.num_tokens, first.num_sequence_tokens) == (78, 80)
    assert first.loss > 0 < first.grad_norm
    assert first.elapsed_ms > 0
    await accepted(stage, make_slice(0, 1, seed=1))
    again = [make_slice(step, seed=0) for step in range(1, 7)]
    for item in again:
        await accepted(stage, item)
    steps = await stage.progress.hold(7)
    losses = [step.loss for step in steps[1:] if isinstance(step, StepDone)]
    assert [step.step for step in steps if isinstance(step, StepDone)] == list(range(7)), "a repeated slice trained again"
    assert losses[-1] < losses[0]
    await stage.settled()
    assert stage.counters()["finetune_tokens"] == 39 * 8
    assert stage.actor.vitals().gauges["jobs"] == 1
    assert stage.load.free_pages == stage.load.num_pages


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora": LoraSpec(rank=0)}, "invalid"),
        ({"lora": LoraSpec(alpha=float("nan"))}, "invalid"),
        ({"lora": LoraSpec(target_modules=("lm_head",))}, "invalid"),
        ({"base_model": "another"}, "unknown_model"),
        ({"checkpoint": "nowhere"}, "not_found"),
    ],
)
async def test_jobs_that_cannot_run_are_refused(stage: Stage, fields: dict[str, Any], reason: str) -> None:
    await refused(stage, open_job(**fields), reason)
    assert stage.engine.training.num_jobs == 0
    await opened(stage)
    assert len(await train(stage, [0])) == 1


async def test_there_is_room_for_so_many_jobs(stage: Stage) -> None:
    answers = await asyncio.gather(*(stage.order(open_job(job_id=name)) for name in ("a", "b", "c")))
    assert [type(answer) for answer in answers].count(JobOpened) == 2
    await refused(stage, open_job(job_id="d"), "overloaded")
    (held, _) = (answer.job_id for answer in answers if isinstance(answer, JobOpened))
    await opened(stage, job_id=held, lease=2)
    assert await stage.order(CloseJob(job_id=held, lease=2)) == JobClosed(job_id=held)
    await opened(stage, job_id="d")


async def test_slices_that_do_not_fit_are_refused_and_the_job_goes_on(stage: Stage) -> None:
    await opened(stage)
    assert (await refused(stage, make_slice(0, 1), "invalid")).retry_after_ms > 0
    assert (await refused(stage, make_slice(1), "invalid")).retry_after_ms > 0
    for bad in (
        {"tokens": random_prompt(200), "weights": (0.0,) * 200},
        {"tokens": (97, 1), "weights": (0.0, 1.0)},
        {"weights": (1.0,)},
        {"tokens": (1, 2), "weights": (0.0, float("nan"))},
    ):
        assert (await refused(stage, make_slice(0, **bad), "invalid")).retry_after_ms == 0
    await refused(stage, make_slice(0, job_id="other"), "not_found")
    assert [step.step for step in await train(stage, [0, 1])] == [0, 1]


async def test_a_full_queue_refuses_and_keeps_what_it_has(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.executor.training.MAX_QUEUED_SLICES", 3)
    await opened(stage)
    with monkeypatch.context() as stuck:
        stuck.setattr(stage.engine.training, "views", list)
        for index in range(3):
            await accepted(stage, make_slice(0, index, optimizer=None))
        assert (await refused(stage, make_slice(0, 3), "overloaded")).retry_after_ms > 0
    await stage.settled()
    await accepted(stage, make_slice(0, 3))
    (step,) = await stage.progress.hold(1)
    assert isinstance(step, StepDone)
    assert step.num_sequence_tokens == 160


async def test_orders_under_another_lease_are_refused(stage: Stage) -> None:
    await opened(stage, lease=5)
    for order in (
        open_job(lease=4),
        make_slice(0, lease=4),
        WriteCheckpoint(job_id="job", lease=4, artifact="a"),
        CloseJob(job_id="job", lease=4),
    ):
        await refused(stage, order, "stale_lease")
    await refused(stage, make_slice(0, lease=6), "not_found")
    await refused(stage, WriteCheckpoint(job_id="job", lease=6, artifact="a"), "not_found")
    assert len(await train(stage, [0], lease=5)) == 1
    assert await stage.order(CloseJob(job_id="nobody", lease=1)) == JobClosed(job_id="nobody")


async def test_a_newer_lease_replaces_the_job(stage: Stage) -> None:
    await opened(stage)
    (first,) = await train(stage, [0])
    gate = Gate(stage.engine)
    await accepted(stage, make_slice(1))
    reopening = asyncio.create_task(stage.order(open_job(lease=2)))
    gate.open()
    assert await reopening == JobOpened(job_id="job", executor_id=stage.executor_id, step=0)
    await refused(stage, make_slice(2), "stale_lease")
    (again,) = await train(stage, [0], lease=2)
    assert again.loss == pytest.approx(first.loss, rel=1e-6)
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages


async def test_an_old_order_that_was_slow_does_not_replace_a_newer_one(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await opened(stage)
    await train(stage, [0])
    assert isinstance(await stage.order(WriteCheckpoint(job_id="job", lease=1, artifact="a")), CheckpointWritten)
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def slow_read(*args: Any) -> bytes:
        reading.set()
        await go_on.wait()
        return await read_object(*args)

    monkeypatch.setattr(training_link, "read_object", slow_read)
    old = asyncio.create_task(stage.order(open_job(lease=2, checkpoint="a")))
    await asyncio.wait_for(reading.wait(), TIMEOUT_S)
    await opened(stage, lease=3)
    go_on.set()
    answer = await old
    assert isinstance(answer, Rejected)
    assert answer.reason == "stale_lease"
    assert stage.engine.training.lease("job") == 3


async def test_a_checkpoint_is_an_adapter_and_resumes_the_job(stage: Stage) -> None:
    await opened(stage)
    await train(stage, [0, 1])
    written = await stage.order(WriteCheckpoint(job_id="job", lease=1, artifact="job:2"))
    assert isinstance(written, CheckpointWritten)
    assert (written.job_id, written.artifact, written.step) == ("job", "job:2", 2)
    (straight,) = await train(stage, [2])

    store = await stage.client.object_store(subjects.ARTIFACTS_STORE)
    data = await read_object(store, "job:2", TIMEOUT_S)
    assert len(data) == written.num_bytes
    tensors = safetensors.torch.load(data)
    assert len(tensors) == 2 * 2 * 7
    prefix = "base_model.model.model.layers.0"
    assert {f"{prefix}.self_attn.q_proj.lora_A.weight", f"{prefix}.mlp.down_proj.lora_B.weight"} <= tensors.keys()
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    config, spec = stage.engine.decoder.config, open_job().lora
    assert LoraAdapter.from_safetensors("a", spec, data, config).to_safetensors() == data
    state = safetensors.torch.load(await read_object(store, "job:2.optimizer", TIMEOUT_S))
    assert int(state["step"]) == 2
    assert tensors.keys() < state.keys()

    await refused(stage, open_job(lease=2, checkpoint="job:2", lora=LoraSpec(rank=3)), "invalid")
    await opened(stage, lease=2, checkpoint="job:2", step=2)
    (resumed,) = await train(stage, [2], lease=2)
    assert (resumed.loss, resumed.grad_norm) == pytest.approx((straight.loss, straight.grad_norm), rel=1e-6)


async def test_a_closed_job_leaves_no_pages(stage: Stage) -> None:
    await opened(stage)
    gate = Gate(stage.engine)
    await accepted(stage, make_slice(0))
    gate.let()
    closing = asyncio.create_task(stage.order(CloseJob(job_id="job", lease=1)))
    gate.open()
    assert await closing == JobClosed(job_id="job")
    await stage.settled()
    assert stage.actor.vitals().gauges["jobs"] == 0
    assert stage.load.free_pages == stage.load.num_pages
    await refused(stage, make_slice(1), "not_found")


async def test_a_job_whose_loss_is_not_finite_fails_alone(stage: Stage) -> None:
    await opened(stage)
    await opened(stage, job_id="calm")
    await accepted(stage, make_slice(0, optimizer=OptimizerStep(learning_rate=1e30)))
    await accepted(stage, make_slice(1))
    failed = await stage.progress.first(lambda event: isinstance(event, JobFailed))
    assert isinstance(failed, JobFailed)
    assert (failed.job_id, failed.lease) == ("job", 1)
    assert "step 1" in failed.message
    assert len(await train(stage, [0], job_id="calm")) == 1
    await refused(stage, make_slice(2), "not_found")
    await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
    assert await stage.output("r3") == truth()["r3"]
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages


@pytest.mark.parametrize("function", ["forward_units.heads", "training_sequence.TrainingSequence.__init__"])
async def test_a_job_that_runs_out_of_memory_fails_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    await opened(stage)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as broken:
        broken.setattr(f"services.executor.{function}", fail)
        await accepted(stage, make_slice(0))
        (failed,) = await stage.progress.hold(1)
    assert failed == JobFailed(job_id="job", lease=1, message="no more")
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages
    await opened(stage, lease=2)
    assert len(await train(stage, [0], lease=2)) == 1

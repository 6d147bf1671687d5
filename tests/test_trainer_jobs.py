"""A job's record, its next action and its executor: pure rules on plain values."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from common.messages import Beat, ExecutorLoad, JobError, JobStatus, LatencyProfile, ServiceState
from services.trainer import jobs, naming
from services.trainer.jobs import JobRecord, SupersededError
from services.trainer.placement import choose_executor, max_training_len
from services.trainer.progress import Position, next_action
from services.trainer.spec import ApiError, JobSpec

SPEC = JobSpec(model="base", training_file="f", seed=1, suffix="mine")


def record(status: JobStatus = "queued", owner: str = "", expires: float = 0.0, job_id: str = "ftjob-1") -> JobRecord:
    made = jobs.with_job(jobs.new_record(job_id, SPEC, now=5.5), status=status)
    return msgspec.structs.replace(made, owner=owner, lease_expires_at=expires, lease=3)


def test_a_new_job_shows_what_was_asked() -> None:
    job = jobs.new_record("ftjob-1", SPEC, now=5.5).job
    assert (job.status, job.created_at, job.suffix, job.seed) == ("validating_files", 5, "mine", 1)
    assert job.hyperparameters["n_epochs"] == 3
    assert job.lora["rank"] == 16


@pytest.mark.parametrize(
    ("status", "owner", "expires", "claimable"),
    [
        ("validating_files", "", 0.0, True),
        ("queued", "", 0.0, True),
        ("running", "other", 11.0, False),
        ("running", "other", 10.0, True),
        ("queued", "me", 99.0, True),
        ("paused", "", 0.0, False),
        ("succeeded", "", 0.0, False),
        ("cancelled", "other", 0.0, False),
    ],
)
def test_only_open_jobs_that_nobody_holds_are_claimed(status: JobStatus, owner: str, expires: float, claimable: bool) -> None:
    found = record(status, owner, expires)
    validates = status == "validating_files"
    with pytest.raises(SupersededError):
        jobs.claim(found, "me", 10.0, 5.0, validates=not validates)
    if not claimable:
        with pytest.raises(SupersededError):
            jobs.claim(found, "me", 10.0, 5.0, validates=validates)
        return
    claimed = jobs.claim(found, "me", 10.0, 5.0, validates=validates)
    assert (claimed.owner, claimed.lease, claimed.lease_expires_at, claimed.job.status) == ("me", 4, 15.0, status)
    jobs.require_held(claimed, "me", 4)
    with pytest.raises(SupersededError):
        jobs.require_held(jobs.claim(claimed, "other", 15.0, 5.0, validates=validates), "me", 4)
    with pytest.raises(SupersededError):
        jobs.require_held(jobs.cancel(claimed, 11.0), "me", 4)


def test_claims_are_all_validations_and_as_many_runs_as_there_are_slots() -> None:
    found = [record("queued", job_id=f"q{i}") for i in (2, 1, 3)] + [record("validating_files", job_id=f"v{i}") for i in (2, 1)]
    found += [record("running", "other", 99.0, "r1"), record("running", "other", 1.0, "r0")]
    assert jobs.choose_claims(found, "me", set(), 2, now=10.0) == ["v1", "v2", "q1", "q2"]
    assert jobs.choose_claims(found, "me", {"v1", "q1"}, 9, now=10.0) == ["v2", "q2", "q3", "r0"]
    assert jobs.choose_claims(found, "me", set(), -1, now=10.0) == ["v1", "v2"]


@pytest.mark.parametrize("status", ["validating_files", "queued", "running", "paused"])
def test_cancel_frees_the_job_whatever_it_does(status: JobStatus) -> None:
    cancelled = jobs.cancel(record(status, "other", 99.0), now=20.9)
    assert (cancelled.job.status, cancelled.owner, cancelled.job.finished_at) == ("cancelled", "", 20)


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_what_is_over_stays_over(status: JobStatus) -> None:
    for change in (lambda r: jobs.cancel(r, 1.0), jobs.pause, jobs.resume):
        with pytest.raises(ApiError, match=status) as error:
            change(record(status))
        assert error.value.reply.status == 409


def test_pause_and_resume() -> None:
    wished = jobs.pause(record("running", "other", 99.0))
    assert (wished.job.status, wished.wish, wished.owner) == ("running", "pause", "other")
    assert jobs.resume(wished).wish == "none"
    paused = jobs.pause(record("queued", "other", 99.0))
    assert (paused.job.status, paused.owner) == ("paused", "")
    assert jobs.resume(paused).job.status == "queued"
    for change, found in ((jobs.pause, record("validating_files")), (jobs.pause, paused), (jobs.resume, record())):
        with pytest.raises(ApiError):
            change(found)


def test_checkpoints_are_listed_once_and_the_newest_is_resumed_from() -> None:
    found = jobs.checkpointed(record("running"), "a/step-2", 2, {"train_loss": 1.0}, 7.0)
    found = jobs.checkpointed(found, "a/step-4", 4, {}, 8.0)
    found = jobs.checkpointed(found, "a/step-4", 4, {"train_loss": 0.5}, 9.0)
    assert [(c.step_number, c.created_at, c.metrics) for c in found.checkpoints] == [
        (2, 7, {"train_loss": 1.0}),
        (4, 9, {"train_loss": 0.5}),
    ]
    assert (found.checkpoint, found.checkpoint_step, found.job.step) == ("a/step-4", 4, 4)
    assert found.checkpoints[0].fine_tuned_model_checkpoint == "ft:base::mine:1:ckpt-step-2"
    finished = jobs.checkpointed(jobs.with_job(found, total_steps=6), "a/step-6", 6, {}, 9.0)
    assert [c.fine_tuned_model_checkpoint for c in finished.checkpoints][1:] == [
        "ft:base::mine:1:ckpt-step-4",
        "ft:base::mine:1",
    ]
    saved = jobs.saved(found, "a/latest", 5)
    assert (saved.checkpoint, saved.checkpoint_step, len(saved.checkpoints)) == ("a/latest", 5, 2)


def test_objects_are_needed_while_users_see_them_or_the_job_resumes_from_them() -> None:
    name = "ftjob-1/step-2"
    found = jobs.checkpointed(record("running"), name, 2, {}, 7.0)
    assert jobs.needed_objects(record("running")) == frozenset()
    assert jobs.needed_objects(found) == {name, f"{name}.optimizer"}
    interim = naming.interim_name("ftjob-1", 3, 0)
    saved = jobs.saved(found, interim, 5)
    assert jobs.needed_objects(saved) == {name, interim, f"{interim}.optimizer"}
    last = jobs.checkpointed(saved, "ftjob-1/step-6", 6, {}, 8.0)
    assert jobs.needed_objects(last) == {name, "ftjob-1/step-6", "ftjob-1/step-6.optimizer"}
    assert jobs.needed_objects(jobs.succeeded(last, "ft:x", 1, (), 9.0)) == {name, "ftjob-1/step-6"}
    for over in (jobs.cancel(last, 9.0), jobs.failed(last, JobError(code="c", message="m"), 9.0)):
        assert (over.checkpoint, over.checkpoints, jobs.needed_objects(over)) == (None, (), frozenset())


def test_interim_checkpoints_never_overwrite_the_one_to_resume_from() -> None:
    names = [naming.interim_name("ftjob-1", lease, turn) for lease in (3, 4) for turn in range(4)]
    assert all(name != following for name, following in itertools.pairwise(names))
    assert len(set(names)) == 4


def test_endings_release_the_job() -> None:
    done = jobs.succeeded(record("running", "me", 99.0), "ft:x", 1234, ("file-a",), 50.0)
    assert (done.job.status, done.job.fine_tuned_model, done.job.trained_tokens, done.owner) == ("succeeded", "ft:x", 1234, "")
    assert done.job.result_files == ("file-a",)
    error = JobError(code="c", message="m")
    assert jobs.failed(record("running", "me", 99.0), error, 50.0).job.error == error
    assert jobs.placed(record("queued"), "x").lease == 4


def test_names() -> None:
    ids = [naming.new_job_id(now) for now in (1.0, 1.7e9, 1.7e9 + 0.001, 2.5e9)]
    assert ids == sorted(ids)
    assert len({naming.new_job_id(1.0) for _ in range(50)}) == 50
    assert all(len(identifier) == 22 for identifier in ids)
    assert naming.model_name("base", None, "ftjob-ab") == "ft:base::heddle:ab"
    assert naming.model_name("base", "Mine, t\u00f6\n:o", "ftjob-ab") == "ft:base::Mine-t-o:ab"
    assert naming.event_number("ftjob-ab", naming.event_id("ftjob-ab", 12)) == 12
    for wrong in ("", "12", "ftevent-ab-", "ftevent-ab-x", "ftevent-ac-12", "ftevent-ab-\u00b2"):
        assert naming.event_number("ftjob-ab", wrong) is None


def walk(spe: int, total: int, max_in_flight: int, lag: int) -> list[str]:
    """The actions of a job whose executor finishes a step whenever it is waited for, `lag` steps behind."""
    sent = done = checkpointed = 0
    actions: list[str] = []
    while True:
        action = next_action(Position(sent, done, checkpointed), spe, total, max_in_flight, stopping=False)
        actions.append(action)
        match action:
            case "send":
                sent += 1
                done = max(done, sent - lag)
            case "wait":
                done += 1
            case "checkpoint":
                assert sent == done
                checkpointed = done
            case ending:
                assert ending == "finish"
                return actions


def test_a_job_sends_each_step_and_writes_a_checkpoint_per_epoch() -> None:
    assert walk(2, 4, 2, lag=99) == [
        "send", "send", "wait", "wait", "checkpoint", "send", "send", "wait", "wait", "checkpoint", "finish",
    ]  # fmt: skip
    assert walk(3, 3, 1, lag=99) == ["send", "wait"] * 3 + ["checkpoint", "finish"]
    assert walk(3, 6, 2, lag=0).count("checkpoint") == 2


@pytest.mark.parametrize(
    ("sent", "done", "checkpointed", "stopping", "action"),
    [
        (5, 3, 0, False, "wait"),
        (5, 4, 0, False, "send"),
        (5, 4, 0, True, "wait"),
        (5, 5, 0, True, "checkpoint"),
        (5, 5, 5, True, "stop"),
        (0, 0, 0, True, "stop"),
        (5, 5, 5, False, "send"),
        (10, 10, 5, False, "checkpoint"),
        (10, 10, 10, False, "send"),
        (10, 9, 0, False, "wait"),
        (20, 20, 20, True, "finish"),
        (20, 20, 17, False, "checkpoint"),
    ],
)
def test_actions_of_a_job_with_two_epochs_of_ten(sent: int, done: int, checkpointed: int, stopping: bool, action: str) -> None:
    assert next_action(Position(sent, done, checkpointed), 10, 20, 2, stopping) == action


def beat(
    name: str, num_jobs: int = 0, model: str = "base", max_len: int = 100, state: ServiceState = "ready", trains: int = 0
) -> Beat:
    load = ExecutorLoad(
        model=model, adapters=(), max_model_len=max_len, page_size=16, num_pages=1, free_pages=1, num_running=0, num_waiting=0,
        waiting_prefill_tokens=0, context_tokens=0, promised_tpot_ms=(), latency=LatencyProfile(points=((1, 1.0),)),
        max_training_tokens=trains,
    )  # fmt: skip
    gauges = {"jobs": float(num_jobs)}
    return Beat(role="executor", instance_id=name, state=state, sent_at=1.0, period_s=1.0, gauges=gauges, executor=load)


def test_the_least_busy_fitting_executor_is_chosen() -> None:
    beats = [
        beat("a", 2),
        beat("b", 1),
        beat("c", 1),
        beat("d", model="other"),
        beat("e", state="draining"),
        beat("f", max_len=9),
    ]
    assert choose_executor(beats, "base", 50, prefer="") == "b"
    assert choose_executor(beats, "base", 50, prefer="a") == "a"
    assert choose_executor(beats, "base", 50, prefer="e") == "b"
    assert choose_executor(beats, "base", 5, prefer="") == "f"
    assert choose_executor(beats, "base", 101, prefer="") is None
    assert max_training_len(beats, "base") == 100
    assert max_training_len(beats, "none") is None


def test_what_an_executor_trains_on_may_be_less_than_what_it_serves() -> None:
    beats = [beat("a", trains=30), beat("b", 1, trains=60), beat("c", 2, max_len=50)]
    assert max_training_len(beats, "base") == 60
    assert choose_executor(beats, "base", 40, prefer="a") == "b"
    assert choose_executor(beats[1:], "base", 50, prefer="") == "b"
    assert choose_executor(beats, "base", 61, prefer="") is None

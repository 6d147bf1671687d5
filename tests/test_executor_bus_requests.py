"""Requests to an executor over a real bus: streams, refusals, cancels, drains, passes and messages that fail."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common import subjects
from common.bus import TooLargeError
from common.messages import Admitted, InferenceRequest, Rejected, Slo
from common.prefix import KEY_BYTES
from services.executor.engine import Iteration
from tests.executor_stage import MODEL, TIMEOUT_S, Connect, Gate, Stage, known_profile, running_executor, write_model
from tests.tiny import NUM_TOKENS, PROMPTS, all_requests, tiny_request, truth


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        yield stage


async def assert_serves(stage: Stage, request_id: str = "after") -> None:
    """A fresh request gets what transformers generates."""
    assert isinstance(await stage.admit(tiny_request(request_id, PROMPTS["r2"], NUM_TOKENS)), Admitted)
    assert await stage.output(request_id) == truth()["r2"]


async def test_streams_are_what_transformers_generates(stage: Stage) -> None:
    answers = await asyncio.gather(*(stage.admit(request) for request in all_requests()))
    assert answers == [Admitted(request_id=name, executor_id=stage.executor_id) for name in PROMPTS]
    assert {name: await stage.output(name) for name in PROMPTS} == truth()
    for name, prompt in PROMPTS.items():
        end = await stage.end(name)
        assert end.finish_reason == "length"
        assert end.executor_id == stage.executor_id
        assert end.usage is not None
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(prompt), NUM_TOKENS)
        assert end.usage.verify_steps == NUM_TOKENS - 1
        assert end.usage.decode_ms > 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"model": "nobody"}, "unknown_model"), ({"max_tokens": 250}, "too_long"), ({"prompt_tokens": (97,)}, "invalid")],
)
async def test_what_cannot_run_is_refused(stage: Stage, fields: dict[str, Any], reason: str) -> None:
    values: dict[str, Any] = {"request_id": "bad", "model": MODEL, "prompt_tokens": PROMPTS["r4"], "max_tokens": 4} | fields
    refused = await stage.admit(InferenceRequest(**values))
    assert isinstance(refused, Rejected)
    assert refused.reason == reason
    await assert_serves(stage)
    assert {chunk.request_id for chunk in stage.chunks} == {"after"}


async def test_a_duplicate_is_refused_and_the_first_goes_on(stage: Stage) -> None:
    gate = Gate(stage.engine)
    request = tiny_request("r3", PROMPTS["r3"], NUM_TOKENS)
    assert isinstance(await stage.admit(request), Admitted)
    again = asyncio.create_task(stage.admit(request))
    gate.let(NUM_TOKENS // 2)
    refused = await again
    assert isinstance(refused, Rejected)
    assert refused.reason == "duplicate"
    gate.open()
    assert await stage.output("r3") == truth()["r3"]


async def test_a_cancelled_request_ends_within_one_iteration(stage: Stage) -> None:
    gate = Gate(stage.engine)
    await stage.admit(tiny_request("r5", PROMPTS["r5"], 150))
    gate.let(3)
    await stage.poll(lambda: gate.num_started == 4)
    await stage.cancel("r5")
    gate.let()
    end = await stage.end("r5")
    assert end.finish_reason == "cancelled"
    assert end.usage is not None
    assert len(await stage.output("r5")) == end.usage.completion_tokens <= 4
    await stage.settled()
    assert gate.num_started == 4
    assert stage.engine.pages.num_free == stage.engine.pages.num_pages
    assert stage.load.free_pages == stage.load.num_pages
    await stage.cancel("r5")
    gate.open()
    await assert_serves(stage)


async def test_vitals_follow_requests(stage: Stage) -> None:
    idle = stage.load
    assert stage.actor.vitals().state == "ready"
    assert (idle.model, idle.adapters, idle.planner_id) == (MODEL, (), "")
    assert (idle.num_pages, idle.free_pages, idle.page_size, idle.max_model_len) == (128, 128, 4, 256)
    assert idle.max_training_tokens == 128
    gate = Gate(stage.engine)
    await stage.admit(tiny_request("r5", PROMPTS["r5"], NUM_TOKENS, slo=Slo(tpot_ms=77.0)))
    submitted = stage.load
    assert (submitted.num_running, submitted.num_waiting, submitted.waiting_prefill_tokens) == (0, 1, 33)
    assert submitted.promised_tpot_ms == (77.0,)
    assert stage.counters() == {"requests": 1}
    gate.let(2)
    await stage.tokens_of("r5", 2)
    await stage.poll(lambda: stage.load.num_running)
    assert stage.load.num_waiting == 0
    assert stage.load.free_pages == 128 - 9
    gate.open()
    await stage.end("r5")
    await stage.settled()
    finished, counters = stage.load, stage.counters()
    assert (finished.num_running, finished.num_waiting, finished.free_pages) == (0, 0, 128)
    assert (finished.context_tokens, finished.promised_tpot_ms) == (0, ())
    assert idle.cached_pages == b""
    assert finished.cached_pages is not None
    assert len(finished.cached_pages) == (33 + NUM_TOKENS - 1) // 4 * KEY_BYTES
    wanted = {"requests": 1, "finished_length": 1, "prefill_tokens": 33, "generated_tokens": NUM_TOKENS, "decode_tokens": 17}
    assert {name: counters[name] for name in wanted} == wanted
    assert counters["iterations"] == NUM_TOKENS
    assert counters["iteration_ms"] > 0
    gauges = stage.actor.vitals().gauges
    assert gauges["pages_in_use"] == 0
    assert gauges["pages_allocated"] == gauges["pages_freed"] > 0


UNWELL = RuntimeError("the device is unwell")


def break_passes(stage: Stage, monkeypatch: pytest.MonkeyPatch, num_failures: int, error: Exception = UNWELL) -> None:
    """The engine's next passes fail."""
    work, left = stage.engine.forward_pass, [None] * num_failures

    def forward_pass() -> Iteration:
        if left:
            left.pop()
            raise error
        return work()

    monkeypatch.setattr(stage.engine, "forward_pass", forward_pass)


async def test_a_failed_pass_ends_its_requests_and_the_executor_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    break_passes(stage, monkeypatch, 1)
    await stage.admit(tiny_request("unlucky", PROMPTS["r3"], NUM_TOKENS))
    end = await stage.end("unlucky")
    assert end.finish_reason == "error"
    assert end.error is not None
    assert "RuntimeError" in end.error
    assert "unwell" not in end.error
    await assert_serves(stage)
    await stage.settled()
    assert stage.counters()["failed_iterations"] == 1
    assert stage.load.free_pages == stage.load.num_pages


async def test_failures_with_a_good_pass_between_them_do_not_add_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        break_passes(stage, monkeypatch, 2)
        for name in (f"{i}a", f"{i}b"):
            await stage.admit(tiny_request(name, PROMPTS["r3"], NUM_TOKENS))
            assert (await stage.end(name)).finish_reason == "error"
        await assert_serves(stage, f"{i}c")
    assert not stage.ended.done()


async def test_an_executor_that_lacks_memory_ends_requests_but_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    break_passes(stage, monkeypatch, 4, torch.OutOfMemoryError("no room"))
    for name in ("a", "b", "c", "d"):
        await stage.admit(tiny_request(name, PROMPTS["r3"], NUM_TOKENS))
        assert "ran out of memory" in ((await stage.end(name)).error or "")
    await assert_serves(stage)
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages


async def test_three_failed_passes_in_a_row_end_the_executor(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    break_passes(stage, monkeypatch, 3)
    for name in ("a", "b", "c"):
        assert not stage.ended.done()
        await stage.admit(tiny_request(name, PROMPTS["r3"], NUM_TOKENS))
        if name != "c":
            await stage.end(name)
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(asyncio.shield(stage.ended), TIMEOUT_S)
    assert ended.group_contains(RuntimeError, match="unwell")


async def test_a_chunk_that_cannot_be_sent_is_counted(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, failures = stage.bus.publish, [None]

    async def failing(subject: str, message: Any) -> None:
        if getattr(message, "seq", None) == 2 and failures:
            failures.pop()
            raise TooLargeError("no")
        await publish(subject, message)

    monkeypatch.setattr(stage.bus, "publish", failing)
    await stage.admit(tiny_request("r1", PROMPTS["r1"], NUM_TOKENS))
    await stage.end("r1")
    assert [chunk.seq for chunk in stage.chunks] == [seq for seq in range(NUM_TOKENS) if seq != 2]
    await stage.settled()
    assert stage.counters()["unsent_chunks"] == 1
    stage.chunks.clear()
    await assert_serves(stage)


async def test_a_draining_executor_finishes_what_runs(stage: Stage) -> None:
    gate = Gate(stage.engine)
    await stage.admit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS))
    draining = asyncio.create_task(stage.actor.drain())
    await asyncio.sleep(0)
    refused = await stage.admit(tiny_request("late", PROMPTS["r1"], NUM_TOKENS))
    assert isinstance(refused, Rejected)
    assert refused.reason == "draining"
    assert refused.retry_after_ms > 0
    gate.open()
    await asyncio.wait_for(draining, TIMEOUT_S)
    assert await stage.output("r4") == truth()["r4"]
    await stage.settled()
    assert stage.actor.vitals().state == "draining"


async def test_what_outlives_the_grace_ends_with_an_error(stage: Stage) -> None:
    stage.actor._config = dataclasses.replace(stage.actor._config, drain_grace_s=0.05)
    gate = Gate(stage.engine)
    await stage.admit(tiny_request("r4", PROMPTS["r4"], 150))
    draining = asyncio.create_task(stage.actor.drain())
    gate.let(3)
    await stage.poll(lambda: gate.num_started == 4)
    await asyncio.wait_for(stage.inbox._filled.wait(), TIMEOUT_S)
    gate.open()
    await asyncio.wait_for(draining, TIMEOUT_S)
    end = await stage.end("r4")
    assert end.finish_reason == "error"
    assert end.error == "the executor is shutting down"
    await stage.settled()
    assert stage.load.free_pages == stage.load.num_pages


async def test_malformed_messages_are_answered_and_survived(stage: Stage) -> None:
    for subject in (subjects.executor_admit(stage.executor_id), subjects.executor_slices(stage.executor_id)):
        await stage.client.client.request(subject, b"garbage", timeout=TIMEOUT_S)
    await stage.client.publish_raw(subjects.cancel("x"), b"garbage")
    await assert_serves(stage)
    assert stage.bus.counters["malformed_messages"] == 3

"""Streams that outlive their executor, and clients that leave: no token lost or repeated, no work left behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from common import subjects
from common.messages import ServiceState, TokenChunk
from tests.fakes import MODEL, REPLY, SAID, FakeExecutor, write_tiny_model
from tests.gateway_stage import Connect, Stage, staged

BODY: dict[str, Any] = {"model": MODEL, "prompt": "one two", "max_tokens": 64}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}}
WAIT_S = 10


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def collect(stage: Stage, **extra: Any) -> tuple[str, str | None, Any]:
    """(text, finish reason, usage) of a streamed completion."""
    stream = await stage.openai.completions.create(
        model=MODEL, prompt="one two", max_tokens=64, stream=True, stream_options={"include_usage": True}, **extra
    )
    text, reason, usage = "", None, None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    return text, reason, usage


def check_continued(stage: Stage, second: FakeExecutor, num_sent: int) -> None:
    """The second executor got prompt and output so far, under another id, and the same sampling."""
    (before,) = stage.executor.requests
    (after,) = second.requests
    assert after.request_id != before.request_id
    assert after.prompt_tokens == before.prompt_tokens + tuple(stage.executor.reply[:num_sent])
    assert after.num_generated == num_sent
    assert after.max_tokens == before.max_tokens
    assert (after.sampling, after.slo, after.arrived_at) == (before.sampling, before.slo, before.arrived_at)


@pytest.mark.parametrize("stall_at", [0, 1, 5])
async def test_a_stream_goes_on_when_its_executor_dies(connect: Connect, model_dir: Path, stall_at: int) -> None:
    async with staged(connect, model_dir, fake={"stall_at": stall_at, "chunk_size": 2}) as stage:
        second = await stage.second_executor()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.executor.kill()
        text, reason, usage = await asyncio.wait_for(collecting, WAIT_S)
        assert (text, reason) == (SAID, "stop")
        assert usage.completion_tokens == len(stage.executor.reply)
        assert usage.prompt_tokens == len(stage.executor.requests[0].prompt_tokens)
        check_continued(stage, second, 2 * stall_at)
        assert stage.gateway.actor.vitals().counters["migrated_requests"] == 1


async def test_an_answer_without_streaming_goes_on_too(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        (await stage.second_executor()).attainable = False
        asking = asyncio.create_task(
            stage.http.post("/v1/completions", json=BODY | {"stop": "three", "slo": {"ttft_ms": 60_000}})
        )
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.executor.kill()
        answer = (await asyncio.wait_for(asking, WAIT_S)).json()
        assert answer["usage"]["slo"]["attainable"], "of a new request"
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (SAID.partition("three")[0], "stop")


async def test_a_restart_under_the_same_name_is_a_death(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        second = await stage.second_executor()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        stage.admission.executors.remove(stage.executor)
        stage.executor.state = "starting"
        await stage.executor.beat()
        assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")
        check_continued(stage, second, 3)
        await stage.executor.kill()


async def test_a_missing_chunk_is_noticed_and_made_good(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"skip": 4, "num_skips": 1}) as stage:
        assert (await asyncio.wait_for(collect(stage), WAIT_S))[:2] == (SAID, "stop")
        first, second = stage.executor.requests
        assert second.num_generated == 4
        assert await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) == first.request_id


async def test_a_gateway_that_was_taken_for_dead_has_its_request_continued(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        second = await stage.second_executor()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        (first,) = stage.executor.requests
        assert first.gateway_id == stage.gateway.actor._config.instance_id != ""
        end = TokenChunk(request_id=first.request_id, seq=3, finish_reason="cancelled", error="its gateway was silent")
        stage.admission.executors.remove(stage.executor)
        await stage.bus.publish(subjects.stream(first.request_id), end)
        assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")
        check_continued(stage, second, 3)


async def test_chunks_of_an_abandoned_attempt_do_not_mix_in(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        second = await stage.second_executor()
        second.stall_at = 2
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.executor.kill()
        await asyncio.wait_for(second.stalled.wait(), WAIT_S)
        old_id = stage.executor.requests[0].request_id
        for seq in range(3, 8):
            await stage.bus.publish(subjects.stream(old_id), TokenChunk(request_id=old_id, seq=seq, tokens=(5,)))
        second.resume.set()
        assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")


@pytest.mark.parametrize("state", ["draining", "ready"])
async def test_an_executor_that_stops_hands_over_but_a_failing_one_does_not(
    connect: Connect, model_dir: Path, state: ServiceState
) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3, "fail_at": 3}) as stage:
        second = await stage.second_executor()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        stage.admission.executors.remove(stage.executor)
        stage.executor.state = state
        await stage.executor.beat()
        await stage.sees(2)
        stage.executor.resume.set()
        if state == "ready":
            with pytest.raises(openai.APIError, match="The executor failed"):
                await asyncio.wait_for(collecting, WAIT_S)
            assert second.requests == []
        else:
            assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")
        await stage.executor.kill()


@pytest.mark.parametrize(
    ("max_tokens", "num_sent", "reason"), [(64, len(REPLY), "stop"), (4, 4, "length")], ids=["stop token", "length"]
)
async def test_a_lost_last_chunk_needs_no_second_executor(
    connect: Connect, model_dir: Path, max_tokens: int, num_sent: int, reason: str
) -> None:
    async with staged(connect, model_dir, fake={"is_dead": True}) as stage:
        executor = stage.executor
        executor.is_dead, executor.stall_at = False, 0
        stream = await stage.openai.completions.create(model=MODEL, prompt="one", max_tokens=max_tokens, stream=True)
        await asyncio.wait_for(executor.stalled.wait(), WAIT_S)
        tokens = tuple(executor.reply[:num_sent])
        request_id = executor.requests[0].request_id
        await stage.bus.publish(subjects.stream(request_id), TokenChunk(request_id=request_id, seq=0, tokens=tokens))
        await executor.kill()
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == stage.tokenizer.decode(tokens)
        assert chunks[-1].choices[0].finish_reason == reason
        assert len(executor.requests) == 1


async def test_a_stream_waits_for_the_executor_that_will_continue_it(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 3}) as stage:
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.executor.kill()
        await stage.sees(0)
        await stage.second_executor()
        assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")


async def test_after_too_many_losses_the_client_is_told(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"skip": 1}, migration_limit=2) as stage:
        with pytest.raises(openai.APIError, match="could not be continued"):
            await asyncio.wait_for(collect(stage), WAIT_S)
        assert len(stage.executor.requests) == 3


async def test_nothing_is_sent_before_the_first_token(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 0}) as stage:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": MODEL, "messages": messages, "stream": True}
        async with stage.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            first = asyncio.ensure_future(anext(lines))
            await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
            done, _ = await asyncio.wait([first], timeout=0.1)
            assert not done
            stage.executor.resume.set()
            delta = json.loads((await first).removeprefix("data: "))["choices"][0]["delta"]
            assert delta == {"role": "assistant", "content": "H"}


async def test_an_admission_that_dies_with_the_question_is_asked_again(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, admission_timeout_s=0.1, open_wait_s=WAIT_S) as stage:
        stage.admission.hold = asyncio.Event()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.admission.asked.wait(), WAIT_S)
        hold, stage.admission.hold = stage.admission.hold, None
        assert (await asyncio.wait_for(collecting, WAIT_S))[:2] == (SAID, "stop")
        assert len(stage.executor.requests) == 1
        hold.set()

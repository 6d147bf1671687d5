"""Clients that leave, and time that runs out: no work is left behind on an executor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes import MODEL, write_tiny_model
from tests.gateway_stage import Connect, staged

BODY: dict[str, Any] = {"model": MODEL, "prompt": "one two", "max_tokens": 64}
STREAM = BODY | {"stream": True}
WAIT_S = 10


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("body", [STREAM, BODY | {"n": 3}, STREAM | {"n": 2}], ids=["stream", "whole, n=3", "stream, n=2"])
async def test_a_client_that_leaves_during_the_answer(connect: Connect, model_dir: Path, body: dict[str, Any]) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 2}) as stage:
        num_choices = body.get("n", 1)
        async with httpx.AsyncClient(base_url=stage.gateway.url) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.wait_for(stage.executor.was_asked(num_choices), WAIT_S)
            await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        cancelled = {await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S) for _ in range(num_choices)}
        assert cancelled == {request.request_id for request in stage.executor.requests}
        await asyncio.wait_for(stage.settled(), WAIT_S)
        assert stage.gateway.actor.vitals().counters["abandoned_requests"] == 1
        metrics = (await stage.http.get("/metrics")).text
        assert f'vllm:request_success_total{{finished_reason="abort",model_name="tiny"}} {num_choices}.0' in metrics


async def test_a_client_that_leaves_while_admission_decides(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 0}) as stage:
        stage.admission.hold = asyncio.Event()
        async with httpx.AsyncClient(base_url=stage.gateway.url) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=STREAM))
            await asyncio.wait_for(stage.admission.asked.wait(), WAIT_S)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(stage.settled(), WAIT_S)
        assert stage.executor.requests == []
        stage.admission.hold.set()
        cancelled = await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S)
        assert cancelled == stage.executor.requests[0].request_id


async def test_a_request_has_a_time_limit(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 2}, request_timeout_s=0.5) as stage:
        response = await stage.http.post("/v1/completions", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S)
        stream = await stage.openai.completions.create(model=MODEL, prompt="one", max_tokens=64, stream=True)
        with pytest.raises(openai.APIError, match="took too long"):
            assert [chunk async for chunk in stream] == []

"""When an executor tells its planner of an iteration, and that its requesters hear of it in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.executor.engine import Iteration
from tests.executor_stage import Connect, known_profile, write_model
from tests.test_executor_bus_planner import FakePlanner, claimed, serve
from tests.tiny import NUM_TOKENS, PROMPTS, tiny_request, truth


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def profile(monkeypatch: pytest.MonkeyPatch) -> None:
    known_profile(monkeypatch)


async def test_a_report_leaves_before_the_chunks_of_its_iteration(
    connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = FakePlanner(bus=await connect(), planner_id="planner-1")
    async with claimed(connect, model_dir, planner) as stage:
        actor, order = stage.actor, list[str]()
        transport = actor._bus.client._transport
        assert transport is not None
        tell, send, write = actor._reports.tell, actor._send, transport.writelines

        async def told(*args: Any, **options: Any) -> None:
            order.append("report")
            await tell(*args, **options)

        async def sent(chunks: Any) -> None:
            order.append("chunks")
            await send(chunks)

        def written(payload: Any) -> None:
            order.append("written")
            write(payload)

        monkeypatch.setattr(actor._reports, "tell", told)
        monkeypatch.setattr(actor, "_send", sent)
        monkeypatch.setattr(transport, "writelines", written)
        await serve(stage, "r3")
        reports = [i for i, what in enumerate(order) if what == "report"]
        assert len(reports) > 3
        assert all(order[i + 1 : order.index("chunks", i)] == ["written"] for i in reports[2:-1])


async def test_a_report_that_cannot_be_made_keeps_no_chunk(
    connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = FakePlanner(bus=await connect(), planner_id="planner-1")
    async with claimed(connect, model_dir, planner) as stage:
        tell = stage.actor._reports.tell

        async def told(iteration: Iteration, **options: Any) -> None:
            if any(chunk.finish_reason for chunk in iteration.chunks):
                raise RuntimeError("no memory for graphs")
            await tell(iteration, **options)

        monkeypatch.setattr(stage.actor._reports, "tell", told)
        await stage.admit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS))
        assert await stage.output("r4") == truth()["r4"]

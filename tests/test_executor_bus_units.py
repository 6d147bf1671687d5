"""Whatever comes to an executor while it finetunes alone waits for a unit of that work, not for the pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from common.messages import Admitted, CheckpointWritten, CloseJob, JobClosed, JobOpened, StepDone, WriteCheckpoint
from services.executor.engine import Iteration
from tests.executor_stage import TIMEOUT_S, Connect, Stage, known_profile, open_job, running_executor, write_model
from tests.test_executor_bus_training import accepted, make_slice, opened
from tests.tiny import NUM_TOKENS, PROMPTS, tiny_request, truth


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def stage(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        yield stage


class Held:
    """The first unit of a pass ends only when something came in; `units_by_pass` are the layers before each iteration."""

    def __init__(self, stage: Stage) -> None:
        self._engine = cast(Any, stage.engine)
        self._layer, self._forward_pass = self._engine.decoder.layer, self._engine.forward_pass
        self._loop, self.started = asyncio.get_running_loop(), asyncio.Event()
        self.num_units, self.units_by_pass = 0, list[int]()
        self._engine.decoder.layer, self._engine.forward_pass = self._held_layer, self._counted_pass

    def _held_layer(self, *inputs: Any) -> Any:
        self.num_units += 1
        if self.num_units == 1:
            self._loop.call_soon_threadsafe(self.started.set)
            until = time.monotonic() + TIMEOUT_S
            while not self._engine.has_news():
                assert time.monotonic() < until, "nothing came in"
                time.sleep(0.001)
        return self._layer(*inputs)

    def _counted_pass(self) -> Iteration:
        self.units_by_pass.append(self.num_units)
        iteration: Iteration = self._forward_pass()
        return iteration


@pytest.fixture
async def held(stage: Stage) -> Held:
    await opened(stage)
    held = Held(stage)
    await accepted(stage, make_slice(0))
    await asyncio.wait_for(held.started.wait(), TIMEOUT_S)
    return held


async def test_a_request_is_in_the_next_iteration(stage: Stage, held: Held) -> None:
    assert isinstance(await stage.admit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS)), Admitted)
    assert await stage.output("r4") == truth()["r4"]
    assert held.units_by_pass[:2] == [0, 1]
    assert isinstance((await stage.progress.hold(1))[0], StepDone)


async def test_so_are_a_jobs_end_and_its_pages(stage: Stage, held: Held) -> None:
    assert isinstance(await stage.order(CloseJob(job_id="job", lease=1)), JobClosed)
    await stage.settled()
    assert held.num_units == 1
    assert stage.load.free_pages == stage.load.num_pages
    assert not stage.progress


async def test_what_waits_for_the_device_itself_is_not_kept_waiting_either(stage: Stage, held: Held) -> None:
    """A new job's weights are made there."""
    assert isinstance(await stage.order(open_job(job_id="other")), JobOpened)
    assert isinstance((await stage.progress.hold(1))[0], StepDone)
    assert held.units_by_pass[:2] == [0, 1]
    await stage.settled()
    assert stage.counters()["finetune_tokens"] == 39


async def test_a_checkpoint_mid_pass_is_of_the_step_before(stage: Stage, held: Held) -> None:
    written = await stage.order(WriteCheckpoint(job_id="job", lease=1, artifact="early"))
    assert isinstance(written, CheckpointWritten)
    assert written.step in (0, 1)
    assert held.units_by_pass[1] == 1
    assert isinstance((await stage.progress.hold(1))[0], StepDone)

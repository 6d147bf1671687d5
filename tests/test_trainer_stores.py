"""Job table and event log on a real server: who may write what, and what others see."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.bus import Bus
from services.trainer import events, jobs
from services.trainer.config import TrainerConfig
from services.trainer.event_log import EventLog
from services.trainer.job_table import JobTable
from services.trainer.jobs import SupersededError
from services.trainer.lease import Lease
from services.trainer.spec import JobSpec
from tests.trainer_fakes import write_model_dir


async def test_a_lost_lease_changes_nothing(bus: Bus, tmp_path: Path) -> None:
    table = await JobTable.open(bus)
    await table.create(jobs.new_record("ftjob-1", JobSpec(model="base", training_file="f", seed=0), 1.0))
    config = TrainerConfig(instance_id="t1", model_dir=write_model_dir(tmp_path))
    old = Lease(table, config, await table.modify("ftjob-1", lambda r: jobs.claim(r, "t1", 10.0, 5.0, validates=True)))
    await old.renew(1, None)
    taken = await table.modify("ftjob-1", lambda r: jobs.claim(r, "t2", 2**40, 5.0, validates=True))
    with pytest.raises(SupersededError):
        await old.renew(2, None)
    assert await table.get("ftjob-1") == taken
    with pytest.raises(SupersededError):
        old.check()
    assert old.wake.is_set()


async def test_concurrent_changes_all_count(bus: Bus) -> None:
    table = await JobTable.open(bus)
    await table.create(jobs.new_record("ftjob-1", JobSpec(model="base", training_file="f", seed=0), 1.0))
    await asyncio.gather(*(table.modify("ftjob-1", lambda r: jobs.placed(r, "x")) for _ in range(20)))
    assert (await table.get("ftjob-1")).lease == 20


async def test_events_of_several_writers_have_no_gaps(bus: Bus) -> None:
    log = await EventLog.open(bus)
    assert await log.count("ftjob-1") == 0
    await asyncio.gather(*(log.append("ftjob-1", events.message(1.0, str(i)), hint=0) for i in range(17)))
    assert await log.count("ftjob-1") == 17
    page, more = await log.page("ftjob-1", None, 100)
    assert ([event.id for event in page], more) == ([f"ftevent-1-{number}" for number in reversed(range(17))], False)
    assert {event.message for event in page} == {str(i) for i in range(17)}
    assert await log.count("ftjob-2") == 0

"""What all jobs of one trainer share: the bus, the stores, the tokenizer, the fleet. Knows no single job."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter

from nats.js.errors import ObjectNotFoundError

from common import subjects
from common.bus import Bus
from common.chat import ChatTokenizer
from common.fleet import Fleet
from common.messages import Beat
from services.trainer.config import TrainerConfig
from services.trainer.dataset import Dataset, DatasetError, read_dataset
from services.trainer.event_log import EventLog
from services.trainer.job_table import JobTable
from services.trainer.placement import max_model_len
from services.trainer.spec import JobSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """`counters` only grow; `fleet` is kept current by the actor."""

    bus: Bus
    config: TrainerConfig
    tokenizer: ChatTokenizer
    table: JobTable
    events: EventLog
    fleet: Fleet
    counters: Counter[str]

    def executors(self) -> list[Beat]:
        """Last beats of the living executors."""
        return self.fleet.alive("executor", time.monotonic())

    async def load_dataset(self, spec: JobSpec) -> Dataset:
        """The training sequences of a job. Raises DatasetError."""
        store = await self.bus.object_store(subjects.FILES_STORE)
        try:
            async with asyncio.timeout(self.config.open_timeout_s):
                data = (await store.get(spec.training_file)).data or b""
        except ObjectNotFoundError as error:
            raise DatasetError(f"file {spec.training_file} does not exist any more") from error
        limits = (self.config.max_sequence_length, max_model_len(self.executors(), spec.model))
        shortest = min(limit for limit in limits if limit is not None)
        return await asyncio.to_thread(read_dataset, data, self.tokenizer, shortest)

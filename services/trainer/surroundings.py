"""What all jobs of one trainer share: the bus, the stores, the tokenizer, the fleet. Knows no single job."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter

from nats.js.errors import ObjectNotFoundError

from common import subjects
from common.artifacts import read_object
from common.bus import Bus
from common.chat import ChatTokenizer
from common.fleet import Fleet
from common.messages import Beat
from services.trainer.artifacts import Artifacts
from services.trainer.config import TrainerConfig
from services.trainer.dataset import Dataset, DatasetError, read_dataset
from services.trainer.event_log import EventLog
from services.trainer.job_table import JobTable
from services.trainer.placement import max_training_len

LENGTH_SETTING = "HEDDLE_TRAINER_MAX_SEQUENCE_LENGTH"
"""The setting behind `TrainerConfig.max_sequence_length`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """`counters` only grow; `fleet` is kept current by the actor."""

    bus: Bus
    config: TrainerConfig
    tokenizer: ChatTokenizer
    table: JobTable
    events: EventLog
    artifacts: Artifacts
    fleet: Fleet
    counters: Counter[str]

    def executors(self) -> list[Beat]:
        """Last beats of the living executors."""
        return self.fleet.alive("executor", time.monotonic())

    async def load_dataset(self, file_id: str, model: str, *, validates: bool) -> Dataset:
        """The sequences of a job's file; those of a validated job are held against the executors of today no more.

        Raises DatasetError; TimeoutError and nats errors when the file cannot be read now.
        """
        store = await self.bus.object_store(subjects.FILES_STORE)
        try:
            data = await read_object(store, file_id, self.config.open_timeout_s)
        except ObjectNotFoundError as error:
            raise DatasetError(f"file {file_id} does not exist any more") from error
        trainable = max_training_len(self.executors(), model) if validates else None
        limit, limited_by = self.config.max_sequence_length, LENGTH_SETTING
        if trainable and trainable < limit:
            limit, limited_by = trainable, "the executors' KV pages and the model's positions"
        return await asyncio.to_thread(read_dataset, data, self.tokenizer, limit, limited_by)

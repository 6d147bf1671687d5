"""A job's events as its owner writes them: one metrics event per step, however often that step is done. Knows no executor."""

from __future__ import annotations

from common.messages import JobEvent
from services.trainer.event_log import EventLog

PAGE = 50


class Journal:
    """The writing end of one job's events."""

    def __init__(self, log: EventLog, job_id: str) -> None:
        self._log = log
        self._job_id = job_id
        self._next: int | None = None
        self._numbers: dict[int, int] = {}

    async def write(self, event: JobEvent) -> int:
        """Append an event; returns its number."""
        number = await self._log.append(self._job_id, event, self._next)
        self._next = number + 1
        return number

    async def metrics(self, step: int, event: JobEvent) -> None:
        """The metrics of a step: replaces what an earlier run of the same step said."""
        if step in self._numbers:
            await self._log.overwrite(self._job_id, self._numbers[step], event)
        else:
            self._numbers[step] = await self.write(event)

    async def rewind(self, step: int) -> None:
        """Steps from `step` on will be done again: find what an earlier owner has said about them."""
        self._numbers.clear()
        end, more = await self._log.count(self._job_id), True
        self._next = end
        while more:
            events, more = await self._log.page(self._job_id, end, PAGE)
            for number, event in zip(range(end - 1, -1, -1), events, strict=False):
                if event.type == "metrics":
                    told = int(event.data["step"]) - 1
                    if told < step:
                        return
                    self._numbers[told] = number
            end -= len(events)

"""Which live streams have lost their executor. Knows heartbeats, clocks and a bus that was away, not tokens."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from common.bus import Bus
from common.fleet import MISSED_BEATS, Fleet
from common.messages import Beat

CHECK_PERIOD_S = 0.25


class Watched(Protocol):
    """A stream: its executor ("" while it has none), since when, and what to call when that executor is dead."""

    executor_id: str
    admitted_at: float

    def lose_executor(self) -> None:
        """Nothing that this stream waits for can be relied on to come."""


class ExecutorWatch:
    """The live streams of this gateway and the executors they run on. `now` is the monotonic clock."""

    def __init__(self, fleet: Fleet, heartbeat_s: float) -> None:
        self.live: set[Watched] = set()
        self._fleet = fleet
        self._patience_s = MISSED_BEATS * heartbeat_s
        self._blind_until = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, stream: Watched) -> None:
        """The stream is live."""
        self.live.add(stream)
        self._idle.clear()

    def release(self, stream: Watched) -> None:
        """The stream is over."""
        self.live.discard(stream)
        if not self.live:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Until no stream is live."""
        await self._idle.wait()

    def observe(self, beat: Beat, now: float) -> None:
        """A beat arrived. An executor that starts again under its old name has forgotten its requests."""
        self._fleet.observe(beat, now)
        if beat.role == "executor" and beat.state == "starting":
            for stream in [stream for stream in self.live if stream.executor_id == beat.instance_id]:
                stream.lose_executor()

    def lose_all(self) -> None:
        """The bus was away: chunks, or an answer of admission, may be missing, and the last chunk leaves no gap behind it.

        Streams that wait for admission are told too: what they asked for may have begun to run meanwhile.
        """
        for stream in list(self.live):
            stream.lose_executor()

    def is_ready(self, executor_id: str, now: float) -> bool:
        """Whether this executor lives and is not about to stop."""
        beats = self._fleet.alive("executor", now)
        return any(beat.instance_id == executor_id and beat.state == "ready" for beat in beats)

    def look(self, now: float, *, is_connected: bool, since_last_s: float) -> None:
        """Tell the streams whose executor was not heard of for three periods.

        While the bus is away, or this process stood still, beats were missed by us and not by them: then wait anew.
        """
        if not is_connected or since_last_s > 4 * CHECK_PERIOD_S:
            self._blind_until = now + self._patience_s
        if not self.live or now < self._blind_until:
            return
        alive = {beat.instance_id for beat in self._fleet.alive("executor", now)}
        for stream in [stream for stream in self.live if stream.executor_id not in alive]:
            if stream.executor_id and now > stream.admitted_at + self._patience_s:
                stream.lose_executor()

    async def run(self, bus: Bus) -> None:
        """Look for ever."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            now = time.monotonic()
            self.look(now, is_connected=bus.client.is_connected, since_last_s=now - last)
            last = now

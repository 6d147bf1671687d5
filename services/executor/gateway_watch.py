"""Which gateways have died while requests of theirs run here. Knows heartbeats and clocks, not requests."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from common.bus import Bus
from common.fleet import MISSED_BEATS
from common.messages import Beat

CHECK_PERIOD_S = 0.25


@dataclasses.dataclass
class _Heard:
    at: float
    period_s: float
    is_starting: bool = False


class GatewayWatch:
    """Calls `on_lost` once for each gateway that is dead, or that has started again under its old name. `now` is monotonic."""

    def __init__(self, heartbeat_s: float, on_lost: Callable[[str], None]) -> None:
        self._heartbeat_s = heartbeat_s
        self._on_lost = on_lost
        self._heard: dict[str, _Heard] = {}
        self._seeing_since = 0.0

    def expect(self, gateway_id: str, now: float) -> None:
        """A request of this gateway came in: it lives, and should beat from now on."""
        self._heard.setdefault(gateway_id, _Heard(now, self._heartbeat_s)).at = now

    def observe(self, beat: Beat, now: float) -> None:
        """A gateway's beat arrived. One that starts has forgotten the requests of its former life."""
        before = self._heard.get(beat.instance_id)
        is_starting = beat.state == "starting"
        self._heard[beat.instance_id] = _Heard(now, beat.period_s, is_starting)
        if before is not None and is_starting and not before.is_starting:
            self._on_lost(beat.instance_id)

    def look(self, now: float, *, is_connected: bool, since_last_s: float) -> None:
        """Give up the gateways that were not heard of for three periods.

        While the bus is away, or this process stood still, beats were missed by us and not by them: then wait anew.
        """
        if not is_connected or since_last_s > 4 * CHECK_PERIOD_S:
            self._seeing_since = now
        for gateway_id, heard in list(self._heard.items()):
            if now - max(heard.at, self._seeing_since) > MISSED_BEATS * heard.period_s:
                del self._heard[gateway_id]
                self._on_lost(gateway_id)

    async def run(self, bus: Bus) -> None:
        """Look for ever."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            now = time.monotonic()
            self.look(now, is_connected=bus.client.is_connected, since_last_s=now - last)
            last = now

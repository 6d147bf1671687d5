"""Changes to the engine that wait until no pass runs. Knows neither the engine nor the bus."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Inbox:
    """Filled by message handlers, emptied by the loop that iterates."""

    def __init__(self) -> None:
        self._changes: deque[Callable[[], None]] = deque()
        self._filled = asyncio.Event()

    def post(self, change: Callable[[], None]) -> None:
        """Apply a change before the next pass."""
        self._changes.append(change)
        self._filled.set()

    async def ask(self, change: Callable[[], T]) -> T:
        """Apply a change before the next pass and return its result, or raise what it raises."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def apply() -> None:
            if done.cancelled():
                return
            try:
                done.set_result(change())
            except Exception as error:  # noqa: BLE001 - it is the caller's, not the loop's
                done.set_exception(error)

        self.post(apply)
        return await done

    @property
    def is_filled(self) -> bool:
        """Whether a change waits; any thread may ask."""
        return bool(self._changes)

    def apply(self) -> None:
        """Apply what is there."""
        self._filled.clear()
        while self._changes:
            self._changes.popleft()()

    async def wait(self) -> None:
        """Return when something is there."""
        await self._filled.wait()

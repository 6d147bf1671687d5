"""Following a KV bucket of typed records. Knows the bus, not what the records mean."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from common.bus import Bus
from common.cancellation import raise_if_cancelled
from common.codec import MalformedMessageError, decode

T = TypeVar("T")
log = structlog.get_logger()

RETRY_PAUSE_S = 1.0
REFRESH_S = 30.0
"""A quiet watch is renewed so often: an ordered consumer that the server lost would be quiet for ever."""


async def record_keys(bus: Bus, bucket: str) -> list[str]:
    """The keys of a bucket, in order; some may have been deleted.

    The client's own `keys()` watches the bucket, and takes it for empty when its first record is still under way.
    """
    await bus.key_value(bucket)
    prefix = f"$KV.{bucket}."
    info = await bus.js.stream_info(f"KV_{bucket}", subjects_filter=f"{prefix}>")
    return sorted(subject.removeprefix(prefix) for subject in info.state.subjects or ())


async def follow_records(
    bus: Bus, bucket: str, record_type: type[T], on_change: Callable[[dict[str, T]], Awaitable[None]]
) -> None:
    """For ever: call `on_change` with all records by key, first with those that are there, then after every change.

    Records that do not decode are logged and left out.
    """
    while True:
        try:
            watcher: Any = await (await bus.key_value(bucket)).watchall()
            try:
                await _follow(watcher, record_type, on_change)
            finally:
                await watcher.stop()
        except NatsTimeoutError:
            continue
        except NatsError as error:
            log.warning("records.watch_failed", bucket=bucket, error=str(error) or type(error).__name__)
            await asyncio.sleep(RETRY_PAUSE_S)


async def _follow(watcher: Any, record_type: type[T], on_change: Callable[[dict[str, T]], Awaitable[None]]) -> None:
    """Apply updates until it is quiet for REFRESH_S (TimeoutError); the first None ends the replay of what is stored."""
    records: dict[str, T] = {}
    is_replayed = False
    while True:
        entry = await watcher.updates(timeout=REFRESH_S)
        raise_if_cancelled()
        if entry is None:
            is_replayed = True
        elif entry.operation is not None:
            records.pop(entry.key, None)
        else:
            try:
                records[entry.key] = decode(entry.value, record_type)
            except MalformedMessageError as error:
                records.pop(entry.key, None)
                log.warning("records.malformed", key=entry.key, error=str(error))
        if is_replayed:
            await on_change(dict(records))

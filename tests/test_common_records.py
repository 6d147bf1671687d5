"""Following a bucket of records on a real bus: replay, changes, records that do not decode, a watch that is renewed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nats.js.errors import NotFoundError

from common import records
from common.bus import Bus
from common.codec import encode
from common.messages import Cancel
from common.nats_server import NatsServer
from common.records import follow_records

BUCKET = "heddle_test"


class Seen:
    """What a follower was told, newest last."""

    def __init__(self) -> None:
        self.states: list[dict[str, Cancel]] = []
        self._changed = asyncio.Condition()

    async def on_change(self, state: dict[str, Cancel]) -> None:
        async with self._changed:
            self.states.append(state)
            self._changed.notify_all()

    async def becomes(self, **expected: str) -> None:
        """Returns when the newest state is this one."""
        wanted = {key: Cancel(request_id=value) for key, value in expected.items()}
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: bool(self.states) and self.states[-1] == wanted)


@contextlib.asynccontextmanager
async def following(bus: Bus) -> AsyncIterator[Seen]:
    """A follower for the length of a block."""
    seen = Seen()
    task = asyncio.create_task(follow_records(bus, BUCKET, Cancel, seen.on_change))
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=10)
    assert task.cancelled()


async def put(bus: Bus, key: str, value: str) -> None:
    await (await bus.key_value(BUCKET)).put(key, encode(Cancel(request_id=value)))


async def test_an_empty_bucket_is_told_once(bus: Bus) -> None:
    async with following(bus) as seen:
        await seen.becomes()
    assert seen.states == [{}]


async def test_stored_records_are_told_together_then_every_change(bus: Bus) -> None:
    await put(bus, "a", "1")
    await put(bus, "b", "1")
    async with following(bus) as seen:
        await seen.becomes(a="1", b="1")
        assert len(seen.states) == 1
        await put(bus, "a", "2")
        await seen.becomes(a="2", b="1")
        await (await bus.key_value(BUCKET)).delete("b")
        await seen.becomes(a="2")
        await (await bus.key_value(BUCKET)).purge("a")
        await seen.becomes()


async def test_records_that_do_not_decode_are_left_out(bus: Bus) -> None:
    bucket = await bus.key_value(BUCKET)
    await bucket.put("bad", b"\xc1")
    await put(bus, "a", "1")
    async with following(bus) as seen:
        await seen.becomes(a="1")
        await bucket.put("a", b"garbage")
        await seen.becomes()
        await put(bus, "bad", "2")
        await seen.becomes(bad="2")


async def test_a_quiet_watch_is_renewed(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REFRESH_S", 0.1)
    await put(bus, "a", "1")
    async with following(bus) as seen:
        await seen.becomes(a="1")
        await lose_consumers(bus)
        await put(bus, "a", "2")
        await seen.becomes(a="2")


async def lose_consumers(bus: Bus) -> None:
    """The server forgets who watches, as after a restart."""
    stream = f"KV_{BUCKET}"
    for consumer in await bus.js.consumers_info(stream):
        with contextlib.suppress(NotFoundError):  # it was renewed meanwhile
            await bus.js.delete_consumer(stream, consumer.name)


async def test_a_follower_outlives_the_server(bus: Bus, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REFRESH_S", 0.2)
    monkeypatch.setattr(records, "RETRY_PAUSE_S", 0.05)
    await put(bus, "a", "1")
    async with following(bus) as seen:
        await seen.becomes(a="1")
        back = asyncio.Event()
        bus.on_reconnect.append(back.set)
        nats_server.kill()
        nats_server.start()
        await asyncio.wait_for(back.wait(), 10)
        await put(bus, "a", "2")
        await seen.becomes(a="2")


async def test_what_on_change_raises_reaches_the_caller(bus: Bus) -> None:
    async def fail(_: dict[str, Any]) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await asyncio.wait_for(follow_records(bus, BUCKET, Cancel, fail), 10)


class DeafWatcher:
    """Loses the cancellation that arrives together with an update, as `asyncio.wait_for` does until Python 3.12."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def watchall(self) -> DeafWatcher:
        return self

    async def updates(self, timeout: float) -> None:  # noqa: ASYNC109 - the client's signature
        self.asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(timeout)

    async def stop(self) -> None:
        pass


async def test_a_lost_cancellation_ends_the_watch_all_the_same(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = DeafWatcher()

    async def key_value(bucket: str) -> DeafWatcher:
        return watcher

    monkeypatch.setattr(bus, "key_value", key_value)
    async with following(bus):
        await watcher.asked.wait()

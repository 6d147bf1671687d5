"""Objects read whole: complete, in linear time, and with clear failures."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest
from nats.js.errors import ObjectNotFoundError

from common.artifacts import read_object
from common.bus import Bus


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 300_001])
async def test_an_object_comes_back_as_it_was_put(bus: Bus, size: int) -> None:
    store = await bus.object_store("objects")
    data = random.Random(size).randbytes(size)
    await store.put("name", data)
    assert await read_object(store, "name", 5.0) == data


async def test_a_missing_or_deleted_object_is_not_found(bus: Bus) -> None:
    store = await bus.object_store("objects")
    with pytest.raises(ObjectNotFoundError):
        await read_object(store, "name", 5.0)
    await store.put("name", b"data")
    await store.delete("name")
    with pytest.raises(ObjectNotFoundError):
        await read_object(store, "name", 5.0)


async def test_a_large_object_is_read_fast_and_the_loop_goes_on(bus: Bus) -> None:
    store = await bus.object_store("objects")
    data = random.Random(0).randbytes(1 << 20) * 40
    await store.put("name", data)
    pauses: list[float] = []
    ticker = asyncio.create_task(_tick(pauses))
    started = time.thread_time()
    assert await read_object(store, "name", 30.0) == data
    elapsed = time.thread_time() - started
    ticker.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ticker
    assert elapsed < 2.5, "40 MB took long: quadratic reads take far more"
    assert max(pauses) < 0.5


async def test_an_object_that_does_not_come_in_time_is_an_error(bus: Bus) -> None:
    store = await bus.object_store("objects")
    await store.put("name", b"data")
    await bus.js.purge_stream("OBJ_objects", subject="$O.objects.C.>")  # its record stays, its bytes are gone
    with pytest.raises(TimeoutError):
        await read_object(store, "name", 0.2)


async def _tick(pauses: list[float]) -> None:
    last = time.thread_time()
    while True:
        await asyncio.sleep(0.001)
        now = time.thread_time()
        pauses.append(now - last)
        last = now

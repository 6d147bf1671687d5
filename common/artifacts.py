"""Objects of the bus's stores, read whole in linear time. Knows no object's meaning."""

from __future__ import annotations

import asyncio
import io

from nats.js.object_store import ObjectStore


async def read_object(store: ObjectStore, name: str, timeout_s: float) -> bytes:
    """The object's bytes, checked against its digest.

    Raises nats' ObjectNotFoundError (a NotFoundError and a nats Error) when there is no such object, TimeoutError (the
    builtin one, no nats Error) when it did not arrive in time, other nats errors when it is damaged or the server refuses.
    The client's own `.data` copies all it has for every chunk, which stalls the event loop for seconds on large objects.
    """
    sink = io.BytesIO()
    async with asyncio.timeout(timeout_s):
        await store.get(name, writeinto=sink)
    return sink.getvalue()

"""`heddle health ROLE`: whether this machine's instance of a service is ready, for container health checks."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from common import subjects
from common.codec import MalformedMessageError, decode
from common.messages import Beat, Role
from services.cli.nats_once import connect_once

PING_WAIT_S = 1.0


class HealthError(RuntimeError):
    """No instance of the service is ready here; the message says what was found."""


async def check(role: Role, nats_url: str, host: str | None = None, timeout_s: float = 5.0) -> str:
    """The id of a ready instance on `host` (default: this one; "any": all). Raises HealthError
    or NatsUnreachableError.

    A ping finds the instances, as `nats micro ping` does; a heartbeat tells the state, because one that still loads its
    model answers pings too.
    """
    client = await connect_once(nats_url)
    try:
        beats = await client.subscribe(subjects.beat(role, "*"))
        ids = await instances(client, role, host or socket.gethostname())
        if not ids:
            raise HealthError(f"no {role} answers pings on {host or 'this host'}")
        async for data in _within(timeout_s, beats):
            beat = _beat(data)
            if beat is not None and beat.instance_id in ids and beat.state == "ready":
                return beat.instance_id
        raise HealthError(f"no {role} said within {timeout_s:g} s that it is ready")
    finally:
        await client.close()


async def instances(client: Client, role: Role, host: str) -> set[str]:
    """Ids of the instances of a service that run on a host ("any": anywhere) and answer within a second."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(f"$SRV.PING.heddle-{role}", b"", reply=inbox)
    found: set[str] = set()
    async for data in _within(PING_WAIT_S, answers):
        if not data:  # the server's word that nobody listens
            break
        metadata = json.loads(data).get("metadata") or {}
        if host in ("any", metadata.get("host")):
            found.add(metadata.get("instance_id", ""))
            break
    return found


async def _within(timeout_s: float, messages: Subscription) -> AsyncIterator[bytes]:
    """The messages that arrive within so long.

    By the clock: on Python 3.11 `next_msg` may lose the cancellation that a timeout around it is made of.
    """
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            message = await messages.next_msg(left_s)
        except nats.errors.TimeoutError:
            return
        yield message.data


def _beat(data: bytes) -> Beat | None:
    try:
        return decode(data, Beat)
    except MalformedMessageError:
        return None

"""`heddle health ROLE`: whether this machine's instance of a service is ready, for container health checks."""

from __future__ import annotations

import asyncio
import json
import socket

import nats.errors
from nats.aio.client import Client

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
        async with asyncio.timeout(timeout_s):
            while True:
                beat = _beat((await beats.next_msg(timeout_s)).data)
                if beat is not None and beat.instance_id in ids and beat.state == "ready":
                    return beat.instance_id
    except (TimeoutError, nats.errors.TimeoutError) as error:
        raise HealthError(f"no {role} said within {timeout_s:g} s that it is ready") from error
    finally:
        await client.close()


async def instances(client: Client, role: Role, host: str) -> set[str]:
    """Ids of the instances of a service that run on a host ("any": anywhere) and answer within a second."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(f"$SRV.PING.heddle-{role}", b"", reply=inbox)
    found: set[str] = set()
    try:
        async with asyncio.timeout(PING_WAIT_S):
            while not found:
                answer = await answers.next_msg(PING_WAIT_S)
                if not answer.data:  # the server's word that nobody listens
                    break
                metadata = json.loads(answer.data).get("metadata") or {}
                if host in ("any", metadata.get("host")):
                    found.add(metadata.get("instance_id", ""))
    except (TimeoutError, nats.errors.TimeoutError):
        pass
    return found


def _beat(data: bytes) -> Beat | None:
    try:
        return decode(data, Beat)
    except MalformedMessageError:
        return None

"""A NATS connection for a command: made now or refused with a reason, where services would wait. Knows no message."""

from __future__ import annotations

import nats
import nats.errors
from nats.aio.client import Client

from common.service import redacted


class NatsUnreachableError(RuntimeError):
    """No NATS server answers there."""


async def connect_once(url: str, name: str = "heddle-cli") -> Client:
    """A connection, after one attempt. Raises NatsUnreachableError with the reason of the last failure."""
    reasons: list[str] = []

    async def on_error(error: Exception) -> None:
        reasons.append(str(error) or type(error).__name__)

    try:
        return await nats.connect(
            url,
            name=name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.1,
            connect_timeout=3,
            error_cb=on_error,
        )
    except (OSError, ValueError, nats.errors.Error) as error:
        reason = reasons[-1] if reasons else str(error) or type(error).__name__
        raise NatsUnreachableError(f"no NATS server answers at {redacted(url)}: {reason}") from error

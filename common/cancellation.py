"""Cancellation that Python 3.11 may lose. Knows no message."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError when this task was cancelled and went on all the same.

    Until Python 3.12 `asyncio.wait_for`, which the NATS client awaits its replies with, drops a cancellation that arrives
    together with the result; a loop around it would then run for ever, and its TaskGroup never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError

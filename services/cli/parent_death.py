"""Ties a child's life to its parent's: a supervisor that is killed leaves nothing running. Knows Linux's prctl only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """A preexec_fn after which the kernel kills the child when the thread that started it ends; None where it cannot.

    SIGKILL, because without a supervisor and a NATS server a child has nobody to hand work over to.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return arm

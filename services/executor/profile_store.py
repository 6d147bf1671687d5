"""Latency profiles that outlive a process: the KV bucket `heddle_profiles`, by model, device, dtype, threads and code."""

from __future__ import annotations

import re

from nats.js.errors import NotFoundError

from common import subjects
from common.bus import Bus
from common.codec import MalformedMessageError, decode, encode
from common.messages import LatencyProfile


class ProfileStore:
    """Recalls and keeps measured profiles, so that a second start does not measure again."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def recall(self, key: str) -> LatencyProfile | None:
        """The profile kept under this key; None if there is none that can be read."""
        try:
            entry = await (await self._bus.key_value(subjects.PROFILES_BUCKET)).get(_safe(key))
            profile = decode(entry.value or b"", LatencyProfile)
            return profile if profile.points else None
        except (NotFoundError, MalformedMessageError):
            return None

    async def keep(self, key: str, profile: LatencyProfile) -> None:
        """Store a profile under this key."""
        await (await self._bus.key_value(subjects.PROFILES_BUCKET)).put(_safe(key), encode(profile))


def _safe(key: str) -> str:
    return re.sub(r"[^-/_=.a-zA-Z0-9]", "_", key)

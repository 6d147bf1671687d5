"""Who is alive: the last heartbeat of every service instance. Pure; `now` is an argument."""

from __future__ import annotations

from common.messages import Beat, Role

MISSED_BEATS = 3
"""A peer is dead after this many periods without a beat."""


class Fleet:
    """The instances heard of, by role and id."""

    def __init__(self) -> None:
        self._beats: dict[tuple[str, str], tuple[float, Beat]] = {}

    def observe(self, beat: Beat, now: float) -> None:
        """Remember a beat that arrived now; the receiver's clock counts, clocks of machines differ."""
        self._beats[beat.role, beat.instance_id] = (now, beat)

    def forget(self, role: Role, instance_id: str) -> None:
        """Treat an instance as dead, for example after it did not answer; its next beat brings it back."""
        self._beats.pop((role, instance_id), None)

    def alive(self, role: Role | None, now: float) -> list[Beat]:
        """Last beats of the living instances of a role (all roles: None), by role and id; drops the dead."""
        dead = [key for key, (heard_at, beat) in self._beats.items() if now - heard_at > MISSED_BEATS * beat.period_s]
        for key in dead:
            del self._beats[key]
        return [beat for (r, _), (_, beat) in sorted(self._beats.items()) if role is None or r == role]

    def is_alive(self, role: Role, instance_id: str, now: float) -> bool:
        """Whether this instance was heard of within three periods."""
        return any(beat.instance_id == instance_id for beat in self.alive(role, now))

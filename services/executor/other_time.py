"""What iterations take beyond their decoding rows: messages, and what else they hold. Pure; knows no clock."""

from __future__ import annotations

WEIGHT = 0.2


class OtherTime:
    """Mean ms of the last iterations beyond what their roots and draft nodes were predicted to take."""

    def __init__(self) -> None:
        self.plain_ms = 0.0
        """Of iterations that only decode: messages."""
        self._mixed_ms = 0.0
        self._knows_plain = False

    @property
    def mixed_ms(self) -> float:
        """What prefill and finetuning add to that."""
        return max(0.0, self._mixed_ms - self.plain_ms)

    def learn(self, other_ms: float, *, is_mixed: bool, is_plain: bool) -> None:
        """An iteration. `is_plain` says that it decoded roots alone and no planner was at work beside it: once there was one of
        these, others tell nothing of `plain_ms`, as verifying and a busy planner are no part of it.
        """
        if is_mixed:
            self._mixed_ms += WEIGHT * (max(0.0, other_ms) - self._mixed_ms)
        elif is_plain or not self._knows_plain:
            self.plain_ms += WEIGHT * (max(0.0, other_ms) - self.plain_ms)
            self._knows_plain |= is_plain

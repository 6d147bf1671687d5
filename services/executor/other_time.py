"""What iterations take beyond their decoding rows: messages, and what else they hold. Pure; knows no clock."""

from __future__ import annotations

WEIGHT = 0.2


class OtherTime:
    """Mean ms of the last iterations beyond what their roots and draft nodes were predicted to take."""

    def __init__(self) -> None:
        self.plain_ms = 0.0
        """Of iterations that decode roots alone while no planner is at work beside them: messages. None until there was one:
        were roots alone believed to take what verifying takes, nobody would try them.
        """
        self._beside_ms = 0.0
        self._mixed_ms = 0.0

    @property
    def busy_ms(self) -> float:
        """What verifying, and a planner at work on the same cores, add to iterations that only decode."""
        return max(0.0, self._beside_ms - self.plain_ms)

    @property
    def mixed_ms(self) -> float:
        """What prefill and finetuning add."""
        return max(0.0, self._mixed_ms - self.plain_ms)

    def learn(self, other_ms: float, *, is_mixed: bool, is_plain: bool) -> None:
        """An iteration; `is_plain` says that it decoded roots alone and no planner was at work beside it."""
        other_ms = max(0.0, other_ms)
        if is_mixed:
            self._mixed_ms += WEIGHT * (other_ms - self._mixed_ms)
        elif is_plain:
            self.plain_ms += WEIGHT * (other_ms - self.plain_ms)
        else:
            self._beside_ms += WEIGHT * (other_ms - self._beside_ms)

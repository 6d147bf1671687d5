"""What to do next with a job on its executor. Pure: positions in, one action out."""

from __future__ import annotations

import dataclasses
from typing import Literal

Action = Literal["send", "wait", "checkpoint", "finish", "stop"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Steps sent to the executor, done by it, and held by the newest checkpoint: checkpointed <= done <= sent."""

    sent: int
    done: int
    checkpointed: int


def next_action(position: Position, steps_per_epoch: int, total_steps: int, max_in_flight: int, stopping: bool) -> Action:
    """Send a step, wait for one, write a checkpoint, finish the job, or (when stopping) leave the executor.

    A checkpoint belongs to an exact step, so steps behind an epoch's end are sent only after its checkpoint is written.
    """
    epoch = max(position.checkpointed // steps_per_epoch + 1, -(-position.done // steps_per_epoch))
    boundary = min(epoch * steps_per_epoch, total_steps)
    limit = position.sent if stopping else boundary
    if position.sent < limit and position.sent - position.done < max_in_flight:
        return "send"
    if position.done < position.sent:
        return "wait"
    if position.checkpointed < position.done and (stopping or position.done == boundary):
        return "checkpoint"
    return "finish" if position.done == total_steps else "stop"

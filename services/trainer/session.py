"""One job on one executor under one lease: orders out, progress in, refusals as exceptions. Knows no schedule and no table."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from nats.aio.subscription import Subscription

from common import subjects
from common.bus import Bus, BusError, BusTimeoutError, TooLargeError
from common.codec import MalformedMessageError
from common.fleet import Fleet
from common.messages import (
    CheckpointWritten,
    CloseJob,
    EvaluationSlice,
    JobClosed,
    JobFailed,
    JobOpened,
    OpenJob,
    Rejected,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)
from services.trainer.config import TrainerConfig

T = TypeVar("T")
Progress = StepDone | SequenceEvaluated | JobFailed
log = structlog.get_logger()
NUM_TRIES = 3
"""An answer may be lost; every order is idempotent."""


class ExecutorLostError(Exception):
    """The executor is gone or does not know the job (any more): open it again, here or elsewhere."""


class OverloadedError(Exception):
    """The executor takes no more now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"overloaded, retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


class JobRejectedError(Exception):
    """The executor will never do this; the job has failed."""


class ExecutorSession:
    """`inbox` collects progress of this lease and `wake` is set with it; `guard` raises when the job is not ours any more."""

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        config: TrainerConfig,
        executor_id: str,
        order: OpenJob,
        wake: asyncio.Event,
        guard: Callable[[], None],
    ) -> None:
        self.executor_id = executor_id
        self.order = order
        self.inbox: deque[Progress] = deque()
        self.wake = wake
        self._bus, self._fleet, self._config, self._guard = bus, fleet, config, guard
        self._subscription: Subscription | None = None

    def is_alive(self) -> bool:
        """Whether the executor's heart beats and it is ready: one that starts (again) or drains holds no job of ours."""
        beats = self._fleet.alive("executor", time.monotonic())
        return any(beat.instance_id == self.executor_id and beat.state == "ready" for beat in beats)

    async def open(self) -> int:
        """Let the executor hold the job as the order's checkpoint has it; returns the step to continue with."""
        either: Any = Progress
        self._subscription = await self._bus.subscribe(subjects.job_progress(self.order.job_id), either, self._on_progress)
        return (await self._ask(self.order, JobOpened, self._config.open_timeout_s)).step

    async def send(self, item: TrainingSlice | EvaluationSlice) -> None:
        """Queue a slice. Raises OverloadedError, ExecutorLostError or JobRejectedError."""
        await self._ask(item, SliceAccepted, self._config.request_timeout_s)

    async def checkpoint(self, artifact: str) -> CheckpointWritten:
        """Store the state after the steps done so far."""
        order = WriteCheckpoint(job_id=self.order.job_id, lease=self.order.lease, artifact=artifact)
        return await self._ask(order, CheckpointWritten, self._config.open_timeout_s)

    async def close(self) -> None:
        """Let the executor forget the job, if it can be reached."""
        order = CloseJob(job_id=self.order.job_id, lease=self.order.lease)
        either: Any = JobClosed | Rejected
        try:
            await self._bus.request(subjects.executor_slices(self.executor_id), order, either, self._config.request_timeout_s)
        except (BusError, MalformedMessageError) as error:
            log.warning("job.not_closed", job_id=order.job_id, executor=self.executor_id, error=str(error))

    async def end(self) -> None:
        """Listen no more."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    async def _on_progress(self, progress: Progress) -> None:
        if progress.lease == self.order.lease:
            self.inbox.append(progress)
            self.wake.set()

    async def _ask(self, message: Any, expected: type[T], timeout_s: float) -> T:
        for _ in range(NUM_TRIES):
            try:
                reply = await self._watched(message, expected, timeout_s)
            except BusTimeoutError:
                continue
            if isinstance(reply, Rejected):
                raise _refusal(reply)
            return reply
        raise ExecutorLostError(f"executor {self.executor_id} does not answer")

    async def _watched(self, message: Any, expected: type[T], timeout_s: float) -> T | Rejected:
        """The reply, unless the executor dies or the job is taken from us meanwhile."""
        either: Any = expected | Rejected
        subject = subjects.executor_slices(self.executor_id)
        request = asyncio.ensure_future(self._bus.request(subject, message, either, timeout_s))
        try:
            while not (await asyncio.wait({request}, timeout=self._config.heartbeat_s))[0]:
                self._guard()
                if not self.is_alive():
                    raise ExecutorLostError(f"executor {self.executor_id} is gone")
            reply: T | Rejected = request.result()
            return reply
        except BusTimeoutError:
            raise
        except TooLargeError as error:
            raise JobRejectedError(str(error)) from error
        except (BusError, MalformedMessageError) as error:
            raise ExecutorLostError(f"executor {self.executor_id}: {error}") from error
        finally:
            request.cancel()


def _refusal(rejected: Rejected) -> Exception:
    match rejected.reason:
        case "overloaded":
            return OverloadedError(rejected.retry_after_ms / 1000)
        case "invalid" | "too_long" if rejected.retry_after_ms == 0:
            return JobRejectedError(rejected.message)
        case _:
            return ExecutorLostError(f"{rejected.reason}: {rejected.message}")

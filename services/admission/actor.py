"""Admission on the bus: hears heartbeats, asks the policy, hands requests over. Decides nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import msgspec
import structlog
from nats.aio.subscription import Subscription

from common import subjects
from common.bus import Bus, BusError, NoServiceError, TooLargeError
from common.codec import MalformedMessageError
from common.fleet import Fleet
from common.messages import Admit, Admitted, Beat, Cancel, InferenceRequest, Rejected
from common.service import Vitals
from services.admission.config import AdmissionConfig
from services.admission.inflight import InFlight
from services.admission.policy import NO_EXECUTOR_RETRY_MS, Limits, admit
from services.admission.prefixes import Prefixes

log = structlog.get_logger()

LISTEN_PERIODS = 1.25
"""Heartbeat periods to listen for before taking requests: an admission that knows no executor yet would turn them away."""
ELSEWHERE = ("overloaded", "draining")
"""An executor's refusals that say nothing about other executors."""
ANSWER: Any = Admitted | Rejected


class AdmissionActor:
    """One of any number of admissions; its state is soft and comes back with the next heartbeats."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._limits = Limits(
            prefill_chunk=config.prefill_chunk, max_backlog_ms=config.max_backlog_ms, max_waiting=config.max_waiting
        )
        self._fleet = Fleet()
        self._in_flight = InFlight()
        self._prefixes = Prefixes()
        self._counters: Counter[str] = Counter()
        self._bus: Bus | None = None
        self._requests: Subscription | None = None

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Learn who is there, then join the queue group."""
        self._bus = bus
        await bus.subscribe(subjects.ALL_BEATS, Beat, self._on_beat)
        await asyncio.sleep(LISTEN_PERIODS * self._config.heartbeat_s)
        self._requests = await bus.subscribe(
            subjects.INFER, InferenceRequest, self._on_request, queue="admission", concurrent=True
        )
        await bus.flush()

    async def drain(self) -> None:
        """Leave the queue group; the bus waits for the handlers that still run."""
        if self._requests is not None:
            await self._requests.drain()  # type: ignore[no-untyped-call]

    def vitals(self) -> Vitals:
        """Decisions so far and the executors in view."""
        return Vitals(
            counters={name: float(count) for name, count in self._counters.items()},
            gauges={
                "executors": float(len(self._executors())),
                "in_flight": float(len(self._in_flight)),
            },
        )

    async def _on_beat(self, beat: Beat) -> None:
        if beat.role == "executor":
            now = time.monotonic()
            self._fleet.observe(beat, now)
            self._in_flight.observe_beat(beat.instance_id, beat.sent_at, now)
            self._prefixes.observe_beat(beat)

    async def _on_request(self, request: InferenceRequest) -> Admitted | Rejected:
        if not request.arrived_at:
            request = msgspec.structs.replace(request, arrived_at=time.time())
        answer = await self._place(request)
        if isinstance(answer, Rejected):
            self._counters[f"rejected_{answer.reason}"] += 1
            log.info("request.rejected", request_id=request.request_id, reason=answer.reason, message=answer.message)
        else:
            self._counters["admitted"] += 1
            self._counters["best_effort"] += answer.best_effort
        return answer

    async def _place(self, request: InferenceRequest) -> Admitted | Rejected:
        """Ask executors, best first, until one takes the request, refuses it for good, or none is left."""
        excluded: set[str] = set()
        refusal: Rejected | None = None
        while True:
            beats = {beat.instance_id: beat for beat in self._executors()}
            cached = {name: self._prefixes.cached_tokens(request, beat) for name, beat in beats.items()}
            decision = admit(request, list(beats.values()), time.time(), self._limits, excluded, cached)
            if isinstance(decision, Rejected):
                return refusal or decision
            self._counters["retried"] += bool(excluded)
            answer = await self._forward(request, decision.executor_id, cached[decision.executor_id])
            if isinstance(answer, Admitted):
                self._counters["expected_cached_tokens"] += cached[decision.executor_id]
                self._prefixes.accepted(beats[decision.executor_id], request)
                return msgspec.structs.replace(
                    answer,
                    best_effort=answer.best_effort or decision.best_effort,
                    attainable=answer.attainable and decision.attainable,
                )
            if answer is not None and answer.reason not in ELSEWHERE:
                return answer
            refusal = answer or refusal
            excluded.add(decision.executor_id)

    def _executors(self) -> list[Beat]:
        """Last beats of the living executors, their loads brought up to date."""
        beats = self._fleet.alive("executor", time.monotonic())
        for known in (self._in_flight, self._prefixes):
            known.keep_only({beat.instance_id for beat in beats})
        return [self._in_flight.add_to(beat) for beat in beats]

    async def _forward(self, request: InferenceRequest, executor_id: str, cached_tokens: int) -> Admitted | Rejected | None:
        """Hand the request to one executor; None if nobody is there, so that it is safe to ask another."""
        assert self._bus is not None
        ttft_ms = request.slo.ttft_ms
        order = Admit(request=request, first_token_due_at=request.arrived_at + ttft_ms / 1000 if ttft_ms else 0.0)
        answer: Admitted | Rejected | None = None
        self._in_flight.send(executor_id, request, cached_tokens)
        try:
            subject = subjects.executor_admit(executor_id)
            answer = await self._bus.request(subject, order, ANSWER, self._config.admit_timeout_s)
        except NoServiceError:
            self._fleet.forget("executor", executor_id)
        except TooLargeError as error:
            answer = Rejected(reason="too_long", message=str(error))
        except (BusError, MalformedMessageError) as error:
            answer = await self._give_up(request, executor_id, error)
        finally:
            accepted = isinstance(answer, Admitted)
            self._in_flight.settle(executor_id, request.request_id, accepted=accepted, now=time.monotonic())
        return answer

    async def _give_up(self, request: InferenceRequest, executor_id: str, error: Exception) -> Rejected:
        """The executor may have taken the request, and a second one would stream on the same subject.

        So nobody else is asked: the request is cancelled, and its sender tries again under a new id.
        """
        assert self._bus is not None
        log.warning("executor.no_answer", executor=executor_id, request_id=request.request_id, error=str(error))
        self._counters["unanswered"] += 1
        self._fleet.forget("executor", executor_id)
        await self._bus.publish(subjects.cancel(request.request_id), Cancel(request_id=request.request_id))
        message = f"executor {executor_id} did not answer"
        return Rejected(reason="no_executor", message=message, retry_after_ms=NO_EXECUTOR_RETRY_MS)

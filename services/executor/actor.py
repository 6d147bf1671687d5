"""The executor's actor: messages in, iterations, messages out. Owns the one thread that touches the device."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog
from nats.errors import Error as NatsError

from common import subjects
from common.bus import Bus, BusError
from common.fingerprint import fingerprint
from common.messages import Admit, Admitted, Beat, Cancel, CheckAdapter, Rejected, TokenChunk
from common.service import Vitals
from services.executor.adapter_slots import AdapterSlots
from services.executor.adapter_store import AdapterStore
from services.executor.config import ExecutorConfig
from services.executor.device import is_out_of_memory
from services.executor.engine import Iteration
from services.executor.gateway_watch import GatewayWatch
from services.executor.grammar_store import GrammarStore
from services.executor.inbox import Inbox
from services.executor.load import cached_pages, executor_vitals
from services.executor.planner_link import PlannerLink
from services.executor.profile_store import ProfileStore
from services.executor.reports import Reports
from services.executor.startup import make_engine
from services.executor.training_link import TrainingLink
from services.executor.training_work import BackwardWork

T = TypeVar("T")
NUM_LOADS = 3
"""How often a request loads its adapter that is evicted again before the request is in."""
MAX_FAILURES = 3
"""Passes in a row that may fail before the process ends."""
log = structlog.get_logger()


class ExecutorActor:
    """Serves one base model and its adapters on one device."""

    def __init__(self, config: ExecutorConfig) -> None:
        self._config = config
        self._model = config.served_model_name or Path(config.model_dir).resolve().name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._inbox = Inbox()
        self._idle = asyncio.Event()
        self._draining = False
        self._vitals = Vitals(state="starting")
        self._pages: bytes | None = None
        self._pages_at = -math.inf
        self._iteration_ms = 0.0
        self._has_worked_back = False
        """In the last iteration, on finetuning."""
        self._num_failures = 0
        self._waiting: set[object] = set()
        """What waits for the device's thread."""
        self._gateways = GatewayWatch(config.heartbeat_s, self._on_lost_gateway)
        self._planner = PlannerLink(config.instance_id, self._model, config.tree_wait_ms / 1e3, config.cohorts)

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Load the model, measure or recall its latency profile, then accept work; adapters come as they are loaded."""
        self._bus = bus
        self._engine = await make_engine(self._config, self._model, ProfileStore(bus), self._on_device)
        self._engine.has_news = lambda: self._inbox.is_filled or bool(self._waiting)
        self._training = TrainingLink(bus, self._config, self._model, self._engine.training, self._inbox, self._on_device)
        self._grammars = GrammarStore(Path(self._config.model_dir), self._engine.decoder.config)
        self._reports = Reports(self._engine, self._planner, self._config, self._on_device)
        self._adapters = self._make_adapter_store(bus)
        tasks.create_task(self._adapters.follow())
        tasks.create_task(self._run())
        await bus.subscribe(subjects.beat("gateway", "*"), Beat, self._on_gateway_beat)
        tasks.create_task(self._gateways.run(bus))
        await bus.subscribe(subjects.executor_admit(self._config.instance_id), Admit, self._on_admit, concurrent=True)
        # NATS clients cancel with an empty message, which the gateway takes.
        await bus.subscribe(subjects.ALL_CANCELS, Cancel, self._on_cancel, ignores_empty=True)
        await self._training.start()
        if self._config.speculation:
            self._planner.fingerprint = fingerprint(Path(self._config.model_dir))
            await self._planner.start(bus, tasks)
        checks = subjects.check_adapter(self._model)
        await bus.subscribe(checks, CheckAdapter, self._adapters.on_check, queue="executor", concurrent=True)
        self._refresh_vitals()

    async def drain(self) -> None:
        """Refuse new work, finish running requests within the grace, then end the rest with an error."""
        self._draining = True
        await self._training.drain()
        try:
            async with asyncio.timeout(self._config.drain_grace_s):
                while self._engine.sequences:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            await self._send(await self._inbox.ask(lambda: self._engine.release_all("the executor is shutting down")))

    def vitals(self) -> Vitals:
        """State and load as of the last iteration."""
        return self._vitals

    # --- messages --------------------------------------------------------------------------------------------------

    async def _on_admit(self, message: Admit) -> Admitted | Rejected:
        request = message.request
        grammar = await self._grammars.state_of(request)
        if isinstance(grammar, Rejected):
            return grammar
        if self._draining:
            return Rejected(reason="draining", message="this executor is shutting down", retry_after_ms=1000)
        adapter = None if request.model == self._model else request.model

        def submit() -> Admitted | Rejected | None:
            if adapter is not None and adapter not in self._engine.adapters:
                return None
            refused = self._engine.submit(request, adapter, message.first_token_due_at, grammar)
            if refused is None and request.gateway_id:
                self._gateways.expect(request.gateway_id, time.monotonic())
            self._refresh_vitals()
            return refused or Admitted(request_id=request.request_id, executor_id=self._config.instance_id)

        for _ in range(NUM_LOADS):
            if (answer := await self._inbox.ask(submit)) is not None:
                return answer
            assert adapter is not None
            if (refused := await self._adapters.obtain(adapter)) is not None:
                return refused
        return Rejected(reason="overloaded", message=f"adapter {adapter} was evicted at once", retry_after_ms=1000)

    async def _on_cancel(self, message: Cancel) -> None:
        self._inbox.post(lambda: self._cancel(message.request_id))

    def _cancel(self, request_id: str, error: str | None = None) -> None:
        chunk = self._engine.cancel(request_id, error)
        if chunk is not None:
            self._reports.drop(request_id)
            self._bus.spawn(self._send([chunk]))

    async def _on_gateway_beat(self, beat: Beat) -> None:
        self._gateways.observe(beat, time.monotonic())

    def _on_lost_gateway(self, gateway_id: str) -> None:
        def cancel() -> None:
            lost = [s.request_id for s in self._engine.sequences.values() if s.request.gateway_id == gateway_id]
            if lost:
                log.warning("gateway.lost", gateway=gateway_id, num_requests=len(lost))
            self._engine.counters["orphaned_requests"] += len(lost)
            for request_id in lost:
                self._cancel(request_id, "nothing was heard of the request's gateway")

        self._inbox.post(cancel)

    def _make_adapter_store(self, bus: Bus) -> AdapterStore:
        engine, config = self._engine, self._config
        self._slots = AdapterSlots(
            config.max_loras, engine.adapters, lambda: [sequence.adapter for sequence in engine.sequences.values()]
        )
        return AdapterStore(
            bus,
            engine.decoder,
            self._model,
            resident=engine.adapters,
            slots=self._slots,
            max_lora_rank=config.max_lora_rank,
            inbox=self._inbox,
            on_device=self._on_device,
        )

    # --- iterations ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Iterate while there is work; between iterations apply what came in."""
        while True:
            self._inbox.apply()
            if not self._engine.has_work:
                self._refresh_vitals(is_idle=True)
                self._idle.set()
                await self._reports.tell_of_dropped()
                await self._inbox.wait()
                continue
            try:
                await self._iterate()
                self._num_failures = 0
            except (RuntimeError, MemoryError) as error:
                await self._survive(error)

    async def _survive(self, error: Exception) -> None:
        """A pass failed: its requests end with an error. When passes keep failing the device is to blame, and we stop:
        whoever supervises starts us again, gateways and trainers go on elsewhere. Not when memory is what they lacked: that is
        the requests' doing, and free again without them.
        """
        self._engine.counters["failed_iterations"] += 1
        if is_out_of_memory(error):
            log.error("iteration.out_of_memory", error=str(error).partition("\n")[0])
            reason = "the executor ran out of memory: HEDDLE_EXECUTOR_MAX_SEQUENCES bounds what it takes in"
        else:
            log.exception("iteration.failed", error=str(error))
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES:
                raise error
            reason = f"the pass failed: {type(error).__name__}"
        chunks = self._engine.release_all(reason)
        for chunk in chunks:
            self._reports.drop(chunk.request_id)
        await self._send(chunks)

    async def _iterate(self) -> None:
        started_at = time.perf_counter()
        iteration = await self._on_device(self._engine.forward_pass)
        passed_at = time.perf_counter()
        reported_at = passed_at
        try:
            await self._reports.tell(iteration, has_worked_back=self._has_worked_back)
            await asyncio.sleep(0)  # the report leaves now, before chunks are encoded: the next pass waits for its answer
            reported_at = time.perf_counter()
        finally:
            await self._send(iteration.chunks)
        sent_at = time.perf_counter()
        self._inbox.apply()
        work = await self._on_device(self._engine.backward_pass)
        self._has_worked_back = work.is_any
        elapsed_ms = (time.perf_counter() - started_at) * 1e3
        self._iteration_ms += 0.2 * (elapsed_ms - self._iteration_ms)
        is_mixed = bool(iteration.prefill_tokens or iteration.finetune_tokens or work.is_any)
        self._reports.learn(iteration, elapsed_ms - (reported_at - passed_at) * 1e3, is_mixed=is_mixed)
        self._engine.counters["send_ms"] += (sent_at - reported_at) * 1e3  # type: ignore[assignment]
        self._note(iteration, work, elapsed_ms)
        await self._training.publish(work.events)
        trees = await self._reports.trees(iteration.number)
        self._inbox.apply()
        if trees is not None:
            self._engine.set_trees(trees)
        self._refresh_vitals()

    def _note(self, iteration: Iteration, work: BackwardWork, elapsed_ms: float) -> None:
        if self._config.log_iterations:
            log.info(
                "iteration",
                number=iteration.number,
                decode=iteration.decode_tokens,
                draft=iteration.draft_tokens,
                prefill=iteration.prefill_tokens,
                finetune=round(iteration.finetune_tokens + work.units.num_tokens, 1),
                backward=round(work.num_tokens, 1),
                ms=round(elapsed_ms, 2),
                planned_ms=round(iteration.planned_ms, 2),
                limit_ms=round(iteration.limit_ms, 2),
            )
        self._engine.counters["iteration_ms"] += elapsed_ms  # type: ignore[assignment]

    async def _send(self, chunks: tuple[TokenChunk, ...] | list[TokenChunk]) -> None:
        """A chunk that cannot be sent is a gap in its stream, which the requester notices and mends."""
        for chunk in chunks:
            try:
                await self._bus.publish(subjects.stream(chunk.request_id), chunk)
            except (BusError, NatsError) as error:
                self._engine.counters["unsent_chunks"] += 1
                log.warning("chunk.unsent", request_id=chunk.request_id, error=str(error) or type(error).__name__)

    # --- the device thread -----------------------------------------------------------------------------------------

    async def _on_device(self, work: Callable[[], T]) -> T:
        waits = object()

        def begin() -> T:
            self._waiting.discard(waits)
            return work()

        self._waiting.add(waits)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, begin)
        finally:
            self._waiting.discard(waits)

    def _refresh_vitals(self, *, is_idle: bool = False) -> None:
        """After each iteration; which pages are cached as often as a beat can tell it."""
        now = time.monotonic()
        if is_idle or now - self._pages_at >= self._config.heartbeat_s / 2:
            self._pages, self._pages_at = cached_pages(self._engine), now
        self._vitals = executor_vitals(
            self._engine,
            model=self._model,
            planner_id=self._planner.planner_id or "",
            draining=self._draining,
            max_loras=self._config.max_loras,
            pages=self._pages,
            gauges={
                "iteration_ms": self._iteration_ms,
                "planner_turnaround_ms": self._planner.mean_turnaround_ms,
                "adapters_evicted": float(self._slots.num_evicted),
            },
        )

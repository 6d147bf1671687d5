"""What the planner is told of iterations, and what it drafted. Knows the engine and the link, not the bus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from common.latency import predict_ms
from common.messages import DraftTrees
from services.executor.config import ExecutorConfig
from services.executor.engine import Engine, Iteration
from services.executor.features import FeatureWish, bounded, wish_of
from services.executor.other_time import OtherTime
from services.executor.planner_link import PlannerLink
from services.executor.scheduler import root_rows

log = structlog.get_logger()


class Reports:
    """Of one executor's iterations to the planner that it claimed."""

    def __init__(
        self,
        engine: Engine,
        link: PlannerLink,
        config: ExecutorConfig,
        on_device: Callable[[Callable[[], int]], Awaitable[int]],
    ) -> None:
        self._engine, self._link, self._config, self._on_device = engine, link, config, on_device
        self._other_time = OtherTime()
        self._is_left_alone = True
        """By the planner, which is not at work beside the next pass."""
        self._unknown: frozenset[str] = frozenset()
        self._dropped: list[str] = []
        self._iteration = 0
        """The last one that was reported."""

    def drop(self, request_id: str) -> None:
        """A request ended outside of a pass: the planner is still to hear of it."""
        self._dropped.append(request_id)

    def learn(self, iteration: Iteration, spent_ms: float, *, is_mixed: bool) -> None:
        """How long an iteration took, without telling of it; `is_mixed` if it held more than decoding."""
        if iteration.decode_tokens or (is_mixed and iteration.prefill_tokens):  # finetuning alone takes as long as it likes
            is_plain = iteration.draft_tokens == 0 and self._is_left_alone
            self._other_time.learn(spent_ms - iteration.decode_ms, is_mixed=is_mixed, is_plain=is_plain)

    async def tell(self, iteration: Iteration, *, has_worked_back: bool) -> None:
        """Report an iteration; `has_worked_back` if there was backward work since the one before."""
        decoding = [sequence for sequence in self._engine.sequences.values() if sequence.is_decoding]
        closed = (*self._dropped, *(chunk.request_id for chunk in iteration.chunks if chunk.finish_reason))
        self._dropped.clear()
        self._iteration = iteration.number
        if not decoding and not closed:
            return
        if (everyone := self._link.takes_reopening()) and self._link.granted is not None:
            await self._wish(wish_of(self._link.granted, self._engine.decoder.config.num_layers))
        fresh = {sequence.request_id for sequence in iteration.opened} | self._unknown
        opened = tuple(s.opened() for s in decoding if everyone or s.request_id in fresh)
        self._unknown = frozenset()
        profile = self._engine.profile
        next_pass = self._engine.cohorts.next_pass(self._decoding())
        contexts = [s.num_computed for s in decoding if s.request_id in next_pass]
        is_mixed = len(decoding) < len(self._engine.sequences) or self._engine.training.has_work
        turns = 1 if len(contexts) == len(decoding) else 2
        known = {sequence.request_id for sequence in opened}
        await self._link.report(
            iteration.number,
            opened=bounded(opened),
            closed=closed,
            progress=tuple(step for step in iteration.progress if step.request_id not in known),
            token_budget=min(self._config.max_draft_tokens, self._config.max_batch_tokens - len(decoding)),
            base_tokens=len(next_pass),
            num_others=len(decoding) - len(contexts),
            plain_ms=turns * (self._other_time.plain_ms + predict_ms(profile, root_rows(contexts))),
            busy_ms=0.0 if is_mixed else turns * self._other_time.busy_ms,
            other_ms=turns * self._other_time.mixed_ms if is_mixed else 0.0,
            is_mixed=bool(iteration.prefill_tokens or iteration.finetune_tokens or has_worked_back),
            latency=profile,
        )

    async def tell_of_dropped(self) -> None:
        """Without an iteration, as there is no work: the planner would hold what ended for ever."""
        if not self._dropped:
            return
        closed = tuple(self._dropped)
        self._dropped.clear()
        await self._link.report(
            self._iteration,
            opened=(),
            closed=closed,
            progress=(),
            token_budget=0,
            base_tokens=0,
            num_others=0,
            plain_ms=0.0,
            busy_ms=0.0,
            other_ms=0.0,
            is_mixed=True,
            latency=self._engine.profile,
        )

    async def trees(self, iteration: int) -> DraftTrees | None:
        """For the next pass, if they come in time. `iteration` is the last one's number."""
        awaited = self._engine.cohorts.awaited(self._decoding(), iteration)
        trees = await self._link.trees(awaited)
        self._is_left_alone = self._link.is_quiet(awaited)
        self._engine.counters["wait_ms"] = self._link.wait_ms  # type: ignore[assignment]
        self._engine.counters["trees_overdue"] = self._link.num_overdue
        if trees is not None:
            self._unknown = frozenset(trees.unknown)
        return trees

    async def _wish(self, wish: FeatureWish) -> None:
        """Keep these states from now on; graphs that do are recorded at once, lest passes with requests in them do it."""
        self._engine.feature_wish = wish
        if num_graphs := await self._on_device(lambda: self._engine.passes.record_all(wish.layers)):
            log.info("executor.graphs", recorded=num_graphs, layers=wish.layers)

    def _decoding(self) -> list[str]:
        return [sequence.request_id for sequence in self._engine.sequences.values() if sequence.is_decoding]

"""The finetuning jobs inside an executor: which windows ride in the next pass, on whose pages. Knows no bus and no SLO."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from common.activation_plan import MAX_WINDOW_TOKENS
from common.messages import EvaluationSlice, TrainingSlice
from services.executor.backward import advance
from services.executor.batch import Segment
from services.executor.device import wait_for
from services.executor.distillation import DistillationJob
from services.executor.evaluation import Evaluations, EvaluationWindow
from services.executor.features import PassFeatures
from services.executor.finetune import FinetuneJob
from services.executor.finetune_share import WHOLE, JobView, UnitSize
from services.executor.in_flight import InFlight
from services.executor.job_steps import MAX_GROUP_ROWS, OutOfOrderSliceError, TrainingDivergedError
from services.executor.lesson import LessonSequence
from services.executor.model import Decoder, KvCache
from services.executor.pages import PageAllocator, PageTable
from services.executor.training_sequence import InvalidSliceError, TrainingSequence, check_slice, heads
from services.executor.training_work import BackwardWork, TrainingEvent, Window

MAX_POOL_SHARE = 0.25
"""Training sequences hold at most this share of the pages, so that inference is never starved of them."""
MAX_QUEUED_SLICES = 64
NUM_REMEMBERED_STEPS = 64
"""Steps of a job that can be told again: at least as many as a trainer has in flight."""


class TooManySlicesError(Exception):
    """The job's queue is full: send on when a step is done."""


@dataclasses.dataclass(eq=False)
class _Entry:
    job: FinetuneJob | DistillationJob
    lease: int
    table: PageTable
    num_queued: int = 0
    steps: deque[TrainingEvent] = dataclasses.field(default_factory=lambda: deque(maxlen=NUM_REMEMBERED_STEPS))
    step_started_at: float = dataclasses.field(default_factory=time.perf_counter)


class Training:
    """Jobs by id. A job holds pages for the sequences that it works on."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, pages: PageAllocator, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self._pages = pages
        self._entries: dict[str, _Entry] = {}
        self._failures: list[TrainingEvent] = []
        self._in_flight = InFlight(decoder, cache, clock)
        self._evaluations = Evaluations(decoder, pages, self._try_reserve)

    @property
    def num_jobs(self) -> int:
        """Jobs that are open."""
        return len(self._entries)

    @property
    def has_work(self) -> bool:
        """Whether some job has a sequence to work on. With no other user of pages, at least one of them can have its pages."""
        is_training = any(entry.num_queued for entry in self._entries.values())
        return is_training or bool(self._failures) or self._evaluations.has_work

    @property
    def max_tokens(self) -> int:
        """Longest training sequence that fits into training's share of the pages."""
        num_pages = int(MAX_POOL_SHARE * self._pages.num_pages)
        return min(num_pages * self._pages.page_size, self.decoder.config.max_position_embeddings)

    def lease(self, job_id: str) -> int | None:
        """The lease that a job was opened with; None for unknown jobs."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.lease

    def held(self, job_id: str, lease: int) -> FinetuneJob | DistillationJob | None:
        """The job, if it is open under this lease."""
        entry = self._entries.get(job_id)
        return entry.job if entry is not None and entry.lease == lease else None

    def last_steps(self, job_id: str, lease: int) -> tuple[TrainingEvent, ...]:
        """A job's last steps, newest last; none of a job that is not open under this lease."""
        entry = self._entries.get(job_id)
        return () if entry is None or entry.lease != lease else tuple(entry.steps)

    def open(self, job: FinetuneJob | DistillationJob, lease: int) -> None:
        """Hold a job, in place of what was held of it under an older lease."""
        self.close(job.job_id)
        self._entries[job.job_id] = _Entry(job, lease, self._pages.table())

    def close(self, job_id: str) -> None:
        """Forget a job and free its pages; unknown jobs are fine."""
        self._evaluations.close(job_id)
        self._in_flight.drop(job_id)
        entry = self._entries.pop(job_id, None)
        if entry is not None:
            self._pages.release(entry.table)

    def close_all(self) -> None:
        """Forget all jobs."""
        for job_id in list(self._entries):
            self.close(job_id)

    def accept(self, item: TrainingSlice | EvaluationSlice) -> None:
        """Queue a slice of an open job; one that came before is ignored.

        Raises InvalidSliceError (also for a sequence that the page pool cannot hold) or TooManySlicesError.
        """
        entry = self._entries[item.job_id]
        if len(item.tokens) > self.max_tokens:
            raise InvalidSliceError(f"tokens: {len(item.tokens)} do not fit into the training share of the KV cache")
        num_queued = entry.num_queued + self._evaluations.num_queued(item.job_id)
        if num_queued >= MAX_QUEUED_SLICES:
            raise TooManySlicesError(f"{num_queued} slices of job {item.job_id} are waiting")
        if isinstance(item, TrainingSlice):
            entry.num_queued += entry.job.accept(item)
            return
        check_slice(item, self.decoder)
        num_evaluations = entry.job.num_evaluations if isinstance(entry.job, DistillationJob) else 0
        if item.step != entry.job.step or entry.num_queued > num_evaluations:
            raise OutOfOrderSliceError(f"an evaluation before step {item.step} came, but step {entry.job.step} is next")
        if isinstance(entry.job, DistillationJob):
            entry.num_queued += entry.job.evaluate(item)
        else:
            self._evaluations.accept(item, entry.job.adapter)

    def views(self) -> list[JobView]:
        """Jobs that can use the next iteration, for the scheduler."""
        views, in_flight = [], self._in_flight.jobs
        for job_id, entry in list(self._entries.items()):
            if job_id in in_flight:
                views.append(JobView(job_id=job_id, forward_tokens=0, is_backward=True, in_flight=in_flight[job_id]))
                continue
            try:
                group = self._current(entry)
            except (RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            if group:
                left = [sequence for sequence in group if not sequence.is_forwarded]
                views.append(
                    JobView(
                        job_id=job_id,
                        forward_tokens=sum(sequence.num_rows - sequence.num_forwarded for sequence in left),
                        is_backward=not left,
                        context_tokens=left[0].num_forwarded if left else 0,
                        is_drafter=isinstance(entry.job, DistillationJob),
                    )
                )
        return views + self._evaluations.views()

    def windows(self, forward: dict[str, int]) -> list[Window | EvaluationWindow]:
        """The windows of a plan's training tokens, a job's sequences one after another: drafters', adapters', evaluations'."""
        windows: list[Window | EvaluationWindow] = []
        entries = [(self._entries[job_id], num_tokens) for job_id, num_tokens in forward.items() if job_id in self._entries]
        for entry, num_tokens in sorted(entries, key=lambda each: not isinstance(each[0].job, DistillationJob)):
            first_slot, left = 0, num_tokens
            for sequence in self._current(entry):
                num_rows = min(left, sequence.num_rows - sequence.num_forwarded)
                if num_rows > 0:
                    segment = _segment(entry, sequence, first_slot, num_rows)
                    start = sequence.num_forwarded
                    windows.append(Window(job_id=entry.job.job_id, sequence=sequence, start=start, segment=segment))
                    left -= num_rows
                first_slot += sequence.num_rows
        return windows + self._evaluations.windows(forward)

    def start_units(self, windows: Sequence[Window | EvaluationWindow]) -> None:
        """Let these windows of adapters, a whole pass, go forward in units: as backward work."""
        self._in_flight.start([window for window in windows if isinstance(window, Window)])

    def heads(self, windows: Sequence[Window | EvaluationWindow], hidden_TH: Tensor, features: PassFeatures) -> None:
        """What comes of the windows that were forwarded, whose rows were the last ones of the pass: losses and gradients, or
        what drafters learn from.
        """
        start = len(hidden_TH) - sum(len(window.segment.tokens) for window in windows)
        parts: list[tuple[TrainingSequence, int, int]] = []
        try:
            for window in windows:
                if isinstance(window, EvaluationWindow):
                    continue
                num_rows = len(window.segment.tokens)
                if isinstance(window.sequence, TrainingSequence):
                    parts.append((window.sequence, window.start, num_rows))
                    continue
                states = features.of_layers(window.sequence.layers)
                window.sequence.take([state_TH[start : start + num_rows] for state_TH in states])
                start += num_rows
            end = start + sum(num_rows for _, _, num_rows in parts)
            if parts:
                heads(parts, hidden_TH[start:end])
            if evaluations := [window for window in windows if isinstance(window, EvaluationWindow)]:
                self._evaluations.heads(evaluations, hidden_TH[end:])
        except (RuntimeError, MemoryError) as error:
            for job_id in {window.job_id for window in windows}:
                self._fail(job_id, error)

    def backward(
        self, plan: Mapping[str, float], unit: UnitSize = WHOLE, is_stopped: Callable[[], bool] = lambda: False
    ) -> BackwardWork:
        """Go back through a plan's work, all jobs together, and on with what goes forward in units; reports steps that end and
        jobs that fail, which are closed. When it is stopped, it ends after the unit in work.
        """
        going_back = self._going_back(plan)
        units = self._in_flight.advance(plan, unit.forward, is_stopped, self._fail)
        started_at = time.perf_counter()
        drafters, drafter_tokens = self._distill(plan)
        drafter_ms = (time.perf_counter() - started_at) * 1e3 if drafters else 0.0
        num_layers = self.decoder.config.num_layers
        entries = {} if units.num_tokens and is_stopped() else going_back
        cursors = [cursor for _, job in entries.values() for cursor in job.cursors()]
        budget = math.ceil(sum(plan[job_id] for job_id in entries) * num_layers)
        max_rows = max(1, int(min(MAX_WINDOW_TOKENS, unit.backward * num_layers)))
        token_layers = 0
        try:
            token_layers = advance(self.decoder, self.cache, cursors, budget, max_rows, is_stopped)
        except (RuntimeError, MemoryError) as error:
            for job_id in entries:
                self._fail(job_id, error)
            entries = {}
        done = drafters | {job_id: entry for job_id, (entry, _) in entries.items()}
        events = [event for job_id, entry in done.items() if (event := self._finish(job_id, entry)) is not None]
        events += [
            TrainingEvent(job_id=job_id, lease=self._entries[job_id].lease, score=score)
            for job_id, score in self._evaluations.scores()
        ]
        events += self._failures
        self._failures = []
        return BackwardWork(
            num_tokens=token_layers / num_layers,
            events=tuple(events),
            drafter_tokens=drafter_tokens,
            drafter_ms=drafter_ms,
            units=units,
        )

    def _distill(self, plan: Mapping[str, float]) -> tuple[dict[str, _Entry], float]:
        """Let the plan's drafters learn; those that could, and what they did. One whose loss is not finite is closed."""
        entries, num_tokens = dict[str, _Entry](), 0.0
        for job_id, budget in plan.items():
            entry = self._entries.get(job_id)
            if entry is None or not isinstance(entry.job, DistillationJob) or not entry.job.is_forwarded:
                continue
            try:
                num_tokens += entry.job.advance(budget)
            except (TrainingDivergedError, RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            entries[job_id] = entry
        if entries:
            wait_for(self.decoder.device)
        return entries, num_tokens

    def _going_back(self, plan: Mapping[str, float]) -> dict[str, tuple[_Entry, FinetuneJob]]:
        """The plan's adapters that can go back; one whose loss is not finite is closed."""
        entries = {}
        for job_id in plan:
            entry = self._entries.get(job_id)
            if entry is None or not isinstance(entry.job, FinetuneJob) or not entry.job.is_forwarded:
                continue
            try:
                entry.job.cursors()
            except (TrainingDivergedError, RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            entries[job_id] = entry, entry.job
        return entries

    def _finish(self, job_id: str, entry: _Entry) -> TrainingEvent | None:
        """Free what a job's group held if it is through; its step, if that ended too."""
        try:
            result = entry.job.finish()
        except (TrainingDivergedError, RuntimeError, MemoryError) as error:
            self._fail(job_id, error)
            return None
        if result is None:
            return None
        self._pages.release(entry.table)
        entry.num_queued -= result.num_sequences
        if result.score is not None:
            return TrainingEvent(job_id=job_id, lease=entry.lease, score=result.score)
        if result.step is None:
            return None
        now = time.perf_counter()
        elapsed_ms, entry.step_started_at = (now - entry.step_started_at) * 1e3, now
        entry.steps.append(TrainingEvent(job_id=job_id, lease=entry.lease, step=result.step, elapsed_ms=elapsed_ms))
        return entry.steps[-1]

    def _fail(self, job_id: str, error: Exception) -> None:
        """Give a job up: its gradients may be half written."""
        entry = self._entries[job_id]
        self.close(job_id)
        self._failures.append(TrainingEvent(job_id=job_id, lease=entry.lease, failure=str(error) or type(error).__name__))

    def _current(self, entry: _Entry) -> tuple[TrainingSequence | LessonSequence, ...]:
        """The sequences in work, if pages for all of them could be had within training's share."""
        group: tuple[TrainingSequence | LessonSequence, ...] = entry.job.start_next(min(MAX_GROUP_ROWS, self.max_tokens))
        if all(len(sequence.slots_T) == sequence.num_rows for sequence in group):
            return group
        num_rows = sum(sequence.num_rows for sequence in group)
        if not self._try_reserve(entry.table, num_rows):
            return ()
        slots_T = torch.tensor(entry.table.slots(0, num_rows), dtype=torch.int64, device=self.decoder.device)
        for sequence, own_T in zip(group, torch.split(slots_T, [sequence.num_rows for sequence in group]), strict=True):
            sequence.slots_T = own_T
        return group

    def _try_reserve(self, table: PageTable, num_tokens: int) -> bool:
        missing = self._pages.missing(table, num_tokens)
        held = sum(len(entry.table.pages) for entry in self._entries.values()) + self._evaluations.num_pages
        if missing > self._pages.num_free or held + missing > MAX_POOL_SHARE * self._pages.num_pages:
            return False
        self._pages.reserve(table, num_tokens)
        return True


def _segment(entry: _Entry, sequence: TrainingSequence | LessonSequence, first_slot: int, num_rows: int) -> Segment:
    """The next rows of a sequence whose slots begin at `first_slot` of the job's."""
    start = sequence.num_forwarded
    end = start + num_rows
    return Segment(
        tokens=sequence.tokens[start:end],
        positions=range(start, end),
        context_slots=entry.table.slots(first_slot, first_slot + start),
        slots=entry.table.slots(first_slot + start, first_slot + end),
        adapter=entry.job.adapter,
        tape=sequence.tape,
        tape_start=start,
        dropout=sequence.dropout,
    )

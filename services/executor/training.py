"""The finetuning jobs inside an executor: which windows ride in the next pass, on whose pages. Knows no bus and no SLO."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.messages import EvaluationSlice, TrainingSlice
from services.executor.backward import advance
from services.executor.batch import Segment
from services.executor.evaluation import Evaluations, EvaluationWindow, Score
from services.executor.finetune import (
    MAX_GROUP_ROWS,
    FinetuneJob,
    OutOfOrderSliceError,
    StepResult,
    TrainingDivergedError,
)
from services.executor.finetune_share import JobView
from services.executor.model import Decoder, KvCache
from services.executor.pages import PageAllocator, PageTable
from services.executor.training_sequence import InvalidSliceError, TrainingSequence, check_slice, heads

MAX_POOL_SHARE = 0.25
"""Training sequences hold at most this share of the pages, so that inference is never starved of them."""
MAX_QUEUED_SLICES = 64
NUM_REMEMBERED_STEPS = 64
"""Steps of a job that can be told again: at least as many as a trainer has in flight."""


class TooManySlicesError(Exception):
    """The job's queue is full: send on when a step is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingEvent:
    """A finished optimizer step, an evaluated sequence, or (`failure`) the end of a job that cannot go on."""

    job_id: str
    lease: int
    step: StepResult | None = None
    elapsed_ms: float = 0.0
    score: Score | None = None
    failure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardWork:
    """What a backward pass did, in whole-model token equivalents, and the steps that it ended."""

    num_tokens: float = 0.0
    events: tuple[TrainingEvent, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Rows of a job's sequence that ride in one forward pass."""

    job_id: str
    sequence: TrainingSequence
    start: int
    segment: Segment


@dataclasses.dataclass(eq=False)
class _Entry:
    job: FinetuneJob
    lease: int
    table: PageTable
    num_queued: int = 0
    steps: deque[TrainingEvent] = dataclasses.field(default_factory=lambda: deque(maxlen=NUM_REMEMBERED_STEPS))
    step_started_at: float = dataclasses.field(default_factory=time.perf_counter)


class Training:
    """Jobs by id. A job holds pages for the sequences that it works on."""

    def __init__(self, decoder: Decoder, cache: KvCache, pages: PageAllocator) -> None:
        self.decoder = decoder
        self.cache = cache
        self._pages = pages
        self._entries: dict[str, _Entry] = {}
        self._failures: list[TrainingEvent] = []
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

    def held(self, job_id: str, lease: int) -> FinetuneJob | None:
        """The job, if it is open under this lease."""
        entry = self._entries.get(job_id)
        return entry.job if entry is not None and entry.lease == lease else None

    def last_steps(self, job_id: str) -> tuple[TrainingEvent, ...]:
        """A job's last steps, newest last; none of an unknown job."""
        entry = self._entries.get(job_id)
        return () if entry is None else tuple(entry.steps)

    def open(self, job: FinetuneJob, lease: int) -> None:
        """Hold a job, in place of what was held of it under an older lease."""
        self.close(job.job_id)
        self._entries[job.job_id] = _Entry(job, lease, self._pages.table())

    def close(self, job_id: str) -> None:
        """Forget a job and free its pages; unknown jobs are fine."""
        self._evaluations.close(job_id)
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
        if item.step != entry.job.step or entry.num_queued:
            raise OutOfOrderSliceError(f"an evaluation before step {item.step} came, but step {entry.job.step} is next")
        self._evaluations.accept(item, entry.job.adapter)

    def views(self) -> list[JobView]:
        """Jobs that can use the next iteration, for the scheduler."""
        views = []
        for job_id, entry in list(self._entries.items()):
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
                    )
                )
        return views + self._evaluations.views()

    def windows(self, forward: dict[str, int]) -> list[Window | EvaluationWindow]:
        """The windows of a plan's training tokens, a job's sequences one after another, then those of evaluations."""
        windows: list[Window | EvaluationWindow] = []
        for job_id, num_tokens in forward.items():
            if (entry := self._entries.get(job_id)) is None:
                continue
            first_slot = 0
            for sequence in self._current(entry):
                num_rows = min(num_tokens, sequence.num_rows - sequence.num_forwarded)
                if num_rows > 0:
                    segment = _segment(entry, sequence, first_slot, num_rows)
                    windows.append(Window(job_id=job_id, sequence=sequence, start=sequence.num_forwarded, segment=segment))
                    num_tokens -= num_rows
                first_slot += sequence.num_rows
        return windows + self._evaluations.windows(forward)

    def heads(self, windows: Sequence[Window | EvaluationWindow], hidden_TH: Tensor) -> None:
        """Losses and gradients of the windows that were forwarded, from the rows that they had in the pass."""
        parts = [(w.sequence, w.start, len(w.segment.tokens)) for w in windows if isinstance(w, Window)]
        evaluations = [window for window in windows if isinstance(window, EvaluationWindow)]
        num_training = sum(num_rows for _, _, num_rows in parts)
        try:
            if parts:
                heads(parts, hidden_TH[:num_training])
            if evaluations:
                self._evaluations.heads(evaluations, hidden_TH[num_training:])
        except (RuntimeError, MemoryError) as error:
            for job_id in {window.job_id for window in windows}:
                self._fail(job_id, error)

    def backward(self, plan: Mapping[str, float]) -> BackwardWork:
        """Go back through a plan's work, all jobs together; reports steps that end and jobs that fail, which are closed."""
        entries = self._going_back(plan)
        cursors = [cursor for entry in entries.values() for cursor in entry.job.cursors()]
        budget = math.ceil(sum(plan[job_id] for job_id in entries) * self.decoder.config.num_layers)
        token_layers = 0
        try:
            token_layers = advance(self.decoder, self.cache, cursors, budget)
        except (RuntimeError, MemoryError) as error:
            for job_id in entries:
                self._fail(job_id, error)
            entries = {}
        events = [event for job_id, entry in entries.items() if (event := self._finish(job_id, entry)) is not None]
        events += [
            TrainingEvent(job_id=job_id, lease=self._entries[job_id].lease, score=score)
            for job_id, score in self._evaluations.scores()
        ]
        events += self._failures
        self._failures = []
        return BackwardWork(num_tokens=token_layers / self.decoder.config.num_layers, events=tuple(events))

    def _going_back(self, plan: Mapping[str, float]) -> dict[str, _Entry]:
        """The plan's jobs that can go back; one whose loss is not finite is closed."""
        entries = {}
        for job_id in plan:
            entry = self._entries.get(job_id)
            if entry is None or not entry.job.is_forwarded:
                continue
            try:
                entry.job.cursors()
            except (TrainingDivergedError, RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            entries[job_id] = entry
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

    def _current(self, entry: _Entry) -> tuple[TrainingSequence, ...]:
        """The sequences in work, if pages for all of them could be had within training's share."""
        group = entry.job.start_next(min(MAX_GROUP_ROWS, self.max_tokens))
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


def _segment(entry: _Entry, sequence: TrainingSequence, first_slot: int, num_rows: int) -> Segment:
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

"""The finetuning jobs inside an executor: which windows ride in the next pass, on whose pages. Knows no bus and no SLO."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from common.messages import EvaluationSlice, TrainingSlice
from services.executor.batch import Segment
from services.executor.evaluation import Evaluations, EvaluationWindow, Score
from services.executor.finetune import FinetuneJob, OutOfOrderSliceError, StepResult, TrainingDivergedError
from services.executor.model import Decoder, KvCache
from services.executor.pages import PageAllocator, PageTable
from services.executor.scheduler import JobView
from services.executor.training_sequence import InvalidSliceError, TrainingSequence, check_slice, heads

MAX_POOL_SHARE = 0.25
"""Training sequences hold at most this share of the pages, so that inference is never starved of them."""
MAX_QUEUED_SLICES = 64


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
    step_started_at: float = dataclasses.field(default_factory=time.perf_counter)


class Training:
    """Jobs by id. A job holds pages for the one sequence that it works on."""

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
                sequence = self._current(entry)
            except (RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            if sequence is not None:
                left = sequence.num_rows - sequence.num_forwarded
                done = sequence.num_forwarded
                views.append(
                    JobView(job_id=job_id, forward_tokens=left, is_backward=sequence.is_forwarded, context_tokens=done)
                )
        return views + self._evaluations.views()

    def windows(self, forward: dict[str, int]) -> list[Window | EvaluationWindow]:
        """The windows of a plan's training tokens, then those of evaluations."""
        windows: list[Window | EvaluationWindow] = []
        for job_id, num_tokens in forward.items():
            if (entry := self._entries.get(job_id)) is None:
                continue
            sequence = self._current(entry)
            assert sequence is not None
            start = sequence.num_forwarded
            end = min(start + num_tokens, sequence.num_rows)
            segment = Segment(
                tokens=sequence.tokens[start:end],
                positions=range(start, end),
                context_slots=entry.table.slots(0, start),
                slots=entry.table.slots(start, end),
                adapter=entry.job.adapter,
                tape=sequence.tape,
                tape_start=start,
                dropout=sequence.dropout,
            )
            windows.append(Window(job_id=job_id, sequence=sequence, start=start, segment=segment))
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

    def backward(self, plan: dict[str, int]) -> BackwardWork:
        """Go back through a plan's share of each job; steps that end are reported, jobs that fail are closed and reported."""
        events: list[TrainingEvent] = []
        token_layers = 0
        for job_id, num_tokens in plan.items():
            entry = self._entries.get(job_id)
            if entry is None or entry.job.current is None or not entry.job.current.is_forwarded:
                continue
            try:
                result = entry.job.backward(num_tokens)
            except (TrainingDivergedError, RuntimeError, MemoryError) as error:
                self._fail(job_id, error)
                continue
            token_layers += result.num_token_layers
            if result.finished is not None:
                self._pages.release(entry.table)
                entry.num_queued -= 1
            if result.step is not None:
                now = time.perf_counter()
                elapsed_ms, entry.step_started_at = (now - entry.step_started_at) * 1e3, now
                events.append(TrainingEvent(job_id=job_id, lease=entry.lease, step=result.step, elapsed_ms=elapsed_ms))
        events += [
            TrainingEvent(job_id=job_id, lease=self._entries[job_id].lease, score=score)
            for job_id, score in self._evaluations.scores()
        ]
        events += self._failures
        self._failures = []
        return BackwardWork(num_tokens=token_layers / self.decoder.config.num_layers, events=tuple(events))

    def _fail(self, job_id: str, error: Exception) -> None:
        """Give a job up: its gradients may be half written."""
        entry = self._entries[job_id]
        self.close(job_id)
        self._failures.append(TrainingEvent(job_id=job_id, lease=entry.lease, failure=str(error) or type(error).__name__))

    def _current(self, entry: _Entry) -> TrainingSequence | None:
        """The sequence in work, if pages for all of it could be had within training's share."""
        sequence = entry.job.start_next()
        if sequence is None or len(sequence.slots_T) == sequence.num_rows:
            return sequence
        if not self._try_reserve(entry.table, sequence.num_rows):
            return None
        slots = entry.table.slots(0, sequence.num_rows)
        sequence.slots_T = torch.tensor(slots, dtype=torch.int64, device=self.decoder.device)
        return sequence

    def _try_reserve(self, table: PageTable, num_tokens: int) -> bool:
        missing = self._pages.missing(table, num_tokens)
        held = sum(len(entry.table.pages) for entry in self._entries.values()) + self._evaluations.num_pages
        if missing > self._pages.num_free or held + missing > MAX_POOL_SHARE * self._pages.num_pages:
            return False
        self._pages.reserve(table, num_tokens)
        return True

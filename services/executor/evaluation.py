"""Sequences that are scored under a job's adapter and change nothing: validation. Knows forward windows, no step and no bus."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.messages import EvaluationSlice
from kernels import ops
from services.executor.batch import Segment
from services.executor.finetune_share import JobView
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder
from services.executor.pages import PageAllocator, PageTable

SUFFIX = "/evaluation"
"""What a job is called in plans when its evaluation asks for rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What came out for slice `index`: summed loss and hits of its tokens that have a weight."""

    step: int
    index: int
    loss: float
    num_correct: int
    num_tokens: int


class EvaluationSequence:
    """A slice in work; `num_rows` ends before the last predicted token."""

    def __init__(self, item: EvaluationSlice) -> None:
        self.item = item
        self.num_rows = max((i for i, weight in enumerate(item.weights) if i and weight), default=0)
        self.num_forwarded = 0
        self._losses: list[float] = []
        self._num_correct = 0
        self.labels_T = torch.tensor(item.tokens[1 : self.num_rows + 1], dtype=torch.int64)
        self.weights_T = torch.tensor(item.weights[1 : self.num_rows + 1], dtype=torch.float32)

    def take(self, losses: Sequence[float], num_correct: int) -> None:
        """The next rows' results."""
        self._losses += losses
        self._num_correct += num_correct
        self.num_forwarded += len(losses)

    @property
    def score(self) -> Score:
        """Once all rows were forwarded."""
        num_tokens = sum(1 for weight in self.item.weights[1:] if weight)
        loss = math.fsum(self._losses)
        place = {"step": self.item.step, "index": self.item.index}
        return Score(**place, loss=loss, num_correct=self._num_correct, num_tokens=num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationWindow:
    """Rows of a sequence that ride in one forward pass."""

    job_id: str
    sequence: EvaluationSequence
    segment: Segment


@dataclasses.dataclass(eq=False)
class _Queue:
    adapter: LoraAdapter
    table: PageTable
    items: deque[EvaluationSlice] = dataclasses.field(default_factory=deque)
    current: EvaluationSequence | None = None


class Evaluations:
    """The evaluations of all jobs, one sequence of each at a time. `try_reserve` grows a table within training's share."""

    def __init__(self, decoder: Decoder, pages: PageAllocator, try_reserve: Callable[[PageTable, int], bool]) -> None:
        self._decoder, self._pages, self._try_reserve = decoder, pages, try_reserve
        self._queues: dict[str, _Queue] = {}
        self._scores: list[tuple[str, Score]] = []

    @property
    def has_work(self) -> bool:
        """Whether something is to be forwarded or told."""
        return any(queue.items or queue.current for queue in self._queues.values()) or bool(self._scores)

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return sum(len(queue.table.pages) for queue in self._queues.values())

    def num_queued(self, job_id: str) -> int:
        """Slices of a job that are not done."""
        queue = self._queues.get(job_id)
        return 0 if queue is None else len(queue.items) + (queue.current is not None)

    def accept(self, item: EvaluationSlice, trained: LoraAdapter) -> None:
        """Queue a slice; one that waits or is in work already is ignored."""
        queue = self._queues.get(item.job_id)
        if queue is None:
            adapter = LoraAdapter(trained.name, trained.spec, trained.weights)
            queue = self._queues[item.job_id] = _Queue(adapter, self._pages.table())
        waiting = [*queue.items, *([queue.current.item] if queue.current else [])]
        if (item.step, item.index) not in [(other.step, other.index) for other in waiting]:
            queue.items.append(item)

    def close(self, job_id: str) -> None:
        """Forget a job's evaluation."""
        queue = self._queues.pop(job_id, None)
        if queue is not None:
            self._pages.release(queue.table)
        self._scores = [(owner, score) for owner, score in self._scores if owner != job_id]

    def views(self) -> list[JobView]:
        """Evaluations that can use the next iteration, for the scheduler."""
        views = []
        for job_id, queue in self._queues.items():
            if (sequence := self._current(job_id, queue)) is not None:
                left, done = sequence.num_rows - sequence.num_forwarded, sequence.num_forwarded
                name = job_id + SUFFIX
                views.append(
                    JobView(job_id=name, forward_tokens=left, is_backward=False, context_tokens=done, is_evaluation=True)
                )
        return views

    def windows(self, forward: dict[str, int]) -> list[EvaluationWindow]:
        """The windows of a plan's rows for evaluations."""
        windows = []
        for name, num_tokens in forward.items():
            if not name.endswith(SUFFIX):
                continue
            job_id = name.removesuffix(SUFFIX)
            queue = self._queues[job_id]
            sequence = queue.current
            assert sequence is not None
            start = sequence.num_forwarded
            end = min(start + num_tokens, sequence.num_rows)
            segment = Segment(
                tokens=sequence.item.tokens[start:end],
                positions=range(start, end),
                context_slots=queue.table.slots(0, start),
                slots=queue.table.slots(start, end),
                adapter=queue.adapter,
            )
            windows.append(EvaluationWindow(job_id=job_id, sequence=sequence, segment=segment))
        return windows

    def heads(self, windows: Sequence[EvaluationWindow], hidden_TH: Tensor) -> None:
        """Losses of the windows, whose rows follow each other; no gradient is computed."""
        places = [
            (w.sequence, slice(w.sequence.num_forwarded, w.sequence.num_forwarded + len(w.segment.tokens))) for w in windows
        ]
        labels_T = torch.cat([sequence.labels_T[rows] for sequence, rows in places])
        weights_T = torch.cat([sequence.weights_T[rows] for sequence, rows in places])
        decoder = self._decoder
        normed_TH = ops.rms_norm(hidden_TH, decoder.final_norm_H, decoder.config.rms_norm_eps)
        loss_T, hits_T = ops.token_losses(normed_TH, decoder.head, labels_T, weights_T)
        losses, hits = loss_T.tolist(), hits_T.tolist()
        first = 0
        for window in windows:
            end = first + len(window.segment.tokens)
            window.sequence.take(losses[first:end], sum(hits[first:end]))
            first = end
            if window.sequence.num_forwarded == window.sequence.num_rows:
                self._finish(window.job_id)

    def scores(self) -> list[tuple[str, Score]]:
        """What was finished since this was last asked, by job."""
        scores, self._scores = self._scores, []
        return scores

    def _current(self, job_id: str, queue: _Queue) -> EvaluationSequence | None:
        while queue.current is None and queue.items:
            queue.current = EvaluationSequence(queue.items.popleft())
            if queue.current.num_rows == 0:
                self._finish(job_id)
        if queue.current is None or not self._try_reserve(queue.table, queue.current.num_rows):
            return None
        return queue.current

    def _finish(self, job_id: str) -> None:
        queue = self._queues[job_id]
        assert queue.current is not None
        self._scores.append((job_id, queue.current.score))
        queue.current = None
        self._pages.release(queue.table)
